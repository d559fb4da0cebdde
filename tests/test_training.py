"""Training: the schedule, decay groups, accumulation, the windows, and runs that survive what can happen to them."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tformer_lib import tokens, training
from tformer_lib.checkpoint import save_tensors
from tformer_lib.mixture_of_experts import ExpertsConfig
from tformer_lib.tokens import CorpusConfig
from tformer_lib.training import IGNORED, Run, TrainingConfig, machine
from tformer_lib.transformer import Decoder, ModelConfig, label_smoothed_loss

ROOT = Path(__file__).parent.parent
TINY = training.llama_like(width=16, layers=1, heads=2, dropout=0.1)


def tiny(data: Path, out: Path, **changes) -> TrainingConfig:
    """A run of seconds, which uses every source of randomness."""
    values = {"steps": 12, "batch": 4, "context": 16, "warmup": 3, "eval_interval": 4, "save_interval": 1}
    values |= {"eval_windows": 4, "log_interval": 2, "sample_tokens": 4, "device": "cpu", "average": 0.8}
    return TrainingConfig(**{"model": TINY, "data": str(data), "out": str(out), **values, **changes})


def trained(config: TrainingConfig) -> Run:
    return training.train(config, quiet=True)


def checkpoint(out: Path) -> dict[str, torch.Tensor]:
    return training.read_tensors(Path(out) / "checkpoint.safetensors")[0]


def assert_same_state(a: Path, b: Path) -> None:
    """Weights, optimizer and random states are equal bit by bit, and so are best weights and losses."""
    ours, theirs = checkpoint(a), checkpoint(b)
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == set()
    bests = [training.read_tensors(Path(x) / "best.safetensors")[0] for x in (a, b)]
    assert all(torch.equal(bests[0][name], bests[1][name]) for name in bests[0])
    timeless = [
        [{k: v for k, v in x.items() if k != "tokens_per_second"} for x in training.read_metrics(y)] for y in (a, b)
    ]
    assert timeless[0] == timeless[1]


# --- schedule, optimizer, loss ------------------------------------------------------------------------------------


def test_schedule_is_nanogpts():
    config = training.preset("shakespeare-char")
    rates = [training.learning_rate(t, config) for t in range(config.steps + 5)]
    assert rates[0] == pytest.approx(config.learning_rate / (config.warmup + 1))
    assert rates[config.warmup - 1] == pytest.approx(config.learning_rate * config.warmup / (config.warmup + 1))
    assert rates[config.warmup] == max(rates) == config.learning_rate
    assert rates[config.steps] == rates[-1] == config.min_learning_rate
    middle = (config.warmup + config.steps) // 2
    assert rates[middle] == pytest.approx((config.learning_rate + config.min_learning_rate) / 2)
    assert all(a > b for a, b in zip(rates[config.warmup : config.steps], rates[config.warmup + 1 :], strict=False))


def test_a_run_that_is_all_warm_up_has_a_schedule(data, tmp_path):
    config = tiny(data, tmp_path, steps=3, warmup=3)
    assert [training.learning_rate(t, config) for t in range(4)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-4])


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_matrices_are_decayed_and_nothing_else(norm):
    model = Decoder(ModelConfig(vocab_size=11, width=8, layers=2, heads=2, norm=norm))
    decayed, spared = training.parameter_groups(model, 0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert {id(p) for p in decayed["params"] + spared["params"]} == names.keys()
    assert len(decayed["params"]) + len(spared["params"]) == len(names)  # the tied table is there once
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in spared["params"])
    assert not any("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in decayed["params"])


@pytest.mark.parametrize("pieces", [1, 2, 3, 6])
def test_accumulated_gradient_is_that_of_the_whole_batch(pieces):
    torch.manual_seed(0)
    model = Decoder(dataclasses.replace(TINY, vocab_size=13, dropout=0.0)).double()
    inputs, targets = torch.randint(0, 13, (2, 6, 9))
    loss = training.next_token_loss(model, inputs, targets)
    whole = torch.autograd.grad(loss, list(model.parameters()))
    total = training.accumulate_gradient(lambda x, y: training.next_token_loss(model, x, y), inputs, targets, pieces)
    assert total.item() == pytest.approx(loss.item(), rel=1e-5)
    for p, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("pieces", [2, 3, 4, 5, 7])
def test_pieces_of_unequal_size_or_padding_give_the_gradient_of_the_whole_batch(pieces):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11)).double()
    inputs, targets = torch.randint(0, 11, (2, 7, 9))
    targets[:2], targets[3, 1:], targets[6, :4] = training.IGNORED, training.IGNORED, training.IGNORED
    loss = training.next_token_loss(model, inputs, targets)
    whole = torch.autograd.grad(loss, list(model.parameters()))
    total = training.accumulate_gradient(lambda x, y: training.next_token_loss(model, x, y), inputs, targets, pieces)
    assert total.item() == pytest.approx(loss.item(), rel=1e-5)
    for p, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("pieces", [0, 8])
def test_a_batch_is_not_cut_into_more_pieces_than_it_has_windows(pieces):
    windows = torch.zeros(7, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"micro-batches must be 1 to 7, the windows of the batch, got {pieces}"):
        training.accumulate_gradient(lambda x, y: torch.zeros(()), windows, windows, pieces)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": math.inf}, "learning_rate must be finite, got inf"),
        ({"dtype": "float16"}, "dtype must be auto, float32 or bfloat16, got 'float16'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"out": ""}, "out must name a file or folder, got ''"),
        ({"seed": 2**32}, r"seed must be below 2\*\*32, got 4294967296"),
    ],
)
def test_settings_that_no_step_can_take_are_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        training.preset("quick", **changes)


def test_the_average_of_the_weights_is_what_is_kept(data, tmp_path):
    """The recurrence by hand; the weights that train on are untouched by what an evaluation borrows."""
    run = Run(tiny(data, tmp_path, average=0.75))
    run.start()
    name = "embedding.tokens.weight"
    expected = training.weights_of(run.model, copy=True)[name]
    for step in range(1, 61):
        run.take_step()
        memory = min(0.75, step / (step + 9))
        expected = memory * expected + (1 - memory) * training.weights_of(run.model)[name]
        torch.testing.assert_close(run.average[name], expected)
    own = training.weights_of(run.model, copy=True)
    loss = run.evaluate()
    assert all(torch.equal(own[n], p) for n, p in training.weights_of(run.model).items())
    best = training.read_tensors(tmp_path / "best.safetensors")[0]
    assert torch.equal(best[name], run.average[name])
    assert not torch.equal(best[name], own[name])
    training.load_weights(run.model, best)
    assert training.evaluate(run.model, run.val_inputs, run.val_targets) == pytest.approx(loss, rel=1e-6)


def test_evaluation_averages_over_targets_not_over_batches():
    torch.manual_seed(0)
    model = Decoder(dataclasses.replace(TINY, vocab_size=13, dropout=0.5)).train()
    inputs, targets = torch.randint(0, 13, (2, 7, 9))
    targets[0, 2:] = IGNORED
    targets[4, :] = IGNORED
    got = training.evaluate(model, inputs, targets, batch=3)
    assert model.training
    model.eval()
    log_p = model(inputs).double().log_softmax(-1)
    kept = targets != IGNORED
    expected = -log_p.gather(-1, targets.clamp_min(0)[..., None])[..., 0][kept].mean()
    assert got == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("shape", [{}, {"kv_heads": 2, "feed_forward": "swiglu", "bias": False}, {"head_dim": 24}])
def test_flops_are_those_that_torch_counts(shape):
    config = ModelConfig(**{"vocab_size": 50, "width": 32, "layers": 3, "heads": 4, "attention": "attention", **shape})
    model, inputs = Decoder(config), torch.randint(0, 50, (2, 20))
    with FlopCounterMode(display=False) as counter:
        training.next_token_loss(model, inputs, inputs).backward()
    assert counter.get_total_flops() == 40 * training.estimate_flops_per_token(config, 20)


# --- windows ------------------------------------------------------------------------------------------------------


def test_windows_of_a_step_depend_on_seed_and_step_alone(data, tmp_path):
    config = tiny(data, tmp_path)
    starts = [training.window_starts(17, config, step) for step in range(50)]
    assert all((s >= 0).all() and (s + config.context < 17).all() for s in starts)
    starts = [training.window_starts(5000, config, step) for step in range(50)]
    assert len({tuple(s) for s in starts}) == 50
    assert (starts[7] == training.window_starts(5000, config, 7)).all()
    other = dataclasses.replace(config, seed=1)
    assert (starts[7] != training.window_starts(5000, other, 7)).any()


def test_targets_are_one_token_on():
    inputs, targets = training.read_windows(np.arange(100, 120, dtype=np.uint16), np.array([0, 9]), 4)
    assert inputs.tolist() == [[100, 101, 102, 103], [109, 110, 111, 112]]
    assert targets.tolist() == [[101, 102, 103, 104], [110, 111, 112, 113]]


def test_a_plain_text_is_read_once_from_end_to_end():
    text = np.arange(1000, 1050)
    inputs, targets = training.evaluation_windows(text, 8)
    assert inputs.flatten().tolist() == list(range(1000, 1048))
    assert (targets == inputs + 1).all()
    assert training.evaluation_windows(text, 8, count=3)[0][:, 0].tolist() == [1000, 1016, 1040]


@draws(60)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=25))
def test_documents_are_scored_whole_each_once(lengths):
    """Each document that fits is scored from its first token to its end; none is scored in part."""
    context, end = 10, 999
    documents = [[100 * i + j for j in range(n - 1)] + [end] for i, n in enumerate(lengths, start=10)]
    text = np.array([end, *chain.from_iterable(documents)])
    inputs, targets = training.evaluation_windows(text, context, end_of_document=end)
    if all(n > context for n in lengths):
        assert (targets != IGNORED).all()  # cut like a plain text
        return
    scored = [row[row != IGNORED].tolist() for row in targets]
    assert [*chain(*scored)] == [*chain(*(d for d in documents if len(d) <= context))]
    assert (inputs[:, 0] == end).all()
    assert all(row[-1] == end for row in scored)


def test_the_floor_of_some_stories_is_their_own(tmp_path):
    from tformer_lib import stories

    config = CorpusConfig(out=tmp_path, stories=60, vocab_size=600, val_fraction=0.2)
    corpus = tokens.prepare(config)
    end = training.end_of_document(corpus)
    whole = training.evaluation_windows(corpus.val, 600, end_of_document=end)
    assert int((whole[1] != IGNORED).sum()) == len(corpus.val) - 1
    assert training.entropy_floor(corpus, whole[1]) == corpus.meta.floor_nats_per_token
    _, few = training.evaluation_windows(corpus.val, 600, count=2, end_of_document=end)
    counted = few[few != IGNORED].tolist()
    texts = corpus.encoding.decode(counted).split("<|endoftext|>")[:-1]
    assert 0 < len(texts) < 12
    assert set(texts) <= set(stories.stories(12, "val 0"))
    expected = -sum(map(stories.log_prob, texts)) / len(counted)
    assert training.entropy_floor(corpus, few) == pytest.approx(expected)
    _, cut = training.evaluation_windows(corpus.val, 20, end_of_document=end)
    assert training.entropy_floor(corpus, cut) is None


# --- killed, stopped, resumed -------------------------------------------------------------------------------------


def test_resumed_is_bit_identical_to_unbroken(data, tmp_path):
    trained(tiny(data, tmp_path / "unbroken"))
    run = Run(tiny(data, tmp_path / "broken", save_interval=5))
    run.start()
    run.evaluate()
    for _ in range(5):
        run.take_step()
    run.save()
    torch.randn(3), np.random.rand(3)  # what others draw meanwhile does not matter
    Run.resume(tmp_path / "broken").train(quiet=True)
    ours, theirs = checkpoint(tmp_path / "broken"), checkpoint(tmp_path / "unbroken")
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == set()


def test_stopped_before_the_first_step_a_run_goes_on(data, tmp_path):
    trained(tiny(data, tmp_path / "unbroken", steps=4))
    run = Run(tiny(data, tmp_path / "stopped", steps=4))
    run.start()
    run.evaluate()
    run.save()
    Run.resume(tmp_path / "stopped").train(quiet=True)
    assert_same_state(tmp_path / "stopped", tmp_path / "unbroken")


DRIVER = """
# A process that starts runs in children and kills them. Children are forked, so that torch is imported once.
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
sys.path.insert(0, "tests")
from deaths import die_at
from tformer_lib import training
from tformer_lib.training import Run

