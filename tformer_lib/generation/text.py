"""Text from tokens as they come."""

import codecs
from collections.abc import Sequence

from tformer_lib.tokens import Encoding


class TextStream:
    """Text from tokens as they come: whole characters only, and nothing that might turn out to begin a stop string.

    A token is a piece of bytes. It may end within a character, and a stop string may begin within one token and end
    within another. So what comes out may lag behind, and is never taken back.

    Args:
        encoding: whose tokens they are.
        stop: the text ends before the first of these.
    """

    def __init__(self, encoding: Encoding, stop: Sequence[str] = ()):
        self.encoding, self.stop = encoding, stop
        self.characters = codecs.getincrementaldecoder("utf-8")("replace")
        self.held, self.stopped = "", False

    def push(self, token: int) -> str:
        """The text that is certain after this token, and was not before; tokens past the vocabulary write nothing."""
        data = self.encoding.decode_single_token_bytes(token) if token < self.encoding.n_vocab else b""
        return self._release(self.characters.decode(data))

    def finish(self) -> str:
        """What was held back, where nothing more will come."""
        last = self._release(self.characters.decode(b"", final=True))
        rest, self.held = self.held, ""
        return last + rest

    def _release(self, new: str) -> str:
        text = self.held + new
        found = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if found:
            self.held, self.stopped = "", True
            return text[: min(found)]
        certain = len(text) - max((overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[certain:]
        return text[:certain]


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of the stop string, fewer than all of it."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
