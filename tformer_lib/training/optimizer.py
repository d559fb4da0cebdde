"""The learning rate's schedule, AdamW with its decay groups, and Muon for the matrices.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) is torch's own, ``torch.optim.Muon``. It replaces
the averaged gradient of a matrix by the nearest matrix whose singular values are all about 1: every direction of the
matrix learns at the same pace. That says nothing about tables of embeddings, whose rows are looked up one by one, nor
about vectors, so these stay with AdamW. Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv:2502.16982), gives
the update the size that AdamW's usually has, so that both share a learning rate.
"""

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


def parted_by_mesh(group: dict) -> list[dict]:
    """The group, or several where its parameters are spread over different processes: a fused kernel wants one kind."""
    parts: dict[object, list[nn.Parameter]] = {}
    for p in group["params"]:
        parts.setdefault(getattr(p, "device_mesh", None), []).append(p)
    return [group] if len(parts) < 2 else [{**group, "params": some} for some in parts.values()]


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The config's optimizer; AdamW works in one fused kernel per group on a GPU.

    Returns:
        AdamW over the model's decay groups, or :class:`MuonAndAdamW`. The learning rate of the schedule is multiplied
        by a group's ``factor``, where it has one.
    """
    device = next(model.parameters()).device
    options = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "fused": device.type == "cuda"}
    groups = [part for group in parameter_groups(model, config.weight_decay) for part in parted_by_mesh(group)]
    if config.cuda_graph:  # which reads the rate anew at each replay, so it is a number on the GPU
        options |= {"lr": torch.tensor(config.learning_rate, device=device), "capturable": True}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    return MuonAndAdamW(matrices(model), groups, factor=config.muon_factor, decay=config.weight_decay, **options)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the schedule's rate, times its ``factor`` if it has one; a rate that is a tensor stays it."""
    for group in optimizer.param_groups:
        own = rate * group.get("factor", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of linear maps in the model's blocks: matrices that vectors are multiplied with."""
    linear = (module for module in model.stack.modules() if isinstance(module, nn.Linear))
    return [module.weight for module in linear if module.weight.requires_grad]


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for some matrices and AdamW for all other parameters, as one optimizer with one state.

    Args:
        matrices: what Muon trains.
        groups: AdamW's groups; a matrix of Muon that stands there too is left out.
        factor: Muon's learning rate is so many times ``lr``.
        decay: Muon's weight decay.
        lr, betas, fused: AdamW's.
    """

    def __init__(
        self, matrices: list[nn.Parameter], groups: list[dict], *, factor: float, decay: float, lr, betas, fused
    ):
        taken = set(matrices)
        groups = [{**group, "params": [p for p in group["params"] if p not in taken]} for group in groups]
        muon = {"lr": factor * lr, "weight_decay": decay, "adjust_lr_fn": "match_rms_adamw"}
        self.muon = torch.optim.Muon([{"params": list(matrices), "factor": factor}], **muon)
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
        super().__init__(self.muon.param_groups + self.adamw.param_groups, {"fused": fused})
        self.share_state()

    def share_state(self) -> None:
        """Let both work on this optimizer's groups and state."""
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over the state of another optimizer of the same groups."""
        super().load_state_dict(state_dict)
        self.share_state()

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """A step of both.

        Raises:
            ValueError: a closure is given, which would have to be called by two.
        """
        if closure is not None:
            raise ValueError("MuonAndAdamW takes no closure")
        self.muon.step()
        self.adamw.step()


def state_names(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[str, ...]:
    """What the optimizer keeps of a parameter."""
    muon = isinstance(optimizer, MuonAndAdamW) and any(p is parameter for p in optimizer.muon.param_groups[0]["params"])
    return ("momentum_buffer",) if muon else ("step", "exp_avg", "exp_avg_sq")
