"""Every step of the flash-attention ladder that this machine can run, against plain float64 attention."""

import itertools
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from benchmarks.harness import edited_kernel
from tformer_lib import jit, masks, profiling
from tformer_lib.attention import attend_scores
from tformer_lib.flash_attention import (
    GRADIENTS,
    RUNGS,
    flash_attention,
    flash_attention_float8,
    flash_attention_qkvpacked,
    flash_attention_varlen,
    hadamard_rotation,
    merge_states,
    plans,
    quantize_float8,
)

HAS_CPU_TWIN = jit.can_build_cpp()
HAS_GPU = torch.cuda.is_available()
ON_HOPPER = HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
HALVES = (torch.bfloat16, torch.float16)


def backends():
    """(step, device, dtype) of everything that runs here."""
    found = [(0, "cpu", torch.float32)]
    if HAS_CPU_TWIN:
        found += [("cpu", "cpu", dtype) for dtype in (torch.float32, torch.bfloat16)]
    if HAS_GPU:
        found += [(step, "cuda", torch.float32) for step in (1, 2)]
        tops = ("3", "4") if ON_HOPPER else ("3",)
        found += [(int(step), "cuda", dtype) for step in tops for dtype in HALVES]
        found += [(rung, "cuda", torch.bfloat16) for step in tops for rung in RUNGS[step]]
    return [pytest.param(*x, id=f"step{x[0]}-{x[1]}-{str(x[2])[6:]}") for x in found]


every_backend = pytest.mark.parametrize(("step", "device", "dtype"), backends())
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
needs_cpu_twin = pytest.mark.skipif(not HAS_CPU_TWIN, reason="needs a C++ compiler and ninja")


def plain(q, k, v, *, causal=False, window=None, mask=None, scale=None, softcap=None, alibi_slopes=None, bias=None):
    """Textbook attention and log-sum-exp, in the precision of its inputs; zeros for a query that sees nothing."""
    T, S, heads = q.shape[2], k.shape[2], q.shape[1]
    position = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)  # query - key
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    seen = torch.ones(1, 1, T, S, dtype=torch.bool, device=q.device) if mask is None else mask
    if isinstance(window, tuple):
        left, right = (math.inf if side is None else side for side in window)
        seen = seen & (position <= left) & (-position <= right)
        window = None
    if causal or window:
        seen = seen & masks.causal(T, S, device=q.device)
    if window:
        seen = seen & masks.sliding_window(T, S, window=window, device=q.device)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - (alibi_slopes[..., None, None] * position.abs()).to(scores.dtype)
    if bias is not None:
        scores = scores + bias.masked_fill(bias == -math.inf, 0.0).to(scores.dtype)
        seen = seen & (bias > -math.inf)
    some = seen.any(-1, keepdim=True)
    probabilities = scores.masked_fill(~seen & some, -math.inf).softmax(-1) * some
    lse = scores.masked_fill(~seen, -math.inf).logsumexp(-1)
    return probabilities.to(q.dtype) @ v, lse


def inputs(shape, dtype, device, *, seed=0, grad=False):
    """q, k and v of (batch, heads, kv_heads, T, S, head_dim), or with v's own width behind these."""
    batch, heads, kv_heads, T, S, d, *value_dim = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, T, d), (kv_heads, S, d), (kv_heads, S, *(value_dim or [d])))
    made = (torch.randn(batch, *size, generator=generator) for size in sizes)
    return [x.to(device, dtype).requires_grad_(grad) for x in made]


def doubles(*tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def assert_close(got, exact, low, *, factor):
    """The error is at most ``factor`` times that of plain attention in the same precision, plus a few roundings."""
    assert torch.isfinite(got).all()
    if got.numel() == 0:
        return
    error, allowed = ((x.double() - exact).abs().max().item() for x in (got, low))
    rounding = 1e-6 * max(30.0, exact.abs().max().item())  # where terms as large as 30 cancel, float32 leaves this
    assert error <= factor * allowed + rounding


def check_against_plain(shape, dtype, device, step, *, backward=False, deterministic=False, **options):
    q, k, v = inputs(shape, dtype, device, grad=backward)
    out, lse = flash_attention(q, k, v, step=step, return_lse=True, deterministic=deterministic, **options)
    exact_inputs = doubles(q, k, v)
    exact, exact_lse = plain(*exact_inputs, **options)
    low, _ = plain(q, k, v, **options)
    assert out.shape == (*q.shape[:3], v.shape[-1])
    assert out.dtype == q.dtype
    assert_close(out, exact, low, factor=2)
    empty = exact_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    assert out[empty].abs().sum() == 0
    torch.testing.assert_close(lse[~empty].double(), exact_lse[~empty], rtol=1e-4, atol=1e-4)
    if backward:
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        got = torch.autograd.grad(out, (q, k, v), dout)
        exact_grads = torch.autograd.grad(exact, exact_inputs, dout.double())
        low_grads = torch.autograd.grad(low, (q, k, v), dout)
        for got_grad, exact_grad, low_grad in zip(got, exact_grads, low_grads, strict=True):
            assert_close(got_grad, exact_grad, low_grad, factor=3)


LENGTHS = [(1, 1), (1, 239), (3, 799), (113, 203), (127, 512), (239, 1), (799, 3), (129, 128), (257, 385)]


@every_backend
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(step, device, dtype, lengths, causal):
    check_against_plain((2, 2, 1, *lengths, 64), dtype, device, step, backward=True, causal=causal)


@every_backend
@pytest.mark.parametrize("head_dim", [8, 32, 40, 64, 80, 96, 128, 160, 192, 224, 256])
def test_head_dims(step, device, dtype, head_dim):
    check_against_plain((1, 2, 2, 150, 190, head_dim), dtype, device, step, backward=True, causal=True)
    check_against_plain((1, 2, 1, 200, 190, head_dim), dtype, device, step)


@every_backend
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("lengths", [(300, 40), (140, 300)], ids=str)
def test_more_tiles_than_multiprocessors(step, device, dtype, lengths, head_dim):
    """Blocks go from tile to tile, some of which see no key, and others one tile of keys alone."""
    batch = 25 if device == "cuda" else 2  # more heads than a GPU has multiprocessors, or a CPU a few cores
    check_against_plain((batch, 8, 2, *lengths, head_dim), dtype, device, step, causal=True)
    q, k, v = inputs((1, 4, 2, 40 * lengths[0], 40 * lengths[1], head_dim), dtype, device)
    cu_q, cu_k = (torch.arange(41, dtype=torch.int32, device=device) * n for n in lengths)
    for cu in (cu_q, cu_k):
        cu[10:20] = cu[10]  # ten sequences without queries or keys, and a long one behind them
    packed = (x[0].transpose(0, 1) for x in (q, k, v))
    longest = [11 * n for n in lengths]
    out = flash_attention_varlen(*packed, cu_q, cu_k, *longest, causal=True, step=step).transpose(0, 1)
    for i in (0, 9, 12, 19, 20, 39):
        (a, b), (c, d) = cu_q[i : i + 2], cu_k[i : i + 2]
        exact, _ = plain(*doubles(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d]), causal=True)
        low, _ = plain(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], causal=True)
        assert_close(out[None, :, a:b], exact, low, factor=2)


