"""Checks of chapter 07."""

import math

import torch

from tformer_lib.teaching.exercises.engine import (
    exercise,
    require,
    require_close,
    require_integer,
    require_shape,
    require_tensor,
)

SIZES = torch.tensor([4.0, 2.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64) / 11
"""The probabilities of the six sizes of a house: the running example of the chapter."""


@exercise(
    "generation.temperature",
    title="Temperature",
    hints=(
        "The temperature divides the logits, before the softmax.",
        "At temperature 0 there is nothing to divide by: all of the probability belongs to the largest logit.",
        "Subtract the largest logit first: the result is the same, and a small temperature cannot overflow.",
    ),
)
def check_temperature(fn):
    logits = SIZES.log() + 3.0
    for temperature, power in ((1.0, 1.0), (0.5, 2.0), (2.0, 0.5), (0.25, 4.0)):
        result = fn(logits.clone(), temperature)
        require_shape(result, (6,), "the result")
        wanted = SIZES**power / (SIZES**power).sum()
        if temperature != 1:
            wrong = SIZES ** (1 / power) / (SIZES ** (1 / power)).sum()
            require(
                not torch.allclose(result.double(), wrong),
                f"at temperature {temperature} the probabilities are those of temperature {power}: divide by it",
            )
            divided = (SIZES / temperature).softmax(-1)
            require(
                not torch.allclose(result.double(), divided),
                "the probabilities were divided by the temperature; it belongs to the logits",
            )
        require_close(result, wanted, f"at temperature {temperature} the probabilities are wrong")
    explain_extremes(fn)


def explain_extremes(fn) -> None:
    """Temperature 0, one near 0, and large logits."""
    logits = torch.tensor([1.0, 4.0, -2.0, 3.0], dtype=torch.float64)
    sure = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    for temperature in (0, 0.0):
        result = fn(logits.clone(), temperature)
        require_shape(result, (4,), "the result at temperature 0")
        require(result.is_floating_point(), f"probabilities should be floats, at temperature 0 they are {result.dtype}")
        require_close(result, sure, "at temperature 0 all of the probability belongs to the largest logit")
    result = fn(torch.tensor([7.0, 2.0, 7.0]), 0.0)
    require_shape(result, (3,), "the result at temperature 0")
    require(
        math.isclose(float(result.sum()), 1.0, rel_tol=1e-5),
        f"at temperature 0, with two largest logits, the probabilities add up to {float(result.sum()):.4g}, not to 1",
    )
    require(float(result[1]) == 0, "at temperature 0 a smaller logit gets a probability")
    near = torch.tensor([0.0, 0.002, 0.001], dtype=torch.float64)
    said = "at temperature 0.001, logits that are 0.001 apart differ by a factor of e: the probabilities are wrong"
    require_close(fn(near.clone(), 0.001), (near * 1000).softmax(-1), said)
    for shift, temperature in ((1000.0, 1.0), (0.0, 1e-4), (-1000.0, 0.5)):
        result = fn(torch.tensor([1.0, 4.0, -2.0, 3.0]) + shift, temperature)
        require_tensor(result)
        require(
            torch.isfinite(result).all(),
            f"logits near {shift:g} at temperature {temperature:g} give {result.flatten()[0].item()}: an exponential "
            "overflows or everything becomes 0; subtract the largest logit first",
        )
        wanted = ((torch.tensor([1.0, 4.0, -2.0, 3.0]).double() - 4) / temperature).softmax(-1)
        require_close(result, wanted, f"logits near {shift:g} at temperature {temperature:g} go wrong", tolerance=1e-4)


@exercise(
    "generation.top_p",
    title="Top-p",
    hints=(
        "Sort the probabilities from large to small, and add them up from the left.",
        "A token is kept if the sum of those before it is still less than p: so the token that reaches p is kept.",
        "sort() also returns where each number came from; put the kept ones back there, and divide by the sum.",
    ),
)
def check_top_p(fn):
    cases = (
        ([0.25, 0.5, 0.125, 0.125], 0.75, [1, 2, 0, 0]),
        ([0.25, 0.5, 0.125, 0.125], 0.625, [1, 2, 0, 0]),
        ([0.125, 0.125, 0.25, 0.5], 0.5, [0, 0, 0, 1]),
        ([0.125, 0.5, 0.125, 0.25], 0.25, [0, 1, 0, 0]),
        ([0.0625, 0.3125, 0.5, 0.125], 0.9375, [0, 5, 8, 2]),
        ([0.0625, 0.3125, 0.5, 0.125], 1.0, [1, 5, 8, 2]),
    )
    for probabilities, p, shares in cases:
        given, shares = torch.tensor(probabilities, dtype=torch.float64), torch.tensor(shares, dtype=torch.float64)
        yours = given.clone()
        result = fn(yours, p)
        require_shape(result, (4,), "the result")
        require(torch.equal(yours, given), "the probabilities that were given have changed: work on a copy")
        case = f"for {probabilities} and p = {p},"
        kept, wanted = int((result > 0).sum()), int((shares > 0).sum())
        require(kept >= 1, f"{case} no token is kept: the likeliest always stays")
        require(
            kept >= wanted,
            f"{case} {kept} of {wanted} tokens are kept: the one that reaches p belongs to them",
        )
        require(kept <= wanted, f"{case} {kept} tokens are kept, and {wanted} reach p")
        shares = shares / shares.sum()
        require(
            not torch.allclose(result.double(), torch.where(shares > 0, given, 0.0))
            or math.isclose(given[shares > 0].sum(), 1),
            f"{case} the kept probabilities add up to {float(result.sum()):.4g}: divide them by their sum",
        )
        require(
            not torch.allclose(result.double(), shares.sort(descending=True).values)
            or torch.allclose(shares, shares.sort(descending=True).values),
            f"{case} the result is sorted: put each probability back to its token",
        )
        require_close(result, shares, f"{case} the result is wrong")
    result = fn(torch.full((8,), 0.125, dtype=torch.float64), 0.25)
    require_shape(result, (8,), "the result")
    said = (
        "of eight tokens of 0.125 each, any two reach p = 0.25: keep two with 0.5 each, and not all that are as likely"
    )
    right = torch.tensor([0.0] * 6 + [0.5] * 2, dtype=torch.float64)
    require_close(result.sort().values, right, said)


@exercise(
    "generation.draw",
    title="Draw a token",
    hints=(
        "Lay the probabilities side by side on the line from 0 to 1. In whose part does u lie?",
        "The token is the first whose running sum is greater than u.",
        "A token of probability 0 has a part of length 0, in which no number lies.",
    ),
)
def check_draw(fn):
    cases = (
        ([0.5, 0.25, 0.25], ((0.0, 0), (0.25, 0), (0.5, 1), (0.625, 1), (0.75, 2), (0.99, 2))),
        ([0.0, 0.25, 0.75], ((0.0, 1), (0.125, 1), (0.25, 2), (0.9, 2))),
        ([0.25, 0.0, 0.0, 0.75, 0.0], ((0.2, 0), (0.25, 3), (0.9999999, 3))),
        ([0.0, 0.0, 1.0], ((0.0, 2), (0.5, 2))),
    )
    for probabilities, draws in cases:
        for u, wanted in draws:
            found = token_of(fn(torch.tensor(probabilities, dtype=torch.float64), u), len(probabilities))
            require(
                probabilities[found] > 0,
                f"from {probabilities}, u = {u} draws token {found}, which has the probability 0",
            )
            require(found == wanted, f"from {probabilities}, u = {u} should draw token {wanted}, and draws {found}")
    drawn = [token_of(fn(SIZES.clone(), (i + 0.5) / 1100), 6) for i in range(1100)]
    counts = [drawn.count(token) for token in range(6)]
    require(
        counts == [400, 200, 200, 100, 100, 100],
        f"1,100 numbers spread evenly from 0 to 1 draw the six sizes {counts} times, expected 400, 200, 200 and 100 "
        "three times",
    )


def token_of(found, size: int) -> int:
    """The learner's token as an int; fails unless it is one of ``size``."""
    if isinstance(found, torch.Tensor):
        require(found.numel() == 1, f"the result should be one token, and has shape {tuple(found.shape)}")
    found = require_integer(found, "the number of a token")
    require(0 <= found < size, f"the result is {found}, and there are {size} tokens, 0 to {size - 1}")
    return found


@exercise(
    "generation.z_scores",
    title="Test a sampler by counting",
    hints=(
        "Of n draws, a token of probability p is expected n p times.",
        "The number of its draws has the variance n p (1 - p).",
        "A token of probability 0 has no variance: its z is 0 if it never came, and infinite if it did.",
    ),
)
def check_z_scores(fn):
    counts, p = torch.tensor([400, 232, 168, 100, 90, 110]), SIZES
    wanted = (counts - 1100 * p) / (1100 * p * (1 - p)).sqrt()
    result = fn(counts.clone(), p.clone())
    require_shape(result, (6,), "the result")
    mistakes = {
        "divide by the standard deviation, which is the root of the variance": (counts - 1100 * p)
        / (1100 * p * (1 - p)),
        "the variance of a count is n p (1 - p), not n p": (counts - 1100 * p) / (1100 * p).sqrt(),
        "the sign is wrong: a token that comes too often has a positive z": -wanted,
        "the size alone is returned: a token that comes too rarely has a negative z": wanted.abs(),
    }
    for words, wrong in mistakes.items():
        require(not torch.allclose(result.double(), wrong, atol=1e-6), words)
    require_close(result, wanted, "z is (count - n p) over the root of n p (1 - p)")
    for counts, p, wanted in (
        ([6, 0, 2], [0.75, 0.0, 0.25], [0.0, 0.0, 0.0]),
        ([6, 1, 1], [0.75, 0.0, 0.25], [0.0, math.inf, -0.816496580927726]),
        ([0, 16], [0.0, 1.0], [0.0, 0.0]),
    ):
        result = fn(torch.tensor(counts), torch.tensor(p, dtype=torch.float64))
        require_shape(result, (len(p),), "the result")
        require(not result.isnan().any(), f"counts {counts} with probabilities {p} give NaN: 0 was divided by 0")
        wanted = torch.tensor(wanted, dtype=torch.float64)
        require(
            torch.allclose(result.double(), wanted),
            f"counts {counts} with probabilities {p} give {[round(z, 2) for z in result.tolist()]}, expected "
            f"{[round(z, 2) for z in wanted.tolist()]}",
        )


@exercise(
    "generation.penalty",
    title="Presence and frequency penalties",
    hints=(
        "Count how often each token stands in the text.",
        "The frequency penalty is taken off once for each time, the presence penalty once if the count is not 0.",
        "torch.bincount(tokens, minlength=len(logits)) counts.",
    ),
)
def check_penalty(fn):
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, 3.0])
    text = torch.tensor([1, 3, 1, 1, 0])
    cases = ((0.5, 0.0), (0.0, 0.25), (0.5, 0.25), (0.0, 0.0), (-0.5, 0.125))
    counts = torch.tensor([1.0, 3.0, 0.0, 1.0, 0.0])
    for presence, frequency in cases:
        given = logits.clone()
        result = fn(given, text.clone(), presence, frequency)
        require_shape(result, (5,), "the result")
        require(torch.equal(given, logits), "the logits that were given have changed: work on a copy")
        case = f"with presence {presence} and frequency {frequency},"
        require(
            torch.allclose(result[counts == 0].double(), logits[counts == 0].double()),
            f"{case} a token that is not in the text has changed",
        )
        if presence:
            each = logits - (presence + frequency) * counts
            require(
                not torch.allclose(result.double(), each.double()),
                f"{case} the presence penalty was taken off for each time; it is taken off once",
            )
        if frequency:
            once = logits - (presence + frequency) * (counts > 0)
            require(
                not torch.allclose(result.double(), once.double()),
                f"{case} the frequency penalty was taken off once; it is taken off for each time",
            )
        require_close(result, logits - presence * (counts > 0) - frequency * counts, f"{case} the logits are wrong")
    result = fn(logits.clone(), torch.tensor([], dtype=torch.int64), 0.5, 0.25)
    require_shape(result, (5,), "the result for an empty text")
    require_close(result, logits, "an empty text should change nothing")
    result = fn(torch.zeros(8), torch.tensor([6, 6, 5]), 1.0, 0.25)
    require_close(
        result, torch.tensor([0.0] * 5 + [-1.25, -1.5, 0.0]), "with a vocabulary of 8 tokens the logits are wrong"
    )


