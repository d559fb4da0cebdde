"""What each scheme holds, sends and takes, on paper: the formulas that the chapter derives and the benchmark checks.

Sources: Rajbhandari et al. 2020, ZeRO (arXiv:1910.02054), section 3 and table 1, for the bytes of weights, gradients
and optimizer state; Korthikanti et al. 2022 (arXiv:2205.05198), table 2, for activations; Thakur et al. 2005,
"Optimization of Collective Communication Operations in MPICH", for what a ring sends.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from tformer_lib.transformer import ModelConfig

GRADIENT, MOMENTS = 4, 8
"""Bytes a parameter of gradient and of AdamW's two moments, in float32."""


def all_gather_bytes(whole: float, size: int) -> float:
    """Bytes that each process of a ring sends until all have all parts of ``whole`` bytes: (N - 1) / N of them.

    A reduce-scatter sends the same.
    """
    return whole * (size - 1) / size


def all_reduce_bytes(whole: float, size: int) -> float:
    """Bytes that each process of a ring sends to add up ``whole`` bytes: a reduce-scatter, then an all-gather."""
    return 2 * all_gather_bytes(whole, size)


@dataclass(frozen=True)
class Counts:
    """A model's numbers of parameters, and one step's tokens.

    Attributes:
        block: parameters of one block.
        rest: parameters outside the blocks: embeddings, the final norm.
        layers, width, kv_width, vocab_size: of the model; ``kv_width`` is kv_heads x head_dim.
        heads_width: heads x head_dim.
        batch: windows of one step, over all devices.
        context: tokens of a window.
        pieces: micro-batches that a device cuts its windows into.
    """

    block: int
    rest: int
    layers: int
    width: int
    kv_width: int
    heads_width: int
    vocab_size: int
    batch: float
    context: int
    pieces: int = 1

    @classmethod
    def of(cls, config: ModelConfig, batch: int, context: int, pieces: int = 1) -> "Counts":
        """The counts of a ``Decoder``; its few norms and biases are left out."""
        heads, kv = config.heads * config.size_of_head, config.number_of_kv_heads * config.size_of_head
        matrices = 3 if config.feed_forward == "swiglu" else 2
        block = config.width * (2 * heads + 2 * kv + matrices * config.size_of_feed_forward)
        rest = config.width * config.vocab_size * (1 if config.tie_embeddings else 2)
        rest += config.width * config.max_length if config.positions == "learned" else 0
        return cls(block, rest, config.layers, config.width, kv, heads, config.vocab_size, batch, context, pieces)

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.block + self.rest

    @property
    def tokens(self) -> float:
        """Tokens of a step."""
        return self.batch * self.context

    @property
    def flops(self) -> float:
        """FLOPs of a step, forward and backward, with causal attention counted whole (PaLM, appendix B)."""
        matrices = self.layers * self.block + self.width * self.vocab_size
        return self.tokens * (6 * matrices + 12 * self.layers * self.heads_width * self.context)


@dataclass(frozen=True)
class Machine:
    """What the devices can do.

    Attributes:
        flops: a device's rate of matrix products that training reaches, FLOP/s.
        link: bytes/s that a device sends to another one of its machine.
        network: bytes/s that a device sends to one of another machine.
        per_host: devices of one machine.
        latency: seconds that a collective operation takes at least, per device in its ring.
        memory: bytes of a device.
    """

    flops: float = 400e12
    link: float = 350e9
    network: float = 50e9
    per_host: int = 8
    latency: float = 5e-6
    memory: float = 80e9

    def seconds(self, sent: float, size: int, times: int = 1, *, spread: bool | None = None) -> float:
        """Seconds to send so many bytes from each device in ``times`` collectives of ``size`` devices.

        Args:
            sent: bytes in all.
            size: devices that take part.
            times: how many collectives.
            spread: whether they stand in several machines; by default, whether one is too small for them.
        """
        if size == 1:
            return 0.0
        spread = size > self.per_host if spread is None else spread
        return sent / (self.network if spread else self.link) + times * self.latency * (size - 1)


