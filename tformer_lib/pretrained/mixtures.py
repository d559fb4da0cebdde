"""Families with experts: Mixtral, Qwen3-MoE, gpt-oss and DeepSeek-V2."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tformer_lib.grouped_query_attention import LatentConfig
from tformer_lib.mixture_of_experts import ExpertsConfig
from tformer_lib.pretrained.family import LLAMA_NAMES
from tformer_lib.pretrained.keys import Keys
from tformer_lib.pretrained.links import Link, same, stacked, transposed
from tformer_lib.pretrained.words import (
    layer_types,
    llama_keys,
    llama_like,
    qwen_window,
    written_layer_types,
    written_qwen_window,
)
from tformer_lib.rope.scaling import yarn_sharpening
from tformer_lib.transformer import ModelConfig


def experts_of(keys: Keys, **options) -> ExpertsConfig:
    """What a config says about its experts, in the words that several families share."""
    keys.ignore("router_aux_loss_coef", "output_router_logits", "router_jitter_noise")
    return ExpertsConfig(per_token=keys.take("num_experts_per_tok"), **options)


def read_mixtral(keys: Keys) -> ModelConfig:
    keys.must_be(hidden_act="silu")
    experts = experts_of(keys, count=keys.take("num_local_experts"))
    return llama_like(keys, base=1_000_000.0, window=keys.take("sliding_window", None), experts=experts)


def write_mixtral(config: ModelConfig) -> dict:
    changes = {"num_local_experts": config.experts.count, "num_experts_per_tok": config.experts.per_token}
    return llama_keys("mixtral", "MixtralForCausalLM", config, **changes) | {"sliding_window": config.window}


def special_mixtral(name: str, place: str, config: ModelConfig) -> Link | None:
    """Mixtral's files hold each expert's three matrices apart, and call them w1, w3 and w2."""
    if name == "feed_forward.router.weight":
        return same(name, f"{place}block_sparse_moe.gate.weight")
    parts = {"gate": "w1", "up": "w3", "down": "w2"}
    return expert_link(name, f"{place}block_sparse_moe.experts.", parts, config)


def expert_link(name: str, place: str, parts: Mapping[str, str], config: ModelConfig) -> Link | None:
    """The matrices of all experts, which files hold one by one; None for what is no expert's."""
    module, _, leaf = name.rpartition(".")
    if module != "feed_forward.experts":
        return None
    return stacked(name, [f"{place}{i}.{parts[leaf]}.weight" for i in range(config.experts.count)])


QWEN_EXPERT = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def read_qwen3_moe(keys: Keys) -> ModelConfig:
    keys.must_be(hidden_act="silu", mlp_only_layers=[])
    count = keys.take("num_experts", None) or keys.take("num_local_experts")
    keys.ignore("num_local_experts")
    width, every = keys.take("moe_intermediate_size"), keys.take("decoder_sparse_step", 1)
    renormalise = keys.take("norm_topk_prob", False)
    experts = experts_of(keys, count=count, width=width, renormalise=renormalise, every=every)
    bias = keys.take("attention_bias", False) or None
    return llama_like(keys, attention_bias=bias, qk_norm="head", experts=experts, **qwen_window(keys))


def write_qwen3_moe(config: ModelConfig) -> dict:
    experts = config.experts
    changes = {
        "attention_bias": bool(config.attention_bias),
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.width,
        "norm_topk_prob": experts.renormalise,
        "decoder_sparse_step": experts.every,
    }
    return llama_keys("qwen3_moe", "Qwen3MoeForCausalLM", config, **changes) | written_qwen_window(config)


def special_qwen_moe(name: str, place: str, config: ModelConfig) -> Link | None:
    """Qwen's files hold each expert's three matrices apart."""
    if name == "feed_forward.router.weight":
        return same(name, f"{place}mlp.gate.weight")
    return expert_link(name, f"{place}mlp.experts.", QWEN_EXPERT, config)


