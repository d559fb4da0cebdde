"""The interactive figure of chapter 16: the banks of shared memory under a swizzle."""

from tformer_lib.teaching.widgets import Interactive, module

ROWS = 8
"""Rows that one phase of ldmatrix reads at once."""

GROUPS = 8
"""Groups of four banks: 128 bytes of shared memory hold one piece of 16 bytes in each."""


class BankExplorer(Interactive):
    """Choose a layout and a piece, and see which banks eight rows of it fall into."""

    _esm = module("flash_kernels.js")


def place(row: int, chunk: int, chunks: int, layout: str) -> int:
    """Where chunk ``chunk`` of row ``row`` lies, counted in pieces of 16 bytes, for rows of ``chunks`` pieces."""
    if layout == "as it comes":
        return row * chunks + chunk
    if layout == "one piece of padding a row":
        return row * (chunks + 1) + chunk
    return row * chunks + (chunk ^ (row % GROUPS))


def banks() -> BankExplorer:
    """The explorer for rows of 64 and of 128 halves."""
    layouts = ["as it comes", "one piece of padding a row", "XOR swizzle"]
    places = {
        f"{d}": {
            layout: [[place(row, chunk, d // 8, layout) for chunk in range(d // 8)] for row in range(ROWS)]
            for layout in layouts
        }
        for d in (64, 128)
    }
    return BankExplorer(
        label="Bank explorer: one piece of eight rows, read at once",
        data={"groups": GROUPS, "layouts": layouts, "widths": [64, 128], "places": places},
    )
