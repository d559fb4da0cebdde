"""Scaling out: one program on several devices.

torchrun --nproc-per-node 2 -m tformer_lib.training train --preset quick               # one machine, 2 processes
torchrun --nproc-per-node 2 -m tformer_lib.training train --preset quick --parallel fsdp
torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 -m tformer_lib.training ...
"""

from tformer_lib.distributed.context_parallel import (
    contiguous,
    merge,
    own_part,
    positions_of,
    ring_attend,
    ring_attention,
    zigzag,
)
from tformer_lib.distributed.data_parallel import (
    announce_piece,
    compile_loss,
    copy_whole,
    data_parallel,
    free_gathered,
    whole,
    whole_weights,
)
from tformer_lib.distributed.processes import TIMEOUT, World, is_lost_peer, joined, own_device, was_launched, world
from tformer_lib.distributed.sharded_checkpoint import SINGLE, Saver, load, newest, remove_others, shapes
from tformer_lib.distributed.tensor_parallel import tensor_parallel
from tformer_lib.distributed.workers import Workers

__all__ = [
    "SINGLE",
    "Saver",
    "TIMEOUT",
    "Workers",
    "World",
    "announce_piece",
    "compile_loss",
    "contiguous",
    "copy_whole",
    "data_parallel",
    "free_gathered",
    "is_lost_peer",
    "joined",
    "load",
    "merge",
    "newest",
    "own_device",
    "own_part",
    "positions_of",
    "remove_others",
    "ring_attend",
    "ring_attention",
    "shapes",
    "tensor_parallel",
    "was_launched",
    "whole",
    "whole_weights",
    "world",
    "zigzag",
]
