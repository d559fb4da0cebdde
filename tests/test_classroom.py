"""A class of five: chapters without solutions go out, progress comes back, and one table says who passed what."""

import csv
import json
import re
import tomllib

import nbformat
import pytest

from tformer_lib.teaching import exercises
from tformer_lib.teaching.exercises import engine, record
from tools import chapters, classroom

SOLVED = {"Ada": 1, "Ben": 2, "Chi": 3}
"""Learners, and with which try each passes the mask; Dan never does, and Eve hands in nothing that can be read."""


def answer(name: str, wrong: int):
    """A function that raises in its own way for each number."""
    scope = {}
    exec(f"def my_{name}(T, S=None):\n    return [{wrong}]\n", scope)
    return scope[f"my_{name}"]


def right(T, S=None):
    """The causal mask of T queries and S keys."""
    import torch

    S = T if S is None else S
    return torch.arange(S) <= torch.arange(S - T, S)[:, None]


@pytest.fixture
def learn(tmp_path, monkeypatch):
    """Work as a learner in a folder of one's own, where progress is kept."""

    def enter(name: str):
        folder = tmp_path / "desks" / name
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("TFORMER_PROGRESS", str(folder / ".tformer-progress.json"))
        return folder

    return enter


def test_a_class_of_five(tmp_path, learn, capsys):
    handed = tmp_path / "handed-in"
    handed.mkdir()
    for name, tries in SOLVED.items():
        folder = learn(name)
        for wrong in range(tries - 1):
            exercises.check("masks.causal", answer("causal", wrong))
            exercises.check("masks.causal", answer("causal", wrong))  # the same answer again is no new try
        exercises.check("masks.causal", right)
        exercises.check("masks.causal", answer("causal", 99))  # after it is passed nothing is counted
        exercises.hand_in(name)
        (folder / f"{name.lower()}.json").rename(handed / f"{name.lower()}.json")
    folder = learn("Dan")
    exercises.check("masks.causal", answer("causal", 1))
    (handed / "Dan").mkdir()
    (folder / ".tformer-progress.json").rename(handed / "Dan" / ".tformer-progress.json")
    (handed / "eve.json").write_text("my dog ate it")
    (handed / "fay.json").write_text("[" * 100_000)
    capsys.readouterr()

    out = tmp_path / "class.csv"
    assert classroom.main(["collect", str(handed), "--out", str(out)]) == 1, "a file was not read"
    said = capsys.readouterr()
    assert "eve.json: is not JSON" in said.err
    assert "fay.json: is not JSON" in said.err
    rows = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in said.out.splitlines()}
    assert rows["exercise"] == ["Ada", "Ben", "Chi", "Dan", "passed"]
    assert rows["masks.causal"] == ["1", "2", "3", "(1)", "3 of 4"]
    assert rows["passed in all"] == ["1", "1", "1", "0", ""]
    with open(out, newline="", encoding="utf-8") as file:
        kept = {row["learner"]: row for row in csv.DictReader(file)}
    assert [kept[name]["masks.causal tries"] for name in ("Ada", "Ben", "Chi", "Dan")] == ["1", "2", "3", "1"]
    assert [kept[name]["masks.causal passed"] for name in ("Ada", "Dan")] == ["1", "0"]


def test_what_is_not_an_own_answer_is_no_try(learn):
    def solution_causal(T, S=None):
        return right(T, S)

    def my_causal(T, S=None):
        raise NotImplementedError

    learn("Fay")
    for given in (solution_causal, my_causal, 3, None):
        exercises.check("masks.causal", given)
    exercises.check("masks.none", right)
    assert record.read() == {"passed": [], "tries": {}}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"passed": 3}', '{"passed": [1, "masks.causal"], "tries": [2]}'])
def test_a_damaged_record_is_read_as_far_as_it_goes(learn, text):
    (learn("Gus") / ".tformer-progress.json").write_text(text)
    found = record.read()
    assert found["tries"] == {}
    assert set(found["passed"]) <= {"masks.causal"}
    exercises.check("masks.causal", right)
    assert record.passed() == {"masks.causal"}


