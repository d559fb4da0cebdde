"""The doors of linear attention: the sum, the decaying sum and the (gated) delta rule."""

from functools import partial
from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.doors.call import (
    DENSE_ODD,
    DENSE_WRONG,
    MASK_WRONG,
    Call,
    changed,
    dense_inputs,
    given,
    int32,
    more,
    numbers,
    of,
    running_sum,
    some,
    spread,
    turned,
    with_number,
)
from tformer_lib import linear_attention as linear


def sum_call(random: Random) -> Call:
    """A causal call of ``attend``, normalised or not."""
    arguments = dense_inputs(random, 140) | {"causal": True, "normalised": random.random() < 0.5}
    arguments["feature_map"] = random.choice((linear.elu_plus_one, linear.relu))
    call = Call(linear.attend, arguments, exact_sum, ("q", "k", "v"))
    return changed(call, SUM_WRONG, DENSE_ODD, random)


def exact_sum(arguments: dict) -> Tensor:
    """All weights written out, in float64."""
    q, k, v = (arguments[name].double() for name in "qkv")
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    root = q.shape[-1] ** -0.25
    phi = F.relu if arguments["feature_map"] is linear.relu else lambda x: torch.where(x > 0, x + 1, x.exp())
    weights = (phi(q * root) @ phi(k * root).mT).tril(S - T)
    if arguments["normalised"]:
        total = weights.sum(-1, keepdim=True)
        weights = weights / total.masked_fill(total == 0, 1.0)
    return weights @ v


def member_call(random: Random, *, delta: bool) -> Call:
    """A call of ``gated_attend`` or ``delta_attend``: packed or not, with a first state or without."""
    x = dense_inputs(random, 80, same_length=True)
    packed = random.random() < 0.4
    if packed:
        x = {name: values[:1] for name, values in x.items()}
    if delta:
        x["k"] = F.normalize(x["k"].double(), dim=-1).to(x["k"].dtype)
    batch, kv_heads, T, _ = x["k"].shape
    sequences = batch
    if packed:
        cuts = sorted(random.choices(range(T + 1), k=random.randint(0, 3)))
        x["cu_seqlens"] = running_sum([b - a for a, b in zip([0, *cuts], [*cuts, T], strict=True)])
        sequences = len(cuts) + 1
        if random.random() < 0.5:
            x["max_seqlen"] = int(x["cu_seqlens"].diff().max()) + random.randint(0, 3)
    for name, there in (("log_decay", not delta or random.random() < 0.6), ("beta", delta)):
        if there:
            shape = [n if random.random() < 0.7 else 1 for n in (batch, kv_heads, T)]
            values = torch.sigmoid(numbers(random, *shape, 1) * 2)
            x[name] = -values if name == "log_decay" else values
    if random.random() < 0.4:
        x["initial_state"] = numbers(random, sequences, kv_heads, x["q"].shape[3], x["v"].shape[3])
    function, wrong = (linear.delta_attend, DELTA_WRONG) if delta else (linear.gated_attend, GATED_WRONG)
    leaves = tuple(name for name in ("q", "k", "v", "log_decay", "beta", "initial_state") if name in x)
    return changed(Call(function, x, exact_member, leaves), wrong, MEMBER_ODD, random)


def exact_member(arguments: dict) -> Tensor:
    """One token after another, in float64."""
    q, k, v = (arguments[name].double() for name in "qkv")
    group, (batch, _, T, d) = q.shape[1] // k.shape[1], k.shape
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    log_decay, beta = (
        by_token(arguments.get(name), (batch, arguments["k"].shape[1], T)) for name in ("log_decay", "beta")
    )
    decay = 1.0 if log_decay is None else log_decay.clamp(min=-100).exp().repeat_interleave(group, 1)
    beta = None if beta is None else beta.repeat_interleave(group, 1)
    starts = arguments["cu_seqlens"].tolist() if "cu_seqlens" in arguments else [0, T]
    initial, outs = arguments.get("initial_state"), []
    for i in range(len(starts) - 1):
        state = q.new_zeros(batch, q.shape[1], d, v.shape[3])
        if initial is not None:
            first = initial[i : i + 1] if "cu_seqlens" in arguments else initial
            state = first.double().repeat_interleave(group, 1)
        for t in range(starts[i], starts[i + 1]):
            now = slice(t, t + 1)
            state = state * (decay[:, :, now] if log_decay is not None else 1.0)
            written = v[:, :, now]
            if beta is not None:
                written = beta[:, :, now] * (written - k[:, :, now] @ state)
            state = state + k[:, :, now].mT @ written
            outs.append(q[:, :, now] * d**-0.5 @ state)
    return torch.cat(outs, 2) if outs else q @ q.new_zeros(d, v.shape[3])


