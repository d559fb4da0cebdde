"""What is measured and what is written about it: the harness, the guard of ratios, the page of results, the prose."""

import importlib
import importlib.util
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import flash_attention, harness, paged_attention, ratios, repeat
from benchmarks import tokens as tokens_benchmark
from benchmarks import training as training_benchmark
from tformer_lib import jit, profiling, stories, teaching, tokens
from tformer_lib.attention import attend, attend_sdpa

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("*/*.json"))
PARTS = {"__init__", "doors", "harness", "serving_latency", "serving_peer"}
COMMANDS = sorted({p.stem for p in (ROOT / "benchmarks").glob("*.py")} - PARTS)


def extension(name: str):
    """An extension of the book as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "book" / "_ext" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the harness


def test_every_input_set_takes_its_turn():
    seen = []
    timing = harness.measure(seen.append, [(1,), (2,), (3,)], seconds=0.0, warmup=0.0, min_calls=6, max_calls=6)
    assert timing.calls == 6
    assert seen[-6:] == [1, 2, 3, 1, 2, 3]


def test_a_text_of_few_words_fills_the_vocabularies_that_it_can():
    text = "".join(stories.stories(20))
    learned = len(tokens.train_bpe(text, tokens_benchmark.CURVE[-1]).vocab)
    curve = tokens_benchmark.compression(text)
    assert 300 < learned < 4096
    assert curve["vocab_size"] == [size for size in tokens_benchmark.CURVE if size <= learned]
    assert len(curve["bytes_per_token"]) == len(curve["vocab_size"])
    assert curve["bytes_per_token"] == sorted(curve["bytes_per_token"])


def test_report_is_written_whole_and_read_back(tmp_path):
    report = harness.Report("topic", "cpu", out=tmp_path)
    report.add("row", harness.Timing(2.0, 1.0, 3.0, 9), flops=4e9, limit=8e9, batch=1)
    report.attach(recording={"rows": [[0, 1.5, 2.0, 7], [1, 2.25, 1e-3, 7]]})
    path = report.finish()
    record = json.loads(path.read_text())
    assert record["rows"][0] | {"rate": 2e9, "share": 0.25} == record["rows"][0]
    assert record["facts"]["recording"]["rows"] == [[0, 1.5, 2.0, 7], [1, 2.25, 1e-3, 7]]
    assert {"device", "versions", "date", "command"} <= set(record)
    assert [p.name for p in tmp_path.iterdir()] == ["topic.json"]


def test_numbers_of_a_list_share_a_line():
    value = {"a": [1, 2.5, -3e-7], "b": ["x", 1], "c": [[1, 2], [3, 4]], "d": "[1,\n 2]"}
    text = harness.as_json(value)
    assert json.loads(text) == value
    assert "[ 1, 2.5, -3e-07 ]" in text


@pytest.mark.parametrize("out", [["--out", "../a place"], ["--out=elsewhere"], []])
def test_a_record_says_what_was_measured_and_not_where_it_was_put(out, monkeypatch):
    flags = ["--device", "cpu", "--part", "a b"]
    for place in (0, 2, 4):
        monkeypatch.setattr(sys, "argv", ["bench.py", *flags[:place], *out, *flags[place:]])
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
        assert harness.command() == "python bench.py --device cpu --part 'a b'"


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda file: file.stem)
def test_one_place_says_where_records_go(file):
    if file.stem != "harness":
        assert not re.search(r"TFORMER_RESULTS\W|RESULTS /", file.read_text(encoding="utf-8"))


def test_a_record_goes_where_it_is_told_to(tmp_path, monkeypatch):
    monkeypatch.delenv("TFORMER_RESULTS", raising=False)
    assert harness.Report("x", folder="two").out == harness.RESULTS / "two"
    monkeypatch.setenv("TFORMER_RESULTS", str(tmp_path / "told"))
    assert harness.Report("x", folder="two").out == harness.Report("x").out == tmp_path / "told"
    assert harness.Report("x", out=tmp_path / "asked", folder="two").out == tmp_path / "asked"


def test_compare_calls_in_turns():
    calls = []
    found = harness.compare(lambda: calls.append("a"), lambda: calls.append("b"), pairs=5)
    assert calls == ["a", "b"] * 7
    assert found.calls == 5


def test_a_profiler_sees_one_call_after_the_warm_up(monkeypatch):
    heard, calls = [], []
    monkeypatch.setattr(harness.profiling, "enable", lambda: heard.append(f"on after {len(calls)} calls"))
    with harness.profiling.listening(lambda name: heard.append(name) or harness.profiling.OFF):
        harness.profiled(lambda: calls.append(1), device="cpu", warmup=3)
    assert heard == ["on after 3 calls", "measured"]
    assert len(calls) == 4


def test_ranges_are_off_again_after_a_profiled_call_that_fails(monkeypatch):
    monkeypatch.setattr(profiling.ranges, "nvtx_marker", lambda: lambda name: profiling.OFF)
    calls = []

    def fail():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the kernel fails")

    with pytest.raises(RuntimeError, match="the kernel fails"):
        harness.profiled(fail, device="cpu", warmup=1)
    assert not profiling.enabled()


@pytest.mark.parametrize("script", ["nsys.sh", "ncu.sh"])
def test_scripts_of_the_profilers_know_their_targets(script):
    path = ROOT / "benchmarks" / script
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    named = re.findall(rf"^#   benchmarks/{script} (\w+)", path.read_text(), flags=re.MULTILINE)
    assert "paged_attention" in named
    for topic in named:
        assert "nvtx: bool" in (ROOT / "benchmarks" / f"{topic}.py").read_text(), f"{topic} has no --nvtx"


@pytest.mark.parametrize("topic", ["kv_cache", "paged_attention", "profiling", "flash_attention"])
def test_targets_of_the_profilers_run_on_a_cpu(topic, monkeypatch):
    module, heard = importlib.import_module(f"benchmarks.{topic}"), []
    if topic == "paged_attention":  # its twin and that of flash attention take a compiler seconds
        monkeypatch.setattr(module, "own", lambda step, own=module.own: own(0))
    if topic == "flash_attention":
        monkeypatch.setattr(module.flash, "flash_attention", lambda q, k, v, step: attend(q, k, v))
    monkeypatch.setattr(sys, "argv", [topic, "--device", "cpu", "--nvtx"])
    monkeypatch.setattr(harness.profiling, "enable", lambda: None)
    with harness.profiling.listening(lambda name: heard.append(name) or harness.profiling.OFF):
        module.main()
    assert heard.count("measured") == 1


def test_noise_of_a_constant_is_small():
    found = harness.noise(lambda: time.sleep(0.002), repeats=3, seconds=0.01, warmup=0.0)
    assert found["repeats"] == len(found["medians"]) == 3
    assert min(found["medians"]) >= 0.002
    assert found["spread"] == max(found["medians"]) / min(found["medians"]) - 1


# --- the guard


@pytest.fixture
def guard(tmp_path, monkeypatch, one_thread):
    """The guard with one small case, whose record and results stay in the test's folder."""
    q, k, v = torch.randn(3, 1, 2, 192, 32)
    plain = lambda: attend(q, k, v, causal=True)  # noqa: E731
    kernel = {"fast": lambda: attend_sdpa(q, k, v, causal=True), "slow": lambda: [plain() for _ in range(5)]}
    case = {"attention: fused / plain": lambda device: (lambda: kernel["fast"](), plain)}
    monkeypatch.setattr(ratios, "CASES", case)
    monkeypatch.setattr(ratios, "RESULTS", tmp_path)
    monkeypatch.setenv("TFORMER_RESULTS", str(tmp_path / "cpu"))
    return kernel


