"""Steps as a CUDA graph: the same training as without, and what is refused. The residual stream in a narrow type."""

from dataclasses import replace

import pytest
import torch

from tformer_lib import tokens, training
from tformer_lib.mixture_of_experts import ExpertsConfig
from tformer_lib.tokens import CorpusConfig
from tformer_lib.training import Run, TrainingConfig
from tformer_lib.training.captured import WARM_UP, CapturedStep
from tformer_lib.training.optimizer import set_learning_rate
from tformer_lib.transformer import Decoder

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MODEL = training.llama_like(width=32, layers=2, heads=4)
SMALL = replace(MODEL, vocab_size=48, max_length=64)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("captured")
    (place / "text.txt").write_text("The cat sat on the mat, and the rat sat on the cat. " * 60)
    tokens.prepare(CorpusConfig(corpus=str(place / "text.txt"), out=place / "data", tokenizer="characters"))
    return place / "data"


def config(data, out, **changes) -> TrainingConfig:
    """A short run whose rate changes with every step."""
    values = {"steps": 4 * WARM_UP, "batch": 4, "context": 16, "warmup": 4, "learning_rate": 1e-2, "log_interval": 1}
    values |= {"min_learning_rate": 1e-3, "eval_interval": 4, "save_interval": 1, "sample_tokens": 0, "average": 0.8}
    values |= {"model": MODEL, "device": "cuda", "data": str(data), "out": str(out), "dtype": "float32"}
    return TrainingConfig(**{**values, **changes})


def trained(settings: TrainingConfig) -> Run:
    return training.train(settings, quiet=True)


def losses(run: Run) -> list[float]:
    return [line[key] for line in run.history for key in ("loss", "gradient_norm", "val_loss") if key in line]


VARIANTS = {
    "plain": {"compile": False},
    "compiled": {"compile": True},
    "in micro-batches": {"compile": False, "accumulation": 2},
    "loss in chunks": {"compile": True, "chunked_loss": True},
    "fused norms, bfloat16": {"compile": True, "fused_norms": True, "dtype": "bfloat16", "residual_in_fp32": False},
}


@needs_gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_captured_run_is_the_run_without(data, tmp_path, variant):
    changes = VARIANTS[variant]
    plain = trained(config(data, tmp_path / "plain", **changes))
    captured = trained(config(data, tmp_path / "captured", cuda_graph=True, **changes))
    assert captured.update.graph is not None
    assert plain.history[0] != plain.history[-1]
    close = 3e-2 if changes.get("dtype") == "bfloat16" else 2e-4
    assert losses(captured) == pytest.approx(losses(plain), rel=close)


@needs_gpu
def test_the_captured_rate_follows_the_schedule(data, tmp_path):
    moved = []
    for rate in (1e-2, 0.0):  # a rate of 0 after the capture leaves the weights where they are
        run = Run(config(data, tmp_path / f"{rate}", cuda_graph=True, compile=False, weight_decay=0.0))
        for _ in range(WARM_UP + 1):
            run.take_step()
        run.config = replace(run.config, learning_rate=rate, min_learning_rate=rate)
        before = [p.detach().clone() for p in run.model.parameters()]
        run.take_step()
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True)))
    assert moved == [True, False]


@needs_gpu
def test_a_captured_run_goes_on_where_it_stopped(data, tmp_path):
    steady = {"learning_rate": 1e-2, "min_learning_rate": 1e-2, "warmup": 0, "cuda_graph": True, "compile": False}
    unbroken = trained(config(data, tmp_path / "unbroken", **steady))
    trained(config(data, tmp_path / "broken", steps=8, **steady))  # after an evaluation, as the unbroken run has it
    rest = Run.resume(tmp_path / "broken", steps=4 * WARM_UP)
    rest.train(quiet=True)
    assert rest.update.graph is not None
    assert losses(rest) == pytest.approx(losses(unbroken), rel=1e-4)


@needs_gpu
def test_each_call_is_one_step_and_its_outputs_are_kept():
    total = torch.zeros(3, device="cuda")

    def step(x):
        total.add_(x)
        return total * 2, x + 1

    captured, expected, found = CapturedStep(step, torch.device("cuda")), torch.zeros(3, device="cuda"), []
    for i in range(2 * WARM_UP + 2):
        x = torch.full((3,), float(i), device="cuda")
        expected = expected + x
        found.append((captured(x), (2 * expected, x + 1)))
    assert torch.equal(total, expected)
    for ours, theirs in found:  # after all steps: no output is overwritten by a later one
        assert all(map(torch.equal, ours, theirs))
    with pytest.raises(ValueError, match="like its first"):
        captured(torch.zeros(1, device="cuda"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"optimizer": "muon"}, "AdamW"), ({"model": replace(MODEL, experts=ExpertsConfig(4))}, "without experts")],
)
def test_what_cannot_be_captured_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        training.preset("quick", cuda_graph=True, **changes)


def test_a_cpu_captures_nothing(data, tmp_path):
    with pytest.raises(ValueError, match="one process on a GPU, this run is on 1 x cpu"):
        Run(config(data, tmp_path / "run", device="cpu", cuda_graph=True))


@pytest.mark.parametrize("captured", [False, True])
def test_every_group_gets_the_schedules_rate(captured):
    settings = training.preset("quick", model=SMALL, cuda_graph=captured)
    optimizer = training.make_optimizer(Decoder(SMALL), settings)
    before = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.125)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert [float(rate) for rate in rates] == [0.125] * len(rates)
    if captured:  # in place: a graph reads it there
        assert all(isinstance(rate, torch.Tensor) and rate is old for rate, old in zip(rates, before, strict=True))


# --- the residual stream's type


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def streams(model: Decoder, windows: torch.Tensor) -> tuple[list[torch.dtype], torch.Tensor]:
    """The type of what each block is given, and the logits."""
    seen, norms = [], [block.attention_norm for block in model.stack.blocks] + [model.stack.final_norm]
    hooks = [norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype)) for norm in norms]
    with torch.autocast(windows.device.type, torch.bfloat16):
        logits = model(windows)
    for hook in hooks:
        hook.remove()
    return seen, logits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wide", [True, False])
def test_the_stream_is_as_wide_as_asked(device, wide):
    torch.manual_seed(0)
    model = Decoder(SMALL).to(device)
    windows = torch.randint(0, 48, (2, 14), device=device)
    exact = model(windows)
    model.stack.residual_in_fp32 = wide
    seen, logits = streams(model, windows)
    assert set(seen) == {torch.float32 if wide else torch.bfloat16}
    assert (logits.float() - exact).norm() / exact.norm() <= 0.02
    assert model(windows).dtype == torch.float32  # without autocast nothing is rounded
    assert torch.equal(model(windows), exact)


@pytest.mark.parametrize("device", DEVICES)
def test_fused_norms_keep_the_narrow_stream(device):
    torch.manual_seed(0)
    model = Decoder(SMALL).to(device)
    windows, gradients = torch.randint(0, 48, (2, 15), device=device), []
    model.stack.residual_in_fp32 = False
    for fused in (False, True):
        model.stack.fused_norms = fused
        with torch.autocast(device, torch.bfloat16):
            loss = training.next_token_loss(model, windows[:, :-1], windows[:, 1:])
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert (ours - theirs).norm() <= 0.03 * theirs.norm()
