"""Build a kernel from its source at first use, and load it.

``load("flash_attention", 3)`` compiles ``kernels/flash_attention/3_*.cu``, and nothing else, with
torch.utils.cpp_extension, and returns it as a ``ctypes.CDLL``. A kernel file exports plain C functions that take
pointers and sizes; a CUDA file includes no header of torch, so that it compiles in seconds and reads as CUDA alone. The
topic's module turns tensors into those pointers and registers the operator.

What is built is kept in torch's extension cache (``TORCH_EXTENSIONS_DIR``, else under ``~/.cache``), in a folder named
by a hash of everything the build depends on: the source, the headers it may include, the flags, the GPU architecture,
torch and Python. A second load, in this process or another, compiles nothing.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

SOURCE_SUFFIXES = (".cu", ".cpp")
HEADER_SUFFIXES = (".h", ".cuh")
PROGRESS_SECONDS = 5.0
BUILT = "built"  # the file that marks a folder of the cache as complete; it holds the library's size in bytes
LOCK = "tformer.lock"

CPP_FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math"]
CUDA_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "--split-compile=0"]


class BuildError(RuntimeError):
    """A kernel cannot be built here; the message says what to install or what the compiler said."""


def load(topic: str, step: int | str, *, device: torch.device | None = None) -> ctypes.CDLL:
    """Build one kernel file if it has not been built yet, and load it.

    Args:
        topic: the folder under ``kernels/``.
        step: the file's number (``3`` or ``"3"`` for ``3_tensor_core.cu``) or its whole name without the suffix
            (``"backward_4_hopper"``, ``"3_tensor_core"``); nothing is guessed from a part of a name.
        device: the GPU to build a ``.cu`` file for; the current one if not given.

    Returns:
        the shared library, whose functions are the file's ``extern "C"`` ones.

    Raises:
        BuildError: nvcc, ninja or a C++ compiler is missing, there is no GPU to build for, the compiler failed, or what
            it made cannot be loaded.
        FileNotFoundError: there is no such kernel.
    """
    source = find_source(topic, step)
    return load_source(topic, source, architecture(device) if source.suffix == ".cu" else "")


def load_source(topic: str, source: Path, arch: str) -> ctypes.CDLL:
    """Load ``source`` built for ``arch`` ("" for the CPU), building it under a lock if it is not in the cache.

    A folder of the cache whose library is missing or damaged is built again.
    """
    flags = compile_flags(source, arch)
    name = build_name(topic, source, flags)
    library = library_of(name)
    for damaged in (False, True):
        if damaged or not is_complete(library):
            check_tools(source)
            with locked(library.parent):
                if damaged or not is_complete(library):  # another process may have built it while this one waited
                    build(name, source, flags, library, arch)
        try:
            return ctypes.CDLL(str(library))
        except OSError as failure:
            error = failure
    raise BuildError(f"kernels/{source.parent.name}/{source.name} was built, but cannot be loaded: {error}") from error


def is_built(topic: str, step: int | str, *, device: torch.device | None = None) -> bool:
    """Whether ``load`` would find the kernel in the cache."""
    source = find_source(topic, step)
    flags = compile_flags(source, architecture(device) if source.suffix == ".cu" else "")
    return is_complete(library_of(build_name(topic, source, flags)))


def is_complete(library: Path) -> bool:
    """Whether a build has ended, and its library is as the build left it."""
    try:
        return (library.parent / BUILT).read_text().split() == [str(library.stat().st_size), "bytes"]
    except OSError:
        return False


def can_build_cpp() -> bool:
    """Whether a C++ compiler and ninja are here."""
    return compiler() is not None and ninja() is not None


# --- where the sources are ---------------------------------------------------------------------------------------


_folder: Path | None = None


def kernels_folder() -> Path:
    """Where sources are taken from: the repository's ``kernels/``, or the folder that :func:`kernels_from` names."""
    return repository_folder() if _folder is None else _folder


