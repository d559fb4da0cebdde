"""Feature maps: what stands for exp(q·k) is φ(q)·φ(k).

(..., d) -> (..., features), never negative in their inner products.
"""

from collections.abc import Callable

import torch
from torch import Tensor

FeatureMap = Callable[[Tensor], Tensor]


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, (..., d) -> (..., d): positive everywhere (Katharopoulos et al. 2020, eq. 7).

    Below zero it is exp(x), and is computed so: the sum ``elu(x) + 1`` rounds to 0 in float32 from x = -17 on.
    """
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def relu(x: Tensor) -> Tensor:
    """max(x, 0), (..., d) -> (..., d): cheap and sparse, but a query may find no key at all (its output is zero)."""
    return x.clamp(min=0)


def taylor(x: Tensor) -> Tensor:
    """exp to second order, (..., d) -> (..., 1 + d + d²): φ(q)·φ(k) = 1 + q·k + (q·k)²/2, which is at least 1/2."""
    square = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / 2**0.5  # (..., d²)
    return torch.cat([torch.ones_like(x[..., :1]), x, square], dim=-1)


class RandomFeatures:
    """Positive random features of FAVOR+: the mean of φ(q)·φ(k) over the draw of the projection is exp(q·k), exactly.

    φ(x) = exp(w_i·x - |x|²/2) / √features for rows w_i ~ N(0, I) (Choromanski et al. 2021, lemma 1). Orthogonal rows
    keep each row's distribution and lower the variance. The exponent of a key is not shifted by a maximum over keys,
    as some implementations do: that maximum would depend on future keys. It is at most |w_i|²/2 as it stands.

    Args:
        head_dim: width of x.
        features: number of random features; the error falls as 1/√features.
        seed: the projection is a function of (head_dim, features, seed, orthogonal) alone.
        orthogonal: draw the rows orthogonal in blocks of head_dim.
    """

    def __init__(self, head_dim: int, features: int, *, seed: int = 0, orthogonal: bool = True):
        if head_dim < 1 or features < 1:
            raise ValueError(f"head_dim and features must be at least 1, got {head_dim} and {features}")
        self.projection = draw_projection(head_dim, features, seed, orthogonal)  # (features, head_dim)

    def __call__(self, x: Tensor) -> Tensor:
        """Features of keys: (..., head_dim) -> (..., features)."""
        return self.exponent(x).exp() / self.projection.shape[0] ** 0.5

    def of_queries(self, x: Tensor) -> Tensor:
        """Features of queries, each row scaled so that its largest is 1: the scale cancels in the normalised output."""
        exponent = self.exponent(x)
        return (exponent - exponent.detach().amax(-1, keepdim=True)).exp()

    def exponent(self, x: Tensor) -> Tensor:
        """w_i·x - |x|²/2 for every row w_i: (..., head_dim) -> (..., features)."""
        if x.shape[-1] != self.projection.shape[1]:
            raise ValueError(f"these features were drawn for head_dim {self.projection.shape[1]}, got {x.shape[-1]}")
        projection = self.projection.to(x)
        return x @ projection.T - x.square().sum(-1, keepdim=True) / 2


def draw_projection(head_dim: int, features: int, seed: int, orthogonal: bool) -> Tensor:
    """Gaussian rows (features, head_dim) in float64, orthogonal within each block of head_dim rows if asked."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(features, head_dim, generator=generator, dtype=torch.float64)
    if not orthogonal:
        return rows
    blocks = -(-features // head_dim)
    square = torch.randn(blocks, head_dim, head_dim, generator=generator, dtype=torch.float64)
    Q, R = torch.linalg.qr(square)
    # LAPACK's signs favour one half-space, which biases the features; making R's diagonal positive takes that out.
    Q = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    directions = Q.mT.flatten(0, 1)[:features]  # (features, head_dim), unit rows
    return directions * rows.norm(dim=1, keepdim=True)  # lengths of independent Gaussian rows
