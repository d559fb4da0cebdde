"""Commands: every refusal is one line on stderr and a status that is not 0; Ctrl-C and a closed pipe end quietly."""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tformer_lib import command_line
from tformer_lib.tokens.command import main as tokens_main
from tformer_lib.training.command import main as training_main

ROOT = Path(__file__).parent.parent
COMMANDS = {"tokens": tokens_main, "training": training_main}


@dataclass
class Settings:
    """What to do."""

    out: Path
    """The folder."""
    steps: int = 3
    """How many."""


def read(*arguments: str) -> Settings:
    return command_line.parse(Settings, arguments, program="python -m example")


def status_of(command, capsys) -> tuple[int, str]:
    """The exit status of a command, and what it says on stderr."""
    status = command_line.run(command)
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--out", "x", "--nonsense", "3"],
            "error: Unrecognized options: --nonsense, 3; python -m example --help",
        ),
        (["--out", "x", "--steps", "many"], "error: Error parsing --steps: invalid literal for int()"),
        ([], "error: Missing from python -m example: --out PATH The folder.; python -m example --help says more"),
    ],
)
def test_arguments_that_cannot_be_read_are_one_line(arguments, expected, capsys):
    status, error = status_of(lambda: read(*arguments), capsys)
    assert status == 2
    assert error.startswith(expected)
    assert error.count("\n") == 1


def test_arguments_are_read(capsys):
    assert command_line.run(lambda: 7) == 7
    assert command_line.run(lambda: None) == 0
    assert read("--out", "x", "--steps", "4") == Settings(Path("x"), 4)
    with pytest.raises(SystemExit) as end:
        command_line.run(lambda: read("--help"))
    assert end.value.code == 0
    assert "The folder." in capsys.readouterr().out


def raiser(error: BaseException):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bad\n  value"),
        OSError("no such disk"),
        FloatingPointError("the loss is nan"),
        MemoryError(),
        ImportError("pip install it"),
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_what_the_user_can_mend_is_one_line(error, capsys):
    status, said = status_of(raiser(error), capsys)
    assert status == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert len(said) > len("error: \n")


def test_a_fault_of_our_own_keeps_its_traceback():
    for error in (RuntimeError("a bug"), KeyError("a bug"), TypeError("a bug")):
        with pytest.raises(type(error), match="a bug"):
            command_line.run(raiser(error))


def test_ctrl_c_and_a_closed_pipe_are_quiet(capsys):
    assert status_of(raiser(KeyboardInterrupt()), capsys) == (130, "")
    code = "import sys; from tformer_lib.command_line import run; sys.exit(run(lambda: print('x' * 10 ** 6)))"
    for program in (["-c", code], ["-m", "tformer_lib.tokens", "--help"]):
        process = subprocess.Popen(
            [sys.executable, *program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 141


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("arguments", [["--nonsense"], ["nonsense"], ["--out"]])
def test_commands_refuse_what_they_do_not_know(name, arguments, capsys):
    assert COMMANDS[name](arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_training_without_a_command_says_which_there_are(capsys):
    assert training_main([]) == 2
    assert capsys.readouterr().err.startswith("error: Expected one of {train, resume, sample}.")


def test_ctrl_c_stops_a_corpus_in_the_making(tmp_path):
    """In a process of its own: interrupted at work, it says nothing and leaves nothing."""
    arguments = ["--stories", "3000000", "--out", str(tmp_path / "made")]
    code = "import sys; from tformer_lib.tokens.command import main; print('ready', flush=True)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}sys.exit(main({arguments}))"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "")
    assert not (tmp_path / "made").exists()
