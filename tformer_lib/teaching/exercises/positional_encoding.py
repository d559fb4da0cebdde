"""The checks of chapter 04: sinusoids, the map that shifts them, ALiBi's bias, T5's buckets, relative scores."""

import torch
from torch.overrides import TorchFunctionMode

from tformer_lib import positional_encoding
from tformer_lib.contract import counted
from tformer_lib.teaching.exercises.engine import exercise, is_close, require, require_close, require_shape


@exercise(
    "positional_encoding.sinusoidal",
    title="The table, from the formula",
    hints=(
        "There are width / 2 frequencies, and each fills two neighbouring channels.",
        "torch.arange(0, width, 2) is the 2i of the formula; divide it by width, not by width / 2.",
        "Fill an empty table in two strides: table[:, 0::2] = angles.sin() and table[:, 1::2] = angles.cos().",
    ),
)
def check_sinusoidal(fn):
    table = fn(50, 16)
    expected = positional_encoding.sinusoidal(50, 16)
    require_shape(table, (50, 16), "the table")
    require(
        not torch.allclose(table[0], torch.cat((torch.zeros(8), torch.ones(8))).to(table.dtype), atol=1e-4),
        "row 0 has all sines first and all cosines after: the paper interleaves them, sin, cos, sin, cos",
    )
    require_close(table[0], expected[0], "row 0 is position 0, where every sine is 0 and every cosine is 1")
    require_close(table[:, 0], expected[:, 0], "channel 0 is sin(p): its frequency is base^0 = 1")
    require_close(
        table[:, 2], expected[:, 2], "channel 2 has the second frequency, base^(-2 / width); count 2i in twos"
    )
    require_close(table, expected, "a frequency is wrong: channel 2i and 2i + 1 turn by base^(-2i / width) per step")
    require_close(fn(7, 4), positional_encoding.sinusoidal(7, 4), "width 16 was right, width 4 is not")
    require_close(fn(1, 4), positional_encoding.sinusoidal(1, 4), "the table of one position is wrong")


@exercise(
    "positional_encoding.shift",
    title="The map of a shift",
    hints=(
        "Write sin(a + b) and cos(a + b) with the angle-sum formulas; a is the old angle, b the shift's.",
        "The map is block-diagonal: width / 2 blocks of 2 x 2, one for each frequency.",
        "With rows as (sin, cos), the block is [[cos b, sin b], [-sin b, cos b]], b = shift * frequency.",
    ),
)
def check_shift(fn):
    for shift, width in ((0, 12), (1, 12), (5, 12), (40, 12), (-3, 12), (2, 6)):
        table = positional_encoding.sinusoidal(400, width).double()
        matrix = fn(shift, width)
        require_shape(matrix, (width, width), f"the map for shift {shift}")
        matrix = matrix.double()
        if shift == 0:
            require_close(
                matrix, torch.eye(width), "a shift by 0 leaves every row as it is: the identity", name="the map"
            )
        here, there = table[50:300], table[50 + shift : 300 + shift]
        back = table[50 - shift : 300 - shift]
        moved = here @ matrix.T  # each row p becomes matrix @ p
        require(
            shift == 0 or not torch.allclose(moved, back, atol=1e-4),
            f"the map for shift {shift} moves by {-shift}: the sign of the sines is the other way round",
        )
        require_close(
            moved, there, f"map(shift={shift}) times the row of p is not the row of p + {shift}", tolerance=1e-3
        )


