"""Mixture of experts: many feed-forwards in a layer, of which each token passes through a few.

A :class:`Router` chooses k of E experts for each token and weighs them. The token's output is the weighted sum of what
its experts make of it, plus what the shared expert makes of it, where there is one. Three forms compute the same sum:

- :func:`mix_by_loop` goes from expert to expert. It is the definition, and the oracle of the tests.
- :func:`mix_grouped` sorts the tokens by expert and multiplies each group by its expert's matrix. It drops nothing.
- :func:`mix_batched` gives every expert the same number of places. With a capacity, what finds no place is dropped.

Sources: Shazeer et al. 2017, "Outrageously Large Neural Networks" (arXiv:1701.06538); Fedus et al. 2022, "Switch
Transformers" (arXiv:2101.03961), for capacity and the balance loss; Gale et al. 2023, "MegaBlocks" (arXiv:2211.15841),
for dropping nothing; Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing" (arXiv:2408.15664); DeepSeek-AI 2024,
"DeepSeek-V3" (arXiv:2412.19437), for sigmoid routers and groups.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tformer_lib.contract import SINGLE, counted, has_autocast, in_named_dtypes, product_dtype, readable

ROUTERS = ("softmax_then_topk", "topk_then_softmax", "sigmoid_then_topk")


@dataclass(frozen=True)
class ExpertsConfig:
    """The experts of a model, which stand in the place of its feed-forwards.

    Raises:
        ValueError: when numbers do not fit together or a choice is unknown; the message names both.
    """

    count: int = 8
    """E, the routed experts of a layer."""
    per_token: int = 2
    """k, how many of them each token passes through."""
    width: int | None = None
    """The size inside each expert; None is that of the model's feed-forward."""
    router: Literal["softmax_then_topk", "topk_then_softmax", "sigmoid_then_topk"] = "softmax_then_topk"
    """How logits become choices and weights: Mixtral's and Qwen's, gpt-oss's, or DeepSeek-V3's."""
    renormalise: bool = True
    """Whether the weights of the chosen experts are divided by their sum (``norm_topk_prob``); a softmax after the
    choice sums to 1 anyway."""
    scale: float = 1.0
    """What the weights are multiplied by at the end (``routed_scaling_factor``)."""
    router_bias: bool = False
    """Whether the router's linear map has a bias (gpt-oss)."""
    groups: int = 1
    """Into how many groups of neighbours the experts are divided (``n_group``), which live on different machines."""
    groups_per_token: int = 1
    """From how many groups a token may take its experts (``topk_group``)."""
    shared_width: int = 0
    """The size inside the shared expert, which every token passes through; 0 is none."""
    shared_gate: bool = False
    """Whether a sigmoid of the token scales the shared expert's output (Qwen2-MoE, Qwen3-Next)."""
    swiglu_limit: float | None = None
    """gpt-oss's SwiGLU: gate and up are clamped to this, and up is raised by 1; None is the plain one."""
    first_layer: int = 0
    """The first layer with experts; those before it keep a dense feed-forward (``first_k_dense_replace``)."""
    every: int = 1
    """Of those layers, the ones whose number, counted from 1, is a multiple of this (``decoder_sparse_step``)."""
    balance_weight: float = 0.01
    """What the load-balancing loss of each layer is multiplied by in training; 0 leaves it out."""
    bias_rate: float = 0.0
    """How far a training step moves each expert's selection bias against its load; 0 leaves the bias alone."""
    capacity_factor: float | None = None
    """In training, an expert has this many times its even share of places, and drops what finds none; None drops
    nothing. Outside training nothing is dropped."""

    def __post_init__(self):
        for name in ("count", "per_token", "groups", "groups_per_token", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of the experts must be at least 1, got {getattr(self, name)}")
        for name in ("shared_width", "first_layer", "balance_weight", "bias_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} of the experts must be at least 0, got {getattr(self, name)}")
        for name in ("width", "capacity_factor", "swiglu_limit"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} of the experts must be above 0, got {getattr(self, name)}")
        for name in ("scale", "balance_weight", "bias_rate"):
            if not abs(getattr(self, name)) <= SINGLE.max:
                raise ValueError(f"{name} of the experts must be finite in float32, got {getattr(self, name)}")
        if self.router not in ROUTERS:
            raise ValueError(f"router must be one of {', '.join(ROUTERS)}, got {self.router!r}")
        if self.shared_gate and not self.shared_width:
            raise ValueError("a shared_gate needs a shared expert, but shared_width is 0")
        self._check_choice()

    def _check_choice(self) -> None:
        if self.count % self.groups:
            raise ValueError(f"{counted(self.count, 'expert')} cannot be divided into {self.groups} groups")
        if self.groups_per_token > self.groups:
            raise ValueError(
                f"groups_per_token must be at most the number of groups, {self.groups}, got {self.groups_per_token}"
            )
        size = self.count // self.groups
        if self.per_token > self.groups_per_token * size:
            raise ValueError(
                f"a token takes {self.per_token} experts, but may choose from {self.groups_per_token * size}"
            )
        if self.groups > 1 and self.router == "sigmoid_then_topk" and size < 2:
            raise ValueError(f"groups are ranked by their two best experts, but {self.groups} groups have {size} each")

    @property
    def has_selection_bias(self) -> bool:
        """Whether a bias takes part in the choice of experts, though not in their weights."""
        return self.router == "sigmoid_then_topk" or self.bias_rate > 0

    def in_layer(self, layer: int) -> bool:
        """Whether this layer, counted from 0, has experts."""
        return layer >= self.first_layer and (layer + 1) % self.every == 0


class Routing(NamedTuple):
    """Which experts N tokens pass through, and with what weights."""

    experts: Tensor
    """(N, k) int64, k different experts for each token."""
    weights: Tensor
    """(N, k), what the outputs of these experts are multiplied by."""
    shares: Tensor
    """(N, E), the router's scores of all experts as shares that sum to 1, for the balance loss."""


class Router(nn.Module):
    """Chooses k of E experts for each token: (N, width) -> :class:`Routing`, computed in float32 at least.

    Args:
        width: of a token's vector.
        config: the experts.
    """

    def __init__(self, width: int, config: ExpertsConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.count, width))
        self.bias = nn.Parameter(torch.zeros(config.count)) if config.router_bias else None
        self.selection_bias = None
        if config.has_selection_bias:  # a parameter, so that it is saved with the weights; no gradient reaches it
            self.selection_bias = nn.Parameter(torch.zeros(config.count), requires_grad=False)
        nn.init.normal_(self.weight, std=width**-0.5)

    @in_named_dtypes
    def forward(self, x: Tensor) -> Routing:
        """x: (N, width)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        return self.choose(F.linear(x.to(dtype), self.weight.to(dtype), bias))

    def choose(self, logits: Tensor) -> Routing:
        """logits: (N, E), how well each expert fits each token."""
        config = self.config
        scores = logits.sigmoid() if config.router == "sigmoid_then_topk" else logits.softmax(-1)  # (N, E)
        shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)  # all sigmoids may be 0
        after = config.router == "topk_then_softmax"
        ranked = logits if after else scores
        if self.selection_bias is not None:
            ranked = ranked + self.selection_bias
        experts = self.within_groups(ranked).topk(config.per_token).indices  # (N, k)
        if after:
            weights = logits.gather(1, experts).softmax(-1)  # (N, k)
        else:
            weights = scores.gather(1, experts)  # (N, k)
            if config.renormalise:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # k sigmoids may all be 0
        return Routing(experts, weights * config.scale, shares)

    def within_groups(self, ranked: Tensor) -> Tensor:
        """The scores (N, E), with -inf outside the best groups of each token.

        DeepSeek-V3 ranks a group by its two best experts, DeepSeek-V2 by its best one.
        """
        config = self.config
        if config.groups == config.groups_per_token:
            return ranked
        grouped = ranked.unflatten(1, (config.groups, -1))  # (N, groups, E / groups)
        best = grouped.topk(2).values.sum(-1) if config.router == "sigmoid_then_topk" else grouped.amax(-1)
        kept = best.topk(config.groups_per_token).indices  # (N, groups_per_token)
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter(1, kept, True)  # (N, groups)
        return grouped.masked_fill(~allowed[..., None], -math.inf).flatten(1)


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""How rows meet the stacked matrices of the experts: (rows, weight, bias) -> rows."""


