"""Sparse attention: patterns by brute force, blocks that miss nothing, attention equal to dense under the same mask."""

import copy
import gc
import random
from functools import partial

import numpy as np
import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tformer_lib import jit, masks
from tformer_lib import sparse_attention as sp
from tformer_lib.attention import attend as dense_attend
from tformer_lib.sparse_attention.lists import NONE, transpose_chosen

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 96  # what the patterns below cover


def make(T=50, S=None, heads=4, kv_heads=2, batch=2, seed=0, dtype=torch.float64, head_dim=8, value_dim=8):
    generator = torch.Generator().manual_seed(seed)
    S = T if S is None else S
    shapes = [(batch, heads, T, head_dim), (batch, kv_heads, S, head_dim), (batch, kv_heads, S, value_dim)]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)


def document_ids(seed, rows=None):
    generator = torch.Generator().manual_seed(seed)
    shape = (LENGTH,) if rows is None else (rows, LENGTH)
    return torch.randint(0, 6, shape, generator=generator).sort().values


def brute_force(allowed, T, S):
    """(T, S) boolean from a function of a query's and a key's position, pair by pair."""
    return torch.tensor([[bool(allowed(q, k)) for k in range(S)] for q in range(S - T, S)]).view(T, S)


# ---- patterns

DEFINITIONS = {
    "causal": (sp.causal(), lambda q, k: k <= q),
    "everything": (sp.everything(), lambda q, k: True),
    "sliding window": (sp.sliding_window(7), lambda q, k: 0 <= q - k < 7),
    "a window of one": (sp.sliding_window(1), lambda q, k: q == k),
    "dilated": (sp.dilated(4, 5), lambda q, k: q - k in (0, 5, 10, 15)),
    "global tokens": (sp.global_tokens([0, 20]), lambda q, k: q in (0, 20) or k in (0, 20)),
    # Child et al., section 4.3: A1 = {t, ..., i} with t = max(0, i - l), A2 = {j : (i - j) mod l = 0}
    "strided": (sp.strided(6), lambda i, j: max(0, i - 6) <= j <= i or (j <= i and (i - j) % 6 == 0)),
    # A1 = {j : floor(j / l) = floor(i / l)}, A2 = {j : j mod l in {t, ..., l - 1}} with t = l - c
    "fixed": (sp.fixed(6, 2), lambda i, j: j <= i and (j // 6 == i // 6 or j % 6 in (4, 5))),
    "longformer": (sp.longformer(8, [3]), lambda q, k: abs(q - k) <= 4 or q == 3 or k == 3),
    "either": (sp.sliding_window(3) | sp.global_tokens([5]), lambda q, k: 0 <= q - k < 3 or q == 5 or k == 5),
    "both": (sp.global_tokens([5]) & sp.causal(), lambda q, k: k <= q and (q == 5 or k == 5)),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize(("T", "S"), [(1, 1), (30, 30), (7, 30), (33, 12)])
def test_masks_are_the_definitions_pair_by_pair(name, T, S):
    pattern, allowed = DEFINITIONS[name]
    assert torch.equal(pattern.mask(T, S), brute_force(allowed, T, S))


def test_masks_agree_with_the_chapter_on_masks():
    ids = document_ids(0, rows=3)
    for T in (96, 10):
        assert torch.equal(sp.causal().mask(T, 96), masks.causal(T, 96))
        assert torch.equal(sp.sliding_window(9).mask(T, 96), masks.sliding_window(T, 96, window=9))
        assert torch.equal(sp.documents(ids).mask(T, 96), masks.document(ids, T))
        assert torch.equal(sp.documents(ids[0]).mask(T, 96), masks.document(ids[0], T))


def test_big_bird_has_a_window_globals_and_so_many_random_blocks():
    block, n = 4, 12
    table = sp.big_bird(block * n, block=block, random_blocks=3, seed=5).mask(block * n)[::block, ::block]
    index = torch.arange(n)
    certain = (index[:, None] - index).abs() <= 1
    certain[[0, -1]] = certain[:, [0, -1]] = True
    assert (table & certain).equal(certain)
    assert ((table & ~certain).sum(1)[1:-1] == 3).all()
    same = sp.big_bird(block * n, block=block, random_blocks=3, seed=5).mask(block * n)
    other = sp.big_bird(block * n, block=block, random_blocks=3, seed=6).mask(block * n)
    assert same[::block, ::block].equal(table)
    assert not other.equal(same)
    assert sp.big_bird(block * 4, block=block, random_blocks=9).mask(block * 4).all(), "few blocks left: take them all"


def draw_patterns():
    small = st.integers(1, 20)
    leaves = st.one_of(
        st.builds(sp.sliding_window, small),
        st.builds(sp.dilated, st.integers(1, 6), small),
        st.builds(sp.Band, st.none() | small, st.none() | small, small),
        st.builds(lambda p: sp.global_tokens(p), st.lists(st.integers(0, LENGTH + 5), min_size=1, max_size=3)),
        st.builds(sp.strided, small),
        st.builds(lambda a, b: sp.fixed(a + b, b), small, small),
        st.builds(sp.Segments, small),
        st.builds(lambda s: sp.big_bird(LENGTH, block=8, random_blocks=2, seed=s), st.integers(0, 9)),
        st.builds(lambda s: sp.documents(document_ids(s)), st.integers(0, 9)),
        st.builds(lambda s: sp.documents(document_ids(s, rows=2)), st.integers(0, 9)),
        st.just(sp.causal()),
    )
    both = lambda inner: st.builds(lambda a, b, o: a | b if o else a & b, inner, inner, st.booleans())  # noqa: E731
    return st.recursive(leaves, both, max_leaves=4)


@draws(120)
@given(
    pattern=draw_patterns(), T=st.integers(1, LENGTH), S=st.integers(1, LENGTH), block=st.sampled_from([1, 5, 16, 64])
)
def test_the_layout_is_live_exactly_where_the_mask_is(pattern, T, S, block):
    mask = pattern.mask(T, S)
    mask = mask.flatten(0, -3).any(0) if mask.dim() == 4 else mask
    rows, columns = sp.blocks_in(T, block), sp.blocks_in(S, block)
    padded = torch.zeros(rows * block, columns * block, dtype=torch.bool)
    padded[:T, :S] = mask
    expected = padded.view(rows, block, columns, block).any(3).any(1)
    assert torch.equal(pattern.layout(T, S, block), expected)


# ---- attention


@draws(80)
@given(
    pattern=draw_patterns(),
    T=st.integers(1, 70),
    S=st.integers(1, 70),
    block=st.sampled_from([4, 16, 64]),
    kv_heads=st.sampled_from([1, 2, 3, 6]),
    causal=st.booleans(),
    mask_shape=st.sampled_from([None, "T S", "b 1 1 S", "b h T S", "h 1 1"]),
    seed=st.integers(0, 99),
)
def test_equals_dense_attention_under_the_same_mask(pattern, T, S, block, kv_heads, causal, mask_shape, seed):
    q, k, v = make(T, S, heads=6, kv_heads=kv_heads, seed=seed, value_dim=5)
    mask = None
    if mask_shape is not None:
        sizes = {"T": T, "S": S, "b": 2, "h": 6, "1": 1}
        shape = [sizes[c] for c in mask_shape.split()]
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    out = sp.attend(q, k, v, pattern=pattern, mask=mask, causal=causal, block=block)
    truth = dense_attend(q, k, v, mask=masks.combine(pattern.mask(T, S), mask), causal=causal)
    torch.testing.assert_close(out, truth, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_as_close_to_float64_as_rounding_allows(dtype):
    q, k, v = make(70, dtype=dtype)
    pattern = sp.sliding_window(20) | (sp.global_tokens([0]) & sp.causal())
    out = sp.attend(q, k, v, pattern=pattern, block=16)
    truth = dense_attend(q.double(), k.double(), v.double(), mask=pattern.mask(70))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), truth, atol=8 * torch.finfo(dtype).eps, rtol=8 * torch.finfo(dtype).eps)


def test_slices_of_a_bucket_do_not_change_the_result(monkeypatch):
    q, k, v = make(90, dtype=torch.float32)
    pattern = sp.fixed(16, 2)
    whole = sp.attend(q, k, v, pattern=pattern, block=8)
    monkeypatch.setattr(sp.patterns, "SLICE", 1)
    torch.testing.assert_close(sp.attend(q, k, v, pattern=pattern, block=8), whole, atol=1e-6, rtol=1e-6)


def test_rows_with_no_live_block_give_zeros_and_zero_gradients():
    q, k, v = (x.requires_grad_() for x in make(64))
    far = sp.Band(None, None) & sp.global_tokens([40]) & sp.Segments(32) & sp.causal()  # nothing before position 40
    out = sp.attend(q, k, v, pattern=far, block=16)
    assert far.layout(64, block=16).sum(1).tolist() == [0, 0, 1, 1]
    assert (out[:, :, :40] == 0).all()
    assert (out[:, :, 40:] != 0).all()
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, :40] == 0).all()


