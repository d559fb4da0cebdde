"""The doors of flash attention."""

from random import Random

import torch
from torch import Tensor

from benchmarks.doors.call import (
    DENSE_ODD,
    DENSE_WRONG,
    DTYPES,
    MASK_WRONG,
    PACKED_WRONG,
    Call,
    changed,
    dense_inputs,
    exact_attention,
    given,
    in_other_strides,
    more,
    numbers,
    of,
    running_sum,
    some,
    spread,
    with_number,
)
from tformer_lib.flash_attention import (
    flash_attention,
    flash_attention_float8,
    flash_attention_varlen,
    merge_states,
    quantize_float8,
)


def exact_dense(arguments: dict) -> Tensor:
    """Attention with the whole matrix of scores, in float64."""
    q, k, v = (arguments[name] for name in "qkv")
    T, S = q.shape[2], k.shape[2]
    before = torch.arange(S - T, S)[:, None] - torch.arange(S)  # how many keys lie between a query's own and a key
    left, right = sides_of(arguments)
    seen = (before <= left) & (-before <= right)
    seen = seen if arguments.get("mask") is None else seen & arguments["mask"]
    softcap, slopes = arguments.get("softcap"), arguments.get("alibi_slopes")

    def scores(x: Tensor) -> Tensor:
        x = softcap * torch.tanh(x / softcap) if softcap else x
        return x if slopes is None else x - slopes.double()[..., None, None] * before.abs()

    return exact_attention(q, k, v, seen, scores)


def sides_of(arguments: dict) -> tuple[float, float]:
    """How many keys before and after its own a query sees."""
    window, endless = arguments.get("window"), float("inf")
    left, right = window if isinstance(window, tuple) else (window - 1 if window else None, 0 if window else None)
    right = 0 if arguments.get("causal") else right
    return endless if left is None else left, endless if right is None else right


def draw_form(random: Random, heads: int, batch: int) -> dict:
    """What may be asked of scores, a window and values beside the plain."""
    form = {"causal": random.random() < 0.5}
    if random.random() < 0.4:
        sides = tuple(random.choice((None, 0, random.randint(1, 80))) for _ in range(2))
        form["window"] = random.choice((random.randint(1, 80), sides))
    if random.random() < 0.25:
        form["softcap"] = random.choice((0.5, 5.0, 50.0))
    if random.random() < 0.25:
        shape = random.choice(((heads,), (batch, heads)))
        form["alibi_slopes"] = torch.rand(shape, generator=torch.Generator().manual_seed(random.randint(0, 99)))
    return form


def flash_call(random: Random) -> Call:
    """A call of ``flash_attention``."""
    arguments = dense_inputs(random, 140)
    arguments |= draw_form(random, arguments["q"].shape[1], arguments["q"].shape[0])
    return changed(Call(flash_attention, arguments, exact_dense, ("q", "k", "v")), FLASH_WRONG, FLASH_ODD, random)


FORM_WRONG = {
    "no window": given(window=0),
    "half a window": given(window=2.5),
    "a window of three sides": given(window=(1, 2, 3)),
    "a window that ends before it begins": given(window=(3, -1)),
    "no cap": given(softcap=0.0),
    "a cap below 0": given(softcap=-2.0),
    "slopes of other heads": given(alibi_slopes=torch.ones(7)),
    "slopes in float64": lambda a, random: {"alibi_slopes": torch.ones(a["q"].shape[-3]).double()},
    "slopes elsewhere": lambda a, random: {"alibi_slopes": torch.ones(a["q"].shape[-3], device="meta")},
}
FLASH_WRONG = DENSE_WRONG | FORM_WRONG | MASK_WRONG
FLASH_ODD = DENSE_ODD | {
    "a window past everything": given(window=2**31),
    "sides past everything": given(window=(2**31, 2**31)),
    "slopes that lie apart": of("alibi_slopes", spread),
}


