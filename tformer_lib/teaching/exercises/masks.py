"""The exercises of the masks chapter."""

import itertools

import numpy as np
import torch

from tformer_lib import masks
from tformer_lib.attention import attend
from tformer_lib.contract import counted
from tformer_lib.teaching.exercises.engine import INVERTED, exercise, require, require_dtype, require_shape


def require_mask(found, expected: torch.Tensor, name: str) -> None:
    """Fail unless ``found`` is the boolean mask ``expected`` (T, S), saying of one pair what is wrong with it."""
    require_shape(found, expected.shape, name)
    require_dtype(found, torch.bool, name)
    if found.numel() and torch.equal(found, ~expected):
        require(False, f"{name} {INVERTED}")
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
    title="The causal mask",
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
    title="A window that keeps the first tokens",
    hints=(
        "Three conditions on every pair: not in the future, inside the window, among the first `sinks` keys.",
        "A pair is allowed if it is not in the future and (it is inside the window or the key is a sink).",
        "(keys <= queries) & ((keys > queries - window) | (keys < sinks))",
    ),
)
def check_sinks(fn):
    for T, S, window, sinks in (
        (8, 8, 3, 2),
        (1, 8, 3, 1),
        (8, 8, 1, 0),
        (3, 9, 4, 2),
        (6, 6, 2, 6),
        (5, 3, 2, 1),
        (1, 1, 1, 1),
    ):
        expected = masks.sliding_window(T, S, window=window) | (masks.causal(T, S) & (torch.arange(S) < sinks))
        found = fn(T, S, window, sinks)
        require_mask(found, expected, f"the mask for T = {T}, S = {S}, window = {window}, sinks = {sinks}")


@exercise(
    "masks.packed",
    title="Documents in one row",
    hints=(
        "Two positions belong together if their document ids are equal; which comparison makes all pairs at once?",
        "ids[:, :, None] == ids[:, None, :] has shape (batch, T, T). Nothing in it knows about time yet.",
        "And it with the causal mask, and put a dimension for the heads at index 1.",
    ),
)
def check_packed(fn):
    check_rows(fn, torch.tensor([[0, 0, 0, 1, 1, 2], [4, 4, 4, 4, 4, 4], [3, 3, 1, 1, 1, 0]]))
    check_rows(fn, torch.tensor([[5, 5, 2, 2]]))
    check_rows(fn, torch.tensor([[7]]))


def check_rows(fn, ids: torch.Tensor) -> None:
    """Hold the mask of rows of ids (batch, T) against the rules, and say which documents leak."""
    batch, T = ids.shape
    found = fn(ids)
    require_shape(found, (batch, 1, T, T), "the mask, with one dimension of size 1 for the heads,")
    wanted = masks.document(ids) & masks.causal(T)
    upside_down = isinstance(found, torch.Tensor) and found.dtype == torch.bool and torch.equal(found, ~wanted)
    require(not upside_down, f"the mask {INVERTED}")
    for b, names in enumerate(ids.tolist()):
        for t, s in torch.cartesian_prod(torch.arange(T), torch.arange(T)).tolist():
            if names[t] != names[s]:
                crossing = f"position {t} of document {names[t]} sees position {s} of document {names[s]}"
                require(not found[b, 0, t, s], f"{crossing}: documents leak into one another")
        require_mask(found[b, 0], masks.document(ids[b]) & masks.causal(T), f"the mask of row {b}")


@exercise(
    "masks.peeks",
    title="A detector of leaks",
    hints=(
        "Run the model twice: on x, and on an x whose last tokens are different. Which outputs may change?",
        "Cut at every position: after a change from position t on, all outputs before t must be as they were.",
        "Change a token by a lot, such as adding 10, and compare with torch.equal or a small tolerance. A derivative "
        "is not enough: that of a number's sign is zero, and the sign still tells something.",
    ),
)
def check_peeks(fn):
    inputs = torch.randn(6, 8), torch.randn(9, 5)
    for x, (name, (model, peeks)) in itertools.product(inputs, suspects().items()):
        before = x.clone()
        verdict = fn(model, x)
        require(torch.equal(x, before), "your detector changes the x that it was given: work on x.clone()")
        one = isinstance(verdict, torch.Tensor) and verdict.dtype == torch.bool and verdict.numel() == 1
        truth = one or isinstance(verdict, (bool, np.bool_))
        require(truth, f"the verdict should be True or False, and is a {type(verdict).__name__}")
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
        "a model whose first output alone sees the last number of the last token": (only_the_corner_peeks, True),
        "a model whose middle output alone sees by how much the next token is above 5": (sees_above_five, True),
        "causal attention": (lambda x: attention_on(x, masks.causal(len(x))), False),
        "attention that is one position too generous": (lambda x: attention_on(x, one_ahead(len(x))), True),
        "a model that normalises over the length of the sequence": (lambda x: (x - x.mean(0)) / x.std(0), True),
        "a model that sees only the sign of the next token": (lambda x: x + sign_of_next(x), True),
        "a model that looks ahead from tokens that are not zero": (lambda x: x + (x != 0) * x.mean(0), True),
        "a model that sees the token before it": (lambda x: x.roll(1, 0) * (steps(x) > 1), False),
        "a model that ignores its input": (torch.ones_like, False),
    }


def steps(x):
    """1, 2, ..., T as a column."""
    return torch.arange(1, len(x) + 1)[:, None]


def only_the_first_peeks(x):
    """Row 0 of the result knows row 1 of x; the others know their past."""
    return torch.cat((x[:1] + x[1:2], x[1:]))


def sign_of_next(x):
    """-1 or 1 for each number of the next token, 0 behind the last: its derivative is zero, and it looks ahead."""
    return torch.cat((x[1:], torch.zeros_like(x[:1]))).sign()


