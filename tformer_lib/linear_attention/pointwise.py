"""What stands between the sums of a normalised gradient: feature maps, their gradients, and that of a quotient.

On a GPU all three are kernels/linear_attention/pointwise.cu for numbers of 16 bits. Elsewhere they are PyTorch.
"""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from tformer_lib.ladder import DTYPE_CODES, is_aligned, refusal_of_tensor_cores
from tformer_lib.linear_attention.feature_maps import relu
from tformer_lib.linear_attention.kernels import LADDER, MAP_OF_CODE
from tformer_lib.linear_attention.shared import sum_dtype


class Pointwise(ctypes.Structure):
    """``linear::Pointwise`` of kernels/linear_attention/arguments.h, in the same order."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "first", "second", "out", "columns")),
        *((name, ctypes.c_int64) for name in ("count", "width")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("map", "dtype")),
    ]


def by_kernel(*tensors: Tensor) -> bool:
    """Whether pointwise.cu takes these: on a GPU, 16 bits, contiguous, rows of a multiple of 16 bytes."""
    x = tensors[0]
    if not x.is_cuda or refusal_of_tensor_cores(x.dtype, x.device) or x.shape[-1] % 8 or not x.numel():
        return False
    return all(t.is_contiguous() and is_aligned(t) for t in tensors)


def map_features(x: Tensor, map_code: int, map_scale: float) -> Tensor:
    """phi(x map_scale), in x's dtype."""
    x = x.contiguous()
    if not by_kernel(x):
        return MAP_OF_CODE[map_code](x.to(sum_dtype(x)) * map_scale).to(x.dtype)
    out = torch.empty_like(x)
    a = Pointwise(x=x.data_ptr(), out=out.data_ptr(), count=x.numel(), scale=map_scale, map=map_code)
    a.dtype = DTYPE_CODES[x.dtype]
    LADDER.launch("pointwise", "map", a, x.device)
    return out


def map_gradient(x: Tensor, first: Tensor, second: Tensor, map_code: int, map_scale: float) -> Tensor:
    """The gradient of x, where that of phi(x map_scale) is first + second."""
    x = x.contiguous()
    if not by_kernel(x, first, second):
        y = x.to(sum_dtype(x)) * map_scale
        slope = (y > 0).to(y.dtype) if MAP_OF_CODE[map_code] is relu else torch.where(y > 0, 1.0, y.clamp(max=0).exp())
        return ((first.to(y.dtype) + second) * slope * map_scale).to(x.dtype)
    out = torch.empty_like(x)
    pointers = [t.data_ptr() for t in (x, first, second, out)]
    a = Pointwise(*pointers, None, x.numel(), x.shape[-1], map_scale, map_code, DTYPE_CODES[x.dtype])
    LADDER.launch("pointwise", "map_gradient", a, x.device)
    return out


def split_quotient(dout: Tensor, out: Tensor, denominators: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of numerator and denominator of out = n / d.

    Args:
        dout, out: (batch, heads, T, value_dim).
        denominators: (batch, heads, T), d; where it is not positive, out is 0 and both gradients are.

    Returns:
        dn in dout's shape and dtype, and dd in two parts, the first of 8 columns (batch, heads, T, 8), the others zero:
        one number of 16 bits is not enough for it.
    """
    dout = dout.contiguous()
    if not by_kernel(dout, out):
        seen = denominators > 0
        inverse = torch.where(seen, 1.0 / torch.where(seen, denominators, 1.0), 0.0).unsqueeze(-1)
        wide = dout.to(inverse.dtype)
        column = -(wide * out).sum(-1, keepdim=True) * inverse
        return (wide * inverse).to(dout.dtype), in_two_parts(column, dout.dtype)
    dn, columns = torch.empty_like(dout), dout.new_empty(*dout.shape[:3], 8)
    pointers = [t.data_ptr() for t in (denominators, dout, out, dn, columns)]
    a = Pointwise(*pointers, denominators.numel(), dout.shape[-1], 1.0, 0, DTYPE_CODES[dout.dtype])
    LADDER.launch("pointwise", "quotient", a, dout.device)
    return dn, columns


def in_two_parts(column: Tensor, dtype: torch.dtype) -> Tensor:
    """(.., 1) -> (.., 8): numbers rounded to dtype, what the rounding left, and zeros."""
    high = column.to(dtype)
    return F.pad(torch.cat([high, (column - high.to(column.dtype)).to(dtype)], -1), (0, 6))
