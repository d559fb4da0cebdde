"""The exercises of the KV cache chapter."""

import torch

from tformer_lib import masks
from tformer_lib.attention import attend
from tformer_lib.contract import counted
from tformer_lib.kv_cache import CacheShape, RingCache
from tformer_lib.teaching.exercises.attention import BELOW, far_below_zero
from tformer_lib.teaching.exercises.engine import (
    INVERTED,
    exercise,
    require,
    require_close,
    require_dtype,
    require_integer,
    require_shape,
)


@exercise(
    "kv_cache.tokens_that_fit",
    title="How many tokens fit?",
    hints=(
        "Count the bytes of one token first: which tensors does each layer keep for it, and of what shape?",
        "A key and a value, in every layer, for every kv head (not for every query head), head_dim numbers each.",
        "memory // (2 * layers * kv_heads * head_dim * itemsize): a token fits wholly or not at all.",
    ),
)
def check_tokens_that_fit(fn):
    cases = (
        ((80 * 2**30, 32, 32, 32, 128, 2), 163_840, "Llama 2 7B"),
        ((80 * 2**30, 32, 32, 8, 128, 2), 655_360, "Llama 3 8B, whose 32 query heads share 8 kv heads"),
        ((80 * 2**30, 80, 64, 8, 128, 2), 262_144, "Llama 3 70B, which has 80 layers"),
        ((1_000_000, 12, 12, 12, 64, 2), 27, "GPT-2 with a megabyte"),
        ((36_863, 12, 12, 12, 64, 2), 0, "a memory that is one byte short of a token"),
        ((1_000_000, 12, 12, 12, 64, 4), 13, "GPT-2 in float32 with a megabyte"),
        ((1_000_000, 30, 9, 3, 64, 1), 86, "a small model whose numbers take a byte"),
    )
    memory, layers, heads, kv_heads, head_dim, _ = cases[0][0]
    require(
        fn(memory, layers, heads, kv_heads, head_dim, 2) != fn(memory, layers, heads, kv_heads, head_dim, 4),
        "numbers of 4 bytes take more memory than those of 2, and you find room for as many tokens",
    )
    for arguments, expected, name in cases:
        found = require_integer(fn(*arguments), f"{name}: the number of tokens")
        per_head = arguments[0] // (2 * arguments[1] * arguments[2] * arguments[4] * arguments[5])
        require(
            found == expected or found != per_head,
            f"{name}: {found:,} would fit if each query head kept keys and values, expected {expected:,}",
        )
        require(
            found != 2 * expected or not expected, f"{name}: {found:,} is twice too many: a value goes with each key"
        )
        require(found == expected, f"{name}: {found:,} tokens, expected {expected:,}")


@exercise(
    "kv_cache.step",
    title="Attention with a cache",
    hints=(
        "Append the new keys and values along the axis of the length, which is the third.",
        "With several new tokens, the first of them must not see the last: which mask is aligned to the last key?",
        "masks.causal(T, S) with S the length after appending; or attend(..., causal=True), which is aligned so.",
    ),
)
def check_step(fn):
    generator = torch.Generator().manual_seed(0)
    check_steps(fn, *torch.randn(3, 2, 4, 9, 8, generator=generator))
    check_steps(fn, *torch.randn(3, 1, 3, 9, 5, generator=generator))
    q, k = far_below_zero((1, 2), 9, 9)
    held, new = slice(0, 6), slice(6, 9)
    out, *_ = fn(q[:, :, new], k[:, :, new], k[:, :, new], k[:, :, held], k[:, :, held])
    wanted = attend(q, k, k, causal=True)[:, :, new]
    require_close(out, wanted, f"with all scores near -16,000, the output differs: {BELOW}", name="the output")


