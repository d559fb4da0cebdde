"""The exercises of the chapter on several devices. Processes are played one after the other: no check starts any."""

import math
from collections.abc import Callable

import torch

from tformer_lib.contract import counted
from tformer_lib.profiling import count
from tformer_lib.teaching.exercises.engine import (
    exercise,
    require,
    require_close,
    require_integer,
    require_number,
    require_tensor,
)


@exercise(
    "scaling_out.send",
    title="A ring all-reduce",
    hints=(
        "In turn 0 each process sends the chunk of its own number. What has just arrived is what it sends next.",
        "What arrives in a turn has the number that the process before has just sent. The number falls by 1.",
        "(rank - turn) % size holds for all 2 (size - 1) turns: after size - 1 of them, finished sums go on.",
    ),
)
def check_send(fn: Callable) -> None:
    for size in (2, 3, 4, 7):
        held = torch.randint(1, 50, (size, size)).double()  # (process, chunk)
        total = held.sum(0)
        for turn in range(2 * (size - 1)):
            sent = [require_integer(fn(rank, turn, size), "the number of a chunk") for rank in range(size)]
            for rank, chunk in enumerate(sent):
                require(
                    0 <= chunk < size,
                    f"process {rank} of {size} sends chunk {chunk} in turn {turn}; there are 0 to {size - 1}",
                )
            values = [held[rank, chunk].item() for rank, chunk in enumerate(sent)]
            for rank, (chunk, value) in enumerate(zip(sent, values, strict=True)):
                after = (rank + 1) % size
                held[after, chunk] = held[after, chunk] + value if turn < size - 1 else value
            if turn == size - 2:
                done = (held == total).sum(0)
                require(
                    done.min() >= 1,
                    f"after {size - 1} turns of {size} processes, no process has the sum of chunk {int(done.argmin())}",
                )
        wrong = (held != total).nonzero().tolist()
        if wrong:
            rank, chunk = wrong[0]
            require(False, f"at the end, process {rank} of {size} does not have the sum of chunk {chunk}")


@exercise(
    "scaling_out.feed_forward",
    title="A feed-forward layer for several devices",
    hints=(
        "The first matrix is cut by columns, so that each process has some of the inner units, whole.",
        "inner = W_up.shape[1] // size; mine = slice(rank * inner, (rank + 1) * inner). W_down has a row a unit.",
        "relu(x @ W_up[:, mine]) @ W_down[mine]: a partial sum, which the all-reduce will add to the others'.",
    ),
)
def check_feed_forward(fn: Callable) -> None:
    for tokens, size, width, inner in ((3, 2, 6, 8), (7, 4, 5, 12), (1, 1, 3, 4)):
        x, up, down = torch.randn(tokens, width), torch.randn(width, inner), torch.randn(inner, width)
        expected, share = torch.relu(x @ up) @ down, inner // size
        parts = []
        for rank in range(size):
            mine = torch.zeros(inner, dtype=torch.bool)
            mine[rank * share : (rank + 1) * share] = True
            own_up, own_down = up.masked_fill(~mine, math.nan), down.masked_fill(~mine[:, None], math.nan)
            with count() as work:
                part = fn(x.clone(), own_up, own_down, rank, size)
            require_tensor(part, "the partial result")
            require(
                tuple(part.shape) == (tokens, width),
                f"process {rank} of {size} should return a partial sum of shape {(tokens, width)}, and it has "
                f"{tuple(part.shape)}",
            )
            require(
                part.isfinite().all(),
                f"process {rank} of {size} touches weights of another process: its own are columns {rank * share} to "
                f"{(rank + 1) * share - 1} of W_up and the same rows of W_down",
            )
            times = work.flops / (4 * tokens * width * share)
            much = f"process {rank} of {size} multiplies {times:.1f} times as much as its part needs"
            require(times < 1.2, f"{much}: cut the matrices before you multiply")
            parts.append(part)
        total = sum(parts)
        if size > 1 and (total - expected).abs().max() > 1e-3:
            again = all((part - expected).abs().max() < 1e-3 for part in parts)
            require(not again, "every process returns the whole result: each should compute its part alone")
        require_close(total, expected, f"the sum over {size} processes is not the layer's result")


@exercise(
    "scaling_out.merge",
    title="Joining two attentions",
    hints=(
        "exp(lse) is the sum of a part's exponentials: its denominator. How large is it beside the other's?",
        "Subtract the larger of the two log-sum-exps before you take exponentials, or large scores overflow.",
        "both = torch.logaddexp(lse_a, lse_b); out = exp(lse_a - both) * out_a + exp(lse_b - both) * out_b",
    ),
)
def check_merge(fn: Callable) -> None:
    for tokens, d, scale, name in ((4, 5, 1.0, "scores"), (4, 5, 2000.0, "large scores"), (1, 7, 1.0, "scores")):
        scores, values = torch.randn(tokens, 9, dtype=torch.float64) * scale, torch.randn(9, d, dtype=torch.float64)
        for cut in (1, 4, 8):
            part = lambda s: (scores[:, s].softmax(-1) @ values[s], scores[:, s].logsumexp(-1))  # noqa: B023, E731
            found = fn(*part(slice(0, cut)), *part(slice(cut, 9)))
            pair = isinstance(found, tuple | list) and len(found) == 2
            require(pair, "return two things: the output and the log-sum-exp over both sets")
            out, lse = found
            require_tensor(out, "the output")
            require_tensor(lse, "the log-sum-exp")
            finite = out.isfinite().all() and lse.isfinite().all()
            require(finite, f"{name}: an exponential overflows: subtract before you take it")
            require_close(out, scores.softmax(-1) @ values, f"{name}: the output is not attention over all keys")
            require_close(lse, scores.logsumexp(-1), f"{name}: the log-sum-exp is not the one over all keys")


@exercise(
    "scaling_out.memory",
    title="What FSDP holds",
    hints=(
        "Weights, gradients and AdamW's two moments are all in float32, and each device holds its share of them.",
        "Besides, a device holds gathered weights: the block that it computes and the one that is on its way.",
        "16 * parameters / devices + 2 * 4 * block, and with one device nothing is gathered.",
    ),
)
def check_memory(fn: Callable) -> None:
    for parameters, block, devices in (
        (8_000_000, 500_000, 2),
        (7_000_000_000, 200_000_000, 64),
        (7_000_000_000, 200_000_000, 8),
        (1_000_000, 100_000, 1),
    ):
        found = require_number(fn(parameters, block, devices), "the number of bytes")
        held = 16 * parameters / devices
        gathered = 8 * block if devices > 1 else 0
        about = f"{parameters:,} parameters with blocks of {block:,} on {counted(devices, 'device')}"
        if devices > 1:
            require(abs(found - held) > 1, f"{about}: the two gathered blocks are missing")
            require(abs(found - 16 * parameters) > 1, f"{about}: that is what each device holds with DDP")
            require(abs(found - (held + 4 * block)) > 1, f"{about}: two blocks are gathered at a time, not one")
        right = held + gathered
        require(abs(found - right) <= 5e-8 * right, f"{about}: {found:,.0f} bytes, expected {right:,.0f}")
