"""Who computes what in the next step: blocks and counts, no tensors."""

from bisect import insort
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tformer_lib.paged_attention import BlockAllocator, BlockTable, blocks_for
from tformer_lib.serving.request import Request


class Row(NamedTuple):
    """A request's part of a step: it computes ``count`` tokens from ``start`` on."""

    request: Request
    start: int
    count: int
    samples: bool
    """Whether they reach the end of what is known, so that a new token follows."""
    drafts: tuple[int, ...] = ()
    """Guesses of what follows; they are the last of its tokens."""

    @property
    def asks(self) -> int:
        """How many tokens are chosen for it: its next one, and one after each draft."""
        return 1 + len(self.drafts) if self.samples else 0


POLICIES = ("mixed", "prefill first", "decode first", "longest first")
"""Who is let in, and what a step does where some rows write and others read a prompt, see :class:`Scheduler`."""


class Scheduler:
    """Who computes what in the next step. First come, first served.

    Running requests are in the order of arrival, and all of them came before all that wait. Rows that write take one
    token of the budget each; what is left goes to prompts, in pieces if need be. A request is let in when there are
    blocks for all of its text so far and some to grow; where those that write need more blocks than there are, the
    latest to arrive gives its own back and waits again.

    Two older policies are there to be compared (their names: Agrawal et al. 2024, arXiv:2403.02310). With "prefill
    first" a step reads prompts alone as long as there is one to read, and those that write pause. With "decode first"
    nobody is let in before all who write have ended, so that a batch is one from its beginning to its end.

    "longest first" is for a file of requests that are all there, where only the end of the last one matters (SGLang's
    ``--schedule-policy lof``, longest output first). It trusts ``max_new_tokens``: who may write most is let in first,
    so that few rows are left over at the end, and only as many are let in as will fit until they have ended, so that
    hardly anybody is preempted. Where requests keep coming, one that asks for little may wait for ever.

    Args:
        allocator: the blocks.
        max_num_seqs: the most requests that run at once.
        budget: the most tokens that a step computes.
        max_blocks: the most blocks that a request may hold.
        prefix_cache: whether a prompt's beginning is looked for among the blocks that were computed before.
        spare_blocks: blocks per running request that must stay free when another is let in, so that it is not thrown
            out again soon.
        policy: one of POLICIES.

    Raises:
        ValueError: the budget is too small, or there is no such policy.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        max_num_seqs: int,
        budget: int,
        max_blocks: int,
        prefix_cache: bool = True,
        spare_blocks: float = 0.0,
        policy: str = "mixed",
    ):
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        if max_num_seqs < 1 or budget < max_num_seqs:
            raise ValueError(f"budget must be at least 1 token for each of {max_num_seqs} batch slots, got {budget}")
        self.allocator, self.budget, self.spare_blocks = allocator, budget, spare_blocks
        self.prefix_cache, self.policy = prefix_cache, policy
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.free_batch_slots = list(range(max_num_seqs - 1, -1, -1))
        # by batch slot; the last one is nobody's
        self.tables = np.zeros((max_num_seqs + 1, max_blocks), dtype=np.int32)
        self.preemptions = 0

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        request.table = BlockTable(self.allocator)
        if self.policy == "longest first":
            insort(self.waiting, request, key=left_to_write)
        else:
            self.waiting.append(request)

    def is_short(self) -> bool:
        """Whether those that write need more blocks for their next token than there are."""
        if len(self.running) <= self.allocator.available:
            return False
        return sum(r.table.slack == 0 and r.wanted == 1 for r in self.running) > self.allocator.available

    def plan(self, drafts: Mapping[Request, Sequence[int]] | None = None) -> list[Row]:
        """The rows of the next step, none if there is nothing to do. Their blocks are taken and counted as computed.

        Args:
            drafts: guesses of what follows some of the texts that are written. They come last: a row is given as many
                as fit into budget and blocks that no other row's next token needs.
        """
        was_short = self.is_short()
        while self.is_short():
            self.preempt()
        is_open = self.policy != "decode first" or all(request.wanted > 1 for request in self.running)
        rows: list[Row] = []
        left = self.budget
        if self.policy == "prefill first" and not was_short:  # else who was preempted would come back at once
            for request in self.running:
                if request.wanted > 1:
                    left -= self._take(request, left, rows)
            self._let_in(left, rows)
            if rows:
                return rows
        for place, request in enumerate(self.running):
            guesses = drafts.get(request, ()) if drafts else ()
            if guesses:
                guesses = guesses[: self._room_for_drafts(place, left)]
            left -= self._take(request, left, rows, tuple(guesses))
        if is_open:
            self._let_in(left, rows)
        return rows

    def _let_in(self, left: int, rows: list[Row]) -> None:
        """Let those that wait run, in their order, while there is budget, a batch slot and room for the next one."""
        while left and self.waiting and self.free_batch_slots and self._admit(self.waiting[0]):
            left -= self._take(self.running[-1], left, rows)

    def _room_for_drafts(self, place: int, left: int) -> int:
        """How many drafts the running request at this place may have, if it and each one after it gets a token."""
        waiting = self.running[place:]
        blocks = self.allocator.available - sum(r.table.slack == 0 and r.wanted == 1 for r in waiting)
        slack = (self.running[place].table.slack or self.allocator.block_size) - 1
        return max(0, min(left - len(waiting), slack + blocks * self.allocator.block_size))

    def _take(self, request: Request, left: int, rows: list[Row], drafts: tuple[int, ...] = ()) -> int:
        """Give a request its part of the step, as far as budget and blocks allow; returns how many tokens it has."""
        table = request.table
        wanted = request.wanted + len(drafts)
        count = min(wanted, left)
        if count > table.slack:
            room = table.slack + self.allocator.available * self.allocator.block_size
            count = min(count, room)
            self._reserve(request, count)
        if count == 0:
            return 0
        rows.append(Row(request, table.length, count, count == wanted, drafts))
        table.length += count
        request.pending += count == wanted
        if self.prefix_cache and table.length // self.allocator.block_size > len(table.prefixes):
            table.publish(request.tokens)
        return count

    def _reserve(self, request: Request, count: int) -> None:
        held = len(request.table.blocks)
        request.table.reserve(count)
        self.tables[request.batch_slot, held : len(request.table.blocks)] = request.table.blocks[held:]

    def _admit(self, request: Request) -> bool:
        """Let the first that waits run, if its text so far would fit; with what a prefix cache has of it."""
        allocator, table = self.allocator, request.table
        found = allocator.match(request.tokens) if self.prefix_cache else []
        alive = sum(allocator.holders[block] > 0 for block in found)  # these cost nothing
        needed = blocks_for(request.known, allocator.block_size) - alive
        if needed > allocator.available - int(self.spare_blocks * len(self.running)):
            return False
        if self.policy == "longest first" and self.running and self._peak(request) > allocator.blocks:
            return False
        self.waiting.popleft()
        self.running.append(request)
        request.batch_slot = self.free_batch_slots.pop()
        request.begun = table.reuse(request.tokens) if found else 0
        request.reused += request.begun
        if found:
            self.tables[request.batch_slot, : len(table.blocks)] = table.blocks
        return True

    def _peak(self, request: Request) -> float:
        """The most blocks, at least, that all who run and this one will ever hold, if each writes all that it may.

        All write one token a step, so the peak is at the end of one of them: those that end later still hold theirs. A
        row's last block counts as full.
        """
        rows = sorted([*self.running, request], key=left_to_write)  # who ends last comes first
        left, known = (np.array(numbers) for numbers in zip(*((-left_to_write(r), r.known) for r in rows), strict=True))
        places = np.arange(1, len(rows) + 1)  # how many are left when each one ends
        tokens = known.cumsum() + left * places
        return (tokens + places * (self.allocator.block_size - 1)).max() / self.allocator.block_size

    def preempt(self) -> None:
        """The latest to arrive gives its blocks back and waits; its tokens stay, their keys are computed again."""
        request = self.running[-1]
        self._leave(request)
        request.preemptions += 1
        self.preemptions += 1
        if self.policy == "longest first":
            insort(self.waiting, request, key=left_to_write)
        else:
            self.waiting.appendleft(request)

    def remove(self, request: Request) -> None:
        """Forget a request that has ended, wherever it stands."""
        if request.batch_slot < 0:
            self.waiting.remove(request)
        else:
            self._leave(request)

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        request.table.free()
        self.free_batch_slots.append(request.batch_slot)
        request.batch_slot = -1


def left_to_write(request: Request) -> int:
    """How many tokens a request may still write, negative: the order of those that wait if the longest is first."""
    return request.known - request.end