@dataclass(frozen=True)
class Cost:
    """One step of one scheme, for each device.

    Attributes:
        weights, gradients, optimizer, activations: bytes held.
        sent: bytes sent in a step.
        compute: seconds of arithmetic.
        communication: seconds of sending, were it alone.
        exposed: the part of them that no arithmetic hides.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    sent: float
    compute: float
    communication: float
    exposed: float

    @property
    def held(self) -> float:
        """Bytes held in all."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.compute + self.exposed

    @property
    def efficiency(self) -> float:
        """Share of the step in which the device computes."""
        return self.compute / self.seconds


def activation_bytes(
    counts: Counts, *, tensor: int = 1, sequence: bool = False, context: int = 1, data: int = 1
) -> float:
    """Bytes of activations that a device keeps for the backward pass, in 16 bits, with flash attention.

    34 bytes a token and feature in each block; 24 of them lie where tensor parallel cuts, the other 10 where only
    sequence parallel does. The logits, in float32 and once more for their gradient, come on top.
    """
    tokens = counts.tokens / data / context / counts.pieces
    block = 34 / tensor if sequence else 10 + 24 / tensor
    return tokens * (counts.layers * counts.width * block + counts.vocab_size * 8 / tensor)


def ddp(counts: Counts, machine: Machine, size: int) -> Cost:
    """Every device holds all; gradients are all-reduced while the backward pass runs, but for the last bucket.

    The table of embeddings has its gradient last, so its bucket has nothing to hide behind.
    """
    p = counts.parameters
    sent = all_reduce_bytes(GRADIENT * p, size)
    compute = counts.flops / size / machine.flops
    buckets = max(1, round(GRADIENT * p / 25e6))
    communication = machine.seconds(sent, size, buckets)
    tail = communication * counts.rest / p
    exposed = tail + max(0.0, communication - tail - compute * 2 / 3)
    activations = activation_bytes(counts, data=size)
    return Cost(4 * p, GRADIENT * p, MOMENTS * p, activations, sent, compute, communication, exposed)


def fsdp(counts: Counts, machine: Machine, size: int, *, weight_bytes: int = 4) -> Cost:
    """Every device holds 1/N, and two gathered blocks at a time.

    With each micro-batch, a block's weights are gathered twice and its gradients scattered once. What stands outside
    the blocks is needed last in the forward and first in the backward pass, so it is kept between them and gathered
    once. What is gathered for the next block hides behind this one; the first gather and the last scatter do not.

    Args:
        weight_bytes: of a weight on its way: 4 for float32, 2 for bfloat16.
    """
    p = counts.parameters
    blocks, rest = (all_gather_bytes(n, size) for n in (counts.layers * counts.block, counts.rest))
    sent = counts.pieces * ((2 * weight_bytes + GRADIENT) * blocks + (weight_bytes + GRADIENT) * rest)
    compute = counts.flops / size / machine.flops
    communication = machine.seconds(sent, size, counts.pieces * (3 * counts.layers + 2))
    ends = machine.seconds(counts.pieces * (weight_bytes + GRADIENT) * rest, size, 2 * counts.pieces)
    exposed = ends + max(0.0, communication - ends - compute)
    gathered = weight_bytes * (2 * counts.block + counts.rest) if size > 1 else 0
    activations = activation_bytes(counts, data=size)
    held = 4 * p / size + gathered
    return Cost(held, GRADIENT * p / size, MOMENTS * p / size, activations, sent, compute, communication, exposed)


