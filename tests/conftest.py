"""What all test files share."""

import sys

import pytest


@pytest.fixture(scope="module", autouse=True)
def compile_anew():
    """Let no file see what another compiled: torch.compile counts recompilations over the whole process."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
