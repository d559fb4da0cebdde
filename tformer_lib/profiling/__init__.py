"""Where the time goes: named ranges, traces, counts of work, and the limits to hold them against.

    profiling.enable()                              # from here on, ranges reach Nsight Systems and Nsight Compute
    with profiling.range("attention"): ...          # free when off

    with profiling.trace("decode.json") as trace:   # Chrome's format, which Perfetto opens
        generate(model, [prompt], max_new_tokens=8)
    print(trace.table())

    with profiling.count() as work:                 # FLOPs and bytes, operator by operator
        model(tokens)
    print(work.table())

The calls are the same on a CPU and on a GPU. Where a GPU took part, a trace's intervals are its kernels and copies, by
CUDA stream; on a CPU alone they are the operators that do the work themselves, by thread.

Each has a room: ``ranges``, ``traces``, ``intervals``, ``counters`` (of Nsight Compute), ``work`` and ``limits``.

Sources: Amdahl 1967 (the law); Williams, Waterman and Patterson 2009 (the roofline); the NVTX documentation.
"""

from tformer_lib.profiling.counters import (
    COUNTERS,
    STALLS,
    UNITS,
    counters_of,
    number_in,
    raw_page,
    read_counters,
    shorten_counters,
)
from tformer_lib.profiling.intervals import (
    as_intervals,
    pack,
    short_name,
    spans,
    time_table,
    totals,
    unpack,
    utilisation,
)
from tformer_lib.profiling.limits import Roofline, amdahl
from tformer_lib.profiling.ranges import OFF, disable, enable, enabled, listening, nvtx_marker, range
from tformer_lib.profiling.traces import KERNELS, Trace, descend, events_of, nest, silent_start, trace, working
from tformer_lib.profiling.work import (
    COUNTED,
    EMPTY,
    LOOKUPS,
    NEW_NAMES,
    PRODUCTS,
    RESERVES,
    WRITES,
    Work,
    attention_backward_flops,
    attention_flops,
    count,
    distinct_bytes,
    moves_nothing,
    tensors,
    traffic,
)

__all__ = [
    "COUNTED",
    "COUNTERS",
    "EMPTY",
    "KERNELS",
    "LOOKUPS",
    "NEW_NAMES",
    "OFF",
    "PRODUCTS",
    "RESERVES",
    "Roofline",
    "STALLS",
    "Trace",
    "UNITS",
    "WRITES",
    "Work",
    "amdahl",
    "as_intervals",
    "attention_backward_flops",
    "attention_flops",
    "count",
    "counters_of",
    "descend",
    "disable",
    "distinct_bytes",
    "enable",
    "enabled",
    "events_of",
    "listening",
    "moves_nothing",
    "nest",
    "number_in",
    "nvtx_marker",
    "pack",
    "range",
    "raw_page",
    "read_counters",
    "short_name",
    "shorten_counters",
    "silent_start",
    "spans",
    "tensors",
    "time_table",
    "totals",
    "trace",
    "traffic",
    "unpack",
    "utilisation",
    "working",
]
