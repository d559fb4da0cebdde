"""What a run takes from the machine: a device, random numbers, and the signals that ask it to stop."""

import contextlib
import random
import signal
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""The signals that ask a run to stop."""


def random_states() -> tuple[dict[str, Tensor], dict]:
    """The states of torch's generators as tensors, of numpy's and Python's as JSON."""
    tensors = {"random.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"random.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    name, keys, position, has_gauss, gauss = np.random.get_state()
    numpy_state = [name, keys.tolist(), position, has_gauss, gauss]
    return tensors, {"python": random.getstate(), "numpy": numpy_state}


def restore_random_states(tensors: dict[str, Tensor], facts: dict) -> None:
    """The inverse of :func:`random_states`; states of GPUs that are not here are left out."""
    torch.set_rng_state(tensors["random.torch"])
    for i in range(torch.cuda.device_count()):
        if f"random.cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{i}"], i)
    version, keys, gauss = facts["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = facts["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect the first Ctrl-C (or SIGTERM) in a list, instead of raising in the middle of a step; a second one raises.

    SIGHUP is collected too, as often as it comes: a terminal that closes may send it twice. A signal that was ignored
    before (nohup) stays ignored. Outside the main thread, where Python hears no signals, the list stays empty.
    """
    heard: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}

    def hear(number: int, _frame) -> None:
        heard.append(number)
        if number in (signal.SIGINT, signal.SIGTERM):
            give_back(signal.SIGINT, signal.SIGTERM)

    def give_back(*numbers: int) -> None:
        for number in numbers:
            if number in before:
                signal.signal(number, before[number])

    for number in before:
        signal.signal(number, hear)
    try:
        yield heard
    finally:
        give_back(*before)


def seed_all(seed: int) -> None:
    """Seed torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
