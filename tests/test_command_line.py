"""Commands: every refusal is one line on stderr and a status that is not 0; Ctrl-C and a closed pipe end quietly."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.checkpoints import save_chat_model
from tformer_lib import command_line, pretrained
from tformer_lib.generation import Conversation, generate
from tformer_lib.generation.command import main as generation_main
from tformer_lib.tokens.command import main as tokens_main
from tformer_lib.training.command import main as training_main

ROOT = Path(__file__).parent.parent
COMMANDS = {"generation": generation_main, "tokens": tokens_main, "training": training_main}


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


SCRIPTS = sorted(file.stem for file in (ROOT / "tools").glob("*.py") if "__main__" in file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_maintainers_scripts_do_nothing_if_asked_for_what_they_do_not_know(name, capsys):
    main = importlib.import_module(f"tools.{name}").main
    assert main(["--nonsense"]) == command_line.REFUSED
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert not end.value.code
    assert f"python -m tools.{name}" in capsys.readouterr().out


def test_training_without_a_command_says_which_there_are(capsys):
    assert training_main([]) == 2
    assert capsys.readouterr().err.startswith("error: Expected one of {train, resume, sample}.")


@pytest.mark.parametrize(
    ("closed", "does", "status", "out", "err"),
    [
        (">&-", "print('said')", 0, "", ""),
        ("2>&-", "print('said')", 0, "said\n", ""),
        (">&-", "c.refuse('why')", 2, "", "error: why\n"),
        ("2>&-", "c.refuse('why')", 2, "", ""),
        ("<&- >&- 2>&-", "print(open('kept', 'w').fileno() < 3)", 0, "", ""),
        ("<&-", "print(open('kept', 'w').fileno() < 3)", 0, "False\n", ""),
        (">&- 2>/dev/full", "c.refuse('why')", 2, "", ""),
        (">/dev/full", "print('said')", 2, "", "error: [Errno 28] No space left on device\n"),
    ],
)
def test_closed_streams_lead_nowhere(tmp_path, closed, does, status, out, err):
    code = f"import sys; from tformer_lib import command_line as c; sys.exit(c.run(lambda: {does}))"
    command = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (status, out, err)


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


# --- python -m tformer_lib.generation ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A public model with random weights and a chat template."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_chat_model(folder)
    return folder


def written(arguments: list, monkeypatch, capsys, typed: str = "") -> tuple[int, str, str]:
    """The exit status of the command, and what it writes on stdout and stderr, given what is typed."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    status = generation_main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_a_prompt_is_gone_on_with(monkeypatch, capsys):
    """By the stories model, where none is named."""
    model, encoding = pretrained.load()
    prompt = [encoding.eot_token, *encoding.encode_ordinary("Once, Lily")]
    for options, rules in (
        ([], {}),
        (["--temperature", 0.9, "--top-k", 20, "--seed", 3], {"temperature": 0.9, "top_k": 20, "seed": 3}),
    ):
        (tokens,) = generate(model, [prompt], max_new_tokens=20, stop_tokens=[encoding.eot_token], **rules)
        arguments = ["--prompt", "Once, Lily", "--max-new-tokens", 20, *options]
        text = encoding.decode([token for token in tokens if token != encoding.eot_token])
        assert written(arguments, monkeypatch, capsys) == (0, f"Once, Lily{text}\n", "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_checkpoint_converses_in_every_dtype(checkpoint, dtype, monkeypatch, capsys):
    conversation = Conversation(*pretrained.load(checkpoint, dtype=getattr(torch, dtype)), system="Be a dog.")
    answers = []
    for text in ("Once upon a time", "there was"):
        answers.append("".join(conversation.say(text, max_new_tokens=8)) + "\n")
    arguments = ["--model", checkpoint, "--chat", "--dtype", dtype, "--max-new-tokens", 8, "--system", "Be a dog."]
    typed = "Once upon a time\nthere was\n"
    assert written(arguments, monkeypatch, capsys, typed) == (0, "".join(answers), "")
    first = [*arguments, "--prompt", "Once upon a time"]
    assert written(first, monkeypatch, capsys, "there was\n/again\n") == (0, "".join([*answers, answers[-1]]), "")
    assert written(arguments, monkeypatch, capsys, "there was\n/new\n" + typed)[1].endswith("".join(answers))


def test_the_stories_model_says_that_its_chat_goes_on_with_the_story(monkeypatch, capsys):
    status, said, note = written(["--chat", "--max-new-tokens", 6], monkeypatch, capsys, "Once, Lily\n\n")
    whole = written(["--prompt", "Once, Lily", "--max-new-tokens", 12], monkeypatch, capsys)[1]
    assert (status, "Once, Lily" + said.replace("\n", "")) == (0, whole.removesuffix("\n"))
    assert note == "stories has no chat template: it goes on with the text, and what you write is appended to it\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --prompt or --chat must be given"),
        (["--prompt", "x", "--model", "nothing"], "there is no pretrained model 'nothing'"),
        (
            ["--prompt", "x", "--model", "/nowhere"],
            "there is no pretrained model '/nowhere', nor a folder of that name",
        ),
        (["--prompt", "x", "--dtype", "float16"], "invalid choice 'float16' for argument '--dtype'"),
        (["--prompt", "x", "--device", "toaster"], "device 'toaster' is not here"),
        (["--prompt", "x", "--context", 300], "context must be from 2 to 256, which is the model's, got 300"),
        (["--prompt", "x" * 2000], "the conversation has"),
        (["--prompt", "x", "--max-new-tokens", 0], "max_new_tokens must be at least 1, got 0"),
        (["--prompt", "x", "--temperature", -1], "temperature must be at least 0"),
        (["--chat", "--system", "Be a dog."], "this model has no chat template"),
    ],
)
def test_what_cannot_be_written_is_one_line(arguments, message, monkeypatch, capsys):
    status, said, error = written(arguments, monkeypatch, capsys)
    assert (status, said) == (2, "")
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_damaged_checkpoints_are_one_line(checkpoint, tmp_path, monkeypatch, capsys):
    for name, text, message in (
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", json.dumps({"model_type": "wizard"}), "a model of type 'wizard'"),
        ("tokenizer.json", "{}", "tokenizer.json is damaged"),
        ("model.safetensors", "12345678", "model.safetensors"),
    ):
        folder = tmp_path / f"{name}-{len(text)}"
        folder.mkdir()
        for path in checkpoint.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / name).write_text(text)
        status, said, error = written(["--chat", "--model", folder], monkeypatch, capsys)
        assert (status, said) == (2, "")
        assert message in error
        assert error.count("\n") == 1


