"""How a run's processes are laid out: which of them share a batch, a window of text, each matrix, or the experts.

N processes are N / (context x tensor) groups that read different windows of a batch. In such a group, ``context``
processes cut each window along its tokens (ring attention), and for each part of it ``tensor`` processes cut each
matrix. Neighbouring ranks share matrices, for they have the most to say to each other, then come those that share a
window. So a machine's own links carry what is sent most often. Processes that hold the same pieces of matrices are
replicas: they average gradients, by DDP or by FSDP. With ``experts``, all processes read different windows and share
the experts.
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from tformer_lib.attention import MultiHeadAttention
from tformer_lib.distributed.context_parallel import own_part, positions_of, ring_attend, zigzag
from tformer_lib.distributed.data_parallel import data_parallel, own, whole
from tformer_lib.distributed.expert_parallel import expert_parallel
from tformer_lib.distributed.processes import World
from tformer_lib.distributed.tensor_parallel import tensor_parallel
from tformer_lib.mixture_of_experts import mixtures


class Layout:
    """The processes of a run, by what they share.

    Args:
        world: of all of them.
        scheme: how replicas are trained: "ddp" or "fsdp".
        context: processes that cut a window.
        tensor: processes that cut a matrix.
        experts: whether all processes share the experts of a mixture.

    Raises:
        ValueError: if the processes cannot be laid out so.
    """

    def __init__(self, world: World, *, scheme: str = "ddp", context: int = 1, tensor: int = 1, experts: bool = False):
        self.world, self.scheme, self.context, self.tensor = world, scheme, context, tensor
        self.experts = experts and world.size > 1
        if world.size % (context * tensor):
            raise ValueError(
                f"world size {world.size} is no multiple of context_parallel {context} x tensor_parallel {tensor}"
            )
        self.replicas = world.size // tensor
        self.readers = self.replicas // context
        """Groups of processes that read different windows."""
        if self.experts and (context * tensor > 1 or scheme != "ddp"):
            raise ValueError("expert_parallel goes with parallel ddp, without context_parallel or tensor_parallel")
        if tensor > 1 and self.replicas > 1 and scheme != "fsdp":
            raise ValueError(
                f"tensor_parallel {tensor} leaves {self.replicas} replicas of each piece, which need parallel fsdp"
            )
        self.cut: CutWindows | None = None
        self.own_experts: set[str] = set()
        self.expert_mesh = None

    @property
    def replica(self) -> int:
        """This process's number among those that hold the same pieces; it says which tokens it reads."""
        return self.world.rank // self.tensor

    def share(self, count: int, what: str) -> slice:
        """Which of ``count`` equal things this process reads: what its group of readers takes."""
        return World(self.replica // self.context, self.readers).share(count, what)

    def spread(self, model: nn.Module, length: int) -> nn.Module:
        """Cut a ``Decoder`` for these processes, in place, and return what a step is to call.

        Args:
            model: with the same weights in every process.
            length: tokens of a window.

        Raises:
            ValueError: if the model or the window cannot be cut so.
        """
        device = next(model.parameters()).device.type
        if self.context > 1:
            if length % (2 * self.context):
                raise ValueError(f"a context of length {length} cannot be cut into {2 * self.context} equal chunks")
            self.cut = CutWindows(model, length, self.context_group(), self.replica % self.context)
        if self.experts:
            self.keep_own_experts(model, device)
            return data_parallel(model, self.scheme)
        if self.tensor == 1:
            return data_parallel(model, self.scheme)
        if model.config.experts is not None or "linear" in model.config.types_of_layers or model.config.latent:
            raise ValueError("tensor_parallel cuts dense layers alone: no experts, linear layers or latent attention")
        mesh = init_device_mesh(device, (self.replicas, self.tensor), mesh_dim_names=("replicas", "tensor"))
        tensor_parallel(model, mesh["tensor"])
        return model if self.replicas == 1 else data_parallel(model, self.scheme, mesh["replicas"])

    def context_group(self) -> dist.ProcessGroup:
        """The processes that share this one's window and hold the same pieces of matrices: a ring."""
        mine = None
        for reader in range(self.readers):
            for piece in range(self.tensor):
                first = reader * self.context * self.tensor + piece
                ranks = list(range(first, first + self.context * self.tensor, self.tensor))
                group = dist.new_group(ranks)
                mine = group if self.world.rank in ranks else mine
        return mine

    def keep_own_experts(self, model: nn.Module, device: str) -> None:
        """Keep this process's share of the experts, whose gradients DDP then leaves alone."""
        if not mixtures(model):
            raise ValueError("expert_parallel needs a model with experts")
        expert_parallel(model)
        experts = {id(p) for mixture in mixtures(model) for p in mixture.experts.parameters()}
        self.own_experts = {name for name, p in model.named_parameters() if id(p) in experts}
        self.expert_mesh = init_device_mesh(device, (self.world.size,), mesh_dim_names=("experts",))
        model._ddp_params_and_buffers_to_ignore = list(self.own_experts)  # where DistributedDataParallel looks

    def part(self, windows: Tensor) -> Tensor:
        """This process's tokens of windows (batch, context)."""
        return windows if self.cut is None else own_part(windows, self.cut.spans, 1)

    @contextlib.contextmanager
    def whole_windows(self) -> Iterator[None]:
        """Let every process read whole texts by itself meanwhile, to write one."""
        with contextlib.nullcontext() if self.cut is None else self.cut.paused():
            yield

    def whole_view(self, name: str, x: Tensor) -> Tensor:
        """A parameter, or what is kept of it, as a checkpoint sees it: experts here are a part of all experts."""
        if name in self.own_experts and x.dim():
            return DTensor.from_local(x, self.expert_mesh, [Shard(0)], run_check=False)
        return x

    def clip_gradients(self, model: nn.Module, longest: float) -> Tensor:
        """Scale the gradients of all processes' pieces down to a norm over all of them, which is returned.

        An expert's gradient is made that of the mean over the processes first.
        """
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        mine = [x for name, x in named.items() if name in self.own_experts]
        for x in mine:
            x.div_(self.world.size)
        if self.tensor == 1 and not self.experts:
            return nn.utils.clip_grad_norm_(model.parameters(), longest)
        squares = [self.world.sum(sum(x.square().sum() for x in mine))] if mine else []
        spread: dict[object, list[Tensor]] = {}  # by the processes; in the same order in all of them
        for name, x in named.items():
            if name not in self.own_experts:
                spread.setdefault(getattr(x, "device_mesh", None), []).append(x)
        squares += [whole(nn.utils.get_total_norm(some)).square() for some in spread.values()]
        norm = torch.stack(squares).sum().sqrt()
        scale = (longest / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([own(x) for x in named.values()], scale)
        return norm


class CutWindows:
    """A model that reads its process's part of each window, and attends round the ring to the others'.

    Args:
        model: a ``Decoder`` with full attention.
        length: tokens of a whole window.
        group: the ring.
        place: this process's place in it.

    Raises:
        ValueError: if a layer's attention is of a kind that the ring does not have.
    """

    def __init__(self, model: nn.Module, length: int, group: dist.ProcessGroup, place: int):
        layout = zigzag(length, group.size())
        self.model, self.spans = model, layout[place]
        self.positions = positions_of(self.spans, next(model.parameters()).device)
        self.layers = [block.attention for block in model.stack.blocks]
        if any(type(x) is not MultiHeadAttention or x.variant is not None for x in self.layers):
            raise ValueError("context_parallel has full attention alone: no windows, soft caps, sinks or linear layers")
        self.alone, self.ring = [x.attend for x in self.layers], ring_attend(layout, group)
        self.begin()

    def begin(self) -> None:
        """Attend round the ring, with the positions of this process's tokens."""
        for layer in self.layers:
            layer.attend = self.ring
        place = partial(add_positions, self.positions)
        self.hook = self.model.register_forward_pre_hook(place, with_kwargs=True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The model as it was."""
        self.hook.remove()
        for layer, attend in zip(self.layers, self.alone, strict=True):
            layer.attend = attend
        try:
            yield
        finally:
            self.begin()


def add_positions(positions: Tensor, model: nn.Module, args: tuple, options: dict) -> tuple[tuple, dict]:
    """What a forward pass is called with, and the places of its tokens."""
    return args, {**options, "positions": positions}