@cache
def repository_folder() -> Path:
    """The repository's ``kernels/``, or its copy inside an installed wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_kernels", package.parent / "kernels"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no kernels: neither {package / '_kernels'} nor {package.parent / 'kernels'} is there")


@contextmanager
def kernels_from(folder: str | Path) -> Iterator[None]:
    """Within it, every kernel is built from ``folder``, an edited copy of ``kernels/``: operators use it too.

    It holds for the whole process, all threads included. To edit a source and measure the change::

        shutil.copytree(jit.kernels_folder(), folder)
        ...  # edit folder/flash_attention/3_tensor_core.cu
        with jit.kernels_from(folder):
            flash_attention(q, k, v, step=3)

    An operator keeps the functions that it has loaded from a folder: use a new folder for each edit.
    """
    global _folder
    before, _folder = _folder, Path(folder).resolve()
    try:
        yield
    finally:
        _folder = before


def find_source(topic: str, step: int | str) -> Path:
    """The file of a step: its number is the part of the file's name before the first underscore, "3" or "3a".

    Raises:
        FileNotFoundError: there is none; the message lists those that there are.
    """
    sources = sorted(p for p in (kernels_folder() / topic).glob("*") if p.suffix in SOURCE_SUFFIXES)
    wanted = str(step)
    for source in sources:
        number, _, name = source.stem.partition("_")
        if wanted == source.stem or (number[:1].isdigit() and name and wanted == number):
            return source
    known = ", ".join(p.stem for p in sources) or "none"
    raise FileNotFoundError(f"kernels/{topic} has no step {step!r}; it has: {known}")


def headers(source: Path) -> list[Path]:
    """Every header that ``source`` may include: its own folder's and ``kernels/common``'s."""
    folders = (source.parent, source.parent.parent / "common")
    return sorted(p for folder in folders for p in folder.glob("*") if p.suffix in HEADER_SUFFIXES)


# --- flags and the key -------------------------------------------------------------------------------------------


def architecture(device: torch.device | None = None) -> str:
    """The name nvcc has for the GPU: "90a" on Hopper, whose own instructions need the a, "80" on an A100.

    Raises:
        BuildError: torch sees no GPU.
    """
    if not torch.cuda.is_available():
        raise BuildError(
            "a CUDA kernel was asked for, but torch sees no CUDA device. Run on a machine with an NVIDIA GPU and a "
            'CUDA build of torch, or use the C++ twin (step="cpu").'
        )
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}a" if (major, minor) == (9, 0) else f"{major}{minor}"


def compile_flags(source: Path, arch: str) -> list[str]:
    """The compiler's flags, which are part of the key."""
    if source.suffix == ".cu":
        return [*CUDA_FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    return [*CPP_FLAGS, *(flag for flag in ("-march=native", "-fopenmp") if accepts(flag))]


def accepts(flag: str) -> bool:
    """Whether the C++ compiler knows ``flag`` (``-march=native`` is not known everywhere)."""
    return preprocess(compiler(), flag) is not None


def native_target() -> str:
    """What ``-march=native`` means here, so that a cache shared by two machines keeps their builds apart."""
    return preprocess(compiler(), "-march=native", "-dM") or ""


@cache
def preprocess(compiler: str | None, *flags: str) -> str | None:
    """What a compiler's preprocessor makes of an empty file; None if there is no compiler, or it fails."""
    if compiler is None:
        return None
    try:
        run = subprocess.run([compiler, *flags, "-x", "c++", "-E", os.devnull], capture_output=True, text=True)
    except OSError:  # it is no program
        return None
    return run.stdout if run.returncode == 0 else None


def build_name(topic: str, source: Path, flags: list[str]) -> str:
    """The name of a build, in which a hash stands for everything that it depends on."""
    return f"tformer_{topic}_{source.stem}_{build_key(source, flags)}"


def library_of(name: str) -> Path:
    """The library that the build of that name leaves in the cache."""
    return cache_folder() / name / f"{name}.so"


def build_key(source: Path, flags: list[str]) -> str:
    """A hash of everything that the build depends on."""
    digest = hashlib.sha256()
    for path in (source, *headers(source)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    parts = [*flags, torch.__version__, sys.version, native_target() if source.suffix == ".cpp" else ""]
    digest.update("\0".join(parts).encode())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where torch keeps the extensions that it builds."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


# --- the tools ---------------------------------------------------------------------------------------------------


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, or c++, g++, clang++ on the PATH."""
    names = filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))
    return next(filter(None, map(shutil.which, names)), None)


def ninja() -> str | None:
    """The folder that holds ninja: on the PATH, or in the package of that name (a venv that is not activated)."""
    if found := shutil.which("ninja"):
        return str(Path(found).parent)
    try:
        import ninja as package
    except ImportError:
        return None
    return package.BIN_DIR


def check_tools(source: Path) -> None:
    """Refuse to start a build that lacks a tool, saying which and how to get it."""
    what = f"building kernels/{source.parent.name}/{source.name} needs"
    if compiler() is None:
        raise BuildError(f"{what} a C++ compiler: install g++ (`apt-get install g++`, or Xcode's tools on macOS)")
    if ninja() is None:
        raise BuildError(f"{what} ninja: `pip install ninja`")
    if source.suffix == ".cu":
        from torch.utils.cpp_extension import CUDA_HOME

        if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
            raise BuildError(
                f"{what} nvcc: install the CUDA toolkit {torch.version.cuda} "
                "(https://developer.nvidia.com/cuda-downloads) and set CUDA_HOME to where it is"
            )


# --- the build ---------------------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: one process builds, the others wait.

    The operating system drops the lock when its holder dies, so an interrupted build locks nobody out.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise BuildError(
            f"kernels are kept in {folder.parent}, where nothing can be written ({error.strerror}): "
            "set TORCH_EXTENSIONS_DIR to a folder that you may write to"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(name: str, source: Path, flags: list[str], library: Path, arch: str) -> None:
    """Compile ``source`` into ``library`` and mark its folder as complete."""
    from torch.utils import cpp_extension

    folder = library.parent
    empty(folder)
    cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop(name, None)  # else torch skips what it has tried before
    target = f"kernels/{source.parent.name}/{source.name}" + (f" for sm_{arch}" if arch else "")
    is_cuda = source.suffix == ".cu"
    with progress(target), tools_in_environment(), quoted_libraries():
        try:
            cpp_extension.load(
                name,
                [str(source)],
                extra_cflags=None if is_cuda else flags,
                extra_cuda_cflags=flags if is_cuda else None,
                extra_ldflags=["-fopenmp"] if "-fopenmp" in flags else None,
                extra_include_paths=[str(kernels_folder())],
                build_directory=str(folder),
                with_cuda=is_cuda,
                is_python_module=False,
            )
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            raise BuildError(f"{target} does not build:\n{tail(str(error))}") from error
    (folder / BUILT).write_text(f"{library.stat().st_size} bytes\n")


def empty(folder: Path) -> None:
    """Remove what an earlier build left, the mark first: half a build, or a library that was damaged since."""
    (folder / BUILT).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name != LOCK and path.is_file():
            path.unlink()


def tail(text: str, lines: int = 60) -> str:
    """The last lines of a compiler's output."""
    return "\n".join(text.splitlines()[-lines:])


_environment = threading.Lock()


@contextmanager
def tools_in_environment() -> Iterator[None]:
    """For the length of a build, let torch find ninja and the compiler that were found here.

    Torch asks ``CXX`` alone, else for ``c++``. The environment is the whole process's, so one build at a time has it.
    """
    with _environment:
        before = {name: os.environ.get(name) for name in ("PATH", "CXX")}
        os.environ["PATH"] = os.pathsep.join(filter(None, (before["PATH"], ninja())))
        os.environ["CXX"] = compiler() or ""
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@contextmanager
def quoted_libraries() -> Iterator[None]:
    """Quote the folder of torch's libraries for the shell, as torch does not: its path may have a space."""
    from torch.utils import cpp_extension

    before = cpp_extension.TORCH_LIB_PATH
    cpp_extension.TORCH_LIB_PATH = shlex.quote(before)
    try:
        yield
    finally:
        cpp_extension.TORCH_LIB_PATH = before


@contextmanager
def progress(target: str) -> Iterator[None]:
    """Say on stderr that a build runs, every few seconds that it still does, and how long it took."""
    start, done = time.perf_counter(), threading.Event()

    def tell() -> None:
        while not done.wait(PROGRESS_SECONDS):
            say(f"  still building {target}: {time.perf_counter() - start:.0f} s")

    say(f"building {target} (once; later loads take it from the cache)")
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    except BaseException:
        say(f"building {target} failed after {time.perf_counter() - start:.1f} s")
        raise
    else:
        say(f"built {target} in {time.perf_counter() - start:.1f} s")
    finally:
        done.set()
        teller.join()


def say(line: str) -> None:
    """One line of progress."""
    print(line, file=sys.stderr, flush=True)