def test_a_refused_turn_leaves_the_conversation_and_is_told_at_the_end(checkpoint, monkeypatch, capsys):
    arguments = ["--model", checkpoint, "--chat", "--max-new-tokens", 5, "--context", 60]
    status, said, error = written(arguments, monkeypatch, capsys, "/again\nOnce\n" + "dog " * 80 + "\nthere was\n")
    assert status == 2
    assert said.count("\n") >= 2
    assert [line.split(":")[0] for line in error.splitlines()] == ["error", "error"]
    assert "nothing was said yet" in error
    assert "its context is 60" in error
    _, alone, _ = written(arguments, monkeypatch, capsys, "Once\nthere was\n")
    assert said == alone


def start_chat(*arguments: str) -> subprocess.Popen:
    """The command in a process of its own, with pipes."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    program = [sys.executable, "-m", "tformer_lib.generation", "--chat", "--temperature", "1", *arguments]
    return subprocess.Popen(program, cwd=ROOT, text=True, **pipes)


def begin_answer(process: subprocess.Popen) -> None:
    """Say something, and wait until the answer has begun."""
    process.stdin.write("Once, Lily\n" + "\n" * 200)
    process.stdin.flush()
    assert process.stdout.read(10)


def test_ctrl_c_ends_a_chat_quietly():
    process = start_chat()
    begin_answer(process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.count("\n") == 1, "only the note about the template"


def test_a_closed_pipe_ends_a_chat_quietly():
    process = start_chat()
    begin_answer(process)
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read().count("\n") == 1, "only the note about the template"
    process.stdin.close()


EMPTY = [
    ("tformer_lib.tokens.command", ["--out", ""]),
    ("tformer_lib.tokens.command", ["--out="]),
    ("tformer_lib.tokens.command", ["--corpus", ""]),
    ("tformer_lib.training.command", ["train", "--out", ""]),
    ("tformer_lib.training.command", ["train", "--data", ""]),
    ("tformer_lib.training.command", ["resume", "--out", ""]),
    ("tformer_lib.training.command", ["sample", "--out", ""]),
    ("tformer_lib.generation.command", ["--prompt", "a", "--model", ""]),
    ("tformer_lib.serving.command", ["complete", "--prompt", "a", "--model", ""]),
    ("tformer_lib.serving.command", ["complete", "--prompt", "a", "--draft-model", "", "--drafts", "2"]),
    ("tformer_lib.serving.command", ["complete", "--prompts", ""]),
    ("tools.deep", ["--out", ""]),
    ("tools.classroom", ["write", ""]),
    ("tools.classroom", ["collect", "x", "--out", ""]),
    ("benchmarks.repeat", ["--out", ""]),
    ("benchmarks.rope", ["--out", ""]),
]


@pytest.mark.parametrize(("module", "arguments"), EMPTY, ids=lambda part: part if isinstance(part, str) else None)
def test_an_empty_path_is_refused_and_nothing_is_written(module, arguments, tmp_path, monkeypatch, capsys):
    """An unset variable of a shell script gives an empty name, which would mean the folder that one stands in."""
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(module).main(arguments) == 2
    said = capsys.readouterr().err
    assert "must name a file or folder, got ''" in said or "must not be empty" in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_path_is_read_as_it_is():
    assert read("--out", ".") == Settings(Path())
    assert read("--out", "a b/c") == Settings(Path("a b") / "c")
