"""The checks of chapter 08: turning pairs, positions of packed documents, the two layouts, NTK's base, YaRN."""

import math

import torch

from tformer_lib.rope import Rope, Yarn, convert_layout, rotate
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
    for shape in ((3, 6), (1, 2, 2, 7, 4)):
        x, angles = torch.randn(shape), torch.randn(shape[-2], shape[-1] // 2)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
        expected = torch.view_as_real(pairs).flatten(-2)
        require_close(fn(x, angles), expected, f"an x of shape {shape} is turned wrongly", name="the turned x")


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
        whole = not positions.is_floating_point() and positions.dtype != torch.bool
        require(whole, f"positions are whole numbers, and yours are {positions.dtype}")
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
    check_converted(fn, heads=3, head_dim=8, width=10)
    check_converted(fn, heads=2, head_dim=6, width=7)


def check_converted(fn, heads: int, head_dim: int, width: int) -> None:
    """Hold a learner's conversion of a random weight against the library's, and its scores against the scores."""
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
        Rope(head_dim, layout=layout).at(positions)(
            (hidden @ w.to(hidden.dtype).T).unflatten(-1, (heads, head_dim)).transpose(1, 2)
        )
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
            f"{say}: with the base {new:.6g} the slowest pair turns slower by a factor of {slower:.4g}, not {factor:g}",
        )


@exercise(
    "rope.yarn",
    title="YaRN, from the paper to a checkpoint's numbers",
    hints=(
        "By the end of the trained length, pair i has made length * theta_i / (2 pi) turns. Work with turns first.",
        "The other way round: which i, as a fraction, makes t turns? Put in theta_i = base^(-2i / head_dim); solve.",
        "Round the fraction for beta_fast down (not below 0) and the one for beta_slow up. Between the two, the share "
        "that is divided grows from 0 to 1 by equal steps; clamp it outside.",
        "A pair's frequency is (1 - share) * theta + share * theta / factor. Queries and keys are both multiplied, "
        "so the scores get the square of what you return.",
    ),
)
def check_yarn(fn):
    cases = [(64, 10000.0, 4.0, 2048, 32, 1), (64, 10000.0, 4.0, 128, 32, 1), (128, 1e6, 1.0, 32768, 32, 1)]
    cases.append((64, 10000.0, 4.0, 131_072, 32, 1))  # no pair is so slow that it makes only one turn
    for _ in range(20):
        r = torch.rand(6).tolist()
        fast, slow, length = 8 + 56 * r[0], 0.5 + 3 * r[1], int(2 ** (8 + 8 * r[2]))
        cases.append((16 * 2 ** int(4 * r[3]), 10 ** (4 + 2 * r[4]), 1.5 + 30 * r[5], length, fast, slow))
    for head_dim, base, factor, length, fast, slow in cases:
        answer = fn(head_dim, base, factor, length, fast, slow)
        require(answer is not None, "your function returns None: is a return missing?")
        require(
            isinstance(answer, (tuple, list)) and len(answer) == 2,
            "return two things: the frequencies of the pairs, and the attention factor",
        )
        frequencies, attention = torch.as_tensor(answer[0]).double(), float(answer[1])
        require_shape(frequencies, (head_dim // 2,), "the frequencies")
        say = (
            f"head_dim {head_dim}, base {base:.6g}, factor {factor:.3g}, length {length}, betas {fast:.3g}, {slow:.3g}"
        )
        explain_pairs(frequencies, say, head_dim, base, factor, length, fast, slow)
        explain_sharpening(attention, factor)


def explain_pairs(frequencies, say, head_dim, base, factor, length, fast, slow) -> None:
    """What YaRN promises of the pairs, then the usual mistakes in the ramp, then the library's numbers."""
    theta = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns, kept = length * theta / (2 * torch.pi), frequencies / theta
    for i in range(head_dim // 2):
        made = f"{say}: pair {i} makes {turns[i]:.3g} turns in the trained context"
        if turns[i] >= fast:
            require(abs(kept[i] - 1) < 1e-3, f"{made}, so it stays, but yours is multiplied by {kept[i]:.4g}")
        if turns[i] <= slow:
            word = f"so it should slow by {factor:.3g}, but yours is multiplied by {kept[i]:.4g}"
            require(abs(kept[i] * factor - 1) < 1e-3, f"{made}, {word}")
        word = f"yours is multiplied by {kept[i]:.4g}: no pair should grow faster, or slow by more than the factor"
        require(1 / factor - 1e-3 < kept[i] < 1.001, f"{made}, and {word}")
    require((kept.diff() < 1e-4).all(), f"{say}: a slower pair is slowed less than the faster one before it")
    expected = Rope(head_dim, base=base, scaling=Yarn(factor, beta_fast=fast, beta_slow=slow), max_length=length)
    expected = expected.frequencies().double() / theta
    exact = Yarn(factor, beta_fast=fast, beta_slow=slow, truncate=False)
    exact = Rope(head_dim, base=base, scaling=exact, max_length=length).frequencies().double() / theta
    by_turns = ((turns - slow) / (fast - slow)).clamp(0, 1)
    share = (1 - expected) / (1 - 1 / factor) if factor > 1 else 0 * expected  # of a pair that is interpolated
    mistakes = {
        "the ramp is straight in the number of turns; it should be straight in the number of the pair": (
            by_turns + (1 - by_turns) / factor
        ),
        "the ramp starts or ends between two pairs: round its start down and its end up, to whole pairs": exact,
        "the ramp blends wavelengths; it should blend frequencies": 1 / (1 + share * (factor - 1)),
        "the ramp goes through powers of the factor; frequencies should be blended by adding shares": factor**-share,
    }
    for words, wrong in mistakes.items():
        usual = torch.allclose(kept, wrong, atol=1e-4) and not torch.allclose(wrong, expected, atol=1e-3)
        require(not usual, f"{say}: {words}")
    require_close(kept, expected, f"{say}: the ramp multiplies a pair by another number", tolerance=1e-3)


def explain_sharpening(attention: float, factor: float) -> None:
    """Name the usual mistakes in the attention factor."""
    expected = 1 + 0.1 * math.log(factor)
    say = f"factor {factor:.3g}: the attention factor is {attention:.4g}"
    mistakes = {
        "what the scores are multiplied by: queries and keys each bring its root": expected**2,
        "the paper's temperature t; queries and keys are multiplied by the root of 1 / t": expected**-2,
        "the inverse: scores should grow sharper, not flatter": 1 / expected,
        "without the 1": expected - 1,
        "a logarithm to the base 10; the paper takes the natural one": 1 + 0.1 * math.log10(factor),
        "no sharpening at all": 1.0,
    }
    for words, wrong in mistakes.items():
        require(abs(attention - wrong) > 1e-4 or abs(wrong - expected) < 1e-4, f"{say}, {words}")
    require(abs(attention - expected) < 1e-3, f"{say}, expected {expected:.4g}")
