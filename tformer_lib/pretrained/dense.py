"""Families whose layers have one feed-forward: GPT-2, Llama, Mistral, Qwen2, Qwen3, OLMo and Gemma 3."""

import torch

from tformer_lib.pretrained.keys import Keys
from tformer_lib.pretrained.links import Link, same, transposed
from tformer_lib.pretrained.words import (
    layer_types,
    llama_keys,
    llama_like,
    qwen_window,
    read_text_config,
    ropes_by_type,
    written_layer_types,
    written_qwen_window,
    written_ropes,
)
from tformer_lib.transformer import ModelConfig

GPT2_NAMES = {
    "embedding.tokens": "wte",
    "embedding.places": "wpe",
    "stack.final_norm": "ln_f",
    "unembedding": "lm_head",
    "attention.out_proj": "attn.c_proj",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
    "attention_norm": "ln_1",
    "feed_forward_norm": "ln_2",
}


def read_gpt2(keys: Keys) -> ModelConfig:
    keys.must_be(
        activation_function="gelu_new",
        add_cross_attention=False,
        scale_attn_by_inverse_layer_idx=False,
        scale_attn_weights=True,
        tie_word_embeddings=True,
    )
    keys.ignore("n_ctx", "reorder_and_upcast_attn", "resid_pdrop", "summary_activation", "summary_first_dropout")
    keys.ignore("summary_proj_to_labels", "summary_type", "summary_use_proj", "embd_pdrop", "attn_pdrop")
    return ModelConfig(
        vocab_size=keys.take("vocab_size"),
        max_length=keys.take("n_positions"),
        width=keys.take("n_embd"),
        layers=keys.take("n_layer"),
        heads=keys.take("n_head"),
        feed_forward_width=keys.take("n_inner", None),
        feed_forward="gelu_tanh",
        norm_epsilon=keys.take("layer_norm_epsilon"),
    )


def write_gpt2(config: ModelConfig) -> dict:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.feed_forward_width,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_epsilon,
    }


def special_gpt2(name: str, place: str, config: ModelConfig) -> Link | None:
    """GPT-2 makes queries, keys and values with one matrix, and holds matrices as (in, out)."""
    if name == "embedding.places.table.weight":
        return same(name, "wpe.weight")
    module, _, leaf = name.rpartition(".")
    if module == "attention.q_proj":
        ours = tuple(f"attention.{part}_proj.{leaf}" for part in "qkv")
        return Link(ours, (f"{place}attn.c_attn.{leaf}",), *(parted if leaf == "bias" else parted_matrix))
    if leaf == "weight" and place and not module.endswith("norm"):
        return transposed(name, f"{place}{GPT2_NAMES[module]}.weight")
    return None


parted = (lambda x: x.chunk(3), lambda *x: (torch.cat(x),))


parted_matrix = (lambda x: x.mT.chunk(3), lambda *x: (torch.cat(x).mT,))


def read_llama(keys: Keys) -> ModelConfig:
    keys.must_be(hidden_act="silu", mlp_bias=False, sliding_window=None, partial_rotary_factor=1.0)
    return llama_like(keys, attention_bias=keys.take("attention_bias", False) or None)


def write_llama(config: ModelConfig) -> dict:
    return llama_keys("llama", "LlamaForCausalLM", config, attention_bias=bool(config.attention_bias))


def read_smollm3(keys: Keys) -> ModelConfig:
    keys.must_be(hidden_act="silu", mlp_bias=False, use_sliding_window=False, sliding_window=None)
    keys.ignore("layer_types", "max_window_layers")
    every, listed = keys.take("no_rope_layer_interval", 4), keys.take("no_rope_layers", None)
    layers = keys.take("num_hidden_layers")
    turned = listed or [int((i + 1) % every != 0) for i in range(layers)]  # 1 where RoPE turns, despite the key's name
    types = {} if all(turned) else {"layer_types": tuple("full" if turn else "nope" for turn in turned)}
    bias = keys.take("attention_bias", False) or None
    return llama_like(
        keys, base=2_000_000.0, attention_bias=bias, tie_embeddings=keys.take("tie_word_embeddings", True), **types
    )


def write_smollm3(config: ModelConfig) -> dict:
    turned = [{"full": 1, "nope": 0}[kind] for kind in config.types_of_layers]
    changes = {"no_rope_layers": turned, "attention_bias": bool(config.attention_bias), "head_dim": None}
    padding = {"pad_token_id": None}  # a missing key would be one that a smaller vocabulary does not have
    return llama_keys("smollm3", "SmolLM3ForCausalLM", config, **changes) | padding


def read_mistral(keys: Keys) -> ModelConfig:
    keys.must_be(hidden_act="silu")
    return llama_like(keys, window=keys.take_or_null("sliding_window", 4096))


def write_mistral(config: ModelConfig) -> dict:
    return llama_keys("mistral", "MistralForCausalLM", config) | {"sliding_window": config.window}


def read_qwen2(keys: Keys) -> ModelConfig:
    keys.must_be(hidden_act="silu", use_mrope=False)
    return llama_like(keys, attention_bias="qkv", **qwen_window(keys))


def write_qwen2(config: ModelConfig) -> dict:
    return llama_keys("qwen2", "Qwen2ForCausalLM", config, head_dim=None) | written_qwen_window(config)


def read_qwen3(keys: Keys) -> ModelConfig:
    keys.must_be(hidden_act="silu")
    bias = keys.take("attention_bias", False) or None
    return llama_like(keys, attention_bias=bias, qk_norm="head", **qwen_window(keys))


def write_qwen3(config: ModelConfig) -> dict:
    keys = llama_keys("qwen3", "Qwen3ForCausalLM", config, attention_bias=bool(config.attention_bias))
    return keys | written_qwen_window(config)


