"""The states of linear layers in an engine: one for each seat, of one size however long its text is."""

from collections.abc import Callable

import torch
from torch import Tensor

from tformer_lib.linear_attention import LayerState


class SeatStates:
    """What the linear layers of a model remember of the text in each seat.

    A request that sits down, or begins anew after it had to leave, begins at position 0, where a state is empty. So
    nobody has to empty a seat.

    Args:
        config: the model's ``ModelConfig``, which has linear layers.
        seats: how many there are, nobody's included.
        dtype: of the model.
        device: of the model.
    """

    def __init__(self, config, seats: int, dtype: torch.dtype, device: torch.device):
        linear, layers = config.linear, config.types_of_layers.count("linear")
        wide = torch.promote_types(dtype, torch.float32)
        size = (layers, seats, linear.channels, linear.kernel - 1)
        self.channels = torch.zeros(size, dtype=dtype, device=device)
        self.memory = torch.zeros(layers, seats, *linear.state, dtype=wide, device=device)
        self.places = [config.types_of_layers[:i].count("linear") for i in range(config.layers)]

    def layer(self, index: int, seats: Tensor, positions: Tensor, starts: Tensor | None) -> "SeatLayer":
        """The part of the model's layer ``index``; the tensors are those of a :class:`SeatLayer`."""
        place = self.places[index]
        return SeatLayer(self.channels[place], self.memory[place], seats, positions, starts)


class SeatLayer:
    """One layer's states, and the rows of a step.

    Args:
        channels: (seats, channels, kernel - 1), written to.
        memory: (seats, heads, head_dim, value_dim), written to.
        seats: (total,) int64, the seat of each token.
        positions: (total,) int64, the place of each token in its row.
        starts: (rows + 1,) int32, where each row's tokens begin; None where each row has one.
    """

    def __init__(self, channels: Tensor, memory: Tensor, seats: Tensor, positions: Tensor, starts: Tensor | None):
        self.channels, self.memory = channels, memory
        self.seats, self.positions, self.starts = seats, positions, starts

    def run(self, layer: Callable[..., Tensor], x: Tensor) -> Tensor:
        """A linear layer over each row's new tokens, from the state of its seat, which it leaves for the next step.

        Rows that bring equally many tokens run together. Where all bring one, nothing is read by the host, so that a
        CUDA graph can record it; else a GPU is waited for.

        Args:
            layer: x (rows, T, width) and ``state`` (a :class:`LayerState`) to (rows, T, width).
            x: (1, total, width).

        Returns:
            (1, total, width).
        """
        if self.starts is None:
            return self._run(layer, x[0][:, None], self.seats, self.positions)[:, 0][None]
        out, starts = torch.zeros_like(x[0]), self.starts.long()
        counts = starts.diff()  # (rows,)
        for count in sorted(set(counts.tolist()) - {0}):
            first = starts[:-1][counts == count]  # (rows of so many tokens,)
            places = first[:, None] + torch.arange(count, device=x.device)
            out[places] = self._run(layer, x[0][places], self.seats[first], self.positions[first])
        return out[None]

    def _run(self, layer: Callable[..., Tensor], x: Tensor, seats: Tensor, first: Tensor) -> Tensor:
        """Rows of equally many tokens: x (rows, T, width), their seats and their first positions, (rows,) each."""
        state, begun = LayerState(), first > 0
        state.channels = self.channels[seats] * begun[:, None, None]
        state.memory = self.memory[seats] * begun[:, None, None, None]
        out = layer(x, state=state)
        self.channels[seats], self.memory[seats] = state.channels.to(self.channels.dtype), state.memory
        return out
