"""Public models against transformers: random weights that it saved, read by us, in every way that we run a model."""

import contextlib
import copy
import functools
import itertools
import json
import os
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tests.checkpoints import CHATML, train_tokenizer
from tformer_lib import pretrained
from tformer_lib.generation import TextStream, generate
from tformer_lib.generation.conversation import first_tokens
from tformer_lib.kv_cache import CacheShape, GrowingCache, ModelCache, cache_bytes
from tformer_lib.pretrained import fetch, hub, int8, interface, rendering, shards, templates
from tformer_lib.serving import LLM, Engine
from tformer_lib.transformer import Decoder, ModelConfig, count_parameters

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

VOCABULARY = 61
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
WINDOWS = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}
DEEPSEEK = SHAPE | {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
HYBRID = SHAPE | {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
KINDS: dict[str, tuple[str, dict]] = {
    "gpt2": ("GPT2", {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}),
    "llama2": ("Llama", SHAPE | {"num_key_value_heads": 4}),
    "llama3": ("Llama", SHAPE | {"rope_parameters": LLAMA3, "head_dim": 16, "tie_word_embeddings": True}),
    "llama, with biases": ("Llama", SHAPE | {"attention_bias": True}),
    "mistral": ("Mistral", SHAPE | {"sliding_window": 5}),
    "mistral 0.3": ("Mistral", SHAPE | {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", SHAPE | {"tie_word_embeddings": True}),
    "qwen2, windows": ("Qwen2", SHAPE | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", SHAPE | {"head_dim": 16}),
    "olmo2": ("Olmo2", SHAPE),
    "olmo3": ("Olmo3", SHAPE | {"num_hidden_layers": 4, "sliding_window": 5, "rope_parameters": WINDOWS}),
    "smollm3": ("SmolLM3", SHAPE | {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "pad_token_id": 0}),
    "gemma2": (
        "Gemma2",
        SHAPE | {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}
        | {"final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3",
        SHAPE | {"num_hidden_layers": 7, "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24},
    ),
    "mixtral": ("Mixtral", SHAPE | {"num_local_experts": 4}),
    "qwen3 moe": (
        "Qwen3Moe",
        SHAPE | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"norm_topk_prob": True},
    ),
    "qwen3 moe, every second layer": (
        "Qwen3Moe",
        SHAPE | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 2},
    ),
    "gpt-oss": (
        "GptOss",
        SHAPE | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}
        | {"rope_parameters": YARN | {"truncate": False}, "num_hidden_layers": 4},
    ),
    "deepseek v2 lite": ("DeepseekV2", DEEPSEEK | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}),
    "deepseek v2": (
        "DeepseekV2",
        DEEPSEEK | {"q_lora_rank": 20, "n_routed_experts": 8, "topk_method": "group_limited_greedy"}
        | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
    "qwen3 next": (
        "Qwen3Next",
        HYBRID | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 24},
    ),
    "qwen3.5": ("Qwen3_5", HYBRID | {"tie_word_embeddings": True, "linear_num_value_heads": 2}),
    "gemma3, capped": (
        "Gemma3",
        SHAPE | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | {"sliding_window": 4, "final_logit_softcapping": 3.0},
    ),
}  # fmt: skip
ARCHITECTURES = {"GPT2": "GPT2LMHeadModel", "Gemma3": "Gemma3ForCausalLM"}
CONFIGS = {"Gemma3": "Gemma3TextConfig", "Qwen3_5": "Qwen3_5TextConfig"}


class Checkpoint:
    """A model of transformers with random weights, and the folder that it was saved to."""

    def __init__(self, kind: str, folder: Path):
        transformers = pytest.importorskip("transformers")
        self.kind, (family, settings) = kind, KINDS[kind]
        config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**settings)
        config._attn_implementation = "eager"
        architecture = getattr(transformers, ARCHITECTURES.get(family, f"{family}ForCausalLM"))
        self.theirs = architecture(config).eval()
        torch.manual_seed(len(kind))
        for name, parameter in self.theirs.named_parameters():
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)  # away from every special value
        self.folder = folder
        self.theirs.save_pretrained(folder)
        self.config = json.loads((folder / "config.json").read_text())

    @torch.no_grad()
    def logits(self, tokens):
        return self.theirs(tokens).logits

    @torch.no_grad()
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Written without a cache, so that it is nobody's cache that is compared with ours."""
        tokens = torch.tensor([prompt])
        for _ in range(count):
            tokens = torch.cat([tokens, self.logits(tokens)[:, -1:].argmax(-1)], dim=1)
        return tokens[0, len(prompt) :].tolist()


MADE: dict[str, Checkpoint] = {}


@pytest.fixture
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    """The checkpoint of a kind, made once."""
    if request.param not in MADE:
        MADE[request.param] = Checkpoint(request.param, tmp_path_factory.mktemp("model"))
    return MADE[request.param]


every_kind = pytest.mark.parametrize("checkpoint", KINDS, indirect=True)
some_kinds = pytest.mark.parametrize("checkpoint", ["gpt2", "llama3", "gemma3"], indirect=True)


def tokens_of(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@every_kind
def test_logits_are_those_of_transformers(checkpoint):
    model, tokens = pretrained.from_hub(checkpoint.folder), tokens_of(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), checkpoint.logits(tokens), atol=1e-4, rtol=1e-4)


@every_kind
def test_greedy_text_is_that_of_transformers_cached_batched_and_in_the_engine(checkpoint):
    model, prompts = pretrained.from_hub(checkpoint.folder), [tokens_of(1, n, seed=n)[0].tolist() for n in (3, 9, 14)]
    expected = [checkpoint.greedy(prompt, 8) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=8) == expected
    caches = [ModelCache.of(model, 3, 30)]
    if model.config.linear is None:
        caches.append(GrowingCache(CacheShape.of(model, 3)))
    for cache in caches:
        assert generate(model, prompts, max_new_tokens=8, cache=cache, chunk=4) == expected
    engine = Engine(model, blocks=40, block_size=4, max_num_seqs=2, budget=8)
    requests = [engine.add(prompt, {"max_new_tokens": 8}) for prompt in prompts]
    engine.run()
    assert [request.new_tokens for request in requests] == expected


@every_kind
def test_a_model_is_exported_bit_by_bit_and_transformers_reads_it(checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokens = pretrained.from_hub(checkpoint.folder), tokens_of(1, 20)
    pretrained.to_hub(model, tmp_path, family=checkpoint.config["model_type"], largest=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours, theirs = shards.Shards(tmp_path), shards.Shards(checkpoint.folder)
    names = {name.removeprefix("transformer."): name for name in theirs}  # GPT-2's first files have no such prefix
    assert set(ours) == set(names)
    for name in ours:
        assert torch.equal(ours.read(name), theirs.read(names[name])), name
    again = pretrained.from_hub(tmp_path)
    assert hub.same_model(again.config, model.config)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(read(tokens).logits, checkpoint.logits(tokens), atol=1e-6, rtol=1e-6)


@every_kind
def test_bfloat16_is_as_near_as_that_of_transformers(checkpoint):
    tokens, exact = tokens_of(2, 40), checkpoint.logits(tokens_of(2, 40))
    model = pretrained.from_hub(checkpoint.folder, dtype=torch.bfloat16)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        ours, rounded = model(tokens).float() - exact, theirs(tokens).logits.float() - exact
    # The median: where rounding sends a token to another expert, that token is far off, in theirs as in ours.
    assert ours.abs().median() < 1.25 * rounded.abs().median()


EYES = {
    "gemma3": (
        "Gemma3",
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    ),
    "qwen3.5": ("Qwen3_5", {"hidden_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 32}),
}


@pytest.mark.parametrize("kind", EYES)
def test_of_a_model_with_eyes_the_language_model_is_read(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    family, eyes = EYES[kind]
    config = getattr(transformers, f"{family}Config")(text_config=dict(KINDS[kind][1]), vision_config=eyes)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    theirs.save_pretrained(tmp_path)
    tokens = tokens_of(1, 12)
    kinds = {"token_type_ids": torch.zeros_like(tokens)} if family == "Gemma3" else {}
    with torch.no_grad():
        found, expected = pretrained.from_hub(tmp_path)(tokens), theirs(input_ids=tokens, **kinds).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# --- published models, whose shapes are written down ------------------------------------------------------------------

BYTES_PER_TOKEN = {
    "openai-community/gpt2": 2 * 12 * 12 * 64 * 2,
    "meta-llama/Llama-2-7b-hf": 2 * 32 * 32 * 128 * 2,
    "meta-llama/Llama-3.1-8B": 2 * 32 * 8 * 128 * 2,
    "meta-llama/Llama-3.2-1B": 2 * 16 * 8 * 64 * 2,
    "mistralai/Mistral-7B-v0.1": 2 * 32 * 8 * 128 * 2,
    "Qwen/Qwen2.5-0.5B": 2 * 24 * 2 * 64 * 2,
    "Qwen/Qwen3-0.6B": 2 * 28 * 8 * 128 * 2,
    "Qwen/Qwen3-30B-A3B": 2 * 48 * 4 * 128 * 2,
    "mistralai/Mixtral-8x7B-v0.1": 2 * 32 * 8 * 128 * 2,
    "google/gemma-3-1b-it": 2 * 26 * 1 * 256 * 2,
    "openai/gpt-oss-20b": 2 * 24 * 8 * 64 * 2,
    "deepseek-ai/DeepSeek-V2-Lite": 27 * (512 + 64) * 2,
    "allenai/OLMo-2-1124-7B": 2 * 32 * 32 * 128 * 2,
}
"""By hand, in bfloat16, while no window is full: keys and values, layers, kv heads, head_dim, bytes of a number."""

WINDOWED = {"mistralai/Mistral-7B-v0.1": (32, 4096), "google/gemma-3-1b-it": (22, 512), "openai/gpt-oss-20b": (12, 128)}
"""How many of the layers look no further than their window, and that window."""


@pytest.mark.parametrize("name", pretrained.PUBLISHED)
def test_published_models_have_the_parameters_and_the_caches_that_they_have(name):
    published, tokens = pretrained.PUBLISHED[name], 8192
    config = pretrained.config_from_hub(published.config)
    with torch.device("meta"):
        model = Decoder(config).to(torch.bfloat16)
    assert count_parameters(model) == published.parameters
    per_token = BYTES_PER_TOKEN[name]
    windows, window = WINDOWED.get(name, (0, tokens))
    expected = per_token * tokens - per_token // config.layers * windows * (tokens - window)
    assert cache_bytes(config, tokens) == expected
    assert ModelCache.of(model, 2, tokens).nbytes == 2 * expected
    assert cache_bytes(config, 100) == 100 * per_token
    assert pretrained.hub_config(config)[0] == published.config["model_type"]


# --- what does not fit is refused, by name, before a weight is read ---------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A Llama in two shards and an index."""
    if "llama2" not in MADE:
        MADE["llama2"] = Checkpoint("llama2", tmp_path)
    MADE["llama2"].theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path


def change(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, message: str, kind: type = ValueError, *, monkeypatch=None) -> None:
    if monkeypatch is not None:
        monkeypatch.setattr(shards.Shards, "read", lambda self, name: pytest.fail(f"{name} was read"))
    with pytest.raises(kind, match=message):
        pretrained.from_hub(folder)


def test_shards_are_read_by_their_index(folder):
    tokens = tokens_of(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            pretrained.from_hub(folder)(tokens), MADE["llama2"].logits(tokens), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "a model of type 'mamba'; gpt2, llama, .* can be read"),
        ({"model_type": None}, "a model of type None"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu' to be read here, got 'gelu'"),
        ({"num_nextn_predict_layers": 1}, "config.json has num_nextn_predict_layers, which is not known here"),
        ({"rms_norm_eps": None}, "it lacks rms_norm_eps"),
        ({"num_hidden_layers": 10**9}, "config.json says 1000000000 layers, the weights are 30 tensors"),
        ({"num_hidden_layers": 4}, "the weights have no model.layers.3.input_layernorm.weight"),
        ({"num_hidden_layers": 2}, "the weights hold model.layers.2.input_layernorm.weight, .*no place for"),
        ({"num_hidden_layers": 2.0}, "config.json says 2.0 layers, the weights are 30 tensors"),
        ({"num_hidden_layers": True}, "the wrong kind: layers is True"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000, no tensor of the weights is longer than 61"),
        ({"vocab_size": 60}, r"embed_tokens.weight should have shape \(60, 32\), and has \(61, 32\)"),
        ({"vocab_size": "61"}, "a value of the wrong kind"),
        ({"hidden_size": 2**62}, "hidden_size is 4611686018427387904, no tensor"),
        ({"hidden_size": 32.0}, "the wrong kind: width is 32.0"),
        ({"hidden_size": [32]}, "a value of the wrong kind"),
        ({"head_dim": 10**10}, "head_dim is 10000000000, no tensor"),
        ({"num_attention_heads": 10**9}, "num_attention_heads is 1000000000, no tensor"),
        ({"text_config": {"num_hidden_layers": 1}, "num_hidden_layers": 10**9}, "says 1000000000 layers"),
        ({"text_config": 7}, "has text_config, which is not known"),
        ({"rms_norm_eps": float("inf")}, "norm_epsilon must be finite in float32 and at least 0, got inf"),
        ({"rms_norm_eps": "1e-5"}, "a value of the wrong kind"),
        ({"tie_word_embeddings": "no"}, "the wrong kind: tie_embeddings is 'no'"),
        ({"rope_theta": 5.0}, "rope_theta is 5.0, rope_parameters say"),
        ({"rope_parameters": 7}, "a value of the wrong kind"),
        ({"model_type": ["llama"]}, "a model of type"),
        ({"quantization_config": "awq"}, r"the weights are quantised \(a method that it does not name\)"),
        ({"intermediate_size": 47}, r"mlp.up_proj.weight should have shape \(47, 32\), and has \(48, 32\)"),
        ({"attention_bias": True}, "the weights have no model.layers.0.self_attn.q_proj.bias"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"the weights are quantised \(mxfp4\)"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type must be one of"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "twist": 1}}, "linear scaling takes .*, got twist"),
    ],
)  # fmt: skip
def test_configs_that_ask_for_something_else_are_refused(folder, changes, message, monkeypatch):
    change(folder / "config.json", **changes)
    refused(folder, message, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mixtral", "num_local_experts": 10**9, "num_experts_per_tok": 2},
            "num_local_experts is 1000000000",
        ),
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}}, "says 1000000000 layers"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0, "sliding_window": 4}, "a value of the wrong kind"),
        ({"model_type": "qwen3_5_text", "linear_conv_kernel_dim": 10**10}, "linear_conv_kernel_dim is 10000000000"),
    ],
)
def test_sizes_of_other_families_are_refused_before_anything_is_made(folder, changes, message, monkeypatch):
    change(folder / "config.json", **changes)
    monkeypatch.setattr(hub, "Decoder", lambda config: pytest.fail("a model was made"))
    refused(folder, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "config.json is not JSON"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "config.json is not JSON"),
        ('{"model_type": "llama", "model_type": "llama"}', "it says model_type twice"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "config.json is not JSON"),
        ("null", "config.json is no JSON object"),
    ],
)
def test_objects_that_are_none_are_refused(folder, text, message):
    (folder / "config.json").write_text(text)
    refused(folder, message)
    index = (folder / shards.INDEX).read_text()
    (folder / shards.INDEX).write_text(text)
    (folder / "config.json").write_text(json.dumps(MADE["llama2"].config))
    refused(folder, message.replace("config.json", "index.json"))
    (folder / shards.INDEX).write_text(
        index.replace('"weight_map": {', '"weight_map": {"lm_head.weight": "x.safetensors",')
    )
    refused(folder, "it says lm_head.weight twice")


