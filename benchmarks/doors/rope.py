"""The doors of RoPE: angles that are given, in place, and angles from positions."""

from random import Random

import torch
from torch import Tensor

from benchmarks.doors.call import DTYPES, Call, changed, given, in_other_strides, more, numbers, of, some, spread
from tformer_lib import rope


def side_by_side(q: Tensor, k: Tensor | None) -> Tensor:
    """The heads of both."""
    return q if k is None else torch.cat((q, k), 1)


def turned_both(step: int | str, **arguments) -> Tensor:
    """``rotate_both``."""
    return side_by_side(*rope.rotate_both(**arguments, step=step))


def turned_in_place(step: int | str, **arguments) -> Tensor:
    """``rotate_both_`` on copies."""
    both = {
        name: x.clone(memory_format=torch.preserve_format) if isinstance(x := arguments[name], Tensor) else x
        for name in "qk"
    }
    rope.rotate_both_(**(arguments | both), step=step)
    return side_by_side(**both)


def turned_at_positions(step: int | str, **arguments) -> Tensor:
    """``rotate_at_positions``."""
    return side_by_side(*rope.rotate_at_positions(**arguments, step=step))


def rotation(random: Random) -> tuple[dict, int, tuple[int, ...]]:
    """Queries and keys with a norm or without, pairs of channels that turn, and the shape of a number a position."""
    batch, T, d, dtype = random.randint(1, 2), random.randint(0, 9), random.choice((2, 5, 8, 24)), random.choice(DTYPES)
    x = {"q": numbers(random, batch, random.randint(1, 4), T, d, dtype=dtype), "k": None}
    if random.random() < 0.8:
        x["k"] = numbers(random, batch, random.randint(1, 4), T, d, dtype=dtype)
    if random.random() < 0.4:
        x["norm_eps"] = 1e-6
        x["q_weight"] = numbers(random, d)
    x["layout"] = random.choice(rope.LAYOUTS)
    return x, random.randint(0, d // 2), random.choice(((T,), (1, T), (batch, T)))


def rotate_call(random: Random) -> Call:
    """A call of ``rotate_both`` or of ``rotate_both_``."""
    arguments, pairs, shape = rotation(random)
    arguments |= {name: numbers(random, *shape, pairs) for name in ("cos", "sin")}
    function = random.choice((turned_both, turned_in_place))
    leaves = tuple(name for name in ("q", "k") if arguments[name] is not None) if function is turned_both else ()
    odd = ODD if function is turned_both else {name: how for name, how in ODD.items() if "one for all" not in name}
    return changed(Call(function, arguments, exact_turn, leaves), ROTATE_WRONG, odd, random)


def positions_call(random: Random) -> Call:
    """A call of ``rotate_at_positions``."""
    arguments, pairs, shape = rotation(random)
    if shape[0] == 1 and len(shape) == 2:
        shape = (arguments["q"].shape[0], shape[1])
    arguments["positions"] = torch.randint(
        0, 500, shape, generator=torch.Generator().manual_seed(random.randint(0, 99))
    )
    arguments["frequencies"] = torch.rand(pairs, generator=torch.Generator().manual_seed(random.randint(0, 99)))
    return changed(Call(turned_at_positions, arguments, exact_positions), POSITIONS_WRONG, ODD, random)


def exact_positions(arguments: dict) -> Tensor:
    """Angles in float32, as the models have them, and the turn in float64."""
    angles = arguments["positions"][..., None].float() * arguments["frequencies"]
    return exact_turn(arguments | {"cos": angles.cos(), "sin": angles.sin()})


def exact_turn(arguments: dict) -> Tensor:
    """One pair of channels after another."""
    cos, sin, layout, turned = arguments["cos"].double(), arguments["sin"].double(), arguments["layout"], []
    pairs = cos.shape[-1]
    cos, sin = (x[:, None] if x.dim() == 3 else x for x in (cos, sin))  # (batch, 1, T, pairs) or (T, pairs)
    for name in "qk":
        if arguments[name] is None:
            continue
        x = arguments[name].double()
        if (eps := arguments.get("norm_eps")) is not None:
            x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
            weight = arguments.get(f"{name}_weight")
            x = x if weight is None else x * weight.double()
        columns = list(x.unbind(-1))
        for pair in range(pairs):
            i, j = (2 * pair, 2 * pair + 1) if layout == "interleaved" else (pair, pair + pairs)
            a, b, c, s = columns[i], columns[j], cos[..., pair], sin[..., pair]
            columns[i], columns[j] = a * c - b * s, a * s + b * c
        turned.append(torch.stack(columns, -1))
    return torch.cat(turned, 1)


def both_angles(change):
    """A change of cosines and sines alike."""
    return lambda a, random: {name: change(a[name]) for name in ("cos", "sin")}


WRONG = {
    "q of three dimensions": of("q", lambda x: x[0]),
    "q of integers": of("q", Tensor.long),
    "k of integers": of("k", Tensor.long),
    "k of more tokens": of("k", lambda x: more(x, 2), some),
    "k of more batches": of("k", lambda x: more(x, 0)),
    "k of more columns": of("k", lambda x: more(x, 3), some),
    "k in float64": of("k", Tensor.double),
    "k elsewhere": of("k", lambda x: x.to("meta")),
    "an unknown layout": given(layout="neither"),
    "a layout that is a number": given(layout=1),
    "a weight without a norm": lambda a, random: {"norm_eps": None, "q_weight": torch.ones(a["q"].shape[-1])},
    "a weight of more columns": lambda a, random: {"norm_eps": 1e-6, "q_weight": torch.ones(a["q"].shape[-1] + 1)},
    "a weight elsewhere": lambda a, random: {
        "norm_eps": 1e-6,
        "q_weight": torch.ones(a["q"].shape[-1], device="meta"),
    },
}
ROTATE_WRONG = WRONG | {
    "more pairs than columns": both_angles(lambda x: torch.zeros(*x.shape[:-1], 13)),
    "cos wider than sin": of("cos", lambda x: more(x, x.dim() - 1), some),
    "angles of more tokens": both_angles(lambda x: torch.zeros(*x.shape[:-2], x.shape[-2] + 1, x.shape[-1])),
    "angles of one dimension": both_angles(Tensor.flatten),
    "angles of four dimensions": both_angles(lambda x: x[None] if x.dim() == 3 else x[None, None]),
    "angles of more batches": both_angles(lambda x: torch.zeros(3, *x.shape[-2:])),
    "angles elsewhere": both_angles(lambda x: x.to("meta")),
    "cos elsewhere": of("cos", lambda x: x.to("meta")),
    "angles of integers": both_angles(Tensor.long),
}
POSITIONS_WRONG = WRONG | {
    "positions between": of("positions", Tensor.float),
    "positions of more tokens": of("positions", lambda x: torch.cat((x, x[..., :1]), -1), some),
    "positions of three dimensions": of("positions", lambda x: x[None] if x.dim() == 2 else x[None, None]),
    "positions of more batches": of("positions", lambda x: torch.zeros(3, x.shape[-1], dtype=torch.int64)),
    "positions elsewhere": of("positions", lambda x: x.to("meta")),
    "more frequencies than pairs": given(frequencies=torch.zeros(13)),
    "frequencies of two dimensions": of("frequencies", lambda x: x[None]),
    "frequencies elsewhere": of("frequencies", lambda x: x.to("meta")),
    "frequencies of integers": of("frequencies", Tensor.long),
}
ODD = in_other_strides("q", "k") | {
    "cos is every second element": of("cos", spread),
    "every second position": of("positions", spread),
    "weights lie apart": of("q_weight", spread),
}