def test_a_slowed_kernel_is_caught(guard, capsys):
    assert ratios.main(["--record"]) == 0
    guard["fast"] = guard["slow"]
    assert ratios.main([]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("SLOWER"))
    assert "attention: fused / plain" in line
    assert "was recorded" in line


def test_a_kernel_that_became_faster_is_none_the_worse(guard, capsys):
    fast, guard["fast"] = guard["fast"], guard["slow"]
    assert ratios.main(["--record"]) == 0
    guard["fast"] = fast
    assert ratios.main([]) == 0
    assert "no kernel became slower" in capsys.readouterr().out


def test_comparing_does_not_touch_the_record(guard, tmp_path):
    ratios.main(["--record"])
    before = (tmp_path / "cpu" / "ratios.json").read_bytes()
    ratios.main([])
    assert (tmp_path / "cpu" / "ratios.json").read_bytes() == before


def test_without_a_record_it_says_so(guard, capsys):
    assert ratios.main([]) == 0
    assert "nothing is recorded" in capsys.readouterr().out


def test_bench_fails_when_a_topic_fails(monkeypatch, capsys):
    import benchmarks.__main__ as bench

    monkeypatch.setattr(bench, "topics", lambda: ["ratios", "rope"])
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    code = lambda command: type("Done", (), {"returncode": int("benchmarks.ratios" in command)})()  # noqa: E731
    monkeypatch.setattr(bench.subprocess, "run", code)
    assert bench.main([]) == 1
    assert "failed: ratios on cpu" in capsys.readouterr().out


def test_every_case_is_on_record():
    recorded = json.loads((RESULTS / "cpu" / "ratios.json").read_text())["facts"]
    assert set(ratios.CASES) <= set(recorded)


# --- the page of results


