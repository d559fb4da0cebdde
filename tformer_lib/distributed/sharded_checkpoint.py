"""Checkpoints that every process writes its own part of, and that any number of processes can read.

torch.distributed.checkpoint plans which process writes which part of which tensor, and when it reads, which parts of
which files make up the parts that a process now holds: that is resharding. The files are safetensors, so nothing is
pickled. All processes must see the same folder, as they do on one machine and on a shared file system.

A checkpoint is a folder ``checkpoint-<step>``; ``sharded.json`` names the one that counts and holds the facts. It is
replaced in one step when all parts are on the disk, so whatever dies whenever, the checkpoint before is still there.
"""

import json
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from tformer_lib.checkpoint import not_finite, part_of, write_atomically
from tformer_lib.distributed.processes import world

POINTER = "sharded.json"
"""The file that names the checkpoint that counts."""

SINGLE = "checkpoint.safetensors"
"""The checkpoint of a run of one process: one file."""


class Saver:
    """Writes sharded checkpoints while the training goes on.

    A save first copies the tensors to the host, which the training waits for, and then writes them from a thread.

    Args:
        out: the run's folder.
    """

    def __init__(self, out: Path):
        self.out = out
        self.group = dist.new_group(backend="gloo")  # its own: the thread's messages must not mix with the training's
        self.writing: tuple[Future, Path, dict] | None = None

    def save(self, state: dict[str, Tensor], facts: dict, step: int) -> None:
        """Begin to write a checkpoint; the one before is finished first. All processes must call it.

        Args:
            state: tensors by name, whole or spread (``DTensor``).
            facts: what is JSON, the same in every process.
            step: names the folder.

        Raises:
            FloatingPointError: if a number is not finite in any process; nothing is written.
        """
        self.finish()
        check_finite(state, self.out)
        folder = self.out / f"checkpoint-{step}"
        if world().is_first:
            shutil.rmtree(part_of(folder), ignore_errors=True)
            part_of(folder).mkdir(parents=True)
        dist.barrier(group=self.group)
        writer = HuggingFaceStorageWriter(str(part_of(folder)), save_distributed=True)
        written = dcp.async_save(state, storage_writer=writer, process_group=self.group)
        self.writing = written, folder, facts

    def publish_if_done(self) -> None:
        """Let a checkpoint count whose parts are all written; called now and then by the first process."""
        if self.writing is not None and self.writing[0].done():
            self._publish()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written counts. All processes must call it."""
        if self.writing is not None:
            self._publish()
        dist.barrier(group=self.group)

    def _publish(self) -> None:
        (written, folder, facts), self.writing = self.writing, None
        written.result()  # raises what went wrong
        if world().is_first:
            shutil.rmtree(folder, ignore_errors=True)
            part_of(folder).rename(folder)
            text = json.dumps({"folder": folder.name, "facts": facts}, indent=1) + "\n"
            write_atomically(self.out / POINTER, text.encode())
            remove_others(self.out, folder)


def remove_others(out: Path, kept: Path | None) -> None:
    """Remove checkpoints that are older than ``kept``: a folder, or None for the one file of a single process."""
    (out / (POINTER if kept is None else SINGLE)).unlink(missing_ok=True)
    for folder in out.glob("checkpoint-*"):
        if folder.is_dir() and folder != kept:
            shutil.rmtree(folder, ignore_errors=True)


def check_finite(state: dict[str, Tensor], out: Path) -> None:
    """Refuse numbers that are not finite, in all processes where one of them has such.

    Raises:
        FloatingPointError: it names the first that this process holds.
    """
    bad = None
    for name, x in state.items():
        mine = x.to_local() if isinstance(x, DTensor) else x
        if bad is None and mine.is_floating_point() and not mine.isfinite().all():
            bad = f"{name} holds {not_finite(mine)}"
    if world().any(bad is not None):
        raise FloatingPointError(f"{out} gets no new checkpoint, because {bad or 'another process holds such numbers'}")


def newest(out: Path) -> tuple[Path, dict] | None:
    """The folder of the checkpoint that counts, and its facts; None if there is none.

    Raises:
        ValueError: if the file that names it is damaged, or the folder is gone.
    """
    path = out / POINTER
    if not path.exists():
        return None
    try:
        named = json.loads(path.read_text())
        folder, facts = out / named["folder"], named["facts"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not folder.is_dir():
        raise ValueError(f"{path} names {folder}, which is not there")
    return folder, facts


def shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The whole shape and the dtype of each tensor of a checkpoint."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {name: x for name, x in metadata.items() if isinstance(x, TensorStorageMetadata)}
    return {name: (x.size, x.properties.dtype) for name, x in tensors.items()}


def load(folder: Path, state: dict[str, Tensor]) -> None:
    """Fill tensors, whole or spread in whatever way, from a checkpoint that any number of processes has written.

    Raises:
        ValueError: if the checkpoint lacks one of them, has others, or other shapes; nothing was filled then.
    """
    there = shapes(folder)
    for name in [*state, *there]:
        if name not in there or name not in state:
            where = "does not have" if name not in there else "has, but the run has not,"
            raise ValueError(f"{folder} is of another configuration: it {where} {name}")
        if there[name][0] != state[name].shape:
            sizes = tuple(there[name][0]), tuple(state[name].shape)
            raise ValueError(f"{folder} is of another configuration: {name} is {sizes[0]}, the run's is {sizes[1]}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is what one process means
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=world().size == 1)
