"""The attention contract: what every attention form promises, over every form and every device that the machine has.

A new form joins by one line in FORMS. What it cannot do is said there, in its flags, and is then not asked of it.
The oracle is the plain formula, written out below. In float64 it is the truth; in a lower precision its error is the
measure: a form may have twice that error in its results, three times in its gradients, plus 1e-5.
"""

import importlib
import importlib.util
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tformer_lib import jit, sparse_attention
from tformer_lib.flash_attention import RUNGS
from tformer_lib.kv_cache import CacheShape, GrowingCache, PreallocatedCache
from tformer_lib.paged_attention import PagedKVCache

pytestmark = pytest.mark.usefixtures("one_thread")

ALL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def plain_attention(q, k, v, *, mask=None, causal=False, scale=None):
    """Softmax attention as the formula stands, every step in the dtype of the inputs."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    allowed = who_sees_whom(q, k, mask, causal)
    sees_something = allowed.any(-1, keepdim=True)
    weights = scores.masked_fill(~allowed & sees_something, -torch.inf).softmax(-1) * sees_something
    return torch.einsum("bhts,bhsd->bhtd", weights, v)


def plain_linear_attention(q, k, v, *, mask=None, causal=False, scale=None):
    """Linear attention with elu + 1 as the formula stands, every step in the dtype of the inputs."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    root = (q.shape[3] ** -0.5 if scale is None else scale) ** 0.5
    weights = (F.elu(q * root) + 1) @ (F.elu(k * root) + 1).mT
    weights = torch.where(who_sees_whom(q, k, mask, causal), weights, 0.0)
    total = weights.sum(-1, keepdim=True)
    return weights @ v / torch.where(total > 0, total, 1.0)


def who_sees_whom(q, k, mask, causal):
    """(batch, heads, T, S) boolean, by comparing positions counted from the end."""
    T, S = q.shape[2], k.shape[2]
    allowed = torch.ones(q.shape[0], q.shape[1], T, S, dtype=torch.bool, device=q.device)
    if causal:
        from_the_end_q = torch.arange(T - 1, -1, -1, device=q.device)
        from_the_end_k = torch.arange(S - 1, -1, -1, device=q.device)
        allowed &= from_the_end_k[None, :] >= from_the_end_q[:, None]
    return allowed if mask is None else allowed & mask


@dataclass(frozen=True)
class Form:
    """An attention form and what it can do.

    Args:
        name: shown in test names.
        path: "module:function", skipped while the module is not there.
        options: keyword arguments that are always given to it.
        oracle: the plain formula that it computes; takes q, k, v, mask, causal and scale in any dtype.
        bidirectional, masks, value_dim, gradients, empty: whether it has a non-causal form, takes masks, takes a
            value_dim that differs from head_dim, can be differentiated, and takes lengths of 0.
        rounds_once: whether all is computed in float32 or better until the result is rounded: where torch's own kernels
            and tensor cores take over, weights are rounded to the dtype of v before they meet it.
        needs: a function that says whether this machine can run it (a compiler, a GPU).
    """

    name: str
    path: str
    options: dict = field(default_factory=dict)
    oracle: Callable = plain_attention
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    head_dims: tuple[int, ...] = (16, 40, 59)
    bidirectional: bool = True
    masks: bool = True
    value_dim: bool = True
    gradients: bool = True
    empty: bool = True
    rounds_once: bool = True
    needs: Callable[[], bool] = lambda: True

    @property
    def exists(self):
        return importlib.util.find_spec(self.path.split(":")[0]) is not None and self.needs()

    @property
    def dtype(self):
        """The dtype of the tests that need one alone: float32, or the first of those that it takes."""
        return torch.float32 if torch.float32 in self.dtypes else self.dtypes[0]

    def assert_close(self, found, expected):
        """The same numbers, summed in another order."""
        tolerance = max(2e-5, 4 * torch.finfo(found.dtype).eps)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)

    @property
    def attend(self):
        module, function = self.path.split(":")
        return partial(getattr(importlib.import_module(module), function), **self.options)


