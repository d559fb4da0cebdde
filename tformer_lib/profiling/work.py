"""Work: the FLOPs and bytes of everything that runs, counted operator by operator."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

PRODUCTS: dict = dict(flop_registry)
"""Operator -> the formula for its FLOPs: PyTorch's own, the CPU's fused attention, which it leaves out, and those that
modules of this library add for their kernels."""


@dataclass
class Work:
    """What was counted: operator -> calls, FLOPs of its matrix products, elements of other results, bytes moved."""

    operators: dict[str, dict] = field(default_factory=lambda: defaultdict(lambda: dict.fromkeys(COUNTED, 0)))

    @property
    def flops(self) -> int:
        """FLOPs of the matrix products and of fused attention, a multiplication and an addition counting two."""
        return sum(entry["flops"] for entry in self.operators.values())

    @property
    def bytes(self) -> int:
        """Bytes read and written, if each operator reads its inputs and writes its results once."""
        return sum(entry["bytes"] for entry in self.operators.values())

    @property
    def calls(self) -> int:
        """Operators that did something; views are free and not counted."""
        return sum(entry["calls"] for entry in self.operators.values())

    def table(self, rows: int = 10) -> str:
        """The operators that move the most bytes."""
        lines = [f"{'bytes':>13} {'flops':>13} {'flop/byte':>9} {'calls':>7}  operator"]
        for name, e in sorted(self.operators.items(), key=lambda item: -item[1]["bytes"])[:rows]:
            intensity = e["flops"] / e["bytes"] if e["bytes"] else 0.0
            lines.append(f"{e['bytes']:13,} {e['flops']:13,} {intensity:9.2f} {e['calls']:7d}  {name}")
        return "\n".join(lines)


COUNTED = ("calls", "flops", "elements", "bytes")


class count(TorchDispatchMode):
    """Count FLOPs and bytes of everything that runs inside; ``as`` gives the :class:`Work`.

    The bytes are those of a machine without a cache: each operator reads each input once and writes each result once.
    An input that was expanded counts its distinct elements, a look-up only the rows that it takes, a view nothing.
    """

    def __init__(self):
        super().__init__()
        self.work = Work()

    def __enter__(self) -> Work:
        super().__enter__()
        return self.work

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operator and add it up."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not moves_nothing(func):
            entry = self.work.operators[str(func._overloadpacket)]
            formula = PRODUCTS.get(func._overloadpacket)
            entry["calls"] += 1
            entry["bytes"] += traffic(func, args, kwargs, out)
            entry["flops"] += formula(*args, **kwargs, out_val=out) if formula else 0
            entry["elements"] += 0 if formula else sum(t.numel() for t in tensors(out))
        return out


LOOKUPS = {torch.ops.aten.embedding, torch.ops.aten.index_select, torch.ops.aten.gather, torch.ops.aten.index}
"""Operators that read of their first input only what they return."""

WRITES = {torch.ops.aten.copy_, torch.ops.aten.fill_, torch.ops.aten.zero_}
"""Operators that overwrite their first input without reading it."""

NEW_NAMES = {torch.ops.aten.detach, torch.ops.aten.alias, torch.ops.aten._unsafe_view}
RESERVES = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided, torch.ops.aten.new_empty}
EMPTY = NEW_NAMES | RESERVES
"""Operators that move nothing: other names for the same numbers, and memory that is left as it is."""


def moves_nothing(func) -> bool:
    """Whether an operator only makes a view, or reserves memory."""
    if func._overloadpacket in EMPTY:
        return True
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def traffic(func, args: tuple, kwargs: dict, out) -> int:
    """Bytes that one operator reads and writes."""
    inputs, packet = tensors((args, kwargs)), func._overloadpacket
    if packet in LOOKUPS or packet in WRITES:
        inputs = inputs[1:]
    taken = sum(distinct_bytes(t) for t in tensors(out)) if packet in LOOKUPS else 0
    return taken + sum(distinct_bytes(t) for t in inputs) + sum(distinct_bytes(t) for t in tensors(out))


def tensors(tree) -> list[Tensor]:
    """The tensors in nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def distinct_bytes(x: Tensor) -> int:
    """Bytes of a tensor's elements, those that ``expand`` repeats counted once."""
    if x.numel() == 0:
        return 0
    size = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        size *= length if stride else 1
    return size


def attention_flops(query, key, value, *args, out_val=None, **kwargs) -> int:
    """FLOPs of fused attention on a CPU: two products of (T, head_dim) by (head_dim, S) a head, causal or not."""
    batch, heads, T, head_dim = query.shape
    return 2 * batch * heads * T * key.shape[2] * (head_dim + value.shape[3])


def attention_backward_flops(grad_out, query, key, value, *args, out_val=None, **kwargs) -> int:
    """FLOPs of its gradients: five products where the forward has two (the scores are computed again)."""
    batch, heads, T, head_dim = query.shape
    return 2 * batch * heads * T * key.shape[2] * (3 * head_dim + 2 * value.shape[3])


PRODUCTS.setdefault(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, attention_flops)
PRODUCTS.setdefault(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, attention_backward_flops)
