"""Weights and state on disk: whole or not at all.

- :func:`write_atomically` replaces one file, :func:`write_together` several as one; :func:`settle` finishes what a kill
  cut short.
- :func:`save_weights`, :func:`read_tensors` and :func:`load_weights` keep tensors as safetensors, with facts about them
  (JSON) in the file's metadata. Nothing here is pickled.
- :func:`build` makes settings of what a file says, and names what is missing or unknown.
- :func:`locked` keeps a folder for one process; :func:`read_metrics` reads the log of a training run.
"""

import contextlib
import json
import numbers
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

try:
    import fcntl
except ImportError:  # native Windows, where folders are not locked
    fcntl = None

Settings = TypeVar("Settings")
Writer = Callable[[Path], None]

JOURNAL = ".replacing.json"
"""The file of a folder that lists which files are about to take their names, while several do."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that at any moment, also after a power cut, its name holds all of the old data or all of the new.

    Raises:
        OSError: if it cannot be written, with the path and the reason; what was there before stays.
    """
    with unharmed(path, path):
        replace_file(path, data)


def write_together(folder: Path, contents: dict[str, bytes | Writer], *, without: Iterable[str] = ()) -> None:
    """Write several files so that after a kill at any moment the folder holds all of the old ones or all of the new.

    Each file is complete under another name before the journal, which lists them all, is written in one step. From then
    on the new files count: whoever opens the folder first lets :func:`settle` give them their names.

    Args:
        folder: made if it is not there.
        contents: name -> bytes, or a function that writes the file at the path it is given; other files of the folder
            are left alone.
        without: names of files to remove with the old ones, if they are there.

    Raises:
        OSError: if the disk is full, or the folder may not be written; what was there before is as it was.
    """
    with unharmed(folder, *(folder / name for name in (*contents, JOURNAL))):
        folder.mkdir(parents=True, exist_ok=True)
        settle(folder)
        for name, data in contents.items():
            write_part(folder / name, data)
        replace_file(folder / JOURNAL, json.dumps({"written": list(contents), "removed": list(without)}).encode())
    settle(folder)


def settle(folder: Path) -> None:
    """Finish a :func:`write_together` that was cut short after its journal was written; else do nothing."""
    journal = folder / JOURNAL
    if not journal.exists():
        return
    with contextlib.suppress(FileNotFoundError):  # somebody else settled it just now
        steps = json.loads(journal.read_text())
        for name in steps["written"]:
            with contextlib.suppress(FileNotFoundError):  # this one has its name already
                os.replace(part_of(folder / name), folder / name)
        for name in steps["removed"]:
            (folder / name).unlink(missing_ok=True)
    sync_folder(folder)
    journal.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """Where the data of a file waits until it is complete."""
    return path.with_name(path.name + ".part")


