"""Cross-entropy from the last hidden states: the logits exist for a chunk of tokens at a time, never for all.

The logits of a batch are its largest tensor by far: 32,768 tokens of GPT-2's vocabulary make 1.6 billion numbers, and
the plain loss wants them in float32, 6.6 GB, and their gradient beside them. But a row of logits depends on its own
token alone, and so does its gradient. So a chunk of rows is multiplied out, its losses are taken, its logits are
replaced by their gradient, the two products of the backward pass are taken from that, and the memory serves the next
chunk. What is kept for the backward pass is the finished gradient, which is scaled by what comes from above.

The same arithmetic is done as by the plain loss, with no product twice: forward makes all three.

Sources: Wijmans et al. 2025, "Cut Your Losses in Large-Vocabulary Language Models" (arXiv:2411.09009); Hsu et al. 2024,
"Liger Kernel" (arXiv:2410.10989), which takes the gradient in the forward pass as is done here.
"""

import torch
from torch import Tensor

from tformer_lib.contract import check_positive, has_autocast, product_dtype
from tformer_lib.training import cross_entropy_triton
from tformer_lib.training.data import IGNORED

CHUNK_BYTES = 2**27
"""What a chunk's logits may take on a CPU, unless the caller says how many tokens a chunk has. On a GPU it is a 32nd of
its memory: large products run faster, and fewer of them do."""


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """``F.cross_entropy(hidden @ weight.T, targets)``, a chunk of tokens at a time, in nats.

    Under autocast the products are in its type, as those of a linear map are; what is added up, is in float32, or in
    float64 for float64 inputs. There is no second derivative.

    Args:
        hidden: (..., width): what the model made of each token.
        weight: (vocab_size, width): the output projection.
        targets: (...) int64.
        ignore_index: targets that do not count.
        label_smoothing: the share of each target's probability that is spread over the whole vocabulary.
        softcap: logits z become ``softcap * tanh(z / softcap)`` first.
        chunk: tokens whose logits are held at once; by the device's memory if not given.

    Returns:
        The mean over the targets that count; NaN if none does, as PyTorch has it.

    Raises:
        ValueError: if shapes or dtypes do not fit, or a number is out of its range.
    """
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1:] != weight.shape[1:] or weight.dim() != 2:
        raise ValueError(
            "expected hidden (..., width), weight (vocab_size, width) and targets (...), "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if softcap is not None:
        check_positive("softcap", softcap)
    if has_autocast(hidden.device.type):
        hidden = hidden.to(product_dtype(hidden))
    elif hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk must have at least 1 token, got {chunk}")
    differentiated = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    options = ignore_index, float(label_smoothing), float(softcap or 0.0), chunk or 0, differentiated
    return chunked_cross_entropy_op(hidden.flatten(0, -2), weight, targets.flatten(), *options)[0]


def tokens_of_chunk(tokens: int, row: int, device: torch.device) -> int:
    """Equal chunks, as few as may be and whole tiles of a matrix product where they are large; ``row`` is in bytes."""
    room = torch.cuda.get_device_properties(device).total_memory // 32 if device.type == "cuda" else CHUNK_BYTES
    most = max(1, room // row)
    each = -(-tokens // max(1, -(-tokens // most)))
    return max(1, min(most, -(-each // 256) * 256) if most >= 256 else most)


@torch.library.custom_op("tformer_lab::chunked_cross_entropy", mutates_args=())
def chunked_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    chunk: int,
    differentiated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of (tokens, width), and its gradients for hidden and weight: empty ones if they are not wanted.

    ``hidden`` says in what type the products are, ``weight`` in what type its gradient is; a ``softcap`` of 0 is none,
    a ``chunk`` of 0 is chosen by the memory.
    """
    chunk = chunk or tokens_of_chunk(len(hidden), len(weight) * hidden.element_size(), hidden.device)
    tokens, vocab_size, wide = len(hidden), len(weight), accumulation_dtype(hidden.dtype)
    matrix, count = weight.to(hidden.dtype), (targets != ignore_index).sum()
    losses = hidden.new_empty(tokens, dtype=wide)
    d_hidden, d_weight = torch.empty_like(hidden) if differentiated else hidden.new_empty(0), None
    # rows begin at whole cache lines, whatever the vocabulary's size
    room = hidden.new_empty(min(chunk, tokens), -(-vocab_size // 64) * 64)
    for start in range(0, tokens, chunk):
        some = slice(start, min(start + chunk, tokens))
        logits = room[: some.stop - start, :vocab_size]
        torch.mm(hidden[some], matrix.t(), out=logits)
        options = count, ignore_index, label_smoothing, softcap, differentiated
        take_losses(logits, targets[some], losses[some], *options)
        if differentiated:  # the logits are their gradient now
            torch.mm(logits, matrix, out=d_hidden[some])
            d_weight = add_product(d_weight, logits.t(), hidden[some], wide)
    if d_weight is None:
        d_weight = torch.zeros_like(weight) if differentiated else weight.new_empty(0)
    return losses.sum() / count, d_hidden, d_weight.to(weight.dtype)


@chunked_cross_entropy_op.register_fake
def chunked_cross_entropy_fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, i: int, s: float, c: float, chunk: int, differentiated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes and dtypes of loss and gradients."""
    loss = hidden.new_empty((), dtype=accumulation_dtype(hidden.dtype))
    if differentiated:
        return loss, torch.empty_like(hidden), torch.empty_like(weight)
    return loss, hidden.new_empty(0), weight.new_empty(0)


def keep_gradients(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """The backward pass needs the gradients that forward has made, and nothing else."""
    ctx.save_for_backward(*output[1:])


def scale_gradients(ctx, d_loss: Tensor, *_) -> tuple:
    """The gradients of hidden and weight: those of the loss, times what comes from above."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError("chunked cross-entropy has no second derivative; use F.cross_entropy")
    d_hidden, d_weight = ctx.saved_tensors
    return (d_hidden * d_loss).to(d_hidden.dtype), (d_weight * d_loss).to(d_weight.dtype), *(None for _ in range(6))


chunked_cross_entropy_op.register_autograd(scale_gradients, setup_context=keep_gradients)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def take_losses(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    count: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    differentiated: bool,
) -> None:
    """Write each row's loss, and put the gradient of the mean into the logits' place.

    With p the softmax of the logits z, V of them, target y and smoothing e, a row's loss is
    ``logsumexp(z) - (1 - e) z[y] - e mean(z)``, and its gradient is ``p - (1 - e) onehot(y) - e / V``, which ``count``
    divides. Rows that do not count have neither.

    Args:
        logits: (tokens, vocab_size), before the cap; changed in place if ``differentiated``.
        targets: (tokens,) int64.
        losses: (tokens,), filled.
        count: () int64, how many targets of all chunks count.
        ignore_index, label_smoothing, softcap: as in :func:`chunked_cross_entropy`; a cap of 0 is none.
        differentiated: whether the gradient is wanted.
    """
    if cross_entropy_triton.can_run(logits):
        options = ignore_index, label_smoothing, softcap, differentiated
        cross_entropy_triton.take_losses(logits, targets, losses, count, *options)
        return
    vocab_size, counts = logits.shape[1], targets != ignore_index
    z = logits.to(losses.dtype, copy=True)
    if softcap:
        z.div_(softcap).tanh_().mul_(softcap)
    slope = (1 - (z / softcap) ** 2) if softcap and differentiated else 1.0
    lse, places = z.logsumexp(1), torch.where(counts, targets, 0)[:, None]
    loss = lse - (1 - label_smoothing) * z.gather(1, places)[:, 0]
    if label_smoothing:
        loss -= label_smoothing * z.mean(1)
    losses.copy_(torch.where(counts, loss, 0.0))
    if differentiated:
        gradient = z.sub_(lse[:, None]).exp_().sub_(label_smoothing / vocab_size)
        gradient.scatter_add_(1, places, torch.full_like(places, label_smoothing - 1, dtype=z.dtype))
        share = torch.where(counts, 1 / count.to(z.dtype), 0.0)[:, None]
        logits.copy_(gradient.mul_(share).mul_(slope))


def add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``total + a @ b`` in a type as wide as theirs or wider, added in place; None counts as zeros."""
    if dtype == a.dtype:
        return a @ b if total is None else total.addmm_(a, b)
    if not a.is_cuda:
        return (a @ b).to(dtype) if total is None else total.add_(a @ b)
    if total is None:  # the sum is never rounded to the factors' type
        return torch.mm(a, b, out_dtype=dtype)
    return torch.addmm(total, a, b, out_dtype=dtype, out=total)