def tensor_parallel(counts: Counts, machine: Machine, size: int, *, sequence: bool = True) -> Cost:
    """Every device holds 1/N of each matrix; four all-reduces a block, each of the whole residual stream in 16 bits.

    They stand between one matrix product and the next that needs their result, so nothing hides them.
    """
    p, stream = counts.parameters, 2 * counts.tokens * counts.width
    times = 4 * counts.layers + 2
    rounds = times * counts.pieces
    sent = times * all_reduce_bytes(stream, size)
    compute = counts.flops / size / machine.flops
    communication = machine.seconds(sent, size, rounds)
    activations = activation_bytes(counts, tensor=size, sequence=sequence)
    shares = (4 * p / size, GRADIENT * p / size, MOMENTS * p / size)
    return Cost(*shares, activations, sent, compute, communication, communication)


def ring_bytes(counts: Counts, size: int, *, itemsize: int = 2, backward: bool = True) -> float:
    """Bytes that a process of the ring sends in one layer.

    Forward, N - 1 times a block of keys and values; backward once more, and N times their gradients in float32.
    """
    block = 2 * counts.tokens / size * counts.kv_width
    turns = size - 1
    forward = block * itemsize * turns
    return forward + (forward + block * 4 * size * (size > 1) if backward else 0.0)


def context_parallel(counts: Counts, machine: Machine, size: int) -> Cost:
    """Every device holds the model, and 1/N of the tokens; keys and values go round while attention computes.

    A turn takes as long as its attention or as its sending, whichever is longer. Gradients of the weights are added up
    as by DDP.
    """
    p = counts.parameters
    weights = ddp(counts, machine, size)
    attention = 12 * counts.layers * counts.heads_width * counts.context * counts.tokens / 2  # causal: half of it
    compute = (counts.flops - attention) / size / machine.flops
    rings = counts.layers * ring_bytes(counts, size)
    ring_time = machine.seconds(rings, size, 2 * counts.layers)
    exposed = max(0.0, ring_time - attention / size / machine.flops) + weights.exposed
    activations = activation_bytes(counts, context=size)
    total = weights.communication + ring_time
    return Cost(4 * p, GRADIENT * p, MOMENTS * p, activations, weights.sent + rings, compute, total, exposed)


def mixed(counts: Counts, machine: Machine, size: int, tensor: int = 8, *, weight_bytes: int = 4) -> Cost:
    """FSDP over groups of ``tensor`` devices, each of which cuts its matrices: what large runs do.

    Tensor parallel stays inside a machine. FSDP gathers among the size / tensor devices that hold the same piece.
    """
    tensor = min(tensor, size)
    if size % tensor:
        raise ValueError(f"the number of devices, {size}, is no multiple of {tensor}")
    groups = size // tensor
    piece = replace(counts, block=counts.block // tensor, rest=counts.rest // tensor)
    inner = tensor_parallel(replace(counts, batch=counts.batch / groups), machine, tensor)
    inside = replace(machine, per_host=max(1, machine.per_host // tensor))
    outer = fsdp(piece, inside, groups, weight_bytes=weight_bytes)
    compute = counts.flops / size / machine.flops
    ends = outer.exposed if outer.communication <= compute else 0.0
    exposed = inner.exposed + max(outer.communication - compute, ends)
    activations = activation_bytes(counts, tensor=tensor, sequence=tensor > 1, data=groups)
    held = outer.weights, outer.gradients, outer.optimizer, activations
    return Cost(*held, inner.sent + outer.sent, compute, inner.communication + outer.communication, exposed)


def that_fits(
    scheme: Callable[[Counts, Machine, int], Cost], counts: Counts, machine: Machine, size: int
) -> tuple[Cost, int] | None:
    """The cost of a scheme with the fewest micro-batches that fit into the memory, and how many; None if none fits."""
    pieces = 1
    while pieces <= counts.batch:
        cost = scheme(replace(counts, pieces=pieces), machine, size)
        if cost.held <= machine.memory:
            return cost, pieces
        pieces *= 2
    return None


SCHEMES: dict[str, Callable[[Counts, Machine, int], Cost]] = {
    "DDP": ddp,
    "FSDP": fsdp,
    "tensor parallel": tensor_parallel,
    "context parallel": context_parallel,
}
"""The schemes by the name that the page has for them."""
