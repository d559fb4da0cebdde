"""What runs through the whole book: one sentence, and one diagram of the model."""

import matplotlib.pyplot as plt
import pytest
import torch

from tformer_lib import pretrained, teaching
from tformer_lib.teaching import running
from tools import chapters


def next_token(text: str) -> tuple[str, float]:
    """The shipped model's most probable next token after ``text``, and its probability."""
    model, encoding = pretrained.load()
    with torch.no_grad():
        probabilities = model(torch.tensor([encoding.encode(text)]))[0, -1].softmax(-1)
    return encoding.decode([probabilities.argmax().item()]), probabilities.max().item()


@pytest.mark.parametrize("name", ["Lily", "Ben"])
def test_the_model_finds_the_name_in_the_story(name):
    story = teaching.STORY.replace("Lily", name)
    before, said, _ = story.rpartition(" said")
    token, probability = next_token(before + said)
    assert token == f" {name}"
    assert probability > 0.9


def test_the_words_that_the_chapters_point_at_are_one_token_each():
    _, encoding = pretrained.load()
    assert teaching.STORY.endswith(teaching.SENTENCE)
    pieces = [encoding.decode([token]) for token in encoding.encode(teaching.STORY)]
    assert "".join(pieces) == teaching.STORY
    assert {" Lily", " red", " ball", " said"} <= set(pieces)


def test_every_chapter_has_its_place_in_the_diagram():
    assert set(running.PARTS) == {chapter.word for chapter in chapters.load().chapters}
    known = {*running.OUTER, *running.INNER, *running.EXTRA}
    assert all(set(parts) <= known and parts for parts in running.PARTS.values())


def test_the_diagram_marks_the_chapters_boxes_alone(monkeypatch):
    bold = []
    monkeypatch.setattr(
        running, "show", lambda: bold.extend(t.get_text() for t in plt.gca().texts if t.get_fontweight() == "bold")
    )
    running.model_map("masks")
    plt.close("all")
    assert bold == ["mask"]
    with pytest.raises(ValueError, match="no chapter is called 'mask'"):
        running.model_map("mask")
