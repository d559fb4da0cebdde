"""The families of models that can be read: what their config.json says in our words, and what their tensors are called.

A family's ``read`` makes a ``ModelConfig`` of a config's keys, and its ``write`` the keys of a ``ModelConfig``. Its
``links`` say which of the file's tensors hold each of our parameters. All three are facts about the public files and
about the reference code in transformers (Wolf et al., arXiv:1910.03771).
"""

from tformer_lib.pretrained import dense, hybrids, mixtures
from tformer_lib.pretrained.family import LLAMA_NAMES, OUT_NORM_NAMES, Family

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        dense.read_gpt2,
        dense.write_gpt2,
        names=dense.GPT2_NAMES,
        layers="h.",
        special=dense.special_gpt2,
        forgotten=(".attn.bias", ".attn.masked_bias"),
        prefix="transformer.",
    ),
    "llama": Family(dense.read_llama, dense.write_llama),
    "mistral": Family(dense.read_mistral, dense.write_mistral),
    "qwen2": Family(dense.read_qwen2, dense.write_qwen2),
    "qwen3": Family(dense.read_qwen3, dense.write_qwen3),
    "mixtral": Family(mixtures.read_mixtral, mixtures.write_mixtral, special=mixtures.special_mixtral, experts=True),
    "qwen3_moe": Family(
        mixtures.read_qwen3_moe, mixtures.write_qwen3_moe, special=mixtures.special_qwen_moe, experts=True
    ),
    "deepseek_v2": Family(
        mixtures.read_deepseek_v2,
        mixtures.write_deepseek_v2,
        names=mixtures.DEEPSEEK_NAMES,
        special=mixtures.special_deepseek_v2,
        experts=True,
        latent=True,
    ),
    "gpt_oss": Family(mixtures.read_gpt_oss, mixtures.write_gpt_oss, special=mixtures.special_gpt_oss, experts=True),
    "qwen3_next": Family(
        hybrids.read_qwen3_next,
        hybrids.write_qwen3_next,
        names=hybrids.NEXT_NAMES,
        special=hybrids.special_qwen3_next,
        elsewhere=("mtp.",),
        experts=True,
        linear=True,
    ),
    "qwen3_5_text": Family(
        hybrids.read_qwen3_5,
        hybrids.write_qwen3_5,
        special=hybrids.special_qwen3_5,
        elsewhere=("mtp.",),
        linear=True,
    ),
    "qwen3_5": Family(
        hybrids.read_qwen3_5_whole,
        hybrids.write_qwen3_5,
        names=LLAMA_NAMES
        | {"embedding.tokens": "language_model.embed_tokens", "stack.final_norm": "language_model.norm"},
        layers="language_model.layers.",
        special=hybrids.special_qwen3_5,
        prefix="model.",
        elsewhere=("visual.", "mtp."),
        linear=True,
    ),
    "olmo2": Family(dense.read_olmo2, dense.write_olmo2, names=LLAMA_NAMES | OUT_NORM_NAMES),
    "olmo3": Family(dense.read_olmo3, dense.write_olmo3, names=LLAMA_NAMES | OUT_NORM_NAMES),
    "smollm3": Family(dense.read_smollm3, dense.write_smollm3),
    "gemma2": Family(dense.read_gemma2, dense.write_gemma2, names=LLAMA_NAMES | OUT_NORM_NAMES),
    "gemma3_text": Family(dense.read_gemma3, dense.write_gemma3, names=LLAMA_NAMES | OUT_NORM_NAMES),
    "gemma3": Family(
        dense.read_gemma3_whole,
        dense.write_gemma3,
        names=LLAMA_NAMES | OUT_NORM_NAMES,
        prefix="language_model.",
        elsewhere=("vision_tower.", "multi_modal_projector."),
    ),
}
"""By ``model_type``."""
