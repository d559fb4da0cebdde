"""The exercises of the chapter on flash attention for Hopper."""

from collections.abc import Callable, Iterator

from tformer_lib.teaching.exercises.engine import exercise, has_parts, require, require_integer

GROUP_ROWS = 64
"""Rows of one warpgroup's accumulator."""


# --- fragments -----------------------------------------------------------------------------------------------------


@exercise(
    "flash_hopper.mask",
    title="The causal mask in registers",
    hints=(
        "Which row of the 64 does the register belong to? The warp gives 16 w, the lane gives g, the register 0 or 8.",
        "Register 4 j + e is column 8 j + 2 t + e % 2, with lane = 4 g + t; e = 2 and e = 3 are the lower row, g + 8.",
        "The query stands at position first_query + row, the key at first_key + column. Hidden: the key comes later.",
    ),
)
def check_mask(fn):
    for first_query, first_key, columns in ((0, 0, 64), (64, 0, 128), (176, 176, 176), (30, 64, 80), (5, 3, 8)):
        for row in range(GROUP_ROWS):
            for column in range(columns):
                warp, lane, register = holder(row, column)
                found = fn(warp, lane, register, first_query, first_key)
                if found not in (True, False):
                    require(False, f"return True or False; yours is {found!r}")
                hidden = first_key + column > first_query + row
                if bool(found) != hidden:
                    who = f"warp {warp}, lane {lane}, register {register}"
                    what = f"holds row {row}, column {column}: query {first_query + row}, key {first_key + column}"
                    require(False, f"{who} {what}; that score is {'hidden' if hidden else 'seen'}")


def holder(row: int, column: int) -> tuple[int, int, int]:
    """The warp of the warpgroup, its lane, and the register that hold an element of an accumulator of wgmma."""
    within = row % 16
    return row // 16, within % 8 * 4 + column % 8 // 2, 4 * (column // 8) + 2 * (within // 8) + column % 2


# --- descriptors ---------------------------------------------------------------------------------------------------


SWIZZLES = {128: 1, 64: 2, 32: 3}
"""Bytes of a row that the swizzle works on -> the code of a descriptor."""


@exercise(
    "flash_hopper.descriptor",
    title="A descriptor for narrower rows",
    hints=(
        "Three of the fields are in units of 16 bytes: shift bytes to the right by 4 before you place them.",
        "Eight rows follow each other without a gap: the next block of 8 rows is 8 * row_bytes on.",
        "The codes of the swizzle are 1, 2 and 3 for rows of 128, 64 and 32 bytes, in bits 62 and 63.",
    ),
)
def check_descriptor(fn):
    for row_bytes, code in SWIZZLES.items():
        for address in (0, 1024, 5120, 65536 + 256, 200_704):
            found = require_integer(fn(address, row_bytes), "the descriptor")
            require(0 <= found < 1 << 64, f"a descriptor has 64 bits, and yours is {found:#x}")
            what = f"rows of {row_bytes} bytes at address {address:,}"
            wanted = {
                "start address, bits 0 to 13,": (0, 14, address >> 4),
                "leading dimension, bits 16 to 29,": (16, 14, 1),
                "stride, bits 32 to 45,": (32, 14, 8 * row_bytes >> 4),
                "base offset, bits 49 to 51,": (49, 3, 0),
                "swizzle, bits 62 and 63,": (62, 2, code),
            }
            for name, (low, count, right) in wanted.items():
                here = found >> low & ((1 << count) - 1)
                require(here == right, f"{what}: the {name} should be {right}, and is {here}")
            known = sum(right << low for low, _, right in wanted.values())
            require(found == known, f"{what}: a bit outside of the fields is set ({found ^ known:#x})")


# --- barriers ------------------------------------------------------------------------------------------------------


class Barrier:
    """An mbarrier: a phase ends when all arrivals have come."""

    def __init__(self, arrivals: int):
        self.arrivals = self.pending = arrivals
        self.phase = 0

    def arrive(self) -> None:
        """One arrival."""
        self.pending -= 1
        if self.pending == 0:
            self.pending, self.phase = self.arrivals, self.phase + 1

    def passed(self, parity: int) -> bool:
        """Whether a thread that waits for the phase of this parity may go on."""
        return self.phase % 2 != parity