@needs_gpu
@pytest.mark.parametrize("room", [100, 164], ids=["sm_89", "sm_80"])
def test_gradients_where_shared_memory_is_small(room):
    """Tiles and buffers for a GPU with that many KB of shared memory a multiprocessor."""
    edit = [("(Sh::SHARED_BYTES + 1024) <= bytes", f"(Sh::SHARED_BYTES + 1024) <= {room} * 1024")]
    with edited_kernel("flash_attention/backward_3_tensor_core.cuh", edit):
        for d, repeats in itertools.product((40, 64, 120, 128, 256), (False, True)):
            shape, options = (2, 4, 2, 150, 190, d), {"causal": True, "deterministic": repeats}
            check_against_plain(shape, torch.bfloat16, "cuda", 3, backward=True, **options)


@needs_cpu_twin
def test_the_twin_takes_float16():
    check_against_plain((1, 2, 1, 130, 170, 40), torch.float16, "cpu", "cpu", backward=True, causal=True)


@every_backend
def test_many_keys(step, device, dtype):
    if device == "cpu":
        pytest.skip("the tiles of a CPU do not depend on the number of keys")
    check_against_plain((1, 2, 1, 270, 8500, 128), dtype, device, step, causal=True)
    check_against_plain((1, 2, 1, 140, 8500, 128), dtype, device, step, window=5000)


@pytest.mark.parametrize("head_dim", [1, 59, 111])
@pytest.mark.parametrize("step", [0, pytest.param("cpu", marks=needs_cpu_twin)])
def test_odd_head_dims(step, head_dim):
    check_against_plain((1, 2, 2, 70, 90, head_dim), torch.float32, "cpu", step, backward=True)


@every_backend
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_kv_head_ratios(step, device, dtype, kv_heads):
    check_against_plain((2, 6, kv_heads, 133, 170, 64), dtype, device, step, backward=True, causal=True)


@every_backend
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 200, 1000])
def test_windows(step, device, dtype, window):
    check_against_plain((1, 2, 1, 300, 410, 128), dtype, device, step, backward=True, window=window)
    check_against_plain((1, 2, 1, 333, 60, 64), dtype, device, step, backward=True, window=window)


EDGES = [{"causal": True}, *({"window": w} for w in (64, 129, 193, 320, (100, 60), (128, 191), (0, 64), (300, None)))]


@every_backend
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("options", EDGES, ids=str)
def test_ends_of_what_is_seen(step, device, dtype, options, head_dim):
    """Rows that see a part of a tile of keys at one end of their sight, or at both, in every order of such tiles."""
    batch = 5 if device == "cuda" else 1  # more tiles of rows than multiprocessors: a block goes from one to the next
    for T, S in ((449, 449), (190, 460), (400, 130)):
        check_against_plain((batch, 8, 2, T, S, head_dim), dtype, device, step, **options)
    lengths = [64, 65, 128, 1, 449, 0, 190, 320]
    starts = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    q, k, v = inputs((1, 8, 2, sum(lengths), sum(lengths), head_dim), dtype, device)
    rows = (x[0].transpose(0, 1) for x in (q, k, v))
    out = flash_attention_varlen(*rows, starts, starts, 449, 449, step=step, **options).transpose(0, 1)
    for a, b in itertools.pairwise(starts.tolist()):
        part = [x[:, :, a:b] for x in (q, k, v)]
        assert_close(out[None, :, a:b], plain(*doubles(*part), **options)[0], plain(*part, **options)[0], factor=2)


@every_backend
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_what_is_left_of_a_gradient_that_is_zero(step, device, dtype, head_dim):
    """A query that sees one key has P = 1: out is that value, and dP - delta the difference of two equal sums."""
    q, k, v = inputs((2, 4, 2, 90, 90, head_dim), dtype, device, grad=True)
    out = flash_attention(q, k, v, window=1, step=step)
    torch.testing.assert_close(out, v.repeat_interleave(2, 1), rtol=0, atol=0)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    terms = (dout.double() * out.double()).abs().sum(-1).max().item()  # of the sums
    left = 2**-20 * terms * head_dim**-0.5
    assert dq.abs().max() <= left * k.abs().max()
    assert dk.abs().max() <= 2 * left * q.abs().max()  # of two heads
    expected = dout.double().unflatten(1, (2, 2)).sum(2)
    # P = exp(score - lse) is 1 to a few roundings of a score, which may be as large as 30
    torch.testing.assert_close(dv.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@every_backend
@pytest.mark.parametrize("window", [(0, 0), (5, 0), (0, 7), (63, 64), (None, 30), (100, None), (None, None), (1000, 3)])
def test_two_sided_windows(step, device, dtype, window):
    check_against_plain((1, 2, 1, 300, 410, 64), dtype, device, step, backward=True, window=window)
    check_against_plain((1, 4, 2, 333, 60, 128), dtype, device, step, backward=True, window=window)
    check_against_plain((1, 2, 1, 130, 140, 40), dtype, device, step, window=window, causal=True)


def forms():
    """The backends that cap scores, add a bias to them, and take values of another width."""
    return [x for x in backends() if x.values[0] in (0, "cpu", 3, 4)]


every_form = pytest.mark.parametrize(("step", "device", "dtype"), forms())


@every_form
@pytest.mark.parametrize("softcap", [0.5, 3.0, 50.0])
def test_softcap(step, device, dtype, softcap):
    for d, options in ((64, {}), (128, {"causal": True}), (160, {"window": 60}), (40, {"scale": -0.7})):
        check_against_plain((2, 2, 1, 200, 270, d), dtype, device, step, backward=True, softcap=softcap, **options)


@every_form
def test_scores_far_beyond_the_soft_cap_are_the_cap(step, device, dtype):
    q, k, v = (x.detach() for x in inputs((1, 2, 1, 40, 70, 64), dtype, device))
    q, k = q.abs() + 0.1, (k.abs() + 0.1) * torch.tensor([1, -1], device=device, dtype=dtype).repeat(35)[:, None]
    for softcap in (0.5, 30.0):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = flash_attention(*leaves, scale=1000.0, softcap=softcap, step=step, return_lse=True)
        exact_inputs = doubles(*leaves)
        exact, exact_lse = plain(*exact_inputs, scale=1000.0, softcap=softcap)
        torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)
        dq, dk, dv = torch.autograd.grad(out, leaves, torch.ones_like(out))
        *_, exact_dv = torch.autograd.grad(exact, exact_inputs, torch.ones_like(exact))
        if device == "cpu":  # a GPU's tanh is right to 2e-6
            assert not dq.any()
            assert not dk.any()
        torch.testing.assert_close(dv.double(), exact_dv, rtol=0.02, atol=0.02)