config = training.config_from_dict(json.loads(sys.argv[1]))
out, rounds = config.out, json.loads(sys.argv[2])

def child(what, count):
    if what:
        die_at(what, count)
    there = os.path.exists(out + "/checkpoint.safetensors")
    (Run.resume(out) if there else Run(config)).train(quiet=True)
    os._exit(0)

died = 0
draw = random.Random(0)
for what, count in rounds + [[None, 0]]:
    process = os.fork()
    if process == 0:
        try:
            child(what if what != "time" else None, count)
        finally:
            os._exit(1)
    if what == "time":
        time.sleep(draw.uniform(0, count))
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    died += os.WIFSIGNALED(status)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status):
        sys.exit("a run failed")
print(died)
"""


def test_killed_at_any_moment_a_run_ends_as_if_unbroken(data, tmp_path):
    """Real SIGKILLs: at random times, before and after each system call of a save, and half way through a file."""
    trained(tiny(data, tmp_path / "unbroken"))
    exact = [[what, count] for what, most in (("fsync", 4), ("replace", 3), ("write", 5)) for count in range(1, most)]
    rounds = exact + [["time", 0.4]] * 5
    config = json.dumps(dataclasses.asdict(tiny(data, tmp_path / "killed")))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, config, json.dumps(rounds)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 6
    assert_same_state(tmp_path / "killed", tmp_path / "unbroken")


def test_ctrl_c_saves_and_the_run_goes_on(data, tmp_path):
    flags = {"data": data, "steps": 100000, "batch": 2, "context": 16, "warmup": 3, "eval-interval": 50000}
    flags |= {"save-interval": 50000, "sample-tokens": 0, "eval-windows": 2, "device": "cpu", "out": tmp_path / "run"}
    flags |= {"model.width": 16, "model.layers": 1, "model.heads": 2}
    command = [sys.executable, "-m", "tformer_lib.training"]
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    process = subprocess.Popen(
        [*command, "train", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and len(training.read_metrics(metrics)) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    run = Run.resume(tmp_path / "run")
    assert f"stopped at step {run.step}" in out
    assert run.step >= 10
    assert run.step == training.read_tensors(run.checkpoint)[1]["step"]
    run.take_step()


def test_gaps_in_the_log_of_a_crash_are_closed(data, tmp_path):
    run = trained(tiny(data, tmp_path, steps=4))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    again = Run.resume(tmp_path)
    assert again.history == run.history
    again.train(quiet=True)
    assert training.read_metrics(tmp_path) == run.history


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_checkpoint(data, tmp_path, monkeypatch):
    run = trained(tiny(data, tmp_path, steps=2))
    before = run.checkpoint.read_bytes()
    run.take_step()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not save .*checkpoint.safetensors: No space left on device; .* is kept"):
        run.save()
    assert run.checkpoint.read_bytes() == before
    assert not list(tmp_path.glob("*.part"))
    monkeypatch.undo()
    assert Run.resume(tmp_path).step == 2


FULL_DISK = """
import resource, sys
from tformer_lib import training
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))  # no file may grow past this
sys.exit(training.main(sys.argv[1:]))
"""


def test_a_write_that_the_system_refuses_is_one_line(data, tmp_path):
    """A real failure of write(2), in the middle of a file, from the command line."""
    trained(tiny(data, tmp_path, steps=2))
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    assert len(before) > 9000
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, "resume", "--out", str(tmp_path), "--steps", "4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert [x for x in done.stderr.splitlines() if x.startswith("error: could not save")], done.stderr
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def error_of(arguments: list, capsys) -> str:
    """The one line that the command line ends with."""
    assert training.main([str(x) for x in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def test_bad_input_is_one_clear_line(data, tmp_path, capsys):
    train = ["train", "--data", data, "--out", tmp_path / "run", "--model.width", 16, "--context", 16]
    cases = {
        ("--preset", "poems"): "unknown preset 'poems': there are quick, stories",
        ("--preset=poems",): "unknown preset 'poems'",
        ("--model.heads", 3): "width 16 is not a multiple of heads, 3",
        ("--context", 4000): "context 4000 needs at least 4001 tokens, but train.bin of",
        ("--context", 300): "context 300 needs at least 301 tokens, but val.bin of",
        ("--batch", 6, "--accumulation", 4): "batch must be a multiple of accumulation, got 6 and 4",
        ("--steps", 0): "steps must be at least 1, got 0",
        ("--min-learning-rate", 1.0): "min_learning_rate must be in [0, learning_rate",
        ("--beta2", 1.0): "beta2 must be in [0, 1), got 1.0",
        ("--device", "tpu9"): "device 'tpu9' is not here",
        ("--device", "meta"): "device 'meta' is not here",
        ("--seed", 2**70): f"seed must be below 2**32, got {2**70}",
        ("--data", tmp_path): "is not a corpus",
    }
    for flags, expected in cases.items():
        assert expected in error_of([*train, *flags], capsys)
    assert not (tmp_path / "run").exists()
    assert "there is no" in error_of(["resume", "--out", tmp_path / "nowhere"], capsys)
    assert "there is no" in error_of(["sample", "--out", tmp_path / "nowhere"], capsys)


def test_a_truncated_corpus_is_refused(data, tmp_path, capsys):
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 100 if file.name == "train.bin" else None])
    assert "train.bin is truncated" in error_of(["train", "--data", tmp_path, "--out", tmp_path / "run"], capsys)


def test_checkpoints_of_another_run_are_refused(data, tmp_path, capsys):
    trained(tiny(data, tmp_path / "run", steps=2))
    before = checkpoint(tmp_path / "run")
    flags = ["train", "--data", data, "--out", tmp_path / "run", "--context", 16]
    error = error_of([*flags, "--model.width", 32, "--model.layers", 1, "--model.heads", 2], capsys)
    assert "already holds a run: its model.width is 16, yours is 32" in error
    with pytest.raises(ValueError, match="it has the same settings: resume it"):
        trained(tiny(data, tmp_path / "run", steps=2))
    other = Decoder(dataclasses.replace(TINY, vocab_size=20, width=24))
    with pytest.raises(
        ValueError, match=r"another configuration: embedding.tokens.weight is \(\d+, 16\), .* \(20, 24\)"
    ):
        training.load_weights(other, {k[8:]: v for k, v in before.items() if k.startswith("weights.")})
    untouched = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match="it does not have embedding"):
        training.load_weights(other, {})
    assert all(torch.equal(v, untouched[k]) for k, v in other.state_dict().items())
    after = checkpoint(tmp_path / "run")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_another_corpus_a_damaged_file_and_bare_weights_are_refused(data, tmp_path):
    trained(tiny(data, tmp_path / "run", steps=2))
    (tmp_path / "other.txt").write_text("The cat sat on the mat, and the rat sat on the bat. " * 40)
    tokens.prepare(CorpusConfig(corpus=str(tmp_path / "other.txt"), out=tmp_path / "other", tokenizer="characters"))
    with pytest.raises(ValueError, match="another corpus"):
        Run.resume(tmp_path / "run", data=str(tmp_path / "other"))
    file = tmp_path / "run/checkpoint.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged"):
        Run.resume(tmp_path / "run")
    file.write_bytes(safetensors.torch.save({"a": torch.ones(2)}))
    with pytest.raises(ValueError, match="holds weights, but no training run"):
        Run.resume(tmp_path / "run")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_in_another_dtype_goes_on_in_the_runs_own_or_is_refused(data, tmp_path, optimizer, dtype):
    trained(tiny(data, tmp_path, steps=2, optimizer=optimizer))
    file = tmp_path / "checkpoint.safetensors"
    tensors, facts = training.read_tensors(file)
    for kind in ("weights.", "average.", "optimizer."):
        changed = {name: x.to(dtype) if name.startswith(kind) else x for name, x in tensors.items()}
        save_tensors(file, changed, facts)
        if dtype == torch.int32:
            with pytest.raises(ValueError, match=r"in torch\.int32: quantised weights cannot be read"):
                Run.resume(tmp_path)
            continue
        run = Run.resume(tmp_path, steps=3)
        assert {x.dtype for x in run.state().values()} == {torch.float32}
        run.train(quiet=True)
        assert run.step == 3


@pytest.mark.parametrize(("name", "value"), [("step", -3), ("best", float("nan")), ("best", -1.0)])
def test_how_far_no_run_can_have_come_is_refused(data, tmp_path, name, value):
    trained(tiny(data, tmp_path, steps=1))
    file = tmp_path / "checkpoint.safetensors"
    tensors, facts = training.read_tensors(file)
    save_tensors(file, tensors, facts | {name: value})
    with pytest.raises(ValueError, match=f"has a {name} that no run can have: {value}"):
        Run.resume(tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    run = Run(tiny(data, tmp_path, average=0.0))
    nn.init.constant_(run.model.unembedding.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="the validation loss is nan at step 0"):
        run.train(quiet=True)
    assert math.isinf(run.best)
    assert training.read_metrics(tmp_path) == []
    assert not run.checkpoint.exists()
    assert not (tmp_path / "best.safetensors").exists()


def spoil_weight(run: Run) -> None:
    run.model.embedding.tokens.weight.data[3, 2] = float("nan")


def spoil_average(run: Run) -> None:
    run.average["embedding.tokens.weight"][3, 2] = float("inf")


def spoil_optimizer(run: Run) -> None:
    run.optimizer.state[run.model.embedding.tokens.weight]["exp_avg"][3, 2] = float("nan")


def spoil_loss(run: Run) -> None:
    run.last_loss = torch.tensor(float("inf"))


SPOILT = [spoil_weight, spoil_average, spoil_optimizer, spoil_loss]


@pytest.mark.parametrize("spoil", SPOILT)
def test_nothing_that_is_not_finite_replaces_the_good_checkpoint(data, tmp_path, spoil):
    run = trained(tiny(data, tmp_path, steps=2))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    spoil(run)
    with pytest.raises(FloatingPointError, match=r"(is not saved, because|the loss is inf at step 2).*is kept"):
        run.save()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert Run.resume(tmp_path).step == 2


@pytest.mark.parametrize("signalled", [True, False])
def test_a_run_that_left_the_finite_numbers_between_two_logs_is_not_saved(data, tmp_path, signalled):
    """By Ctrl-C, or by a save interval that comes before the next log."""
    run = trained(tiny(data, tmp_path, steps=2))
    before = run.checkpoint.read_bytes()
    run = Run.resume(tmp_path, steps=50, log_interval=1000, eval_interval=1000, save_interval=1000 if signalled else 5)
    own = run.take_step

    def diverging():
        loss, norm = own()
        if run.step == 4:
            spoil_weight(run)
        if signalled and run.step == 6:
            signal.raise_signal(signal.SIGINT)
        return loss, norm

    run.take_step = diverging
    with pytest.raises(FloatingPointError, match="is kept"):
        run.train(quiet=True)
    assert run.step == (6 if signalled else 5)
    assert run.checkpoint.read_bytes() == before


def test_two_runs_in_one_folder_the_second_is_refused(data, tmp_path, capsys):
    run = trained(tiny(data, tmp_path, steps=2))
    first, second = Run.resume(tmp_path, steps=6), Run.resume(tmp_path, steps=6)
    own, errors = first.take_step, []

    def step():
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(BlockingIOError, match=f"{tmp_path} is in use: another process is writing to it"):
            second.train(quiet=True)
        errors.append(error_of(["resume", "--out", tmp_path, "--steps", 9], capsys))
        errors.append(error_of(["train", "--data", data, "--out", tmp_path, "--context", 16], capsys))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        return own()

    first.take_step = step
    assert first.train(quiet=True)
    assert set(errors) == {f"error: {tmp_path} is in use: another process is writing to it"}
    assert run.step == 2
    assert Run.resume(tmp_path).step == 6


CHANGES = {
    "facts lack step": (lambda t, f: f.pop("step"), "is of another version: it lacks step"),
    "facts lack best": (lambda t, f: f.pop("best"), "is of another version: it lacks best"),
    "facts lack corpus": (lambda t, f: f.pop("corpus"), "is of another version: it lacks corpus"),
    "facts lack random": (lambda t, f: f.pop("random"), "is of another version: it lacks random"),
    "facts lack config": (lambda t, f: f.pop("config"), "is of another version: it lacks config"),
    "config is a text": (lambda t, f: f.update(config="quick"), "config is no JSON object, but 'quick'"),
    "config lacks model": (lambda t, f: f["config"].pop("model"), "config is of another version: it lacks model"),
    "model lacks size": (
        lambda t, f: f["config"]["model"].pop("vocab_size"),
        "config.model is of another version: it lacks",
    ),
    "unknown setting": (
        lambda t, f: f["config"].update(momentum=0.9),
        "it has momentum, which is not known here",
    ),
    "unknown size": (lambda t, f: f["config"]["model"].update(teacher=1), "it has teacher, which is not"),
    "wrong kind": (lambda t, f: f["config"].update(batch="many"), "config has a value of the wrong kind: "),
    "RoPE of a list": (
        lambda t, f: f["config"]["model"].update(rope_scaling={"rope_type": []}),
        "rope_type must be one",
    ),
    "layers in halves": (lambda t, f: f["config"]["model"].update(layers=1.5), "wrong kind: layers is 1.5"),
    "RoPE is a list": (lambda t, f: f["config"]["model"].update(rope_scaling=[8]), r"wrong kind: rope_scaling is [8]"),
    "step is a text": (lambda t, f: f.update(step="3"), "has a value of the wrong kind: step is '3'"),
    "no python": (lambda t, f: f["random"].pop("python"), "random is of another version: it lacks python"),
    "odd numpy": (lambda t, f: f["random"].update(numpy=["PCG64", [1, 2], 3]), "has random states of another version"),
    "no torch": (lambda t, f: t.pop("random.torch"), "is of another version: it lacks random.torch"),
    "short torch": (lambda t, f: t.update({"random.torch": torch.zeros(3, dtype=torch.uint8)}), "random states of"),
    "no average": (lambda t, f: t.pop("average.stack.final_norm.weight"), "it does not have stack.final_norm.weight"),
    "no weight": (lambda t, f: t.pop("weights.stack.final_norm.weight"), "it does not have stack.final_norm.weight"),
    "quantised": (
        lambda t, f: t.update({"weights.stack.final_norm.weight": torch.ones(16, dtype=torch.int8)}),
        "has stack.final_norm.weight in torch.int8: quantised weights cannot be read here",
    ),
    "no optimizer": (
        lambda t, f: [t.pop(name) for name in list(t) if name.startswith("optimizer.")],
        "it lacks the optimizer's state",
    ),
    "half an optimizer": (
        lambda t, f: t.pop("optimizer.stack.final_norm.weight.exp_avg"),
        "optimizer is of another configuration: it does not have stack.final_norm.weight.exp_avg",
    ),
    "another optimizer": (
        lambda t, f: t.update({"optimizer.stack.final_norm.weight.momentum_buffer": torch.ones(16)}),
        "it has, but the model has not, stack.final_norm.weight.momentum_buffer",
    ),
    "another model's": (
        lambda t, f: t.update({"optimizer.head.exp_avg": torch.ones(16)}),
        "it has, but the model has not, head.exp_avg",
    ),
    "another shape": (
        lambda t, f: t.update({"optimizer.stack.final_norm.weight.exp_avg": torch.ones(17)}),
        "stack.final_norm.weight.exp_avg is (17,), the model's is (16,)",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_of_another_version_is_refused_in_one_line(data, tmp_path, name, capsys):
    change, expected = CHANGES[name]
    run = trained(tiny(data, tmp_path, steps=2))
    tensors, facts = training.read_tensors(run.checkpoint)
    change(tensors, facts)
    run.checkpoint.write_bytes(safetensors.torch.save(tensors, {"facts": json.dumps(facts)}))
    assert expected in error_of(["resume", "--out", tmp_path, "--steps", 4], capsys)


def test_weights_of_another_version_write_nothing(data, tmp_path, capsys):
    trained(tiny(data, tmp_path, steps=2))
    best = tmp_path / "best.safetensors"
    tensors, facts = training.read_tensors(best)
    tensors = {name: x.clone() for name, x in tensors.items()}  # off the file, which is written to
    for change, expected in (
        ({"beginning": None}, "lacks beginning"),
        ({"config": None}, "lacks config"),
        ({"config": {"model": {}}}, "config.model is of another version: it lacks vocab_size"),
    ):
        changed = {k: v for k, v in (facts | change).items() if v is not None}
        best.write_bytes(safetensors.torch.save(tensors, {"facts": json.dumps(changed)}))
        assert expected in error_of(["sample", "--out", tmp_path], capsys)


def test_a_terminal_that_closes_does_not_lose_the_run(data, tmp_path):
    """SIGHUP comes, twice, and nothing more can be written to the terminal: the run is saved all the same."""
    pty = pytest.importorskip("pty")
    flags = {"data": data, "steps": 100000, "batch": 2, "context": 16, "warmup": 3, "eval-interval": 50000}
    flags |= {"save-interval": 50000, "sample-tokens": 0, "eval-windows": 2, "device": "cpu", "out": tmp_path / "run"}
    flags |= {"model.width": 16, "model.layers": 1, "model.heads": 2}
    command = [sys.executable, "-m", "tformer_lib.training", "train", *(f"--{k}={v}" for k, v in flags.items())]
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, command)
    metrics = tmp_path / "run/metrics.jsonl"
    while len(training.read_metrics(metrics)) < 3 and os.waitpid(process, os.WNOHANG)[0] == 0:
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 1 << 16)
    os.close(terminal)  # the system sends SIGHUP to whoever runs in it; a shell would send another
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGHUP)
    os.waitpid(process, 0)
    run = Run.resume(tmp_path / "run")
    assert run.step >= 10
    run.take_step()


def test_what_was_ignored_stays_ignored():
    """Under nohup a hang-up is ignored, and a run goes on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with machine.interrupts() as heard:
            signal.raise_signal(signal.SIGHUP)
            assert heard == []
            signal.raise_signal(signal.SIGTERM)
            assert heard == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what a test run under nohup does not begin with
        with machine.interrupts() as heard:
            for _ in range(3):
                signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert heard == [signal.SIGHUP] * 3 + [signal.SIGINT]


