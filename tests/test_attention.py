"""The reference attention against loops and PyTorch, and the multi-head layer against torch.nn.MultiheadAttention."""

import math
from functools import partial

import pytest
import torch
from draws import draws
from functorch.compile import make_boxed_func
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from tformer_lib import attention, masks
from tformer_lib.attention import (
    MANY_TOKENS,
    AttentionVariant,
    MultiHeadAttention,
    aligned,
    attend,
    attend_scores,
    attend_sdpa,
    masked_softmax,
    scaled_scores,
    side_by_side,
)
from tformer_lib.flash_attention import flash_attention
from tformer_lib.positional_encoding import alibi_slopes

FORMS = pytest.mark.parametrize("form", [attend, attend_sdpa])


def attention_by_loops(q, k, v, mask, scale, bias):
    """The formula for one query after another, in Python numbers; mask and bias are (batch, heads, T, S)."""
    batch, heads, T, _ = q.shape
    out = torch.zeros(batch, heads, T, v.shape[3], dtype=torch.float64)
    group = heads // k.shape[1]
    for b, h, t in torch.cartesian_prod(*map(torch.arange, (batch, heads, T))).tolist():
        seen = [s for s in range(k.shape[2]) if mask[b, h, t, s]]
        scores = [scale * sum(q[b, h, t] * k[b, h // group, s]) + bias[b, h, t, s] for s in seen]
        total = sum(math.exp(score) for score in scores)
        for s, score in zip(seen, scores, strict=True):
            out[b, h, t] += math.exp(score) / total * v[b, h // group, s]
    return out


@FORMS
@draws(25)
@given(data=st.data())
def test_equals_loops_over_every_pair(form, data):
    T, S, group, kv_heads = (data.draw(st.integers(low, 4)) for low in (0, 0, 1, 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    q, k, v = random(2, group * kv_heads, T, 3), random(2, kv_heads, S, 3), random(2, kv_heads, S, 2)
    mask, bias = random(2, group * kv_heads, T, S) < 0.5, random(2, group * kv_heads, T, S)
    found = form(q, k, v, mask=mask, scale=0.7, bias=bias)
    torch.testing.assert_close(found, attention_by_loops(q, k, v, mask, 0.7, bias))


@FORMS
def test_keys_and_values_are_a_set(form):
    """Attention without positions does not know the order of its keys."""
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    order = torch.randperm(9)
    torch.testing.assert_close(form(q, k, v), form(q, k[:, :, order], v[:, :, order]))


@FORMS
def test_a_constant_bias_changes_nothing_and_one_of_its_heads_is_its_own(form):
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    torch.testing.assert_close(form(q, k, v, bias=torch.tensor(3.0)), form(q, k, v))
    bias = torch.zeros(4, 1, 9)
    bias[1, :, 0] = 100.0
    out = form(q, k, v, bias=bias)
    torch.testing.assert_close(out[:, 1], v[:, 0, :1].expand(-1, 5, -1))  # head 1 looks at key 0 alone
    torch.testing.assert_close(out[:, [0, 2, 3]], form(q, k, v)[:, [0, 2, 3]])


@FORMS
@pytest.mark.parametrize("causal", [True, False])
def test_a_bias_has_a_gradient(form, causal):
    q, k, v = (torch.randn(1, 2, 4, 8, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: form(q, k, v, bias=b, causal=causal), bias)


@FORMS
@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.ones(4, 5, dtype=torch.bool), "floating-point tensor that is added to the scores, got torch.bool"),
        (1.0, "got float"),
        (torch.zeros(5, 4), r"broadcast to .* = \(1, 2, 4, 5\), got \(5, 4\)"),
        (torch.zeros(4, 5, device="meta"), "on the device of q, cpu, got meta"),
    ],
)
def test_wrong_biases_are_refused_by_name(form, bias, message):
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=message):
        form(q, k, k, bias=bias)


def test_gradients_by_finite_differences():
    q, k, v = (torch.randn(1, h, n, 4, dtype=torch.float64, requires_grad=True) for h, n in ((2, 5), (1, 3), (1, 3)))
    assert torch.autograd.gradcheck(partial(attend, causal=True), (q, k, v))  # two blind queries among them


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_no_nan_is_made_on_the_way():
    """Anomaly detection looks at every step of the backward pass, where a NaN could hide behind a mask."""
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (5, 3, 3))
    with torch.autograd.detect_anomaly(check_nan=True):
        attend(q, k, v, causal=True).sum().backward()


def test_the_softmax_of_low_precision_is_taken_in_float32():
    q, k = torch.randn(1, 1, 4, 16).bfloat16(), torch.randn(1, 1, 600, 16).bfloat16()
    assert scaled_scores(q, k).dtype == torch.float32
    weights = masked_softmax(scaled_scores(q, k))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_as_exact_as_the_dtype_that_they_name(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 4, 33, 64, generator=generator).to(dtype) for _ in range(2))
    found, truth = scaled_scores(q, k), scaled_scores(q.double(), k.double())
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found - truth).abs().max() < 64 * torch.finfo(found.dtype).eps


@FORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_bias_that_the_dtype_cannot_hold_is_still_a_bias(form, dtype):
    q, v = torch.zeros(1, 1, 3, 8, dtype=dtype), torch.eye(3, 8, dtype=dtype)[None, None]
    inf = torch.inf
    bias = torch.tensor([[1e5, 0.0, -inf], [-1e5, -1e5, -inf], [-inf, -inf, -inf]])
    wanted = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(form(q, q, v, bias=bias)[0, 0, :, :3].float(), wanted)


def test_scores_do_not_overflow_in_float16():
    q = torch.full((1, 1, 1, 64), 50.0).half()  # the plain product is 160,000, and float16 ends at 65,504
    assert scaled_scores(q, q).item() == 20_000


def test_a_row_of_minus_infinity_is_a_blind_row():
    scores = torch.tensor([[-torch.inf, -torch.inf], [0.0, -torch.inf]], requires_grad=True)
    weights = masked_softmax(scores)
    assert weights.tolist() == [[0.0, 0.0], [1.0, 0.0]]
    weights.square().sum().backward()
    assert (scores.grad == 0).all()


@pytest.mark.parametrize("T", [1, 6])
def test_sdpa_takes_the_fast_path_only_where_it_is_right(T, monkeypatch):
    """torch's is_causal is aligned to the top left: over 6 keys it would show one query the first key alone."""
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    spy = lambda *args, **options: calls.append(options) or fused(*args, **options)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q, k, v = torch.randn(1, 4, T, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    torch.testing.assert_close(attend_sdpa(q, k, v, causal=True), attend(q, k, v, causal=True))
    assert calls[0].get("attn_mask") is None
    assert calls[0]["is_causal"] == (T == 6)


@pytest.mark.parametrize("hides", ["nothing", "keys", "keys of a row", "all keys of a row", "keys of a head"])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_one_query_reads_the_keys_of_its_group_once(kv_heads, hides, monkeypatch):
    q, k, v = torch.randn(3, 6, 1, 8), torch.randn(3, kv_heads, 9, 8), torch.randn(3, kv_heads, 9, 4)
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    shape = {
        "keys": (9,),
        "keys of a row": (3, 1, 1, 9),
        "all keys of a row": (3, 1, 1, 1),
        "keys of a head": (6, 1, 9),
    }
    mask = None if hides == "nothing" else torch.arange(math.prod(shape[hides])).view(shape[hides]) % 3 != 1
    heads = []
    fused = torch.nn.functional.scaled_dot_product_attention
    spy = lambda *args, **options: heads.append(args[0].shape[1]) or fused(*args, **options)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    found, wanted = (form(q, k, v, mask=mask, causal=True, scale=0.3) for form in (attend_sdpa, attend))
    torch.testing.assert_close(found, wanted)
    for ours, reference in zip(
        *(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(ours, reference)
    assert heads == [6 if hides == "keys of a head" else kv_heads]


def copied_from(theirs, width, heads):
    """Our layer with the weights of a torch.nn.MultiheadAttention."""
    ours = MultiHeadAttention(width, heads, bias=theirs.in_proj_bias is not None)
    state = {"out_proj.weight": theirs.out_proj.weight}
    parts = dict(zip(("q_proj", "k_proj", "v_proj"), theirs.in_proj_weight.chunk(3), strict=True))
    state |= {f"{name}.weight": weight for name, weight in parts.items()}
    if theirs.in_proj_bias is not None:
        state["out_proj.bias"] = theirs.out_proj.bias
        state |= {f"{n}.bias": b for n, b in zip(parts, theirs.in_proj_bias.chunk(3), strict=True)}
    ours.load_state_dict(state)
    return ours


@pytest.mark.parametrize("bias", [True, False])
def test_parity_with_torch_multihead_attention(bias):
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(48, 6, bias=bias, batch_first=True)
    if bias:
        torch.nn.init.normal_(theirs.in_proj_bias)
        torch.nn.init.normal_(theirs.out_proj.bias)
    ours = copied_from(theirs, 48, 6)
    x, context = torch.randn(3, 7, 48), torch.randn(3, 9, 48)
    real = masks.padding(torch.tensor([9, 4, 1]), 9)  # (3, 1, 1, 9)
    pairs = [
        (ours(x), theirs(x, x, x)),
        (ours(x, causal=True), theirs(x, x, x, attn_mask=~masks.causal(7))),
        (ours(x, context), theirs(x, context, context)),
        (ours(x, context, mask=real), theirs(x, context, context, key_padding_mask=~real[:, 0, 0])),
    ]
    for found, (expected, _) in pairs:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_gradients_agree_with_torch_multihead_attention():
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(48, 6, batch_first=True)
    ours = copied_from(theirs, 48, 6)
    x = torch.randn(2, 7, 48)
    ours(x, causal=True).square().sum().backward()
    theirs(x, x, x, attn_mask=~masks.causal(7))[0].square().sum().backward()
    found = torch.cat([ours.q_proj.weight.grad, ours.k_proj.weight.grad, ours.v_proj.weight.grad])
    torch.testing.assert_close(found, theirs.in_proj_weight.grad, atol=1e-5, rtol=1e-5)


def test_shared_kv_heads_equal_repeated_ones():
    torch.manual_seed(0)
    grouped, full = MultiHeadAttention(32, 8, kv_heads=2), MultiHeadAttention(32, 8)
    state = grouped.state_dict()
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        per_head = state[name].unflatten(0, (2, 4))  # (kv_heads, head_dim, ...)
        state[name] = per_head.repeat_interleave(4, 0).flatten(0, 1)
    full.load_state_dict(state)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(grouped(x, causal=True), full(x, causal=True))
    assert grouped.k_proj.weight.numel() * 4 == full.k_proj.weight.numel()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_any_form_can_be_given_to_the_layer(kv_heads):
    torch.manual_seed(0)
    ours = MultiHeadAttention(32, 4, kv_heads=kv_heads, head_dim=16)
    fast = MultiHeadAttention(32, 4, kv_heads=kv_heads, head_dim=16, attend=attend_sdpa)
    fast.load_state_dict(ours.state_dict())
    x, mask, bias = torch.randn(2, 5, 32), masks.padding(torch.tensor([5, 2]), 5), torch.randn(4, 5, 5)
    expected = ours(x, mask=mask, causal=True, bias=bias)
    torch.testing.assert_close(fast(x, mask=mask, causal=True, bias=bias), expected)
    assert expected.shape == x.shape


def test_rotate_turns_queries_and_keys_and_leaves_values():
    layer = MultiHeadAttention(32, 4)
    x = torch.randn(2, 5, 32)
    seen = []
    expected = layer(x)
    turned = layer(x, rotate=lambda heads: seen.append(heads.shape) or -heads)
    assert seen == [(2, 4, 5, 8), (2, 4, 5, 8)]
    torch.testing.assert_close(turned, expected)  # both signs change, so their product does not


def test_a_cache_is_asked_in_place_of_the_form():
    class Cache:
        def attend(self, q, k, v, *, attend, mask=None):
            assert q.shape == (2, 4, 5, 8)
            assert k.shape == v.shape == (2, 2, 5, 8)
            return attend(q, k, v, mask=mask, causal=True)

    layer = MultiHeadAttention(32, 4, kv_heads=2)
    x, bias = torch.randn(2, 5, 32), torch.randn(4, 5, 5)
    assert torch.equal(layer(x, cache=Cache()), layer(x, causal=True))
    assert torch.equal(layer(x, cache=Cache(), bias=bias), layer(x, causal=True, bias=bias))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((30, 4), {}, "width 30 is not divisible by 4 heads"),
        ((32, 0), {}, "heads must be at least 1, got 0"),
        ((0, 4), {}, "width must be at least 1, got 0"),
        ((32, 4), {"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ((32, 4), {"kv_heads": 3}, "q has 4 heads, which 3 kv heads do not divide"),
        ((32, 4), {"kv_heads": 0}, "which 0 kv heads do not divide"),
    ],
)
def test_wrong_layers_are_refused_by_name(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(*arguments, **options)


@FORMS
def test_one_compiled_function_serves_any_heads_and_lengths(form):
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: form(q, k, v, causal=True), fullgraph=True, backend="eager")
    for heads, kv_heads, T, S in ((2, 2, 5, 5), (4, 2, 6, 6), (6, 3, 7, 9), (8, 8, 3, 3)):
        q, (k, v) = torch.randn(1, heads, T, 8), torch.randn(2, 1, kv_heads, S, 8)
        torch.testing.assert_close(compiled(q, k, v), form(q, k, v, causal=True))


@pytest.mark.parametrize("bias", [False, True])
def test_one_matmul_for_three_maps_gives_what_three_give(bias):
    parts = [nn.Linear(24, width, bias=bias, dtype=torch.float64) for width in (32, 8, 8)]
    x = torch.randn(3, 5, 24, dtype=torch.float64, requires_grad=True)
    together, apart = side_by_side(parts, x), [part(x) for part in parts]
    parameters = [x, *(p for part in parts for p in part.parameters())]
    gradients = [torch.autograd.grad(sum(o.square().sum() for o in out), parameters) for out in (together, apart)]
    for ours, theirs in zip((*together, *gradients[0]), (*apart, *gradients[1]), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_layer_hands_one_tensor_to_a_form_that_takes_it(monkeypatch, kv_heads):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = MultiHeadAttention(32, 4, kv_heads=kv_heads, attend=flash_attention)
    x = torch.randn(2, 9, 32, requires_grad=True)
    leaves = [x, *layer.parameters()]
    out = layer(x, causal=True)
    expected = [out, *torch.autograd.grad(out.square().sum(), leaves)]
    monkeypatch.setattr(attention, "is_worth_joining", lambda x: True)
    names = []

    def compiler(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    for call in (layer, compiled):
        out = call(x, causal=True)
        got = [out, *torch.autograd.grad(out.square().sum(), leaves)]
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert sum("qkvpacked" in name for name in names) == 2  # forward and backward
    assert sum("cat" in name for name in names) == 2  # the weights' and biases', and no gradient's
    for options in ({"mask": torch.ones(9, 9, dtype=torch.bool)}, {"rotate": lambda y: y}, {"context": x + 1}):
        layer(x, **options)  # none of which the form takes
    layer.q_proj.register_forward_hook(lambda module, args, out: 2 * out)  # a map that does more than its weight says
    doubled = layer(x, causal=True)
    monkeypatch.setattr(attention, "is_worth_joining", lambda x: False)
    torch.testing.assert_close(doubled, layer(x, causal=True))
    assert not torch.allclose(doubled, expected[0])


def test_the_check_of_places_leaves_one_graph_and_copies_only_what_lies_wrong():
    """What a GPU's SDPA goes through: a graph that breaks there copies q, k and v of every layer."""
    copies = []

    def compiler(graph, inputs):
        copies.append(sum(node.target is torch.ops.aten.clone.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    def parts(x):
        return [aligned(y.unflatten(-1, (2, 4)).transpose(1, 2)) for y in x.split(8, -1)]

    backend = aot_autograd(fw_compiler=compiler)
    x = torch.randn(2, 3, 24)
    for ours, theirs in zip(torch.compile(parts, backend=backend, fullgraph=True)(x), parts(x), strict=True):
        assert torch.equal(ours, theirs)
    wrong = torch.compile(lambda x: aligned(x[..., 1:9]), backend=backend, fullgraph=True)(x)
    assert torch.equal(wrong, x[..., 1:9])
    assert copies == [0, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="one matmul for q, k and v is for a GPU")
@pytest.mark.parametrize("tokens", [MANY_TOKENS - 1, MANY_TOKENS])
def test_a_layer_on_a_gpu_gives_the_same_below_and_above_many_tokens(tokens):
    layer = MultiHeadAttention(64, 4, kv_heads=2, attend=attend_sdpa)
    x = torch.randn(1, tokens, 64)
    torch.testing.assert_close(
        layer.cuda()(x.cuda(), causal=True).cpu(), layer.cpu()(x, causal=True), atol=2e-5, rtol=0
    )


@FORMS
def test_one_compiled_function_serves_any_scale(form):
    """A number that changes becomes a symbol, which a check must not ask more than a comparison."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, scale: form(q, q, q, scale=scale), fullgraph=True, backend="eager")
    q = torch.randn(1, 2, 5, 8)
    for scale in (0.5, 0.25, 0.1, 2, -0.5, 0.0):
        torch.testing.assert_close(compiled(q, scale), form(q, q, q, scale=scale))


# --- what models add -------------------------------------------------------------------------------------------------


def variant_by_formula(q, k, v, *, allowed, scale, softcap, sinks, slopes):
    """Softmax attention as the formulas stand: the sink is one more key, whose value is zero."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    T, S = scores.shape[2:]
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)
    scores = scores - slopes[:, None, None] * distance.abs()
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(q.shape[0], -1, T, 1)], -1)
        v = torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
    return torch.einsum("bhts,bhsd->bhtd", scores.softmax(-1), v)


@pytest.mark.parametrize("form", [attend, attend_sdpa, partial(flash_attention, step=0)])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("added", ["", "softcap", "sinks", "alibi", "softcap sinks alibi"])
def test_variants_are_their_formulas_over_every_form(form, window, added):
    generator = torch.Generator().manual_seed(1)
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    q, k, v, sinks = random(2, 4, 6, 8), random(2, 2, 9, 8), random(2, 2, 9, 8), random(4)
    softcap = 1.5 if "softcap" in added else None
    options = {"scale": 0.6, "softcap": softcap, "sinks": sinks if "sinks" in added else None}
    variant = AttentionVariant(form, window=window, alibi="alibi" in added, **options)
    allowed = masks.causal(6, 9) if window is None else masks.sliding_window(6, 9, window=window)
    slopes = alibi_slopes(4).double() if variant.alibi else torch.zeros(4, dtype=torch.float64)
    q.requires_grad_()
    found = variant(q, k, v, causal=True)
    expected = variant_by_formula(q, k, v, allowed=allowed, slopes=slopes, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = random(found.shape)
    gradients = [torch.autograd.grad((x * weights).sum(), q)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", [attend, attend_sdpa, flash_attention])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0}, {"sinks": torch.ones(2)}], ids=str)
def test_a_variant_with_alibi_compiles_to_one_graph(form, options):
    torch._dynamo.reset()
    variant = AttentionVariant(form, alibi=True, **options)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 7, 8))
    found = torch.compile(lambda *x: variant(*x, causal=True), fullgraph=True, backend="aot_eager")(q, k, v)
    expected = variant(q, k, v, causal=True)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_variant_looks_by_the_places_that_it_is_told():
    """Keys in any order, with their places beside them, are keys in order."""
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (3, 7, 7))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    variant = AttentionVariant(window=4, alibi=True)
    expected = variant(q, k, v)
    places = (torch.arange(4, 7)[None], order[None])
    torch.testing.assert_close(variant(q, k[:, :, order], v[:, :, order], places=places), expected)


def test_a_sink_takes_all_where_nothing_may_be_seen():
    q, k, v = (torch.randn(1, 1, 2, 4) for _ in range(3))
    blind = torch.tensor([[True, True], [False, False]])
    out = attend_scores(q, k, v, mask=blind, sinks=torch.zeros(1))
    assert out[0, 0, 1].tolist() == [0.0] * 4
    assert out[0, 0, 0].abs().sum() > 0


def test_dropout_drops_weights_in_training_alone_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = MultiHeadAttention(16, 2, variant=AttentionVariant(dropout=0.4)).double()
    plain = MultiHeadAttention(16, 2).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(layer.eval()(x), plain(x), rtol=0, atol=1e-12)
    runs = torch.stack([layer.train()(x) for _ in range(2000)])
    assert runs.std(0).min() > 0
    error = (runs.mean(0) - plain(x)).abs() / (runs.std(0) / 2000**0.5)
    assert error.max() < 5  # standard errors, of 144 means


@pytest.mark.parametrize("size", ["head", "projection"])
def test_queries_and_keys_are_normalised_by_heads_or_all_together(size):
    layer = MultiHeadAttention(12, 3, kv_heads=1, head_dim=4).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    plain = layer.project(x, x)
    heads = (1, 1) if size == "head" else (3, 1)
    layer.q_norm, layer.k_norm = (nn.RMSNorm(4 * n, eps=0.0).double() for n in heads)
    for norm in (layer.q_norm, layer.k_norm):
        nn.init.normal_(norm.weight)
    q, k, v = layer.project(x, x)
    for found, before, norm in ((q, plain[0], layer.q_norm), (k, plain[1], layer.k_norm)):
        parts = before.view(2, 5, -1, norm.weight.numel())
        expected = parts / parts.pow(2).mean(-1, keepdim=True).sqrt() * norm.weight
        torch.testing.assert_close(found, expected.flatten(-2))
    assert torch.equal(v, plain[2])


def test_a_gate_scales_what_the_heads_found():
    layer = MultiHeadAttention(8, 2, gate=True).double()
    plain = MultiHeadAttention(8, 2).double()
    plain.load_state_dict({name: x for name, x in layer.state_dict().items() if "gate" not in name})
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    found = plain.out_proj.weight.inverse() @ (plain(x) - plain.out_proj.bias)[0].T  # what the heads found, (8, 4)
    expected = layer.out_proj(found.T * torch.sigmoid(x[0] @ layer.gate_proj.weight.T))
    torch.testing.assert_close(layer(x)[0], expected)
