"""Let a search for a chapter's subject find the chapter first.

Sphinx ranks pages by whether a word stands in them, not by how much they are about it, and orders equals by the
alphabet. So each chapter says in ``book/chapters.toml`` what it is about, in the words that a reader may type; a search
for one of them shows the chapter above the glossary's entry and the pages that only mention it.
"""

import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.chapters import load


def forms(subject: str) -> set[str]:
    """How a subject may be typed: with its hyphens, or with spaces for them."""
    return {subject, subject.replace("-", " ")}


def announce(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Give the chapter its subjects, for the search alone; the glossary's entries come after them."""
    if page == "glossary":
        for node in doctree.findall(addnodes.index):
            node["entries"] = [(kind, value, target, "", key) for kind, value, target, _, key in node["entries"]]
    chapter = load().named(Path(page).name) if page.startswith("notebooks/") else None
    if chapter and chapter.subjects:
        words = sorted(set().union(*map(forms, chapter.subjects.split(", "))))
        doctree.insert(0, addnodes.index(entries=[("single", word, "", "main", None) for word in words]))


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("doctree-resolved", announce)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
