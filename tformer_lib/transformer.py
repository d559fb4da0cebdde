"""The Transformer: the encoder-decoder of the paper, and the decoder-only model that grew out of it.

One :class:`Block` serves every model here: GPT-2's (LayerNorm, GELU, learned positions), Llama's (RMSNorm, SwiGLU,
RoPE, grouped queries) and the paper's encoder and decoder (ReLU, sinusoids, cross-attention). A :class:`ModelConfig`
says which.

Sources: Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762); Radford et al. 2019 (GPT-2);
Touvron et al. 2023 (Llama, arXiv:2302.13971); Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202);
Zhang and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv:1910.07467).
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tformer_lib import positional_encoding, profiling
from tformer_lib.attention import MultiHeadAttention
from tformer_lib.contract import readable
from tformer_lib.masks import padding
from tformer_lib.rope import Rope

ATTENTION_FORMS = {
    "attention": "tformer_lib.attention:attend",
    "sdpa": "tformer_lib.attention:attend_sdpa",
    "flash_attention": "tformer_lib.flash_attention:flash_attention",
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "swiglu": F.silu,
}


def attention_form(name: str) -> Callable:
    """The attention function of that name, imported when it is asked for.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in ATTENTION_FORMS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION_FORMS)}, got {name!r}")
    module, function = ATTENTION_FORMS[name].split(":")
    return getattr(import_module(module), function)


