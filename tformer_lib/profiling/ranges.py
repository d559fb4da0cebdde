"""Named ranges: stretches of time that Nsight Systems, Nsight Compute and traces show by name."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch

OFF = nullcontext()
"""What :func:`range` gives while nobody listens."""

_markers: tuple[Callable[[str], AbstractContextManager], ...] = ()


def range(name: str) -> AbstractContextManager:
    """A named stretch of time, for a ``with``. It costs a function call when nobody listens.

    Args:
        name: the phase: ``"attention"``, ``"sampling"``. One word for one thing, so that filters find it.
    """
    if not _markers or torch.compiler.is_compiling():
        return OFF
    return _marked(name)


@contextmanager
def _marked(name: str) -> Iterator[None]:
    """Tell every listener where the range begins and ends."""
    with ExitStack() as stack:
        for marker in _markers:
            stack.enter_context(marker(name))
        yield


def enable() -> None:
    """Send ranges to NVIDIA's tools, until :func:`disable`.

    Raises:
        ImportError: neither the nvtx package nor a PyTorch with CUDA is there.
    """
    global _markers
    _markers = (*_markers, nvtx_marker())


def disable() -> None:
    """Switch every range off."""
    global _markers
    _markers = ()


def enabled() -> bool:
    """Whether anybody listens to ranges."""
    return bool(_markers)


def nvtx_marker() -> Callable[[str], AbstractContextManager]:
    """What makes an NVTX range: the nvtx package, or PyTorch's binding where it was built with CUDA."""
    try:
        import nvtx
    except ImportError as error:
        if torch.version.cuda is None:
            raise ImportError("NVTX ranges need the nvtx package, which is missing: pip install nvtx") from error
        return torch.cuda.nvtx.range
    return nvtx.annotate


@contextmanager
def listening(marker: Callable[[str], AbstractContextManager]) -> Iterator[None]:
    """Call ``marker(name)`` for each range opened inside."""
    global _markers
    before = _markers
    _markers = (*before, marker)
    try:
        yield
    finally:
        _markers = before
