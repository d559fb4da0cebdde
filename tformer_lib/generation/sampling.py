"""The rules by which the next token is chosen from the logits."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from tformer_lib.contract import counted


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits. The rules apply in the order of the fields that follow ``seed``.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    temperature: float = 0.0
    """What logits are divided by; 0 always takes the most likely token (greedy)."""
    seed: int | Sequence[int] = 0
    """Row i draws from a stream seeded with seed + i, or with seed[i]."""
    repetition_penalty: float = 1.0
    """Logits of tokens seen in the row are divided by it where positive, else multiplied (Keskar et al. 2019, CTRL)."""
    top_k: int | None = None
    """Keep the k most likely tokens (Fan et al. 2018)."""
    top_p: float | None = None
    """Keep the fewest tokens whose probabilities add up to top_p (the nucleus; Holtzman et al. 2020)."""
    min_p: float | None = None
    """Keep tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024)."""

    def __post_init__(self):
        for name, kind, wanted, holds in RANGES:
            value = getattr(self, name)
            if value is None and name in ("top_k", "top_p", "min_p"):
                continue
            number = check_number(name, value, kind)
            if not all(map(holds, (number, float32(number)) if isinstance(number, float) else (number,))):
                raise ValueError(f"{name} must be {wanted}, got {value}")
            object.__setattr__(self, name, number)
        if isinstance(self.seed, Sequence) and not isinstance(self.seed, str):
            seed = tuple(check_number("each seed", seed, numbers.Integral) for seed in self.seed)
        elif isinstance(self.seed, numbers.Integral):
            seed = int(self.seed)
        else:
            raise ValueError(f"seed must be a whole number, or one for each prompt, got {self.seed!r}")
        object.__setattr__(self, "seed", seed)


RANGES = (
    ("temperature", numbers.Real, "at least 0 and finite in float32", lambda x: 0 <= x < math.inf),
    ("repetition_penalty", numbers.Real, "greater than 0 and finite in float32", lambda x: 0 < x < math.inf),
    ("top_k", numbers.Integral, "at least 1", lambda x: x >= 1),
    ("top_p", numbers.Real, "in (0, 1]", lambda x: 0 < x <= 1),
    ("min_p", numbers.Real, "in [0, 1]", lambda x: 0 <= x <= 1),
)
"""What the fields of :class:`Sampling` may be, both as they are and as float32, in which they meet the logits."""


def check_number(name: str, value, kind: type) -> int | float:
    """The value as an int (``numbers.Integral``) or as a float (``numbers.Real``), as which it will be used.

    Raises:
        ValueError: it is no number of that kind, or larger than a float can be.
    """
    whole = kind is numbers.Integral
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{name} must be a {'whole ' if whole else ''}number, got {value!r}")
    try:
        return int(value) if whole else float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite in float32, got a number past what floats can say") from None


def float32(number: float) -> float:
    """The number as it is in float32: too large a one is infinite, too small a one is 0."""
    return torch.tensor(number, dtype=torch.float32).item()


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less likely.

    Args:
        logits: (batch, vocab_size).
        seen: (batch, vocab_size) boolean, True for tokens of the prompt and of the text so far.
        penalty: above 1 discourages, below 1 encourages; as strong as it may be, finite logits stay finite, and others
            what they are.

    Returns:
        (batch, vocab_size), float64 for float64 and float32 for all others.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    most = torch.finfo(logits.dtype).max
    changed = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-most, most)
    return torch.where(seen & logits.isfinite(), changed, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the k largest logits of each row; ties with the k-th stay. (batch, vocab_size) -> the same."""
    kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]  # (batch, 1)
    return logits.masked_fill(logits < kth, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf for all but the fewest most likely tokens whose probabilities reach p. (batch, vocab_size) -> the same."""
    ordered, order = logits.sort(descending=False)
    beyond = ordered.softmax(-1).cumsum(-1) <= 1 - p  # the unlikely end, which p does without
    beyond[:, -1] = False  # the likeliest token always stays
    return logits.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """-inf for tokens less than p times as likely as the likeliest. (batch, vocab_size) -> the same."""
    likely = logits.softmax(-1)
    return logits.masked_fill(likely < p * likely.amax(-1, keepdim=True), float("-inf"))


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities that a token is drawn from: temperature, then top-k, top-p and min-p, in transformers' order.

    Args:
        logits: (batch, vocab_size), the repetition penalty applied.
        sampling: the rules; the temperature must be above 0.

    Returns:
        (batch, vocab_size) float64; temperature and rules are applied in float32, or in float64 for float64 logits.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    coldest = torch.finfo(logits.dtype).tiny  # colder, and a quotient is 0 / 0
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, coldest)  # at most 0: no overflow
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return logits.double().softmax(-1)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the running sum of probabilities passes the uniform number (inverse transform sampling).

    One number per row decides its token, so that rows keep random streams of their own, without one generator each
    on the device.

    Args:
        probabilities: (batch, vocab_size) float64.
        uniforms: (batch,) float64 in [0, 1).

    Returns:
        (batch,) int64.
    """
    sums = probabilities.cumsum(-1)  # (batch, vocab_size)
    target = uniforms[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, target, right=True).squeeze(1).clamp_max(probabilities.shape[-1] - 1)


class Sampler:
    """Chooses the next token of every row, and remembers what it needs from step to step.

    Args:
        sampling: the rules.
        prompts: the rows' tokens so far.
        steps: how many tokens will be drawn at most.
        vocab_size: how many tokens there are.
        device: where the logits will be.
    """

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], steps: int, vocab_size: int, device: torch.device
    ):
        self.sampling, self.step = sampling, 0
        self.seen = seen_tokens(prompts, vocab_size).to(device) if sampling.repetition_penalty != 1 else None
        if sampling.temperature > 0:
            streams = [random_stream(seed) for seed in row_seeds(sampling.seed, len(prompts))]
            numbers = [[stream.random() for _ in range(steps)] for stream in streams]
            self.uniforms = torch.tensor(numbers, dtype=torch.float64).to(device)  # (batch, steps)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (batch, vocab_size) -> tokens (batch,) int64.

        Raises:
            ValueError: a row's logits hold NaN, infinity, or nothing but -inf. This is looked at on a CPU alone:
                nothing here waits for a GPU.
        """
        if self.seen is not None:
            logits = penalise_repetition(logits, self.seen, self.sampling.repetition_penalty)
        if self.sampling.temperature > 0:
            chances = distribution(logits, self.sampling)
            tokens = draw(chances, self.uniforms[:, self.step])
        else:
            chances = logits
            tokens = logits.argmax(-1)
        if logits.device.type == "cpu":
            check_chosen(chances, tokens, self.step)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        self.step += 1
        return tokens


def check_chosen(chances: Tensor, tokens: Tensor, step: int) -> None:
    """Refuse tokens that were chosen by numbers that are none: one NaN among the logits makes all chances NaN."""
    finite = chances.gather(1, tokens[:, None])[:, 0].isfinite()
    if not finite.all():
        raise ValueError(
            f"the logits of row {finite.int().argmin()} are not finite after {counted(step, 'new token')}: "
            f"the model's weights, or its numbers in their dtype, are NaN or too large"
        )


def seen_tokens(prompts: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """(batch, vocab_size) boolean, True for the tokens of each prompt."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    return seen


def row_seeds(seed: int | Sequence[int], batch: int) -> list[int]:
    """The seed of each row: seed + i, or the i-th of those given; refuses another number of seeds than rows."""
    if isinstance(seed, int):
        return [seed + row for row in range(batch)]
    if len(seed) != batch:
        raise ValueError(
            f"seed must be one number or one per prompt: {counted(batch, 'prompt')}, {counted(len(seed), 'seed')}"
        )
    return list(seed)


def random_stream(seed: int) -> Random:
    """The random numbers of one row: different ones for each seed, while ``Random`` knows a seed but for its sign."""
    return Random(seed if seed >= 0 else str(seed))
