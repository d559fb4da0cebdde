"""How the frequencies of RoPE change so that a model reads more positions than it was trained on."""

import math
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tformer_lib.rope.rope import Rope


@dataclass(frozen=True)
class Scaling:
    """How the frequencies change so that a model reads more positions than it was trained on. This one: not at all."""

    needs_length = False
    needs_max_length = False

    def frequencies(self, rope: "Rope", length: Tensor | None, device: torch.device) -> Tensor:
        """(rotary_dim / 2,) float32. ``length`` is None unless the class sets ``needs_length``."""
        return plain_frequencies(rope.rotary_dim, rope.base, device)

    def attention_factor(self, rope: "Rope") -> float:
        """What cosines and sines are multiplied by."""
        return 1.0

    def check(self, rope: "Rope") -> None:
        """Refuse parameters that make no sense for this rope."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not all(math.isfinite(number) for number in (value if isinstance(value, tuple) else (value or 0,))):
                raise ValueError(f"{type(self).__name__} must have a finite {field.name}, got {value}")
        factor = getattr(self, "factor", 1.0)
        if not factor >= 1.0:
            raise ValueError(f"{type(self).__name__} must have a factor of at least 1, got {factor}")
        if self.needs_max_length and rope.max_length is None:
            raise ValueError(f"{type(self).__name__} must know the trained context: give Rope a max_length")


@dataclass(frozen=True)
class Linear(Scaling):
    """Position interpolation (Chen et al. 2023): positions are divided by ``factor``, which slows every pair alike."""

    factor: float

    def frequencies(self, rope: "Rope", length: Tensor | None, device: torch.device) -> Tensor:
        return plain_frequencies(rope.rotary_dim, rope.base, device) / self.factor


@dataclass(frozen=True)
class NTK(Scaling):
    """NTK-aware scaling (bloc97 2023): a larger base. The slowest pair slows by ``factor``, the fastest not at all."""

    factor: float

    def frequencies(self, rope: "Rope", length: Tensor | None, device: torch.device) -> Tensor:
        return plain_frequencies(rope.rotary_dim, ntk_base(rope, self.factor), device)

    def check(self, rope: "Rope") -> None:
        super().check(rope)
        check_ntk(rope)


@dataclass(frozen=True)
class DynamicNTK(Scaling):
    """NTK-aware scaling by as much as the present length asks: none within the trained context, then more and more.

    Keys cached at one length were turned at other frequencies than keys of a longer one. A cached pass
    equals an uncached one only if ``length`` is given and kept.
    """

    factor: float
    needs_length = True
    needs_max_length = True

    def frequencies(self, rope: "Rope", length: Tensor | None, device: torch.device) -> Tensor:
        stretch = self.factor * length.clamp(min=rope.max_length) / rope.max_length - (self.factor - 1)
        return plain_frequencies(rope.rotary_dim, ntk_base(rope, stretch), device)

    def check(self, rope: "Rope") -> None:
        super().check(rope)
        check_ntk(rope)


@dataclass(frozen=True)
class Yarn(Scaling):
    """YaRN (Peng et al. 2023): pairs that turn often in the trained context stay, slow ones are interpolated.

    Between ``beta_fast`` and ``beta_slow`` turns per trained context a ramp blends the two. Scores are
    sharpened as well: `attention_factor` is 0.1 ln(factor) + 1 unless given.
    """

    factor: float
    attention: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    needs_max_length = True

    def frequencies(self, rope: "Rope", length: Tensor | None, device: torch.device) -> Tensor:
        powers = frequency_powers(rope.rotary_dim, rope.base, device)
        kept, interpolated = 1.0 / powers, 1.0 / (self.factor * powers)
        low, high = self.ramp_range(rope)
        ramp = (torch.arange(rope.rotary_dim // 2, dtype=torch.float32, device=device) - low) / (high - low)
        keep = 1 - ramp.clamp(0, 1)
        return interpolated * (1 - keep) + kept * keep

    def ramp_range(self, rope: "Rope") -> tuple[float, float]:
        """The pair below which all is kept, and the pair above which all is interpolated (paper, section 3.2)."""
        low, high = (pair_that_turns(turns, rope) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.rotary_dim - 1)
        return (low, high + 0.001) if low == high else (low, high)

    def attention_factor(self, rope: "Rope") -> float:
        if self.attention is not None:
            return self.attention
        if self.mscale and self.mscale_all_dim:
            return yarn_sharpening(self.factor, self.mscale) / yarn_sharpening(self.factor, self.mscale_all_dim)
        return yarn_sharpening(self.factor)

    def check(self, rope: "Rope") -> None:
        super().check(rope)
        if not 0 < self.beta_slow <= self.beta_fast:
            pair = f"{self.beta_fast} and {self.beta_slow}"
            raise ValueError(f"beta_fast must not be below beta_slow, nor that be 0 or less, got {pair}")
        if rope.base == 1:
            raise ValueError("Yarn tells pairs apart by their frequencies, which are all the same for a base of 1")


@dataclass(frozen=True)
class Llama3(Scaling):
    """Llama 3.1: pairs under low_freq_factor turns a trained context are interpolated, over high_freq_factor kept."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    needs_max_length = True

    def frequencies(self, rope: "Rope", length: Tensor | None, device: torch.device) -> Tensor:
        kept = plain_frequencies(rope.rotary_dim, rope.base, device)
        turns = rope.max_length / (2 * math.pi / kept)  # full turns of each pair in the trained context
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = (1 - share) * kept / self.factor + share * kept
        scaled = torch.where(turns < self.low_freq_factor, kept / self.factor, blended)
        return torch.where(turns > self.high_freq_factor, kept, scaled)

    def check(self, rope: "Rope") -> None:
        super().check(rope)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must be over low_freq_factor, got {self.high_freq_factor} and {self.low_freq_factor}"
            )