def test_a_pattern_that_allows_nothing_gives_zeros_and_zero_gradients():
    inputs = [torch.randn(1, 2, 9, 4, requires_grad=True) for _ in "qkv"]
    nothing = sp.Segments(4) & sp.global_tokens([100])
    out = sp.attend(*inputs, pattern=nothing, block=4)
    assert not out.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), inputs))


def test_gradients_equal_those_of_dense_attention():
    for kv_heads in (1, 4):
        q, k, v = (x.requires_grad_() for x in make(50, 70, kv_heads=kv_heads))
        for pattern in (sp.strided(9), sp.documents(document_ids(1)[:70]), sp.longformer(10, [0])):
            ours = torch.autograd.grad(sp.attend(q, k, v, pattern=pattern, block=16).square().sum(), (q, k, v))
            mask = pattern.mask(50, 70)
            theirs = torch.autograd.grad(dense_attend(q, k, v, mask=mask).square().sum(), (q, k, v))
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_gradcheck():
    q, k, v = (x.requires_grad_() for x in make(9, heads=2, kv_heads=1, batch=1, head_dim=3, value_dim=2))
    form = lambda q, k, v: sp.attend(q, k, v, pattern=sp.strided(3), block=4)  # noqa: E731
    assert torch.autograd.gradcheck(form, (q, k, v), fast_mode=True)


def test_lengths_of_zero():
    for T, S, batch in ((0, 5, 2), (3, 0, 2), (0, 0, 2), (3, 5, 0)):
        q, k, v = make(T, S, batch=batch)
        out = sp.attend(q, k, v, pattern=sp.sliding_window(3))
        assert out.shape == q.shape
        assert (out == 0).all()


