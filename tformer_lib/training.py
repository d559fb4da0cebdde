"""Training: from a random network and a corpus to a model that writes.

One dataclass, :class:`TrainingConfig`, says everything about a run; :class:`Run` is a run in progress. On the command
line (``python -m tformer_lib.training --help``):

    python -m tformer_lib.training train --preset quick        # a preset, any field of which a flag changes
    python -m tformer_lib.training resume --out runs/quick     # go on after Ctrl-C, a crash or a power cut
    python -m tformer_lib.training sample --out runs/quick --prompt "Once"

A run's folder holds ``config.json``, the tokenizer, ``metrics.jsonl`` (one line per measurement), ``best.safetensors``
(the weights with the lowest validation loss so far) and ``checkpoint.safetensors``: weights, optimizer, random states
and the place in the data in one file. That file is replaced in one step, so a run killed at any moment goes on exactly
where its last checkpoint was. Nothing here is pickled.

Sources: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization" (arXiv:1711.05101); Karpathy's nanoGPT,
whose schedule, decay groups and recipes for Shakespeare are followed; Chowdhery et al. 2022, PaLM (arXiv:2204.02311),
appendix B, for the count of floating-point operations.
"""

import contextlib
import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from tformer_lib import stories
from tformer_lib.generation import generate
from tformer_lib.tokens import END_OF_TEXT, Corpus, Encoding, load_encoding, save_encoding
from tformer_lib.transformer import Decoder, ModelConfig, count_parameters

IGNORED = -100  # a target that does not count, as F.cross_entropy has it


