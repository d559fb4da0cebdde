"""A few processes that wait for functions to run together: what tests and notebooks use in place of torchrun.

``torchrun`` starts a program anew each time, which takes seconds. Here the processes are started once and stay::

    with Workers(2) as workers:
        workers.run(lambda: dist.get_rank())  # [0, 1]

They talk by gloo on the CPU, so nothing but this machine is needed.
"""

import atexit
import contextlib
import dis
import importlib
import marshal
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

GRACE = 2.0
"""Seconds that the other processes get to answer too, after one has failed."""


class Workers:
    """Processes of one group, each of which runs the function that :meth:`run` is given.

    Args:
        size: how many.
        timeout: seconds that a call may take, and that a process waits for another.
    """

    def __init__(self, size: int = 2, *, timeout: float = 60.0):
        if size < 1:
            raise ValueError(f"there must be at least 1 process, got {size}")
        self.size, self.timeout = size, timeout
        self.processes: list = []
        self.lines: list[Connection] = []
        atexit.register(self.close)

    def start(self) -> None:
        """Start the processes and let them meet; :meth:`run` does it at its first call."""
        context = multiprocessing.get_context("spawn")
        self.folder = Path(tempfile.mkdtemp(prefix="workers-"))
        with one_thread_each(), main_left_alone():
            for rank in range(self.size):
                ours, theirs = context.Pipe()
                job = (theirs, rank, self.size, self.folder, self.timeout, list(sys.path))
                process = context.Process(target=serve, args=job, daemon=True)
                process.start()
                theirs.close()
                self.processes.append(process)
                self.lines.append(ours)

    def run(self, function: Callable, *args, timeout: float | None = None, **options) -> list:
        """What each process returns from ``function(*args, **options)``, in the order of the ranks.

        The function may be one of a module, or one of a notebook or made on the spot: then its code travels, with the
        modules, functions and values that it names. A worker knows its rank from ``torch.distributed.get_rank()``.

        Raises:
            TimeoutError: if they have not all answered in time.
            RuntimeError: if one raises, with its rank and its own traceback, or dies. In each of these cases the
                processes are ended; the next call starts new ones.
        """
        if not self.processes:
            self.start()
        deadline = time.monotonic() + (timeout or self.timeout)
        job = pickle.dumps((packed(function), args, options))
        answers: dict[int, tuple[bool, object]] = {}
        try:
            for line in self.lines:
                line.send_bytes(job)
            while len(answers) < self.size:
                waiting = {line: rank for rank, line in enumerate(self.lines) if rank not in answers}
                ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
                if not ready:
                    break
                for line in ready:
                    answers[waiting[line]] = pickle.loads(line.recv_bytes())
                    if not answers[waiting[line]][0]:
                        deadline = min(deadline, time.monotonic() + GRACE)
        except (EOFError, OSError):
            said = self.last_words()
            codes = self.close()
            dead = [f"process {r} has ended with exit code {code}{said[r]}" for r, code in codes.items() if code]
            raise RuntimeError(f"{', '.join(dead) or 'a process has ended'} in the middle of the call") from None
        failed = [rank for rank, (succeeded, _) in sorted(answers.items()) if not succeeded]
        if failed:
            self.close()
            first = next((r for r in failed if "by peer" not in answers[r][1]), failed[0])  # not who only lost its peer
            raise RuntimeError(f"process {first} of {self.size} failed:\n{answers[first][1]}")
        if len(answers) < self.size:
            self.close()
            silent = ", ".join(str(rank) for rank in range(self.size) if rank not in answers)
            raise TimeoutError(f"no answer from process {silent} within {timeout or self.timeout:g} s")
        return [answers[rank][1] for rank in range(self.size)]

    def last_words(self) -> list[str]:
        """The end of what each process has written to its standard output and error."""
        texts = [(self.folder / f"{rank}.log").read_text(errors="replace") for rank in range(self.size)]
        return [f" ({text[-300:].strip()})" if text.strip() else "" for text in texts]

    def close(self) -> dict[int, int | None]:
        """End the processes; returns the exit codes of those that had ended by themselves."""
        for process in self.processes:
            process.join(0.05)
        codes = {rank: process.exitcode for rank, process in enumerate(self.processes)}
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for line in self.lines:
            line.close()
        if self.processes:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.processes, self.lines = [], []
        return codes

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        self.close()


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Let processes that start within have one thread: together they fill the machine's cores."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


@contextlib.contextmanager
def main_left_alone() -> Iterator[None]:
    """Keep a new process from running this program's main file once more, which multiprocessing would do."""
    main = sys.modules["__main__"]
    hidden = {name: getattr(main, name) for name in ("__spec__", "__file__") if hasattr(main, name)}
    for name in hidden:
        setattr(main, name, None)
    try:
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)


def serve(line: Connection, rank: int, size: int, folder: Path, timeout: float, path: list[str]) -> None:
    """A worker's life: join the group, then run what comes until the line closes. What it prints goes to a file."""
    sys.path[:] = path
    with open(folder / f"{rank}.log", "wb") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    meeting, limit = f"file://{folder / 'meeting'}", timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=limit)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            function, args, options = pickle.loads(line.recv_bytes())
            try:
                answer = True, unpacked(function)(*args, **options)
                reply = pickle.dumps(answer)
            except Exception:
                reply = pickle.dumps((False, traceback.format_exc()))
            line.send_bytes(reply)
    os._exit(0)


def packed(value) -> tuple:
    """A value as pickle can carry it: a module by its name, a function that no module has by its code and its names."""
    if isinstance(value, ModuleType):
        return "module", value.__name__
    if not isinstance(value, FunctionType) or not (value.__module__ == "__main__" or "<" in value.__qualname__):
        return "value", value
    names = names_in(value.__code__)
    known = {n: value.__globals__[n] for n in names if n in value.__globals__ and value.__globals__[n] is not value}
    cells = [packed(cell.cell_contents) for cell in value.__closure__ or ()]
    carried = {name: packed(item) for name, item in known.items()}
    return (
        "code",
        marshal.dumps(value.__code__),
        value.__name__,
        value.__defaults__,
        value.__kwdefaults__,
        cells,
        carried,
    )


def unpacked(parcel: tuple):
    """The inverse of :func:`packed`."""
    kind, *content = parcel
    if kind == "module":
        return importlib.import_module(content[0])
    if kind == "value":
        return content[0]
    code, name, defaults, keyword_defaults, cells, carried = content
    scope = {"__builtins__": __builtins__, "__name__": "__main__"}
    scope |= {known: unpacked(item) for known, item in carried.items()}
    closure = tuple(CellType(unpacked(cell)) for cell in cells)
    function = FunctionType(marshal.loads(code), scope, name, defaults, closure)
    function.__kwdefaults__ = keyword_defaults
    scope[name] = function  # it may call itself
    return function


CellType = type((lambda x: lambda: x)(0).__closure__[0])


def names_in(code: CodeType) -> set[str]:
    """The global names that a function's code reads, those of functions inside it too."""
    named = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return named.union(*(names_in(inner) for inner in code.co_consts if isinstance(inner, CodeType)))
