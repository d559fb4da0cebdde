"""The exercises of the chapter on the kernels of flash attention."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import torch
from torch import Tensor

from tformer_lib.contract import counted
from tformer_lib.teaching import kernels
from tformer_lib.teaching.exercises.engine import (
    exercise,
    has_parts,
    in_digits,
    require,
    require_close,
    require_integer,
    require_number,
)

GROUPS = 8
"""Groups of four banks: where a piece of 16 bytes can lie in a line of 128."""


# --- fragments -----------------------------------------------------------------------------------------------------


@exercise(
    "flash_kernels.row_max",
    title="A row's maximum in fragments",
    hints=(
        "Which lanes hold elements of row g? Those with the numbers 4g, 4g + 1, 4g + 2 and 4g + 3.",
        "First inside the lane: the elements 0 and 1 of a fragment are row g, the elements 2 and 3 are row g + 8.",
        "c.unflatten(2, (2, 2)).amax((1, 3)) is (32, 2); then take the maximum with shuffle(.., 1), then (.., 2).",
    ),
)
def check_row_max(fn):
    for fragments in (1, 8, 3):
        S = torch.randn(16, 8 * fragments) - 5.0
        S[3, 1], S[11, 6], S[4, 0] = 7.0, 8.0, -math.inf
        held = fragments_of(S)
        used = []

        def shuffle(x: Tensor, offset: int, used: list = used) -> Tensor:
            used.append(offset)
            require(isinstance(x, Tensor) and x.shape[:1] == (32,), "shuffle takes a tensor with a row for each lane")
            offset = require_integer(offset, "an offset")
            require(0 < offset < 32, f"an offset is 1 to 31, and yours is {offset}")
            return x[torch.arange(32) ^ offset]

        result = fn(held.clone(), shuffle)
        what = f"16 rows in {fragments} fragment{'s' if fragments > 1 else ''}"
        require(isinstance(result, Tensor) and result.shape == (32, 2), f"{what}: return a tensor of shape (32, 2)")
        result = result.detach()
        rows = torch.arange(32) // 4
        wanted = torch.stack((S.amax(1)[rows], S.amax(1)[rows + 8]), 1)
        require(len(used) <= 2, f"{what}: you shuffle {len(used)} times, with offsets {used}; two are enough")
        for lane in range(32):
            for r in range(2):
                row = int(rows[lane]) + 8 * r
                found, right = float(result[lane, r]), float(wanted[lane, r])
                mine, true = in_digits(found, right, ".4f")
                require(found == right, f"{what}: the maximum of row {row} is {true}, and lane {lane} has {mine}")


def fragments_of(S: Tensor) -> Tensor:
    """(16, columns) -> (32, columns / 8, 4): what each lane of a warp holds of it, as mma.sync leaves it."""
    lane = torch.arange(32)
    rows = lane[:, None, None] // 4 + torch.tensor([0, 0, 8, 8])
    columns = 8 * torch.arange(S.shape[1] // 8)[:, None] + 2 * (lane[:, None, None] % 4) + torch.tensor([0, 1, 0, 1])
    return S[rows, columns]


@exercise(
    "flash_kernels.ldmatrix",
    title="Addresses for ldmatrix",
    hints=(
        "Matrix r becomes register r. Registers 0 and 1 of A are its columns 0 to 7, so rows 0 to 7 of the tile.",
        "Register 1 is rows 8 to 15 of A: columns 8 to 15 of the tile, piece 1. Lanes 8 to 15 name its rows.",
        "Lanes 0-7: rows 0-7, piece 0. Lanes 8-15: rows 0-7, piece 1. Lanes 16-23: rows 8-15, piece 0. Then piece 1.",
    ),
)
def check_ldmatrix(fn):
    A = torch.arange(256).reshape(16, 16)
    named = [fn(lane) for lane in range(32)]
    for lane, pair in enumerate(named):
        require(has_parts(pair, 2), f"lane {lane}: return two numbers, row and piece")
        pair = named[lane] = [
            require_integer(x, f"the {name} of lane {lane}") for x, name in zip(pair, ("row", "piece"), strict=True)
        ]
        require(0 <= pair[0] < 16 and 0 <= pair[1] < 2, f"lane {lane}: the tile has no row {pair[0]}, piece {pair[1]}")
    for lane in range(32):
        g, t = divmod(lane, 4)
        for register in range(4):
            found = transposed_load(A.T, named, register, lane)
            top, left = g + 8 * (register % 2), 2 * t + 8 * (register // 2)
            wanted = A[top, left : left + 2].tolist()
            here = f"register {register} of lane {lane} should hold row {top}, columns {left} and {left + 1} of A"
            row, column = divmod(found[0], 16)
            require(found == wanted, f"{here}; its first number is row {row}, column {column}")


def transposed_load(tile: Tensor, named: list, register: int, lane: int) -> list[int]:
    """What ldmatrix.trans leaves in a register of a lane, when each lane has named (row, piece) of the tile."""
    g, t = divmod(lane, 4)
    rows = [named[8 * register + 2 * t + i] for i in range(2)]
    return [int(tile[row, 8 * piece + g]) for row, piece in rows]


# --- swizzle -------------------------------------------------------------------------------------------------------


@exercise(
    "flash_kernels.swizzle",
    title="A swizzle for rows of any width",
    hints=(
        "The bank group of a place is place % 8. A row of 8 pieces begins at group 0 each time: XOR with row % 8.",
        "With rows of 4 pieces, two rows share a line of 128 bytes: rows 0 and 1 differ already, rows 0 and 2 do not.",
        "XOR the chunk with (row * chunks // 8) % min(chunks, 8) when a row is at most a line, else with row % 8.",
    ),
)
def check_swizzle(fn):
    for chunks in (8, 16, 32, 4, 2):
        places = [
            [require_integer(fn(row, chunk, chunks), "the place") for chunk in range(chunks)] for row in range(32)
        ]
        rows = f"rows of {chunks} pieces"
        for row, found in enumerate(places):
            own = set(range(row * chunks, (row + 1) * chunks))
            strange = sorted(set(found) - own)
            require(not strange, f"{rows}: row {row} owns the places {min(own)} to {max(own)}, and uses {strange[:1]}")
            require(len(set(found)) == chunks, f"{rows}: two pieces of row {row} share a place")
        for top in range(0, 32, 8):
            for chunk in range(chunks):
                turns = turns_of([places[row][chunk] for row in range(top, top + 8)])
                what = f"{rows}: piece {chunk} of rows {top} to {top + 7}"
                require(turns == 1, f"{what} takes {turns} turns: bank groups are shared")


def turns_of(places: list[int]) -> int:
    """How often the busiest group of banks is read."""
    groups = [place % GROUPS for place in places]
    return max(groups.count(group) for group in groups)


# --- occupancy -----------------------------------------------------------------------------------------------------


LAUNCHES = {  # (threads, registers, shared bytes): blocks. The first ten are the steps, as the driver told on an H200
    (256, 37, 0): 6,
    (256, 40, 0): 6,
    (256, 60, 0): 4,
    (256, 128, 52224): 2,
    (256, 128, 84992): 2,
    (128, 168, 71168): 3,
    (128, 255, 81920): 2,
    (128, 255, 98304): 2,
    (384, 168, 214096): 1,
    (512, 128, 91216): 1,
    (32, 16, 0): 32,
    (1024, 64, 0): 1,
    (128, 32, 116736): 1,
    (64, 32, 1): 32,
    (256, 33, 0): 6,
    (1024, 16, 0): 2,
    (512, 16, 0): 4,
    (128, 32, 115712): 2,
    (128, 32, 115713): 1,
    (768, 16, 0): 2,
    (192, 16, 0): 10,
}


@exercise(
    "flash_kernels.occupancy",
    title="Blocks that fit on an SM",
    hints=(
        "Three things run out: 65,536 registers, 233,472 bytes of shared memory, 2,048 threads. The cap is 32.",
        "A warp's registers are handed out in portions of 256: round registers * 32 up to the next one, for each warp.",
        "Each block takes 1,024 bytes of shared memory for the system, beside its own: shared_bytes + 1024.",
    ),
)
def check_occupancy(fn):
    for (threads, registers, shared_bytes), blocks in LAUNCHES.items():
        found = require_integer(fn(threads, registers, shared_bytes), "the number of blocks")
        launch = f"{threads} threads of {registers} registers, {shared_bytes:,} bytes"
        require(found == blocks, f"{launch}: room for {counted(blocks, 'block')}, and you say {found}")


# --- roofline ------------------------------------------------------------------------------------------------------


@exercise(
    "flash_kernels.limit",
    title="Which limit binds",
    hints=(
        "Operations: 4 * rows * keys * d. Bytes: K and V once, q in and out once, each number of element_bytes.",
        "The memory allows intensity * bandwidth operations a second. The arithmetic units allow `flops`.",
        "return operations / moved, min(flops, operations / moved * bandwidth)",
    ),
)
def check_limit(fn):
    cases = ((128, 4096, 128, 2), (1, 4096, 128, 2), (8, 1024, 64, 2), (64, 64, 64, 4), (1, 1, 8, 4))
    for rows, keys, d, element_bytes in cases:
        for flops, bandwidth in ((6.9e14, 4.3e12), (1.2e11, 2.0e10)):
            result = fn(rows, keys, d, element_bytes, flops, bandwidth)
            require(has_parts(result, 2), "return two numbers: the intensity, the rate")
            what = f"{rows} queries, {keys} keys, d {d}, {element_bytes} bytes a number"
            result = [require_number(x, f"the {name}") for x, name in zip(result, ("intensity", "rate"), strict=True)]
            intensity = 4 * rows * keys * d / ((2 * keys + 2 * rows) * d * element_bytes)
            mine, right = in_digits(result[0], intensity)
            require(close(result[0], intensity), f"{what}: {right} operations a byte, and you say {mine}")
            rate = min(flops, intensity * bandwidth)
            said = f"{what}, {flops:.3g} operations and {bandwidth:.3g} bytes a second"
            mine, right = in_digits(result[1], rate)
            require(close(result[1], rate), f"{said}: {right} operations a second, and you say {mine}")


def close(found: float, wanted: float) -> bool:
    """Equal to six digits."""
    return math.isclose(found, wanted, rel_tol=1e-6)


# --- order of tiles ------------------------------------------------------------------------------------------------


@exercise(
    "flash_kernels.order",
    title="An order for causal tiles",
    hints=(
        "Tile i has i + 1 tiles of keys. In which order should the tiles be handed out, so that the end is even?",
        "Longest first: the tile of place p is tiles - 1 - p // heads. A block takes places block, block + blocks, ...",
        "Every second round goes backwards: in odd rounds block b takes place round * blocks + blocks - 1 - b.",
    ),
)
def check_order(fn):
    for blocks, heads, tiles in ((4, 1, 8), (4, 2, 8), (3, 4, 7), (8, 1, 3), (132, 16, 128)):
        what = f"{counted(blocks, 'block')}, {counted(heads, 'head')} of {counted(tiles, 'tile')}"
        taken = [list(fn(block, blocks, heads, tiles)) for block in range(blocks)]
        for block, work in enumerate(taken):
            pairs = all(has_parts(w, 2) for w in work)
            require(pairs, f"{what}: block {block} should list pairs (head, tile)")
        taken = [[(require_integer(h, "a head"), require_integer(t, "a tile")) for h, t in work] for work in taken]
        every = [w for work in taken for w in work]
        wanted = {(head, tile) for head in range(heads) for tile in range(tiles)}
        missing, twice = wanted - set(every), len(every) - len(set(every))
        require(not missing, f"{what}: nobody takes (head, tile) {min(missing, default='')}")
        require(set(every) <= wanted, f"{what}: there is no (head, tile) {min(set(every) - wanted, default='')}")
        require(not twice, f"{what}: {twice} tiles are taken twice")
        ends = [sum(tile + 1 for _, tile in work) for work in taken]
        most = max(tiles, 1.1 * sum(ends) / blocks, most_even(blocks, heads, tiles))
        late = f"the last block ends at {max(ends)}, and {most:.0f} can be had"
        require(max(ends) <= most, f"{what}: {late}; all together would end at {sum(ends) / blocks:.1f}")


def most_even(blocks: int, heads: int, tiles: int) -> int:
    """When the last block ends if long tiles come first and every second round goes backwards."""
    costs = [tile + 1 for tile in reversed(range(tiles)) for _ in range(heads)]
    ends = [0] * blocks
    for i, cost in enumerate(costs):
        turn, place = divmod(i, blocks)
        ends[place if turn % 2 == 0 else blocks - 1 - place] += cost
    return max(ends)


# --- C++ -----------------------------------------------------------------------------------------------------------


WINDOWED = "int first_key(const Problem& p, int i) { return p.window ? std::max(0, i + p.S - p.T - p.window + 1) : 0; }"


def compiled(fn: Callable, more: str = "") -> Path:
    """The library of a learner's function that returns C++, with some more functions replaced."""
    text = fn()
    require(isinstance(text, str), f"return the C++ as a string; yours is a {type(text).__name__}")
    text = dedent(text)
    require(re.search(kernels.DEFINED, text, re.MULTILINE), "there is no C++ function in the string")
    try:
        return kernels.compile_small(f"{text}\n{more}" if more else text)
    except kernels.KernelError as failure:
        require(False, str(failure))