def test_a_config_of_an_absurd_size_is_not_read(folder, monkeypatch):
    with open(folder / "config.json", "r+b") as file:
        file.truncate(2**40)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("it was read"))
    refused(folder, "has 1,099,511,627,776 bytes, more than")


@pytest.mark.parametrize("hub", ["meta-llama/Llama-3.2-1B", "google/gemma-3-1b-it", "openai/gpt-oss-20b"])
def test_two_scalings_of_rope_that_differ_are_refused(hub):
    config = pretrained.PUBLISHED[hub].config
    same = {"rope_type": "linear", "factor": 2.0, "rope_theta": config["rope_theta"]}
    both = config | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_parameters": same}
    with pytest.raises(ValueError, match="rope_scaling and rope_parameters disagree on factor"):
        pretrained.config_from_hub(both)


def test_shards_that_lie_are_refused(folder, monkeypatch):
    index, first = folder / shards.INDEX, sorted(folder.glob("*.safetensors"))[0]
    whole, data = json.loads(index.read_text()), first.read_bytes()
    places = whole["weight_map"]
    for outside in (
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "weights.bin",
        250 * "a" + ".safetensors",
        7,
    ):
        change(index, weight_map=places | {"lm_head.weight": outside})
        refused(folder, "lm_head.weight is in .*, which is no .* of this folder", monkeypatch=monkeypatch)
    change(index, weight_map=places | {"lm_head.weight": "model-00009.safetensors"})
    refused(folder, "there is no .*model-00009.safetensors", FileNotFoundError)
    change(index, weight_map=places | {"model.extra.weight": first.name})
    refused(folder, f"says that model.extra.weight is in {first.name}, which does not have it")
    for text in ("{}", '{"weight_map": {}}', '{"weight_map": []}'):
        index.write_text(text)
        refused(folder, "has no weight_map")
    index.write_text("{")
    refused(folder, "index.json is not JSON")
    index.write_text(json.dumps(whole))
    headers = {
        "cut short": data[:-4],
        "longer than it says": data + bytes(4),
        "empty": b"",
        "a header of an absurd size": (2**60).to_bytes(8, "little") + data[8:],
        "no header": (16).to_bytes(8, "little") + b"x" * 16,
    }
    for content in headers.values():
        first.write_bytes(content)
        refused(folder, f"{first.name} is damaged or no safetensors file", monkeypatch=monkeypatch)
    first.write_bytes(data)
    index.unlink()
    (folder / "twice.safetensors").write_bytes(data)
    refused(folder, "is in .* and in twice.safetensors")