@dataclass(frozen=True)
class LongRope(Scaling):
    """LongRoPE (Ding et al. 2024): a searched divisor for each pair, one list up to the trained context, one beyond."""

    factor: float
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention: float | None = None
    needs_length = True
    needs_max_length = True

    def frequencies(self, rope: "Rope", length: Tensor | None, device: torch.device) -> Tensor:
        short, long = (
            torch.tensor(divisors, dtype=torch.float32, device=device)
            for divisors in (self.short_factor, self.long_factor)
        )
        divisors = torch.where(length > rope.max_length, long, short)
        return 1.0 / (divisors * frequency_powers(rope.rotary_dim, rope.base, device))

    def attention_factor(self, rope: "Rope") -> float:
        if self.attention is not None:
            return self.attention
        return math.sqrt(1 + math.log(self.factor) / math.log(rope.max_length))

    def check(self, rope: "Rope") -> None:
        super().check(rope)
        if self.attention is None and rope.max_length == 1:
            raise ValueError("LongRope must have a max_length over 1, whose logarithm it divides by, got 1")
        for name in ("short_factor", "long_factor"):
            if not all(divisor > 0 for divisor in getattr(self, name)):
                raise ValueError(f"{name} must hold positive divisors, got {getattr(self, name)}")
            if len(getattr(self, name)) != rope.rotary_dim // 2:
                raise ValueError(
                    f"{name} must have {rope.rotary_dim // 2} divisors, one a pair, got {len(getattr(self, name))}"
                )


@dataclass(frozen=True)
class Proportional(Scaling):
    """Gemma's partial rotation: the fastest ``fraction`` of the pairs turn, the others stand still."""

    fraction: float = 1.0
    factor: float = 1.0

    def check(self, rope: "Rope") -> None:
        super().check(rope)
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction must be from 0 to 1, got {self.fraction}")

    def frequencies(self, rope: "Rope", length: Tensor | None, device: torch.device) -> Tensor:
        frequencies = plain_frequencies(rope.rotary_dim, rope.base, device) / self.factor
        turning = int(self.fraction * rope.rotary_dim // 2)
        return torch.where(torch.arange(len(frequencies), device=device) < turning, frequencies, 0.0)


SCALINGS: dict[str, type[Scaling]] = {
    "default": Scaling,
    "linear": Linear,
    "ntk": NTK,
    "dynamic": DynamicNTK,
    "yarn": Yarn,
    "llama3": Llama3,
    "longrope": LongRope,
    "proportional": Proportional,
}
FOREIGN_NAMES = {"attention_factor": "attention", "partial_rotary_factor": "fraction"}


def scaling_from(given: Scaling | dict | None) -> Scaling:
    """A `Scaling` from itself, from None, or from a dict: rope_type (a key of `SCALINGS`) and that class's fields.

    Raises:
        ValueError: it is something else, or the dict has an unknown key or lacks one that its class needs.
    """
    if given is None:
        return Scaling()
    if isinstance(given, Scaling):
        return given
    if not isinstance(given, dict):
        raise ValueError(f"scaling must be None, a Scaling or a dict, got {type(given).__name__}")
    values = {FOREIGN_NAMES.get(key, key): value for key, value in given.items() if value is not None}
    kind = values.pop("rope_type", values.pop("type", "default"))
    values.pop("type", None)
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(f"rope_type must be one of {', '.join(SCALINGS)}, got {kind!r}")
    known = {field.name for field in fields(SCALINGS[kind])}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{kind} scaling takes {', '.join(sorted(known)) or 'nothing'}, got {', '.join(unknown)}")
    needed = {field.name for field in fields(SCALINGS[kind]) if field.default is MISSING}
    if missing := sorted(needed - set(values)):
        raise ValueError(f"{kind} scaling needs {', '.join(sorted(needed))}, and has no {', '.join(missing)}")
    return SCALINGS[kind](**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def plain_frequencies(rotary_dim: int, base: float | Tensor, device: torch.device | None = None) -> Tensor:
    """theta_i = base^(-2i / rotary_dim), (rotary_dim / 2,) float32."""
    return 1.0 / frequency_powers(rotary_dim, base, device)


def frequency_powers(rotary_dim: int, base: float | Tensor, device: torch.device | None = None) -> Tensor:
    """base^(2i / rotary_dim), (rotary_dim / 2,).

    In float32 and in this order, as released models computed it: at position 100,000 the last bit of a
    frequency moves the angle by a hundredth of a radian.
    """
    return base ** (torch.arange(0, rotary_dim, 2, device=device).float() / rotary_dim)


def ntk_base(rope: "Rope", stretch: float | Tensor) -> float | Tensor:
    """The base at which the slowest pair turns ``stretch`` times slower."""
    return rope.base * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))


def pair_that_turns(turns: float, rope: "Rope") -> float:
    """The (fractional) index of the pair that makes this many full turns in the trained context."""
    return rope.rotary_dim * math.log(rope.max_length / (turns * 2 * math.pi)) / (2 * math.log(rope.base))


def yarn_sharpening(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by (paper, equation 22): 1 + 0.1 mscale ln(factor)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def check_ntk(rope: "Rope") -> None:
    """Refuse NTK scaling of a single pair: it has no slowest one beside the fastest."""
    if rope.rotary_dim < 4:
        raise ValueError(f"NTK scaling needs a rotary_dim of at least 4, got {rope.rotary_dim}")
