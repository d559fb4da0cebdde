"""What a model is made of: the settings of its blocks, and the functions that their names stand for."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tformer_lib.checkpoint import build
from tformer_lib.contract import SINGLE, check_positive
from tformer_lib.grouped_query_attention import LatentConfig
from tformer_lib.mixture_of_experts import ExpertsConfig
from tformer_lib.rope import Rope

ATTENTION_FORMS = {
    "attention": "tformer_lib.attention:attend",
    "sdpa": "tformer_lib.attention:attend_sdpa",
    "flash_attention": "tformer_lib.flash_attention:flash_attention",
}


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its approximation x / 2 (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), of any shape.

    Compiled, it is the same function as x sigmoid(2 u): an exponential is one instruction of a GPU, a tanh is dozens.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "swiglu": F.silu,
    "geglu": gelu_tanh,
}

GATED = ("swiglu", "geglu")
"""Feed-forwards whose non-linearity acts on a gate, a third matrix (Shazeer 2020); Gemma's is ``geglu``."""

NORMS = ("layernorm", "rmsnorm", "rmsnorm_1p")

LAYER_TYPES = ("full", "window", "nope", "linear")
"""What a layer can be: attention over all tokens before it, over a window of them, over all without RoPE, or linear
attention, which keeps a state of one size however many there are."""


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
class LinearConfig:
    """The sizes of a model's linear layers (:class:`tformer_lib.linear_attention.GatedDeltaLayer`)."""

    key_heads: int
    """Heads of queries and keys."""
    value_heads: int
    """Heads of values and states, a multiple of ``key_heads``."""
    head_dim: int
    """The size of a query and a key."""
    value_dim: int
    """The size of a value."""
    kernel: int = 4
    """Tokens that the short convolution sees, the token itself among them."""

    def __post_init__(self):
        for name in ("key_heads", "value_heads", "head_dim", "value_dim", "kernel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of linear layers must be at least 1, got {getattr(self, name)}")
        if self.value_heads % self.key_heads:
            raise ValueError(
                f"value heads must be a multiple of key heads, got {self.value_heads} and {self.key_heads}"
            )

    @property
    def channels(self) -> int:
        """Channels of the convolution: those of queries, keys and values."""
        return 2 * self.key_heads * self.head_dim + self.value_heads * self.value_dim

    @property
    def state(self) -> tuple[int, int, int]:
        """The shape of a row's state: a matrix for each value head."""
        return self.value_heads, self.head_dim, self.value_dim


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
    """The size inside the feed-forward; None is 4 x width, or 8/3 x width for SwiGLU and GeGLU: three matrices."""
    norm: Literal["layernorm", "rmsnorm", "rmsnorm_1p"] = "layernorm"
    """The normalisation; ``rmsnorm_1p`` multiplies by 1 + gain, with gains that begin at 0 (Gemma)."""
    norm_first: bool = True
    """True normalises what goes into a sub-layer (pre-norm), False the sum that comes out (the paper's post-norm)."""
    branch_norm: Literal["in", "out", "both"] = "in"
    """With ``norm_first``: what is normalised of each sub-layer. What goes in (GPT-2, Llama), what comes out before it
    is added (OLMo 2), or both (the sandwich of Gemma 2)."""
    final_norm: bool | None = None
    """A last norm after the blocks; None is: with pre-norm yes, with post-norm no."""
    norm_epsilon: float = 1e-5
    """What the norm adds to the variance."""
    feed_forward: Literal["relu", "gelu", "gelu_tanh", "swiglu", "geglu"] = "gelu"
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
    rotary_fraction: float = 1.0
    """The share of each head's channels that RoPE turns, the first ones; the rest knows no position (GPT-NeoX)."""
    window: int | None = None
    """A query of a window layer sees itself and the ``window - 1`` tokens before it (Mistral 7B)."""
    layer_types: tuple[Literal["full", "window", "nope", "linear"], ...] | None = None
    """What each layer attends to: ``full`` to all tokens before it, ``window`` to a window of them, ``nope`` to all
    without RoPE; ``linear`` is the gated delta rule. A pattern shorter than ``layers`` is repeated; Gemma 3's is five
    windows and a full layer, Qwen3-Next's three linear layers and a full one. None: all layers are window layers if
    there is a ``window``, else full."""
    linear: LinearConfig | None = None
    """The sizes of linear layers, which ``layer_types`` must name. A file's JSON object is read as one."""
    window_rope_base: float | None = None
    """RoPE's base in window layers, which ``rope_scaling`` then leaves alone (Gemma 3, OLMo 3); None is as elsewhere.
    """
    attention_bias: bool | Literal["qkv"] | None = None
    """Whether attention's projections have a bias: all, none, or queries, keys and values alone (Qwen2); None is as
    ``bias`` says."""
    qk_norm: Literal["head", "projection"] | None = None
    """Normalise queries and keys before they are turned: each head on its own (Qwen3, Gemma 3), or all of a token's
    queries together and all of its keys (OLMo 2)."""
    attention_scale: float | None = None
    """What scores are multiplied by; None is 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    """Scores s become cap * tanh(s / cap) (Gemma 2)."""
    attention_sinks: bool = False
    """Whether each head has a learned logit that takes part in the softmax and has no value (gpt-oss)."""
    attention_gate: bool = False
    """Whether what heads find is multiplied by a sigmoid of the token before the last projection (Qwen3-Next)."""
    attention_dropout: float = 0.0
    """The share of attention weights dropped in training."""
    logit_softcap: float | None = None
    """Logits z become cap * tanh(z / cap) (Gemma 2)."""
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

    latent: LatentConfig | None = None
    """Multi-head latent attention in the place of keys and values of every head (DeepSeek-V2); ``head_dim`` is then the
    part of a head that knows no position. A file's JSON object is read as one."""
    experts: ExpertsConfig | None = None
    """A mixture of experts in the place of feed-forwards; None is none. A file's JSON object is read as one."""

    def __post_init__(self):
        if isinstance(self.linear, dict):
            object.__setattr__(self, "linear", build(LinearConfig, self.linear, "linear"))
        if isinstance(self.latent, dict):
            object.__setattr__(self, "latent", build(LatentConfig, self.latent, "latent"))
        if isinstance(self.experts, dict):
            object.__setattr__(self, "experts", build(ExpertsConfig, self.experts, "experts"))
        if self.layer_types is not None:
            object.__setattr__(self, "layer_types", tuple(self.layer_types))  # a list where it was read from JSON
        self._check_sizes()
        self._check_choices()
        self._check_layers()
        for kind in set(self.pattern):
            make_rope(self, kind)  # refuses what RoPE cannot do

    def _check_sizes(self) -> None:
        sizes = ("vocab_size", "max_length", "width", "layers", "heads", "head_dim", "feed_forward_width", "window")
        for name in sizes:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.norm_epsilon <= SINGLE.max:
            raise ValueError(f"norm_epsilon must be finite in float32 and at least 0, got {self.norm_epsilon}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads, {self.heads}; set head_dim or change one")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        if self.positions == "rope" and self.turned_dim % 2:
            what = "head_dim" if self.latent is None else "rope_dim"
            raise ValueError(f"RoPE turns pairs, so {what} must be even, got {self.turned_dim}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("attention_scale", "attention_softcap", "logit_softcap"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if not 0 < self.rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction must be in (0, 1], got {self.rotary_fraction}")

    def _check_choices(self) -> None:
        choices = {
            "norm": NORMS,
            "branch_norm": ("in", "out", "both"),
            "attention_bias": (None, True, False, "qkv"),
            "qk_norm": (None, "head", "projection"),
            "feed_forward": tuple(ACTIVATIONS),
            "positions": ("sinusoidal", "learned", "rope", "alibi", "none"),
            "attention": tuple(ATTENTION_FORMS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")

    def _check_layers(self) -> None:
        if self.branch_norm != "in" and not self.norm_first:
            raise ValueError(f"branch_norm {self.branch_norm!r} needs norm_first: post-norm normalises the sum instead")
        if self.latent is not None:
            self._check_latent()
        if (self.linear is not None) != ("linear" in self.pattern):
            raise ValueError(f"layer_types and linear go together, got {self.layer_types} and {self.linear}")
        if self.layer_types is None:
            return
        if not 0 < len(self.layer_types) <= self.layers:
            raise ValueError(
                f"layer_types must name at least 1 layer and at most {self.layers}, got {len(self.layer_types)}"
            )
        for kind in self.layer_types:
            if kind not in LAYER_TYPES:
                raise ValueError(f"layer_types must be of {', '.join(LAYER_TYPES)}, got {kind!r}")
        if ("window" in self.layer_types) != (self.window is not None):
            raise ValueError(f"layer_types and window go together, got window {self.window} for {self.layer_types}")

    def _check_latent(self) -> None:
        if self.positions != "rope":
            raise ValueError(f"latent attention places tokens by RoPE, got positions {self.positions!r}")
        for name in ("window", "qk_norm", "attention_softcap", "attention_bias"):
            if getattr(self, name) is not None:
                raise ValueError(f"latent attention has no {name}, got {getattr(self, name)!r}")
        for name in ("attention_sinks", "attention_gate", "attention_dropout"):
            if getattr(self, name):
                raise ValueError(f"latent attention has no {name}, got {getattr(self, name)!r}")

    @property
    def types_of_layers(self) -> tuple[str, ...]:
        """The type of each layer: ``layer_types``, repeated, or one type for all."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.layers))

    @property
    def pattern(self) -> tuple[str, ...]:
        """The types of layers that repeat."""
        return self.layer_types or ("full" if self.window is None else "window",)

    @property
    def size_of_head(self) -> int:
        """``head_dim``, or what follows from width and heads."""
        return self.head_dim or self.width // self.heads

    @property
    def turned_dim(self) -> int:
        """The channels of a head among which RoPE finds its pairs."""
        return self.size_of_head if self.latent is None else self.latent.rope_dim

    @property
    def cached_dims(self) -> tuple[int, int, int]:
        """What a layer caches of a token: heads, and the sizes of a key and of a value."""
        if self.latent is not None:
            return 1, self.latent.entry, 0
        return self.number_of_kv_heads, self.size_of_head, self.size_of_head

    @property
    def number_of_kv_heads(self) -> int:
        """``kv_heads``, or as many as there are heads."""
        return self.kv_heads or self.heads

    @property
    def size_of_feed_forward(self) -> int:
        """``feed_forward_width``, or 4 x width; for a gated one 8/3 x width, rounded up to a multiple of 8."""
        if self.feed_forward_width is not None:
            return self.feed_forward_width
        return -(-8 * self.width // 24) * 8 if self.gated else 4 * self.width

    @property
    def gated(self) -> bool:
        """Whether a third matrix gates the feed-forward's hidden numbers."""
        return self.feed_forward in GATED

    @property
    def active_feed_forward_weights(self) -> int:
        """The weights that one token meets in the feed-forwards and routers of all layers; biases left out."""
        matrices, experts = 3 if self.gated else 2, self.experts
        dense = matrices * self.width * self.size_of_feed_forward
        if experts is None:
            return self.layers * dense
        inner = experts.per_token * (experts.width or self.size_of_feed_forward) + experts.shared_width
        mixture = self.width * (matrices * inner + experts.count + experts.shared_gate)
        return sum(mixture if experts.in_layer(layer) else dense for layer in range(self.layers))

    @property
    def has_final_norm(self) -> bool:
        """Whether a norm follows the last block."""
        return self.norm_first if self.final_norm is None else self.final_norm


def make_rope(config: ModelConfig, kind: str = "full") -> Rope | None:
    """The RoPE of the config's layers of a kind, or None if they place tokens otherwise."""
    if config.positions != "rope" or kind in ("nope", "linear"):
        return None
    parameters = {**(config.rope_scaling or {}), "rope_theta": config.rope_base}
    if kind == "window" and config.window_rope_base is not None:
        parameters = {"rope_theta": config.window_rope_base}
    if config.rotary_fraction != 1:
        parameters["partial_rotary_factor"] = config.rotary_fraction
    return Rope.from_parameters(config.turned_dim, parameters, max_length=config.max_length, layout=config.rope_layout)