def test_a_plan_made_in_inference_serves_training():
    pattern = sp.Documents(document_ids(3))  # a new pattern, so that no plan of it is kept yet
    q, k, v = make(40)
    with torch.inference_mode():
        sp.attend(q, k, v, pattern=pattern)
    q.requires_grad_()
    sp.attend(q, k, v, pattern=pattern).sum().backward()
    assert q.grad is not None


# ---- work and memory follow the live blocks


def count_flops(length, pattern, backward=False):
    q, k, v = (x.requires_grad_(backward) for x in make(length, dtype=torch.float32))
    with FlopCounterMode(display=False) as counter:
        out = sp.attend(q, k, v, pattern=pattern, block=16)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


def saved_bytes(length, pattern):
    """Bytes that autograd keeps for the backward pass."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    q, k, v = (x.requires_grad_() for x in make(length, dtype=torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = sp.attend(q, k, v, pattern=pattern, block=16)
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("backward", [False, True])
def test_work_is_that_of_the_live_blocks(backward):
    pattern = sp.sliding_window(33)  # blocks of 16: three live in every row but the first two
    live = int(pattern.layout(256, block=16).sum())
    assert live == 3 * 16 - 3
    assert count_flops(256, pattern, backward) == (3 if backward else 1) * 2 * 2 * 8 * 8 * 16 * 16 * live
    assert count_flops(512, pattern, backward) / count_flops(256, pattern, backward) == pytest.approx(2, rel=0.1)


def test_padding_of_buckets_adds_at_most_a_quarter():
    for count in range(1, 3000):
        assert count <= sp.bucket_size(count) <= 1.25 * count


def test_memory_of_the_backward_pass_grows_with_the_length_and_not_its_square():
    assert saved_bytes(2048, sp.sliding_window(33)) / saved_bytes(1024, sp.sliding_window(33)) < 2.2
    assert saved_bytes(2048, sp.causal()) / saved_bytes(1024, sp.causal()) > 3  # the measure can see a square


# ---- reach


def test_the_receptive_field_is_what_gradients_reach():
    mask = sp.dilated(3, 2).mask(24)
    x = torch.zeros(24, dtype=torch.float64)

    def through(x, layers):
        return through(x + mask.double() @ x, layers - 1) if layers else x

    for layers in range(4):
        jacobian = torch.autograd.functional.jacobian(partial(through, layers=layers), x)
        assert torch.equal(sp.receptive_field(mask, layers), jacobian != 0)


# ---- parity


def reach_by_perturbing(layer, x):
    """(T, T) boolean: output t changes when input s does; all T perturbed copies go through as one batch."""
    T = x.shape[0]
    copies = x.expand(T, T, -1) + torch.eye(T, dtype=x.dtype)[:, :, None]
    with torch.no_grad():
        return ((layer(copies) - layer(x[None])).abs().amax(-1) > 1e-12).T


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend_with(layer, x, pattern, heads):
    """This library's sparse attention with the projections of another library's layer."""
    q, k, v = (split(f(x), heads) for f in (layer.query, layer.key, layer.value))
    return sp.attend(q, k, v, pattern=pattern, block=8).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("global_positions", [(), (0, 37)])
def test_longformer_reaches_what_the_pattern_says(global_positions):
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    torch.manual_seed(0)
    T, heads = 64, 2
    config = LongformerConfig(
        hidden_size=16, num_attention_heads=heads, attention_window=[8], attention_probs_dropout_prob=0.0
    )
    theirs = LongformerSelfAttention(config, 0).double().eval()
    is_global = torch.zeros(1, T, dtype=torch.bool)
    is_global[:, list(global_positions)] = True

    def layer(x):
        flags = is_global.expand(x.shape[0], T)
        return theirs(x, 1e4 * flags, torch.zeros_like(flags), flags, bool(global_positions))[0]

    pattern = sp.longformer(8, global_positions)
    x = torch.randn(T, 16, dtype=torch.float64)
    assert torch.equal(reach_by_perturbing(layer, x), pattern.mask(T))
    local = ~is_global[0]  # global queries have projections of their own there
    out = attend_with(theirs, x[None], pattern, heads)
    torch.testing.assert_close(out[:, local], layer(x[None])[:, local], atol=1e-6, rtol=1e-6)


def test_big_bird_reaches_what_the_pattern_says():
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    torch.manual_seed(0)
    block, n, random_blocks = 4, 12, 2
    T = block * n
    config = BigBirdConfig(
        hidden_size=8, num_attention_heads=1, block_size=block, num_random_blocks=random_blocks,
        attention_probs_dropout_prob=0.0, max_position_embeddings=T,
    )  # fmt: skip
    theirs = BigBirdBlockSparseAttention(config, seed=3).double().train()  # it draws no random blocks in eval

    def layer(x):
        blocked, band, start, end = BigBirdModel.create_masks_for_block_sparse_attn(x.new_ones(x.shape[0], T), block)
        return theirs(x, band, start, end, blocked, blocked)[0]

    x = torch.randn(T, 8, dtype=torch.float64)
    reach = reach_by_perturbing(layer, x)
    certain = sp.big_bird(T, block=block, random_blocks=0).mask(T)
    table = reach[::block, ::block]
    assert torch.equal(reach, table.repeat_interleave(block, 0).repeat_interleave(block, 1))
    assert (reach & certain).equal(certain)
    drawn = (reach & ~certain)[::block, ::block].sum(1)
    ours = sp.big_bird(T, block=block, random_blocks=random_blocks, seed=1).mask(T)
    assert drawn.equal((ours & ~certain)[::block, ::block].sum(1))
    assert drawn.tolist() == [0, *[random_blocks] * (n - 2), 0]
    out = attend_with(theirs, x[None], sp.BlockPattern(block, table), 1)
    torch.testing.assert_close(out, layer(x[None]), atol=1e-6, rtol=1e-6)


# ---- refusals


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sp.sliding_window(0), "window must be at least 1 .* got 0"),
        (lambda: sp.dilated(3, 0), "step must be at least 1, got 0"),
        (lambda: sp.Band(-1, 0), "before must be at least 0 or None, got -1"),
        (lambda: sp.Segments(0), "size must be at least 1, got 0"),
        (lambda: sp.fixed(4, 5), r"width must lie in 1 .. size = 4, got 5"),
        (lambda: sp.global_tokens([]), r"one or more numbers of at least 0, got \(\)"),
        (lambda: sp.global_tokens([-1]), r"one or more numbers of at least 0, got \(-1,\)"),
        (lambda: sp.big_bird(64, block=0), "at least 1 and random_blocks at least 0, got 0 and 3"),
        (lambda: sp.big_bird(64, block=8, random_blocks=-1), "at least 0, got 8 and -1"),
        (lambda: sp.big_bird(100, block=16), "length must be a positive multiple of block = 16, got 100"),
        (lambda: sp.documents(torch.ones(3)), r"ids must be \(S,\) or \(batch, S\) integers, got \(3,\)"),
        (lambda: sp.BlockPattern(4, torch.ones(2, 3, dtype=torch.bool)), r"\(blocks, blocks\) boolean, got \(2, 3\)"),
    ],
)
def test_wrong_patterns_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_what_is_no_pattern_is_refused():
    q = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"pattern must be a Pattern .* got Tensor"):
        sp.attend(q, q, q, pattern=torch.ones(4, 4, dtype=torch.bool))


def test_a_pattern_that_is_too_short_is_refused():
    q, k, v = make(70)
    with pytest.raises(ValueError, match="documents cover 60 positions, got a key at position 69"):
        sp.attend(q, k, v, pattern=sp.documents(document_ids(0)[:60]))
    with pytest.raises(ValueError, match="table covers 64 positions, got a key at position 69"):
        sp.attend(q, k, v, pattern=sp.big_bird(64, block=8))


def test_wrong_inputs_are_refused_by_name():
    q, k, v = make(7)
    with pytest.raises(ValueError, match="q has 3 heads, which 2 kv heads do not divide"):
        sp.attend(q[:, :3], k, v, pattern=sp.causal())
    with pytest.raises(ValueError, match="boolean tensor"):
        sp.attend(q, k, v, pattern=sp.causal(), mask=torch.ones(7, 7))
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        sp.attend(q, k, v, pattern=sp.causal(), block=0)


# ---- lists of blocks, and the operator over them

GPU = torch.cuda.is_available()
HOPPER = GPU and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU: step 2 is TMA and wgmma")
AMPERE = GPU and torch.cuda.get_device_capability() >= (8, 0)
PLACES = [("cpu", "0")] + [("cpu", "cpu")] * jit.can_build_cpp()
PLACES += [("cuda", "0")] * GPU + [("cuda", "1")] * AMPERE + [("cuda", "2")] * HOPPER


def mask_of_lists(lists, rows, columns, batch):
    """(batch, heads, rows, columns) boolean, entry by entry."""
    heads, tiles = lists.counts.shape[1:]
    height = lists.rows
    mask = torch.zeros(batch, heads, tiles * height, sp.blocks_in(columns, 64) * 64, dtype=torch.bool)
    bits = torch.arange(64)
    for b in range(batch):
        row = min(b, lists.counts.shape[0] - 1)
        for h in range(heads):
            for t in range(tiles):
                for i in range(int(lists.counts[row, h, t])):
                    block, which = int(lists.blocks[row, h, t, i]), NONE
                    if lists.masks is not None:
                        which = int(lists.masks[row, h, t, i])
                    inside = lists.words[which, :, None] >> bits & 1 if which != NONE else torch.ones(height, 64)
                    mask[b, h, t * height : (t + 1) * height, block * 64 : block * 64 + 64] |= inside.bool()
    return mask[:, :, :rows, :columns]


@draws(60)
@given(pattern=draw_patterns(), T=st.integers(1, LENGTH), S=st.integers(1, LENGTH), transposed=st.booleans())
def test_lists_hold_the_mask_whole_blocks_without_bits(pattern, T, S, transposed):
    lists = sp.pattern_lists(pattern, T, S, "cpu", transposed)
    mask = pattern.mask(T, S)
    mask = mask if mask.dim() == 4 else mask.expand(1, 1, T, S)
    expected = (mask.mT if transposed else mask).expand(2, 1, *((S, T) if transposed else (T, S)))
    assert torch.equal(mask_of_lists(lists, *expected.shape[2:], 2), expected)
    assert (lists.order.diff() != 0).all()
    live = lists.counts.sum((0, 1))[lists.order.long()]
    assert lists.counts.shape[0] > 1 or (live.diff() <= 0).all()
    if pattern == sp.everything():
        assert lists.masks is None


def draw_chosen(T, S, heads, n, seed, batch=1):
    """Some blocks for every tile of queries, each once; a few are none."""
    g = torch.Generator().manual_seed(seed)
    tiles, blocks = sp.blocks_in(T, 128), sp.blocks_in(S, 64)
    chosen = torch.rand(batch, heads, tiles, blocks, generator=g).argsort(-1)[..., : min(n, blocks)]
    return chosen.masked_fill(torch.rand(chosen.shape, generator=g) < 0.1, -1)


def mask_of_chosen(chosen, T, S, heads, causal):
    """(batch, heads, T, S) boolean."""
    blocks = sp.blocks_in(S, 64)
    seen = torch.zeros(*chosen.shape[:3], blocks + 1, dtype=torch.bool)
    seen.scatter_(3, chosen.masked_fill(chosen < 0, blocks), True)
    seen = seen[..., :blocks].repeat_interleave(128, 2)[:, :, :T].repeat_interleave(64, 3)[..., :S]
    seen = seen.repeat_interleave(heads // seen.shape[1], 1)
    return seen & sp.causal().mask(T, S) if causal else seen


@pytest.mark.parametrize(("T", "S"), [(1, 1), (300, 300), (130, 517), (517, 130)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_transposed_lists_of_a_choice_are_its_mask(T, S, causal):
    chosen = draw_chosen(T, S, heads=2, n=3, seed=T + causal, batch=2)
    lists = transpose_chosen(chosen, T, S)
    assert lists.blocks.is_contiguous()  # kernels ask only for the outer strides
    assert lists.counts.is_contiguous()
    assert torch.equal(mask_of_lists(lists, S, T, 2).mT, mask_of_chosen(chosen, T, S, 2, False))


@pytest.mark.parametrize(("T", "S"), [(300, 300), (128, 1000), (1, 64), (130, 517)])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_are_chosen_by_the_means_own_blocks_first(T, S, causal):
    q, k, _ = make(T, S)
    chosen = sp.choose_blocks(q, k, 4, causal=causal)
    tiles, blocks = sp.blocks_in(T, 128), sp.blocks_in(S, 64)
    assert chosen.shape == (2, 2, tiles, min(4, blocks))
    for b, h, t in np.ndindex(2, 2, tiles):
        rows = slice(t * 128, min(T, t * 128 + 128))
        mean = q[b, 2 * h : 2 * h + 2, rows].mean((0, 1))
        scores = [float(mean @ k[b, h, j * 64 : j * 64 + 64].mean(0)) for j in range(blocks)]
        first, last = rows.start + S - T, rows.stop - 1 + S - T
        if causal:
            own = range(first // 64, last // 64 + 1)
            scores = [1e9 if j in own else s if j * 64 <= last else -1e9 for j, s in enumerate(scores)]
        best = sorted(range(blocks), key=lambda j: -scores[j])[: min(4, blocks)]
        expected = sorted(j for j in best if scores[j] > -1e9)
        assert sorted(j for j in chosen[b, h, t].tolist() if j >= 0) == expected


def test_a_needle_is_found_by_the_choice_that_a_fixed_window_of_the_same_budget_misses():
    torch.manual_seed(0)
    S, needle = 4096, 777
    q, k, v = (0.1 * torch.randn(1, 1, S, 32) for _ in "qkv")
    direction = 2 * torch.randn(32)
    q[:, :, -128:] += direction  # the last tile asks for what one block holds
    k[:, :, needle // 64 * 64 : needle // 64 * 64 + 64] += direction
    v[:, :, needle // 64 * 64 : needle // 64 * 64 + 64] += 10.0
    truth = dense_attend(q, k, v, causal=True)[:, :, -1]
    chosen = sp.choose_blocks(q, k, 8, causal=True)
    found = sp.attend_chosen(q, k, v, chosen, causal=True)[:, :, -1]
    window = sp.attend(q, k, v, pattern=sp.sliding_window(8 * 64))[:, :, -1]
    assert (found - truth).abs().max() < 0.05 * truth.abs().max()
    assert (window - truth).abs().max() > 0.5 * truth.abs().max()


def rough_attention(q, k, v, mask, scale, sinks):
    """The formula in the dtype of its inputs, blind rows zero."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    blind = ~mask.any(-1, keepdim=True)
    column = None if sinks is None else sinks.to(q.dtype)[:, None, None].expand(*scores.shape[:3], 1)
    scores = scores if column is None else torch.cat((scores, column), -1)
    weights = scores.masked_fill(blind & torch.ones_like(scores, dtype=torch.bool), 0.0).softmax(-1)[..., : k.shape[2]]
    return weights.masked_fill(blind, 0.0) @ v