class Experts(nn.Module):
    """The matrices of E feed-forwards, stacked: ``up`` and ``gate`` (E, inner, width), ``down`` (E, width, inner).

    Biases lie behind each other, ``up_bias`` and ``gate_bias`` (E inner,), ``down_bias`` (E width,), so that what tells
    matrices from vectors by their dimensions, as weight decay does, is right about them.

    Args:
        count: E.
        width: of a token's vector.
        inner: the size inside each expert.
        activation: the non-linearity.
        gated: whether a third matrix gates the hidden numbers, as in SwiGLU.
        bias: whether the linear maps have biases.
        swiglu_limit: see :class:`ExpertsConfig`.
    """

    def __init__(
        self,
        count: int,
        width: int,
        inner: int,
        *,
        activation: Callable[[Tensor], Tensor] = F.silu,
        gated: bool = True,
        bias: bool = False,
        swiglu_limit: float | None = None,
    ):
        super().__init__()
        if swiglu_limit is not None and not gated:
            raise ValueError("swiglu_limit clamps a gated feed-forward, and this one has no gate")
        self.activation, self.swiglu_limit = activation, swiglu_limit
        for name, outputs, inputs in (("up", inner, width), ("gate", inner, width), ("down", width, inner)):
            there = gated or name != "gate"
            weight = nn.Parameter(torch.empty(count, outputs, inputs).normal_(std=inputs**-0.5)) if there else None
            setattr(self, name, weight)
            setattr(self, f"{name}_bias", nn.Parameter(torch.zeros(count * outputs)) if there and bias else None)

    def forward(self, x: Tensor, product: Product) -> Tensor:
        """The feed-forward's formula, whatever way the rows meet their matrices: (..., width) -> (..., width)."""
        up = product(x, self.up, stacked(self.up_bias, self.up))  # (..., inner)
        gate = None if self.gate is None else product(x, self.gate, stacked(self.gate_bias, self.gate))  # (..., inner)
        return product(self.hidden(gate, up), self.down, stacked(self.down_bias, self.down))

    def hidden(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """The numbers between the matrices, (..., inner)."""
        if gate is None:
            return self.activation(up)
        if self.swiglu_limit is None:
            return self.activation(gate) * up
        gate = gate.clamp(max=self.swiglu_limit)
        up = up.clamp(-self.swiglu_limit, self.swiglu_limit)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)  # a sigmoid of 1.702 x is nearly GELU's


