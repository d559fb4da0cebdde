"""The gated delta rule as a layer, in the place of self-attention: the forms of Qwen3-Next, Qwen3.5 and Kimi Linear.

    q, k, v = SiLU(convolution(W x))          a short causal convolution of each channel: a token and the few before it
    q, k    = q / |q|, k / |k|                so that β k kᵀ never grows the state
    β       = σ(W_β x)                        how much of its value a token corrects, for each head
    g       = -exp(A) softplus(W_g x + b)     the log decay of each head's state
    o       = RMSNorm(delta rule of q, k, v, β, g) SiLU(W_z x)
    y       = W_o o

There is no rotation and no mask of the future: the convolution and the decay know the order, and a state holds only
what came before. Between two calls the layer keeps a :class:`LayerState`, whose size does not depend on the text.

Kimi Linear has a decay for each feature of a key, so g is a vector; its output gate is a sigmoid (``KimiDeltaLayer``).

Sources: Yang, Kautz and Hatamizadeh 2025, "Gated Delta Networks"; the release of Qwen3-Next (2025); Kimi Team 2025,
"Kimi Linear".
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tformer_lib.contract import counted
from tformer_lib.linear_attention.forms import delta_attend
from tformer_lib.linear_attention.shared import sum_dtype

NORM_EPSILON = 1e-6


class GatedDeltaLayer(nn.Module):
    """The gated delta rule with its projections: (batch, T, width) -> (batch, T, width).

    Args:
        width: of the model.
        key_heads: heads of queries and keys.
        value_heads: heads of values, states, decays and step sizes: a multiple of ``key_heads``, which share them out.
        head_dim: of queries and keys.
        value_dim: of values; ``head_dim`` if None.
        kernel: tokens that the convolution sees, the token itself among them.
        norm_epsilon: what the norm of the output adds to the variance.

    Raises:
        ValueError: a size is below 1, or the heads do not divide.
    """

    gate_activation = staticmethod(F.silu)

    def __init__(
        self,
        width: int,
        *,
        key_heads: int,
        value_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        kernel: int = 4,
        norm_epsilon: float = NORM_EPSILON,
    ):
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"width": width, "key_heads": key_heads, "value_heads": value_heads, "head_dim": head_dim}
        for name, size in (sizes | {"value_dim": value_dim, "kernel": kernel}).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if value_heads % key_heads:
            raise ValueError(f"value heads must be a multiple of key heads, got {value_heads} and {key_heads}")
        self.key_heads, self.value_heads, self.kernel = key_heads, value_heads, kernel
        self.head_dim, self.value_dim, self.norm_epsilon = head_dim, value_dim, norm_epsilon
        self.key_width, self.value_width = key_heads * head_dim, value_heads * value_dim
        self.channels = 2 * self.key_width + self.value_width
        self.qkv_proj = nn.Linear(width, self.channels, bias=False)
        self.gate_proj = nn.Linear(width, self.value_width, bias=False)
        self.beta_proj = nn.Linear(width, value_heads, bias=False)
        self.decay_proj = nn.Linear(width, value_heads, bias=False)
        self.convolution = nn.Parameter(torch.empty(self.channels, kernel).uniform_(-(kernel**-0.5), kernel**-0.5))
        self.log_rate = nn.Parameter(torch.empty(value_heads).uniform_(1, 16).log())
        self.decay_bias = nn.Parameter(first_decay_bias(value_heads))
        self.norm = nn.Parameter(torch.ones(value_dim))
        self.out_proj = nn.Linear(self.value_width, width, bias=False)

    def forward(self, x: Tensor, *, state: "LayerState | None" = None, mask: Tensor | None = None) -> Tensor:
        """The layer over T tokens, from an empty state or from what ``state`` holds, which then holds these tokens too.

        Args:
            x: (batch, T, width).
            state: of this layer and batch; None is an empty one that is thrown away.
            mask: (batch, T), True where there is a token. Padding stands before a text: it changes no state, and the
                convolution sees zeros there.

        Returns:
            (batch, T, width).

        Raises:
            ValueError: x, the mask or the state does not fit.
        """
        self._check(x, mask)
        if x.shape[1] == 0:
            return torch.zeros_like(x)
        x = x if mask is None else x.masked_fill(~mask[..., None], 0.0)
        q, k, v = self.convolve(self.qkv_proj(x), state)  # (batch, heads, T, head_dim or value_dim)
        beta, log_decay = self.beta_proj(x).sigmoid().unsqueeze(3), self.log_decay(x)  # (batch, T, value_heads, 1 or d)
        if mask is not None:
            beta, log_decay = (number.masked_fill(~mask[..., None, None], 0.0) for number in (beta, log_decay))
        out, last = delta_attend(
            *(unit(y).repeat_interleave(self.value_heads // self.key_heads, 1) for y in (q, k)),
            v,
            beta=beta.transpose(1, 2),
            log_decay=log_decay.transpose(1, 2),
            initial_state=None if state is None else state.memory,
            return_state=True,
        )
        if state is not None:
            state.memory = last
        gate = self.gate_proj(x).unflatten(2, (self.value_heads, self.value_dim))  # (batch, T, value_heads, value_dim)
        return self.out_proj(self.gated_norm(out.transpose(1, 2), gate).flatten(2))

    def convolve(self, x: Tensor, state: "LayerState | None") -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v by heads, from the channels (batch, T, channels) of these tokens and of the few before them."""
        batch, before = x.shape[0], self.kernel - 1
        x = x.transpose(1, 2)  # (batch, channels, T)
        past = x.new_zeros(batch, self.channels, before) if state is None or state.channels is None else state.channels
        if past.shape != (batch, self.channels, before):
            raise ValueError(
                f"the state is of {counted(past.shape[0], 'text')}, x has {batch}; use a state for each batch"
            )
        x = torch.cat([past.to(x.dtype), x], 2)
        if state is not None:
            state.channels = x[:, :, x.shape[2] - before :].clone()
        x = F.silu(convolved(x, self.convolution))  # (batch, channels, T)
        q, k, v = x.transpose(1, 2).split([self.key_width, self.key_width, self.value_width], 2)
        return tuple(y.unflatten(2, (-1, dim)).transpose(1, 2) for y, dim in self._with_dims(q, k, v))

    def log_decay(self, x: Tensor) -> Tensor:
        """(batch, T, value_heads, 1), at most 0, in float32 or float64; with a decay a feature (.., head_dim)."""
        a = self.decay_proj(x)
        dtype = sum_dtype(a)
        steps = F.softplus(a.to(dtype) + self.decay_bias).unflatten(2, (self.value_heads, -1))
        return -self.log_rate.to(dtype).exp()[:, None] * steps

    def gated_norm(self, out: Tensor, gate: Tensor) -> Tensor:
        """RMSNorm of each head's output in float32, times its gate: (batch, T, value_heads, value_dim)."""
        wide = out.to(sum_dtype(out))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.norm_epsilon)
        return (self.norm * normed.to(out.dtype) * self.gate_activation(gate.to(wide.dtype))).to(out.dtype)

    def _with_dims(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, int], ...]:
        return (q, self.head_dim), (k, self.head_dim), (v, self.value_dim)

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        width = self.qkv_proj.in_features
        if x.dim() != 3 or x.shape[2] != width:
            raise ValueError(f"x must be (batch, T, {width}), got {tuple(x.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            expected = f"(batch, T) = {tuple(x.shape[:2])} of torch.bool"
            raise ValueError(f"mask must be {expected}, got {tuple(mask.shape)} of {mask.dtype}")


class KimiDeltaLayer(GatedDeltaLayer):
    """The layer with a decay for each feature of a key: (batch, T, width) -> (batch, T, width).

    Decays and gates come from x by way of ``head_dim`` numbers, so that their matrices stay small.

    Args:
        width, head_dim, kernel, norm_epsilon: as there.
        heads: of queries, keys, values and states.
    """

    gate_activation = staticmethod(torch.sigmoid)

    def __init__(self, width: int, *, heads: int, head_dim: int, kernel: int = 4, norm_epsilon: float = NORM_EPSILON):
        sizes = {"key_heads": heads, "value_heads": heads, "head_dim": head_dim, "kernel": kernel}
        super().__init__(width, **sizes, norm_epsilon=norm_epsilon)
        narrow = lambda: nn.Sequential(  # noqa: E731
            nn.Linear(width, head_dim, bias=False), nn.Linear(head_dim, heads * head_dim, bias=False)
        )
        self.gate_proj, self.decay_proj = narrow(), narrow()
        self.decay_bias = nn.Parameter(first_decay_bias(heads * head_dim))


class LayerState:
    """What a :class:`GatedDeltaLayer` remembers of the tokens so far; its size does not depend on how many there were.

    Attributes:
        channels: None before the first token, then (batch, channels, kernel - 1): what the convolution sees next.
        memory: None, then (batch, value_heads, head_dim, value_dim) in float32 or float64.
    """

    def __init__(self):
        self.channels: Tensor | None = None
        self.memory: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it holds now."""
        return sum(x.nbytes for x in (self.channels, self.memory) if x is not None)

    def reset(self) -> None:
        """Forget everything."""
        self.channels = self.memory = None

    def reorder(self, rows: Sequence[int] | Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was; a row may be taken more than once, or dropped."""
        if self.memory is not None:
            rows = torch.as_tensor(rows, device=self.memory.device)
            self.channels, self.memory = self.channels[rows], self.memory[rows]


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """Each channel of x (batch, channels, n) convolved on its own: (batch, channels, n - kernel + 1).

    Args:
        weight: (channels, kernel).
    """
    if (
        x.shape[2] == weight.shape[1] and not x.is_cuda
    ):  # one token of a text: a CPU's convolution takes longer to begin
        dtype = sum_dtype(x)
        return (x.to(dtype) * weight.to(dtype)).sum(2, keepdim=True).to(x.dtype)
    return F.conv1d(x, weight.unsqueeze(1), groups=len(weight))


def first_decay_bias(heads: int) -> Tensor:
    """(heads,): what softplus turns into steps of 0.001 to 0.1, evenly on a logarithmic axis.

    A fresh head then keeps exp(-0.001) to exp(-1.6) of its state a token; a bias of 1 would forget nearly all of it.
    Source: Gu and Dao 2023, "Mamba", section 3.6.
    """
    steps = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp()
    return steps + torch.log(-torch.expm1(-steps))  # the inverse of softplus


def unit(x: Tensor) -> Tensor:
    """x (..., head_dim) with length 1, but for a 1e-6 that keeps a row of zeros from a division by zero."""
    wide = x.to(sum_dtype(x))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


# --- published layers ------------------------------------------------------------------------------------------------

NAMES = {
    "conv1d.weight": "convolution",
    "A_log": "log_rate",
    "dt_bias": "decay_bias",
    "norm.weight": "norm",
    "out_proj.weight": "out_proj.weight",
    "in_proj_qkv.weight": "qkv_proj.weight",
    "in_proj_z.weight": "gate_proj.weight",
    "in_proj_b.weight": "beta_proj.weight",
    "in_proj_a.weight": "decay_proj.weight",
}
"""Names of weights in checkpoints of Qwen3.5, and here."""
KIMI_NAMES = {
    "conv1d.weight": "convolution",
    "forget_gate.A_log": "log_rate",
    "forget_gate.dt_bias": "decay_bias",
    "o_norm.weight": "norm",
    "o_proj.weight": "out_proj.weight",
    "in_proj_qkv.weight": "qkv_proj.weight",
    "b_proj.weight": "beta_proj.weight",
    **{f"g_{part}_proj.weight": f"gate_proj.{i}.weight" for i, part in enumerate("ab")},
    **{f"forget_gate.f_{part}_proj.weight": f"decay_proj.{i}.weight" for i, part in enumerate("ab")},
}
"""The same for Kimi Linear, whose q, k and v are joined first."""


def weights_from_checkpoint(layer: GatedDeltaLayer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a linear layer of Qwen3-Next, Qwen3.5 or Kimi Linear under the names of ``layer``.

    Qwen3.5 has a matrix for each of q, k and v together, gate, step sizes and decays. Qwen3-Next has two: the rows of
    ``in_proj_qkvz`` are q, k, v and gate of the first key head and its value heads, then of the second, and so on;
    ``in_proj_ba`` has step sizes and decays in the same order.

    Args:
        layer: of the checkpoint's sizes.
        weights: by the names in the checkpoint, without the layer's own.

    Raises:
        ValueError: a name is unknown.
    """
    weights = dict(weights)
    if "in_proj_qkvz.weight" in weights:
        group = layer.value_heads // layer.key_heads
        values = group * layer.value_dim
        by_head = lambda name, sizes: weights.pop(name).unflatten(0, (layer.key_heads, -1)).split(sizes, 1)  # noqa: E731
        *qkv, z = by_head("in_proj_qkvz.weight", [layer.head_dim, layer.head_dim, values, values])
        b, a = by_head("in_proj_ba.weight", [group, group])
        weights["in_proj_qkv.weight"] = torch.cat([x.flatten(0, 1) for x in qkv])
        for name, x in (("z", z), ("b", b), ("a", a)):
            weights[f"in_proj_{name}.weight"] = x.flatten(0, 1)
    names = KIMI_NAMES if isinstance(layer, KimiDeltaLayer) else NAMES
    if names is KIMI_NAMES and "q_proj.weight" in weights:
        weights["in_proj_qkv.weight"] = torch.cat([weights.pop(f"{name}_proj.weight") for name in "qkv"])
    if unknown := sorted(set(weights) - set(names)):
        raise ValueError(f"these weights are not of a gated delta layer: {', '.join(unknown)}")
    shapes = {name: x.shape for name, x in layer.state_dict().items()}
    return {names[name]: x.reshape(shapes[names[name]]) for name, x in weights.items()}
