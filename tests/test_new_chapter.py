"""`make chapter` in a copy of the project: what it makes is whole, and passes the tests that every chapter passes."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tools.chapters import load, stale
from tools.new_chapter import NewChapter, make

ROOT = Path(__file__).resolve().parents[1]
NAME, TOPIC = "22-state-spaces", "state_spaces"
NEW = NewChapter(NAME, "State spaces", "What is kept?", "modern-models", "forms")
PLANNED = """
[[chapters]]
number = 22
word = "state-spaces"
title = "State spaces"
part = "modern-models"
modules = ["state_spaces"]
question = "Which question will it answer?"
subjects = "state space"
state = "to come"

[floors]
"""
LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "_build", "vendor", "data", "runs", "build", "*.ipynb", "results"
)


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """A copy of the project, with the chapter made and its notebook run; the other notebooks are there, but empty."""
    root = tmp_path_factory.mktemp("project") / "course"
    shutil.copytree(ROOT, root, ignore=LEFT_OUT, symlinks=True)
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        (root / "notebooks" / notebook.name).write_text("{}", encoding="utf-8")
    listed = root / "book" / "chapters.toml"
    listed.write_text(listed.read_text().replace("\n[floors]\n", PLANNED))
    command = [sys.executable, "-m", "tools.new_chapter", NAME, "--question", NEW.question]
    subprocess.run(command, cwd=root, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(root)})
    run = "jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False"
    command = [str(Path(sys.executable).parent / "jupyter"), *run.split()[1:], f"notebooks/{NAME}.ipynb"]
    environment = os.environ | {"PYTHONPATH": str(root), "TFORMER_PROGRESS": ""}
    subprocess.run(command, cwd=root, check=True, capture_output=True, env=environment)
    return root


def test_new_chapter_passes_the_tests_of_every_chapter(copied):
    notebook, tests = f"notebooks/{NAME}.ipynb", [f"tests/test_{TOPIC}.py", "tests/test_layout.py"]
    some = ["tests/test_notebooks.py", "tests/test_exercises.py", "-k", f"{NAME} or {TOPIC} or layout"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", notebook, *tests, *some]
    ran = subprocess.run(
        command, cwd=copied, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(copied)}
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert int(ran.stdout.split(" passed")[0].split()[-1]) > 30


def test_new_chapter_is_clean(copied):
    files = [
        f"tformer_lib/{TOPIC}.py",
        f"tests/test_{TOPIC}.py",
        f"tests/exercise_answers/{TOPIC}.py",
        "tests/test_layout.py",
    ]
    files += [f"tformer_lib/teaching/exercises/{TOPIC}.py", f"notebooks/{NAME}.ipynb"]
    ruff = str(Path(sys.executable).parent / "ruff")
    for verb in (["check"], ["format", "--check"]):
        ran = subprocess.run([ruff, *verb, "--no-cache", *files], cwd=copied, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout


def test_new_chapter_is_listed(copied):
    assert f"      - file: notebooks/{NAME}\n" in (copied / "_toc.yml").read_text()
    assert f"(notebooks/{NAME}.ipynb) | `{TOPIC}.py` | ready |" in (copied / "README.md").read_text()
    assert load(copied).named(NAME).question == NEW.question
    assert not stale(copied)
    courses = tomllib.loads((copied / "book" / "syllabuses.toml").read_text())["syllabus"]
    weeks = max(courses, key=lambda course: course["weeks"])["week"]
    assert weeks[-1]["chapters"][-1] == NAME
    assert [name for name in weeks[-1]["exercises"] if name.startswith(TOPIC)] == [
        f"{TOPIC}.{word}" for word in ("double", "keep_shape", "no_change")
    ]
    comments = [line for line in (ROOT / "book" / "chapters.toml").read_text().splitlines() if line.startswith("#")]
    assert [c for c in (copied / "book" / "chapters.toml").read_text().splitlines() if c.startswith("#")] == comments


def test_a_chapter_beyond_the_plan_gets_a_row_and_a_floor(copied):
    make(copied, NewChapter("23-wavelets", "Wavelets", "Which wave?", "modern-models", "forms"))
    course = load(copied)
    assert course.chapters[-1].title == "Wavelets"
    assert "wavelets" in course.floors["forms"]


@pytest.mark.parametrize(
    ("name", "part", "words"),
    [
        ("02-lookup", "modern-models", "02-attention"),
        ("24-masks", "modern-models", "exists already"),
        ("24-x", "none", "no part"),
    ],
)
def test_a_chapter_that_cannot_be_is_refused_and_nothing_written(copied, name, part, words):
    before = sorted(copied.rglob("*"))
    with pytest.raises(ValueError, match=words):
        make(copied, NewChapter(name, "A", "B?", part, "forms"))
    assert sorted(copied.rglob("*")) == before


def test_nothing_is_overwritten(copied):
    before = json.loads((copied / "notebooks" / f"{NAME}.ipynb").read_text())
    with pytest.raises(ValueError, match="exists already"):
        make(copied, NEW)
    assert json.loads((copied / "notebooks" / f"{NAME}.ipynb").read_text()) == before


@pytest.mark.parametrize("wrong", [{"name": "Experts"}, {"name": "18_experts"}, {"part": "No such part"}])
def test_wrong_wishes_are_refused_before_anything_is_written(copied, wrong):
    fields = {**vars(NEW), "name": "24-other", **wrong}
    listed = (copied / "_toc.yml").read_text()
    with pytest.raises(ValueError, match=r"name|part"):
        make(copied, NewChapter(**fields))
    assert not (copied / "tformer_lib" / "other.py").exists()
    assert (copied / "_toc.yml").read_text() == listed