@exercise(
    "flash_hopper.parity",
    title="Two consumers that take turns",
    hints=(
        "Buffer s holds the tiles s, s + stages, s + 2 stages, ...: its phases count these, whoever reads them.",
        "Tile i is the (i // stages)-th tile of its buffer. The full barrier's phases are 0, 1, 2, ... for them.",
        "The producer waits until the tile BEFORE this one has left the buffer: a phase earlier, so the other parity.",
    ),
)
def check_parity(fn):
    for stages in (5, 2, 4, 3):
        for order in ("producer first", "consumer 0 first", "consumer 1 first", "in turns"):
            simulate(fn, stages, 11, order)


def simulate(fn: Callable, stages: int, tiles: int, order: str) -> None:
    """A producer and two consumers, each of which reads every second tile; fails where a wrong tile is read."""
    what = f"{stages} buffers"
    full, empty = [Barrier(1) for _ in range(stages)], [Barrier(1) for _ in range(stages)]
    held = [None] * stages
    read, used = set(), set()

    def place(tile: int) -> tuple[int, int, int]:
        result = fn(tile, stages)
        require(has_parts(result, 3), "return three numbers: buffer and two parities")
        names = ("the buffer", "the parity of full", "the parity of empty")
        result = tuple(require_integer(x, name) for x, name in zip(result, names, strict=True))
        require(0 <= result[0] < stages, f"{what}: tile {tile} cannot go into buffer {result[0]}")
        require(result[1] in (0, 1) and result[2] in (0, 1), f"{what}: a parity is 0 or 1, yours are {result[1:]}")
        return result

    def producer() -> Iterator:
        for tile in range(tiles):
            stage, _, parity = place(tile)
            used.add(stage)
            while not empty[stage].passed(parity):
                yield f"the producer, with tile {tile}, waits for parity {parity} of empty[{stage}]"
            before = held[stage]
            require(before is None, f"{what}: tile {tile} is loaded into buffer {stage} before tile {before} was read")
            held[stage] = tile
            full[stage].arrive()
            yield None

    def consumer(which: int) -> Iterator:
        for tile in range(which, tiles, 2):
            stage, parity, _ = place(tile)
            while not full[stage].passed(parity):
                yield f"consumer {which}, for tile {tile}, waits for parity {parity} of full[{stage}]"
            here = held[stage]
            holds = "nothing" if here is None else f"tile {here}"
            require(here == tile, f"{what}: consumer {which} wants tile {tile} and reads {holds} from buffer {stage}")
            read.add(tile)
            held[stage] = None
            empty[stage].arrive()
            yield None

    agents = [producer(), consumer(0), consumer(1)]
    first = {"producer first": (0, 1, 2), "consumer 0 first": (1, 2, 0), "consumer 1 first": (2, 1, 0)}
    run(agents, first.get(order, (0, 1, 2)), greedy=order in first, what=what)
    require(len(read) == tiles, f"{what}: {len(read)} of {tiles} tiles were read")
    require(
        len(used) == stages, f"{what}: you use {len(used)} of them, and the loads are less far ahead than they could be"
    )


def run(agents: list[Iterator], order: tuple[int, ...], *, greedy: bool, what: str) -> None:
    """Let agents go on, one as far as it can before the next (greedy) or in turns; fails where nobody can."""
    alive = dict(enumerate(agents))
    while alive:
        waits, moved = [], False
        for i in [i for i in order if i in alive]:
            while i in alive:
                try:
                    wait = next(alive[i])
                except StopIteration:
                    del alive[i]
                    moved = True
                    break
                if wait is not None:
                    waits.append(wait)
                    break
                moved = True
                if not greedy:
                    break
        require(moved or not alive, f"{what}: nobody can go on: {waits[0] if waits else ''}")
