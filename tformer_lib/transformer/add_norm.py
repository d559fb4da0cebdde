"""A residual sum and the norm that follows it, by one kernel forward and one backward.

Between two matrix multiplications a pre-norm model adds a branch to the residual stream and normalises the sum. What
a compiler makes of these steps moves the stream several times: the normalised numbers are kept in float32 for the
backward pass beside the sum, and the gradient of the sum is written in float32 for the stream, then read again to be
rounded for the branch. By one kernel, for each number of a stream of 4 bytes with a branch of 2:

- forward reads the stream and the branch, and writes the sum and its norm: 4 + 2 + 4 + 2 = 12 bytes. What the backward
  pass needs beside the sum is the mean and the deviation of each row.
- backward reads the sum and both gradients, and writes the stream's gradient and the branch's: 4 + 4 + 2 + 4 + 2 = 16.

Ledger (GPT-2's 124M, 32,768 tokens a step, 23 such pairs; one H200)
  before      torch.compile moves 12 to 22 bytes forward (it keeps the normalised numbers, and adds up to four branches
              anew each time), 0.094 ms on average; backward 14 and then 6 for the rounding, 0.088 + 0.035 ms
  predicted   0.072 and 0.095 ms at the rate of a copy, 4.2 TB/s: 1.2 ms less in a step of 58
  measured    0.073 and 0.116 ms: 0.8 ms less, 58.4 became 57.6. Backward moves 3.5 TB/s; perhaps a program waits for
              its row's sums before it asks for the next row. With 46 operators more, the host is part of the time

A stream in bfloat16 (``residual_in_fp32=False``) needs 8 bytes forward and 8 backward, where one gradient serves both:
1.5 ms less in that step by the bytes. A whole step with it has not been measured.

The gradient of the gains is summed over a program's rows in registers, and over the programs by a second, small sum.
"""

import torch
from torch import Tensor, nn

from tformer_lib.contract import product_dtype
from tformer_lib.ladder import accumulation_dtype

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

constexpr = object if triton is None else tl.constexpr  # known when the kernel is compiled
WARPS = 4
PROGRAMS_PER_MULTIPROCESSOR = 16
"""Programs of the backward kernel. Its 78 registers let 6 of them stand on a multiprocessor; the others follow."""
MOST_WIDTH = 8192
"""A program holds a whole row in registers."""


