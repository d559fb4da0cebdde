"""The exercises of the grouped-query attention chapter."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tformer_lib.contract import counted
from tformer_lib.grouped_query_attention import pool_heads
from tformer_lib.teaching.exercises.engine import (
    exercise,
    is_close,
    require,
    require_close,
    require_finite,
    require_integer,
    require_shape,
)


@exercise(
    "grouped_query_attention.kv_head",
    title="Which KV head?",
    hints=(
        "Query heads come in consecutive groups. How many heads has a group?",
        "heads // kv_heads of them; head 0 to that number less one read kv head 0.",
        "head // (heads // kv_heads)",
    ),
)
def check_kv_head(fn):
    for heads, kv_heads in ((8, 2), (8, 8), (8, 1), (12, 4), (32, 8)):
        group = heads // kv_heads
        for head in range(heads):
            place = f"with {heads} heads and {counted(kv_heads, 'kv head')}, query head {head}"
            found = require_integer(fn(head, heads, kv_heads), f"{place}: the kv head")
            require(0 <= found < kv_heads, f"{place} reads kv head {found}, which does not exist")
            require(found == head // group, f"{place} reads kv head {found}, expected {head // group}")


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that is made within it and does not lie in the memory of its inputs."""

    def __init__(self, *inputs):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in inputs}
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.known:
            self.largest = max(self.largest, out.numel())
        return out


