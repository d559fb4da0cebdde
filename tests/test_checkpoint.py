"""Files are whole or not at all, whatever happens while they are written; and what is read is what was meant."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from tformer_lib import checkpoint

ROOT = Path(__file__).parent.parent

OLD = {"a": b"old a", "b": b"old b" * 1000, "gone": b"old"}
NEW = {"a": b"new a" * 2000, "b": b"new b", "c": b"new c"}

DRIVER = """
# Kill a child at its count-th call of a system function, or half way through a write, while it replaces three files.
import json, os, sys
from pathlib import Path
sys.path.insert(0, "tests")
from deaths import die_at
from tformer_lib import checkpoint

folder, old, new = Path(sys.argv[1]), *(json.loads(x) for x in sys.argv[2:4])
old, new = ({k: v.encode() for k, v in x.items()} for x in (old, new))
states = []
for what, most in (("write", 5), ("fsync", 9), ("replace", 5), ("unlink", 4)):
    for count in range(1, most):
        for path in folder.iterdir():
            path.unlink()
        checkpoint.write_together(folder, old)
        process = os.fork()
        if process == 0:
            die_at(what, count)
            checkpoint.write_together(folder, new, without=["gone"])
            os._exit(0)
        died = os.WIFSIGNALED(os.waitpid(process, 0)[1])
        checkpoint.settle(folder)
        found = {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.endswith(".part")}
        states.append([what, count, died, "old" if found == old else "new" if found == new else sorted(found)])
        checkpoint.write_together(folder, new, without=["gone"])
        assert {p.name for p in folder.iterdir()} == set(new), sorted(folder.iterdir())
print(json.dumps(states))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test kills forked processes")
def test_several_files_are_replaced_as_one_wherever_the_kill_falls(tmp_path):
    texts = [json.dumps({k: v.decode() for k, v in x.items()}) for x in (OLD, NEW)]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path), *texts], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    states = json.loads(done.stdout)
    assert {state for *_, state in states} == {"old", "new"}, states
    assert sum(died for _, _, died, _ in states) >= 16


def test_a_failed_write_leaves_the_old_files_and_no_others(tmp_path, monkeypatch):
    checkpoint.write_together(tmp_path, OLD)
    for failing in range(1, 5):
        calls = []

        def full(descriptor, calls=calls, failing=failing):
            calls.append(descriptor)
            if len(calls) == failing:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(
            OSError, match=r"^could not save .*: No space left on device; what was there before is kept"
        ):
            checkpoint.write_together(tmp_path, NEW, without=["gone"])
        monkeypatch.undo()
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == OLD


def test_a_folder_is_one_processs_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    code = "import sys, time; from pathlib import Path; from tformer_lib.checkpoint import locked\n"
    code += f"with locked(Path({str(tmp_path)!r})): print('in', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "in\n"
    with pytest.raises(BlockingIOError, match=f"{tmp_path} is in use"), checkpoint.locked(tmp_path):
        pass
    other.kill()
    other.communicate()
    with checkpoint.locked(tmp_path), pytest.raises(BlockingIOError), checkpoint.locked(tmp_path):
        pass
    with checkpoint.locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs files that are none")
def test_what_is_no_file_is_named_in_the_refusal(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(OSError, match=f"{name} is no file"):
            checkpoint.read_tensors(tmp_path / name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_finite_are_never_saved(tmp_path, bad, dtype):
    path = tmp_path / "w.safetensors"
    checkpoint.save_tensors(path, {"x": torch.ones(3, dtype=dtype), "n": torch.tensor(3)}, {"step": 1})
    before = path.read_bytes()
    x = torch.ones(8, dtype=dtype)
    x[3] = bad
    with pytest.raises(FloatingPointError, match=r"not saved, because x holds 1 of 8 numbers .* before is kept"):
        checkpoint.save_tensors(path, {"y": torch.ones(2), "x": x}, {"step": 2})
    assert path.read_bytes() == before
    model = nn.Linear(2, 2).to(dtype)
    nn.init.constant_(model.bias, bad)
    with pytest.raises(FloatingPointError, match="bias holds 2 of 2"):
        checkpoint.save_weights(path, model, {})
    assert path.read_bytes() == before


def test_weights_beyond_float32_are_not_saved_as_infinity(tmp_path):
    model = nn.Linear(2, 2).double()
    nn.init.constant_(model.weight, 1e300)
    with pytest.raises(FloatingPointError, match="weight holds 4 of 4"):
        checkpoint.save_weights(tmp_path / "w.safetensors", model, {})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.bool])
def test_quantised_weights_are_refused_by_name(dtype):
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    with pytest.raises(ValueError, match=f"the file has weight in {dtype}: quantised weights cannot be read"):
        checkpoint.load_weights(model, {"weight": torch.ones(2, 2).to(dtype), "bias": torch.zeros(2)})
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000, "{"])
def test_what_is_no_json_is_refused_or_left_out(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{text}\n{{"step": 2}}\n')
    assert checkpoint.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(safetensors.torch.save({"x": torch.ones(1)}, {"facts": text}))
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged"):
        checkpoint.read_tensors(weights)


def test_facts_that_are_no_object_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors.torch.save({"x": torch.ones(1)}, {"facts": "[1, 2]"}))
    with pytest.raises(ValueError, match=r"w\.safetensors has facts that are no JSON object, but \[1, 2\]"):
        checkpoint.read_tensors(path)


def test_lines_of_a_log_end_at_line_feeds_alone(tmp_path):
    """U+2028 and its like are line breaks for ``str.splitlines``, and may stand in a JSON string as they are."""
    breaks = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
    lines = [{"step": 1, "sample": f"one{breaks[:3]}two"}, {"step": 2, "sample": "x\u2028"}]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '[1]\n"x"\n{"step": 3', encoding="utf-8")
    assert checkpoint.read_metrics(tmp_path) == lines