def test_tensors_of_another_kind_are_refused(folder, tmp_path):
    weights, config = MADE["llama2"].theirs.state_dict(), MADE["llama2"].config
    norm = "model.layers.1.input_layernorm.weight"
    for changed, message in (
        ({norm: torch.ones(31)}, r"layers.1.input_layernorm.weight should have shape \(32,\), and has \(31,\)"),
        ({norm: torch.ones(32).to(torch.float8_e4m3fn)}, "input_layernorm.weight is in F8_E4M3: quantised weights"),
        ({"model.layers.0.self_attn.sinks": torch.ones(4)}, "the weights hold model.layers.0.self_attn.sinks"),
    ):
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        safetensors.torch.save_file(weights | changed, folder / "model.safetensors")
        refused(folder, message)
    tied = config | {"tie_word_embeddings": True}
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        pretrained.from_tensors(weights, tied)


def test_nothing_but_a_folder_or_a_name_of_the_hub_is_looked_for(tmp_path, monkeypatch):
    for name in ("./nowhere", "/no/where", "nowhere", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            pretrained.from_hub(name)
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def no_network(*_, **options):
        assert options["allow_patterns"] == fetch.FILES
        assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in fetch.FILES[:4])
        raise OSError("Temporary failure in name resolution")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(
        FileNotFoundError, match=r"could not be fetched from the hub \(is there a network.*name resolution"
    ):
        pretrained.from_hub("nobody/nothing")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        pretrained.from_hub("nobody/nothing")


