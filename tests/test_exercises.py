"""The exercises' checks are tested themselves: the right answer passes, plausible wrong ones are told why they fail."""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import exercise_answers as answers
import pytest
import torch

from tformer_lib.teaching import exercises
from tformer_lib.teaching.exercises import engine, record

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def collect(kind: str) -> dict:
    """``RIGHT``, ``ALSO_RIGHT`` or ``WRONG`` of every file of answers, as one dictionary."""
    modules = [m.name for m in pkgutil.iter_modules(answers.__path__)]
    together = {}
    for name in modules:
        together |= getattr(importlib.import_module(f"{answers.__name__}.{name}"), kind, {})
    return together


ALL = {e.name: e for e in engine.all_exercises()}
RIGHT, WRONG = collect("RIGHT"), collect("WRONG")
WRONG_CASES = [(name, i) for name, many in WRONG.items() for i in range(len(many))]


@pytest.mark.parametrize("name", sorted(ALL))
def test_exercise_is_complete(name):
    assert name in RIGHT, "no right answer in tests/exercise_answers"
    assert len(WRONG.get(name, ())) >= 2, "fewer than two wrong answers in tests/exercise_answers"
    assert ALL[name].title
    assert all(len(hint) >= 10 for hint in ALL[name].hints)


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_right_answer_passes(name):
    assert engine.examine(name, RIGHT[name]) == engine.Outcome(True)


@pytest.mark.parametrize(
    ("name", "answer"), [(name, answer) for name, many in collect("ALSO_RIGHT").items() for answer in many]
)
def test_right_answer_in_another_style_passes(name, answer):
    assert engine.examine(name, answer) == engine.Outcome(True)


@pytest.mark.parametrize(("name", "i"), WRONG_CASES)
def test_wrong_answer_is_told_why(name, i):
    outcome = engine.examine(name, WRONG[name][i])
    assert not outcome.passed, "a wrong answer passes"
    assert len(outcome.message.split()) >= 3, f"not in words: {outcome.message!r}"
    assert not outcome.message.startswith("there is no exercise")
    assert outcome == engine.examine(name, WRONG[name][i]), "the message differs from run to run"


HOSTILE = {
    "None": lambda *a, **k: None,
    "a string": lambda *a, **k: "mask",
    "a number": lambda *a, **k: 7,
    "an empty tensor": lambda *a, **k: torch.empty(0),
    "NaN": lambda *a, **k: torch.full((3, 3), torch.nan),
    "an integer tensor": lambda *a, **k: torch.zeros(2, 2, dtype=torch.int64),
    "no arguments": lambda: torch.zeros(2, 2),
    "no function": 3,
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("name", sorted(ALL))
def test_check_never_raises_and_prints_one_line(name, answer, capsys, monkeypatch):
    monkeypatch.setenv("TFORMER_PROGRESS", "")
    exercises.check(name, answer)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("not yet: ")


@pytest.mark.parametrize("name", sorted(ALL))
def test_check_names_an_exception_of_the_learner(name):
    def answer(*args, **options):
        raise KeyError("my own mistake")

    assert "your function raises KeyError" in engine.examine(name, answer).message


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebooks_use_exercises_that_exist(file):
    code = "\n".join("".join(c["source"]) for c in json.loads(file.read_text())["cells"] if c["cell_type"] == "code")
    assert set(re.findall(r"exercises\.(?:check|hint)\(\s*[\"']([\w.]+)[\"']", code)) <= set(ALL)


@pytest.fixture
def toy():
    """An exercise of our own, removed afterwards."""

    @engine.exercise("toy.double", title="Twice", hints=("Add.", "x + x."))
    def check_double(fn):
        engine.require_close(fn(torch.eye(2)), 2 * torch.eye(2), "it is not twice the input")

    yield "toy.double"
    del engine.REGISTRY["toy.double"]
    engine.HINTS_GIVEN.pop("toy.double", None)


def stub(x):
    raise NotImplementedError


def deep(x):
    return deep(x)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x, "it is not twice the input (at index [0, 0] it is 1, expected 2)"),
        (lambda x: x * torch.nan, "the result holds nan at index [0, 0]"),
        (lambda x: None, "the result is None: is a return missing?"),
        (lambda x: [1], "the result should be a tensor, and is a list"),
        (lambda x: x[0], "the result should have shape (2, 2), and has (2,)"),
        (stub, "the function is still to be written: it raises NotImplementedError"),
        (7, "expected a function, got int"),
    ],
)
def test_messages(toy, answer, message):
    assert engine.examine(toy, answer).message == message