def has_gpu(*capabilities):
    """Whether torch sees a CUDA device, of one of the compute capabilities if any are given."""
    return torch.cuda.is_available() and (not capabilities or torch.cuda.get_device_capability() in capabilities)


def flash_step(step, dtypes, *, needs=has_gpu, head_dims=(16, 40, 59)):
    """A CUDA step of the flash-attention ladder."""
    options = {"devices": ("cuda",), "masks": False, "value_dim": False, "rounds_once": dtypes == (torch.float32,)}
    path = "tformer_lib.flash_attention:flash_attention"
    return Form(f"flash-{step}", path, {"step": step}, dtypes=dtypes, head_dims=head_dims, needs=needs, **options)


def linear_step(step, dtypes):
    """A CUDA step of the ladder of linear attention."""
    options = {"devices": ("cuda",), "bidirectional": False, "masks": False, "oracle": plain_linear_attention}
    return Form(
        f"linear-{step}", LINEAR, {"step": step}, dtypes=dtypes, head_dims=(16, 40, 64), needs=has_gpu, **options
    )


HALVES = (torch.bfloat16, torch.float16)
LINEAR = "tformer_lib.linear_attention:attend"
FORMS = [
    Form("attention", "tformer_lib.attention:attend"),
    Form("attention-sdpa", "tformer_lib.attention:attend_sdpa", rounds_once=False),
    Form("attention-scores", "tformer_lib.attention:attend_scores"),
    Form("repeated-heads", "tformer_lib.grouped_query_attention:attend_repeated"),
    Form("linear", LINEAR, oracle=plain_linear_attention, masks=False),
    Form("linear-operator", LINEAR, {"step": 0}, oracle=plain_linear_attention, bidirectional=False, masks=False),
    Form(
        "linear-cpu",
        LINEAR,
        {"step": "cpu"},
        oracle=plain_linear_attention,
        devices=("cpu",),
        dtypes=(torch.float32, *HALVES),
        bidirectional=False,
        masks=False,
        needs=jit.can_build_cpp,
    ),
    linear_step(1, (torch.float32, *HALVES)),
    linear_step(2, HALVES),
    Form("linear-parallel", "tformer_lib.linear_attention:parallel", oracle=plain_linear_attention),
    Form("flash", "tformer_lib.flash_attention:flash_attention"),
    Form("flash-tiled", "tformer_lib.flash_attention:flash_attention", {"step": 0}),
    flash_step(1, (torch.float32,)),
    flash_step(2, (torch.float32,)),
    flash_step(3, HALVES, head_dims=(16, 40, 64)),
    flash_step(4, HALVES, head_dims=(16, 40, 64), needs=partial(has_gpu, (9, 0))),
    *(flash_step(rung, HALVES[:1], head_dims=(40, 64)) for rung in RUNGS["3"]),
    *(flash_step(rung, HALVES[:1], head_dims=(40, 64), needs=partial(has_gpu, (9, 0))) for rung in RUNGS["4"]),
    Form("sparse", "tformer_lib.sparse_attention:attend", {"pattern": sparse_attention.everything(), "block": 16}),
    Form(
        "sparse-cpu",
        "tformer_lib.sparse_attention:attend",
        {"pattern": sparse_attention.everything(), "step": "cpu"},
        devices=("cpu",),
        dtypes=(torch.float32, *HALVES),
        masks=False,
        value_dim=False,
        needs=jit.can_build_cpp,
    ),
    *(
        Form(
            f"sparse-{step}",
            "tformer_lib.sparse_attention:attend",
            {"pattern": sparse_attention.everything(), "step": step},
            devices=("cuda",),
            dtypes=HALVES,
            head_dims=(16, 40, 64),
            masks=False,
            value_dim=False,
            needs=needs,
        )
        for step, needs in ((1, has_gpu), (2, partial(has_gpu, (9, 0))))
    ),
]
CACHES = {"growing": GrowingCache, "preallocated": partial(PreallocatedCache, capacity=40)}
CACHES |= {"paged": partial(PagedKVCache, blocks=24, block_size=4)}
HERE = [(form, device) for form in FORMS for device in DEVICES if form.exists and device in form.devices]
IDS = [f"{form.name}-{device}" for form, device in HERE]
over_forms = pytest.mark.parametrize(("form", "device"), HERE, ids=IDS)