# --- what is lent is given back -----------------------------------------------------------------------------------


def test_a_models_own_weights_and_modes_come_back_on_every_way_out(data, tmp_path):
    run = Run(tiny(data, tmp_path))
    run.start()
    for _ in range(3):
        run.take_step()
    own = training.weights_of(run.model, copy=True)
    run.model.stack.blocks[0].eval()  # a frozen part keeps its mode
    modes = {name: module.training for name, module in run.model.named_modules()}
    assert len(set(modes.values())) == 2

    def fail(*_, **__):
        raise KeyboardInterrupt

    handle = run.model.unembedding.register_forward_hook(fail)
    for call in (
        run.evaluate,
        run.sample,
        lambda: training.evaluate(run.model, run.val_inputs, run.val_targets),
    ):
        with pytest.raises(KeyboardInterrupt):
            call()
        assert all(torch.equal(own[n], p) for n, p in training.weights_of(run.model).items())
        assert {name: module.training for name, module in run.model.named_modules()} == modes
    handle.remove()
    run.evaluate()
    assert {name: module.training for name, module in run.model.named_modules()} == modes


# --- precision ----------------------------------------------------------------------------------------------------


class Scores(nn.Module):
    """A model whose logits are its parameter."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.logits[inputs]


def losses() -> dict:
    """Each loss as a function of logits (12, 7), its rows being the places, with two that do not count."""
    targets = torch.tensor([[0, 1, 2, 3], [4, IGNORED, 6, 0], [1, 2, 3, IGNORED]])
    inputs = torch.arange(12).view(3, 4)

    def accumulated(logits: torch.Tensor, pieces: int = 3) -> torch.Tensor:
        model = Scores(logits.detach())
        return training.accumulate_gradient(lambda x, y: training.next_token_loss(model, x, y), inputs, targets, pieces)

    return {
        "next_token": lambda x: training.next_token_loss(lambda i: x[i], inputs, targets),
        "label_smoothed": lambda x: label_smoothed_loss(x, targets.flatten(), smoothing=0.1, ignore_index=IGNORED),
        "accumulated": accumulated,
    }


@pytest.mark.parametrize("name", losses())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32_or_better(name, dtype):
    """Against float64 on the same rounded logits: an error of the accumulation's precision, not of the inputs'."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(12, 7, dtype=torch.float64)).to(dtype)
    loss = losses()[name]
    found, expected = loss(logits), loss(logits.double())
    promised = torch.promote_types(dtype, torch.float32)
    assert found.dtype == promised
    targets = torch.tensor([0, 1, 2, 3, 4, 0, 6, 0, 1, 2, 3, 0])
    log_p = logits.double().log_softmax(-1)
    counted = torch.tensor([i for i in range(12) if i not in (5, 11)])
    exact = -log_p[counted, targets[counted]].mean()
    if name == "label_smoothed":
        exact = 0.9 * exact - 0.1 * log_p[counted].mean()
    assert abs(expected - exact) < 1e-14
    assert abs(found - exact) < 8 * torch.finfo(promised).eps


