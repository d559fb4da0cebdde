"""Mixtures of experts: the forms against the loop, the blocks against transformers, and what a setting promises."""

import json
import math
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tformer_lib.checkpoint import build
from tformer_lib.generation import generate
from tformer_lib.kv_cache import pass_cost
from tformer_lib.mixture_of_experts import (
    ROUTERS,
    Experts,
    ExpertsConfig,
    MixtureOfExperts,
    Router,
    Routing,
    balance_loss,
    every_row_by_every_matrix,
    expected_experts,
    grouped_matmul,
    grouped_matmul_op,
    grouped_outer_op,
    load_entropy,
    mix_batched,
    mix_by_loop,
    mix_grouped,
    mixtures,
    take_balance_loss,
    update_selection_biases,
)
from tformer_lib.training import (
    Run,
    TrainingConfig,
    estimate_flops_per_token,
    next_token_loss,
    parameter_groups,
    train,
    training_loss,
)
from tformer_lib.training.command import read_command
from tformer_lib.transformer import Decoder, FeedForward, ModelConfig, count_parameters, make_feed_forward

WIDTH, INNER = 16, 24
FORMS = {"grouped": mix_grouped, "batched": mix_batched}
KINDS = {
    "swiglu": {},
    "biases": {"bias": True},
    "gpt-oss": {"bias": True, "swiglu_limit": 1.0},
    "not gated": {"gated": False, "activation": torch.relu, "bias": True},
}


def random_experts(count: int, kind: str = "swiglu", seed: int = 0) -> Experts:
    torch.manual_seed(seed)
    experts = Experts(count, WIDTH, INNER, **KINDS[kind]).double()
    for p in experts.parameters():
        nn.init.normal_(p, std=0.5)
    return experts


def random_routing(tokens: int, count: int, k: int) -> Routing:
    """Any choice of different experts, with any weights."""
    chosen = torch.rand(tokens, count).argsort(1)[:, :k]
    shares = torch.rand(tokens, count, dtype=torch.float64)
    return Routing(chosen, torch.randn(tokens, k, dtype=torch.float64), shares / shares.sum(1, keepdim=True))


def model_config(**experts) -> ModelConfig:
    choices = {"norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rope", "bias": False}
    sizes = {"vocab_size": 61, "max_length": 40, "width": WIDTH, "layers": 2, "heads": 2, "feed_forward_width": INNER}
    return ModelConfig(**sizes, **choices, experts=ExpertsConfig(**experts))


def mixture(width: int = WIDTH, seed: int = 0, bias: bool = False, **experts) -> MixtureOfExperts:
    torch.manual_seed(seed)
    config = replace(model_config(**experts), width=width, bias=bias)
    layer = make_feed_forward(config).double()
    for name, p in layer.named_parameters():
        nn.init.normal_(p, std=1.0 if "router" in name else 0.4)
    return layer


# --- the forms against the loop -----------------------------------------------------------------------------------


def outputs_and_gradients(form, experts: Experts, x: torch.Tensor, routing: Routing) -> list[torch.Tensor]:
    x, weights = x.clone().requires_grad_(), routing.weights.clone().requires_grad_()
    out = form(experts, x, routing._replace(weights=weights))
    slopes = 1 + torch.arange(out.numel(), device=out.device) % 7 / 8  # exact in bfloat16, and none cancels another
    out.mul(slopes.to(out.dtype).view_as(out)).sum().backward()
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in (x, weights, *experts.parameters())]
    experts.zero_grad()
    return [out.detach(), *gradients]


def assert_same_as_loop(form, experts: Experts, x: torch.Tensor, routing: Routing) -> None:
    found, wanted = (outputs_and_gradients(f, experts, x, routing) for f in (form, mix_by_loop))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "count", "k"), [(1, 4, 2), (33, 8, 3), (6, 32, 2), (20, 4, 4), (3, 1, 1)])
def test_forms_equal_the_loop(form, kind, tokens, count, k):
    experts = random_experts(count, kind)
    x = torch.randn(tokens, WIDTH, dtype=torch.float64)
    assert_same_as_loop(FORMS[form], experts, x, random_routing(tokens, count, k))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("expert", [0, 2, 4])
def test_all_tokens_to_one_expert(form, expert):
    experts = random_experts(5, "biases")
    routing = random_routing(9, 5, 1)._replace(experts=torch.full((9, 1), expert))
    assert_same_as_loop(FORMS[form], experts, torch.randn(9, WIDTH, dtype=torch.float64), routing)


@pytest.mark.parametrize("form", [*FORMS.values(), mix_by_loop])
def test_no_token_at_all(form):
    out = form(random_experts(3), torch.zeros(0, WIDTH, dtype=torch.float64), random_routing(0, 3, 2))
    assert out.shape == (0, WIDTH)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_need_not_be_contiguous(form):
    experts = random_experts(4)
    x = torch.randn(WIDTH, 2 * 11, dtype=torch.float64).T[::2]
    routing = random_routing(11, 4, 2)
    routing = routing._replace(experts=routing.experts.T.contiguous().T)
    torch.testing.assert_close(FORMS[form](experts, x, routing), mix_by_loop(experts, x, routing), atol=1e-12, rtol=0)