LENGTHS = [(1, 1), (1, 7), (7, 7), (7, 33), (33, 7), (1, 257), (33, 33), (33, 257), (257, 257)]
HEADS = [(6, 6), (6, 3), (6, 2), (6, 1)]


def make(form, device, dtype, lengths, heads=(6, 2), head_dim=None, batch=2, seed=0):
    """Random q, k, v: (batch, heads, T, head_dim) and twice (batch, kv_heads, S, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    (T, S), (query_heads, kv_heads) = lengths, heads
    head_dim = form.head_dims[0] if head_dim is None else head_dim
    shapes = [(batch, query_heads, T, head_dim)] + 2 * [(batch, kv_heads, S, head_dim)]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes)


def random_mask(q, k, seed=1):
    """A random mask; the first query of every head is blind, and so is all of head 0 in the last row of the batch."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(q.shape[0], q.shape[1], q.shape[2], k.shape[2], generator=generator) < 0.6
    mask[:, :, 0] = False
    mask[-1, 0] = False
    return mask.to(q.device)


def situations(form, q, k):
    """The (mask, causal) pairs that a form takes."""
    pairs = [(None, True)] + [(None, False)] * form.bidirectional
    if form.masks:
        pairs += [(random_mask(q, k), True)] + [(random_mask(q, k), False)] * form.bidirectional
    return pairs


def assert_within(found, plain, truth, factor, what):
    """The error of ``found`` is at most ``factor`` times that of the plain formula in the same dtype, plus 1e-5."""
    assert found.shape == truth.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(truth.shape)}"
    assert found.isfinite().all(), f"{what}: not finite"
    if truth.numel() == 0:
        return
    error, allowed = ((x.double() - truth).abs().max().item() for x in (found, plain))
    assert error <= factor * allowed + 1e-5, f"{what}: error {error:.2e}, the plain formula's is {allowed:.2e}"


def check_against_oracle(form, q, k, v, mask, causal, scale=None):
    found = form.attend(q, k, v, mask=mask, causal=causal, scale=scale)
    plain = form.oracle(q, k, v, mask=mask, causal=causal, scale=scale)
    truth = form.oracle(q.double(), k.double(), v.double(), mask=mask, causal=causal, scale=scale)
    assert found.dtype == q.dtype
    assert_within(found, plain, truth, 2, f"{q.dtype}, mask {mask is not None}, causal {causal}")


# ---- results


@over_forms
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_equals_the_float64_oracle(form, device, lengths):
    batch, heads = (1, (2, 1)) if min(lengths) > 100 else (2, (6, 2))
    for dtype in form.dtypes:
        q, k, v = make(form, device, dtype, lengths, heads, batch=batch)
        for mask, causal in situations(form, q, k):
            check_against_oracle(form, q, k, v, mask, causal)