def write_part(path: Path, data: bytes | Writer) -> None:
    """Write what is to be the file ``path`` under its waiting name, down to the disk."""
    if callable(data):
        data(part_of(path))
    with open(part_of(path), "ab" if callable(data) else "wb") as file:
        if not callable(data):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file under its waiting name, and let it take its own once it is on the disk, which is one step."""
    write_part(path, data)
    os.replace(part_of(path), path)
    sync_folder(path.parent)


@contextlib.contextmanager
def unharmed(target: Path, *files: Path) -> Iterator[None]:
    """Tidy up after a write that failed, and say what could not be saved and why."""
    try:
        yield
    except OSError as error:
        for path in files:
            with contextlib.suppress(OSError):
                part_of(path).unlink()
        kept = "; what was there before is kept" if target.exists() else ""
        raise OSError(f"could not save {target}: {error.strerror or error}{kept}") from error


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk; some file systems cannot."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep a folder for whoever is inside, until the block ends or the process dies; its files are not locked.

    Args:
        folder: it must exist.
        wait: until whoever is inside leaves.

    Raises:
        BlockingIOError: somebody else is inside, in this process or another, and ``wait`` is off.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise BlockingIOError(f"{folder} is in use: another process is writing to it") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def weights_of(model: nn.Module, *, copy: bool = False) -> dict[str, Tensor]:
    """The parameters by name, or copies of them; a tied one once, under its first name."""
    return {name: p.detach().clone() if copy else p.detach() for name, p in model.named_parameters()}


@torch.no_grad()
def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str = "the file") -> None:
    """Copy weights into the model.

    Raises:
        ValueError: if names or shapes are not the model's, or numbers are quantised; the message names the first that
            differs, and the model is as it was.
    """
    ours = weights_of(model)
    check_not_quantised(weights, source)
    check_like(weights, ours, source)
    for name, parameter in ours.items():
        parameter.copy_(weights[name])


def check_like(theirs: dict[str, Tensor], ours: dict[str, Tensor], source: str) -> None:
    """Refuse tensors whose names or shapes are not ours.

    Raises:
        ValueError: the message names the first that differs.
    """
    for name in [*ours, *theirs]:
        if name not in theirs or name not in ours:
            where = "does not have" if name not in theirs else "has, but the model has not,"
            raise ValueError(f"{source} is of another configuration: it {where} {name}")
        if theirs[name].shape != ours[name].shape:
            there, expected = tuple(theirs[name].shape), tuple(ours[name].shape)
            raise ValueError(f"{source} is of another configuration: {name} is {there}, the model's is {expected}")


def check_not_quantised(weights: dict[str, Tensor], source: str) -> None:
    """Refuse weights of integers or of 8 bits: they mean something only with the scales that they were made with.

    Raises:
        ValueError: the message names the first and its dtype.
    """
    for name, x in weights.items():
        if not x.is_floating_point() or x.element_size() < 2:
            raise ValueError(f"{source} has {name} in {x.dtype}: quantised weights cannot be read here")


def save_weights(path: Path, model: nn.Module, facts: dict) -> None:
    """Write the model's weights as float32 safetensors, with facts (JSON) in the file's metadata, atomically.

    Raises:
        FloatingPointError: if a weight is not finite; what was there before stays.
        OSError: if the file cannot be written; what was there before stays.
    """
    save_tensors(path, {name: p.float() for name, p in weights_of(model).items()}, facts)


def save_tensors(path: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Write tensors as safetensors, with facts (JSON) in the file's metadata, atomically.

    Raises:
        FloatingPointError: if a number is not finite, so that nothing could go on from it; what was there before stays.
        OSError: if the file cannot be written; what was there before stays.
    """
    for name, x in tensors.items():
        if x.is_floating_point() and not x.isfinite().all():
            kept = "; what was there before is kept" if path.exists() else ""
            raise FloatingPointError(f"{path} is not saved, because {name} holds {not_finite(x)}{kept}")
    data = safetensors.torch.save({k: x.contiguous() for k, x in tensors.items()}, {"facts": json.dumps(facts)})
    write_atomically(path, data)


def not_finite(x: Tensor) -> str:
    """What a tensor with numbers that are not finite holds, in words: "3 of 8 numbers that are NaN or infinite"."""
    return f"{int((~x.isfinite()).sum()):,} of {x.numel():,} numbers that are NaN or infinite"


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a safetensors file and the facts in its metadata.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read.
        ValueError: if it is no whole safetensors file, or its facts are no JSON object.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if not path.is_file():
        raise IsADirectoryError(f"{path} is no file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
    except OSError as error:  # which the library raises without the file's name
        raise OSError(f"cannot read {path}: {error}") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} has facts that are no JSON object, but {facts!r:.40}")
    return tensors, facts


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def require(values: dict, names: set[str], source: str) -> None:
    """Refuse what lacks a key.

    Raises:
        ValueError: the message names all that are missing.
    """
    if missing := names - values.keys():
        raise ValueError(f"{source} is of another version: it lacks {', '.join(sorted(missing))}")


def build(kind: type[Settings], values: dict, source: str) -> Settings:
    """A dataclass from the values that a file holds of it. A field that has a default may be missing.

    Args:
        kind: the dataclass.
        values: field -> value.
        source: what an error calls the file.

    Raises:
        ValueError: a field is missing or unknown, or has a value that makes no sense; the message says which.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{source} is no JSON object, but {values!r:.40}")
    names = {field.name for field in fields(kind)}
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    require(values, needed, source)
    if unknown := values.keys() - names:
        raise ValueError(
            f"{source} is of another version: it has {', '.join(sorted(unknown))}, which is not known here"
        )
    check_kinds(kind, values, source)
    return kind(**values)


def check_kinds(kind: type, values: dict, source: str) -> None:
    """Refuse values that are not what a dataclass says of its fields.

    Raises:
        ValueError: the message names the first of them.
    """
    kinds = get_type_hints(kind)
    for name, value in values.items():
        if not is_of(value, kinds[name]):
            raise ValueError(f"{source} has a value of the wrong kind: {name} is {value!r:.40}")


def is_of(value, kind) -> bool:
    """Whether a value, as JSON gives it, is what an annotation says; a dataclass may still be its JSON object."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(is_of(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is tuple:  # of any length, as all of ours are
        return isinstance(value, (list, tuple)) and all(is_of(one, inner[0]) for one in value)
    if is_dataclass(kind):
        return isinstance(value, (dict, kind))
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def read_metrics(out: str | Path) -> list[dict]:
    """The measurements of a run's folder, or of a metrics file; a last line that a crash cut short is left out."""
    path = Path(out)
    path = path / "metrics.jsonl" if path.is_dir() else path
    lines = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:  # U+2028 may stand in a text
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]
