"""Files that a corpus or an encoding is made of: text, JSON, and what is downloaded, each checked."""

import hashlib
import json
import urllib.request
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

SECONDS_TO_CONNECT = 10


class CorpusError(ValueError):
    """Text, a file or a setting that no corpus or encoding can be made from; the message is one line."""


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


def to_json(value: dict) -> bytes:
    """``value`` as readable JSON."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> dict:
    """The JSON object in ``path``."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # brackets in brackets, deeper than Python goes
        raise CorpusError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorpusError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value