def varlen_call(random: Random) -> Call:
    """A call of ``flash_attention_varlen``: a few sequences end to end, some of them empty."""
    kv_heads, group = random.randint(1, 2), random.randint(1, 3)
    d, dtype = random.choice((1, 5, 8, 24)), random.choice(DTYPES)
    sequences = random.randint(1, 4)
    counts = {name: [random.choice((0, 1, random.randint(2, 60))) for _ in range(sequences)] for name in "qk"}
    arguments = {f"cu_seqlens_{name}": running_sum(counts[name]) for name in "qk"}
    widths = {"q": d, "k": d, "v": d if random.random() < 0.7 else random.randint(1, 40)}
    for name, heads in (("q", group * kv_heads), ("k", kv_heads), ("v", kv_heads)):
        arguments[name] = numbers(random, sum(counts["q" if name == "q" else "k"]), heads, widths[name], dtype=dtype)
    if random.random() < 0.5:
        arguments |= {f"max_seqlen_{name}": max(counts[name]) + random.randint(0, 3) for name in "qk"}
    arguments |= draw_form(random, group * kv_heads, sequences)
    return changed(
        Call(flash_attention_varlen, arguments, exact_packed, ("q", "k", "v")), VARLEN_WRONG, VARLEN_ODD, random
    )


def exact_packed(arguments: dict) -> Tensor:
    """One sequence after another."""
    rows, columns = (arguments[f"cu_seqlens_{name}"].tolist() for name in "qk")
    q, v, slopes = arguments["q"], arguments["v"], arguments.get("alibi_slopes")
    out = torch.zeros((*q.shape[:2], v.shape[2]), dtype=torch.float64)
    form = {name: arguments.get(name) for name in ("causal", "window", "softcap")}
    for i in range(len(rows) - 1):
        here, there = slice(rows[i], rows[i + 1]), slice(columns[i], columns[i + 1])
        one = {name: arguments[name][here if name == "q" else there].transpose(0, 1)[None] for name in "qkv"}
        own = {"alibi_slopes": slopes if slopes is None or slopes.dim() == 1 else slopes[i]}
        out[here] = exact_dense(one | form | own)[0].transpose(0, 1)
    return out


VARLEN_WRONG = (
    PACKED_WRONG
    | FORM_WRONG
    | {
        "sequences that begin late": with_number("cu_seqlens_q", 0, lambda n: n + 1),
        "sequences that begin before": with_number("cu_seqlens_k", 0, lambda n: -5),
        "queries past the end": with_number("cu_seqlens_q", -1, lambda n: n + 1),
        "keys past the end": with_number("cu_seqlens_k", -1, lambda n: n + 100),
        "keys that are left over": of("k", lambda x: more(x, 0), some),
        "queries that rise and fall": with_number("cu_seqlens_q", 1, lambda n: 2**30),
        "keys that fall below 0": with_number("cu_seqlens_k", 1, lambda n: -1),
        "int64 starts": of("cu_seqlens_k", Tensor.long),
        "starts of two dimensions": of("cu_seqlens_q", lambda x: x[None]),
        "no starts": of("cu_seqlens_q", lambda x: x[:0]),
        "more sequences of keys": of("cu_seqlens_k", lambda x: torch.cat((x, x[-1:]))),
        "a longest that is too short": lambda a, random: {"max_seqlen_k": int(a["cu_seqlens_k"].diff().max()) - 1},
    }
)
VARLEN_ODD = in_other_strides("q", "k", "v") | {
    "every second start": of("cu_seqlens_k", spread),
}


# --- float8 --------------------------------------------------------------------------------------------------------


def float8_call(random: Random) -> Call:
    """A call of ``flash_attention_float8``."""
    x = dense_inputs(random, 70)
    x["v"] = x["v"][..., : x["q"].shape[3]]
    if x["v"].shape[3] < x["q"].shape[3]:
        x["v"] = numbers(random, *x["k"].shape)
    arguments = {"causal": random.random() < 0.5}
    if random.random() < 0.4:
        arguments["window"] = random.choice((random.randint(1, 80), (random.randint(0, 9), None)))
    for name, values in x.items():
        if some(values):
            arguments[name], arguments[f"{name}_scale"] = quantize_float8(values)
        else:
            arguments[name], arguments[f"{name}_scale"] = values.to(torch.float8_e4m3fn), torch.ones(values.shape[1])
    return changed(Call(flash_attention_float8, arguments, exact_float8), FLOAT8_WRONG, FLOAT8_ODD, random)


