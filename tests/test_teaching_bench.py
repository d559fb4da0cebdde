"""The learner's bench: an edited step is built, checked and timed, and whatever goes wrong ends in words."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from tformer_lib import jit
from tformer_lib.teaching import bench, kernels

needs_compiler = pytest.mark.skipif(not jit.can_build_cpp(), reason="needs a C++ compiler and ninja")
LOOP = "for (int64_t column = begin; column < end; column += KEY_TILE) {"


def edited(old: str, new: str) -> str:
    """cpu.cpp with one text replaced."""
    text = kernels.kernel_text("flash_attention/cpu.cpp")
    assert old in text
    return text.replace(old, new)


def test_the_code_of_a_rung_stands_in_its_header():
    assert kernels.step_file("flash_attention", "cpu") == "flash_attention/cpu.cpp"
    assert kernels.step_file("flash_attention", 2) == "flash_attention/2_tiled.cu"
    assert kernels.step_file("flash_attention", "3b") == "flash_attention/3_tensor_core.cuh"
    assert kernels.step_file("flash_attention", 4) == "flash_attention/4_hopper.cuh"
    assert kernels.step_file("flash_attention", "4e") == "flash_attention/4_hopper.cuh"
    with pytest.raises(FileNotFoundError, match="it has: "):
        kernels.step_file("flash_attention", 9)


@needs_compiler
def test_a_right_edit_is_checked_and_timed():
    found = kernels.compile_step("flash_attention", "cpu", edited("KEY_TILE = 256;", "KEY_TILE = 128;"))
    assert found.right, found.message
    assert repr(found) == f"right on {len(bench.SHAPES)} shapes, to the rounding of float32"
    assert set(found.medians()) == {"yours", "as it is", "SDPA"}
    assert all(0 < low <= mid <= high for mid, low, high in found.seconds.values())
    assert found.build_seconds > 0


@needs_compiler
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (LOOP, LOOP + " unknown();", r"does not compile: cpu\.cpp:\d+:\d+: error: .*unknown"),
        (LOOP, LOOP + " continue;", r"1 query, 1 key.*the output is wrong \(at .*it is (0|nan), expected"),
        (LOOP, LOOP + " __builtin_trap();", "it crashed: does it read or write outside of its arrays, on 1 query"),
        ("QUERY_TILE = 96;", "QUERY_TILE = 96; static_assert(false);", "does not compile"),
    ],
)
def test_a_wrong_kernel_and_a_crash_end_in_words(old, new, message):
    found = kernels.compile_step("flash_attention", "cpu", edited(old, new))
    assert not found.right
    assert not found.seconds
    assert re.search(message, found.message), found.message


@needs_compiler
def test_an_endless_loop_is_stopped():
    endless = edited(LOOP, LOOP + ' for (;;) asm volatile("");')
    found = kernels.compile_step("flash_attention", "cpu", endless, seconds=30.0)
    assert not found.right
    assert "does a loop not move on" in found.message
    assert "1 query, 1 key" in found.message


PARENT = """
import signal, sys
from tformer_lib.teaching import kernels
signal.signal(signal.SIGINT, signal.default_int_handler)  # the suite may have been started with it ignored
kernels.compile_step("flash_attention", "cpu", open(sys.argv[1]).read(), seconds=float(sys.argv[2]))
"""


def workers_of(session_file):
    """The processes of the bench that were started for this file's text, by what the system lists."""
    listed = subprocess.run(["ps", "-eww", "-o", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if "teaching.bench import work" in line and session_file in line]


@needs_compiler
@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_endless_loop_does_not_outlive_whoever_started_it(tmp_path, how):
    text = tmp_path / "endless.cpp"
    text.write_text(edited(LOOP, LOOP + ' for (;;) asm volatile("");'))
    limit = 60 if how == signal.SIGINT else 25
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # the copy's folder, by which the worker is known
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(text), str(limit)], env=environment)
    while not workers_of(str(tmp_path)):
        assert parent.poll() is None
        time.sleep(0.2)
    time.sleep(1.0)
    parent.send_signal(how)
    parent.wait(20)
    deadline = time.monotonic() + (5 if how == signal.SIGINT else limit + 10)
    while workers_of(str(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_without_a_compiler_or_a_gpu_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(jit, "compiler", lambda: None)
    found = kernels.compile_step("flash_attention", "cpu", "")
    assert not found.right
    assert "needs a C++ compiler" in found.message


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@needs_compiler
def test_a_cuda_step_without_a_gpu_is_refused_in_words():
    found = kernels.compile_step("flash_attention", "3b", "")
    assert not found.right
    assert "nothing was built" in found.message


def test_other_topics_and_files_are_refused():
    with pytest.raises(ValueError, match="knows the kernels of 'flash_attention', got 'rope'"):
        kernels.compile_step("rope", 1, "")
    with pytest.raises(ValueError, match="is not there: name a file such as"):
        kernels.compile_step("flash_attention", "cpu", {"flash_attention/7_none.cu": ""})
    with pytest.raises(FileNotFoundError):
        kernels.compile_step("flash_attention", 9, "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("step", ["1", "3b"])
def test_a_cuda_step_is_built_checked_and_timed(step):
    text = kernels.kernel_text(kernels.step_file("flash_attention", step))
    found = kernels.compile_step("flash_attention", step, text + "\n// edited\n")
    assert found.right, found.message
    wrong = {"1": ("score = warp_sum(score);", ""), "3b": ("chunk ^ (row % 8)", "chunk ^ (row % 4) ^ (chunk & 1)")}[
        step
    ]
    found = kernels.compile_step("flash_attention", step, text.replace(*wrong))
    assert not found.right, found.message
    assert "the output is wrong" in found.message
