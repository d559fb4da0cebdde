"""The doors of sparse attention: over a pattern, and over blocks that were chosen."""

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from benchmarks.doors.call import (
    DENSE_ODD,
    DENSE_WRONG,
    Call,
    changed,
    dense_inputs,
    exact_attention,
    given,
    numbers,
    of,
    some,
    spread,
    turned,
)
from tformer_lib import sparse_attention as sparse
from tformer_lib.sparse_attention.lists import BLOCK, TILE

LENGTH = 320  # what patterns with a length cover


def pattern_call(random: Random) -> Call:
    """A call of ``attend``: lengths past one tile of queries and several blocks of keys."""
    arguments = dense_inputs(random, 200, same_width=True) | {
        "pattern": draw_pattern(random),
        "causal": random.random() < 0.4,
    }
    if random.random() < 0.3:
        arguments["sinks"] = numbers(random, arguments["q"].shape[1])
    leaves = ("q", "k", "v", "sinks") if "sinks" in arguments else ("q", "k", "v")
    return changed(Call(sparse.attend, arguments, exact_pattern, leaves), PATTERN_WRONG, SPARSE_ODD, random)


def draw_pattern(random: Random) -> sparse.Pattern:
    """One with a name, or two of them."""
    drawn = (
        sparse.everything(),
        sparse.causal(),
        sparse.sliding_window(random.randint(1, 150)),
        sparse.dilated(random.randint(1, 9), random.randint(1, 40)),
        sparse.global_tokens([random.randint(0, 250)]),
        sparse.strided(random.randint(1, 90)),
        sparse.big_bird(LENGTH, block=random.choice((16, 64)), random_blocks=1, seed=random.randint(0, 9)),
        sparse.documents(torch.arange(LENGTH) // random.randint(1, 99)),
    )
    pattern = random.choice(drawn)
    if random.random() < 0.3:
        other = random.choice(drawn)
        pattern = pattern | other if random.random() < 0.5 else pattern & other
    return pattern


def exact_pattern(arguments: dict) -> Tensor:
    """Attention under the pattern's mask."""
    q, k, v = (arguments[name] for name in "qkv")
    T, S = q.shape[2], k.shape[2]
    seen = arguments["pattern"].mask(T, S) & ahead_hidden(T, S, arguments["causal"])
    return exact_attention(q, k, v, seen, sinks=arguments.get("sinks"))


def ahead_hidden(T: int, S: int, causal: bool) -> Tensor:
    """(T, S), True where a query may look."""
    allowed = torch.ones(T, S, dtype=torch.bool)
    return allowed.tril(S - T) if causal else allowed


def chosen_call(random: Random) -> Call:
    """A call of ``attend_chosen``: lists with gaps, in any order, for one head or for all."""
    arguments = dense_inputs(random, 300, same_width=True) | {"causal": random.random() < 0.5}
    q, k = arguments["q"], arguments["k"]
    tiles, blocks = sparse.blocks_in(q.shape[2], TILE), sparse.blocks_in(k.shape[2], BLOCK)
    batch, heads = random.choice((1, q.shape[0])), random.choice((1, k.shape[1], q.shape[1]))
    count = random.randint(0, blocks)
    chosen = torch.full((batch, heads, tiles, count), -1)
    for row in chosen.view(-1, count) if count else ():
        row[:] = torch.tensor(random.sample(range(blocks), count))
        row[torch.tensor([random.random() < 0.3 for _ in range(count)])] = -1
    arguments["chosen"] = chosen.to(random.choice((torch.int64, torch.int32)))
    call = Call(sparse.attend_chosen, arguments, exact_chosen, ("q", "k", "v"))
    return changed(call, CHOSEN_WRONG, CHOSEN_ODD, random)


def exact_chosen(arguments: dict) -> Tensor:
    """Attention under the mask of the chosen blocks."""
    q, k, v, chosen = (arguments[name] for name in ("q", "k", "v", "chosen"))
    T, S = q.shape[2], k.shape[2]
    live = torch.zeros(*chosen.shape[:3], sparse.blocks_in(S, BLOCK) + 1, dtype=torch.bool)
    live = live.scatter(3, (chosen.long() + 1), True)[..., 1:]  # (batch, heads, tiles, blocks); -1 fell into the first
    seen = live.repeat_interleave(TILE, 2)[:, :, :T].repeat_interleave(BLOCK, 3)[..., :S]
    if seen.shape[1] not in (1, q.shape[1]):
        seen = seen.repeat_interleave(q.shape[1] // seen.shape[1], 1)
    return exact_attention(q, k, v, seen & ahead_hidden(T, S, arguments["causal"]), sinks=arguments.get("sinks"))


def with_entry(value: Callable[[int], int]) -> Callable:
    """A block that is not there, in one list."""

    def apply(arguments: dict, random: Random) -> dict | None:
        chosen = arguments["chosen"].clone()
        if not some(chosen):
            return None
        chosen.view(-1)[random.randrange(chosen.numel())] = value(sparse.blocks_in(arguments["k"].shape[2], BLOCK))
        return {"chosen": chosen}

    return apply


def chosen_twice(arguments: dict, random: Random) -> dict | None:
    """One block twice in a list."""
    chosen = arguments["chosen"].clone()
    if not some(chosen) or chosen.shape[3] < 2:
        return None
    chosen[0, 0, 0, :2] = 0
    return {"chosen": chosen}


SPARSE_WRONG = DENSE_WRONG | {
    "sinks of other heads": given(sinks=torch.zeros(7)),
    "sinks of two dimensions": lambda a, random: {"sinks": torch.zeros(1, a["q"].shape[1])},
    "sinks elsewhere": lambda a, random: {"sinks": torch.zeros(a["q"].shape[1], device="meta")},
    "sinks of integers": lambda a, random: {"sinks": torch.zeros(a["q"].shape[1], dtype=torch.int64)},
}
PATTERN_WRONG = SPARSE_WRONG | {
    "no pattern": given(pattern=None),
    "a mask for a pattern": lambda a, random: {"pattern": torch.ones(a["q"].shape[2], a["k"].shape[2]).bool()},
    "a pattern that is too short": lambda a, random: (
        {"pattern": sparse.documents(torch.zeros(a["k"].shape[2] - 1, dtype=torch.int64))}
        if a["k"].shape[2] > 1 and a["q"].shape[2]
        else None
    ),
    "a mask of other lengths": lambda a, random: {"mask": torch.ones(a["q"].shape[2] + 2, 2 + a["k"].shape[2]).bool()},
}
SPARSE_ODD = DENSE_ODD | {"sinks that lie apart": of("sinks", spread)}
CHOSEN_WRONG = SPARSE_WRONG | {
    "a block past the keys": with_entry(lambda blocks: blocks),
    "a block far past the keys": with_entry(lambda blocks: 2**31 - 1),
    "a negative block": with_entry(lambda blocks: -2),
    "a block twice": chosen_twice,
    "floats chosen": of("chosen", Tensor.float),
    "booleans chosen": of("chosen", Tensor.bool),
    "chosen in three dimensions": of("chosen", lambda x: x[0]),
    "chosen for more tiles": of("chosen", lambda x: torch.cat((x, x[:, :, :1]), 2), lambda x: x.shape[2] > 0),
    "chosen for more batches": of("chosen", lambda x: torch.cat((x, x, x))),
    "chosen for more heads": of("chosen", lambda x: torch.cat((x,) * 7, 1)),
    "chosen elsewhere": of("chosen", lambda x: x.to("meta")),
}
CHOSEN_ODD = SPARSE_ODD | {"every second choice": of("chosen", spread), "choices are turned": of("chosen", turned)}
