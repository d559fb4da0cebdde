"""The exercises' checks are tested themselves: the right answer passes, plausible wrong ones are told why they fail."""

import contextlib
import functools
import importlib
import inspect
import json
import multiprocessing
import pkgutil
import re
from pathlib import Path

import exercise_answers as answers
import numpy as np
import pytest
import torch
from notebook_rules import ONE_OF_MANY

from tformer_lib.teaching import exercises
from tformer_lib.teaching.exercises import engine, flash_kernels, record

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


def everywhere(change, result):
    """``change`` done to every part of a result."""
    if isinstance(result, (tuple, list)):
        return type(result)(everywhere(change, part) for part in result)
    return change(result)


def of_numpy(x):
    """A plain number or truth value as NumPy has it."""
    kinds = {int: np.int64, float: np.float32, bool: np.bool_}
    fits = type(x) in kinds and not (type(x) is int and abs(x) >= 2**63)
    return kinds[type(x)](x) if fits else x


def of_torch(x):
    """A plain number or truth value as a tensor."""
    return torch.tensor(x) if type(x) in (int, float, bool) and abs(x) < 2**63 else x


def in_double(x):
    return x.double() if type(x) is torch.Tensor and x.is_floating_point() else x


def in_single(x):
    return x.float() if type(x) is torch.Tensor and x.is_floating_point() else x


def strided(x):
    """The same tensor with gaps between its numbers."""
    return torch.stack((x, x), -1)[..., 0] if type(x) is torch.Tensor else x


def with_a_graph(x):
    return x.clone().requires_grad_() if type(x) is torch.Tensor and x.is_floating_point() else x


def other_sequence(result):
    """A list for a tuple of tensors, and a tuple for a list of them."""
    inside = isinstance(result, (tuple, list)) and result and all(isinstance(x, torch.Tensor) for x in result)
    return {tuple: list, list: tuple}[type(result)](result) if inside else result


STYLES = {
    change.__name__: functools.partial(everywhere, change)
    for change in (of_numpy, of_torch, in_double, in_single, strided, with_a_graph)
} | {"other_sequence": other_sequence}

BOUND = {
    ("positional_encoding.skew", "in_single"): "asked for the type of its inputs",
    ("grouped_query_attention.scores", "strided"): "makes a tensor of twice the numbers",
}
"""Right answers that a style makes wrong, with the reason."""


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", sorted(RIGHT))
def test_right_answer_in_other_types_passes(name, style):
    answer = RIGHT[name]
    if isinstance(answer, type) or (name, style) in BOUND:
        return
    assert engine.examine(name, lambda *args, **options: STYLES[style](answer(*args, **options))) == engine.Outcome(
        True
    )


NOT_REPLAYED = {"grouped_query_attention.scores", "positional_encoding.skew", "profiling.without_copies"}
"""Exercises that count the tensors that are made: the copies that this test makes are counted too."""


@pytest.mark.parametrize("name", sorted(RIGHT.keys() - NOT_REPLAYED))
def test_right_answer_that_changes_what_it_was_given_is_told_so(name):
    answer = RIGHT[name]
    if isinstance(answer, type):
        return

    def careless(*args, **options):
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        result = answer(*copies, **options)
        for x in args:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                x.detach().mul_(0.5)
        return result

    outcome = engine.examine(name, careless)
    assert outcome.passed or "your function changes what it was given" in outcome.message


@pytest.mark.parametrize("change", ["clear", "reverse"])
@pytest.mark.parametrize("name", ["rope.positions", "paged_attention.slots", "tokens.encode", "ten_minutes.write"])
def test_right_answer_that_changes_its_list_is_told_so(name, change):
    def careless(*args):
        result = RIGHT[name](*(list(x) if isinstance(x, list) else x for x in args))
        for x in args:
            if isinstance(x, list):
                getattr(x, change)()
        return result

    message = engine.examine(name, careless).message
    assert re.fullmatch(r"right, but your function changes what it was given, [\w ]+: work on a copy", message)


def test_answers_that_use_up_what_they_are_given_are_told_so():
    def positions(lengths):
        found = []
        while lengths:
            found += range(lengths.pop(0))
        return torch.tensor(found)

    told = "right, but your function changes what it was given, lengths: work on a copy"
    assert engine.examine("rope.positions", positions).message == told

    def worth(seconds, speedups):
        saved = {phase: seconds.pop(phase) * (1 - 1 / speedups.pop(phase)) for phase in list(speedups)}
        return max(saved, key=saved.get)

    told = "right, but your function changes what it was given, seconds, speedups: work on a copy"
    assert engine.examine("profiling.worth", worth).message == told


