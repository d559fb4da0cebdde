"""Pretrained models: public weights by our names against transformers, and the small model that the chapters share."""

import json
import math

import pytest
import safetensors.torch
import torch
from torch import nn

from tformer_lib import pretrained, stories
from tformer_lib.generation import generate

GPT2 = {"vocab_size": 61, "n_positions": 40, "n_embd": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.3}
LLAMA = {
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
KINDS = {
    "gpt2": ("GPT2", GPT2),
    "llama": ("Llama", LLAMA),
    "llama, all heads": ("Llama", LLAMA | {"num_key_value_heads": 4}),
    "llama, wide heads": ("Llama", LLAMA | {"head_dim": 16}),
    "llama, tied": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "llama 3.1's frequencies": (
        "Llama",
        LLAMA
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama, stretched": (
        "Llama",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
}


def reference(kind: str):
    """transformers' model with random weights: every tensor, norms and biases too, away from its special value."""
    transformers = pytest.importorskip("transformers")
    family, settings = KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")(config).eval()
    for p in model.parameters():
        nn.init.normal_(p, mean=float(p.dim() < 2), std=0.2)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_public_weights_give_the_logits_and_the_greedy_text_of_transformers(kind, tmp_path):
    theirs = reference(kind)
    theirs.save_pretrained(tmp_path)
    ours = pretrained.from_folder(tmp_path)
    tokens = torch.randint(0, 61, (2, 19))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    text = tokens[:1, :5]
    options = {"attention_mask": torch.ones_like(text), "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(text, max_new_tokens=16, do_sample=False, **options)
    with torch.no_grad():
        for _ in range(16):
            text = torch.cat([text, ours(text)[:, -1:].argmax(-1)], dim=1)
    assert text.tolist() == expected.tolist()


STRETCHES = {
    "default": {},
    "dynamic, of another trained length": {"factor": 2.0},
    "yarn, its factor from the lengths": {"factor": None, "mscale": 0.7, "mscale_all_dim": 1.3},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope, its factor from the lengths": {"short_factor": [1.1] * 4, "long_factor": [1.0, 1.5, 2.0, 4.0]},
}


@pytest.mark.parametrize("name", STRETCHES)
def test_a_stretched_llama_is_read_with_both_of_its_lengths(name):
    transformers = pytest.importorskip("transformers")
    kind = name.split(",")[0]
    lengths = {} if kind == "default" else {"original_max_position_embeddings": 16}
    rope = {"rope_type": kind, "rope_theta": 1e4, **STRETCHES[name], **lengths}
    settings = LLAMA | {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "max_position_embeddings": 64}
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | {"rope_parameters": rope})).eval()
    ours = pretrained.from_tensors(theirs.state_dict(), theirs.config.to_dict())
    assert ours.config.max_length == 64
    with torch.no_grad():
        for length in (12, 40, 80):  # within the trained length, beyond it, and beyond both
            tokens = torch.randint(0, 61, (2, length))
            torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_weights_in_several_files_are_read_together(tmp_path):
    theirs = reference("gpt2")
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = torch.randint(0, 61, (1, 7))
    torch.testing.assert_close(pretrained.from_folder(tmp_path)(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_a_tied_table_is_one_parameter():
    theirs = reference("gpt2")
    model = pretrained.from_tensors(theirs.state_dict(), theirs.config.to_dict())
    assert model.unembedding.weight is model.embedding.tokens.weight


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_weights_that_do_not_fit_are_refused_by_name(kind):
    theirs = reference(kind)
    weights, config = theirs.state_dict(), theirs.config.to_dict()
    norm = {"gpt2": "transformer.h.1.ln_2.weight", "llama": "model.layers.1.post_attention_layernorm.weight"}[kind]
    with pytest.raises(ValueError, match="ln_2.weight" if kind == "gpt2" else "post_attention_layernorm"):
        pretrained.from_tensors({k: v for k, v in weights.items() if k != norm}, config)
    with pytest.raises(ValueError, match="extra"):
        pretrained.from_tensors(weights | {"transformer.h.0.extra": torch.ones(2)}, config)
    with pytest.raises(ValueError, match=r"\.weight should have shape \(32,\), and has \(31,\)"):
        pretrained.from_tensors(weights | {norm: torch.ones(31)}, config)
    odd = {"gpt2": {"activation_function": "relu"}, "llama": {"hidden_act": "gelu"}}[kind]
    with pytest.raises(ValueError, match="must be"):
        pretrained.from_tensors(weights, config | odd)


def test_folders_that_hold_no_such_model_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        pretrained.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"'bert'; gpt2, llama, .* can be read"):
        pretrained.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GPT2 | {"model_type": "gpt2"}))
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        pretrained.from_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(safetensors.torch.save({"a": torch.ones(3)})[:-4])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        pretrained.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("kind", "odd", "message"),
    [
        ("llama", {"sliding_window": 4096}, "sliding_window must be None to be read here, got 4096"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0 to be read here, got 0.5"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention must be False to be read here, got True"),
    ],
)
def test_what_is_not_built_here_is_not_dropped_without_a_word(kind, odd, message):
    theirs = reference(kind)
    with pytest.raises(ValueError, match=message):
        pretrained.from_tensors(theirs.state_dict(), theirs.config.to_dict() | odd)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_quantised_weights_are_refused(kind, tmp_path):
    theirs = reference(kind)
    name = {"gpt2": "transformer.h.1.mlp.c_proj.weight", "llama": "model.layers.1.mlp.down_proj.weight"}[kind]
    weights = theirs.state_dict()
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.int32):
        with pytest.raises(ValueError, match=f"in {dtype}: quantised weights cannot be read here"):
            pretrained.from_tensors(weights | {name: weights[name].to(dtype)}, theirs.config.to_dict())
    theirs.save_pretrained(tmp_path)
    config = theirs.config.to_dict() | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json says that the weights are quantised \(gptq\)"):
        pretrained.from_folder(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_config_without_a_key_says_which(kind):
    theirs = reference(kind)
    config = theirs.config.to_dict()
    for key in {"gpt2": ("n_layer", "layer_norm_epsilon"), "llama": ("rms_norm_eps", "intermediate_size")}[kind]:
        with pytest.raises(ValueError, match=f"config.json is of another version: it lacks {key}"):
            pretrained.from_tensors(theirs.state_dict(), {k: v for k, v in config.items() if k != key})


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", r"is no JSON object, but \[1\]"), ("{", "is not JSON: "), ("\xff", "is not JSON: ")],
)
def test_a_config_that_is_no_config_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"config.json {message}"):
        pretrained.from_folder(tmp_path)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="no pretrained model 'poems'"):
        pretrained.load("poems")


