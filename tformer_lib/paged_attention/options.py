"""What is asked of paged attention beside queries and pools. They are tuples, which Python hashes fastest."""

from typing import NamedTuple

from torch import Tensor

from tformer_lib.ladder import AUTO, loadable


class Options(NamedTuple):
    """What is asked of every step that attends."""

    scale: float
    """Of the scores."""
    window: int | None = None
    """A query sees so many keys, its own the last."""
    k_scale: float = 1.0
    """What the keys in the pool are multiplied by."""
    v_scale: float = 1.0
    step: str = AUTO
    checked: bool = False
    """Whether the numbers in tables, lengths and starts are looked at on a GPU too."""
    batch_invariant: bool = False
    """Whether a row's result must be the same in every bit, whatever the other rows are."""


class Rows(NamedTuple):
    """Where the keys and the queries of each row are, as :func:`paged_attention` takes them."""

    block_tables: Tensor
    lengths: Tensor
    query_starts: Tensor | None = None
    max_queries: int | None = None

    def loadable(self) -> "Rows":
        """The same numbers where kernels can read them."""
        starts = None if self.query_starts is None else loadable(self.query_starts)
        return Rows(loadable(self.block_tables), loadable(self.lengths), starts, self.max_queries)

    @property
    def one_query(self) -> bool:
        """Whether each row has one query at most."""
        return self.query_starts is None or self.max_queries == 1


class WriteOptions(NamedTuple):
    """What is asked of every step that writes."""

    layout: str = "half"
    """Of RoPE's pairs."""
    k_scale: float = 1.0
    """What is stored in a pool of float8 is divided by this."""
    v_scale: float = 1.0
    step: str = AUTO
    checked: bool = False
    """Whether the slots are looked at on a GPU too."""


class Places(NamedTuple):
    """Where new keys and values go, and the angles that the keys are turned by, as :func:`write_cache` takes them."""

    slots: Tensor
    cos: Tensor | None = None
    sin: Tensor | None = None

    def loadable(self) -> "Places":
        """The same numbers where kernels can read them."""
        return Places(*(None if x is None else loadable(x) for x in self))
