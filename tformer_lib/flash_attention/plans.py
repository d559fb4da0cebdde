"""Plans: a call but for its addresses, kept for tensors of the same layout.

Checking shapes, choosing a step, filling the kernel's arguments and passing through ``torch.library`` takes the host
longer than a short call takes a GPU. All of it depends on layouts and options alone. So the door looks the call up
first: the second call of a layout packs its addresses between numbers that are ready, and launches.

Only a call that passed every check leaves a plan, and whatever the checks look at is part of its key. Whoever watches
operators (``torch.compile``, ``torch.func``, dispatch modes, the profiler) gets the operator.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import NoneType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tformer_lib import jit
from tformer_lib.flash_attention import kernels
from tformer_lib.flash_attention.options import Options, Packing
from tformer_lib.flash_attention.reference import empty_outputs
from tformer_lib.ladder import Kernel, address_of, counters

MOST_PLANS = 4096
_plans: dict[tuple, "Plan | None"] = {}  # None: the operator's work


@dataclass(frozen=True, slots=True)
class Plan:
    """A forward but for its addresses.

    Attributes:
        kernel: the C function.
        pack: makes the struct from addresses and, in between, ``numbers``.
        numbers: the bytes of the struct between two addresses.
        step: what the caller asked for.
        options: what is asked beside it, without slopes.
        longest: the longest packed sequences of queries and keys.
        on_gpu: whether it deals out its tiles by counters.
    """

    kernel: Kernel
    pack: Callable[..., bytes]
    numbers: tuple[bytes, ...]
    step: str
    options: Options
    longest: tuple[int, int]
    on_gpu: bool

    def run(self, q: Tensor, k: Tensor, v: Tensor, others: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
        """out and lse.

        Args:
            others: alibi_slopes, cu_seqlens_q and cu_seqlens_k, where there are any.
        """
        out, lse = empty_outputs(q, v)
        dealt = counters(self.kernel.device) if self.on_gpu else None  # alive until the launch
        slopes, starts_q, starts_k = (0 if x is None else x.data_ptr() for x in others)
        n = self.numbers
        self.kernel.launch(
            self.pack(
                q.data_ptr(),
                n[0],
                k.data_ptr(),
                n[1],
                v.data_ptr(),
                n[2],
                out.data_ptr(),
                n[3],
                lse.data_ptr(),
                n[4],
                0 if dealt is None else dealt.data_ptr(),
                starts_q,
                starts_k,
                slopes,
                n[5],
            )
        )
        return out, lse


# --- looking up ----------------------------------------------------------------------------------------------------


def key_of(tensors: tuple[Tensor | None, ...], window: object, options: tuple) -> tuple | None:
    """What a call's plan is kept by; None where the operator must see the call.

    Args:
        tensors: q, k, v, alibi_slopes, cu_seqlens_q and cu_seqlens_k, some of which may be None.
        window: as the caller gave it.
        options: all other options, as the caller gave them.
    """
    if is_watched() or not is_whole(window):
        return None
    for option in options:
        if type(option) not in SIMPLE:
            return None
    layouts, address = [], 0
    for x in tensors:
        if x is None:
            layouts.append(None)
            continue
        place = address_of(x)
        if place is None:
            return None
        layouts.append((x.shape, x.stride(), x.dtype, x.device))
        address |= place
    slopes = tensors[3]
    return (*layouts, address & 15, slopes is not None and slopes.requires_grad, window, options, jit.kernels_folder())


SIMPLE = (NoneType, bool, int, float, str)


def is_whole(window: object) -> bool:
    """Whether a window holds whole numbers: 2.0, which is refused, equals 2 as a key."""
    kind = type(window)
    return kind in (NoneType, int) or (kind is tuple and all(type(side) in (NoneType, int) for side in window))


def is_watched() -> bool:
    """Whether somebody wants to see the operator: a compiler, a transform, a mode, a profiler."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
    )


def find(key: tuple) -> Plan | None:
    """The plan that is kept by a key, or None."""
    return _plans.get(key)


def keep(key: tuple, make: Callable[[], Plan | None]) -> None:
    """Keep the plan of a call that passed; calls of very many layouts begin anew."""
    if key in _plans:
        return
    if len(_plans) >= MOST_PLANS:
        _plans.clear()
    _plans[key] = make()


# --- making --------------------------------------------------------------------------------------------------------


def make_plan(
    q: Tensor, k: Tensor, v: Tensor, options: Options, packing: Packing | None, step: str, checked: bool
) -> Plan | None:
    """The plan of a call that the operator has just run; None where it copies a tensor, or runs no kernel."""
    chosen = kernels.best_step(step, q, v, None, options)
    given = [x for x in (options.alibi_slopes, *starts_of(packing)) if x is not None]
    if (
        chosen == "0"
        or 0 in (q.numel(), k.numel(), v.numel())
        or any(kernels.prepared(x) is not x for x in (q, k, v))
        or not all(x.is_contiguous() for x in given)
        or (q.is_cuda and options.scale <= 0)  # a copy of q takes the sign
        or (packing is not None and (checked or not q.is_cuda))  # what cu_seqlens hold is looked at in every call
    ):
        return None
    out, lse = empty_outputs(q, v)
    arguments = kernels.arguments_of(q, k, v, options, packing)
    arguments.out, arguments.lse = kernels.matrix(out), lse.data_ptr()
    pack, numbers = cut(bytes(arguments))
    kernel = kernels.LADDER.kernel(kernels.source_of(chosen, options), "forward", q.device)
    longest = (q.shape[2], k.shape[2]) if packing is None else (packing.max_seqlen_q, packing.max_seqlen_k)
    return Plan(kernel, pack, numbers, step, replace(options, alibi_slopes=None), longest, q.is_cuda)


def starts_of(packing: Packing | None) -> tuple[Tensor | None, Tensor | None]:
    """Where packed queries and keys begin."""
    return (None, None) if packing is None else (packing.cu_seqlens_q, packing.cu_seqlens_k)


ADDRESSES = ("q", "k", "v", "out", "lse", "dealt", "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes")


def cut(arguments: bytes) -> tuple[Callable[..., bytes], tuple[bytes, ...]]:
    """How to put new addresses into a struct of arguments: a packer, and the bytes between the addresses."""
    places = [getattr(kernels.Arguments, name).offset for name in ADDRESSES]
    ends = [*places[1:], len(arguments)]
    parts = [arguments[place + 8 : end] for place, end in zip(places, ends, strict=True)]
    layout = "=" + "".join(f"Q{len(part)}s" if part else "Q" for part in parts)
    return struct.Struct(layout).pack, tuple(part for part in parts if part)
