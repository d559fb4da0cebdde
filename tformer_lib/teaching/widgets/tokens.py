"""The merge stepper of chapter 01: byte-pair encoding, one merge at a time."""

from collections import Counter

from tformer_lib.teaching.widgets import Interactive, module
from tformer_lib.tokens import count_pairs, merge_pair


class MergeStepper(Interactive):
    """Step through the merges of a small text: the counts before each, and the words after it."""

    _esm = module("tokens.js")


def merge_stepper(text: str, merges: int, shown: int = 6) -> MergeStepper:
    """The stepper for the words of ``text``, which are those between spaces.

    Args:
        text: ASCII.
        merges: how many steps, or fewer where no pair is left.
        shown: how many pairs are listed, most frequent first.
    """
    words = {tuple(bytes([b]) for b in word.encode()): times for word, times in Counter(text.split()).items()}
    steps = [{"words": spelled(words), "pairs": [], "merged": None}]
    while len(steps) <= merges and (counts := count_pairs(words)):
        ranked = sorted(counts, key=lambda pair: (counts[pair], pair), reverse=True)
        words = {merge_pair(word, ranked[0]): times for word, times in words.items()}
        pairs = [[left.decode(), right.decode(), counts[left, right]] for left, right in ranked[:shown]]
        steps.append({"words": spelled(words), "pairs": pairs, "merged": (ranked[0][0] + ranked[0][1]).decode()})
    return MergeStepper(label="Merge stepper: byte-pair encoding of a small text", data={"steps": steps})


def spelled(words: dict[tuple[bytes, ...], int]) -> list:
    """The words as JSON: [[times, [token, ...]], ...]."""
    return [[times, [token.decode() for token in word]] for word, times in words.items()]