def read_gpt_oss(keys: Keys) -> ModelConfig:
    keys.must_be(hidden_act="silu", swiglu_alpha=1.702, attention_bias=True)
    keys.ignore("experts_per_token", "initial_context_length")
    experts = experts_of(
        keys,
        count=keys.take("num_local_experts"),
        router="topk_then_softmax",
        router_bias=True,
        swiglu_limit=keys.take("swiglu_limit", 7.0),
    )
    if not keys.config.get("rope_parameters") and not keys.config.get("rope_scaling"):
        raise keys.lacks("rope_parameters")  # without them the reference code stretches by its own
    window = {"window": keys.take("sliding_window")}
    kinds = layer_types(keys, window, lambda i: "full_attention" if i % 2 else "sliding_attention")
    return llama_like(keys, base=None, bias=True, attention_sinks=True, experts=experts, **kinds)


def write_gpt_oss(config: ModelConfig) -> dict:
    changes = {
        "attention_bias": True,
        "num_local_experts": config.experts.count,
        "num_experts_per_tok": config.experts.per_token,
        "swiglu_limit": config.experts.swiglu_limit,
        "sliding_window": config.window,
        "layer_types": written_layer_types(config),
    }
    return llama_keys("gpt_oss", "GptOssForCausalLM", config, **changes)


def special_gpt_oss(name: str, place: str, config: ModelConfig) -> Link | None:
    """gpt-oss holds all experts' matrices together as (E, in, out), with the columns of gate and up in turns."""
    module, _, leaf = name.rpartition(".")
    count = config.experts.count
    if module == "feed_forward.router":
        return same(name, f"{place}mlp.router.{leaf}")
    if module != "feed_forward.experts":
        return None
    place = f"{place}mlp.experts."
    if leaf == "down":
        return transposed(name, f"{place}down_proj")
    if leaf == "down_bias":
        return Link((name,), (f"{place}down_proj_bias",), lambda x: (x.flatten(),), lambda x: (x.view(count, -1),))
    if leaf.endswith("_bias"):
        ours = (f"{module}.gate_bias", f"{module}.up_bias")
        return Link(ours, (f"{place}gate_up_proj_bias",), lambda x: flat_turns(x), lambda *x: in_turns(count, *x))
    return Link((f"{module}.gate", f"{module}.up"), (f"{place}gate_up_proj",), matrices_of_turns, matrices_in_turns)


def flat_turns(x: Tensor) -> tuple[Tensor, Tensor]:
    """(E, 2 n), gate and up in turns -> both (E n,)."""
    return x[:, ::2].flatten(), x[:, 1::2].flatten()


def in_turns(count: int, gate: Tensor, up: Tensor) -> tuple[Tensor]:
    """The inverse of :func:`flat_turns`."""
    return (torch.stack((gate.view(count, -1), up.view(count, -1)), dim=-1).flatten(1),)


def matrices_of_turns(x: Tensor) -> tuple[Tensor, Tensor]:
    """(E, width, 2 n), gate and up in turns -> both (E, n, width)."""
    return x[..., ::2].mT, x[..., 1::2].mT


def matrices_in_turns(gate: Tensor, up: Tensor) -> tuple[Tensor]:
    """The inverse of :func:`matrices_of_turns`."""
    return (torch.stack((gate.mT, up.mT), dim=-1).flatten(2),)