def test_models_made_here_are_exported_to_the_family_that_has_their_parts(tmp_path):
    torch.manual_seed(0)
    llama = {"norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rope", "bias": False, "tie_embeddings": False}
    kinds = {
        "gpt2": {"feed_forward": "gelu_tanh"},
        "llama": llama,
        "mistral": llama | {"window": 5},
        "qwen2": llama | {"attention_bias": "qkv", "kv_heads": 2},
        "qwen3": llama | {"qk_norm": "head"},
    }
    for name, options in kinds.items():
        model = Decoder(
            ModelConfig(vocab_size=VOCABULARY, max_length=32, width=32, layers=2, heads=4, **options)
        ).eval()
        assert pretrained.hub_config(model.config)[0] == name
        pretrained.to_hub(model, tmp_path / name)
        tokens = tokens_of(1, 9)
        with torch.no_grad():
            torch.testing.assert_close(pretrained.from_hub(tmp_path / name)(tokens), model(tokens), rtol=0, atol=1e-6)
    odd = ModelConfig(vocab_size=VOCABULARY, width=32, heads=4, positions="alibi")
    with pytest.raises(ValueError, match="every family lacks something"):
        pretrained.hub_config(odd)
    with pytest.raises(ValueError, match="llama lacks something"):
        pretrained.hub_config(odd, "llama")
    with pytest.raises(ValueError, match="family must be one of"):
        pretrained.hub_config(odd, "bert")


def without_each(config: dict) -> Iterator[tuple[str, dict]]:
    """The config without one of its keys, for each of them, also of those in RoPE's objects."""
    for key, value in config.items():
        yield key, {name: other for name, other in config.items() if name != key}
        if key.startswith("rope_") and isinstance(value, dict):
            for inner, changed in without_each({f"rope_{name}": x for name, x in value.items()}):
                parts = {name.removeprefix("rope_"): x for name, x in changed.items()}
                yield f"{key}.{inner}", config | {key: parts}


@every_kind
def test_a_missing_key_means_what_it_means_in_the_reference_code_or_is_refused(checkpoint):
    transformers = pytest.importorskip("transformers")
    family, _ = KINDS[checkpoint.kind]
    theirs = getattr(transformers, CONFIGS.get(family, f"{family}Config"))
    weights = shards.Shards(checkpoint.folder)
    for key, config in without_each(checkpoint.config):
        try:
            read, _ = pretrained.config_from_hub(config), hub.load_family(weights, config)
        except ValueError:
            continue
        try:
            whole = theirs.from_dict(copy.deepcopy(config)).to_dict()
            hub.load_family(weights, whole)
        except Exception:
            continue  # transformers does not read the config, or means a size that the weights do not have
        assert hub.same_model(read, pretrained.config_from_hub(whole)), key


