"""The angles of a model's RoPE, and the rotation at given positions."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tformer_lib.contract import check_dense, readable
from tformer_lib.positional_encoding import check_positions
from tformer_lib.rope.kernels import rotate, rotate_both
from tformer_lib.rope.pairs import check_layout, check_rotary_dim
from tformer_lib.rope.scaling import Scaling, scaling_from


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
        if not 0 < base < math.inf:
            raise ValueError(f"base must be {'finite' if base == math.inf else 'positive'}, got {base}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.head_dim, self.rotary_dim, self.base, self.layout = head_dim, rotary_dim, float(base), layout
        self.max_length = max_length
        self.scaling = scaling_from(scaling)
        self.scaling.check(self)
        self._frequencies: dict[torch.device, Tensor] = {}
        self._check_finite()

    def _check_finite(self) -> None:
        """Refuse numbers that are each in order and overflow together: an angle of NaN would fail nowhere but here."""
        lengths = (self.max_length, 4 * self.max_length) if self.scaling.needs_length else (None,)
        try:
            found = torch.cat([self.frequencies(length) for length in lengths]) * self.attention_factor
            finite = found.isfinite().all()
            fits = abs(self.attention_factor) < torch.finfo(found.dtype).max
            is_finite = fits and (not readable(finite) or bool(finite))
        except ArithmeticError:  # Python's own numbers overflow with an error
            is_finite = False
        if not is_finite:
            raise ValueError(f"the numbers of {self} overflow together: its frequencies or its factor are not finite")

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
            last = positions.max() if positions.is_floating_point() else positions.max().long()  # uint8 ends at 255
            length = last + 1  # stays on the device: no synchronisation
        angles = positions[..., None].float() * self.frequencies(length, positions.device)
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def at(self, positions: Tensor, *, length: int | Tensor | None = None) -> "Rotation":
        """The function that turns x (batch, heads, T, head_dim) as these positions ask; arguments as in a call."""
        return Rotation(self.head_dim, self.layout, *self(positions, length=length))

    def __repr__(self) -> str:
        return (
            f"Rope(head_dim={self.head_dim}, base={self.base:g}, layout={self.layout!r}, "
            f"rotary_dim={self.rotary_dim}, scaling={self.scaling}, max_length={self.max_length})"
        )


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation at given positions, whose cosines and sines every layer shares.

    Attributes:
        cos, sin: ([batch,] T, rotary_dim / 2) float32.
    """

    head_dim: int
    layout: str
    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x (batch, heads, T, head_dim), turned."""
        self.check(x)
        return rotate(x, self.cos, self.sin, self.layout)

    def both(
        self,
        q: Tensor,
        k: Tensor,
        *,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        norm_eps: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys, turned in one pass on a GPU; arguments as in :func:`rotate_both`."""
        self.check(q)
        return rotate_both(
            q,
            k,
            self.cos,
            self.sin,
            self.layout,
            q_weight=q_weight,
            k_weight=k_weight,
            norm_eps=norm_eps,
        )

    def check(self, x: Tensor) -> None:
        """Refuse an x of another head_dim."""
        check_dense("x", x)
        if x.shape[-1] != self.head_dim:
            raise ValueError(f"x must have head_dim {self.head_dim}, got shape {tuple(x.shape)}")


def turn_both(rotate_at: Callable[[Tensor], Tensor], q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by any function of one tensor: in one pass where it is a :class:`Rotation`."""
    return rotate_at.both(q, k) if isinstance(rotate_at, Rotation) else (rotate_at(q), rotate_at(k))
