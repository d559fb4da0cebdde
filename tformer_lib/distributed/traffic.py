"""What really travels between processes: the collective operations that the profiler sees, and their bytes."""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from tformer_lib.distributed.costs import all_gather_bytes, all_reduce_bytes

KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "send": "send",
}
"""torch's operators -> what they do."""

ITEMSIZES = {"float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8, "long int": 8, "int": 4}
"""How the profiler calls a dtype -> its bytes."""


def collectives(fn: Callable[[], object], device: torch.device) -> list[tuple[str, float]]:
    """The collective operations of one call: (kind, bytes of the largest tensor that it is given) of each."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        fn()
        if device.type == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = []
    for event in events:
        space, _, name = str(event.get("name", "")).partition("::")
        kind = KINDS.get(name) if space == "c10d" else None
        if kind is not None:
            arguments = event.get("args", {})
            found.append((kind, largest(arguments.get("Input Dims", []), arguments.get("Input type", []))))
    return found


def largest(dims: list, types: list) -> float:
    """Bytes of the largest tensor among an operator's arguments, lists of tensors included.

    The profiler does not say what a list of tensors holds: it is taken for float32.
    """
    most = 0.0
    for shape, dtype in zip(dims, types, strict=False):
        if shape and isinstance(shape[0], list):
            inner = dtype if isinstance(dtype, list) else [dtype] * len(shape)
            most = max(most, largest(shape, inner))
        elif shape:
            count = 1.0
            for n in shape:
                count *= n
            name = re.sub(r"^TensorList|\[\]$", "", str(dtype)) or "float"
            most = max(most, count * ITEMSIZES.get(name, 4))
    return most


def sent_bytes(kind: str, whole: float, size: int) -> float:
    """Bytes that a device sends in an operation whose largest tensor has ``whole`` bytes."""
    if kind == "send":
        return whole
    return (all_reduce_bytes if kind == "all-reduce" else all_gather_bytes)(whole, size)


def bytes_sent(fn: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Bytes that this process sends in one call of ``fn``, by torch's profiler and what a ring sends.

    All processes must call it together.
    """
    size = torch.distributed.get_world_size()
    return sum(sent_bytes(kind, whole, size) for kind, whole in collectives(fn, torch.device(device)))
