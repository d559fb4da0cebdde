"""The glossary has every term that the chapters define in bold, and those that the course promises."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GLOSSARY = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8")
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9][0-9]-*.ipynb"))

PROMISED = """
query, key, value, encoder, decoder, logit, AdamW, dropout, warm-up, TTFT, TPOT, SM, HBM, latency, throughput, prefill,
decode, batch slot, GEMM, warp, L2 cache, shared memory, spill, occupancy, SFU, mbarrier, tensor map, swizzle, KV cache,
"""
"""What a reader of papers, profilers and manuals must find here."""

STRESSED = {
    "said for emphasis": [
        *("replaces", "added", "not", "adds", "columns", "rows", "orthogonal", "mean", 'True means "may look"'),
        *("same work", "same weights", "total", "take turns", "all work at once", "rung 1", "instructions issued", "W"),
        *("1,024 cycles", "1,152 cycles", "1,536 cycles", "edit, compile, run, compare"),
    ],
    "the name of one of several things of the page": ["A", "F", "full", "empty", "memory", "uniform", "bundles"],
    "a name in a config.json": ["num_hidden_layers", "num_key_value_heads", "num_experts_per_tok"],
    "a verb or an adjective beside the noun that the glossary has": [
        *("warms up", "decays", "quantise", "evict", "renormalise", "silence", "preempted", "spilled", "absorbed"),
        *("fuse", "coalesced", "dropped", "dropless", "persistent", "asynchronous", "active", "ping-pong", "eager"),
    ],
    "a plain word that is explained where it stands and used there alone": [
        *("id", "bit", "family", "collapse", "live", "plan", "ring", "request", "parity", "process", "grammar"),
        *("recompute", "swap", "chain of hashes", "group", "presence", "feed-forward", "contiguous"),
    ],
}
"""Why a bold word is no term of the glossary -> the words."""

SPARED = {word.lower() for words in STRESSED.values() for word in words}


def terms() -> set[str]:
    """The glossary's terms, in small letters, without what stands in brackets after them."""
    place = ROOT / "book" / "_ext" / "terms.py"
    spec = importlib.util.spec_from_file_location("terms", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {re.sub(r" \(.*\)$", "", term).lower() for term in module.definitions(GLOSSARY)}


def bold(text: str) -> Iterator[str]:
    """The words in bold within sentences, not those that begin a paragraph or an item, or stand in a table."""
    text = re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    for found in re.finditer(r"(?<![*\w])\*\*([^*\n]+?)\*\*(?![*\w])", text):
        before = text[: found.start()].rpartition("\n")[2].lstrip()
        short = len(found[1].split()) <= 4 and not re.search(r"[.?!:,]$", found[1])
        if short and not before.startswith("|") and not re.fullmatch(r"(?:[-*]|\d+\.)?\s*", before):
            yield found[1].strip("`")


def known(word: str, listed: set[str]) -> bool:
    """Whether a word, or its singular, is listed."""
    word = word.lower()
    return bool({word, word.removesuffix("s"), re.sub(r"ies$", "y", word)} & listed)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_what_a_chapter_defines_is_in_the_glossary(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    words = {word for text in texts for word in bold(text)}
    listed = terms()
    missing = sorted(word for word in words if not known(word, listed) and word.lower() not in SPARED)
    assert missing == [], "bold words that book/glossary.md does not define (STRESSED lists those that are no terms)"


@pytest.mark.parametrize("term", [word.strip() for word in PROMISED.split(",") if word.strip()])
def test_a_promised_term_is_there(term):
    assert known(term, terms())


def test_the_terms_stand_in_the_order_of_the_alphabet():
    body = GLOSSARY.partition(":::{glossary}\n")[2]
    first = [terms.splitlines()[0] for terms in re.findall(r"((?:^\S.*\n)+)(?:  .*\n)+", body, flags=re.MULTILINE)]
    assert first == sorted(first, key=lambda term: (term.lower().replace("-", " "), term))


def test_no_word_is_spared_that_no_chapter_has():
    words = set()
    for path in CHAPTERS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        words |= {word.lower() for cell in cells for word in bold("".join(cell["source"]))}
    assert SPARED - words == set()


def test_bold_words_are_told_from_leads_and_tables():
    text = "A **token** is. And **this is much too long to be one**.\n- **Lead.** x\n**Also** a lead\n| **cell** |"
    text += "\n```\nsome **code**\n```"
    assert list(bold(text)) == ["token"]


def test_the_glossary_says_which_chapter_introduces_a_term():
    place = ROOT / "book" / "_ext" / "terms.py"
    spec = importlib.util.spec_from_file_location("terms", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.with_chapters(GLOSSARY, ROOT / "notebooks")
    assert page.count("Introduced in") > 200
    entries = dict(re.findall(r"^(\S.*)\n((?:  .*\n)+)", page, flags=re.MULTILINE))
    for term, chapter in {
        "query": "02-attention",
        "mbarrier": "17-flash-hopper",
        "window (of training)": "06-training",
    }.items():
        assert entries[term].endswith(f"Introduced in [](notebooks/{chapter}.ipynb).\n"), entries[term]
    assert module.definitions(page).keys() == module.definitions(GLOSSARY).keys()
    for chapter, others in module.INTRODUCED.items():
        assert (ROOT / "notebooks" / f"{chapter}.ipynb").exists()
        assert others <= module.definitions(GLOSSARY).keys()
