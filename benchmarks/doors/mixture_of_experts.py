"""The doors of the mixture of experts: three ways of one sum, and the products of groups of rows."""

from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.doors.call import Call, changed, in_other_strides, more, numbers, of, some, spread, turned
from tformer_lib import mixture_of_experts as moe

FORMS = {"loop": moe.mix_by_loop, "grouped": moe.mix_grouped, "batched": moe.mix_batched}


def mixed(step: int | str, x: Tensor, chosen: Tensor, weights: Tensor, form: str, **matrices: Tensor) -> Tensor:
    """One of the forms over experts made of these matrices; there is one step."""
    count, inner, width = matrices["up"].shape
    experts = moe.Experts(count, width, inner, gated=False)
    experts.up, experts.down = (torch.nn.Parameter(matrices[name], requires_grad=False) for name in ("up", "down"))
    return FORMS[form](experts, x, moe.Routing(chosen, weights, weights))


def mix_call(random: Random) -> Call:
    """A call of one of the forms."""
    tokens, count, width, inner = random.randint(0, 9), random.randint(1, 5), random.randint(1, 9), random.randint(1, 9)
    k = random.randint(1, count)
    chosen = torch.tensor([random.sample(range(count), k) for _ in range(tokens)], dtype=torch.int64).view(tokens, k)
    arguments = {
        "x": numbers(random, tokens, width),
        "chosen": chosen,
        "weights": torch.rand(tokens, k, generator=torch.Generator().manual_seed(random.randint(0, 99))),
        "up": numbers(random, count, inner, width),
        "down": numbers(random, count, width, inner),
        "form": random.choice(sorted(FORMS)),
    }
    return changed(Call(mixed, arguments, exact_mix, ("x", "weights")), MIX_WRONG, MIX_ODD, random)


def exact_mix(arguments: dict) -> Tensor:
    """One token and one of its experts after another."""
    x, weights, up, down = (arguments[name].double() for name in ("x", "weights", "up", "down"))
    rows = [
        sum(weight * (down[expert] @ F.silu(up[expert] @ row)) for weight, expert in zip(w, experts, strict=True))
        for row, w, experts in zip(x, weights, arguments["chosen"].tolist(), strict=True)
    ]
    return torch.stack(rows) if rows else torch.zeros_like(x)


def with_expert(value: int | None):
    """One expert that is not there: below 0, or past the last one."""

    def apply(arguments: dict, random: Random) -> dict | None:
        chosen = arguments["chosen"].clone()
        if not some(chosen):
            return None
        chosen.view(-1)[random.randrange(chosen.numel())] = len(arguments["up"]) if value is None else value
        return {"chosen": chosen}

    return apply


MIX_WRONG = {
    "an expert past the last": with_expert(None),
    "an expert far past the last": with_expert(2**40),
    "a negative expert": with_expert(-1),
    "experts between": of("chosen", Tensor.float),
    "experts of more tokens": of("chosen", lambda x: more(x, 0), some),
    "experts of one dimension": of("chosen", lambda x: x[:, 0]),
    "weights of more tokens": of("weights", lambda x: more(x, 0), some),
    "weights of fewer choices": of("weights", lambda x: x[:, :0]),
    "tokens of more columns": of("x", lambda x: more(x, 1), some),
    "tokens of one dimension": of("x", lambda x: x[:, 0]),
}
MIX_ODD = in_other_strides("x", "weights") | {"choices are turned": of("chosen", turned)}


def grouped(step: int | str, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """``grouped_matmul``; there is one step."""
    return moe.grouped_matmul(rows, weight, counts)


def groups_call(random: Random) -> Call:
    """A call of ``grouped_matmul``, some of whose groups have no rows."""
    counts = [random.choice((0, 1, random.randint(2, 9))) for _ in range(random.randint(1, 5))]
    inputs, outputs = random.randint(1, 9), random.randint(1, 9)
    arguments = {
        "rows": numbers(random, sum(counts), inputs),
        "weight": numbers(random, len(counts), outputs, inputs),
        "counts": torch.tensor(counts),
    }
    return changed(Call(grouped, arguments, exact_groups, ("rows", "weight")), GROUPS_WRONG, GROUPS_ODD, random)


def exact_groups(arguments: dict) -> Tensor:
    """One row after another."""
    rows, weight = arguments["rows"].double(), arguments["weight"].double()
    expert = torch.arange(len(weight)).repeat_interleave(arguments["counts"])
    return (weight[expert] @ rows[..., None])[..., 0]


def with_count(change):
    """One group of another size."""

    def apply(arguments: dict, random: Random) -> dict:
        counts = arguments["counts"].clone()
        place = random.randrange(len(counts))
        counts[place] = change(int(counts[place]))
        return {"counts": counts}

    return apply


GROUPS_WRONG = {
    "rows left over": with_count(lambda n: n - 1),
    "more rows than there are": with_count(lambda n: n + 1),
    "far more rows than there are": with_count(lambda n: 2**40),
    "a group taken back": lambda a, random: (
        {"counts": torch.cat((a["counts"][:-2], a["counts"][-2:] + torch.tensor([100, -100])))}
        if len(a["counts"]) > 1
        else None
    ),
    "counts between": of("counts", Tensor.float),
    "counts of more groups": of("counts", lambda x: torch.cat((x, x[:1] * 0))),
    "counts of two dimensions": of("counts", lambda x: x[None]),
    "rows of more columns": of("rows", lambda x: more(x, 1), some),
    "rows of three dimensions": of("rows", lambda x: x[None]),
    "matrices of two dimensions": of("weight", lambda x: x[0]),
    "matrices in float64": of("weight", Tensor.double),
}
GROUPS_ODD = in_other_strides("rows", "weight") | {"every second count": of("counts", spread)}