def add_norm(x: Tensor, branch: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x + branch, and the norm of it.

    Args:
        x: (..., width), the residual stream.
        branch: x's shape, in its dtype or a narrower one.
        norm: ``nn.LayerNorm`` without a bias, or ``nn.RMSNorm``, over the last dimension; see :func:`can_fuse`.

    Returns:
        The sum in x's dtype, and its norm: in the dtype of matrix products under autocast, else in x's.
    """
    dtype = product_dtype(x)
    centred, eps = isinstance(norm, nn.LayerNorm), norm.eps
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return torch.ops.tformer_lab.add_norm(x, branch, norm.weight, eps, centred, dtype)[:2]


def can_fuse(norm: nn.Module) -> bool:
    """Whether :func:`add_norm` can take a norm: it has gains and no bias."""
    if type(norm) not in (nn.LayerNorm, nn.RMSNorm) or len(norm.normalized_shape) != 1 or norm.weight is None:
        return False
    return getattr(norm, "bias", None) is None and norm.normalized_shape[0] <= MOST_WIDTH


# --- the operators -------------------------------------------------------------------------------------------------


@torch.library.custom_op("tformer_lab::add_norm", mutates_args=())
def add_norm_op(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, centred: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, its norm in ``dtype``, and each row's mean (zero unless ``centred``) and reciprocal deviation."""
    check_operands(x, branch, weight)
    if runs_in_triton(x):
        return add_norm_in_triton(x, branch, weight, eps, centred, dtype)
    total = x + branch
    wide = total.to(accumulation_dtype(x))
    mean = wide.mean(-1) if centred else wide.new_zeros(wide.shape[:-1])
    apart = wide - mean[..., None]
    scale = (apart.square().mean(-1) + eps).rsqrt()
    normed = (apart * scale[..., None] * weight.to(wide.dtype)).to(dtype)
    return total.contiguous(), normed.contiguous(), mean, scale


@add_norm_op.register_fake
def add_norm_fake(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, centred: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The shapes and dtypes of what the operator returns."""
    mean, scale = (x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x)) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), mean, scale


@torch.library.custom_op("tformer_lab::add_norm_backward", mutates_args=())
def add_norm_backward_op(
    d_total: Tensor,
    d_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    centred: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the branch (the same, in ``dtype``) and of the gains.

    Where x has that dtype too, the branch's is empty: x's serves for both.
    """
    check_operands(total, d_total, weight)
    check_operands(total, d_normed, weight)
    if runs_in_triton(total):
        return add_norm_backward_in_triton(d_total, d_normed, total, weight, mean, scale, centred, dtype)
    wide = accumulation_dtype(total)
    apart = (total.to(wide) - mean[..., None]) * scale[..., None]
    given = d_normed.to(wide)
    g = given * weight.to(wide)
    rest = g - apart * (g * apart).mean(-1, keepdim=True) - (g.mean(-1, keepdim=True) if centred else 0)
    dx = (rest * scale[..., None] + d_total.to(wide)).to(total.dtype)
    d_weight = (given * apart).flatten(0, -2).sum(0).to(weight.dtype)
    d_branch = dx.new_empty(0) if dtype == dx.dtype else dx.to(dtype).contiguous()
    return dx.contiguous(), d_branch, d_weight


@add_norm_backward_op.register_fake
def add_norm_backward_fake(
    d_total: Tensor,
    d_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    centred: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes and dtypes of the gradients."""
    shape = (0,) if dtype == total.dtype else total.shape
    return total.new_empty(total.shape), total.new_empty(shape, dtype=dtype), torch.empty_like(weight)


def check_operands(x: Tensor, other: Tensor, weight: Tensor) -> None:
    """Refuse what the kernels cannot index."""
    if other.shape != x.shape or weight.shape != x.shape[-1:]:
        shapes = ", ".join(str(tuple(y.shape)) for y in (x, other, weight))
        raise ValueError(f"expected two tensors (..., width) and gains (width,), got {shapes}")
    if other.device != x.device or weight.device != x.device:
        raise ValueError(f"tensors must be on one device, got {x.device}, {other.device} and {weight.device}")


def save_for_backward(ctx, inputs: tuple, output: tuple) -> None:
    """The sum and each row's two numbers; not the normalised numbers, which follow from them."""
    _, branch, weight, _, ctx.centred, _ = inputs
    total, _, mean, scale = output
    ctx.save_for_backward(total, weight, mean, scale)
    ctx.branch_dtype = branch.dtype


def backward(ctx, d_total: Tensor, d_normed: Tensor, *_) -> tuple:
    """The gradients of x, branch and weight."""
    total, weight, mean, scale = ctx.saved_tensors
    given = d_total, d_normed, total, weight, mean, scale, ctx.centred, ctx.branch_dtype
    dx, d_branch, d_weight = torch.ops.tformer_lab.add_norm_backward(*given)
    return dx, dx if ctx.branch_dtype == total.dtype else d_branch, d_weight, None, None, None


add_norm_op.register_autograd(backward, setup_context=save_for_backward)


# --- the kernels ---------------------------------------------------------------------------------------------------


def sum_and_norm_kernel(
    x, branch, weight, total, normed, means, scales, eps, W: constexpr, BLOCK: constexpr, CENTRED: constexpr
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < W
    here = row * W + columns
    t = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    t += tl.load(branch + here, mask=inside, other=0.0).to(tl.float32)
    t = t.to(total.dtype.element_ty).to(tl.float32)  # as it is stored
    tl.store(total + here, t.to(total.dtype.element_ty), mask=inside)
    mean = 0.0
    if CENTRED:
        mean = tl.sum(t, 0) / W
    apart = tl.where(inside, t - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(apart * apart, 0) / W + eps)
    gains = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + here, (apart * scale * gains).to(normed.dtype.element_ty), mask=inside)
    tl.store(means + row, mean)
    tl.store(scales + row, scale)


def gradients_kernel(
    d_total, d_normed, total, weight, means, scales, dx, d_branch, d_weights, rows, programs,
    W: constexpr, BLOCK: constexpr, CENTRED: constexpr, TWO_TYPES: constexpr,
):  # fmt: skip
    """Every ``programs``-th row; their part of the gains' gradient, (programs, W), at the end."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < W
    gains = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    d_gains = tl.zeros([BLOCK], tl.float32)
    for row in range(program, rows, programs):
        here = row * W + columns
        t = tl.load(total + here, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(d_normed + here, mask=inside, other=0.0).to(tl.float32)
        above = tl.load(d_total + here, mask=inside, other=0.0).to(tl.float32)
        mean, scale = tl.load(means + row), tl.load(scales + row)
        apart = tl.where(inside, (t - mean) * scale, 0.0)
        g = given * gains
        rest = g - apart * (tl.sum(g * apart, 0) / W)
        if CENTRED:
            rest -= tl.sum(g, 0) / W
        d = (rest * scale + above).to(dx.dtype.element_ty)
        tl.store(dx + here, d, mask=inside)
        if TWO_TYPES:
            tl.store(d_branch + here, d.to(d_branch.dtype.element_ty), mask=inside)
        d_gains += given * apart
    tl.store(d_weights + program * W + columns, d_gains, mask=inside)


FORWARD, BACKWARD = (triton.jit(k) if triton is not None else None for k in (sum_and_norm_kernel, gradients_kernel))


def runs_in_triton(x: Tensor) -> bool:
    """Whether the kernels take it: on a GPU, in a type of up to 32 bits, where Triton is installed."""
    return triton is not None and x.is_cuda and x.dtype != torch.float64 and x.numel() > 0


def add_norm_in_triton(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, centred: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the operator returns."""
    width, x, branch, weight = x.shape[-1], x.contiguous(), branch.contiguous(), weight.contiguous()
    outputs = add_norm_fake(x, branch, weight, eps, centred, dtype)
    options = {"W": width, "BLOCK": 1 << (width - 1).bit_length(), "CENTRED": centred, "num_warps": WARPS}
    with torch.cuda.device_of(x):
        FORWARD[(x.numel() // width,)](x, branch, weight, *outputs, eps, **options)
    return outputs


def add_norm_backward_in_triton(
    d_total: Tensor,
    d_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    centred: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that the operator returns."""
    given = [y.contiguous() for y in (d_total, d_normed, total, weight, mean, scale)]
    width, dx, two_types = total.shape[-1], total.new_empty(total.shape), dtype != total.dtype
    d_branch = total.new_empty(total.shape if two_types else 0, dtype=dtype)
    rows, programs = total.numel() // width, min(total.numel() // width, programs_of(total.device))
    parts = total.new_empty(programs, width, dtype=torch.float32)
    options = {"W": width, "BLOCK": 1 << (width - 1).bit_length(), "CENTRED": centred, "TWO_TYPES": two_types}
    with torch.cuda.device_of(total):
        BACKWARD[(programs,)](*given, dx, d_branch, parts, rows, programs, num_warps=WARPS, **options)
    return dx, d_branch, parts.sum(0).to(weight.dtype)


def programs_of(device: torch.device) -> int:
    """How many programs of the backward kernel share the rows."""
    if device.type != "cuda":
        return 4
    return PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