def small_cases() -> Iterator[tuple[str, Tensor, Tensor, Tensor, bool]]:
    """What, q, k, v, causal: lengths around the tiles of 16 and 32, and scores that fall and rise."""
    for T, S, causal in ((16, 32, False), (16, 64, False), (5, 70, False), (37, 90, True), (37, 24, True)):
        q, k, v = torch.randn(T, 8), torch.randn(S, 8), torch.randn(S, 8)
        yield f"{T} queries, {S} keys{', causal' if causal else ''}", q, k, v, causal
    yield "heads of 5 numbers", torch.randn(20, 5), torch.randn(70, 5), torch.randn(70, 5), True
    yield "heads of 12 numbers", torch.randn(20, 12), torch.randn(70, 12), torch.randn(70, 12), False
    rising = torch.linspace(-20, 20, 96)[:, None] * torch.ones(8)
    yield "scores that rise from tile to tile", torch.ones(16, 8), rising, torch.randn(96, 8), False
    yield "scores that fall from tile to tile", torch.ones(16, 8), -rising, torch.randn(96, 8), False
    q, v = torch.ones(16, 8), torch.randn(96, 8)
    yield "scores around -200, whose exponentials are 0", q, torch.full((96, 8), -70.0) + torch.rand(96, 1), v, False
    for place in (0, 17, 31, 32, 95):
        k = torch.rand(96, 8)
        k[place] += 40  # a score of 113, whose exponential is no float
        yield f"one score of 113, at key {place}", q, k, v, False


