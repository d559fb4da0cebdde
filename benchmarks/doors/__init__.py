"""Random calls of the library's public doors, right ones and wrong ones, and what must come of each: see ``call``."""

from random import Random

from benchmarks.doors import (
    attention,
    flash_attention,
    linear_attention,
    mixture_of_experts,
    paged_attention,
    rope,
    sparse_attention,
)
from benchmarks.doors.call import Call, shifted, spread, turned

DOORS = {
    "attention": attention.CALLS,
    "flash_attention": {
        "flash_attention": flash_attention.flash_call,
        "flash_attention_varlen": flash_attention.varlen_call,
        "flash_attention_float8": flash_attention.float8_call,
        "merge_states": flash_attention.merge_call,
    },
    "linear_attention": {
        "linear attend": linear_attention.sum_call,
        "gated_attend": linear_attention.gated_call,
        "delta_attend": linear_attention.delta_call,
    },
    "mixture_of_experts": {"mix": mixture_of_experts.mix_call, "grouped_matmul": mixture_of_experts.groups_call},
    "paged_attention": {"paged_attention": paged_attention.paged_call, "write_cache": paged_attention.write_call},
    "rope": {"rotate_both": rope.rotate_call, "rotate_at_positions": rope.positions_call},
    "sparse_attention": {
        "sparse attend": sparse_attention.pattern_call,
        "attend_chosen": sparse_attention.chosen_call,
    },
}
"""What draws a call, for the doors of each topic."""
WRONG = {
    "flash_attention": flash_attention.FLASH_WRONG,
    "flash_attention_varlen": flash_attention.VARLEN_WRONG,
    "flash_attention_float8": flash_attention.FLOAT8_WRONG,
    "merge_states": flash_attention.MERGE_WRONG,
    "linear attend": linear_attention.SUM_WRONG,
    "gated_attend": linear_attention.GATED_WRONG,
    "delta_attend": linear_attention.DELTA_WRONG,
    "mix": mixture_of_experts.MIX_WRONG,
    "grouped_matmul": mixture_of_experts.GROUPS_WRONG,
    "paged_attention": paged_attention.PAGED_WRONG,
    "write_cache": paged_attention.WRITE_WRONG,
    "rotate_both": rope.ROTATE_WRONG,
    "rotate_at_positions": rope.POSITIONS_WRONG,
    "sparse attend": sparse_attention.PATTERN_WRONG,
    "attend_chosen": sparse_attention.CHOSEN_WRONG,
} | dict.fromkeys(attention.CALLS, attention.WRONG)
"""What can be wrong with a call of each door."""
WITH_A_TWIN = {"flash_attention", "linear_attention", "paged_attention", "sparse_attention"}
"""Topics whose kernels have a C++ twin."""
IN_PYTORCH_ALONE = {"flash_attention_float8", "merge_states"}
"""Doors of them that have none."""


def steps(topic: str, door: str) -> tuple[int | str, ...]:
    """The steps by which a CPU answers at a door."""
    return (0, "cpu") if topic in WITH_A_TWIN and door not in IN_PYTORCH_ALONE else (0,)


__all__ = ["DOORS", "WRONG", "Call", "Random", "shifted", "spread", "steps", "turned"]
