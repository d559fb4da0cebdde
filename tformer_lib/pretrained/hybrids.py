"""Families of linear and full layers in turns: Qwen3-Next, with experts, and the language model of Qwen3.5."""

import torch
from torch import Tensor

from tformer_lib.mixture_of_experts import ExpertsConfig
from tformer_lib.pretrained.family import LLAMA_NAMES
from tformer_lib.pretrained.keys import Keys
from tformer_lib.pretrained.links import Link, same
from tformer_lib.pretrained.mixtures import experts_of, special_qwen_moe
from tformer_lib.pretrained.words import check_one_rope, llama_keys, llama_like, read_text_config, rope_parameters
from tformer_lib.transformer import LinearConfig, ModelConfig

TYPES = {"linear_attention": "linear", "full_attention": "full"}


def read_hybrid(keys: Keys, **options) -> ModelConfig:
    """What Qwen3-Next and Qwen3.5 have in common."""
    keys.must_be(hidden_act="silu", attn_output_gate=True)
    keys.ignore("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mlp_only_layers")
    every, listed = keys.take("full_attention_interval", 4), keys.take("layer_types", None)
    layers = keys.take("num_hidden_layers")
    types = listed or ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    for kind in types:
        if kind not in TYPES:
            raise ValueError(f"layer_types must be of {', '.join(TYPES)}, got {kind!r}")
    linear = LinearConfig(
        key_heads=keys.take("linear_num_key_heads"),
        value_heads=keys.take("linear_num_value_heads"),
        head_dim=keys.take("linear_key_head_dim"),
        value_dim=keys.take("linear_value_head_dim"),
        kernel=keys.take("linear_conv_kernel_dim", 4),
    )
    return llama_like(
        keys,
        norm="rmsnorm_1p",
        qk_norm="head",
        attention_gate=True,
        attention_bias=keys.take("attention_bias", False) or None,
        layer_types=tuple(TYPES[kind] for kind in types),
        linear=linear,
        **hybrid_rope(keys),
        **options,
    )


def hybrid_rope(keys: Keys) -> dict:
    """RoPE on the first channels of a head, a quarter of them where the file says no other share.

    Sections for the axes of an image mean nothing in a text.
    """
    check_one_rope(keys.config)
    given = keys.take("rope_parameters", None) or keys.take("rope_scaling", None) or {}
    text = {name: value for name, value in given.items() if name not in ("mrope_section", "mrope_interleaved")}
    apart = {
        "rope_theta": keys.take("rope_theta", None),
        "partial_rotary_factor": keys.take("partial_rotary_factor", 0.25),
    }
    base, scaling, fraction = rope_parameters({**apart, **text}, keys)
    return {"rope_base": base, "rope_scaling": scaling, "rotary_fraction": fraction}


def hybrid_keys(model_type: str, architecture: str, config: ModelConfig, **changes) -> dict:
    """The inverse of :func:`read_hybrid`."""
    linear, names = config.linear, {ours: theirs for theirs, ours in TYPES.items()}
    return llama_keys(
        model_type,
        architecture,
        config,
        attention_bias=bool(config.attention_bias),
        layer_types=[names[kind] for kind in config.types_of_layers],
        linear_num_key_heads=linear.key_heads,
        linear_num_value_heads=linear.value_heads,
        linear_key_head_dim=linear.head_dim,
        linear_value_head_dim=linear.value_dim,
        linear_conv_kernel_dim=linear.kernel,
        **changes,
    )


