"""What all test files share."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from draws import register_profiles
from hypothesis import settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background run: tests press Ctrl-C all the same
    signal.signal(signal.SIGINT, signal.default_int_handler)

for package in ("fla", "causal_conv1d"):  # transformers' layers would take their kernels, even for tensors on a CPU
    sys.modules.setdefault(package, None)

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


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The folder of a corpus of characters, small enough to train on in seconds."""
    from tformer_lib import tokens  # not for the many files that need no corpus

    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("The cat sat on the mat, and the rat sat on the cat. " * 40)
    config = tokens.CorpusConfig(corpus=str(folder / "text.txt"), out=folder / "corpus", tokenizer="characters")
    tokens.prepare(config)
    return folder / "corpus"