@given(data=st.data())
def test_forms_equal_the_loop_for_any_routing(data):
    tokens, count = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, count))
    chosen = [data.draw(st.permutations(range(count)))[:k] for _ in range(tokens)]
    routing = random_routing(tokens, count, k)._replace(experts=torch.tensor(chosen))
    experts = random_experts(count, "biases")
    x = torch.randn(tokens, WIDTH, dtype=torch.float64)
    for form in FORMS.values():
        torch.testing.assert_close(form(experts, x, routing), mix_by_loop(experts, x, routing), atol=1e-12, rtol=0)


def test_loop_is_the_weighted_sum_of_dense_feed_forwards():
    """Written with plain matrices of each token's own experts."""
    experts, routing = random_experts(6), random_routing(8, 6, 2)
    x = torch.randn(8, WIDTH, dtype=torch.float64)
    wanted = torch.zeros_like(x)
    for n in range(8):
        for e, w in zip(routing.experts[n].tolist(), routing.weights[n], strict=True):
            gate, up = experts.gate[e] @ x[n], experts.up[e] @ x[n]
            wanted[n] += w * (experts.down[e] @ (gate / (1 + torch.exp(-gate)) * up))
    torch.testing.assert_close(mix_by_loop(experts, x, routing), wanted, atol=1e-12, rtol=1e-12)


def test_equals_the_dense_model_when_every_expert_is_chosen_and_all_are_alike():
    config = model_config(count=4, per_token=4)
    torch.manual_seed(3)
    dense, mixed = Decoder(replace(config, experts=None)).double().eval(), Decoder(config).double().eval()
    missing, _ = mixed.load_state_dict(dense.state_dict(), strict=False)
    assert all("experts" in name or "router" in name for name in missing)
    with torch.no_grad():
        for ours, theirs in zip(mixed.stack.blocks, dense.stack.blocks, strict=True):
            for name in ("up", "gate", "down"):
                getattr(ours.feed_forward.experts, name).copy_(getattr(theirs.feed_forward, name).weight)
        tokens = torch.randint(0, 61, (3, 20))
        torch.testing.assert_close(mixed(tokens), dense(tokens), atol=1e-12, rtol=1e-12)


def test_equals_one_wide_dense_layer_when_every_expert_is_chosen():
    """E experts side by side are a feed-forward E times as wide, whose hidden numbers the weights multiply."""
    layer = mixture(count=3, per_token=3)
    wide = FeedForward(replace(model_config(), experts=None, feed_forward_width=3 * INNER)).double()
    wide.up.weight.data.copy_(layer.experts.up.flatten(0, 1))
    wide.gate.weight.data.copy_(layer.experts.gate.flatten(0, 1))
    x = torch.randn(1, WIDTH, dtype=torch.float64)
    routing = layer.router(x)
    weights = torch.zeros(3, dtype=torch.float64).scatter(0, routing.experts[0], routing.weights[0])
    wide.down.weight.data.copy_((layer.experts.down * weights[:, None, None]).transpose(0, 1).flatten(1))
    torch.testing.assert_close(layer(x), wide(x), atol=1e-12, rtol=1e-12)


# --- routers ------------------------------------------------------------------------------------------------------


def router(count: int, **config) -> Router:
    return Router(WIDTH, ExpertsConfig(count=count, **config)).double()


def test_routers_by_hand():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]], dtype=torch.float64)
    e = math.e
    total = e**2 + 1 + e + 1 / e
    sigmoids = [1 / (1 + e**-2), 1 / (1 + 1 / e)]
    hand = {
        ("softmax_then_topk", True): [e / (e + 1), 1 / (e + 1)],
        ("softmax_then_topk", False): [e**2 / total, e / total],
        ("topk_then_softmax", True): [e / (e + 1), 1 / (e + 1)],
        ("sigmoid_then_topk", True): [s / sum(sigmoids) for s in sigmoids],
        ("sigmoid_then_topk", False): sigmoids,
    }
    for (kind, renormalise), wanted in hand.items():
        for scale in (1.0, 2.5):
            config = {"per_token": 2, "router": kind, "renormalise": renormalise, "scale": scale}
            routing = router(4, **config).choose(logits)
            assert routing.experts.tolist() == [[0, 2]]
            assert routing.weights[0].tolist() == pytest.approx([scale * w for w in wanted])
            assert routing.shares.sum().item() == pytest.approx(1)


def test_softmax_before_or_after_the_choice_is_the_same_once_renormalised():
    logits = torch.randn(50, 8, dtype=torch.float64) * 3
    before, after = (router(8, per_token=3, router=kind).choose(logits) for kind in ROUTERS[:2])
    assert torch.equal(before.experts, after.experts)
    torch.testing.assert_close(before.weights, after.weights)