def exact_float8(arguments: dict) -> Tensor:
    """Attention of the numbers times their scales."""
    wide = {name: arguments[name].double() * arguments[f"{name}_scale"].double()[:, None, None] for name in "qkv"}
    return exact_dense(arguments | wide)


NOT_IN_FLOAT8 = ("q in float64", "v in float64", "k of integers")
FLOAT8_WRONG = {name: change for name, change in DENSE_WRONG.items() if name not in NOT_IN_FLOAT8} | {
    "q in bfloat16": of("q", Tensor.bfloat16),
    "v in the other float8": of("v", lambda x: x.float().to(torch.float8_e5m2)),
    "values of more columns": of("v", lambda x: more(x, 3), some),
    "no window": given(window=0),
    "scales of more heads": of("k_scale", lambda x: more(x, 0)),
    "one scale": of("q_scale", lambda x: x[0]),
    "scales in float64": of("v_scale", Tensor.double),
    "scales elsewhere": of("k_scale", lambda x: x.to("meta")),
}
FLOAT8_ODD = {"keys are columns": of("k", lambda x: x.mT.contiguous().mT), "scales lie apart": of("q_scale", spread)}


# --- parts that are merged -----------------------------------------------------------------------------------------


def merged(step: int | str, outs: list[Tensor], lses: list[Tensor]) -> Tensor:
    """Output and log-sum-exp side by side; there is one step."""
    out, lse = merge_states(outs, lses)
    return torch.cat((out, torch.nan_to_num(lse, neginf=0.0).to(out.dtype)[..., None]), -1)


def merge_call(random: Random) -> Call:
    """A call of ``merge_states``: a few parts, some of whose queries saw no key."""
    shape = (random.randint(1, 2), random.randint(1, 3), random.randint(0, 20))
    dtype, width, parts = random.choice(DTYPES), random.randint(1, 9), random.randint(1, 4)
    outs = [numbers(random, *shape, width, dtype=dtype) for _ in range(parts)]
    lses = [numbers(random, *shape) * 3 for _ in range(parts)]
    blind = [numbers(random, *shape) > 0.8 for _ in range(parts)]
    lses = [x.masked_fill(hidden, -torch.inf) for x, hidden in zip(lses, blind, strict=True)]
    outs = [x.masked_fill(hidden[..., None], 0) for x, hidden in zip(outs, blind, strict=True)]
    return changed(Call(merged, {"outs": outs, "lses": lses}, exact_merge), MERGE_WRONG, MERGE_ODD, random)


def exact_merge(arguments: dict) -> Tensor:
    """The formula, in float64."""
    outs, lses = (torch.stack(arguments[name]).double() for name in ("outs", "lses"))
    lse = torch.logsumexp(lses, 0)
    weights = torch.nan_to_num(torch.exp(lses - lse))
    out = (weights[..., None] * outs).sum(0)
    return torch.cat((out, torch.nan_to_num(lse, neginf=0.0)[..., None]), -1)


def last(name: str, change):
    """A change of the last part."""
    return lambda a, random: {name: [*a[name][:-1], change(a[name][-1])]}


def among(name: str, change):
    """A change of the last of several parts."""
    return lambda a, random: last(name, change)(a, random) if len(a[name]) > 1 else None


MERGE_WRONG = {
    "no part": given(outs=[], lses=[]),
    "one part more": lambda a, random: {"outs": a["outs"] * 2},
    "a wider part": among("outs", lambda x: more(x, 3)),
    "a part of more heads": among("outs", lambda x: more(x, 1)),
    "a part in float64": among("outs", Tensor.double),
    "a part elsewhere": among("outs", lambda x: x.to("meta")),
    "sums of more heads": last("lses", lambda x: more(x, 1)),
    "sums with a column": last("lses", lambda x: x[..., None]),
    "sums in float64": last("lses", Tensor.double),
    "sums elsewhere": last("lses", lambda x: x.to("meta")),
}
MERGE_ODD = {"a part that lies apart": last("outs", spread), "sums that lie apart": last("lses", spread)}