@exercise(
    "positional_encoding.alibi",
    title="ALiBi for a cache",
    hints=(
        "Where does the last of the T queries stand, if there are S keys? And the first?",
        "Query i stands at S - T + i; subtract that from the keys' positions 0 .. S-1.",
        "distance = (arange(S)[None, :] - (arange(T)[:, None] + S - T)).abs(); multiply by -slopes[:, None, None].",
    ),
)
def check_alibi(fn):
    slopes = torch.tensor([0.5, 0.25, 0.125])
    square = fn(slopes, 4, 4)
    require_shape(square, (3, 4, 4), "the bias of 4 queries to 4 keys")
    require(square[0, 3, 3] == 0, "a query's distance to itself is 0, and so is its bias")
    require(square[0, 3, 0] <= 0, "the bias is positive: distance should lower a score, not raise it")
    behind = torch.ones(4, 4, dtype=torch.bool).tril()
    require_close(square * behind, expected_alibi(slopes, 4, 4) * behind, "the bias of head h is -slope[h] * distance")
    require_close(
        square, expected_alibi(slopes, 4, 4), "a key after the query is as far away as one before it: take the absolute"
    )
    cached = fn(slopes, 1, 6)
    require_shape(cached, (3, 1, 6), "the bias of 1 query to 6 keys")
    require(
        cached[0, 0, 5] == 0,
        "with 1 query and 6 keys the query stands at position 5, beside the last key: align to the bottom right",
    )
    require_close(fn(slopes, 3, 7), expected_alibi(slopes, 3, 7), "3 queries and 7 keys: the queries are the last 3")
    slope = torch.tensor([0.3])
    require_close(fn(slope, 2, 5), expected_alibi(slope, 2, 5), "one head, with the slope 0.3: the bias is wrong")


def expected_alibi(slopes: torch.Tensor, T: int, S: int) -> torch.Tensor:
    """(heads, T, S) by two loops, for any slopes."""
    bias = torch.zeros(len(slopes), T, S)
    for i in range(T):
        for j in range(S):
            bias[:, i, j] = -slopes * abs(S - T + i - j)
    return bias


@exercise(
    "positional_encoding.bucket",
    title="A bucket for every distance",
    hints=(
        "Distances under buckets / 2 are their own bucket; the others share the other half.",
        "The share of the way from exact to max_distance, by logarithms, is log(d / exact) / log(max / exact).",
        "int(exact + share * (buckets - exact)), and never more than buckets - 1.",
    ),
)
def check_bucket(fn):
    for buckets, largest in ((32, 128), (16, 64), (12, 100)):
        distances = torch.arange(0, 3 * largest)
        expected = positional_encoding.t5_bucket(-distances, buckets=buckets, max_distance=largest, bidirectional=False)
        exact = buckets // 2
        for distance, bucket in zip(distances.tolist(), expected.tolist(), strict=True):
            came = fn(distance, buckets, largest)
            require(came is not None, "your function returns None: is a return missing?")
            say = f"distance {distance} of {buckets} buckets to {largest}"
            require(came == int(came), f"{say} gives {came}: a bucket is a whole number")
            require(0 <= came < buckets, f"{say} gives bucket {came}; there are buckets 0 to {buckets - 1}")
            require(distance >= exact or came == distance, f"{say} gives bucket {came}: small distances are exact")
            edge = expected[distance - 1] != bucket or expected[min(distance + 1, len(expected) - 1)] != bucket
            near = abs(int(came) - bucket) <= 1 and edge  # float64 and float32 may differ at an edge
            require(came == bucket or near, f"{say} gives bucket {came}, expected {bucket}")


class Work(TorchFunctionMode):
    """Counts the calls that make tensors within it, the numbers of the largest, and what is looked up by index."""

    def __init__(self, *inputs):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in inputs}
        self.operations, self.largest, self.lookups = 0, 0, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not isinstance(out, torch.Tensor):
            return out
        name = function.__name__
        places = args[1] if name == "__getitem__" and isinstance(args[1], tuple) else args[1:2]
        by_places = name == "__getitem__" and any(isinstance(place, (torch.Tensor, list)) for place in places)
        if by_places or name in ("gather", "index_select", "take", "take_along_dim", "embedding"):
            self.lookups.append("table[indices]" if by_places else name)
        self.operations += 1
        if out.untyped_storage().data_ptr() not in self.known:
            self.largest = max(self.largest, out.numel())
        return out


