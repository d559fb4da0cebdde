"""What a reader can answer after a chapter, and where the page says it: ``tests/questions/NN-word.toml``.

Each file lists ten questions or more. The place of an answer stands word for word in the Markdown of the notebook, so a
rewrite that drops an answer fails here.
"""

import re
import tomllib
from pathlib import Path

import pytest
from notebook_rules import cells, load, source

from tools.chapters import load as load_chapters

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "tests" / "questions").glob("*.toml"))


def complaints(listed: dict, notebook: dict) -> list[str]:
    """What is wrong with a chapter's list of questions."""
    questions = listed["questions"]
    text = flat("\n\n".join(source(cell) for cell in cells(notebook, "markdown")))
    asked = [question["ask"] for question in questions]
    found = [f"asked twice: {ask}" for ask in sorted({ask for ask in asked if asked.count(ask) > 1})]
    if len(questions) < 10:
        found.append(f"{len(questions)} questions; a chapter has ten or more")
    for question in questions:
        ask, place = question["ask"], flat(question["place"])
        if not ask.endswith("?"):
            found.append(f"not a question: {ask}")
        if len(question["answer"].split()) < 5:
            found.append(f"the answer is shorter than a sentence: {ask}")
        if len(place) < 12:
            found.append(f"the place {place!r} could stand anywhere: {ask}")
        if place not in text:
            found.append(f"the page no longer says {place!r}, where this is answered: {ask}")
    return found


def flat(text: str) -> str:
    """The text with each run of white space as one space: a place may go over the end of a line."""
    return re.sub(r"\s+", " ", text).strip()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_question_is_answered_on_the_page(file):
    listed = tomllib.loads(file.read_text(encoding="utf-8"))
    assert listed["chapter"] == file.stem
    assert complaints(listed, load(ROOT / "notebooks" / f"{file.stem}.ipynb")) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_chapter_s_question_is_the_one_of_the_contents(file):
    listed = tomllib.loads(file.read_text(encoding="utf-8"))
    assert listed["question"] == load_chapters().named(file.stem).question
    first = source(load(ROOT / "notebooks" / f"{file.stem}.ipynb")["cells"][0])
    assert f"**{listed['question']}**" in first, "the chapter opens with another question"


PAGE = {"cells": [{"cell_type": "markdown", "source": ["## Keys\n", "A key is what a token\n", "can be found by."]}]}
SOUND = {"ask": "What is a key?", "answer": "What a token can be found by.", "place": "what a token can be found by"}


def test_a_sound_list_has_no_complaints():
    assert complaints({"questions": [{**SOUND, "ask": f"What is key {i}?"} for i in range(10)]}, PAGE) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"place": "what a token can be lost by"}, "no longer says"),
        ({"place": "key"}, "could stand anywhere"),
        ({"ask": "Say what a key is."}, "not a question"),
        ({"answer": "A vector."}, "shorter than a sentence"),
        ({"ask": "What is key 0?"}, "asked twice"),
    ],
)
def test_a_faulty_question_is_found(change, complaint):
    questions = [{**SOUND, "ask": f"What is key {i}?"} for i in range(10)] + [{**SOUND, **change}]
    found = complaints({"questions": questions}, PAGE)
    assert len(found) == 1
    assert complaint in found[0]


def test_a_short_list_is_found():
    assert complaints({"questions": [SOUND]}, PAGE) == ["1 questions; a chapter has ten or more"]
