"""Linear attention: three forms of one sum, features that stand for exp, a state that replaces the cache."""

import math
import random
from functools import partial
from itertools import pairwise

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tformer_lib import jit
from tformer_lib import linear_attention as la
from tformer_lib.linear_attention import backward, gradients, kernels

pytestmark = pytest.mark.usefixtures("one_thread")

D = 8
MAPS = {
    "elu+1": la.elu_plus_one,
    "relu": la.relu,
    "taylor": la.taylor,
    "favor+": la.RandomFeatures(D, 32, seed=3),
}
over_maps = pytest.mark.parametrize("name", MAPS)


def naive_weights(name, q, k):
    """The weights from their formulas in float64, without these maps: (..., T, d), (..., S, d) -> (..., T, S)."""
    if name == "taylor":
        x = q @ k.mT
        return 1 + x + x**2 / 2
    maps = {"elu+1": lambda x: F.elu(x) + 1, "relu": F.relu, "favor+": plain_favor}
    return maps[name](q) @ maps[name](k).mT


def plain_favor(x):
    projection = MAPS["favor+"].projection
    return (x @ projection.T - (x**2).sum(-1, keepdim=True) / 2).exp()


def naive(name, q, k, v, *, causal=True, mask=None, scale=None):
    """Float64, every weight written out, positions counted from the end."""
    q, k, v = q.double(), k.double(), v.double()
    group, (T, S) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    root = math.sqrt(q.shape[3] ** -0.5 if scale is None else scale)
    allowed = torch.ones(T, S, dtype=torch.bool)
    if causal:
        allowed = torch.arange(S - 1, -1, -1)[None, :] >= torch.arange(T - 1, -1, -1)[:, None]
    allowed = allowed if mask is None else allowed & mask
    weights = torch.where(allowed, naive_weights(name, q * root, k * root), 0.0)
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights @ v / total.where(total > 0, torch.ones(())), 0.0)


def make(T=37, S=None, heads=4, kv_heads=2, batch=2, seed=0, dtype=torch.float32, value_dim=D):
    generator = torch.Generator().manual_seed(seed)
    S = T if S is None else S
    shapes = [(batch, heads, T, D), (batch, kv_heads, S, D), (batch, kv_heads, S, value_dim)]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)


# ---- the three forms


@over_maps
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 9), (7, 7), (64, 64), (65, 65), (7, 150), (200, 200), (12, 5)])
def test_the_causal_forms_equal_the_float64_sum(name, T, S):
    q, k, v = make(T, S, value_dim=5)
    truth = naive(name, q, k, v)
    outs = [
        la.parallel(q, k, v, causal=True, feature_map=MAPS[name]),
        la.recurrent(q, k, v, feature_map=MAPS[name]),
        la.chunked(q, k, v, feature_map=MAPS[name], chunk=16),
        la.attend(q, k, v, causal=True, feature_map=MAPS[name]),
    ]
    for out in outs:
        torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)


@draws(40)
@given(
    T=st.integers(1, 40),
    extra=st.integers(-10, 30),
    chunk=st.integers(1, 50),
    kv_heads=st.sampled_from([1, 2, 3, 6]),
    scale=st.sampled_from([None, 1.0, 0.2]),
    seed=st.integers(0, 99),
)
def test_any_chunk_and_any_lengths_give_the_same_sum(T, extra, chunk, kv_heads, scale, seed):
    q, k, v = make(T, max(1, T + extra), heads=6, kv_heads=kv_heads, seed=seed)
    for name in ("elu+1", "relu"):
        out = la.attend(q, k, v, causal=True, feature_map=MAPS[name], chunk=chunk, scale=scale)
        torch.testing.assert_close(out.double(), naive(name, q, k, v, scale=scale), atol=1e-5, rtol=1e-5)