def stacked(bias: Tensor | None, weight: Tensor) -> Tensor | None:
    """The biases of stacked matrices (E, outputs, inputs), a row for each: (E outputs,) -> (E, outputs)."""
    return None if bias is None else bias.view(weight.shape[:2])


def mix_by_loop(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """Each expert in turn takes its tokens and adds what it makes of them to the output: the definition.

    Args:
        experts: of the layer.
        x: (N, width).
        routing: of these tokens.

    Returns:
        (N, width).

    Raises:
        ValueError: the routing does not fit the tokens, or, on a CPU, names an expert that is not there.
    """
    check_routing(x, routing, experts)
    out = torch.zeros_like(x)
    for expert in range(len(experts.up)):
        token, choice = (routing.experts == expert).nonzero(as_tuple=True)  # both (its tokens,)
        if len(token):
            made = experts(x[token], partial(linear_of_one, expert))  # (its tokens, width)
            weights = routing.weights[token, choice, None]  # (its tokens, 1)
            out = out.index_add(0, token, (made * weights).to(out.dtype))
    return out


def check_routing(x: Tensor, routing: Routing, experts: Experts, processes: int = 1) -> None:
    """Refuse tokens and a routing that do not fit one another or the experts, of which each process holds as many.

    Which experts are named is read on a CPU alone: a GPU would wait for it.
    """
    held, _, width = experts.up.shape
    chosen, count = routing.experts, held * processes
    if x.dim() != 2 or x.shape[1] != width:
        raise ValueError(f"x must be (N, {width}), got {tuple(x.shape)}")
    if chosen.dim() != 2 or len(chosen) != len(x) or chosen.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"experts must be ({len(x)}, k) integers, got {tuple(chosen.shape)} of {chosen.dtype}")
    if routing.weights.shape != chosen.shape:
        raise ValueError(f"weights must be {tuple(chosen.shape)} as experts are, got {tuple(routing.weights.shape)}")
    if chosen.device.type == "cpu" and chosen.numel() and readable(chosen):
        least, most = (int(n) for n in chosen.aminmax())
        if least < 0 or most >= count:
            raise ValueError(f"experts must be 0 to {count - 1}, got {least if least < 0 else most}")


