"""The scheduler stepper of chapter 19: who runs in which step, and whose the blocks are."""

from collections.abc import Sequence

from tformer_lib.paged_attention import BlockAllocator, blocks_for
from tformer_lib.serving import Params, Request, Scheduler
from tformer_lib.teaching.widgets import Interactive, module

REQUESTS = ((0, 6, 7), (0, 4, 2), (0, 9, 4), (1, 3, 9), (3, 5, 3), (4, 8, 5))
"""(step of arrival, tokens of the prompt, tokens to write) of requests A to F."""


class SchedulerStepper(Interactive):
    """Choose how requests are scheduled, go from step to step, and see batch slots and blocks change hands."""

    _esm = module("serving.js")


def stepper(
    requests: Sequence[tuple[int, int, int]] = REQUESTS, *, max_num_seqs: int = 3, budget: int = 8, block_size: int = 4
) -> SchedulerStepper:
    """The stepper: the library's scheduler at work on these requests, with plenty of blocks and with few, and a static
    batch beside it."""
    longest = max(prompt + new for _, prompt, new in requests)
    plenty, few = 12, 7
    runs = {
        "static batches": static_run(requests, max_num_seqs, blocks_for(longest, block_size), block_size),
        f"continuous, {plenty} blocks": engine_run(requests, max_num_seqs, budget, plenty, block_size),
        f"continuous, {few} blocks": engine_run(requests, max_num_seqs, budget, few, block_size),
    }
    return SchedulerStepper(
        label="Scheduler stepper: six requests, three batch slots",
        data={"runs": runs, "names": [chr(ord("A") + i) for i in range(len(requests))], "blockSize": block_size},
    )


def engine_run(
    requests: Sequence[tuple[int, int, int]], max_num_seqs: int, budget: int, blocks: int, block_size: int
) -> dict:
    """The steps of the library's scheduler, without a model: every sampled token comes back at once."""
    allocator = BlockAllocator(blocks, block_size)
    scheduler = Scheduler(allocator, max_num_seqs=max_num_seqs, budget=budget, max_blocks=blocks, prefix_cache=False)
    made = [Request(i, [0] * prompt, Params(max_new_tokens=new)) for i, (_, prompt, new) in enumerate(requests)]
    steps: list[dict] = []
    while any(request.finish_reason is None for request in made):
        for request, (arrival, _, _) in zip(made, requests, strict=True):
            if arrival == len(steps):
                scheduler.add(request)
        was = {request.id for request in scheduler.running}
        rows = {row.request.id: row for row in scheduler.plan()}
        states = [state_of(request, rows, len(steps) < requests[request.id][0], request.id in was) for request in made]
        owners = [-1] * blocks
        for request in scheduler.running:
            for block in request.table.blocks:
                owners[block] = request.id
        steps.append({"states": states, "owners": owners, "tokens": sum(row.count for row in rows.values())})
        for row in rows.values():
            if row.samples:
                take_token(row.request, scheduler)
    return {"steps": steps, "budget": budget}


def state_of(request: Request, rows: dict, is_early: bool, was_running: bool) -> list:
    """[what the request does in this step, how many tokens it computes]."""
    if request.finish_reason is not None:
        return ["done", 0]
    if is_early:
        return ["away", 0]
    if request.id in rows:
        row = rows[request.id]
        return ["reads" if row.start < request.prompt_length or row.count > 1 else "writes", row.count]
    return ["preempted" if was_running else "waits", 0]


def take_token(request: Request, scheduler: Scheduler) -> None:
    """The sampled token comes back; the request may end by it."""
    request.pending -= 1
    request.tokens.append(0)
    if len(request.tokens) == request.end:
        request.finish_reason = "length"
        scheduler.remove(request)


def static_run(requests: Sequence[tuple[int, int, int]], max_num_seqs: int, reserved: int, block_size: int) -> dict:
    """The same requests in batches: a batch starts when the one before has ended and its requests are there, reserves
    for each what the longest might need, and goes on until its last request has ended."""
    steps: list[dict] = []
    for first in range(0, len(requests), max_num_seqs):
        batch = range(first, min(first + max_num_seqs, len(requests)))
        while len(steps) < max(requests[i][0] for i in batch):
            steps.append(static_step(requests, batch, None, len(steps), max_num_seqs * reserved, reserved))
        for done in range(max(requests[i][2] for i in batch)):
            steps.append(static_step(requests, batch, done, len(steps), max_num_seqs * reserved, reserved))
    return {"steps": steps, "budget": None}


def static_step(requests: Sequence, batch: range, done: int | None, now: int, blocks: int, reserved: int) -> dict:
    """One step of a static batch whose rows have written ``done`` tokens; None while it waits to begin."""
    states, owners = [], [-1] * blocks
    for i, (arrival, prompt, new) in enumerate(requests):
        if i not in batch or done is None:
            states.append(["done" if i < batch.start else "away" if now < arrival else "waits", 0])
            continue
        owners[(i - batch.start) * reserved : (i - batch.start + 1) * reserved] = [i] * reserved
        states.append(["idle", 1] if done >= new else ["reads", prompt] if done == 0 else ["writes", 1])
    return {"states": states, "owners": owners, "tokens": sum(count for _, count in states)}
