"""Corpora: text as token ids in a folder, made whole, and checked when it is opened."""

import hashlib
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from tformer_lib import stories as grammar
from tformer_lib.checkpoint import build, locked, settle, write_atomically, write_together
from tformer_lib.command_line import named
from tformer_lib.stories import stories
from tformer_lib.tokens.bpe import END_OF_TEXT, train_bpe
from tformer_lib.tokens.encoding import (
    Encoding,
    characters,
    encode_special,
    encoding_files,
    gpt2,
    load_encoding,
    pieces,
)
from tformer_lib.tokens.files import CorpusError, download, read_json, read_text, sha256_of, to_json

SHAKESPEARE_ADDRESS = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FORMAT = "tformer corpus 1"
ENCODING_FILES = {"encoding.json", "encoding.tiktoken"}


def shakespeare() -> str:
    """The char-rnn Shakespeare, 1,115,394 characters, downloaded once into ``$TFORMER_DATA`` (``data`` by default)."""
    place = Path(os.environ.get("TFORMER_DATA", "data")) / "tinyshakespeare.txt"
    if not place.exists():
        data = download(SHAKESPEARE_ADDRESS, SHAKESPEARE_SHA256, otherwise=f"put a copy of it at {place}")
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, data)
    text = read_text(place)
    if sha256_of(text.encode()) != SHAKESPEARE_SHA256:
        raise CorpusError(f"{place} is not the char-rnn Shakespeare (SHA-256 {SHAKESPEARE_SHA256}); move it away")
    return text


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
    overwrite: bool = False
    """Replace another corpus that the folder holds."""

    @property
    def folder(self) -> Path:
        """Where the corpus goes."""
        return named("out", self.out) if self.out is not None else Path("data") / Path(self.corpus).stem


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
        settle(folder)
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
    try:
        return build(Meta, facts, str(path))
    except ValueError as error:
        raise CorpusError(str(error)) from None


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

    A corpus that the folder holds already is replaced as one, and only where ``config.overwrite`` says so.

    A corpus of stories begins with the end-of-text token, and each story ends with one. So every token but the first is
    a prediction whose probability the grammar knows.
    """
    named("corpus", config.corpus)
    check_place(config, corpus=config.corpus, tokenizer=config.tokenizer)
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
    contents = {**bins, **encoding_files(encoding), "meta.json": to_json(asdict(meta))}
    config.folder.mkdir(parents=True, exist_ok=True)
    with locked(config.folder):
        check_place(config, **asdict(meta))
        write_together(config.folder, contents, without=ENCODING_FILES - contents.keys())
    return Corpus.load(config.folder)


def check_place(config: CorpusConfig, **facts) -> None:
    """Refuse a folder that holds a corpus of which other facts are true, unless it may be overwritten.

    Raises:
        CorpusError: the message names the first fact that differs.
    """
    settle(config.folder)
    path = config.folder / "meta.json"
    if config.overwrite or not path.exists():
        return
    theirs = read_json(path)
    for name, value in facts.items():
        if theirs.get(name) != value:
            there = f"its {name} is {theirs.get(name)!r}, yours {value!r}"
            raise CorpusError(f"{config.folder} holds another corpus ({there}): choose another --out, or --overwrite")


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
        raise CorpusError(f"the number of stories, {config.stories}, is too small to split by {config.val_fraction}")
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


def summary(corpus: Corpus) -> str:
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
