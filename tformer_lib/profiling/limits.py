"""Limits: the roofline of a device, and Amdahl's law."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Roofline:
    """The limits of a device, and what they promise.

    Args:
        flops_per_second: the rate of its matrix products, measured.
        bytes_per_second: the rate of a large copy, bytes read and written, measured.
        launch_seconds: what it takes to start one operator, measured.
    """

    flops_per_second: float
    bytes_per_second: float
    launch_seconds: float = 0.0

    @property
    def ridge(self) -> float:
        """FLOPs per byte at which arithmetic takes as long as memory."""
        return self.flops_per_second / self.bytes_per_second

    def rate(self, intensity: float) -> float:
        """The FLOP/s that work of so many FLOPs per byte can reach."""
        return min(self.flops_per_second, intensity * self.bytes_per_second)

    def parts(self, flops: float, bytes: float, launches: int = 1) -> dict[str, float]:
        """Seconds that the arithmetic, the memory and the launches would each take alone."""
        return {
            "arithmetic": flops / self.flops_per_second,
            "memory": bytes / self.bytes_per_second,
            "launches": launches * self.launch_seconds,
        }

    def seconds(self, flops: float, bytes: float, launches: int = 1) -> float:
        """The least time: the three overlap at best, so the longest decides."""
        return max(self.parts(flops, bytes, launches).values())

    def bound(self, flops: float, bytes: float, launches: int = 1) -> str:
        """What decides: "arithmetic", "memory" or "launches"."""
        parts = self.parts(flops, bytes, launches)
        return max(parts, key=parts.get)


def amdahl(share: float, speedup: float) -> float:
    """How many times faster the whole gets when ``share`` of its time gets ``speedup`` times faster.

    Raises:
        ValueError: the share is no share, or the speedup is not positive.
    """
    if not 0 <= share <= 1 or speedup <= 0:
        raise ValueError(f"share must be in [0, 1] and speedup above 0, got {share} and {speedup}")
    left = 1 - share + share / speedup
    return 1 / left if left else math.inf
