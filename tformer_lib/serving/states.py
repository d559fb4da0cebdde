"""The states of linear layers in an engine: one for each batch slot, of one size however long its text is."""

from collections.abc import Callable

import torch
from torch import Tensor

from tformer_lib.linear_attention import LayerState


class BatchSlotStates:
    """What the linear layers of a model remember of the text in each batch slot.

    A request that gets a batch slot, or gets one again after it had to leave, begins at position 0, where a state is
    empty. So nobody has to empty a batch slot.

    Args:
        config: the model's ``ModelConfig``, which has linear layers.
        batch_slots: how many there are, nobody's included.
        dtype: of the model.
        device: of the model.
    """

    def __init__(self, config, batch_slots: int, dtype: torch.dtype, device: torch.device):
        linear, layers = config.linear, config.types_of_layers.count("linear")
        wide = torch.promote_types(dtype, torch.float32)
        size = (layers, batch_slots, linear.channels, linear.kernel - 1)
        self.channels = torch.zeros(size, dtype=dtype, device=device)
        self.memory = torch.zeros(layers, batch_slots, *linear.state, dtype=wide, device=device)
        self.places = [config.types_of_layers[:i].count("linear") for i in range(config.layers)]

    def layer(self, index: int, batch_slots: Tensor, positions: Tensor, starts: Tensor | None) -> "BatchSlotLayer":
        """The part of the model's layer ``index``; the tensors are those of a :class:`BatchSlotLayer`."""
        place = self.places[index]
        return BatchSlotLayer(self.channels[place], self.memory[place], batch_slots, positions, starts)


class BatchSlotLayer:
    """One layer's states, and the rows of a step.

    Args:
        channels: (batch_slots, channels, kernel - 1), written to.
        memory: (batch_slots, heads, head_dim, value_dim), written to.
        batch_slots: (total,) int64, the batch slot of each token.
        positions: (total,) int64, the place of each token in its row.
        starts: (rows + 1,) int32, where each row's tokens begin; None where each row has one.
    """

    def __init__(self, channels: Tensor, memory: Tensor, batch_slots: Tensor, positions: Tensor, starts: Tensor | None):
        self.channels, self.memory = channels, memory
        self.batch_slots, self.positions, self.starts = batch_slots, positions, starts

    def run(self, layer: Callable[..., Tensor], x: Tensor) -> Tensor:
        """A linear layer over each row's new tokens, from its batch slot's state, which it leaves for the next step.

        Rows that bring equally many tokens run together. Where all bring one, nothing is read by the host, so that a
        CUDA graph can record it; else a GPU is waited for.

        Args:
            layer: x (rows, T, width) and ``state`` (a :class:`LayerState`) to (rows, T, width).
            x: (1, total, width).

        Returns:
            (1, total, width).
        """
        if self.starts is None:
            return self._run(layer, x[0][:, None], self.batch_slots, self.positions)[:, 0][None]
        out, starts = torch.zeros_like(x[0]), self.starts.long()
        counts = starts.diff()  # (rows,)
        for count in sorted(set(counts.tolist()) - {0}):
            first = starts[:-1][counts == count]  # (rows of so many tokens,)
            places = first[:, None] + torch.arange(count, device=x.device)
            out[places] = self._run(layer, x[0][places], self.batch_slots[first], self.positions[first])
        return out[None]

    def _run(self, layer: Callable[..., Tensor], x: Tensor, batch_slots: Tensor, first: Tensor) -> Tensor:
        """Rows of equally many tokens: x (rows, T, width), their batch slots and first positions, (rows,) each."""
        state, begun = LayerState(), first > 0
        state.channels = self.channels[batch_slots] * begun[:, None, None]
        state.memory = self.memory[batch_slots] * begun[:, None, None, None]
        out = layer(x, state=state)
        self.channels[batch_slots], self.memory[batch_slots] = state.channels.to(self.channels.dtype), state.memory
        return out
