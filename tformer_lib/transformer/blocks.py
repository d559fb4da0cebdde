"""The parts of a model: the block, the stack of blocks, and the embedding before them."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tformer_lib import positional_encoding, profiling
from tformer_lib.attention import AttentionVariant, MultiHeadAttention
from tformer_lib.contract import product_dtype, readable
from tformer_lib.grouped_query_attention import MultiHeadLatentAttention
from tformer_lib.linear_attention import GatedDeltaLayer
from tformer_lib.mixture_of_experts import MixtureOfExperts
from tformer_lib.transformer.add_norm import add_norm, can_fuse
from tformer_lib.transformer.config import ACTIVATIONS, ModelConfig, attention_form, gelu_tanh
from tformer_lib.transformer.gelu_feed_forward import gelu_feed_forward


def make_norm(config: ModelConfig, size: int | None = None) -> nn.Module:
    """The config's norm over the last dimension, (..., size) -> (..., size); the size is the width if not given."""
    size = config.width if size is None else size
    if config.norm == "layernorm":
        return nn.LayerNorm(size, eps=config.norm_epsilon, bias=config.bias)
    return (nn.RMSNorm if config.norm == "rmsnorm" else RMSNorm1p)(size, eps=config.norm_epsilon)


class RMSNorm1p(nn.RMSNorm):
    """RMSNorm that multiplies by 1 + gain: gains begin at 0, where weight decay pulls them to. (..., n) -> (..., n)."""

    def reset_parameters(self) -> None:
        """Gains of 0."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """In float32 or better, rounded once."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, self.normalized_shape, 1 + self.weight.to(wide.dtype), self.eps).to(x.dtype)


class FeedForward(nn.Module):
    """Two linear maps with a non-linearity between, on each token alone; SwiGLU and GeGLU gate it with a third.

    (batch, T, width) -> (batch, T, width)

    Args:
        config: what the model is made of.
        inner: the size inside, if it is not the config's.
    """

    def __init__(self, config: ModelConfig, inner: int | None = None):
        super().__init__()
        inner, gated = inner or config.size_of_feed_forward, config.gated
        self.up = nn.Linear(config.width, inner, bias=config.bias)
        self.gate = nn.Linear(config.width, inner, bias=config.bias) if gated else None
        self.down = nn.Linear(inner, config.width, bias=config.bias)
        self.activation = ACTIVATIONS[config.feed_forward]
        self.fused_gelu = False  # whether GELU is taken inside the products, where it can be

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, T, width)."""
        if self.fused_gelu and self.can_fuse_gelu():
            return gelu_feed_forward(x, self.up.weight, self.down.weight)
        hidden = self.up(x)  # (batch, T, feed_forward_width)
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(x)) * hidden
        return self.down(hidden)  # (batch, T, width)

    def can_fuse_gelu(self) -> bool:
        """Whether it is GPT-2's: GELU by tanh between two plain linear maps, without biases and without hooks."""
        maps = (self.up, self.down)
        plain = all(type(x) is nn.Linear and x.bias is None for x in maps)
        hooked = any(x._forward_hooks or x._forward_pre_hooks for x in maps)
        return self.activation is gelu_tanh and self.gate is None and plain and not hooked


def make_feed_forward(config: ModelConfig, layer: int = 0) -> nn.Module:
    """The feed-forward of a layer: the dense one, or the mixture of experts that the config has in its place."""
    experts = config.experts
    if experts is None or not experts.in_layer(layer):
        return FeedForward(config)
    shared = FeedForward(config, experts.shared_width) if experts.shared_width else None
    kind = {"activation": ACTIVATIONS[config.feed_forward], "gated": config.gated, "bias": config.bias}
    return MixtureOfExperts(config.width, config.size_of_feed_forward, experts, shared=shared, **kind)