@pytest.mark.parametrize("kind", ["qwen3 next", "qwen3.5"])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_the_share_of_channels_that_turns_is_exported(kind, fraction, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = pretrained.config_from_hub(
        getattr(transformers, "Qwen3_5TextConfig" if kind == "qwen3.5" else "Qwen3NextConfig")(
            **KINDS[kind][1]
        ).to_dict()
    )
    torch.manual_seed(0)
    model = Decoder(replace(config, rotary_fraction=fraction)).eval()
    pretrained.to_hub(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = tokens_of(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)


@every_kind
def test_where_all_channels_turn_no_part_of_them_is_asked_for(checkpoint):
    """The reference code of most families turns a whole head, also where the file says that a part turns."""
    ropes = checkpoint.config.get("rope_parameters")
    if ropes is None:
        pytest.skip("this family has no RoPE")
    layers = [kind for kind, values in ropes.items() if isinstance(values, dict)]
    for kind in layers or [None]:
        changed = {**ropes, "partial_rotary_factor": 0.5}
        if kind is not None:
            changed = {**ropes, kind: {**ropes[kind], "partial_rotary_factor": 0.5}}
        if pretrained.FAMILIES[checkpoint.config["model_type"]].linear:
            assert pretrained.config_from_hub(checkpoint.config | {"rope_parameters": changed}).rotary_fraction == 0.5
        else:
            with pytest.raises(ValueError, match=r"partial_rotary_factor must be 1\.0 to be read here, got 0\.5"):
                pretrained.config_from_hub(checkpoint.config | {"rope_parameters": changed})


@pytest.mark.parametrize(
    "options",
    [
        {"rotary_fraction": 0.5},
        {"rotary_fraction": 0.5, "qk_norm": "head"},
        {"attention_softcap": 2.0, "qk_norm": "head", "norm": "rmsnorm_1p", "feed_forward": "geglu"}
        | {"branch_norm": "both", "scale_embeddings": True, "window": 4, "layer_types": ("window", "full")},
    ],
)  # fmt: skip
def test_what_the_reference_code_would_pass_over_is_not_exported(options):
    shape = {"vocab_size": VOCABULARY, "width": 32, "layers": 2, "heads": 2, "bias": False, "tie_embeddings": False}
    config = ModelConfig(**shape | {"norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rope"} | options)
    with pytest.raises(ValueError, match="every family lacks something"):
        pretrained.hub_config(config)


@pytest.mark.parametrize("kind", ["gemma3", "olmo3"])
def test_windows_that_turn_as_the_other_layers_do_are_written_as_such(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    family, settings = KINDS[kind]
    read = pretrained.config_from_hub(
        getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**settings).to_dict()
    )
    torch.manual_seed(0)
    model = Decoder(replace(read, window_rope_base=None, rope_scaling=None)).double().eval()
    pretrained.to_hub(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = tokens_of(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)
    for turned in ({"window_rope_base": None}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}):
        with pytest.raises(ValueError, match="every family lacks something"):  # windows are never stretched there
            pretrained.hub_config(replace(read, **{"window_rope_base": None, "rope_scaling": YARN} | turned))


def test_weights_stay_mapped_where_their_dtype_stays(folder):
    """No memory is taken for a tensor that needs no change; what is written to it does not reach the file."""
    before = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    model = pretrained.from_hub(folder)
    with torch.no_grad():
        model.stack.blocks[0].feed_forward.up.weight.zero_()
    assert all(path.read_bytes() == data for path, data in before.items())
    assert pretrained.from_hub(folder).stack.blocks[0].feed_forward.up.weight.abs().sum() > 0


# --- tokenizers and chat templates ------------------------------------------------------------------------------------

TEXTS = [
    "Once upon a time, there was a dog.",
    "  two  spaces\n\nand lines",
    "naïve café, 日本語 🦙",
    "<|im_end|> is text",
    "",
]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_a_tokenizer_is_that_of_transformers_and_its_tokens_are_bytes(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    train_tokenizer(tmp_path, kind)
    ours = pretrained.load_tokenizer(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="<|im_end|>", chat_template=CHATML
    )
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
        plain = ours.encode_ordinary(text)
        assert ours.encode_single_token("<|im_end|>") not in plain
        assert b"".join(map(ours.decode_single_token_bytes, plain)) == text.encode()
        assert ours.decode(plain) == text
    assert ours.n_vocab == len(theirs)
    assert ours.stop_tokens == [ours.eot_token] == [theirs.eos_token_id]
    with pytest.raises(KeyError):
        ours.decode_single_token_bytes(10_000)
    with pytest.raises(KeyError):
        ours.encode_single_token("<|nothing|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert pretrained.load_tokenizer(tmp_path).stop_tokens == [7, 9]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_added_tokens_and_streams_read_as_the_library_decodes(kind, tmp_path):
    """Runs of spaces, which Gemma has added, and special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    train_tokenizer(tmp_path, kind)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain.add_tokens(["\u2581\u2581", "  two", "日本"])
    plain.add_special_tokens(["<｜begin\u2581of｜>"])
    plain.save(str(tmp_path / "tokenizer.json"))
    ours = pretrained.load_tokenizer(tmp_path)
    for token in range(ours.n_vocab):
        found = ours.decode_single_token_bytes(token).decode("utf-8", "replace")
        assert found == ours.decode([token]), ours.tokenizer.id_to_token(token)
    for text in (*TEXTS, "  two 日本\u2581\u2581 <｜begin\u2581of｜>"):
        tokens, stream = ours.encode(text), TextStream(ours)
        assert "".join(map(stream.push, tokens)) + stream.finish() == ours.decode(tokens)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_half_a_surrogate_pair_is_read_as_tiktoken_reads_it(kind, tmp_path):
    train_tokenizer(tmp_path, kind)
    ours = pretrained.load_tokenizer(tmp_path)
    for text, expected in (("a\ud800b", "a\ufffdb"), ("\udc00\ud800", "\ufffd\ufffd"), ("\ud83d\ude42", "🙂")):
        assert ours.encode(text) == ours.encode(expected)
        assert ours.encode_ordinary(text) == ours.encode_ordinary(expected)


def test_threads_may_read_one_text_both_ways_at_once(tmp_path):
    """The library's tokenizer holds the switch for special tokens: here one thread waits between switch and text."""
    train_tokenizer(tmp_path, "bytes")
    ours = pretrained.load_tokenizer(tmp_path)
    end, library = ours.encode_single_token("<|im_end|>"), ours.tokenizer
    waits, other_is_done = threading.Event(), threading.Event()

    class Slow:
        """Its first text waits until another thread has had time to read its own."""

        def __setattr__(self, name, value):
            setattr(library, name, value)

        def encode(self, *args, **options):
            if not waits.is_set():
                waits.set()
                other_is_done.wait(0.5)
            return library.encode(*args, **options)

    ours.tokenizer = Slow()
    found = []
    plain = threading.Thread(target=lambda: found.append(ours.encode_ordinary("a<|im_end|>")))
    plain.start()
    waits.wait()
    assert end in ours.encode("a<|im_end|>")
    other_is_done.set()
    plain.join()
    assert end not in found[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_tokenizer_can_be_copied(tmp_path, copied):
    train_tokenizer(tmp_path, "bytes")
    ours = pretrained.load_tokenizer(tmp_path)
    assert copied(ours).encode("a<|im_end|>") == ours.encode("a<|im_end|>")


def test_a_conversation_is_written_as_transformers_writes_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    train_tokenizer(tmp_path, "bytes")
    ours = pretrained.load_tokenizer(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="<|im_end|>", chat_template=CHATML
    )
    turns = [{"role": "user", "content": " Tell me of a dog & a cat. "}, {"role": "assistant", "content": "Once"}]
    for answer in (True, False):
        expected = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer)
        assert ours.render(turns, answer=answer) == expected
        assert ours.encode_chat(turns, answer=answer) == theirs(expected, add_special_tokens=False)["input_ids"]
    tools = [{"name": "find", "what": "<é>"}]
    expected = theirs.apply_chat_template(turns, tools=tools, tokenize=False)
    assert ours.render(turns, tools=tools, answer=False) == expected
    with pytest.raises(ValueError, match="the chat template refuses the conversation: no role wizard"):
        ours.render([{"role": "wizard", "content": ""}])
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}")
    assert pretrained.load_tokenizer(tmp_path).render(turns) == "2"


IDIOMS = {
    "what the model wrote is marked (SmolLM3)": """{% for m in messages %}{% if m.role == 'assistant' %}
{%- generation %}{{ '<|im_start|>' ~ m.content ~ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}
{%- endfor %}""",
    "from the end to the beginning, thoughts cut off (Qwen3)": """{%- set ns = namespace(last=-1, found=false) %}
{%- for m in messages[::-1] %}{% set i = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and m.role == 'user' and m.content is string %}
        {%- set ns.last = i %}{% set ns.found = true %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {{- m.content.split('</think>')[-1].lstrip('\\n') if loop.index0 < ns.last else m.content.strip() }}{{ ns.last }}
{%- endfor %}""",
    "a date, and tools that are none (Llama 3)": """{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if not date is defined %}{% set date = strftime_now("%d %b") | length %}{% endif %}
{{- bos_token }}{{ date }}{{ tools is none }}{{ messages[0]['content'] | trim }}""",
    "macros, and schemas indented (gpt-oss)": """{%- macro describe(x) -%}{{ x | tojson(indent=2) }}{%- endmacro -%}
{%- if tools -%}{% for tool in tools %}{{ describe(tool) }}{% endfor %}{%- else -%}none of them{%- endif -%}
{%- for k, v in messages[0] | dictsort %}{{ k }}={{ v }};{% endfor %}""",
    "roles that must take turns (Mistral, Gemma)": """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}{% endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- role ~ ': ' ~ message['content'] | trim }}
{% endfor %}{% if add_generation_prompt %}model: {% endif %}""",
    "parts of a turn (Gemma 3, Qwen-VL)": """{% for m in messages %}
{%- if m.content is string %}{{ m.content }}{% else %}
{%- for part in m.content %}{{ part.text if part.type == 'text' else '<' + part.type + '>' }}{% endfor %}
{%- endif %}{% endfor %}""",
}
"""What the templates of public models do, in words of our own."""


@pytest.mark.parametrize("idiom", IDIOMS)
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "find", "what": "<é & 'x'>"}}]])
def test_what_templates_of_public_models_do_is_done(idiom, tools, tmp_path):
    transformers = pytest.importorskip("transformers")
    train_tokenizer(tmp_path, "bytes", IDIOMS[idiom])
    ours = pretrained.load_tokenizer(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="<|im_end|>"
    )
    theirs.chat_template = IDIOMS[idiom]
    user = [{"type": "text", "text": "Hi"}, {"type": "image"}] if "parts" in idiom else " Hi <b>\n"
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": "<think>so</think>\n\n é"}]
    turns.append({"role": "user", "content": "And?"})
    for messages in (turns, turns[:1]):
        expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        assert expected
        assert ours.render(messages, tools=tools) == expected


