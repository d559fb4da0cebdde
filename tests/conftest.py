"""What all test files share."""

import os
import sys

import pytest
from draws import register_profiles
from hypothesis import settings

register_profiles()
if "HYPOTHESIS_PROFILE" in os.environ:
    settings.load_profile(os.environ["HYPOTHESIS_PROFILE"])


@pytest.fixture(scope="module", autouse=True)
def compile_anew():
    """Let no file see what another compiled: torch.compile counts recompilations over the whole process."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