# --- the model that comes with the library ------------------------------------------------------------------------


def test_the_small_model_is_small_and_whole():
    assert "stories" in pretrained.names()
    assert sum(path.stat().st_size for path in pretrained.folder("stories").iterdir()) < 8_000_000
    model, encoding = pretrained.load()
    assert model.config.vocab_size == encoding.n_vocab
    assert not model.training
    facts, log = pretrained.facts(), pretrained.log()
    losses = {line["step"]: line["val_loss"] for line in log if "val_loss" in line}
    assert facts["val_loss"] == min(losses.values()) == losses[facts["step"]]


def test_it_is_as_sure_of_new_stories_as_their_grammar():
    """Fresh stories, which no training saw: the model's loss is the grammar's own -log p, but for a few per cent."""
    model, encoding = pretrained.load()
    told = stories.stories(24, "fresh stories for a test")
    total, floor, count = 0.0, 0.0, 0
    for story in told:
        tokens = torch.tensor([[encoding.eot_token, *encoding.encode(story), encoding.eot_token]])
        with torch.no_grad():
            loss = nn.functional.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:], reduction="sum")
        total, floor, count = total + loss.item(), floor - stories.log_prob(story), count + tokens.shape[1] - 1
    assert -0.002 < (total - floor) / count < 0.01


def test_it_writes_stories_of_the_grammar():
    model, encoding = pretrained.load()
    rows = generate(
        model, [[encoding.eot_token]] * 6, max_new_tokens=255, temperature=0.8, seed=0, stop_tokens=[encoding.eot_token]
    )
    told = [encoding.decode(row[:-1]) for row in rows]
    assert sum(math.isfinite(stories.log_prob(story)) for story in told) >= 4