@exercise(
    "generation.shown",
    title="How much may be shown?",
    hints=(
        "If a stop string stands in the text, show what comes before the first of them.",
        "If not, the end of the text may still be the beginning of a stop string: hold that back.",
        "Try the ends of the text from the longest: does one of the stop strings begin with it?",
    ),
)
def check_shown(fn):
    cases = (
        ("Lily said no.", (), 13, "there is no stop string"),
        ("", ("END",), 0, "the text is empty"),
        ("Lily. END Ben", ("END",), 6, "a stop string stands in the text"),
        ("Lily. END Ben END", ("END",), 6, "the first place counts"),
        ("Lily. Ben. Pip.", ("Pip", "Ben"), 6, "the stop string that comes first in the text counts"),
        ("Lily. E", ("END",), 6, "the end may be the beginning of a stop string"),
        ("Lily. EN", ("END",), 6, "the end may be the beginning of a stop string"),
        ("Lily. EB", ("END",), 8, "the end is no beginning of a stop string any more"),
        ("she said: aab", ("aabaab",), 10, "the end may be the beginning of a stop string"),
        ("she said: aabaa", ("aabaab",), 10, "the longest end counts"),
        ("Lily.\n", ("\n\nUser", "."), 4, "a whole stop string goes before a part of another"),
        ("Lily\n", ("END", "\n\nUser"), 4, "each of the stop strings may have begun"),
        ("Lily\nU", ("User", "\nUs"), 4, "the longest of the ends is held back"),
        ("Lily went to the park. EN", ("END",), 23, "the end may be the beginning of a stop string"),
        ("EN", ("END",), 0, "the whole text may be the beginning of a stop string"),
    )
    for text, stops, wanted, why in cases:
        found = require_integer(fn(text, list(stops)), "the number of characters")
        require(
            found == wanted,
            f"of {text!r} with the stop strings {list(stops)}, {wanted} characters may be shown ({why}), and you "
            f"show {found}",
        )
