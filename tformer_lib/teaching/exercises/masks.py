"""The exercises of the masks chapter."""

import torch

from tformer_lib import masks
from tformer_lib.attention import attend
from tformer_lib.teaching.exercises.engine import exercise, require, require_dtype, require_shape


def require_mask(found, expected: torch.Tensor, name: str) -> None:
    """Fail unless ``found`` is the boolean mask ``expected`` (T, S), saying of one pair what is wrong with it."""
    require_shape(found, expected.shape, name)
    require_dtype(found, torch.bool, name)
    if found.numel() and torch.equal(found, ~expected):
        require(False, f"{name} is inverted: True means that a query may look, and here it hides")
    for t, s in (found != expected).nonzero().tolist()[:1]:
        verb = "attends to" if found[t, s] else "does not see"
        require(False, f"{name}: row {t} {verb} position {s}, {reason(expected.shape, t, s, bool(found[t, s]))}")


def reason(shape, t: int, s: int, sees: bool) -> str:
    """Why a query may (not) look at a key: where the query stands, and on which side of it the key is."""
    here = shape[1] - shape[0] + t
    place = f"the query stands at position {here}"
    if sees and s > here:
        return f"but {place}: the future leaks"
    return f"but {place} and {'must not' if sees else 'may'}"


@exercise(
    "masks.causal",
    title="A causal mask for T queries at the end of S positions",
    hints=(
        "Write down the position of each query and of each key, then compare every pair.",
        "The last query stands on the last key, so query t stands at position S - T + t.",
        "torch.arange(S - T, S)[:, None] holds the queries' positions as a column; compare it with torch.arange(S).",
    ),
)
def check_causal(fn):
    for T, S in ((4, 4), (1, 5), (3, 7), (5, 3), (1, 1)):
        require_mask(fn(T, S), masks.causal(T, S), f"the mask for T = {T}, S = {S}")


@exercise(
    "masks.sinks",
    title="A sliding window that keeps the first tokens in sight",
    hints=(
        "Three conditions on every pair: not in the future, inside the window, among the first `sinks` keys.",
        "A pair is allowed if it is not in the future and (it is inside the window or the key is a sink).",
        "(keys <= queries) & ((keys > queries - window) | (keys < sinks))",
    ),
)
def check_sinks(fn):
    for T, S, window, sinks in ((8, 8, 3, 2), (1, 8, 3, 1), (8, 8, 1, 0), (3, 9, 4, 2), (6, 6, 2, 6)):
        expected = masks.sliding_window(T, S, window=window) | (masks.causal(T, S) & (torch.arange(S) < sinks))
        found = fn(T, S, window, sinks)
        require_mask(found, expected, f"the mask for T = {T}, S = {S}, window = {window}, sinks = {sinks}")


@exercise(
    "masks.packed",
    title="Documents packed into one row, each seeing its own past",
    hints=(
        "Two positions belong together if their document ids are equal; which comparison makes all pairs at once?",
        "ids[:, :, None] == ids[:, None, :] has shape (batch, T, T). Nothing in it knows about time yet.",
        "And it with the causal mask, and put a dimension for the heads at index 1.",
    ),
)
def check_packed(fn):
    ids = torch.tensor([[0, 0, 0, 1, 1, 2], [4, 4, 4, 4, 4, 4], [3, 3, 1, 1, 1, 0]])
    found = fn(ids)
    require_shape(found, (3, 1, 6, 6), "the mask, with one dimension of size 1 for the heads,")
    for b, names in enumerate(ids.tolist()):
        for t, s in torch.cartesian_prod(torch.arange(6), torch.arange(6)).tolist():
            if names[t] != names[s]:
                crossing = f"position {t} of document {names[t]} sees position {s} of document {names[s]}"
                require(not found[b, 0, t, s], f"{crossing}: documents leak into one another")
        require_mask(found[b, 0], masks.document(ids[b]) & masks.causal(6), f"the mask of row {b}")


@exercise(
    "masks.peeks",
    title="A detector of models that look ahead",
    hints=(
        "Run the model twice: on x, and on an x whose last tokens are different. Which outputs may change?",
        "Cut at every position: after a change from position t on, all outputs before t must be as they were.",
        "Change a token by a lot, such as adding 10, and compare with torch.equal or a small tolerance.",
    ),
)
def check_peeks(fn):
    x = torch.randn(6, 8)
    for name, (model, peeks) in suspects().items():
        before = x.clone()
        verdict = fn(model, x)
        require(torch.equal(x, before), "your detector changes the x that it was given: work on x.clone()")
        require(isinstance(verdict, bool), f"the verdict should be True or False, and is a {type(verdict).__name__}")
        require(peeks or not verdict, f"{name} was called a peeker, and it never looks ahead")
        require(verdict or not peeks, f"{name} looks ahead, and your detector did not see it")


def suspects() -> dict:
    """Models from (T, width) to (T, width), and whether each one looks ahead."""
    return {
        "a model that sees the whole sequence": (lambda x: x + x.mean(0), True),
        "a model that sees the running mean of its past": (lambda x: x.cumsum(0) / steps(x), False),
        "a model that works on each token alone": (torch.tanh, False),
        "a model whose first output alone sees the second token": (only_the_first_peeks, True),
        "a model whose token before the last sees the last": (only_the_last_but_one_peeks, True),
        "causal attention": (lambda x: attention_on(x, masks.causal(len(x))), False),
        "attention that is one position too generous": (lambda x: attention_on(x, one_ahead(len(x))), True),
        "a model that normalises over the length of the sequence": (lambda x: (x - x.mean(0)) / x.std(0), True),
        "a model that sees the token before it": (lambda x: x.roll(1, 0) * (steps(x) > 1), False),
        "a model that ignores its input": (torch.ones_like, False),
    }


def steps(x):
    """1, 2, ..., T as a column."""
    return torch.arange(1, len(x) + 1)[:, None]


def only_the_first_peeks(x):
    """Row 0 of the result knows row 1 of x; the others know their past."""
    return torch.cat((x[:1] + x[1:2], x[1:]))


def only_the_last_but_one_peeks(x):
    """Row T - 2 of the result knows row T - 1 of x."""
    out = x.clone()
    out[-2] = x[-2] + x[-1]
    return out


def one_ahead(T: int):
    """(T, T): the causal mask with one key too many in each row."""
    return torch.ones(T, T, dtype=torch.bool).tril(1)


def attention_on(x, mask):
    """Self-attention of one head on the bare tokens: (T, width) -> (T, width)."""
    return attend(x[None, None], x[None, None], x[None, None], mask=mask)[0, 0]
