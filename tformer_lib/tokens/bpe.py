"""Byte-level BPE: how a vocabulary is learned, as its definition reads and fast."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import regex
import tiktoken

from tformer_lib.tokens.files import CorpusError

END_OF_TEXT = "<|endoftext|>"

# How GPT-4 (tiktoken's cl100k_base) and GPT-2 cut text into pre-tokens; no merge crosses a cut. From tiktoken (MIT).
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

Pair = tuple[bytes, bytes]


@dataclass(frozen=True)
class BPE:
    """A learned byte-level vocabulary.

    Attributes:
        vocab: the bytes of each token: ids 0 to 255 are the single bytes, then one id a merge, then the special tokens.
        merges: the pairs of tokens merged, in the order learned.
        special_tokens: the id of each special token.
        pattern: the regular expression that cuts text into pre-tokens.
    """

    vocab: dict[int, bytes]
    merges: list[Pair]
    special_tokens: dict[str, int]
    pattern: str

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        """The vocabulary as a ``tiktoken.Encoding``: ``encode``, ``decode``, ``n_vocab``, ``eot_token`` ..."""
        special_ids = set(self.special_tokens.values())
        return tiktoken.Encoding(
            f"bpe-{len(self.vocab)}",
            pat_str=self.pattern,
            mergeable_ranks={token: i for i, token in self.vocab.items() if i not in special_ids},
            special_tokens=self.special_tokens,
        )


def train_bpe(
    text: str, vocab_size: int, special_tokens: Iterable[str] = (END_OF_TEXT,), pattern: str = GPT4_PATTERN
) -> BPE:
    """Learn a vocabulary of ``vocab_size`` tokens from ``text`` (Sennrich et al. 2016, on bytes as GPT-2 does).

    Start from the 256 bytes. Then, again and again, merge the pair of neighbouring tokens that is seen most often; of
    pairs seen equally often, the one whose two byte strings compare greater. It stops early where no pair is left.
    Pairs are counted within pre-tokens, so no merge crosses a cut of ``pattern`` or a special token. A pair that spells
    a token already learned is merged without a new id: tiktoken, which knows tokens by their bytes, does the same.

    The counts are kept up to date merge by merge (``MergeTable``), which gives what ``train_bpe_plain`` gives.

    Raises:
        CorpusError: ``vocab_size`` has no room for 256 bytes and the special tokens, or there is no text.
    """
    special_tokens = list(special_tokens)
    merge_count = room_for_merges(vocab_size, special_tokens)
    table = MergeTable(count_words(text, special_tokens, pattern))
    tokens, merges = single_bytes(), []
    while len(tokens) < 256 + merge_count and (pair := table.most_frequent()):
        table.merge(pair)
        merges.append(pair)
        tokens.setdefault(b"".join(pair), len(tokens))
    return finish(tokens, merges, special_tokens, pattern)


def train_bpe_plain(
    text: str, vocab_size: int, special_tokens: Iterable[str] = (END_OF_TEXT,), pattern: str = GPT4_PATTERN
) -> BPE:
    """``train_bpe`` as its definition reads: every pair of the text is counted anew before every merge.

    It takes time proportional to merges times text, and is the oracle of the fast one.
    """
    special_tokens = list(special_tokens)
    merge_count = room_for_merges(vocab_size, special_tokens)
    words = {tuple(bytes([b]) for b in word): n for word, n in count_words(text, special_tokens, pattern).items()}
    tokens, merges = single_bytes(), []
    while len(tokens) < 256 + merge_count and (counts := count_pairs(words)):
        pair = max(counts, key=lambda pair: (counts[pair], pair))
        words = {merge_pair(word, pair): n for word, n in words.items()}
        merges.append(pair)
        tokens.setdefault(b"".join(pair), len(tokens))
    return finish(tokens, merges, special_tokens, pattern)


def count_pairs(words: dict[tuple[bytes, ...], int]) -> Counter:
    """How often each pair of neighbours is seen in ``words`` (word as a tuple of tokens -> times it is in the text)."""
    counts = Counter()
    for word, times in words.items():
        for pair in pairwise(word):
            counts[pair] += times
    return counts


def merge_pair(word: tuple[bytes, ...], pair: Pair) -> tuple[bytes, ...]:
    """``word`` with each ``pair`` of neighbours, found left to right, made one token."""
    merged, i = [], 0
    while i < len(word):
        step = 2 if word[i : i + 2] == pair else 1
        merged.append(b"".join(word[i : i + step]))
        i += step
    return tuple(merged)


def room_for_merges(vocab_size: int, special_tokens: list[str]) -> int:
    """How many tokens are left to learn beside the bytes and the special tokens."""
    least = 256 + len(special_tokens)
    if "" in special_tokens or len(set(special_tokens)) < len(special_tokens):
        raise CorpusError(f"special tokens must be different and not empty, got {special_tokens}")
    if vocab_size < least:
        raise CorpusError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens need {least}"
        )
    return vocab_size - least


def count_words(text: str, special_tokens: list[str], pattern: str) -> Counter[bytes]:
    """How often each pre-token, as UTF-8 bytes, is in ``text`` between the special tokens."""
    if not text:
        raise CorpusError("the corpus is empty: there is no text to learn from")
    words = Counter()
    for part in split_special(text, special_tokens)[::2]:
        words.update(found[0] for found in regex.finditer(pattern, part))
    try:
        return Counter({word.encode(): times for word, times in words.items()})
    except UnicodeEncodeError as error:
        raise CorpusError(f"the corpus holds {error.object[error.start]!a}, half of a surrogate pair") from None


def split_special(text: str, special_tokens: Iterable[str]) -> list[str]:
    """``text`` cut at the special tokens: text, special, text, ..., text; of those that start alike, at the longest."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.split(f"({'|'.join(map(regex.escape, longest_first))})", text) if longest_first else [text]