def read_deepseek_v2(keys: Keys) -> ModelConfig:
    keys.must_be(hidden_act="silu", mlp_bias=False, attention_bias=False, norm_topk_prob=False, rms_norm_eps=1e-6)
    keys.must_be(scoring_func="softmax", moe_layer_freq=1, seq_aux=True)
    keys.ignore("aux_loss_alpha", "ep_size", "qk_head_dim")
    keys.must_be(num_key_value_heads=keys.take("num_attention_heads"))
    width, method = keys.take("moe_intermediate_size"), keys.take("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method must be greedy or group_limited_greedy to be read here, got {method!r}")
    groups, chosen = keys.take("n_group", 1) or 1, keys.take("topk_group", 1) or 1
    experts = experts_of(
        keys,
        count=keys.take("n_routed_experts"),
        width=width,
        renormalise=False,
        scale=keys.take("routed_scaling_factor", 1.0),
        groups=groups if method == "group_limited_greedy" else 1,
        groups_per_token=chosen if method == "group_limited_greedy" else 1,
        shared_width=width * (keys.take("n_shared_experts", 0) or 0),
        first_layer=keys.take("first_k_dense_replace", 0),
    )
    latent = LatentConfig(
        keys=keys.take("kv_lora_rank"),
        rope_dim=keys.take("qk_rope_head_dim"),
        value_dim=keys.take("v_head_dim"),
        queries=keys.take("q_lora_rank", None),
    )
    plain = keys.take("qk_nope_head_dim")
    keys.ignore("head_dim", "num_key_value_heads")
    options = {"head_dim": plain, "kv_heads": None, "rope_layout": "interleaved", "latent": latent, "experts": experts}
    config = llama_like(keys, **options)
    sharpened = latent_scale(plain + latent.rope_dim, config.rope_scaling)
    return config if sharpened is None else replace(config, attention_scale=sharpened)


def latent_scale(size: int, scaling: dict | None) -> float | None:
    """DeepSeek sharpens scores by YaRN's factor where its ``mscale_all_dim`` asks for it; None is 1 / sqrt(size)."""
    if not scaling or not scaling.get("mscale_all_dim"):
        return None
    return size**-0.5 * yarn_sharpening(scaling["factor"], scaling["mscale_all_dim"]) ** 2


def write_deepseek_v2(config: ModelConfig) -> dict:
    experts, latent = config.experts, config.latent
    grouped = experts.groups > 1
    changes = {
        "num_key_value_heads": config.heads,
        "head_dim": None,
        "kv_lora_rank": latent.keys,
        "q_lora_rank": latent.queries,
        "qk_nope_head_dim": config.size_of_head,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "n_routed_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.width,
        "n_shared_experts": experts.shared_width // experts.width,
        "routed_scaling_factor": experts.scale,
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        "n_group": experts.groups if grouped else None,
        "topk_group": experts.groups_per_token if grouped else None,
        "first_k_dense_replace": experts.first_layer,
    }
    return llama_keys("deepseek_v2", "DeepseekV2ForCausalLM", config, **changes) | {"q_lora_rank": latent.queries}


DEEPSEEK_NAMES = LLAMA_NAMES | {
    "attention.q_down": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.down": "self_attn.kv_a_proj_with_mqa",
    "attention.norm": "self_attn.kv_a_layernorm",
    "feed_forward.shared.gate": "mlp.shared_experts.gate_proj",
    "feed_forward.shared.up": "mlp.shared_experts.up_proj",
    "feed_forward.shared.down": "mlp.shared_experts.down_proj",
}


def special_deepseek_v2(name: str, place: str, config: ModelConfig) -> Link | None:
    """DeepSeek's files make keys and values of the latent with one matrix, and hold experts apart."""
    latent, plain = config.latent, config.size_of_head
    if name == "attention.q_proj.weight":
        return same(name, f"{place}self_attn.{'q_proj' if latent.queries is None else 'q_b_proj'}.weight")
    if name == "attention.up_k":

        def read(x: Tensor) -> tuple[Tensor, ...]:
            return x.view(config.heads, -1, latent.keys).split((plain, latent.value_dim), dim=1)

        def write(up_k: Tensor, up_v: Tensor) -> tuple[Tensor]:
            return (torch.cat((up_k, up_v), dim=1).flatten(0, 1),)

        return Link((name, "attention.up_v"), (f"{place}self_attn.kv_b_proj.weight",), read, write)
    return special_qwen_moe(name, place, config)
