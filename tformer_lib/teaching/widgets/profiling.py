"""The limit explorer of chapter 20: what decides the time of a piece of work, and what a faster part would buy."""

from tformer_lib.profiling import Roofline
from tformer_lib.teaching.widgets import Interactive, module


class LimitExplorer(Interactive):
    """Choose a device and a piece of work, and read which of arithmetic, memory and launches decides."""

    _esm = module("profiling.js")


def explorer(devices: dict[str, Roofline], works: dict[str, tuple[float, float, int]]) -> LimitExplorer:
    """The explorer for these devices, with works to start from.

    Args:
        devices: label -> limits.
        works: label -> (FLOPs, bytes, operators launched).
    """
    roofs = {name: [r.flops_per_second, r.bytes_per_second, r.launch_seconds] for name, r in devices.items()}
    return LimitExplorer(
        label="Limit explorer: arithmetic, memory, launches",
        data={"devices": {n: [float(f"{x:.3g}") for x in r] for n, r in roofs.items()}, "works": rounded(works)},
    )


def rounded(works: dict[str, tuple[float, float, int]]) -> dict[str, list[float]]:
    """Three digits are enough to move sliders by."""
    return {name: [float(f"{x:.3g}") for x in work] for name, work in works.items()}
