"""The ladder of a topic's kernels: which step can do what is asked, and how its C functions are called.

A topic with kernels has step 0, plain PyTorch, in its module, and faster steps in the folder ``kernels/<topic>/``. What
the modules of all such topics need is here: the choice of a step, what a device can do, the codes of data types,
alignment, and the call itself. A new topic adds one :class:`Ladder`, the twin of its kernels' ``struct Arguments``, and
one function that says what each step cannot do::

    LADDER = Ladder("rope", steps=("0", "cpu", "1"), fastest={"cpu": ("cpu", "0"), "cuda": ("1", "0")})

    class Arguments(ctypes.Structure):
        \"""``rope::Arguments`` of kernels/rope/arguments.h, in the same order.\"""

        _fields_ = [("x", ctypes.c_void_p), ("out", ctypes.c_void_p), ("tokens", ctypes.c_int64), ...]

    def refusal(step: str, x: Tensor) -> str | None:
        \"""Why ``step`` cannot do this, or None if it can.\"""
        return None if step == "0" else refusal_of_place(step, x) or refusal_of_dtype(x)

    @torch.library.custom_op("tformer_lab::rope", mutates_args=())
    def rope_op(x: Tensor, ..., step: str) -> Tensor:
        chosen = LADDER.choose(step, x.device, lambda name: refusal(name, x))
        if chosen == "0":
            return rotate(x, ...)
        x = loadable(x)
        out = torch.empty_like(x)
        LADDER.launch(chosen, "forward", Arguments(x.data_ptr(), out.data_ptr(), ..., DTYPE_CODES[x.dtype]), x.device)
        return out

    def rope(x, ..., step: int | str | None = None):
        return torch.ops.tformer_lab.rope(x, ..., LADDER.name(step))

A kernel file exports C functions of the form ``const char* forward(const Arguments*, void* stream)``. They return null,
or what went wrong. A topic has several ladders where what is asked decides the order, as prefill and decode do.
"""

import ctypes
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from tformer_lib import jit

AUTO = "auto"  # the name of the wish for the fastest step that can do it
FP8 = torch.float8_e4m3fn
HALVES = (torch.bfloat16, torch.float16)
KERNEL_DTYPES = (torch.float32, *HALVES)
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, FP8: 3}
"""``enum Dtype`` of every ``arguments.h``."""


# --- which step ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ladder:
    """The steps of a topic, and the order in which they are tried.

    Attributes:
        topic: the folder under ``kernels/``.
        steps: every step that a caller may ask for, "0" among them. A step is named as ``jit.load`` names it.
        fastest: of each device type the steps to try, the fastest first and "0" last. Other devices run step 0.
        aliases: names in ``steps`` that are other names of a step.
    """

    topic: str
    steps: tuple[str, ...]
    fastest: Mapping[str, tuple[str, ...]]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def name(self, step: int | str | None) -> str:
        """The name of a step that a caller asked for; "auto" for None.

        Raises:
            ValueError: there is no such step.
        """
        if step is None:
            return AUTO
        for name in self.steps:  # by comparisons, since torch.compile may trace ``step`` as a symbol
            if step == (name if isinstance(step, str) or not name.isdigit() else int(name)):
                return self.aliases.get(name, name)
        raise ValueError(f"step must be one of {', '.join(self.steps)}, got {step!r}")

    def choose(self, step: str, device: torch.device, refusal: Callable[[str], str | None]) -> str:
        """The step asked for, if it can do this; for "auto" the fastest that can, and that can be built here.

        A warning says why, where a GPU is left with step 0 or a kernel that could do it cannot be built.

        Args:
            step: a name of ``steps``, or "auto".
            device: where the tensors are.
            refusal: why a step cannot do what is asked, or None if it can; None for step "0".

        Raises:
            ValueError: the step that was asked for cannot do it.
        """
        if step != AUTO:
            if reason := refusal(step):
                raise ValueError(f"step {step} cannot do this: {reason}")
            return step
        return self.first(self.fastest.get(device.type, ("0",)), device, refusal)

    def first(self, names: tuple[str, ...], device: torch.device, refusal: Callable[[str], str | None]) -> str:
        """The first of these steps that can do what is asked; the last is taken where no other can."""
        name, reasons, unbuilt = self.best(names, device, refusal)
        if unbuilt or (reasons and name == "0" and device.type == "cuda"):
            why = "; ".join(dict.fromkeys(unbuilt + reasons))
            what = "step 0, plain PyTorch, which is slow" if name == "0" else f"step {name}, which is not the fastest"
            warnings.warn(f"{self.topic.replace('_', ' ')} runs {what}: {why}", stacklevel=3)
        return name

    def best(
        self, names: tuple[str, ...], device: torch.device, refusal: Callable[[str], str | None]
    ) -> tuple[str, list[str], list[str]]:
        """The same without a warning, with the reasons why those before it cannot do it, or cannot be built."""
        reasons, unbuilt = [], []
        for name in names[:-1]:
            if reason := refusal(name):
                reasons.append(reason)
            elif reason := build_failure(self.topic, name, device, jit.kernels_folder()):
                unbuilt.append(reason)
            else:
                return name, reasons, unbuilt
        return names[-1], reasons, unbuilt

    def kernel(self, step: str, name: str, device: torch.device) -> "Kernel":
        """A C function of a step, built at the first call.

        Raises:
            tformer_lib.jit.BuildError: it cannot be built here; the message says what to install.
        """
        return load_kernel(self.topic, self.aliases.get(step, step), name, device, jit.kernels_folder())

    def launch(self, step: str, name: str, arguments: ctypes.Structure, device: torch.device, *more: int) -> None:
        """Call a C function of a step, see :meth:`Kernel.launch`."""
        self.kernel(step, name, device).launch(arguments, *more)