def only_the_last_but_one_peeks(x):
    """Row T - 2 of the result knows row T - 1 of x."""
    out = x.clone()
    out[-2] = x[-2] + x[-1]
    return out


def only_the_corner_peeks(x):
    """The last number of row 0 of the result knows the last number of x."""
    out = x.clone()
    out[0, -1] += x[-1, -1]
    return out


def sees_above_five(x):
    """The row in the middle knows by how much the numbers of the next one are above 5, which few are."""
    out, middle = x.clone(), len(x) // 2
    out[middle] += (x[middle + 1] - 5).relu()
    return out


def one_ahead(T: int):
    """(T, T): the causal mask with one key too many in each row."""
    return torch.ones(T, T, dtype=torch.bool).tril(1)


def attention_on(x, mask):
    """Self-attention of one head on the bare tokens: (T, width) -> (T, width)."""
    return attend(x[None, None], x[None, None], x[None, None], mask=mask)[0, 0]


@exercise(
    "masks.tree",
    title="The mask of a tree",
    hints=(
        "Start with the drafts alone: a (D, D) table that says who is whose parent. Who sees a grandparent?",
        "A draft sees what its parent sees, and itself. The parent may stand behind it, so one pass in order is not "
        "enough: repeat until nothing changes.",
        "If a table says who is reached in up to n steps up, its product with itself says who is reached in up to 2n.",
        "A draft's depth is the number of drafts that it sees, less itself. And one draft can be padding: no row, no "
        "column, position 0.",
    ),
)
def check_tree(fn):
    chain, star, backwards = [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [-1, -1, -1], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, -1]
    cases = [([[-1]], [3]), ([star], [2]), ([chain], [4]), ([backwards], [1])]
    cases += [([[-1, 0, 0, 1, 1], [-1, -1, 0, 1, -2], [-2] * 5], [4, 1, 6])]
    cases += [([grow(12), grow(7) + [-2] * 5, [-2] * 2 + grow(10, behind=2)], [5, 0, 9]) for _ in range(3)]
    for parents, lengths in cases:
        given, prefixes = torch.tensor(parents), torch.tensor(lengths)
        pair = fn(given, prefixes)
        unchanged = given.tolist() == parents and prefixes.tolist() == lengths
        require(unchanged, "your function changes the tensors that it was given: work on a clone()")
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2
        require(is_pair, "return two tensors: the mask and the positions")
        require_tree(*pair, parents, lengths)


def grow(drafts: int, behind: int = 0) -> list[int]:
    """The parents of a random tree whose drafts stand in any order, numbered from ``behind``."""
    names = torch.randperm(drafts).tolist()
    parents = [0] * drafts
    for i, name in enumerate(names):
        above = int(torch.randint(-1, i, ())) if i else -1
        parents[name] = names[above] + behind if above >= 0 else -1
    return parents


def require_tree(mask, positions, parents, lengths) -> None:
    """Compare with a walk from every draft up to the prefix, one draft after another."""
    batch, D, S = len(parents), len(parents[0]), max(lengths)
    require_shape(mask, (batch, 1, D, S + D), f"the mask of {batch} trees with {D} drafts behind {S} keys")
    require_dtype(mask, torch.bool, "the mask")
    positions = torch.as_tensor(positions)
    require_shape(positions, (batch, D), "the tensor of positions")
    whole = not positions.is_floating_point() and positions.dtype != torch.bool
    require(whole, f"positions are whole numbers, and yours are {positions.dtype}")
    for tree, length, row, places in zip(parents, lengths, mask[:, 0], positions.tolist(), strict=True):
        for t, parent in enumerate(tree):
            about = f"with the parents {tree} and a prefix of {length}, draft {t}"
            require_row(row[t, :S], row[t, S:].tolist(), walk(tree, t), parent, length, about)
            require_place(places, t, parent, length, len(walk(tree, t)) - 1, max(lengths), about)


def walk(tree, t: int) -> list[int]:
    """A draft, its parent, its parent's parent, and so on to the prefix; of padding, nothing."""
    path = []
    while t >= 0 and tree[t] != -2:
        path.append(t)
        t = tree[t]
    return path


def require_row(prefix, drafts, path, parent, length, about) -> None:
    """Fail unless a draft sees its own row's prefix and its path, and nothing else."""
    if parent == -2:
        require(not prefix.any() and not any(drafts), f"{about} is padding (-2), and still sees something")
        return
    seen = prefix.sum().item()
    require(not prefix[length:].any(), f"{about} sees a key of the cache behind its own prefix: that is padding")
    require(seen == length, f"{about} sees {seen} keys of the prefix: it should see them all")
    require(drafts[path[0]], f"{about} does not see itself")
    for s, sees in enumerate(drafts):
        steps = path.index(s) if s in path else 0
        require(
            sees or s not in path,
            f"{about} does not see draft {s}, from which it descends ({counted(steps, 'step')} up)",
        )
        require(not sees or s in path, f"{about} sees draft {s}, which is not on its own path: a text that never was")


def require_place(places, t, parent, length, depth, longest, about) -> None:
    """Fail unless a draft stands as far behind its prefix as it is deep in the tree."""
    if parent == -2:
        require(places[t] == 0, f"{about} is padding, its position should be 0, and is {places[t]}")
        return
    found, right = places[t], length + depth
    told = f"{about} is given position {found}"
    require(found == right or found != longest + depth, f"{told}: count from its own prefix, not from the longest")
    require(found == right or found != length + t, f"{told}, its place in the row: it is {depth} deep in the tree")
    require(found == right, f"{told}: it is {depth} deep behind {length} tokens, so it stands at {right}")
