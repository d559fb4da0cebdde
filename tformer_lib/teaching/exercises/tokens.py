"""The exercises of the tokens chapter."""

import math
import random
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import SupportsFloat

from tformer_lib import stories, tokens
from tformer_lib.teaching.exercises.engine import exercise, in_digits, require


@exercise(
    "tokens.merge",
    title="Merge a pair",
    hints=(
        "Walk with an index i: if the pair stands at i, merge it and move on by two, otherwise move on by one.",
        "After a merge, the second token of the pair is used up: it cannot begin another pair.",
        "In aaa the pair (a, a) stands at 0 and at 1, but once 0 is merged, only one a is left.",
    ),
)
def check_merge(fn):
    cases = ["abab", "aaa", "aaaa", "", "b", "xaby", "aab", "abaab"]
    for word in cases:
        for pair in ((b"a", b"b"), (b"a", b"a")):
            check_one_merge(fn, tuple(bytes([b]) for b in word.encode()), pair)
    check_one_merge(fn, (b"ab", b"a", b"b", b"ab", b"c"), (b"ab", b"c"))


def check_one_merge(fn, word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> None:
    """Fail unless ``fn`` merges ``pair`` in ``word`` as the library does."""
    found = fn(word, pair)
    require(isinstance(found, tuple), f"the result should be a tuple of tokens, and is a {type(found).__name__}")
    case = f"{pair} in {word}"
    require(b"".join(found) == b"".join(word), f"{case} gives {found}: bytes were lost or made up")
    require(pair not in pairwise(found), f"{case} gives {found}: a pair was left unmerged")
    expected = tokens.merge_pair(word, pair)
    require(found == expected, f"{case} gives {found}, expected {expected}: merge from left to right")


@exercise(
    "tokens.encode",
    title="Encode a word",
    hints=(
        "Begin with single bytes. Which of the pairs that stand in the word now was learned first?",
        "Merge that pair everywhere, then look again, until none of the pairs in the word was ever learned.",
        "min(pairs_in_word, key=order.get) with order = {pair: i for i, pair in enumerate(merges)}",
    ),
)
def check_encode(fn):
    bpe = tokens.train_bpe(" ".join(stories.stories(60, seed=3)), 500)
    draw = random.Random(0)
    words = [" house", "the", " lemonade", "s", "", " unbelievable", "zzzz", " the" * 3, "é"]
    words += ["".join(draw.choices("aehlnost ", k=9)) for _ in range(40)]
    words.append(b"".join(bpe.merges[-1]).decode())  # the one word that needs the last merge
    for word, merges in [(word, bpe.merges) for word in words] + [(word, bpe.merges[:60]) for word in words[:9]]:
        found = fn(word.encode(), merges)
        require(isinstance(found, list | tuple), f"the result should be a list of tokens, and is {found!r}")
        require(b"".join(found) == word.encode(), f"{word!r} gives {found}: the tokens do not join to the word")
        expected = replay(word.encode(), merges)
        reason = "the pair learned first goes first" if len(found) <= len(expected) else "more pairs can be merged"
        require(list(found) == expected, f"{word!r} gives {list(found)}, expected {expected}: {reason}")


def replay(word: bytes, merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    """The tokens of ``word`` after every merge, in the order learned: what training itself did to it."""
    cut = tuple(bytes([b]) for b in word)
    for pair in merges:
        cut = tokens.merge_pair(cut, pair)
    return list(cut)


@exercise(
    "tokens.bits_per_byte",
    title="Bits per byte",
    hints=(
        "The loss is a mean: how many nats does the whole text cost?",
        "The same text has the same bytes whatever the vocabulary, so divide by those.",
        "A bit is log(2) = 0.693 nats, so the same surprise is more bits than nats.",
    ),
)
def check_bits_per_byte(fn):
    cases = [(1.0, 100, 100), (2.0, 50, 100), (3.3, 1000, 3300), (math.log(256), 40, 40)]
    for loss, count, size in cases:
        found, expected = fn(loss, count, size), loss * count / (size * math.log(2))
        case = f"a loss of {loss:.4g} on each of {count} tokens, {size} bytes of text,"
        require(isinstance(found, SupportsFloat), f"the result should be a number, and is {found!r}")
        found = float(found)
        require(
            not close(found, loss * count / size) or close(found, expected), f"{case} came out in nats: convert to bits"
        )
        require(not close(found, loss / math.log(2)) or count == size, f"{case} came out per token, not per byte")
        mine, right = in_digits(found, expected, ".4f")
        require(close(found, expected), f"{case} should be {right} bits per byte, and came out as {mine}")


def close(x: float, y: float) -> bool:
    """Equal but for rounding."""
    return math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-12)


@exercise(
    "tokens.stream",
    title="Show text as it is written",
    hints=(
        "A token may hold half a character. Keep its bytes until the rest has come.",
        "Collect bytes; try to decode what you have; where that fails because the end is cut off, wait.",
        'codecs.getincrementaldecoder("utf-8")("replace") keeps unfinished bytes; end with decode(b"", final=True).',
    ),
)
def check_stream(fn):
    for text in ("plain text", "naïve café", "日本語", "one 👩‍🚀 two", "", "é"):
        pieces = [bytes([b]) for b in text.encode()]
        check_one_stream(fn, pieces, text)
    check_one_stream(fn, [b"caf", b"\xc3", b"\xa9 ", b"\xf0\x9f", b"\x99\x83!"], "café 🙃!")
    check_one_stream(fn, [b"na\xc3", b"\xafve \xe6\x97", b"\xa5!"], "naïve 日!")
    for begun in (b"\xc3", b"\xe6\x97", b"\xf0\x9f\x99"):
        shown = run_stream(fn, [b"ok " + begun])
        require(
            shown == "ok \ufffd",
            f"text that ends after {len(begun)} of a character's bytes shows as {shown!r}: end it with one \ufffd, "
            "not with silence and not with one for each byte",
        )


def check_one_stream(fn, pieces: list[bytes], text: str) -> None:
    """Fail unless ``fn`` shows ``text`` whole, and all that is complete before it asks for the next piece."""
    shown = run_stream(fn, pieces)
    require(
        "\ufffd" not in shown, f"{text!r} shows as {shown!r}: a character was decoded before all its bytes had come"
    )
    require(shown == text, f"{text!r} shows as {shown!r}: bytes that wait for the rest of their character were lost")
    seen, late = "", []

    def source() -> Iterator[bytes]:
        for i, piece in enumerate(pieces):
            yield piece
            have = b"".join(pieces[: i + 1]).decode("utf-8", "ignore")
            if seen != have:
                late.append(f"{text!r}: only {seen!r} was shown when {have!r} had come: do not wait for more")

    for part in fn(source()):
        seen += part
    require(not late, late[0] if late else "")


def run_stream(fn, pieces: list[bytes]) -> str:
    """All that ``fn`` shows."""
    parts = fn(iter(pieces))
    require(parts is not None, "the result is None: yield the text that can be shown")
    parts = list(parts)
    require(all(isinstance(part, str) for part in parts), "yield strings: what the reader sees, not bytes")
    return "".join(parts)


@exercise(
    "tokens.train",
    title="A trainer that never counts twice",
    hints=(
        "Keep two tables from merge to merge: how often each pair is seen, and which words hold it.",
        "A merge changes the words that hold its pair: take a word's pairs out of the count, merge, put the new in.",
        "In the second table, a set of words for each pair; a word that has lost the pair may stay and does no harm.",
        "max(counts, key=lambda pair: (counts[pair], pair)) has the tie rule; drop pairs whose count is down to 0.",
    ),
)
def check_train(fn):
    draw = random.Random(0)
    corpora = [{b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}, {b"aaaa": 2, b"aaa": 1, b"baaab": 1}, {b"a": 3}]
    for letters in ["ab", "abc", "abcdé"] * 8:
        words = ("".join(draw.choices(letters, k=draw.randint(1, 9))).encode() for _ in range(8))
        corpora.append({word: draw.randint(1, 4) for word in words})
    for words in corpora:
        check_one_training(fn, words, 40)  # more than some of them have
    check_one_training(fn, tokens.count_words(" ".join(stories.stories(5, seed=1)), [], tokens.GPT4_PATTERN), 30)
    check_work_of_training(fn)


def check_one_training(fn, words: dict[bytes, int], count: int) -> None:
    """Fail unless ``fn`` learns up to ``count`` merges from ``words`` as the plain algorithm does."""
    given = dict(words)
    found = fn(given, count)
    require(isinstance(found, list | tuple), f"the result should be a list of pairs, and is {found!r:.60}")
    require(given == words, "your function changed the dictionary of words that it was given: work on a copy")
    case = str(dict(words)) if len(words) < 10 else f"a corpus of {len(words)} words"
    cut = {tuple(bytes([b]) for b in word): times for word, times in words.items()}
    for number in range(count + 1):
        counts = tokens.count_pairs(cut)
        learned = tuple(found[number]) if number < len(found) else None
        best = max(counts, key=lambda pair: (counts[pair], pair)) if counts and number < count else None
        if learned != best:
            fail_training(cut, learned, best, f"{case}: merge {number + 1}")
        if best is None:
            return
        merged = {}
        for word, times in cut.items():
            merged[tokens.merge_pair(word, best)] = times
        cut = merged


def fail_training(cut: dict, learned: tuple | None, best: tuple | None, case: str) -> None:
    """Say why ``learned`` is not the merge to come, which is ``best``."""
    counts = tokens.count_pairs(cut)
    require(best is not None, f"{case} should not be there: as many as asked for are learned, or no pair is left")
    should = f"should be {best}, seen {counts[best]} times"
    require(learned is not None, f"{case} {should}, and is missing")
    require(learned in counts, f"{case} is {learned}, which stands nowhere by then: a count was not brought up to date")
    least = f"{case} is {learned}, and {should}"
    require(counts[learned] < counts[best], f"{least} too: of pairs seen as often, the greater goes first")
    once = tokens.count_pairs(dict.fromkeys(cut, 1))
    plainly = once[learned] >= once[best] and max(cut.values()) > 1
    doubt = "does a word count as often as it is in the text, and is every old pair of a merged word taken out?"
    twice = "in aaa the pair of two a's is seen twice, though merged once"
    require(best[0] != best[1] or plainly, f"{least}: {twice}, and the same in longer rows")
    require(False, f"{least}, where {learned} is seen {counts[learned]} times: {doubt}")


def check_work_of_training(fn) -> None:
    """Fail where a merge costs as much as a look at all words, by lines of Python run: not by time."""
    draw = random.Random(1)
    rare = {"".join(draw.choices("uvwxyz", k=draw.randint(5, 7))).encode(): 1 for _ in range(3000)}
    frequent = {"".join(draw.choices("abcdefghij", k=8)).encode(): draw.randint(2000, 9000) for _ in range(40)}
    words = rare | frequent
    start = count_lines(lambda: fn(dict(words), 3))
    reason = (
        f"the merges are right, but too slow: of {len(words)} words only {len(frequent)} hold pairs that are merged, "
        "and yet a merge runs more than a line of Python for every second word: visit only those that hold the pair"
    )
    found = []
    count_lines(lambda: found.extend(fn(dict(words), 53)), start + 50 * len(words) // 2, reason)
    table, expected = tokens.MergeTable(words), []
    for _ in range(53):
        expected.append(table.most_frequent())
        table.merge(expected[-1])
    require([tuple(pair) for pair in found] == expected, f"53 merges of {len(words)} words go wrong")


def count_lines(run, most: float = math.inf, reason: str = "") -> int:
    """How many lines of Python ``run()`` runs, with all that it calls; fail with ``reason`` beyond ``most``."""
    lines, before = 0, sys.gettrace()

    def trace(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        require(lines <= most, reason)
        return trace

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return lines
