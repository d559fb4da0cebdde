"""The memory calculator of chapter 10: what a model's KV cache takes, and what fits on which GPUs."""

from dataclasses import dataclass

from tformer_lib.kv_cache import CacheShape
from tformer_lib.teaching.widgets import Interactive, module


@dataclass(frozen=True)
class Model:
    """What the calculator must know of a model, as its authors published it.

    With multi-head latent attention, ``latent`` numbers are cached for each token and layer, the rotated key included,
    and they are one entry for all heads: ``kv_heads`` is 1.
    """

    name: str
    parameters: float
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    latent: int = 0


MODELS = (
    Model("the stories model", 1.87e6, 4, 192, 8, 8, 32),
    Model("GPT-2 (124M)", 124e6, 12, 768, 12, 12, 64),
    Model("Qwen2.5 0.5B", 0.494e9, 24, 896, 14, 2, 64),
    Model("Llama 2 7B", 6.74e9, 32, 4096, 32, 32, 128),
    Model("Llama 3 8B", 8.03e9, 32, 4096, 32, 8, 128),
    Model("Llama 3 70B", 70.6e9, 80, 8192, 64, 8, 128),
    Model("GPT-3 (175B)", 175e9, 96, 12288, 96, 96, 128),
    Model("DeepSeek-V2 (236B, MLA)", 236e9, 60, 5120, 128, 1, 128, latent=512 + 64),
    Model("DeepSeek-V3 (671B, MLA)", 671e9, 61, 7168, 128, 1, 128, latent=512 + 64),
)

GPUS = (
    ("RTX 4060, 8 GB", 8e9, 0.272e12),
    ("RTX 4090, 24 GB", 24e9, 1.008e12),
    ("A100, 80 GB", 80e9, 2.039e12),
    ("H100, 80 GB", 80e9, 3.35e12),
    ("H200, 141 GB", 141e9, 4.8e12),
)
"""Name, bytes of memory, bytes per second, as the data sheets have them."""


class MemoryCalculator(Interactive):
    """Choose a model, its kv heads, a context, a batch and GPUs, and read what the cache takes on each of them."""

    _esm = module("grouped_query_attention.js")


def memory_calculator(model: str = "Llama 3 8B", gpu: str = "H100, 80 GB") -> MemoryCalculator:
    """The calculator, opened at this model and this GPU."""
    return MemoryCalculator(
        label="Memory calculator: what the KV cache takes",
        data={
            "models": [facts(m) for m in MODELS],
            "gpus": [{"name": name, "bytes": size, "rate": rate} for name, size, rate in GPUS],
            "model": [m.name for m in MODELS].index(model),
            "gpu": [name for name, *_ in GPUS].index(gpu),
        },
    )


def facts(model: Model) -> dict:
    """A model as JSON; each choice is (kv heads, numbers cached per token, parameters with so many kv heads).

    A model with a latent has one choice.
    """
    if model.latent:
        choices = [[1, model.layers * model.latent, model.parameters]]
        return {"name": model.name, "heads": model.heads, "own": 1, "latent": True, "choices": choices}
    choices = []
    for kv_heads in (n for n in range(1, model.heads + 1) if model.heads % n == 0):
        numbers = CacheShape(model.layers, 1, kv_heads, model.head_dim).bytes_per_token // 4  # of float32
        projections = 2 * model.layers * model.width * model.head_dim * (kv_heads - model.kv_heads)
        choices.append([kv_heads, numbers, model.parameters + projections])
    return {"name": model.name, "heads": model.heads, "own": model.kv_heads, "latent": False, "choices": choices}
