"""Ranges, traces, counters, the roofline: what they promise, against independent counts."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tformer_lib import profiling
from tformer_lib.flash_attention import flash_attention, flash_attention_varlen
from tformer_lib.generation import StaticStep, generate
from tformer_lib.kv_cache import CacheShape, PreallocatedCache
from tformer_lib.transformer import Decoder, ModelConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ModelConfig(vocab_size=64, max_length=64, width=32, layers=2, heads=4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Decoder(CONFIG).eval()


def names_heard(run) -> list[str]:
    """The ranges that ``run()`` opens, in order."""
    heard = []
    with profiling.listening(lambda name: heard.append(name) or profiling.OFF):
        run()
    return heard


def test_ranges_of_a_decode_loop(model):
    heard = names_heard(lambda: generate(model, [[1, 2, 3]], max_new_tokens=3))
    step = ["embed", *["attention", "feed-forward"] * CONFIG.layers, "unembed"]
    assert heard == ["prefill", *step, "sampling", "decode", *step, "sampling", "decode", *step, "sampling"]


def test_off_is_one_object_that_does_nothing():
    assert not profiling.enabled()
    assert profiling.range("a") is profiling.range("b")
    with profiling.range("a"), profiling.range("b"):
        pass


def test_switch_sends_ranges_to_nvtx(monkeypatch):
    nvtx = pytest.importorskip("nvtx")
    seen = []
    monkeypatch.setattr(nvtx, "annotate", lambda name: seen.append(name) or profiling.OFF)
    profiling.enable()
    try:
        with profiling.range("attention"):
            pass
    finally:
        profiling.disable()
    with profiling.range("unheard"):
        pass
    assert seen == ["attention"]


def test_real_nvtx_ranges_open_and_close():
    pytest.importorskip("nvtx")
    profiling.enable()
    try:
        with profiling.range("outer"), profiling.range("inner"):
            assert profiling.enabled()
    finally:
        profiling.disable()


def test_without_nvtx_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nvtx", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ImportError, match="pip install nvtx"):
        profiling.enable()
    assert not profiling.enabled()


def test_ranges_close_when_the_work_fails():
    class Fails(Exception):
        pass

    closed = []

    class Marker:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            return self

        def __exit__(self, *error):
            closed.append(self.name)

    with profiling.listening(Marker), pytest.raises(Fails), profiling.range("outer"), profiling.range("inner"):
        raise Fails
    assert closed == ["inner", "outer"]


@pytest.mark.parametrize("listening", [False, True])
def test_a_step_with_ranges_compiles_whole(model, listening):
    step = StaticStep(model, PreallocatedCache(CacheShape.of(model, 1), 8), compile=True, backend="eager")
    if listening:
        with profiling.listening(lambda name: profiling.OFF):
            assert step(torch.tensor([[1]])).shape == (1, 64)
    else:
        assert step(torch.tensor([[1]])).shape == (1, 64)


def test_trace_holds_ranges_and_operators(model, tmp_path, capfd):
    with profiling.trace(tmp_path / "t.json") as trace:
        generate(model, [[1, 2, 3]], max_new_tokens=4)
    assert not profiling.enabled()
    phases = trace.phases()
    assert phases["attention"]["calls"] == 4 * CONFIG.layers
    assert phases["sampling"]["calls"] == 4
    names = {i["name"] for i in trace.intervals()}
    assert "aten::addmm" in names
    assert trace.launches() == len(trace.intervals())
    assert "aten::addmm" in trace.table()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_trace_reads_what_it_wrote(name, tmp_path):
    with profiling.trace(tmp_path / name) as trace:
        torch.ones(8) + 1
    again = profiling.Trace.read(tmp_path / name)
    assert again.intervals() == trace.intervals() != []


def failing_trace():
    """A trace around work that fails."""
    with profiling.trace():
        torch.ones(2).reshape(3)


def test_trace_outlives_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="shape"):
        failing_trace()
    recording = profiling.trace(tmp_path / "t.json")
    trace = recording.__enter__()
    with profiling.range("before"):
        torch.ones(8) + 1
    assert not recording.__exit__(ValueError, ValueError("too late"), None)
    assert "before" in trace.phases()
    assert "before" in profiling.Trace.read(tmp_path / "t.json").phases()
    with profiling.trace() as trace:
        torch.ones(8) + 1
    assert trace.intervals()


def test_a_trace_within_a_trace_is_refused_and_the_outer_one_goes_on():
    with profiling.trace() as outer:
        with pytest.raises(RuntimeError, match="recorded already"), profiling.trace():
            pass
        with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="recorded already"):
            pool.submit(lambda: profiling.trace().__enter__()).result()
        with profiling.range("after"):
            torch.ones(8) + 1
    assert "after" in outer.phases()
    with torch.profiler.profile(), pytest.raises(RuntimeError, match="recorded already"), profiling.trace():
        pass


def test_a_trace_that_could_not_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"), profiling.trace(tmp_path / "missing" / "t.json"):
        raise AssertionError("the work began")


GPU_TRACE = [
    {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": "10.0", "dur": 5, "tid": 1},
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 12, "dur": 1, "tid": 1},
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaDeviceSynchronize", "ts": 13, "dur": 9, "tid": 1},
    {"ph": "X", "cat": "kernel", "name": "void ns::gemm<int, 4>(float*)", "ts": 20, "dur": 4, "args": {"stream": 7}},
    {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": 22, "dur": 6, "tid": 9, "args": {"stream": 9}},
    {"ph": "f", "cat": "kernel", "name": "an arrow", "ts": 20},
]
for event in GPU_TRACE:
    event.setdefault("tid", 7)


def test_intervals_of_a_gpu_are_its_kernels_and_copies(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps({"traceEvents": GPU_TRACE}))
    trace = profiling.Trace.read(tmp_path / "gpu.json")
    assert trace.intervals() == [
        {"name": "void ns::gemm<int, 4>(float*)", "start_us": 0.0, "duration_us": 4.0, "stream": 7},
        {"name": "Memcpy DtoH", "start_us": 2.0, "duration_us": 6.0, "stream": 9},
    ]
    assert trace.launches() == 1
    assert profiling.utilisation(trace.intervals(), 0, 16) == 0.5


def test_working_operators_keep_most_of_their_time():
    call = lambda name, ts, dur: {"name": name, "ts": ts, "dur": dur, "tid": 1}  # noqa: E731
    events = [call("linear", 0, 10), call("t", 0, 1), call("addmm", 1, 8.5), call("expand", 2, 1), call("relu", 10, 2)]
    assert [e["name"] for e in profiling.working(events)] == ["t", "addmm", "relu"]


intervals_strategy = st.lists(
    st.builds(
        lambda start, length, stream: {
            "name": "k",
            "start_us": float(start),
            "duration_us": float(length),
            "stream": stream,
        },
        st.integers(0, 60),
        st.integers(0, 20),
        st.integers(0, 3),
    ),
    max_size=12,
)


@draws(60)
@given(intervals_strategy, st.integers(0, 30), st.integers(1, 60))
def test_utilisation_is_the_share_of_covered_microseconds(intervals, start, length):
    covered = {us for i in intervals for us in range(int(i["start_us"]), int(i["start_us"] + i["duration_us"]))} & set(
        range(start, start + length)
    )
    assert profiling.utilisation(intervals, start, start + length) == pytest.approx(len(covered) / length)


@draws(40)
@given(intervals_strategy, st.integers(0, 8))
def test_spans_join_what_touches_or_nearly(intervals, gap):
    joined = profiling.spans(intervals, gap_us=gap)
    assert all(after[0] > before[1] + gap for before, after in pairwise(joined))
    for i in intervals:
        assert any(b <= i["start_us"] and i["start_us"] + i["duration_us"] <= e for b, e in joined)


def test_empty_window_is_refused():
    with pytest.raises(ValueError, match="must end after"):
        profiling.utilisation([], 5, 5)


@draws(40)
@given(intervals_strategy)
def test_pack_and_unpack(intervals):
    recording = json.loads(json.dumps(profiling.pack(intervals, 40.0)))
    assert profiling.unpack(recording) == [i for i in intervals if i["start_us"] < 40]


def test_short_names():
    assert profiling.short_name("void at::native::(anonymous namespace)::softmax<float, 4>(float*, int)") == "softmax"
    assert profiling.short_name("aten::mm") == "aten::mm"
    assert profiling.short_name("Memcpy DtoH (Device -> Pinned)") == "Memcpy DtoH "


RAW_PAGE = """==PROF== Connected
"ID","Kernel Name","Grid Size","gpu__time_duration.sum","dram__bytes_read.sum","launch__registers_per_thread",""" + (
    """"sm__warps_active.avg.pct_of_peak_sustained_active","smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio","""
    """"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio","""
    """"smsp__average_warps_issue_stalled_not_selected_per_issue_active.ratio"
