"""Random calls of the kernels' public doors, right ones and wrong ones, and what must come of each.

A wrong call has one thing wrong: a shape, a dtype, a number that is indexed by. It must be refused by a ValueError, on
every step alike; a right one, whatever its strides, must give what float64 gives. The tests draw the calls with
hypothesis, ``python -m benchmarks.sanitize <topic> --device cpu`` draws them under an address sanitizer, where a
read or a write outside of a tensor ends the process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


@dataclass
class Call:
    """One call of a door.

    Attributes:
        function: the door.
        arguments: by name.
        what: what is wrong with it, or odd.
        refused: whether it must be refused.
        exact: what it must give, in float64, computed from the arguments.
        leaves: the arguments whose gradients are taken too, of a call that is answered.
    """

    function: Callable
    arguments: dict
    exact: Callable[[dict], Tensor]
    leaves: tuple[str, ...] = ()
    what: str = "nothing"
    refused: bool = False

    def check(self, step: int | str) -> None:
        """Make the call by one step.

        Raises:
            AssertionError: a wrong call was answered, or a right one was answered wrongly.
        """
        __tracebackhide__ = True
        if not self.refused:
            leaves = {name: x.detach().requires_grad_() for name in self.leaves if some(x := self.arguments[name])}
            arguments = self.arguments | leaves
            found, wanted = self.function(**arguments, step=step), self.exact(arguments)
            self.compare("the answer", found.detach(), wanted.detach(), TOLERANCE[found.dtype])
            if leaves and found.requires_grad:
                self.check_gradients(found, wanted, leaves)
            return
        try:
            self.function(**self.arguments, step=step)
        except ValueError:
            return
        raise AssertionError(f"{self.function.__name__} by step {step} answered a call with this wrong: {self.what}")

    def check_gradients(self, found: Tensor, wanted: Tensor, leaves: dict[str, Tensor]) -> None:
        """The gradients of the answer, for one in its direction: float32's are compared, others must be finite."""
        direction = torch.cos(torch.arange(found.numel(), dtype=torch.float64)).view(found.shape)
        ours = torch.autograd.grad(found, list(leaves.values()), direction.to(found.dtype), allow_unused=True)
        if not wanted.requires_grad:
            wanted = wanted + 0 * sum(x.sum() for x in leaves.values())  # nothing was computed from anything
        exact = torch.autograd.grad(wanted, list(leaves.values()), direction, allow_unused=True)
        for name, x, y in zip(leaves, ours, exact, strict=True):
            x, y = (torch.zeros_like(leaves[name]) if grad is None else grad for grad in (x, y))
            tolerance = 50 * TOLERANCE[x.dtype] if found.dtype == torch.float32 else float("inf")
            self.compare(f"the gradient of {name}", x, y.double(), tolerance)

    def compare(self, name: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
        """Refuse numbers that are not finite, and those too far from the exact ones."""
        if not found.isfinite().all():
            raise AssertionError(f"{self.what}: {name} is not finite")
        most = max(1.0, wanted.abs().max().item() if some(wanted) else 0.0)
        told = lambda text: f"{self.what}: {name}: {text}"  # noqa: E731
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * most, msg=told)


def changed(call: Call, changes: dict[str, Callable], oddities: dict[str, Callable], random: Random) -> Call:
    """The call with one change that makes it wrong, one oddity that does not, or neither."""
    kind = random.choice(("wrong", "wrong", "odd", "plain"))
    if kind == "plain":
        return call
    call.what = random.choice(sorted(changes if kind == "wrong" else oddities))
    change = (changes if kind == "wrong" else oddities)[call.what](call.arguments, random)
    call.arguments.update(change or {})
    call.refused = kind == "wrong" and change is not None  # None: this call has nothing that could be made wrong so
    return call


def numbers(random: Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers in memory of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(random.randrange(2**31))).to(dtype)


def int32(values: list[int]) -> Tensor:
    """(n,) int32."""
    return torch.tensor(values, dtype=torch.int32)


def running_sum(counts: list[int]) -> Tensor:
    """(n + 1,) int32: 0, then the sum of the first count, of the first two, ..."""
    return int32([sum(counts[:i]) for i in range(len(counts) + 1)])


# --- other strides -------------------------------------------------------------------------------------------------


