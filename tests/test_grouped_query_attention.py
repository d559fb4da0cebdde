"""Grouped-query attention: equal to its definition, to PyTorch and to Llama; pooling; the two forms of MLA."""

import pytest
import torch
import torch.nn.functional as F
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tformer_lib import masks
from tformer_lib.attention import attend, attend_sdpa
from tformer_lib.generation import generate, generate_uncached
from tformer_lib.grouped_query_attention import (
    LatentCache,
    MultiHeadLatentAttention,
    attend_repeated,
    pool_heads,
    to_grouped,
    uptrain,
)
from tformer_lib.kv_cache import CacheShape
from tformer_lib.pretrained import from_tensors
from tformer_lib.rope import Rope
from tformer_lib.training import next_token_loss
from tformer_lib.transformer import Decoder, ModelConfig

pytestmark = pytest.mark.usefixtures("one_thread")

KV_HEADS = [8, 4, 2, 1]


def qkv(kv_heads, T=5, S=33, dtype=torch.float64):
    generator = torch.Generator().manual_seed(kv_heads)
    make = lambda heads, length: torch.randn(2, heads, length, 16, generator=generator, dtype=dtype)  # noqa: E731
    return make(8, T), make(kv_heads, S), make(kv_heads, S)


@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads_equal_copied_heads_and_torch(kv_heads, causal):
    q, k, v = qkv(kv_heads)
    mask = masks.causal(5, 33) if causal else None
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    for form in (attend, attend_sdpa, attend_repeated):
        torch.testing.assert_close(form(q, k, v, causal=causal), wanted)


@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_the_head_of_a_group_is_the_one_that_its_queries_read(kv_heads):
    q, k, v = qkv(kv_heads)
    before = attend(q, k, v)
    v[:, -1] += 1.0  # the last kv head serves the last group of consecutive queries
    changed = ((attend(q, k, v) - before).abs() > 1e-6).any(-1).any(-1)  # (batch, heads)
    assert changed.tolist() == [[head >= 8 - 8 // kv_heads for head in range(8)]] * 2


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_keys_and_values_are_never_copied_for_their_group(kv_heads):
    q, k, v = qkv(kv_heads, T=1, S=257)

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            shared = [x.untyped_storage().data_ptr() for x in (k, v)]
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in shared:
                self.size = max(self.size, out.numel())
            return out

    with Largest() as grouped:
        attend(q, k, v)
    with Largest() as repeated:
        attend_repeated(q, k, v)
    assert repeated.size >= 2 * 8 * 257 * 16
    assert grouped.size <= 2 * 8 * 257  # the scores are the largest thing made


@pytest.mark.parametrize("kv_heads", KV_HEADS)
@torch.no_grad()
def test_a_llama_of_transformers_gives_the_same_logits_and_the_same_text(kv_heads):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(kv_heads)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    theirs = LlamaForCausalLM(config).eval()
    ours = from_tensors(theirs.state_dict(), config.to_dict())
    tokens = torch.randint(61, (2, 12))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)
    wanted = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, min_new_tokens=20, do_sample=False
    )
    assert generate(ours, tokens, max_new_tokens=20) == wanted[:, 12:].tolist()
    assert generate_uncached(ours, tokens[0].tolist(), max_new_tokens=20) == wanted[0, 12:].tolist()


# Conversion


def make_model(kv_heads=8, bias=True):
    torch.manual_seed(5)
    config = ModelConfig(
        vocab_size=31, max_length=32, width=32, layers=2, heads=8, kv_heads=kv_heads, positions="rope", bias=bias
    )
    return Decoder(config).double()


