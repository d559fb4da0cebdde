"""Plans: what a call needs but for its addresses, kept for tensors of the same layout and bound for a pass.

Checking shapes, choosing a step and collecting strides takes Python longer than a short decode takes a GPU.
"""

from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from tformer_lib import jit
from tformer_lib.ladder import DTYPE_CODES, Kernel, address_of, loadable, note_written, wants_gradients
from tformer_lib.paged_attention.checks import check_indices, check_paged, check_slots, check_write
from tformer_lib.paged_attention.kernels import (
    ARGUMENTS,
    DECODE_HEAD_DIMS,
    PREFILL_STEPS,
    WRITE,
    WRITE_ARGUMENTS,
    choose_step,
    choose_writer,
    kernels_of,
    scratch_of,
)
from tformer_lib.paged_attention.options import Options, Places, Rows, WriteOptions
from tformer_lib.paged_attention.reference import attend_in_pytorch, attend_one_by_one, write_in_pytorch


@dataclass(frozen=True, slots=True)
class Call:
    """A call but for its addresses.

    Attributes:
        step: "0", or the step that was chosen.
        device: where it runs.
        kernels: the C functions to call, with what each takes beyond the arguments and the stream.
        strides: of each tensor in the arguments, in their order.
        numbers: the arguments after the last address.
        pairs: counters that step 2 needs, or the better prefill; 0 if neither takes part.
        copies: whether the tensors must be copied first, so that the kernels can read them.
    """

    step: str
    device: torch.device
    kernels: tuple[tuple[Kernel, tuple[int, ...]], ...] = ()
    strides: tuple[tuple[int, ...], ...] = ()
    numbers: tuple[float, ...] = ()
    pairs: int = 0
    copies: bool = False

    def launch(self, arguments: bytes) -> None:
        """Call the C functions."""
        for kernel, more in self.kernels:
            kernel.launch(arguments, *more)


MOST_CALLS = 4096
_calls: dict[tuple, Call] = {}


def keep_call(key: tuple, call: Call) -> Call:
    """Keep a call; many different layouts come from prompts of many lengths, so old ones are dropped."""
    if len(_calls) >= MOST_CALLS:
        _calls.clear()
    _calls[key] = call
    return call


def layout_of(x: Tensor | None) -> tuple | None:
    """All of a tensor that a call depends on, apart from its address."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


def facts_of(*tensors: Tensor) -> tuple:
    """What a call depends on, of tensors whose addresses come later: layouts, alignment, and who asks for gradients."""
    places = [address_of(x) for x in tensors]
    aligned = None if None in places else reduce(or_, places) & 15
    return (*map(layout_of, tensors), aligned, wants_gradients(*tensors))


def check_in_memory(facts: tuple) -> None:
    """Refuse to plan for tensors that lie nowhere: a plan hands out addresses."""
    if facts[-2] is None:
        raise ValueError("a plan is made of tensors whose numbers lie in memory: call paged_attention or write_cache")


def check_facts(planned: tuple, *tensors: Tensor) -> None:
    """Refuse tensors that are not laid out as those that were planned for."""
    found = facts_of(*tensors)
    if found != planned:
        pairs = zip(found, planned, strict=True)
        came, wanted = next((came, wanted) for came, wanted in pairs if came != wanted)
        raise ValueError(f"the plan was made for {wanted}, got {came}: plan again for tensors of another layout")


# --- attention -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The attention of a pass but for the addresses of queries and pools, which differ from layer to layer."""

    shared: Call
    facts: tuple
    rows: Rows
    options: Options

    def run(
        self,
        q: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        *,
        return_lse: bool = False,
        settled: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of one layer, as :func:`paged_attention` returns it.

        Args:
            settled: lengths and tables were not written by the kernel that comes just before. Step 2 then starts while
                that kernel still runs, and reads them; for all else it waits.

        Raises:
            ValueError: a tensor has another shape, dtype, device or strides than the one that the plan was made with.
        """
        check_facts(self.facts, q, k_pool, v_pool)
        out, lse = self.call(q, k_pool, v_pool, return_lse, settled)
        return (out, lse) if return_lse else out

    def call(
        self, q: Tensor, k_pool: Tensor, v_pool: Tensor, with_lse: bool, settled: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The same for tensors that are known to fit; lse is None where it was not asked for and costs something."""
        shared, rows = self.shared, self.rows
        if shared.step == "0":
            step_0 = attend_one_by_one if self.options.batch_invariant else attend_in_pytorch
            return step_0(q, k_pool, v_pool, rows, self.options)
        if shared.copies:
            q = q.clone(memory_format=torch.contiguous_format)
            return make_plan(q, k_pool, v_pool, rows, self.options).call(q, k_pool, v_pool, with_lse)
        out = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32) if with_lse else None
        if q.numel() == 0:
            return out, lse
        q_strides, out_strides, k_strides, v_strides = shared.strides
        arguments = ARGUMENTS.pack(
            q.data_ptr(),
            *q_strides,
            out.data_ptr(),
            *out_strides,
            k_pool.data_ptr(),
            *k_strides,
            v_pool.data_ptr(),
            *v_strides,
            rows.block_tables.data_ptr(),
            rows.lengths.data_ptr(),
            0 if rows.query_starts is None else rows.query_starts.data_ptr(),
            0 if lse is None else lse.data_ptr(),
            *(scratch_of(shared.device, shared.pairs) if shared.pairs else (0, 0)),
            *shared.numbers,
            settled,
        )
        shared.launch(arguments)
        return out, lse


