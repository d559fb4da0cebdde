"""The windows of text that training and evaluation read, and what a run has to know about its corpus."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tformer_lib import stories
from tformer_lib.contract import counted
from tformer_lib.tokens import END_OF_TEXT, Corpus
from tformer_lib.training.config import TrainingConfig

IGNORED = -100  # a target that does not count, as F.cross_entropy has it


# Data


def window_starts(tokens: int, config: TrainingConfig, step: int) -> np.ndarray:
    """Where the windows of a step begin: (batch,) int64.

    They depend on the seed and the step alone, so a resumed run reads what an unbroken one would have.

    Args:
        tokens: how many tokens the training text has.
    """
    return np.random.default_rng((config.seed, step)).integers(0, tokens - config.context, config.batch)


def read_windows(tokens: np.ndarray, starts: np.ndarray, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each (windows, context) int64; the target of a token is the one after it."""
    rows = torch.from_numpy(np.asarray(tokens[starts[:, None] + np.arange(context + 1)]).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def replace_some(inputs: Tensor, config: TrainingConfig, step: int) -> Tensor:
    """The inputs (batch, context) with a share of ``token_noise`` replaced by random tokens, by seed and step alone."""
    if not config.token_noise:
        return inputs
    generator = np.random.default_rng((config.seed, step, 1))  # the 1 keeps it apart from the windows' generator
    chosen = torch.from_numpy(generator.random(inputs.shape) < config.token_noise)
    return torch.where(chosen, torch.from_numpy(generator.integers(0, config.model.vocab_size, inputs.shape)), inputs)


def evaluation_windows(
    tokens: np.ndarray, context: int, *, count: int = 0, end_of_document: int | None = None
) -> tuple[Tensor, Tensor]:
    """The windows that every evaluation reads: inputs and targets, each (windows, context) int64.

    A plain text is cut into windows that follow each other, and every target counts. The first tokens of a window are
    hard to guess, for lack of what came before, so the loss is a little above what a longer view would give.

    A text of documents (stories) is cut so that each window holds whole documents: its first input is the token that
    ended the document before, and the targets past the last whole document are ``IGNORED``. Nothing that a guess
    depends on is cut off, so the loss may be compared with the exact entropy of the source. A document longer than a
    window is skipped; if all are longer, the text is cut like a plain one.

    Args:
        tokens: (N,) the validation text.
        context: tokens in a window.
        count: how many windows to keep, spread evenly over the text; 0 is all.
        end_of_document: the token that ends a document; None for a plain text.
    """
    starts, lengths = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    if end_of_document is not None:
        starts, lengths = whole_documents(np.flatnonzero(np.asarray(tokens) == end_of_document), context)
    if len(starts) == 0:  # a plain text
        starts = np.arange((len(tokens) - 1) // context) * context
        lengths = np.full(len(starts), context)
    if len(starts) == 0:
        raise ValueError(f"the validation text of {counted(len(tokens), 'token')} has no window of context {context}")
    if 0 < count < len(starts):
        kept = np.linspace(0, len(starts) - 1, count).round().astype(np.int64)
        starts, lengths = starts[kept], lengths[kept]
    padded = np.pad(tokens, (0, context))  # the last window is read to its end too, though that may not count
    inputs, targets = read_windows(padded, starts, context)
    past_the_end = torch.arange(context) >= torch.from_numpy(lengths)[:, None]  # (windows, context)
    return inputs, targets.masked_fill(past_the_end, IGNORED)


def whole_documents(ends: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill windows with whole documents, first come first served.

    Args:
        ends: (documents + 1,) int64, where the ends of documents stand in the text.
        context: tokens in a window.

    Returns:
        Where each window starts (on the end before its first document), and how many targets it has, both (windows,).
    """
    starts, lengths, first = [], [], 0
    while first < len(ends) - 1:
        last = int(np.searchsorted(ends, ends[first] + context, side="right")) - 1
        if last > first:
            starts.append(ends[first])
            lengths.append(ends[last] - ends[first])
        first = max(last, first + 1)
    return np.array(starts, dtype=np.int64), np.array(lengths, dtype=np.int64)


def fit_to_corpus(config: TrainingConfig, corpus: Corpus) -> TrainingConfig:
    """The config with the corpus's vocabulary and the context's length in the model.

    Raises:
        ValueError: if the corpus is too short for the context.
    """
    for name, tokens in (("train", corpus.train), ("val", corpus.val)):
        if len(tokens) <= config.context:
            raise ValueError(
                f"context {config.context} needs at least {config.context + 1} tokens, "
                f"but {name}.bin of {config.data} has {len(tokens)}"
            )
    if config.sample_tokens and config.model.positions == "alibi":
        raise ValueError(
            "a model with ALiBi writes without a cache, so its runs cannot show samples: set sample_tokens to 0"
        )
    model = replace(config.model, vocab_size=corpus.encoding.n_vocab, max_length=config.context)
    return replace(config, model=model)


def end_of_document(corpus: Corpus) -> int | None:
    """The token that ends each document of the corpus, or None if it is one plain text."""
    try:
        end = corpus.encoding.eot_token
    except KeyError:
        return None
    return end if np.count_nonzero(np.asarray(corpus.val) == end) > 1 else None


def beginning(corpus: Corpus) -> list[int]:
    """What stands before a text that begins: the end of the document before, or a new line, if the corpus has any."""
    end = end_of_document(corpus)
    if end is not None:
        return [end]
    try:
        return corpus.encoding.encode("\n")
    except ValueError:
        return [int(corpus.train[0])]


def entropy_floor(corpus: Corpus, targets: Tensor) -> float | None:
    """The mean of -log p of the targets under the grammar that wrote them, in nats per token; None if it is not known.

    Args:
        corpus: the text.
        targets: (windows, T) int64, whole stories; ``IGNORED`` ones do not count.
    """
    if corpus.meta.floor_nats_per_token is None:
        return None
    counted = targets[targets != IGNORED].tolist()
    last = targets.gather(1, (targets != IGNORED).sum(1, keepdim=True) - 1)[:, 0]  # (windows,)
    if not (last == corpus.encoding.eot_token).all():
        return None  # these windows cut stories
    if len(counted) == len(corpus.val) - 1:
        return corpus.meta.floor_nats_per_token
    told = corpus.encoding.decode(counted).split(END_OF_TEXT)[:-1]
    return -sum(stories.log_prob(story) for story in told) / len(counted)


def fingerprint(corpus: Corpus) -> dict:
    """What tells this corpus from another: its name and the hashes of its files."""
    return {"name": corpus.meta.corpus, "sha256": corpus.meta.sha256}