@dataclass(frozen=True)
class TrainingConfig:
    """Everything about one training run.

    Raises:
        ValueError: when a setting makes no sense alone; what must fit the data is checked when the run begins.
    """

    model: ModelConfig
    """The model. Its vocab_size is taken from the corpus, its max_length from the context."""
    preset: str = "quick"
    """The settings to start from: quick, stories, shakespeare-char or shakespeare-char-cpu; other flags change them."""
    data: str = "data/stories"
    """The corpus: a folder that `python -m tformer_lib.tokens` made."""
    out: str = "runs/quick"
    """The run's folder, for checkpoint, best weights and metrics."""
    batch: int = 32
    """Windows of text per step of the optimizer, over all its micro-batches."""
    context: int = 256
    """Tokens in a window."""
    steps: int = 300
    """Steps of the optimizer."""
    learning_rate: float = 1e-3
    """The peak learning rate."""
    min_learning_rate: float = 1e-4
    """The learning rate at the end of the cosine; a tenth of the peak is usual."""
    warmup: int = 100
    """Steps of linear warm-up: step t (from 0) has (t + 1) / (warmup + 1) of the peak."""
    beta1: float = 0.9
    """AdamW's memory of the gradient: about 1 / (1 - beta1) steps."""
    beta2: float = 0.99
    """AdamW's memory of the squared gradient; 0.99 where a batch has few tokens, 0.95 where it has many."""
    weight_decay: float = 0.1
    """AdamW's decay of every matrix, embeddings included; norms and biases are never decayed."""
    clip: float = 1.0
    """The longest gradient, as a norm over all parameters; longer ones are scaled down to it. 0 is off."""
    average: float = 0.0
    """Evaluate, show and keep a running average of the weights with this memory (0.995: some 200 steps); 0 is off."""
    token_noise: float = 0.0
    """The share of input tokens (never targets) that a random token replaces: keeps a large model from learning a small
    corpus by heart."""
    accumulation: int = 1
    """Micro-batches that a batch is cut into, to fit in memory; the gradient is that of the whole batch."""
    eval_interval: int = 100
    """Steps between evaluations on the validation text (the first is before step 0, the last after the last step)."""
    eval_windows: int = 0
    """Windows that an evaluation reads, the same every time, spread over the validation text; 0 is all of it."""
    save_interval: int = 100
    """Steps between checkpoints; the last step and Ctrl-C save too."""
    log_interval: int = 10
    """Steps between lines of the training loss in metrics.jsonl."""
    sample_tokens: int = 60
    """Tokens of the sample that follows each evaluation; 0 is none."""
    seed: int = 1337
    """Seeds the weights, the dropout and the choice of windows."""
    device: str = "auto"
    """Where to train: 'cpu', 'cuda', 'cuda:1'; 'auto' is the first GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The type of the matrix products; 'auto' is bfloat16 (autocast) on a GPU that has it, else float32."""
    compile: bool | None = None
    """Whether to fuse the model with torch.compile; None is: on a GPU yes, on a CPU no."""

    def __post_init__(self):
        at_least = {"batch": 1, "context": 1, "steps": 1, "warmup": 0, "accumulation": 1, "eval_interval": 1}
        at_least |= {"eval_windows": 0, "save_interval": 1, "log_interval": 1, "sample_tokens": 0, "seed": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.batch % self.accumulation:
            raise ValueError(
                f"a batch of {self.batch} windows cannot be cut into {self.accumulation} equal micro-batches"
            )
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype must be auto, float32 or bfloat16, got {self.dtype!r}")
        if not math.isfinite(self.learning_rate):
            raise ValueError(f"learning_rate must be finite, got {self.learning_rate}")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"min_learning_rate must be in [0, learning_rate = {self.learning_rate}], got {self.min_learning_rate}"
            )
        for name in ("beta1", "beta2", "average", "token_noise"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


def llama_like(**sizes) -> ModelConfig:
    """The shape that the presets share: RoPE, RMSNorm, SwiGLU, no biases. Vocabulary and length come from the run."""
    return ModelConfig(
        **{"vocab_size": 1, "norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rope", "bias": False, **sizes}
    )


PRESETS = {
    config.preset: config
    for config in (
        TrainingConfig(  # what chapter 06 trains while you watch
            preset="quick",
            model=llama_like(width=128, layers=2, heads=4),
            batch=4, context=256, steps=400, learning_rate=3e-3, min_learning_rate=3e-4, warmup=30,
            eval_interval=100, eval_windows=64, save_interval=100,
        ),
        TrainingConfig(  # the model in tformer_lib/weights, which later chapters load
            preset="stories", data="data/stories-large", out="runs/stories",
            model=llama_like(width=192, layers=4, heads=8, head_dim=32, feed_forward_width=384),
            batch=128, context=256, steps=5000, learning_rate=2e-3, min_learning_rate=2e-5, warmup=200, beta2=0.98,
            eval_interval=250, save_interval=1000,
        ),
        TrainingConfig(  # nanoGPT's sizes, batch and rate for one GPU, with more against learning by heart
            preset="shakespeare-char", data="data/shakespeare-char", out="runs/shakespeare-char",
            model=llama_like(width=384, layers=6, heads=6, dropout=0.3), average=0.998, token_noise=0.1,
            batch=64, context=256, steps=5000, learning_rate=1e-3, min_learning_rate=1e-4, warmup=100,
            eval_interval=250, save_interval=1000, sample_tokens=200,
        ),
        TrainingConfig(  # nanoGPT's recipe for a CPU, with its 0.8 million parameters
            preset="shakespeare-char-cpu", data="data/shakespeare-char", out="runs/shakespeare-char-cpu",
            model=llama_like(width=128, layers=4, heads=4),
            batch=12, context=64, steps=2000, learning_rate=1e-3, min_learning_rate=1e-4, warmup=100,
            eval_interval=250, save_interval=250, sample_tokens=200,
        ),
    )
}  # fmt: skip


def preset(name: str, **changes) -> TrainingConfig:
    """The preset of that name, with some fields changed.

    Raises:
        ValueError: if there is no such preset; the message lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: there are {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)


def config_from_dict(values: dict) -> TrainingConfig:
    """The inverse of ``dataclasses.asdict``: what ``config.json`` and a checkpoint hold."""
    return TrainingConfig(**{**values, "model": ModelConfig(**values["model"])})


# Schedule and optimizer


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then half a cosine from the peak to the minimum.

    Args:
        step: steps done so far: 0 for the first.
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / (config.warmup + 1)
    if step >= config.steps:
        return config.min_learning_rate
    done = (step - config.warmup) / (config.steps - config.warmup)  # 0 at the peak, 1 at the end
    height = 0.5 * (1 + math.cos(math.pi * done))
    return config.min_learning_rate + height * (config.learning_rate - config.min_learning_rate)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices, which are decayed, and the rest (norms, biases), which are not.

    Decay pulls a weight towards 0. For a matrix that means computing less, which a model can afford where it learns
    nothing; but a norm's gain belongs near 1, and a bias has nothing to overfit with. Embedding tables are matrices,
    and are decayed like the others (as in nanoGPT): a tied one is the output projection too.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the model's decay groups, fused into one kernel per group on a GPU."""
    groups = parameter_groups(model, config.weight_decay)
    fused = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=fused)


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
        raise ValueError(f"the validation text of {len(tokens)} tokens has no window of context {context}")
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


