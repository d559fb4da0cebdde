"""Public weights that are on your disk, by our names."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tformer_lib.checkpoint import check_not_quantised, read_tensors, require
from tformer_lib.transformer import Decoder, ModelConfig


def from_folder(path: Path | str, *, dtype: torch.dtype = torch.float32) -> Decoder:
    """The model of a folder as the Hugging Face hub lays one out: ``config.json`` and one or more ``*.safetensors``.

    Args:
        path: the folder.
        dtype: of the weights in memory.

    Raises:
        FileNotFoundError: if one of the files is missing.
        ValueError: if the model is of a kind that is not built here, or its weights do not fit its configuration.
    """
    path = Path(path)
    config = read_config(path / "config.json")
    kind = config.get("model_type")
    if kind not in READERS:
        raise ValueError(f"{path} holds a model of type {kind!r}; {' and '.join(READERS)} can be read")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"there are no *.safetensors in {path}")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= read_tensors(file)[0]
    return READERS[kind](weights, config, dtype=dtype)


def read_config(path: Path) -> dict:
    """A ``config.json``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON object, or says that the weights are quantised.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no JSON object, but {config!r:.40}")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "a method that it does not name")
        raise ValueError(f"{path} says that the weights are quantised ({method}), which cannot be read here")
    return config


def from_gpt2(weights: dict[str, Tensor], config: dict, *, dtype: torch.dtype = torch.float32) -> Decoder:
    """GPT-2 as our :class:`Decoder`.

    GPT-2's linear layers hold their matrix as (in, out), ours as (out, in); and it makes q, k and v with one.

    Args:
        weights: its tensors by name, with or without the leading ``transformer.``.
        config: its ``config.json``.
        dtype: of the result.

    Raises:
        ValueError: if a tensor is missing, left over or of another shape, or the config asks for what is not here.
    """
    refuse(
        config,
        {
            "activation_function": "gelu_new",
            "add_cross_attention": False,
            "scale_attn_by_inverse_layer_idx": False,
            "scale_attn_weights": True,
        },
    )
    require(config, {"vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon"}, "config.json")
    weights = {name.removeprefix("transformer."): x for name, x in weights.items()}
    ours = {
        "embedding.tokens.weight": pull(weights, "wte.weight"),
        "embedding.places.table.weight": pull(weights, "wpe.weight"),
    }
    ours |= {f"stack.final_norm.{part}": pull(weights, f"ln_f.{part}") for part in ("weight", "bias")}
    for i in range(config["n_layer"]):
        layer, block = take(weights, f"h.{i}."), f"stack.blocks.{i}."
        ours |= {block + name: x for name, x in gpt2_block(layer).items()}
    head = weights.pop("lm_head.weight", ours["embedding.tokens.weight"])
    refuse_leftover(weights)
    if not torch.equal(head, ours["embedding.tokens.weight"]):
        raise ValueError("lm_head.weight differs from wte.weight, which GPT-2 ties")
    return assemble(gpt2_config(config), ours, dtype)


def gpt2_config(config: dict) -> ModelConfig:
    """GPT-2's ``config.json`` in our words."""
    return ModelConfig(
        vocab_size=config["vocab_size"],
        max_length=config["n_positions"],
        width=config["n_embd"],
        layers=config["n_layer"],
        heads=config["n_head"],
        feed_forward_width=config.get("n_inner"),
        feed_forward="gelu_tanh",
        norm_epsilon=config["layer_norm_epsilon"],
    )