def test_the_page_has_every_row_of_every_file():
    results = extension("results")
    page = results.sections(RESULTS)
    for file in FILES:
        record = json.loads(file.read_text())
        if isinstance(record, dict) and "command" in record:
            assert f"`{file.stem}`" in page
            assert record["command"] in page
            for row in results.timed_rows(record):
                start = f"| {results.named(row)} | {row['contestant']} | "
                assert start in page, f"{file.stem} has {row['name']}"
                cells = page.partition(start)[2].partition("\n")[0].rstrip(" |").split(" | ")
                assert len(cells) == 5, (file.stem, row["name"], cells)  # time, spread, rate, limit, peer
                assert cells[-1], f"{file.stem}: {row['name']} stands beside nothing"


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_recorded_row_has_a_peer_and_a_limit_or_says_why_not(file):
    record = json.loads(file.read_text())
    rows = extension("results").timed_rows(record) if isinstance(record, dict) else []
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    peers = {row["peer"] for row in rows}
    assert peers <= {*names, None}
    for row in rows:
        assert row["contestant"], row["name"]
        assert row["peer"] or row["alone"] or row["name"] in peers, f"{row['name']} has no peer and does not say why"
        assert row["peer"] != row["name"]
        assert row["limit"] or row["unbounded"], f"{row['name']} has no limit and does not say why"
        assert not (row["alone"] and row["peer"]), row["name"]


def test_the_summary_has_every_file_that_holds_times():
    results = extension("results")
    summary, page = results.summary(RESULTS), results.sections(RESULTS)
    files = [file for file in FILES if isinstance(record := json.loads(file.read_text()), dict) and "command" in record]
    timed = [file for file in files if results.timed_rows(json.loads(file.read_text()))]
    assert len(summary.splitlines()) == 2 + len(timed)
    for file in timed:
        assert f"(#{results.anchor(file)})" in summary
        assert f"({results.anchor(file)})=" in page


def test_a_row_stands_beside_its_peer():
    results = extension("results")
    report = harness.Report("x", peers=("theirs", "ours"))
    report.add(timing=harness.Timing(1.0, 1.0, 1.0, 3), case="8 x 8", contestant="ours", flops=1, limit=2)
    report.add("8 x 8: theirs", harness.Timing(2.0, 2.0, 2.0, 3), flops=1, limit=2)
    report.add("8 x 8: ours, changed", harness.Timing(4.0, 4.0, 4.0, 3), peer="8 x 8: ours", flops=1, limit=2)
    report.add("other: ours", harness.Timing(4.0, 4.0, 4.0, 3), peer="8 x 8: ours", flops=1, limit=2)
    report.add("lone: ours", harness.Timing(1.0, 1.0, 1.0, 3), alone="nobody else can", unbounded="it waits")
    rows = {row["name"]: row for row in report.as_dict()["rows"]}
    assert {name: results.beside(row, rows) for name, row in rows.items()} == {
        "8 x 8: ours": "2.00 times as fast as theirs",
        "8 x 8: theirs": "takes 2.00 times as long as ours",
        "8 x 8: ours, changed": "takes 4.00 times as long as ours",
        "other: ours": "takes 4.00 times as long as 8 x 8: ours",
        "lone: ours": "nobody else can",
    }
    assert results.share(rows["lone: ours"]) == "it waits"
    assert report.missing() == []
    report.add("lone: other", harness.Timing(1.0, 1.0, 1.0, 3))
    report.add("nameless", harness.Timing(1.0, 1.0, 1.0, 3), limit=1, flops=1)
    assert report.missing() == [("nameless", "peer"), ("lone: other", "limit")]


@pytest.mark.parametrize(
    ("commit", "told"),
    [
        ("abc123", "commit abc123"),
        ("abc123+changes", "commit abc123 with changes that were not committed"),
        (None, "of an unrecorded commit"),
    ],
)
def test_where_a_record_comes_from_is_told_whole(commit, told):
    record = {"device": "a CPU", "command": "python -m benchmarks.x", "commit": commit, "date": "2026-11-22T23"}
    assert extension("results").provenance(record) == f"*a CPU (), 2026-11-22, {told}:* `python -m benchmarks.x`"


@pytest.mark.parametrize("topic", [file.stem for file in FILES if file.parent.name == "nvidia-h200"])
def test_the_command_that_would_make_a_missing_file_exists(topic):
    with pytest.raises(FileNotFoundError, match="make them with python -m benchmarks") as refusal:
        teaching.results("no-such-device", topic)
    module = re.search(r"python -m benchmarks\.([\w-]+)", str(refusal.value))[1]
    assert module in COMMANDS


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_the_command_of_a_record_exists(file):
    record = json.loads(file.read_text())
    if isinstance(record, dict) and "command" in record:
        assert re.match(r"python -m benchmarks\.(\w+)", record["command"])[1] in COMMANDS


def test_runs_are_compared_line_by_line():
    from benchmarks.scaling_command import difference

    one = [{"step": 0, "val_loss": 2.0}, {"step": 4, "loss": 1.5, "gradient_norm": 9.0}, {"step": 4, "val_loss": 1.0}]
    other = [
        {"step": 0, "val_loss": 2.0},
        {"step": 4, "loss": 1.25, "gradient_norm": 1.0},
        {"step": 4, "val_loss": 1.1},
    ]
    assert difference(one, one) == 0
    assert difference(one, other) == 0.25


