"""Positional encodings: the published formulas, the properties they promise, and transformers as an oracle."""

import math

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st

from tformer_lib.positional_encoding import (
    LearnedEncoding,
    SinusoidalEncoding,
    T5Bias,
    alibi,
    alibi_slopes,
    relative_positions,
    sinusoidal,
    t5_bucket,
)

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
HEADS = [1, 2, 3, 5, 6, 8, 12, 16, 20, 25, 32, 71, 112]


@given(position=st.integers(-10_000, 1_000_000), half=st.integers(1, 40), base=st.sampled_from([100.0, 10000.0, 5e5]))
@draws(50)
def test_sinusoidal_is_the_papers_formula(position, half, base):
    row = sinusoidal(torch.tensor([position]), 2 * half, base=base)[0]
    for i in range(half):
        angle = position / base ** (2 * i / (2 * half))
        tolerance = 1e-6 if abs(position) < 1e5 else 1e-5
        assert row[2 * i].item() == pytest.approx(math.sin(angle), abs=tolerance)
        assert row[2 * i + 1].item() == pytest.approx(math.cos(angle), abs=tolerance)


@given(shift=st.integers(-500, 500), half=st.integers(1, 32))
@draws(30)
def test_a_shift_is_one_linear_map_whatever_the_position(shift, half):
    positions = torch.arange(0, 700, 37)
    here, there = (sinusoidal(p, 2 * half).double().unflatten(-1, (half, 2)) for p in (positions, positions + shift))
    angle = shift * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack((here[..., 0] * cos + here[..., 1] * sin, here[..., 1] * cos - here[..., 0] * sin), dim=-1)
    assert torch.allclose(turned, there, atol=1e-6)


def test_dot_products_of_sinusoids_depend_on_the_distance_alone():
    table = sinusoidal(300, 64).double()
    gram = table @ table.T
    for distance in (0, 1, 7, 100):
        diagonal = gram.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)


def test_sinusoidal_takes_a_length_or_positions_of_any_shape():
    positions = torch.tensor([[3, 4, 5], [0, 9, 2]])
    table = sinusoidal(10, 8)
    assert table.dtype == torch.float32
    assert torch.equal(sinusoidal(positions, 8), table[positions])
    assert sinusoidal(0, 8).shape == (0, 8)