@every_form
@pytest.mark.parametrize("slopes", [(4,), (2, 4)], ids=["one a head", "one a head and sequence"])
def test_alibi(step, device, dtype, slopes):
    slopes = (2.0 ** -torch.arange(1.0, 1 + math.prod(slopes))).reshape(slopes).to(device)
    for d, options in ((64, {}), (128, {"causal": True}), (64, {"softcap": 2.0}), (192, {"window": (50, 20)})):
        shape = (2, 4, 2, 200, 270, d)
        check_against_plain(shape, dtype, device, step, backward=True, alibi_slopes=slopes, **options)
    check_against_plain((2, 4, 2, 270, 133, 80), dtype, device, step, backward=True, alibi_slopes=slopes)


BIASES = {  # shapes that broadcast to (batch, heads, T, S) = (2, 4, 200, 270)
    "a number for each pair": ((200, 270), torch.float32),
    "a number for each head and key": ((4, 1, 270), torch.float16),
    "a number for each sequence and query": ((2, 1, 200, 1), torch.bfloat16),
    "a number for everything": ((2, 4, 200, 270), torch.float64),
}


@every_form
@pytest.mark.parametrize("kind", BIASES)
def test_bias(step, device, dtype, kind):
    shape, bias_dtype = BIASES[kind]
    bias = (2 * torch.randn(shape, generator=torch.Generator().manual_seed(3))).to(device, bias_dtype)
    if shape[-1] == 270:
        bias[..., 7] = -math.inf  # nobody sees key 7
        if shape[-2] == 200:
            bias[..., 3, :] = -math.inf  # query 3 sees nothing
    for d, options in ((64, {}), (128, {"causal": True}), (64, {"softcap": 2.0}), (160, {"window": (50, 20)})):
        size = (2, 4, 2, 200, 270, d)
        check_against_plain(size, dtype, device, step, backward=True, bias=bias, **options)
    given = bias.mT.contiguous().mT if bias.dim() > 1 else bias  # the same numbers, laid out by columns
    q, k, v = inputs((2, 4, 2, 200, 270, 64, 40), dtype, device)
    torch.testing.assert_close(
        flash_attention(q, k, v, bias=given, step=step), flash_attention(q, k, v, bias=bias, step=step), rtol=0, atol=0
    )


@every_form
@pytest.mark.parametrize("kind", BIASES)
def test_a_bias_has_a_gradient(step, device, dtype, kind):
    shape, bias_dtype = BIASES[kind]
    q, k, v = inputs((2, 4, 2, 200, 270, 64), dtype, device, grad=True)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(device, bias_dtype).requires_grad_()
    leaves = (q, k, v, bias)
    exact_leaves = doubles(*leaves)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    options = {"causal": True, "softcap": 3.0}
    got = torch.autograd.grad(flash_attention(q, k, v, bias=bias, step=step, **options), leaves, dout)
    exact_out, _ = plain(*exact_leaves[:3], bias=exact_leaves[3], **options)
    exact = torch.autograd.grad(exact_out, exact_leaves, dout.double())
    low_leaves = [x.detach().requires_grad_() for x in leaves]
    low_out, _ = plain(*low_leaves[:3], bias=low_leaves[3], **options)
    for got_grad, exact_grad, low_grad in zip(got, exact, torch.autograd.grad(low_out, low_leaves, dout), strict=True):
        assert got_grad.dtype == low_grad.dtype
        assert_close(got_grad, exact_grad, low_grad, factor=3)


@every_form
@pytest.mark.parametrize("dims", [(192, 128), (64, 128), (128, 40), (40, 64), (256, 8), (8, 256), (136, 96)], ids=str)
def test_values_of_another_width(step, device, dtype, dims):
    shape = (2, 4, 2, 200, 270, *dims)
    check_against_plain(shape, dtype, device, step, backward=True)
    check_against_plain(shape, dtype, device, step, backward=True, causal=True)
    slopes = torch.tensor([0.5, 0.1, 0.01, 0.0], device=device)
    check_against_plain(shape, dtype, device, step, backward=True, softcap=3.0, alibi_slopes=slopes, window=(70, None))


@every_form
def test_packed_sequences_of_every_form(step, device, dtype):
    cu_q, cu_k = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1, 131, 131, 431], [0, 60, 61, 81, 500])
    )
    slopes = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)).to(device)
    generator = torch.Generator().manual_seed(2)
    sizes = ((431, 4, 64), (500, 2, 64), (500, 2, 128))
    leaves = [torch.randn(size, generator=generator).to(device, dtype).requires_grad_() for size in sizes]
    for options in ({"softcap": 2.0}, {"window": (30, 50)}, {"causal": True, "softcap": 5.0, "window": (70, None)}):
        out = flash_attention_varlen(*leaves, cu_q, cu_k, alibi_slopes=slopes, step=step, **options)
        dout = torch.randn(out.shape, generator=generator).to(device, dtype)
        grads = torch.autograd.grad(out, leaves, dout)
        for i, (a, b, c, e) in enumerate(zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True)):
            cuts = (slice(a, b), slice(c, e), slice(c, e))
            part = [x[cut][None].transpose(1, 2).detach().requires_grad_() for x, cut in zip(leaves, cuts, strict=True)]
            alone = flash_attention(*part, alibi_slopes=slopes[i], step=0, **options)
            alone_grads = torch.autograd.grad(alone, part, dout[a:b][None].transpose(1, 2))
            tolerance = 2e-5 if dtype == torch.float32 else 4e-2
            torch.testing.assert_close(out[a:b], alone[0].transpose(0, 1), rtol=tolerance, atol=tolerance)
            for x, cut, y in zip(grads, cuts, alone_grads, strict=True):
                torch.testing.assert_close(x[cut], y[0].transpose(0, 1), rtol=tolerance, atol=tolerance)


@needs_gpu
def test_a_step_names_the_form_that_it_lacks():
    q, k, v = inputs((1, 2, 2, 5, 6, 64), torch.bfloat16, "cuda")
    with pytest.raises(ValueError, match=r"step 3b cannot do this: it does not cap scores"):
        flash_attention(q, k, v, softcap=2.0, step="3b")
    with pytest.raises(ValueError, match=r"step 3b cannot do this: it adds no bias"):
        flash_attention(q, k, v, alibi_slopes=torch.ones(2, device="cuda"), step="3b")
    with pytest.raises(ValueError, match=r"step 3b cannot do this: it takes values of head_dim 64 alone, got 32"):
        flash_attention(q, k, v[..., :32], step="3b")


@every_backend
@pytest.mark.parametrize("scale", [0.37, -0.2, 0.0])
def test_scale(step, device, dtype, scale):
    check_against_plain((1, 2, 2, 100, 130, 64), dtype, device, step, backward=True, scale=scale, causal=True)


@every_backend
def test_large_scores_do_not_overflow(step, device, dtype):
    q, k, v = inputs((1, 1, 1, 64, 300, 64), dtype, device)
    out = flash_attention(q * 100, k, v, step=step)
    exact, _ = plain(*doubles(q * 100, k, v))
    low, _ = plain(q * 100, k, v)
    assert_close(out, exact, low, factor=2)