@pytest.mark.parametrize("kind", ROUTERS)
def test_ties_and_extreme_logits_still_choose_different_experts(kind):
    logits = torch.tensor([[0.0] * 6, [1e4, 1e4, -1e4, 0, 0, 0], [-1e4] * 6, [1e4] + [-1e4] * 5], dtype=torch.float64)
    routing = router(6, per_token=3, router=kind).choose(logits)
    assert all(len(set(chosen)) == 3 for chosen in routing.experts.tolist())
    assert routing.weights.isfinite().all()
    assert routing.experts[3].tolist()[0] == 0


def test_topk_then_softmax_ranks_logits_where_a_softmax_would_be_zero():
    logits = torch.tensor([[0.0, 200.0, 100.0, 50.0]], dtype=torch.float32)
    routing = router(4, per_token=3, router="topk_then_softmax").choose(logits)
    assert routing.experts.tolist() == [[1, 2, 3]]


def test_selection_bias_changes_the_choice_and_not_the_weights():
    r = router(4, per_token=2, router="sigmoid_then_topk", renormalise=False)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    assert r.choose(logits).experts.tolist() == [[0, 1]]
    r.selection_bias[3] = 1.0
    routing = r.choose(logits)
    assert sorted(routing.experts[0].tolist()) == [0, 3]
    assert sorted(routing.weights[0].tolist()) == pytest.approx(sorted(logits.sigmoid()[0, [0, 3]].tolist()))


@pytest.mark.parametrize("kind", ROUTERS)
def test_groups_limit_where_experts_come_from(kind):
    config = {"count": 12, "per_token": 3, "groups": 4, "groups_per_token": 2, "router": kind}
    logits = torch.randn(200, 12, dtype=torch.float64)
    routing = Router(WIDTH, ExpertsConfig(**config)).double().choose(logits)
    ranks = logits.sigmoid() if kind == "sigmoid_then_topk" else logits
    for chosen, row in zip(routing.experts.tolist(), ranks.tolist(), strict=True):
        groups = [sorted(row[3 * g : 3 * g + 3], reverse=True) for g in range(4)]
        value = [sum(g[:2]) if kind == "sigmoid_then_topk" else g[0] for g in groups]
        best = sorted(range(4), key=lambda g: -value[g])[:2]
        allowed = [e for e in range(12) if e // 3 in best]
        assert chosen == sorted(allowed, key=lambda e: -row[e])[:3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_computes_in_float32(dtype):
    r = Router(64, ExpertsConfig(count=8, per_token=2)).to(dtype)
    x = torch.randn(100, 64).to(dtype)
    exact = deepcopy(r).float()(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        routing = r(x)
    assert routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.shares, exact.shares, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"count": 0}, "count of the experts must be at least 1, got 0"),
        ({"per_token": 9}, "a token takes 9 experts, but may choose from 8"),
        ({"groups": 3}, "8 experts cannot be divided into 3 groups"),
        ({"groups": 2, "groups_per_token": 3}, "groups_per_token must be at most the number of groups, 2, got 3"),
        ({"groups": 4, "per_token": 3}, "a token takes 3 experts, but may choose from 2"),
        ({"groups": 8, "per_token": 1, "router": "sigmoid_then_topk"}, "two best experts, but 8 groups have 1 each"),
        ({"router": "hash"}, "router must be one of softmax_then_topk, .*, got 'hash'"),
        ({"shared_gate": True}, "a shared_gate needs a shared expert"),
        ({"capacity_factor": 0.0}, "capacity_factor of the experts must be above 0, got 0.0"),
        ({"scale": math.nan}, "scale of the experts must be finite in float32, got nan"),
        ({"balance_weight": 1e39}, "balance_weight of the experts must be finite in float32, got 1e"),
        ({"balance_weight": math.nan}, "balance_weight of the experts must be at least 0, got nan"),
        ({"bias_rate": -1.0}, "bias_rate of the experts must be at least 0, got -1.0"),
        ({"width": 0}, "width of the experts must be above 0, got 0"),
    ],
)
def test_settings_that_make_no_sense(wrong, words):
    with pytest.raises(ValueError, match=words):
        ExpertsConfig(**wrong)


def test_swiglu_limit_needs_a_gate():
    with pytest.raises(ValueError, match="has no gate"):
        Experts(2, 4, 4, gated=False, swiglu_limit=7.0)


# --- transformers as oracle ---------------------------------------------------------------------------------------


def random_block(block: nn.Module, std: float = 0.3) -> nn.Module:
    for p in block.parameters():
        nn.init.normal_(p, std=std)
    return block.double().eval()


def copy_experts(ours: Experts, theirs: nn.Module) -> None:
    """From gate and up in one matrix."""
    gate, up = theirs.gate_up_proj.data.chunk(2, dim=1)
    for name, weight in (("gate", gate), ("up", up), ("down", theirs.down_proj.data)):
        getattr(ours, name).data.copy_(weight)