def true_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window: int = 0, softcap: float = 0.0
) -> Tensor:
    """Attention in float64; a row that sees nothing is zero."""
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.T / q.shape[1] ** 0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    T, S = scores.shape
    here, there = torch.arange(T)[:, None] + S - T, torch.arange(S)
    seen = torch.ones(T, S, dtype=torch.bool)
    seen = seen & (there <= here) if causal else seen
    seen = seen & (there > here - window) if window else seen
    return scores.masked_fill(~seen, -math.inf).softmax(1).nan_to_num(0.0) @ v


def require_attention(library, what: str, q: Tensor, k: Tensor, v: Tensor, **options) -> None:
    """Fail unless the learner's library computes attention."""
    try:
        out = kernels.run_small(library, q, k, v, **options)
    except kernels.KernelError as failure:
        require(False, f"{what}: {failure}")
    require_close(
        out, true_attention(q, k, v, **options), f"{what}: the output is wrong", tolerance=1e-3, name=f"{what}: out"
    )


@exercise(
    "flash_kernels.rescale",
    title="The softmax of a tile, in C++",
    hints=(
        "Write down m, l and O before and after a tile whose maximum is higher. Which were made with the old m?",
        "l and every O[c] are multiplied by exp(m_old - m_new), before the new terms are added.",
        "Where all scores so far are -INF, m_new is -INF: subtract 0 instead. See `anchor` in small.cpp.",
    ),
)
def check_rescale(fn):
    library = compiled(fn, WINDOWED)
    for what, q, k, v, causal in small_cases():
        require_attention(library, what, q, k, v, causal=causal)
    q, k, v = torch.randn(40, 8), torch.randn(75, 8), torch.randn(75, 8)
    what = "a window of 12, so that some rows see nothing of the first tile"
    require_attention(library, what, q, k, v, causal=True, window=12)


