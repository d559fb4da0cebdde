"""A step of a Llama-like model with few kernels: what a GPU runs in place of ``Decoder.forward``.

A layer is nine kernels: four matrix products, attention, and four small ones of kernels/serving/decode_step.cu between
them, each of which starts while the kernel before it still runs. Where a prompt is read, the host has less to do as
well: it launches nine kernels a layer instead of some twenty, or one graph for all of them, because no kernel needs to
be told how long the rows are.
"""

import struct
from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tformer_lib.attention import MultiHeadAttention
from tformer_lib.ladder import DTYPE_CODES, HALVES, Ladder, refusal_of_hopper
from tformer_lib.paged_attention import AttentionPlan, Rows, plan_attention, write_cache
from tformer_lib.rope import turn_pairs
from tformer_lib.transformer import Block, Decoder, FeedForward

LADDER = Ladder("serving", steps=("0", "decode_step", "few_rows"), fastest={"cuda": ("decode_step", "0")})

ADD_NORM = struct.Struct("4P 3q fi")
TURN = struct.Struct("2P Pqqq Pqqq 3P 6q ff ii")
GATE = struct.Struct("2P qq i 4x")
PRODUCT = struct.Struct("3P 4q ii")
"""The structs of kernels/serving/arguments.h."""

PRODUCTS = ("qkv", "out", "gate_up", "down")
"""The products of a layer, each of which cuBLAS computes, or few_rows.cu where tokens are few."""
MOST_TOKENS, TILE, STEP, MOST_SPLITS, CLUSTER = 256, 128, 64, 8, 2
"""Of few_rows.cu: tokens, rows of W in a block, columns of a step; into how many parts a sum is cut; blocks that share
tokens."""


class Layer(NamedTuple):
    """What a block is made of: norms, and matrices (out_features, in_features)."""

    attention_norm: nn.RMSNorm
    qkv: Tensor
    out: Tensor
    feed_forward_norm: nn.RMSNorm
    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, block: Block) -> "Layer":
        """The parts of a block whose projections were joined."""
        attention, feed_forward = block.attention, block.feed_forward
        qkv, out = attention.joined.weight, attention.out_proj.weight
        gate_up, down = feed_forward.joined[0], feed_forward.down.weight
        return cls(block.attention_norm, qkv, out, block.feed_forward_norm, gate_up, down)


