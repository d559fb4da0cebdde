"""Answers to the exercises of the chapter on real models."""


def parameters(config):
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", width // heads)
    queries, keys = heads * head_dim, config["num_key_value_heads"] * head_dim
    layer = 2 * width * queries + 2 * width * keys + 3 * width * config["intermediate_size"] + 2 * width
    tables = config["vocab_size"] * width * (1 if config["tie_word_embeddings"] else 2)
    return tables + config["num_hidden_layers"] * layer + width


def parameters_tied(config):
    return parameters(config | {"tie_word_embeddings": True})


def parameters_without_last_norm(config):
    return parameters(config) - config["hidden_size"]


def parameters_of_full_keys(config):
    return parameters(config | {"num_key_value_heads": config["num_attention_heads"]})


def parameters_without_head_dim(config):
    return parameters({key: value for key, value in config.items() if key != "head_dim"})


def parameters_as_text(config):
    return f"{parameters(config):,}"


def cache(layer_types, window, tokens, kv_heads, head_dim, itemsize):
    kept = sum(tokens if kind == "full" else min(tokens, window) for kind in layer_types)
    return 2 * kept * kv_heads * head_dim * itemsize


def cache_of_keys_alone(layer_types, window, tokens, kv_heads, head_dim, itemsize):
    return cache(layer_types, window, tokens, kv_heads, head_dim, itemsize) // 2


def cache_of_full_layers(layer_types, window, tokens, kv_heads, head_dim, itemsize):
    return 2 * len(layer_types) * tokens * kv_heads * head_dim * itemsize


def cache_of_whole_windows(layer_types, window, tokens, kv_heads, head_dim, itemsize):
    kept = sum(tokens if kind == "full" else window for kind in layer_types)
    return 2 * kept * kv_heads * head_dim * itemsize


def cache_in_numbers(layer_types, window, tokens, kv_heads, head_dim, itemsize):
    return cache(layer_types, window, tokens, kv_heads, head_dim, 1)


def name(ours):
    for mine, theirs in (
        ("embedding.tokens.", "model.embed_tokens."),
        ("stack.final_norm.", "model.norm."),
        ("unembedding.", "lm_head."),
        ("stack.blocks.", "model.layers."),
        ("attention_norm", "input_layernorm"),
        ("feed_forward_norm", "post_attention_layernorm"),
        ("attention.out_proj", "self_attn.o_proj"),
        (".attention.", ".self_attn."),
        ("feed_forward.up", "mlp.up_proj"),
        ("feed_forward.gate", "mlp.gate_proj"),
        ("feed_forward.down", "mlp.down_proj"),
    ):
        ours = ours.replace(mine, theirs)
    return ours


def name_unchanged(ours):
    return ours


def name_of_the_first_layer(ours):
    return name(ours).replace("layers.1", "layers.0")


def name_with_our_norms(ours):
    return name(ours).replace("input_layernorm", "attention_norm")


RIGHT = {"real_models.parameters": parameters, "real_models.cache": cache, "real_models.name": name}
WRONG = {
    "real_models.parameters": [
        parameters_tied,
        parameters_without_last_norm,
        parameters_of_full_keys,
        parameters_without_head_dim,
        parameters_as_text,
    ],
    "real_models.cache": [cache_of_keys_alone, cache_of_full_layers, cache_of_whole_windows, cache_in_numbers],
    "real_models.name": [name_unchanged, name_of_the_first_layer, name_with_our_norms],
}
