"""The learner's folder: an edit survives an update of the course, and a clean copy is one command away."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.sign import NotebookNotary

from tools import lab

NAMES = ["02-attention", "03-masks", "05-transformer"]
LIST = """
[[parts]]
word = "start"
caption = "Start"

{chapters}
[floors]
"""
CHAPTER = """
[[chapters]]
number = {number}
word = "{word}"
title = "A title"
part = "start"
modules = ["attention"]
question = "Why?"
"""


def notebook(*texts: str, outputs: str = "") -> str:
    """A notebook with a code cell for each text."""
    said = [nbformat.v4.new_output("stream", text=outputs)] if outputs else []
    cells = [nbformat.v4.new_code_cell(text, outputs=said, id=f"cell-{i}") for i, text in enumerate(texts)]
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells))


@pytest.fixture
def course(tmp_path, monkeypatch) -> Path:
    """A course whose chapters are small, and a home of its own for signatures."""
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    return small_course(tmp_path / "course")


def small_course(root: Path) -> Path:
    """A course of three chapters, with two cells in each."""
    (root / "book").mkdir(parents=True)
    (root / "notebooks").mkdir()
    rows = [CHAPTER.format(number=int(name[:2]), word=name[3:]) for name in NAMES]
    (root / "book" / "chapters.toml").write_text(LIST.format(chapters="".join(rows)))
    for name in NAMES:
        (root / "notebooks" / f"{name}.ipynb").write_text(notebook("import torch", f"print('{name}')"))
    return root


def text(path: Path) -> list[str]:
    """The cells' text."""
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]


def test_every_chapter_is_copied_and_trusted(course):
    assert lab.bring(course, course / "learn") == []
    assert sorted(p.stem for p in (course / "learn").glob("*.ipynb")) == sorted(NAMES)
    copied = nbformat.read(course / "learn" / f"{NAMES[0]}.ipynb", as_version=4)
    assert NotebookNotary().check_signature(copied)
    assert lab.latest(course / "learn").stem == NAMES[0]


def test_an_edited_chapter_stays_and_an_unedited_one_is_renewed(course):
    learn = course / "learn"
    lab.bring(course, learn)
    (learn / "02-attention.ipynb").write_text(notebook("mine"))
    (learn / "03-masks.ipynb").write_text(notebook("import torch", "print('03-masks')", outputs="ran"))  # no edit
    for name in ("02-attention", "03-masks"):
        (course / "notebooks" / f"{name}.ipynb").write_text(notebook("new"))
    told = lab.bring(course, learn)
    assert text(learn / "02-attention.ipynb") == ["mine"]
    assert text(learn / "03-masks.ipynb") == ["new"]
    assert [line.split()[0] for line in told] == ["02-attention"]
    assert lab.bring(course, learn) == told, "it is said each time, until a clean copy is taken"


def test_a_clean_copy_keeps_the_learners_own(course):
    learn = course / "learn"
    lab.bring(course, learn)
    for mine in ("first", "second"):
        (learn / "02-attention.ipynb").write_text(notebook(mine))
        assert "yours is now" in lab.fresh(course, learn, "02-attention")
    assert text(learn / "02-attention.ipynb") == ["import torch", "print('02-attention')"]
    assert sorted(text(p)[0] for p in learn.glob("02-attention mine*")) == ["first", "second"]
    assert lab.bring(course, learn) == []
    with pytest.raises(ValueError, match="there is no chapter '99-none'"):
        lab.fresh(course, learn, "99-none")


def test_the_lab_opens_what_was_saved_last(course):
    learn = course / "learn"
    lab.bring(course, learn)
    for name, second in (("05-transformer", 2_000_000_000), ("03-masks", 2_000_000_100)):
        os.utime(learn / f"{name}.ipynb", (second, second))
    assert lab.latest(learn).stem == "03-masks"
    assert "--LabApp.default_url=/lab/tree/03-masks.ipynb" in lab.options(learn)


@pytest.mark.parametrize(("chosen", "policy"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_of_a_learners_kernel_sleep_while_they_wait_unless_told_otherwise(course, monkeypatch, chosen, policy):
    if chosen is None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", chosen)
    monkeypatch.chdir(course)
    monkeypatch.setattr(lab, "ROOT", course)
    started = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(os.environ["OMP_WAIT_POLICY"]))
    try:
        assert lab.main([]) in (0, None)
    finally:
        if chosen is None:
            os.environ.pop("OMP_WAIT_POLICY", None)
    assert started == [policy]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize(("target", "said"), [("fresh", "Which chapter?"), ("address", "Which address?")])
def test_a_command_that_was_not_told_on_what_says_so_and_does_nothing(tmp_path, target, said):
    """``make fresh`` alone took a clean copy of the last chapter, and ``make address`` alone forgot the address."""
    ready = tmp_path / "ready"
    ready.touch()  # no set-up here
    command = ["make", "-C", str(Path(lab.__file__).parents[1]), target, f"READY={ready}", f"BIN={tmp_path}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("NB", "URL", "MAKEFLAGS")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stdout
    assert "tools." not in done.stdout


@pytest.mark.parametrize(
    ("kept", "said"),
    [(None, "0 exercises"), ('{"passed": ["masks.causal"]}', "1 exercise "), ('{"passed": ["a", "b"]}', "2 exercises")]
    + [(broken, "0 exercises") for broken in ("", "[]", '{"passed": 3}')],
)
def test_the_learner_is_told_how_many_exercises_are_passed(tmp_path, kept, said):
    if kept is not None:
        (tmp_path / lab.PROGRESS).write_text(kept)
    assert lab.progress(tmp_path).startswith(said)


@pytest.mark.parametrize("record", ["", "{", "[1]", '{"02-attention": {}}'])
def test_a_lost_record_loses_no_work(course, record):
    learn = course / "learn"
    lab.bring(course, learn)
    (learn / "02-attention.ipynb").write_text(notebook("mine"))
    (learn / lab.RECORD).write_text(record)
    lab.bring(course, learn)
    assert text(learn / "02-attention.ipynb") == ["mine"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["edit", "update", "bring", "fresh", "break"]), max_size=8))
def test_whatever_happens_no_line_of_the_learner_is_lost(tmp_path_factory, steps):
    root = small_course(tmp_path_factory.mktemp("course") / "course")
    learn, name, written = root / "learn", "02-attention", []
    lab.bring(root, learn)
    for number, step in enumerate(steps):
        if step == "edit":
            written.append(f"mine {number}")
            (learn / f"{name}.ipynb").write_text(notebook(*written))
        elif step == "update":
            (root / "notebooks" / f"{name}.ipynb").write_text(notebook(f"course {number}"))
        elif step == "break":
            (learn / lab.RECORD).unlink(missing_ok=True)
        elif step == "fresh":
            lab.fresh(root, learn, name)
        else:
            lab.bring(root, learn)
    kept = {line for path in learn.glob("*.ipynb") for line in text(path)}
    assert set(written) <= kept
