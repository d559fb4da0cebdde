"""A feed-forward layer with GELU inside its products: what the plain layer gives, forward and backward."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from tformer_lib import training
from tformer_lib.training.run import choose_forms
from tformer_lib.transformer import Decoder, cublas_lt
from tformer_lib.transformer.blocks import FeedForward
from tformer_lib.transformer.gelu_feed_forward import gelu_feed_forward

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
GPT2 = {"norm": "layernorm", "feed_forward": "gelu_tanh", "positions": "learned", "bias": False}
SMALL = replace(training.llama_like(vocab_size=48, max_length=64, width=32, layers=2, heads=4), **GPT2)


def plain(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.gelu(x @ up.T, approximate="tanh") @ down.T


def error(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference as a share of theirs."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.float64, 1e-13), (torch.float32, 2e-5), (torch.bfloat16, 8e-3), (torch.float16, 1.5e-3)],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(64, 32, 128, 32), (1, 8, 8, 16), (300, 96, 40, 24), (5, 7, 9, 3)], ids=str)
def test_it_is_the_plain_layer(device, dtype, most, sizes):
    torch.manual_seed(0)
    tokens, width, inner, out = sizes
    shapes, scales = ((tokens, width), (inner, width), (out, inner)), (1, 2 * width**-0.5, inner**-0.5)
    operands = [
        (s * torch.randn(n, device=device)).to(dtype).requires_grad_() for n, s in zip(shapes, scales, strict=True)
    ]
    exact = [x.detach().double().requires_grad_() for x in operands]
    above = torch.randn(tokens, out, device=device).to(dtype)
    ours, theirs = gelu_feed_forward(*operands), plain(*exact)
    assert ours.dtype == dtype
    assert error(ours, theirs) <= most
    gradients = torch.autograd.grad(ours, operands, above)
    for got, wanted in zip(gradients, torch.autograd.grad(theirs, exact, above.double()), strict=True):
        assert got.dtype == dtype
        assert error(got, wanted) <= 1.5 * most


@pytest.mark.parametrize("device", DEVICES)
def test_gelu_far_from_zero_is_itself_or_nothing(device):
    x = torch.tensor([[-1e4], [-30.0], [0.0], [30.0], [1e4]], device=device).repeat(1, 8).to(torch.bfloat16)
    eye = torch.eye(8, device=device, dtype=torch.bfloat16)
    x.requires_grad_()
    out = gelu_feed_forward(x, eye, eye)
    assert torch.equal(out, x.detach().clamp(min=0))
    (slope,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(slope[:, 0], torch.tensor([0, 0, 0.5, 1, 1], device=device, dtype=torch.bfloat16))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    sizes = ((6, 16), (24, 16), (8, 24))
    operands = [torch.randn(size, device=device, requires_grad=True) for size in sizes]
    torch.library.opcheck(torch.ops.tformer_lab.gelu_feed_forward, operands)


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_is_the_same_with_it(device):
    torch.manual_seed(0)
    model = Decoder(SMALL).to(device)
    windows = torch.randint(0, 48, (2, 15), device=device)
    found = {}
    for fused in (False, True):
        choose_forms(model, training.preset("quick", model=SMALL, fused_gelu=fused))
        loss = training.next_token_loss(model, windows[:, :-1], windows[:, 1:])
        with torch.autocast(device, torch.bfloat16):
            narrow = training.next_token_loss(model, windows[:, :-1], windows[:, 1:])
        gradients = [torch.autograd.grad(x, list(model.parameters())) for x in (loss, narrow)]
        found[fused] = loss, narrow, *gradients
    (loss, narrow, exact, rough), (plain_loss, plain_narrow, plain_exact, plain_rough) = found[True], found[False]
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(narrow, plain_narrow, rtol=1e-2, atol=1e-2)
    for a, b, c, d in zip(exact, plain_exact, rough, plain_rough, strict=True):
        assert c.dtype == torch.float32
        assert error(a, b) <= 1e-4
        assert error(c, b) <= 1.5 * error(d, b) + 1e-3


@pytest.mark.parametrize(
    ("changes", "fused"),
    [({}, True), ({"bias": True}, False), ({"feed_forward": "gelu"}, False), ({"feed_forward": "geglu"}, False)],
)
def test_it_serves_gpt2s_layer_and_no_other(changes, fused):
    layer = FeedForward(replace(SMALL, **changes))
    assert layer.can_fuse_gelu() == fused
    x = torch.randn(3, 32)
    expected = layer(x)
    layer.fused_gelu = True
    torch.testing.assert_close(layer(x), expected)


def test_a_hook_is_called():
    layer, seen = FeedForward(SMALL), []
    layer.fused_gelu = True
    layer.up.register_forward_hook(lambda *_: seen.append(1))
    layer(torch.randn(3, 32))
    assert seen == [1]


def test_it_compiles_to_one_graph():
    torch._dynamo.reset()
    model = Decoder(SMALL)
    choose_forms(model, training.preset("quick", model=SMALL, fused_gelu=True))
    counter = CompileCounter()
    tokens = torch.randint(0, 48, (1, 9))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))
    assert counter.frame_count == 1


def test_what_does_not_fit_is_refused():
    x, up, down = torch.randn(3, 8), torch.randn(16, 8), torch.randn(8, 16)
    with pytest.raises(ValueError, match="expected"):
        gelu_feed_forward(x, up, down.T.contiguous())
    with pytest.raises(ValueError, match="one dtype"):
        torch.ops.tformer_lab.gelu_feed_forward(x, up.double(), down)


# --- cuBLASLt itself


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("a_by_columns", [False, True])
@pytest.mark.parametrize("b_by_columns", [False, True])
def test_products_of_both_orders(a_by_columns, b_by_columns):
    torch.manual_seed(0)
    draw = lambda m, n, turned: (  # noqa: E731
        torch.randn(n, m, device="cuda").bfloat16().t() if turned else torch.randn(m, n, device="cuda").bfloat16()
    )
    a, b = draw(72, 40, a_by_columns), draw(40, 48, b_by_columns)
    before = torch.empty(72, 48, device="cuda", dtype=torch.bfloat16)
    out = cublas_lt.matmul(a, b, before, cublas_lt.GELU_AND_INPUT)
    exact = a.double() @ b.double()
    assert error(before, exact) <= 4e-3
    assert error(out, F.gelu(exact, approximate="tanh")) <= 4e-3
    where = before.double().requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(where, approximate="tanh").sum(), where)
    assert error(cublas_lt.matmul(a, b, before, cublas_lt.GELU_GRADIENT), exact * slope) <= 4e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_products_are_cublaslts_on_a_gpu(monkeypatch):
    calls, real = [], cublas_lt.matmul
    monkeypatch.setattr(cublas_lt, "matmul", lambda *given: calls.append(given[-1]) or real(*given))
    operands = [torch.randn(s, device="cuda", requires_grad=True) for s in ((16, 32), (64, 32), (32, 64))]
    with torch.autocast("cuda", torch.bfloat16):
        out = gelu_feed_forward(*operands)
    assert calls == [cublas_lt.GELU_AND_INPUT]
    out.sum().backward()
    assert calls == [cublas_lt.GELU_AND_INPUT, cublas_lt.GELU_GRADIENT]
    assert all(x.grad.dtype == torch.float32 for x in operands)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_fastest_algorithm_is_taken_and_every_candidate_is_right():
    torch.manual_seed(0)
    a, b = (torch.randn(s, device="cuda").bfloat16() for s in ((264, 136), (136, 520)))
    before = torch.empty(264, 520, device="cuda", dtype=torch.bfloat16)
    exact = a.double() @ b.double()
    cublas_lt.matmul(a, b, before, cublas_lt.GELU_AND_INPUT)
    shapes = cublas_lt.as_columns(a), cublas_lt.as_columns(b)
    plan = cublas_lt.plan(a.device.index, a.dtype, *shapes, cublas_lt.GELU_AND_INPUT, cublas_lt.ALIGNMENT)
    assert plan.best in plan.candidates
    chosen = plan.best
    for candidate in plan.candidates:
        plan.best = candidate
        out = cublas_lt.matmul(a, b, before.zero_(), cublas_lt.GELU_AND_INPUT)
        assert error(out, F.gelu(exact, approximate="tanh")) <= 4e-3
        assert error(before, exact) <= 4e-3
    plan.best = chosen


def test_autocast_leaves_float64_alone_and_shapes_have_no_autocast():
    x, up, down = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 8), (12, 8), (8, 12)))
    expected = gelu_feed_forward(x, up, down)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gelu_feed_forward(x, up, down), expected)
    assert gelu_feed_forward(*(part.to("meta") for part in (x, up, down))).shape == expected.shape
