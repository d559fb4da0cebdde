"""One decode step: plain, compiled, or recorded in a CUDA graph."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from tformer_lib.kv_cache import KVCache
from tformer_lib.transformer import evaluating


class StaticStep:
    """One decode step whose shapes and addresses never change, so that it can be recorded once and replayed.

    On a GPU the step is captured in a CUDA graph: its hundred or more kernels then cost one launch. The lengths live on
    the device and the step advances them itself, so one recording serves every length up to the cache's capacity.
    Elsewhere, or with ``capture=False``, the same step runs uncaptured.

    Args:
        model: a ``Decoder``; a step runs in evaluation mode.
        cache: a cache with ``static_shapes`` (preallocated or ring), still empty: recording writes to it.
        compile: fuse the step's kernels with ``torch.compile`` first; its first call takes tens of seconds.
        capture: record a CUDA graph; by default where the cache is on a GPU.
        backend: the compiler's backend.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: KVCache,
        *,
        compile: bool = False,
        capture: bool | None = None,
        backend: str = "inductor",
    ):
        if not hasattr(cache, "static_shapes"):
            raise ValueError(f"a static step needs a preallocated or a ring cache, got {type(cache).__name__}")
        if any(cache.host_lengths):
            raise ValueError(f"a static step is recorded on an empty cache, this one holds {cache.host_lengths} tokens")
        self.model, self.cache = model, cache
        self.tokens = torch.zeros(cache.shape.batch, 1, dtype=torch.int64, device=cache.lengths.device)
        self.forward = lambda tokens: model(tokens, cache=cache)[:, -1]
        if compile:
            self.forward = torch.compile(self.forward, fullgraph=True, backend=backend)
        self.graph: torch.cuda.CUDAGraph | None = None
        if cache.lengths.is_cuda if capture is None else capture:
            self._capture()

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Append tokens (batch, 1) int64 and return the logits (batch, vocab_size) of the next.

        The logits of a captured step are overwritten by the next call.
        """
        self.cache.check_room([n + 1 for n in self.cache.host_lengths])
        if self.graph is None:
            logits = self._run(tokens)
        else:
            self.tokens.copy_(tokens)
            self.graph.replay()
            logits = self.logits
        self.cache.replayed()
        return logits

    def _run(self, tokens: Tensor) -> Tensor:
        with evaluating(self.model), self.cache.static_shapes():
            return self.forward(tokens)

    @torch.no_grad()
    def _capture(self) -> None:
        """Warm up on a side stream, as CUDA graphs ask, record, and leave the cache empty again."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.cache.reset()
                self._run(self.tokens)
        torch.cuda.current_stream().wait_stream(side)
        self.cache.reset()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._run(self.tokens)
        self.cache.reset()


class Switch:
    """A setting of the whole process, which is another one as long as anybody is inside.

    The first that enters changes it, and the last that leaves puts back what the first found, in whatever thread.

    Args:
        read: returns the setting.
        write: changes it.
        wanted: what it is inside.
    """

    def __init__(self, read: Callable[[], bool], write: Callable[[bool], None], wanted: bool):
        self.read, self.write, self.wanted = read, write, wanted
        self.lock, self.inside, self.found = threading.Lock(), 0, wanted

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.found = self.read()
                self.write(self.wanted)
            self.inside += 1

    def __exit__(self, *_) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.write(self.found)


CUDNN_ATTENTION = Switch(torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp, False)
ONEDNN = Switch(
    lambda: torch.backends.mkldnn.enabled, lambda on: setattr(torch.backends.mkldnn, "enabled", on), wanted=False
)


@contextmanager
def changing_shapes() -> Iterator[None]:
    """PyTorch's attention without cuDNN, which prepares a plan for every new shape, and here each step has one.

    On a GPU where PyTorch prefers cuDNN, preparing takes tens of milliseconds, each step's attention microseconds.
    """
    with CUDNN_ATTENTION:
        yield


@contextmanager
def one_row(model: nn.Module, tokens: Tensor) -> Iterator[None]:
    """PyTorch's own products of a matrix and a vector in place of oneDNN's, where a pass brings one bfloat16 token.

    On a CPU, PyTorch gives bfloat16 products to oneDNN, which is made for many rows and, for one, reads the weights at
    half the speed of PyTorch's own loop. Both add in float32. From two rows on, oneDNN is as fast or faster.

    Args:
        model: a ``Decoder``.
        tokens: (batch, T), what the pass brings.
    """
    is_one = tokens.numel() == 1 and tokens.device.type == "cpu"
    with ONEDNN if is_one and next(model.parameters()).dtype == torch.bfloat16 else nullcontext():
        yield


def decode_step(
    model: nn.Module, cache: KVCache, *, cuda_graph: bool = False, compile: bool = False
) -> Callable[[Tensor], Tensor]:
    """The function that appends tokens (batch, 1) and returns the next logits (batch, vocab_size).

    Raises:
        ValueError: a CUDA graph was asked for, and the cache is on no GPU.
    """
    if cuda_graph and not cache.lengths.is_cuda:
        raise ValueError(f"cuda_graph needs a model on a GPU, this one is on {cache.lengths.device}")
    if cuda_graph or compile:
        return StaticStep(model, cache, compile=compile, capture=cuda_graph)

    def step(tokens: Tensor) -> Tensor:
        with evaluating(model), changing_shapes(), one_row(model, tokens):
            return model(tokens, cache=cache)[:, -1]

    return step