# One step


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the targets, in nats.

    Args:
        model: tokens (batch, T) to logits (batch, T, vocab_size).
        inputs: (batch, T) int64.
        targets: (batch, T) int64; ``IGNORED`` ones do not count.
    """
    logits = model(inputs)  # (batch, T, vocab_size)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


def accumulate_gradient(loss_of, inputs: Tensor, targets: Tensor, pieces: int) -> Tensor:
    """Add up the gradient of a batch piece by piece, and return the batch's loss.

    The mean over the batch is that of the pieces' means, each weighted by its share of the targets that count: by
    1 / ``pieces`` where all count and the pieces are equally large. Without the weights the gradient would be
    ``pieces`` times too long; with equal ones, a piece that is half padding would count for as much as a full one.

    Args:
        loss_of: a function of (inputs, targets) that returns the mean loss over the targets that are not ``IGNORED``.
        inputs: (batch, T) int64.
        targets: (batch, T) int64.
        pieces: how many micro-batches, at most ``batch``.

    Returns:
        The mean loss of the batch, in nats.

    Raises:
        ValueError: if the batch has fewer windows than pieces.
    """
    if not 1 <= pieces <= len(inputs):
        raise ValueError(f"a batch of {len(inputs)} windows cannot be cut into {pieces} micro-batches")
    total, all_counted = torch.zeros((), device=inputs.device), (targets != IGNORED).sum()
    for x, y in zip(inputs.tensor_split(pieces), targets.tensor_split(pieces), strict=True):
        counted = (y != IGNORED).sum()  # stays on the device: nothing waits for it
        loss = torch.where(counted > 0, loss_of(x, y), 0.0) * (counted / all_counted)  # a mean over nothing is NaN
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor, *, batch: int = 64) -> float:
    """Mean loss in nats over all targets that count, without dropout.

    Args:
        model: tokens (batch, T) to logits (batch, T, vocab_size).
        inputs: (windows, T) int64, on the model's device.
        targets: (windows, T) int64.
        batch: windows read at once.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=inputs.device)
    for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
        total += next_token_loss(model, x, y).double() * (y != IGNORED).sum()
    model.train(was_training)
    return (total / (targets != IGNORED).sum()).item()


def write(model: Decoder, encoding: Encoding, prompt: list[int], count: int, **sampling) -> str:
    """Let the model go on from a prompt, for at most ``count`` tokens (and its context), and return the text it wrote.

    Args:
        model: the decoder.
        encoding: of its tokens.
        prompt: at least one token.
        count: the most tokens to write; it ends earlier where the model ends the text.
        sampling: the fields of :class:`tformer_lib.generation.Sampling`; by default temperature 0.8 and seed 0.
    """
    stop = [encoding.eot_token] if END_OF_TEXT in encoding.special_tokens_set else []
    count = min(count, model.config.max_length - len(prompt) + 1)
    options = {"temperature": 0.8, "seed": 0, "max_new_tokens": count, "stop_tokens": stop, **sampling}
    tokens = generate(model, [prompt], **options)[0]
    return encoding.decode([token for token in tokens if token not in stop])


# Checkpoints


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that at any moment, also after a power cut, its name holds all of the old data or all of the new.

    Raises:
        OSError: if it cannot be written, with the path and the reason; what was there before stays.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # the data is on the disk before the name points to it
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        kept = "; the file that was there is kept" if path.exists() else ""
        raise OSError(f"could not save {path}: {error.strerror or error}{kept}") from error
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def weights_of(model: nn.Module, *, copy: bool = False) -> dict[str, Tensor]:
    """The parameters by name, or copies of them; a tied one once, under its first name."""
    return {name: p.detach().clone() if copy else p.detach() for name, p in model.named_parameters()}


