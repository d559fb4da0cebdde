"""The loader: builds what is asked for, once, says so, heals, and explains what is missing."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from tformer_lib import jit

needs_compiler = pytest.mark.skipif(not jit.can_build_cpp(), reason="needs a C++ compiler and ninja")
SMALL = 'extern "C" int answer() { return %d; }\n'


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A small ``kernels/`` with one topic, and an empty cache."""
    folder = tmp_path / "kernels" / "small"
    folder.mkdir(parents=True)
    (tmp_path / "kernels" / "common").mkdir()
    (folder / "cpu.cpp").write_text('#include "common/number.h"\nextern "C" int answer() { return NUMBER; }\n')
    (folder / "1_first.cpp").write_text(SMALL % 1)
    (folder / "2_second.cu").write_text("// never built here\n")
    (tmp_path / "kernels" / "common" / "number.h").write_text("#define NUMBER 42\n")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    with jit.kernels_from(tmp_path / "kernels"):
        yield folder


def test_a_step_is_found_by_number_or_name(kernels):
    assert jit.find_source("small", 1).name == "1_first.cpp"
    assert jit.find_source("small", "1_first").name == "1_first.cpp"
    assert jit.find_source("small", "cpu").name == "cpu.cpp"
    (kernels / "1a_less.cpp").write_text(SMALL % 0)
    assert jit.find_source("small", "1a").name == "1a_less.cpp"
    assert jit.find_source("small", 1).name == "1_first.cpp"
    (kernels / "1a_less.cpp").unlink()
    with pytest.raises(FileNotFoundError, match=r"kernels/small has no step 7; it has: 1_first, 2_second, cpu"):
        jit.find_source("small", 7)


@pytest.mark.parametrize("step", ["first", "1_", "1_fir", "c", "prefill", "", "01", 0])
def test_nothing_is_guessed_from_a_part_of_a_name(kernels, step):
    (kernels / "prefill_hopper.cu").write_text("// never built here\n")
    (kernels / "10_tenth.cu").write_text("// never built here\n")
    with pytest.raises(FileNotFoundError, match=f"has no step {step!r}"):
        jit.find_source("small", step)


def test_another_folder_of_kernels_is_used_within_its_context_alone(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "7_only.cpp").write_text(SMALL % 7)
    ours = jit.kernels_folder()
    with jit.kernels_from(tmp_path):
        assert jit.find_source("small", 7) == tmp_path.resolve() / "small" / "7_only.cpp"
    with pytest.raises(FileNotFoundError), jit.kernels_from(tmp_path):
        jit.find_source("small", 8)
    assert jit.kernels_folder() == ours


def test_the_repository_holds_every_step_of_the_ladder():
    for step in ("cpu", 1, 2, 3, 4, "backward_4_hopper"):
        assert jit.find_source("flash_attention", step).exists()


@needs_compiler
def test_builds_only_what_is_asked_for_and_says_so(kernels, tmp_path, capfd):
    assert not jit.is_built("small", "cpu")
    assert jit.load("small", "cpu").answer() == 42
    said = capfd.readouterr().err
    assert "building kernels/small/cpu.cpp" in said
    assert "built kernels/small/cpu.cpp in" in said
    assert jit.is_built("small", "cpu")
    assert [p.name.split("_")[2] for p in (tmp_path / "cache").iterdir()] == ["cpu"]
    assert jit.load("small", "cpu").answer() == 42
    assert capfd.readouterr().err == ""


@needs_compiler
def test_a_changed_header_or_source_is_built_again(kernels):
    assert jit.load("small", "cpu").answer() == 42
    (kernels.parent / "common" / "number.h").write_text("#define NUMBER 43\n")
    assert jit.load("small", "cpu").answer() == 43


@needs_compiler
def test_builds_where_paths_have_spaces(kernels, tmp_path, monkeypatch):
    folder = tmp_path / "my course"
    folder.mkdir()
    (folder / "lib").symlink_to(cpp_extension.TORCH_LIB_PATH)
    kernels.parent.rename(folder / "kernels")
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", str(folder / "lib"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "cache"))
    with jit.kernels_from(folder / "kernels"):
        assert jit.load("small", "cpu").answer() == 42


@needs_compiler
def test_a_compiler_error_is_shown(kernels):
    (kernels / "1_first.cpp").write_text("this is no C++\n")
    with pytest.raises(jit.BuildError, match=r"kernels/small/1_first.cpp does not build(.|\n)*this is no C"):
        jit.load("small", 1)
    (kernels / "1_first.cpp").write_text(SMALL % 5)
    assert jit.load("small", 1).answer() == 5