@pytest.mark.parametrize(
    "program",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.__class__.__init__.__globals__['os'].system('true') }}",
        "{% for x in range(10**9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ undefined.attribute }}",
        "{% if %}",
        "{{ 'x' * 10**10 }}",
        "{{ 'x' * 2**25 }}",
        "{{ 'x'.ljust(10**11) }}",
        "{% set n = namespace(x='abc') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_chat_template_reaches_nothing(program, tmp_path):
    train_tokenizer(tmp_path, "bytes")
    (tmp_path / "chat_template.jinja").write_text(program)
    with pytest.raises(ValueError, match="the chat template refuses the conversation"):
        pretrained.load_tokenizer(tmp_path).render([{"role": "user", "content": "Hi"}])


ENDLESS = "{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}"


def test_a_chat_template_that_never_ends_is_stopped(tmp_path, monkeypatch):
    renderer = templates.Renderer()
    assert renderer.render("{{ x }}", {"x": "here"}) == "here"
    program = Path(rendering.__file__).read_text().replace(f"SECONDS = {rendering.SECONDS}", "SECONDS = 1")
    (tmp_path / "hasty.py").write_text(program)
    monkeypatch.setattr(rendering, "__file__", str(tmp_path / "hasty.py"))
    renderer.stop()
    for _ in range(2):  # the next conversation has a process of its own again
        with pytest.raises(ValueError, match="the chat template was stopped"):
            renderer.render(ENDLESS, {})
        assert renderer.render("{{ x }}", {"x": "here"}) == "here"
    renderer.stop()


def test_an_interrupted_template_leaves_no_answer_behind(monkeypatch):
    renderer = templates.Renderer()
    renderer.render("{{ x }}", {"x": "first"})

    class Interrupted:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setattr(renderer.process, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        renderer.render("{{ x }}", {"x": "second"})
    assert renderer.render("{{ x }}", {"x": "third"}) == "third"
    renderer.stop()


def test_threads_that_render_get_their_own_texts():
    renderer = templates.Renderer()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: renderer.render("{{ i }}", {"i": i}), range(100))) == [
            str(i) for i in range(100)
        ]
    with pytest.raises(ValueError, match="a conversation must be of texts"):
        renderer.render("{{ x }}", {"x": object()})
    renderer.stop()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chat_template": 7}, "has a chat_template that is no text: 7"),
        ({"chat_template": [{"name": "default"}]}, "has no chat template"),
        ({"chat_template": [7, {"name": "other", "template": "x"}]}, "has no chat template"),
        ({"chat_template": "x", "bos_token": ["<s>"]}, r"says that bos_token is \['<s>'\], which is no text"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused(settings, message, tmp_path):
    train_tokenizer(tmp_path, "bytes")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        pretrained.load_tokenizer(tmp_path).render([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("ends", ["</s>", -1, 2**63, [1, None], [[1]], True, 1.0, {}])
def test_tokens_that_end_a_text_are_whole_numbers(ends, tmp_path):
    train_tokenizer(tmp_path, "bytes")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(ValueError, match="which is no token"):
        _ = pretrained.load_tokenizer(tmp_path).stop_tokens


def test_a_tokenizer_without_first_and_last_tokens_adds_none(tmp_path):
    """As Qwen's: no token begins a text, and the config names a last one that the vocabulary lacks."""
    tokenizers = pytest.importorskip("tokenizers")
    train_tokenizer(tmp_path, "bytes")
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    plain.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": None, "eos_token": "<|gone|>", "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    encoding = pretrained.load_tokenizer(tmp_path)
    assert encoding.encode("a dog") == encoding.encode_ordinary("a dog")
    assert encoding.encode("") == encoding.stop_tokens == []
    assert encoding.render([{"role": "user", "content": "Hi"}]) == "Hi"
    with pytest.raises(ValueError, match="the text is empty: there is no token to continue"):
        first_tokens(encoding, "")


def test_tokenizers_that_are_none_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):  # noqa: RUF043
        pretrained.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged or of an unknown kind"):
        pretrained.load_tokenizer(tmp_path)
    train_tokenizer(tmp_path, "bytes")
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no JSON object"):
        pretrained.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    encoding = pretrained.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="has no chat template"):
        encoding.render([])
    with pytest.raises(ValueError, match="says which token ends a text"):
        _ = encoding.eot_token


# --- our attention in the models of transformers ----------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", ["llama3", "qwen3", "mistral", "gpt-oss", "gemma3, capped"], indirect=True)
def test_models_of_transformers_run_on_our_attention(checkpoint, monkeypatch):
    transformers = pytest.importorskip("transformers")
    interface.register_with_transformers()
    calls = []
    computed = interface.flash_attention

    def counted(*args, **options):
        calls.append(options.get("mask") is None)
        return computed(*args, **options)

    monkeypatch.setattr(interface, "flash_attention", functools.wraps(computed)(counted))
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder, attn_implementation="tformer_flash")
    tokens, attend = tokens_of(2, 20), {"pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, checkpoint.logits(tokens), atol=1e-4, rtol=1e-4)
        padded = torch.ones_like(tokens)
        padded[0, :7] = 0
        torch.testing.assert_close(
            model(tokens, attention_mask=padded).logits[0, 7:],
            checkpoint.theirs(tokens, attention_mask=padded).logits[0, 7:],
            atol=1e-4,
            rtol=1e-4,
        )
        everywhere = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, **attend}
        assert (
            model.generate(tokens, **everywhere).tolist() == checkpoint.theirs.generate(tokens, **everywhere).tolist()
        )
    assert sum(calls) > len(calls) / 3  # most passes need no mask, which is what the kernels know


