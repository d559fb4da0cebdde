"""The families of models that can be read: what their config.json says in our words, and what their tensors are called.

A family's ``read`` makes a ``ModelConfig`` of a config's keys, and its ``write`` the keys of a ``ModelConfig``. Its
``links`` say which of the file's tensors hold each of our parameters. All three are facts about the public files and
about the reference code in transformers (Wolf et al., arXiv:1910.03771).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tformer_lib.grouped_query_attention import LatentConfig
from tformer_lib.mixture_of_experts import ExpertsConfig
from tformer_lib.pretrained.keys import Keys
from tformer_lib.pretrained.links import Link, same, stacked, transposed
from tformer_lib.rope.scaling import yarn_sharpening
from tformer_lib.transformer import ModelConfig

Special = Callable[[str, str, ModelConfig], Link | None]
"""A link for a parameter that is no plain tensor of the file: its name in the block, where the block's tensors are."""

BLOCK = "stack.blocks."

LLAMA_NAMES = {
    "embedding.tokens": "model.embed_tokens",
    "stack.final_norm": "model.norm",
    "unembedding": "lm_head",
    "attention": "self_attn",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.out_proj": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
}
"""Our modules and those of Llama's files; what stands in a block is counted from ``model.layers.N``."""

OUT_NORM_NAMES = {
    "attention_out_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_out_norm": "post_feedforward_layernorm",
}
"""The norms of models that normalise what sub-layers give (Gemma, OLMo 2)."""

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


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        read: a config's keys to our config.
        write: our config to the keys of a ``config.json`` that ``read`` reads back.
        names: our module -> theirs.
        layers: where their blocks are.
        special: what makes a link for a parameter that no single tensor of the file holds.
        forgotten: ends of names that old files hold and that nothing is made of.
        prefix: what may stand before each name.
        elsewhere: beginnings of names of parts that are no language model.
        experts, latent: whether the family's models have them.
    """

    read: Callable[[Keys], ModelConfig]
    write: Callable[[ModelConfig], dict]
    names: Mapping[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    layers: str = "model.layers."
    special: Special = lambda name, place, config: None
    forgotten: tuple[str, ...] = (".rotary_emb.inv_freq",)
    prefix: str = ""
    elsewhere: tuple[str, ...] = ()
    experts: bool = False
    latent: bool = False

    def links(self, model: nn.Module) -> Iterator[Link]:
        """The links of all of a ``Decoder``'s parameters."""
        linked: set[str] = set()
        for name, parameter in model.named_parameters():
            if name in linked:
                continue
            link = self.link(name, parameter, model.config)
            linked |= set(link.ours)
            yield link

    def link(self, name: str, parameter: Tensor, config: ModelConfig) -> Link:
        """The link that holds a parameter.

        Raises:
            ValueError: this family's files have no such parameter.
        """
        begin, inside, place = "", name, ""
        if name.startswith(BLOCK):
            number, inside = name.removeprefix(BLOCK).split(".", 1)
            begin, place = f"{BLOCK}{number}.", f"{self.layers}{number}."
        special = self.special(inside, place, config)
        if special is not None:
            return Link(tuple(begin + ours for ours in special.ours), special.theirs, special.read, special.write)
        module, _, leaf = inside.rpartition(".")
        if module not in self.names:
            raise ValueError(f"files of this family have no place for {name}")
        return same(name, f"{place}{self.names[module]}.{leaf}")


# What configs have in common


def llama_like(keys: Keys, **options) -> ModelConfig:
    """The config of a model with RMSNorm, SwiGLU and RoPE, whose keys are Llama's."""
    base, scaling, fraction = rope_of(keys)
    heads = {"heads": keys.take("num_attention_heads"), "kv_heads": keys.take("num_key_value_heads", None)}
    keys.ignore("pretraining_tp")
    plain = {
        "vocab_size": keys.take("vocab_size"),
        "max_length": keys.take("max_position_embeddings"),
        "width": keys.take("hidden_size"),
        "layers": keys.take("num_hidden_layers"),
        **heads,
        "head_dim": keys.take("head_dim", None),
        "feed_forward_width": keys.take("intermediate_size"),
        "norm": "rmsnorm",
        "norm_epsilon": keys.take("rms_norm_eps"),
        "feed_forward": "swiglu",
        "positions": "rope",
        "rope_base": base,
        "rope_scaling": scaling,
        "rotary_fraction": fraction,
        "tie_embeddings": keys.take("tie_word_embeddings", False),
        "attention_dropout": keys.take("attention_dropout", 0.0),
        "bias": False,
    }
    return ModelConfig(**plain | options)


