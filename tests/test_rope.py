"""RoPE: what the mathematics promises, and transformers as an oracle for every scaling that it offers."""

import math
import subprocess
import sys
from dataclasses import MISSING, fields

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st

from tformer_lib.rope import (
    LAYOUTS,
    NTK,
    SCALINGS,
    DynamicNTK,
    Linear,
    Llama3,
    LongRope,
    Proportional,
    Rope,
    Yarn,
    convert_layout,
    rotate,
    rotate_at_positions,
    rotate_both,
    rotate_both_,
    scaling_from,
    turn_pairs,
)

HEAD_DIM = 64
PARAMETERS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 256},
    "yarn, its own sharpening": {"factor": 4.0, "original_max_position_embeddings": 256, "attention_factor": 0.9},
    "yarn, mscale": {"factor": 40.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.0},
    "yarn, exact ramp": {
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "truncate": False,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "longrope": {
        "factor": 4.0,
        "short_factor": [1 + i / 50 for i in range(HEAD_DIM // 2)],
        "long_factor": [1 + i / 5 for i in range(HEAD_DIM // 2)],
        "original_max_position_embeddings": 256,
    },
    "proportional": {"partial_rotary_factor": 0.25},
}


def rope_parameters(name: str, **more) -> dict:
    return {"rope_type": name.split(",")[0], **PARAMETERS[name], **more}


def pairs_as_complex(x, layout, rotary_dim):
    """An independent reading of the layouts: each pair as one complex number, in float64."""
    x = x[..., :rotary_dim].double()
    half = rotary_dim // 2
    if layout == "half":
        return torch.complex(x[..., :half], x[..., half:])
    return torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous())


# What the mathematics promises


@given(
    layout=st.sampled_from(LAYOUTS),
    positions=st.lists(st.integers(-2000, 2000), min_size=1, max_size=6),
    head_dim=st.sampled_from([2, 6, 16, 64]),
    base=st.sampled_from([100.0, 10000.0, 500000.0]),
)
@draws(50)
def test_rotation_is_multiplication_by_a_unit_complex_number(layout, positions, head_dim, base):
    x = torch.randn(2, 3, len(positions), head_dim)
    rotated = Rope(head_dim, base=base, layout=layout).at(torch.tensor(positions))(x)
    theta = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.tensor(positions, dtype=torch.float64)[:, None] * theta
    expected = pairs_as_complex(x, layout, head_dim) * torch.polar(torch.ones_like(angles), angles)
    assert torch.allclose(pairs_as_complex(rotated, layout, head_dim), expected, atol=2e-3)  # float32 angles near 2,000
    assert torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


@given(
    m=st.integers(0, 500),
    n=st.integers(0, 500),
    shift=st.integers(-500, 3000),
    layout=st.sampled_from(LAYOUTS),
    rotary_dim=st.sampled_from([8, 16, 32]),
)
@draws(50)
def test_scores_depend_on_the_distance_alone(m, n, shift, layout, rotary_dim):
    rope = Rope(32, layout=layout, rotary_dim=rotary_dim)
    q, k = torch.randn(2, 1, 4, 1, 32)

    def score(i, j):
        return (rope.at(torch.tensor([i]))(q) * rope.at(torch.tensor([j]))(k)).sum(-1)

    assert torch.allclose(score(m, n), score(m + shift, n + shift), atol=1e-2)
    assert torch.allclose(score(m, m), (q * k).sum(-1), atol=1e-4)


@given(m=st.integers(-300, 300), n=st.integers(-300, 300), layout=st.sampled_from(LAYOUTS))
@draws(30)
def test_rotations_compose_and_have_inverses(m, n, layout):
    rope, x = Rope(16, layout=layout), torch.randn(1, 2, 1, 16)
    twice = rope.at(torch.tensor([n]))(rope.at(torch.tensor([m]))(x))
    assert torch.allclose(twice, rope.at(torch.tensor([m + n]))(x), atol=1e-3)
    assert torch.allclose(rope.at(torch.tensor([-m]))(rope.at(torch.tensor([m]))(x)), x, atol=1e-5)
    assert torch.equal(rope.at(torch.tensor([0]))(x), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_partial_rotation_leaves_the_rest_alone(layout):
    x, positions = torch.randn(2, 2, 5, 24), torch.arange(3, 8)
    rotated = Rope(24, layout=layout, rotary_dim=10).at(positions)(x)
    assert torch.equal(rotated[..., 10:], x[..., 10:])
    assert torch.equal(rotated[..., :10], Rope(10, layout=layout).at(positions)(x[..., :10]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_are_explicit_offsets_ragged_rows_and_packed_documents(layout):
    rope, x = Rope(16, layout=layout), torch.randn(2, 3, 12, 16)
    whole = rope.at(torch.arange(12))(x)
    assert torch.equal(rope.at(torch.arange(9, 12))(x[:, :, 9:]), whole[:, :, 9:])
    ragged = rope.at(torch.tensor([[4, 5], [8, 9]]))(torch.stack((x[0, :, 4:6], x[1, :, 8:10])))
    assert torch.equal(ragged, torch.stack((whole[0, :, 4:6], whole[1, :, 8:10])))
    packed = rope.at(torch.tensor([*range(7), *range(5)]))(torch.cat((x[:1, :, :7], x[1:, :, :5]), dim=2))
    assert torch.equal(packed, torch.cat((whole[:1, :, :7], whole[1:, :, :5]), dim=2))
    assert torch.equal(rope.at(torch.arange(12)[None])(x), whole)  # one row of positions serves the batch


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotation_takes_non_contiguous_and_empty_inputs_and_sends_gradients(layout):
    rope = Rope(8, layout=layout)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    turned = rope.at(torch.arange(5))(x.transpose(1, 2))
    assert torch.equal(turned, rope.at(torch.arange(5))(x.transpose(1, 2).contiguous()))
    assert rope.at(torch.arange(0))(torch.zeros(1, 2, 0, 8)).shape == (1, 2, 0, 8)
    assert torch.autograd.gradcheck(lambda t: rope.at(torch.arange(5))(t.transpose(1, 2)), (x,))


# The two layouts


@pytest.mark.parametrize("rotary_dim", [16, 12])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_converted_projections_give_the_same_scores(rotary_dim, kv_heads):
    torch.manual_seed(0)
    heads, head_dim, width, T = 4, 16, 24, 9
    hidden = torch.randn(2, T, width)
    weights = {n: (torch.randn(n * head_dim, width), torch.randn(n * head_dim)) for n in {heads, kv_heads}}

    def project(n, to=None):
        weight, bias = weights[n]
        if to is not None:
            weight, bias = (convert_layout(p, n, to=to, rotary_dim=rotary_dim) for p in (weight, bias))
        return (hidden @ weight.T + bias).unflatten(-1, (n, head_dim)).transpose(1, 2)

    def scores(layout, to=None):
        rotate_at = Rope(head_dim, layout=layout, rotary_dim=rotary_dim).at(torch.arange(T) + 5)
        q, k = rotate_at(project(heads, to)), rotate_at(project(kv_heads, to))
        return q @ k.repeat_interleave(heads // kv_heads, dim=1).mT

    assert torch.allclose(scores("half", to="half"), scores("interleaved"), atol=1e-3)
    assert torch.allclose(scores("interleaved", to="interleaved"), scores("half"), atol=1e-3)
    assert not torch.allclose(scores("half"), scores("interleaved"), atol=1.0)  # the bug that raises no error


@given(heads=st.integers(1, 5), pairs=st.integers(1, 8), rest=st.integers(0, 4))
@draws(30)
def test_conversions_undo_each_other(heads, pairs, rest):
    weight = torch.randn(heads * (2 * pairs + rest), 3)
    there = convert_layout(weight, heads, to="half", rotary_dim=2 * pairs)
    assert torch.equal(convert_layout(there, heads, to="interleaved", rotary_dim=2 * pairs), weight)


def test_conversion_to_half_is_the_permutation_of_the_llama_conversion_script():
    heads, head_dim, width = 4, 8, 32
    weight = torch.randn(heads * head_dim, width)
    permuted = weight.view(heads, head_dim // 2, 2, width).transpose(1, 2).reshape(heads * head_dim, width)
    assert torch.equal(convert_layout(weight, heads, to="half"), permuted)


def test_half_layout_is_transformers_llama_and_interleaved_its_gptj():
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

    x, positions = torch.randn(2, 3, 7, 16), torch.arange(40, 47)
    cos, sin = Rope(16)(positions)
    doubled = [torch.cat((t, t), dim=-1)[None] for t in (cos, sin)]
    assert torch.allclose(rotate(x, cos, sin, "half"), llama(x, x, *doubled)[0], atol=1e-6)
    interleaved = gptj(x.transpose(1, 2), sin[None], cos[None]).transpose(1, 2)
    assert torch.allclose(rotate(x, cos, sin, "interleaved"), interleaved, atol=1e-6)


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_angles_stay_float32_in_a_half_precision_model_at_position_100k(dtype, layout):
    rope = Rope(64, layout=layout)
    positions = torch.arange(100_000, 100_016)
    x = torch.randn(1, 2, 16, 64).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cos, sin = rope(positions)
        rotated = rope.at(positions)(x)
    assert cos.dtype == sin.dtype == torch.float32
    assert rotated.dtype == dtype
    assert torch.equal(rotated, rope.at(positions)(x.float()).to(dtype))
    angles = positions.double()[:, None] * 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    assert (cos - angles.cos()).abs().max() < 0.02  # float32 itself; bfloat16 angles would be wrong by up to 2
    wrong = (positions.to(dtype)[:, None] * rope.frequencies().to(dtype)).cos()
    assert not (wrong.double() - angles.cos()).abs().max() < 1.0


def test_frequencies_made_in_inference_mode_serve_training():
    rope, x = Rope(8), torch.randn(1, 1, 3, 8, requires_grad=True)
    with torch.inference_mode():
        rope.at(torch.arange(3))(x)
    rope.at(torch.arange(3))(x).sum().backward()
    assert x.grad is not None


def test_rotation_compiles_without_a_graph_break():
    rope, x = Rope(16, scaling=DynamicNTK(2.0), max_length=8), torch.randn(1, 2, 12, 16)
    compiled = torch.compile(lambda p, t: rope.at(p)(t), backend="eager", fullgraph=True)
    assert torch.allclose(compiled(torch.arange(12), x), rope.at(torch.arange(12))(x))


# Scalings


@pytest.mark.parametrize("length", [100, 257, 1024, 1025, 5000])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", PARAMETERS)
def test_angles_are_transformers_llama_rotary(name, theta, length):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=1024,
        rope_parameters=rope_parameters(name, rope_theta=theta),
    )
    positions = torch.stack((torch.arange(length), torch.randint(length, (length,))))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    rope = Rope.from_parameters(HEAD_DIM, config.rope_parameters, max_length=1024)
    for ours, theirs in zip(rope(positions), (cos, sin), strict=True):
        assert torch.allclose(torch.cat((ours, ours), dim=-1), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name not in ("default", "longrope", "proportional")])
def test_partial_rotation_with_scaling_is_transformers(name):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = rope_parameters(name, rope_theta=10000.0, partial_rotary_factor=0.5)
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=1024, rope_parameters=dict(parameters)
    )
    theirs, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
    rope = Rope.from_parameters(HEAD_DIM, parameters, max_length=1024)
    assert rope.rotary_dim == 32
    assert torch.allclose(rope.frequencies(), theirs, rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(factor, abs=1e-9)


def test_default_partial_rotation_is_transformers_neox():
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

    config = GPTNeoXConfig(hidden_size=128, num_attention_heads=2)
    cos, _ = GPTNeoXRotaryEmbedding(config)(torch.zeros(1), torch.arange(50)[None])
    rope = Rope.from_parameters(64, config.rope_parameters, max_length=2048)
    assert rope.rotary_dim < 64
    assert torch.allclose(torch.cat([rope(torch.arange(50))[0]] * 2, dim=-1), cos[0], atol=1e-6)


def test_every_scaling_that_transformers_offers_is_here():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ROPE_INIT_FUNCTIONS) <= set(SCALINGS)
    assert {name.split(",")[0] for name in PARAMETERS} >= set(ROPE_INIT_FUNCTIONS)


@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
def test_ntk_keeps_the_fastest_pair_and_slows_the_slowest_by_the_factor(factor):
    plain, scaled = Rope(64).frequencies().double(), Rope(64, scaling=NTK(factor)).frequencies().double()
    assert scaled[0] == plain[0] == 1
    assert plain[-1] / scaled[-1] == pytest.approx(factor, rel=1e-5)
    ratio = plain / scaled
    assert (ratio.diff() >= -1e-6).all()


def test_dynamic_ntk_with_factor_one_is_ntk_by_the_stretch_of_the_present_length():
    dynamic = Rope(64, scaling=DynamicNTK(1.0), max_length=256)
    assert torch.equal(dynamic.frequencies(200), Rope(64).frequencies())
    assert torch.allclose(dynamic.frequencies(1024), Rope(64, scaling=NTK(4.0)).frequencies(), rtol=1e-5)


def test_an_explicit_length_keeps_the_frequencies_of_a_growing_sequence():
    rope, x = Rope(16, scaling=DynamicNTK(2.0), max_length=8), torch.randn(1, 1, 20, 16)
    whole = rope.at(torch.arange(20), length=32)(x)
    for t in range(20):
        assert torch.equal(rope.at(torch.tensor([t]), length=32)(x[:, :, t : t + 1]), whole[:, :, t : t + 1])
    assert not torch.allclose(rope.at(torch.arange(10, 20))(x[:, :, 10:]), whole[:, :, 10:], atol=1e-3)


@pytest.mark.parametrize(
    "scaling", [Linear(4.0), NTK(4.0), Yarn(4.0), Llama3(4.0), DynamicNTK(2.0), Proportional(0.5, 2.0)]
)
def test_scaled_frequencies_lie_between_the_plain_and_the_interpolated_ones(scaling):
    plain = Rope(64).frequencies()
    scaled = Rope(64, scaling=scaling, max_length=256).frequencies(1024)
    turning = scaled > 0
    assert (scaled[turning] <= plain[turning] * (1 + 1e-6)).all()
    assert (scaled[turning] >= plain[turning] / (8 if isinstance(scaling, DynamicNTK) else 4) * (1 - 1e-6)).all()


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_dict_and_a_dataclass_say_the_same(kind):
    parameters = next(rope_parameters(name) for name in [*PARAMETERS, "ntk"] if name == kind) if kind != "ntk" else None
    if kind == "ntk":
        assert scaling_from({"rope_type": "ntk", "factor": 2}) == NTK(2)
        return
    parameters.pop("original_max_position_embeddings", None)
    scaling = scaling_from(parameters)
    assert type(scaling) is SCALINGS[kind]
    assert scaling_from(scaling) is scaling
    assert Rope(HEAD_DIM, scaling=parameters, max_length=256).scaling == scaling


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Rope(7), "even .* got 7"),
        (lambda: Rope(8, rotary_dim=10), "at most head_dim, got 10 and 8"),
        (lambda: Rope(8, layout="neox"), "half, interleaved, got 'neox'"),
        (lambda: Rope(8, scaling={"rope_type": "magic"}), "one of default, linear, .* got 'magic'"),
        (lambda: Rope(8, scaling={"rope_type": "linear", "beta": 1}), "linear scaling takes factor, got beta"),
        (lambda: Rope(8, base=0), "base must be positive, got 0"),
        (lambda: Rope(8, base=math.inf), "base must be finite, got inf"),
        (lambda: Rope(8, scaling=Linear(math.inf)), "finite factor, got inf"),
        (lambda: Rope(8, scaling=Yarn(4.0, beta_slow=0.0), max_length=8), "got 32.0 and 0.0"),
        (lambda: Rope(8, scaling=Yarn(4.0, beta_fast=math.nan), max_length=8), "finite beta_fast, got nan"),
        (lambda: Rope(8, base=1.0, scaling=Yarn(4.0), max_length=8), "the same for a base of 1"),
        (lambda: Rope(8, scaling=LongRope(2.0, (1.0,) * 4, (1.0, 0.0, 1.0, 1.0)), max_length=8), "positive divisors"),
        (lambda: Rope(8, scaling=LongRope(2.0, (1.0,) * 4, (1.0,) * 4), max_length=1), "over 1, .* got 1"),
        (lambda: Rope(8, scaling=Proportional(1.5)), "from 0 to 1, got 1.5"),
        (lambda: Rope(8).at(torch.arange(3))(torch.zeros(1, 2, 3, 8, dtype=torch.int64)), "floats, .*int64"),
        (lambda: Rope(8, max_length=0), "max_length must be at least 1, got 0"),
        (lambda: Rope(8, scaling=3.0), "None, a Scaling or a dict, got float"),
        (
            lambda: Rope(8, scaling={"rope_type": "yarn", "beta_fast": 9}),
            "yarn scaling needs factor, and has no factor",
        ),
        (lambda: Rope(8, scaling={"rope_type": "longrope", "factor": 2.0}), "has no long_factor, short_factor"),
        (lambda: Rope(8, scaling=Linear(0.5)), "factor of at least 1, got 0.5"),
        (lambda: Rope(8, scaling=Linear(math.nan)), "got nan"),
        (lambda: Rope(8, scaling=Yarn(4.0)), "Yarn must know the trained context"),
        (lambda: Rope(8, scaling=Yarn(4.0, beta_fast=1, beta_slow=2), max_length=8), "got 1 and 2"),
        (lambda: Rope(8, scaling=Llama3(4.0, 4.0, 1.0), max_length=8), "got 1.0 and 4.0"),
        (lambda: Rope(2, scaling=NTK(4.0)), "at least 4, got 2"),
        (lambda: Rope(8, scaling=LongRope(2.0, (1.0,) * 4, (1.0,) * 3), max_length=8), "long_factor .* 4 .* got 3"),
        (lambda: Rope(8).at(torch.arange(3))(torch.zeros(1, 2, 4, 8)), "4 tokens, .* 3 positions"),
        (lambda: Rope(8).at(torch.arange(3))(torch.zeros(1, 2, 3, 6)), r"head_dim 8, got shape \(1, 2, 3, 6\)"),
        (lambda: Rope(8).at(torch.arange(3))(torch.zeros(2, 3, 8)), r"got shape \(2, 3, 8\)"),
        (lambda: Rope(8).at(torch.zeros(3, 2))(torch.zeros(2, 1, 2, 8)), "batch 2, .* batch of 3"),
        (lambda: Rope(8)(torch.zeros(1, 2, 3)), r"\(batch, T\), got shape \(1, 2, 3\)"),
        (lambda: Rope(8)([0, 1]), "got list"),
        (lambda: convert_layout(torch.zeros(9, 4), 2, to="half"), "2 heads do not divide the 9 rows"),
        (lambda: convert_layout(torch.zeros(8, 4), 2, to="neox"), "got 'neox'"),
    ],
)
def test_errors_name_what_was_expected_and_what_came(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_import_is_light():
    code = "import sys, tformer_lib.rope; print([m for m in ('transformers', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# The ladder: one operator, its steps and its gradients


GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device: steps 1 and 2 are CUDA kernels")
PLACES = [("cpu", "0")] + [("cuda", step) for step in ("0", "1", "2")] * GPU


def drawn(seed, *, batch=2, heads=3, kv_heads=1, T=5, head_dim=32, rotary_dim=None, dtype=torch.float32, device="cpu"):
    """q, k, cosines and sines, and two norm weights, in float64's random numbers cut to dtype."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, h, T, head_dim, generator=g).to(device, dtype) for h in (heads, kv_heads))
    positions = torch.randint(0, 5000, (batch, T), generator=g)
    cos, sin = Rope(head_dim, rotary_dim=rotary_dim)(positions)
    weights = [torch.randn(head_dim, generator=g).to(device, dtype) for _ in "qk"]
    return q, k, cos.to(device), sin.to(device), *weights


def in_memory(x, how):
    """The same numbers in another layout of memory."""
    if how == "heads last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "cut from wider rows":
        wide = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan, dtype=x.dtype, device=x.device)
        wide[..., : x.shape[3]] = x
        return wide[..., : x.shape[3]]
    if how == "off by one":
        flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
        return flat[1:].view_as(x).copy_(x)
    return x


def plain(q, k, cos, sin, layout, weights, eps, dtype):
    """The formula in another dtype: both outputs, by autograd differentiable."""
    outs = []
    for x, weight in ((q, weights[0]), (k, weights[1])):
        x, w = x.to(dtype), None if weight is None else weight.to(dtype)
        if eps is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            x = x if w is None else x * w
        outs.append(turn_pairs(x, cos.to(dtype), sin.to(dtype), layout))
    return outs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["no norm", "norm", "norm with weights"])
@pytest.mark.parametrize(("device", "step"), PLACES)
def test_both_sides_and_their_gradients_are_the_float64_formula(device, step, norm, layout):
    generator = torch.Generator().manual_seed(len(norm) + len(layout))
    shapes = [(1, 1, 1, 1), (2, 3, 1, 7), (1, 8, 2, 33), (3, 32, 8, 5), (1, 2, 2, 257), (1, 3, 1, 4099)]
    dims = [(32, 32), (64, 32), (128, 128), (96, 64), (80, 80), (256, 128)]
    dims += [] if step == "2" else [(2, 2), (59, 10), (40, 24)]
    for batch, heads, kv_heads, T in shapes:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            head_dim, rotary_dim = dims[int(torch.randint(len(dims), (), generator=generator))]
            how = ["as it is", "heads last", "cut from wider rows"] + ([] if step == "2" else ["off by one"])
            how = how[int(torch.randint(len(how), (), generator=generator))]
            sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "T": T, "head_dim": head_dim}
            q, k, cos, sin, *weights = drawn(T, **sizes, rotary_dim=rotary_dim, dtype=dtype, device=device)
            weights = weights if norm == "norm with weights" else [None, None]
            eps = None if norm == "no norm" else 1e-6
            given = [in_memory(x, how).requires_grad_() for x in (q, k)]
            given += [w.requires_grad_() for w in weights if w is not None]
            options = {"q_weight": weights[0], "k_weight": weights[1], "norm_eps": eps, "step": step}
            found = rotate_both(*given[:2], cos, sin, layout, **options)
            grads_out = [torch.randn(x.shape, generator=generator).to(x) for x in found]
            found_grads = torch.autograd.grad(found, given, grads_out)
            truth = plain(*given[:2], cos, sin, layout, weights, eps, torch.float64)
            truth_grads = torch.autograd.grad(truth, given, [g.double() for g in grads_out])
            rough = plain(*given[:2], cos, sin, layout, weights, eps, dtype)
            rough_grads = torch.autograd.grad(rough, given, grads_out)
            case = f"{sizes} {rotary_dim} {dtype} {how}"
            for a, b, c in zip(found, truth, rough, strict=True):
                assert a.dtype == dtype
                assert error(a, b) <= 2 * error(c, b) + 1e-5, case
            for a, b, c in zip(found_grads, truth_grads, rough_grads, strict=True):
                assert error(a, b) <= 3 * error(c, b) + 1e-5, case


def error(found, truth):
    """Relative to the largest number."""
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize(("device", "step"), PLACES)
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
def test_in_place_and_from_positions_are_the_same(device, step, norm_eps):
    q, k, *_ = drawn(1, T=9, head_dim=64, device=device)
    rope, positions = Rope(64, rotary_dim=32), torch.tensor([0, 1, 2, 0, 1, 70_000, 131_072, 5, 5], device=device)
    cos, sin = rope(positions)
    expected = rotate_both(q, k, cos, sin, norm_eps=norm_eps, step="0")
    frequencies = rope.frequencies(device=q.device)
    computed = rotate_at_positions(q, k, positions, frequencies, norm_eps=norm_eps, step=step)
    rotate_both_(q, k, cos, sin, norm_eps=norm_eps, step=step)
    for found in (computed, (q, k)):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("device", "step"), PLACES)
def test_what_does_not_turn_passes_even_where_it_is_infinite(device, step):
    x, _, cos, sin, *_ = drawn(2, head_dim=64, rotary_dim=32, device=device)
    x[..., 32:] = torch.inf
    out = rotate(x, cos, sin, step=step)
    assert torch.equal(out[..., 32:], x[..., 32:])
    assert out[..., :32].isfinite().all()


@pytest.mark.parametrize(("device", "step"), PLACES)
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
def test_the_operator_passes_opcheck(device, step, norm_eps):
    q, k, cos, sin, w, _ = drawn(3, device=device)
    weights = (None, None) if norm_eps is None else (w.requires_grad_(), None)
    args = (q.requires_grad_(), k.requires_grad_(), cos, sin, None, None, 1.0, *weights, norm_eps, "half", False, step)
    torch.library.opcheck(torch.ops.tformer_lab.rope, args)
    torch.library.opcheck(torch.ops.tformer_lab.rope, (q, None, *args[2:]))


@pytest.mark.parametrize(("device", "step"), PLACES)
def test_the_operator_compiles_with_its_gradients(device, step):
    q, k, cos, sin, *_ = drawn(4, device=device)

    def loss(q, k):
        a, b = torch.ops.tformer_lab.rope(q, k, cos, sin, None, None, 1.0, None, None, 1e-6, "half", False, step)
        return a.square().sum() + (a[:, :1] * b).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(q.requires_grad_(), k.requires_grad_()), (q, k)) for f in (loss, compiled)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("device", "step"), PLACES)
def test_no_tokens_no_work(device, step):
    q, k, cos, sin, *_ = drawn(5, T=0, device=device)
    a, b = rotate_both(q.requires_grad_(), k.requires_grad_(), cos, sin, norm_eps=1e-6, step=step)
    assert a.shape == q.shape
    torch.autograd.grad(a.sum() + b.sum(), (q, k))


def test_a_model_turns_both_sides_in_one_call(monkeypatch):
    from tformer_lib.attention import MultiHeadAttention
    from tformer_lib.rope import rope as module

    calls = []
    original = module.rotate_both
    monkeypatch.setattr(module, "rotate_both", lambda *a, **o: calls.append(a[1].shape) or original(*a, **o))
    layer, x = MultiHeadAttention(32, 4, kv_heads=2), torch.randn(1, 6, 32)
    rotate_at = Rope(8).at(torch.arange(6))
    out = layer(x, causal=True, rotate=rotate_at)
    assert calls == [(1, 2, 6, 8)]
    assert torch.equal(out, layer(x, causal=True, rotate=lambda heads: rotate_at(heads)))


@needs_gpu
def test_steps_run_in_a_graph_on_any_stream_and_by_default():
    q, k, cos, sin, *_ = drawn(
        6, batch=2, heads=8, kv_heads=2, T=300, head_dim=128, dtype=torch.bfloat16, device="cuda"
    )
    expected = rotate_both(q, k, cos, sin, step=0)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    rotate_both(q, k, cos, sin)  # builds
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = q + 0
        on_stream = rotate_both(late, k, cos, sin)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        in_graph = rotate_both(q, k, cos, sin)
    in_graph[0].fill_(torch.nan)
    graph.replay()
    for found in (on_stream, in_graph):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.float(), b.float(), atol=2e-2, rtol=2e-2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        Rope(128).at(torch.arange(300, device="cuda")).both(q, k)
    assert any("rope" in event.key and "rows_kernel" in event.key for event in profile.key_averages())


@needs_gpu
def test_numbers_past_2_to_the_31_are_turned():
    x = torch.zeros(1, 2**17 + 1, 130, 128, dtype=torch.bfloat16, device="cuda")  # 2.18e9 numbers
    cos, sin = Rope(128)(torch.arange(130, device="cuda"))
    x[:, -1] = torch.randn_like(x[:, -1])
    for step in (1, 2):
        out = rotate(x, cos, sin, step=step)
        torch.testing.assert_close(out[:, -1:], rotate(x[:, -1:], cos, sin, step=0), atol=2e-2, rtol=2e-2)
        del out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 1, 4, 32)}, "4 tokens, but there are angles for 5"),
        ({"k": torch.zeros(2, 1, 5, 16)}, "too small for 16 pairs|agree in batch, tokens and head_dim"),
        ({"k": torch.zeros(2, 1, 5, 32, dtype=torch.float64)}, "share dtype and device"),
        ({"q_weight": torch.ones(32)}, "without its norm_eps"),
        ({"q_weight": torch.ones(31), "norm_eps": 1e-6}, r"weight must be \(32,\), got \(31,\)"),
        ({"step": 3}, "step must be one of 0, 1, 2, got 3"),
        ({"step": 2}, "step 2 cannot do this: it runs on cuda"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    q, k, cos, sin, *_ = drawn(7)
    given = {"q": q, "k": k, "cos": cos, "sin": sin, **change}
    with pytest.raises(ValueError, match=message):
        rotate_both(**given)


def test_in_place_refuses_what_it_would_turn_wrongly():
    q, k, cos, sin, *_ = drawn(5)
    for leaf in (q.clone().requires_grad_(), q.clone().requires_grad_() * 1):
        with pytest.raises(NotImplementedError, match="RoPE in place has no gradient, and q wants one"):
            rotate_both_(leaf, k, cos, sin)
        with pytest.raises(NotImplementedError, match="RoPE in place has no gradient, and k wants one"):
            rotate_both_(q, leaf[:, : k.shape[1]], cos, sin)
        with torch.no_grad():
            rotate_both_(leaf.detach(), None, cos, sin)
    with pytest.raises(ValueError, match="q is written to and must not be expanded"):
        rotate_both_(q[:, :1].expand_as(q), k, cos, sin)


def test_the_operators_refuse_what_the_doors_do():
    q, k, cos, sin, *_ = drawn(9)
    options = (None, None, 1.0, None, None, None, "half", False, "0")
    with pytest.raises(ValueError, match="5 tokens, but there are angles for 4"):
        torch.ops.tformer_lab.rope(q, k, cos[:, 1:], sin[:, 1:], *options)
    with pytest.raises(ValueError, match="5 tokens, but there are angles for 4"):
        torch.ops.tformer_lab.rope_(q, k, cos[:, 1:], sin[:, 1:], None, None, None, "half", "0")
    positions, frequencies = torch.arange(4), torch.ones(16)
    with pytest.raises(ValueError, match="5 tokens, but there are angles for 4"):
        torch.ops.tformer_lab.rope(q, k, None, None, positions, frequencies, *options[2:])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32])
def test_the_length_of_dynamic_scaling_does_not_wrap_around(dtype):
    """In uint8 the place after 255 is 0."""
    rope = Rope(8, scaling=DynamicNTK(2.0), max_length=64)
    positions = torch.tensor([0, 200, 255])
    for found, wanted in zip(rope(positions.to(dtype)), rope(positions), strict=True):
        torch.testing.assert_close(found, wanted)


HOSTILE = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-300, 0.5, 1.0, 2.0, 1e300])


@draws(200)
@given(data=st.data())
def test_every_number_is_refused_or_gives_finite_angles(data):
    """Scalings with parameters that no paper has: a ValueError that says so, or angles, never NaN."""
    kind = data.draw(st.sampled_from(sorted(SCALINGS)))
    numbers = {}
    for field in fields(SCALINGS[kind]):
        if field.name in ("short_factor", "long_factor"):
            numbers[field.name] = tuple(data.draw(st.lists(HOSTILE, min_size=4, max_size=4)))
        elif field.name != "truncate" and data.draw(st.booleans() if field.default is not MISSING else st.just(True)):
            numbers[field.name] = data.draw(HOSTILE)
    try:
        rope = Rope(
            8, base=data.draw(HOSTILE), scaling=SCALINGS[kind](**numbers), max_length=data.draw(st.integers(1, 99))
        )
        angles = rope(torch.tensor([0, 5, 300]))
    except ValueError:
        return
    assert all(x.isfinite().all() for x in angles), rope
