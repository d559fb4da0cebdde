"""The capstone of part I: a reader's answers become a GPT that loads the book's weights."""

import importlib
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tformer_lib import pretrained, teaching
from tformer_lib.teaching import exercises
from tformer_lib.teaching.exercises import record
from tformer_lib.teaching.exercises.sources import Unportable, source_of
from tformer_lib.teaching.my_gpt import MARK, PARTS, book, frame

ROOT = Path(__file__).parent.parent


def answers_of(kind: str, name: str):
    """RIGHT or WRONG answers to an exercise."""
    return getattr(importlib.import_module(f"tests.exercise_answers.{name.partition('.')[0]}"), kind)[name]


RIGHT = {name: answers_of("RIGHT", name) for name in PARTS}


@pytest.fixture
def learner(tmp_path, monkeypatch) -> Path:
    """A folder in which somebody works through the book."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFORMER_PROGRESS", str(tmp_path / ".tformer-progress.json"))
    return tmp_path


def same_logits(module, dtype=torch.float64) -> float:
    """The largest difference between the file's logits and the library's."""
    model, encoding = pretrained.load()
    ids = torch.tensor([[encoding.eot_token, *encoding.encode_ordinary(teaching.STORY * 3)]])
    with torch.no_grad():
        return (module.gpt(ids, module.load_weights(dtype)) - model.to(dtype)(ids)).abs().max().item()


def test_answers_are_kept_as_they_pass_and_make_a_gpt(learner, capsys):
    for name, answer in RIGHT.items():
        exercises.check(name, answer)
    assert record.answers().keys() == PARTS.keys()
    capsys.readouterr()
    module = teaching.capstone()
    said = capsys.readouterr().out
    assert said.count(": yours\n") == len(PARTS)
    assert "below 1e-09" in said
    text = (learner / "my_gpt.py").read_text()
    assert text.count(": my answer\n") == len(PARTS)
    assert "the answer of the book" not in text
    for name, part in PARTS.items():
        assert getattr(module, part.name).__module__ == "my_gpt", f"{name} is the library's"
    assert same_logits(module) < 1e-9
    assert same_logits(module, torch.float32) < 1e-3
    story = said.split("\n\n")[-1].strip()
    assert story.startswith("Once, Lily")
    assert len(story.split()) > 30
    assert module.write("Once, Lily") == story
    assert module.write("Once, Lily", seed=1) != story


def test_the_file_runs_by_itself(learner, capsys):
    teaching.capstone(RIGHT)
    story = capsys.readouterr().out.split("\n\n")[-1].strip()
    alone = subprocess.run(
        [sys.executable, "my_gpt.py"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert alone.stderr == ""
    assert alone.stdout.strip() == story


def test_what_is_missing_is_named_and_can_be_filled(learner, capsys):
    for name in ("masks.causal", "generation.draw"):
        exercises.check(name, RIGHT[name])
    record.add("tokens.encode", answer="x", right=True)
    capsys.readouterr()
    assert teaching.capstone() is None
    lines = capsys.readouterr().out.splitlines()
    assert "chapter 3, exercise masks.causal: yours" in lines
    assert "chapter 3, exercise attention.attend: is not solved yet" in lines
    assert "chapter 1, exercise tokens.encode: is solved, but its answer was not kept: run its check again" in lines
    assert lines[-1].startswith("6 of 8 parts are missing")
    assert not (learner / "my_gpt.py").exists()
    module = teaching.capstone(fill=True)
    lines = capsys.readouterr().out.splitlines()
    assert "chapter 3, exercise attention.attend: is not solved yet; the book's is taken" in lines
    text = (learner / "my_gpt.py").read_text()
    assert (text.count(": my answer\n"), text.count(": the answer of the book\n")) == (2, 6)
    assert same_logits(module) < 1e-9


@pytest.mark.parametrize("name", PARTS)
def test_a_wrong_answer_is_named(name, learner, capsys):
    wrong = next(answer for answer in answers_of("WRONG", name) if answer.__name__ != "<lambda>")
    assert teaching.capstone(RIGHT | {name: wrong}) is None
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"not yet: chapter {PARTS[name].chapter}, exercise {name}: ")


def test_an_answer_that_its_check_lets_pass_is_named_by_the_logits(learner, capsys):
    assert teaching.capstone(RIGHT | {"transformer.rms_norm": rounds}) is None
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("not yet: chapter 5, exercise transformer.rms_norm: with your answer the logits differ")


def rounds(x, gain, epsilon):
    return norm(x, gain * (1 + 1e-6), epsilon)


def norm_in_float32(x, gain, epsilon):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + epsilon)).type_as(x) * gain


def attend_in_float32(q, k, v, mask):
    return book.attend(q.float(), k.float(), v.float(), mask)


def attend_with_an_added_mask(q, k, v, mask):
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    return (q @ k.mT / q.shape[-1] ** 0.5 + added).softmax(-1).nan_to_num() @ v


def test_a_constant_in_float32_rounds_nothing(learner, capsys):
    assert teaching.capstone(RIGHT | {"attention.attend": attend_with_an_added_mask}) is not None


@pytest.mark.parametrize(
    ("name", "answer"), [("transformer.rms_norm", norm_in_float32), ("attention.attend", attend_in_float32)]
)
def test_an_answer_that_rounds_to_float32_is_told_so(name, answer, learner, capsys):
    """It passes its check, which gives float32; Llama's own RMSNorm is written like the first."""
    assert teaching.capstone(RIGHT | {name: answer}) is None
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"not yet: chapter {PARTS[name].chapter}, exercise {name}: with your answer the logits")
    assert last.endswith("it computes in float32 what it gets in float64; keep to the type of its input")