def test_endless_recursion_is_reported(toy):
    assert "your function raises RecursionError" in engine.examine(toy, deep).message


@pytest.mark.parametrize("name", ["toy.nothing", "no-topic.x", "", ".", 3, "engine.check", "record.add"])
def test_unknown_name_is_told(name, capsys):
    exercises.check(name, stub)
    exercises.hint(name)
    assert capsys.readouterr().out.count("there is no exercise") == 2


def test_hints_come_one_by_one(toy, capsys):
    for _ in range(3):
        exercises.hint(toy)
    first, second, last = capsys.readouterr().out.splitlines()
    assert (first, second) == ("hint 1 of 2: Add.", "hint 2 of 2: x + x.")
    assert last.startswith("that was the last hint")


def test_check_leaves_the_generators_alone(toy):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    engine.examine(toy, lambda x: torch.rand(2, 2))
    assert torch.equal(torch.rand(3), expected)


def test_progress_is_kept(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("TFORMER_PROGRESS", str(tmp_path / "progress.json"))
    exercises.check(toy, lambda x: x + x)
    assert record.passed() == {toy}
    assert [p.name for p in tmp_path.iterdir()] == ["progress.json"]


def test_solution_of_the_book_is_not_counted(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("TFORMER_PROGRESS", str(tmp_path / "progress.json"))

    def solution(x):
        return x + x

    exercises.check(toy, solution)
    assert record.passed() == set()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"passed": 3}', '{"passed": [1, null]}', "\x00", "[" * 10**5], ids=range(7)
)
def test_broken_record_is_an_empty_one(toy, text, tmp_path, monkeypatch):
    file = tmp_path / "progress.json"
    file.write_text(text)
    monkeypatch.setenv("TFORMER_PROGRESS", str(file))
    assert record.passed() == set()
    exercises.check(toy, lambda x: x + x)
    assert record.passed() == {toy}


def test_record_that_cannot_be_written_stops_nothing(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFORMER_PROGRESS", str(tmp_path / "no" / "such" / "folder" / "progress.json"))
    exercises.check(toy, lambda x: x + x)
    assert capsys.readouterr().out == "passed: Twice\n"


def test_kernels_that_note_at_the_same_time_lose_nothing(tmp_path):
    code = "import sys; from tformer_lib.teaching.exercises import record\n"
    code += "for i in range(20): record.add(f'{sys.argv[1]}.{i}', answer='x', right=True)"
    environ = {**os.environ, "TFORMER_PROGRESS": str(tmp_path / "progress.json")}
    root = Path(__file__).parent.parent
    notes = [subprocess.Popen([sys.executable, "-c", code, name], env=environ, cwd=root) for name in "abc"]
    assert [note.wait(120) for note in notes] == [0, 0, 0]
    names = json.loads((tmp_path / "progress.json").read_text())["passed"]
    assert sorted(names) == sorted(f"{name}.{i}" for name in "abc" for i in range(20))
    assert [file.name for file in tmp_path.iterdir()] == ["progress.json"]


def test_test_runs_keep_nothing(toy, tmp_path, monkeypatch):
    monkeypatch.delenv("TFORMER_PROGRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    exercises.check(toy, lambda x: x + x)
    assert not list(tmp_path.iterdir())


def test_progress_lists_every_exercise(capsys):
    exercises.progress()
    said = capsys.readouterr().out
    assert all(f"`{name}`" in said for name in ALL)
