"""One cache for a model whose layers are of different kinds."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from torch import Tensor, nn

from tformer_lib.kv_cache.interface import CacheShape, KVCache, LayerCache
from tformer_lib.kv_cache.preallocated import PreallocatedCache
from tformer_lib.kv_cache.ring import RingCache
from tformer_lib.kv_cache.state import StateCache, StateLayer


class ModelCache:
    """The interface of a cache over several, each of which holds the layers of one kind.

    A window layer never looks past its window, so it keeps a ring, whose memory does not grow. A full layer keeps all,
    a linear layer one state. All parts hold equally many tokens of each row.

    Args:
        parts: name -> cache. The books of the first are those of all.
        kinds: for each layer of the model the name of its part, which has as many layers as there are of its name.

    Raises:
        ValueError: a part has another number of layers or rows.
    """

    def __init__(self, parts: Mapping[str, KVCache], kinds: Sequence[str]):
        self.parts, self.kinds = dict(parts), tuple(kinds)
        for name, part in self.parts.items():
            layers, batch = self.kinds.count(name), self.first.shape.batch
            if (part.shape.layers, part.shape.batch) != (layers, batch):
                came = f"{part.shape.layers} and {part.shape.batch}"
                raise ValueError(f"part {name} must have {layers} layers and {batch} rows, got {came}")
        self.places = [self.kinds[:i].count(kind) for i, kind in enumerate(self.kinds)]

    @classmethod
    def of(cls, model: nn.Module, batch: int, capacity: int) -> "ModelCache":
        """The cache that ``model`` (a ``Decoder``) needs for ``batch`` rows of at most ``capacity`` tokens.

        A window that holds ``capacity`` tokens needs no ring.
        """
        shape, config = CacheShape.of(model, batch), model.config
        kinds = ["full" if kind == "nope" else kind for kind in config.types_of_layers]

        def part(name: str) -> KVCache:
            of_kind = replace(shape, layers=kinds.count(name))
            if name == "linear":
                linear = config.linear
                return StateCache(of_kind, channels=linear.channels, before=linear.kernel - 1, state=linear.state)
            is_ring = name == "window" and config.window < capacity
            return RingCache(of_kind, config.window, sinks=0) if is_ring else PreallocatedCache(of_kind, capacity)

        return cls({name: part(name) for name in ("linear", "window", "full") if name in kinds}, kinds)

    @property
    def first(self) -> KVCache:
        """The first part, whose books are those of all."""
        return next(iter(self.parts.values()))

    @property
    def shape(self) -> CacheShape:
        """What is held for each token, by all layers together."""
        return replace(self.first.shape, layers=len(self.kinds))

    @property
    def lengths(self) -> Tensor:
        """(batch,) tokens held so far."""
        return self.first.lengths

    @property
    def host_lengths(self) -> list[int]:
        """The same numbers where reading them does not wait for a GPU."""
        return self.first.host_lengths

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that the parts take now."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token of one row takes while no window is full."""
        return sum(part.bytes_per_token for part in self.parts.values())

    def expect(self, counts: Sequence[int]) -> None:
        """Say that the next pass is ragged: see :meth:`KVCache.expect`."""
        for part in self.parts.values():
            part.expect(counts)

    def positions(self, T: int) -> Tensor:
        """The places of the next T tokens in their rows, (batch, T) int64."""
        places, *_ = [part.positions(T) for part in self.parts.values()]  # every part plans the pass
        return places

    def layer(self, index: int) -> LayerCache | StateLayer:
        """The part of layer ``index``.

        Raises:
            ValueError: there is no such layer.
        """
        if not 0 <= index < len(self.kinds):
            raise ValueError(f"the cache has layers 0 to {len(self.kinds) - 1}, got {index}")
        return self.parts[self.kinds[index]].layer(self.places[index])

    def check_room(self, ends: list[int]) -> None:
        """Refuse a pass after which some row would hold more than there is room for."""
        for part in self.parts.values():
            part.check_room(ends)

    def advance(self, T: int) -> None:
        """Count the T tokens that all layers have stored."""
        for part in self.parts.values():  # all before one counts
            part.check_length(T)
        for part in self.parts.values():
            part.advance(T)

    @contextmanager
    def static_shapes(self) -> Iterator[None]:
        """Passes of one token whose shapes never change: see :meth:`StaticCache.static_shapes`."""
        with ExitStack() as stack:
            for part in self.parts.values():
                stack.enter_context(part.static_shapes())
            yield

    def replayed(self) -> None:
        """Count one more token per row on the host, after a pass under ``static_shapes``."""
        for part in self.parts.values():
            part.replayed()

    def reset(self) -> None:
        """Forget everything, as if just made."""
        for part in self.parts.values():
            part.reset()

    def check_truncate(self, lengths: Sequence[int]) -> list[int]:
        """The lengths as integers, where every part can be cut to them."""
        *_, lengths = [part.check_truncate(lengths) for part in self.parts.values()]
        return lengths

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget all but the first ``lengths[b]`` tokens of each row b.

        Raises:
            ValueError: a row holds fewer tokens than it is to keep, or a ring has lost some of them. Nothing changed.
        """
        self.check_truncate(lengths)
        for part in self.parts.values():
            part.truncate(lengths)

    def reorder(self, rows: Sequence[int]) -> None:
        """Row b becomes a copy of what row ``rows[b]`` was."""
        for part in self.parts.values():
            part.abandon()  # a part that cannot undo a pass that failed says so before any part has new rows
        for part in self.parts.values():
            part.reorder(rows)
