"""Evaluation mode for as long as somebody needs it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn


def all_modules(model: nn.Module) -> list[nn.Module]:
    """The model and all modules within it, in half the time that ``modules()`` takes, which makes names as well."""
    modules = [model]
    for module in modules:  # which grows meanwhile
        modules += [part for part in module._modules.values() if part is not None]
    return modules


class Evaluation:
    """Which modules of a model to put back into training mode, once the last that evaluates it has left."""

    def __init__(self):
        self.inside, self.training = 0, []


EVALUATIONS: WeakKeyDictionary[nn.Module, Evaluation] = WeakKeyDictionary()
"""The models that are being evaluated."""


EVALUATIONS_LOCK = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode (no dropout), and afterwards each of its modules in the mode that it was in.

    Whoever evaluates a model while somebody else does, in another thread or in a loop that has not ended, keeps it in
    evaluation mode until both have left. Modes are the model's: nobody can train it in the meantime.

    Args:
        model: any module.
    """
    with EVALUATIONS_LOCK:
        evaluation = EVALUATIONS.setdefault(model, Evaluation())
        training = [module for module in all_modules(model) if module.training]
        evaluation.training += training
        evaluation.inside += 1
        for module in training:
            module.training = False
    try:
        yield
    finally:
        with EVALUATIONS_LOCK:
            evaluation.inside -= 1
            if not evaluation.inside:
                for module in evaluation.training:
                    module.training = True
                evaluation.training.clear()