@pytest.mark.parametrize("make", [lambda: SinusoidalEncoding(16), lambda: LearnedEncoding(40, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_at_an_explicit_position_gets_what_it_had_in_the_full_pass(make, dtype):
    torch.manual_seed(0)
    encoding, x = make().to(dtype), torch.randn(2, 12, 16).to(dtype)
    whole = encoding(x)
    assert whole.dtype == dtype
    assert torch.equal(encoding(x[:, 7:], torch.arange(7, 12)), whole[:, 7:])
    ragged = torch.tensor([[5, 6], [2, 3]])
    expected = torch.stack((whole[0, 5:7], whole[1, 2:4]))
    assert torch.equal(encoding(torch.stack((x[0, 5:7], x[1, 2:4])), ragged), expected)


def test_sinusoidal_encoding_has_no_parameters_and_no_end():
    encoding = SinusoidalEncoding(8)
    assert not list(encoding.state_dict())
    x = torch.zeros(1, 1, 8)
    assert torch.equal(encoding(x, torch.tensor([10**6]))[0], sinusoidal(torch.tensor([10**6]), 8))


def test_learned_encoding_trains_only_the_rows_that_were_used():
    encoding = LearnedEncoding(10, 4)
    encoding(torch.zeros(2, 3, 4), torch.tensor([[1, 2, 3], [3, 4, 5]])).sum().backward()
    assert encoding.table.weight.grad[:, 0].tolist() == [0, 1, 1, 2, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sinusoidal(4, 7), "width must be even, .* got 7"),
        (lambda: SinusoidalEncoding(0), "got 0"),
        (lambda: LearnedEncoding(8, 4)(torch.zeros(1, 9, 4)), "position 8 .* positions 0 to 7"),
        (lambda: LearnedEncoding(8, 4)(torch.zeros(1, 2, 4), torch.tensor([3, 31])), "position 31 .* 0 to 7"),
        (lambda: LearnedEncoding(8, 4)(torch.zeros(1, 2, 4), torch.tensor([-1, 3])), "position -1 .* 0 to 7"),
        (
            lambda: LearnedEncoding(8, 4)(torch.zeros(1, 2, 4), torch.tensor([0.5, 3])),
            "integers .* torch.float32",
        ),
        (lambda: LearnedEncoding(8, 4)(torch.zeros(1, 2, 6)), r"width=4\), got shape \(1, 2, 6\)"),
        (lambda: SinusoidalEncoding(4)(torch.zeros(1, 2, 4), torch.arange(3)), r"\(3,\) do not fit x .* \(1, 2, 4\)"),
        (lambda: SinusoidalEncoding(4)(torch.zeros(3, 2, 4), torch.zeros(2, 2)), r"\(2, 2\) do not fit"),
        (lambda: LearnedEncoding(8, 4)(torch.zeros(1, 2, 4, dtype=torch.int64)), "x must be floating-point.*int64"),
        (lambda: SinusoidalEncoding(4)(torch.zeros(1, 2, 4, dtype=torch.int64)), "x must be floating-point.*int64"),
        (lambda: sinusoidal(2.5, 4), "positions must be an integer, got 2.5"),
        (lambda: sinusoidal(-1, 4), "at least 0, got positions = -1"),
        (lambda: sinusoidal(torch.tensor([True]), 4), "numbers, got torch.bool"),
        (lambda: sinusoidal(4, 4, base=math.inf), "base must be positive and finite, got inf"),
        (lambda: sinusoidal(4, 4, base=-2.0), "base must be positive and finite, got -2.0"),
        (lambda: sinusoidal(4, 4.0), "width must be an integer, got 4.0"),
        (lambda: alibi_slopes(2.5), "heads must be an integer, got 2.5"),
        (lambda: alibi(4, 2.5), "T must be an integer, got 2.5"),
        (
            lambda: alibi(4, positions=torch.zeros(2, 3), key_positions=torch.zeros(3, 3)),
            r"agree in batch and device, got \(\(2, 3\), 'cpu'\) and \(\(3, 3\), 'cpu'\)",
        ),
        (
            lambda: alibi(4, positions=torch.zeros(3), key_positions=torch.zeros(3, device="meta")),
            "agree in batch and device.* 'meta'",
        ),
        (lambda: t5_bucket(torch.tensor([0.5])), "must be integers.*float32"),
        (lambda: T5Bias(4)(positions=torch.zeros(3)), "must be integers.*float32"),
        (lambda: t5_bucket(torch.arange(3), max_distance=math.nan), "over 8, .* got nan"),
        (lambda: t5_bucket(torch.arange(3), max_distance=math.inf), "over 8, .* got inf"),
        (lambda: alibi_slopes(0), "at least 1, got 0"),
        (lambda: alibi(4), "how many queries"),
        (lambda: alibi(4, -1), "at least 0, got T = -1"),
        (lambda: T5Bias(0), "heads must be at least 1, got 0"),
        (lambda: alibi(4, 3, positions=torch.arange(2)), r"T is 3, .* \(2,\)"),
        (lambda: alibi(4, 3, 5, key_positions=torch.arange(4)), r"S is 5, .* \(4,\)"),
        (lambda: alibi(4, positions=torch.zeros(1, 2, 3)), r"got shape \(1, 2, 3\)"),
        (lambda: alibi(4, positions=torch.tensor([True])), "got torch.bool"),
        (lambda: t5_bucket(torch.arange(3), buckets=7), "even and at least 4, got 7"),
        (lambda: T5Bias(4, buckets=32, max_distance=8), "over 8, .* got 8"),
    ],
)
def test_errors_name_what_was_expected_and_what_came(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("heads", HEADS)
def test_alibi_slopes_are_blooms_and_mpts(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    slopes = alibi_slopes(heads)
    bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]  # slope times key index 1
    mpt = -build_mpt_alibi_tensor(heads, 2)[:, 0, 0]  # slope times distance 1
    assert torch.allclose(slopes, bloom, rtol=1e-6)
    assert torch.allclose(slopes, mpt, rtol=1e-6)


@pytest.mark.parametrize("heads", [3, 8, 12])
def test_alibi_gives_the_attention_weights_that_bloom_gives(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    T = 19
    scores = torch.randn(heads, T, T, dtype=torch.float64)
    future = torch.ones(T, T).triu(1).bool()
    ours, blooms = (
        (scores + bias).masked_fill(future, -math.inf).softmax(-1)
        for bias in (alibi(heads, T), build_alibi_tensor(torch.ones(1, T), heads, torch.float32))
    )
    assert torch.allclose(ours, blooms, atol=1e-5)


@given(T=st.integers(1, 20), extra=st.integers(0, 20), heads=st.sampled_from(HEADS))
@draws(30)
def test_biases_are_aligned_bottom_right(T, extra, heads):
    S = T + extra
    t5 = T5Bias(heads)
    for full, part in ((alibi(heads, S), alibi(heads, T, S)), (t5(S), t5(T, S))):
        assert part.shape == (heads, T, S)
        assert torch.equal(part, full[:, extra:])
    assert alibi(heads, T, S)[:, -1, -1].abs().max() == 0


def test_biases_take_the_positions_of_a_ragged_cache():
    positions = torch.tensor([[4, 5], [9, 10]])  # two rows, two new tokens each, after 4 and after 9 stored ones
    t5 = T5Bias(6, bidirectional=False)
    for bias, full in ((alibi(6, S=11, positions=positions), alibi(6, 11)), (t5(S=11, positions=positions), t5(11))):
        assert bias.shape == (2, 6, 2, 11)
        assert torch.equal(bias[0], full[:, 4:6])
        assert torch.equal(bias[1], full[:, 9:11])


def test_biases_of_permuted_keys_are_permuted_biases():
    order = torch.randperm(9)
    assert torch.equal(alibi(4, positions=torch.arange(9), key_positions=order), alibi(4, 9)[..., order])
    assert torch.equal(relative_positions(2, 9, key_positions=torch.arange(9)), relative_positions(2, 9))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 64), (16, 1000), (6, 20), (4, 3), (64, 4096)])