def test_kernels_of_a_training_step_stand_beside_their_bounds():
    file = RESULTS / "nvidia-h200" / "training-nanogpt.json"
    facts = json.loads(file.read_text())["facts"]
    parts, copy = facts["kernels of GPT-2 small, 124M"], 4.2e12
    least = training_benchmark.least_by_kernel(training_benchmark.GPT2_SMALL, facts["matmul_rate"], copy)
    found = Counter()
    for name, _, ms, *_ in parts["milliseconds"][training_benchmark.FUSED]["longest"]:
        pattern = next((pattern for pattern in least if re.search(pattern, name)), None)
        found[pattern] += ms
        assert training_benchmark.least_of(name, least) == least.get(pattern)
    for pattern, ms in least.items():  # each is in the record, and none was faster than the device allows
        assert ms <= 1.1 * found[pattern] <= 4 * ms


def test_clock_and_power_are_those_of_the_later_half():
    text = "345, 80.1, 700.00\n400, 90.0, 700.00\n1500, 699.5, 700.00\n1530, 701.5, 700.00\n14"
    assert training_benchmark.medians_of_samples(text) == {
        "clock in MHz": 1515,
        "power in W": 700.5,
        "limit in W": 700,
    }
    for silent in ("", "No devices were found\n", "1500, [N/A], 700.00\n"):
        assert training_benchmark.medians_of_samples(silent) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_products_of_a_step_are_listed_with_their_flops():
    a, b, c = (torch.randn(shape, device="cuda") for shape in ((256, 512), (512, 1024), (256, 1024)))

    def step(x):
        for _ in range(3):
            torch.mm(x, b)
        torch.addmm(c, x, b)
        torch.mm(x.t(), c)

    step(a)
    found = training_benchmark.product_times(step, (a,), 1e12)
    assert {(shape, calls, least) for shape, calls, _, least in found} == {
        ("256 x 512 x 1,024", 4, round(4 * 2e3 * 256 * 512 * 1024 / 1e12, 4)),
        ("512 x 256 x 1,024", 1, round(2e3 * 256 * 512 * 1024 / 1e12, 4)),
    }
    assert all(ms > 0 for *_, ms, _ in found)


@pytest.mark.parametrize("topic", COMMANDS)
def test_benchmarks_refuse_in_one_line(topic, capsys):
    module = importlib.import_module(f"benchmarks.{topic}")
    missing = [] if torch.cuda.is_available() else [["--device", "cuda"]]
    for arguments in (["--nonsense"], ["--device", "tpu"], *missing):
        assert module.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-6, "4.56 µs"), (3e-8, "30 ns")]
)
def test_times_have_units(seconds, text):
    assert extension("results").time(seconds).replace("\u00a0", " ") == text


# --- records made again


def a_record(command: str, commit: str | None = "abc", **rows: tuple[float, float, float]) -> dict:
    """A record of one row for each name: its median, 10th and 90th percentile in seconds."""
    rows = [{"name": name, **dict(zip(("seconds", "p10", "p90"), times, strict=True))} for name, times in rows.items()]
    return {"command": command, "commit": commit, "date": "2026-11-30T00:00", "device": "a CPU", "rows": rows}


@pytest.fixture
def two_commands(tmp_path, monkeypatch):
    """A folder of records, three of two commands and one that no command made alone."""
    monkeypatch.setattr(repeat, "RESULTS", tmp_path)
    records = {
        "x": a_record("python -m benchmarks.x --device cpu", a=(1.0, 0.9, 1.1), b=(2.0, 1.9, 2.1)),
        "x-more": a_record("python -m benchmarks.x --device cpu", None, a=(1.0, 0.9, 1.1)) | {"took": 41.2},
        "y": a_record("python -m benchmarks.y 'a b' --device cpu", "abc+changes"),
        "z": a_record("python -m benchmarks.z ... (each row's own command)"),
        "ledger": {"rows": []},
    }
    (tmp_path / "cpu").mkdir()
    for name, record in records.items():
        (tmp_path / "cpu" / f"{name}.json").write_text(json.dumps(record))
    return tmp_path


def test_records_are_made_again_by_their_commands_and_compared(two_commands, monkeypatch, capsys):
    asked = []

    def run(words, out, seconds):
        asked.append((words, seconds))
        out.mkdir(exist_ok=True)
        if words[2] == "benchmarks.y":
            return "exit status 3"
        found = a_record("", a=(1.05, 1.0, 1.2), b=(1.0, 0.9, 1.1), c=(3.0, 3.0, 3.0))
        (out / "x.json").write_text(json.dumps(found))
        return ""

    monkeypatch.setattr(repeat, "run", run)
    out = two_commands / "again"
    out.mkdir()
    (out / "x-more.json").write_text(json.dumps(a_record("", a=(9.0, 9.0, 9.0))))  # left by an earlier run
    assert repeat.main(["x", "x-more", "y", "--of", "cpu", "--out", str(out)]) == 1
    assert [words for words, _ in asked] == [
        ("python", "-m", "benchmarks.x", "--device", "cpu"),
        ("python", "-m", "benchmarks.y", "a b", "--device", "cpu"),
    ]
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "a 1000.000 1050.000 1.05" in lines
    assert "b 2000.000 1000.000 0.50 changed" in lines
    assert "c 3000.000 new" in lines
    assert "x-more: the command did not write it" in lines
    assert "y: exit status 3" in lines
    assert lines[-1].startswith("1 of 2 commands ran;")


