"""The doors of attention itself: the plain form and PyTorch's."""

from functools import partial
from random import Random

import torch
from torch import Tensor

from benchmarks.doors.call import (
    DENSE_ODD,
    DENSE_WRONG,
    MASK_WRONG,
    Call,
    changed,
    dense_inputs,
    exact_attention,
    numbers,
    of,
    spread,
    turned,
)
from tformer_lib import attention

FORMS = {"attend": attention.attend, "attend_sdpa": attention.attend_sdpa, "attend_scores": attention.attend_scores}


def attended(step: int | str, form: str, **arguments) -> Tensor:
    """One of the forms; there is one step."""
    return FORMS[form](**arguments)


def dense_call(random: Random, form: str) -> Call:
    """A call with a mask or a bias, or without."""
    arguments = dense_inputs(random, 40) | {"causal": random.random() < 0.5, "form": form}
    sizes = (*arguments["q"].shape[:3], arguments["k"].shape[2])
    first, drop = random.randint(0, 3), [random.random() < 0.3 for _ in sizes]
    shape = [1 if alone else size for size, alone in zip(sizes, drop, strict=True)][first:]
    if random.random() < 0.4:
        arguments["mask"] = numbers(random, *shape) > -0.5
    if random.random() < 0.3:
        arguments["bias"] = numbers(random, *shape)
    odd = DENSE_ODD | {"the mask lies apart": of("mask", spread), "the bias is turned": of("bias", turned_bias)}
    return changed(Call(attended, arguments, exact_dense, ("q", "k", "v")), WRONG, odd, random)


def turned_bias(x: Tensor) -> Tensor:
    """The same numbers with the first two dimensions swapped in memory, where there are two."""
    return turned(x) if x.dim() > 1 else x


def exact_dense(arguments: dict) -> Tensor:
    """Attention with the whole matrix of scores, in float64."""
    q, k, v, mask, bias = (arguments.get(name) for name in ("q", "k", "v", "mask", "bias"))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    seen = seen.tril(k.shape[2] - q.shape[2]) if arguments["causal"] else seen
    seen = seen if mask is None else seen & mask
    return exact_attention(q, k, v, seen, lambda x: x if bias is None else x + bias.double())


WRONG = (
    DENSE_WRONG
    | MASK_WRONG
    | {
        "a bias of other lengths": lambda a, random: {"bias": torch.zeros(a["q"].shape[2] + 2, 2 + a["k"].shape[2])},
        "a bias of integers": lambda a, random: {"bias": torch.zeros(a["q"].shape[2], a["k"].shape[2]).long()},
        "a bias elsewhere": lambda a, random: {"bias": torch.zeros(a["q"].shape[2], a["k"].shape[2], device="meta")},
    }
)
CALLS = {form: partial(dense_call, form=form) for form in FORMS}