def single_bytes() -> dict[bytes, int]:
    """The vocabulary before any merge: each byte and its id."""
    return {bytes([b]): b for b in range(256)}


def finish(tokens: dict[bytes, int], merges: list[Pair], special_tokens: list[str], pattern: str) -> BPE:
    """The BPE of what was learned, special tokens last."""
    special_ids = {token: len(tokens) + i for i, token in enumerate(special_tokens)}
    vocab = {i: token for token, i in tokens.items()} | {i: token.encode() for token, i in special_ids.items()}
    return BPE(vocab, merges, special_ids, pattern)


class MergeTable:
    """The tokens of the distinct words, laid end to end in cells, and how often each pair of neighbours is seen.

    A merge visits only the cells that are listed for its pair. A cell is listed once for each of the bytes at first and
    at most twice more for each join, and every join leaves one cell less. So all merges together make fewer visits than
    three times the bytes of the distinct words, however many merges there are.
    """

    def __init__(self, words: dict[bytes, int]):
        # Cell 0 holds no token: it stands before the first and after the last token of every word.
        self.token = [b""]  # the token that begins at each cell; empty once the cell before has taken it in
        self.before = [0]  # the cell of the neighbouring token, on either side
        self.after = [0]
        self.times = [0]  # how often the cell's word is in the text
        self.count = defaultdict(int)  # pair -> times seen in the text, exact
        self.cells = defaultdict(list)  # pair -> cells where it began when it was found; some have changed since
        self.heap = []  # (-count, ...) of every pair, where the count may have fallen since
        for word, times in words.items():
            self.lay_out(word, times)
        for pair in self.count:
            self.push(pair)

    def lay_out(self, word: bytes, times: int) -> None:
        """Put the bytes of ``word`` in new cells."""
        first = len(self.token)
        last = first + len(word) - 1
        self.token += [bytes([b]) for b in word]
        self.before += [0, *range(first, last)]
        self.after += [*range(first + 1, last + 1), 0]
        self.times += [times] * len(word)
        for cell in range(first, last):
            self.found((self.token[cell], self.token[cell + 1]), cell)

    def found(self, pair: Pair, cell: int) -> None:
        """Count ``pair``, which begins at ``cell``."""
        self.count[pair] += self.times[cell]
        self.cells[pair].append(cell)

    def push(self, pair: Pair) -> None:
        """Offer ``pair`` to ``most_frequent`` with its count of now; the heap's least is the greatest pair."""
        heapq.heappush(self.heap, (-self.count[pair], descending(pair[0]), descending(pair[1]), pair))

    def most_frequent(self) -> Pair | None:
        """The pair seen most often, of equals the greatest; None where no pair is left.

        Lazily: a count that fell is noticed only here, when its pair comes up, and the pair goes back with the new one.
        """
        while self.heap:
            promised, _, _, pair = heapq.heappop(self.heap)
            if -promised == self.count[pair] > 0:
                return pair
            if self.count[pair] > 0:
                self.push(pair)
        return None

    def merge(self, pair: Pair) -> None:
        """Make one token of each ``pair``, left to right, and bring the counts of the pairs around it up to date."""
        left, right = pair
        joined, born = left + right, set()
        for cell in sorted(self.cells.pop(pair)):
            other = self.after[cell]
            if self.token[cell] != left or self.token[other] != right:
                continue
            previous, following = self.before[cell], self.after[other]
            self.token[cell], self.token[other] = joined, b""
            self.after[cell], self.before[following] = following, cell
            if previous:
                self.count[self.token[previous], left] -= self.times[cell]
                born.add((self.token[previous], joined))
                self.found((self.token[previous], joined), previous)
            if following:
                self.count[right, self.token[following]] -= self.times[cell]
                born.add((joined, self.token[following]))
                self.found((joined, self.token[following]), cell)
        del self.count[pair]
        for new in born:
            self.push(new)


def descending(token: bytes, flip: bytes = bytes(range(255, -1, -1))) -> str:
    """A key that sorts tokens from greatest to least; the last character makes a longer token come before its start."""
    return token.translate(flip).decode("latin-1") + "\u0100"
