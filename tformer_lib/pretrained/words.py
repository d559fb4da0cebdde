"""What the configs of several families say in the same words, in ours and back."""

from collections.abc import Callable

from tformer_lib.pretrained.keys import Keys
from tformer_lib.transformer import ModelConfig


def llama_like(keys: Keys, *, base: float | None = 10_000.0, **options) -> ModelConfig:
    """The config of a model with RMSNorm, SwiGLU and RoPE, whose keys are Llama's.

    Args:
        keys: of its ``config.json``.
        base: RoPE's, where the file does not say it and the reference code has a base of its own; None: it must say.
        options: fields of the config that the family reads in its own way; with ``rope_base`` all that RoPE needs.
    """
    if "rope_base" not in options:
        options["rope_base"], options["rope_scaling"] = rope_of(keys, base)
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
        "tie_embeddings": keys.take("tie_word_embeddings", False),
        "attention_dropout": keys.take("attention_dropout", 0.0),
        "bias": False,
    }
    return ModelConfig(**plain | options)


def rope_of(keys: Keys, base: float | None = None) -> tuple[float, dict | None]:
    """RoPE's base and its scaling, of a family in which all channels of a head turn.

    They stand in ``rope_parameters``, or in older files apart, as ``rope_theta`` and ``rope_scaling``.

    Raises:
        ValueError: both places are there, and they disagree; neither says the base, and there is no other; or only some
            of the channels are to turn.
    """
    check_one_rope(keys.config)
    old = {"rope_theta": keys.take("rope_theta", base), **(keys.take("rope_scaling", None) or {})}
    return whole_rope({**old, **(keys.take("rope_parameters", None) or {})}, keys)


def check_one_rope(config: dict) -> None:
    """Refuse a config with two RoPEs that differ: which of them is meant, nobody can know.

    Raises:
        ValueError: ``rope_scaling`` says something that ``rope_parameters`` does not say, or ``rope_theta`` another
            base than they do.
    """
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    base = config.get("rope_theta")
    if new and base is not None and new.get("rope_theta", base) != base:
        raise ValueError(f"rope_theta is {base!r}, rope_parameters say {new['rope_theta']!r}")
    if not old or not new:
        return
    apart = [name for name, value in old.items() if new.get("rope_type" if name == "type" else name) != value]
    if apart:
        raise ValueError(f"rope_scaling and rope_parameters disagree on {', '.join(sorted(apart))}")


def rope_parameters(parameters: dict, keys: Keys) -> tuple[float, dict | None, float]:
    """The same from one object: its base, the rest if it stretches anything, and its ``partial_rotary_factor``.

    Raises:
        ValueError: it does not say its base.
    """
    parameters = dict(parameters)
    base, fraction = parameters.pop("rope_theta", None), parameters.pop("partial_rotary_factor", 1.0)
    if base is None:
        raise keys.lacks("rope_theta")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return base, None if kind == "default" else parameters, fraction


def whole_rope(parameters: dict, keys: Keys) -> tuple[float, dict | None]:
    """The same of a family whose reference code turns all channels of a head, whatever the object says.

    Raises:
        ValueError: it says that only some of them turn.
    """
    base, scaling, fraction = rope_parameters(parameters, keys)
    if fraction != 1:
        raise ValueError(f"partial_rotary_factor must be 1.0 to be read here, got {fraction!r}")
    return base, scaling


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
    fraction = {} if config.linear is None else {"partial_rotary_factor": config.rotary_fraction}
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


def qwen_window(keys: Keys) -> dict:
    """Qwen's layers from ``max_window_layers`` on have a window, if ``use_sliding_window`` turns it on."""
    window, first = keys.take("sliding_window", None), keys.take("max_window_layers", 28)
    if not keys.take("use_sliding_window", False):
        keys.ignore("layer_types")
        return {}
    return layer_types(keys, {"window": window}, lambda i: "sliding_attention" if i >= first else "full_attention")


def written_qwen_window(config: ModelConfig) -> dict:
    if config.window is None:
        return {"use_sliding_window": False}
    types = {"layer_types": written_layer_types(config)}
    return {"use_sliding_window": True, "sliding_window": config.window, "max_window_layers": 0, **types}


def ropes_by_type(keys: Keys) -> dict:
    """RoPE's settings of models that turn full and window layers differently.

    They stand in ``rope_parameters`` by type of layer, or in older files apart; windows are never stretched.
    """
    check_one_rope(keys.config)
    parameters = keys.take("rope_parameters", None)
    if parameters is None:
        base, scaling = rope_of(keys)
        window_base = keys.take("rope_local_base_freq", base)
    else:
        keys.ignore("rope_theta", "rope_scaling", "rope_local_base_freq")
        full, window = (rope_of_type(kind, parameters, keys) for kind in ("full_attention", "sliding_attention"))
        base, scaling = whole_rope(full, keys)
        window_base, stretched = whole_rope(window, keys)
        if stretched is not None:
            raise ValueError(f"RoPE of window layers is read plain, got {stretched}")
    return {"rope_base": base, "rope_scaling": scaling, "window_rope_base": window_base}


def rope_of_type(kind: str, parameters: dict, keys: Keys) -> dict:
    """The object of one type of layer; one object for all types, or another's where no layer is of this type.

    Raises:
        ValueError: there is none for layers that the model has.
    """
    given = [values for values in parameters.values() if isinstance(values, dict)]
    if kind in parameters or not given:
        return parameters.get(kind, parameters)
    if kind in (keys.config.get("layer_types") or [kind]):
        raise keys.lacks(f"rope_parameters of {kind}")
    return given[0]


def written_ropes(config: ModelConfig) -> dict:
    """The inverse of :func:`ropes_by_type`."""
    full = {"rope_theta": config.rope_base, **(config.rope_scaling or {"rope_type": "default"})}
    base = config.rope_base if config.window_rope_base is None else config.window_rope_base
    window = {"rope_theta": base, "rope_type": "default"}
    return {"full_attention": full, "sliding_attention": window}


def read_text_config(keys: Keys, read: Callable[[Keys], ModelConfig]) -> ModelConfig:
    """The language model of a model that has eyes too, whose config stands in ``text_config``.

    Args:
        keys: of the whole model; whether tables are tied is said there, where it is said at all.
        read: how the family's text models are read.
    """
    tied = keys.take("tie_word_embeddings", None)
    text = keys.take("text_config") | ({} if tied is None else {"tie_word_embeddings": tied})
    text = Keys(text, f"text_config of {keys.source}")
    config = read(text)
    text.finish()
    return config