def test_a_record_without_tries_stays_valid(tmp_path):
    (tmp_path / "ida.json").write_text(json.dumps({"passed": ["masks.causal"]}))
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "ida.json").write_text(
        json.dumps({"learner": "ida", "passed": [], "tries": {"masks.causal": {"count": 4, "last": "x"}}})
    )
    (learner,), unread = classroom.collect(tmp_path)
    assert unread == []
    assert learner.passed == {"masks.causal"}
    assert learner.tries == {"masks.causal": 4}
    assert classroom.entry(learner, "masks.causal") == "4"


def test_the_class_gets_every_chapter_without_a_solution(tmp_path):
    names = classroom.write(chapters.ROOT, tmp_path / "class")
    assert names == [chapter.name for chapter in chapters.load().chapters if chapter.ready]
    for name in names:
        ours = nbformat.read(chapters.ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        theirs = nbformat.read(tmp_path / "class" / f"{name}.ipynb", as_version=4)
        nbformat.validate(theirs)
        text = "\n".join(cell.source for cell in theirs.cells)
        assert not re.search(r"def solution|, solution_?\w*\)", text), f"{name} gives a solution away"
        checks = re.findall(r'exercises\.check\("([\w.]+)"', "\n".join(cell.source for cell in ours.cells))
        assert set(checks) <= set(re.findall(r'exercises\.check\("([\w.]+)"', text)), f"{name} lost an exercise"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["write", "{}/new", "--chapters", "99-none"], "there is no chapter '99-none'"),
        (["write", "{}"], "is not an empty folder"),
        (["collect", "{}/nowhere"], "is not a folder"),
        (["collect", "{}/empty"], "nothing was handed in"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tmp_path, capsys, words, said):
    (tmp_path / "empty").mkdir()
    assert classroom.main([word.format(tmp_path) for word in words]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint
    assert complaint.count("\n") == 1


def test_a_name_is_no_formula():
    assert classroom.spelled("=cmd()") == "'=cmd()"
    assert classroom.spelled("Ada") == "Ada"


def test_a_name_becomes_a_file_of_its_own(learn, capsys):
    folder = learn("Joe")
    exercises.hand_in("../Joe O'Neill")
    assert [path.name for path in folder.glob("*.json") if not path.name.startswith(".")] == ["joe-o-neill.json"]
    exercises.hand_in(" .. ")
    assert "wants your name" in capsys.readouterr().out
    assert engine.mark(right) == engine.mark(right) != engine.mark(answer("causal", 1))


SYLLABUSES = tomllib.loads((chapters.ROOT / "book" / "syllabuses.toml").read_text(encoding="utf-8"))["syllabus"]


@pytest.mark.parametrize("course", SYLLABUSES, ids=lambda course: f"{course['weeks']} weeks")
def test_a_syllabus_sets_exercises_that_its_chapters_have_taught(course):
    known = {exercise.name for exercise in engine.all_exercises()}
    assert len(course["week"]) == course["weeks"]
    seen, taught, listed = [], set(), chapters.load()
    for week in course["week"]:
        assert week["assumes"]
        assert week["chapters"]
        seen += week["chapters"]
        for chapter in map(listed.named, week["chapters"]):
            taught |= exercises_of(chapter)
        assert set(week["exercises"]) <= known & taught, f"week of {week['chapters']}"
    assert seen == sorted(seen), "the chapters come in the order of the book"
    if course["weeks"] == max(one["weeks"] for one in SYLLABUSES):
        assert seen == [chapter.name for chapter in listed.chapters], "the longest course has every chapter"
        assert sorted(known) == sorted(name for week in course["week"] for name in week["exercises"])


def exercises_of(chapter) -> set[str]:
    """The exercises that stand in a chapter's notebook; none where the chapter is to come."""
    if not chapter.ready:
        return set()
    cells = nbformat.read(chapters.ROOT / "notebooks" / f"{chapter.name}.ipynb", as_version=4).cells
    return set(re.findall(r'exercises\.check\("([\w.]+)"', "\n".join(cell.source for cell in cells)))