def copy_linear(ours: FeedForward, theirs: nn.Module) -> None:
    for name in ("gate", "up", "down"):
        getattr(ours, name).weight.data.copy_(getattr(theirs, f"{name}_proj").weight)


def assert_equals(theirs: nn.Module, ours: MixtureOfExperts, *, tokens: int = 13, tolerance: float = 1e-6) -> None:
    """Our block with the weights of theirs, which are float32, makes the same of random tokens."""
    ours.router.weight.data.copy_(theirs.gate.weight)
    copy_experts(ours.experts, theirs.experts)
    shared = getattr(theirs, "shared_experts", getattr(theirs, "shared_expert", None))
    if shared is not None:
        copy_linear(ours.shared, shared)
    x = torch.randn(2, tokens, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), atol=tolerance, rtol=min(tolerance, 1e-5))


def test_equals_mixtral_of_transformers():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = mixtral.MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_local_experts=8,
        num_experts_per_tok=2,
        experts_implementation="eager",
    )
    theirs = random_block(mixtral.MixtralSparseMoeBlock(config))
    ours = mixture(count=8, per_token=2)
    assert_equals(theirs, ours)


@pytest.mark.parametrize("renormalise", [True, False])
def test_equals_qwen3_moe_of_transformers(renormalise):
    qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = qwen.Qwen3MoeConfig(
        norm_topk_prob=renormalise,
        hidden_size=WIDTH,
        moe_intermediate_size=INNER,
        num_experts=16,
        num_experts_per_tok=4,
    )
    config._experts_implementation = "eager"
    theirs = random_block(qwen.Qwen3MoeSparseMoeBlock(config))
    ours = mixture(count=16, per_token=4, renormalise=renormalise)
    assert_equals(theirs, ours)


def test_equals_qwen2_moe_of_transformers_with_its_shared_gate():
    qwen = pytest.importorskip("transformers.models.qwen2_moe.modeling_qwen2_moe")
    config = qwen.Qwen2MoeConfig(
        hidden_size=WIDTH,
        moe_intermediate_size=INNER,
        shared_expert_intermediate_size=40,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=False,
    )
    config._experts_implementation = "eager"
    theirs = random_block(qwen.Qwen2MoeSparseMoeBlock(config))
    ours = mixture(count=6, per_token=2, renormalise=False, shared_width=40, shared_gate=True)
    ours.shared_gate.weight.data.copy_(theirs.shared_expert_gate.weight)
    assert_equals(theirs, ours)


def test_equals_deepseek_v3_of_transformers_with_groups_and_bias():
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = deepseek.DeepseekV3Config(
        hidden_size=WIDTH,
        moe_intermediate_size=INNER,
        n_routed_experts=16,
        num_experts_per_tok=3,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    config._experts_implementation = "eager"
    theirs = random_block(deepseek.DeepseekV3MoE(config))
    theirs.gate.e_score_correction_bias.data.copy_(0.3 * torch.randn(16))
    ours = mixture(
        count=16,
        per_token=3,
        router="sigmoid_then_topk",
        scale=2.5,
        groups=4,
        groups_per_token=2,
        shared_width=2 * INNER,
    )
    ours.router.selection_bias.data.copy_(theirs.gate.e_score_correction_bias)
    assert_equals(theirs, ours, tokens=50, tolerance=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
def test_equals_deepseek_v2_of_transformers(groups):
    deepseek = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
    config = deepseek.DeepseekV2Config(
        hidden_size=WIDTH,
        num_attention_heads=4,
        moe_intermediate_size=INNER,
        n_routed_experts=16,
        num_experts_per_tok=3,
        n_shared_experts=2,
        n_group=groups,
        topk_group=2 if groups > 1 else 1,
        topk_method="group_limited_greedy" if groups > 1 else "greedy",
        routed_scaling_factor=16.0,
    )
    config._experts_implementation = "eager"
    theirs = random_block(deepseek.DeepseekV2Moe(config))
    ours = mixture(
        count=16,
        per_token=3,
        renormalise=False,
        scale=16.0,
        groups=groups,
        groups_per_token=2 if groups > 1 else 1,
        shared_width=2 * INNER,
    )
    assert_equals(theirs, ours, tokens=50, tolerance=1e-4)


def test_equals_gpt_oss_of_transformers():
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = gpt_oss.GptOssConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=6, num_experts_per_tok=3, swiglu_limit=1.5
    )
    config._experts_implementation = "eager"
    theirs = random_block(gpt_oss.GptOssMLP(config), std=0.6)
    ours = mixture(count=6, per_token=3, router="topk_then_softmax", router_bias=True, swiglu_limit=1.5, bias=True)
    ours.router.load_state_dict(theirs.router.state_dict())
    there = theirs.experts
    for name, weight in (("gate", there.gate_up_proj[..., ::2]), ("up", there.gate_up_proj[..., 1::2])):
        getattr(ours.experts, name).data.copy_(weight.mT)
    for name, bias in (("gate", there.gate_up_proj_bias[..., ::2]), ("up", there.gate_up_proj_bias[..., 1::2])):
        getattr(ours.experts, f"{name}_bias").data.copy_(bias.flatten())
    ours.experts.down.data.copy_(there.down_proj.mT)
    ours.experts.down_bias.data.copy_(there.down_proj_bias.flatten())
    x = torch.randn(2, 13, WIDTH, dtype=torch.float64)
    out = theirs(x)
    torch.testing.assert_close(ours(x), out[0] if isinstance(out, tuple) else out, atol=1e-6, rtol=1e-6)


def test_balance_loss_is_k_times_smaller_than_transformers():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(64, 8)
    theirs = mixtral.load_balancing_loss_func((logits,), num_experts=8, top_k=2)
    routing = router(8, per_token=2).choose(logits)
    counts = torch.bincount(routing.experts.flatten(), minlength=8)
    torch.testing.assert_close(2 * balance_loss(routing.shares, counts), theirs)


# --- load, balance, capacity --------------------------------------------------------------------------------------


def test_balance_loss_is_one_when_even_and_e_over_k_when_collapsed():
    even = torch.full((8, 4), 0.25)
    assert balance_loss(even, torch.tensor([4, 4, 4, 4])).item() == pytest.approx(1)
    collapsed = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 8)
    assert balance_loss(collapsed, torch.tensor([8, 8, 0, 0])).item() == pytest.approx(4 / 2)
    assert balance_loss(even[:0].sum(0, keepdim=True), torch.zeros(4)).item() == 0