@exercise(
    "positional_encoding.skew",
    title="Relative attention without an index",
    hints=(
        "First without a cache, T = S. Row i of queries @ table.T has what you need, from column T-1-i on.",
        "So each row is to move a place further left than the row above. What if rows were a number longer in memory?",
        "Add one column, lay the rows end to end, drop the first T-1 numbers, and cut into rows that are one shorter.",
        "For S keys, S+T-1 rows of the table are needed, distances -(S-1) to T-1. Pad to S+T columns, flatten, drop "
        "T-1 numbers at the front and one at the end, cut into rows of S+T-1 and keep S columns of them.",
    ),
)
def check_skew(fn):
    for T, S, longest in ((5, 5, 5), (1, 1, 1), (4, 4, 9), (1, 6, 6), (3, 7, 10), (2, 9, 9)):
        queries = torch.randn(2, T, 3, 8).transpose(1, 2)  # as a layer makes them: not contiguous
        check_one_skew(fn, queries, torch.randn(2 * longest - 1, 8), S)
    queries, table = torch.randn(1, 2, 3, 4).double().requires_grad_(), torch.randn(9, 4).double().requires_grad_()
    upstream = torch.randn(1, 2, 3, 5).double()
    found = fn(queries, table, 5)
    require(found.dtype == torch.float64, f"of float64 the scores should be float64, and are {found.dtype}")
    require_shape(found, (1, 2, 3, 5), "with one text, 2 heads, 3 queries and 5 keys, the result")
    require(found.requires_grad, "no gradient flows back to the table: was it detached, or its data copied?")
    grads = torch.autograd.grad((found * upstream).sum(), (queries, table), allow_unused=True)
    wanted = torch.autograd.grad((loop_over_pairs(queries, table, 5) * upstream).sum(), (queries, table))
    for grad, right, name in zip(grads, wanted, ("queries", "table"), strict=True):
        require(grad is not None, f"no gradient flows back to the {name}")
        require_close(grad, right, f"the values are right, and the gradient of the {name} is not", name="the gradient")
    check_work_of_skew(fn)


def check_one_skew(fn, queries: torch.Tensor, table: torch.Tensor, S: int) -> None:
    """Fail unless ``fn`` gives each query the score of its distance to each of ``S`` keys."""
    T, longest = queries.shape[2], (len(table) + 1) // 2
    case = f"with {counted(T, 'query', 'queries')}, {counted(S, 'key')} and a table up to distance {longest - 1}"
    found, expected = fn(queries, table, S), loop_over_pairs(queries, table, S)
    require_shape(found, expected.shape, f"{case}, the result")
    if is_close(found, expected):
        return
    mirrored = is_close(found, loop_over_pairs(queries, table.flip(0), S))
    require(
        not mirrored, f"{case}, past and future are exchanged: the distance is the key's position minus the query's"
    )
    top_left = loop_over_pairs(torch.cat((queries, queries.new_zeros(2, 3, S - T, 8)), 2), table, S)[:, :, :T]
    require(
        not is_close(found, top_left),
        f"{case}, query 0 is taken to stand at position 0: the queries are the last {T} of {S}",
    )
    past = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    require(
        not is_close(found * past, expected * past),
        f"{case}, keys up to the query's own are right, and those after it are not: "
        "padding a column on the left of the past's distances serves a causal model alone",
    )
    last_row = is_close(found[:, :, -1], expected[:, :, -1])
    drift = "is not: each row begins a column earlier than the row above it"
    require(not last_row, f"{case}, the last query's row is right, and one above it {drift}")
    require(
        not is_close(found[:, :, 0], expected[:, :, 0]),
        f"{case}, the first query's row is right, and one below it {drift}",
    )
    require_close(found, expected, f"{case}, a score is not the query's product with the row of its distance")


def loop_over_pairs(queries: torch.Tensor, table: torch.Tensor, S: int) -> torch.Tensor:
    """(batch, heads, T, S), one pair of a query and a key after the other."""
    T, zero = queries.shape[2], len(table) // 2
    rows = [[queries[:, :, i] @ table[zero + j - (S - T + i)] for j in range(S)] for i in range(T)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def check_work_of_skew(fn) -> None:
    """Fail where the answer looks scores up, takes an operation for each row, or makes a tensor that is too large."""
    T, S, width = 48, 64, 32
    queries, table = torch.randn(1, 2, T, width), torch.randn(2 * 512 - 1, width)
    with Work(queries, table) as work:
        fn(queries, table, S)
    require(not work.lookups, f"the values are right, but they are looked up ({' '.join(work.lookups[:1])}): reshape")
    require(work.operations < T, f"{T} queries take {work.operations} operations: do not loop over rows, reshape")
    enough = 2 * T * (S + T)
    require(
        work.largest <= 2 * enough,
        f"a tensor of {work.largest:,} numbers is made; {enough:,} do for 2 heads, {T} queries and {S} keys: "
        "multiply with the S + T - 1 rows of the table that can occur, and not with more",
    )