@over_forms
@pytest.mark.parametrize("autocast", [False, True])
def test_results_are_rounded_once(form, device, autocast):
    """Scores and sums are kept in float32, or in float64 for float64, whatever autocast does to matrix products."""
    kernels = device == "cuda" and form.name.partition("-")[0] in ("flash", "sparse", "linear")
    if not form.rounds_once or kernels:
        pytest.skip("its kernels round the weights as well")
    for dtype in form.dtypes:
        q, k, v = make(form, device, dtype, (33, 257))
        q, k = 2 * q, 2 * k
        for mask, causal in situations(form, q, k):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
                found = form.attend(q, k, v, mask=mask, causal=causal)
            truth = form.oracle(q.double(), k.double(), v.double(), mask=mask, causal=causal)
            kept = 1e-12 if dtype == torch.float64 else 2e-5
            allowed = kept + truth.abs() * torch.finfo(dtype).eps / 2
            worst = ((found.double() - truth).abs() / allowed).max().item()
            assert worst <= 1, f"{dtype}, causal {causal}: {worst:.2f} times what one rounding allows"


@over_forms
def test_scores_past_what_float16_holds_do_not_overflow(form, device):
    """Without a scale, 100 * 100 * 16 is 160,000, and float16 ends at 65,504."""
    for dtype in form.dtypes:
        q, k, v = make(form, device, dtype, (7, 33))
        large, sign = q.sign() * 100, k.sign() * 100
        found = form.attend(large, sign, v, causal=True, scale=1.0)
        truth = form.oracle(large.double(), sign.double(), v.double(), causal=True, scale=1.0)
        torch.testing.assert_close(found.double(), truth, atol=2e-2, rtol=2e-2)


@over_forms
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_every_ratio_of_kv_heads_and_odd_head_dims(form, device, heads):
    for head_dim in form.head_dims:
        q, k, v = make(form, device, form.dtypes[-1], (7, 33), heads, head_dim)
        for mask, causal in situations(form, q, k):
            check_against_oracle(form, q, k, v, mask, causal)


@over_forms
def test_value_dim_may_differ(form, device):
    if not form.value_dim:
        pytest.skip("takes one head_dim only")
    q, k, v = make(form, device, form.dtype, (7, 33))
    check_against_oracle(form, q, k, v[..., :5], None, True)


@over_forms
def test_scale_is_used(form, device):
    q, k, v = make(form, device, form.dtype, (7, 33))
    for scale in (1.0, 0.03):
        check_against_oracle(form, q, k, v, None, True, scale=scale)


@over_forms
@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_a_scale_need_not_be_positive(form, device, scale):
    """Of 0 it makes means, below 0 it prefers what matches least; what is hidden stays hidden."""
    q, k, v = make(form, device, form.dtype, (33, 33))
    if form.oracle is plain_linear_attention:
        with pytest.raises(ValueError, match="scale must be positive, since its root goes to each side"):
            form.attend(q, k, v, causal=True, scale=scale)
        return
    for dtype in form.dtypes:
        for lengths in ((33, 33), (7, 33), (1, 33)):
            q, k, v = make(form, device, dtype, lengths)
            for mask, causal in situations(form, q, k):
                check_against_oracle(form, q, k, v, mask, causal, scale=scale)
    if not form.gradients:
        return
    given = (*make(form, device, form.dtype, (33, 33)), make(form, device, form.dtype, (33, 33), seed=3)[0])
    found = gradients(partial(form.attend, scale=scale), *given, None, True)
    plain = gradients(partial(form.oracle, scale=scale), *given, None, True)
    truth = gradients(partial(form.oracle, scale=scale), *(x.double() for x in given), None, True)
    for name, f, p, t in zip("qkv", found, plain, truth, strict=True):
        assert_within(f, p, t, 3, f"gradient of {name} at scale {scale}")


@over_forms
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_a_scale_that_is_not_finite_is_refused(form, device, scale):
    q, k, v = make(form, device, form.dtype, (7, 33))
    with pytest.raises(ValueError, match=re.escape(f"scale must be finite in float32, got {scale}")):
        form.attend(q, k, v, causal=True, scale=scale)