@pytest.mark.parametrize("router", ROUTERS)
def test_no_token_and_no_score_leave_a_loss_that_is_a_number(router):
    """A batch may bring a process no token, and sigmoids of logits far below 0 are all 0."""
    layer = mixture(count=5, per_token=2, router=router).train()
    assert layer(torch.zeros(3, 0, WIDTH, dtype=torch.float64)).shape == (3, 0, WIDTH)
    total = take_balance_loss([layer])
    total.backward()
    assert total.item() == 0
    logits = torch.full((4, 5), -2000.0, requires_grad=True)
    routing = layer.router.choose(logits)
    total = balance_loss(routing.shares, torch.tensor([4, 4, 0, 0, 0])) + routing.weights.sum()
    total.backward()
    assert total.isfinite()
    assert logits.grad.isfinite().all()


def test_gradient_of_the_balance_loss_takes_from_the_busiest():
    logits = torch.zeros(6, 3, requires_grad=True)
    balance_loss(logits.softmax(-1), torch.tensor([9, 2, 1])).backward()
    assert (logits.grad[:, 0] > 0).all()  # descent lowers it
    assert (logits.grad[:, 1:] < 0).all()


def test_load_counts_choices_only_in_training():
    layer = mixture(count=5, per_token=2)
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64)
    layer.train()(x), layer(x)
    chosen = layer.router(x.flatten(0, 1)).experts
    assert layer.load.tolist() == (2 * torch.bincount(chosen.flatten(), minlength=5)).tolist()
    layer.eval()(x)
    assert layer.load.sum() == 2 * 2 * 12
    assert "load" not in layer.state_dict()


@pytest.mark.parametrize("kind", ROUTERS)
def test_bias_update_evens_the_load(kind):
    """Loss-free balancing: alone, with weights that do not learn, it makes a lopsided router even."""
    torch.manual_seed(0)
    r = {"count": 8, "per_token": 2, "router": kind, "bias_rate": 0.01, "balance_weight": 0.0}
    layer = mixture(**r).train()
    layer.router.selection_bias.data.zero_()
    layer.router.weight.data.mul_(0.25)
    x = torch.randn(512, WIDTH, dtype=torch.float64) + 1.0  # all tokens lean one way
    entropies = []
    for _ in range(300):
        layer(x)
        entropies.append(load_entropy(layer.load))
        update_selection_biases(layer)
    assert entropies[0] < 0.93
    assert entropies[-1] > 0.99
    assert layer.load.sum() == 0


def test_one_bias_update_by_hand():
    layer = mixture(count=4, per_token=1, bias_rate=0.5)
    layer.router.selection_bias.data.zero_()
    layer.load.copy_(torch.tensor([8, 2, 4, 2]))
    update_selection_biases(layer)
    assert layer.router.selection_bias.tolist() == [-0.5, 0.5, 0.0, 0.5]


def test_capacity_drops_the_later_tokens():
    experts = random_experts(2)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    routing = random_routing(5, 2, 1)._replace(experts=torch.tensor([[0], [0], [1], [0], [0]]))
    out = mix_batched(experts, x, routing, capacity=2)
    wanted = mix_by_loop(experts, x, routing)
    torch.testing.assert_close(out[:3], wanted[:3], atol=1e-12, rtol=1e-12)
    assert out[3:].abs().max() == 0