@cache
def build_failure(topic: str, step: str, device: torch.device, folder: Path) -> str | None:
    """Why a step of ``folder`` cannot be built here, or None if it is built now; asked once in a process."""
    try:
        jit.load(topic, step, device=device)
    except jit.BuildError as error:
        return str(error)
    return None


# --- what a device can do ------------------------------------------------------------------------------------------


def refusal_of_place(step: str, q: Tensor) -> str | None:
    """Why a step does not run where the tensors, ``q`` among them, are: "cpu" is the C++ twin, all others CUDA."""
    wanted = "cpu" if step == "cpu" else "cuda"
    return None if q.device.type == wanted else f"it runs on {wanted}, the tensors are on {q.device.type}"


def refusal_of_dtype(q: Tensor, dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES) -> str | None:
    """Why a step does not compute in q's dtype."""
    if q.dtype in dtypes:
        return None
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return f"it takes {' and '.join(filter(None, (', '.join(names[:-1]), names[-1])))}, got {q.dtype}"


def refusal_of_tensor_cores(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why ``mma.sync`` on 16-bit numbers with asynchronous copies cannot be used."""
    if dtype not in HALVES:
        return f"tensor-core steps take bfloat16 and float16, got {dtype}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"mma.sync with bfloat16 and cp.async need compute capability 8.0, this GPU has {capability}"
    return None


def refusal_of_hopper(device: torch.device) -> str | None:
    """Why TMA and wgmma cannot be used."""
    capability = torch.cuda.get_device_capability(device)
    return None if capability == (9, 0) else f"wgmma is of compute capability 9.0 alone, this GPU has {capability}"


def wants_gradients(*tensors: Tensor) -> bool:
    """Whether a derivative is asked for, backward or forward: a kernel that is called directly gives none."""
    return has_tangent(*tensors) or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether a forward-mode derivative (``torch.func.jvp``, ``torch.autograd.forward_ad``) is on its way."""
    is_on = forward_ad._current_level >= 0
    return is_on and any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def is_followed(x: Tensor | None) -> bool:
    """Whether ``torch.func.grad``, ``vjp`` or ``jacrev`` wants a gradient of x."""
    while x is not None and functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def check_no_tangent(operator: str, *tensors: Tensor | None, instead: str) -> None:
    """Refuse derivatives that an operator of ``torch.library`` lacks.

    A forward-mode derivative it would drop without a word; to those of ``torch.func`` it answers with words about a
    class that the caller has never seen.

    Args:
        operator: what is refused, in words.
        tensors: its inputs.
        instead: plain PyTorch that has such derivatives.

    Raises:
        NotImplementedError: one of the tensors has a tangent, or is followed by a transform of ``torch.func``.
    """
    if torch.compiler.is_compiling():
        return
    if has_tangent(*tensors):
        raise NotImplementedError(
            f"{operator} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad): use the backward "
            f"mode, or plain PyTorch, which has both: {instead}"
        )
    if functorch.peek_interpreter_stack() is not None and any(map(is_followed, tensors)):
        raise NotImplementedError(
            f"{operator} has no derivative for torch.func (grad, vjp, jacrev): use backward() or torch.autograd.grad, "
            f"or plain PyTorch: {instead}"
        )


# --- numbers and memory --------------------------------------------------------------------------------------------


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Sums are kept in float32, or in float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


PLAIN_TENSORS = (Tensor, torch.nn.Parameter)  # and no subclass, which may be of any nature


def address_of(x: Tensor) -> int | None:
    """Where the numbers of ``x`` lie, for a kernel that is called without ``torch.library``; None if nowhere.

    A view may stand for the negatives of what lies there (``z.conj().imag``), zeros may have no memory at all (PyTorch
    makes such in derivatives of complex numbers), and a tensor inside ``torch.func.vmap`` or on the meta device has
    none. An operator is given such tensors after they were copied, one after another, or never.
    """
    if type(x) not in PLAIN_TENSORS or x.is_neg() or x.is_nested:
        return None
    try:
        address = x.data_ptr()
    except RuntimeError:  # of a tensor without storage
        return None
    return address if address or x.numel() == 0 else None


def note_written(*tensors: Tensor) -> None:
    """Tell autograd that a kernel wrote into tensors, as torch's own operations do; inference tensors keep no count."""
    for x in tensors:
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)


