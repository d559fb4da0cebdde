"""The exercises of the chapter on real models: what a config.json and the names of a checkpoint say."""

import json
import random
from functools import cache

import torch

from tformer_lib import pretrained
from tformer_lib.teaching.exercises.engine import exercise, require, require_integer
from tformer_lib.transformer import Decoder, count_parameters


def draw_config(draw: random.Random) -> dict:
    """A small config.json of the Llama family."""
    kv_heads, group, head_dim = draw.choice((1, 2, 4)), draw.choice((1, 2, 3)), draw.choice((4, 8, 16))
    config = {
        "model_type": "llama",
        "vocab_size": draw.randint(10, 90),
        "hidden_size": kv_heads * group * head_dim,
        "intermediate_size": draw.randint(8, 90),
        "num_hidden_layers": draw.randint(1, 4),
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": draw.random() < 0.5,
    }
    if draw.random() < 0.5:
        config |= {"head_dim": draw.choice((2, 6, 10))}
    return config


@cache
def counted(configs: str) -> list[int]:
    """The parameters of models by their config.json, as JSON, because models take a while to make."""
    with torch.device("meta"):
        return [count_parameters(Decoder(pretrained.config_from_hub(config))) for config in json.loads(configs)]


@exercise(
    "real_models.parameters",
    title="Count a model from its config.json",
    hints=(
        "Embedding, layers, a last norm, and an output matrix if it is not tied to the embedding.",
        "A layer has q, k, v and o, three matrices of the feed-forward, and two norms. A missing head_dim is the width "
        "divided by the heads.",
        "k and v are hidden_size times num_key_value_heads * head_dim each; a norm has hidden_size numbers.",
    ),
)
def check_parameters(fn):
    draw = random.Random(0)
    configs = [draw_config(draw) for _ in range(12)]
    configs.append(pretrained.PUBLISHED["meta-llama/Llama-3.2-1B"].config)
    configs.append(pretrained.PUBLISHED["meta-llama/Llama-2-7b-hf"].config)
    for config, expected in zip(configs, counted(json.dumps(configs)), strict=True):
        found = require_integer(fn(dict(config)), "the number of parameters")
        given = {k: v for k, v in config.items() if k not in ("model_type", "rope_scaling")}
        require(found == expected, f"{given} has {expected:,} parameters, and you count {found:,}")


@exercise(
    "real_models.cache",
    title="The bytes of a cache with windows",
    hints=(
        "A layer with full attention keeps every token; a layer with a window keeps at most the window.",
        "A token takes a key and a value: 2 * kv_heads * head_dim numbers in each layer that keeps it.",
        "sum(tokens if kind == 'full' else min(tokens, window) for kind in layer_types) tokens are kept in all.",
    ),
)
def check_cache(fn):
    draw = random.Random(1)
    cases = [
        (["window", "full"] * 12, 128, 131_072, 8, 64, 2),
        (["window"] * 3, 8, 5, 2, 4, 4),
        (["full"], 1, 7, 1, 2, 2),
    ]
    for _ in range(12):
        kinds = [draw.choice(("full", "window")) for _ in range(draw.randint(1, 6))]
        cases.append((kinds, draw.randint(1, 50), draw.randint(0, 90), draw.randint(1, 8), draw.randint(1, 64), 2))
    for kinds, window, tokens, kv_heads, head_dim, itemsize in cases:
        kept = sum(tokens if kind == "full" else min(tokens, window) for kind in kinds)
        expected = 2 * kept * kv_heads * head_dim * itemsize
        found = fn(list(kinds), window, tokens, kv_heads, head_dim, itemsize)
        shown = f"{kinds[:4]}{'...' if len(kinds) > 4 else ''}, a window of {window}, {tokens} tokens"
        said = f"{found:,}" if isinstance(found, int) else found
        require(
            found == expected,
            f"{shown}, {kv_heads} kv heads of {head_dim}, {itemsize} bytes a number: {expected:,}, and you say {said}",
        )


@exercise(
    "real_models.name",
    title="From our names to a checkpoint's",
    hints=(
        "Look at the table of names above: what is the same in both, and which parts are replaced?",
        "Replace 'stack.blocks.' by 'model.layers.', 'attention.' by 'self_attn.', and 'out_proj' by 'o_proj'; the "
        "norms and the feed-forward have names of their own.",
        "A list of pairs (ours, theirs), applied one after the other with str.replace, is enough.",
    ),
)
def check_name(fn):
    for config in (
        pretrained.PUBLISHED["meta-llama/Llama-3.2-1B"].config | {"num_hidden_layers": 12},
        pretrained.PUBLISHED["meta-llama/Llama-2-7b-hf"].config | {"num_hidden_layers": 2},
    ):
        family = pretrained.FAMILIES["llama"]
        with torch.device("meta"):
            model = Decoder(pretrained.config_from_hub(config))
        for link in family.links(model):
            (ours,), (theirs,) = link.ours, link.theirs
            found = fn(ours)
            require(found == theirs, f"{ours} is called {theirs} in a checkpoint, and you say {found!r}")