@over_maps
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_associativity_equals_the_sum_over_all_keys(name, kv_heads):
    q, k, v = make(33, 50, kv_heads=kv_heads)
    out = la.attend(q, k, v, feature_map=MAPS[name])
    torch.testing.assert_close(out.double(), naive(name, q, k, v, causal=False), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, la.parallel(q, k, v, feature_map=MAPS[name]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("poison", [0.0, 1e4, float("nan")])
def test_padding_is_as_if_the_keys_were_not_there(causal, poison):
    q, k, v = make(20)
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    mask[0, ..., 13:] = mask[1, ..., :4] = False
    truth = naive("elu+1", q, k, v, causal=causal, mask=mask)
    k, v = (torch.where(mask.mT, x, poison) for x in (k, v))
    for form in [la.recurrent, la.chunked] if causal else [la.associative]:
        torch.testing.assert_close(form(q, k, v, mask=mask).double(), truth, atol=1e-5, rtol=1e-5)


def test_parallel_takes_any_mask():
    q, k, v = make(20, 30)
    mask = torch.rand(2, 4, 20, 30, generator=torch.Generator().manual_seed(1)) < 0.3
    out = la.parallel(q, k, v, mask=mask, causal=True)
    torch.testing.assert_close(out.double(), naive("elu+1", q, k, v, mask=mask), atol=1e-5, rtol=1e-5)


def test_a_changed_future_token_changes_no_earlier_output():
    for feature_map in MAPS.values():
        q, k, v = make(50)
        before = la.attend(q, k, v, causal=True, feature_map=feature_map, chunk=16)
        k[:, :, 30:], v[:, :, 30:] = 5.0, -7.0
        after = la.attend(q, k, v, causal=True, feature_map=feature_map, chunk=16)
        assert torch.equal(before[:, :, :30], after[:, :, :30])
        assert not torch.equal(before[:, :, 30:], after[:, :, 30:])


# ---- gradients


@over_maps
def test_gradients(name):
    q, k, v = (x.requires_grad_() for x in make(5, 7, heads=2, kv_heads=1, batch=1, dtype=torch.float64, value_dim=2))
    for causal in (True, False):
        form = partial(la.attend, causal=causal, feature_map=MAPS[name], chunk=3)
        assert torch.autograd.gradcheck(form, (q, k, v), fast_mode=True)


def test_gradients_of_the_forms_agree():
    inputs = make(50)
    grads = []
    for form in (lambda *x: la.parallel(*x, causal=True), la.recurrent, lambda *x: la.chunked(*x, chunk=8)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        grads.append(torch.autograd.grad(form(*leaves).square().sum(), leaves))
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# ---- numerics


def test_a_query_with_no_weight_gets_zeros_and_finite_gradients():
    q, k, v = (x.requires_grad_() for x in make(12, 5))  # causal: the first 7 queries stand before every key
    relu_q = torch.where(torch.arange(12)[:, None] == 11, -q.abs(), q)  # and relu leaves the last one nothing
    out = la.attend(relu_q, k, v, causal=True, feature_map=la.relu)
    assert (out[:, :, :7] == 0).all()
    assert (out[:, :, 11] == 0).all()
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, :7] == 0).all()


def test_a_small_denominator_is_still_a_weighted_mean():
    q, k, v = make(9)
    q, k = q - 60, k - 20  # elu + 1 is e^-21 and e^-7 after the scale
    out = la.attend(q, k, v, causal=True)
    torch.testing.assert_close(out.double(), naive_in_logs(q, k, v), atol=1e-4, rtol=1e-4)


def naive_in_logs(q, k, v):
    """elu + 1 of negative inputs is exp, so its weights are a softmax of their logarithms."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    root = D**-0.25
    log_weights = torch.logsumexp(root * (q.unsqueeze(3) + k.unsqueeze(2)), -1)
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return log_weights.masked_fill(future, -torch.inf).softmax(-1) @ v


def test_elu_plus_one_is_exp_where_the_sum_would_round_to_zero():
    x = torch.tensor([-80.0, -20.0, -1.0, 0.0, 3.0], requires_grad=True)
    assert (F.elu(x.detach())[:2] + 1 == 0).all()
    torch.testing.assert_close(la.elu_plus_one(x).double(), torch.where(x > 0, x + 1, x.double().exp()))
    (grad,) = torch.autograd.grad(la.elu_plus_one(x).sum(), x)
    torch.testing.assert_close(grad, x.detach().clamp(max=0).exp())
    assert la.elu_plus_one(torch.tensor(500.0, requires_grad=True)).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_sums_keep_growing_in_half_precision(dtype):
    """With equal weights the output is the mean of the values; a sum held in bfloat16 would stop at 256 of 4,096."""
    T = 4096
    q, k = torch.zeros(2, 1, 1, T, 4, dtype=dtype)
    v = torch.linspace(0, 1, T).view(1, 1, T, 1).to(dtype)
    means = v.double().cumsum(2) / torch.arange(1, T + 1).view(1, 1, T, 1)
    eps = torch.finfo(dtype).eps
    for form in (la.recurrent, la.chunked):
        out = form(q, k, v)
        assert out.dtype == dtype
        assert (out.double() - means).abs().max() < eps
    held = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(1000):
        held = held + torch.ones((), dtype=torch.bfloat16)
    assert held == 256


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 7, 33, 257])
def test_every_dtype_and_tiny_lengths(dtype, length):
    q, k, v = make(length, dtype=dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    for causal in (True, False):
        out = la.attend(q, k, v, causal=causal)
        assert out.dtype == dtype
        assert out.shape == q.shape
        torch.testing.assert_close(out.double(), naive("elu+1", q, k, v, causal=causal), atol=tolerance, rtol=tolerance)


def test_inputs_need_not_be_contiguous_and_may_be_empty():
    q, k, v = make(33)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(la.attend(*views, causal=True), la.attend(q, k, v, causal=True))
    for T, S, batch in ((0, 5, 2), (3, 0, 2), (0, 0, 2), (3, 5, 0)):
        q, k, v = make(T, S, batch=batch)
        for causal in (True, False):
            out = la.attend(q, k, v, causal=causal)
            assert out.shape == q.shape
            assert (out == 0).all()


# ---- features that stand for exp


def draw_estimates(features, draws, *, orthogonal):
    """exp(q·k) and independent estimates of it (pairs, draws), each from its own share of one large projection."""
    generator = torch.Generator().manual_seed(0)
    q, k = 0.2 * torch.randn(2, 40, D, generator=generator, dtype=torch.float64)
    projection = la.RandomFeatures(D, features * draws, seed=1, orthogonal=orthogonal)
    products = (projection(q) * projection(k)).unflatten(1, (draws, features))  # (pairs, draws, features)
    return (q * k).sum(-1, keepdim=True).exp(), products.sum(-1) * draws


def test_random_features_are_unbiased_and_orthogonal_ones_vary_less():
    errors = {}
    for orthogonal in (True, False):
        truth, estimates = draw_estimates(16, 1000, orthogonal=orthogonal)
        standard_error = estimates.std(1, keepdim=True) / 1000**0.5
        assert ((estimates.mean(1, keepdim=True) - truth).abs() < 5 * standard_error).all()
        errors[orthogonal] = (estimates / truth - 1).square().mean().item()
    assert errors[True] < 0.95 * errors[False]


def test_the_error_of_random_features_falls_as_one_over_their_root():
    mean_squares = []
    for features in (16, 256):
        truth, estimates = draw_estimates(features, 500, orthogonal=False)
        mean_squares.append((estimates / truth - 1).square().mean().item())
    assert mean_squares[0] / mean_squares[1] == pytest.approx(16, rel=0.3)


def test_attention_with_many_features_approaches_softmax():
    q, k, v = make(30, dtype=torch.float64)
    k_all, v_all = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    truth = F.scaled_dot_product_attention(q, k_all, v_all, is_causal=True)
    errors = [
        (la.attend(q, k, v, causal=True, feature_map=la.RandomFeatures(D, m)) - truth).abs().mean().item()
        for m in (8, 128, 2048, 32768)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


def test_orthogonal_rows_are_orthogonal_seeded_and_scaled_like_gaussians():
    projection = la.RandomFeatures(D, 3 * D + 5, seed=7).projection
    assert projection.shape == (3 * D + 5, D)
    block = projection[D : 2 * D]
    torch.testing.assert_close(block @ block.T, torch.diag(block.square().sum(1)), atol=1e-12, rtol=0)
    assert torch.equal(projection, la.RandomFeatures(D, 3 * D + 5, seed=7).projection)
    assert not torch.equal(projection, la.RandomFeatures(D, 3 * D + 5, seed=8).projection)
    lengths = la.RandomFeatures(D, 4000).projection.square().sum(1)
    assert lengths.mean() == pytest.approx(D, rel=0.05)
    assert lengths.var() == pytest.approx(2 * D, rel=0.15)


def test_random_features_of_large_queries_neither_overflow_nor_vanish():
    q, k, v = make(20)
    out = la.attend(300 * q, k, v, causal=True, feature_map=MAPS["favor+"])
    assert out.isfinite().all()
    assert (out != 0).any(-1).all()


# ---- decoding


@over_maps
@pytest.mark.parametrize("pieces", [(37,), (1,) * 37, (20, 1, 1, 15), (5, 32)])
def test_a_state_fed_in_pieces_equals_the_full_pass(name, pieces):
    q, k, v = make(37)
    full = la.attend(q, k, v, causal=True, feature_map=MAPS[name])
    state = la.LinearState(feature_map=MAPS[name], chunk=8)
    outs = [state.attend(*part) for part in zip(*(x.split(pieces, dim=2) for x in (q, k, v)), strict=True)]
    torch.testing.assert_close(torch.cat(outs, 2), full, atol=1e-5, rtol=1e-5)


@draws(40)
@given(data=st.data(), chunk=st.sampled_from([1, 3, 64]))
def test_a_state_in_any_pieces_with_any_padding_equals_recomputation(data, chunk):
    """Pieces of any length, whose padding holds NaN; some calls are refused first and must leave no trace."""
    pieces = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    q, k, v = make(sum(pieces), dtype=torch.float64)
    rows = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in [sum(pieces)] * q.shape[0]]
    real = torch.tensor(rows, dtype=torch.bool).view(q.shape[0], 1, 1, -1)
    wanted = la.parallel(q, k, v, mask=real, causal=True)
    k, v = (x.masked_fill(~real.mT, torch.nan) for x in (k, v))
    state, outs = la.LinearState(chunk=chunk), []
    for *part, mask in zip(*(x.split(pieces, dim=2) for x in (q, k, v)), real.split(pieces, dim=3), strict=True):
        if data.draw(st.booleans()):
            with pytest.raises(ValueError, match="mask must broadcast"):
                state.attend(*part, mask=torch.ones(7, 1, 1, 1, dtype=torch.bool))
        outs.append(state.attend(*part, mask=mask))
    torch.testing.assert_close(torch.cat(outs, 2), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", [la.gated_attend, la.gated_recurrent, la.gated_parallel])
@pytest.mark.parametrize("autocast", [False, True])
def test_gated_sums_are_kept_in_float32_or_better(form, autocast):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        q, k, v = make(70, dtype=dtype)
        gates = torch.full((1, 1, 1, 1), -0.02, dtype=torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = form(q, k, v, log_decay=gates)
        truth = form(q.double(), k.double(), v.double(), log_decay=gates)
        kept = 1e-12 if dtype == torch.float64 else 5e-5
        assert ((found.double() - truth).abs() <= kept + truth.abs() * torch.finfo(dtype).eps / 2).all()


def test_a_state_is_kept_in_float32_under_autocast():
    q, k, v = make(9, dtype=torch.bfloat16)
    state, plain = la.LinearState(), la.LinearState()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = state.attend(q, k, v)
    assert torch.equal(out, plain.attend(q, k, v))
    assert torch.equal(state.sums, plain.sums)


def test_a_state_keeps_its_size_and_its_float32():
    q, k, v = make(64, dtype=torch.bfloat16)
    state, sizes = la.LinearState(), set()
    for t in range(64):
        out = state.attend(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
        sizes.add((state.sums.shape, state.sums.dtype))
        assert out.dtype == torch.bfloat16
    assert sizes == {((2, 2, D, D + 1), torch.float32)}


def test_a_state_refuses_tokens_that_do_not_fit_it():
    state = la.LinearState()
    state.attend(*make(5))
    with pytest.raises(ValueError, match=r"must be .* = \(3, 2, 8, 9\), got \(2, 2, 8, 9\)"):
        state.attend(*make(5, batch=3))
    with pytest.raises(ValueError, match="as many queries as keys, got 4 and 5"):
        state.attend(*make(4, 5))
    with pytest.raises(ValueError, match=r"state is on cpu.*meta"):
        state.attend(*(x.to("meta") for x in make(5)))


def test_a_model_decodes_from_its_states_as_it_reads():
    from tformer_lib.attention import MultiHeadAttention

    torch.manual_seed(0)
    layers = [MultiHeadAttention(32, 4, kv_heads=2, attend=la.attend) for _ in range(2)]
    x = torch.randn(3, 12, 32)
    states, full = [la.LinearState() for _ in layers], x
    for layer in layers:
        full = full + layer(full, causal=True)
    outs = []
    for part in x.split([7, 1, 1, 3], dim=1):
        y = part
        for i, layer in enumerate(layers):
            y = y + layer(y, cache=states[i])
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), full, atol=1e-5, rtol=1e-5)


# ---- decay


def gate_shapes():
    return [(1, 2, 1, 1), (2, 2, 37, 1), (2, 2, 37, D), (1, 1, 37, D), (1, 2, 1, D)]


def draw_gates(shape, strength=1.0, seed=0):
    return -strength * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state_space_model(q, k, v, gates, scale):
    """h_t = A_t h_{t-1} + B_t x_tᵀ, y_t = C_tᵀ h_t in float64, head by head: C = q, B = k, x = v, A = exp(g)."""
    batch, heads, T, _ = q.shape
    out = torch.zeros(batch, heads, T, v.shape[-1], dtype=torch.float64)
    gates = gates.expand(batch, k.shape[1], T, k.shape[3])
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // k.shape[1])
            state = torch.zeros(k.shape[3], v.shape[3], dtype=torch.float64)
            for t in range(T):
                state = torch.diag(gates[b, kv, t].exp()) @ state + torch.outer(k[b, kv, t], v[b, kv, t])
                out[b, h, t] = scale * q[b, h, t] @ state
    return out


@pytest.mark.parametrize("shape", gate_shapes(), ids=str)
@pytest.mark.parametrize("strength", [0.0, 0.1, 5.0, 200.0])
def test_the_decayed_forms_equal_a_state_space_model(shape, strength):
    q, k, v = make(37, value_dim=5)
    gates = draw_gates(shape, strength)
    truth = state_space_model(*(x.double() for x in (q, k, v)), gates, D**-0.5)
    outs = [
        la.gated_parallel(q, k, v, log_decay=gates),
        la.gated_recurrent(q, k, v, log_decay=gates),
        la.gated_attend(q, k, v, log_decay=gates),
        la.gated_attend(q, k, v, log_decay=gates, chunk=5),
    ]
    for out in outs:
        torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)


def test_a_gate_of_minus_infinity_starts_a_new_document():
    q, k, v = make(20, dtype=torch.float64)
    gates = torch.full((1, 1, 20, 1), -0.1, dtype=torch.float64)
    gates[:, :, 11] = -torch.inf
    for form in (la.gated_attend, la.gated_recurrent, la.gated_parallel):
        whole = form(q, k, v, log_decay=gates)
        second = form(q[:, :, 11:], k[:, :, 11:], v[:, :, 11:], log_decay=gates[:, :, 11:])
        torch.testing.assert_close(whole[:, :, 11:], second)


def test_gated_gradients():
    q, k, v = (x.requires_grad_() for x in make(7, heads=2, kv_heads=1, batch=1, dtype=torch.float64, value_dim=2))
    for width in (1, D):
        leaves = (q, k, v, draw_gates((1, 1, 7, width)).requires_grad_())
        assert torch.autograd.gradcheck(
            lambda *x: la.gated_attend(*x[:3], log_decay=x[3], chunk=3), leaves, fast_mode=True
        )


def test_retention_decays_are_those_of_the_paper():
    decays = la.retention_log_decay(4).exp().flatten()
    torch.testing.assert_close(decays, torch.tensor([31 / 32, 63 / 64, 127 / 128, 255 / 256], dtype=torch.float64))


@pytest.mark.parametrize("form", [la.gated_attend, la.gated_recurrent, la.gated_parallel])
def test_the_decayed_forms_compile_as_one_graph(form):
    q, k, v = make(7)
    run = lambda *inputs: form(*inputs, log_decay=la.retention_log_decay(k.shape[1]))  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), run(q, k, v))


# ---- the delta rule


def draw_delta(T=37, heads=4, kv_heads=2, batch=2, seed=0, value_dim=5, gate=1, dtype=torch.float64):
    """q, k, v, and beta and log_decay as keyword arguments; keys of unit length, gates of width ``gate`` or none."""
    q, k, v = make(T, heads=heads, kv_heads=kv_heads, batch=batch, seed=seed, value_dim=value_dim, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed + 1)
    options = {"beta": torch.rand(batch, kv_heads, T, 1, generator=generator, dtype=torch.float64) * 1.8}
    if gate:
        options["log_decay"] = draw_gates((batch, kv_heads, T, gate), seed=seed)
    return *(x.to(dtype) for x in (q, F.normalize(k, dim=-1), v)), options


def delta_by_steps(q, k, v, beta, log_decay=None, initial=None):
    """S = A S (I - ...) written out in float64, head by head, with the matrices that the papers have."""
    q, k, v, beta = (x.double() for x in (q, k, v, beta))
    batch, heads, T, d = q.shape
    gates = torch.zeros(batch, k.shape[1], T, d) if log_decay is None else log_decay.expand(batch, k.shape[1], T, d)
    out, last = torch.zeros(batch, heads, T, v.shape[-1], dtype=torch.float64), None
    last = torch.zeros(batch, k.shape[1], d, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // k.shape[1])
            S = torch.zeros(d, v.shape[-1], dtype=torch.float64) if initial is None else initial[b, kv].double()
            for t in range(T):
                erase = torch.eye(d, dtype=torch.float64) - beta[b, kv, t] * torch.outer(k[b, kv, t], k[b, kv, t])
                S = erase @ torch.diag(gates[b, kv, t].double().exp()) @ S
                S = S + beta[b, kv, t] * torch.outer(k[b, kv, t], v[b, kv, t])
                out[b, h, t] = d**-0.5 * q[b, h, t] @ S
            last[b, kv] = S
    return out, last


@pytest.mark.parametrize("gate", [0, 1, D])
@pytest.mark.parametrize("T", [1, 16, 37])
def test_the_delta_forms_equal_the_float64_recurrence(gate, T):
    q, k, v, options = draw_delta(T, gate=gate)
    initial = torch.randn(2, 2, D, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for start in (None, initial):
        truth, state = delta_by_steps(q, k, v, **options, initial=start)
        extra = {"initial_state": start, "return_state": True}
        for form in (la.delta_attend, la.delta_recurrent, partial(la.delta_attend, chunk=5)):
            out, last = form(q, k, v, **options, **extra)
            torch.testing.assert_close(out, truth, atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(last, state, atol=1e-10, rtol=1e-10)
    q, k, v = (x.float() for x in (q, k, v))
    truth, _ = delta_by_steps(q, k, v, **options)
    torch.testing.assert_close(la.delta_attend(q, k, v, **options).double(), truth, atol=1e-5, rtol=1e-5)


def test_the_delta_rule_stores_a_value_so_that_its_key_finds_it():
    """With beta 1 and unit keys the state answers to the last key with its value exactly; a plain sum does not."""
    _, k, v, _ = draw_delta(20, heads=2)
    beta = torch.ones(2, 2, 20, 1, dtype=torch.float64)
    torch.testing.assert_close(la.delta_attend(k, k, v, beta=beta, scale=1.0), v)
    plain = la.gated_attend(k, k, v, log_decay=torch.zeros(1, 1, 1, 1), scale=1.0)
    assert (plain - v).abs().mean() > 0.1


def test_without_a_correction_the_delta_rule_is_the_decaying_sum():
    """Keys that are orthogonal to all before them have nothing to correct."""
    T = D
    q, _, v, _ = draw_delta(T)
    k = torch.eye(D, dtype=torch.float64).expand(2, 2, D, D)
    gates = draw_gates((2, 2, T, 1))
    out = la.delta_attend(q, k, v, beta=torch.ones(1, 1, 1, 1), log_decay=gates)
    torch.testing.assert_close(out, la.gated_attend(q, k, v, log_decay=gates))


@pytest.mark.parametrize("gate", [0, 1, D])
def test_delta_gradients(gate):
    q, k, v, options = draw_delta(7, heads=2, kv_heads=1, batch=1, value_dim=2, gate=gate)
    leaves = [x.requires_grad_() for x in (q, k, v, *options.values())]
    form = lambda q, k, v, *rest: la.delta_attend(q, k, v, **dict(zip(options, rest, strict=True)), chunk=3)  # noqa: E731
    assert torch.autograd.gradcheck(form, leaves, fast_mode=True)


def test_a_changed_future_token_changes_no_earlier_output_of_the_delta_rule():
    q, k, v, options = draw_delta(50)
    before = la.delta_attend(q, k, v, **options, chunk=16)
    k[:, :, 30:], v[:, :, 30:] = k[:, :, 30:].flip(-1), -7.0
    after = la.delta_attend(q, k, v, **options, chunk=16)
    assert torch.equal(before[:, :, :30], after[:, :, :30])
    assert not torch.equal(before[:, :, 30:], after[:, :, 30:])


# ---- states of every member, and packed sequences


def members(T=37, dtype=torch.float64):
    """(name, form, tensors by token, options): each member of the family that has a state."""
    q, k, v, options = draw_delta(T, dtype=dtype)
    decay = {"log_decay": options["log_decay"]}
    by_feature = {"log_decay": draw_gates((2, 2, T, D))}
    return [
        ("decay", la.gated_attend, (q, k, v), decay),
        ("decay, recurrent", la.gated_recurrent, (q, k, v), decay),
        ("decay by feature", la.gated_attend, (q, k, v), by_feature),
        ("delta", la.delta_attend, (q, k, v), {"beta": options["beta"]}),
        ("gated delta", la.delta_attend, (q, k, v), options),
        ("gated delta, recurrent", la.delta_recurrent, (q, k, v), options),
        ("gated delta by feature", la.delta_attend, (q, k, v), {"beta": options["beta"], **by_feature}),
    ]


over_members = pytest.mark.parametrize("member", range(7), ids=[m[0] for m in members(1)])


@over_members
@pytest.mark.parametrize("pieces", [(37,), (1,) * 37, (20, 1, 0, 16), (5, 32)], ids=str)
def test_a_state_carried_over_any_split_equals_one_pass(member, pieces):
    _, form, tensors, options = members()[member]
    whole, last = form(*tensors, **options, return_state=True)
    outs, state = [], None
    for cut in zip(*(x.split(pieces, dim=2) for x in (*tensors, *options.values())), strict=True):
        now = dict(zip(options, cut[3:], strict=True))
        out, state = form(*cut[:3], **now, initial_state=state, return_state=True)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole)
    torch.testing.assert_close(state, last)


@over_members
def test_packed_sequences_do_not_see_one_another(member):
    _, form, tensors, options = members()[member]
    tensors = [x[:1] for x in tensors]
    options = {name: x[:1] for name, x in options.items()}
    starts = [0, 5, 5, 21, 37]
    initial = torch.randn(4, 2, D, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    out, last = form(*tensors, **options, cu_seqlens=cu_seqlens, initial_state=initial, return_state=True)
    for i, (a, b) in enumerate(pairwise(starts)):
        now = {name: x[:, :, a:b] for name, x in options.items()}
        alone, state = form(
            *(x[:, :, a:b] for x in tensors), **now, initial_state=initial[i : i + 1], return_state=True
        )
        torch.testing.assert_close(out[:, :, a:b], alone)
        torch.testing.assert_close(last[i : i + 1], state)


def test_packed_sums_do_not_see_one_another():
    q, k, v = make(37, batch=1)
    starts = [0, 5, 5, 21, 37]
    for normalised in (True, False):
        out = la.chunked_packed(q, k, v, torch.tensor(starts, dtype=torch.int32), normalised=normalised, chunk=8)
        for a, b in pairwise(starts):
            alone = la.attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], causal=True, normalised=normalised)
            torch.testing.assert_close(out[:, :, a:b], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ["decay", "delta", "gated delta"])
def test_a_gated_state_decodes_as_it_reads(rule):
    q, k, v, options = draw_delta(20, dtype=torch.float32)
    options = {name: x for name, x in options.items() if rule == "gated delta" or (name == "beta") == (rule == "delta")}
    whole = (la.gated_attend if rule == "decay" else la.delta_attend)(q, k, v, **options)
    state, outs = la.GatedState(chunk=8), []
    for cut in zip(*(x.split([13, *[1] * 7], dim=2) for x in (q, k, v, *options.values())), strict=True):
        outs.append(state.attend(*cut[:3], **dict(zip(options, cut[3:], strict=True))))
    torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-5, rtol=1e-5)
    assert state.state.shape == (2, 2, D, 5)


# ---- sums without a denominator


@pytest.mark.parametrize("causal", [True, False])
def test_the_sum_without_a_denominator(causal):
    q, k, v = make(33)
    root = D**-0.25
    weights = (F.elu(q.double() * root) + 1) @ (F.elu(k.double() * root) + 1).repeat_interleave(2, 1).mT
    truth = (weights.tril() if causal else weights) @ v.double().repeat_interleave(2, 1)
    forms = [la.recurrent, la.chunked] if causal else [la.associative]
    for form in (*forms, partial(la.attend, causal=causal), partial(la.parallel, causal=causal)):
        torch.testing.assert_close(form(q, k, v, normalised=False).double(), truth, atol=1e-4, rtol=1e-5)


def test_a_state_without_a_denominator_streams():
    q, k, v = make(37)
    full = la.attend(q, k, v, causal=True, normalised=False)
    state = la.LinearState(normalised=False, chunk=8)
    outs = [state.attend(*part) for part in zip(*(x.split([20, 1, 16], dim=2) for x in (q, k, v)), strict=True)]
    torch.testing.assert_close(torch.cat(outs, 2), full, atol=1e-5, rtol=1e-5)
    assert state.sums.shape == (2, 2, D, D)


# ---- the operator, whose gradients are written out


RULES = ["sum", "mean", "decay", "delta", "gated delta"]


def operator_call(rule, *, packed=False, started=True, dtype=torch.float64):
    """(run, tensors): the operator's step 0 as a function of all that it has gradients for."""
    q, k, v, options = draw_delta(70, batch=1 if packed else 2, dtype=dtype)
    wanted = {"decay": ("log_decay",), "delta": ("beta",), "gated delta": ("beta", "log_decay")}.get(rule, ())
    names = [*wanted, *(["initial_state"] if started else [])]
    cu_seqlens = torch.tensor([0, 3, 3, 66, 70], dtype=torch.int32) if packed else None
    states = 4 if packed else 2
    options["initial_state"] = torch.rand(
        states, 2, D, 5 + (rule == "mean"), generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    extra = {"cu_seqlens": cu_seqlens, "scale": 0.7}
    if rule == "mean":
        extra |= {"normalised": True, "feature_map": la.elu_plus_one, "map_scale": 0.8}

    def run(q, k, v, *rest, step=0):
        return la.operator.run(q, k, v, **dict(zip(names, rest, strict=True)), **extra, step=step)

    return run, [q, k, v, *(options[name].to(torch.promote_types(dtype, torch.float32)) for name in names)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_the_operators_gradients(rule, packed, started):
    run, tensors = operator_call(rule, packed=packed, started=started)
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in tensors], fast_mode=True)


@pytest.mark.parametrize("packed", [False, True])
def test_the_operators_gradients_under_fixed_decays(packed):
    """Without a gradient of the gates three sums are enough, two of them from the last token to the first."""
    run, tensors = operator_call("decay", packed=packed)
    *leaves, gates, initial = tensors
    fixed = lambda q, k, v, initial: run(q, k, v, gates, initial)  # noqa: E731
    assert torch.autograd.gradcheck(fixed, [x.requires_grad_() for x in (*leaves, initial)], fast_mode=True)


@pytest.mark.parametrize("rule", RULES)
def test_the_operator_is_registered_rightly(rule):
    run, tensors = operator_call(rule, dtype=torch.float32)
    tensors = [x.requires_grad_() for x in tensors]
    calls = []
    with CallsOfOperator(calls):
        run(*tensors)
    torch.library.opcheck(torch.ops.tformer_lab.linear_attention.default, calls[0])


@pytest.mark.parametrize("rule", RULES)
def test_the_operator_compiles_as_one_graph(rule):
    run, tensors = operator_call(rule, dtype=torch.float32)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(compiled(*tensors), run(*tensors), strict=True):
        torch.testing.assert_close(found, wanted)


# ---- the kernels, where this machine has them


def steps_here():
    """The kernels that can run here, each with its device."""
    steps = [("cpu", "cpu")] if jit.can_build_cpp() else []
    return steps + [(step, "cuda") for step in ("1", "2", "3", "4") if torch.cuda.is_available()]


@draws(60)
@given(
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    T=st.sampled_from([1, 7, 63, 64, 65, 129, 200, 700]),
    dims=st.sampled_from([(8, 8), (40, 16), (64, 64), (128, 128), (96, 40), (256, 128)]),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2)]),
    layout=st.sampled_from(["contiguous", "tokens first", "sliced"]),
    started=st.booleans(),
    cuts=st.lists(st.integers(0, 700), max_size=3),
    seed=st.integers(0, 10**6),
)
@pytest.mark.skipif(not steps_here(), reason="neither a C++ compiler nor a GPU is here")
def test_the_kernels_equal_the_float64_sum(rule, dtype, T, dims, heads, layout, started, cuts, seed):
    """Within twice the error of the same sum in the inputs' own precision: the dtype's rounding, plus 1e-5."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    (d, e), (H, KV) = dims, heads
    starts = sorted({0, T, *(cut for cut in cuts if cut < T)}) if cuts else None
    batch = 1 if starts else 2
    q, k, v = (in_layout(draw, (batch, h, T, w), layout) for h, w in ((H, d), (KV, d), (KV, e)))
    options = {"scale": d**-0.5}
    if rule == "mean":
        options |= {"normalised": True, "map_code": 1, "map_scale": d**-0.25, "scale": 1.0}
    if "delta" in rule:
        k = F.normalize(k, dim=-1)
        options["beta"] = draw(batch, KV, T, 1).sigmoid()
    if rule in ("decay", "gated delta"):
        options["log_decay"] = -draw(batch, KV, T, 1).abs() * 10 ** draw(1).item()
    sequences = len(starts) - 1 if starts else batch
    if started:
        options["initial"] = draw(sequences, KV, e + (rule == "mean"), d).abs()
    options["cu_seqlens"] = torch.tensor(starts, dtype=torch.int32) if starts else None
    inputs = [x.to(dtype) for x in (q, k, v)]
    truth = kernels.plain(*(x.double() for x in inputs), **options)
    options = {name: x.float() if is_float(x) else x for name, x in options.items()}
    for step, device in steps_here():
        on_device = [x.to(device) for x in inputs]
        given = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        if kernels.refusal(step, on_device[0], on_device[2], given.get("beta")):
            continue
        found = kernels.launch(step, *on_device, **given, length=T)
        for name, a, b in zip(("out", "state"), found, truth, strict=False):
            error = (a.double().cpu() - b).norm() / b.norm()
            eps = torch.finfo(dtype).eps if name == "out" or step in "234" else 1e-7
            assert error < 2 * eps + 1e-5, f"step {step}, {name}: error {error:.1e}"


@pytest.mark.skipif(not steps_here(), reason="neither a C++ compiler nor a GPU is here")
@pytest.mark.parametrize("seed", range(24 if torch.cuda.is_available() else 6))
def test_shapes_drawn_afresh_are_the_float64_formula(seed):
    """Lengths to 4,099 (on a CPU to 1,500), head_dim to 256, ratios of heads, strides, packed and empty sequences, and
    states over any split.

    Outputs within twice the error of step 0, whose sums are float32, gradients of q, k and v within three times its
    own. What is float32, where step 0 rounds nothing, within the dtype's eps: the last states, and the gradients of
    gates, step sizes and first states.
    """
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rule, dtype = draw.choice(RULES), draw.choice((torch.bfloat16, torch.float16))
    longest, widest = (4099, 8) if torch.cuda.is_available() else (1500, 4)
    T = draw.choice((1, 63, 65, draw.randint(1, 700), draw.randint(700, longest)))
    d, e = (draw.choice((32, 40, 64, 72, 96, 128, 160, 256)) for _ in "kv")
    KV, group, layout = (
        draw.choice((1, 2)),
        draw.choice((1, 2, 3, widest)),
        draw.choice(("contiguous", "tokens first", "sliced")),
    )
    starts = sorted({0, T, *(draw.randint(0, T) for _ in range(3))}) if draw.random() < 0.4 else None
    starts = [*starts, T] if starts else None  # the last sequence is empty
    batch = 1 if starts else 2
    number = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k, v = (in_layout(number, (batch, h, T, w), layout) for h, w in ((group * KV, d), (KV, d), (KV, e)))
    options = {"scale": d**-0.5}
    if rule == "mean":
        options |= {"normalised": True, "feature_map": la.elu_plus_one, "map_scale": d**-0.25, "scale": 1.0}
    if "delta" in rule:
        k = F.normalize(k, dim=-1)
        options["beta"] = number(batch, KV, T, 1).sigmoid()
    if rule in ("decay", "gated delta"):
        options["log_decay"] = -number(batch, KV, T, 1).abs() * 10 ** draw.uniform(-3, 0)
    sequences = len(starts) - 1 if starts else batch
    options["initial_state"] = number(sequences, KV, d, e + (rule == "mean")).abs()
    options |= {"cu_seqlens": torch.tensor(starts, dtype=torch.int32), "max_seqlen": T} if starts else {}
    inputs, dout = [x.to(dtype) for x in (q, k, v)], number(batch, group * KV, T, e).to(dtype)

    def run(step, device, dtype, number, cut=None):
        """(outputs and last states, gradients); with a cut the tokens in two calls, without gradients."""
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        given = {n: x.to(device, number).requires_grad_() if is_float(x) else x for n, x in options.items()}
        if starts:
            given["cu_seqlens"] = given["cu_seqlens"].to(device)
        if kernels.refusal(step, leaves[0], leaves[2], given.get("beta")):
            return None
        if cut is not None:
            at = lambda x, piece: x[:, :, piece].detach()  # noqa: E731
            tokens = {n: given.pop(n) for n in ("beta", "log_decay") if n in given}
            outs = []
            for piece in (slice(0, cut), slice(cut, T)):
                now = {n: at(x, piece) for n, x in tokens.items()}
                out, given["initial_state"] = la.operator.run(
                    *(at(x, piece) for x in leaves), **given, **now, step=step
                )
                outs.append(out)
            return torch.cat(outs, 2), given["initial_state"]
        out, state = la.operator.run(*leaves, **given, step=step)
        wanted = [*leaves, *(x for x in given.values() if is_float(x))]
        return (out.detach(), state.detach()), torch.autograd.grad(out, wanted, dout.to(device, dtype))

    truth, truth_grads = run("0", "cpu", torch.float64, torch.float64)
    rough, rough_grads = run("0", "cpu", dtype, torch.float32)
    apart = lambda a, b: ((a.double().cpu() - b).norm() / b.norm().clamp(min=1e-30)).item()  # noqa: E731
    case = f"{rule} {dtype} T {T} d {d} {e} heads {KV} x {group} {layout} {starts}"
    for step, device in steps_here():
        found = run(step, device, dtype, torch.float32)
        if found is None:
            continue
        cut = draw.randint(0, T)
        for outs in (found[0], *([] if starts else [run(step, device, dtype, torch.float32, cut)])):
            bound = 2 * apart(rough[0], truth[0]) + 1e-5
            assert apart(outs[0], truth[0]) <= bound, f"step {step}, {case}, {cut}"
            assert apart(outs[1], truth[1]) <= torch.finfo(dtype).eps, f"state, step {step}, {case}, {cut}"
        for i, (a, b, c) in enumerate(zip(found[1], truth_grads, rough_grads, strict=True)):
            bound = 3 * apart(c, b) if i < 3 else torch.finfo(dtype).eps
            bound += 1e-5 + 2.0**-24 * b.numel() ** 0.5 / b.norm().clamp(min=1e-30).item()
            assert apart(a, b) <= bound, f"gradient {i}, step {step}, {case}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_long_sequences_in_segments_equal_the_float64_sum(rule, segments):
    """Many chunks for every step that works by chunks, at the width that they are made for."""
    q, k, v = (torch.randn(1, 2, 1500, 128, dtype=torch.float64, device="cuda").bfloat16() for _ in range(3))
    options = {"scale": 128**-0.5}
    if rule == "mean":
        options |= {"normalised": True, "map_code": 1, "map_scale": 128**-0.25, "scale": 1.0}
    if "delta" in rule:
        k = F.normalize(k.double(), dim=-1).bfloat16()
        options["beta"] = torch.rand(1, 2, 1500, 1, device="cuda")
    if rule in ("decay", "gated delta"):
        options["log_decay"] = F.logsigmoid(torch.randn(1, 2, 1500, 1, device="cuda"))
    truth = kernels.plain(q.double(), k.double(), v.double(), **options)
    for step in ("2", "3", "4"):
        if kernels.refusal(step, q, v, options.get("beta")):
            continue
        for a, b in zip(kernels.launch(step, q, k, v, **options, segment_count=segments)[:2], truth[:2], strict=True):
            error = (a.double() - b).norm() / b.norm()
            assert error < torch.finfo(torch.bfloat16).eps, f"step {step}: error {error:.1e}"


@pytest.mark.skipif(not steps_here(), reason="neither a C++ compiler nor a GPU is here")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("d", [40, 128])
def test_products_past_what_float16_holds_do_not_overflow(rule, d):
    """Products of queries and keys of over 65,504, where float16 ends, with values so small that the sum fits."""
    generator = torch.Generator().manual_seed(d)
    draw = lambda width: torch.randn(1, 2, 300, width, generator=generator)  # noqa: E731
    q, k, v = draw(d).sign() * 100, draw(d).sign() * 100, draw(d) * 1e-4
    options = {"scale": 1.0}
    if rule == "mean":
        q, k, v = q.abs(), k.abs(), v * 1e4
        options["normalised"] = True
    if "delta" in rule:
        q, k = q * 200, k / (100 * d**0.5)
        options["beta"] = draw(1).sigmoid()
    if rule in ("decay", "gated delta"):
        options["log_decay"] = F.logsigmoid(draw(1))
    inputs = [x.half() for x in (q, k, v)]
    assert (inputs[0].double() @ inputs[1].double().mT).abs().max() > 65504
    truth = kernels.plain(*(x.double() for x in inputs), **options)
    for step, device in steps_here():
        on_device = [x.to(device) for x in inputs]
        given = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        if not kernels.refusal(step, on_device[0], on_device[2], given.get("beta")):
            found = kernels.launch(step, *on_device, **given)
            for name, a, b in zip(("out", "state"), found, truth, strict=False):
                error = (a.double().cpu() - b).norm() / b.norm()
                assert error < 2 * torch.finfo(torch.float16).eps, f"step {step}, {name}: error {error:.1e}"


def in_layout(draw, shape, layout):
    """Random numbers whose strides are those of a contiguous, a transposed or a sliced tensor."""
    batch, heads, T, width = shape
    if layout == "tokens first":
        return draw(batch, T, heads, width).transpose(1, 2)
    return draw(batch, heads, T, 2 * width)[..., width:] if layout == "sliced" else draw(*shape)


def is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


@pytest.mark.parametrize("rule", ["sum", "mean", "decay"])
def test_the_kernels_gradients_are_those_of_step_0(rule):
    run, tensors = operator_call(rule, dtype=torch.float32)
    for step, device in steps_here():
        if step in "234":
            continue  # they take halves: the next test
        grads = []
        for name, place in (("0", "cpu"), (step, device)):
            leaves = [x.detach().to(place).requires_grad_() for x in tensors]
            out, state = run(*leaves, step=name)
            grads.append([g.cpu() for g in torch.autograd.grad(out.square().sum() + state.sum(), leaves)])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("d", [40, 128])
@pytest.mark.parametrize("large", ["states", "scores", "values", "small gradients"])
def test_gradients_past_what_float16_holds_do_not_overflow(rule, d, large):
    """What a gradient passes on the way may be past 65,504, where float16 ends, or below 6e-5, where it has few."""
    generator = torch.Generator().manual_seed(d)
    draw = lambda width: torch.randn(1, 2, 300, width, generator=generator)  # noqa: E731
    q, k, v, dout = draw(d), F.normalize(draw(d), dim=-1), draw(d), draw(d)
    initial = torch.randn(1, 2, d, d, generator=generator)
    options = {"scale": 1.0, "initial_state": initial}
    if "delta" in rule:
        options["beta"] = draw(1).sigmoid()
    if rule in ("decay", "gated delta"):
        options["log_decay"] = 0.1 * F.logsigmoid(draw(1))
    if rule == "mean":
        q, k = q.abs(), k.abs()
        options |= {"initial_state": None, "normalised": True}
    if large == "states":
        q, dout = q * 1e-3, dout * 1e-3
        options["initial_state"] = None if rule == "mean" else 3e5 * initial
    elif large == "scores":
        q, k = q.clamp(-2, 2) * 3e4, k * (1 if "delta" in rule else 30)
        options["initial_state"] = None if rule == "mean" else 1e-3 * initial
        if rule == "mean":
            q = 0.1 * q
        else:
            dout, v = dout * 1e-3, v * 1e-3
    elif large == "values":
        v, dout = v * (1e2 if rule == "mean" else 1e3), dout * 1e2
        q, k = (x * (3 if rule == "mean" else 1) for x in (q, k))
        options |= {"initial_state": None, "scale": 1.0 if rule == "mean" else 3e-4}
    else:
        dout = dout * 1e-5
    given = [x.half() for x in (q, k, v)]
    dstate = dout.std() * torch.randn(1, 2, d, d + (rule == "mean"), generator=generator)
    if large == "values":
        dstate[..., :d] *= 1e-2
    grads = []
    for step, device, dtype in [("0", "cpu", torch.float64), *((s, place, torch.float16) for s, place in steps_here())]:
        leaves = [x.to(device, dtype).requires_grad_() for x in given]
        more = {n: x.to(device).requires_grad_() if is_float(x) else x for n, x in options.items()}
        if kernels.refusal(step, leaves[0], leaves[2], more.get("beta")):
            continue
        out, state = la.operator.run(*leaves, **more, step=step)
        wanted = [*leaves, *(x for x in more.values() if is_float(x))]
        given_grads = dout.half().to(device, dtype), dstate.to(state)
        grads.append((step, torch.autograd.grad((out, state), wanted, given_grads)))
    (_, truth), *found = grads
    for step, gradients_of_step in found:
        for i, (a, b) in enumerate(zip(gradients_of_step, truth, strict=True)):
            assert b.abs().max() < 65504, f"gradient {i} itself is past float16: {b.abs().max():.1e}"
            error, spacing = (a.double().cpu() - b).norm(), 2.0**-24 * b.numel() ** 0.5  # of the smallest numbers
            within = 4 * torch.finfo(torch.float16).eps * b.norm() + spacing
            assert error < within, f"step {step}, gradient {i}: {error / b.norm():.1e} of its length"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("width", [64, 128])
def test_the_gradients_on_a_gpu_equal_those_in_float64(rule, width):
    """Inputs of 16 bits, so that tensor cores compute them: sums by the forward's kernel, the others by chunks."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k, v = draw(2, 4, 333, width), draw(2, 2, 333, width), draw(2, 2, 333, width)
    options = {"scale": width**-0.5}
    if rule == "mean":
        options |= {"normalised": True, "feature_map": la.elu_plus_one, "map_scale": width**-0.25, "scale": 1.0}
    if "delta" in rule:
        k = F.normalize(k, dim=-1)
        options["beta"] = draw(2, 2, 333, 1).sigmoid()
    if rule in ("decay", "gated delta"):
        options["log_decay"] = F.logsigmoid(draw(2, 2, 333, 1))
    q, k, v = (x.bfloat16().double() for x in (q, k, v))
    dout = draw(2, 4, 333, width).bfloat16().double()
    grads = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        given = {name: x.to(device).requires_grad_() if is_float(x) else x for name, x in options.items()}
        step = 0 if device == "cpu" else None
        out, _ = la.operator.run(*leaves, **given, step=step)
        wanted = [*leaves, *(x for x in given.values() if isinstance(x, torch.Tensor))]
        grads.append([g.double().cpu() for g in torch.autograd.grad(out, wanted, dout.to(device, dtype))])
    for expected, found in zip(*grads, strict=True):
        error = (found - expected).norm() / expected.norm()
        assert error < 4 * torch.finfo(torch.bfloat16).eps, f"error {error:.1e}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["decay", "delta", "gated delta"])