@needs_compiler
def test_an_interrupted_build_heals(kernels, tmp_path):
    code = f"""
from tformer_lib import jit
with jit.kernels_from({str(tmp_path / "kernels")!r}):
    jit.load("small", 1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)
    process.stderr.readline()  # it has said that it builds
    while not list((tmp_path / "cache").glob("*/lock")) and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert jit.load("small", 1).answer() == 1


def answer_of_a_new_process(said: Path) -> int:
    """What the small kernel answers in a process that has loaded none; what it says on stderr goes to a file.

    The process is a fork of this one, so that it need not import torch.
    """

    def answer() -> None:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        theirs.send(jit.load("small", 1).answer())

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=answer)
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


@needs_compiler
@pytest.mark.parametrize("harm", ["missing", "empty", "cut", "no library"])
def test_a_damaged_library_is_built_again(kernels, tmp_path, harm):
    said = tmp_path / "said"
    assert answer_of_a_new_process(said) == 1
    (library,) = (tmp_path / "cache").glob("*/*.so")
    whole = library.read_bytes()
    library.unlink()  # a new file: the old one may be mapped
    if harm != "missing":
        library.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "no library": b"x" * len(whole)}[harm])
    assert answer_of_a_new_process(said) == 1
    assert "built kernels/small/1_first.cpp" in said.read_text()
    assert answer_of_a_new_process(said) == 1
    assert "building" not in said.read_text()


@needs_compiler
def test_two_processes_build_once(kernels, tmp_path):
    code = f"""
from tformer_lib import jit
with jit.kernels_from({str(tmp_path / "kernels")!r}):
    print(jit.load("small", 1).answer())
"""
    run = lambda: subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True)  # noqa: E731
    results = [process.communicate() for process in (run(), run())]
    assert [out for out, _ in results] == ["1\n", "1\n"]
    assert sum("built kernels" in err for _, err in results) == 1


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(kernels, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(jit.BuildError, match=r"file/cache, where nothing can be written .*set TORCH_EXTENSIONS_DIR"):
        jit.load("small", 1)


def test_torch_is_told_of_the_tools_that_were_found(monkeypatch):
    monkeypatch.setattr(jit, "compiler", lambda: "/opt/bin/g++-14")
    monkeypatch.setattr(jit, "ninja", lambda: "/opt/ninja")
    monkeypatch.setenv("CXX", "a wrapper with words")
    monkeypatch.setenv("PATH", "/usr/bin")
    with jit.tools_in_environment():
        assert os.environ["CXX"] == "/opt/bin/g++-14"
        assert os.environ["PATH"] == os.pathsep.join(("/usr/bin", "/opt/ninja"))
    assert (os.environ["CXX"], os.environ["PATH"]) == ("a wrapper with words", "/usr/bin")


def test_a_missing_compiler_is_named(kernels, monkeypatch):
    monkeypatch.setattr(jit, "compiler", lambda: None)
    with pytest.raises(jit.BuildError, match=r"needs a C\+\+ compiler: install g\+\+"):
        jit.check_tools(kernels / "cpu.cpp")


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 3\n", "no program at all"])
def test_a_broken_compiler_is_a_build_error(kernels, tmp_path, monkeypatch, text):
    broken = tmp_path / "broken-c++"
    broken.write_text(text)
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(jit.BuildError, match=r"kernels/small/1_first\.cpp does not build"):
        jit.load("small", 1)


def test_a_missing_ninja_is_named(kernels, monkeypatch):
    monkeypatch.setattr(jit, "compiler", lambda: "c++")
    monkeypatch.setattr(jit, "ninja", lambda: None)
    with pytest.raises(jit.BuildError, match="needs ninja: `pip install ninja`"):
        jit.check_tools(kernels / "cpu.cpp")


def test_a_missing_nvcc_is_named(kernels, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setattr(jit, "compiler", lambda: "c++")
    monkeypatch.setattr(jit, "ninja", lambda: "bin")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.raises(jit.BuildError, match="needs nvcc: install the CUDA toolkit"):
        jit.check_tools(kernels / "2_second.cu")


NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
SOURCES = sorted((jit.kernels_folder()).glob("*/*.cu"))


def compiles(source, out):
    """Whether nvcc takes a source for Hopper under the flags of our loader and of PyTorch, and what it said; without
    optimisation, which would take most of the time."""
    flags = [flag for flag in jit.compile_flags(source, "90a") if flag != "-O3"]
    command = [NVCC, *cpp_extension.COMMON_NVCC_FLAGS, *flags, f"-I{jit.kernels_folder()}", "-Xcicc", "-O0", "-ptx"]
    done = subprocess.run([*command, str(source), "-o", str(out)], capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: f"{source.parent.name}/{source.stem}")
def test_every_kernel_is_one_that_nvcc_takes_under_pytorchs_flags(source, tmp_path):
    """They are built on a machine with a GPU alone, but may be broken on any."""
    taken, said = compiles(source, tmp_path / "out.ptx")
    assert taken, said


@needs_nvcc
def test_what_pytorchs_flags_forbid_is_refused_by_that_test(tmp_path):
    source = tmp_path / "half.cu"
    source.write_text("#include <cuda_fp16.h>\n__global__ void kernel(__half* x, float y) { *x = __half(y); }\n")
    taken, said = compiles(source, tmp_path / "out.ptx")
    assert not taken
    assert "__half" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named(kernels):
    with pytest.raises(jit.BuildError, match="torch sees no CUDA device"):
        jit.load("small", 2)


def test_hopper_gets_its_own_instructions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert jit.architecture() == "90a"
    source = jit.find_source("flash_attention", 4)
    assert "-gencode=arch=compute_90a,code=sm_90a" in jit.compile_flags(source, "90a")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    assert jit.architecture() == "86"
