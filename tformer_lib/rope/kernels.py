"""The ladder of rotations: plain PyTorch and the kernels of kernels/rope behind one operator."""

import ctypes

import torch
from torch import Tensor

from tformer_lib.contract import check_writable
from tformer_lib.ladder import (
    DTYPE_CODES,
    KERNEL_DTYPES,
    Ladder,
    accumulation_dtype,
    check_no_tangent,
    is_aligned,
    loadable,
    refusal_of_dtype,
    refusal_of_place,
)
from tformer_lib.rope.pairs import check_rotation, turn_pairs

LADDER = Ladder("rope", steps=("0", "1", "2"), fastest={"cuda": ("2", "1", "0")})
LOAD_BYTES = 16
LANES = 32  # of a warp: step 2 gives a row to one warp at most
GRADIENT_BLOCKS = 528  # partial sums of a norm weight's gradient: four for each of 132 multiprocessors


# --- the public doors ----------------------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str = "half", *, step: int | str | None = None) -> Tensor:
    """Turn each pair (a, b) of channels: (a cos - b sin, a sin + b cos). Computed in float32 or wider.

    Args:
        x: (batch, heads, T, head_dim), any strides.
        cos, sin: (T, rotary_dim / 2) or (batch, T, rotary_dim / 2), as `Rope` gives them.
        layout: "half" or "interleaved".
        step: 0, 1 or 2; the top one that can do it if not given.

    Returns:
        x's shape and dtype; channels from rotary_dim on are unchanged.

    Raises:
        ValueError: if the angles are of other positions, another batch or more channels than x has.
    """
    return rotate_both(x, None, cos, sin, layout, step=step)[0]


