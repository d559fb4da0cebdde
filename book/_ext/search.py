"""Let a search for a chapter's subject find the chapter first.

Sphinx ranks pages by whether a word stands in them, not by how much they are about it, and orders equals by the
alphabet. So each chapter says in ``book/chapters.toml`` what it is about, in the words that a reader may type; a search
for one of them shows the chapter above the glossary's entry and the pages that only mention it.

A second build writes only the pages that changed. Sphinx then takes the words of the others from the index that it has,
but not their entries, so they are handed to it here.
"""

import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.search import js_index

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.chapters import LIST, ROOT, load


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


def recall(app: Sphinx, env: BuildEnvironment) -> None:
    """Give the index the entries of the last build. Those of the pages that are written now will replace them."""
    file = Path(app.outdir) / "searchindex.js"
    if not file.exists():
        return
    try:
        last = js_index.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return  # Sphinx warns that it cannot read it
    kept = env._search_index_index_entries  # where Sphinx 7 looks; it forgets them with each process
    kept.clear()
    for word, places in last.get("indexentries", {}).items():
        for number, target, main in places:
            page = last["docnames"][number]
            if page in env.all_docs:
                kept.setdefault(page, []).append((word, target, "main" if main else ""))


def depend(app: Sphinx, page: str, source: list[str]) -> None:
    """A chapter is written again when the list of chapters changes, for its subjects stand there."""
    if page.startswith("notebooks/"):
        app.env.note_dependency(str(ROOT / LIST))


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("source-read", depend)
    app.connect("env-updated", recall)
    app.connect("doctree-resolved", announce)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