def gpt2_block(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one of GPT-2's blocks, by our names; the causal mask that old files hold is left out."""
    pairs = {"attn.c_proj": "attention.out_proj", "mlp.c_fc": "feed_forward.up", "mlp.c_proj": "feed_forward.down"}
    ours = {}
    for part in ("weight", "bias"):
        joined = pull(layer, f"attn.c_attn.{part}")  # (width, 3 width), or (3 width,) the bias
        for name, x in zip(("q_proj", "k_proj", "v_proj"), joined.chunk(3, dim=-1), strict=True):
            ours[f"attention.{name}.{part}"] = x.T if part == "weight" else x
        for theirs, name in pairs.items():
            x = pull(layer, f"{theirs}.{part}")
            ours[f"{name}.{part}"] = x.T if part == "weight" else x
        ours[f"attention_norm.{part}"] = pull(layer, f"ln_1.{part}")
        ours[f"feed_forward_norm.{part}"] = pull(layer, f"ln_2.{part}")
    refuse_leftover({name: x for name, x in layer.items() if name not in ("attn.bias", "attn.masked_bias")})
    return ours


def from_llama(weights: dict[str, Tensor], config: dict, *, dtype: torch.dtype = torch.float32) -> Decoder:
    """A Llama (or a model of its shape) as our :class:`Decoder`.

    Args:
        weights: its tensors by name, as transformers has them (RoPE in the "half" layout).
        config: its ``config.json``.
        dtype: of the result.

    Raises:
        ValueError: if a tensor is missing, left over or of another shape, or the config asks for what is not here.
    """
    expected = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    refuse(config, expected | {"sliding_window": None, "partial_rotary_factor": 1.0})
    require(config, LLAMA_KEYS, "config.json")
    weights = dict(weights)
    ours = {"embedding.tokens.weight": pull(weights, "model.embed_tokens.weight")}
    ours["stack.final_norm.weight"] = pull(weights, "model.norm.weight")
    for i in range(config["num_hidden_layers"]):
        layer, block = take(weights, f"model.layers.{i}."), f"stack.blocks.{i}."
        ours |= {block + name: x for name, x in llama_block(layer).items()}
    head = weights.pop("lm_head.weight", None)
    if not config.get("tie_word_embeddings", False):
        if head is None:
            raise ValueError("the weights have no lm_head.weight, and the config does not tie the embeddings")
        ours["unembedding.weight"] = head
    refuse_leftover(weights)
    return assemble(llama_config(config), ours, dtype)


def llama_config(config: dict) -> ModelConfig:
    """Llama's ``config.json`` in our words; RoPE's settings stand in ``rope_parameters``, or in older files apart."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = rope.pop("rope_theta", config.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    return ModelConfig(
        vocab_size=config["vocab_size"],
        max_length=config["max_position_embeddings"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        feed_forward_width=config["intermediate_size"],
        norm="rmsnorm",
        norm_epsilon=config["rms_norm_eps"],
        feed_forward="swiglu",
        positions="rope",
        rope_base=base,
        rope_scaling=None if kind == "default" else rope,
        tie_embeddings=config.get("tie_word_embeddings", False),
        bias=False,
    )


LLAMA_KEYS = {
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "rms_norm_eps",
}
"""What a Llama's ``config.json`` must say."""

LLAMA_NAMES = {
    "self_attn.q_proj": "attention.q_proj",
    "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj",
    "self_attn.o_proj": "attention.out_proj",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
}


def llama_block(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one of Llama's blocks, by our names; the angles that old files hold are left out."""
    ours = {f"{name}.weight": pull(layer, f"{theirs}.weight") for theirs, name in LLAMA_NAMES.items()}
    layer.pop("self_attn.rotary_emb.inv_freq", None)
    refuse_leftover(layer)
    return ours


READERS: dict[str, Callable[..., Decoder]] = {"gpt2": from_gpt2, "llama": from_llama}


def take(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the tensors whose names begin with ``prefix`` out of ``weights``, and return them without it."""
    names = [name for name in weights if name.startswith(prefix)]
    return {name.removeprefix(prefix): weights.pop(name) for name in names}


def pull(weights: dict[str, Tensor], name: str) -> Tensor:
    """Take one tensor out of ``weights``."""
    if name not in weights:
        raise ValueError(f"the weights have no {name}")
    return weights.pop(name)


def refuse(config: dict, expected: dict) -> None:
    """Refuse a config that asks for something else than what is built here."""
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r} to be read here, got {config[name]!r}")


def refuse_leftover(weights: dict[str, Tensor]) -> None:
    """Refuse tensors that nothing was made of: they would be missed in silence."""
    if weights:
        raise ValueError(f"the weights hold {', '.join(sorted(weights)[:3])}, which the model has no place for")


def assemble(config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> Decoder:
    """A decoder of this config with these weights, which are put into place and not copied twice."""
    check_not_quantised(weights, "the checkpoint")
    with torch.device("meta"):
        model = Decoder(config)
    expected = {name: p.shape for name, p in model.named_parameters()}
    for name in [*expected, *weights]:
        ours, theirs = expected.get(name), weights[name].shape if name in weights else None
        if ours != theirs:
            raise ValueError(f"{name} should have shape {ours and tuple(ours)}, and has {theirs and tuple(theirs)}")
    weights = {name: x.to(dtype).contiguous() for name, x in weights.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tie_embeddings:
        model.unembedding.weight = model.embedding.tokens.weight
    return model.eval()