@exercise(
    "grouped_query_attention.scores",
    title="Scores without a copy",
    hints=(
        "The queries of a group all meet the same keys. What if they were rows of one matrix?",
        "Give q the shape (batch, kv_heads, group * T, head_dim): consecutive heads lie side by side already.",
        "(q.reshape(batch, kv_heads, -1, head_dim) @ k.transpose(-2, -1)).view(batch, heads, T, S)",
    ),
)
def check_scores(fn):
    shapes = (2, 8, 2, 1, 40, 16), (2, 8, 1, 3, 40, 16), (2, 4, 4, 2, 33, 16), (3, 6, 3, 1, 50, 12), (1, 4, 2, 1, 30, 8)
    for batch, heads, kv_heads, T, S, d in shapes:
        q, k = torch.randn(batch, heads, T, d), torch.randn(batch, kv_heads, S, d)
        with Sizes(q, k) as sizes:
            found = fn(q, k)
        wanted = torch.einsum("bhtd,bhsd->bhts", q, k.repeat_interleave(heads // kv_heads, 1))
        place = f"with {heads} heads and {counted(kv_heads, 'kv head')}"
        scaled = is_close(found, wanted / q.shape[-1] ** 0.5)
        require(not scaled, "the scores are divided by sqrt(head_dim); they were asked for unscaled")
        require_close(found, wanted, f"{place}, {whose_keys(heads, kv_heads)}", name=f"{place}, the scores")
        largest = max(q.numel(), wanted.numel())
        message = f"{place}, a tensor of {sizes.largest:,} numbers is made; the scores are {wanted.numel():,}: "
        copied = "the keys are copied" + (" for each query head" if sizes.largest > k.numel() else "")
        require(kv_heads == heads or sizes.largest <= largest, message + copied)


def whose_keys(heads: int, kv_heads: int) -> str:
    """What is wrong with scores that are not a query's with its keys, in groups only where there are some."""
    if kv_heads == 1:
        return "a query does not meet the keys of the one kv head, or meets them out of order"
    if kv_heads == heads:
        return "a query meets the keys of another head, or its own out of order"
    return "a query meets the keys of another group, or its own out of order"


@exercise(
    "grouped_query_attention.pool",
    title="Pool the heads of a group",
    hints=(
        "The weight is (heads * head_dim, width), one head after the other. Which shape shows the groups?",
        "(kv_heads, heads // kv_heads, head_dim, width): over which axis is the mean?",
        "weight.view(kv_heads, -1, head_dim, width).mean(1).reshape(kv_heads * head_dim, width)",
    ),
)
def check_pool(fn):
    for heads, kv_heads, head_dim, width in ((8, 2, 4, 10), (8, 1, 4, 10), (4, 4, 2, 6), (6, 3, 5, 7)):
        weight = torch.randn(heads * head_dim, width)
        name = f"the weight from {heads} to {counted(kv_heads, 'head')}"
        found = fn(weight, kv_heads, head_dim)
        explain_pool(found, weight, kv_heads, head_dim)
        require_close(
            found,
            pool_heads(weight, kv_heads, head_dim),
            f"{name} is not the mean of each group of neighbouring heads",
            name=name,
        )


def explain_pool(found: torch.Tensor, weight: torch.Tensor, kv_heads: int, head_dim: int) -> None:
    """Name the usual mistakes in the mean of each group."""
    heads = weight.shape[0] // head_dim
    if (
        not isinstance(found, torch.Tensor)
        or found.shape != (kv_heads * head_dim, weight.shape[1])
        or kv_heads == heads
    ):
        return
    mean = pool_heads(weight, kv_heads, head_dim)
    split = weight.unflatten(0, (heads, head_dim))
    mistakes = {
        "the heads of a group are added up, and not divided by their number": mean * (heads // kv_heads),
        "this is one head of each group: the exercise asks for the mean of them all": split[:: heads // kv_heads],
        "neighbouring rows are averaged: they belong to one head; average row 0 of each head of the group, and so on": (
            weight.unflatten(0, (kv_heads * head_dim, -1)).mean(1)
        ),
        "heads that stand kv_heads apart are averaged: a group is made of neighbours": (
            split.unflatten(0, (-1, kv_heads)).mean(0)
        ),
    }
    for words, wrong in mistakes.items():
        different = not torch.allclose(found.double(), wrong.reshape(found.shape).double(), atol=1e-4)
        require(different or (kv_heads == 1 and torch.allclose(wrong.reshape(mean.shape), mean)), words)


@exercise(
    "grouped_query_attention.absorb",
    title="Scores against latents",
    hints=(
        "q . (W c) is a number; which other order of the products gives the same one?",
        "(W^T q) . c: carry the query to the latent space, once per head, and leave the cache alone.",
        'torch.einsum("hdc,bhtd->bhtc", up, q) @ latents[:, None].transpose(-2, -1)',
    ),
)
def check_absorb(fn):
    # Latents of 4, heads of 32: a product may copy the latents for each head, and that is less than one head's keys.
    for batch, heads, T, S, head_dim, rank in ((2, 4, 1, 50, 32, 4), (1, 3, 5, 40, 36, 3)):
        q, up, latents = (
            torch.randn(batch, heads, T, head_dim),
            torch.randn(heads, head_dim, rank),
            torch.randn(batch, S, rank),
        )
        with Sizes(q, up, latents) as sizes:
            found = fn(q, up, latents)
        keys = torch.einsum("hdc,bsc->bhsd", up, latents)
        wanted = q @ keys.transpose(-2, -1)
        name = f"the scores of {counted(T, 'query', 'queries')} in {heads} heads"
        require_close(found, wanted, f"{name} differ from those of the expanded keys", name=name)
        explain_size(sizes, keys)


def explain_size(sizes: Sizes, keys: torch.Tensor) -> None:
    """Fail where keys were made, for one head at least."""
    one_head = keys[:, 0].numel()
    made = f"a tensor of {sizes.largest:,} numbers is made; the keys of one head are {one_head:,}"
    require(sizes.largest < one_head, f"{made}: keys are still made")


def as_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The elements that RoPE turns together as complex numbers: (heads, head_dim / 2, width)."""
    first, second = weight.unflatten(0, (-1, head_dim)).chunk(2, dim=1)
    return torch.complex(first, second)


def rotated_scores(q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, head_dim: int, rope: bool) -> torch.Tensor:
    """Scores of all pairs of tokens in every head, with RoPE or without: (heads, T, T)."""
    place = torch.arange(len(x), dtype=torch.float64)[:, None]
    angle = place * 10_000.0 ** -torch.linspace(0, 1, head_dim // 2, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle if rope else torch.zeros_like(angle))
    q, k = (torch.einsum("tw,hpw->htp", x.to(turn.dtype), as_pairs(w, head_dim)) * turn for w in (q, k))
    return torch.einsum("htp,hsp->hts", q, k.conj()).real


@exercise(
    "grouped_query_attention.align",
    title="Align heads before you pool them",
    hints=(
        "Values first. Head i adds out_i @ v_i to the result. Which matrices can you put between the two for free?",
        "The orthogonal R that brings R @ v_i nearest to v_first comes from the SVD of v_first @ v_i.T (Procrustes).",
        "Keys: RoPE turns elements (j, j + head_dim / 2) together, and turns commute with turns in the same plane. "
        "Make each pair one complex number; what is left to choose is an angle for each pair.",
        "For complex rows a and b, the angle of (a * b.conj()).sum() turns b towards a. q turns with k; out undoes v.",
    ),
)
def check_align(fn):
    for heads, kv_heads, head_dim, width in ((4, 2, 6, 20), (6, 3, 4, 15), (6, 2, 4, 15), (4, 1, 8, 40)):
        weights = [torch.randn(heads * head_dim, width) for _ in range(3)] + [torch.randn(width, heads * head_dim)]
        given = [w.clone() for w in weights]
        found = fn(*given, kv_heads, head_dim)
        require(isinstance(found, (tuple, list)) and len(found) == 4, "return four weights: q, k, v and out")
        for name, new, old, kept in zip(("q", "k", "v", "out"), found, weights, given, strict=True):
            require(
                torch.equal(kept, old), f"your function changes the weight of {name} that it was given: make a new one"
            )
            require_shape(new, old.shape, f"the weight of {name}")
            require_finite(new, f"the weight of {name}")
        before = [w.double() for w in weights]
        after = [w.detach().double() for w in found]
        place = f"with {heads} heads in {counted(kv_heads, 'group')}"
        same_function(before, after, head_dim, place)
        near_the_first(before, after, kv_heads, head_dim, place)


def same_function(before: list, after: list, head_dim: int, place: str) -> None:
    """Fail unless every head computes what it did."""
    x = torch.randn(5, before[0].shape[1], dtype=torch.float64)
    for rope in (False, True):
        old, new = (rotated_scores(w[0], w[1], x, head_dim, rope) for w in (before, after))
        why = "q must make the same turns as k"
        if rope:
            why = "only turns in the planes of the pairs (j, j + head_dim / 2) commute with RoPE"
        require_close(new, old, f"{place}, the scores change {'under RoPE' if rope else 'even without RoPE'}: {why}")
    old, new = (
        torch.einsum("ohd,hdw->how", w[3].unflatten(1, (-1, head_dim)), w[2].unflatten(0, (-1, head_dim)))
        for w in (before, after)
    )
    require_close(new, old, f"{place}, out @ v of a head changes: what turns v must be undone in out")


def near_the_first(before: list, after: list, kv_heads: int, head_dim: int, place: str) -> None:
    """Fail unless every head's keys and values are as near to those of its group's first head as a turn brings them."""
    k, v = as_pairs(before[1], head_dim), before[2].unflatten(0, (-1, head_dim))
    group = len(k) // kv_heads
    for name, old, weight in (("keys", k, after[1]), ("values", v, after[2])):
        new = weight.unflatten(0, (-1, head_dim))
        for i in range(len(k)):
            first = i - i % group
            head = f"{place}, the {name} of head {i}"
            length = old[i].norm()
            require(
                torch.isclose(new[i].norm(), length, rtol=1e-3),
                f"{head} are stretched: turn them and keep their length",
            )
            if name == "keys":
                common = (old[first] * old[i].conj()).sum(-1).abs().sum()
            else:
                common = torch.linalg.matrix_norm(old[first] @ old[i].T, "nuc")
            best = (old[first].norm() ** 2 + length**2 - 2 * common).clamp(min=0).sqrt()
            distance, way = (new[first] - new[i]).norm(), "a turn" if name == "keys" else "a turn or a reflection"
            words = f"{head} are {distance:.2f} from those of head {first}, the group's first"
            require(i == first or distance <= best + 1e-3 * length, f"{words}; {way} can bring them to {best:.2f}")
