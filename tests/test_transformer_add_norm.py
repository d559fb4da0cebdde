"""A residual sum and the norm after it as one operator: what the two steps give, forward and backward."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from tformer_lib import tokens, training
from tformer_lib.tokens import CorpusConfig
from tformer_lib.transformer import Decoder
from tformer_lib.transformer.add_norm import add_norm, can_fuse

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NORMS = {
    "layer norm": lambda width, **kind: nn.LayerNorm(width, bias=False, **kind),
    "RMS norm": lambda width, **kind: nn.RMSNorm(width, eps=1e-6, **kind),
}
SMALL = training.llama_like(vocab_size=48, max_length=64, width=32, layers=3, heads=4)


def apart(x: Tensor, branch: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The two steps."""
    total = x + branch
    return total, norm(total)


def error(ours, theirs) -> float:
    """The norm of the difference as a share of theirs."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", [(2, 7, 48), (1, 1), (3, 700), (5, 1, 768), (2049, 96)], ids=str)
@pytest.mark.parametrize(
    ("dtypes", "most"),
    [
        ((torch.float64, torch.float64), 1e-13),
        ((torch.float32, torch.float32), 2e-6),
        ((torch.float32, torch.bfloat16), 2e-6),
        ((torch.bfloat16, torch.bfloat16), 8e-3),
    ],
    ids=["float64", "float32", "a branch of bfloat16", "bfloat16"],
)
def test_sum_and_norm_are_those_of_two_steps(device, kind, shape, dtypes, most):
    torch.manual_seed(0)
    x = (3 * torch.randn(shape, dtype=dtypes[0], device=device) + 1).requires_grad_()
    branch = torch.randn(shape, dtype=dtypes[1], device=device, requires_grad=True)
    norm = NORMS[kind](shape[-1], dtype=torch.promote_types(dtypes[0], torch.float32), device=device)
    nn.init.normal_(norm.weight)
    above = [torch.randn(shape, dtype=dtypes[0], device=device) for _ in range(2)]
    leaves = (x, branch, norm.weight)
    ours = add_norm(x, branch, norm)
    gradients = torch.autograd.grad(ours, leaves, above)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_norm = NORMS[kind](shape[-1], dtype=torch.float64, device=device)
    exact_norm.weight = nn.Parameter(exact[2].detach())
    theirs = apart(exact[0], exact[1], exact_norm)
    expected = torch.autograd.grad(theirs, (exact[0], exact[1], exact_norm.weight), [a.double() for a in above])
    for got, wanted in zip((*ours, *gradients), (*theirs, *expected), strict=True):
        if shape[-1] > 1 or kind != "layer norm":  # a row of one number is its own mean: 0 / 0
            rounding = most if got.dtype == dtypes[0] or got.dtype == torch.float32 else 4e-3
            assert error(got, wanted) <= rounding
        assert got.isfinite().all()
    assert [g.dtype for g in gradients] == [x.dtype, branch.dtype, norm.weight.dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("centred", [True, False])
def test_opcheck(device, centred):
    x = torch.randn(2, 5, 24, device=device, requires_grad=True)
    branch, weight = (torch.randn(shape, device=device, requires_grad=True) for shape in ((2, 5, 24), (24,)))
    torch.library.opcheck(torch.ops.tformer_lab.add_norm, (x, branch, weight, 1e-5, centred, torch.float32))
    strided = torch.randn(5, 2, 24, device=device).transpose(0, 1)
    ours = torch.ops.tformer_lab.add_norm(strided, branch, weight, 1e-5, centred, torch.float32)
    same = torch.ops.tformer_lab.add_norm(strided.contiguous(), branch, weight, 1e-5, centred, torch.float32)
    for a, b in zip(ours, same, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="gains"):
        torch.ops.tformer_lab.add_norm(x, branch[:1], weight, 1e-5, centred, torch.float32)


def test_which_norms_it_takes():
    assert can_fuse(nn.LayerNorm(8, bias=False))
    assert can_fuse(nn.RMSNorm(8))
    for norm in (nn.LayerNorm(8), nn.LayerNorm((2, 4), bias=False), nn.RMSNorm(8, elementwise_affine=False)):
        assert not can_fuse(norm)
    assert not can_fuse(nn.Identity())


MODELS = {
    "rope and RMS norm": {},
    "GPT-2": {"positions": "learned", "norm": "layernorm", "feed_forward": "gelu_tanh"},
    "windows": {"window": 5, "layer_types": ("window", "full", "window")},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_the_same_with_fused_norms(device, model):
    torch.manual_seed(0)
    dtype = torch.float64 if device == "cpu" else torch.float32
    model = Decoder(replace(SMALL, **MODELS[model])).to(device, dtype)
    windows = torch.randint(0, 48, (2, 14), device=device)
    calls = []

    def gradients(fused: bool) -> list[Tensor]:
        model.stack.fused_norms = fused
        hooks = [m.register_forward_hook(lambda *_: calls.append(1)) for m in (model.stack.final_norm,)]
        loss = training.next_token_loss(model, windows[:, :-1], windows[:, 1:])
        for hook in hooks:
            hook.remove()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-9 if device == "cpu" else 1e-3, atol=1e-9 if device == "cpu" else 1e-5
        )


def test_norms_are_fused_only_where_nothing_is_lost(monkeypatch):
    model = Decoder(replace(SMALL, dropout=0.1))
    stack = model.stack
    assert not stack.can_fuse_norms()
    assert model.eval().stack.can_fuse_norms()
    model = Decoder(SMALL)
    assert model.stack.can_fuse_norms()
    seen = []
    model.stack.blocks[1].attention_norm.register_forward_hook(lambda *_: seen.append(1))
    assert not model.stack.can_fuse_norms()
    model.stack.fused_norms = True
    model(torch.zeros(1, 4, dtype=torch.int64))
    assert seen == [1]
    assert not Decoder(replace(SMALL, branch_norm="both")).stack.can_fuse_norms()
    assert not Decoder(replace(SMALL, norm="layernorm", bias=True)).stack.can_fuse_norms()


def test_fused_norms_compile_to_one_graph():
    torch._dynamo.reset()
    model = Decoder(SMALL)
    model.stack.fused_norms = True
    counter = CompileCounter()
    tokens = torch.randint(0, 48, (1, 9))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))
    assert counter.frame_count == 1


def test_a_run_may_ask_for_it(tmp_path):
    (tmp_path / "text.txt").write_text("The cat sat on the mat, and the rat sat on the cat. " * 40)
    tokens.prepare(CorpusConfig(corpus=str(tmp_path / "text.txt"), out=tmp_path / "data", tokenizer="characters"))
    values = {"steps": 4, "batch": 4, "context": 16, "eval_interval": 2, "sample_tokens": 2, "device": "cpu"}
    model, losses = training.llama_like(width=16, layers=2, heads=2), []
    for fused in (False, True):
        out = str(tmp_path / f"run-{fused}")
        config = training.TrainingConfig(model=model, data=str(tmp_path / "data"), out=out, fused_norms=fused, **values)
        run = training.train(config, quiet=True)
        assert run.model.stack.fused_norms == fused
        losses.append([line["val_loss"] for line in run.history if "val_loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("kind", NORMS)
def test_autocast_leaves_float64_alone_and_shapes_have_no_autocast(kind):
    x, branch = torch.randn(2, 3, 8, dtype=torch.float64)
    norm = NORMS[kind](8, dtype=torch.float64)
    expected = add_norm(x, branch, norm)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(add_norm(x, branch, norm), expected, rtol=0, atol=0)
    assert add_norm(x.to("meta"), branch.to("meta"), norm.to("meta"))[1].shape == x.shape