def test_gradients_of_losses_are_exact_in_float64():
    torch.manual_seed(0)
    logits = (3 * torch.randn(12, 7, dtype=torch.float64)).requires_grad_()
    for name in ("next_token", "label_smoothed"):
        assert torch.autograd.gradcheck(losses()[name], logits)
    inputs, targets = torch.arange(12).view(3, 4), torch.randint(0, 7, (3, 4))
    targets[1, 2:] = IGNORED
    model = Scores(logits.detach())
    loss = training.next_token_loss(model, inputs, targets)
    whole = torch.autograd.grad(loss, model.logits)[0]
    total = training.accumulate_gradient(lambda x, y: training.next_token_loss(model, x, y), inputs, targets, 3)
    assert abs(total - loss) < 1e-14
    torch.testing.assert_close(model.logits.grad, whole, atol=1e-15, rtol=1e-13)


def test_an_evaluation_skips_batches_that_do_not_count():
    torch.manual_seed(0)
    model, inputs = Scores(torch.randn(12, 7, dtype=torch.float64)), torch.arange(12).view(3, 4)
    targets = torch.randint(0, 7, (3, 4))
    targets[2] = IGNORED
    assert training.evaluate(model, inputs, targets, batch=1) == pytest.approx(
        training.next_token_loss(model, inputs, targets).item(), rel=1e-13
    )


