"""What all test files share."""

import os
import sys

import pytest
import torch
from draws import register_profiles
from hypothesis import settings

register_profiles()
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ordinary"))


@pytest.fixture(scope="module", autouse=True)
def compile_anew():
    """Let no file see what another compiled: torch.compile counts recompilations over the whole process."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture(scope="module")
def one_thread():
    """One thread for a file whose tensors are tiny: more would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