@exercise(
    "flash_kernels.tile",
    title="Two bugs in a tile loop",
    hints=(
        "The first shows with 70 keys in tiles of 32: how many keys has the last tile?",
        "The second shows where causal queries of one tile end at different keys: which row sees the most?",
        "keys = std::min(KEYS, end - key), and end = last_key(p, row + rows - 1), of the tile's last row.",
    ),
)
def check_tile(fn):
    library = compiled(fn)
    for what, q, k, v, causal in small_cases():
        require_attention(library, what, q, k, v, causal=causal)


@exercise(
    "flash_kernels.window",
    title="A sliding window and a soft cap, in C++",
    hints=(
        "score() alone knows the soft cap; first_key() alone knows the window. Zero means: off.",
        "Query i stands at key i + S - T, and sees p.window keys of which that one is the last.",
        "first_key is never negative: std::max(0, i + p.S - p.T - p.window + 1). softcap * std::tanh(sum / softcap).",
    ),
)
def check_window(fn):
    library = compiled(fn)
    for what, q, k, v, causal in small_cases():
        require_attention(library, f"{what}, no window, no cap", q, k, v, causal=causal)
    for T, S, window in ((40, 40, 1), (40, 40, 7), (20, 75, 33), (33, 33, 100), (50, 20, 4)):
        q, k, v = torch.randn(T, 8), torch.randn(S, 8), torch.randn(S, 8)
        what = f"{T} queries, {S} keys, a window of {window}"
        require_attention(library, what, q, k, v, causal=True, window=window)
    q, k, v = 5 * torch.randn(20, 8), 5 * torch.randn(50, 8), torch.randn(50, 8)
    require_attention(library, "a soft cap of 10", q, k, v, softcap=10.0)
    require_attention(
        library, "a soft cap of 2 and a window of 9", q, k[:20], v[:20], causal=True, window=9, softcap=2.0
    )