SLEEPER = "import os, time; print(os.getpid(), flush=True); time.sleep(20); print('still here')"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_benchmark_ends_with_whoever_repeats_it(number, tmp_path):
    program = (
        "import pathlib, sys; from benchmarks import repeat\n"
        f"repeat.run(['python', '-c', {SLEEPER!r}], pathlib.Path(sys.argv[1]), float('inf'))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.send_signal(number)
        assert parent.stdout.read() == ""  # the child had the pipe too, so it has ended when the pipe does
        assert parent.wait() != 0
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_the_list_says_what_speaks_against_a_record(two_commands, capsys):
    assert repeat.main(["--of", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = {line.split()[0]: " ".join(line.split()[2:]) for line in lines[::2]}
    assert said == {
        "x": "as its sources are",  # there are no sources of this name
        "x-more": "made without a commit",
        "y": "made beside changes",
        "z": "as its sources are",
    }
    assert lines[3].strip() == "python -m benchmarks.x --device cpu  # 41 s"
    assert lines[1::2][-1].strip() == "no command alone made it"


@pytest.mark.parametrize("folder", sorted({file.parent.name for file in FILES}))
def test_every_record_is_listed(folder, capsys):
    assert repeat.main(["--of", folder]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()[::2]}
    made = {file.stem for file in FILES if file.parent.name == folder and json.loads(file.read_text()).get("command")}
    assert listed == made
    assert all(record.words is None or len(record.words) > 2 for record in repeat.load(RESULTS / folder).values())


def test_stale_records_are_those_that_something_speaks_against(two_commands):
    records = repeat.load(two_commands / "cpu")
    assert [r.name for r in repeat.choose(records, repeat.Asked(stale=True))] == ["x-more", "y"]
    assert [r.name for r in repeat.choose(records, repeat.Asked())] == ["x", "x-more", "y"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["w", "--of", "cpu"], "no record is called w"), (["z", "--of", "cpu"], "alone made z"), (["--of", "tpu"], "cpu")],
)
def test_records_that_cannot_be_made_again_are_refused(two_commands, arguments, words, capsys):
    assert repeat.main(arguments) == 2
    assert re.search(words, capsys.readouterr().err)


def test_a_recorded_command_runs_and_is_ended(tmp_path):
    write = "import os, pathlib; pathlib.Path(os.environ['TFORMER_RESULTS'], 'here').touch()"
    assert repeat.run(["python", "-c", write], tmp_path, float("inf")) == ""
    assert (tmp_path / "here").exists()
    assert repeat.run(["python", "-c", "raise SystemExit(3)"], tmp_path, 60.0) == "exit status 3"
    assert repeat.run(["python", "-c", "import time; time.sleep(60)"], tmp_path, 0.2) == "the time is up"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")
def test_sources_that_changed_since_a_commit_are_found():
    assert repeat.changed_since("HEAD", ["LICENSE"]) in ([], ["LICENSE"])
    assert repeat.changed_since("no-such-commit", ["LICENSE"]) is None


# --- figures in prose

UNIT = (
    r"(?:[TGM]?FLOP/s|[TGM]B/s|tokens/s|tokens (?:per|a) second|ms|µs|milliseconds?|microseconds?"
    r"|times (?:faster|slower|as fast|as slow|as long)|% of (?:the|its) (?:limit|peak|bandwidth|roof))"
)
FIGURE = re.compile(rf"(?P<number>\d[\d,]*(?:\.\d+)?)[ \u00a0\n]*(?P<unit>{UNIT})(?!\w)")
SCALES = {
    "T": (1e-12,),
    "G": (1e-9,),
    "M": (1e-6,),
    "ms": (1e3, 1.0),
    "milli": (1e3, 1.0),
    "µs": (1e6, 1.0),
    "micro": (1e6, 1.0),
    "%": (100.0,),
}
"""How a unit begins -> what a number in a file (in seconds, bytes, FLOPs) is multiplied by to be in that unit."""

PAGES = sorted((ROOT / "notebooks").glob("*.ipynb")) + sorted((ROOT / "book").glob("*.md"))


def figures(text: str):
    """Each measured figure of a text that stands in a paragraph without a citation: (whole, number, unit)."""
    for paragraph in re.split(r"\n\s*\n", text):
        if "{cite" not in paragraph:
            yield from ((m[0], m["number"], m["unit"]) for m in FIGURE.finditer(paragraph))


def page_of(file: Path) -> tuple[str, str, list[Path]]:
    """A page's prose, what its cells hold and print, and the files of results that it reads."""
    if file.suffix == ".md":
        return file.read_text(encoding="utf-8"), "", FILES
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    prose = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    code = [c for c in cells if c["cell_type"] == "code"]
    outputs = [o for c in code for o in c["outputs"]]
    printed = ["".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/markdown", "")) for o in outputs]
    printed += re.findall(
        r"<t[dh][^>]*>([^<]+)<", "".join(h for o in outputs for h in o.get("data", {}).get("text/html", ""))
    )
    source = "\n".join("".join(c["source"]) for c in code)
    topics = set(re.findall(r"results\(\s*[\"']([\w-]+)[\"'],\s*[\"']([\w.-]+)[\"']", source))
    return prose, "\n".join([source, *printed]), [RESULTS / device / f"{topic}.json" for device, topic in topics]


def numbers_in(value) -> set[float]:
    """Every number of a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return set().union(*map(numbers_in, value)) if value else set()
    return {float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else set()


def limits_on_record() -> set[float]:
    """The rates of a large product and of a large copy that were measured anywhere, in FLOP/s and bytes/s."""
    found = set()
    for file in FILES:
        facts = json.loads(file.read_text(encoding="utf-8"))
        facts = facts.get("facts", {}) if isinstance(facts, dict) else {}
        for name, value in facts.items():
            if re.search(r"matmul|copy|read", name) and isinstance(value, float):
                found.add(value * (1e12 if name.endswith("tflops") else 1.0))
    return found


def rounds_to(value: float, number: str) -> bool:
    """Whether a value is what is written, to the digits that are written; zeros at the end of an integer are none."""
    written = float(number.replace(",", ""))
    decimals = len(number.partition(".")[2])
    zeros = 0 if decimals else len(number) - len(number.rstrip("0"))
    return abs(value - written) <= 0.5 * 10.0 ** (zeros - decimals) * (1 + 1e-9)


def is_backed(number: str, unit: str, cells: str, values: set[float]) -> bool:
    """Whether a figure stands in a cell or its output, or in a file of results in some prefix of its unit."""
    if re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d]|[.,]\d)", cells):
        return True
    scales = next((s for start, s in SCALES.items() if unit.startswith(start)), (1.0,))
    values = values | ({float(n) for n in re.findall(r"\d+\.?\d*e\d+", cells)} if cells else set())
    return any(rounds_to(value * scale, number) for value in values for scale in scales)


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_every_figure_of_speed_comes_from_a_file_or_a_cell(file):
    prose, cells, files = page_of(file)
    values = limits_on_record().union(*(numbers_in(json.loads(f.read_text(encoding="utf-8"))) for f in files))
    unbacked = [whole for whole, number, unit in figures(prose) if not is_backed(number, unit, cells, values)]
    assert not unbacked, f"{file.name} says {unbacked}: cite it, print it, or record it"


def test_an_invented_figure_is_found():
    text = "It reaches 812.5 TFLOP/s and is 3.7 times faster.\n\nThey reach 740 TFLOP/s {cite}`shah2024`."
    assert [(number, unit) for _, number, unit in figures(text)] == [("812.5", "TFLOP/s"), ("3.7", "times faster")]
    assert is_backed("812.5", "TFLOP/s", "", {8.1251e14})
    assert not is_backed("812.5", "TFLOP/s", "", {8.1261e14, 812.5})
    assert is_backed("3.7", "times faster", "faster: 3.7", set())
    assert not is_backed("3.7", "times faster", "13.7 and 3.75 and 3,7", {3.76})


def test_a_copy_outside_a_checkout_names_its_commit_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "benchmarks" / "harness.py"))
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("TFORMER_COMMIT", raising=False)
    assert harness.commit() is None
    monkeypatch.setenv("TFORMER_COMMIT", "0123456789ab")
    assert harness.commit() == "0123456789ab"


# Latency under load


def test_arrivals_have_their_rate_and_their_bursts():
    from benchmarks.serving_latency import arrivals

    single, grouped = arrivals(4000, 10.0), arrivals(4000, 10.0, burst=8)
    for times in (single, grouped):
        assert times == sorted(times)
        assert times[-1] == pytest.approx(400, rel=0.2)
    gaps = [later - earlier for earlier, later in itertools.pairwise(single)]
    mean = sum(gaps) / len(gaps)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.03), "exponential"
    assert all(len(set(grouped[i : i + 8])) == 1 for i in range(0, 4000, 8))
    assert len(set(grouped)) == 500


def test_percentiles_are_values_that_occurred():
    from benchmarks.serving_latency import percentiles

    assert percentiles([i / 1000 for i in range(100, 0, -1)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([0.007]) == {"p50": 7.0, "p90": 7.0, "p99": 7.0}


def test_a_load_is_driven_to_its_end_and_every_wait_counts_from_the_arrival():
    from benchmarks.serving_latency import Load, Wait, drive, latency_row
    from tformer_lib.serving import Engine
    from tformer_lib.transformer import Decoder, ModelConfig

    model = Decoder(ModelConfig(vocab_size=11, max_length=32, width=8, layers=1, heads=1, positions="rope"))
    engine = Engine(model, blocks=20, max_num_seqs=2, budget=4)
    load = Load([[1, 2, 3, i] for i in range(6)], [1, 2, 3, 4, 5, 6], lambda: engine)
    times = [0.0, 0.0, 0.0, 0.05, 0.05, 0.1]
    waits = drive(engine, load, times)
    assert not engine.busy
    assert all(0 < wait.first <= wait.whole for wait in waits)
    assert [wait.whole for wait in waits] == pytest.approx(
        [wait.first + wait.each * (new - 1) for wait, new in zip(waits, load.new, strict=True)]
    )
    everything, nothing = Wait(math.inf, math.inf, math.inf), Wait(0.0, 0.0, 0.0)
    rows = [latency_row("case", "policy", waits, objective) for objective in (everything, nothing)]
    assert rows[0]["goodput_per_second"] == rows[0]["requests_per_second"] > 0
    assert rows[1]["goodput_per_second"] == 0


def test_in_a_talk_each_question_brings_the_dialogue_along_and_comes_after_the_answer():
    from benchmarks.serving_latency import THINKING, Load, drive
    from tformer_lib.serving import Engine
    from tformer_lib.transformer import Decoder, ModelConfig

    model = Decoder(ModelConfig(vocab_size=11, max_length=32, width=8, layers=1, heads=1, positions="rope"))
    engine, added = Engine(model, blocks=20, max_num_seqs=2, budget=4), []
    add = engine.add
    engine.add = lambda prompt, *args, **options: added.append(add(prompt, *args, **options))
    waits = drive(engine, Load([[1, 2, 3], [4]], [2, 1], lambda: engine, [[[5, 6], [7]], []]), [0.0, 0.0])
    assert len(waits) == len(added) == 4
    first, second, third = (request for request in added if request.tokens[0] == 1)
    assert second.prompt == [*first.tokens, 5, 6]
    assert third.prompt == [*second.tokens, 7]
    talk = sorted(wait.arrived for wait, request in zip(waits, added, strict=True) if request.tokens[0] == 1)
    assert all(later - earlier > THINKING for earlier, later in itertools.pairwise(talk))
    assert [wait.tokens for wait in waits] == [len(request.new_tokens) for request in added]


def test_the_cost_model_predicts_waits_by_its_own_clock():
    from benchmarks.serving_latency import Load, predicted
    from tformer_lib.paged_attention import BlockAllocator
    from tformer_lib.serving import Scheduler

    load = Load([[0] * 6, [0] * 6, [0]], [3, 1, 2], lambda: None)
    scheduler = Scheduler(BlockAllocator(8), max_num_seqs=2, budget=4, max_blocks=8, prefix_cache=False)
    waits = predicted(load, [0.0, 0.5, 20.0], scheduler, lambda tokens, held: 1.0 + held / 100)
    # the steps: 4 of the first prompt; 2 and 2 of the second; 1 and 3; 1 and 1; and later the third one's two
    ends, clock = [], 0.0
    for held in (4, 6 + 2, 7 + 5, 8 + 6):
        clock += 1 + held / 100
        ends.append(clock)
    assert waits[0].first == pytest.approx(ends[1])
    assert waits[0].whole == pytest.approx(ends[3])
    assert waits[1].first == pytest.approx(ends[3] - 0.5)
    assert waits[2].first == pytest.approx(1.01)
    assert waits[2].whole == pytest.approx(1.01 + 1.02)


@pytest.mark.parametrize("held_up", [(), (3, 17, 31)], ids=["a quiet machine", "three steps held up"])
def test_what_a_step_takes_is_found_in_the_log(held_up):
    from benchmarks.serving_latency import fit_steps
    from tformer_lib.serving import Step

    log, clock = [], 0.0
    for i in range(40):
        begun = clock - 0.001 if i % 10 else clock + 5.0  # every tenth begins when the one before has ended
        tokens, live = 1 + 7 * i % 31, 100 + 13 * i % 57
        clock = max(clock, begun) + 0.002 + 3e-6 * live + 5e-5 * tokens + (0.2 if i in held_up else 0)
        counts = {"samples": 1, "waiting": 0, "preemptions": 0, "unused_slots": 0, "held_blocks": 9, "block_size": 16}
        log.append(Step([(0, 0, tokens)], live_tokens=live, drafted=0, started=begun, finished=clock, **counts))
    assert fit_steps(log) == pytest.approx((0.002, 5e-5, 3e-6), rel=1e-3)
    assert fit_steps(log)(10, 1000) == pytest.approx(0.002 + 0.0005 + 0.003, rel=1e-3)


def test_the_knee_is_driven_beside_two_predictions_of_the_same_arrivals():
    from benchmarks.serving_latency import Load, find_knee
    from tformer_lib.serving import Engine
    from tformer_lib.transformer import Decoder, ModelConfig

    model = Decoder(ModelConfig(vocab_size=11, max_length=32, width=8, layers=1, heads=1, positions="rope"))
    engine = Engine(model, blocks=20, max_num_seqs=2, budget=4, prefix_cache=False)
    load = Load([[1, 2, 3, i] for i in range(6)], [1, 2, 3, 4, 5, 6], lambda: engine)
    result = find_knee(engine, load, (100, 1000), lambda tokens, held: 1e-3)
    whos = ["driven", "predicted by the bound", "predicted by its steps"]
    assert [(row["rate"], row["contestant"]) for row in result["rows"]] == [
        (r, who) for r in (100, 1000) for who in whos
    ]
    slow = find_knee(engine, load, (1000,), lambda tokens, held: 1.0)["rows"]
    assert slow[1]["ttft_ms"]["p50"] > 1000 > slow[2]["ttft_ms"]["p50"]


# Edited kernels


EDITS = [(f"flash_attention/{file}", edits) for _, _, file, edits in flash_attention.ABLATIONS]
EDITS += [(f"paged_attention/{paged_attention.STEP_2}", edits) for edits in paged_attention.ABLATIONS.values()]


@pytest.mark.parametrize(("file", "edits"), EDITS)
def test_every_ablation_still_finds_what_it_edits(file, edits):
    ours = jit.kernels_folder()
    with harness.edited_kernel(file, edits):
        assert jit.kernels_folder() != ours
        assert (jit.kernels_folder() / file).read_text() != (ours / file).read_text()
    assert jit.kernels_folder() == ours


def test_an_edit_of_what_is_no_longer_there_is_refused():
    with (
        pytest.raises(ValueError, match=r"flash_attention/small\.cpp no longer holds 'no such text'"),
        harness.edited_kernel("flash_attention/small.cpp", [("no such text", "")]),
    ):
        pass


@pytest.mark.skipif(not jit.can_build_cpp(), reason="needs a C++ compiler and ninja")
def test_an_edited_kernel_that_another_process_built_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    edits = [("int first_key(const Problem&, int) { return 0; }", "int first_key(const Problem&, int) { return 1; }")]
    with harness.edited_kernel("flash_attention/small.cpp", edits):
        assert not jit.is_built("flash_attention", "small")
    flash_attention.build_edited("small", "small.cpp", edits)
    assert not jit.is_built("flash_attention", "small")
    with harness.edited_kernel("flash_attention/small.cpp", edits):
        assert jit.is_built("flash_attention", "small")


def test_contestants_take_turns_and_each_is_first_in_one():
    calls = []
    run = {name: partial(lambda name: calls.append(name) or len(calls), name) for name in "abc"}
    assert harness.take_turns(run, 3) == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}
    assert "".join(calls) == "abcbcacab"
    assert harness.Timing.of([2.0]) == harness.Timing(2.0, 2.0, 2.0, 1)
    assert harness.Timing.of([1.0, 3.0, 2.0]).median == 2.0


def test_a_recorded_command_names_a_file_without_its_folder(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--nanogpt", "/some/where/model.py", "--out", "/else/where", "--steps", "3"])
    assert harness.command().endswith("--nanogpt model.py --steps 3")


def test_of_all_tries_the_recipe_and_the_best_keep_their_logs():
    """A try that is better than those before takes the best one's place, in whatever order tries end."""
    model = {"dropout": 0.2, "norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rope"}
    config = {"model": model} | dict.fromkeys(("token_noise", "average", "weight_decay", "learning_rate", "steps"), 1)

    def ended(changes: tuple[str, ...], *losses: float) -> dict:
        history = [{"step": n, "train_loss": 1.0} for n in range(3)]
        history += [{"step": n, "val_loss": loss} for n, loss in enumerate(losses)]
        found = {"changes": list(changes), "config": config, "history": history, "parameters": 10}
        return found | {"best_val_loss": min(losses), "best_step": losses.index(min(losses))}

    facts = {"tries": []}
    for found in (ended(("a",), 3.0, 2.0), ended(training_benchmark.PLAIN_RECIPE, 2.5, 2.6), ended(("b",), 1.5, 1.75)):
        training_benchmark.keep_try(facts, found)
    assert [(row["best_val_loss"], row["last_val_loss"]) for row in facts["tries"]] == [
        (2.0, 2.0),
        (2.5, 2.6),
        (1.5, 1.75),
    ]
    assert facts["best"]["changes"] == ["b"]
    assert facts["recipe"]["changes"] == list(training_benchmark.PLAIN_RECIPE)
    assert facts["best"]["history"][-1] == {"step": 1, "val_loss": 1.75}
    assert training_benchmark.PLAIN_RECIPE in training_benchmark.TRIES