def linear_of_one(expert: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear map of one expert: x (n, inputs), weight (E, outputs, inputs), bias (E, outputs) -> (n, outputs)."""
    return F.linear(x, weight[expert], None if bias is None else bias[expert])


def mix_grouped(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """Sort the choices by expert, so that each expert finds its tokens side by side, and sort back what they become.

    Args, result and errors as for :func:`mix_by_loop`.
    """
    check_routing(x, routing, experts)
    order, counts = sort_by_expert(routing.experts, len(experts.up))  # (N k,), (E,)
    token = order // routing.experts.shape[1]  # choice i belongs to token i // k
    made = experts(x[token], partial(grouped_linear, counts))  # (N k, width)
    return weighted_sum(made[order.argsort()], routing)


def sort_by_expert(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The order in which the choices (N, k) stand side by side for each expert, earlier tokens first.

    Returns:
        The order, (N k,) int64, of the choices counted row by row; and how many fall on each expert, (E,) int64.
    """
    chosen = experts.flatten()
    counts = chosen.new_zeros(count).index_add(0, chosen, torch.ones_like(chosen))
    return chosen.argsort(stable=True), counts


def weighted_sum(made: Tensor, routing: Routing) -> Tensor:
    """What each token's experts made of it, (N k, width) in the order of the choices, becomes (N, width)."""
    made = made.unflatten(0, routing.experts.shape)  # (N, k, width)
    return torch.einsum("nkd,nk->nd", made, routing.weights.to(made.dtype))


def grouped_linear(counts: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear map of each group's expert: rows (M, inputs), sorted by expert -> (M, outputs)."""
    if has_autocast(rows.device.type):
        dtype = product_dtype(rows)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    out = grouped_matmul(rows, weight, counts)
    if bias is None:
        return out
    expert = torch.arange(len(counts), device=rows.device).repeat_interleave(counts, output_size=len(rows))  # (M,)
    chosen = F.one_hot(expert, len(counts)).to(bias.dtype)  # (M, E)
    return out + chosen @ bias  # a product, whose gradient adds up in float32 on every device


def grouped_matmul(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply the first ``counts[0]`` rows by the first matrix, the next ``counts[1]`` by the second, and so on.

    PyTorch's ``grouped_mm`` does it in one kernel in bfloat16 on GPUs from sm_80 on. Elsewhere each group is one matrix
    multiplication; a group of no rows costs nothing, and its matrix is not read.

    Args:
        rows: (M, inputs).
        weight: (E, outputs, inputs).
        counts: (E,) int64, with sum M.

    Returns:
        (M, outputs).

    Raises:
        ValueError: shapes or dtypes do not fit, or the counts, where they are read, do not sum to M.
    """
    check_groups(rows, weight, counts)
    if has_grouped_kernel(rows, weight):
        return F.grouped_mm(rows, weight.mT, offs=counts.cumsum(0, dtype=torch.int32))
    return grouped_matmul_op(rows, weight, counts)


def check_groups(rows: Tensor, weight: Tensor, counts: Tensor) -> None:
    """Refuse rows, stacked matrices and counts that do not fit one another. The counts are not read."""
    if rows.dim() != 2 or weight.dim() != 3 or rows.shape[1] != weight.shape[2]:
        raise ValueError(
            f"rows must be (M, inputs) and weight (E, outputs, inputs), got {tuple(rows.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if rows.dtype != weight.dtype:
        raise ValueError(f"rows and weight must share a dtype, got {rows.dtype} and {weight.dtype}")
    if counts.shape != weight.shape[:1] or counts.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"counts must be ({len(weight)},) integers, got {tuple(counts.shape)} of {counts.dtype}")


def has_grouped_kernel(rows: Tensor, weight: Tensor) -> bool:
    """Whether ``grouped_mm`` takes them: bfloat16 on a GPU, with rows of a multiple of 16 bytes."""
    aligned = all(size % 8 == 0 for size in weight.shape[1:])
    on_gpu = rows.is_cuda and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    return on_gpu and aligned and rows.dtype == weight.dtype == torch.bfloat16


@torch.library.custom_op("tformer_lab::grouped_matmul", mutates_args=())
def grouped_matmul_op(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """One matrix multiplication a group, as an operator, so that a compiled model need not know the counts."""
    if rows.is_cuda and torch.cuda.is_current_stream_capturing():
        return every_row_by_every_matrix(rows, weight, counts)
    out = rows.new_empty(len(rows), weight.shape[1])
    for expert, (start, stop) in spans(counts, len(rows)):
        torch.mm(rows[start:stop], weight[expert].T, out=out[start:stop])
    return out


def every_row_by_every_matrix(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The same without a look at the counts, which a CUDA graph cannot take: each row keeps what its own matrix made.

    It multiplies E times more, which the few rows of a decode step hide behind reading the matrices.
    """
    expert = torch.arange(len(counts), device=rows.device).repeat_interleave(counts, output_size=len(rows))  # (M,)
    out = rows.new_zeros(len(rows), weight.shape[1])
    for number, matrix in enumerate(weight):
        out = torch.where((expert == number)[:, None], rows @ matrix.T, out)
    return out


@torch.library.custom_op("tformer_lab::grouped_outer", mutates_args=())
def grouped_outer_op(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """The gradient of the matrices: left (M, outputs), right (M, inputs) -> (E, outputs, inputs), zeros for no rows."""
    out = left.new_zeros(len(counts), left.shape[1], right.shape[1])
    for expert, (start, stop) in spans(counts, len(left)):
        torch.mm(left[start:stop].T, right[start:stop], out=out[expert])
    return out


def spans(counts: Tensor, rows: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Each expert that has rows, with its first row and the one after its last."""
    sizes, stop = counts.tolist(), 0
    if min(sizes, default=0) < 0 or sum(sizes) != rows:
        raise ValueError(f"counts must be at least 0 and sum to {counted(rows, 'row')}, got {sizes}")
    for expert, count in enumerate(sizes):
        start, stop = stop, stop + count
        if count:
            yield expert, (start, stop)


@grouped_matmul_op.register_fake
def _(rows, weight, counts):
    return rows.new_empty(len(rows), weight.shape[1])


@grouped_outer_op.register_fake
def _(left, right, counts):
    return left.new_empty(len(counts), left.shape[1], right.shape[1])


def keep_for_backward(ctx, inputs, output) -> None:
    """What the gradient needs."""
    ctx.save_for_backward(*inputs)


def grouped_matmul_backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """The gradients of rows and matrices."""
    rows, weight, counts = ctx.saved_tensors
    of_rows = grouped_matmul_op(grad, weight.mT, counts) if ctx.needs_input_grad[0] else None
    return of_rows, grouped_outer_op(grad, rows, counts) if ctx.needs_input_grad[1] else None, None


grouped_matmul_op.register_autograd(grouped_matmul_backward, setup_context=keep_for_backward)


def mix_batched(experts: Experts, x: Tensor, routing: Routing, capacity: int | None = None) -> Tensor:
    """Give every expert the same number of places, so that all of them are one batched matrix multiplication.

    Args:
        experts: of the layer.
        x: (N, width).
        routing: of these tokens.
        capacity: places of an expert. The tokens that come first take them; a choice that finds no place adds nothing
            to its token. None is as many as the busiest expert needs, and drops nothing.

    Returns:
        (N, width).

    Raises:
        ValueError: as for :func:`mix_by_loop`, or the capacity is negative.
    """
    check_routing(x, routing, experts)
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity must be at least 0, got {capacity}")
    count, width = len(experts.up), x.shape[1]
    order, counts = sort_by_expert(routing.experts, count)
    if capacity is None:
        capacity = int(counts.max())
    chosen = routing.experts.flatten()[order]  # (N k,)
    in_line = torch.arange(len(order), device=x.device) - (counts.cumsum(0) - counts)[chosen]  # (N k,)
    nowhere = count * capacity  # one place more than there are: its output is zeros
    place = torch.where(in_line < capacity, chosen * capacity + in_line, nowhere)  # (N k,)
    rows = x.new_zeros(nowhere + 1, width).index_copy(0, place, x[order // routing.experts.shape[1]])
    made = experts(rows[:-1].view(count, capacity, width), batched_linear).flatten(0, 1)  # (E capacity, width)
    made = F.pad(made, (0, 0, 0, 1))[place]  # (N k, width)
    return weighted_sum(made[order.argsort()], routing)


def batched_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """All experts' linear maps at once: x (E, capacity, inputs) -> (E, capacity, outputs)."""
    out = torch.bmm(x, weight.mT)
    return out if bias is None else out + bias[:, None]


class MixtureOfExperts(nn.Module):
    """A layer's experts and their router, in the place of a feed-forward: (..., width) -> (..., width).

    In training it counts the choices of each expert in ``load``, and leaves its load-balancing loss to
    :func:`take_balance_loss`.

    Args:
        width: of a token's vector.
        inner: the size inside each expert, where the config does not say.
        config: the experts.
        shared: the shared expert, (..., width) -> (..., width), if there is one.
        feed_forward: ``activation``, ``gated`` and ``bias`` of each expert, see :class:`Experts`.
    """

    def __init__(
        self, width: int, inner: int, config: ExpertsConfig, *, shared: nn.Module | None = None, **feed_forward
    ):
        super().__init__()
        self.config = config
        self.router = Router(width, config)
        limit = config.swiglu_limit
        self.experts = Experts(config.count, width, config.width or inner, swiglu_limit=limit, **feed_forward)
        self.shared = shared
        self.shared_gate = nn.Linear(width, 1, bias=False) if config.shared_gate else None
        self.register_buffer("load", torch.zeros(config.count, dtype=torch.int64), persistent=False)
        self.balance = None
        self.mix = mix_grouped  # another one where the experts are spread over processes

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width)."""
        rows = x.reshape(-1, x.shape[-1])  # (N, width)
        routing = self.router(rows)
        if self.training:
            self.note(routing)
        if self.training and self.config.capacity_factor is not None:
            out = mix_batched(self.experts, rows, routing, self.capacity(len(rows)))
        else:
            out = self.mix(self.experts, rows, routing)
        if self.shared is not None:
            shared = self.shared(rows)
            out = out + (shared if self.shared_gate is None else shared * self.shared_gate(rows).sigmoid())
        return out.view_as(x)

    def capacity(self, tokens: int) -> int:
        """The places of each expert for so many tokens, at most one for each token."""
        even = tokens * self.config.per_token / self.config.count
        return max(1, min(tokens, math.ceil(self.config.capacity_factor * even)))

    def note(self, routing: Routing) -> None:
        """Count the choices, and work out the balance loss of these tokens."""
        counts = sort_by_expert(routing.experts, self.config.count)[1]
        self.load += counts
        if torch.is_grad_enabled() and self.config.balance_weight:
            self.balance = balance_loss(routing.shares, counts)

    def __getstate__(self) -> dict:
        """A copy of the module has no loss waiting: it is part of a graph, which cannot be copied."""
        return {**self.__dict__, "balance": None}


def balance_loss(shares: Tensor, counts: Tensor) -> Tensor:
    """Switch Transformer's load-balancing loss, equation 4, for any k: 1 where all experts are chosen equally often.

    It is E times the sum over experts of (share of the choices) x (mean share of the router's scores). Only the second
    factor has a gradient. The loss is largest, E / k at most, where the router is sure of the same k experts always.

    Args:
        shares: (N, E), the router's scores of all experts, each row with sum 1.
        counts: (E,) how many choices fell on each expert.
    """
    of_choices = counts / counts.sum().clamp(min=1)
    of_scores = shares.mean(0) if len(shares) else shares.sum(0)  # a mean of no tokens is NaN
    return len(counts) * (of_choices.to(shares.dtype) * of_scores).sum()


def mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    """The mixtures of a model, first layer first."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def take_balance_loss(layers: list[MixtureOfExperts]) -> Tensor | float:
    """The weighted sum of what these mixtures have left since the last call; 0.0 where they have left nothing."""
    total = 0.0
    for mixture in layers:
        if mixture.balance is not None:
            total = total + mixture.config.balance_weight * mixture.balance
            mixture.balance = None
    return total


@torch.no_grad()
def update_selection_biases(model: nn.Module) -> None:
    """After a training step: raise the bias of experts that had less than their even load, lower that of the others.

    The bias moves by ``bias_rate`` whatever the difference is (Wang et al. 2024, algorithm 1). The loads are then
    counted anew.
    """
    for mixture in mixtures(model):
        if mixture.config.bias_rate:
            missing = mixture.load.float().mean() - mixture.load  # (E,)
            mixture.router.selection_bias += mixture.config.bias_rate * missing.sign()
        mixture.load.zero_()


def load_entropy(load: Tensor) -> float:
    """How even a load (E,) is: its entropy over that of an even one. 1 is even, 0 is all on one expert."""
    shares = load.double() / load.sum()
    return (torch.special.entr(shares).sum() / math.log(len(load))).item()


def expected_experts(count: int, per_token: int, tokens: int) -> float:
    """How many different experts so many tokens choose on average, if each chooses ``per_token`` of ``count`` evenly.

    An expert is left out by one token with probability 1 - k / E, and by all with that to the power of ``tokens``.
    """
    return count * (1 - (1 - per_token / count) ** tokens)