def is_aligned(x: Tensor, size: int = 16) -> bool:
    """Whether every row of x, that is every run along its last dimension, begins at a multiple of ``size`` bytes."""
    step = max(1, size // x.element_size())
    strides = [stride for count, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if count > 1]
    return x.data_ptr() % size == 0 and all(stride % step == 0 for stride in strides)


def loadable(x: Tensor, *, aligned: bool = False) -> Tensor:
    """``x`` itself where a kernel can load it by its strides, else a contiguous copy.

    Args:
        x: any shape; a kernel is given the strides of all dimensions but the last, whose elements must be adjacent.
        aligned: it loads 16 bytes at a time, so each row must begin at a multiple of 16 bytes. The rows of the copy do
            where a row has a multiple of 16 bytes.
    """
    adjacent = x.shape[-1] == 1 or x.stride(-1) == 1
    return x if adjacent and (not aligned or is_aligned(x)) else x.clone(memory_format=torch.contiguous_format)


_counters: dict[tuple[int, int], Tensor] = {}


def counters(device: torch.device) -> Tensor:
    """Two int32 zeros on a GPU, by which the blocks of a kernel deal out their work among themselves.

    The kernel must leave them zeros, for they are kept from call to call, a pair for each stream. While a CUDA graph is
    captured, each call gets its own, which the graph sets to zero.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    key = device.index, stream_of(device)
    if key not in _counters:
        _counters[key] = torch.zeros(2, dtype=torch.int32, device=device)
    return _counters[key]


# --- the call ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kernel:
    """A C function of a step, for the tensors of one device.

    Attributes:
        function: ``const char* (const Arguments*, void*)``, with more numbers behind where it takes them.
        label: what an error message calls it.
        device: where the tensors are whose addresses it gets.
    """

    function: ctypes._CFuncPtr
    label: str
    device: torch.device

    def launch(self, arguments: ctypes.Structure | bytes, *more: int) -> None:
        """Call it: on a GPU with the tensors' device current, on that device's current stream.

        Args:
            arguments: the struct that the kernel reads.
            more: int32 arguments behind the stream.

        Raises:
            RuntimeError: what the kernel says went wrong.
        """
        if self.device.type == "cuda" and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self.launch(arguments, *more)
        stream = stream_of(self.device) if self.device.type == "cuda" else None
        return self._call(arguments, stream, *more)

    def ask(self, arguments: ctypes.Structure | bytes, answer: ctypes.Structure | ctypes.Array) -> None:
        """Let a function that launches nothing write its answer, the sizes of scratch memory for instance."""
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                return self._call(arguments, ctypes.byref(answer))
        return self._call(arguments, ctypes.byref(answer))

    def _call(self, arguments: ctypes.Structure | bytes, *more) -> None:
        packed = arguments if isinstance(arguments, bytes) else ctypes.byref(arguments)
        if error := self.function(packed, *more):
            raise RuntimeError(f"{self.label}: {error.decode()}")


@cache
def load_kernel(topic: str, step: str, name: str, device: torch.device, folder: Path) -> Kernel:
    """A C function of a step of ``folder``, which is where ``jit`` takes sources from now."""
    function = getattr(jit.load(topic, step, device=device), name)
    function.restype = ctypes.c_char_p  # null, or what went wrong
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]  # bytes, or a reference to a struct; what follows is int32
    return Kernel(function, f"{topic.replace('_', ' ')}, step {step}, {name}", device)


def stream_of(device: torch.device) -> int:
    """The handle of a GPU's current stream, by the short way that compiled code takes."""
    return torch._C._cuda_getCurrentRawStream(device.index)