@over_forms
def test_a_mask_may_have_any_shape_that_broadcasts(form, device):
    if not form.masks:
        pytest.skip("takes no mask")
    q, k, v = make(form, device, form.dtype, (7, 33))
    mask = random_mask(q, k)
    for part in (
        mask[:1],
        mask[:, :1],
        mask[:1, :1],
        mask[:, :1, 3:4],
        mask[0, 1],
        mask[0, 1, 2],
        mask[..., 5:6],
    ):
        for causal in (True, False) if form.bidirectional else (True,):
            check_against_oracle(form, q, k, v, part, causal)


@over_forms
def test_large_scores_do_not_overflow(form, device):
    for dtype in form.dtypes:
        q, k, v = make(form, device, dtype, (7, 33))
        out = form.attend(q * 60, k * 60, v, causal=True)
        assert out.isfinite().all()
        assert out.abs().max() <= v.abs().max() * 1.01 or form.oracle is not plain_attention


@over_forms
def test_lengths_of_zero(form, device):
    if not form.empty:
        pytest.skip("takes no empty input")
    for T, S, batch in ((0, 5, 2), (3, 0, 2), (0, 0, 2), (3, 5, 0)):
        q, k, v = make(form, device, form.dtype, (T, S), batch=batch)
        for causal in (True, False) if form.bidirectional else (True,):
            out = form.attend(q, k, v, causal=causal)
            assert out.shape == q.shape
            assert (out == 0).all()


# ---- nobody peeks


@over_forms
def test_a_changed_future_token_changes_no_earlier_output(form, device):
    q, k, v = make(form, device, form.dtype, (33, 33))
    before = form.attend(q, k, v, causal=True)
    for cut in (1, 16, 32):
        q2, k2, v2 = (x.clone() for x in (q, k, v))
        for x in (q2, k2, v2):
            x[:, :, cut:] = 50 * torch.randn_like(x[:, :, cut:])
        after = form.attend(q2, k2, v2, causal=True)
        assert torch.equal(before[:, :, :cut], after[:, :, :cut]), (
            f"changing positions from {cut} on changed one before"
        )
        assert not torch.equal(before[:, :, cut:], after[:, :, cut:])


@over_forms
def test_the_last_queries_alone_equal_the_full_pass(form, device):
    """What a cache relies on: causal is aligned to the bottom right."""
    q, k, v = make(form, device, form.dtype, (33, 33))
    full = form.attend(q, k, v, causal=True)
    for T in (1, 7, 32):
        form.assert_close(form.attend(q[:, :, -T:], k, v, causal=True), full[:, :, -T:])


@over_forms
@pytest.mark.parametrize("name", CACHES)
def test_cached_equals_uncached(form, device, name):
    """Token by token, in ragged pieces or at once: a cache gives what the full pass gives."""
    q, k, v = make(form, device, form.dtype, (33, 33))
    full = form.attend(q, k, v, causal=True)
    shape = CacheShape(layers=1, batch=2, kv_heads=2, head_dim=q.shape[3], dtype=q.dtype, device=device)
    for pieces in ((1,) * 33, (7, 1, 20, 5), (33,)):
        cache, outputs = CACHES[name](shape), []
        for piece in zip(*(x.split(pieces, 2) for x in (q, k, v)), strict=True):
            outputs.append(cache.layer(0).attend(*piece, attend=form.attend))
            cache.advance(piece[0].shape[2])
        form.assert_close(torch.cat(outputs, 2), full)


@over_forms
def test_a_masked_token_has_no_influence(form, device):
    if not form.masks:
        pytest.skip("takes no mask")
    q, k, v = make(form, device, form.dtype, (7, 33))
    mask = torch.ones(33, dtype=torch.bool, device=device)
    mask[[0, 20]] = False
    before = form.attend(q, k, v, mask=mask, causal=True)
    k[:, :, ~mask], v[:, :, ~mask] = 40.0, -1e4
    assert torch.equal(before, form.attend(q, k, v, mask=mask, causal=True))