def make_attention(config: ModelConfig, kind: str = "full", *, attend: Callable | None = None) -> nn.Module:
    """The attention of the config's layers of a kind.

    Args:
        config: what the model is made of.
        kind: one of ``LAYER_TYPES``.
        attend: the attention function, instead of the one that the config names.
    """
    if kind == "linear":
        return make_linear_attention(config)
    if config.latent is not None:
        return make_latent_attention(config, attend or attention_form(config.attention))
    bias = config.bias if config.attention_bias is None else bool(config.attention_bias)
    attention = MultiHeadAttention(
        config.width,
        config.heads,
        kv_heads=config.number_of_kv_heads,
        head_dim=config.size_of_head,
        bias=bias,
        attend=attend or attention_form(config.attention),
        out_bias=bias and config.attention_bias != "qkv",
        variant=make_variant(config, kind),
        sinks=config.attention_sinks,
        gate=config.attention_gate,
    )
    if config.qk_norm is not None:
        heads = (1, 1) if config.qk_norm == "head" else (config.heads, config.number_of_kv_heads)
        attention.q_norm, attention.k_norm = (make_norm(config, n * config.size_of_head) for n in heads)
    return attention


def make_latent_attention(config: ModelConfig, attend: Callable) -> MultiHeadLatentAttention:
    """The latent attention of a config that has one."""
    latent = config.latent
    return MultiHeadLatentAttention(
        config.width,
        config.heads,
        config.size_of_head,
        latent=latent.keys,
        rope_dim=latent.rope_dim,
        value_dim=latent.value_dim,
        query_latent=latent.queries,
        scale=config.attention_scale,
        attend=attend,
    )


class LinearAttention(GatedDeltaLayer):
    """The gated delta rule behind the interface of the attention layers."""

    def forward(self, x: Tensor, *, mask=None, causal=True, bias=None, rotate=None, cache=None) -> Tensor:
        """x (batch, T, width) to the same; ``cache`` is a layer of states. It sees the past by itself, and only that.

        Raises:
            ValueError: it is to look at something else.
        """
        if mask is not None or bias is not None or not causal:
            raise ValueError("a linear layer sees all that came before a token: it takes no mask and no bias")
        if cache is not None and not hasattr(cache, "run"):
            raise ValueError("a linear layer needs a cache that holds states: ModelCache.of(model, rows, capacity)")
        run = super().forward
        return run(x) if cache is None else cache.run(run, x)


def make_linear_attention(config: ModelConfig) -> LinearAttention:
    """The linear layer of a config that has such layers."""
    linear = config.linear
    return LinearAttention(
        config.width,
        key_heads=linear.key_heads,
        value_heads=linear.value_heads,
        head_dim=linear.head_dim,
        value_dim=linear.value_dim,
        kernel=linear.kernel,
        norm_epsilon=config.norm_epsilon,
    )


def make_variant(config: ModelConfig, kind: str = "full") -> AttentionVariant | None:
    """What layers of a kind add to the attention form; None for nothing."""
    added = {
        "scale": config.attention_scale,
        "window": config.window if kind == "window" else None,
        "softcap": config.attention_softcap,
        "alibi": config.positions == "alibi",
        "dropout": config.attention_dropout,
    }
    return AttentionVariant(**added) if any(added.values()) else None


