"""Ways to tell attention where a word stands: tables added to the input, and biases added to the scores.

Attention without positions is blind to order: permute the keys with their values and no output changes.
Two families repair that, and both take explicit positions, so that a cache, a padded batch or a packed
sequence says where its tokens stand:

- added to the input, (batch, T, width): `sinusoidal`, `SinusoidalEncoding`, `LearnedEncoding`;
- added to the scores, (heads, T, S): `alibi`, `T5Bias`. They are the ``bias`` argument of `attend`.

RoPE, which turns queries and keys instead, has its own file, `tformer_lib.rope`.
"""

import math

import torch
from torch import Tensor, nn

from tformer_lib.contract import check_integer, readable


def sinusoidal(positions: int | Tensor, width: int, *, base: float = 10000.0) -> Tensor:
    """The sines and cosines of "Attention Is All You Need" (section 3.5), interleaved.

    Channel 2i of position p is sin(p / base^(2i / width)), channel 2i + 1 is its cosine.

    Args:
        positions: a length T, which means positions 0 .. T-1, or a tensor of positions of any shape (...).
        width: number of channels, even.
        base: the longest wavelength is 2 pi times nearly this many positions.

    Returns:
        (..., width) float32, computed in float64 so that a large position keeps its phase.

    Raises:
        ValueError: the width is odd, the length no integer of at least 0, or the base not positive and finite.
    """
    check_even(width)
    if not 0 < base < math.inf:
        raise ValueError(f"base must be positive and finite, got {base}")
    if not isinstance(positions, Tensor):
        check_length("positions", positions)
        positions = torch.arange(positions)
    elif positions.dtype == torch.bool or positions.is_complex():
        raise ValueError(f"positions must be a tensor of numbers, got {positions.dtype}")
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    angles = positions.double()[..., None] * base**-exponents  # (..., width / 2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).float()  # (..., width)


class SinusoidalEncoding(nn.Module):
    """Add `sinusoidal` positions to (batch, T, width). No parameters, no largest length."""

    def __init__(self, width: int, *, base: float = 10000.0):
        super().__init__()
        check_even(width)
        self.width, self.base = width, base

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Args: x (batch, T, width); positions (T,) or (batch, T), by default 0 .. T-1. Returns x's shape and dtype."""
        positions = input_positions(x, positions, self.width)
        return x + sinusoidal(positions, self.width, base=self.base).to(x.dtype)

    def extra_repr(self) -> str:
        return f"width={self.width}, base={self.base:g}"


class LearnedEncoding(nn.Module):
    """Add one trained vector per position, as GPT-2 and BERT do. It ends with its table."""

    def __init__(self, max_length: int, width: int):
        super().__init__()
        self.table = nn.Embedding(max_length, width)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Args: x (batch, T, width); positions (T,) or (batch, T), by default 0 .. T-1. Returns x's shape and dtype."""
        default = positions is None
        positions = input_positions(x, positions, self.table.embedding_dim)
        if not default:
            check_in_table(positions, self.table.num_embeddings)
        elif x.shape[1] > self.table.num_embeddings:
            raise ValueError(beyond_table(x.shape[1] - 1, self.table.num_embeddings))
        return x + self.table(positions).to(x.dtype)


def alibi_slopes(heads: int) -> Tensor:
    """The slope of each head in ALiBi (Press et al. 2022, section 3): a geometric series from 2^(-8/heads) to 2^-8.

    Where ``heads`` is no power of two, the series of the next lower power comes first, and every second
    slope of the next higher power fills up, as in the authors' code.

    Returns:
        (heads,) float32, positive.
    """
    check_integer("heads", heads)
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    lower = 2 ** (heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / lower) for i in range(1, lower + 1)]
    between = [2 ** (-8 * i / (2 * lower)) for i in range(1, 2 * lower + 1, 2)]
    return torch.tensor((slopes + between)[:heads], dtype=torch.float32)