def test_pooling_takes_the_mean_of_neighbouring_heads():
    weight = torch.arange(4 * 2 * 3, dtype=torch.float64).view(8, 3)  # 4 heads of 2 rows
    heads = weight.view(4, 2, 3)
    wanted = torch.stack([(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2]).view(4, 3)
    assert torch.equal(pool_heads(weight, 2, 2), wanted)
    assert torch.equal(pool_heads(weight[:, 0], 1, 2), heads[:, :, 0].mean(0))
    assert torch.equal(pool_heads(weight, 4, 2), weight)


@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_conversion_is_exact_where_the_heads_of_a_group_were_equal(kv_heads, bias):
    few = make_model(kv_heads, bias)
    many = make_model(8, bias)
    expanded = {
        name: weight.unflatten(0, (kv_heads, 4)).repeat_interleave(8 // kv_heads, 0).flatten(0, 1)
        if ".k_proj." in name or ".v_proj." in name
        else weight
        for name, weight in few.state_dict().items()
    }
    many.load_state_dict(expanded)
    tokens = torch.randint(31, (2, 16))
    before = many(tokens)
    grouped = to_grouped(many, kv_heads)
    torch.testing.assert_close(grouped(tokens), before)
    assert torch.equal(many(tokens), before)
    assert CacheShape.of(grouped, 1).bytes_per_token * (8 // kv_heads) == CacheShape.of(many, 1).bytes_per_token


def test_conversion_in_two_steps_is_conversion_in_one():
    model = make_model()
    at_once, in_steps = to_grouped(model, 2), to_grouped(to_grouped(model, 4), 2)
    for a, b in zip(at_once.parameters(), in_steps.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("kv_heads", "heads"), [(3, 8), (16, 8), (0, 8)])
def test_a_number_that_does_not_divide_is_refused(kv_heads, heads):
    with pytest.raises(ValueError, match=f"{kv_heads} kv heads do not divide"):
        to_grouped(make_model(), kv_heads)


def test_uptraining_brings_a_converted_model_back():
    torch.manual_seed(0)
    model = make_model().float()
    tokens = torch.randint(31, (8, 17))
    batches = [(tokens[:, :-1], tokens[:, 1:])] * 60
    uptrain(model, batches, next_token_loss, learning_rate=3e-3)
    trained = next_token_loss(model, *batches[0]).item()
    grouped = to_grouped(model, 1)
    broken = next_token_loss(grouped, *batches[0]).item()
    losses = uptrain(grouped, batches[:30], next_token_loss)
    assert len(losses) == 30
    assert losses[0] == pytest.approx(broken)
    assert next_token_loss(grouped, *batches[0]).item() < broken
    assert trained < broken


# Multi-head latent attention


def make_mla(rope_dim=6, heads=4, latent=10):
    torch.manual_seed(9)
    layer = MultiHeadLatentAttention(24, heads, 8, latent=latent, rope_dim=rope_dim).double()
    torch.nn.init.uniform_(layer.norm.weight, 0.5, 1.5)
    return layer


def rotation(layer, start, stop):
    return Rope(layer.rope_dim).at(torch.arange(start, stop)) if layer.rope_dim else None


def mla_by_hand(layer, x, rotate):
    """Causal MLA token by token and head by head, as the paper's equations stand."""
    T, out = x.shape[0], torch.zeros(x.shape[0], layer.heads * layer.head_dim, dtype=x.dtype)
    joint = x @ layer.down.weight.T
    c = joint[:, : layer.latent]
    c = c / (c.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm.weight
    shared = joint[:, layer.latent :]
    shared = rotate(shared[None, None])[0, 0] if rotate else shared
    q_all = (x @ layer.q_proj.weight.T).view(T, layer.heads, -1)
    for h in range(layer.heads):
        k, v = c @ layer.up_k[h].T, c @ layer.up_v[h].T
        plain, turned = q_all[:, h, : layer.head_dim], q_all[:, h, layer.head_dim :]
        turned = rotate(turned[None, None])[0, 0] if rotate else turned
        scores = (plain @ k.T + turned @ shared.T) / (layer.head_dim + layer.rope_dim) ** 0.5
        weights = scores.masked_fill(~masks.causal(T), -torch.inf).softmax(-1)
        out[:, h * layer.head_dim : (h + 1) * layer.head_dim] = weights @ v
    return out @ layer.out_proj.weight.T


@pytest.mark.parametrize("rope_dim", [0, 6])
@pytest.mark.parametrize("absorb", [False, True])
@torch.no_grad()
def test_both_forms_of_mla_are_the_papers_equations(rope_dim, absorb):
    layer = make_mla(rope_dim)
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    rotate = rotation(layer, 0, 11)
    wanted = torch.stack([mla_by_hand(layer, row, rotate) for row in x])
    torch.testing.assert_close(layer(x, causal=True, rotate=rotate, absorb=absorb), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rope_dim", [0, 6])
@torch.no_grad()
def test_absorbed_decoding_from_the_latent_cache_equals_the_naive_full_pass(rope_dim):
    layer, cache = make_mla(rope_dim), LatentCache()
    x = torch.randn(2, 14, 24, dtype=torch.float64)
    wanted = layer(x, causal=True, rotate=rotation(layer, 0, 14))
    got = [layer(x[:, :5], causal=True, rotate=rotation(layer, 0, 5), cache=cache)]
    for i in range(5, 14):
        got.append(layer(x[:, i : i + 1], causal=True, rotate=rotation(layer, i, i + 1), cache=cache, absorb=True))
        assert cache.nbytes == 2 * (i + 1) * (10 + rope_dim) * 8
    torch.testing.assert_close(torch.cat(got, dim=1), wanted, rtol=0, atol=1e-6)


@draws(40)
@given(parts=st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans()), min_size=1, max_size=6))
@torch.no_grad()
def test_latents_fed_in_any_pieces_equal_recomputation(parts):
    """Passes of any length, expanded or absorbed, some of which die at their mask and come again."""
    layer, cache, held, outs = make_mla(), LatentCache(), 0, []
    x = torch.randn(2, sum(T for T, _, _ in parts), 24, dtype=torch.float64)
    for T, absorb, dies in parts:
        now, rotate = x[:, held : held + T], rotation(layer, held, held + T)
        if dies:
            with pytest.raises(ValueError, match="mask must broadcast"):
                layer(now, mask=torch.ones(T + 2, 1, dtype=torch.bool), rotate=rotate, cache=cache, absorb=absorb)
        outs.append(layer(now, causal=True, rotate=rotate, cache=cache, absorb=absorb))
        held += T
    wanted = layer(x, causal=True, rotate=rotation(layer, 0, held))
    torch.testing.assert_close(torch.cat(outs, dim=1), wanted, rtol=0, atol=1e-12)


def test_latents_that_do_not_fit_are_refused_and_what_is_held_carries_no_gradient():
    layer, cache = make_mla(), LatentCache()
    layer(torch.randn(2, 3, 24, dtype=torch.float64), rotate=rotation(layer, 0, 3), cache=cache)
    assert not cache.entries.requires_grad
    with pytest.raises(ValueError, match=r"the cache holds .*\(2, 16, torch.float64.*got \(3, 16"):
        layer(torch.randn(3, 1, 24, dtype=torch.float64), rotate=rotation(layer, 3, 4), cache=cache)


@torch.no_grad()
def test_mla_obeys_a_mask():
    layer, x = make_mla(), torch.randn(1, 7, 24, dtype=torch.float64)
    mask = torch.rand(7, 7) < 0.5
    plain, absorbed = (layer(x, mask=mask, rotate=rotation(layer, 0, 7), absorb=absorb) for absorb in (False, True))
    torch.testing.assert_close(plain, absorbed, rtol=0, atol=1e-10)
    x[:, 3] = 9.0  # a token that query 5 does not see cannot change it
    mask[5, 3] = False
    with_it = layer(x, mask=mask, rotate=rotation(layer, 0, 7))[0, 5]
    x[:, 3] = -9.0
    torch.testing.assert_close(layer(x, mask=mask, rotate=rotation(layer, 0, 7))[0, 5], with_it)


def test_an_odd_rope_dim_is_refused():
    with pytest.raises(ValueError, match="rope_dim must be even, got 5"):
        make_mla(rope_dim=5)
