"""The checks of chapter 07: turning pairs, positions of packed documents, the two layouts, NTK's base."""

import torch

from tformer_lib.rope import Rope, convert_layout, rotate
from tformer_lib.teaching.exercises.engine import exercise, require, require_close, require_shape


@exercise(
    "rope.rotate",
    title="Turn the pairs",
    hints=(
        "x[..., 0::2] holds the first member of every pair, x[..., 1::2] the second; both are (..., T, head_dim / 2).",
        "A turn by t takes (a, b) to (a cos t - b sin t, a sin t + b cos t).",
        "Put the members back where they were: torch.stack((a, b), dim=-1).flatten(-2).",
    ),
)
def check_rotate(fn):
    x = torch.randn(2, 3, 5, 8)
    angles = torch.arange(5)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])  # (T, pairs)
    given = x.clone()
    turned = fn(given, angles)
    require(torch.equal(given, x), "your function changes x itself: the caller's queries are lost")
    require_shape(turned, x.shape, "the turned x")
    require(
        not torch.allclose(turned[:, :, 0].float(), torch.cat((x[:, :, 0, 0::2], x[:, :, 0, 1::2]), dim=-1)),
        "all first members come before all second ones: each should go back to where it was",
    )
    require_close(turned[:, :, 0], x[:, :, 0], "position 0 has angle 0, so its token should not change")
    require_close(turned.norm(dim=-1), x.norm(dim=-1), "lengths changed: a rotation keeps them", name="the norm")
    require(
        not torch.allclose(turned.float(), rotate(x, angles.cos(), angles.sin(), "half"), atol=1e-4),
        "these are the pairs of the half-split layout, (0, 4), (1, 5), ...: the exercise asks for neighbours",
    )
    require(
        not torch.allclose(turned.float(), rotate(x, angles.cos(), -angles.sin(), "interleaved"), atol=1e-4),
        "the pairs turn the other way round: clockwise. The minus belongs to the first member",
    )
    require_close(turned, rotate(x, angles.cos(), angles.sin(), "interleaved"), "a pair is turned wrongly")


@exercise(
    "rope.positions",
    title="Positions of packed documents",
    hints=(
        "A document does not know what was packed before it.",
        "torch.arange(length) for each document, one after the other.",
    ),
)
def check_positions(fn):
    for lengths in ([3, 2], [4], [1, 1, 5], [2, 6, 1, 3]):
        positions = fn(lengths)
        total = sum(lengths)
        require_shape(positions, (total,), f"the positions of documents of {lengths} tokens")
        require(int(positions[0]) == 0, f"the first token stands at {int(positions[0])}; RoPE counts from 0")
        start = 0
        for number, length in enumerate(lengths):
            came = positions[start : start + length].tolist()
            require(
                came == list(range(length)),
                f"lengths {lengths}: document {number} has positions {came}, expected {list(range(length))}",
            )
            start += length


@exercise(
    "rope.convert",
    title="From one layout to the other",
    hints=(
        "Rows belong to heads: look at the weight as (heads, head_dim, width) first.",
        "Within a head, the new order takes the even rows first, then the odd ones.",
        "weight.view(heads, head_dim // 2, 2, width) has a pair's two rows beside each other: swap dimensions 1 and 2.",
    ),
)
def check_convert(fn):
    heads, head_dim, width = 3, 8, 10
    weight = torch.randn(heads * head_dim, width)
    converted = fn(weight, heads)
    require_shape(converted, weight.shape, "the converted weight")
    expected = convert_layout(weight, heads, to="half")
    require(not torch.equal(converted, weight), "the weight came back as it was")
    require(
        not torch.equal(converted, convert_layout(weight, 1, to="half")),
        "rows of different heads were mixed: reorder within each head",
    )
    require(
        not torch.equal(converted, convert_layout(weight, heads, to="interleaved")),
        "this is the way back, from half to interleaved",
    )
    require_close(converted, expected, "rows are in the wrong order")
    hidden, positions = torch.randn(1, 6, width), torch.arange(6) + 3
    theirs, ours = (
        Rope(head_dim, layout=layout).at(positions)((hidden @ w.T).unflatten(-1, (heads, head_dim)).transpose(1, 2))
        for layout, w in (("interleaved", weight), ("half", converted))
    )
    require_close(ours @ ours.mT, theirs @ theirs.mT, "the scores differ after the conversion", tolerance=1e-3)


@exercise(
    "rope.ntk",
    title="The base that slows the slowest pair",
    hints=(
        "The slowest pair has theta = base^(-(dim - 2) / dim). Write the same with the new base, and divide.",
        "new^((dim - 2) / dim) = factor * base^((dim - 2) / dim): solve for new.",
    ),
)
def check_ntk(fn):
    for base, factor, dim in ((10000.0, 4.0, 64), (10000.0, 1.0, 64), (500000.0, 8.0, 128), (100.0, 2.0, 4)):
        new = fn(base, factor, dim)
        require(new is not None, "your function returns None: is a return missing?")
        say = f"base {base:g}, factor {factor:g}, {dim} channels"
        require(new > 0, f"{say}: the new base is {new}")
        slower = (new / base) ** ((dim - 2) / dim)
        require(
            abs(slower / factor - 1) < 1e-3,
            f"{say}: with the base {new:.6g} the slowest pair turns {slower:.4g} times slower, not {factor:g} times",
        )