@given(tokens=st.integers(1, 20), capacity=st.integers(1, 8), seed=st.integers(0, 99))
def test_capacity_is_the_loop_without_the_dropped_choices(tokens, capacity, seed):
    torch.manual_seed(seed)
    experts, routing = random_experts(4, "biases"), random_routing(tokens, 4, 2)
    seen, weights = [0] * 4, routing.weights.clone()
    for n in range(tokens):
        for slot, e in enumerate(routing.experts[n].tolist()):
            weights[n, slot] *= seen[e] < capacity
            seen[e] += 1
    x = torch.randn(tokens, WIDTH, dtype=torch.float64)
    wanted = mix_by_loop(experts, x, routing._replace(weights=weights))
    found = outputs_and_gradients(lambda *a: mix_batched(*a, capacity=capacity), experts, x, routing)
    torch.testing.assert_close(found[0], wanted, atol=1e-12, rtol=1e-12)
    assert all(g.isfinite().all() for g in found)


def test_capacity_holds_in_training_alone():
    layer = mixture(count=4, per_token=2, capacity_factor=0.5)
    x = torch.randn(32, WIDTH, dtype=torch.float64)
    assert layer.capacity(32) == 8
    routing = layer.router(x)
    torch.testing.assert_close(layer.train()(x), mix_batched(layer.experts, x, routing, 8), atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.eval()(x), mix_by_loop(layer.experts, x, routing), atol=1e-12, rtol=1e-12)
    assert layer.capacity(1) == 1
    assert mixture(count=4, per_token=2, capacity_factor=100.0).capacity(5) == 5


def test_load_entropy():
    assert load_entropy(torch.tensor([3, 3, 3, 3])) == pytest.approx(1)
    assert load_entropy(torch.tensor([0, 7, 0])) == pytest.approx(0)
    assert load_entropy(torch.tensor([1, 1, 0, 0])) == pytest.approx(0.5)


def test_expected_experts_is_the_mean_of_drawn_routings():
    torch.manual_seed(0)
    for many in (1, 4, 32):
        drawn = [len(random_routing(many, 16, 2).experts.unique()) for _ in range(500)]
        assert expected_experts(16, 2, many) == pytest.approx(sum(drawn) / 500, abs=0.25)
    assert expected_experts(8, 2, 1) == pytest.approx(2)


# --- the operator -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_grouped_matmul_multiplies_each_group_by_its_matrix(dtype):
    counts = torch.tensor([3, 0, 5, 1])
    rows, weight = torch.randn(9, 16).to(dtype), torch.randn(4, 8, 16).to(dtype)
    wanted = torch.cat(
        [part @ w.T for part, w in zip(rows.double().split(counts.tolist()), weight.double(), strict=True)]
    )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for form in (grouped_matmul, every_row_by_every_matrix):
        torch.testing.assert_close(form(rows, weight, counts).double(), wanted, atol=tolerance, rtol=tolerance)


def test_operators_keep_the_rules_of_torch():
    counts = torch.tensor([2, 0, 4])
    rows, weight = torch.randn(6, 5, requires_grad=True), torch.randn(3, 7, 5, requires_grad=True)
    torch.library.opcheck(grouped_matmul_op, (rows, weight, counts))
    torch.library.opcheck(grouped_outer_op, (torch.randn(6, 7), torch.randn(6, 5), counts))


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_gradients_of_biases_are_added_up_in_float32(device):
    """2,000 rows of bfloat16: a sum in bfloat16 stands still once a row is less than half its last digit."""
    experts = Experts(2, 8, 8, bias=True).bfloat16().to(device)
    routing = Routing(torch.zeros(2000, 1, dtype=torch.int64), torch.ones(2000, 1), torch.ones(2000, 2) / 2)
    routing = Routing(*(x.to(device) for x in routing))
    mix_grouped(experts, torch.zeros(2000, 8, dtype=torch.bfloat16, device=device), routing).sum().backward()
    assert experts.down_bias.grad[:8].tolist() == pytest.approx([2000.0] * 8, rel=0.01)


def test_gradcheck():
    experts, routing = random_experts(3), random_routing(4, 3, 2)
    x = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mix_grouped(experts, x, routing), x)


def test_autocast_multiplies_in_bfloat16():
    layer = mixture(count=4, per_token=2, shared_width=24).float()
    x = torch.randn(10, WIDTH)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    torch.testing.assert_close(out.float(), exact, atol=0.1 * exact.abs().max().item(), rtol=0.1)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_compiles_whole_with_its_gradients(capacity_factor):
    torch.manual_seed(5)
    config = model_config(count=4, per_token=2, bias_rate=0.01, shared_width=8, capacity_factor=capacity_factor)
    model = Decoder(config).train()
    tokens = torch.randint(0, 61, (2, 9))
    plain = training_loss(model, tokens, tokens)
    plain.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    load = model.stack.blocks[0].feed_forward.load.clone()
    model.zero_grad()
    update_selection_biases(model)
    for mixed in mixtures(model):
        mixed.router.selection_bias.data.zero_()
    compiled = torch.compile(training_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(model, tokens, tokens)
    loss.backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(model.stack.blocks[0].feed_forward.load, load)
    for name, gradient in wanted.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, atol=1e-6, rtol=1e-4)