@over_forms
def test_a_blind_query_gets_zeros_and_gives_zero_gradients(form, device):
    for dtype in form.dtypes:
        q, k, v = (x.requires_grad_(form.gradients) for x in make(form, device, dtype, (33, 7)))
        cases = [(None, 26)]  # causal and T > S: the first T - S queries stand before every key
        if form.masks:
            cases.append((torch.arange(33, device=device)[:, None] >= 30, 30))
        for mask, blind in cases:
            out = form.attend(q, k, v, mask=mask, causal=True)
            assert (out[:, :, :blind] == 0).all()
            assert (out[:, :, blind:] != 0).any(-1).all()
            if form.gradients:
                grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
                assert all(g.isfinite().all() for g in grads)
                assert (grads[0][:, :, :blind] == 0).all()


# ---- gradients


@over_forms
@pytest.mark.parametrize("lengths", [(1, 7), (33, 33), (7, 33), (33, 7)], ids=str)
def test_gradients_equal_the_float64_oracle(form, device, lengths):
    if not form.gradients:
        pytest.skip("has no backward")
    for dtype in form.dtypes:
        q, k, v = make(form, device, dtype, lengths)
        out_grad = make(form, device, dtype, lengths, seed=3)[0]
        for mask, causal in situations(form, q, k):
            found = gradients(form.attend, q, k, v, out_grad, mask, causal)
            plain = gradients(form.oracle, q, k, v, out_grad, mask, causal)
            truth = gradients(form.oracle, *(x.double() for x in (q, k, v, out_grad)), mask, causal)
            for name, f, p, t in zip("qkv", found, plain, truth, strict=True):
                assert_within(f, p, t, 3, f"gradient of {name} in {dtype}, mask {mask is not None}, causal {causal}")


def gradients(attend, q, k, v, out_grad, mask, causal):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    return torch.autograd.grad(attend(q, k, v, mask=mask, causal=causal), (q, k, v), out_grad)


# ---- memory