@pytest.mark.parametrize(
    ("T", "starts", "heads", "dims", "segments"),
    [
        (1, None, (16, 16), (8, 8), 1),
        (64, None, (2, 2), (64, 64), 1),
        (200, None, (4, 2), (128, 64), 2),
        (333, None, (3, 1), (96, 40), 3),
        (700, None, (2, 2), (40, 136), 5),
        (1027, None, (2, 1), (128, 128), 7),
        (2048, None, (16, 16), (128, 128), None),
        (300, [0, 3, 3, 70, 200, 300], (4, 2), (64, 128), 2),
        (700, [0, 1, 65, 129, 700, 700], (2, 2), (128, 128), 4),
    ],
)
def test_the_gradients_by_chunks_equal_those_in_float64(T, starts, heads, dims, segments, rule, dtype):
    """Within the dtype's eps: about three times what it costs to round the result alone."""
    generator = torch.Generator().manual_seed(T)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    (H, KV), (d, e), batch = heads, dims, 1 if starts else 2
    q, k, v, dout = draw(batch, H, T, d), draw(batch, KV, T, d), draw(batch, KV, T, e), draw(batch, H, T, e)
    q, k, v, dout = (x.to(dtype) for x in (q, F.normalize(k, dim=-1), v, dout))
    sequences = len(starts) - 1 if starts else batch
    beta = draw(batch, KV, T, 1).sigmoid() if "delta" in rule else None
    log_decay = None if rule == "delta" else F.logsigmoid(draw(batch, KV, T, 1))
    initial, dfinal = draw(sequences, KV, e, d), draw(sequences, KV, e, d)
    cu_seqlens = torch.tensor(starts, dtype=torch.int32) if starts else None
    length = max(b - a for a, b in pairwise(starts)) if starts else T
    place = lambda x, kind: None if x is None else x.to("cuda", kind)  # noqa: E731
    wide = [place(x, torch.float64) for x in (dout, dfinal, q, k, v, log_decay, beta, initial)]
    truth = gradients.chunk_gradients(*wide, cu_seqlens, length, d**-0.5)
    narrow = [place(x, dtype) for x in (dout, q, k, v)], [place(x, torch.float32) for x in (log_decay, beta)]
    (dout, q, k, v), numbers = narrow
    states = [place(x, torch.float32) for x in (dfinal, initial)]
    on_gpu = None if cu_seqlens is None else cu_seqlens.cuda()
    dq, *rest = backward.run_backward(dout, states[0], q, k, v, *numbers, states[1], on_gpu, length, d**-0.5, segments)
    found = [dq, *(None if x is None else gradients.from_heads(x.float(), H // KV) for x in rest)]
    for name, a, b in zip(("q", "k", "v", "log_decay", "beta", "initial"), found, truth, strict=True):
        if b is None or (name == "log_decay" and rule == "delta"):
            continue
        assert a.isfinite().all(), name
        error = (a.double() - b).norm() / b.norm()
        assert error < torch.finfo(dtype).eps, f"d{name}: error {error:.1e}"


def test_the_shared_memory_that_the_gradients_ask_for_is_what_the_kernel_takes():
    source = (jit.kernels_folder() / "linear_attention" / "backward.cu").read_text()
    for width, size in backward.SHARED_BYTES.items():
        assert f"ChunkLayout<{width}>::BYTES == {size}" in source


class CallsOfOperator(torch.overrides.TorchFunctionMode):
    """Keeps the arguments that the operator is called with."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.tformer_lab.linear_attention:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


# ---- refusals


@pytest.mark.parametrize("form", [la.attend, la.parallel, la.associative, la.recurrent, la.chunked])
def test_wrong_inputs_are_refused_by_name(form):
    q, k, v = make(7)
    with pytest.raises(ValueError, match="q has 3 heads, which 2 kv heads do not divide"):
        form(q[:, :3], k, v)
    with pytest.raises(ValueError, match="share a dtype"):
        form(q, k.double(), v)
    with pytest.raises(ValueError, match=r"scale must be positive.*got -1"):
        form(q, k, v, scale=-1.0)


def test_a_mask_that_depends_on_the_query_is_refused():
    q, k, v = make(7)
    for mask in (torch.ones(7, 7, dtype=torch.bool), torch.ones(2, 4, 1, 7, dtype=torch.bool)):
        for causal in (True, False):
            with pytest.raises(ValueError, match=r"expected a mask that broadcasts to \(batch, 1, 1, S\), got"):
                la.attend(q, k, v, mask=mask, causal=causal)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: la.attend(q, k, v, causal=True, chunk=0), "chunk must be at least 1, got 0"),
        (lambda q, k, v: la.gated_attend(q, k, v, log_decay=torch.zeros(1, 1, 1, 1), chunk=0), "chunk must be"),
        (lambda q, k, v: la.gated_attend(q, k, v, log_decay=torch.ones(1, 1, 1, 1)), "at most 0.*got 1"),
        (lambda q, k, v: la.gated_attend(q[:, :, :3], k, v, log_decay=torch.zeros(1, 1, 1, 1)), "got 3 and 7"),
        (lambda q, k, v: la.attend(q, k, v, feature_map=la.RandomFeatures(4, 8)), "drawn for head_dim 4, got 8"),
        (lambda q, k, v: la.RandomFeatures(8, 0), "at least 1, got 8 and 0"),
        (lambda q, k, v: la.gated_attend(q, k, v, log_decay=-1.0), "must be a tensor .* got float"),
        (lambda q, k, v: la.delta_attend(q, k, v, beta=0.5), "beta must be a tensor .* got float"),
        (lambda q, k, v: la.delta_attend(q, k, v, beta=torch.ones(2, 3, 7, 1)), r"broadcast to .*\(2, 2, 7, 1\)"),
        (lambda q, k, v: la.delta_attend(q[:, :, :3], k, v, beta=torch.ones(1, 1, 1, 1)), "got 3 and 7"),
        (lambda q, k, v: la.GatedState().attend(q, k, v), "needs log_decay, or beta"),
        (lambda q, k, v: la.attend(q, k, v, causal=True, step=9), "step must be one of 0, cpu, 1, 2, 3, 4, got 9"),
        (lambda q, k, v: la.attend(q, k, v, causal=True, step=2), "step 2 cannot do this: .*head_dim|runs on cuda"),
        (lambda q, k, v: la.attend(q, k, v, causal=True, feature_map=la.taylor, step=2), "step 2 cannot do this"),
        (
            lambda q, k, v: la.gated_attend(
                q, k, v, log_decay=torch.zeros(1, 1, 1, 1), cu_seqlens=torch.tensor([0, 7], dtype=torch.int32)
            ),
            "packed sequences lie in one batch row, got a batch of 2",
        ),
        (lambda q, k, v: la.retention_log_decay(0), "heads must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(*make(7))


@pytest.mark.skipif(not jit.can_build_cpp(), reason="needs a C++ compiler and ninja")
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("gate_gradient", [False, True])
def test_a_scale_of_zero_leaves_the_gradients_of_the_state(delta, gate_gradient):
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (1, 4, 70, 8), "k": (1, 2, 70, 8), "v": (1, 2, 70, 8), "initial_state": (1, 2, 8, 8)}
    x = {name: (torch.randn(shape, generator=generator) * 0.3).requires_grad_() for name, shape in shapes.items()}
    gates = (-torch.rand(1, 2, 70, 1, generator=generator)).requires_grad_(gate_gradient)
    more = {"beta": torch.full((1, 2, 70, 1), 0.5)} if delta else {}
    form = la.delta_attend if delta else la.gated_attend
    leaves = [*x.values(), *([gates] if gate_gradient else [])]

    def gradients(step):
        out, state = form(**x, log_decay=gates, scale=0.0, step=step, return_state=True, **more)
        return torch.autograd.grad(out.sum() + state.square().sum(), leaves)

    for ours, plain in zip(gradients("cpu"), gradients(None), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