class FusedPass:
    """The pass of a Llama-like model over rows that stand end to end, in nine kernels a layer.

    On a CPU the small kernels are plain PyTorch, for the tests.

    Args:
        model: one for which :func:`refusal` has no reason.
        pools: (keys, values) of each layer.
        scales: what keys and values are divided by in pools of float8; None elsewhere.
    """

    def __init__(self, model: Decoder, pools: list[tuple[Tensor, Tensor]], scales: tuple[float, float] | None):
        self.model, self.pools, self.scales = model, pools, scales
        weight = model.embedding.tokens.weight
        self.on_gpu = weight.is_cuda
        if self.on_gpu:
            kernel = partial(LADDER.kernel, "decode_step", device=weight.device)
            self.add_norm_kernel, self.turn_kernel, self.gate_kernel = map(kernel, ("add_norm", "turn", "gate"))
            self.product_kernel = LADDER.kernel("few_rows", "product", weight.device)
            self.processors = torch.cuda.get_device_properties(weight.device).multi_processor_count

    def __call__(self, *inputs: Tensor | Rows, **options: object) -> Tensor:
        """The logits, (total or n, vocab_size), by the arguments of :meth:`hidden`."""
        return self.model.unembed(self.hidden(*inputs, **options))

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        rows: Rows,
        *,
        only: Tensor | None = None,
        batch_invariant: bool = False,
        own: Collection[str] = (),
    ) -> Tensor:
        """What the logits are made of, (total or n, width).

        Args:
            tokens, positions, slots: (total,) int64.
            rows: whose numbers no kernel of this pass may write: attention reads them early.
            only: (n,) int64, the places that are wanted; all if not given.
            batch_invariant: see :func:`paged_attention`.
            own: those of PRODUCTS that few_rows.cu computes, see :meth:`takes`.
        """
        model, plan, added = self.model, None, None
        x = model.embedding.tokens(tokens)  # (total, width)
        x = x if model.embedding.scale == 1 else x * model.embedding.scale
        angles = model.rope(positions)
        layers = map(Layer.of, model.stack.blocks)  # as they are now: somebody may have replaced a weight
        for layer, pools in zip(layers, self.pools, strict=True):
            hidden = self.add_norm(x, added, layer.attention_norm)
            q = self.turn(
                self.product(hidden, layer.qkv, "qkv" in own), *pools, slots, *angles
            )  # (total, heads, head_dim)
            plan = self.plan(q, *pools, rows, batch_invariant) if plan is None else plan
            found = plan.run(q, *pools, settled=True).flatten(1)  # (total, heads head_dim)
            added = self.product(found, layer.out, "out" in own)
            hidden = self.add_norm(x, added, layer.feed_forward_norm)
            hidden = self.gated_product(hidden, layer.gate_up, "gate_up" in own)  # (total, feed_forward_width)
            added = self.product(hidden, layer.down, "down" in own)
        x = self.add_norm(x, added, model.stack.final_norm)
        return x if only is None else x[only]

    def reads_by_kernels(self, total: int, rows: Rows) -> bool:
        """Whether kernels compute the attention of so many tokens, so that a pass can be recorded."""
        heads, head_dim = self.model.config.heads, self.model.config.size_of_head
        q = self.pools[0][0].new_empty(total, heads, head_dim, dtype=self.model.embedding.tokens.weight.dtype)
        return self.plan(q, *self.pools[0], rows, False).shared.step != "0"

    def plan(self, q: Tensor, k_pool: Tensor, v_pool: Tensor, rows: Rows, batch_invariant: bool) -> AttentionPlan:
        """The attention of all layers."""
        scales = {} if self.scales is None else {"k_scale": self.scales[0], "v_scale": self.scales[1]}
        options = {"query_starts": rows.query_starts, "max_queries": rows.max_queries, **scales}
        options |= {"batch_invariant": True} if batch_invariant else {}
        return plan_attention(q, k_pool, v_pool, rows.block_tables, rows.lengths, **options)

    # between the products

    def add_norm(self, x: Tensor, added: Tensor | None, norm: nn.RMSNorm) -> Tensor:
        """x += added, in place; returns the norm of the sum.

        Args:
            x: (total, width).
            added: of the same shape, or what :meth:`product` has in parts.
            norm: over the width.
        """
        if not self.on_gpu:
            return norm(x if added is None else x.add_(whole(added)))
        out = torch.empty_like(x)
        pointers = (x.data_ptr(), 0 if added is None else added.data_ptr(), norm.weight.data_ptr(), out.data_ptr())
        numbers = (*x.shape, parts_of(added), norm.eps, DTYPE_CODES[x.dtype])
        self.add_norm_kernel.launch(ADD_NORM.pack(*pointers, *numbers))
        return out

    def turn(self, qkv: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """RoPE on queries and keys, which are stored with their values; returns the queries (total, heads, head_dim).

        Args:
            qkv: (total, (heads + 2 kv_heads) head_dim), in parts or not.
            k_pool, v_pool: (blocks, kv_heads, block_size, head_dim).
            slots: (total,) int64.
            cos, sin: (total, head_dim / 2).
        """
        kv_heads, block_size, head_dim = k_pool.shape[1:]
        heads = qkv.shape[-1] // head_dim - 2 * kv_heads
        if not self.on_gpu:
            q, k, v = whole(qkv).unflatten(1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=1)
            q, k = (turn_pairs(x.transpose(0, 1), cos, sin, "half").transpose(0, 1) for x in (q, k))
            write_cache(k, v, k_pool, v_pool, slots)
            return q
        parts, sums = parts_of(qkv), 0
        if parts:
            sums, qkv = (
                qkv,
                torch.empty(qkv.shape[1:], dtype=self.model.embedding.tokens.weight.dtype, device=qkv.device),
            )
        addresses = (qkv.data_ptr(), sums.data_ptr() if parts else 0)
        pools = (k_pool.data_ptr(), *k_pool.stride()[:3], v_pool.data_ptr(), *v_pool.stride()[:3])
        tables = (slots.data_ptr(), cos.data_ptr(), sin.data_ptr())
        numbers = (len(qkv), heads, kv_heads, head_dim, block_size, parts, *(self.scales or (1.0, 1.0)))
        codes = (DTYPE_CODES[qkv.dtype], DTYPE_CODES[k_pool.dtype])
        self.turn_kernel.launch(TURN.pack(*addresses, *pools, *tables, *numbers, *codes))
        return qkv[:, : heads * head_dim].unflatten(1, (heads, head_dim))

    def gate(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up: (total, 2 width), the gates first, to (total, width)."""
        if not self.on_gpu:
            gates, hidden = gate_up.chunk(2, dim=-1)
            return F.silu(gates) * hidden
        total, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(total, width)
        self.gate_kernel.launch(GATE.pack(gate_up.data_ptr(), out.data_ptr(), total, width, DTYPE_CODES[out.dtype]))
        return out

    # products

    def product(self, x: Tensor, weight: Tensor, own: bool) -> Tensor:
        """x (total, in_features) times a matrix: (total, out_features), or in float32 (parts, total, out_features)."""
        if not own:
            return F.linear(x, weight)
        splits = self.splits_of(weight)
        sums = torch.empty(splits, len(x), len(weight), dtype=torch.float32, device=x.device)
        return self.launch_product(x, weight, sums, splits, gated=False)

    def gated_product(self, x: Tensor, weight: Tensor, own: bool) -> Tensor:
        """silu(gate) * up of the product with [gates; ups]: (total, in_features) -> (total, out_features / 2)."""
        if not own:
            return self.gate(F.linear(x, weight))
        return self.launch_product(x, weight, x.new_empty(len(x), len(weight) // 2), 1, gated=True)

    def launch_product(self, x: Tensor, weight: Tensor, out: Tensor, splits: int, *, gated: bool) -> Tensor:
        """Call few_rows.cu; returns ``out``."""
        pointers = (x.data_ptr(), weight.data_ptr(), out.data_ptr())
        self.product_kernel.launch(PRODUCT.pack(*pointers, len(x), *weight.shape, splits, gated, CLUSTER))
        return out

    def splits_of(self, weight: Tensor) -> int:
        """Into how many parts few_rows.cu cuts the sums, so that all multiprocessors have work."""
        tiles, steps = len(weight) // TILE, weight.shape[1] // STEP
        fitting = [n for n in range(2, MOST_SPLITS + 1) if tiles * n <= self.processors and steps % n == 0]
        return max(fitting, default=1)

    def takes(self, tokens: int) -> tuple[str, ...]:
        """Those of PRODUCTS that few_rows.cu can compute for so many tokens."""
        layers = list(map(Layer.of, self.model.stack.blocks))
        if not self.on_gpu or tokens > MOST_TOKENS or layers[0].out.dtype != torch.bfloat16:
            return ()
        fits = lambda weight: len(weight) % (TILE * CLUSTER) == weight.shape[1] % STEP == 0  # noqa: E731
        return tuple(name for name in PRODUCTS if all(fits(getattr(layer, name)) for layer in layers))


def parts_of(x: Tensor | None) -> int:
    """How many parts must be added up; 0 if x is whole."""
    return x.shape[0] if x is not None and x.dim() == 3 else 0


def whole(x: Tensor) -> Tensor:
    """The sum of the parts, (total, features)."""
    return x.sum(0) if parts_of(x) else x


# which models


def refusal(model: nn.Module) -> str | None:
    """Why a model has parts that these kernels do not know, or None if it is Llama's kind."""
    config = model.config
    if config.size_of_head not in (64, 128) or config.width % 8 or config.width > 8192:
        return "the kernels take a head_dim of 64 or 128 and a width of 8,192 at most"
    rope = model.rope
    if rope is None or model.window_rope is not None or rope.layout != "half" or rope.rotary_dim != rope.head_dim:
        return "the kernels turn whole heads, channel i with channel i + head_dim / 2"
    if set(config.types_of_layers) != {"full"} or config.latent is not None:
        return "the kernels take layers of full attention"
    if model.embedding.places is not None or type(model.stack.final_norm) is not nn.RMSNorm:
        return "the kernels take RMSNorm, and no learned positions"
    return next(filter(None, map(refusal_of_block, model.stack.blocks)), None)


def refusal_of_block(block: Block) -> str | None:
    """Why a block has parts that these kernels do not know."""
    attention, feed_forward = block.attention, block.feed_forward
    if not block.norm_first or block.attention_out_norm is not None or block.cross_attention is not None:
        return "the kernels take norms before the layers"
    if any(type(norm) is not nn.RMSNorm for norm in (block.attention_norm, block.feed_forward_norm)):
        return "the kernels take RMSNorm"
    if type(attention) is not MultiHeadAttention or attention.joined is None or attention.joined.bias is not None:
        return "the kernels take projections without biases"
    if any(x is not None for x in (attention.variant, attention.gate_proj, attention.q_norm, attention.out_proj.bias)):
        return "the kernels take plain attention"
    if not isinstance(feed_forward, FeedForward) or feed_forward.activation is not F.silu:
        return "the kernels take SwiGLU"
    if getattr(feed_forward, "joined", (None, 0))[1] is not None or feed_forward.down.bias is not None:
        return "the kernels take matrices without biases"
    plain = type(feed_forward.down) is type(attention.out_proj) is nn.Linear
    return None if plain else "the kernels take matrices of 16-bit numbers"


def refusal_of_weights(weight: Tensor) -> str | None:
    """Why the kernels cannot run with such weights where they are, or None if they can."""
    if not weight.is_cuda or weight.dtype not in HALVES:
        return f"the kernels take bfloat16 and float16 on a GPU, got {weight.dtype} on {weight.device}"
    return refusal_of_hopper(weight.device)