@every_backend
def test_strided_inputs_need_no_copy_to_be_right(step, device, dtype):
    qkv = torch.randn(2, 150, 3, 4, 64, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (batch, T, 3, heads, d) -> three of (batch, heads, T, d)
    expected = flash_attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True, step=step)
    torch.testing.assert_close(flash_attention(q, k, v, causal=True, step=step), expected, rtol=0, atol=0)
    shifted = torch.empty(2 * 4 * 150 * 64 + 1, device=device, dtype=dtype)[1:].view(2, 4, 150, 64).copy_(q)
    torch.testing.assert_close(flash_attention(shifted, k, v, causal=True, step=step), expected, rtol=0, atol=0)
    columns = q.mT.contiguous().mT
    torch.testing.assert_close(flash_attention(columns, k, v, causal=True, step=step), expected, rtol=0, atol=0)
    one = k[:, :1].expand(2, 4, 150, 64)
    expected = flash_attention(q, one.contiguous(), one.contiguous(), step=step)
    torch.testing.assert_close(flash_attention(q, one, one, step=step), expected, rtol=0, atol=0)


@every_backend
def test_future_tokens_change_nothing(step, device, dtype):
    q, k, v = inputs((1, 2, 1, 200, 200, 64), dtype, device)
    before = flash_attention(q, k, v, causal=True, step=step)
    k[:, :, 150:], v[:, :, 150:] = 7.0, -7.0
    after = flash_attention(q, k, v, causal=True, step=step)
    assert torch.equal(before[:, :, :150], after[:, :, :150])
    assert not torch.equal(before[:, :, 150:], after[:, :, 150:])


@every_backend
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 40}], ids=str)
def test_packed_sequences(step, device, dtype, options):
    lengths_q, lengths_k = [5, 0, 130, 1, 77, 3], [9, 4, 100, 0, 300, 3]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int().to(device) for n in (lengths_q, lengths_k))
    generator = torch.Generator().manual_seed(5)
    sizes = ((int(cu_q[-1]), 4), (int(cu_k[-1]), 2), (int(cu_k[-1]), 2))
    q, k, v = (torch.randn(n, h, 64, generator=generator).to(device, dtype).requires_grad_() for n, h in sizes)
    out, lse = flash_attention_varlen(q, k, v, cu_q, cu_k, step=step, return_lse=True, **options)
    dout = torch.randn(out.shape, generator=generator).to(device, dtype)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        part = [x[None].transpose(1, 2).detach().requires_grad_() for x in (q[a:b], k[c:d], v[c:d])]
        alone, alone_lse = flash_attention(*part, step=0, return_lse=True, **options)
        alone_grads = torch.autograd.grad(alone, part, dout[a:b][None].transpose(1, 2))
        tolerance = 2e-5 if dtype == torch.float32 else 4e-2
        torch.testing.assert_close(out[a:b], alone[0].transpose(0, 1), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse[:, a:b], alone_lse[0], rtol=1e-4, atol=1e-4)
        for x, rows, y in zip(grads, ((a, b), (c, d), (c, d)), alone_grads, strict=True):
            torch.testing.assert_close(x[slice(*rows)], y[0].transpose(0, 1), rtol=tolerance, atol=tolerance)


@every_backend
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_a_packed_neighbour_of_nan_does_not_leak(step, device, dtype, head_dim, causal):
    cu = torch.tensor([0, 70, 150, 200], dtype=torch.int32, device=device)
    q, k, v, dout = (torch.randn(200, 2, head_dim).to(device, dtype) for _ in range(4))
    for x in (q, k, v, dout):
        x[:70], x[150:] = math.nan, math.nan
        x.requires_grad_()
    out, lse = flash_attention_varlen(q, k, v, cu, cu, causal=causal, step=step, return_lse=True)
    assert torch.isfinite(out[70:150]).all()
    assert torch.isfinite(lse[:, 70:150]).all()
    grads = torch.autograd.grad(out, (q, k, v), dout)
    assert all(torch.isfinite(x[70:150]).all() for x in grads)


@every_backend
def test_packed_sequences_of_every_width(step, device, dtype):
    cu_q, cu_k = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1, 131, 131, 431], [0, 60, 61, 81, 500])
    )
    for d in (32, 128, 160, 256):
        q, k, v = (torch.randn(n, h, d).to(device, dtype) for n, h in ((431, 4), (500, 2), (500, 2)))
        for options in ({}, {"causal": True}, {"window": 70}):
            out, lse = flash_attention_varlen(q, k, v, cu_q, cu_k, step=step, return_lse=True, **options)
            for a, b, c, e in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
                part = [x[None].transpose(1, 2) for x in (q[a:b], k[c:e], v[c:e])]
                alone, alone_lse = flash_attention(*part, step=step, return_lse=True, **options)
                tolerance = 2e-5 if dtype == torch.float32 else 1e-2
                torch.testing.assert_close(out[a:b], alone[0].transpose(0, 1), rtol=tolerance, atol=tolerance)
                torch.testing.assert_close(lse[:, a:b], alone_lse[0], rtol=1e-4, atol=1e-4)


@every_backend
def test_gradient_of_lse(step, device, dtype):
    q, k, v = inputs((1, 2, 2, 65, 90, 64), dtype, device, grad=True)
    exact_inputs = doubles(q, k, v)
    _, lse = flash_attention(q, k, v, step=step, return_lse=True)
    _, exact = plain(*exact_inputs)
    _, low = plain(q, k, v)
    weights = torch.linspace(-1, 1, 65, device=device)
    got = torch.autograd.grad((lse * weights).sum(), (q, k))
    expected = torch.autograd.grad((exact * weights.double()).sum(), exact_inputs[:2])
    low_grads = torch.autograd.grad((low.float() * weights).sum(), (q, k))
    for a, b, c in zip(got, expected, low_grads, strict=True):
        assert_close(a, b, c, factor=3)


@every_backend
def test_empty_inputs(step, device, dtype):
    q, k, v = inputs((2, 2, 2, 5, 0, 64), dtype, device)
    out, lse = flash_attention(q, k, v, step=step, return_lse=True)
    assert out.abs().sum() == 0
    assert (lse == -math.inf).all()
    q, k, v = inputs((2, 2, 2, 0, 5, 64), dtype, device)
    assert flash_attention(q, k, v, step=step).shape == (2, 2, 0, 64)
    q, k, v = inputs((0, 2, 2, 4, 5, 64), dtype, device)
    assert flash_attention(q, k, v, step=step).shape == (0, 2, 4, 64)


@every_backend
def test_forward_is_deterministic(step, device, dtype):
    q, k, v = inputs((2, 4, 2, 300, 300, 64), dtype, device)
    first = flash_attention(q, k, v, causal=True, step=step)
    assert all(torch.equal(first, flash_attention(q, k, v, causal=True, step=step)) for _ in range(3))


@every_backend
def test_backward_can_be_deterministic(step, device, dtype):
    q, k, v = inputs((2, 4, 2, 500, 500, 64), dtype, device, grad=True)

    def grads():
        out = flash_attention(q, k, v, causal=True, step=step, deterministic=True)
        return torch.autograd.grad(out.sum(), (q, k, v))

    first = grads()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, grads(), strict=True))