class Block(nn.Module):
    """Attention, then cross-attention if there is a memory to look at, then the feed-forward; each adds to its input.

    Args:
        config: what the block is made of.
        layer: its number in the stack, counted from 0.
        cross: whether it also attends to an encoder's output.
        attend: the attention function, instead of the one that the config names.
    """

    def __init__(self, config: ModelConfig, layer: int = 0, *, cross: bool = False, attend: Callable | None = None):
        super().__init__()
        self.kind, self.norm_first = config.types_of_layers[layer], config.norm_first
        new_attention = partial(make_attention, config, self.kind, attend=attend)
        self.attention_norm, self.attention = make_norm(config), new_attention()
        self.cross_norm, self.cross_attention = (make_norm(config), new_attention()) if cross else (None, None)
        self.feed_forward_norm, self.feed_forward = make_norm(config), make_feed_forward(config, layer)
        self.attention_out_norm, self.feed_forward_out_norm = None, None
        if config.branch_norm != "in":
            self.attention_out_norm, self.feed_forward_out_norm = make_norm(config), make_norm(config)
        if config.branch_norm == "out":
            self.attention_norm, self.feed_forward_norm = nn.Identity(), nn.Identity()
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
            x = self._add(x, self.attention_norm, followed_by(self.attention_out_norm, attend))
        if self.cross_attention is not None:
            with profiling.range("cross-attention"):
                x = self._add(x, self.cross_norm, partial(self.cross_attention, context=memory, mask=memory_mask))
        with profiling.range("feed-forward"):
            return self._add(x, self.feed_forward_norm, followed_by(self.feed_forward_out_norm, self.feed_forward))

    def _add(self, x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """The residual connection: pre-norm keeps the sum untouched, post-norm normalises it."""
        if self.norm_first:
            return (x + self.dropout(sublayer(norm(x)))).to(x.dtype)
        return norm(x + self.dropout(sublayer(x)))


def followed_by(norm: nn.Module | None, sublayer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The sub-layer, with a norm on what it gives if there is one."""
    return sublayer if norm is None else lambda x: norm(sublayer(x))


class Stack(nn.Module):
    """Blocks one after the other, and the final norm if the config has one: (batch, T, width) -> (batch, T, width)."""

    def __init__(self, config: ModelConfig, *, cross: bool = False, attend: Callable | None = None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, i, cross=cross, attend=attend) for i in range(config.layers))
        self.final_norm = make_norm(config) if config.has_final_norm else nn.Identity()
        self.fused_norms = False  # whether a sum and the norm after it are one operator, where they can be
        self.residual_in_fp32 = True  # or in the narrower type of the products, under autocast

    def forward(self, x: Tensor, *, cache=None, rotate=None, **options) -> Tensor:
        """Run the blocks.

        Args:
            x: (batch, T, width).
            cache: of which each block gets its own layer.
            rotate: RoPE's rotation, or one for each kind of layer, by its name.
            options: the other arguments of each :class:`Block`.
        """
        if not self.residual_in_fp32:
            x = x.to(product_dtype(x))
        if self.fused_norms and cache is None and options.get("memory") is None and self.can_fuse_norms():
            return self.forward_fused(x, rotate, **options)
        for i, block in enumerate(self.blocks):
            turn = rotate.get(block.kind) if isinstance(rotate, dict) else rotate
            x = block(x, cache=None if cache is None else cache.layer(i), rotate=turn, **options)
        return self.final_norm(x)

    def forward_fused(self, x: Tensor, rotate, *, memory: None = None, memory_mask: None = None, **options) -> Tensor:
        """The same, but each residual sum is one operator with the norm after it, across the borders of the blocks."""
        normed, blocks = self.blocks[0].attention_norm(x), list(self.blocks)
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            turn = rotate.get(block.kind) if isinstance(rotate, dict) else rotate
            x, normed = add_norm(x, block.attention(normed, rotate=turn, **options), block.feed_forward_norm)
            branch = block.feed_forward(normed)
            if following is not None:
                x, normed = add_norm(x, branch, following.attention_norm)
        return self.final_norm(x + branch)

    def can_fuse_norms(self) -> bool:
        """Whether each block is two branches with a plain norm before each, and no part has a hook."""
        return all(
            block.norm_first
            and block.cross_attention is None
            and block.attention_out_norm is None
            and (block.dropout.p == 0 or not self.training)
            and can_fuse(block.attention_norm)
            and can_fuse(block.feed_forward_norm)
            and not any(part._forward_pre_hooks or part._forward_hooks for part in block.children())
            and not (block._forward_pre_hooks or block._forward_hooks)
            for block in self.blocks
        )


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


def initialise(model: nn.Module, config: ModelConfig) -> None:
    """GPT-2's initialisation: normal with deviation 0.02, smaller where 2 x layers branches add up in the residual."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        if name.endswith("attention.convolution"):  # which begins as its layer made it
            continue
        last = name.endswith(("out_proj.weight", "down.weight", "experts.down"))
        nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if last else 0.02)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