def relative_error(found, truth):
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).abs().max() / truth.abs().max().clamp(min=0.1))


def assert_is_the_formula(out, inputs, mask, scale, case, *, gradients=True, floor=2e-5):
    """At most 2 times the error of the formula in its own dtype against float64, 3 times for the gradients."""
    inputs = [x for x in inputs if x is not None]
    dout = torch.randn(out.shape).to(out)
    found = torch.autograd.grad(out, inputs, dout) if gradients else ()
    results = []
    for number in (torch.float64, out.dtype):
        cast = [x.detach().to(number).requires_grad_() for x in inputs]
        other = rough_attention(*cast[:3], mask, scale, cast[3] if len(cast) > 3 else None)
        results.append((other, torch.autograd.grad(other, cast, dout.to(number))))
    (truth, truth_grads), (rough, rough_grads) = results
    assert relative_error(out, truth) <= 2 * relative_error(rough, truth) + 1e-5, case
    for name, a, b, c in zip("qkvs", found, truth_grads, rough_grads, strict=False):
        assert a.isfinite().all(), case
        assert relative_error(a, b) <= 3 * relative_error(c, b) + floor, f"d{name} {case}"


KINDS = {
    "window": lambda S: sp.sliding_window(max(1, S // 3)),
    "strided": lambda S: sp.strided(max(1, S // 7)),
    "documents": lambda S: sp.documents(torch.randint(0, 4, (S,)).sort().values) & sp.causal(),
    "documents a row": lambda S: sp.documents(torch.randint(0, 4, (2, S)).sort().values),
    "sinks and a window": lambda S: (sp.global_tokens([0]) & sp.causal()) | sp.sliding_window(40),
    "everything": lambda S: sp.everything(),
    "blind rows": lambda S: sp.Segments(40) & sp.global_tokens([50]) & sp.causal(),
    "chosen": None,
}
SIZES = [(1, 9), (7, 300), (128, 128), (257, 257), (333, 100), (500, 1027)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("device", "step"), PLACES)
def test_the_operator_and_its_gradients_are_the_float64_formula(device, step, kind):
    torch.manual_seed(len(kind))
    dims = (8, 17) if device == "cpu" or step == "0" else (32, 40, 64, 80, 96, 128)
    for n, (T, S) in enumerate(SIZES if device == "cuda" else SIZES[:5]):
        dtype = (
            torch.float32 if step == "0" else (torch.bfloat16, torch.float16, torch.float32)[n % (2 + (step == "cpu"))]
        )
        d, heads, causal = dims[n % len(dims)], [(4, 2), (3, 3), (6, 1)][n % 3], n % 2 == 1
        q = torch.randn(2, heads[0], T, d).to(device, dtype).requires_grad_()
        k, v = (torch.randn(2, heads[1], S, d).to(device, dtype).requires_grad_() for _ in "kv")
        sinks = torch.randn(heads[0], device=device, requires_grad=True) if n % 3 == 1 else None
        scale = -0.2 if n == 3 else 0.3
        if kind == "chosen":
            chosen = draw_chosen(T, S, (heads[1], 1, heads[0])[n % 3], 3, seed=n)
            mask = mask_of_chosen(chosen, T, S, heads[0], causal)
            out = sp.attend_chosen(q, k, v, chosen.to(device), causal=causal, scale=scale, sinks=sinks, step=step)
        else:
            pattern = KINDS[kind](S)
            mask = (pattern & sp.causal() if causal else pattern).mask(T, S)
            options = (pattern.handle, causal, scale, step)
            out = torch.ops.tformer_lab.sparse_attention(q, k, v, sinks, None, *options)[0]
        assert_is_the_formula(
            out, (q, k, v, sinks), mask.to(device), scale, f"{kind} {T} {S} {d} {heads} {causal} {dtype}"
        )


@pytest.mark.parametrize(("device", "step"), PLACES)
@pytest.mark.parametrize("kind", ["pattern", "chosen"])
def test_the_operator_passes_opcheck_and_compiles(device, step, kind):
    dtype = torch.bfloat16 if device == "cuda" and step != "0" else torch.float32
    q, k, v = (x.to(device, dtype).requires_grad_() for x in make(200, head_dim=16, value_dim=16))
    sinks = torch.zeros(4, device=device, requires_grad=True)
    pattern = sp.sliding_window(30)
    chosen = draw_chosen(200, 200, 1, 2, 0).to(device) if kind == "chosen" else None
    args = (q, k, v, sinks, chosen, pattern.handle, True, 0.25, step)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    close = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(torch.ops.tformer_lab.sparse_attention, args, test_utils=utils, **close)

    def loss(q, k, v):
        if kind == "chosen":
            return sp.attend_chosen(q, k, v, chosen, causal=True, sinks=sinks, step=step).square().sum()
        return sp.attend(q, k, v, pattern=pattern, causal=True, sinks=sinks, step=step).square().sum()

    torch.compiler.reset()  # each case compiles the doors anew, and Dynamo gives up after eight
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (loss, compiled)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **close)


def test_step_0_knows_sinks_and_lists_agree_with_buckets():
    q, k, v = (x.requires_grad_() for x in make(150, 200))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for pattern in (sp.strided(9), sp.documents(torch.randint(0, 5, (2, 200)).sort().values), sp.longformer(10, [0])):
        a = sp.attend(q, k, v, pattern=pattern, block=16, sinks=sinks)
        b = torch.ops.tformer_lab.sparse_attention(q, k, v, sinks, None, pattern.handle, False, 8**-0.5, "0")[0]
        truth = rough_attention(q, k, v, pattern.mask(150, 200), 8**-0.5, sinks)
        for found in (a, b):
            torch.testing.assert_close(found, truth, atol=1e-12, rtol=1e-12)
            for x, y in zip(
                *(torch.autograd.grad(o.square().sum(), (q, k, v, sinks), retain_graph=True) for o in (found, truth)),
                strict=True,
            ):
                torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("device", "step"), PLACES)
@pytest.mark.parametrize("window", [None, 24])
def test_sinks_are_those_of_gpt_oss_in_transformers(device, step, window):
    from types import SimpleNamespace

    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 90, 64) for heads in (8, 2, 2))
    sinks = torch.randn(8)
    module = SimpleNamespace(sinks=sinks, num_key_value_groups=4, training=False)
    pattern = sp.causal() if window is None else sp.sliding_window(window)
    bias = torch.zeros(90, 90).masked_fill(~pattern.mask(90), -torch.inf)[None, None]
    theirs = eager_attention_forward(module, q, k, v, bias, scaling=0.125)[0].transpose(1, 2)
    dtype = torch.bfloat16 if device == "cuda" and step != "0" else torch.float32
    ours = sp.attend(*(x.to(device, dtype) for x in (q, k, v)), pattern=pattern, sinks=sinks.to(device), step=step)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours.cpu().float(), theirs, atol=tolerance, rtol=tolerance)