def read_qwen3_next(keys: Keys) -> ModelConfig:
    keys.must_be(decoder_sparse_step=1, mlp_only_layers=[])
    keys.ignore("num_local_experts")
    experts = experts_of(
        keys,
        count=keys.take("num_experts"),
        width=keys.take("moe_intermediate_size"),
        renormalise=keys.take("norm_topk_prob", True),
        shared_width=keys.take("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    return read_hybrid(keys, experts=experts)


def write_qwen3_next(config: ModelConfig) -> dict:
    experts: ExpertsConfig = config.experts
    changes = {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.width,
        "norm_topk_prob": experts.renormalise,
        "shared_expert_intermediate_size": experts.shared_width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return hybrid_keys("qwen3_next", "Qwen3NextForCausalLM", config, **changes)


def read_qwen3_5(keys: Keys) -> ModelConfig:
    return read_hybrid(keys)


def write_qwen3_5(config: ModelConfig) -> dict:
    return hybrid_keys("qwen3_5_text", "Qwen3_5ForCausalLM", config)


def read_qwen3_5_whole(keys: Keys) -> ModelConfig:
    """Qwen3.5 with eyes: its language model alone."""
    keys.ignore("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return read_text_config(keys, read_qwen3_5)


NEXT_NAMES = LLAMA_NAMES | {
    "feed_forward.shared.gate": "mlp.shared_expert.gate_proj",
    "feed_forward.shared.up": "mlp.shared_expert.up_proj",
    "feed_forward.shared.down": "mlp.shared_expert.down_proj",
    "feed_forward.shared_gate": "mlp.shared_expert_gate",
}

WHOLE_NAMES = LLAMA_NAMES | {
    "embedding.tokens": "language_model.embed_tokens",
    "stack.final_norm": "language_model.norm",
}

LINEAR_NAMES = {
    "attention.log_rate": "A_log",
    "attention.decay_bias": "dt_bias",
    "attention.norm": "norm.weight",
    "attention.out_proj.weight": "out_proj.weight",
    "attention.qkv_proj.weight": "in_proj_qkv.weight",
    "attention.gate_proj.weight": "in_proj_z.weight",
    "attention.beta_proj.weight": "in_proj_b.weight",
    "attention.decay_proj.weight": "in_proj_a.weight",
}
"""Parameters of our linear layers, and of Qwen3.5's."""


def special_qwen3_5(name: str, place: str, config: ModelConfig) -> Link | None:
    """Qwen3.5 holds a full layer's gate among its queries; a linear layer has names of its own."""
    if not name.startswith("attention.") or not place:
        return None
    if kind_at(place, config) == "full":
        return gated_queries(name, f"{place}self_attn.q_proj.", config)
    if name == "attention.convolution":
        return Link((name,), (f"{place}linear_attn.conv1d.weight",), lambda x: (x[:, 0],), lambda x: (x[:, None],))
    return same(name, f"{place}linear_attn.{LINEAR_NAMES[name]}")


def special_qwen3_next(name: str, place: str, config: ModelConfig) -> Link | None:
    """Qwen3-Next holds what its linear layers make of a token in two matrices, head by head."""
    if place and kind_at(place, config) == "linear":
        place_here = f"{place}linear_attn."
        if name == "attention.qkv_proj.weight":
            ours = (name, "attention.gate_proj.weight")
            return Link(ours, (f"{place_here}in_proj_qkvz.weight",), *by_key_head(config.linear))
        if name == "attention.beta_proj.weight":
            ours = (name, "attention.decay_proj.weight")
            return Link(ours, (f"{place_here}in_proj_ba.weight",), *pairs_by_key_head(config.linear))
    return special_qwen3_5(name, place, config) or special_qwen_moe(name, place, config)


def kind_at(place: str, config: ModelConfig) -> str:
    """The type of the layer that a block's place names, such as ``model.layers.3.``"""
    return config.types_of_layers[int(place.split(".")[-2])]


def gated_queries(name: str, place: str, config: ModelConfig) -> Link | None:
    """One matrix of theirs, whose rows are a head's queries and then its gates, for two of ours."""
    leaf = name.rpartition(".")[2]
    if name != f"attention.q_proj.{leaf}":
        return None
    if leaf == "bias":
        raise ValueError("a gate with a bias cannot be read here: attention_bias must be False")

    def read(x: Tensor) -> tuple[Tensor, Tensor]:
        queries, gates = x.unflatten(0, (config.heads, 2, -1)).unbind(1)
        return queries.flatten(0, 1), gates.flatten(0, 1)

    def write(queries: Tensor, gates: Tensor) -> tuple[Tensor]:
        parts = [x.unflatten(0, (config.heads, -1)) for x in (queries, gates)]
        return (torch.stack(parts, dim=1).flatten(0, 2),)

    return Link((name, "attention.gate_proj.weight"), (f"{place}{leaf}",), read, write)


def by_key_head(linear: LinearConfig):
    """From and to rows that are queries, keys, values and gates of one key head, then of the next."""
    values = linear.value_heads // linear.key_heads * linear.value_dim
    sizes = [linear.head_dim, linear.head_dim, values, values]

    def read(x: Tensor) -> tuple[Tensor, Tensor]:
        *qkv, gate = (part.flatten(0, 1) for part in x.unflatten(0, (linear.key_heads, -1)).split(sizes, dim=1))
        return torch.cat(qkv), gate

    def write(qkv: Tensor, gate: Tensor) -> tuple[Tensor]:
        parts = [*qkv.split([linear.key_heads * size for size in sizes[:3]]), gate]
        return (torch.cat([part.unflatten(0, (linear.key_heads, -1)) for part in parts], dim=1).flatten(0, 1),)

    return read, write


def pairs_by_key_head(linear: LinearConfig):
    """The same for step sizes and decays, one row a value head."""
    group = linear.value_heads // linear.key_heads

    def read(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.flatten(0, 1) for part in x.unflatten(0, (linear.key_heads, -1)).split([group, group], dim=1))

    def write(*parts: Tensor) -> tuple[Tensor]:
        return (torch.cat([part.unflatten(0, (linear.key_heads, -1)) for part in parts], dim=1).flatten(0, 1),)

    return read, write
