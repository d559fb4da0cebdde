"""Tensor parallel: each matrix is cut, and every process multiplies with its piece (Megatron-LM; Shoeybi et al. 2019).

With ``torch.distributed.tensor``: the matrices that make queries, keys and values, and those that lead into the
feed-forward, are cut by columns of the map (each process has some heads, some inner units); the matrices that lead out
of both are cut by rows, so that each process has a partial sum of the result, and one all-reduce adds them. That is two
all-reduces a block, forward, and two backward. The vocabulary is cut too, for the embedding and for the logits.

Sequence parallel (Korthikanti et al. 2022, arXiv:2205.05198) splits each all-reduce into a reduce-scatter and an
all-gather: in between, where norms and residual sums work on each token alone, a process holds only its share of the
tokens. The bytes sent are the same, the activations held there are 1/N.
"""

from dataclasses import replace

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tformer_lib.transformer import Decoder

WHOLE, TOKENS, LAST = Replicate(), Shard(1), Shard(-1)
"""How (batch, T, features) lies: all in every process, cut along the tokens, cut along the features."""


def tensor_parallel(model: Decoder, mesh: DeviceMesh, *, sequence: bool = False, gather_logits: bool = True) -> Decoder:
    """Cut a ``Decoder`` for the processes of a mesh, in place: the same logits, and gradients of each process's pieces.

    Afterwards ``model.config`` says what this process computes: its share of the heads and of the feed-forward. So a KV
    cache made for the model holds this process's kv heads.

    Args:
        model: with the same weights in every process.
        mesh: of one dimension.
        sequence: sequence parallel too. T must then be a multiple of the processes.
        gather_logits: hand out whole logits; else a ``DTensor`` whose vocabulary is cut, for the loss under
            ``torch.distributed.tensor.parallel.loss_parallel()``.

    Returns:
        The model.

    A vocabulary that does not divide evenly stays whole in every process, where the rest of the scheme allows it.

    Raises:
        ValueError: if heads, kv_heads or the feed-forward do not divide evenly; or the vocabulary, with ``sequence`` or
            without ``gather_logits``.
    """
    cut_vocabulary = sequence or not gather_logits or model.config.vocab_size % mesh.size() == 0
    check_divides(model, mesh.size(), cut_vocabulary)
    learned = model.config.positions == "learned"
    between = TOKENS if sequence else WHOLE
    embedded = RowwiseParallel(input_layouts=WHOLE, output_layouts=WHOLE if learned else between)
    logits = ColwiseParallel(
        input_layouts=between, output_layouts=WHOLE if gather_logits else LAST, use_local_output=gather_logits
    )
    tied = model.unembedding.weight is model.embedding.tokens.weight
    if cut_vocabulary:
        parallelize_module(model, mesh, {"embedding.tokens": embedded, "unembedding": logits})
    if tied:
        model.unembedding.weight = model.embedding.tokens.weight
    if learned and cut_vocabulary:
        cut_positions(model, mesh, sequence)
    for block in model.stack.blocks:
        parallelize_module(block, mesh, block_plan(block, sequence))
        block.attention.heads //= mesh.size()
        block.attention.kv_heads //= mesh.size()
    if sequence:
        parallelize_module(model.stack, mesh, {"final_norm": SequenceParallel()})
    model.config = local_config(model, mesh.size())
    return model


def block_plan(block: nn.Module, sequence: bool) -> dict:
    """What is done to each part of a block."""
    into, out_of = ColwiseParallel(), RowwiseParallel(output_layouts=TOKENS if sequence else WHOLE)
    plan = {f"attention.{name}": into for name in ("q_proj", "k_proj", "v_proj")}
    plan |= {"attention.out_proj": out_of, "feed_forward.up": into, "feed_forward.down": out_of}
    if block.feed_forward.gate is not None:
        plan["feed_forward.gate"] = into
    if sequence:
        gather = PrepareModuleInput(input_layouts=TOKENS, desired_input_layouts=WHOLE, use_local_output=True)
        plan |= {"attention_norm": SequenceParallel(), "feed_forward_norm": SequenceParallel()}
        plan |= {"attention": gather, "feed_forward": gather}
    return plan


def cut_positions(model: Decoder, mesh: DeviceMesh, sequence: bool) -> None:
    """Keep the table of learned positions in every process, and cut what the embedding hands on along the tokens."""
    distribute_module(
        model.embedding.places.table,
        mesh,
        input_fn=lambda module, inputs, mesh: tuple(DTensor.from_local(x, mesh, [WHOLE]) for x in inputs),
        output_fn=lambda module, output, mesh: output.to_local(),
    )
    if sequence:
        plan = PrepareModuleOutput(output_layouts=WHOLE, desired_output_layouts=TOKENS, use_local_output=True)
        parallelize_module(model, mesh, {"embedding": plan})


def check_divides(model: Decoder, size: int, cut_vocabulary: bool) -> None:
    """Refuse a model whose pieces would not be equal."""
    config = model.config
    counts = {"heads": config.heads, "kv_heads": config.number_of_kv_heads}
    counts |= {"feed_forward_width": config.size_of_feed_forward}
    counts |= {"vocab_size": config.vocab_size} if cut_vocabulary else {}
    for name, count in counts.items():
        if count % size:
            raise ValueError(f"{name} {count} cannot be cut into {size} equal pieces")


def local_config(model: Decoder, size: int):
    """The config of one process's pieces: fewer heads of the same size, a narrower feed-forward."""
    config = model.config
    return replace(
        config,
        heads=config.heads // size,
        kv_heads=config.number_of_kv_heads // size,
        head_dim=config.size_of_head,
        feed_forward_width=config.size_of_feed_forward // size,
    )
