"""Every kernel of paged attention that this machine can run, against step 0 in float64.

Memory that no row owns is NaN, and tables name nonsense past a row's last block: a kernel that reads either shows.
"""

import re

import pytest
import torch

from tformer_lib import jit
from tformer_lib.paged_attention import FP8, blocks_for, plan_attention, plan_write, write_cache
from tformer_lib.paged_attention import paged_attention as attention
from tformer_lib.paged_attention.kernels import ARGUMENTS, WRITE_ARGUMENTS

HAS_CPU_TWIN = jit.can_build_cpp()
HAS_GPU = torch.cuda.is_available()
IS_HOPPER = HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RAGGED = (0, 1, 15, 16, 17, 63, 64, 65, 333, 0, 1100, 7)

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
needs_hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")
needs_cpu_twin = pytest.mark.skipif(not HAS_CPU_TWIN, reason="needs a C++ compiler and ninja")
pytestmark = pytest.mark.filterwarnings("ignore:.*compile.*:UserWarning")


def backends(packed: bool):
    """(step, device, dtype) of every kernel that runs here."""
    found = [("cpu", "cpu", dtype) for dtype in (FP32, BF16)] if HAS_CPU_TWIN else []
    if HAS_GPU and packed:
        steps = ["prefill_tensor_core"] + ["prefill_hopper"] * IS_HOPPER
        found += [(step, "cuda", dtype) for step in steps for dtype in (BF16, FP16)]
    elif HAS_GPU:
        found += [(1, "cuda", FP32), (1, "cuda", BF16), (2, "cuda", BF16), (2, "cuda", FP16)]
    return [pytest.param(*x, id=f"{x[0]}-{str(x[2])[6:]}") for x in found]


every_decoder = pytest.mark.parametrize(("step", "device", "dtype"), backends(False))
every_prefill = pytest.mark.parametrize(("step", "device", "dtype"), backends(True))


def case(lengths, *, counts=None, heads=4, kv_heads=2, d=64, block_size=16, dtype=FP32, cache=None, device="cpu"):
    """Arguments of paged_attention, as a dictionary: rows of these lengths, in blocks all over the pool."""
    generator = torch.Generator().manual_seed(0)
    used = [blocks_for(n, block_size) for n in lengths]
    total = sum(used) + 2  # one that nobody owns in front, one behind
    shape = (total, kv_heads, block_size, d)
    pools = [torch.randn(shape, generator=generator).to(cache or dtype) for _ in range(2)]
    order = (torch.randperm(total - 2, generator=generator) + 1).tolist()
    tables = torch.full((len(lengths), max(used) + 1), 2**30, dtype=torch.int32)
    for row, n in enumerate(used):
        tables[row, :n] = torch.tensor([order.pop() for _ in range(n)], dtype=torch.int32)
    if cache is None:  # float8 has a NaN, but PyTorch cannot put it there
        for pool in pools:
            pool[0] = pool[-1] = torch.nan
            for row, n in enumerate(lengths):
                if n % block_size:
                    pool[tables[row, used[row] - 1], :, n % block_size :] = torch.nan
    queries = len(lengths) if counts is None else sum(counts)
    x = {
        "q": torch.randn(queries, heads, d, generator=generator).to(dtype),
        "k_pool": pools[0],
        "v_pool": pools[1],
        "block_tables": tables,
        "lengths": torch.tensor(lengths, dtype=torch.int32),
    }
    if counts is not None:
        x["query_starts"] = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    return {name: tensor.to(device) for name, tensor in x.items()}


def exact(x, **options):
    """Step 0 in float64, on the CPU."""
    wide = {name: tensor.cpu() for name, tensor in x.items()}
    for name in ("q", "k_pool", "v_pool"):
        wide[name] = wide[name].double()
    return attention(**wide, **options, step=0, return_lse=True)


