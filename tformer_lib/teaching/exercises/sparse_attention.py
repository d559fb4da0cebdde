"""The exercises of the sparse-attention chapter."""

import torch

from tformer_lib import sparse_attention as sp
from tformer_lib.attention import attend
from tformer_lib.teaching.exercises.engine import exercise, require, require_close, require_dtype, require_shape


def require_mask(found, expected: torch.Tensor, name: str) -> None:
    """Fail unless ``found`` is the boolean mask, saying of the first wrong pair what is wrong."""
    require_shape(found, expected.shape, name)
    require_dtype(found, torch.bool, name)
    for t, s in (found != expected).nonzero().tolist()[:1]:
        if found[t, s]:
            why = "the future leaks" if s > t else "and must not"
            require(False, f"{name}: query {t} sees key {s}, {why}")
        require(False, f"{name}: query {t} does not see key {s}, and should")


@exercise(
    "sparse_attention.strided",
    title="The strided pattern of the Sparse Transformer",
    hints=(
        "Write a table of the distances i - j first. Every rule of this pattern is about the distance alone.",
        "Three rules: the distance is not negative; and it is less than the stride, or a multiple of it.",
        "(distance >= 0) & ((distance < stride) | (distance % stride == 0))",
    ),
)
def check_strided(fn):
    for T, stride in ((12, 4), (9, 3), (5, 1), (4, 8), (1, 2)):
        require_mask(fn(T, stride), sp.strided(stride).mask(T), f"the mask for T = {T}, stride = {stride}")


@exercise(
    "sparse_attention.layout",
    title="From a mask to the blocks that must be computed",
    hints=(
        "A block is live if any pair inside it is allowed. How can one dimension of length T become two?",
        "Pad the mask with False to whole blocks, then view it as (rows, block, columns, block).",
        "torch.nn.functional.pad(mask, (0, -S % block, 0, -T % block)), a view, then .any(3).any(1).",
    ),
)
def check_layout(fn):
    cases = (
        (sp.sliding_window(5).mask(16), 4),
        (sp.global_tokens([9]).mask(12), 4),
        (sp.causal().mask(10), 4),
        (sp.strided(5).mask(7, 13), 3),
        (torch.zeros(6, 6, dtype=torch.bool), 3),
        (torch.ones(3, 3, dtype=torch.bool), 8),
    )
    for mask, block in cases:
        T, S = mask.shape
        rows, columns = -(-T // block), -(-S // block)
        name = f"the layout of a {T} x {S} mask in blocks of {block}"
        found = fn(mask, block)
        require_shape(found, (rows, columns), name)
        require_dtype(found, torch.bool, name)
        for r in range(rows):
            for c in range(columns):
                tile = mask[r * block : (r + 1) * block, c * block : (c + 1) * block]
                allowed, live = int(tile.sum()), bool(found[r, c])
                words = f"{name}: block ({r}, {c}) holds {allowed} allowed pairs of {tile.numel()}"
                require(live == (allowed > 0), f"{words}, and you call it {'live' if live else 'dead'}")


@exercise(
    "sparse_attention.window",
    title="Window attention without the table of all scores",
    hints=(
        "Cut the queries into blocks of `window`. Which keys can the queries of one block see?",
        "A block of queries at start .. start + window sees keys from start - window + 1 on: two blocks at most.",
        "Slice k and v from max(0, start - window) to the block's end, and mask inside the slice by distance.",
    ),
)
def check_window(fn):
    from tformer_lib.teaching.exercises.linear_attention import LargestTensor

    for T, window in ((12, 4), (10, 4), (7, 1), (5, 9), (16, 3)):
        q, k, v = (torch.randn(T, 4) for _ in range(3))
        found = fn(q, k, v, window)
        require_shape(found, (T, 4), f"the output for T = {T}, window = {window}")
        mask = sp.sliding_window(window).mask(T)
        expected = attend(q[None, None], k[None, None], v[None, None], mask=mask)[0, 0]
        require_close(found, expected, f"the output for T = {T}, window = {window} is not that of the mask")
    q, k, v = (torch.randn(400, 4) for _ in range(3))
    with LargestTensor() as seen:
        fn(q, k, v, 10)
    words = f"right, but for 400 tokens and a window of 10 a tensor of {seen.most:,} numbers was made"
    require(seen.most < 400 * 100, f"{words}: slice the keys before you multiply")


@exercise(
    "sparse_attention.layers",
    title="How many layers until everyone has heard from everyone",
    hints=(
        "After one layer, a token knows what its row of the mask allows. After two, what those tokens knew after one.",
        "reach = reach @ mask > 0, in floats, is one more layer.",
        "Count layers until every pair that `full` allows is in reach; stop with None when a layer adds nothing.",
    ),
)
def check_layers(fn):
    cases = (
        (sp.sliding_window(3).mask(13), 6),
        (sp.sliding_window(2).mask(5), 4),
        (sp.causal().mask(6), 1),
        (sp.strided(4).mask(16), 2),
        (sp.documents(torch.tensor([0, 0, 1, 1])).mask(4) & sp.causal().mask(4), None),
        (sp.sliding_window(1).mask(3), None),
    )
    for mask, expected in cases:
        found = fn(mask)
        right = found == expected and type(found) is type(expected)
        row = f"a causal mask of {len(mask)} tokens with {int(mask.sum())} pairs"
        require(right, f"{row} needs {expected} layers, and you say {found}" if expected else no_way(row, found))


def no_way(row: str, found) -> str:
    """What to say of a number of layers where there is none."""
    return f"{row} never connects all of them, so the answer is None, and you say {found}"
