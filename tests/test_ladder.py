"""The ladder: a small topic of its own climbs it, and says why where it cannot."""

import ctypes
import itertools
import re
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tformer_lib import jit, ladder
from tformer_lib.ladder import AUTO, Ladder, is_aligned, loadable

needs_compiler = pytest.mark.skipif(not jit.can_build_cpp(), reason="needs a C++ compiler and ninja")
CPU = torch.device("cpu")
DOUBLE = """
struct Arguments { const float* x; float* out; long long count; };
extern "C" const char* forward(const Arguments* a, void*, int factor) {
    if (a->count > 5) return "more than five";
    for (long long i = 0; i < a->count; ++i) a->out[i] = factor * a->x[i];
    return nullptr;
}
extern "C" const char* size(const Arguments* a, void* answer) {
    *static_cast<long long*>(answer) = a->count;
    return nullptr;
}
"""


class Arguments(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("out", ctypes.c_void_p), ("count", ctypes.c_int64)]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A topic with a step that builds and one that does not."""
    folder = tmp_path / "kernels" / "small"
    folder.mkdir(parents=True)
    (folder / "cpu.cpp").write_text(DOUBLE)
    (folder / "1_broken.cpp").write_text("this is no C++\n")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    with jit.kernels_from(tmp_path / "kernels"):
        yield Ladder("small", ("0", "cpu", "1"), {"cpu": ("1", "cpu", "0"), "cuda": ("1", "0")})


def nothing(step: str) -> None:
    """Refuse no step."""


@pytest.mark.parametrize(("step", "name"), [(None, AUTO), (0, "0"), ("0", "0"), (1, "1"), ("1", "1"), ("cpu", "cpu")])
def test_steps_are_asked_for_by_number_or_name(small, step, name):
    assert small.name(step) == name


@pytest.mark.parametrize("step", [2, "first", "", -1, "auto", 0.5, "CPU"])
def test_other_steps_are_refused_by_name(small, step):
    with pytest.raises(ValueError, match=re.escape(f"step must be one of 0, cpu, 1, got {step!r}")):
        small.name(step)


def test_a_step_that_was_asked_for_is_taken_or_refused(small):
    assert small.choose("cpu", CPU, nothing) == "cpu"
    with pytest.raises(ValueError, match="step 1 cannot do this: for a reason"):
        small.choose("1", CPU, lambda step: "for a reason")


@needs_compiler
def test_the_fastest_that_can_do_it_is_taken(small):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert small.choose(AUTO, CPU, lambda step: "no" if step == "1" else None) == "cpu"
        assert small.choose(AUTO, CPU, lambda step: None if step == "0" else "no") == "0"
        assert small.choose(AUTO, torch.device("meta"), nothing) == "0"


def test_a_gpu_that_is_left_with_step_0_is_told_why(small):
    with pytest.warns(UserWarning, match=r"small runs step 0, plain PyTorch, which is slow: no$"):
        assert small.choose(AUTO, torch.device("cuda", 0), lambda step: None if step == "0" else "no") == "0"


@needs_compiler
def test_what_does_not_build_is_passed_over_with_its_reason(small):
    with pytest.warns(UserWarning, match=r"small runs step cpu, which is not the fastest: kernels/small/1_broken.cpp"):
        assert small.choose(AUTO, CPU, nothing) == "cpu"
    with pytest.raises(jit.BuildError, match="does not build"):
        small.kernel("1", "forward", CPU)


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 3\n", "no program at all"])
def test_a_broken_compiler_does_not_stop_step_0(small, tmp_path, monkeypatch, text):
    broken = tmp_path / "broken-c++"
    broken.write_text(text)
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(UserWarning, match=r"small runs step 0, plain PyTorch, which is slow: kernels/small/1_broken"):
        assert small.choose(AUTO, CPU, nothing) == "0"


def test_a_missing_compiler_does_not_stop_step_0(small, monkeypatch):
    monkeypatch.setattr(jit, "compiler", lambda: None)
    with pytest.warns(UserWarning, match=r"small runs step 0, .* needs a C\+\+ compiler: install g\+\+"):
        assert small.choose(AUTO, CPU, nothing) == "0"


@needs_compiler
def test_a_kernel_is_called_with_a_struct_or_its_bytes(small):
    x, out = torch.arange(5.0), torch.full((5,), torch.nan)
    arguments = Arguments(x.data_ptr(), out.data_ptr(), 5)
    small.launch("cpu", "forward", arguments, CPU, 2)
    assert out.tolist() == [0, 2, 4, 6, 8]
    small.kernel("cpu", "forward", CPU).launch(bytes(arguments), 3)
    assert out.tolist() == [0, 3, 6, 9, 12]
    answer = ctypes.c_int64()
    small.kernel("cpu", "size", CPU).ask(arguments, answer)
    assert answer.value == 5


@needs_compiler
def test_what_a_kernel_says_is_raised(small):
    with pytest.raises(RuntimeError, match="small, step cpu, forward: more than five"):
        small.launch("cpu", "forward", Arguments(None, None, 6), CPU, 1)


@needs_compiler
def test_another_folder_s_kernels_are_other_kernels(small, tmp_path):
    first = small.kernel("cpu", "forward", CPU)
    assert small.kernel("cpu", "forward", CPU) is first
    copy = tmp_path / "copy" / "small"
    copy.mkdir(parents=True)
    (copy / "cpu.cpp").write_text(DOUBLE.replace("factor *", "-factor *"))
    x, out = torch.arange(5.0), torch.empty(5)
    with jit.kernels_from(tmp_path / "copy"):
        small.launch("cpu", "forward", Arguments(x.data_ptr(), out.data_ptr(), 5), CPU, 1)
    assert out.tolist() == [0, -1, -2, -3, -4]
    assert small.kernel("cpu", "forward", CPU) is first


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int32, torch.uint8]),
    offset=st.integers(0, 9),
    step=st.integers(1, 2),
    width=st.integers(0, 9),
    aligned=st.booleans(),
)
def test_loadable_keeps_the_numbers_and_copies_no_more_than_it_must(shape, dtype, offset, step, width, aligned):
    """A view into a larger tensor, by any offset, any stride of columns and of rows."""
    strides, last = [], step
    for count in reversed(shape):
        strides.insert(0, last)
        last = last * count + width
    memory = torch.arange(offset + last + 1).to(dtype)
    x = memory.as_strided(shape, strides, offset)
    found = loadable(x, aligned=aligned)
    assert torch.equal(found, x)
    assert found.shape[-1] == 1 or found.stride(-1) == 1
    rows = [x[place] for place in itertools.product(*map(range, x.shape[:-1]))]
    may_stay = (x.shape[-1] == 1 or step == 1) and (not aligned or all(row.data_ptr() % 16 == 0 for row in rows))
    assert (found is x) == may_stay


def test_rows_of_any_size_are_aligned_to_that_size():
    x = torch.zeros(4, 12, dtype=torch.bfloat16)
    assert is_aligned(x, 8)
    assert not is_aligned(x)
    assert is_aligned(x[:1])


def test_a_data_type_has_one_code_in_every_topic():
    for header in jit.kernels_folder().glob("*/arguments.h"):
        codes = dict(re.findall(r"(FLOAT32|BFLOAT16|FLOAT16|FLOAT8) = (\d)", header.read_text()))
        names = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", ladder.FP8: "FLOAT8"}
        assert codes, header
        assert all(codes.get(names[dtype], str(code)) == str(code) for dtype, code in ladder.DTYPE_CODES.items()), (
            header
        )


def test_refusals_name_what_was_expected_and_what_came():
    x = torch.zeros(2)
    assert ladder.refusal_of_place("cpu", x) is None
    assert ladder.refusal_of_place("3", x) == "it runs on cuda, the tensors are on cpu"
    assert ladder.refusal_of_dtype(x) is None
    assert ladder.refusal_of_dtype(x.double()) == "it takes float32, bfloat16 and float16, got torch.float64"
    assert ladder.refusal_of_dtype(x.half(), (torch.float32,)) == "it takes float32, got torch.float16"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (10, 0)])
def test_tensor_cores_need_their_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    gpu = torch.device("cuda", 0)
    assert (ladder.refusal_of_tensor_cores(torch.bfloat16, gpu) is None) == (capability >= (8, 0))
    assert (ladder.refusal_of_hopper(gpu) is None) == (capability == (9, 0))
    assert "bfloat16 and float16" in ladder.refusal_of_tensor_cores(torch.float32, gpu)
