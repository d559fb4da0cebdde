"""The attention contract in code: what every attention form checks at its door.

Every form is a function ``attend(q, k, v, *, mask=None, causal=False, scale=None) -> out``:

- ``q``: (batch, heads, T, head_dim); ``k``, ``v``: (batch, kv_heads, S, head_dim); ``kv_heads`` divides ``heads``.
- ``mask``: boolean, broadcastable to (batch, heads, T, S), True where a query may look.
- ``causal`` is aligned to the bottom right: the last query sees the last key.
- A query that may look at nothing gets zeros. ``out`` has the shape and dtype of ``q`` (with v's last dimension, where
  a form takes one that differs from head_dim).
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._subclasses.fake_tensor import is_fake

SINGLE = torch.finfo(torch.float32)
"""Of the type in which scores are computed unless all inputs are float64."""

ATTENTION_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
    """Raise a ValueError that names what was expected and what came, if the inputs break the contract.

    Args:
        q: (batch, heads, T, head_dim).
        k: (batch, kv_heads, S, head_dim).
        v: (batch, kv_heads, S, value_dim); ``value_dim`` may differ from ``head_dim`` where a form allows it.
        mask: None, or boolean and broadcastable to (batch, heads, T, S).
    """
    check_tensors(q, k, v)
    check_shapes(q, k, v)
    if mask is not None:
        check_mask(mask, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]), q.device)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse inputs that are not floating-point tensors of one dtype on one device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        check_dense(name, x)
        if x.dtype not in ATTENTION_DTYPES:
            raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
        if x.device != q.device:
            raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")


def check_dense(name: str, x: Tensor) -> None:
    """Refuse a tensor whose numbers do not lie by strides: nested, sparse, or in a layout of a library's own."""
    if x.is_nested or x.layout != torch.strided:
        came = "nested tensor" if x.is_nested else f"tensor of layout {x.layout}"
        raise ValueError(f"{name} must be a dense tensor, got a {came}: pad its sequences, or pack them end to end")


def check_writable(name: str, x: Tensor) -> None:
    """Refuse to write into an expanded tensor, where one place in memory stands for several numbers."""
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(
            f"{name} is written to and must not be expanded, got strides {x.stride()} for {tuple(x.shape)}"
        )


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse shapes that do not fit the contract."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, length, head_dim), got shape {tuple(x.shape)}"
            )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must agree in batch, kv_heads and length, got {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch {q.shape[0]}, k and v have batch {k.shape[0]}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has head_dim {q.shape[3]}, k has head_dim {k.shape[3]}")
    if q.shape[3] == 0:
        raise ValueError(f"q and k must have a head_dim of at least 1, got shape {tuple(q.shape)}")
    check_heads(q.shape[1], k.shape[1])


def counted(number: int, thing: str, things: str = "") -> str:
    """A number of things, as a message says it: 1 block, 3 blocks; 1 query, 2 queries (with ``things`` given)."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"


def check_heads(heads: int, kv_heads: int) -> None:
    """Refuse a number of kv heads that does not divide the number of query heads."""
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q has {counted(heads, 'head')}, which {kv_heads} kv heads do not divide")


def check_mask(mask: Tensor, target: tuple[int, int, int, int], device: torch.device) -> None:
    """Refuse a mask that is not boolean, not on the device of q, or not broadcastable to ``target``."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be a boolean tensor, True where a query may look, got {came}")
    if mask.device != device:
        raise ValueError(f"mask must be on the device of q, {device}, got {mask.device}")
    if not broadcasts_to(mask.shape, target):
        raise ValueError(f"mask must broadcast to (batch, heads, T, S) = {target}, got {tuple(mask.shape)}")


def check_bias(bias: Tensor, q: Tensor, k: Tensor) -> None:
    """Refuse a bias that is not floating-point, not on the device of q, or not broadcastable to the scores."""
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        came = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise ValueError(f"bias must be a floating-point tensor that is added to the scores, got {came}")
    if bias.device != q.device:
        raise ValueError(f"bias must be on the device of q, {q.device}, got {bias.device}")
    target = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if not broadcasts_to(bias.shape, target):
        raise ValueError(f"bias must broadcast to (batch, heads, T, S) = {target}, got {tuple(bias.shape)}")


def score_scale(scale: float | None, head_dim: int) -> float:
    """What scores are multiplied by: 1 / sqrt(head_dim), or the number that was given, which float32 must hold."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise ValueError("scale must be a number, for no gradient would reach it: multiply q by it instead")
    number = scale if isinstance(scale, (int, float)) else float(scale)
    if not -SINGLE.max <= number <= SINGLE.max:  # a comparison, which may be symbolic under torch.compile
        raise ValueError(f"scale must be finite in float32, got {number}")
    return number


def check_positive(name: str, number: float) -> None:
    """Refuse what is not positive and finite as kernels take it, in float32, where too small a number is 0."""
    if not SINGLE.tiny <= number <= SINGLE.max:
        raise ValueError(f"{name} must be positive and finite in float32, got {number}")


def check_integer(name: str, value: int) -> None:
    """Refuse what is no integer: arange and comparisons would take 2.5 or NaN, and make a mask of it."""
    if value is None or isinstance(value, (bool, float, complex, str)):
        raise ValueError(f"{name} must be an integer, got {value!r}")


def in_named_dtypes(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a form compute in the dtypes that it names under autocast too, which would round its matrix products."""

    @wraps(form)
    def outside_autocast(*inputs, **options) -> Tensor:
        device = next((x.device.type for x in inputs if isinstance(x, Tensor)), "meta")
        if not has_autocast(device):
            return form(*inputs, **options)
        with torch.autocast(device, enabled=False):
            return form(*inputs, **options)

    return outside_autocast


def has_autocast(device: str) -> bool:
    """Whether autocast is on for a type of device. "meta" has none, and torch does not answer for it."""
    return device != "meta" and torch.is_autocast_enabled(device)


def product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product with ``x`` comes in: its dtype, or autocast's, which leaves float64 alone."""
    if x.dtype == torch.float64 or not has_autocast(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def readable(x: Tensor) -> bool:
    """Whether a check may read the values of ``x``.

    Not while a graph is compiled or captured, which it would break, and not where there are none: in the tensors of
    ``torch.func.vmap``, which stand for many, and of a ``FakeTensorMode``, which have a shape alone.
    """
    if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return not (functorch.is_functorch_wrapped_tensor(x) or has_no_numbers(x))


def has_no_numbers(x: Tensor) -> bool:
    """Whether ``x`` is a shape alone: on the meta device, or of a ``FakeTensorMode``."""
    return x.is_meta or is_fake(x)


def broadcasts_to(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether a tensor of ``shape`` broadcasts to ``target`` without enlarging it."""
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, wanted) for size, wanted in pairs)
