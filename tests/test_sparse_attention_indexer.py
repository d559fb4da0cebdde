"""The indexer: its formula, its choice, its loss, and the attention of DeepSeek-V3.2 in transformers."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from tformer_lib import sparse_attention as sp
from tformer_lib.attention import attend
from tformer_lib.grouped_query_attention import MultiHeadLatentAttention
from tformer_lib.rope import Rope, rotate

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_scores_are_the_weighted_sum_of_what_each_head_likes():
    q, k, weights = draw(2, 3, 5, 4), draw(2, 7, 4, seed=1), draw(2, 5, 3, seed=2)
    found = sp.index_scores(q, k, weights)
    for b, t, s in ((0, 0, 0), (1, 4, 6), (0, 3, 2)):
        liked = [max(0.0, float(q[b, h, t] @ k[b, s])) * float(weights[b, t, h]) for h in range(3)]
        assert found[b, t, s].item() == pytest.approx(sum(liked) / 12**0.5, abs=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S"), [(1, 9), (9, 9), (4, 9)])
def test_the_best_are_chosen_and_the_future_never(T, S, causal):
    scores = draw(2, T, S)
    found = sp.chosen_tokens(scores, 3, causal=causal)
    for b in range(2):
        for t in range(T):
            seen = S - T + t + 1 if causal else S
            best = set(scores[b, t, :seen].topk(min(3, seen)).indices.tolist())
            assert set(found[b, 0, t].nonzero()[:, 0].tolist()) == best


def test_fewer_than_one_key_is_refused():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        sp.chosen_tokens(draw(1, 2, 2), 0)


@pytest.mark.parametrize("chosen", [False, True])
def test_the_loss_is_the_divergence_from_the_attention_by_hand(chosen):
    scores, attention = draw(1, 4, 4), draw(1, 2, 4, 4, seed=1).softmax(-1)
    mask = sp.chosen_tokens(scores, 2, causal=True) if chosen else None
    expected = 0.0
    for t in range(4):
        keys = [s for s in range(t + 1) if mask is None or mask[0, 0, t, s]]
        p = attention[0, :, t, keys].double().sum(0)
        q = scores[0, t, keys].double().softmax(-1)
        expected += float((p / p.sum() * (p / p.sum() / q).log()).sum()) / 4
    assert sp.index_loss(scores, attention, mask=mask, causal=True).item() == pytest.approx(expected, abs=1e-6)


def test_the_loss_is_zero_where_both_agree_and_has_finite_gradients_where_weights_are_zero():
    scores = draw(2, 6, 6).requires_grad_()
    attention = scores.detach().masked_fill(torch.ones(6, 6).triu(1) > 0, -torch.inf).softmax(-1)
    assert sp.index_loss(scores, attention[:, None], causal=True).item() == pytest.approx(0.0, abs=1e-6)
    hard = torch.eye(6).expand(2, 1, 6, 6)
    (gradient,) = torch.autograd.grad(sp.index_loss(scores, hard), scores)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient, (scores.softmax(-1) - hard[:, 0]).detach() / 12)


def test_an_indexer_learns_to_point_where_the_attention_looks():
    """Attention by keys of 16 numbers, an indexer with 2 heads of 4: after training half the budget loses little."""
    x = draw(64, 24, 16)
    q, k = x @ draw(16, 16, seed=1) / 4, x @ draw(16, 16, seed=2) / 4
    attention = attend_weights(q, k)
    torch.manual_seed(0)
    indexer = sp.Indexer(16, 2, 4)
    optimizer = torch.optim.Adam(indexer.parameters(), lr=0.02)

    def kept():
        mask = sp.chosen_tokens(indexer(x), 6, causal=True)
        return float((attention * mask).sum(-1)[:, :, 12:].mean())

    before = kept()
    for _ in range(150):
        loss = sp.index_loss(indexer(x), attention, causal=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert kept() > before + 0.15, f"{before:.2f} -> {kept():.2f} of the weight is kept"


def attend_weights(q, k):
    """(batch, 1, T, T) causal softmax weights, sharpened so that few keys matter."""
    scores = q @ k.mT / 2
    return scores.masked_fill(torch.ones_like(scores[0]).triu(1) > 0, -torch.inf).softmax(-1)[:, None]


# ---- DeepSeek-V3.2


HEADS, NOPE, ROPE, VALUES, LATENT, QUERIES, WIDTH, TOKENS = 4, 8, 4, 6, 12, 20, 32, 40


def random_attention(chosen_keys):
    """transformers' attention with random weights in float64."""
    name = "transformers.models.deepseek_v32"
    config_of = pytest.importorskip(f"{name}.configuration_deepseek_v32").DeepseekV32Config
    theirs = pytest.importorskip(f"{name}.modeling_deepseek_v32")
    config = config_of(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=QUERIES,
        kv_lora_rank=LATENT,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUES,
        index_topk=chosen_keys,
        index_head_dim=8,
        index_n_heads=3,
        num_hidden_layers=1,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(0)
    attention = theirs.DeepseekV32Attention(config, 0).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return attention, theirs.DeepseekV32RotaryEmbedding(config).double()


def ours(theirs):
    """Multi-head latent attention and an indexer with the weights of transformers' module."""
    sizes = {"latent": LATENT, "rope_dim": ROPE, "value_dim": VALUES, "query_latent": QUERIES}
    attention = MultiHeadLatentAttention(WIDTH, HEADS, NOPE, **sizes).double()
    up = theirs.kv_b_proj.weight.detach().unflatten(0, (HEADS, NOPE + VALUES))
    names = {
        "q_down.weight": theirs.q_a_proj.weight,
        "q_norm.weight": theirs.q_a_layernorm.weight,
        "q_proj.weight": theirs.q_b_proj.weight,
        "down.weight": theirs.kv_a_proj_with_mqa.weight,
        "norm.weight": theirs.kv_a_layernorm.weight,
        "up_k": up[:, :NOPE],
        "up_v": up[:, NOPE:],
        "out_proj.weight": theirs.o_proj.weight,
    }
    attention.load_state_dict({name: tensor.detach() for name, tensor in names.items()})
    indexer = sp.Indexer(WIDTH, 3, 8, query_width=QUERIES, rope_dim=ROPE).double()
    names = {"q_proj": "wq_b", "k_proj": "wk", "k_norm": "k_norm", "weigh": "weights_proj"}
    indexer.load_state_dict(
        {
            f"{a}.{kind}": tensor
            for a, b in names.items()
            for kind, tensor in getattr(theirs.indexer, b).state_dict().items()
        }
    )
    return attention, indexer


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("chosen_keys", [1, 6, 100])
def test_equals_deepseek_v32_of_transformers(chosen_keys, absorb):
    """Latent attention under the mask of what the indexer chose, on the same random weights."""
    theirs, angles = random_attention(chosen_keys)
    attention, indexer = ours(theirs)
    x = draw(2, TOKENS, WIDTH).double()
    positions = torch.arange(TOKENS)
    hidden = torch.full((TOKENS, TOKENS), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)
    with torch.no_grad():
        expected, _ = theirs(x, angles(x, positions[None]), hidden.expand(2, 1, -1, -1))
        turn = {
            layout: partial(
                rotate, **dict(zip(("cos", "sin"), Rope(ROPE, layout=layout)(positions), strict=True)), layout=layout
            )
            for layout in ("half", "interleaved")
        }
        queries = attention.q_norm(attention.q_down(x))
        scores = indexer(x, queries=queries, rotate=turn["half"])
        mask = sp.chosen_tokens(scores, chosen_keys, causal=True)
        found = attention(x, mask=mask, causal=True, rotate=turn["interleaved"], absorb=absorb)
        everything = attention(x, causal=True, rotate=turn["interleaved"])
    assert mask.sum(-1).max() == min(chosen_keys, TOKENS)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    if chosen_keys < TOKENS:
        assert (everything - expected).abs().max() > 0.1, "the choice changes the output"


def test_a_mask_of_chosen_tokens_is_attention_over_those_alone():
    q, k, v = draw(1, 2, 10, 8), draw(1, 2, 10, 8, seed=1), draw(1, 2, 10, 8, seed=2)
    mask = sp.chosen_tokens(draw(1, 10, 10, seed=3), 3, causal=True)
    out = attend(q, k, v, mask=mask, causal=True)
    for t in range(10):
        keys = mask[0, 0, t].nonzero()[:, 0]
        weights = F.softmax(q[0, :, t, None] @ k[0][:, keys].mT / 8**0.5, dim=-1)
        torch.testing.assert_close(out[0, :, t], (weights @ v[0][:, keys])[:, 0])