@every_backend
def test_opcheck_and_compile(step, device, dtype):
    torch.compiler.reset()  # else torch counts every case as a recompilation of the same function
    q, k, v = inputs((1, 4, 2, 70, 90, 64), dtype, device, grad=True)
    options = (None, None, None, 70, 90, True, 0, 0.125, str(step), False)
    torch.library.opcheck(torch.ops.tformer_lab.flash_attention, (q, k, v, *options))
    compiled = torch.compile(
        lambda *x: flash_attention(*x, causal=True, step=step) * 2, fullgraph=True, backend="aot_eager"
    )
    out = compiled(q, k, v)
    expected = flash_attention(q, k, v, causal=True, step=step) * 2
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for a, b in zip(
        torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@every_form
def test_opcheck_and_compile_of_every_form(step, device, dtype):
    torch.compiler.reset()
    q, k, v = inputs((1, 4, 2, 70, 90, 64, 32), dtype, device, grad=True)
    slopes = torch.tensor([0.5, 0.1, 0.01, 0.0], device=device)
    given = (None, None, None, 70, 90, False, 21, 0.125, str(step), False, False, 30, 2.0, slopes)
    torch.library.opcheck(torch.ops.tformer_lab.flash_attention, (q, k, v, *given))
    options = {"window": (20, 30), "softcap": 2.0, "alibi_slopes": slopes, "step": step}
    compiled = torch.compile(lambda *x: flash_attention(*x, **options), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), flash_attention(q, k, v, **options), rtol=0, atol=0)
    bias = torch.randn(4, 1, 90, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.tformer_lab.flash_attention, (q, k, v, *given, bias))
    compiled = torch.compile(
        lambda *x: flash_attention(*x[:3], bias=x[3], **options), fullgraph=True, backend="aot_eager"
    )
    leaves = (q, k, v, bias)
    outs = [attend(*leaves) for attend in (compiled, lambda *x: flash_attention(*x[:3], bias=x[3], **options))]
    torch.testing.assert_close(*outs, rtol=0, atol=0)
    for got, expected in zip(*(torch.autograd.grad(out.sum(), leaves) for out in outs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


@every_backend
@pytest.mark.parametrize("shape", [(2, 4, 2, 70, 64), (1, 3, 3, 130, 128), (2, 6, 1, 1, 40)], ids=str)
def test_queries_keys_and_values_of_one_tensor(step, device, dtype, shape):
    batch, heads, kv_heads, T, head_dim = shape
    torch.manual_seed(0)
    qkv = torch.randn(batch, T, heads + 2 * kv_heads, head_dim, device=device, dtype=dtype, requires_grad=True)
    dout = torch.randn(batch, T, heads, head_dim, device=device, dtype=dtype)
    for options in ({}, {"causal": True, "scale": -0.3}, {"window": 20}):
        out = flash_attention_qkvpacked(qkv, heads, step=step, **options)
        assert out.is_contiguous()
        q, k, v = qkv.transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)
        expected = flash_attention(q, k, v, step=step, **options).transpose(1, 2)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        got, wanted = (torch.autograd.grad(x, qkv, dout)[0] for x in (out, expected))
        assert got.is_contiguous()
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
        torch.testing.assert_close(got, wanted, **close)  # on a GPU, dq is summed in another order each time
    options = (True, 0, 0.125, str(step), False, -1)
    torch.library.opcheck(torch.ops.tformer_lab.flash_attention_qkvpacked, (qkv, heads, *options))
    with pytest.raises(ValueError, match="heads are not"):
        flash_attention_qkvpacked(qkv, heads + 1)


@every_backend
def test_states_of_parts_merge_to_the_whole(step, device, dtype):
    q, k, v = inputs((2, 4, 2, 70, 130, 64), dtype, device)
    exact, exact_lse = plain(*doubles(q, k, v))
    cuts = (0, 50, 50, 51, 130)  # an empty part and a part of one key among them
    parts = [
        flash_attention(q, k[:, :, a:b], v[:, :, a:b], step=step, return_lse=True) for a, b in itertools.pairwise(cuts)
    ]
    out, lse = merge_states(*zip(*parts, strict=True))
    assert out.dtype == dtype
    assert_close(out, exact, plain(q, k, v)[0], factor=3)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)
    nested = merge_states(*zip(merge_states(*zip(*parts[:2], strict=True)), parts[2], parts[3], strict=True))
    torch.testing.assert_close(nested[1], lse, rtol=1e-5, atol=1e-5)


def test_merged_states_are_exact_have_gradients_and_know_blind_queries():
    q, k, v = inputs((1, 2, 1, 6, 9, 4), torch.float64, "cpu", grad=True)

    parts = [flash_attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True) for a, b in ((0, 4), (4, 9))]
    out, lse = merge_states(*zip(*parts, strict=True))
    for found, expected in zip((out, lse), plain(q, k, v), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))
    exact, exact_lse = plain(q, k, v)
    expected = torch.autograd.grad(exact.square().sum() + exact_lse.sum(), (q, k, v))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    blind = torch.full((1, 2, 6), -math.inf, dtype=torch.float64)
    blind.requires_grad_()
    out, lse = merge_states([torch.zeros_like(exact)] * 2, [blind] * 2)
    assert torch.autograd.grad(out.sum() + lse.exp().sum(), blind)[0].abs().sum() == 0
    assert out.abs().sum() == 0
    assert torch.equal(lse, blind)


