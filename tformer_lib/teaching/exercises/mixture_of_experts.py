"""Checks of chapter 13's exercises."""

import torch

from tformer_lib.teaching.exercises.engine import exercise, require, require_close, require_shape

HINTS = ("Which operation doubles a number?", "It is a multiplication.")


@exercise("mixture_of_experts.double", title="Twice", hints=HINTS)
def check_double(fn):
    x = torch.tensor([1.0, -2.0, 0.5])
    require_close(fn(x), x + x, "each number should be twice what it was")


@exercise("mixture_of_experts.keep_shape", title="Twice, in any shape", hints=HINTS)
def check_keep_shape(fn):
    x = torch.randn(2, 3)
    require_shape(fn(x), (2, 3), "the result")
    require_close(fn(x), x + x, "each number should be twice what it was")


@exercise("mixture_of_experts.no_change", title="Twice, and leave the input", hints=HINTS)
def check_no_change(fn):
    x = torch.tensor([3.0])
    require_close(fn(x), torch.tensor([6.0]), "each number should be twice what it was")
    require(x.item() == 3.0, "the input has changed: your function works in place")