def test_buckets_are_t5s(buckets, max_distance, bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = torch.arange(-6000, 6001)
    theirs = T5Attention._relative_position_bucket(relative, bidirectional, buckets, max_distance)
    ours = t5_bucket(relative, buckets=buckets, max_distance=max_distance, bidirectional=bidirectional)
    assert torch.equal(ours, theirs)
    assert ours.min() >= 0
    assert ours.max() < buckets


@pytest.mark.parametrize("decoder", [True, False])
def test_t5_bias_is_transformers_compute_bias(decoder):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(d_model=32, d_kv=8, num_heads=4, is_decoder=decoder)
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours = T5Bias(4, bidirectional=not decoder)
    ours.table.weight.data.copy_(theirs.relative_attention_bias.weight)
    assert torch.equal(ours(300), theirs.compute_bias(300, 300)[0])
    assert torch.equal(ours(5, 300), theirs.compute_bias(5, 300, past_seen_tokens=295)[0])


def test_t5_bias_sends_gradients_to_its_table():
    bias = T5Bias(2, buckets=8, max_distance=16, bidirectional=False)
    bias(3).sum().backward()
    assert bias.table.weight.grad[:, 0].tolist() == [6, 2, 1, 0, 0, 0, 0, 0]  # three of distance 0, three ahead


@pytest.mark.parametrize("dtype", INTEGERS)
def test_positions_in_any_integer_dtype_stand_where_they_stand(dtype):
    """Differences of small unsigned integers wrap around: 1 - 2 is 255 in uint8."""
    queries, keys = torch.tensor([1, 100, 3]), torch.tensor([2, 0, 120, 7])
    wanted = relative_positions(positions=queries, key_positions=keys)
    assert torch.equal(relative_positions(positions=queries.to(dtype), key_positions=keys.to(dtype)), wanted)
    assert torch.equal(sinusoidal(keys.to(dtype), 8), sinusoidal(keys, 8))
    bias = T5Bias(2)
    assert torch.equal(
        bias(positions=queries.to(dtype), key_positions=keys), bias(positions=queries, key_positions=keys)
    )


def test_differences_of_half_precision_positions_are_exact():
    positions = torch.tensor([2048.0, 2050.0]).half()
    found = relative_positions(positions=positions, key_positions=torch.tensor([2049, 0]))
    assert found.tolist() == [[1.0, -2048.0], [-1.0, -2050.0]]
