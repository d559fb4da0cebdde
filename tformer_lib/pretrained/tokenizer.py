"""The tokenizer of a public model: its tokenizer.json, and how it writes a conversation."""

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from tformer_lib.pretrained.fetch import fetch
from tformer_lib.pretrained.keys import read_object
from tformer_lib.pretrained.templates import RENDERER

Message = Mapping[str, object]
"""A turn of a conversation: ``{"role": "user", "content": "Hello"}``."""

SPACE = "▁"
"""Stands for a space in the vocabularies of SentencePiece."""


class HubEncoding:
    """A public model's tokenizer, with the methods that every encoding here has, and its chat template.

    Args:
        folder: where ``tokenizer.json`` lies, and beside it ``tokenizer_config.json``, ``generation_config.json`` and
            ``chat_template.jinja``, if there are any.

    Raises:
        FileNotFoundError: there is no ``tokenizer.json``.
        ImportError: the tokenizers library is missing; the message says how to install it.
        ValueError: a file is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder, path = Path(folder), Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}")
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ImportError("a tokenizer.json is read by tokenizers: pip install 'tformer-lab[hub]'") from None
        try:
            self.tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"{path} is damaged or of an unknown kind: {error}") from error
        self.settings = read_json(self.folder / "tokenizer_config.json")
        self.switch = threading.Lock()  # of how special tokens are read: the library keeps that in the tokenizer

    def __getstate__(self) -> dict:
        """What is copied and pickled: all but the lock."""
        return {name: value for name, value in self.__dict__.items() if name != "switch"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, switch=threading.Lock())

    def files(self) -> dict[str, bytes]:
        """The files that say all of this, by name: for another folder with the same tokenizer."""
        names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
        return {name: (self.folder / name).read_bytes() for name in names if (self.folder / name).is_file()}

    @property
    def n_vocab(self) -> int:
        """One more than the largest token."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def stop_tokens(self) -> list[int]:
        """The tokens that end a text or a turn, by ``generation_config.json``, or else the config or the tokenizer.

        Raises:
            ValueError: what a file says is no token.
        """
        for name in ("generation_config.json", "config.json"):
            said = read_json(self.folder / name).get("eos_token_id")
            if said is not None:
                ends = said if isinstance(said, list) else [said]
                if not all(type(end) is int and 0 <= end < 2**63 for end in ends):
                    raise ValueError(f"{self.folder / name} says that eos_token_id is {said!r:.40}, which is no token")
                return ends
        end = self.tokenizer.token_to_id(self.special("eos_token") or "")
        return [] if end is None else [end]

    @property
    def eot_token(self) -> int:
        """The first of the tokens that end a text.

        Raises:
            ValueError: no file says which it is.
        """
        if not self.stop_tokens:
            raise ValueError(f"no file in {self.folder} says which token ends a text")
        return self.stop_tokens[0]

    def special(self, name: str) -> str | None:
        """The text of ``bos_token``, ``eos_token`` and the like, if there is one.

        Raises:
            ValueError: what the file says is no text.
        """
        token = self.settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if not isinstance(text, str | None):
            raise ValueError(
                f"{self.folder / 'tokenizer_config.json'} says that {name} is {text!r:.40}, which is no text"
            )
        return text

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        """A text to tokens; what it says of special tokens becomes these, and the model's first token goes before it.

        Args:
            text: any text.
            specials: whether the tokens are added that the tokenizer puts around every text.
        """
        with self.switch:
            self.tokenizer.encode_special_tokens = False
            return self.tokenizer.encode(whole(text), add_special_tokens=specials).ids

    def encode_ordinary(self, text: str) -> list[int]:
        """A text to tokens, nothing added; ``<|im_end|>`` in it is that text, not a token that ends a turn."""
        with self.switch:
            self.tokenizer.encode_special_tokens = True
            return self.tokenizer.encode(whole(text), add_special_tokens=False).ids

    def encode_single_token(self, token: str) -> int:
        """The number of a token that is known by its text.

        Raises:
            KeyError: there is none.
        """
        number = self.tokenizer.token_to_id(token)
        if number is None:
            raise KeyError(token)
        return number

    def decode(self, tokens: Iterable[int]) -> str:
        """Tokens to text, special ones too."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, which may be a part of a character.

        Beside bytes as characters, a token that was added to the vocabulary is the text that it is. Beside pieces it is
        read as all are: Gemma has added runs of spaces.

        Raises:
            KeyError: there is no such token.
        """
        text = self.tokenizer.id_to_token(token)
        if text is None:
            raise KeyError(token)
        if self.is_byte_level:
            is_added = token in self.tokenizer.get_added_tokens_decoder()
            return text.encode() if is_added else bytes(BYTES[character] for character in text)
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes([int(text[3:5], 16)])
        return text.replace(SPACE, " ").encode()

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether the vocabulary writes bytes as characters, as GPT-2's does, instead of SentencePiece's pieces."""
        return '"ByteLevel"' in json.dumps(json.loads(self.tokenizer.to_str()).get("decoder"))

    # conversations

    @cached_property
    def template(self) -> str | None:
        """The chat template, if the model has one.

        Raises:
            ValueError: what a file says is no template.
        """
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        found = self.settings.get("chat_template")
        if isinstance(found, list):  # several, by name
            named = [one for one in found if isinstance(one, dict) and one.get("name") == "default"]
            found = named[0].get("template") if named else None
        if not isinstance(found, str | None):
            raise ValueError(
                f"{self.folder / 'tokenizer_config.json'} has a chat_template that is no text: {found!r:.40}"
            )
        return found

    def render(self, messages: Sequence[Message], *, answer: bool = True, **options) -> str:
        """A conversation as the text that the model was trained to go on with.

        The template is a program by whoever made the checkpoint. It runs in jinja2's sandbox, which lets it change
        nothing and reach nothing outside, and in a process that ends if it takes more than 5 seconds or a gigabyte.

        Args:
            messages: the turns so far.
            answer: whether the beginning of the model's turn stands at the end.
            options: what the template knows besides, such as ``tools`` or ``enable_thinking``.

        Raises:
            ValueError: the model has no chat template, or the template refuses the conversation.
            ImportError: jinja2 is missing.
        """
        if self.template is None:
            raise ValueError(f"{self.folder} has no chat template: this model was not trained to converse")
        known = {name: self.special(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        known = {name: text for name, text in known.items() if text is not None}
        known |= {"messages": messages, "add_generation_prompt": answer, "tools": None, "documents": None, **options}
        return RENDERER.render(self.template, known)

    def encode_chat(self, messages: Sequence[Message], **options) -> list[int]:
        """A conversation as tokens; arguments as for :meth:`render`.

        A turn that says ``<|im_end|>`` writes that token, as in every library: let nobody write turns for others.
        """
        return self.encode(self.render(messages, **options), specials=False)


def whole(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which JSON may bring and UTF-8 cannot write."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_json(path: Path) -> dict:
    """A JSON object, or an empty one if there is no such file.

    Raises:
        ValueError: it is something else.
    """
    return read_object(path) if path.is_file() else {}


def bytes_of_characters() -> dict[str, int]:
    """GPT-2's way to write bytes as characters that can be seen: those that can stay, the others follow from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTES = bytes_of_characters()
"""The byte that each character of a byte-level vocabulary stands for."""


def load_tokenizer(name: str | Path, *, revision: str | None = None) -> HubEncoding:
    """The tokenizer of a folder, or of a model on the hub: see :func:`tformer_lib.pretrained.from_hub`."""
    return HubEncoding(fetch(name, revision))
