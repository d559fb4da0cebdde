"""The chat of chapter 14: a box in the notebook behind which a model writes, and what one of its heads looks at."""

import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from tformer_lib import pretrained
from tformer_lib.attention import MultiHeadAttention
from tformer_lib.contract import counted
from tformer_lib.generation import Conversation
from tformer_lib.teaching.widgets import FOLDER, Interactive
from tformer_lib.tokens import Encoding

PAUSE = 0.1
"""Seconds between two looks at an answer that is being written: each is a message to the browser."""

MOST_WEIGHTS = 200_000
"""Attention weights that are sent to the browser; a longer answer shows its last tokens alone."""

STYLE = """
.tf-chat .tf-said { margin: 0.25rem 0; padding: 0.4rem 0.7rem; border-radius: 8px; background: var(--tf-raised); white-space: pre-wrap; overflow-wrap: anywhere; }
.tf-chat .tf-mine { margin-left: 2rem; border: 1px solid var(--tf-line); background: transparent; }
.tf-chat .tf-took { margin: 0 0 0.5rem; font-size: 0.85rem; color: var(--tf-muted); }
.tf-chat .tf-text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; }
.tf-chat .tf-word { border-radius: 3px; }
.tf-chat textarea { display: block; width: 100%; margin: 0.25rem 0 0.5rem; font: inherit; color: inherit; background: var(--tf-surface); border: 1px solid var(--tf-line); border-radius: 6px; }
.tf-chat :is(button, select, input, textarea):disabled { opacity: 0.6; cursor: default; }
"""  # noqa: E501