def read_olmo2(keys: Keys) -> ModelConfig:
    keys.must_be(hidden_act="silu")
    bias = keys.take("attention_bias", False) or None
    return llama_like(keys, attention_bias=bias, qk_norm="projection", branch_norm="out")


def write_olmo2(config: ModelConfig) -> dict:
    bias = bool(config.attention_bias)
    return llama_keys("olmo2", "Olmo2ForCausalLM", config, attention_bias=bias, head_dim=None)


def read_olmo3(keys: Keys) -> ModelConfig:
    keys.must_be(hidden_act="silu")
    window = {"window": keys.take("sliding_window")}
    kinds = layer_types(keys, window, lambda i: "full_attention" if (i + 1) % 4 == 0 else "sliding_attention")
    ropes = ropes_by_type(keys)
    bias = keys.take("attention_bias", False) or None
    return llama_like(keys, attention_bias=bias, qk_norm="projection", branch_norm="out", **kinds, **ropes)


def write_olmo3(config: ModelConfig) -> dict:
    changes = {"attention_bias": bool(config.attention_bias), "head_dim": None, "sliding_window": config.window}
    changes |= {"layer_types": written_layer_types(config), "rope_parameters": written_ropes(config)}
    return llama_keys("olmo3", "Olmo3ForCausalLM", config, **changes)


def read_gemma2(keys: Keys) -> ModelConfig:
    keys.must_be(hidden_activation="gelu_pytorch_tanh", use_bidirectional_attention=False)
    keys.ignore("hidden_act", "cache_implementation")
    window = {"window": keys.take("sliding_window", 4096)}
    kinds = layer_types(keys, window, lambda i: "full_attention" if i % 2 else "sliding_attention")
    return llama_like(
        keys,
        feed_forward="geglu",
        norm="rmsnorm_1p",
        branch_norm="both",
        scale_embeddings=True,
        tie_embeddings=keys.take("tie_word_embeddings", True),
        attention_bias=keys.take("attention_bias", False) or None,
        attention_scale=keys.take("query_pre_attn_scalar") ** -0.5,
        attention_softcap=keys.take_or_null("attn_logit_softcapping", 50.0),
        logit_softcap=keys.take_or_null("final_logit_softcapping", 30.0),
        **kinds,
    )


def gemma_keys(config: ModelConfig) -> dict:
    """What Gemma 2 and 3 say beside Llama's keys."""
    return {
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round((config.attention_scale or config.size_of_head**-0.5) ** -2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "attention_bias": bool(config.attention_bias),
        "sliding_window": config.window,
        "layer_types": written_layer_types(config),
    }


def write_gemma2(config: ModelConfig) -> dict:
    changes = gemma_keys(config)
    # null says "no cap"; a missing key is the reference code's 50 and 30
    caps = {name: changes[name] for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    return llama_keys("gemma2", "Gemma2ForCausalLM", config, **changes) | caps


def read_gemma3(keys: Keys) -> ModelConfig:
    keys.must_be(hidden_activation="gelu_pytorch_tanh", use_bidirectional_attention=False)
    keys.must_be(attn_logit_softcapping=None)  # Gemma 3's reference code knows the key, and caps nothing
    keys.ignore("hidden_act")  # an old name, which the reference code does not read
    every = keys.take("_sliding_window_pattern", keys.take("sliding_window_pattern", 6))
    keys.ignore("sliding_window_pattern")
    window = {"window": keys.take("sliding_window", 4096)}
    kinds = layer_types(keys, window, lambda i: "full_attention" if (i + 1) % every == 0 else "sliding_attention")
    ropes = gemma_ropes(keys)
    heads = {
        "heads": keys.take("num_attention_heads", 8),
        "kv_heads": keys.take("num_key_value_heads", 4),
        "head_dim": keys.take("head_dim", 256),
    }
    return ModelConfig(
        vocab_size=keys.take("vocab_size", 262_208),
        max_length=keys.take("max_position_embeddings", 131_072),
        width=keys.take("hidden_size"),
        layers=keys.take("num_hidden_layers"),
        **heads,
        feed_forward_width=keys.take("intermediate_size"),
        feed_forward="geglu",
        norm="rmsnorm_1p",
        norm_epsilon=keys.take("rms_norm_eps", 1e-6),
        branch_norm="both",
        qk_norm="head",
        positions="rope",
        scale_embeddings=True,
        tie_embeddings=keys.take("tie_word_embeddings", True),
        attention_scale=keys.take("query_pre_attn_scalar", 256) ** -0.5,
        attention_dropout=keys.take("attention_dropout", 0.0),
        attention_bias=keys.take("attention_bias", False) or None,
        logit_softcap=keys.take("final_logit_softcapping", None),
        bias=False,
        **kinds,
        **ropes,
    )


def gemma_ropes(keys: Keys) -> dict:
    """Gemma 3's two bases, which older files leave to the reference code: 1,000,000, and 10,000 in windows."""
    if keys.config.get("rope_parameters") is None:
        keys.config = {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0} | {
            name: value for name, value in keys.config.items() if value is not None
        }
    return ropes_by_type(keys)


def write_gemma3(config: ModelConfig) -> dict:
    changes = gemma_keys(config) | {"rope_parameters": written_ropes(config)}
    return llama_keys("gemma3_text", "Gemma3ForCausalLM", config, **changes)


def read_gemma3_whole(keys: Keys) -> ModelConfig:
    """Gemma 3 with eyes: its language model alone."""
    keys.ignore("vision_config", "boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image")
    return read_text_config(keys, read_gemma3)
