"""Small checkpoints with a tokenizer and a chat template, laid out as the hub does it."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

CHATML = """{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant"] %}
        {{- raise_exception("no role " + message.role) }}
    {%- endif %}
    {{- "<|im_start|>" + message.role + "\n" + message.content | trim + "<|im_end|>\n" }}
{%- endfor %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- for x in [1, 2, 3] %}{%- if x == 2 %}{%- break %}{%- endif %}{{- bos_token }}{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n" }}{%- endif %}"""

TURNS = """{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n" }}{%- endif %}"""
"""A template that leaves what was said as it was."""


def train_tokenizer(folder: Path, kind: str, template: str = CHATML) -> None:
    """A small tokenizer.json: GPT-2's bytes as characters, or SentencePiece's pieces with bytes to fall back on."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    specials = ["<s>", "<|im_start|>", "<|im_end|>"]
    if kind == "bytes":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", *specials, *bytes_])
    tokenizer.train_from_iterator(["Once upon a time there was a dog, and two spaces and lines."] * 3, trainer)
    if kind != "bytes":  # the trainer made special tokens of the bytes, which they are not
        data = json.loads(tokenizer.to_str())
        data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LINEAR = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "tie_word_embeddings": True,
}
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "windows": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"head_dim": 8, "sliding_window": 16}),
    "linear": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", LINEAR),
}
"""What transformers calls a family, and what is asked for besides :data:`SHAPE`."""


def save_chat_model(folder: Path, family: str = "llama", template: str = TURNS) -> None:
    """A model of transformers with random weights, a tokenizer and a chat template, saved by transformers."""
    transformers = pytest.importorskip("transformers")
    train_tokenizer(folder, "bytes", template)
    config, model, changes = FAMILIES[family]
    config = getattr(transformers, config)(**SHAPE | {"vocab_size": 420} | changes)
    theirs = getattr(transformers, model)(config)
    torch.manual_seed(len(family))
    for name, parameter in theirs.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    theirs.save_pretrained(folder)
