"""The learning rate's schedule, and AdamW with its decay groups."""

import math

import torch
from torch import nn

from tformer_lib.training.config import TrainingConfig

# Schedule and optimizer


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then half a cosine from the peak to the minimum.

    Args:
        step: steps done so far: 0 for the first.
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / (config.warmup + 1)
    if step >= config.steps:
        return config.min_learning_rate
    done = (step - config.warmup) / (config.steps - config.warmup)  # 0 at the peak, 1 at the end
    height = 0.5 * (1 + math.cos(math.pi * done))
    return config.min_learning_rate + height * (config.learning_rate - config.min_learning_rate)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices, which are decayed, and the rest (norms, biases), which are not.

    Decay pulls a weight towards 0. For a matrix that means computing less, which a model can afford where it learns
    nothing; but a norm's gain belongs near 1, and a bias has nothing to overfit with. Embedding tables are matrices,
    and are decayed like the others (as in nanoGPT): a tied one is the output projection too.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the model's decay groups, fused into one kernel per group on a GPU."""
    groups = parameter_groups(model, config.weight_decay)
    fused = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=fused)
