"""The tensors of a checkpoint's folder: what there is is known from the headers, before any number is read."""

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tformer_lib.pretrained.keys import read_object

INDEX = "model.safetensors.index.json"
"""Says which tensor is in which file, where there are several."""

MAPPED = 2**26
"""Bytes read of a file after which it is opened anew: what a process has read of a mapped file counts as its memory."""


class Shards:
    """The tensors in one or several safetensors files, by name.

    Files are mapped into memory, so that a tensor takes none of its own until it is written to or converted.

    Args:
        folder: where ``model.safetensors`` lies, or an index and the files that it names, or any ``*.safetensors``.

    Raises:
        FileNotFoundError: there is no such file, or one that the index names is missing.
        ValueError: a file is damaged, two have a tensor of the same name, or the index is none, names a file outside
            the folder, or says something else than the files do.
    """

    def __init__(self, folder: Path):
        self.folder, self.files = folder, {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        index = read_index(folder)
        for path in files_of(folder, index):
            self._read_header(path)
        for name, file in (index or {}).items():
            if self.files.get(name) != folder / file:
                raise ValueError(f"{folder / INDEX} says that {name} is in {file}, which does not have it")
        self._path, self._open, self._read = None, None, 0

    def _read_header(self, path: Path) -> None:
        """Note what is in a file; its header and its length are checked by the safetensors library."""
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    if name in self.files:
                        raise ValueError(f"{name} is in {self.files[name].name} and in {path.name}")
                    part = file.get_slice(name)
                    self.files[name] = path
                    self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()
        except OSError as error:  # which the library raises without the file's name
            raise OSError(f"cannot read {path}: {error}") from error
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def read(self, name: str) -> Tensor:
        """One tensor, as it lies in the mapped file."""
        path = self.files[name]
        if path != self._path or self._read > MAPPED:
            self._path, self._open, self._read = path, safe_open(path, framework="pt"), 0
        x = self._open.get_tensor(name)
        self._read += x.nbytes
        return x

    def close(self) -> None:
        """Let go of the file that is open; tensors that were read keep what they need of it."""
        self._path, self._open = None, None


def read_index(folder: Path) -> dict[str, str] | None:
    """Which tensor is in which file, or None if the folder has no index.

    Raises:
        ValueError: it is no index, or names a file by more than its name, such as ``../x.safetensors``.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    files = read_object(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{path} has no weight_map of names and files")
    for name, file in files.items():
        is_name = isinstance(file, str) and file == Path(file).name and len(file.encode(errors="replace")) < 256
        if not is_name or not file.endswith(".safetensors"):
            raise ValueError(f"{path} says that {name} is in {file!r}, which is no *.safetensors of this folder")
    return files


def files_of(folder: Path, index: dict[str, str] | None) -> list[Path]:
    """The files of a checkpoint: those of its index, else ``model.safetensors``, else all there are."""
    if index is not None:
        return [folder / file for file in sorted(set(index.values()))]
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"there are no *.safetensors in {folder}")
    return files