def transposed(x):
    """The same numbers, laid out as (batch, length, heads, head_dim), as projections leave them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_other(x):
    """The same numbers, with a hole after each."""
    return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1).flatten(-2)[..., ::2]


def with_an_offset(x):
    """The same numbers, starting one element into a storage, so that rows are not aligned to 16 bytes."""
    return torch.cat((x.new_full((1,), torch.nan), x.flatten()))[1:].view(x.shape)


def cut_from_wider_rows(x):
    """The same numbers, one NaN after each row, so that rows are not aligned to each other."""
    return torch.cat((x, torch.full_like(x[..., :1], torch.nan)), dim=-1)[..., :-1]


def cut_from_a_cache(x):
    """The same numbers, the front of a longer buffer whose rest is NaN."""
    return torch.cat((x, torch.full_like(x, torch.nan)), dim=2)[:, :, : x.shape[2]]


@over_forms
@pytest.mark.parametrize("layout", [transposed, every_other, with_an_offset, cut_from_wider_rows, cut_from_a_cache])
def test_inputs_need_not_be_contiguous(form, device, layout):
    for dtype in form.dtypes:
        q, k, v = make(form, device, dtype, (33, 33))
        expected = form.attend(q, k, v, causal=True)
        views = [layout(x) for x in (q, k, v)]
        assert all(torch.equal(a, b) for a, b in zip(views, (q, k, v), strict=True))
        close = partial(torch.testing.assert_close, rtol=0, atol=max(1e-6, 8 * torch.finfo(dtype).eps))
        close(form.attend(*views, causal=True), expected)
        close(form.attend(q, views[1], v, causal=True), expected)


@over_forms
def test_one_row_may_be_expanded_over_the_batch(form, device):
    q, k, v = make(form, device, form.dtype, (7, 33))
    k, v = k[:1], v[:1]
    wide = form.attend(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), causal=True)
    torch.testing.assert_close(wide, form.attend(q, k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1), causal=True))


@over_forms
def test_inputs_are_left_alone_and_results_repeat(form, device):
    q, k, v = make(form, device, form.dtype, (33, 33))
    copies = [x.clone() for x in (q, k, v)]
    first = form.attend(q, k, v, causal=True)
    assert torch.equal(first, form.attend(q, k, v, causal=True))
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True))


# ---- wrong inputs


def nested(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its interface will change
        return torch.nested.nested_tensor(list(x))


def ragged(x):
    return torch.nested.nested_tensor(list(x.transpose(1, 2)), layout=torch.jagged).transpose(1, 2)


def wrong_inputs():
    """Pairs of a change to good inputs and what the error must say."""
    return {
        "q has 3 dimensions": (lambda q, k, v: (q[0], k, v), r"q must have 4 dimensions.*\(6, 7, 16\)"),
        "batches differ": (lambda q, k, v: (q[:1], k, v), r"q has batch 1, k and v have batch 2"),
        "head_dims differ": (lambda q, k, v: (q[..., :8], k, v), r"q has head_dim 8, k has head_dim 16"),
        "no head_dim": (lambda q, k, v: (q[..., :0], k[..., :0], v), r"head_dim of at least 1, got .*, 7, 0\)"),
        "k and v lengths differ": (lambda q, k, v: (q, k[:, :, :5], v), r"k and v must agree.*5.*33"),
        "k and v heads differ": (lambda q, k, v: (q, k[:, :1], v), r"k and v must agree"),
        "heads do not divide": (lambda q, k, v: (q[:, :5], k, v), r"q has 5 heads, which 2 kv heads do not divide"),
        "dtypes differ": (lambda q, k, v: (q, k.double(), v), r"share a dtype, got torch.\w+, torch.float64"),
        "integers": (lambda q, k, v: (q.long(), k, v), r"q must be float64.*got torch.int64"),
        "not a tensor": (lambda q, k, v: (q, k, v.tolist()), r"v must be a tensor, got list"),
        "sparse": (
            lambda q, k, v: (q, k.to_sparse(), v),
            "k must be a dense tensor, got .*sparse_coo",
        ),
        "nested": (lambda q, k, v: (nested(q), nested(k), nested(v)), "q must be a dense tensor, got a nested tensor"),
        "ragged": (lambda q, k, v: (ragged(q), ragged(k), ragged(v)), "q must be a dense tensor, got a nested tensor"),
        "devices differ": (lambda q, k, v: (q, k.to("meta"), v), r"on one device, got .*meta"),
    }


@over_forms
@pytest.mark.parametrize("case", wrong_inputs())
def test_wrong_inputs_are_refused_by_name(form, device, case):
    change, message = wrong_inputs()[case]
    q, k, v = make(form, device, form.dtype, (7, 33), head_dim=16)
    with pytest.raises(ValueError, match=message):
        form.attend(*change(q, k, v), causal=True)


@over_forms
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(7, 33), "boolean tensor, True where a query may look, got torch.float32"),
        ([[True]], "boolean tensor, True where a query may look, got list"),
        (torch.ones(33, 7, dtype=torch.bool), r"broadcast to .* = \(2, 6, 7, 33\), got \(33, 7\)"),
        (torch.ones(1, 2, 6, 7, 33, dtype=torch.bool), r"broadcast to .* got \(1, 2, 6, 7, 33\)"),
        (torch.ones(7, 33, dtype=torch.bool, device="meta"), "on the device of q, .* got meta"),
    ],
    ids=["float", "list", "shape", "five dimensions", "device"],
)
def test_wrong_masks_are_refused_by_name(form, device, mask, message):
    if not form.masks:
        pytest.skip("takes no mask")
    q, k, v = make(form, device, form.dtype, (7, 33))
    mask = mask.to(device) if isinstance(mask, torch.Tensor) and mask.device.type == "cpu" else mask
    with pytest.raises(ValueError, match=message):
        form.attend(q, k, v, mask=mask, causal=True)
