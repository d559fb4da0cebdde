"""Every door of the kernels under random calls, right and wrong: what is wrong is refused, what is odd is answered.

A kernel that indexes by an unchecked number reads or writes memory of others, which a test sees only by luck. So the
calls are drawn twice: here without a sanitizer, which finds doors that answer what they should refuse, and by
``python -m benchmarks.sanitize <topic> --device cpu`` with one.
"""

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import doors
from benchmarks.doors.paged_attention import paged_call
from tformer_lib import attention, jit, linear_attention, rope, sparse_attention
from tformer_lib.flash_attention import flash_attention, flash_attention_qkvpacked, flash_attention_varlen
from tformer_lib.paged_attention import paged_attention, plan_attention
from tformer_lib.transformer.gelu_feed_forward import gelu_feed_forward

needs_cpu_twin = pytest.mark.skipif(not jit.can_build_cpp(), reason="needs a C++ compiler and ninja")
every_step = pytest.mark.parametrize("step", [0, pytest.param("cpu", marks=needs_cpu_twin)])
DOORS = [
    pytest.param(name, draw, step, marks=needs_cpu_twin if step == "cpu" else (), id=f"{name}-{step}")
    for topic, draws_of in doors.DOORS.items()
    for name, draw in draws_of.items()
    for step in doors.steps(topic, name)
]
every_door = pytest.mark.parametrize(("door", "draw", "step"), DOORS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@every_door
@draws(60)
@given(random=st.randoms())
def test_wrong_calls_are_refused_and_odd_ones_answered(door, draw, step, random):
    draw(random).check(step)


@every_door
def test_each_kind_of_wrong_call_is_refused(door, draw, step):
    for what, wrong in doors.WRONG[door].items():
        made = 0
        for seed in range(200):
            call = draw(doors.Random(seed))
            if call.what != "nothing" or (change := wrong(call.arguments, doors.Random(seed))) is None:
                continue
            call.arguments.update(change)
            call.what, call.refused, made = what, True, made + 1
            call.check(step)
            if made == 3:
                break
        assert made, f"no call could be made wrong in this way: {what}"


# ---- the operators, for who calls them without the public door


def operands():
    """q, k and v of two heads to a kv head."""
    return torch.randn(1, 4, 5, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)


DENSE = (None, None, None, 5, 6, True, 0, 0.5)


@pytest.mark.parametrize("step", ["0", "auto"])
@pytest.mark.parametrize(
    ("place", "change", "match"),
    [
        (0, lambda x: x[..., :4], "q has head_dim 4, k has head_dim 8"),
        (1, lambda x: x[:, :, :3], "k and v must agree in batch, kv_heads and length"),
        (2, lambda x: x.double(), "q, k and v must share a dtype"),
        (2, lambda x: x[:, :1], "k and v must agree in batch, kv_heads and length"),
        (0, lambda x: x[:, :3], "q has 3 heads, which 2 kv heads do not divide"),
        (0, lambda x: x[0], "q must have 4 dimensions"),
    ],
)
def test_the_operator_of_flash_attention_checks_what_it_indexes_by(step, place, change, match):
    given = list(operands())
    given[place] = change(given[place])
    with pytest.raises(ValueError, match=match):
        torch.ops.tformer_lab.flash_attention(*given, *DENSE, step, False)


@pytest.mark.parametrize("step", ["0", "auto"])
def test_the_operator_of_the_gradients_checks_what_it_indexes_by(step):
    q, k, v = operands()
    out, lse = torch.ops.tformer_lab.flash_attention(q, k, v, *DENSE, step, False)
    good = {"dout": torch.ones_like(out), "dlse": torch.ones_like(lse), "out": out, "lse": lse}

    def run(**changes):
        x = good | changes
        given = (x["dout"], x["dlse"], q, k, v, x["out"], x["lse"])
        return torch.ops.tformer_lab.flash_attention_backward(*given, *DENSE, step, False)

    run()
    for name, x in good.items():
        for wrong in (x[:, :, :3], x.double(), x[:, :2], x[0]):
            with pytest.raises(ValueError, match=f"{name} must be torch.float32 of shape"):
                run(**{name: wrong})
    spread = {name: doors.spread(x) for name, x in good.items()}
    for ours, theirs in zip(run(**spread), run(), strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- a brother: another operator that indexes by what it is given


@every_step
@pytest.mark.parametrize("starts", [[0, 90], [5, 70], [0, -5, 70], [0, 50, 20, 70], [0, 69]])
def test_packed_linear_attention_refuses_sequences_past_its_tensors(starts, step):
    q, k, decay = torch.randn(1, 4, 70, 8), torch.randn(1, 2, 70, 8), -torch.rand(1, 2, 70, 1)
    packed = {"cu_seqlens": torch.tensor(starts, dtype=torch.int32), "step": step}
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 70"):
        linear_attention.gated_attend(q, k, k, log_decay=decay, max_seqlen=70, **packed)


def test_packed_linear_attention_refuses_a_longest_that_is_too_short():
    q, k, decay = torch.randn(1, 4, 70, 8), torch.randn(1, 2, 70, 8), -torch.rand(1, 2, 70, 1)
    packed = {"cu_seqlens": torch.tensor([0, 30, 70], dtype=torch.int32), "max_seqlen": 39}
    with pytest.raises(ValueError, match="max_seqlen is 39, the longest sequence has 40 tokens"):
        linear_attention.gated_attend(q, k, k, log_decay=decay, step=0, **packed)


# ---- forward-mode derivatives


def dual(function, tangent, *tensors):
    """The tangent of what a function returns, in forward mode."""
    with torch.autograd.forward_ad.dual_level():
        first = torch.autograd.forward_ad.make_dual(tensors[0], tangent)
        return torch.autograd.forward_ad.unpack_dual(function(first, *tensors[1:])).tangent


@pytest.mark.parametrize("step", [None, 0])
def test_flash_attention_refuses_a_forward_mode_derivative_in_words(step):
    q, k, v = operands()
    starts = torch.tensor([0, 6], dtype=torch.int32)
    for which in range(3):
        given = [q, k, v]
        tangents = [torch.zeros_like(x) for x in given]
        tangents[which] += 1

        def function(x, which=which, given=given):
            return flash_attention(*given[:which], x, *given[which + 1 :], step=step)

        with pytest.raises(NotImplementedError, match="flash attention has no forward-mode derivative"):
            dual(function, tangents[which], given[which])
        with pytest.raises(NotImplementedError, match="flash attention has no forward-mode derivative"):
            torch.func.jvp(function, (given[which],), (tangents[which],))
    packed = [x[0].transpose(0, 1) for x in (k, k, v)]
    with pytest.raises(NotImplementedError, match="flash attention has no forward-mode derivative"):
        dual(lambda x: flash_attention_varlen(x, *packed[1:], starts, starts, step=step), packed[0], packed[0])


def other_operators():
    """Functions of q whose operators a forward-mode derivative must not enter, by name."""
    k, v, angles = torch.randn(1, 2, 70, 8), torch.randn(1, 2, 70, 8), torch.rand(70, 4)
    chosen = torch.zeros(1, 2, 1, 1, dtype=torch.int64)
    pattern = sparse_attention.sliding_window(9)
    return {
        "linear attention": lambda q: linear_attention.attend(q, k, v, causal=True, step="cpu"),
        "sparse attention": lambda q: sparse_attention.attend(q, k, v, pattern=pattern, step="cpu"),
        "attend_chosen": lambda q: sparse_attention.attend_chosen(q, k, v, chosen),
        "RoPE in place": lambda q: rope.rotate_both_(q, None, angles, angles),
    }


@needs_cpu_twin
@pytest.mark.parametrize("name", other_operators())
def test_no_other_operator_drops_a_forward_mode_derivative(name):
    q = torch.randn(1, 4, 70, 8)
    other_operators()[name](q.clone())
    with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode derivative"):
        dual(other_operators()[name], torch.ones_like(q), q)


@needs_cpu_twin
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
@pytest.mark.parametrize("name", ["flash attention", *other_operators()])
def test_operators_refuse_gradients_of_torch_func_in_words(name, transform):
    """A map over a batch alone has no gradient to give, and passes."""
    k, v = torch.randn(2, 1, 2, 70, 8)
    form = other_operators() | {"flash attention": lambda q: flash_attention(q, k, v, causal=True)}
    q = torch.randn(1, 4, 70, 8)
    with pytest.raises(NotImplementedError, match=f"{name} has no derivative for torch.func"):
        transform(lambda x: form[name](x).sum())(q)
    with pytest.raises(NotImplementedError, match=f"{name} has no derivative for torch.func"):
        torch.func.vmap(transform(lambda x: form[name](x).sum()))(q[None])
    if name != "RoPE in place":
        torch.testing.assert_close(torch.func.vmap(form[name])(torch.stack((q, 2 * q)))[1], form[name](2 * q))


def test_attend_which_the_refusal_names_has_one():
    q, k, v = (x.double() for x in operands())
    direction = torch.randn_like(q)
    found = dual(lambda x: attention.attend(x, k, v, causal=True), direction, q)
    step = 1e-6
    difference = attention.attend(q + step * direction, k, v, causal=True) - attention.attend(
        q - step * direction, k, v, causal=True
    )
    torch.testing.assert_close(found, difference / (2 * step), rtol=1e-6, atol=1e-8)


def test_paged_attention_has_a_forward_mode_derivative_by_step_0():
    call = paged_call(doors.Random(3))
    while call.what != "nothing" or call.arguments["q"].numel() == 0:
        call = paged_call(doors.Random(call.arguments["q"].shape[0] + len(call.what) + torch.randint(999, ()).item()))
    rest = {
        name: x.double() if name in ("k_pool", "v_pool") else x for name, x in call.arguments.items() if name != "q"
    }
    q = call.arguments["q"].double()
    direction = torch.randn_like(q)
    found = dual(lambda x: paged_attention(x, **rest), direction, q)
    step = 1e-6
    ahead, behind = (paged_attention(q + sign * step * direction, **rest) for sign in (1, -1))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)


def test_gradients_of_gradients_are_refused():
    q, k, v = (x.requires_grad_() for x in operands())
    (dq,) = torch.autograd.grad(flash_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula|not require grad|does not require"):
        torch.autograd.grad(dq.sum(), k)


# ---- autocast


def int32(numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def calls_of_operators():
    """Functions of q, k and v whose operators name the dtypes in which they compute, by name."""
    mask, starts = torch.rand(70, 70) > 0.5, int32([0, 30, 70])
    gates, beta, chosen = -torch.rand(1, 2, 70, 1), torch.rand(1, 2, 70, 1), torch.zeros(1, 2, 1, 1, dtype=torch.int64)
    window = sparse_attention.sliding_window(9)
    packed = lambda *x: (each[0].transpose(0, 1) for each in x)  # noqa: E731
    pools = lambda x: x[0].unflatten(1, (2, 35)).transpose(0, 1).contiguous()  # noqa: E731
    paged = {"block_tables": int32([[0, 1]]), "lengths": int32([70]), "query_starts": int32([0, 70]), "step": 0}
    return {
        "flash": lambda q, k, v: flash_attention(q, k, v, causal=True, step=0),
        "flash, a mask": lambda q, k, v: flash_attention(q, k, v, mask=mask),
        "flash, packed": lambda q, k, v: flash_attention_varlen(*packed(q, k, v), starts, starts, step=0),
        "flash, one tensor": lambda q, k, v: flash_attention_qkvpacked(torch.cat((q, k, v), 1).transpose(1, 2), 4),
        "linear": lambda q, k, v: linear_attention.attend(q, k, v, causal=True, step="cpu"),
        "linear, step 0": lambda q, k, v: linear_attention.attend(q, k, v, causal=True, step=0),
        "gates": lambda q, k, v: linear_attention.gated_attend(q, k, v, log_decay=gates, step="cpu"),
        "delta": lambda q, k, v: linear_attention.delta_attend(
            q, torch.nn.functional.normalize(k, dim=-1), v, log_decay=gates, beta=beta, step="cpu"
        ),
        "sparse": lambda q, k, v: sparse_attention.attend(q, k, v, pattern=window, step="cpu"),
        "chosen": lambda q, k, v: sparse_attention.attend_chosen(q, k, v, chosen),
        "paged": lambda q, k, v: paged_attention(q[0].transpose(0, 1), pools(k), pools(v), **paged),
        "feed-forward": lambda q, k, v: gelu_feed_forward(q[0, 0], k[0, 0], v[0, 0].mT),
    }


@needs_cpu_twin
@pytest.mark.parametrize("name", calls_of_operators())
def test_operators_compute_in_their_own_dtypes_under_autocast(name):
    """Forward, and backward too, which whoever calls backward() inside of autocast runs there."""
    torch.manual_seed(0)
    call = calls_of_operators()[name]
    leaves = [torch.randn(1, heads, 70, 8, requires_grad=True) for heads in (4, 2, 2)]
    out = call(*leaves)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, dout, retain_graph=True, materialize_grads=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out, leaves, dout, materialize_grads=True)
        if name != "feed-forward":  # which takes its products in autocast's type
            torch.testing.assert_close(call(*leaves), out, rtol=0, atol=0)
    if name != "paged":  # whose gradients are those of torch's own products
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


# ---- plans


def test_a_plan_checks_what_is_indexed_by_once_for_its_layers():
    call = paged_call(doors.Random(0))
    good = {
        **call.arguments,
        "q": torch.zeros(1, 2, 8),
        "k_pool": torch.zeros(2, 1, 4, 8),
        "v_pool": torch.zeros(2, 1, 4, 8),
    }
    good = {name: good[name] for name in ("q", "k_pool", "v_pool")}
    tables, lengths = torch.tensor([[1, 5]], dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    with pytest.raises(ValueError, match="row 0 names block 5 at place 1"):
        plan_attention(**good, block_tables=tables, lengths=lengths)
    plan_attention(**good, block_tables=tables, lengths=lengths - 1).run(**good)