@needs_hopper
def test_the_kernel_is_the_default_in_graphs_on_streams_and_in_models():
    q, k, v = (x.to("cuda", torch.bfloat16) for x in make(1000, head_dim=64, value_dim=64, batch=1))
    pattern = sp.sliding_window(100)
    expected = sp.attend(q, k, v, pattern=pattern, step=0)
    found = sp.attend(q, k, v, pattern=pattern)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = sp.attend(q + 0, k, v, pattern=pattern)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        in_graph = sp.attend(q, k, v, pattern=pattern)
    in_graph.fill_(torch.nan)
    graph.replay()
    graph.replay()
    for out in (found, on_stream, in_graph):
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sp.attend(q, k, v, pattern=pattern)
    assert any("sparse" in event.key and "forward_kernel" in event.key for event in profile.key_averages())


def test_a_pattern_that_nobody_holds_lives_until_its_gradients():
    q, k, v = (x.requires_grad_() for x in make(100))
    handle_and_options = (sp.sliding_window(7).handle, False, 0.3, "0")
    with pytest.raises(ValueError, match="no pattern has the handle"):
        torch.ops.tformer_lab.sparse_attention(q, k, v, None, None, *handle_and_options)
    held = sp.sliding_window(7)
    out = torch.ops.tformer_lab.sparse_attention(q, k, v, None, None, held.handle, False, 0.3, "0")[0]
    del held
    gc.collect()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    truth = rough_attention(q, k, v, sp.sliding_window(7).mask(100), 0.3, None)
    for found, expected in zip(grads, torch.autograd.grad(truth.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_a_copied_pattern_is_its_own():
    pattern = sp.sliding_window(5)
    other = copy.deepcopy(pattern)
    assert other == pattern
    assert other.handle != pattern.handle
    assert sp.patterns.pattern_of(other.handle) is other
    assert sp.patterns.pattern_of(pattern.handle) is pattern


def test_the_operators_refuse_what_the_doors_do():
    q, k, v = make(150)
    out, lse = torch.zeros(2, 4, 150, 8, dtype=torch.float64), torch.zeros(2, 4, 150, dtype=torch.float64)
    options, handle = (True, 0.3, "0"), sp.everything()
    forward, backward = torch.ops.tformer_lab.sparse_attention, torch.ops.tformer_lab.sparse_attention_backward
    with pytest.raises(ValueError, match="q has head_dim 8, k has head_dim 7"):
        forward(q, k[..., :7], v, None, None, handle.handle, *options)
    with pytest.raises(ValueError, match="takes a choice of 1 or 4 heads, got 2"):
        forward(q, k, v, None, torch.zeros(1, 2, 2, 1, dtype=torch.long), -1, *options)
    with pytest.raises(ValueError, match=r"dout must be \(2, 4, 150, 8\) on cpu, got \(2, 4, 149, 8\)"):
        backward(out[:, :, 1:], None, q, k, v, out, lse, None, handle.handle, *options)
    with pytest.raises(ValueError, match=r"lse must be \(2, 4, 150\) on cpu, got \(2, 4, 149\)"):
        backward(out, None, q, k, v, out, lse[..., 1:], None, handle.handle, *options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": torch.zeros(1, 1, 2, 2)}, "integers on cpu"),
        ({"chosen": torch.zeros(1, 1, 3, 2, dtype=torch.long)}, "must have 2 tiles of 128 queries, got 3"),
        ({"chosen": torch.zeros(1, 3, 2, 2, dtype=torch.long)}, "must have 1 or 2 or 4 heads, got 3"),
        ({"chosen": torch.zeros(1, 1, 2, 5, dtype=torch.long)}, "must have at most 3 blocks, got 5"),
        ({"chosen": torch.full((1, 1, 2, 2), 3)}, "must hold blocks 0 to 2, or -1 for none, got 3"),
        ({"chosen": torch.full((1, 1, 2, 2), -2)}, "must hold blocks 0 to 2, or -1 for none, got -2"),
        ({"chosen": torch.ones(1, 1, 2, 2, dtype=torch.long)}, "a block at most once in a list"),
        ({"sinks": torch.zeros(3)}, r"sinks must be \(4,\) floats on cpu, got \(3,\)"),
        ({"step": 2}, "step 2 cannot do this: it runs on cuda"),
        ({"step": "cuda"}, "step must be one of"),
    ],
)
def test_wrong_choices_are_refused_by_name(change, message):
    q, k, v = make(150)
    given = {"chosen": torch.tensor([0, -1]).expand(1, 1, 2, 2), **change}
    with pytest.raises(ValueError, match=message):
        sp.attend_chosen(q, k, v, given.pop("chosen"), **given)


@needs_hopper
@pytest.mark.parametrize("step", [1, 2])
def test_numbers_past_2_to_the_31_are_attended(step):
    heads, T = 132, 2**17  # 2.2e9 numbers of q; all heads share one of k and v
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GB of free GPU memory")
    q = torch.randn(1, heads, T, 128, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(1, 1, T, 128, dtype=torch.bfloat16, device="cuda") for _ in "kv")
    pattern = sp.sliding_window(100)
    out = sp.attend(q, k, v, pattern=pattern, step=step)
    last = sp.attend(q[:, -1:, -1000:], k, v, pattern=pattern, step=0)
    torch.testing.assert_close(out[:, -1:, -1000:], last, atol=2e-2, rtol=2e-2)


@needs_hopper
def test_deterministic_algorithms_are_kept_to():
    q, k, v = (x.to("cuda", torch.bfloat16).requires_grad_() for x in make(700, head_dim=64, value_dim=64))
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS asks for a setting of the environment
    try:
        with pytest.warns(UserWarning, match="its blocks add to dq in any order"):
            grads = [torch.autograd.grad(sp.attend(q, k, v, pattern=sp.causal()).sum(), (q, k, v)) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def drawn_inputs(seed, head_dims):
    """Lengths to 4,099, ratios of heads, cut and transposed inputs on a GPU; and the generator to draw on with."""
    draw = random.Random(seed)
    T, S = (draw.choice((1, 63, 64, 65, 127, 129, draw.randint(1, 700), draw.randint(700, 4099))) for _ in "qk")
    d, group, kv_heads = draw.choice(head_dims), draw.choice((1, 2, 3, 8)), draw.choice((1, 2))
    dtype = draw.choice((torch.bfloat16, torch.float16))
    torch.manual_seed(seed)

    def made(heads, length):
        wide = torch.randn(1, length, heads, 2 * d, device="cuda").to(dtype)
        x = wide[..., :d].transpose(1, 2) if draw.random() < 0.5 else wide[..., d:].contiguous().transpose(1, 2)
        return x.detach().requires_grad_()

    q, k, v = made(group * kv_heads, T), made(kv_heads, S), made(kv_heads, S)
    sinks = torch.randn(group * kv_heads, device="cuda", requires_grad=True) if draw.random() < 0.3 else None
    return draw, q, k, v, sinks


@needs_hopper
@pytest.mark.parametrize("seed", range(24))
def test_shapes_drawn_afresh_are_the_float64_formula(seed):
    """Head_dim to 256, any pattern; both steps."""
    draw, q, k, v, sinks = drawn_inputs(seed, (32, 40, 64, 72, 96, 128, 160, 192, 256))
    T, S, d = q.shape[2], k.shape[2], q.shape[3]
    step, window, causal = 2 if d > 128 else draw.choice((1, 2)), draw.randint(1, S), draw.random() < 0.5
    pattern = draw.choice(
        (
            sp.sliding_window(window),
            sp.dilated(max(1, window // 5), 5),
            sp.strided(max(1, window // 3)),
            sp.longformer(window, [0, S // 2]),
            sp.Segments(window),
            sp.documents(torch.randint(0, 5, (S,)).sort().values),
            sp.everything(),
        )
    )
    mask = (pattern & sp.causal() if causal else pattern).mask(T, S).cuda()
    out = sp.attend(q, k, v, pattern=pattern, causal=causal, sinks=sinks, step=step)
    case = f"{T} {S} {d} {q.shape[1]} {k.shape[1]} {q.dtype} {step} {pattern} {causal}"
    floor = torch.finfo(q.dtype).eps * 4 if S == 1 or window == 1 else 2e-5  # one key: the true dq and dk are zero
    assert_is_the_formula(out, (q, k, v, sinks), mask, d**-0.5, case, gradients=d <= 128, floor=floor)


@needs_hopper
@pytest.mark.parametrize("seed", range(24))
def test_choices_drawn_afresh_are_the_float64_formula(seed):
    """Any number of blocks for every tile, for every head or for all; both steps."""
    draw, q, k, v, sinks = drawn_inputs(seed, (32, 40, 64, 72, 96, 128))
    (heads, T, d), S = q.shape[1:], k.shape[2]
    step, causal = draw.choice((1, 2)), draw.random() < 0.5
    chosen = draw_chosen(T, S, draw.choice((1, k.shape[1], heads)), draw.choice((1, 2, 5, 64)), seed)
    mask = mask_of_chosen(chosen, T, S, heads, causal).cuda()
    out = sp.attend_chosen(q, k, v, chosen.cuda(), causal=causal, sinks=sinks, step=step)
    case = f"{T} {S} {d} {heads} {k.shape[1]} {q.dtype} {step} {chosen.shape} {causal}"
    floor = torch.finfo(q.dtype).eps * 4 if S == 1 else 2e-5
    assert_is_the_formula(out, (q, k, v, sinks), mask, d**-0.5, case, floor=floor)


@pytest.mark.parametrize("step", [None, 0])
def test_tensors_without_numbers_have_a_shape(step):
    q, k = torch.empty(2, 4, 50, 8, device="meta"), torch.empty(2, 2, 70, 8, device="meta")
    assert sp.attend(q, k, k, pattern=sp.sliding_window(9), step=step).shape == q.shape
