"""Link the first mention of each glossary term in a chapter to the glossary, with its definition to hover over.

The chapters name terms in plain words, so that they read well in JupyterLab too; the links are made when the book is
built. The glossary gets links back: each term says which chapter introduces it.
"""

import json
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

LEFT_ALONE = (nodes.title, nodes.reference, nodes.literal, nodes.math, nodes.math_block, nodes.literal_block, nodes.raw)
LEFT_ALONE += (nodes.table, nodes.caption, nodes.footnote, nodes.inline)
"""What stands inside these is no running text, or is a link already."""


OTHER_SENSE = {
    "01-tokens": {"decode", "decoder", "encoder", "rank", "score", "value"},
    "02-attention": {"rank", "shuffle"},
    "03-masks": {"value"},
    "05-transformer": {"shuffle"},
    "06-training": {"activations", "value"},
    "07-generation": {"value"},
    "08-rope": {"kernel"},
    "09-kv-cache": {"activations"},
    "12-linear-attention": {"loss", "mask"},
    "13-mixture-of-experts": {"bias", "rank", "score", "top-k", "value"},
    "14-real-models": {"bias", "kernel"},
    "16-flash-kernels": {"padding", "scheduler"},
    "17-flash-hopper": {"scheduler"},
    "18-paged-attention": {"head"},
}
"""Chapter -> terms that it uses in another sense."""


INTRODUCED = {
    "01-tokens": {"glitch token"},
    "05-transformer": {
        "feed-forward layer",
        "layer normalisation",
        "logit lens",
        "Transformer (the model)",
        "unembedding",
    },
    "06-training": {
        *("AdamW", "bfloat16", "gradient accumulation", "gradient clipping", "mixed precision", "momentum"),
        *("overfitting", "scaling law"),
    },
    "07-generation": {"presence and frequency penalty", "sampling", "stop token"},
    "08-rope": {"bandwidth", "base (of RoPE)"},
    "09-kv-cache": {"eviction", "quantised cache"},
    "10-grouped-query-attention": {"absorbed matrices"},
    "12-linear-attention": {"decay (of a state)"},
    "13-mixture-of-experts": {"active parameters", "dropless mixture", "load balancing"},
    "16-flash-kernels": {"block (of threads)", "coalesced access", "L2 cache", "register (of a GPU)", "spill"},
    "17-flash-hopper": {"asynchronous instruction", "persistent kernel", "ping-pong scheduling"},
    "19-serving": {"latency"},
    "20-profiling": {"Amdahl's law", "eager mode", "NVTX"},
}
"""Chapter -> terms that it introduces in other words than the glossary's, or after their word in another sense."""