def rotate_both(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    layout: str = "half",
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    norm_eps: float | None = None,
    step: int | str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Turn queries and keys, on a GPU in one pass over both.

    Args:
        q: (batch, heads, T, head_dim), any strides.
        k: (batch, kv_heads, T, head_dim) of q's dtype and device, or None.
        cos, sin: (T, rotary_dim / 2) or (batch, T, rotary_dim / 2).
        layout: "half" or "interleaved".
        q_weight, k_weight: (head_dim,), the weights of an RMS norm over each head before the turn (Qwen3); without
            them such a norm has weights of 1.
        norm_eps: what that norm adds to the mean square; None: no norm.
        step: 0, 1 or 2; the top one that can do it if not given.

    Returns:
        q and k of their shapes and dtypes, laid out in memory as they were where those have no gaps.

    Raises:
        ValueError: the shapes, dtypes or devices do not fit, or the step cannot do what is asked.
    """
    check_both(q, k, cos, sin, layout, q_weight, k_weight, norm_eps)
    name = LADDER.name(step)
    if takes_formula(name, q, cos, sin):
        return (
            formula(q, cos, sin, layout, q_weight, norm_eps),
            None if k is None else formula(k, cos, sin, layout, k_weight, norm_eps),
        )
    check_no_tangent("this step of RoPE", q, k, cos, sin, q_weight, k_weight, instead="rotate with step=0")
    turned = torch.ops.tformer_lab.rope(
        q, k, cos, sin, None, None, 1.0, q_weight, k_weight, norm_eps, layout, False, name
    )
    return turned[0], None if k is None else turned[1]


def rotate_at_positions(
    q: Tensor,
    k: Tensor | None,
    positions: Tensor,
    frequencies: Tensor,
    layout: str = "half",
    *,
    factor: float = 1.0,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    norm_eps: float | None = None,
    step: int | str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same from positions: the kernel computes cosines and sines itself, which saves launches for few tokens.

    Args:
        positions: (T,) or (batch, T) integers.
        frequencies: (rotary_dim / 2,) float32, radians per position.
        factor: what cosines and sines are multiplied by.
    """
    angles = shape_of_angles(positions, frequencies)
    check_both(q, k, angles, angles, layout, q_weight, k_weight, norm_eps)
    name = LADDER.name(step)
    if takes_formula(name, q, frequencies, frequencies):
        cos, sin = angles_at(positions, frequencies, factor)
        return rotate_both(q, k, cos, sin, layout, q_weight=q_weight, k_weight=k_weight, norm_eps=norm_eps, step=step)
    check_no_tangent("this step of RoPE", q, k, frequencies, q_weight, k_weight, instead="rotate with step=0")
    turned = torch.ops.tformer_lab.rope(
        q, k, None, None, positions, frequencies, factor, q_weight, k_weight, norm_eps, layout, False, name
    )
    return turned[0], None if k is None else turned[1]


def rotate_both_(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    layout: str = "half",
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    norm_eps: float | None = None,
    step: int | str | None = None,
) -> None:
    """Turn queries and keys in place. Arguments as in :func:`rotate_both`.

    Raises:
        NotImplementedError: q or k wants a gradient, or has a derivative of another kind: here none passes.
    """
    check_both(q, k, cos, sin, layout, q_weight, k_weight, norm_eps)
    check_no_tangent("RoPE in place", q, k, cos, sin, q_weight, k_weight, instead="rotate with step=0")
    for name, x in (("q", q), ("k", k)):
        if x is not None:
            check_writable(name, x)
            check_no_gradient(name, x)
    torch.ops.tformer_lab.rope_(q, k, cos, sin, q_weight, k_weight, norm_eps, layout, LADDER.name(step))


def check_no_gradient(name: str, x: Tensor) -> None:
    """Refuse to turn in place what wants a gradient, which would pass as if nothing had been turned."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise NotImplementedError(f"RoPE in place has no gradient, and {name} wants one: use rotate_both")


def check_both(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    layout: str,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm_eps: float | None,
) -> None:
    """Refuse what does not fit together."""
    check_rotation(q, cos, sin, layout)
    if k is not None:
        check_rotation(k, cos, sin, layout)
        if (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
            raise ValueError(
                f"q and k must agree in batch, tokens and head_dim, got {tuple(q.shape)} and {tuple(k.shape)}"
            )
        if (k.dtype, k.device) != (q.dtype, q.device):
            raise ValueError(
                f"q and k must share dtype and device, got {q.dtype} on {q.device} and {k.dtype} on {k.device}"
            )
    for weight in (q_weight, k_weight):
        if weight is None:
            continue
        if norm_eps is None:
            raise ValueError("weights of a norm were given without its norm_eps")
        if weight.shape != q.shape[-1:]:
            raise ValueError(f"a norm's weight must be ({q.shape[-1]},), got {tuple(weight.shape)}")
        if weight.device != q.device or not weight.is_floating_point():
            raise ValueError(f"a norm's weight must be floats on {q.device}, got {weight.dtype} on {weight.device}")


def shape_of_angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """A tensor of the shape that the angles have, ([batch,] T, pairs), and of the frequencies' dtype and device."""
    if positions.is_floating_point() or positions.dtype == torch.bool or positions.dim() not in (1, 2):
        raise ValueError(f"positions must be ([batch,] T) integers, got {tuple(positions.shape)} of {positions.dtype}")
    if frequencies.dim() != 1 or frequencies.device != positions.device:
        raise ValueError(
            f"frequencies must be (pairs,) on {positions.device}, where positions are, got "
            f"{tuple(frequencies.shape)} on {frequencies.device}"
        )
    return frequencies.expand(*positions.shape, -1)


def check_operator(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    frequencies: Tensor | None,
    layout: str,
    weights: tuple[Tensor | None, Tensor | None],
    norm_eps: float | None,
) -> None:
    """Refuse what a kernel would follow out of its tensors, from whoever calls the operator."""
    if positions is not None:
        cos = sin = shape_of_angles(positions, frequencies)
    check_both(q, k, cos, sin, layout, *weights, norm_eps)


def takes_formula(step: str, q: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether plain PyTorch answers, which differentiates twice and knows gradients of the angles too."""
    if step == "0":
        return True
    return step == "auto" and (not q.is_cuda or q.dtype not in KERNEL_DTYPES or cos.requires_grad or sin.requires_grad)


# --- step 0 --------------------------------------------------------------------------------------------------------


def formula(x: Tensor, cos: Tensor, sin: Tensor, layout: str, weight: Tensor | None, norm_eps: float | None) -> Tensor:
    """Norm and turn in plain PyTorch, rounded to x's dtype once."""
    if norm_eps is None:
        return turn_pairs(x, cos, sin, layout)
    wide = x.to(accumulation_dtype(x))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm_eps)
    return turn_pairs(wide if weight is None else wide * weight, cos, sin, layout).to(x.dtype)


def angles_at(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines ([batch,] T, pairs), float32."""
    angles = positions[..., None].float() * frequencies
    return angles.cos() * factor, angles.sin() * factor


# --- which step ----------------------------------------------------------------------------------------------------


def refusal(step: str, tensors: list[Tensor], rotary_dim: int) -> str | None:
    """Why ``step`` cannot turn these (batch, heads, T, head_dim) tensors, or None if it can."""
    x = tensors[0]
    if step == "0":
        return None
    if reason := refusal_of_place(step, x) or refusal_of_dtype(x):
        return reason
    if step == "1":
        return None
    vectors = 2 * LOAD_BYTES // x.element_size()  # numbers in the two vectors of a lane
    if x.shape[-1] % vectors or rotary_dim % vectors or x.shape[-1] > LANES * vectors:
        return (
            f"two 16-byte vectors a lane need a head_dim and a rotary_dim that {vectors} divides, up to "
            f"{LANES * vectors}, got {x.shape[-1]} and {rotary_dim}"
        )
    readable = all(t.stride(-1) == 1 and is_aligned(t, LOAD_BYTES) for t in tensors)
    return None if readable else "16-byte loads need adjacent columns and aligned rows"


# --- the kernels ---------------------------------------------------------------------------------------------------


class Matrix(ctypes.Structure):
    """``rope::Matrix`` of kernels/rope/arguments.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "head", "row", "column")),
    ]


