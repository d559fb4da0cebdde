"""The loss of a batch, its gradient in pieces, its mean over the validation text, and what a token costs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tformer_lib.mixture_of_experts import mixtures, take_balance_loss
from tformer_lib.training.cross_entropy import chunked_cross_entropy
from tformer_lib.training.data import IGNORED
from tformer_lib.transformer import Decoder, ModelConfig, evaluating

# One step


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor, *, chunked: bool = False) -> Tensor:
    """Mean cross-entropy of the targets, in nats; computed in float32, or in float64 for float64 logits.

    Args:
        model: tokens (batch, T) to logits (batch, T, vocab_size).
        inputs: (batch, T) int64.
        targets: (batch, T) int64; ``IGNORED`` ones do not count.
        chunked: take the logits of a chunk of tokens at a time. The model must be a ``Decoder``, or what stands around
            one where it is trained by several processes.
    """
    if not chunked:
        return mean_cross_entropy(model(inputs), targets)
    return model(inputs, head=lambda hidden, decoder: loss_of_hidden(hidden, decoder, targets))


def loss_of_hidden(hidden: Tensor, model: Decoder, targets: Tensor) -> Tensor:
    """The loss of what the blocks made of the tokens, (batch, T, width), without all logits at once."""
    return chunked_cross_entropy(hidden, model.unembedding.weight, targets, softcap=model.config.logit_softcap)


CHUNKED_FROM = 2**28
"""Bytes of float32 logits from which on they are taken in chunks, unless the config says otherwise: 256 MB."""


def is_chunked(wish: bool | None, tokens: int, vocab_size: int) -> bool:
    """Whether a loss over so many tokens takes their logits in chunks: as wished, or by their size."""
    return 4 * tokens * vocab_size > CHUNKED_FROM if wish is None else wish


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of logits (batch, T, vocab_size): see :func:`next_token_loss`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def training_loss(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    head: Callable[[Tensor, Tensor], Tensor] = mean_cross_entropy,
    *,
    chunked: bool = False,
) -> Tensor:
    """What training minimises: :func:`next_token_loss`, and the balance loss of the model's experts, if it has any.

    Args:
        model, inputs, targets: as for :func:`next_token_loss`.
        head: (logits, targets) to the loss, such as a compiled :func:`mean_cross_entropy`.
        chunked: take the logits of a chunk of tokens at a time, as :func:`next_token_loss` does; ``head`` is not used.
    """
    layers = mixtures(model)  # before they run, for a compiled model lists no modules that have changed
    loss = next_token_loss(model, inputs, targets, chunked=True) if chunked else head(model(inputs), targets)
    return loss + take_balance_loss(layers)


def accumulate_gradient(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    pieces: int,
    announce: Callable[[bool], None] = lambda last: None,
) -> Tensor:
    """Add up the gradient of a batch piece by piece, and return the batch's loss.

    The mean over the batch is that of the pieces' means, each weighted by its share of the targets that count: by
    1 / ``pieces`` where all count and the pieces are equally large. Without the weights the gradient would be
    ``pieces`` times too long; with equal ones, a piece that is half padding would count for as much as a full one.

    Args:
        loss_of: a function of (inputs, targets) that returns the mean loss over the targets that are not ``IGNORED``.
        inputs: (batch, T) int64.
        targets: (batch, T) int64.
        pieces: how many micro-batches, at most ``batch``.
        announce: told before each of them whether it is the last.

    Returns:
        The mean loss of the batch, in nats, of the dtype that ``loss_of`` returns.

    Raises:
        ValueError: if the batch has fewer windows than pieces.
    """
    if not 1 <= pieces <= len(inputs):
        raise ValueError(f"micro-batches must be 1 to {len(inputs)}, the windows of the batch, got {pieces}")
    total, all_counted = 0.0, (targets != IGNORED).sum()
    for i, (x, y) in enumerate(zip(inputs.tensor_split(pieces), targets.tensor_split(pieces), strict=True)):
        announce(i == pieces - 1)
        counted = (y != IGNORED).sum()  # stays on the device: nothing waits for it
        loss = loss_of(x, y)
        share = counted.to(loss.dtype) / all_counted
        loss = torch.where(counted > 0, loss, 0.0) * share  # a mean over nothing is NaN
        loss.backward()
        total = total + loss.detach()
    return total


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor, *, batch: int = 64, chunked: bool = False) -> float:
    """Mean loss in nats over all targets that count, without dropout, added up in float64.

    Args:
        model: tokens (batch, T) to logits (batch, T, vocab_size).
        inputs: (windows, T) int64, on the model's device.
        targets: (windows, T) int64.
        batch: windows read at once.
        chunked: take the logits of a chunk of tokens at a time, as :func:`next_token_loss` does.
    """
    total = torch.zeros((), dtype=torch.float64, device=inputs.device)
    with evaluating(model):
        for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
            counted = (y != IGNORED).sum()
            loss = next_token_loss(model, x, y, chunked=chunked)
            total += torch.where(counted > 0, loss.double() * counted, 0.0)
    return (total / (targets != IGNORED).sum()).item()


def estimate_flops_per_token(config: ModelConfig, context: int | None = None) -> float:
    """Floating-point operations that training spends on a token, forward and backward (PaLM, appendix B).

    Every weight of a matrix multiplies once and adds once: 2 forward, and twice that backward (for the input's gradient
    and the weight's), 6 in all. The embedding table is looked up, not multiplied, but the output projection counts.
    Attention adds 2 products of length ``context`` per element of the heads, q k^T and weights v: 12 in all per layer.
    As is the custom, the half that causality could save is counted. Of a mixture of experts, those that the token
    passes through count.

    Args:
        config: the model's.
        context: the window's length; ``config.max_length`` if not given.
    """
    heads = config.heads * config.size_of_head
    kv = config.number_of_kv_heads * config.size_of_head
    projections = config.layers * config.width * (2 * heads + 2 * kv)
    weights = projections + config.active_feed_forward_weights + config.width * config.vocab_size
    return 6 * weights + 12 * config.layers * heads * (context or config.max_length)