@pytest.mark.parametrize("checkpoint", ["llama3", "gemma3, capped", "gpt-oss"], indirect=True)
def test_a_mask_of_numbers_is_added_to_the_scores(checkpoint):
    transformers = pytest.importorskip("transformers")
    interface.register_with_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder, attn_implementation="tformer")
    tokens, generator = tokens_of(2, 12), torch.Generator().manual_seed(0)
    seen = (torch.rand(2, 1, 12, 12, generator=generator) < 0.6) | torch.eye(12, dtype=torch.bool)
    added = torch.where(seen, torch.randn(seen.shape, generator=generator), torch.finfo(torch.float32).min)
    if "full_attention" in (kinds := set(getattr(model.config, "layer_types", None) or ())):
        added = dict.fromkeys(kinds, added)
    with torch.no_grad():
        found, wanted = (one(tokens, attention_mask=added).logits for one in (model, checkpoint.theirs))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_model_that_attends_in_chunks_does_so_past_its_first_chunk():
    transformers = pytest.importorskip("transformers")
    interface.register_with_transformers()
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "intermediate_size_mlp": 48}
    config = transformers.Llama4TextConfig(**sizes, **heads, attention_chunk_size=8, no_rope_layer_interval=4)
    torch.manual_seed(0)
    theirs = transformers.Llama4ForCausalLM._from_config(config, attn_implementation="eager").eval()
    model = transformers.Llama4ForCausalLM._from_config(config, attn_implementation=interface.NAME).eval()
    model.load_state_dict(theirs.state_dict())
    tokens, asked = torch.randint(1, 64, (2, 21)), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, theirs(tokens).logits, atol=1e-4, rtol=1e-4)
        given = {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0, **asked}
        assert model.generate(tokens, **given).tolist() == theirs.generate(tokens, **given).tolist()


@pytest.mark.parametrize("padded", [False, True])
def test_a_bias_of_positions_is_added_to_the_scores(padded):
    transformers = pytest.importorskip("transformers")
    interface.register_with_transformers()
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    model = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="tformer").eval()
    model.load_state_dict(theirs.state_dict())
    tokens = torch.randint(1, 64, (2, 11))
    given = {"attention_mask": (torch.arange(11) < torch.tensor([[11], [7]])).long()} if padded else {}
    found, wanted = (one(tokens, decoder_input_ids=tokens[:, :6], **given).logits for one in (model, theirs))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    table = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    for one, logits in ((model, found), (theirs, wanted)):
        logits.logsumexp(-1).sum().backward()
        one.slope = one.get_parameter(table).grad
    torch.testing.assert_close(model.slope, theirs.slope, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", interface.UNKNOWN)
def test_what_would_change_the_result_is_not_passed_over(name):
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=f"Linear hands over {name}, which tformer does not know"):
        interface.attend_for_transformers(torch.nn.Linear(1, 1), q, q, q, None, **{name: torch.zeros(2)})


def test_a_mask_is_left_out_only_where_causality_says_it_all():
    plain = {"q_length": 4, "kv_length": 9, "q_offset": 5}
    assert interface.is_plainly_causal(**plain)
    assert interface.is_plainly_causal(**plain, attention_mask=torch.ones(2, 9, dtype=torch.bool))
    assert interface.is_plainly_causal(**plain, local_size=9)
    for changes in (
        {"q_offset": 0},
        {"local_size": 8},
        {"allow_is_causal_skip": False},
        {"attention_mask": torch.tensor([[False] + [True] * 8])},
        {"kv_length": 12},
        {"q_offset": torch.tensor(5)},
    ):
        assert not interface.is_plainly_causal(**plain | changes)


# --- eight bits, and a checkpoint served in one line ------------------------------------------------------------------


