"""Weights and state on disk: whole or not at all.

- :func:`write_atomically` replaces one file, :func:`write_together` several as one; :func:`settle` finishes what a kill
  cut short.
- :func:`save_weights`, :func:`read_tensors` and :func:`load_weights` keep tensors as safetensors, with facts about them
  (JSON) in the file's metadata. Nothing here is pickled.
- :func:`read_metrics` reads the log of a training run.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

JOURNAL = ".replacing.json"
"""The file of a folder that lists which files are about to take their names, while several do."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that at any moment, also after a power cut, its name holds all of the old data or all of the new.

    Raises:
        OSError: if it cannot be written, with the path and the reason; what was there before stays.
    """
    with unharmed(path, path):
        replace_file(path, data)


def write_together(folder: Path, contents: dict[str, bytes]) -> None:
    """Write several files so that after a kill at any moment the folder holds all of the old ones or all of the new.

    Each file is complete under another name before the journal, which lists them all, is written in one step. From then
    on the new files count: whoever opens the folder first lets :func:`settle` give them their names.

    Args:
        folder: made if it is not there.
        contents: name -> bytes; other files of the folder are left alone.

    Raises:
        OSError: if the disk is full, or the folder may not be written; what was there before is as it was.
    """
    with unharmed(folder, *(folder / name for name in (*contents, JOURNAL))):
        folder.mkdir(parents=True, exist_ok=True)
        settle(folder)
        for name, data in contents.items():
            write_part(folder / name, data)
        replace_file(folder / JOURNAL, json.dumps(list(contents)).encode())
    settle(folder)


def settle(folder: Path) -> None:
    """Finish a :func:`write_together` that was cut short after its journal was written; else do nothing."""
    journal = folder / JOURNAL
    if not journal.exists():
        return
    for name in json.loads(journal.read_text()):
        with contextlib.suppress(FileNotFoundError):  # this one has its name already
            os.replace(part_of(folder / name), folder / name)
    sync_folder(folder)
    journal.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """Where the data of a file waits until it is complete."""
    return path.with_name(path.name + ".part")


def write_part(path: Path, data: bytes) -> None:
    """Write what is to be the file ``path`` under its waiting name, down to the disk."""
    with open(part_of(path), "wb") as file:
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


def weights_of(model: nn.Module, *, copy: bool = False) -> dict[str, Tensor]:
    """The parameters by name, or copies of them; a tied one once, under its first name."""
    return {name: p.detach().clone() if copy else p.detach() for name, p in model.named_parameters()}


@torch.no_grad()
def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str = "the file") -> None:
    """Copy weights into the model.

    Raises:
        ValueError: if names or shapes are not the model's; the message names the first that differs, and the model is
            as it was.
    """
    ours = weights_of(model)
    for name in [*ours, *weights]:
        if name not in weights or name not in ours:
            where = "does not have" if name not in weights else "has, but the model has not,"
            raise ValueError(f"{source} is of another configuration: it {where} {name}")
        if weights[name].shape != ours[name].shape:
            theirs, expected = tuple(weights[name].shape), tuple(ours[name].shape)
            raise ValueError(f"{source} is of another configuration: {name} is {theirs}, the model's is {expected}")
    for name, parameter in ours.items():
        parameter.copy_(weights[name])


def save_weights(path: Path, model: nn.Module, facts: dict) -> None:
    """Write the model's weights as float32 safetensors, with facts (JSON) in the file's metadata, atomically."""
    tensors = {name: p.float().contiguous() for name, p in weights_of(model).items()}
    write_atomically(path, safetensors.torch.save(tensors, {"facts": json.dumps(facts)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a safetensors file and the facts in its metadata.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no whole safetensors file.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return tensors, json.loads((file.metadata() or {}).get("facts", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def read_metrics(out: str | Path) -> list[dict]:
    """The measurements of a run's folder, or of a metrics file; a last line that a crash cut short is left out."""
    path = Path(out)
    path = path / "metrics.jsonl" if path.is_dir() else path
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines
