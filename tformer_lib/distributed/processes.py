"""The processes of a run: who this one is, how they find each other, and what they agree on.

``torchrun --nproc-per-node N -m ...`` starts N copies of a program and tells each its rank, how many there are, and
where they meet, in environment variables. :func:`joined` reads them. A program that was started alone finds nothing
there and is a world of one process, in which every function of this room does the obvious thing.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = 600.0
"""Seconds that a process waits for the others in a collective operation before it gives up."""


@dataclass(frozen=True)
class World:
    """The processes that run one program together.

    Attributes:
        rank: this process's number, from 0.
        size: how many processes there are, on all machines.
        local_rank: this process's number on its machine, which is its GPU's too.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes files."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process. All must ask at the same place of the program."""
        if self.size == 1:
            return bool(flag)
        raised = torch.tensor(int(flag))  # on the host: no GPU is waited for
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the processes' tensors, the same in all of them; ``x`` itself where there is one process."""
        if self.size == 1:
            return x
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    def mean(self, x: Tensor) -> Tensor:
        """The mean of the processes' tensors."""
        return self.sum(x) / self.size

    def share(self, count: int, what: str = "a batch") -> slice:
        """Which of ``count`` equal things this process takes: neighbouring ones, in the order of the ranks.

        Raises:
            ValueError: if they do not divide evenly.
        """
        if count % self.size:
            raise ValueError(f"{what} of {count} cannot be shared by {self.size} processes evenly")
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


def world() -> World:
    """This process's world: the process group that it has joined, or itself alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    rank = dist.get_rank()
    return World(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)))


def was_launched() -> bool:
    """Whether torchrun (or another launcher that sets its variables) started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextlib.contextmanager
def joined(*, cpu: bool = False, timeout: float = TIMEOUT) -> Iterator[World]:
    """Meet the other processes, if torchrun started this one, and part from them at the end.

    Tensors on a GPU travel by NCCL, those on the host by gloo; on a machine without a GPU all travel by gloo.

    Args:
        cpu: leave GPUs alone although they are there.
        timeout: seconds after which a process that waits for the others gives up with an error.
    """
    if not was_launched() or dist.is_initialized():
        yield world()
        return
    on_gpu = torch.cuda.is_available() and not cpu
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout))
    yield world()  # after an error the others may be gone, and parting from them would never end
    world().any(False)  # nobody leaves before all are here
    dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process, where the program asks for "a GPU" and has several processes; else the device asked for.

    Raises:
        ValueError: if the machine has fewer GPUs than processes.
    """
    here = world()
    if here.size == 1 or device.type != "cuda" or device.index is not None:
        return device
    if here.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {here.local_rank} of this machine has no GPU of its own: it has {torch.cuda.device_count()}; "
            "start fewer processes, or train with --device cpu"
        )
    device = torch.device("cuda", here.local_rank)
    torch.cuda.set_device(device)
    return device


LOST = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "timeout", "aborted")


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process has gone, or did not come in time."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and world().size > 1 and any(word in text for word in LOST)