class Table(ctypes.Structure):
    """``rope::Table``."""

    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("row", ctypes.c_int64)]


class Side(ctypes.Structure):
    """``rope::Side``."""

    _fields_ = [
        *((name, Matrix) for name in ("x", "out", "dout")),
        ("weight", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("weight_is_float", ctypes.c_int32),
        ("normalised", ctypes.c_int32),
    ]


class Arguments(ctypes.Structure):
    """``rope::Arguments``, in the same order."""

    _fields_ = [
        ("q", Side),
        ("k", Side),
        *((name, Table) for name in ("cos", "sin", "positions")),
        ("frequencies", ctypes.c_void_p),
        ("weight_sums", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "head_dim", "rotary_dim", "blocks")),
        *((name, ctypes.c_float) for name in ("factor", "eps", "sign")),
        ("interleaved", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    ]


class Angles:
    """Cosines and sines as the operators take them: tabled, or to be computed from positions and frequencies."""

    def __init__(
        self,
        cos: Tensor | None,
        sin: Tensor | None,
        positions: Tensor | None,
        frequencies: Tensor | None,
        factor: float,
    ):
        self.tabled = positions is None
        self.factor = factor
        if self.tabled:
            self.cos, self.sin = (loadable(t.float(), aligned=True) for t in (cos, sin))
            self.pairs = cos.shape[-1]
        else:
            self.positions, self.frequencies = positions.long(), frequencies.float().contiguous()
            self.pairs = frequencies.shape[0]

    def tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines as tensors, for step 0."""
        return (self.cos, self.sin) if self.tabled else angles_at(self.positions, self.frequencies, self.factor)

    def fill(self, arguments: Arguments) -> None:
        """Hand them to a kernel."""
        arguments.rotary_dim = 2 * self.pairs
        if self.tabled:
            arguments.cos, arguments.sin = table(self.cos, 2), table(self.sin, 2)
        else:
            arguments.positions, arguments.frequencies = table(self.positions, 1), self.frequencies.data_ptr()
            arguments.factor = self.factor


def table(x: Tensor, dims: int) -> Table:
    """([batch,] T, ...) numbers of each token as a kernel sees them."""
    batched = x.dim() > dims and x.shape[0] > 1
    return Table(x.data_ptr(), x.stride(0) if batched else 0, x.stride(-dims))


def side(x: Tensor, out: Tensor, weight: Tensor | None, norm_eps: float | None, dout: Tensor | None = None) -> Side:
    """Queries or keys as a kernel sees them."""
    description = Side(x=matrix(x), out=matrix(out), heads=x.shape[1], normalised=norm_eps is not None)
    if dout is not None:
        description.dout = matrix(dout)
    if weight is not None:
        description.weight, description.weight_is_float = weight.data_ptr(), weight.dtype == torch.float32
    return description


def matrix(x: Tensor) -> Matrix:
    """A (batch, heads, T, head_dim) tensor as a kernel sees it."""
    return Matrix(x.data_ptr(), *x.stride())


def ready_weight(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """A norm's weight in a dtype that the kernels read: x's or float32."""
    if weight is None:
        return None
    return (weight if weight.dtype in (x.dtype, torch.float32) else weight.float()).contiguous()


def common_arguments(q: Tensor, angles: Angles, layout: str, norm_eps: float | None, inverse: bool) -> Arguments:
    """What the forward and the backward kernels need alike."""
    arguments = Arguments(eps=norm_eps or 0.0, sign=-1.0 if inverse else 1.0, interleaved=layout == "interleaved")
    arguments.batch, _, arguments.tokens, arguments.head_dim = q.shape
    arguments.dtype = DTYPE_CODES[q.dtype]
    angles.fill(arguments)
    return arguments


def run(
    step: str,
    sides: list[tuple[Tensor, Tensor, Tensor | None]],
    angles: Angles,
    norm_eps: float | None,
    layout: str,
    inverse: bool,
) -> None:
    """Turn each side's x into its out; a side is (x, out, weight)."""
    q = sides[0][0]
    chosen = LADDER.choose(
        step, q.device, lambda name: refusal(name, [x for s in sides for x in s[:2]], 2 * angles.pairs)
    )
    if chosen == "0":
        cos, sin = angles.tables()
        for x, out, weight in sides:
            out.copy_(formula(x, cos, -sin if inverse else sin, layout, weight, norm_eps))
        return
    sides = [(x, out, ready_weight(weight, x)) for x, out, weight in sides]
    arguments = common_arguments(q, angles, layout, norm_eps, inverse)
    arguments.q = side(*sides[0], norm_eps)
    if len(sides) > 1:
        arguments.k = side(*sides[1], norm_eps)
    if q.shape[0] * q.shape[2] and sum(x.numel() for x, _, _ in sides):
        LADDER.launch(chosen, "forward", arguments, q.device)


# --- the operators -------------------------------------------------------------------------------------------------


@torch.library.custom_op("tformer_lab::rope", mutates_args=())
def rope_op(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    frequencies: Tensor | None,
    factor: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm_eps: float | None,
    layout: str,
    inverse: bool,
    step: str,
) -> tuple[Tensor, Tensor]:
    """The operator behind the public doors. ``inverse`` turns back; without k the second result is empty."""
    check_operator(q, k, cos, sin, positions, frequencies, layout, (q_weight, k_weight), norm_eps)
    out = rope_fake(q, k)
    sides = [(q, out[0], q_weight)] + ([] if k is None else [(k, out[1], k_weight)])
    run(step, sides, Angles(cos, sin, positions, frequencies, factor), norm_eps, layout, inverse)
    return out


@rope_op.register_fake
def rope_fake(q: Tensor, k: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    """The shapes, dtypes and strides of what the operator returns."""
    return torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k)


@torch.library.custom_op("tformer_lab::rope_", mutates_args={"q", "k"})
def rope_inplace_op(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm_eps: float | None,
    layout: str,
    step: str,
) -> None:
    """The same in place."""
    check_operator(q, k, cos, sin, None, None, layout, (q_weight, k_weight), norm_eps)
    sides = [(q, q, q_weight)] + ([] if k is None else [(k, k, k_weight)])
    run(step, sides, Angles(cos, sin, None, None, 1.0), norm_eps, layout, False)


@torch.library.custom_op("tformer_lab::rope_norm_backward", mutates_args=())
def rope_norm_backward_op(
    dq_out: Tensor,
    dk_out: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    frequencies: Tensor | None,
    factor: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    norm_eps: float,
    layout: str,
    inverse: bool,
    step: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, of k (empty without it) and of both weights, (2, head_dim) float32."""
    check_operator(q, k, cos, sin, positions, frequencies, layout, (q_weight, k_weight), norm_eps)
    if dq_out.shape != q.shape or (k is not None and dk_out.shape != k.shape):
        raise ValueError(
            f"a gradient must have the shape of what it is of, got {tuple(dq_out.shape)} of {tuple(q.shape)}"
        )
    angles = Angles(cos, sin, positions, frequencies, factor)
    sides = [(q, dq_out, q_weight)] + ([] if k is None else [(k, dk_out, k_weight)])
    grads = [torch.empty_like(x) for x, _, _ in sides]
    tensors = [t for (x, dout, _), dx in zip(sides, grads, strict=True) for t in (x, dout, dx)]
    chosen = LADDER.choose(step, q.device, lambda name: refusal(name, tensors, 2 * angles.pairs))
    if chosen == "0":
        weights = norm_gradients(sides, grads, angles, norm_eps, layout, inverse)
    else:
        weights = launch_norm_gradients(chosen, sides, grads, angles, norm_eps, layout, inverse)
    return grads[0], grads[1] if len(grads) > 1 else q.new_empty(0), weights


@rope_norm_backward_op.register_fake
def rope_norm_backward_fake(dq_out, dk_out, q, k, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes and dtypes of the gradients."""
    weights = q.new_empty(2, q.shape[-1], dtype=accumulation_dtype(q))
    return torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k), weights


def norm_gradients(
    sides: list[tuple[Tensor, Tensor, Tensor | None]],
    grads: list[Tensor],
    angles: Angles,
    norm_eps: float,
    layout: str,
    inverse: bool,
) -> Tensor:
    """Step 0: y = x r w with r = 1 / rms(x), and g, the gradient of y, is dout turned back.

    dw = sum of g x r over rows, dx = r g w - x r^3 mean(g w x).
    """
    cos, sin = angles.tables()
    weights = []
    for (x, dout, weight), dx in zip(sides, grads, strict=True):
        wide = x.to(accumulation_dtype(x))
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm_eps)
        g = turn_pairs(dout.to(wide.dtype), cos, sin if inverse else -sin, layout)
        weights.append((g * wide * r).sum((0, 1, 2)))
        g = g if weight is None else g * weight
        dx.copy_(r * g - wide * r**3 * (g * wide).mean(-1, keepdim=True))
    return torch.stack(weights if len(weights) == 2 else [*weights, torch.zeros_like(weights[0])])


