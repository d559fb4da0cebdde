"""Data parallel training: every process reads its share of the batch, and the gradients are averaged.

Two schemes, both torch's own:

- ``ddp`` (DistributedDataParallel; Li et al. 2020, arXiv:2006.15704): every process holds the whole model, its
  gradients and its optimizer's state. Gradients are all-reduced in buckets while the backward pass still runs.
- ``fsdp`` (``fully_shard``, FSDP2; Zhao et al. 2023, arXiv:2304.11277; ZeRO stage 3, Rajbhandari et al. 2020,
  arXiv:1910.02054): every process holds 1/N of each parameter, gradient and optimizer state. A block's weights are
  gathered just before they are used and freed after; its gradients are reduced and scattered.
"""

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tformer_lib.distributed.processes import world

SCHEMES = ("ddp", "fsdp")
SYNC_BUFFERS = "forward_sync_buffers"
if SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:  # torch before 2.13
    SYNC_BUFFERS = "broadcast_buffers"


def data_parallel(model: nn.Module, scheme: str = "ddp", mesh: DeviceMesh | None = None) -> nn.Module:
    """The model as a data parallel run calls it: forward as ever, and gradients that are the mean over the processes.

    The optimizer is to be made afterwards: ``fsdp`` replaces the model's parameters.

    Args:
        model: a ``Decoder``, on this process's device, with the same weights in every process. ``ddp`` leaves it as it
            is; ``fsdp`` changes it in place.
        scheme: "ddp" or "fsdp".
        mesh: the processes to share with; all of them if not given.

    Returns:
        What to call: the wrapper of ``ddp``, or the model itself for ``fsdp`` and in a world of one process.

    Raises:
        ValueError: if there is no such scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"parallel must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    device = next(model.parameters()).device
    if mesh is None and world().size == 1:
        return model
    if scheme == "ddp":
        options = {} if device.type == "cpu" else {"device_ids": [device.index]}
        options |= {} if mesh is None else {"process_group": mesh.get_group()}
        # Gradients are views of the buckets: one copy less, in memory and in time. Buffers are each process's own.
        options |= {"gradient_as_bucket_view": True, SYNC_BUFFERS: False}
        return DistributedDataParallel(model, **options)
    return shard(model, mesh or init_device_mesh(device.type, (world().size,), mesh_dim_names=("data",)))


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2 of a ``Decoder``: each block is gathered and freed as one, embeddings and the rest as another."""
    untrained = {p for p in model.parameters() if not p.requires_grad}  # what no gradient reaches stays whole
    for block in model.stack.blocks:
        fully_shard(block, mesh=mesh, ignored_params=untrained)
    return fully_shard(model, mesh=mesh, ignored_params=untrained)


def announce_piece(network: nn.Module, last: bool) -> None:
    """Say before the forward of each micro-batch whether it is a step's last: only then DDP's gradients travel.

    Those of FSDP travel with each micro-batch, for to add them up before would take the memory that FSDP saves.
    """
    if isinstance(network, DistributedDataParallel):
        network.require_backward_grad_sync = last  # what network.no_sync() sets


def free_gathered(network: nn.Module) -> None:
    """Let each process hold only its part of the weights again: FSDP keeps some whole until a backward pass."""
    if isinstance(network, FSDPModule):
        network.reshard()


def compile_loss(network: nn.Module, loss: Callable, head: Callable) -> Callable:
    """The loss of (network, inputs, targets), compiled: as a whole in one process, block by block in several.

    FSDP gathers and frees weights around each block, where a compiler may not look. And a whole backward pass in one
    piece would hand over all its gradients at its end, so that DDP could hide none of their way.

    Args:
        network: what :func:`data_parallel` returned.
        loss: (network, inputs, targets, head) to the loss.
        head: (logits, targets) to the loss, what ``loss`` takes if it is given none.
    """
    spread = any(isinstance(p, DTensor) for p in network.parameters())
    if not spread and not isinstance(network, FSDPModule | DistributedDataParallel):
        return torch.compile(loss)
    model = network.module if isinstance(network, DistributedDataParallel) else network
    for block in model.stack.blocks:
        block.compile()
    return partial(loss, head=torch.compile(head))


def own(x: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory: all of it where it is not spread."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """A tensor with all its parts, gathered from the processes where they are spread (all must ask)."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_weights(model: nn.Module, view: Callable[[str, Tensor], Tensor] = lambda name, x: x) -> dict[str, Tensor]:
    """The parameters by name, each whole.

    Args:
        model: whose parameters.
        view: what stands for a parameter of that name where one process holds a part of it.
    """
    return {name: whole(view(name, p.detach())) for name, p in model.named_parameters()}


@torch.no_grad()
def copy_whole(target: Tensor, x: Tensor) -> None:
    """Copy a whole tensor, which every process has, into one that may be spread over them."""
    if isinstance(target, DTensor) and not isinstance(x, DTensor):
        x = distribute_tensor(x.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(x)