def make_plan(q: Tensor, k_pool: Tensor, v_pool: Tensor, rows: Rows, options: Options) -> AttentionPlan:
    """The plan of a call; what depends on layouts alone is looked up. On a CPU all that is indexed by is checked."""
    facts = facts_of(q, k_pool, v_pool)
    layouts = (layout_of(rows.block_tables), layout_of(rows.lengths), layout_of(rows.query_starts), rows.max_queries)
    key = (facts, layouts, options, jit.kernels_folder())
    shared = _calls.get(key)
    if shared is None:
        check_paged(q, k_pool, v_pool, rows, options)
        check_in_memory(facts)
        shared = keep_call(key, attention_call(q, k_pool, v_pool, rows, options))
    if options.checked or shared.device.type == "cpu":
        check_indices(k_pool, rows, q.shape[0])
    return AttentionPlan(shared, facts, rows.loadable(), options)


def attention_call(q: Tensor, k_pool: Tensor, v_pool: Tensor, rows: Rows, options: Options) -> Call:
    """Choose the step for tensors that fit, and collect what it is given."""
    step = choose_step(q, k_pool, v_pool, rows, options)
    if step == "0":
        return Call(step, q.device)
    if q is not loadable(q, aligned=step not in ("cpu", "1")):
        return Call(step, q.device, copies=True)
    (tokens, heads, d), batch = q.shape, rows.lengths.shape[0]
    numbers = (
        rows.loadable().block_tables.stride(0),
        batch,
        tokens,
        heads,
        k_pool.shape[1],
        d,
        k_pool.shape[2],
        options.window or 0,
        options.scale * options.k_scale,
        options.v_scale,
        DTYPE_CODES[q.dtype],
        DTYPE_CODES[k_pool.dtype],
    )
    strides = (q.stride()[:2], (heads * d, d), k_pool.stride()[:3], v_pool.stride()[:3])
    with_step_2 = step in PREFILL_STEPS and d in DECODE_HEAD_DIMS and not options.batch_invariant
    pairs = max(2, batch * heads) if with_step_2 or step in ("2", "prefill_hopper") else 0
    return Call(step, q.device, kernels_of(step, k_pool, with_step_2), strides, numbers, pairs)


# --- writing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WritePlan:
    """The writing of a pass but for the addresses of keys, values and pools, which differ from layer to layer."""

    shared: Call
    facts: tuple
    places: Places
    options: WriteOptions

    def run(self, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor) -> None:
        """Write one layer's keys and values.

        Raises:
            ValueError: a tensor has another shape, dtype, device or strides than the one that the plan was made with.
        """
        check_facts(self.facts, k, v, k_pool, v_pool)
        self.call(k, v, k_pool, v_pool)

    def call(self, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor) -> None:
        """The same for tensors that are known to fit."""
        shared, places = self.shared, self.places
        if shared.step == "0":
            return write_in_pytorch(k, v, k_pool, v_pool, places, self.options)
        if shared.copies:
            k, v = loadable(k), loadable(v)
            return make_write_plan(k, v, k_pool, v_pool, places, self.options).call(k, v, k_pool, v_pool)
        if k.numel() == 0:
            return None
        k_strides, v_strides, k_pool_strides, v_pool_strides = shared.strides
        arguments = WRITE_ARGUMENTS.pack(
            k.data_ptr(),
            *k_strides,
            v.data_ptr(),
            *v_strides,
            k_pool.data_ptr(),
            *k_pool_strides,
            v_pool.data_ptr(),
            *v_pool_strides,
            *(0 if x is None else x.data_ptr() for x in places),
            *shared.numbers,
        )
        shared.launch(arguments)
        note_written(k_pool, v_pool)
        return None


def make_write_plan(
    k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, places: Places, options: WriteOptions
) -> WritePlan:
    """The plan of a call; what depends on layouts alone is looked up. On a CPU the slots are checked."""
    facts = facts_of(k, v, k_pool, v_pool)
    key = (facts, *map(layout_of, places), options, jit.kernels_folder())
    shared = _calls.get(key)
    if shared is None:
        check_write(k, v, k_pool, v_pool, places, options)
        check_in_memory(facts)
        shared = keep_call(key, write_call(k, v, k_pool, v_pool, places, options))
    if options.checked or shared.device.type == "cpu":
        check_slots(places.slots, k_pool)
    return WritePlan(shared, facts, places.loadable(), options)


def write_call(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, places: Places, options: WriteOptions) -> Call:
    """Choose the step for tensors that fit, and collect what it is given."""
    step = choose_writer(options.step, k, v, k_pool, v_pool)
    if step == "0":
        return Call(step, k.device)
    if k is not loadable(k) or v is not loadable(v):
        return Call(step, k.device, copies=True)
    _, cos, sin = places.loadable()
    numbers = (
        0 if cos is None else cos.stride(0),
        0 if sin is None else sin.stride(0),
        *k.shape,
        k_pool.shape[2],
        0 if cos is None else 2 * cos.shape[1],
        options.k_scale,
        options.v_scale,
        options.layout == "interleaved",
        DTYPE_CODES[k.dtype],
        DTYPE_CODES[k_pool.dtype],
    )
    strides = (k.stride()[:2], v.stride()[:2], k_pool.stride()[:3], v_pool.stride()[:3])
    return Call(step, k.device, ((WRITE.kernel(step, "write_cache", k.device), ()),), strides, numbers)