"","","","us","Mbyte","register/thread","%","inst","inst","inst"
"0","void ns::gemm<4>(float*)","(8, 1, 1)","1,250.5","2.5","168","12.5","0.1","2.5","9.0"
"1","copy(int)","(1, 1, 1)","3","n/a","32","50","0.2","0.1","0.0"
"""
)


def test_counters_of_nsight_compute(tmp_path):
    (tmp_path / "raw.csv").write_text(RAW_PAGE)
    first, second = profiling.read_counters(tmp_path / "raw.csv")
    assert first == {
        "name": "void ns::gemm<4>(float*)",
        "kernel": "gemm",
        "seconds": pytest.approx(1250.5e-6),
        "dram_read": 2.5e6,
        "occupancy": 0.125,
        "registers": 168,
        "waits_for": "long scoreboard",
    }
    assert "dram_read" not in second
    assert second["waits_for"] == "barrier"
    profiling.shorten_counters(tmp_path / "raw.csv", tmp_path / "short.csv")
    assert profiling.read_counters(tmp_path / "short.csv") == [first, second]


def test_another_csv_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="--csv --page raw"):
        profiling.read_counters(tmp_path / "a.csv")


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("*/*.csv")), ids=lambda f: f.stem)
def test_recorded_counters_can_be_read(file):
    kernels = profiling.read_counters(file)
    assert kernels
    for kernel in kernels:
        assert 0 < kernel["seconds"] < 1
        assert all(0 <= kernel[word] <= 1.02 for word in ("tensor_share", "dram_share", "occupancy") if word in kernel)


def test_flops_of_a_model_are_torch_s(model):
    tokens = torch.randint(64, (2, 17))
    with torch.no_grad():
        with profiling.count() as work:
            model(tokens)
        with FlopCounterMode(display=False) as counter:
            model(tokens)
    fused = work.operators.get("aten._scaled_dot_product_flash_attention_for_cpu", {"flops": 0})["flops"]
    assert fused == CONFIG.layers * 4 * 2 * 17 * 17 * CONFIG.width
    assert work.flops - fused == counter.get_total_flops()


def test_flops_of_a_training_step():
    x, w = torch.randn(5, 7), torch.randn(7, 3, requires_grad=True)
    with profiling.count() as work:
        (x @ w).sum().backward()
    assert work.flops == 2 * (2 * 5 * 7 * 3)


@pytest.mark.parametrize("attend", [F.scaled_dot_product_attention, flash_attention])
def test_flops_of_fused_attention_and_its_gradients_are_those_of_its_products(attend):
    q, k, v = (torch.randn(2, 3, length, 16, requires_grad=True) for length in (5, 7, 7))
    product = 2 * 2 * 3 * 5 * 7 * 16
    with profiling.count() as forward:
        out = attend(q, k, v)
    with profiling.count() as backward:
        out.sum().backward()
    assert (forward.flops, backward.flops) == (2 * product, 5 * product)


def test_flops_of_packed_sequences_are_those_of_each():
    x, starts = torch.randn(9, 3, 16), torch.tensor([0, 2, 2, 9], dtype=torch.int32)
    with profiling.count() as work:
        flash_attention_varlen(x, x, x, starts, starts)
    assert work.flops == 2 * 2 * 3 * 16 * (2 * 2 + 7 * 7)


def test_bytes_of_simple_operators():
    x, y, index = torch.randn(8, 16), torch.randn(8, 16), torch.tensor([1, 1, 3])
    cases = [
        (lambda: x + y, 3 * 512),
        (lambda: x.exp(), 2 * 512),
        (lambda: x.sum(-1), 512 + 32),
        (lambda: x @ y.T, 512 + 512 + 256),
        (lambda: x.transpose(0, 1), 0),
        (lambda: x.transpose(0, 1).contiguous(), 2 * 512),
        (lambda: x.view(4, 32)[1:], 0),
        (lambda: torch.empty(100), 0),
        (lambda: x.add_(y), 3 * 512),
        (lambda: x.copy_(y), 2 * 512),
        (lambda: x + y[:1].expand(8, 16), 512 + 64 + 512),
        (lambda: F.embedding(index, x), 24 + 2 * 3 * 64),
    ]
    for i, (run, expected) in enumerate(cases):
        with profiling.count() as work:
            run()
        assert work.bytes == expected, f"case {i}: {dict(work.operators)}"


def test_a_softmax_of_five_operators_moves_four_times_as_much():
    x = torch.randn(64, 1024)
    with profiling.count() as five:
        y = (x - x.amax(-1, keepdim=True)).exp()
        y / y.sum(-1, keepdim=True)
    with profiling.count() as one:
        x.softmax(-1)
    assert (five.calls, one.calls) == (5, 1)
    assert 4.0 < five.bytes / one.bytes < 4.02


def test_counting_does_not_change_the_result(model):
    tokens = torch.randint(64, (1, 9))
    with torch.no_grad():
        expected = model(tokens)
        with profiling.count():
            assert torch.equal(model(tokens), expected)


@draws(50)
@given(st.floats(1e9, 1e15), st.floats(1e9, 1e13), st.floats(1e6, 1e15), st.floats(1e3, 1e12))
def test_roofline_bounds_time_and_rate(flops_rate, bytes_rate, flops, moved):
    roof = profiling.Roofline(flops_rate, bytes_rate)
    seconds = roof.seconds(flops, moved)
    assert seconds == pytest.approx(flops / roof.rate(flops / moved), rel=1e-9)
    if flops / moved != pytest.approx(roof.ridge, rel=1e-9):
        assert roof.bound(flops, moved) == ("arithmetic" if flops / moved > roof.ridge else "memory")


def test_launches_bound_small_work():
    roof = profiling.Roofline(1e12, 1e11, launch_seconds=1e-5)
    assert roof.bound(1e6, 1e5, launches=1) == "launches"
    assert roof.seconds(1e6, 1e5, launches=100) == pytest.approx(1e-3)


def test_amdahl():
    random.seed(0)
    assert profiling.amdahl(1.0, 4) == 4
    assert profiling.amdahl(0.5, float("inf")) == 2
    assert profiling.amdahl(0.0, 10) == 1
    for _ in range(20):
        share, speedup = random.random(), 1 + 9 * random.random()
        assert profiling.amdahl(share, speedup) == pytest.approx(1 / ((1 - share) + share / speedup))
    for share, speedup in ((1.5, 2), (-0.1, 2), (0.5, 0)):
        with pytest.raises(ValueError, match="share must be"):
            profiling.amdahl(share, speedup)