def alibi(
    heads: int,
    T: int | None = None,
    S: int | None = None,
    *,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """ALiBi: the score of a key falls by the head's slope with each step of distance.

    Args:
        heads: number of query heads.
        T, S: number of queries and keys (S is T by default), aligned to the bottom right: the last query
            stands where the last key stands.
        positions: instead of T, where each query stands, (T,) or (batch, T).
        key_positions: where each key stands, (S,) or (batch, S); by default 0 .. S-1.

    Returns:
        (heads, T, S) float32, or (batch, heads, T, S) where a position tensor has a batch.

    Raises:
        ValueError: if there is no head, or lengths and positions do not fit together.
    """
    relative = relative_positions(T, S, positions=positions, key_positions=key_positions, device=device)
    slopes = alibi_slopes(heads).to(relative.device)[:, None, None]
    return -slopes * relative.abs().unsqueeze(-3)  # (..., heads, T, S)


class T5Bias(nn.Module):
    """T5's bias: one trained number for each head and each bucket of distance (Raffel et al. 2020, section 2.1).

    Args:
        heads: number of query heads.
        buckets, max_distance, bidirectional: as in `t5_bucket`.

    Raises:
        ValueError: if there is no head, or the buckets leave no room for exact or for logarithmic ones.
    """

    def __init__(self, heads: int, *, buckets: int = 32, max_distance: int = 128, bidirectional: bool = True):
        super().__init__()
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        check_buckets(buckets, max_distance, bidirectional)
        self.buckets, self.max_distance, self.bidirectional = buckets, max_distance, bidirectional
        self.table = nn.Embedding(buckets, heads)

    def forward(
        self,
        T: int | None = None,
        S: int | None = None,
        *,
        positions: Tensor | None = None,
        key_positions: Tensor | None = None,
    ) -> Tensor:
        """The bias of T queries to S keys; arguments and alignment as in `alibi`.

        Returns:
            (heads, T, S), or (batch, heads, T, S) where a position tensor has a batch; the table's dtype.
        """
        device = self.table.weight.device
        relative = relative_positions(T, S, positions=positions, key_positions=key_positions, device=device)
        bucket = t5_bucket(
            relative, buckets=self.buckets, max_distance=self.max_distance, bidirectional=self.bidirectional
        )
        return self.table(bucket).movedim(-1, -3)  # (..., T, S, heads) -> (..., heads, T, S)

    def extra_repr(self) -> str:
        return f"buckets={self.buckets}, max_distance={self.max_distance}, bidirectional={self.bidirectional}"


def t5_bucket(relative: Tensor, *, buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> Tensor:
    """The bucket of each relative position: small distances exactly, larger ones by their logarithm.

    Args:
        relative: integers of any shape, position of the key minus position of the query.
        buckets: how many there are; with ``bidirectional`` half of them serve keys after the query.
        max_distance: this distance and all beyond share the last bucket.
        bidirectional: False where no query looks ahead; keys after the query then share bucket 0.

    Returns:
        int64 of the same shape, in 0 .. buckets - 1.

    Raises:
        ValueError: if the buckets leave no room for exact or for logarithmic ones, or the positions are no integers.
    """
    check_buckets(buckets, max_distance, bidirectional)
    if relative.is_floating_point() or relative.is_complex():
        raise ValueError(f"relative positions must be integers, each of which has a bucket, got {relative.dtype}")
    relative = relative.long()
    ahead = torch.zeros_like(relative)
    if bidirectional:
        buckets //= 2
        ahead = (relative > 0) * buckets
        distance = relative.abs()
    else:
        distance = (-relative).clamp(min=0)
    exact = buckets // 2
    # float32, as T5 computes it: at the edge of a bucket the rounding decides.
    share = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact)  # 0 .. 1 and beyond
    by_logarithm = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
    return ahead + torch.where(distance < exact, distance, by_logarithm)


def relative_positions(
    T: int | None = None,
    S: int | None = None,
    *,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Position of each key minus position of each query, aligned to the bottom right unless positions are given.

    Args:
        T, S: number of queries and keys; S is T by default.
        positions: (T,) or (batch, T), where each query stands.
        key_positions: (S,) or (batch, S), where each key stands; by default 0 .. S-1.

    Returns:
        (T, S) or (batch, T, S): int64, or floating-point (float32 at least) where positions are.

    Raises:
        ValueError: if the number of queries is not given, is negative, or lengths and positions do not fit together.
    """
    if positions is None and T is None:
        raise ValueError("say how many queries there are: T, or their positions")
    for name, length in (("T", T), ("S", S)):
        if length is not None:
            check_length(name, length)
    if positions is not None:
        check_positions(positions)
        if T is not None and positions.shape[-1] != T:
            raise ValueError(f"T is {T}, but positions have shape {tuple(positions.shape)}")
        T, device = positions.shape[-1], positions.device
    if key_positions is None:
        key_positions = torch.arange(T if S is None else S, device=device)
    check_positions(key_positions)
    if S is not None and key_positions.shape[-1] != S:
        raise ValueError(f"S is {S}, but key_positions have shape {tuple(key_positions.shape)}")
    if positions is None:
        positions = torch.arange(T, device=key_positions.device) + key_positions.shape[-1] - T
    batches = {x.shape[0] for x in (positions, key_positions) if x.dim() == 2} - {1}
    if len(batches) > 1 or positions.device != key_positions.device:
        one, other = ((tuple(x.shape), str(x.device)) for x in (positions, key_positions))
        raise ValueError(f"positions and key_positions must agree in batch and device, got {one} and {other}")
    return signed(key_positions).unsqueeze(-2) - signed(positions).unsqueeze(-1)  # (..., T, S)


def signed(positions: Tensor) -> Tensor:
    """Positions in a dtype whose differences are right: 1 - 2 is 255 in uint8, and 2048 + 1 is 2048 in float16."""
    return positions.to(
        torch.promote_types(positions.dtype, torch.float32) if positions.is_floating_point() else torch.int64
    )


def input_positions(x: Tensor, positions: Tensor | None, width: int) -> Tensor:
    """The positions of x (batch, T, width), checked; 0 .. T-1 where none are given."""
    if x.dim() != 3 or x.shape[-1] != width:
        raise ValueError(f"x must be (batch, T, width={width}), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating-point, for positions are fractions that it could not hold, got {x.dtype}")
    if positions is None:
        return torch.arange(x.shape[1], device=x.device)
    check_positions(positions)
    if positions.shape[-1] != x.shape[1] or (positions.dim() == 2 and positions.shape[0] not in (1, x.shape[0])):
        raise ValueError(f"positions of shape {tuple(positions.shape)} do not fit x of shape {tuple(x.shape)}")
    return positions


def check_positions(positions: Tensor) -> None:
    """Refuse positions that are not a real tensor of shape (T,) or (batch, T)."""
    if not isinstance(positions, Tensor) or positions.dtype == torch.bool or positions.is_complex():
        came = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise ValueError(f"positions must be a tensor of numbers, got {came}")
    if positions.dim() not in (1, 2):
        raise ValueError(f"positions must be (T,) or (batch, T), got shape {tuple(positions.shape)}")


def check_in_table(positions: Tensor, max_length: int) -> None:
    """Refuse positions outside a table; silent where reading them would break a graph that is being recorded."""
    if positions.numel() == 0 or not readable(positions):
        return
    if positions.is_floating_point():
        raise ValueError(f"positions must be integers to look up a table, got {positions.dtype}")
    lowest, highest = positions.min().item(), positions.max().item()
    if lowest < 0 or highest >= max_length:
        raise ValueError(beyond_table(highest if highest >= max_length else lowest, max_length))


def beyond_table(position: int, max_length: int) -> str:
    """The message for a position that a learned table does not hold."""
    return f"position {position} is outside the learned table, which holds positions 0 to {max_length - 1}"


def check_length(name: str, length: int) -> None:
    """Refuse a length that is no integer of at least 0."""
    check_integer(name, length)
    if length < 0:
        raise ValueError(f"{name} must be at least 0, got {name} = {length}")


def check_even(width: int) -> None:
    """Refuse a width whose channels do not form pairs."""
    check_integer("width", width)
    if width < 2 or width % 2:
        raise ValueError(f"width must be even, since each frequency takes a sine and a cosine, got {width}")


def check_buckets(buckets: int, max_distance: int, bidirectional: bool) -> None:
    """Refuse numbers of buckets that leave no room for exact or for logarithmic ones."""
    check_integer("buckets", buckets)
    if buckets < (4 if bidirectional else 2) or (bidirectional and buckets % 2):
        raise ValueError(f"buckets must be even and at least {4 if bidirectional else 2}, got {buckets}")
    exact = (buckets // 2 if bidirectional else buckets) // 2
    if not exact < max_distance < math.inf:
        raise ValueError(f"max_distance must be over {exact}, the number of exact buckets, got {max_distance}")