def link(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Link the terms of one chapter; what its own title names needs no link."""
    if not page.startswith("notebooks/"):
        return
    title = next(doctree.findall(nodes.title)).astext().lower()
    anchors = {name: place for (kind, name), place in app.env.get_domain("std").objects.items() if kind == "term"}
    meanings = definitions((Path(app.srcdir) / "glossary.md").read_text(encoding="utf-8"))
    spared = OTHER_SENSE.get(Path(page).name, set())
    left = {term: meaning for term, meaning in meanings.items() if term in anchors and term not in spared}
    left = {term: meaning for term, meaning in left.items() if term.lower() not in title}
    for text in list(doctree.findall(nodes.Text)):
        if left and is_running_text(text):
            text.parent.replace(text, linked(app, page, text, left, anchors))


def is_running_text(text: nodes.Text) -> bool:
    """Whether a piece of text stands in a paragraph, outside of code, mathematics, links and tables."""
    node = text.parent
    while node is not None:
        if isinstance(node, LEFT_ALONE) or {"cell", "footer"} & set(getattr(node, "attributes", {}).get("classes", [])):
            return False
        node = node.parent
    return True


def linked(app: Sphinx, page: str, text: nodes.Text, left: dict[str, str], anchors: dict) -> list[nodes.Node]:
    """The text in pieces, with a link at the first mention of each term that is left; takes those out of ``left``."""
    pieces, rest = [], text.astext()
    while left and (found := pattern(left).search(rest)):
        term = named(found[0], left)
        where, anchor = anchors[term]
        meaning = left[term]
        reference = make_refnode(app.builder, page, where, anchor, nodes.Text(found[0]), meaning)
        for name in names_of_one_entry(term, left):
            del left[name]
        reference["classes"].append("tf-term")
        pieces += [nodes.Text(rest[: found.start()]), reference]
        rest = rest[found.end() :]
    return [*pieces, nodes.Text(rest)]


def names_of_one_entry(term: str, meanings: dict[str, str]) -> list[str]:
    """The term and its other names: "logit" and "logits", "time to first token" and "TTFT" have one definition."""
    return [name for name, meaning in meanings.items() if name == term or (meaning and meaning == meanings[term])]


def pattern(terms) -> re.Pattern:
    """Any of the terms as whole words: abbreviations as they are, others also in the plural or with a capital."""
    words = sorted(terms, key=len, reverse=True)
    forms = [re.escape(word) if is_abbreviation(word) else f"(?i:{re.escape(word)})s?" for word in words]
    return re.compile(rf"(?<![\w-])(?:{'|'.join(forms)})(?![\w-])")


def named(mention: str, terms) -> str:
    """The term that a mention means."""
    return next(term for term in sorted(terms, key=len, reverse=True) if pattern([term]).fullmatch(mention))


def is_abbreviation(word: str) -> bool:
    """Whether the word is written with capitals of its own: BPE, RoPE, KV cache."""
    return word != word.lower()


def definitions(glossary: str) -> dict[str, str]:
    """Term -> definition, from the glossary's page, in plain words."""
    found = re.findall(r"((?:^\S.*\n)+)((?:  .*\n)+)", glossary.partition(":::{glossary}\n")[2], flags=re.MULTILINE)
    return {term: plain(" ".join(text.split())) for terms, text in found for term in terms.splitlines()}


def plain(text: str) -> str:
    """Text without Markdown's marks; nothing for a formula, which cannot be hovered over."""
    return "" if "\\" in text else re.sub(r"\{\w+\}(?=`)|[`$*]", "", text)


def say_where(app: Sphinx, page: str, source: list[str]) -> None:
    """On the glossary's page, end each definition with the chapter that introduces the term."""
    if page == "glossary":
        source[0] = with_chapters(source[0], Path(app.srcdir).resolve() / "notebooks")
        app.env.note_reread()  # the chapters may change while the page does not


def with_chapters(glossary: str, notebooks: Path) -> str:
    """The glossary's page with a link to the first chapter that has a term, or another name of it, in bold."""
    bold = {}
    for path in sorted(notebooks.glob("[0-9][0-9]-*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        for word in re.findall(r"\*\*([^*\n]+)\*\*", text):
            bold.setdefault(singular(word), path.name)

    def with_chapter(entry: re.Match) -> str:
        terms = entry[1].splitlines()
        names = [singular(re.sub(r" \(.*\)$", "", term)) for term in terms]
        places = [f"{chapter}.ipynb" for chapter, others in INTRODUCED.items() if others & {*terms}]
        places += sorted(bold[name] for name in names if name in bold)
        return entry[0] + (f"  Introduced in [](notebooks/{places[0]}).\n" if places else "")

    head, mark, entries = glossary.partition(":::{glossary}\n")
    return head + mark + re.sub(r"((?:^\S.*\n)+)(?:  .*\n)+", with_chapter, entries, flags=re.MULTILINE)


def singular(word: str) -> str:
    """A word in small letters and without the s of a plural."""
    return word.lower().removesuffix("s")


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("source-read", say_where)
    app.connect("doctree-resolved", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