def check(x, step, **options):
    """The kernel is as near to the truth as plain PyTorch in its precision is, up to a factor of two."""
    leave_nan_behind(x["q"])
    out, lse = attention(**x, **options, step=step, return_lse=True)
    true, true_lse = exact(x, **options)
    plain = attention(**x, **options, step=0)
    allowed = 2 * (plain.cpu().double() - true).abs().max().item() + 1e-5
    assert out.dtype == x["q"].dtype
    assert (out.cpu().double() - true).abs().max().item() <= allowed
    torch.testing.assert_close(lse.cpu().double(), true_lse, rtol=1e-4, atol=1e-4)
    again = attention(**x, **options, step=step, return_lse=True)
    assert torch.equal(out, again[0]), "two runs differ"
    assert torch.equal(lse, again[1]), "two runs differ"


def leave_nan_behind(q):
    """The allocator's next tensor of q's size is full of NaN, so that an output that was not written shows."""
    torch.full_like(q, torch.nan)


@every_decoder
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (3, 3), (16, 1), (20, 1), (24, 2)])
def test_decode_for_any_ratio_of_heads(step, device, dtype, heads):
    check(case(RAGGED, heads=heads[0], kv_heads=heads[1], dtype=dtype, device=device), step)


@every_decoder
@pytest.mark.parametrize("block_size", [1, 2, 8, 16, 32, 128, 256])
def test_decode_for_any_block_size(step, device, dtype, block_size):
    check(case(RAGGED, block_size=block_size, dtype=dtype, device=device), step)


@every_decoder
@pytest.mark.parametrize("d", [64, 128])
def test_decode_of_wide_and_long_rows(step, device, dtype, d):
    check(case((5000, 1, 2049), heads=8, d=d, dtype=dtype, device=device), step)


@every_decoder
@pytest.mark.parametrize("window", [1, 16, 100, 5000])
def test_decode_under_a_window(step, device, dtype, window):
    check(case(RAGGED, dtype=dtype, device=device), step, window=window)


@every_decoder
def test_decode_from_float8(step, device, dtype):
    check(case(RAGGED, dtype=dtype, cache=FP8, device=device), step, k_scale=0.5, v_scale=2.0)


@every_decoder
@pytest.mark.parametrize("scale", [0.3, 1.0, -0.2])
def test_decode_with_another_scale(step, device, dtype, scale):
    check(case(RAGGED, dtype=dtype, device=device), step, scale=scale)


@every_decoder
def test_rows_may_all_be_empty(step, device, dtype):
    out, lse = attention(**case((0, 0, 0), dtype=dtype, device=device), step=step, return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@every_decoder
def test_packed_rows_of_one_query_or_none(step, device, dtype):
    x = case((40, 9, 70, 5), counts=(1, 0, 1, 1), dtype=dtype, device=device)
    check(x, step, max_queries=1)


def with_other_strides(x):
    """vLLM's order of a pool, queries that are a slice of something wider, and a table inside a larger one."""
    for name in ("k_pool", "v_pool"):
        x[name] = x[name].transpose(1, 2).contiguous().transpose(1, 2)
    heads, most = x["q"].shape[1], x["block_tables"].shape[1]
    x["q"] = torch.cat((x["q"], x["q"]), dim=1)[:, :heads]
    x["block_tables"] = torch.cat((x["block_tables"], x["block_tables"]), dim=1)[:, :most]
    return x


@every_decoder
def test_any_strides(step, device, dtype):
    check(with_other_strides(case(RAGGED, dtype=dtype, device=device)), step)


@needs_cpu_twin
@pytest.mark.parametrize("d", [1, 5, 24, 40, 80, 111, 256])
def test_cpu_twin_takes_any_head_dim(d):
    check(case(RAGGED, d=d), "cpu")
    check(case((40, 300), counts=(7, 30), d=d), "cpu")


@needs_cpu_twin
def test_cpu_twin_in_float16():
    check(case(RAGGED, dtype=FP16), "cpu")
    check(case(RAGGED, dtype=FP16, cache=FP8), "cpu", k_scale=0.5)


MIXED = {"counts": (1, 0, 5, 100, 33, 2, 1, 0, 7), "lengths": (900, 0, 700, 100, 1333, 2, 1, 17, 7)}


@every_prefill
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (2, 2), (24, 2), (7, 1), (71, 1)])
def test_prefill_mixed_with_decode(step, device, dtype, heads):
    check(case(**MIXED, heads=heads[0], kv_heads=heads[1], dtype=dtype, device=device), step)