def test_states_that_do_not_fit_are_refused():
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    for outs, lses, message in (
        ([], [], "got 0 and 0"),
        ([out], [lse, lse], "got 1 and 2"),
        ([out, out[..., :2]], [lse, lse], r"outputs must be .*\(1, 2, 3, 4\) .*got .*\(1, 2, 3, 2\)"),
        ([out], [lse.double()], "log-sum-exps must be torch.float32 .*got torch.float64"),
        ([out], [lse[..., :1]], r"got torch.float32 of shape \(1, 2, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_states(outs, lses)


# ---- float8


def float8_backends():
    """(step, device) of what runs here."""
    return [(0, "cpu")] + ([(0, "cuda")] if HAS_GPU else []) + ([("float8", "cuda")] if ON_HOPPER else [])


every_float8 = pytest.mark.parametrize(("step", "device"), float8_backends())


def rounded_attention(q, k, v, **options):
    """Float64 attention whose probabilities are rounded as the kernel rounds them: e4m3 of 2^8 P, sums before that."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    _, lse = plain(q, k, v, **options)
    T, S = q.shape[2], k.shape[2]
    scores = q @ k.mT * options.get("scale", q.shape[-1] ** -0.5)
    if options.get("causal"):
        scores = scores.masked_fill(~masks.causal(T, S, device=q.device), -math.inf)
    m = scores.amax(-1, keepdim=True)
    m = m.masked_fill(m == -math.inf, 0.0)
    P = (torch.exp(scores - m) * 256).float().to(torch.float8_e4m3fn).double() / 256
    return P @ v * torch.exp(m - lse[..., None]).masked_fill(lse[..., None] == -math.inf, 0.0)


@every_float8
@pytest.mark.parametrize(
    "lengths", [(1, 1), (1, 239), (3, 799), (113, 203), (257, 128), (239, 1), (385, 1030)], ids=str
)
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
def test_float8(step, device, lengths, options):
    for heads, kv_heads, d in ((4, 2, 128), (2, 2, 64), (3, 1, 80)):
        q, k, v = inputs((2, heads, kv_heads, *lengths, d), torch.float32, device)
        quantized = [quantize_float8(x) for x in (q * 2, k, v)]
        numbers, scales = zip(*quantized, strict=True)
        out, lse = flash_attention_float8(*numbers, *scales, step=step, return_lse=True, **options)
        exact_inputs = [x.double() * s.double()[:, None, None] for x, s in quantized]
        exact, exact_lse = plain(*exact_inputs, **options)
        low = rounded_attention(*exact_inputs, **options)
        assert out.dtype == torch.bfloat16
        assert torch.isfinite(out).all()
        error, allowed = ((x.double() - exact).abs().max().item() for x in (out, low))
        assert error <= 2 * allowed + 2**-8 * exact.abs().max().item(), (heads, d)
        empty = exact_lse == -math.inf
        assert torch.equal(lse == -math.inf, empty)
        assert out[empty].abs().sum() == 0
        torch.testing.assert_close(lse[~empty].double(), exact_lse[~empty], rtol=1e-4, atol=2e-3)


@every_float8
def test_float8_windows_and_many_keys(step, device):
    for lengths, options in (
        ((300, 700), {"window": 200}),
        ((400, 500), {"window": (50, 90)}),
        ((270, 4500), {"causal": True}),
    ):
        q, k, v = inputs((1, 4, 2, *lengths, 128), torch.float32, device)
        quantized = [quantize_float8(x) for x in (q, k, v)]
        numbers, scales = zip(*quantized, strict=True)
        out = flash_attention_float8(*numbers, *scales, step=step, **options)
        exact, _ = plain(*(x.double() * s.double()[:, None, None] for x, s in quantized), **options)
        assert (out.double() - exact).abs().max() <= 0.04 * exact.abs().max()


def test_a_rotation_spreads_outliers_and_keeps_scores():
    R = hadamard_rotation(64)
    torch.testing.assert_close(R @ R.T, torch.eye(64))
    q, k, v = inputs((1, 2, 2, 90, 120, 64), torch.float32, "cpu")
    q[..., 5] *= 30
    k[..., 5] *= 30
    exact, _ = plain(q.double(), k.double(), v.double(), scale=0.01)
    errors = []
    for rotate in (torch.eye(64), R):
        numbers, scales = zip(*(quantize_float8(x) for x in (q @ rotate, k @ rotate, v)), strict=True)
        errors.append((flash_attention_float8(*numbers, *scales, scale=0.01).double() - exact).abs().mean().item())
    assert errors[1] < errors[0]
    with pytest.raises(ValueError, match="a power of two, got 80"):
        hadamard_rotation(80)


def test_what_float8_refuses():
    q, k, v = (quantize_float8(x)[0] for x in inputs((1, 4, 2, 5, 6, 64), torch.float32, "cpu"))
    ones = torch.ones(4), torch.ones(2), torch.ones(2)
    with pytest.raises(ValueError, match="q must be a float8_e4m3fn tensor"):
        flash_attention_float8(q.float(), k, v, *ones)
    with pytest.raises(ValueError, match=r"q_scale must be float32 of shape \(4,\) on cpu"):
        flash_attention_float8(q, k, v, *ones[1:], ones[1])
    with pytest.raises(ValueError, match="step float8 cannot do this: it runs on cuda"):
        flash_attention_float8(q, k, v, *ones, step="float8")
    with pytest.raises(ValueError, match="step must be one of 0, float8, got 4"):
        flash_attention_float8(q, k, v, *ones, step=4)
    with pytest.raises(ValueError, match="has no gradients"):
        flash_attention_float8(q, k, v, *ones[:2], torch.ones(2, requires_grad=True))


# ---- the door


def second_call(*tensors, **options):
    """A call that goes by the plan that the first one left."""
    plans._plans.clear()
    flash_attention(*tensors, **options)
    (plan,) = plans._plans.values()
    assert plan is not None
    return flash_attention(*tensors, **options)


@every_backend
def test_a_planned_call_gives_the_same_bits_and_gradients(step, device, dtype):
    for layout in ("heads first", "tokens first"):
        q, k, v = inputs((2, 4, 2, 70, 90, 64), dtype, device)
        if layout == "tokens first":
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        options = {"causal": True, "step": step, "return_lse": True, "deterministic": True}
        plans._plans.clear()
        expected = flash_attention(*leaves, **options)
        expected_grads = torch.autograd.grad([x.sum() for x in expected], leaves)
        if step != 0:
            assert list(map(type, plans._plans.values())) == [plans.Plan]
        found = flash_attention(*leaves, **options)
        grads = torch.autograd.grad([x.sum() for x in found], leaves)
        for a, b in zip((*found, *grads), (*expected, *expected_grads), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            assert a.stride() == b.stride()
        with torch.no_grad():
            out = flash_attention(*leaves, **options)[0]
        torch.testing.assert_close(out, expected[0].detach(), rtol=0, atol=0)
        assert not out.requires_grad


@needs_cpu_twin
def test_a_plan_lets_nothing_pass_that_is_refused():
    q, k, v = inputs((1, 2, 2, 5, 6, 8), torch.float32, "cpu")
    second_call(q, k, v, window=2, scale=1.0)
    with pytest.raises(ValueError, match=r"window must be a whole number of keys, got 2\.0"):
        flash_attention(q, k, v, window=2.0, scale=1.0)
    second_call(q, k, v, window=(2, 1))
    with pytest.raises(ValueError, match=r"window's left side must be a whole number of keys, got 2\.0"):
        flash_attention(q, k, v, window=(2.0, 1))
    slopes = torch.ones(2)
    second_call(q, k, v, alibi_slopes=slopes)
    with pytest.raises(ValueError, match="must not require a gradient"):
        flash_attention(q, k, v, alibi_slopes=slopes.clone().requires_grad_())
    second_call(q, k, v)
    with pytest.raises(ValueError, match="must share a dtype"):
        flash_attention(q, k, v.double())
    with pytest.raises(ValueError, match="head_dim 8, k has head_dim 7"):
        flash_attention(q, k[..., :7], v)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"), forward_ad.dual_level():
        flash_attention(forward_ad.make_dual(q, q), k, v)


@needs_cpu_twin
def test_who_watches_operators_sees_planned_calls_too():
    q, k, v = inputs((1, 2, 2, 5, 6, 8), torch.float32, "cpu")
    second_call(q, k, v)
    with profiling.count() as work:
        flash_attention(q, k, v)
    assert work.flops == 2 * 2 * 2 * 5 * 6 * 8
    with torch.profiler.profile() as trace:
        flash_attention(q, k, v)
    assert "tformer_lab::flash_attention" in {event.name for event in trace.events()}
    batched = torch.func.vmap(flash_attention)(*(x[None] for x in (q, k, v)))
    torch.testing.assert_close(batched[0], flash_attention(q, k, v), rtol=0, atol=0)


@needs_cpu_twin
def test_who_watches_the_gradients_of_a_planned_call_sees_an_operator():
    q, k, v = inputs((1, 2, 2, 5, 6, 8), torch.float32, "cpu", grad=True)
    second_call(q, k, v)
    out = flash_attention(q, k, v)
    douts = torch.randn(3, *out.shape)
    expected = [torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for dout in douts]
    batched = torch.autograd.grad(out, (q, k, v), douts, is_grads_batched=True, retain_graph=True)
    for found, *each in zip(batched, *expected, strict=True):
        torch.testing.assert_close(found, torch.stack(each), rtol=0, atol=0)
    with profiling.count() as work:
        torch.autograd.grad(out, (q, k, v), douts[0], retain_graph=True)
    assert work.flops == 5 * 2 * 2 * 5 * 6 * 8
    with torch.profiler.profile() as trace:
        torch.autograd.grad(out, (q, k, v), douts[0])
    assert "tformer_lab::flash_attention_backward" in {event.name for event in trace.events()}


def negative_view(x):
    """The numbers of x as a view of their negatives, as the imaginary part of a conjugate is one."""
    return torch._neg_view(-x)


@needs_cpu_twin
@pytest.mark.parametrize("step", [0, "cpu"])
def test_numbers_are_those_of_a_tensor_and_not_what_lies_at_its_address(step):
    """Its memory may hold their negatives, or zeros may have none: a plan knows layouts alone."""
    given = [x.detach() for x in inputs((1, 2, 2, 5, 6, 8), torch.float32, "cpu")]
    flash_attention(*given, step=step)
    expected = flash_attention(*given, step=step)
    zeros = flash_attention(torch.zeros_like(given[0]), *given[1:], step=step)
    for place, x in enumerate(given):
        changed = [*given[:place], negative_view(x), *given[place + 1 :]]
        torch.testing.assert_close(flash_attention(*changed, step=step), expected)
    found = flash_attention(torch._efficientzerotensor(given[0].shape), *given[1:], step=step)
    torch.testing.assert_close(found, zeros)
    leaves = [x.requires_grad_() for x in given]
    out, lse = flash_attention(*leaves, step=step, return_lse=True)
    pair = torch.randn_like(out), torch.randn_like(lse)
    wanted = torch.autograd.grad((out, lse), leaves, pair, retain_graph=True)
    found = torch.autograd.grad((out, lse), leaves, [negative_view(x) for x in pair])
    torch.testing.assert_close(found, wanted)


def test_packed_tensors_without_numbers_have_a_shape():
    q, k, v, starts = (
        torch.empty(9, 4, 8),
        torch.empty(9, 2, 8),
        torch.empty(9, 2, 6),
        torch.zeros(3, dtype=torch.int32),
    )
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (q, k, v, starts, starts)]
        assert flash_attention_varlen(*fake, causal=True).shape == (9, 4, 6)
    assert flash_attention_varlen(*(x.to("meta") for x in (q, k, v, starts, starts))).shape == (9, 4, 6)


@needs_cpu_twin
def test_a_planned_call_keeps_to_the_rules_of_autograd():
    q, k, v = inputs((1, 2, 2, 5, 6, 8), torch.float32, "cpu", grad=True)
    second_call(q, k, v)
    out, lse = flash_attention(q, k, v, return_lse=True)
    (from_lse,) = torch.autograd.grad(lse.sum(), q, retain_graph=True)
    torch.testing.assert_close(from_lse, torch.autograd.grad(plain(q, k, v)[1].sum(), q)[0], rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.sum(), q)
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@draws(25)
@given(
    T=st.integers(1, 70),
    S=st.integers(1, 70),
    d=st.integers(1, 40),
    ratio=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 80),
)
@pytest.mark.parametrize("step", [0, pytest.param("cpu", marks=needs_cpu_twin)])
def test_any_small_shape(step, T, S, d, ratio, causal, window):
    check_against_plain((1, *ratio, T, S, d), torch.float32, "cpu", step, backward=True, causal=causal, window=window)


def test_every_step_and_its_gradients_have_a_source():
    names = {"1", "2", "3", "4", "cpu", *(name for names in GRADIENTS.values() for name in names)} - {"0"}
    assert all(jit.find_source("flash_attention", name).stem.split("_")[0] == name.split("_")[0] for name in names)


def test_a_compiled_function_may_get_its_step_as_an_argument():
    q, k, v = inputs((1, 2, 1, 9, 9, 8), torch.float32, "cpu")
    compiled = torch.compile(lambda *x: flash_attention(*x[:3], step=x[3]), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, 0), flash_attention(q, k, v, step=0), rtol=0, atol=0)
    for step in (1, 2):  # the second integer makes torch.compile trace it as a symbol
        with pytest.raises(ValueError, match=f"step {step} cannot do this: it runs on cuda"):
            compiled(q, k, v, step)


def test_step_0_is_exact_in_float64():
    q, k, v = inputs((2, 4, 2, 150, 280, 24), torch.float64, "cpu", grad=True)
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    exact, exact_lse = plain(q, k, v, causal=True)
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-12, atol=1e-12)
    small = inputs((1, 2, 1, 5, 7, 4), torch.float64, "cpu", grad=True)
    assert torch.autograd.gradcheck(lambda *x: flash_attention(*x, window=3, return_lse=True), small)


def test_any_mask_runs_step_0():
    q, k, v = inputs((2, 2, 1, 140, 150, 16), torch.float32, "cpu", grad=True)
    for mask in (torch.rand(2, 2, 140, 150) > 0.5, masks.padding(torch.tensor([0, 90]), 150), torch.rand(140, 1) > 0.5):
        out = flash_attention(q, k, v, mask=mask)
        exact, _ = plain(q, k, v, mask=mask)
        torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(exact.sum(), (q, k, v)), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("step", [0, pytest.param("cpu", marks=needs_cpu_twin)])
def test_memory_grows_linearly(step):
    """The peak resident memory at 2,048 queries and 4,096 keys stays far under their matrix of floats (32 MB)."""
    code = f"""
import resource, torch
torch.set_num_threads(2)
from tformer_lib.flash_attention import flash_attention
q, k, v = (torch.randn(1, 1, n, 16) for n in (2048, 4096, 4096))
flash_attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], step={step!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
flash_attention(q, k, v, step={step!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    kilobytes = int(done.stdout) / (1 if sys.platform == "linux" else 1024)
    assert kilobytes < 10 * 1024


def test_errors_name_what_came():
    q, k, v = inputs((1, 4, 2, 5, 6, 8), torch.float32, "cpu")
    with pytest.raises(ValueError, match="window must be at least 1"):
        flash_attention(q, k, v, window=0)
    with pytest.raises(ValueError, match=r"window must be a whole number of keys, got 2\.5"):
        flash_attention(q, k, v, window=2.5)
    with pytest.raises(ValueError, match="step must be one of"):
        flash_attention(q, k, v, step=7)
    with pytest.raises(ValueError, match="runs on cuda"):
        flash_attention(q, k, v, step=3)
    for window, message in (
        ((3,), "a number of keys or a pair"),
        ((-1, 2), "left side must be at least 0"),
        ((2.0, 0), "w"),
    ):
        with pytest.raises(ValueError, match=message):
            flash_attention(q, k, v, window=window)
    for softcap in (0.0, -1.0, math.inf, math.nan, 1e39, 1e-60):
        for form in (flash_attention, attend_scores):
            with pytest.raises(ValueError, match=re.escape(f"in float32, got {softcap}")):
                form(q, k, v, softcap=softcap)
    for slopes, message in (
        (torch.ones(3), r"\(4,\) or \(1, 4\), got \(3,\)"),
        (torch.ones(2, 4), r"\(4,\) or \(1, 4\), got \(2, 4\)"),
        (torch.ones(4).double(), "must be a float32 tensor, got torch.float64"),
        ([0.5] * 4, "must be a float32 tensor, got list"),
        (torch.ones(4, requires_grad=True), "must not require a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            flash_attention(q, k, v, alibi_slopes=slopes)
    with pytest.raises(ValueError, match="q has 4 heads, which 3 kv heads do not divide"):
        flash_attention(q, k.new_zeros(1, 3, 6, 8), v.new_zeros(1, 3, 6, 8))
    with pytest.raises(ValueError, match="must have 3 dimensions"):
        flash_attention_varlen(q, k, v, torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"must be \(batch \+ 1,\) int32"):
        flash_attention_varlen(q[0], k[0], v[0], torch.zeros(2), torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize("step", [0, pytest.param("cpu", marks=needs_cpu_twin)])
@pytest.mark.parametrize(
    ("starts", "options", "message"),
    [
        ([0, 3, 12], {}, "cu_seqlens_q must go from 0 to 9, got 0 to 12"),
        ([-1, 9], {}, "must go from 0 to 9, got -1 to 9"),
        ([0, 3, 8], {}, "must go from 0 to 9, got 0 to 8"),
        ([0, 5, 3, 9], {}, r"cu_seqlens_q must not fall, got \[0, 5, 3, 9\]"),
        ([0, 3, 9], {"max_seqlen_q": 5}, "max_seqlen_q is 5, the longest sequence has 6 tokens"),
        ([0, 3, 9], {"max_seqlen_k": 0}, "max_seqlen_k is 0, the longest sequence has 6 tokens"),
    ],
)
def test_a_packing_that_lies_is_refused_where_looking_costs_nothing(step, starts, options, message):
    x, starts = torch.randn(9, 2, 8), torch.tensor(starts, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        flash_attention_varlen(x, x, x, starts, starts, **options, step=step)


@pytest.mark.parametrize("step", [0, pytest.param("cpu", marks=needs_cpu_twin)])
def test_starts_may_have_gaps_in_memory(step):
    x, starts = torch.randn(9, 2, 8, requires_grad=True), torch.tensor([0, 3, 9], dtype=torch.int32)
    gappy = torch.stack([starts, torch.full_like(starts, 7)], dim=1)[:, 0]
    found, wanted = (flash_attention_varlen(x, x, x, s, s, step=step) for s in (gappy, starts))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@needs_cpu_twin
def test_a_step_refuses_what_it_cannot_do():
    q, k, v = inputs((1, 2, 2, 5, 6, 8), torch.float32, "cpu")
    with pytest.raises(ValueError, match="step cpu cannot do this: kernels know the masks causal and window"):
        flash_attention(q, k, v, mask=torch.ones(5, 6, dtype=torch.bool), step="cpu")
    with pytest.raises(ValueError, match=r"float32, bfloat16 and float16, got torch.float64"):
        flash_attention(q.double(), k.double(), v.double(), step="cpu")
    with pytest.raises(ValueError, match="head_dim must be at most 256"):
        flash_attention(*inputs((1, 1, 1, 2, 2, 264), torch.float32, "cpu"), step="cpu")


def test_a_machine_without_a_compiler_is_told_that_it_runs_step_0(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(jit, "compiler", lambda: None)
    q, k, v = inputs((1, 2, 2, 5, 6, 8), torch.float32, "cpu", grad=True)
    copy = tmp_path / "kernels"
    shutil.copytree(jit.kernels_folder(), copy)
    with jit.kernels_from(copy):  # other functions than those that this process has loaded
        with pytest.warns(UserWarning, match=r"runs step 0, plain PyTorch, which is slow: .* needs a C\+\+ compiler"):
            out = flash_attention(q, k, v)
        assert torch.equal(out, flash_attention(q, k, v, step=0))
        with pytest.warns(UserWarning, match="runs step 0"):
            out.sum().backward()
        with pytest.raises(jit.BuildError, match=r"needs a C\+\+ compiler: install g\+\+"):
            flash_attention(q, k, v, step="cpu")


@needs_gpu
def test_steps_refuse_dtypes():
    q, k, v = inputs((1, 2, 2, 5, 6, 64), torch.bfloat16, "cuda")
    with pytest.raises(ValueError, match="takes float32"):
        flash_attention(q, k, v, step=2)
    with pytest.raises(ValueError, match="bfloat16 and float16"):
        flash_attention(q.float(), k.float(), v.float(), step=3)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graph_replays(dtype):
    q, k, v = inputs((1, 4, 2, 300, 300, 64), dtype, "cuda")
    flash_attention(q, k, v, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attention(q, k, v, causal=True)
    q.normal_()
    graph.replay()
    torch.testing.assert_close(out, flash_attention(q, k, v, causal=True), rtol=0, atol=0)


@needs_gpu
def test_uses_the_current_stream():
    q, k, v = inputs((1, 8, 8, 2000, 2000, 64), torch.bfloat16, "cuda")
    expected = flash_attention(q, k, v)
    late = torch.zeros_like(q)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        out = flash_attention(late, k, v)
    stream.synchronize()
    assert torch.equal(out, expected)


@needs_gpu
@pytest.mark.parametrize("step", [3, pytest.param(4, marks=pytest.mark.skipif(not ON_HOPPER, reason="needs sm_90"))])
def test_more_than_two_to_the_31_elements(step):
    batch, heads, T, d = 18, 16, 65536, 128  # 2.4e9 elements in q and out
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    q = torch.randn(1, 1, T, d, device="cuda", dtype=torch.bfloat16).expand(batch, heads, T, d).contiguous()
    k, v = (torch.randn(batch, 1, 64, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = flash_attention(q, k, v, step=step)
    exact, _ = plain(q[-1:, -1:, -500:].double(), k[-1:].double(), v[-1:].double())
    torch.testing.assert_close(out[-1:, -1:, -500:].double(), exact, rtol=2e-2, atol=2e-2)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_uses_the_tensors_device():
    q, k, v = inputs((1, 2, 2, 100, 100, 64), torch.bfloat16, "cuda:1")
    with torch.cuda.device(0):
        out = flash_attention(q, k, v)
    exact, _ = plain(*doubles(q, k, v))
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)
