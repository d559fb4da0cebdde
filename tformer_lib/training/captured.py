"""A step as a CUDA graph: the host asks for all of its kernels by one call.

A step of GPT-2 124M is some 700 kernels. PyTorch asks for them one after the other, and each time it works out shapes,
memory and autograd's nodes anew. A GPU that finishes a kernel before the host has asked for the next one waits. A CUDA
graph is the list of the kernels of one step with all of their arguments. It is written down once, by a step that is
recorded and not run (the capture), and then one call of the host runs all of it (the replay).

The price is that nothing may change but the numbers in memory: every replay reads its inputs from the same addresses,
so that they must be copied there, and a number that the host passed to a kernel stays what it was at the capture. The
learning rate is therefore a tensor on the GPU. A step that asks the GPU for a number and waits cannot be captured.

Ledger (GPT-2's 124M, 32,768 tokens a step with fused norms; one H200)
  before      57.49 ms; the profiler saw the GPU idle for 5.7 ms of a step, some of it the profiler's own
  predicted   1.8 ms less, what is idle by the times of the kernels in a step without a profiler
  measured    57.28 ms in turns with it, 0.2 ms less. Idle time fell to 0.7 ms, but all kernels together took 55.0 ms in
              place of 53.4; perhaps the clock of a busier GPU is lower. After 12 steps losses differ by 0.0002

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
"""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3
"""Steps that run before the capture: they compile, load kernels and make the optimizer's state."""


class CapturedStep:
    """A step that is run a few times, then captured, and replayed from then on. Each call does one step.

    Args:
        step: a function of tensors that returns a tuple of tensors. Whatever else it reads and writes (weights,
            gradients, the optimizer's state) must be tensors on the GPU that stay at their addresses.
        device: the GPU.
    """

    def __init__(self, step: Callable[..., tuple[Tensor, ...]], device: torch.device):
        self.step, self.calls = step, 0
        self.inputs: tuple[Tensor, ...] = ()
        self.outputs: tuple[Tensor, ...] = ()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream(device)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One step; what it returns is the caller's own.

        Raises:
            ValueError: if the inputs have other shapes or dtypes than those of the first call.
        """
        self.take(inputs)
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.warm_up()
        if self.graph is None:
            self.capture()
        self.graph.replay()
        return tuple(x.clone() for x in self.outputs)

    def take(self, inputs: tuple[Tensor, ...]) -> None:
        """Copy the inputs to where the graph reads them."""
        if not self.inputs:
            self.inputs = tuple(map(torch.empty_like, inputs))
        expected, got = ([(tuple(x.shape), x.dtype) for x in some] for some in (self.inputs, inputs))
        if expected != got:
            raise ValueError(f"a captured step takes inputs like its first, {expected}, got {got}")
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)

    def warm_up(self) -> tuple[Tensor, ...]:
        """A step that is run as always, but on the stream of the capture."""
        here = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            outputs = self.step(*self.inputs)
        here.wait_stream(self.stream)
        return tuple(x.clone() for x in outputs)

    def capture(self) -> None:
        """Write down what a step asks the GPU for, without running it."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.outputs = self.step(*self.inputs)
