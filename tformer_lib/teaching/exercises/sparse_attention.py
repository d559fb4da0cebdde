"""The exercises of the sparse-attention chapter."""

import torch

from tformer_lib import sparse_attention as sp
from tformer_lib.attention import attend
from tformer_lib.contract import counted
from tformer_lib.teaching.exercises.attention import BELOW, far_below_zero
from tformer_lib.teaching.exercises.engine import (
    INVERTED,
    exercise,
    require,
    require_close,
    require_dtype,
    require_integer,
    require_shape,
)


def require_mask(found, expected: torch.Tensor, name: str) -> None:
    """Fail unless ``found`` is the boolean mask, saying of the first wrong pair what is wrong."""
    require_shape(found, expected.shape, name)
    require_dtype(found, torch.bool, name)
    require(not torch.equal(found, ~expected), f"{name} {INVERTED}")
    for t, s in (found != expected).nonzero().tolist()[:1]:
        if found[t, s]:
            why = "the future leaks" if s > t else "and must not"
            require(False, f"{name}: query {t} sees key {s}, {why}")
        require(False, f"{name}: query {t} does not see key {s}, and should")


@exercise(
    "sparse_attention.strided",
    title="The strided pattern",
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
    title="From a mask to live blocks",
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
        (torch.arange(12 * 10).view(12, 10) % 37 == 22, 5),  # a lone pair here and there
    )
    for mask, block in cases:
        T, S = mask.shape
        rows, columns = -(-T // block), -(-S // block)
        name = f"the layout of a {T} x {S} mask in blocks of {block}"
        found = fn(mask, block)
        require_shape(found, (rows, columns), name)
        require_dtype(found, torch.bool, name)
        live, dead = layout_of(mask, block), layout_of(~mask, block)
        require(torch.equal(found, live) or not torch.equal(found, dead), f"the mask {INVERTED}")
        words = f"{name} is inverted: True means that the block must be computed"
        require(torch.equal(found, live) or not torch.equal(found, ~live), words)
        for r in range(rows):
            for c in range(columns):
                tile = mask[r * block : (r + 1) * block, c * block : (c + 1) * block]
                allowed, live = int(tile.sum()), bool(found[r, c])
                words = f"{name}: block ({r}, {c}) holds {counted(allowed, 'allowed pair')} of {tile.numel()}"
                require(live == (allowed > 0), f"{words}, and you call it {'live' if live else 'dead'}")


def layout_of(mask: torch.Tensor, block: int) -> torch.Tensor:
    """Which blocks of a mask (T, S) hold an allowed pair."""
    rows = [torch.stack([tile.any() for tile in part.split(block, 1)]) for part in mask.split(block, 0)]
    return torch.stack(rows)


@exercise(
    "sparse_attention.window",
    title="A window without the table of scores",
    hints=(
        "Cut the queries into blocks of `window`. Which keys can the queries of one block see?",
        "A block of queries at start .. start + window sees keys from start - window + 1 on: two blocks at most.",
        "Slice k and v from max(0, start - window) to the block's end, and mask inside the slice by distance.",
    ),
)
def check_window(fn):
    from tformer_lib.profiling import count
    from tformer_lib.teaching.exercises.linear_attention import LargestTensor

    for T, window, loud in ((12, 4, 1), (10, 4, 1), (7, 1, 1), (5, 9, 1), (16, 3, 1), (1, 3, 1), (12, 4, 1000)):
        d, value_dim = (6, 6) if T == 12 else (9, 4)
        q, k, v = loud * torch.randn(T, d), torch.randn(T, d), torch.randn(T, value_dim)
        found = fn(q, k, v, window)
        require_shape(found, (T, value_dim), f"the output for T = {T}, window = {window}")
        require(loud == 1 or found.isfinite().all(), "with scores in the thousands, whose exponentials overflow: NaN")
        mask = sp.sliding_window(window).mask(T)
        expected = attend(q[None, None], k[None, None], v[None, None], mask=mask)[0, 0]
        require_close(found, expected, f"the output for T = {T}, window = {window} is not that of the mask")
    q, k = far_below_zero((), 12, 12)
    v, mask = torch.randn(12, 5), sp.sliding_window(4).mask(12)
    expected = attend(q[None, None], k[None, None], v[None, None], mask=mask)[0, 0]
    require_close(fn(q, k, v, 4), expected, f"with all scores near -16,000, the output differs: {BELOW}")
    q, k, v = (torch.randn(400, 4) for _ in range(3))
    with LargestTensor() as seen, count() as work:
        fn(q, k, v, 10)
    words = "right, but for 400 tokens and a window of 10"
    made = f"a tensor of {seen.most:,} numbers was made"
    require(seen.most < 400 * 100, f"{words} {made}: slice the keys before you multiply")
    times = work.flops / (4 * 4 * 400 * 10)
    require(times < 4, f"{words} you multiply {times:.0f} times as much as the pairs need: slice the keys at both ends")


@exercise(
    "sparse_attention.layers",
    title="How many layers?",
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
        (sp.documents(torch.tensor([0, 0, 0, 1, 1])).mask(5) & sp.sliding_window(2).mask(5), None),
        ((sp.sliding_window(1) | sp.global_tokens([0, 5])).mask(6) & sp.causal().mask(6), None),
        ((sp.sliding_window(2) | sp.global_tokens([0, 6])).mask(7) & sp.causal().mask(7), 4),
    )
    for mask, expected in cases:
        found = fn(mask)
        found = found if found is None else require_integer(found, "the number of layers")
        right = found == expected
        require(right or found != layers_of(~mask), f"the mask {INVERTED}")
        row = f"a causal mask of {len(mask)} tokens with {int(mask.sum())} pairs"
        require(right, f"{row} needs {expected} layers, and you say {found}" if expected else no_way(row, found))


def layers_of(mask: torch.Tensor) -> int | None:
    """How many layers of a mask connect all that causality allows; None if no number does."""
    full = sp.causal().mask(len(mask))
    for layers in range(1, len(mask) + 1):
        if not (full & ~sp.receptive_field(mask, layers)).any():
            return layers
    return None


def no_way(row: str, found) -> str:
    """What to say of a number of layers where there is none."""
    return f"{row} never connects all of them, so the answer is None, and you say {found}"


def seen_pairs(live: torch.Tensor, allows, T: int, S: int, block: int) -> torch.Tensor:
    """The mask (T, S) that a layout and a rule inside its blocks make together."""
    inside = live.repeat_interleave(block, 0).repeat_interleave(block, 1)[:T, :S]
    return inside & allows(torch.arange(T)[:, None], torch.arange(S)[None, :])


def by_the_table(q, k, v, mask: torch.Tensor) -> torch.Tensor:
    """Masked attention of one head with all its scores written out; zeros where a query sees nothing."""
    scores = (q.double() @ k.double().T / q.shape[1] ** 0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v.double()


def draw_blocks(T: int, S: int, block: int, share: float = 0.5):
    """A random layout, and a random rule that says yes to everything past the ends."""
    rows, columns = -(-T // block), -(-S // block)
    live, table = torch.rand(rows, columns) < share, torch.rand(rows * block, columns * block) < share
    live[0, 0] = live[0, -1] = True
    table[0], table[1, :block] = False, False  # query 0 sees nothing at all, query 1 nothing in the first block
    table[1, S - 1] = True
    table[T:], table[:, S:] = True, True
    return live, lambda i, j: table[i, j]


def what_is_inverted(found, q, k, v, live, allows, block: int) -> str | None:
    """Which of the two masks is read the other way round, if one is and the result is what comes of it."""
    T, S = len(q), len(k)
    no = lambda i, j: ~allows(i, j)  # noqa: E731
    for what, mask in (
        ("what `allows` says", seen_pairs(live, no, T, S, block)),
        ("the layout", seen_pairs(~live, allows, T, S, block)),
        ("each mask, the layout and `allows`,", seen_pairs(~live, no, T, S, block)),
    ):
        other = by_the_table(q, k, v, mask)
        is_same_shape = isinstance(found, torch.Tensor) and found.shape == other.shape
        if is_same_shape and torch.allclose(found.detach().double(), other, rtol=1e-3, atol=1e-3):
            return what
    return None


def say_which_query(found, q, k, v, live, allows, block: int, case: str) -> None:
    """Fail unless this is attention over the layout, saying of the first wrong query what is wrong."""
    T, S = len(q), len(k)
    mask = seen_pairs(live, allows, T, S, block)
    expected = by_the_table(q, k, v, mask)
    require_shape(found, expected.shape, f"{case}: the output")
    wrong = ~torch.isclose(found.detach().double(), expected, rtol=1e-3, atol=1e-3)
    for t in wrong.any(1).nonzero().flatten().tolist()[:1]:
        where = mask[t].nonzero().flatten() // block
        blocks, first = where.unique().tolist(), live[t // block].nonzero().flatten().tolist()[:1]
        query = f"{case}: query {t}"
        for other, words in (
            (allows(torch.arange(T)[:, None], torch.arange(S)[None, :]), "sees pairs of dead blocks, too"),
            (seen_pairs(live, lambda i, j: i + j >= 0, T, S, block), "sees all of its blocks: ask `allows` as well"),
        ):
            same = torch.allclose(found[t].double(), by_the_table(q, k, v, other)[t], atol=1e-3)
            require(not same, f"{query} {words}")
        value = f"holds {found[t, 0].item():.3g}"
        require(blocks, f"{query} sees no key, so its output is zeros, and yours {value}")
        if not bool(torch.isfinite(found[t]).all()):
            late = case != "large scores" and blocks[0] != first[0]
            why = f"it sees nothing of the first of its live blocks, {first[0]}: the maximum is minus infinity there"
            require(False, f"{query} {value}: {why if late else 'take the largest score out before exp'}")
        wanted = f"output {found[t, 0].item():.4g}, expected {expected[t, 0].item():.4g}"
        require(False, f"{query} sees {len(where)} keys in blocks {blocks} of {block}: {wanted}")


@exercise(
    "sparse_attention.blocks",
    title="Attention over any layout of blocks",
    hints=(
        "One row of blocks at a time: its queries, and the list of its live columns. The last block may be shorter.",
        "Either gather the keys of the live columns and do one softmax, or keep a maximum, a sum of weights and a sum "
        "of weighted values for each query, and go from block to block as in the chapter on flash attention.",
        "When the maximum rises from m to n, what was summed before is multiplied by exp(m - n).",
        "While a query has seen nothing, its maximum is minus infinity, and minus infinity less itself is NaN: "
        "subtract 0 there. At the end its sum of weights is 0: divide by 1.",
    ),
)
def check_blocks(fn):
    from tformer_lib.profiling import count
    from tformer_lib.teaching.exercises.linear_attention import LargestTensor

    for T, S, block in ((8, 8, 4), (12, 20, 4), (10, 11, 4), (3, 9, 4), (13, 7, 5)):
        case = f"{T} queries, {S} keys, blocks of {block}"
        q, k, v = torch.randn(T, 6), torch.randn(S, 6), torch.randn(S, 3)
        live, allows = draw_blocks(T, S, block)
        sees = seen_pairs(live, allows, T, S, block).any(1)
        found = fn(q, k, v, live.clone(), allows, block)
        what = what_is_inverted(found, q, k, v, live, allows, block)
        require(what is None, f"{what} {INVERTED}")
        total = fn(q, k, torch.ones(S, 1), live.clone(), allows, block)
        require_shape(total, (T, 1), f"{case}, values (S, 1): the output")
        for t in (total[:, 0] - 1).abs().gt(1e-3).logical_and(sees).nonzero().flatten().tolist()[:1]:
            why = "all that it sees shares one softmax, over all of its blocks"
            lost = "does it miss a key that it may see, or does one past the end have a share?"
            words = f"the weights of query {t} sum to {total[t, 0].item():.3g} instead of 1"
            require(False, f"{case}: {words}: {why if total[t, 0] > 1 else lost}")
        say_which_query(fn(q, k, v, live.clone(), allows, block), q, k, v, live, allows, block, case)
        say_which_query(
            fn(60 * q, k, v, live.clone(), allows, block), 60 * q, k, v, live, allows, block, "large scores"
        )
        q, k = 15 * q.abs() + 5, -k.abs() - 2
        say_which_query(fn(q, k, v, live.clone(), allows, block), q, k, v, live, allows, block, "scores far below zero")
    q, k = far_below_zero((), T, S)
    say_which_query(
        fn(q, k, v, live.clone(), allows, block), q, k, v, live, allows, block, f"all scores near -16,000, and {BELOW}"
    )
    nothing = torch.zeros_like(live)
    say_which_query(
        fn(q, k, v, nothing, allows, block), q, k, v, nothing, allows, block, "a layout without live blocks"
    )

    T, block = 260, 16
    pattern = (sp.sliding_window(20) | sp.global_tokens([0])) & sp.causal() | sp.global_tokens([T - 1])
    q, k, v = (torch.randn(T, 8) for _ in range(3))
    live = pattern.layout(T, block=block)
    with LargestTensor() as seen, count() as work:
        found = fn(q, k, v, live.clone(), pattern.allows, block)
    case = "a window with global tokens"
    say_which_query(found, q, k, v, live, pattern.allows, block, case)
    pairs = int(live.sum()) * block * block
    words = f"right, but for {T} tokens, whose {int(live.sum())} live blocks hold {pairs:,} pairs,"
    advice = "go row of blocks by row of blocks, and do not fill all rows up to the longest"
    require(seen.most <= pairs, f"{words} a tensor of {seen.most:,} numbers was made: {advice}")
    times = work.flops / (4 * 8 * pairs)
    require(times < 2, f"{words} you multiply {times:.1f} times as much as those need: leave dead blocks out")