# --- the model ----------------------------------------------------------------------------------------------------


def test_layers_with_experts():
    config = ExpertsConfig(first_layer=1)
    assert [config.in_layer(i) for i in range(4)] == [False, True, True, True]
    assert [ExpertsConfig(every=2).in_layer(i) for i in range(4)] == [False, True, False, True]
    model = Decoder(replace(model_config(first_layer=1), layers=3))
    kinds = [type(block.feed_forward) for block in model.stack.blocks]
    assert kinds == [FeedForward, MixtureOfExperts, MixtureOfExperts]


def test_parameters_and_active_weights_by_hand():
    config = model_config(count=8, per_token=2, width=10, shared_width=6, shared_gate=True, first_layer=1)
    dense = Decoder(replace(config, experts=None))
    of_dense = 3 * WIDTH * INNER
    of_mixture = 3 * WIDTH * (8 * 10 + 6) + 8 * WIDTH + WIDTH
    assert count_parameters(Decoder(config)) == count_parameters(dense) - of_dense + of_mixture
    active = 3 * WIDTH * (2 * 10 + 6) + 8 * WIDTH + WIDTH
    assert config.active_feed_forward_weights == of_dense + active
    less = 2 * of_dense - config.active_feed_forward_weights
    assert estimate_flops_per_token(dense.config) - estimate_flops_per_token(config) == 6 * less
    costs = [pass_cost(c, held=5, new=1) for c in (dense.config, config)]
    assert costs[0].flops - costs[1].flops == 2 * less
    assert costs[0].bytes - costs[1].bytes == 4 * less


def test_configuration_survives_json():
    config = model_config(count=6, per_token=2, groups=2, groups_per_token=2)
    assert build(ModelConfig, json.loads(json.dumps(asdict(config))), "file") == config
    with pytest.raises(ValueError, match="experts is of another version: it has colour"):
        build(ModelConfig, {"vocab_size": 5, "experts": {"colour": 1}}, "file")


def test_cached_equals_uncached():
    torch.manual_seed(0)
    model = Decoder(model_config(count=6, per_token=2, shared_width=8)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2, mean=float(p.dim() < 2))
    tokens = torch.randint(0, 61, (2, 5))
    written = generate(model, tokens.tolist(), max_new_tokens=8, temperature=0.0)
    for prompt, new in zip(tokens.tolist(), written, strict=True):
        text = list(prompt)
        for _ in range(8):
            text.append(model(torch.tensor([text]))[0, -1].argmax().item())
        assert text[5:] == new


def test_a_later_token_changes_nothing_earlier():
    layer = mixture(count=4, per_token=2)
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64)
    changed = x.clone()
    changed[:, 6:] += 1
    torch.testing.assert_close(layer(x)[:, :6], layer(changed)[:, :6], atol=1e-13, rtol=0)


def test_a_model_with_a_loss_waiting_can_be_copied():
    model = Decoder(model_config(count=4)).train()
    model(torch.randint(0, 61, (1, 5)))
    assert take_balance_loss(mixtures(deepcopy(model))) == 0.0
    assert take_balance_loss(mixtures(model)).requires_grad
    assert take_balance_loss(mixtures(model)) == 0.0


def test_biases_of_experts_are_not_decayed():
    model = Decoder(replace(model_config(count=3, router_bias=True), bias=True))
    names = {p: name for name, p in model.named_parameters()}
    decayed, others = ({names[p] for p in group["params"]} for group in parameter_groups(model, 0.1))
    assert not any(name.endswith("bias") for name in decayed)
    assert "stack.blocks.0.feed_forward.experts.up_bias" in others
    assert "stack.blocks.0.feed_forward.experts.up" in decayed
    assert all(p.abs().max() == 0 for name, p in model.named_parameters() if name.endswith("_bias"))


# --- training -----------------------------------------------------------------------------------------------------


def settings(data: Path, out: Path, *, steps: int = 40, **experts) -> TrainingConfig:
    values = {"batch": 4, "context": 32, "warmup": 5, "learning_rate": 5e-3, "eval_windows": 4, "sample_tokens": 0}
    values |= {"eval_interval": 20, "save_interval": 20, "log_interval": 1, "device": "cpu", "average": 0.8}
    return TrainingConfig(model=model_config(**experts), data=str(data), out=str(out), steps=steps, **values)