def test_answer_that_is_wrong_and_changes_what_it_was_given_is_told_what_is_wrong():
    def no_scale(q, k, v):
        q += 1
        return ((q - 1) @ k.mT).softmax(-1) @ v

    assert engine.examine("attention.simple", no_scale).message.startswith("the scale is missing")

    def in_its_own_input(q, k, v):
        q /= q.shape[-1] ** 0.5
        return (q @ k.mT).softmax(-1) @ v

    message = "right, but your function changes what it was given, q: work on a copy"
    assert engine.examine("attention.simple", in_its_own_input).message == message

    def result_is_the_input(x, gain, epsilon):
        return x.mul_(x.pow(2).mean(-1, keepdim=True).add(epsilon).rsqrt()).mul_(gain)

    message = "right, but your function changes what it was given, x: work on a copy"
    assert engine.examine("transformer.rms_norm", result_is_the_input).message == message


NEARLY = (
    "attention.simple",
    "flash_kernels.limit",
    "flash_kernels.row_max",
    "mixture_of_experts.expected",
    "profiling.busy",
    "profiling.least_time",
    "serving.decode_bound",
    "tokens.bits_per_byte",
    "training.schedule",
    "transformer.smoothing",
)


@pytest.mark.parametrize("factor", [1 + 3e-3, 1 + 3e-4])
@pytest.mark.parametrize("name", NEARLY)
def test_two_numbers_that_differ_do_not_look_the_same(name, factor):
    by_a_little = functools.partial(everywhere, lambda x: x * factor if isinstance(x, (float, torch.Tensor)) else x)
    message = engine.examine(name, lambda *args, **options: by_a_little(RIGHT[name](*args, **options))).message
    told = re.findall(r"(?<![\w.,])-?\d[\d,]*\.\d+(?:e[+-]?\d+)?", message)
    assert told, f"no number in {message!r}"
    assert len(told) == len(set(told)), f"a number is said twice: {message!r}"