@dataclass(frozen=True)
class ModelConfig:
    """What a model is made of. The defaults are a small GPT-2-like model.

    Raises:
        ValueError: when sizes do not fit together or a choice is unknown; the message names both.
    """

    vocab_size: int
    """How many tokens there are."""
    max_length: int = 256
    """The longest sequence: the size of a learned position table, and what a cache reserves."""
    width: int = 256
    """The size of the vector that stands for a token between blocks (d_model in the paper)."""
    layers: int = 4
    """How many blocks (in an encoder-decoder: how many in each stack)."""
    heads: int = 4
    """Query heads in each attention."""
    kv_heads: int | None = None
    """Key and value heads, which must divide ``heads``; None is as many as ``heads``."""
    head_dim: int | None = None
    """The size of one head; None is ``width / heads``."""
    feed_forward_width: int | None = None
    """The size inside the feed-forward; None is 4 x width, or 8/3 x width for SwiGLU, which has three matrices."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """The normalisation."""
    norm_first: bool = True
    """True normalises what goes into a sub-layer (pre-norm), False the sum that comes out (the paper's post-norm)."""
    final_norm: bool | None = None
    """A last norm after the blocks; None is: with pre-norm yes, with post-norm no."""
    norm_epsilon: float = 1e-5
    """What the norm adds to the variance."""
    feed_forward: Literal["relu", "gelu", "gelu_tanh", "swiglu"] = "gelu"
    """The feed-forward's non-linearity; GPT-2's is ``gelu_tanh``."""
    positions: Literal["sinusoidal", "learned", "rope", "alibi", "none"] = "learned"
    """How a token's place gets into the model."""
    rope_base: float = 10_000.0
    """RoPE's base: the slowest pair turns once in about 2 pi x base tokens."""
    rope_layout: Literal["half", "interleaved"] = "half"
    """Which elements of a head RoPE pairs: Llama's halves, or the paper's neighbours."""
    rope_scaling: dict | None = None
    """How RoPE is stretched past the trained length, as :meth:`tformer_lib.rope.Rope.from_parameters` reads it; None
    leaves it alone. The trained length is its ``original_max_position_embeddings``, or ``max_length``."""
    attention: str = "sdpa"
    """The attention form: 'attention' is the readable reference, 'sdpa' torch's fused one."""
    tie_embeddings: bool = True
    """Whether the output projection is the embedding table."""
    scale_embeddings: bool = False
    """Whether embeddings are multiplied by sqrt(width), as in the paper."""
    bias: bool = True
    """Whether linear layers and LayerNorm have a bias."""
    dropout: float = 0.0
    """The share of elements dropped from the embeddings and from what each sub-layer adds."""

    def __post_init__(self):
        self._check_sizes()
        self._check_choices()
        make_rope(self)  # refuses what RoPE cannot do

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "max_length", "width", "layers", "heads", "head_dim", "feed_forward_width"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.norm_epsilon >= 0:
            raise ValueError(f"norm_epsilon must be at least 0, got {self.norm_epsilon}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads; set head_dim or change one")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"{self.heads} heads are not a multiple of {self.kv_heads} kv_heads")
        if self.positions == "rope" and self.size_of_head % 2:
            raise ValueError(f"RoPE turns pairs, so head_dim must be even, got {self.size_of_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def _check_choices(self) -> None:
        choices = {
            "norm": ("layernorm", "rmsnorm"),
            "feed_forward": tuple(ACTIVATIONS),
            "positions": ("sinusoidal", "learned", "rope", "alibi", "none"),
            "attention": tuple(ATTENTION_FORMS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.positions == "alibi" and self.attention not in ("attention", "sdpa"):
            raise ValueError(f"ALiBi adds a bias, which attention 'attention' and 'sdpa' take, got {self.attention!r}")

    @property
    def size_of_head(self) -> int:
        """``head_dim``, or what follows from width and heads."""
        return self.head_dim or self.width // self.heads

    @property
    def number_of_kv_heads(self) -> int:
        """``kv_heads``, or as many as there are heads."""
        return self.kv_heads or self.heads

    @property
    def size_of_feed_forward(self) -> int:
        """``feed_forward_width``, or 4 x width; for SwiGLU 8/3 x width, rounded up to a multiple of 8."""
        if self.feed_forward_width is not None:
            return self.feed_forward_width
        return 4 * self.width if self.feed_forward != "swiglu" else -(-8 * self.width // 24) * 8

    @property
    def has_final_norm(self) -> bool:
        """Whether a norm follows the last block."""
        return self.norm_first if self.final_norm is None else self.final_norm


def make_norm(config: ModelConfig) -> nn.Module:
    """The config's norm over the last dimension, (..., width) -> (..., width)."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.width, eps=config.norm_epsilon)
    return nn.LayerNorm(config.width, eps=config.norm_epsilon, bias=config.bias)


class FeedForward(nn.Module):
    """Two linear maps with a non-linearity between, on each token alone; SwiGLU gates it with a third.

    (batch, T, width) -> (batch, T, width)
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        inner, gated = config.size_of_feed_forward, config.feed_forward == "swiglu"
        self.up = nn.Linear(config.width, inner, bias=config.bias)
        self.gate = nn.Linear(config.width, inner, bias=config.bias) if gated else None
        self.down = nn.Linear(inner, config.width, bias=config.bias)
        self.activation = ACTIVATIONS[config.feed_forward]

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, T, width)."""
        hidden = self.up(x)  # (batch, T, feed_forward_width)
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(x)) * hidden
        return self.down(hidden)  # (batch, T, width)


class Block(nn.Module):
    """Attention, then cross-attention if there is a memory to look at, then the feed-forward; each adds to its input.

    Args:
        config: what the block is made of.
        cross: whether it also attends to an encoder's output.
        attend: the attention function, instead of the one that the config names.
    """

    def __init__(self, config: ModelConfig, *, cross: bool = False, attend: Callable | None = None):
        super().__init__()
        attend = attend or attention_form(config.attention)
        new_attention = partial(
            MultiHeadAttention,
            config.width,
            config.heads,
            kv_heads=config.number_of_kv_heads,
            head_dim=config.size_of_head,
            bias=config.bias,
            attend=attend,
        )
        self.norm_first = config.norm_first
        self.attention_norm, self.attention = make_norm(config), new_attention()
        self.cross_norm, self.cross_attention = (make_norm(config), new_attention()) if cross else (None, None)
        self.feed_forward_norm, self.feed_forward = make_norm(config), FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        *,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        causal: bool = False,
        bias: Tensor | None = None,
        rotate: Callable[[Tensor], Tensor] | None = None,
        cache=None,
    ) -> Tensor:
        """One block.

        Args:
            x: (batch, T, width).
            memory: (batch, S, width), the encoder's output; needed if the block has cross-attention.
            mask: boolean, broadcastable to (batch, heads, T, T), True where a query may look.
            memory_mask: the same for the memory, broadcastable to (batch, heads, T, S).
            causal: whether a token may look only at itself and what is before it.
            bias: additive, broadcastable to (batch, heads, T, T).
            rotate: RoPE's rotation of (batch, heads, T, head_dim) queries and keys.
            cache: this layer's part of a KV cache.
        """
        attend = partial(self.attention, mask=mask, causal=causal, bias=bias, rotate=rotate, cache=cache)
        if (memory is None) != (self.cross_attention is None):
            needs, came = ("a", "none") if memory is None else ("no", "one")
            raise ValueError(f"this block has {needs} cross-attention and so takes {needs} memory, got {came}")
        with profiling.range("attention"):
            x = self._add(x, self.attention_norm, attend)
        if self.cross_attention is not None:
            with profiling.range("cross-attention"):
                x = self._add(x, self.cross_norm, partial(self.cross_attention, context=memory, mask=memory_mask))
        with profiling.range("feed-forward"):
            return self._add(x, self.feed_forward_norm, self.feed_forward)

    def _add(self, x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """The residual connection: pre-norm keeps the sum untouched, post-norm normalises it."""
        if self.norm_first:
            return x + self.dropout(sublayer(norm(x)))
        return norm(x + self.dropout(sublayer(x)))


class Stack(nn.Module):
    """Blocks one after the other, and the final norm if the config has one: (batch, T, width) -> (batch, T, width)."""

    def __init__(self, config: ModelConfig, *, cross: bool = False, attend: Callable | None = None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, cross=cross, attend=attend) for _ in range(config.layers))
        self.final_norm = make_norm(config) if config.has_final_norm else nn.Identity()

    def forward(self, x: Tensor, *, cache=None, **options) -> Tensor:
        """x: (batch, T, width); ``options`` go to each :class:`Block`, and to each its own layer of the cache."""
        for i, block in enumerate(self.blocks):
            x = block(x, cache=None if cache is None else cache.layer(i), **options)
        return self.final_norm(x)


class Embedding(nn.Module):
    """Tokens and their places to vectors: (batch, T) -> (batch, T, width)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.scale = math.sqrt(config.width) if config.scale_embeddings else 1.0
        self.places = self._places(config)
        self.dropout = nn.Dropout(config.dropout)

    @staticmethod
    def _places(config: ModelConfig) -> nn.Module | None:
        """What is added for a token's place; RoPE and ALiBi act inside attention instead."""
        if config.positions == "sinusoidal":
            return positional_encoding.SinusoidalEncoding(config.width)
        if config.positions == "learned":
            return positional_encoding.LearnedEncoding(config.max_length, config.width)
        return None

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """tokens: (batch, T) int64; positions: (T,) or (batch, T) int64, by default 0, 1, ..."""
        check_tokens(tokens, self.tokens.num_embeddings)
        x = self.tokens(tokens) * self.scale  # (batch, T, width)
        return self.dropout(x if self.places is None else self.places(x, positions))


class Decoder(nn.Module):
    """The decoder-only model: predicts each next token from those before it.

    Args:
        config: what it is made of.
        attend: an attention function under the contract, instead of the one that the config names.
    """

    def __init__(self, config: ModelConfig, *, attend: Callable | None = None):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.stack = Stack(config, attend=attend)
        self.unembedding = nn.Linear(config.width, config.vocab_size, bias=False)
        self.rope = make_rope(config)
        initialise(self, config)
        if config.tie_embeddings:
            self.unembedding.weight = self.embedding.tokens.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache=None,
        only: Tensor | None = None,
    ) -> Tensor:
        """The logits of the token after each one.

        Args:
            tokens: (batch, T) int64.
            positions: (T,) or (batch, T) int64, the place of each token; by default 0, 1, ... or what the cache says.
            mask: boolean, broadcastable to (batch, heads, T, T), on top of the causal mask.
            cache: a KV cache; T new tokens are appended to what it holds.
            only: (n,) int64, the places along T whose logits are wanted; all if not given. A server that reads a
                prompt needs those of its last token alone, and the vocabulary is the widest matrix.

        Returns:
            (batch, T, vocab_size), or (batch, n, vocab_size) with ``only``.

        Raises:
            ValueError: if ``tokens`` has another shape or dtype, or a token is outside the vocabulary or too far along
                for the model.
        """
        if positions is None and cache is not None:
            positions = cache.positions(tokens.shape[1])
        with profiling.range("embed"):
            x = self.embedding(tokens, positions)  # (batch, T, width)
        bias = self.score_bias(tokens.shape[1], cache)
        x = self.stack(x, mask=mask, causal=True, bias=bias, rotate=self.rotation(tokens, positions), cache=cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        with profiling.range("unembed"):
            return self.unembedding(x if only is None else x[:, only])  # (batch, T or n, vocab_size)

    def rotation(self, tokens: Tensor, positions: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        """RoPE's rotation at these positions, worked out once for all layers, if the config asks for it."""
        if self.rope is None:
            return None
        return self.rope.at(torch.arange(tokens.shape[1], device=tokens.device) if positions is None else positions)

    def score_bias(self, length: int, cache) -> Tensor | None:
        """ALiBi's bias, (heads, T, T), if the config asks for it."""
        if self.config.positions != "alibi":
            return None
        if cache is not None:
            raise ValueError("a model with ALiBi runs without a cache: its bias needs the place of every key")
        return positional_encoding.alibi(self.config.heads, length, device=self.unembedding.weight.device)


class EncoderDecoder(nn.Module):
    """The model of the paper: an encoder reads the source, a decoder writes the target while looking at it.

    The three embedding tables (source, target, output) are one, as in section 3.4 of the paper, unless
    ``config.tie_embeddings`` is off, which leaves the output its own.
    """

    def __init__(self, config: ModelConfig, *, attend: Callable | None = None):
        super().__init__()
        if config.positions in ("rope", "alibi"):
            raise ValueError(f"the encoder-decoder takes sinusoidal, learned or no positions, got {config.positions!r}")
        self.config = config
        self.embedding = Embedding(config)
        self.encoder = Stack(config, attend=attend)
        self.decoder = Stack(config, cross=True, attend=attend)
        self.unembedding = nn.Linear(config.width, config.vocab_size, bias=False)
        initialise(self, config)
        if config.tie_embeddings:
            self.unembedding.weight = self.embedding.tokens.weight

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        *,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """The logits of the target's next tokens.

        Args:
            source: (batch, S) int64.
            target: (batch, T) int64, shifted right: it starts with the start token.
            source_lengths: (batch,) int64, how many tokens of each source row are real; None is all.
            target_lengths: the same for the target.

        Returns:
            (batch, T, vocab_size).

        Raises:
            ValueError: if tokens have another shape or dtype or are outside the vocabulary, or lengths do not fit them.
        """
        memory = self.encode(source, source_lengths)
        return self.decode(target, memory, source_lengths=source_lengths, target_lengths=target_lengths)

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> Tensor:
        """source (batch, S) int64 -> memory (batch, S, width)."""
        x = self.embedding(source)  # (batch, S, width)
        return self.encoder(x, mask=None if lengths is None else padding(lengths, source.shape[1]))

    def decode(
        self,
        target: Tensor,
        memory: Tensor,
        *,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """target (batch, T) int64 and memory (batch, S, width) -> logits (batch, T, vocab_size)."""
        x = self.embedding(target)  # (batch, T, width)
        x = self.decoder(
            x,
            memory=memory,
            causal=True,
            mask=None if target_lengths is None else padding(target_lengths, target.shape[1]),
            memory_mask=None if source_lengths is None else padding(source_lengths, memory.shape[1]),
        )
        return self.unembedding(x)

    @torch.no_grad()
    def translate(
        self,
        source: Tensor,
        *,
        start: int,
        end: int,
        max_length: int | None = None,
        source_lengths: Tensor | None = None,
    ) -> Tensor:
        """Write the most likely target token by token, without dropout.

        Args:
            source: (batch, S) int64.
            start: the token that opens a target.
            end: the token that closes it; rows that have written it go on with it.
            max_length: the most tokens to write; by default ``config.max_length - 1``.
            source_lengths: (batch,) int64, how many tokens of each source row are real; None is all.

        Returns:
            (batch, at most max_length) int64, without the start token.
        """
        with evaluating(self):
            memory = self.encode(source, source_lengths)
            target = torch.full((source.shape[0], 1), start, device=source.device)
            for _ in range(self.config.max_length - 1 if max_length is None else max_length):
                logits = self.decode(target, memory, source_lengths=source_lengths)[:, -1]  # (batch, vocab_size)
                step = logits.argmax(-1, keepdim=True).masked_fill(target[:, -1:] == end, end)  # (batch, 1)
                target = torch.cat([target, step], dim=1)
                if (step == end).all():
                    break
        return target[:, 1:]


def all_modules(model: nn.Module) -> list[nn.Module]:
    """The model and all modules within it, in half the time that ``modules()`` takes, which makes names as well."""
    modules = [model]
    for module in modules:  # which grows meanwhile
        modules += [part for part in module._modules.values() if part is not None]
    return modules


class Evaluation:
    """Which modules of a model to put back into training mode, once the last that evaluates it has left."""

    def __init__(self):
        self.inside, self.training = 0, []


EVALUATIONS: WeakKeyDictionary[nn.Module, Evaluation] = WeakKeyDictionary()
"""The models that are being evaluated."""

EVALUATIONS_LOCK = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode (no dropout), and afterwards each of its modules in the mode that it was in.

    Whoever evaluates a model while somebody else does, in another thread or in a loop that has not ended, keeps it in
    evaluation mode until both have left. Modes are the model's: nobody can train it in the meantime.

    Args:
        model: any module.
    """
    with EVALUATIONS_LOCK:
        evaluation = EVALUATIONS.setdefault(model, Evaluation())
        training = [module for module in all_modules(model) if module.training]
        evaluation.training += training
        evaluation.inside += 1
        for module in training:
            module.training = False
    try:
        yield
    finally:
        with EVALUATIONS_LOCK:
            evaluation.inside -= 1
            if not evaluation.inside:
                for module in evaluation.training:
                    module.training = True
                evaluation.training.clear()


def label_smoothed_loss(logits: Tensor, targets: Tensor, *, smoothing: float = 0.1, ignore_index: int = -100) -> Tensor:
    """Cross-entropy against a target that keeps ``1 - smoothing`` for the right token and spreads the rest evenly.

    It is computed in float32, or in float64 for float64 logits.

    Args:
        logits: (..., vocab_size).
        targets: (...) int64; places that hold ``ignore_index`` do not count.
        smoothing: the share spread over all tokens, the right one included (section 5.4 of the paper: 0.1).

    Returns:
        The mean over the places that count, in nats; NaN, as in torch, if none does.

    Raises:
        ValueError: if smoothing is not in [0, 1].
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be in [0, 1], got {smoothing}")
    flat = logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(flat, targets.reshape(-1), label_smoothing=smoothing, ignore_index=ignore_index)


def make_rope(config: ModelConfig) -> Rope | None:
    """The config's RoPE, or None if it places tokens otherwise."""
    if config.positions != "rope":
        return None
    parameters = {**(config.rope_scaling or {}), "rope_theta": config.rope_base}
    return Rope.from_parameters(
        config.size_of_head, parameters, max_length=config.max_length, layout=config.rope_layout
    )


def initialise(model: nn.Module, config: ModelConfig) -> None:
    """GPT-2's initialisation: normal with deviation 0.02, smaller where 2 x layers branches add up in the residual."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        last = name.endswith(("out_proj.weight", "down.weight"))
        nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if last else 0.02)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Refuse tokens that are not (batch, T) integers, or on a CPU (elsewhere it would wait) outside the vocabulary."""
    if not isinstance(tokens, Tensor):
        raise ValueError(f"tokens must be a tensor of (batch, T) integers, got {type(tokens).__name__}")
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens must be (batch, T) integers, got {tokens.dtype} of shape {tuple(tokens.shape)}")
    if tokens.device.type == "cpu" and tokens.numel() and readable(tokens):
        lowest, highest = (x.item() for x in tokens.aminmax())
        if lowest < 0 or highest >= vocab_size:
            outside = lowest if lowest < 0 else highest
            raise ValueError(f"token {outside} is outside the vocabulary, which has tokens 0 to {vocab_size - 1}")


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model learns; a tied table counts once."""
    return sum(p.numel() for p in model.parameters())
