"""What every command of the course does alike: read its settings, refuse in one line, and end quietly.

    def main(arguments=None) -> int:
        return run(lambda: say(parse(Settings, arguments, program="python -m tformer_lib.example")))

The settings are dataclasses, and tyro makes the flags of their fields. A refusal is one line on stderr that begins with
``error:``, and exit status 2. Ctrl-C ends with status 130 and a closed pipe with 141, as a shell expects of them.
"""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import torch
    import tyro

REFUSED = 2
INTERRUPTED = 128 + signal.SIGINT
PIPE_CLOSED = 128 + 13  # SIGPIPE, which Windows does not name

MENDABLE = (ValueError, OSError, FloatingPointError, ImportError, MemoryError)
"""Errors that the user can mend, so that their message is enough."""

OUT_OF_MEMORY = ("out of memory", "allocate memory")
"""What PyTorch's RuntimeErrors say where a GPU or a CPU has no more."""


class Refusal(ValueError):
    """A command line that cannot be read; the message is one line."""


def run(command: Callable[[], int | None]) -> int:
    """Do what a command does, and return the exit status.

    Args:
        command: returns its own exit status; None is 0.
    """
    open_what_is_closed()
    try:
        try:
            return command() or 0
        finally:
            sys.stdout.flush()  # here, where a closed pipe is heard
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has had enough
        drop(sys.stdout)
        return PIPE_CLOSED
    except MENDABLE as error:
        try:
            sys.stdout.flush()
        except OSError:  # a full disk, perhaps
            drop(sys.stdout)
        return refuse(error)
    except RuntimeError as error:
        if not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        return refuse(error)


def open_what_is_closed() -> None:
    """Let a standard stream that is closed (``>&-``) lead nowhere.

    Python has None for such a stream, and prints what was meant for stderr to stdout. The system gives its number to
    the next file that is opened, a checkpoint perhaps, into which a library would then print.
    """
    with contextlib.suppress(OSError):
        while (nowhere := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(nowhere)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (it stays for as long as the process)


def drop(stream: TextIO) -> None:
    """Let what a stream still holds lead nowhere, so that Python does not fail at it once more when it ends."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def refuse(error: Exception | str) -> int:
    """Say on stderr, in one line, why nothing is done; returns the exit status."""
    try:
        print(f"error: {one_line(str(error) or type(error).__name__)}", file=sys.stderr, flush=True)
    except OSError:
        drop(sys.stderr)
    return REFUSED


def one_line(text: str) -> str:
    """A text without line breaks and runs of spaces."""
    return " ".join(text.split())


def parse(kind, arguments: Sequence[str] | None = None, *, program: str, description: str | None = None):
    """The settings that a command line asks for; ``--help`` prints and exits.

    Args:
        kind: a dataclass, or a union of them for subcommands, as ``tyro.cli`` takes it.
        arguments: by default those of this process.
        program: how the command is called: ``"python -m tformer_lib.tokens"``.
        description: what ``--help`` says first; by default the docstring of ``kind``.

    Raises:
        Refusal: the arguments cannot be read; the message says which and where help is.
    """
    import tyro  # here, so that the library works where there is no tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), rules():
            return tyro.cli(kind, args=arguments, prog=program, description=description)
    except EmptyPath:
        raise Refusal(f"a path must name a file or folder, got ''; {program} --help says more") from None
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise Refusal(f"{first_words(said.getvalue())}; {program} --help says more") from None


def rules() -> "tyro.constructors.ConstructorRegistry":
    """What every command reads otherwise than tyro does: an empty path is refused."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def of_path(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if kind.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda given: read_path(given[0]),
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda path: [str(path)],
        )

    return registry


class EmptyPath(Exception):
    """A path was given, and is empty. No ValueError, of which tyro says nothing where an option may be left out."""


def read_path(given: str) -> Path:
    """An argument as a path."""
    if not given:
        raise EmptyPath
    return Path(given)


def named(what: str, path: str | Path) -> Path:
    """The path that a setting names, which must name one.

    An unset variable of a shell script gives an empty name, and ``Path("")`` is the folder that the script stands in.

    Args:
        what: the setting's name.
        path: its value.

    Raises:
        ValueError: the name is empty.
    """
    if not str(path):
        raise ValueError(f"{what} must name a file or folder, got ''")
    return Path(path)


@dataclass(frozen=True)
class NoOptions:
    """A command line that asks for nothing."""


def without_options(
    command: Callable[[], int | None], arguments: Sequence[str] | None = None, *, program: str, description: str
) -> int:
    """Do what a command without options does, unless it was asked for anything else; returns the exit status.

    Args:
        command: as of :func:`run`.
        arguments, program, description: as of :func:`parse`.
    """

    def obey() -> int | None:
        parse(NoOptions, arguments, program=program, description=description)
        return command()

    return run(obey)


def first_words(box: str) -> str:
    """What a box of tyro's says before its first ruler; where the terminal has no lines to draw, they are ASCII."""
    words = []
    for line in box.splitlines()[1:]:
        content = line.strip("│╭╰╯╮|+ ")
        if content.strip("─-"):
            words.append(content)
        elif words:
            break
    return one_line(" ".join(words)).removesuffix(" (required)")


def pick_device(name: str) -> "torch.device":
    """The device of that name; 'auto' is the first GPU if there is one.

    Raises:
        ValueError: if there is no such device here.
    """
    import torch  # here, so that a command which computes nothing starts at once

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()  # the meta device holds no numbers
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not here: {str(error).splitlines()[0]}") from error
    return device