@contextlib.contextmanager
def default_type(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


NOTEBOOKS_STATES = {
    "float64": lambda: default_type(torch.float64),
    "bfloat16": lambda: default_type(torch.bfloat16),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "another device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("state", NOTEBOOKS_STATES)
@pytest.mark.parametrize(
    "name",
    ["attention.backward", "attention.simple", "flash_math.backward", "rope.rotate", "training.accumulate"],
)
def test_check_does_not_depend_on_what_the_notebook_has_set(name, state):
    with NOTEBOOKS_STATES[state]():
        before = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
        assert engine.examine(name, RIGHT[name]) == engine.Outcome(True)
        assert (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()) == before


@pytest.mark.parametrize("name", ["training.adamw", "training.muon", "kv_cache.step", "linear_attention.step"])
def test_right_answer_whose_results_are_inference_tensors_passes(name):
    assert engine.examine(name, torch.inference_mode()(RIGHT[name])) == engine.Outcome(True)


SAY_1_HEADS = {"flash_kernels.occupancy", "flash_kernels.order"}
"""Exercises whose messages may put 1 before a plural."""


@pytest.mark.parametrize(("name", "i"), WRONG_CASES)
def test_wrong_answer_is_told_why(name, i):
    outcome = engine.examine(name, WRONG[name][i])
    assert not outcome.passed, "a wrong answer passes"
    assert len(outcome.message.split()) >= 3, f"not in words: {outcome.message!r}"
    assert name in SAY_1_HEADS or not ONE_OF_MANY.search(outcome.message), outcome.message
    assert not outcome.message.startswith("there is no exercise")
    assert outcome == engine.examine(name, WRONG[name][i]), "the message differs from run to run"


GENERATED = {"flash_kernels.rescale", "flash_kernels.tile", "flash_kernels.window"}
"""Exercises whose answers return a text and take nothing."""

ALWAYS = {
    ("flash_kernels.row_max", "c.shape[0]"): "a warp has 32 lanes",
    ("flash_kernels.row_max", "c.shape[2]"): "a lane holds four numbers of a fragment",
    ("profiling.without_copies", "q.shape[2]"): "one query, as the exercise says",
    ("training.accumulate", "inputs.shape[1]"): "only the check's own loss looks at it",
}
"""What a check gives in every call alike, and why an answer may know it."""


def facts(name: str, value) -> dict[str, object]:
    """What an answer could know of an argument beforehand: a number, a text, a tensor's sizes and numbers, a module."""
    if isinstance(value, torch.Tensor):
        return {f"{name}.shape[{i}]": size for i, size in enumerate(value.shape)} | {name: value}
    if isinstance(value, torch.nn.Module):
        return {name: repr(value)}
    return {name: value} if isinstance(value, (int, float, str, bytes, list, tuple, dict, set)) else {}


def is_same(x, other) -> bool:
    """Whether two arguments are equal."""
    return torch.equal(x, other) if isinstance(x, torch.Tensor) and isinstance(other, torch.Tensor) else x == other


@pytest.mark.parametrize("name", sorted(RIGHT.keys() - GENERATED))
def test_no_argument_is_the_same_in_every_call(name):
    if isinstance(RIGHT[name], type):
        return
    signature, same = inspect.signature(RIGHT[name]), None

    def watched(*args, **options):
        nonlocal same
        if same is None or same:
            given = signature.bind(*args, **options).arguments
            found = {fact: x for argument, value in given.items() for fact, x in facts(argument, value).items()}
            same = found if same is None else {f: x for f, x in same.items() if f in found and is_same(x, found[f])}
        return RIGHT[name](*args, **options)

    engine.examine(name, watched)
    known = {fact for fact in same if (name, fact) not in ALWAYS}
    assert not known, f"an answer may hold these as constants, and passes: {sorted(known)}"


NEVER_ONE = {
    "attention.previous": "of one token there is nothing to look back at",
    "flash_kernels.row_max": "a warp has 32 lanes",
    "grouped_query_attention.align": "a group of heads of one number has nothing to turn",
    "grouped_query_attention.pool": "a weight has more rows and columns",
    "linear_attention.step": "a state has a column for the denominator",
    "positional_encoding.shift": "sines and cosines come in pairs",
    "rope.convert": "a weight has more rows and columns",
    "training.adamw": "a weight of any shape",
    "training.muon": "a matrix of one row or column is a vector",
}
"""Exercises whose results have no dimension of size 1, and why."""


@pytest.mark.parametrize("name", sorted(RIGHT.keys() - GENERATED - NEVER_ONE.keys()))
def test_a_result_that_lost_its_dimensions_of_size_one_is_refused(name):
    answer, dimensions = RIGHT[name], [0]
    if isinstance(answer, type):
        return

    def squeezed(x):
        dimensions.append(x.dim() if type(x) is torch.Tensor else 0)
        return x.squeeze() if type(x) is torch.Tensor else x

    outcome = engine.examine(name, lambda *args, **options: everywhere(squeezed, answer(*args, **options)))
    assert max(dimensions) < 2 or not outcome.passed


def test_kernels_are_tried_with_heads_of_several_sizes():
    assert {q.shape[1] for _, q, *_ in flash_kernels.small_cases()} >= {5, 8, 12}


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
        (lambda x: x[0], "the result should have shape (2, 2), not (2,)"),
        (stub, "the function is still to be written: it raises NotImplementedError"),
        (7, "expected a function, got int"),
    ],
)
def test_messages(toy, answer, message):
    assert engine.examine(toy, answer).message == message


def test_an_operator_that_torch_lacks_is_no_stub(toy):
    def answer(x):
        return torch.linalg.inv(x.to("meta")).cpu()

    assert engine.examine(toy, answer).message.startswith("your function raises NotImplementedError: ")


def test_endless_recursion_is_reported(toy):
    assert "your function raises RecursionError" in engine.examine(toy, deep).message


def test_arguments_the_other_way_round_are_told(capsys):
    exercises.check(stub, "masks.causal")
    assert "its name comes first, as in check('masks.causal', my_causal)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["toy.nothing", "no-topic.x", "", ".", 3, [], stub, "engine.check", "record.add"])
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


def test_kernels_that_note_at_the_same_time_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TFORMER_PROGRESS", str(tmp_path / "progress.json"))

    def note(name: str) -> None:
        for i in range(20):
            record.add(f"{name}.{i}", answer="x", right=True)

    together = multiprocessing.get_context("fork")  # nothing is imported anew
    notes = [together.Process(target=note, args=(name,)) for name in "abc"]
    for one in notes:
        one.start()
    for one in notes:
        one.join(120)
    assert [one.exitcode for one in notes] == [0, 0, 0]
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