@every_prefill
@pytest.mark.parametrize("d", [64, 128, 256])
def test_prefill_of_wide_rows(step, device, dtype, d):
    check(case(**MIXED, d=d, dtype=dtype, device=device), step)


@every_prefill
@pytest.mark.parametrize("block_size", [1, 8, 32, 256])
def test_prefill_for_any_block_size(step, device, dtype, block_size):
    if step == "prefill_hopper" and block_size < 8:
        pytest.skip("TMA's swizzle works on 8 rows")
    check(case(**MIXED, block_size=block_size, dtype=dtype, device=device), step)


@every_prefill
@pytest.mark.parametrize("window", [1, 40, 128])
def test_prefill_under_a_window(step, device, dtype, window):
    check(case(**MIXED, dtype=dtype, device=device), step, window=window)


@every_prefill
def test_prefill_from_float8(step, device, dtype):
    if step == "prefill_hopper":
        pytest.skip("TMA copies numbers as they are")
    check(case(**MIXED, dtype=dtype, cache=FP8, device=device), step, k_scale=0.5, v_scale=2.0)


@every_prefill
@pytest.mark.parametrize("d", [64, 128])
def test_prefill_of_long_rows(step, device, dtype, d):
    """Several tiles of queries against several of keys, more of them than a GPU works on at once."""
    if device == "cpu":
        pytest.skip("takes long")
    check(case((5000, 1, 2049, 3000), counts=(700, 1, 2049, 3000), heads=8, d=d, dtype=dtype, device=device), step)


@every_prefill
def test_prefill_of_many_short_rows(step, device, dtype):
    lengths = [i * 7 % 60 for i in range(150)]
    check(case(lengths, counts=[min(n, i % 9) for i, n in enumerate(lengths)], dtype=dtype, device=device), step)


@every_prefill
@pytest.mark.parametrize("d", [64, 128])
def test_prefill_with_other_strides_and_scales(step, device, dtype, d):
    x = with_other_strides(case(**MIXED, d=d, dtype=dtype, device=device))
    check(x, step, scale=0.3, k_scale=0.5, v_scale=2.0)
    x["q"] = x["q"][:, :1].expand(-1, 4, -1)
    check(x, step)


@every_prefill
def test_queries_before_the_first_key_see_nothing(step, device, dtype):
    x = case((3, 0), counts=(10, 4), dtype=dtype, device=device)
    out = attention(**x, step=step)
    assert (out[:7] == 0).all()
    assert (out[10:] == 0).all()
    check(x, step)


# ---- writing


def writers():
    """(step, device) of the kernels that write."""
    return (["cpu"] if HAS_CPU_TWIN else []) + (["cuda"] if HAS_GPU else [])