def test_rows_are_rounded_to_the_nearest_of_their_own_integers():
    weight = torch.randn(6, 40) * torch.logspace(-6, 6, 6)[:, None]
    weight[2] = 0.0
    numbers, scale = int8.quantise_rows(weight)
    assert numbers.dtype == torch.int8
    assert numbers.abs().amax(1).tolist() == [127, 127, 0, 127, 127, 127]
    assert ((numbers * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    with pytest.raises(ValueError, match="NaN or infinite"):
        int8.quantise_rows(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("checkpoint", ["gpt2", "llama3", "qwen2", "gemma3"], indirect=True)
def test_eight_bits_stay_near_and_take_a_quarter(checkpoint):
    small, tokens = pretrained.from_hub(checkpoint.folder, dtype=torch.int8), tokens_of(2, 30)
    wide = pretrained.from_hub(checkpoint.folder)
    linears = [part for part in small.stack.modules() if isinstance(part, int8.Int8Linear)]
    assert len(linears) == sum(isinstance(part, nn.Linear) for part in wide.stack.modules())
    assert all(part.weight.dtype == torch.int8 for part in linears)
    with torch.no_grad():
        for name, part in wide.stack.named_modules():  # the wide model with the rounded numbers is the oracle
            if isinstance(part, nn.Linear):
                rounded = small.stack.get_submodule(name)
                part.weight.copy_(rounded.weight.float() * rounded.scale[:, None])
        torch.testing.assert_close(small(tokens), wide(tokens), atol=1e-4, rtol=1e-4)
        error = small(tokens) - checkpoint.logits(tokens)
    assert error.pow(2).mean().sqrt() < 0.1 * checkpoint.logits(tokens).std()
    again = pretrained.quantise(pretrained.from_hub(checkpoint.folder))
    with torch.no_grad():
        assert torch.equal(again(tokens), small(tokens))
    assert generate(small, [[1, 2, 3]], max_new_tokens=4) == generate(again, [[1, 2, 3]], max_new_tokens=4)


@pytest.fixture(scope="module")
def two_models() -> tuple[Decoder, Decoder]:
    """Two models of one shape and other weights."""
    options = {"norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rope", "bias": False, "tie_embeddings": False}
    config = ModelConfig(vocab_size=23, max_length=40, width=16, layers=2, heads=4, **options)
    return Decoder(config).eval(), Decoder(config).eval()


def weights_of_folder(folder: Path) -> list[Tensor]:
    return list(pretrained.from_hub(folder).parameters())


SIZES = [1_000, 2_000, 10**9]  # of the largest file: 21 files and an index, 12, one without


@pytest.mark.parametrize(("first", "second"), itertools.permutations(SIZES, 2))
def test_a_folder_that_is_written_again_holds_the_new_model_alone(two_models, tmp_path, first, second):
    old, new = two_models
    (tmp_path / "best.safetensors").write_bytes(b"a run's")
    pretrained.to_hub(old, tmp_path / "alone", largest=second)
    pretrained.to_hub(old, tmp_path, largest=first)
    pretrained.to_hub(new, tmp_path, largest=second)
    assert all(map(torch.equal, weights_of_folder(tmp_path), new.parameters()))
    alone = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == alone | {"alone", "best.safetensors"}
    mapped = pretrained.from_hub(tmp_path)
    pretrained.to_hub(mapped, tmp_path, largest=first)  # into the files that its weights are maps of
    assert all(map(torch.equal, weights_of_folder(tmp_path), new.parameters()))


@pytest.mark.parametrize("what", ["replace", "fsync"])
def test_a_model_that_is_killed_while_it_is_written_is_the_old_one_or_the_new_one(
    two_models, tmp_path, monkeypatch, what
):
    models, found, call = two_models, [], 0
    system = getattr(os, what)

    def dies(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise SystemExit
        return system(*arguments)

    while len(found) == call:
        pretrained.to_hub(models[0], tmp_path, largest=6_000)
        left, call = call, call + 1
        monkeypatch.setattr(os, what, dies)
        with contextlib.suppress(SystemExit):
            pretrained.to_hub(models[1], tmp_path)
        monkeypatch.setattr(os, what, system)
        weights = weights_of_folder(tmp_path)
        found += [i for i in (0, 1) if left < 0 and all(map(torch.equal, weights, models[i].parameters()))]
    assert len(set(found)) == 2, "it died before the journal and after it"
    assert found == sorted(found)
    assert len(found) == call - 1, "every death but the last, which did not come, left one of them whole"


WRONG = [None, True, 0, -1, 2.5, 1e400, "8", "rope", [], [8], {}, {"rope_type": []}, 10**30]


@every_kind
def test_a_config_that_makes_no_sense_is_refused_in_one_line(checkpoint):
    refused = []
    for key, value in itertools.product(checkpoint.config, WRONG):
        config = checkpoint.config | {key: value}
        try:
            hub.check_sizes(config, {f"{i}": (10**30,) for i in range(100)})
            hub.config_from_hub(config)
        except ValueError as error:  # of no other kind, whatever is wrong
            refused.append(str(error))
    assert len(refused) > 2 * len(checkpoint.config)
    assert not any("\n" in message for message in refused)


def test_a_checkpoint_is_served_in_one_line(tmp_path):
    train_tokenizer(tmp_path, "bytes")
    torch.manual_seed(0)
    size = pretrained.load_tokenizer(tmp_path).n_vocab
    options = {"norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rope", "bias": False, "attention_bias": "qkv"}
    model = Decoder(ModelConfig(vocab_size=size, max_length=64, width=32, layers=2, heads=4, **options)).eval()
    pretrained.to_hub(model, tmp_path)
    answers = LLM(*pretrained.load(tmp_path)).generate(["Once upon a time", "There was"], {"max_new_tokens": 6})
    prompts = [pretrained.load_tokenizer(tmp_path).encode_ordinary(text) for text in ("Once upon a time", "There was")]
    assert [answer.new_tokens for answer in answers] == generate(model, prompts, max_new_tokens=6)
    model, encoding = pretrained.load(tmp_path)
    pretrained.to_hub(model, tmp_path / "copy", encoding)
    copied, same = pretrained.load(tmp_path / "copy")
    assert same.render([{"role": "user", "content": "Hi"}]) == encoding.render([{"role": "user", "content": "Hi"}])
    assert generate(copied, prompts, max_new_tokens=6) == generate(model, prompts, max_new_tokens=6)
    small, _ = pretrained.load(tmp_path, dtype=torch.int8)
    assert any(isinstance(part, int8.Int8Linear) for part in small.modules())


# --- on a GPU ---------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
@every_kind
def test_on_a_gpu_logits_and_greedy_texts_are_those_of_transformers(checkpoint):
    """Graphs and compiled blocks too: what is recorded must hold at every length, in rings and states as well."""
    model, tokens = pretrained.from_hub(checkpoint.folder, device="cuda"), tokens_of(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens.cuda()).cpu(), checkpoint.logits(tokens), atol=1e-3, rtol=1e-3)
    prompts = [tokens_of(1, n, seed=n)[0].tolist() for n in (3, 9, 14)]
    expected = [checkpoint.greedy(prompt, 8) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=8) == expected
    assert generate(model, prompts, max_new_tokens=8, cuda_graph=True) == expected
    engine = Engine(model, blocks=40, block_size=8, max_num_seqs=2, budget=8)
    requests = [engine.add(prompt, {"max_new_tokens": 8}) for prompt in prompts]
    engine.run()
    assert [request.new_tokens for request in requests] == expected


@needs_gpu
@pytest.mark.parametrize("checkpoint", ["llama3", "qwen3", "gpt-oss"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_models_of_transformers_run_on_our_kernels(checkpoint, dtype):
    transformers = pytest.importorskip("transformers")
    interface.register_with_transformers()
    tokens, exact = tokens_of(2, 20), checkpoint.logits(tokens_of(2, 20))
    error = {}
    for name in ("eager", "tformer_flash", "tformer"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, dtype=dtype, attn_implementation=name
        ).cuda()
        with torch.no_grad():
            error[name] = (model(tokens.cuda()).logits.float().cpu() - exact).abs().median()
    assert max(error["tformer_flash"], error["tformer"]) < 1.5 * error["eager"] + 1e-4
