"""The feed-forward layer of GPT-2 with GELU inside its matrix products.

Between the two matrices of a feed-forward layer stands GELU. A compiler makes a kernel of it: forward it reads the
product and writes GELU of it, backward it reads the product and the gradient and writes another gradient. These are
5 passes over the widest tensor of a layer, 2 bytes a number each. In the epilogue of a product the number is in a
register already:

- forward, the product with the first matrix writes itself and GELU of itself: the reading is saved.
- backward, the product of the gradient with the second matrix reads GELU's input and writes the finished gradient: a
  writing and a reading are saved.

The gradients of the weights and of the layer's input are plain products.

Ledger (32,768 tokens, 768 to 3,072; one H200, each product alone)
  before      product and kernel 0.309 ms forward, 0.365 backward
  predicted   0.235 and 0.260: 1.9 ms less in a step of 12 layers
  measured    0.250 and 0.275 by the best of eight algorithms, 0.271 and 0.290 by the one that cuBLASLt lists first, so
              that they are timed: 1.8 ms. A whole step with it has not been measured
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tformer_lib.contract import in_named_dtypes, product_dtype
from tformer_lib.ladder import accumulation_dtype
from tformer_lib.transformer import cublas_lt


def gelu_feed_forward(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``F.gelu(x @ up.T, approximate="tanh") @ down.T``, in the products' type under autocast, else in x's.

    Args:
        x: (..., width).
        up: (inner, width).
        down: (width_out, inner).

    Returns:
        (..., width_out).
    """
    dtype = product_dtype(x)
    flat, up, down = x.to(dtype).flatten(0, -2), up.to(dtype), down.to(dtype)
    return torch.ops.tformer_lab.gelu_feed_forward(flat, up, down)[0].unflatten(0, x.shape[:-1])


def has_epilogues(x: Tensor) -> bool:
    """Whether the products are cuBLASLt's: on a GPU, in 16 bits, for sizes whose rows begin where it needs them to."""
    return x.is_cuda and x.dtype in cublas_lt.TYPES and len(x) > 0 and cublas_lt.library() is not None


def slope(z: Tensor) -> Tensor:
    """The slope of GELU (by tanh) at z."""
    c, a = (2 / torch.pi) ** 0.5, 0.044715
    t = torch.tanh(c * (z + a * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * a * z * z)


@torch.library.custom_op("tformer_lab::gelu_feed_forward", mutates_args=())
def gelu_feed_forward_op(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The layer of (tokens, width), the numbers between GELU and the second matrix, and those before GELU."""
    check_operands(x, up, down)
    if fits(x, up, down):
        before = x.new_empty(len(x), len(up))
        hidden = cublas_lt.matmul(x.contiguous(), up.contiguous().t(), before, cublas_lt.GELU_AND_INPUT)
    else:
        before = x @ up.t()
        hidden = F.gelu(before.to(accumulation_dtype(x)), approximate="tanh").to(x.dtype)
    return hidden @ down.t(), hidden, before


@gelu_feed_forward_op.register_fake
def gelu_feed_forward_fake(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes and dtypes of what the operator returns."""
    return x.new_empty(len(x), len(down)), x.new_empty(len(x), len(up)), x.new_empty(len(x), len(up))


@torch.library.custom_op("tformer_lab::gelu_feed_forward_backward", mutates_args=())
@in_named_dtypes
def gelu_feed_forward_backward_op(
    d_out: Tensor, x: Tensor, up: Tensor, down: Tensor, hidden: Tensor, before: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and of both matrices."""
    d_out = d_out.contiguous()
    if fits(x, up, down):
        d_before = cublas_lt.matmul(d_out, down.contiguous(), before, cublas_lt.GELU_GRADIENT)
    else:
        wide = accumulation_dtype(x)
        d_before = ((d_out @ down).to(wide) * slope(before.to(wide))).to(x.dtype)
    return d_before @ up, d_before.t() @ x, d_out.t() @ hidden


@gelu_feed_forward_backward_op.register_fake
def gelu_feed_forward_backward_fake(
    d_out: Tensor, x: Tensor, up: Tensor, down: Tensor, hidden: Tensor, before: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes and dtypes of the gradients."""
    return x.new_empty(x.shape), up.new_empty(up.shape), down.new_empty(down.shape)


def fits(x: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether cuBLASLt takes the products: rows of a multiple of 8 numbers, as its epilogues want them."""
    return has_epilogues(x) and all(size % 8 == 0 for size in (*up.shape, *down.shape))


def check_operands(x: Tensor, up: Tensor, down: Tensor) -> None:
    """Refuse what the products cannot index."""
    if x.dim() != 2 or up.dim() != 2 or down.dim() != 2 or x.shape[1] != up.shape[1] or down.shape[1] != len(up):
        shapes = ", ".join(str(tuple(y.shape)) for y in (x, up, down))
        raise ValueError(f"expected (tokens, width), (inner, width) and (width_out, inner), got {shapes}")
    if {x.dtype} != {up.dtype, down.dtype} or {x.device} != {up.device, down.device}:
        raise ValueError("expected three tensors of one dtype on one device")


def save_for_backward(ctx, inputs: tuple, output: tuple) -> None:
    """Operands, and both sides of GELU."""
    ctx.save_for_backward(*inputs, *output[1:])


def backward(ctx, d_out: Tensor, *_) -> tuple:
    """The gradients of x and of both matrices."""
    return torch.ops.tformer_lab.gelu_feed_forward_backward(d_out, *ctx.saved_tensors)


gelu_feed_forward_op.register_autograd(backward, setup_context=save_for_backward)