def launch_norm_gradients(
    step: str,
    sides: list[tuple[Tensor, Tensor, Tensor | None]],
    grads: list[Tensor],
    angles: Angles,
    norm_eps: float,
    layout: str,
    inverse: bool,
) -> Tensor:
    """A kernel's gradients, the weights' summed over its blocks."""
    q = sides[0][0]
    arguments = common_arguments(q, angles, layout, norm_eps, not inverse)
    sums = q.new_zeros(GRADIENT_BLOCKS, 2, q.shape[-1], dtype=torch.float32)
    arguments.weight_sums, arguments.blocks = sums.data_ptr(), GRADIENT_BLOCKS
    described, kept = [], []
    for (x, dout, weight), dx in zip(sides, grads, strict=True):
        kept.append(ready_weight(weight, x))  # until the launch
        described.append(side(x, dx, kept[-1], norm_eps, dout))
    arguments.q = described[0]
    if len(described) > 1:
        arguments.k = described[1]
    if q.shape[0] * q.shape[2]:
        LADDER.launch(step, "backward", arguments, q.device)
    return sums.sum(0)


def save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Keep the angles, and with a norm its inputs."""
    q, k, cos, sin, positions, frequencies, factor, q_weight, k_weight, norm_eps, layout, inverse, step = inputs
    normed = (q, k, q_weight, k_weight) if norm_eps is not None else (None,) * 4
    ctx.save_for_backward(cos, sin, positions, frequencies, *normed)
    ctx.has_k = k is not None
    ctx.options = factor, norm_eps, layout, inverse, step


def backward(ctx, dq_out: Tensor, dk_out: Tensor) -> tuple:
    """A rotation's gradient turns back: R is orthogonal but for a factor, so its transpose has the sines negated."""
    *angles, q, k, q_weight, k_weight = ctx.saved_tensors
    factor, norm_eps, layout, inverse, step = ctx.options
    dk_out = dk_out if ctx.has_k else None
    step = "auto" if step == "2" else step  # a gradient may be laid out as step 2 cannot read it
    if norm_eps is None:
        dq, dk = torch.ops.tformer_lab.rope(
            dq_out, dk_out, *angles, factor, None, None, None, layout, not inverse, step
        )
        return dq, dk if ctx.has_k else None, *(None for _ in range(11))
    dq, dk, dw = torch.ops.tformer_lab.rope_norm_backward(
        dq_out, dk_out, q, k, *angles, factor, q_weight, k_weight, norm_eps, layout, inverse, step
    )
    dw_q, dw_k = (None if w is None else g.to(w.dtype) for w, g in zip((q_weight, k_weight), dw, strict=True))
    return dq, dk if ctx.has_k else None, *(None for _ in range(5)), dw_q, dw_k, *(None for _ in range(4))


rope_op.register_autograd(backward, setup_context=save_for_backward)
