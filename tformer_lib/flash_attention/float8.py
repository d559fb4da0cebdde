"""Flash attention in float8: e4m3 numbers with a scale a head, at twice the rate of the tensor cores.

A forward alone. The caller rounds q, k and v: :func:`quantize_float8` gives each head the scale at which its largest
number is the largest of e4m3. :func:`hadamard_rotation` is a rotation of q and k that spreads outliers over all columns
before that, and leaves every score as it was.
"""

import math

import torch
from torch import Tensor

from tformer_lib.contract import check_shapes, score_scale
from tformer_lib.flash_attention.checks import Window, check_options
from tformer_lib.flash_attention.kernels import LADDER, arguments_of, matrix
from tformer_lib.flash_attention.options import Options, options_of
from tformer_lib.flash_attention.reference import tiled_forward
from tformer_lib.ladder import FP8, counters, is_aligned, refusal_of_hopper, wants_gradients

LARGEST = torch.finfo(FP8).max  # 448
STEPS = ("0", "float8")


def flash_attention_float8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: Window = None,
    step: int | str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q times its scale over k and v times theirs; probabilities are rounded to e4m3 on their way to v.

    Args:
        q: (batch, heads, T, head_dim) float8_e4m3fn.
        k, v: (batch, kv_heads, S, head_dim) float8_e4m3fn; kv_heads divides heads.
        q_scale: (heads,) float32, positive.
        k_scale, v_scale: (kv_heads,) float32, positive.
        causal, scale, window, return_lse: see :func:`flash_attention`.
        step: 0, plain PyTorch in float32; "float8", the kernel (float8.cu; a Hopper GPU, head_dim a multiple of 16 up
            to 128); the kernel where it can be used if not given.

    Returns:
        out (batch, heads, T, head_dim) bfloat16, and with ``return_lse`` lse (batch, heads, T) float32.

    Raises:
        ValueError: the inputs do not fit one another, or the step cannot do what is asked.
    """
    check_float8(q, k, v, {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale})
    check_options(q, window)
    options = options_of(causal, float(score_scale(scale, q.shape[-1])), window)
    reason = refusal(q, k, v, options)
    if step == "float8" and reason:
        raise ValueError(f"step float8 cannot do this: {reason}")
    if step not in (None, 0, "0", "float8"):
        raise ValueError(f"step must be one of {', '.join(STEPS)}, got {step!r}")
    if step in (0, "0") or reason:
        wide = (x.float() * s[:, None, None] for x, s in ((q, q_scale), (k, k_scale), (v, v_scale)))
        out, lse = tiled_forward(*wide, options)
        out = out.bfloat16()
    else:
        out, lse = run(q, k, v, (q_scale, k_scale, v_scale), options)
    return (out, lse) if return_lse else out


def run(q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, ...], options: Options) -> tuple[Tensor, Tensor]:
    """Call the kernel."""
    out = torch.empty(q.shape, device=q.device, dtype=torch.bfloat16)
    lse = torch.empty(q.shape[:3], device=q.device)
    if 0 in (q.numel(), k.numel()):
        return out.zero_(), lse.fill_(-math.inf)
    arguments = arguments_of(q, k, v, options)
    arguments.out, arguments.lse = matrix(out), lse.data_ptr()
    scales = [x.contiguous() for x in scales]  # alive until the launch
    arguments.q_scale, arguments.k_scale, arguments.v_scale = (x.data_ptr() for x in scales)
    dealt = counters(q.device)  # alive until the launch
    arguments.dealt = dealt.data_ptr()
    LADDER.launch("float8", "forward", arguments, q.device)
    del dealt
    return out, lse


def refusal(q: Tensor, k: Tensor, v: Tensor, options: Options) -> str | None:
    """Why the kernel cannot do this, or None if it can."""
    if not q.is_cuda:
        return f"it runs on cuda, the tensors are on {q.device.type}"
    if reason := refusal_of_hopper(q.device):
        return reason
    if q.shape[-1] > 128 or q.shape[-1] % 16:
        return f"head_dim must be a multiple of 16 up to 128, got {q.shape[-1]}"
    if options.scale <= 0:
        return f"scale must be positive, got {options.scale}"
    if not all(x.stride(-1) == 1 and is_aligned(x) for x in (q, k, v)):
        return "the rows of q, k and v must begin at multiples of 16 bytes"
    return None


def check_float8(q: Tensor, k: Tensor, v: Tensor, scales: dict[str, Tensor]) -> None:
    """Refuse inputs that are no float8 tensors with a scale a head."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dtype != FP8:
            came = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a float8_e4m3fn tensor, got {came}")
        if x.device != q.device:
            raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    check_shapes(q, k, v)
    if v.shape[-1] != q.shape[-1]:
        raise ValueError(f"v must have q's head_dim {q.shape[-1]}, got {v.shape[-1]}")
    for (name, x), heads in zip(scales.items(), (q.shape[1], k.shape[1], k.shape[1]), strict=True):
        if x.shape != (heads,) or x.dtype != torch.float32 or x.device != q.device:
            came = f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
            raise ValueError(f"{name} must be float32 of shape ({heads},) on {q.device}, got {came}")
    if wants_gradients(*scales.values()):
        raise ValueError("flash attention in float8 has no gradients")


def quantize_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, heads, n, d) as float8_e4m3fn, and the scale (heads,) float32 of each head: x is nearly their product.

    The largest magnitude of a head becomes 448, the largest that e4m3 has.
    """
    scale = x.detach().abs().amax((0, 2, 3)).float().clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    return (x.float() / scale[:, None, None]).clamp(-LARGEST, LARGEST).to(FP8), scale


def hadamard_rotation(head_dim: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """A random rotation R (head_dim, head_dim) float32 that spreads an outlier over all columns: signs, then Hadamard.

    R R^T is the identity, so (q R) (k R)^T = q k^T (QuIP#, arXiv:2402.04396, and FlashAttention-3 use it so).

    Raises:
        ValueError: head_dim is no power of two.
    """
    if head_dim < 1 or head_dim & (head_dim - 1):
        raise ValueError(f"a Hadamard matrix needs a head_dim that is a power of two, got {head_dim}")
    H = torch.ones(1, 1)
    while H.shape[0] < head_dim:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    signs = torch.randint(2, (head_dim, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (signs * H * head_dim**-0.5).to(device)