def rope_of(keys: Keys) -> tuple[float, dict | None, float]:
    """RoPE's base, its scaling, and the share of channels that turn.

    They stand in ``rope_parameters``, or in older files apart, as ``rope_theta`` and ``rope_scaling``.
    """
    old = {"rope_theta": keys.take("rope_theta", 10_000.0), **(keys.take("rope_scaling", None) or {})}
    return rope_parameters({**old, **(keys.take("rope_parameters", None) or {})})


def rope_parameters(parameters: dict) -> tuple[float, dict | None, float]:
    """The same from one object: its base, the rest if it stretches anything, and its ``partial_rotary_factor``."""
    parameters = dict(parameters)
    base, fraction = parameters.pop("rope_theta", 10_000.0), parameters.pop("partial_rotary_factor", 1.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return base, None if kind == "default" else parameters, fraction


def layer_types(keys: Keys, config: dict, default: Callable[[int], str]) -> dict:
    """``window`` and ``layer_types`` of a model whose layers are of different kinds.

    Args:
        config: what has ``window``, or nothing where no layer has one.
        default: the type of layer i, in files that do not list them.
    """
    known = {"full_attention": "full", "sliding_attention": "window"}
    listed = keys.take("layer_types", None)
    types = listed or [default(i) for i in range(keys.take("num_hidden_layers"))]
    for kind in types:
        if kind not in known:
            raise ValueError(f"layer_types must be of {', '.join(known)}, got {kind!r}")
    types = tuple(known[kind] for kind in types)
    if "window" not in types:
        return {}
    return config if set(types) == {"window"} else config | {"layer_types": types}


def written_layer_types(config: ModelConfig) -> list[str]:
    """The types of our layers in their words."""
    return [{"window": "sliding_attention", "full": "full_attention"}[kind] for kind in config.types_of_layers]


def llama_keys(model_type: str, architecture: str, config: ModelConfig, **changes) -> dict:
    """The keys of a ``config.json`` that all families with Llama's words have."""
    parameters = config.rope_scaling or {"rope_type": "default"}
    fraction = {} if config.rotary_fraction == 1 else {"partial_rotary_factor": config.rotary_fraction}
    keys = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.number_of_kv_heads,
        "head_dim": config.size_of_head,
        "intermediate_size": config.size_of_feed_forward,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_theta": config.rope_base, **parameters, **fraction},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.attention_dropout,
    }
    return {name: value for name, value in (keys | changes).items() if value is not None}


# GPT-2


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


# Llama, Mistral, Qwen


def read_llama(keys: Keys) -> ModelConfig:
    keys.must_be(hidden_act="silu", mlp_bias=False, sliding_window=None, partial_rotary_factor=1.0)
    return llama_like(keys, attention_bias=keys.take("attention_bias", False) or None)


def write_llama(config: ModelConfig) -> dict:
    return llama_keys("llama", "LlamaForCausalLM", config, attention_bias=bool(config.attention_bias))


def read_mistral(keys: Keys) -> ModelConfig:
    keys.must_be(hidden_act="silu")
    return llama_like(keys, window=keys.take("sliding_window", None))


def write_mistral(config: ModelConfig) -> dict:
    return llama_keys("mistral", "MistralForCausalLM", config) | {"sliding_window": config.window}


def qwen_window(keys: Keys) -> dict:
    """Qwen's layers from ``max_window_layers`` on have a window, if ``use_sliding_window`` turns it on."""
    window, first = keys.take("sliding_window", None), keys.take("max_window_layers", 0)
    if not keys.take("use_sliding_window", False):
        keys.ignore("layer_types")
        return {}
    return layer_types(keys, {"window": window}, lambda i: "sliding_attention" if i >= first else "full_attention")


def written_qwen_window(config: ModelConfig) -> dict:
    if config.window is None:
        return {"use_sliding_window": False}
    types = {"layer_types": written_layer_types(config)}
    return {"use_sliding_window": True, "sliding_window": config.window, "max_window_layers": 0, **types}


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


# OLMo


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


