"""RoPE: queries and keys are turned by angles that grow with their position (Su et al. 2021, RoFormer).

Channels form pairs; pair i of a token at position p turns by p * theta_i, theta_i = base^(-2i / rotary_dim).
A dot product of two turned vectors then depends on the distance of their positions alone.

    rope = Rope(head_dim=64, layout="half")
    rotate_at = rope.at(positions)             # positions: (T,) or (batch, T)
    q, k = rotate_at(q), rotate_at(k)          # (batch, heads, T, head_dim)

Two layouts of the pairs are in use, and nothing fails when they are mixed up, except the model:
"interleaved" pairs channels (0, 1), (2, 3), ... as the paper and Meta's Llama files do; "half" pairs channel i
with channel i + rotary_dim / 2, as GPT-NeoX and transformers do. `convert_layout` takes weights from one to the other.
"""

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields

import torch
from torch import Tensor

from tformer_lib.positional_encoding import check_positions

LAYOUTS = ("half", "interleaved")


class Rope:
    """The angles of RoPE for one model: how fast each pair turns, and which channels make a pair.

    A plain object on purpose: a module's buffer would follow ``model.to(torch.bfloat16)``, and bfloat16 has
    no number between 65,536 and 66,048 to hold a position in. Angles here are float32 always.

    Args:
        head_dim: channels per head.
        base: the slowest pair turns once in nearly 2 pi * base positions.
        layout: "half" or "interleaved".
        rotary_dim: how many of the first channels turn (all by default); the rest passes unturned.
        scaling: None, one of the classes in `SCALINGS`, or a dict such as {"rope_type": "yarn", "factor": 4.0}.
        max_length: the context that the model was trained with; scalings that compare with it need it.

    Raises:
        ValueError: if channels do not form pairs, or the base, the layout or the scaling makes no sense.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        layout: str = "half",
        rotary_dim: int | None = None,
        scaling: "Scaling | dict | None" = None,
        max_length: int | None = None,
    ):
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        check_rotary_dim(rotary_dim, head_dim)
        check_layout(layout)
        if not base > 0:
            raise ValueError(f"base must be positive, got {base}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.head_dim, self.rotary_dim, self.base, self.layout = head_dim, rotary_dim, float(base), layout
        self.max_length = max_length
        self.scaling = scaling_from(scaling)
        self.scaling.check(self)
        self._frequencies: dict[torch.device, Tensor] = {}

    @classmethod
    def from_parameters(cls, head_dim: int, parameters: dict, *, max_length: int, layout: str = "half") -> "Rope":
        """Read ``rope_parameters`` (or the older ``rope_scaling``) as a transformers configuration holds them.

        Args:
            parameters: rope_theta, rope_type, factor, ... in that library's words.
            max_length: its max_position_embeddings; original_max_position_embeddings, where given, goes first.

        Raises:
            ValueError: the parameters have an unknown key, lack one, or make no sense.
        """
        parameters = dict(parameters)
        base = parameters.pop("rope_theta", 10000.0)
        trained = parameters.pop("original_max_position_embeddings", None)
        if trained is None or parameters.get("rope_type") == "dynamic":  # that one stretches max_length itself
            trained = max_length
        if parameters.get("rope_type", parameters.get("type")) in ("yarn", "longrope"):
            parameters["factor"] = parameters.get("factor") or max_length / trained
        rotary_dim = head_dim
        if parameters.get("rope_type") != "proportional":  # that one keeps the fraction for itself
            rotary_dim = int(head_dim * parameters.pop("partial_rotary_factor", 1.0))
        return cls(head_dim, base=base, layout=layout, rotary_dim=rotary_dim, scaling=parameters, max_length=trained)

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by; its square multiplies every score. 1 without YaRN or LongRoPE."""
        return self.scaling.attention_factor(self)

    def frequencies(self, length: int | Tensor | None = None, device: torch.device | str | None = None) -> Tensor:
        """Radians per position of each pair, after scaling.

        Args:
            length: how many positions the sequence has; only dynamic NTK and LongRoPE ask. None: the trained context.

        Returns:
            (rotary_dim / 2,) float32.
        """
        device = torch.device(device or "cpu")
        if self.scaling.needs_length:
            length = torch.as_tensor(self.max_length if length is None else length, device=device)
            return self.scaling.frequencies(self, length, device)
        if device not in self._frequencies:
            with torch.inference_mode(False):  # a tensor made in inference mode could not serve training later
                self._frequencies[device] = self.scaling.frequencies(self, None, device)
        return self._frequencies[device]

    def __call__(self, positions: Tensor, *, length: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every pair's angle.

        Args:
            positions: (T,) or (batch, T); any order, offset or repetition.
            length: for length-dependent scalings; by default the largest position + 1, as transformers does.

        Returns:
            cos, sin: (T, rotary_dim / 2) or (batch, T, rotary_dim / 2), float32, times `attention_factor`.
        """
        check_positions(positions)
        if self.scaling.needs_length and length is None and positions.numel():
            length = positions.max() + 1  # stays on the device: no synchronisation
        angles = positions[..., None].float() * self.frequencies(length, positions.device)
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def at(self, positions: Tensor, *, length: int | Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """The function that turns x (batch, heads, T, head_dim) as these positions ask; arguments as in a call."""
        cos, sin = self(positions, length=length)

        def rotate_at(x: Tensor) -> Tensor:
            if x.shape[-1] != self.head_dim:
                raise ValueError(f"x must have head_dim {self.head_dim}, got shape {tuple(x.shape)}")
            return rotate(x, cos, sin, self.layout)

        return rotate_at

    def __repr__(self) -> str:
        return (
            f"Rope(head_dim={self.head_dim}, base={self.base:g}, layout={self.layout!r}, "
            f"rotary_dim={self.rotary_dim}, scaling={self.scaling}, max_length={self.max_length})"
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str = "half") -> Tensor:
    """Turn each pair (a, b) of channels: (a cos - b sin, a sin + b cos). Computed in float32 or wider.

    Args:
        x: (batch, heads, T, head_dim).
        cos, sin: (T, rotary_dim / 2) or (batch, T, rotary_dim / 2), as `Rope` gives them.
        layout: "half" or "interleaved".

    Returns:
        x's shape and dtype; channels from rotary_dim on are unchanged.

    Raises:
        ValueError: if the angles are of other positions, another batch or more channels than x has.
    """
    check_rotation(x, cos, sin, layout)
    cos, sin = (t.unsqueeze(-3) for t in (cos, sin))  # (1, T, pairs) or (batch, 1, T, pairs): the same for all heads
    rotary_dim = 2 * cos.shape[-1]
    a, b = split_pairs(x[..., :rotary_dim], layout)  # each (batch, heads, T, rotary_dim / 2)
    turned = join_pairs(a * cos - b * sin, a * sin + b * cos, layout).to(x.dtype)
    return turned if rotary_dim == x.shape[-1] else torch.cat((turned, x[..., rotary_dim:]), dim=-1)


def split_pairs(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The first and the second member of every pair: (..., 2 pairs) -> two of (..., pairs)."""
    if layout == "interleaved":
        return x[..., 0::2], x[..., 1::2]
    return x.chunk(2, dim=-1)


def join_pairs(a: Tensor, b: Tensor, layout: str) -> Tensor:
    """The inverse of `split_pairs`."""
    if layout == "interleaved":
        return torch.stack((a, b), dim=-1).flatten(-2)
    return torch.cat((a, b), dim=-1)


def convert_layout(parameter: Tensor, heads: int, *, to: str, rotary_dim: int | None = None) -> Tensor:
    """Reorder the rows of a q_proj or k_proj parameter from one layout to the other, ``to``.

    The model computes the same scores after it, if its Rope changes layout too. Values and the output
    projection stay as they are: scores are sums over channels, and v is never turned.

    Args:
        parameter: weight (heads * head_dim, width), or bias (heads * head_dim,).
        heads: query heads for q_proj, kv heads for k_proj.
        to: the layout wanted, "half" or "interleaved"; the parameter is in the other one.
        rotary_dim: how many channels of each head turn; all by default.

    Returns:
        A new tensor of the parameter's shape.
    """
    check_layout(to)
    rows = parameter.shape[0]
    if heads < 1 or rows % heads:
        raise ValueError(
            f"{heads} heads do not divide the {rows} rows of a parameter of shape {tuple(parameter.shape)}"
        )
    head_dim = rows // heads
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    check_rotary_dim(rotary_dim, head_dim)
    order = torch.arange(head_dim, device=parameter.device)
    pairs = split_pairs(order[:rotary_dim], "interleaved" if to == "half" else "half")
    order = torch.cat((join_pairs(*pairs, to), order[rotary_dim:]))  # row order[c] of a head becomes its row c
    return parameter.unflatten(0, (heads, head_dim))[:, order].flatten(0, 1)


@dataclass(frozen=True)
class Scaling:
    """How the frequencies change so that a model reads more positions than it was trained on. This one: not at all."""

    needs_length = False
    needs_max_length = False

    def frequencies(self, rope: Rope, length: Tensor | None, device: torch.device) -> Tensor:
        """(rotary_dim / 2,) float32. ``length`` is None unless the class sets ``needs_length``."""
        return plain_frequencies(rope.rotary_dim, rope.base, device)

    def attention_factor(self, rope: Rope) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0

    def check(self, rope: Rope) -> None:
        """Refuse parameters that make no sense for this rope."""
        factor = getattr(self, "factor", 1.0)
        if not factor >= 1.0:
            raise ValueError(f"{type(self).__name__} must have a factor of at least 1, got {factor}")
        if self.needs_max_length and rope.max_length is None:
            raise ValueError(f"{type(self).__name__} must know the trained context: give Rope a max_length")


@dataclass(frozen=True)
class Linear(Scaling):
    """Position interpolation (Chen et al. 2023): positions are divided by ``factor``, which slows every pair alike."""

    factor: float

    def frequencies(self, rope: Rope, length: Tensor | None, device: torch.device) -> Tensor:
        return plain_frequencies(rope.rotary_dim, rope.base, device) / self.factor


@dataclass(frozen=True)
class NTK(Scaling):
    """NTK-aware scaling (bloc97 2023): a larger base. The slowest pair slows by ``factor``, the fastest not at all."""

    factor: float

    def frequencies(self, rope: Rope, length: Tensor | None, device: torch.device) -> Tensor:
        return plain_frequencies(rope.rotary_dim, ntk_base(rope, self.factor), device)

    def check(self, rope: Rope) -> None:
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

    def frequencies(self, rope: Rope, length: Tensor | None, device: torch.device) -> Tensor:
        stretch = self.factor * length.clamp(min=rope.max_length) / rope.max_length - (self.factor - 1)
        return plain_frequencies(rope.rotary_dim, ntk_base(rope, stretch), device)

    def check(self, rope: Rope) -> None:
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

    def frequencies(self, rope: Rope, length: Tensor | None, device: torch.device) -> Tensor:
        powers = frequency_powers(rope.rotary_dim, rope.base, device)
        kept, interpolated = 1.0 / powers, 1.0 / (self.factor * powers)
        low, high = self.ramp_range(rope)
        ramp = (torch.arange(rope.rotary_dim // 2, dtype=torch.float32, device=device) - low) / (high - low)
        keep = 1 - ramp.clamp(0, 1)
        return interpolated * (1 - keep) + kept * keep

    def ramp_range(self, rope: Rope) -> tuple[float, float]:
        """The pair below which all is kept, and the pair above which all is interpolated (paper, section 3.2)."""
        low, high = (pair_that_turns(turns, rope) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.rotary_dim - 1)
        return (low, high + 0.001) if low == high else (low, high)

    def attention_factor(self, rope: Rope) -> float:
        if self.attention is not None:
            return self.attention
        if self.mscale and self.mscale_all_dim:
            return yarn_sharpening(self.factor, self.mscale) / yarn_sharpening(self.factor, self.mscale_all_dim)
        return yarn_sharpening(self.factor)

    def check(self, rope: Rope) -> None:
        super().check(rope)
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast must not be below beta_slow, got {self.beta_fast} and {self.beta_slow}")


@dataclass(frozen=True)
class Llama3(Scaling):
    """Llama 3.1: pairs under low_freq_factor turns a trained context are interpolated, over high_freq_factor kept."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    needs_max_length = True

    def frequencies(self, rope: Rope, length: Tensor | None, device: torch.device) -> Tensor:
        kept = plain_frequencies(rope.rotary_dim, rope.base, device)
        turns = rope.max_length / (2 * math.pi / kept)  # full turns of each pair in the trained context
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = (1 - share) * kept / self.factor + share * kept
        scaled = torch.where(turns < self.low_freq_factor, kept / self.factor, blended)
        return torch.where(turns > self.high_freq_factor, kept, scaled)

    def check(self, rope: Rope) -> None:
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

    def frequencies(self, rope: Rope, length: Tensor | None, device: torch.device) -> Tensor:
        short, long = (
            torch.tensor(divisors, dtype=torch.float32, device=device)
            for divisors in (self.short_factor, self.long_factor)
        )
        divisors = torch.where(length > rope.max_length, long, short)
        return 1.0 / (divisors * frequency_powers(rope.rotary_dim, rope.base, device))

    def attention_factor(self, rope: Rope) -> float:
        if self.attention is not None:
            return self.attention
        return math.sqrt(1 + math.log(self.factor) / math.log(rope.max_length))

    def check(self, rope: Rope) -> None:
        super().check(rope)
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != rope.rotary_dim // 2:
                raise ValueError(
                    f"{name} must have {rope.rotary_dim // 2} divisors, one a pair, got {len(getattr(self, name))}"
                )


@dataclass(frozen=True)
class Proportional(Scaling):
    """Gemma's partial rotation: the fastest ``fraction`` of the pairs turn, the others stand still."""

    fraction: float = 1.0
    factor: float = 1.0

    def frequencies(self, rope: Rope, length: Tensor | None, device: torch.device) -> Tensor:
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
    if kind not in SCALINGS:
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


def ntk_base(rope: Rope, stretch: float | Tensor) -> float | Tensor:
    """The base at which the slowest pair turns ``stretch`` times slower."""
    return rope.base * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))


def pair_that_turns(turns: float, rope: Rope) -> float:
    """The (fractional) index of the pair that makes this many full turns in the trained context."""
    return rope.rotary_dim * math.log(rope.max_length / (turns * 2 * math.pi)) / (2 * math.log(rope.base))


def yarn_sharpening(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by (paper, equation 22): 1 + 0.1 mscale ln(factor)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def check_layout(layout: str) -> None:
    """Refuse a layout that does not exist."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def check_rotary_dim(rotary_dim: int, head_dim: int) -> None:
    """Refuse a number of turning channels that does not form pairs or is more than there are."""
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and at least 2, since channels turn in pairs, got {rotary_dim}")
    if rotary_dim > head_dim:
        raise ValueError(f"rotary_dim must be at most head_dim, got {rotary_dim} and {head_dim}")


def check_ntk(rope: Rope) -> None:
    """Refuse NTK scaling of a single pair: it has no slowest one beside the fastest."""
    if rope.rotary_dim < 4:
        raise ValueError(f"NTK scaling needs a rotary_dim of at least 4, got {rope.rotary_dim}")


def check_rotation(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> None:
    """Refuse an x that the angles do not fit."""
    check_layout(layout)
    if x.dim() != 4:
        raise ValueError(f"x must be (batch, heads, T, head_dim), got shape {tuple(x.shape)}")
    if cos.shape != sin.shape or cos.dim() not in (2, 3):
        raise ValueError(f"cos and sin must both be ([batch,] T, pairs), got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if cos.shape[-2] != x.shape[-2]:
        raise ValueError(f"x has {x.shape[-2]} tokens, but there are angles for {cos.shape[-2]} positions")
    if cos.dim() == 3 and cos.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"x has batch {x.shape[0]}, but there are angles for a batch of {cos.shape[0]}")
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(f"x has head_dim {x.shape[-1]}, too small for {cos.shape[-1]} pairs of channels")