@pytest.mark.parametrize("device", writers())
@pytest.mark.parametrize(("dtype", "cache"), [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP8), (FP32, FP8)])
@pytest.mark.parametrize(("layout", "rotary"), [(None, 0), ("half", 64), ("half", 32), ("interleaved", 64)])
def test_writing(device, dtype, cache, layout, rotary):
    generator = torch.Generator().manual_seed(0)
    tokens, kv_heads, d, block_size, blocks = 100, 3, 64, 8, 20
    qkv = torch.randn(tokens, 3 * kv_heads, d, generator=generator).to(dtype).to(device) * 3
    k, v = qkv[:, :kv_heads], qkv[:, kv_heads : 2 * kv_heads]
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens].to(device)
    slots[::7] = -1
    options = {}
    if layout:
        angles = torch.rand(tokens, rotary // 2, generator=generator).to(device) * 6
        options = {"cos": angles.cos(), "sin": angles.sin(), "layout": layout}
    pools = [
        [torch.zeros(blocks, kv_heads, block_size, d, device=device).to(cache) for _ in range(2)] for _ in range(2)
    ]
    write_cache(k, v, *pools[0], slots, **options, k_scale=0.01, v_scale=2.0)
    write_cache(k, v, *pools[1], slots, **options, k_scale=0.01, v_scale=2.0, step=0)
    for ours, plain in zip(*pools, strict=True):
        step = {FP8: 0.13, BF16: 0.01, FP16: 0.002, FP32: 1e-5}[
            cache
        ]  # one unit of the last place: roundings may differ
        torch.testing.assert_close(ours.float(), plain.float(), rtol=step, atol=step)
        assert (ours.float() != plain.float()).float().mean() < (0.5 if cache == FP32 else 0.02)


@pytest.mark.parametrize("device", writers())
def test_writing_past_float8(device):
    """float8 has no infinity: what is too large is cut off."""
    k = torch.tensor([1e9, -1e9, 460.0, 3.0], device=device).view(1, 1, 4)
    pools = [torch.zeros(1, 1, 1, 4, device=device).to(FP8) for _ in range(2)]
    write_cache(k, k, *pools, torch.zeros(1, dtype=torch.int64, device=device))
    assert pools[0].flatten().tolist() == [448.0, -448.0, 448.0, 3.0]


# ---- the operators


def devices():
    """Where a kernel is chosen without asking."""
    return ([pytest.param("cpu", FP32)] if HAS_CPU_TWIN else []) + ([pytest.param("cuda", BF16)] if HAS_GPU else [])


@pytest.mark.parametrize(("device", "dtype"), devices())
def test_opcheck(device, dtype):
    x = case((5, 40), dtype=dtype, device=device)
    torch.library.opcheck(
        torch.ops.tformer_lab.paged_attention, (*x.values(), None, None, 0.125, None, 1.0, 1.0, "auto")
    )
    k = torch.randn(3, 2, 64, device=device, dtype=dtype)
    pools = [torch.zeros(2, 2, 4, 64, device=device, dtype=dtype) for _ in range(2)]
    slots = torch.tensor([0, -1, 5], device=device)
    arguments = (k, k, *pools, slots, None, None, "half", 1.0, 1.0, "auto")
    torch.library.opcheck(torch.ops.tformer_lab.write_cache, arguments)


@pytest.mark.parametrize(("device", "dtype"), devices())
def test_compile_without_a_graph_break(device, dtype):
    x = case((5, 40), dtype=dtype, device=device)

    def step(k, slots, x):
        write_cache(k, k, x["k_pool"], x["v_pool"], slots)
        return attention(**x) * 2

    k, slots = torch.randn(1, 2, 64, device=device, dtype=dtype), torch.tensor([17], device=device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(k, slots, x), step(k, slots, x))


@pytest.mark.parametrize(("device", "dtype"), devices())
@pytest.mark.parametrize("step", [0, None])
def test_a_plan_serves_every_layer_of_a_pass(device, dtype, step):
    first, second = (case(**MIXED, dtype=dtype, device=device) for _ in range(2))
    for name in ("k_pool", "v_pool", "q"):
        second[name] = 2 * first[name].flip(-1)  # another layer: other numbers, the same rows
    rows = {name: first[name] for name in ("block_tables", "lengths", "query_starts")}
    plan = plan_attention(first["q"], first["k_pool"], first["v_pool"], **rows, max_queries=100, window=40, step=step)
    for x in (first, second):
        out, lse = plan.run(x["q"], x["k_pool"], x["v_pool"], return_lse=True)
        again, again_lse = attention(**(x | rows), window=40, step=step, return_lse=True)
        assert torch.equal(out, again)
        assert torch.equal(lse, again_lse)


@pytest.mark.parametrize(("device", "dtype"), devices())
def test_a_plan_to_write_serves_every_layer(device, dtype):
    layers = [torch.randn(2, 5, 2, 64, device=device, dtype=dtype) for _ in range(2)]
    pools = [torch.zeros(2, 4, 2, 8, 64, device=device, dtype=dtype) for _ in range(2)]
    slots, angles = torch.tensor([0, 31, -1, 8, 9], device=device), torch.rand(5, 32, device=device)
    options = {"cos": angles.cos(), "sin": angles.sin()}
    plan = plan_write(*layers[0], *pools[0], slots, **options)
    for (k, v), (k_pool, v_pool) in zip(layers, pools, strict=True):
        plan.run(k, v, k_pool, v_pool)
        wanted = [torch.zeros_like(pool) for pool in (k_pool, v_pool)]
        write_cache(k, v, *wanted, slots, **options)
        assert torch.equal(k_pool, wanted[0])
        assert torch.equal(v_pool, wanted[1])


OTHER_LAYERS = {
    "fewer queries": lambda q, k, v: (q[:1], k, v),
    "other heads": lambda q, k, v: (q[:, :2].contiguous(), k, v),
    "other strides of q": lambda q, k, v: (q.transpose(0, 1).contiguous().transpose(0, 1), k, v),
    "fewer blocks": lambda q, k, v: (q, k[:-1], v[:-1]),
    "another dtype": lambda q, k, v: (q.double(), k.double(), v.double()),
    "a pool elsewhere": lambda q, k, v: (q, k, v.to("meta")),
    "other strides of a pool": lambda q, k, v: (q, k.transpose(1, 2).contiguous().transpose(1, 2), v),
}


@pytest.mark.parametrize("change", OTHER_LAYERS)
def test_a_plan_refuses_a_layer_of_another_layout(change):
    x = case((5, 40))
    plan = plan_attention(**x)
    with pytest.raises(ValueError, match=r"the plan was made for .*: plan again for tensors of another layout"):
        plan.run(*OTHER_LAYERS[change](x["q"], x["k_pool"], x["v_pool"]))


def test_packed_structures_are_as_long_as_those_of_the_kernels():
    header = (jit.kernels_folder() / "paged_attention" / "arguments.h").read_text()
    sizes = dict(re.findall(r"static_assert\(sizeof\((\w+)\) == (\d+)", header))
    assert int(sizes["Arguments"]) == ARGUMENTS.size
    assert int(sizes["WriteArguments"]) == WRITE_ARGUMENTS.size


def test_refusals_say_why():
    x = case((5, 40))
    with pytest.raises(ValueError, match="runs on cuda, the tensors are on cpu"):
        attention(**x, step=2)
    with pytest.raises(ValueError, match=r"step must be one of 0, cpu, 1, 2, prefill, .*, got 7"):
        attention(**x, step=7)
    with pytest.raises(ValueError, match="no gradients"):
        attention(**{**x, "q": x["q"].requires_grad_()}, step="cpu")
    x["block_tables"][1, 1] = 99
    with pytest.raises(ValueError, match="row 1 names block 99"):
        attention(**x, checked=True)


def test_gradients_come_from_step_0():
    x = case((5, 40))
    q = x["q"].requires_grad_()
    attention(**x).sum().backward()
    assert q.grad.abs().sum() > 0


@pytest.mark.parametrize("step", [0, None])
def test_a_parameter_has_the_gradient_of_any_tensor(step):
    x = case((5, 40))
    parameter, tensor = torch.nn.Parameter(x["q"].clone()), x["q"].clone().requires_grad_()
    for q in (parameter, tensor):
        attention(**{**x, "q": q}, step=step).square().sum().backward()
    torch.testing.assert_close(parameter.grad, tensor.grad, rtol=0, atol=0)


@pytest.mark.parametrize("step", [0, None])
def test_transforms_map_over_calls_or_are_refused_in_words(step):
    x = case((5, 40))
    other = {**x, "q": 2 * x["q"], "k_pool": -x["k_pool"], "lengths": x["lengths"] - 3}
    for names in (("q",), ("k_pool",), ("lengths",), ("q", "k_pool", "lengths")):

        def call(*changed, names=names):
            return attention(**{**x, **dict(zip(names, changed, strict=True))}, step=step)

        both = torch.func.vmap(call)(*(torch.stack((x[name], other[name])) for name in names))
        torch.testing.assert_close(both[1], call(*(other[name] for name in names)))
    total = lambda q: attention(**{**x, "q": q}, step=step).sum()  # noqa: E731
    gradient = torch.func.grad(total)
    for transformed, q in (
        (gradient, x["q"]),
        (torch.func.jacrev(total), x["q"]),
        (torch.func.vmap(gradient), x["q"][None]),
    ):
        with pytest.raises(NotImplementedError, match=r"paged attention has no derivative for torch\.func"):
            transformed(q)
    with pytest.raises(NotImplementedError, match="paged attention has no forward-mode derivative"):
        torch.func.jvp(total, (x["q"],), (x["q"],))


@pytest.mark.parametrize("step", [0, None])
def test_numbers_are_those_of_a_tensor_and_not_what_lies_at_its_address(step):
    """Its memory may hold their negatives: the imaginary part of a conjugate is such a view."""
    x = case((5, 40))
    expected = attention(**x, step=step)
    for name in ("q", "k_pool", "v_pool"):
        torch.testing.assert_close(attention(**{**x, name: torch._neg_view(-x[name])}, step=step), expected)
    k, v, slots = torch.randn(3, 2, 64), torch.randn(3, 2, 64), torch.tensor([7, -1, 0])
    pools = [[torch.zeros_like(x[name]) for name in ("k_pool", "v_pool")] for _ in range(2)]
    write_cache(k, v, *pools[0], slots, step=step)
    write_cache(torch._neg_view(-k), torch._neg_view(-v), *pools[1], slots, step=step)
    torch.testing.assert_close(pools[1], pools[0], rtol=0, atol=0)
    with pytest.raises(ValueError, match="nothing is written to a view of their negatives"):
        write_cache(k, v, torch._neg_view(pools[0][0]), pools[0][1], slots, step=step)


@pytest.mark.parametrize("step", [0, None])
def test_a_write_is_noticed_by_autograd_and_needs_a_place_for_each_number(step):
    pool, weight = torch.zeros(3, 2, 8, 16), torch.ones(3, 2, 8, 16, requires_grad=True)
    k, slots = torch.randn(2, 2, 16), torch.tensor([0, 9])
    product = pool * weight
    write_cache(k, k, pool, pool.clone(), slots, step=step)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        made_here = torch.zeros(3, 2, 8, 16)
        write_cache(k, k, made_here, made_here.clone(), slots, step=step)
    torch.testing.assert_close(made_here, pool, rtol=0, atol=0)
    for pools in ((pool[:1].expand(3, -1, -1, -1), pool), (pool, pool[:, :1].expand(-1, 2, -1, -1))):
        with pytest.raises(ValueError, match="_pool is written to and must not be expanded"):
            write_cache(k, k, *pools, slots, step=step)


def test_tensors_without_numbers_have_a_shape_and_no_plan():
    x = case((5, 40))
    meta = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in x.items()}
    out, lse = attention(**meta, return_lse=True)
    assert (out.shape, lse.shape) == (x["q"].shape, x["q"].shape[:2])
    k, slots = torch.zeros(3, 2, 64, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta")
    write_cache(k, k, meta["k_pool"], meta["v_pool"], slots)
    with pytest.raises(ValueError, match="the pools are on meta, q came on cpu"):
        attention(**{**meta, "q": x["q"]})
    with pytest.raises(ValueError, match="the pools are on meta, k came on cpu"):
        write_cache(torch.zeros(3, 2, 64), k, meta["k_pool"], meta["v_pool"], slots)
    with pytest.raises(ValueError, match="a plan is made of tensors whose numbers lie in memory"):
        plan_attention(**meta)


# ---- a GPU alone


@needs_gpu
def test_refusals_of_the_gpu():
    with pytest.raises(ValueError, match=r"bfloat16 and float16, got torch\.float32"):
        attention(**case((5,), device="cuda"), step=2)
    with pytest.raises(ValueError, match="head_dim must be one of 64, 128, got 40"):
        attention(**case((5,), d=40, dtype=BF16, device="cuda"), step=2)
    with pytest.raises(ValueError, match="power of two, got 12"):
        attention(**case((5,), block_size=12, dtype=BF16, device="cuda"), step=2)
    with pytest.raises(ValueError, match="one query a row"):
        attention(**case((5,), counts=(3,), dtype=BF16, device="cuda"), step=2)


@needs_hopper
def test_refusals_of_hopper():
    def refused(message, **options):
        x = case((40, 9), **{"counts": (30, 9), "dtype": BF16, "device": "cuda", **options})
        with pytest.raises(ValueError, match=message):
            attention(**x, step="prefill_hopper")
        check(x, "prefill")

    refused("at least, got 4", block_size=4)
    refused(r"must be of q's dtype torch\.bfloat16, got torch\.float8_e4m3fn", cache=FP8)
    refused("fit into a tile of 128 rows, got 129", heads=129, kv_heads=1)


@needs_gpu
def test_cuda_graph_of_prefill_follows_lengths_and_tables():
    x = case((704, 48, 0), counts=(50, 48, 3), dtype=BF16, device="cuda")
    attention(**x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(**x)
    for name in ("lengths", "block_tables"):
        x[name].copy_(x[name].flip(0))
    x["q"].normal_()
    x["query_starts"].copy_(torch.tensor([0, 0, 40, 101]))
    for _ in range(2):
        graph.replay()
        assert torch.equal(out, attention(**x))


@needs_gpu
def test_cuda_graph_follows_lengths_and_tables():
    x = case((704, 48, 0), dtype=BF16, device="cuda")
    attention(**x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(**x)
    x["lengths"].copy_(x["lengths"].flip(0))
    x["block_tables"].copy_(x["block_tables"].flip(0))
    x["q"].normal_()
    graph.replay()
    assert torch.equal(out, attention(**x))


@needs_gpu
def test_current_stream():
    x = case((3000,) * 8, dtype=BF16, device="cuda")
    want, stream = attention(**x), torch.cuda.Stream()
    torch.cuda.synchronize()
    q = torch.zeros_like(x["q"])
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        q.copy_(x["q"])
        out = attention(**{**x, "q": q})
    stream.synchronize()
    assert torch.equal(out, want)


@needs_gpu
def test_more_than_two_to_the_31_numbers():
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 12 GB")
    x = case((100, 40), dtype=BF16, device="cuda", heads=4, kv_heads=2, d=128)
    far = 2**31 // (2 * 16 * 128) + 100
    moved = {**x, "block_tables": x["block_tables"] + far}
    for name in ("k_pool", "v_pool"):
        moved[name] = torch.empty(far + x[name].shape[0], *x[name].shape[1:], dtype=BF16, device="cuda")
        moved[name][far:] = x[name]
    for step in (1, 2):
        assert torch.equal(attention(**moved, step=step), attention(**x, step=step))
    starts = {"query_starts": torch.tensor([0, 2, 2], dtype=torch.int32, device="cuda")}
    assert torch.equal(attention(**moved, **starts, step="prefill"), attention(**x, **starts, step="prefill"))