def by_token(x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """A number a token and kv head, (batch, kv_heads, T, 1) in float64."""
    return None if x is None else x.double().expand(*shape, 1)


def longest_too_short(arguments: dict, random: Random) -> dict | None:
    """A longest sequence below what there is."""
    if "cu_seqlens" not in arguments or not some(arguments["q"]):
        return None
    return {"max_seqlen": int(arguments["cu_seqlens"].diff().max()) - 1}


def other_starts(cu_seqlens: Tensor):
    """Packing where there was none, or other packing."""
    return lambda arguments, random: {"cu_seqlens": cu_seqlens} if "cu_seqlens" in arguments else None


SUM_WRONG = DENSE_WRONG | MASK_WRONG | {"a negative scale": given(scale=-1.0)}
GATED_WRONG = DENSE_WRONG | {
    "one decay": given(log_decay=torch.zeros(1)),
    "a number for a decay": given(log_decay=-0.5),
    "decays of more tokens": of("log_decay", lambda x: torch.zeros(1, 1, 1000, 1)),
    "decays of more heads": of("log_decay", lambda x: torch.zeros(1, 7, 1, 1)),
    "a decay above 0": of("log_decay", lambda x: x * 0 + 0.5, some),
    "a state of more columns": of("initial_state", lambda x: more(x, 3), some),
    "a state of more sequences": of("initial_state", lambda x: more(x, 0)),
    "a state of three dimensions": of("initial_state", lambda x: x[0]),
    "a state elsewhere": of("initial_state", lambda x: x.to("meta")),
    "sequences that begin late": with_number("cu_seqlens", 0, lambda n: n + 1),
    "sequences that begin before": with_number("cu_seqlens", 0, lambda n: -5),
    "tokens past the end": with_number("cu_seqlens", -1, lambda n: n + 100),
    "tokens left over": with_number("cu_seqlens", -1, lambda n: n - 1),
    "sequences that rise and fall": lambda a, random: (
        {"cu_seqlens": int32([0, a["q"].shape[2] + 7, a["q"].shape[2]])} if "cu_seqlens" in a else None
    ),
    "int64 starts": of("cu_seqlens", Tensor.long),
    "starts of two dimensions": of("cu_seqlens", lambda x: x[None]),
    "no starts": of("cu_seqlens", lambda x: x[:0]),
    "a batch that is packed": lambda a, random: (
        {"cu_seqlens": int32([0, a["q"].shape[2]])} if a["q"].shape[0] > 1 else None
    ),
    "a longest that is too short": longest_too_short,
    "more queries than tokens": of("q", lambda x: more(x, 2), some),
}
DELTA_WRONG = {name: change for name, change in GATED_WRONG.items() if name != "one decay"} | {
    "step sizes of more tokens": of("beta", lambda x: torch.zeros(1, 1, 1000, 1)),
    "step sizes of three dimensions": of("beta", lambda x: x[0]),
    "step sizes of more columns": of("beta", lambda x: torch.cat((x, x), 3), some),
    "a number for step sizes": given(beta=0.5),
}
MEMBER_ODD = DENSE_ODD | {
    "decays lie apart": of("log_decay", spread),
    "step sizes are turned": of("beta", turned),
    "states lie apart": of("initial_state", spread),
    "every second start": of("cu_seqlens", spread),
}
gated_call, delta_call = partial(member_call, delta=False), partial(member_call, delta=True)
