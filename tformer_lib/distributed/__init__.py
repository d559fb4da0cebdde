"""Scaling out: one program on several devices, by torch's own engine.

    torchrun --nproc-per-node 2 -m tformer_lib.training train --preset quick                  # DDP
    torchrun --nproc-per-node 2 -m tformer_lib.training train --preset quick --parallel fsdp
    torchrun --nproc-per-node 4 -m tformer_lib.training resume --out runs/quick               # on other devices
    torchrun --nproc-per-node 8 -m tformer_lib.training train --tensor-parallel 2 --context-parallel 2 --parallel fsdp

and on several machines the same line on each of them, which finds the others at HOST:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 -m tformer_lib.training train

Each topic has a room: ``processes`` (who runs, and how they meet), ``data_parallel`` (DDP and FSDP2),
``tensor_parallel``, ``context_parallel`` (ring attention), ``expert_parallel``, ``layout`` (which processes of a run
share what), ``sharded_checkpoint``, ``workers`` (processes for notebooks and tests), ``costs`` (what each scheme holds,
sends and takes, on paper) and ``traffic`` (what the profiler sees).
"""

from tformer_lib.distributed.context_parallel import (
    contiguous,
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
    own,
    whole,
    whole_weights,
)
from tformer_lib.distributed.expert_parallel import expert_parallel
from tformer_lib.distributed.layout import Layout
from tformer_lib.distributed.processes import TIMEOUT, World, is_lost_peer, joined, own_device, was_launched, world
from tformer_lib.distributed.sharded_checkpoint import SINGLE, Saver, load, newest, remove_others, shapes
from tformer_lib.distributed.tensor_parallel import tensor_parallel
from tformer_lib.distributed.traffic import bytes_sent
from tformer_lib.distributed.workers import Workers

__all__ = [
    "Layout",
    "SINGLE",
    "Saver",
    "TIMEOUT",
    "Workers",
    "World",
    "announce_piece",
    "bytes_sent",
    "compile_loss",
    "contiguous",
    "copy_whole",
    "data_parallel",
    "expert_parallel",
    "free_gathered",
    "is_lost_peer",
    "joined",
    "load",
    "newest",
    "own",
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
