"""Chunked cross-entropy: the plain loss and its gradients, whatever the chunk, and never the memory of all logits."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tformer_lib import training
from tformer_lib.mixture_of_experts import ExpertsConfig
from tformer_lib.training import IGNORED, Run, chunked_cross_entropy, cross_entropy, cross_entropy_triton
from tformer_lib.transformer import Decoder

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.2e-2}


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, *, smoothing: float, cap: float | None) -> Tensor:
    """PyTorch's loss of all logits at once, in float64."""
    logits = hidden.double() @ weight.double().T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, label_smoothing=smoothing)


def problem(dtype: torch.dtype, device: str, tokens: int = 37, width: int = 16, vocab_size: int = 101) -> tuple:
    """Hidden states, weights and targets, a quarter of which do not count."""
    hidden = torch.randn(2, tokens, width, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(vocab_size, width, dtype=dtype, device=device, requires_grad=True)
    targets = torch.randint(0, vocab_size, (2, tokens), device=device)
    return hidden, weight, targets.masked_fill(torch.rand(2, tokens, device=device) < 0.25, IGNORED)


def distance(a: Tensor, b: Tensor) -> float:
    """The norm of the difference as a share of b's."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_the_plain_loss_whatever_the_chunk(smoothing, cap, dtype, device):
    torch.manual_seed(0)
    hidden, weight, targets = problem(dtype, device)
    expected = plain(hidden, weight, targets, smoothing=smoothing, cap=cap)
    gradients = torch.autograd.grad(3 * expected, (hidden, weight))
    for chunk in (1, 7, 37, 1000, None):
        loss = chunked_cross_entropy(hidden, weight, targets, label_smoothing=smoothing, softcap=cap, chunk=chunk)
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        assert loss.item() == pytest.approx(expected.item(), rel=ROUNDING[dtype])
        for ours, theirs in zip(torch.autograd.grad(3 * loss, (hidden, weight)), gradients, strict=True):
            assert ours.dtype == dtype
            assert distance(ours, theirs) <= ROUNDING[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_a_wide_vocabulary_of_an_odd_size(device):
    torch.manual_seed(0)
    hidden, weight, targets = problem(torch.float32, device, tokens=9, vocab_size=50_257)
    expected = plain(hidden, weight, targets, smoothing=0.0, cap=None)
    loss = chunked_cross_entropy(hidden, weight, targets, chunk=5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert distance(ours, theirs) <= (2e-3 if device == "cuda" else 1e-5)  # TF32 may be allowed there


def test_autocast_leaves_float64_alone_and_shapes_have_no_autocast():
    hidden, weight, targets = problem(torch.float64, "cpu")
    expected = chunked_cross_entropy(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chunked_cross_entropy(hidden, weight, targets), expected)
    assert chunked_cross_entropy(*(x.to("meta") for x in (hidden, weight, targets))).shape == ()


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_takes_the_products_in_its_type_and_keeps_the_weights_gradient_wide(device):
    torch.manual_seed(0)
    hidden, weight, targets = problem(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, targets, chunk=8)
    halves = hidden.detach().bfloat16(), weight.detach().bfloat16()
    assert loss.item() == pytest.approx(chunked_cross_entropy(*halves, targets, chunk=8).item(), rel=1e-6)
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    assert d_hidden.dtype == d_weight.dtype == torch.float32
    expected = torch.autograd.grad(plain(hidden, weight, targets, smoothing=0.0, cap=None), (hidden, weight))
    assert max(distance(d_hidden, expected[0]), distance(d_weight, expected[1])) <= 1.2e-2


@pytest.mark.parametrize("device", DEVICES)
def test_targets_that_do_not_count_have_no_gradient(device):
    torch.manual_seed(0)
    hidden, weight, targets = problem(torch.float32, device)
    d_hidden = torch.autograd.grad(chunked_cross_entropy(hidden, weight, targets, chunk=5), hidden)[0]
    assert d_hidden[targets == IGNORED].abs().max() == 0 < d_hidden[targets != IGNORED].abs().sum(-1).min()
    nothing = chunked_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED))
    assert nothing.isnan()
    assert torch.autograd.grad(nothing, hidden)[0].abs().max() == 0


def test_without_gradients_none_is_made():
    hidden, weight, targets = problem(torch.float32, "cpu")
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(plain(hidden, weight, targets, smoothing=0.0, cap=None).item(), rel=1e-6)


def test_it_is_an_operator_that_torch_can_look_through():
    hidden, weight, targets = problem(torch.float32, "cpu")
    operator = cross_entropy.chunked_cross_entropy_op
    torch.library.opcheck(operator, (hidden.flatten(0, 1), weight, targets.flatten(), IGNORED, 0.1, 0.0, 8, True))
    still = hidden.detach().flatten(0, 1), weight.detach(), targets.flatten()
    torch.library.opcheck(operator, (*still, IGNORED, 0.0, 4.0, 8, False))


def test_a_second_derivative_is_refused():
    hidden, weight, targets = problem(torch.float64, "cpu")
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(chunked_cross_entropy(hidden, weight, targets), hidden, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(2, 5, dtype=torch.int64)}, "targets \\(...\\), got"),
        ({"targets": torch.zeros(2, 37)}, "int64, got torch.float32"),
        ({"weight": torch.zeros(9, 8)}, r"got \(2, 37, 16\), \(9, 8\)"),
        ({"weight": torch.zeros(9, 16, dtype=torch.float64)}, "hidden is torch.float32, weight is torch.float64"),
        ({"label_smoothing": 1.5}, "label_smoothing must be in"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"chunk": 0}, "at least 1 token"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    hidden, weight, targets = problem(torch.float32, "cpu")
    given = {"hidden": hidden, "weight": weight, "targets": targets, **change}
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(**given)


# --- in training


def decoder(**changes) -> Decoder:
    torch.manual_seed(0)
    return Decoder(training.llama_like(vocab_size=48, max_length=16, width=16, layers=2, heads=2, **changes)).double()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False, "logit_softcap": 2.0}, {"experts": ExpertsConfig(count=4, balance_weight=0.1)}],
    ids=["tied", "own matrix and cap", "experts"],
)
def test_a_model_learns_the_same(changes, compiled):
    inputs, targets = torch.randint(0, 48, (2, 4, 12), generator=torch.Generator().manual_seed(1))
    targets[:, 3:5] = IGNORED
    losses = {}
    for chunked in (False, True):
        model = decoder(**changes)
        loss_of = partial(training.training_loss, chunked=chunked)
        loss_of = torch.compile(loss_of, backend="aot_eager") if compiled and chunked else loss_of
        loss = training.accumulate_gradient(partial(loss_of, model), inputs, targets, 2)
        losses[chunked] = loss, {name: p.grad for name, p in model.named_parameters()}
    assert losses[True][0].item() == pytest.approx(losses[False][0].item(), rel=1e-13)
    for name, gradient in losses[False][1].items():
        assert (losses[True][1][name] - gradient).abs().max() <= 1e-12, name


def test_an_evaluation_reads_the_same():
    model, (inputs, targets) = decoder(), torch.randint(0, 48, (2, 5, 12))
    expected = training.evaluate(model, inputs, targets)
    assert training.evaluate(model, inputs, targets, batch=2, chunked=True) == pytest.approx(expected, rel=1e-13)


def test_large_logits_are_taken_in_chunks_and_small_ones_are_not(tmp_path):
    from tformer_lib.training.loss import is_chunked

    assert is_chunked(None, 32_768, 50_304)
    assert not is_chunked(None, 1024, 1024)
    assert is_chunked(True, 1, 2)
    assert not is_chunked(False, 32_768, 50_304)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("late", [60.0, 300.0, -1e9])
def test_logits_of_a_row_may_lie_far_apart(device, late):
    """The last of 5,000 logits is far above, or below, all that a kernel sees first."""
    hidden = torch.ones(3, 1, device=device, requires_grad=True)
    weight = torch.randn(5000, 1, device=device)
    weight[-1] = late
    weight.requires_grad_()
    targets = torch.tensor([0, 4999, 7], device=device)
    loss = chunked_cross_entropy(hidden, weight, targets)
    expected = plain(hidden, weight, targets, smoothing=0.0, cap=None)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * abs(late))


def test_a_run_may_ask_for_it(tmp_path):
    from tformer_lib import tokens
    from tformer_lib.tokens import CorpusConfig

    (tmp_path / "text.txt").write_text("The cat sat on the mat, and the rat sat on the cat. " * 40)
    tokens.prepare(CorpusConfig(corpus=str(tmp_path / "text.txt"), out=tmp_path / "data", tokenizer="characters"))
    values = {"steps": 4, "batch": 4, "context": 16, "eval_interval": 2, "sample_tokens": 0, "device": "cpu"}
    model, losses = training.llama_like(width=16, layers=1, heads=2), []
    for chunked in (False, True, None):
        out = tmp_path / f"run-{chunked}"
        config = training.TrainingConfig(
            model=model, data=str(tmp_path / "data"), out=str(out), chunked_loss=chunked, **values
        )
        run = Run(config)
        assert run.chunked == bool(chunked)
        run.train(quiet=True)
        losses.append([line["val_loss"] for line in run.history if "val_loss" in line])
    assert losses[0] == losses[2]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def most_allocated(step, path) -> int:
    """Bytes that the host's memory held at most during a step, over what it held before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    profile.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda e: e["ts"])
    held = most = 0
    for event in events:
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def test_the_memory_of_all_logits_is_never_taken(tmp_path):
    tokens, width, vocab_size = 512, 16, 4096
    hidden, weight, targets = problem(torch.float32, "cpu", tokens // 2, width, vocab_size)
    all_logits = 4 * tokens * vocab_size  # 8 MB
    whole = lambda: F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten()).backward()  # noqa: E731
    chunked = lambda: chunked_cross_entropy(hidden, weight, targets, chunk=32).backward()  # noqa: E731
    assert most_allocated(whole, tmp_path / "whole.json") >= 2 * all_logits
    assert most_allocated(chunked, tmp_path / "chunked.json") <= all_logits / 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_memory_of_all_logits_is_never_taken_on_a_gpu():
    tokens, width, vocab_size = 4096, 64, 50_304
    hidden, weight, targets = problem(torch.bfloat16, "cuda", tokens // 2, width, vocab_size)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    chunked_cross_entropy(hidden, weight, targets, chunk=256).backward()
    assert torch.cuda.max_memory_allocated() - before <= 2 * tokens * vocab_size / 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_on_a_gpu_are_taken_by_the_kernel():
    assert cross_entropy_triton.can_run(torch.zeros(2, 3, device="cuda", dtype=torch.bfloat16))
    assert not cross_entropy_triton.can_run(torch.zeros(2, 3, device="cuda", dtype=torch.float64))


def test_rows_on_a_cpu_are_not():
    assert not cross_entropy_triton.can_run(torch.zeros(2, 3))