class Chat(Interactive):
    """A conversation with a model that runs in this kernel.

    Args:
        conversation: what is said goes there.
        temperature: of the answers, until the reader moves the slider.
        max_new_tokens: the most tokens of an answer.
        seed: of the random numbers.
        look: the layer and the head whose attention is shown.
    """

    _esm = "\n".join(
        [(FOLDER / name).read_text(encoding="utf-8") for name in ("kit.js", "real_models.js")]
        + ["export default { render: renderChat };", ""]
    )
    _css = (FOLDER / "kit.css").read_text(encoding="utf-8") + STYLE

    def __init__(
        self,
        conversation: Conversation,
        *,
        temperature: float = 0.0,
        max_new_tokens: int = 256,
        seed: int = 0,
        look: tuple[int, int] | None = None,
    ):
        super().__init__(label="Chat: a model that answers from this kernel")
        self.conversation, self.max_new_tokens, self.seed = conversation, max_new_tokens, seed
        self.temperature, self.writer, self.stopping = temperature, None, threading.Event()
        self.heads = heads_of(conversation.model)
        if look is not None and tuple(look) not in self.heads:
            raise ValueError(f"the model has no head {look[1]} with attention weights in layer {look[0]}")
        self.place = look or (self.heads[-1] if self.heads else None)
        self.looked = None
        self.show()
        self.on_msg(lambda _, message, __: self.hear(message))

    def hear(self, message: dict) -> None:
        """Do what the browser asks for; while an answer is being written, nothing but to stop it.

        Args:
            message: ``{"do": "say", "text": ...}``, or one of "stop", "again", "new", "set" (with a temperature),
                "look" (with a place: layer and head), and "hello", which is answered.
        """
        what = message.get("do")
        if what == "hello":
            self.send("here")
        elif what == "stop":
            self.stopping.set()
        elif what == "set":
            self.temperature = float(message["temperature"])
        elif what == "look":
            self.place = tuple(message["place"])
            if not self.busy:
                self.look()
                self.show()
        elif not self.busy:
            self.take_turn(what, message.get("text", ""))

    def take_turn(self, what: str, text: str) -> None:
        """Say something, ask for another answer, or begin anew; an answer is written in a thread of its own."""
        self.looked = None
        try:
            if what == "new":
                self.conversation.clear()
                return self.show()
            said = self.conversation.take_back() if what == "again" else text
            rules = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "seed": self.seed}
            pieces = self.conversation.say(said, **rules)
        except ValueError as error:
            return self.show(note=str(error))
        self.stopping.clear()
        self.show(busy=True)
        self.writer = threading.Thread(target=self.write, args=(pieces,), daemon=True)
        return self.writer.start()

    def write(self, pieces) -> None:
        """Write an answer, and show it as it comes, until it ends or somebody stops it."""
        note, shown = "", 0.0
        try:
            for _ in pieces:
                if time.monotonic() - shown > PAUSE:
                    self.show(busy=True)
                    shown = time.monotonic()
                if self.stopping.is_set():
                    break
            pieces.close()
            self.look()
        except Exception as error:  # nobody would see a traceback of this thread
            note = f"{type(error).__name__}: {error}"
        self.show(note=note)

    @property
    def busy(self) -> bool:
        """Whether an answer is being written."""
        return self.writer is not None and self.writer.is_alive()

    def wait(self) -> None:
        """Until the answer is written."""
        if self.writer is not None:
            self.writer.join()

    def look(self) -> None:
        """Ask the model again for the attention of the chosen head over the last answer."""
        turn = self.conversation.turns[-1] if self.conversation.turns else None
        if turn is None or turn.written == 0 or self.place is None:
            self.looked = None
            return
        rows = min(turn.written, max(1, MOST_WEIGHTS // len(turn.tokens)))
        weights = attention_of(self.conversation.model, turn.tokens, self.place, rows)  # (rows, T)
        start = len(turn.tokens) - rows
        self.looked = {
            "words": [word(self.conversation.encoding, token) for token in turn.tokens],
            "start": start,
            "rows": [[round(x, 3) for x in row[: start + i + 1].tolist()] for i, row in enumerate(weights)],
        }

    def show(self, *, busy: bool = False, note: str = "") -> None:
        """Hand all that is shown to the browser."""
        layer, head = self.place or (0, 0)
        self.data = {
            "turns": [
                {"said": turn.said, "answer": turn.answer, "took": took(turn)} for turn in self.conversation.turns
            ],
            "busy": busy,
            "note": note,
            "temperature": self.temperature,
            "heads": [list(place) for place in self.heads],
            "layer": layer,
            "head": head,
            "look": self.looked,
            "why": "" if self.heads else "no layer of this model keeps attention weights for each head",
        }


def took(turn) -> str:
    """What a turn took, in words."""
    speed = f", {turn.tokens_per_second:.0f} tokens a second" if turn.tokens_per_second else ""
    return f"{counted(turn.read, 'token')} read, {turn.written} written{speed}"


def word(encoding: Encoding, token: int) -> str:
    """A token's text; a piece of a character has a sign in its place, and a token past the vocabulary has none."""
    if token >= encoding.n_vocab:
        return ""
    return encoding.decode_single_token_bytes(token).decode("utf-8", "replace")


def heads_of(model: nn.Module) -> list[tuple[int, int]]:
    """(layer, head) of all heads that weigh tokens: those of linear and latent attention hand out no weights."""
    layers = [block.attention for block in model.stack.blocks]
    kinds = [(i, layer) for i, layer in enumerate(layers) if type(layer) is MultiHeadAttention]
    return [(i, head) for i, layer in kinds for head in range(layer.heads)]


@torch.no_grad()
def attention_of(model: nn.Module, tokens: list[int], place: tuple[int, int], rows: int) -> Tensor:
    """The attention weights of one head, by the layer's own form with all that the model adds to it.

    Attention makes a weighted mean of the values. Where the values are the rows of an identity matrix, the mean is
    the weights themselves, whatever the form is.

    Args:
        model: a ``Decoder``.
        tokens: T of them.
        place: layer and head.
        rows: how many of the last tokens ask.

    Returns:
        (rows, T) float32.
    """
    layer, head = place
    attention, found = model.stack.blocks[layer].attention, []

    def form(bias: Tensor | None = None):
        whole = type(attention).form(attention, bias)

        def attend(q, k, v, **options):
            one = torch.eye(k.shape[2], dtype=v.dtype, device=v.device).expand(*k.shape[:2], -1, -1)
            found.append(whole(q[:, :, -rows:], k, one, **options)[0, head].float())
            return whole(q, k, v, **options)

        return attend

    attention.form = form
    try:
        model(torch.tensor([tokens], device=next(model.parameters()).device))
    finally:
        del attention.form
    return found[0].cpu()


def chat(
    model: nn.Module | str | Path = "stories", encoding: Encoding | None = None, *, say: str | None = None, **options
) -> Chat:
    """A box to converse with a model in JupyterLab: stop it, ask again, and see what a head looks at.

    The model answers from the running kernel. A page without one shows the conversation as it was recorded.

    Args:
        model: a ``Decoder``, or what :func:`tformer_lib.pretrained.load` loads; by default the small model that comes
            with the library, which has no chat template and goes on with the story.
        encoding: of a model that is given itself.
        say: a first turn, whose answer is waited for.
        options: of :class:`Chat`: temperature, max_new_tokens, seed, look.

    Raises:
        ValueError: there is no such model, or it comes without its encoding.
    """
    if isinstance(model, str | Path):
        model, encoding = pretrained.load(model)
    elif encoding is None:
        raise ValueError("a model that is given itself needs its encoding: chat(model, encoding)")
    box = Chat(Conversation(model, encoding), **options)
    if say is not None:
        box.hear({"do": "say", "text": say})
        box.wait()
    return box