def spread(x: Tensor) -> Tensor:
    """The same numbers, every second element of a larger tensor."""
    wide = torch.full((*x.shape, 2), 7).to(x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def turned(x: Tensor) -> Tensor:
    """The same numbers with the first two dimensions swapped in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def shifted(x: Tensor) -> Tensor:
    """The same numbers, one element into memory that begins at a multiple of 64 bytes."""
    memory = x.new_empty(x.numel() + 1)
    memory[1:] = x.flatten()
    return memory[1:].view(x.shape)


def repeated(x: Tensor) -> Tensor:
    """The first row for all, by a stride of 0."""
    return x[:1].expand_as(x)


def of(name: str, change: Callable[[Tensor], Tensor | None], needs: Callable[[Tensor], bool] = lambda x: True):
    """A change of one argument, where it is given."""

    def apply(arguments: dict, random: Random) -> dict | None:
        x = arguments.get(name)
        return None if x is None or not needs(x) else {name: change(x)}

    return apply


def given(**options):
    """A change that gives other options."""
    return lambda arguments, random: options


def more(x: Tensor, dim: int) -> Tensor:
    """One more slice along a dimension."""
    return torch.cat((x, x.narrow(dim, 0, 1)), dim)


def some(x: Tensor) -> bool:
    """Whether there is an element."""
    return x.numel() > 0


def with_number(name: str, place: int | None, value: Callable[[int], int]) -> Callable:
    """A wrong number in a list of integers; at a random place where None is given."""

    def apply(arguments: dict, random: Random) -> dict | None:
        x = arguments.get(name)
        if x is None or not some(x):
            return None
        x = x.clone()
        at = random.randrange(len(x)) if place is None else place
        x[at] = value(int(x[at]))
        return {name: x}

    return apply


STRIDES = {"every second element": spread, "turned": turned, "not aligned": shifted, "one for all": repeated}


def in_other_strides(*names: str) -> dict[str, Callable]:
    """Oddities: each of these tensors laid out in each other way."""
    return {f"{name} is {word}": of(name, how) for name in names for word, how in STRIDES.items()}


# --- queries, keys and values --------------------------------------------------------------------------------------

PACKED_WRONG = {
    "more columns of q": of("q", lambda x: more(x, x.dim() - 1), some),
    "more columns of k": of("k", lambda x: more(x, x.dim() - 1), some),
    "no columns": lambda a, random: {name: a[name][..., :0] for name in "qkv"},
    "q in float64": of("q", Tensor.double),
    "v in float64": of("v", Tensor.double),
    "k of integers": of("k", Tensor.long),
    "q of two dimensions": of("q", lambda x: x.flatten(1)[:, :1]),
    "v elsewhere": of("v", lambda x: x.to("meta")),
}
"""What is wrong whether sequences are packed or not."""
DENSE_WRONG = PACKED_WRONG | {
    "more batches of q": of("q", lambda x: more(x, 0)),
    "more batches of k": of("k", lambda x: more(x, 0)),
    "more heads of v": of("v", lambda x: more(x, 1)),
    "more values than keys": of("v", lambda x: more(x, 2), some),
    "more keys than values": of("k", lambda x: more(x, 2), some),
    "heads of q that do not fit": lambda a, random: {"q": more(a["q"], 1)} if a["k"].shape[1] > 1 else None,
    "no heads of k": lambda a, random: {name: a[name][:, :0] for name in "kv"},
    "no scale": given(scale=float("nan")),
    "an endless scale": given(scale=float("inf")),
}
MASK_WRONG = {
    "a mask of other lengths": lambda a, random: {"mask": torch.ones(a["q"].shape[2] + 2, 2 + a["k"].shape[2]).bool()},
    "a mask of numbers": lambda a, random: {"mask": torch.ones(a["q"].shape[2], a["k"].shape[2])},
    "a mask elsewhere": lambda a, random: {
        "mask": torch.ones(a["q"].shape[2], a["k"].shape[2], dtype=torch.bool, device="meta")
    },
}
DENSE_ODD = in_other_strides("q", "k", "v") | {"keys are columns": of("k", lambda x: x.mT.contiguous().mT)}


def dense_inputs(
    random: Random, longest: int, *, same_length: bool = False, same_width: bool = False
) -> dict[str, Tensor]:
    """q (batch, heads, T, d), k (batch, kv_heads, S, d) and v (batch, kv_heads, S, value_dim) of one dtype."""
    batch, kv_heads, group = random.randint(1, 2), random.randint(1, 2), random.randint(1, 3)
    T, S = (random.choice((0, 1, random.randint(2, longest))) for _ in range(2))
    d, dtype = random.choice((1, 5, 8, 24, 33)), random.choice(DTYPES)
    S = T if same_length else S
    value_dim = d if same_width or random.random() < 0.7 else random.randint(1, 40)
    sizes = {"q": (group * kv_heads, T, d), "k": (kv_heads, S, d), "v": (kv_heads, S, value_dim)}
    return {name: numbers(random, batch, *size, dtype=dtype) for name, size in sizes.items()}


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scores: Callable = lambda x: x, sinks=None
) -> Tensor:
    """Attention with the whole matrix of scores, in float64.

    Args:
        seen: broadcastable to (batch, heads, T, S), where a query may look.
        scores: what becomes of the scaled scores; None: nothing.
        sinks: (heads,) or None, logits that join each row and have no value.
    """
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    x = q @ k.mT * q.shape[-1] ** -0.5
    x = (x if scores is None else scores(x)).masked_fill(~seen, -torch.inf)
    top = x.detach().amax(-1, keepdim=True) if some(x) else x.new_zeros(())
    sink = None if sinks is None else sinks.double()[:, None, None]
    top = (top if sink is None else torch.maximum(top, sink.detach())).clamp(min=-1e300)
    weights = torch.exp(x - top)
    total = weights.sum(-1, keepdim=True) + (0 if sink is None else torch.exp(sink - top))
    return weights / total.masked_fill(total == 0, 1.0) @ v