def ropes_by_type(keys: Keys) -> dict:
    """RoPE's settings of models that turn full and window layers differently.

    They stand in ``rope_parameters`` by type of layer, or in older files apart; windows are never stretched.
    """
    parameters = keys.take("rope_parameters", None)
    if parameters is None:
        base, scaling, _ = rope_of(keys)
        window_base = keys.take("rope_local_base_freq", base)
    else:
        keys.ignore("rope_theta", "rope_scaling", "rope_local_base_freq")
        full = parameters.get("full_attention", parameters)
        base, scaling, _ = rope_parameters(full)
        window_base, stretched, _ = rope_parameters(parameters.get("sliding_attention", full))
        if stretched is not None:
            raise ValueError(f"RoPE of window layers is read plain, got {stretched}")
    keys.config = {name: value for name, value in keys.config.items() if not name.startswith("rope_")}
    return {"rope_base": base, "rope_scaling": scaling, "window_rope_base": window_base}


def written_ropes(config: ModelConfig) -> dict:
    """The inverse of :func:`ropes_by_type`."""
    full = {"rope_theta": config.rope_base, **(config.rope_scaling or {"rope_type": "default"})}
    window = {"rope_theta": config.window_rope_base, "rope_type": "default"}
    return {"full_attention": full, "sliding_attention": window}


# Gemma 3


def read_gemma3(keys: Keys) -> ModelConfig:
    keys.must_be(hidden_activation="gelu_pytorch_tanh", use_bidirectional_attention=False)
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
        attention_softcap=keys.take("attn_logit_softcapping", None),
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
    changes = {
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round((config.attention_scale or config.size_of_head**-0.5) ** -2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "attention_bias": bool(config.attention_bias),
        "sliding_window": config.window,
        "layer_types": written_layer_types(config),
        "rope_parameters": written_ropes(config),
    }
    return llama_keys("gemma3_text", "Gemma3ForCausalLM", config, **changes)


def read_gemma3_whole(keys: Keys) -> ModelConfig:
    """Gemma 3 with eyes: its language model alone."""
    keys.ignore("vision_config", "boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image")
    keys.ignore("tie_word_embeddings")
    text = Keys(keys.take("text_config"), f"text_config of {keys.source}")
    config = read_gemma3(text)
    text.finish()
    return config


# Mixtures of experts


def experts_of(keys: Keys, **options) -> ExpertsConfig:
    """What a config says about its experts, in the words that several families share."""
    keys.ignore("router_aux_loss_coef", "output_router_logits", "router_jitter_noise")
    return ExpertsConfig(per_token=keys.take("num_experts_per_tok"), **options)


def read_mixtral(keys: Keys) -> ModelConfig:
    keys.must_be(hidden_act="silu")
    experts = experts_of(keys, count=keys.take("num_local_experts"))
    return llama_like(keys, window=keys.take("sliding_window", None), experts=experts)


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
    window = {"window": keys.take("sliding_window")}
    kinds = layer_types(keys, window, lambda i: "full_attention" if i % 2 else "sliding_attention")
    return llama_like(keys, bias=True, attention_sinks=True, experts=experts, **kinds)


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


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        read_gpt2,
        write_gpt2,
        names=GPT2_NAMES,
        layers="h.",
        special=special_gpt2,
        forgotten=(".attn.bias", ".attn.masked_bias"),
        prefix="transformer.",
    ),
    "llama": Family(read_llama, write_llama),
    "mistral": Family(read_mistral, write_mistral),
    "qwen2": Family(read_qwen2, write_qwen2),
    "qwen3": Family(read_qwen3, write_qwen3),
    "mixtral": Family(read_mixtral, write_mixtral, special=special_mixtral, experts=True),
    "qwen3_moe": Family(read_qwen3_moe, write_qwen3_moe, special=special_qwen_moe, experts=True),
    "deepseek_v2": Family(
        read_deepseek_v2,
        write_deepseek_v2,
        names=DEEPSEEK_NAMES,
        special=special_deepseek_v2,
        experts=True,
        latent=True,
    ),
    "gpt_oss": Family(read_gpt_oss, write_gpt_oss, special=special_gpt_oss, experts=True),
    "olmo2": Family(read_olmo2, write_olmo2, names=LLAMA_NAMES | OUT_NORM_NAMES),
    "olmo3": Family(read_olmo3, write_olmo3, names=LLAMA_NAMES | OUT_NORM_NAMES),
    "gemma3_text": Family(read_gemma3, write_gemma3, names=LLAMA_NAMES | OUT_NORM_NAMES),
    "gemma3": Family(
        read_gemma3_whole,
        write_gemma3,
        names=LLAMA_NAMES | OUT_NORM_NAMES,
        prefix="language_model.",
        elsewhere=("vision_tower.", "multi_modal_projector."),
    ),
}
"""By ``model_type``."""