def test_training_lowers_the_loss_and_evens_the_load(data, tmp_path):
    run = train(settings(data, tmp_path / "run", count=4, per_token=1, bias_rate=0.01), quiet=True)
    losses = [line["val_loss"] for line in run.history if "val_loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    biases = [mixed.router.selection_bias for mixed in mixtures(run.model)]
    assert all(0 < b.abs().max() <= 40 * 0.01 + 1e-6 for b in biases)
    assert all(mixed.load.sum() == 0 for mixed in mixtures(run.model))  # counted anew after each step


def test_balance_loss_reaches_the_training_loop(data, tmp_path):
    """The routers' gradient, which without it is that of the next token alone, follows its weight."""
    gradients = []
    for weight in (0.0, 100.0):
        run = Run(settings(data, tmp_path / f"run{weight}", count=4, per_token=1, balance_weight=weight))
        inputs, targets = run.next_batch()
        run.batch_loss(inputs, targets).backward()
        gradients.append(run.model.stack.blocks[0].feed_forward.router.weight.grad.norm().item())
    assert gradients[1] > 10 * gradients[0]


def test_training_loss_is_the_next_tokens_and_the_weighted_balance_loss():
    torch.manual_seed(0)
    model, text = Decoder(model_config(count=4, per_token=2, balance_weight=0.5)).train(), torch.randint(0, 61, (2, 9))
    plain = next_token_loss(model, text, text)
    waiting = [mixed.balance.item() for mixed in mixtures(model)]
    take_balance_loss(mixtures(model))
    assert training_loss(model, text, text).item() == pytest.approx(plain.item() + 0.5 * sum(waiting))
    model.eval()
    assert training_loss(model, text, text).item() == pytest.approx(plain.item())


def test_a_resumed_run_goes_on_as_if_unbroken(data, tmp_path):
    choices = {"count": 4, "per_token": 1, "bias_rate": 0.01}
    whole = train(settings(data, tmp_path / "whole", **choices), quiet=True)
    half = Run(settings(data, tmp_path / "cut", **choices))
    half.start()
    for _ in range(20):
        half.take_step()
    half.save()
    resumed = Run.resume(tmp_path / "cut")
    assert resumed.config.model == whole.config.model
    resumed.train(quiet=True)
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_command_line_has_experts():
    command = ["train", "--steps", "7", "model.experts:experts-config", "--model.experts.count", "6"]
    config = read_command(command)
    assert config.model.experts == ExpertsConfig(count=6)
    assert read_command(["train"]).model.experts is None
    with pytest.raises(ValueError, match="a token takes 2 experts, but may choose from 1"):
        read_command([*command[:-1], "1"])


# --- on a GPU -----------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "count", "k", "width", "inner"),
    [(1, 8, 2, 64, 96), (300, 8, 2, 64, 96), (5, 64, 4, 128, 64), (77, 4, 1, 64, 64), (33, 6, 2, 50, 30)],
)
@pytest.mark.parametrize("one_expert", [False, True])
def test_gpu_forms_equal_the_loop_in_float64(dtype, tokens, count, k, width, inner, one_expert):
    """Widths of 50 and 30 are no multiples of 16 bytes, so the operator takes them."""
    torch.manual_seed(0)
    experts = Experts(count, width, inner, bias=True).cuda().to(dtype)
    chosen = torch.rand(tokens, count, device="cuda").argsort(1)[:, :k]
    chosen = (torch.zeros_like(chosen) + torch.arange(k, device="cuda")) if one_expert else chosen
    weights = torch.rand(tokens, k, device="cuda")
    x = torch.randn(tokens, width, device="cuda").to(dtype)
    routing = Routing(chosen, weights, torch.rand(tokens, count, device="cuda"))
    exact = outputs_and_gradients(
        mix_by_loop, deepcopy(experts).double(), x.double(), routing._replace(weights=weights.double())
    )
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for form in FORMS.values():
        for ours, theirs in zip(outputs_and_gradients(form, experts, x, routing), exact, strict=True):
            assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-3)


@needs_gpu
def test_gpu_layer_is_captured_in_a_graph():
    layer = gpu_layer()
    x = torch.randn(5, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)  # what PyTorch sets up on a first call is no part of a graph
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(out, layer(x))


@needs_gpu
def test_gpu_layer_compiles_whole():
    layer, compiled = gpu_layer(), torch.compile(gpu_layer(), fullgraph=True)
    x = torch.randn(5, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), atol=2e-2, rtol=2e-2)


def gpu_layer() -> MixtureOfExperts:
    """16 experts and a shared one, in bfloat16; the same on every call."""
    torch.manual_seed(0)
    config = replace(model_config(count=16, per_token=2, shared_width=64), width=64, feed_forward_width=96)
    return make_feed_forward(config).cuda().to(torch.bfloat16).eval()


@needs_gpu
def test_gpu_training_step_compiles():
    torch.manual_seed(0)
    sizes = {"width": 64, "heads": 2, "feed_forward_width": 64}
    model = Decoder(replace(model_config(count=8, per_token=2, bias_rate=0.01), **sizes)).cuda().train()
    text = torch.randint(0, 61, (4, 33), device="cuda")
    losses = []
    for loss_of in (training_loss, torch.compile(training_loss)):
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(model, text, text)
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