def norm(x, gain, epsilon):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * gain


def test_nothing_that_is_not_the_capstone_s_is_overwritten(learner, capsys):
    (learner / "my_gpt.py").write_text("my own work\n")
    with pytest.raises(ValueError, match=r"my_gpt\.py is not the capstone's"):
        teaching.capstone(fill=True)
    assert (learner / "my_gpt.py").read_text() == "my own work\n"
    (learner / "other.py").write_text(f"{MARK}, some time ago")
    assert teaching.capstone(fill=True, path="other.py") is not None
    with pytest.raises(ValueError, match=r"'masks\.tree' is no part of a GPT"):
        teaching.capstone({"masks.tree": RIGHT["masks.causal"]}, path="third.py")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"masks.causal": 3}', '{"masks.causal": {"function": "f"}}'])
def test_kept_answers_that_are_damaged_are_none(text, learner):
    (learner / ".tformer-progress.json.answers").write_text(text)
    assert record.answers() == {}
    exercises.check("masks.causal", RIGHT["masks.causal"])
    assert list(record.answers()) == ["masks.causal"]


# --- the source of an answer ------------------------------------------------------------------------------------------

WIDTH, NAMES, TABLE = 3, ("a", "b"), torch.zeros(3)


def helper(n: int) -> list:
    return [*pairwise(range(n))] if n < WIDTH else [helper(n - 1), NAMES]


def needs_much(x, n=math.pi):
    inner = lambda t: F.relu(t) + n  # noqa: E731
    return torch.stack([inner(x) for _ in helper(5)]), [name for name in NAMES]  # noqa: C416


def needs_a_tensor(x):
    return x + TABLE


def test_a_source_brings_what_it_needs(tmp_path):
    source = source_of(needs_much)
    expected = {"import math", "import torch", "import torch.nn.functional as F", "from itertools import pairwise"}
    assert set(source.imports) == expected
    assert list(source.definitions)[-2:] == ["helper", "needs_much"] or list(source.definitions)[-1] == "needs_much"
    namespace = {}
    exec("\n".join([*source.imports, *source.definitions.values()]), namespace)
    x = torch.randn(4)
    found, expected = namespace["needs_much"](x), needs_much(x)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]


def test_what_another_file_does_not_have_is_named():
    def outer():
        y = 3
        return lambda x: x, lambda x: x + y

    def closed(x):
        return x + len(captured)

    captured = [1]
    for answer, message in (
        (needs_a_tensor, "it uses TABLE of its notebook, a Tensor"),
        (outer()[0], "no function that a def defines"),
        (closed, "closed uses captured of the function around it"),
        (len, "no function that a def defines"),
    ):
        with pytest.raises(Unportable, match=message):
            source_of(answer)


def test_names_that_mean_two_things_are_refused(learner, capsys):
    assert teaching.capstone({"masks.causal": gpt}, fill=True) is None
    assert "defines gpt, a name that the file needs" in capsys.readouterr().out


def gpt(T, S):
    return torch.arange(S) <= torch.arange(S - T, S)[:, None]


def test_the_book_s_own_answers_pass(learner):
    for name, part in PARTS.items():
        outcome = exercises.engine.examine(name, getattr(book, part.name))
        assert outcome.passed, (name, outcome.message)
    assert frame.Tokens().numbers(teaching.STORY)[1:] == pretrained.load()[1].encode_ordinary(teaching.STORY)
