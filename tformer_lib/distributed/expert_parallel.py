"""Expert parallel: each process holds some of the experts of a mixture, and tokens travel to those that they choose.

Every process reads its own tokens and routes them. An all-to-all sends each choice to the process that holds its
expert, the experts work, and a second all-to-all sends what they made back (GShard; Lepikhin et al. 2020,
arXiv:2006.16668). The two carry N k vectors of the width there and as many back: bytes that grow with the tokens and
not with the experts.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_to_all_single

from tformer_lib.contract import counted
from tformer_lib.mixture_of_experts import (
    Experts,
    Routing,
    check_routing,
    grouped_linear,
    mixtures,
    sort_by_expert,
    weighted_sum,
)


def expert_parallel(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Keep in each process 1 / N of the experts of each of a model's mixtures, in place; the outputs stay the same.

    An expert's gradient is then the sum over all processes' tokens, and only its own process has it. Where the loss is
    a mean over processes, it is to be divided by N, and no all-reduce may touch it.

    Args:
        model: with the same weights in every process.
        group: the processes; all of them if not given.

    Returns:
        The model.

    Raises:
        ValueError: if the experts of a mixture do not divide evenly, or a capacity is set, which only one process could
            keep an eye on.
    """
    group = dist.group.WORLD if group is None else group
    for mixture in mixtures(model):
        config = mixture.config
        if config.count % group.size():
            raise ValueError(f"{counted(config.count, 'expert')} cannot be shared by {group.size()} processes evenly")
        if config.capacity_factor is not None:
            raise ValueError("experts with a capacity are not spread over processes: set capacity_factor to None")
        keep_own(mixture.experts, group.rank(), group.size())
        mixture.mix = partial(mix_over_processes, group=group)
    return model


def keep_own(experts: Experts, rank: int, size: int) -> None:
    """Replace the stacked matrices and biases by those of this process's experts."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        mine = parameter.detach().chunk(size)[rank].clone()
        setattr(experts, name, nn.Parameter(mine, requires_grad=parameter.requires_grad))


def mix_over_processes(experts: Experts, x: Tensor, routing: Routing, *, group: dist.ProcessGroup) -> Tensor:
    """What :func:`tformer_lib.mixture_of_experts.mix_grouped` does, with the experts spread over processes.

    Args:
        experts: this process's, E / N of them.
        x: (tokens, width), this process's.
        routing: of these tokens, among all E experts.
        group: the processes, which hold the experts in the order of their ranks.

    Returns:
        (tokens, width).
    """
    check_routing(x, routing, experts, group.size())
    held = len(experts.up)
    order, counts = sort_by_expert(routing.experts, held * group.size())  # (tokens k,), (E,)
    arriving = torch.empty_like(counts)  # from each process, for each of my experts
    dist.all_to_all_single(arriving, counts, group=group)
    leaves, comes = (c.view(group.size(), held).sum(1).tolist() for c in (counts, arriving))
    sent = x[order // routing.experts.shape[1]]  # side by side for each expert, and so for each process
    got = exchanged(sent, leaves, comes, group)  # by process, and within it by expert
    which = torch.arange(held, device=x.device).repeat(group.size()).repeat_interleave(arriving)  # the expert of each
    by_expert = which.argsort(stable=True)
    of_mine = arriving.view(group.size(), held).sum(0)  # (E / N,)
    made = experts(got[by_expert], partial(grouped_linear, of_mine))[by_expert.argsort()]
    back = exchanged(made, comes, leaves, group)
    return weighted_sum(back[order.argsort()], routing)


def exchanged(rows: Tensor, leaves: list[int], comes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send so many rows to each process and take so many from each; gradients go back the same way."""
    out = rows.new_empty(sum(comes), rows.shape[1])
    return all_to_all_single(out, rows.contiguous(), comes, leaves, group=group)