# --- from end to end ----------------------------------------------------------------------------------------------


def test_a_run_learns_writes_and_leaves_its_files(data, tmp_path, capsys):
    config = tiny(data, tmp_path, steps=60, model=training.llama_like(width=32, layers=1, heads=2), learning_rate=1e-2)
    run = trained(dataclasses.replace(config, eval_interval=60, save_interval=60))
    losses = [line["val_loss"] for line in run.history if "val_loss" in line]
    assert losses[0] == pytest.approx(math.log(run.corpus.encoding.n_vocab), abs=0.2)
    assert losses[-1] < 0.6 * losses[0]
    assert run.best == losses[-1]
    names = {"config.json", "metrics.jsonl", "checkpoint.safetensors", "best.safetensors", "encoding.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert training.config_from_dict(json.loads((tmp_path / "config.json").read_text())) == run.config
    assert (
        training.main(
            ["sample", "--out", str(tmp_path), "--prompt", "The c", "--max-new-tokens", "20", "--device", "cpu"]
        )
        == 0
    )
    written = capsys.readouterr().out
    assert written.startswith("The c")
    assert len(written.strip()) > 10


def test_a_prompt_that_the_model_cannot_read_is_refused_in_one_line(data, tmp_path, capsys):
    trained(tiny(data, tmp_path, steps=1))
    error = error_of(["sample", "--out", tmp_path, "--prompt", "the cat " * 9], capsys)
    assert error == "error: the prompt has 73 tokens, the model reads 16"
    for flags in (["--device", "tpu"], ["--temperature", "nan"], ["--top-k", 0], ["--prompt", "Ω"]):
        assert error_of(["sample", "--out", tmp_path, *flags], capsys).startswith("error: ")


def test_accumulation_trains_the_same_model(data, tmp_path):
    plain = dataclasses.replace(TINY, dropout=0.0)
    runs = [trained(tiny(data, tmp_path / str(n), model=plain, accumulation=n, steps=5)) for n in (1, 4)]
    for a, b in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_every_setting_has_its_sentence(capsys):
    """--help says what each flag does, and names every preset."""
    with pytest.raises(SystemExit):
        training.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(TrainingConfig):
        name = field.name.replace("_", "-")
        assert "--model.width" in text if name == "model" else f"--{name}" in text
    assert ", ".join(list(training.PRESETS)[:-1]) in text
    with pytest.raises(SystemExit):
        training.main(["--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ["train", "resume", "sample", *training.PRESETS])


@pytest.mark.parametrize("name", training.PRESETS)
def test_presets_fit_their_budgets(name):
    config = training.preset(name)
    vocab_size = 65 if "shakespeare" in name else 1024
    model = Decoder(dataclasses.replace(config.model, vocab_size=vocab_size))
    size = sum(p.numel() for p in model.parameters())
    most = {"shakespeare-char": 10.65e6, "shakespeare-char-cpu": 0.81e6, "stories": 2e6, "quick": 0.6e6}[name]
    assert 0.9 * most < size <= most or name == "quick"


def test_token_noise_replaces_a_share_of_the_inputs_and_depends_on_seed_and_step_alone():
    config = training.preset("quick", token_noise=0.3)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=1000))
    inputs = torch.zeros(64, 256, dtype=torch.int64)
    noisy = training.replace_some(inputs, config, step=5)
    share = (noisy != inputs).float().mean().item()
    assert abs(share - 0.3) < 0.02
    assert 0 <= noisy.min() <= noisy.max() < config.model.vocab_size
    assert torch.equal(noisy, training.replace_some(inputs, config, step=5))
    assert not torch.equal(noisy, training.replace_some(inputs, config, step=6))
    assert training.replace_some(inputs, training.preset("quick"), step=5) is inputs


CHANGED = {
    "cuda_graph": True,
    "optimizer": "muon",
    "dtype": "bfloat16",
    "parallel": "fsdp",
    "compile": False,
    "average": 0.5,
    "accumulation": 2,
}


@pytest.mark.parametrize("change", ["nothing", "experts", *CHANGED])
def test_every_configuration_comes_back_from_its_file(change):
    """What a run writes down, a resumed one reads: checks look at a model, and not at its dictionary."""
    config = training.preset("quick")
    if change == "experts":
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, experts=ExpertsConfig(count=4, per_token=2))
        )
    elif change != "nothing":
        config = dataclasses.replace(config, **{change: CHANGED[change]})
    assert training.config_from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