def check_steps(fn, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Feed nine tokens in pieces, and hold the outputs against one pass."""
    batch, heads, _, head_dim = q.shape
    wanted = attend(q, k, v, causal=True)
    keys, values = k[:, :, :3], v[:, :, :3]
    for start, stop in ((3, 4), (4, 7), (7, 9)):
        new = slice(start, stop)
        answer = fn(q[:, :, new], k[:, :, new], v[:, :, new], keys, values)
        require(
            isinstance(answer, (tuple, list)) and len(answer) == 3,
            "return three things: the output, all keys, all values",
        )
        out, keys, values = answer
        require_close(
            keys, k[:, :, :stop], "the keys returned are not the old ones followed by the new", name="the keys"
        )
        require_close(values, v[:, :, :stop], "the values are not the old ones followed by the new", name="the values")
        require_shape(out, (batch, heads, stop - start, head_dim), "the output")
        keys, values = keys.detach().to(k.dtype), values.detach().to(v.dtype)  # they go into the next step
        explain_step(out, q[:, :, new], k[:, :, :stop], v[:, :, :stop], start)
        for t in range(stop - start):
            place = f"with {counted(start, 'token')} cached and {stop - start} new, the new token {t}"
            require_close(
                out[:, :, t], wanted[:, :, start + t], f"{place} does not see exactly the tokens up to itself"
            )


def explain_step(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, held: int) -> None:
    """Name the usual mistakes in what the T new queries see of the S keys, ``held`` of them old."""
    T, S = q.shape[2], k.shape[2]
    mistakes = {
        "the scores are not divided by sqrt(head_dim)": attend(q, k, v, causal=True, scale=1.0),
        "the new tokens do not see themselves: append first, then look": attend(q, k[:, :, :held], v[:, :, :held]),
        "the mask is aligned to the first key: new token 0 sees one key, and not all that are cached": attend(
            q, k, v, mask=masks.causal(S)[:T]
        ),
    }
    if T > 1:
        mistakes[f"of {counted(T, 'new token')}, the first sees the last: the future leaks"] = attend(q, k, v)
    for words, wrong in mistakes.items():
        require(not torch.allclose(out, wrong.to(out.dtype), atol=1e-4), words)


@exercise(
    "kv_cache.visible",
    title="The mask of a ragged batch",
    hints=(
        "Row b holds lengths[b] tokens; where does its new query t stand?",
        "At position lengths[b] + t. It may see the slots up to there, of the S slots there are.",
        "(torch.arange(S) <= (lengths[:, None] + torch.arange(T))[:, :, None])[:, None]",
    ),
)
def check_visible(fn):
    for lengths, T, S in (([3, 0, 5], 1, 8), ([2, 4], 3, 7), ([0], 4, 4)):
        mask = fn(torch.tensor(lengths), T, S)
        name = f"the mask for lengths {lengths}, T = {T}, S = {S}"
        require_shape(mask, (len(lengths), 1, T, S), name)
        require_dtype(mask, torch.bool, name)
        wanted = torch.arange(S) <= torch.tensor(lengths)[:, None, None] + torch.arange(T)[:, None]  # (batch, T, S)
        require(not torch.equal(mask[:, 0], ~wanted), f"{name} {INVERTED}")
        for b, length in enumerate(lengths):
            for t in range(T):
                seen = mask[b, 0, t].nonzero().flatten().tolist()
                if seen != list(range(length + t + 1)):
                    require(False, explain(b, t, length, seen))


def explain(b: int, t: int, length: int, seen: list[int]) -> str:
    """What is wrong with the slots that a query sees."""
    last = length + t
    beyond = [slot for slot in seen if slot > last]
    missing = [slot for slot in range(last + 1) if slot not in seen]
    fault = f"sees slot {beyond[0]}, which is not its past" if beyond else f"does not see slot {missing[0]}"
    return f"row {b} holds {length} tokens, so its new query {t} stands at position {last}, but it {fault}"


@exercise(
    "kv_cache.slot",
    title="The slot of a token in a ring",
    hints=(
        "The first `sinks` positions keep their own slots for good. What is left for the others?",
        "`window` slots behind the sinks, used round and round: count positions from the first that is no sink.",
        "position if position < sinks else sinks + (position - sinks) % window",
    ),
)
def check_slot(fn):
    for window, sinks in ((4, 2), (3, 0), (1, 1), (5, 4), (2, 5)):
        ring = RingCache(CacheShape(1, 1, 1, 2), window, sinks)
        place = f"window = {window}, sinks = {sinks}"
        for position in range(4 * (window + sinks)):
            found, expected = fn(position, window, sinks), int(ring.slot(torch.tensor(position)))
            found = require_integer(found, f"{place}: the slot of position {position}")
            require(
                0 <= found < window + sinks, f"{place}: position {position} goes to slot {found}, which does not exist"
            )
            if position >= sinks:
                require(found >= sinks, f"{place}: position {position} overwrites the sink in slot {found}")
            require(found == expected, f"{place}: position {position} goes to slot {found}, expected {expected}")


class CountedModel:
    """A large model whose logits follow from the tokens that its cache holds; it counts passes and positions.

    Like a real one it does not notice what is wrong in its cache: it goes on writing from there.
    """

    vocabulary, most = 48, 200

    def __init__(self, text: list[int]):
        self.tokens, self.passes, self.held = list(text), [], []

    def __call__(self, tokens: torch.Tensor, *, cache: "CountedModel") -> torch.Tensor:
        require(cache is self, "give the model the cache that came with it: model(tokens, cache=cache)")
        tokens = torch.as_tensor(tokens)
        require(
            tokens.ndim == 2 and tokens.shape[0] == 1 and tokens.shape[1] > 0,
            f"the model takes tokens of shape (1, T) with T at least 1, and got {tuple(tokens.shape)}",
        )
        require(len(self.passes) < self.most, f"{self.most} passes, and still no end: what if no guess is accepted?")
        self.held.append(list(self.tokens))
        self.passes.append(tokens[0].tolist())
        start = len(self.tokens)
        self.tokens += tokens[0].tolist()
        return torch.stack([self.logits(self.tokens[: i + 1]) for i in range(start, len(self.tokens))])[None]

    @classmethod
    def logits(cls, text: list[int]) -> torch.Tensor:
        """(vocabulary,) of the token that follows a text: any change of the text changes them."""
        state = 7
        for token in text:
            state = (state * 1_000_003 + token + 1) % (2**31 - 1)
        return torch.randn(cls.vocabulary, generator=torch.Generator().manual_seed(state))

    @property
    def lengths(self) -> torch.Tensor:
        """(1,) tokens held, as the library's caches say it."""
        return torch.tensor([len(self.tokens)])

    def truncate(self, lengths) -> None:
        """Forget all but the first lengths[0] tokens."""
        (length,) = [int(n) for n in lengths]
        held = len(self.tokens)
        require(0 <= length <= held, f"truncate([{length}]), but the cache holds {held} tokens: it can only be cut")
        del self.tokens[length:]


def greedy(text: list[int], count: int) -> list[int]:
    """The next ``count`` tokens that the counted model writes, one at a time."""
    text, start = list(text), len(text)
    for _ in range(count):
        text.append(int(CountedModel.logits(text).argmax()))
    return text[start:]


def drafter(luck: int):
    """A draft that guesses like the large model, but wrong at some places: ``luck`` of 12 guesses are right.

    After some texts it has no guess at all, unless it is always right.
    """

    def draft(text, n):
        text, start = [int(token) for token in text], len(text)
        for _ in range(n if luck == 12 or sum(text) % 5 else 0):
            (right,) = greedy(text, 1)
            wrong = (31 * sum(text) + 7 * len(text)) % 12 >= luck
            text.append((right + wrong) % CountedModel.vocabulary)
        return text[start:]

    return draft


def passes_needed(text: list[int], count: int, draft, n: int) -> int:
    """How many passes write ``count`` tokens, if each accepts all it can and adds a token of its own."""
    wanted, done, passes = greedy(text, count), 0, 0
    while done < count:
        guesses = draft(text + wanted[:done], n)
        right = [a == b for a, b in zip(guesses, wanted[done:], strict=False)]
        done, passes = done + [*right, False].index(False) + 1, passes + 1
    return passes


@exercise(
    "kv_cache.speculate",
    title="Speculative decoding",
    hints=(
        "Keep one thing true: before each pass the cache holds the text but for its last token. So a pass takes that "
        "token and the guesses behind it.",
        "Row i of the logits says what follows guess i - 1, and row 0 what follows the text. So there is one row more "
        "than there are guesses: what is the last one good for?",
        "A guess is worth something only if all guesses before it were right. Count up to the first that is not; the "
        "row at which you stop gives the next token, right or wrong guess alike.",
        "With a guesses accepted the text has grown by a + 1. Cut the cache to one less than the text, and ask for no "
        "more guesses than still fit.",
    ),
)
def check_speculate(fn):
    cases = [(0, 6, 3), (12, 12, 3), (12, 1, 4), (8, 20, 1)]
    cases += [(6, 20, 4), (9, 23, 5), (10, 17, 2), (11, 15, 8), (9, 24, 4)]
    for luck, count, n in cases:
        prompt = torch.randint(CountedModel.vocabulary, (3 + count % 4,)).tolist()
        model, text, draft = CountedModel(prompt[:-1]), list(prompt), drafter(luck)
        written = fn(model, model, draft, text, count, n)
        require(written is not None, "your function returns None: is a return missing?")
        require(text == prompt, "your function changes the caller's text: work on a copy")
        written, wanted = [require_integer(token, "a new token") for token in written], greedy(prompt, count)
        name = f"a prompt of {len(prompt)} tokens, {count} to write, {n} guesses at a time"
        require(written[: len(prompt)] != prompt or written == wanted, f"{name}: return the new tokens alone")
        explain_cache(model, prompt + written, name)
        explain_tokens(model, len(prompt), written, wanted, name)
        require(len(written) == count, f"{name}: you return {counted(len(written), 'token')}")
        explain_passes(model, len(prompt), count, passes_needed(prompt, count, draft, n), name)
        require(
            len(model.tokens) < len(prompt) + count or model.tokens == prompt + wanted,
            f"{name}: at the end the cache holds {len(model.tokens)} tokens, more than the text has",
        )


def explain_cache(model: CountedModel, text: list[int], name: str) -> None:
    """Hold what the cache held before each pass, and the pass's first token, against the text that was written."""
    for number, (held, tokens) in enumerate(zip(model.held, model.passes, strict=True), 1):
        pairs = zip(held, text, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        require(
            place is None,
            f"{name}: when pass {number} begins, the cache holds a token at place {place} that your text does not have "
            "there, a rejected guess: cut it back",
        )
        require(
            len(held) >= len(text) or tokens[0] == text[len(held)],
            f"{name}: pass {number} starts at place {len(held)} with another token than your text has there: "
            "the cache was cut to the wrong length, or the pass starts with the wrong token",
        )


def explain_tokens(model: CountedModel, known: int, written: list[int], wanted: list[int], name: str) -> None:
    """Say whether the first wrong token is a guess that was believed, or another row's."""
    place = next((i for i, (a, b) in enumerate(zip(written, wanted, strict=False)) if a != b), None)
    if place is None:
        return
    ahead = [(known + place - len(held), tokens) for held, tokens in zip(model.held, model.passes, strict=True)]
    why = "which row of the logits says what follows the last accepted guess?"
    if any(0 < i < len(tokens) and tokens[i] == written[place] for i, tokens in ahead):
        why = "a wrong guess was accepted. Does each row judge the guess behind it, and did you stop at the first miss?"
    require(False, f"{name}: new token {place} is {written[place]}, and greedy decoding writes {wanted[place]}: {why}")


def explain_passes(model: CountedModel, known: int, count: int, needed: int, name: str) -> None:
    """Say why there were more passes, or longer ones, than the draft asks for."""
    passes = len(model.passes)
    why = "each pass gives the accepted guesses and one token more, also where all were right or none"
    if passes == count and needed < count:
        why = "that is one for each token: verify all guesses in one pass"
    require(passes <= needed, f"{name}: the right text, but in {passes} passes, and {needed} are enough: {why}")
    require(passes >= needed, f"{name}: passes: {passes}, needed: {needed}; the text cannot come from the model")
    again = [number for number, held in enumerate(model.held, 1) if len(held) < known - 1]
    require(not again, f"{name}: pass {again[0] if again else 0} computes the prompt again, which was in the cache")