@torch.no_grad()
def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str = "the file") -> None:
    """Copy weights into the model.

    Raises:
        ValueError: if names or shapes are not the model's; the message names the first that differs, and the model is
            as it was.
    """
    ours = weights_of(model)
    for name in [*ours, *weights]:
        if name not in weights or name not in ours:
            where = "does not have" if name not in weights else "has, but the model has not,"
            raise ValueError(f"{source} is of another configuration: it {where} {name}")
        if weights[name].shape != ours[name].shape:
            theirs, expected = tuple(weights[name].shape), tuple(ours[name].shape)
            raise ValueError(f"{source} is of another configuration: {name} is {theirs}, the model's is {expected}")
    for name, parameter in ours.items():
        parameter.copy_(weights[name])


def save_weights(path: Path, model: nn.Module, facts: dict) -> None:
    """Write the model's weights as float32 safetensors, with facts (JSON) in the file's metadata, atomically."""
    tensors = {name: p.float().contiguous() for name, p in weights_of(model).items()}
    write_atomically(path, safetensors.torch.save(tensors, {"facts": json.dumps(facts)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a safetensors file and the facts in its metadata.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no whole safetensors file.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return tensors, json.loads((file.metadata() or {}).get("facts", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def random_states() -> tuple[dict[str, Tensor], dict]:
    """The states of torch's generators as tensors, of numpy's and Python's as JSON."""
    tensors = {"random.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"random.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    name, keys, position, has_gauss, gauss = np.random.get_state()
    numpy_state = [name, keys.tolist(), position, has_gauss, gauss]
    return tensors, {"python": random.getstate(), "numpy": numpy_state}


def restore_random_states(tensors: dict[str, Tensor], facts: dict) -> None:
    """The inverse of :func:`random_states`; states of GPUs that are not here are left out."""
    torch.set_rng_state(tensors["random.torch"])
    for i in range(torch.cuda.device_count()):
        if f"random.cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{i}"], i)
    version, keys, gauss = facts["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = facts["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


# A run


class Run:
    """A training run in progress: the model, its optimizer, and how far it has come.

    Args:
        config: the settings.
        corpus: the text; read from ``config.data`` if not given.

    Raises:
        ValueError: if the settings do not fit the corpus.

    Attributes:
        step: steps of the optimizer done.
        best: the lowest validation loss so far, in nats per token.
        history: every measurement, as in metrics.jsonl.
        val_tokens: how many predictions an evaluation averages over.
        floor: the mean loss that the source of the text itself would have on them, if it is known.
    """

    def __init__(self, config: TrainingConfig, corpus: Corpus | None = None):
        self.corpus = corpus or Corpus.load(config.data)
        self.config = config = fit_to_corpus(config, self.corpus)
        self.device = pick_device(config.device)
        seed_all(config.seed)
        self.model = Decoder(config.model).to(self.device)
        self.optimizer = make_optimizer(self.model, config)
        self.average = weights_of(self.model, copy=True) if config.average else {}
        self.step, self.best, self.history, self.started = 0, math.inf, [], False
        end = end_of_document(self.corpus)
        windows = evaluation_windows(self.corpus.val, config.context, count=config.eval_windows, end_of_document=end)
        self.val_inputs, self.val_targets = (x.to(self.device) for x in windows)
        self.val_tokens = int((self.val_targets != IGNORED).sum())
        self.floor = entropy_floor(self.corpus, windows[1])
        compiled = self.device.type == "cuda" if config.compile is None else config.compile
        self.loss = torch.compile(next_token_loss) if compiled else next_token_loss

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.config.out)

    @property
    def checkpoint(self) -> Path:
        """The file that holds all that is needed to go on."""
        return self.out / "checkpoint.safetensors"

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products in bfloat16 where config and device say so; weights, norms and the loss stay in float32."""
        wanted = self.config.dtype
        if wanted == "auto":
            wanted = "bfloat16" if self.device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
        if wanted == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def take_step(self) -> tuple[Tensor, Tensor]:
        """One step of the optimizer; returns the batch's loss and the gradient's norm before clipping."""
        config = self.config
        inputs, targets = self.next_batch()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        loss = accumulate_gradient(self.batch_loss, inputs, targets, config.accumulation)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.update_average()
        return loss, norm

    def update_average(self) -> None:
        """Move the average towards the weights of now; at first in larger steps, to forget the random start."""
        if self.average:
            memory = min(self.config.average, self.step / (self.step + 9))
            torch._foreach_lerp_(list(self.average.values()), list(weights_of(self.model).values()), 1 - memory)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the averaged weights, if the run keeps them, and afterwards with its own again."""
        if not self.average:
            yield
            return
        own = weights_of(self.model, copy=True)
        load_weights(self.model, self.average)
        yield
        load_weights(self.model, own)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The windows of the step to come, (batch, context) int64 each, on the device."""
        starts = window_starts(len(self.corpus.train), self.config, self.step)
        inputs, targets = read_windows(self.corpus.train, starts, self.config.context)
        windows = replace_some(inputs, self.config, self.step), targets
        if self.device.type == "cuda":  # from pinned memory the copy does not wait for the step before
            windows = tuple(x.pin_memory() for x in windows)
        return tuple(x.to(self.device, non_blocking=True) for x in windows)

    def batch_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of one micro-batch, in the run's precision."""
        with self.autocast():
            return self.loss(self.model, inputs, targets)

    def evaluate(self) -> float:
        """Measure the validation loss, record it, and keep the weights if they are the best so far."""
        with self.averaged():
            with self.autocast():
                loss = evaluate(self.model, self.val_inputs, self.val_targets)
            self.keep_best(loss)
        self.record(val_loss=loss, val_tokens=self.val_tokens, **({} if self.floor is None else {"floor": self.floor}))
        return loss

    def keep_best(self, loss: float) -> None:
        """Write the model's weights to best.safetensors if their validation loss is the lowest so far."""
        if loss < self.best:
            self.best = loss
            save_weights(self.out / "best.safetensors", self.model, {**self.facts(), "val_loss": loss})

    def sample(self) -> str:
        """What the model writes now, from the beginning of a text."""
        with self.averaged():
            text = write(self.model, self.corpus.encoding, beginning(self.corpus), self.config.sample_tokens)
        self.record(sample=text)
        return text

    def record(self, **values) -> None:
        """Append one measurement to the history and to metrics.jsonl."""
        line = {"step": self.step, **values}
        self.history.append(line)
        path = self.out / "metrics.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(f"could not write {path}: {error.strerror}; the last checkpoint is kept") from error

    def facts(self) -> dict:
        """What a file of weights says about itself."""
        corpus = fingerprint(self.corpus)
        return {"config": asdict(self.config), "step": self.step, "corpus": corpus, "beginning": beginning(self.corpus)}

    def save(self) -> None:
        """Replace the checkpoint by one of now, atomically.

        Raises:
            OSError: if it cannot be written; the checkpoint before it stays.
        """
        tensors, states = random_states()
        tensors |= {f"weights.{name}": p for name, p in weights_of(self.model).items()}
        tensors |= {f"average.{name}": x for name, x in self.average.items()}
        names = {p: name for name, p in self.model.named_parameters()}
        for parameter, state in self.optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": value for key, value in state.items()}
        facts = {**self.facts(), "best": self.best, "random": states}
        data = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, {"facts": json.dumps(facts)})
        write_atomically(self.checkpoint, data)

    @classmethod
    def resume(cls, out: str | Path, corpus: Corpus | None = None, **changes) -> "Run":
        """The run of that folder, as its last checkpoint left it.

        Args:
            out: the run's folder.
            corpus: the text; read from the folder that the run's config names if not given.
            changes: fields of the config to change, such as ``device`` or a larger ``steps``.

        Raises:
            FileNotFoundError: if the folder has no checkpoint.
            ValueError: if the checkpoint is damaged, or of another configuration or corpus.
        """
        tensors, facts = read_tensors(Path(out) / "checkpoint.safetensors")
        if not {"config", "random", "corpus"} <= facts.keys():
            raise ValueError(f"{Path(out) / 'checkpoint.safetensors'} holds weights, but no training run")
        run = cls(replace(config_from_dict(facts["config"]), out=str(out), **changes), corpus)
        if facts["corpus"] != fingerprint(run.corpus):
            raise ValueError(f"the run in {out} was trained on another corpus than {run.config.data} holds now")
        run.restore(tensors, facts)
        return run

    def restore(self, tensors: dict[str, Tensor], facts: dict) -> None:
        """Take over the state of a checkpoint: the inverse of :meth:`save`."""
        part = lambda prefix: {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        load_weights(self.model, part("weights."), str(self.checkpoint))
        self.average = {name: tensors[f"average.{name}"].to(self.device) for name in self.average}
        for name, parameter in self.model.named_parameters():
            state = part(f"optimizer.{name}.")
            if state:  # the step counts on the host, unless the optimizer is fused
                counter = parameter.device if self.optimizer.defaults["fused"] else "cpu"
                self.optimizer.state[parameter] = {
                    k: v.to(counter if k == "step" else parameter.device) for k, v in state.items()
                }
        self.step, self.best, self.started = facts["step"], facts["best"], True
        self.history = [line for line in read_metrics(self.out) if line["step"] <= self.step]
        write_atomically(self.out / "metrics.jsonl", "".join(json.dumps(x) + "\n" for x in self.history).encode())
        restore_random_states(tensors, facts["random"])

    def start(self) -> None:
        """Make the run's folder and its first files.

        Raises:
            ValueError: if the folder holds another run.
        """
        if self.checkpoint.exists():
            _, facts = read_tensors(self.checkpoint)
            raise ValueError(
                f"{self.out} already holds a run: {difference(facts.get('config', {}), asdict(self.config))}"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out / "config.json", (json.dumps(asdict(self.config), indent=1) + "\n").encode())
        save_encoding(self.corpus.encoding, self.out)
        (self.out / "metrics.jsonl").unlink(missing_ok=True)
        self.started = True

    def train(self, *, quiet: bool = False) -> bool:
        """Train to the end, or until Ctrl-C, then save.

        Args:
            quiet: show no progress bar and no samples.

        Returns:
            Whether the run came to its end.

        Raises:
            FloatingPointError: if the loss is not finite any more; the last checkpoint is left as it was.
        """
        if not self.started:
            self.start()
        with Progress(self, quiet) as progress, interrupts() as interrupted:
            if not self.history:
                progress.evaluated(self.evaluate())
            while self.step < self.config.steps and not interrupted:
                loss, norm = self.take_step()
                self.after_step(loss, norm, progress)
            if interrupted:
                self.save()
        return not interrupted

    def after_step(self, loss: Tensor, norm: Tensor, progress: "Progress") -> None:
        """Log, evaluate, sample and save when it is time to."""
        config, last = self.config, self.step == self.config.steps
        if self.step % config.log_interval == 0 or last:
            progress.logged(self.log(loss.item(), norm.item(), progress.tokens_per_second()))
        if self.step % config.eval_interval == 0 or last:
            progress.evaluated(self.evaluate(), self.sample() if config.sample_tokens else None)
        if self.step % config.save_interval == 0 or last:
            self.save()
            progress.skip_time()

    def log(self, loss: float, norm: float, tokens_per_second: float) -> float:
        """Record the training loss, and stop if it is not finite."""
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {self.step}: try a lower learning_rate or a longer warmup"
            )
        rate = learning_rate(self.step - 1, self.config)
        self.record(loss=loss, learning_rate=rate, gradient_norm=norm, tokens_per_second=round(tokens_per_second))
        return loss


class Progress:
    """The live bar of a run: loss, validation loss, tokens per second, time left; and the samples as they come."""

    def __init__(self, run: Run, quiet: bool):
        self.run, self.shown = run, {}
        self.bar = tqdm(total=run.config.steps, initial=run.step, unit="step", disable=quiet, dynamic_ncols=True)
        self.skip_time()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def skip_time(self) -> None:
        """Start the clock again, so that evaluating and saving do not count as training."""
        self.since, self.from_step = time.perf_counter(), self.run.step

    def tokens_per_second(self) -> float:
        """Since the clock was last started."""
        config, seconds = self.run.config, time.perf_counter() - self.since
        return (self.run.step - self.from_step) * config.batch * config.context / max(seconds, 1e-9)

    def logged(self, loss: float) -> None:
        """Show a new training loss and the speed."""
        speed = self.tokens_per_second()
        self.show(loss=f"{loss:.3f}", tok_s=f"{speed / 1e3:.1f}k" if speed < 1e6 else f"{speed / 1e6:.2f}M")
        self.skip_time()

    def evaluated(self, loss: float, sample: str | None = None) -> None:
        """Show a new validation loss, and the sample above the bar."""
        floor = self.run.floor
        self.show(val=f"{loss:.3f}" + ("" if floor is None else f" (floor {floor:.3f})"))
        if sample is not None and not self.bar.disable:
            self.bar.write(f"--- step {self.run.step}, validation loss {loss:.4f}\n{sample}\n")
        self.skip_time()

    def show(self, **values: str) -> None:
        """Bring the bar up to date."""
        self.shown |= values
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update(self.run.step - self.bar.n)


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect the first Ctrl-C (or SIGTERM) in a list, instead of raising in the middle of a step; a second one raises.

    Outside the main thread, where Python hears no signals, the list stays empty.
    """
    heard: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def hear(number: int, _frame) -> None:
        heard.append(number)
        for known, handler in before.items():
            signal.signal(known, handler)

    for number in before:
        signal.signal(number, hear)
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(config: TrainingConfig, *, quiet: bool = False) -> Run:
    """Train from the beginning; returns the run with its model and history."""
    run = Run(config)
    run.train(quiet=quiet)
    return run


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


def pick_device(name: str) -> torch.device:
    """The device of that name; 'auto' is the first GPU if there is one.

    Raises:
        ValueError: if there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not here: {str(error).splitlines()[0]}") from error
    return device


def seed_all(seed: int) -> None:
    """Seed torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def difference(theirs: dict, ours: dict) -> str:
    """What to do about a run that is already there, naming the first setting that differs."""
    for field in fields(TrainingConfig):
        if theirs.get(field.name) == ours[field.name]:
            continue
        if isinstance(ours[field.name], dict) and isinstance(theirs.get(field.name), dict):
            key = next(k for k, v in ours[field.name].items() if theirs[field.name].get(k) != v)
            there, here = theirs[field.name].get(key), ours[field.name][key]
            return f"its {field.name}.{key} is {there!r}, yours is {here!r}; choose another --out"
        return f"its {field.name} is {theirs.get(field.name)!r}, yours is {ours[field.name]!r}; choose another --out"
    return "it has the same settings: resume it, or choose another --out"


def read_metrics(out: str | Path) -> list[dict]:
    """The measurements of a run's folder, or of a metrics file; a last line that a crash cut short is left out."""
    path = Path(out)
    path = path / "metrics.jsonl" if path.is_dir() else path
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


# What it costs


def estimate_flops_per_token(config: ModelConfig, context: int | None = None) -> float:
    """Floating-point operations that training spends on a token, forward and backward (PaLM, appendix B).

    Every weight of a matrix multiplies once and adds once: 2 forward, and twice that backward (for the input's gradient
    and the weight's), 6 in all. The embedding table is looked up, not multiplied, but the output projection counts.
    Attention adds 2 products of length ``context`` per element of the heads, q k^T and weights v: 12 in all per layer.
    As is the custom, the half that causality could save is counted.

    Args:
        config: the model's.
        context: the window's length; ``config.max_length`` if not given.
    """
    heads = config.heads * config.size_of_head
    kv = config.number_of_kv_heads * config.size_of_head
    matrices = 3 if config.feed_forward == "swiglu" else 2
    layer = config.width * (2 * heads + 2 * kv) + matrices * config.width * config.size_of_feed_forward
    weights = config.layers * layer + config.width * config.vocab_size
    return 6 * weights + 12 * config.layers * heads * (context or config.max_length)


# The command line


@dataclass(frozen=True)
class Resume:
    """Go on with a run from its last checkpoint, exactly where it was."""

    out: str
    """The run's folder."""
    steps: int | None = None
    """Train to this step instead of the run's own last one (the cosine then ends there)."""
    data: str | None = None
    """Where the corpus is now, if it was moved."""
    device: str | None = None
    """Go on on another device."""


@dataclass(frozen=True)
class Sample:
    """Let the best weights of a run write."""

    out: str
    """The run's folder."""
    prompt: str = ""
    """What to go on from; by default the beginning of a text."""
    tokens: int = 200
    """Tokens to write at most."""
    temperature: float = 0.8
    """What the logits are divided by: 0 always takes the likeliest token, 1 draws from the model's own distribution."""
    top_k: int | None = None
    """Draw from this many likeliest tokens only; None is from all."""
    seed: int = 0
    """Seeds the draws."""
    device: str = "auto"
    """Where to run."""


def command_train(config: TrainingConfig) -> int:
    """Train a run from the beginning."""
    return train_and_tell(Run(config))


def command_resume(command: Resume) -> int:
    """Go on with a run."""
    changes = {name: getattr(command, name) for name in ("steps", "data", "device")}
    return train_and_tell(Run.resume(command.out, **{k: v for k, v in changes.items() if v is not None}))


def train_and_tell(run: Run) -> int:
    """Train, say where things are, and return the exit status: 130 after Ctrl-C, as a shell expects."""
    config = run.config
    print(
        f"{count_parameters(run.model):,} parameters on {run.device}, {config.batch * config.context:,} tokens a step, "
        f"steps {run.step} to {config.steps}, validation on {run.val_tokens:,} tokens; Ctrl-C saves and stops"
    )
    finished = run.train()
    floor = "" if run.floor is None else f" (the entropy of the text is {run.floor:.4f})"
    print(f"{'finished' if finished else 'stopped'} at step {run.step}, best validation loss {run.best:.4f}{floor}")
    print(f"next: python -m tformer_lib.training {'sample' if finished else 'resume'} --out {run.out}")
    return 0 if finished else 130


def command_sample(command: Sample) -> int:
    """Write a text."""
    weights, facts = read_tensors(Path(command.out) / "best.safetensors")
    encoding = load_encoding(command.out)
    model = Decoder(config_from_dict(facts["config"]).model)
    load_weights(model, weights, f"{command.out}/best.safetensors")
    model.to(pick_device(command.device)).eval()
    prompt = facts["beginning"] + encoding.encode(command.prompt, disallowed_special=())
    options = {"temperature": command.temperature, "top_k": command.top_k, "seed": command.seed}
    print(command.prompt + write(model, encoding, prompt, command.tokens, **options))
    return 0


def preset_in(arguments: list[str]) -> str:
    """The preset that the arguments name: flags change its fields, so it must be known before they are read."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith("--preset"):
            return argument.partition("=")[2] if "=" in argument else following
    return "quick"


def describe_presets() -> str:
    """One line per preset, for --help."""
    lines = []
    for name, c in PRESETS.items():
        shape = f"{c.model.layers} layers, {c.model.width} wide, context {c.context}"
        lines.append(f"  {name:22} {shape}, {c.steps:,} steps of {c.batch} windows of {c.data}")
    return "\n".join(lines)


HELP = """Train a small Transformer, go on with it after a stop, and let it write.

  python -m tformer_lib.tokens --help                              make a corpus first
  python -m tformer_lib.training train --preset quick              train on it
  python -m tformer_lib.training train --help                      every setting, with the preset's value
  python -m tformer_lib.training resume --out runs/quick           go on after Ctrl-C or a crash
  python -m tformer_lib.training sample --out runs/quick --prompt Once

Presets:
"""


@contextlib.contextmanager
def checks_deferred() -> Iterator[None]:
    """Let configs be built unchecked: tyro would put what their checks say into a box of its own, cut into lines."""
    checks = {kind: kind.__post_init__ for kind in (ModelConfig, TrainingConfig)}
    for kind in checks:
        kind.__post_init__ = lambda self: None
    try:
        yield
    finally:
        for kind, check in checks.items():
            kind.__post_init__ = check


def read_command(arguments: list[str]) -> TrainingConfig | Resume | Sample:
    """What the command line asks for; ``--help`` prints and exits."""
    import tyro  # here, so that the library trains where there is no tyro

    start = preset(preset_in(arguments))
    settings = tyro.conf.subcommand("train", default=start, description="Train a model from the beginning.")
    commands = (
        Annotated[TrainingConfig, settings]
        | Annotated[Resume, tyro.conf.subcommand("resume")]
        | Annotated[Sample, tyro.conf.subcommand("sample")]
    )
    with checks_deferred():
        command = tyro.cli(
            commands, args=arguments, prog="python -m tformer_lib.training", description=HELP + describe_presets()
        )
    if isinstance(command, TrainingConfig):
        replace(command.model), replace(command)  # built again, now with their checks
    return command


def run_command(arguments: list[str]) -> int:
    """Do what the command line asks for; returns the exit status."""
    command = read_command(arguments)
    return {TrainingConfig: command_train, Resume: command_resume, Sample: command_sample}[type(command)](command)


def main(arguments: list[str] | None = None) -> int:
    """The command line: an error that the user can mend is one line, without a traceback."""
    try:
        return run_command(sys.argv[1:] if arguments is None else arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint, if there is one, is whole", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
