"""Random calls of the kernels' public doors, right ones and wrong ones, and what must come of each.

A wrong call has one thing wrong: a shape, a dtype, a number that is indexed by. It must be refused by a ValueError, on
every step alike; a right one, whatever its strides, must give what float64 gives. The tests draw the calls with
hypothesis, ``python -m benchmarks.sanitize <topic> --device cpu`` draws them under an address sanitizer, where a
read or a write outside of a tensor ends the process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from tformer_lib.flash_attention import flash_attention, flash_attention_varlen
from tformer_lib.paged_attention import blocks_for, paged_attention, write_cache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


@dataclass
class Call:
    """One call of a door.

    Attributes:
        function: the door.
        arguments: by name.
        what: what is wrong with it, or odd.
        refused: whether it must be refused.
        exact: what it must give, in float64, computed from the arguments.
    """

    function: Callable
    arguments: dict
    exact: Callable[[dict], Tensor]
    what: str = "nothing"
    refused: bool = False

    def check(self, step: int | str) -> None:
        """Make the call by one step.

        Raises:
            AssertionError: a wrong call was answered, or a right one was answered wrongly.
        """
        __tracebackhide__ = True
        if not self.refused:
            found, wanted = self.function(**self.arguments, step=step), self.exact(self.arguments)
            limit = TOLERANCE[found.dtype] * max(1.0, wanted.abs().max().item() if wanted.numel() else 0.0)
            torch.testing.assert_close(
                found.double(), wanted, rtol=0, atol=limit, msg=lambda text: f"{self.what}: {text}"
            )
            return
        try:
            self.function(**self.arguments, step=step)
        except ValueError:
            return
        raise AssertionError(f"{self.function.__name__} by step {step} answered a call with this wrong: {self.what}")


def changed(call: Call, changes: dict[str, Callable], oddities: dict[str, Callable], random: Random) -> Call:
    """The call with one change that makes it wrong, one oddity that does not, or neither."""
    kind = random.choice(("wrong", "wrong", "odd", "plain"))
    if kind == "plain":
        return call
    call.what = random.choice(sorted(changes if kind == "wrong" else oddities))
    change = (changes if kind == "wrong" else oddities)[call.what](call.arguments, random)
    call.arguments.update(change or {})
    call.refused = kind == "wrong" and change is not None  # None: this call has nothing that could be made wrong so
    return call


def numbers(random: Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers in memory of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(random.randrange(2**31))).to(dtype)


def int32(values: list[int]) -> Tensor:
    """(n,) int32."""
    return torch.tensor(values, dtype=torch.int32)


def running_sum(counts: list[int]) -> Tensor:
    """(n + 1,) int32: 0, then the sum of the first count, of the first two, ..."""
    return int32([sum(counts[:i]) for i in range(len(counts) + 1)])


# --- other strides -------------------------------------------------------------------------------------------------


def spread(x: Tensor) -> Tensor:
    """The same numbers, every second element of a larger tensor."""
    wide = torch.full((*x.shape, 2), 7).to(x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def turned(x: Tensor) -> Tensor:
    """The same numbers with the first two dimensions swapped in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def shifted(x: Tensor) -> Tensor:
    """The same numbers, one element into memory that begins at a multiple of 64 bytes."""
    memory = x.new_empty(x.numel() + 1)
    memory[1:] = x.flatten()
    return memory[1:].view(x.shape)


def repeated(x: Tensor) -> Tensor:
    """The first row for all, by a stride of 0."""
    return x[:1].expand_as(x)


def of(name: str, change: Callable[[Tensor], Tensor | None], needs: Callable[[Tensor], bool] = lambda x: True):
    """A change of one argument, where it is given."""

    def apply(arguments: dict, random: Random) -> dict | None:
        x = arguments.get(name)
        return None if x is None or not needs(x) else {name: change(x)}

    return apply


def given(**options):
    """A change that gives other options."""
    return lambda arguments, random: options


def more(x: Tensor, dim: int) -> Tensor:
    """One more slice along a dimension."""
    return torch.cat((x, x.narrow(dim, 0, 1)), dim)


def some(x: Tensor) -> bool:
    """Whether there is an element."""
    return x.numel() > 0


# --- paged attention -----------------------------------------------------------------------------------------------


def paged_call(random: Random) -> Call:
    """A call of ``paged_attention``: a few rows, their blocks all over the pool, nonsense past each row's last one."""
    block_size, group, kv_heads = random.choice((1, 3, 4, 16)), random.randint(1, 3), random.randint(1, 3)
    d, dtype = random.choice((1, 5, 8, 24, 33)), random.choice(DTYPES)
    lengths = [random.choice((0, 1, random.randint(2, 70))) for _ in range(random.randint(1, 4))]
    used = [blocks_for(n, block_size) for n in lengths]
    blocks = sum(used) + random.randint(0, 2)
    order = random.sample(range(blocks), blocks)
    tables = torch.full((len(lengths), max(used) + 1), 2**30, dtype=torch.int32)
    for row, count in enumerate(used):
        tables[row, :count] = int32([order.pop() for _ in range(count)])
    arguments = {"block_tables": tables, "lengths": int32(lengths)}
    queries = len(lengths)
    if random.random() < 0.6:
        counts = [random.randint(0, min(n, 9)) for n in lengths]
        queries, arguments["query_starts"] = sum(counts), running_sum(counts)
        if random.random() < 0.5:
            arguments["max_queries"] = max(counts) + random.randint(0, 2)
    arguments["q"] = numbers(random, queries, group * kv_heads, d, dtype=dtype)
    for name in ("k_pool", "v_pool"):
        arguments[name] = numbers(random, blocks, kv_heads, block_size, d, dtype=dtype)
    if random.random() < 0.3:
        arguments["window"] = random.randint(1, 40)
    return changed(Call(paged_attention, arguments, exact_paged), PAGED_WRONG, PAGED_ODD, random)


def exact_paged(arguments: dict) -> Tensor:
    """One query after another: its keys are looked up one by one."""
    q, k_pool, v_pool = (arguments[name].double() for name in ("q", "k_pool", "v_pool"))
    tables, lengths, block_size = arguments["block_tables"], arguments["lengths"].tolist(), k_pool.shape[2]
    starts = arguments.get("query_starts")
    starts = list(range(len(q) + 1)) if starts is None else starts.tolist()
    out, window = torch.zeros_like(q), arguments.get("window")
    for row, length in enumerate(lengths):
        for query in range(starts[row], starts[row + 1]):
            last = length - starts[row + 1] + query
            places = range(max(0, last - window + 1) if window else 0, last + 1)
            if len(places) == 0:
                continue
            found = [(int(tables[row, p // block_size]), p % block_size) for p in places]
            k, v = (torch.stack([pool[b, :, o] for b, o in found], 1) for pool in (k_pool, v_pool))  # (kv_heads, S, d)
            groups = q[query].unflatten(0, (k.shape[0], -1))  # (kv_heads, group, d)
            weights = (groups @ k.mT * q.shape[2] ** -0.5).softmax(-1)
            out[query] = (weights @ v).flatten(0, 1)
    return out


def with_block(offset: Callable[[int], int]) -> Callable:
    """A wrong block id where a row's tokens are."""

    def apply(arguments: dict, random: Random) -> dict | None:
        size, lengths = arguments["k_pool"].shape[2], arguments["lengths"].tolist()
        places = [(row, place) for row, n in enumerate(lengths) for place in range(blocks_for(n, size))]
        if not places:
            return None
        tables = arguments["block_tables"].clone()
        tables[random.choice(places)] = offset(arguments["k_pool"].shape[0])
        return {"block_tables": tables}

    return apply


def with_number(name: str, place: int | None, value: Callable[[int], int]) -> Callable:
    """A wrong number in a list of integers; at a random place where None is given."""

    def apply(arguments: dict, random: Random) -> dict | None:
        x = arguments.get(name)
        if x is None or not some(x):
            return None
        x = x.clone()
        at = random.randrange(len(x)) if place is None else place
        x[at] = value(int(x[at]))
        return {name: x}

    return apply


def too_few_queries(arguments: dict, random: Random) -> dict | None:
    """max_queries below what a row has."""
    starts = arguments.get("query_starts")
    most = 0 if starts is None else int(starts.diff().max())
    return {"max_queries": most - 1} if most > 0 else None


PAGED_WRONG = {
    "a block past the pool": with_block(lambda blocks: blocks),
    "a block far past the pool": with_block(lambda blocks: 2**31 - 1),
    "a negative block": with_block(lambda blocks: -1),
    "a length past the table": with_number("lengths", None, lambda n: 2**30),
    "a negative length": with_number("lengths", None, lambda n: -1),
    "starts that begin late": with_number("query_starts", 0, lambda n: n + 1),
    "starts that begin before": with_number("query_starts", 0, lambda n: -1),
    "starts that end late": with_number("query_starts", -1, lambda n: n + 1),
    "starts that end early": with_number("query_starts", -1, lambda n: n - 1),
    "starts that rise and fall": with_number("query_starts", 1, lambda n: 2**30),
    "more queries than max_queries": too_few_queries,
    "a negative max_queries": given(max_queries=-1),
    "int64 tables": of("block_tables", Tensor.long),
    "tables of one dimension": of("block_tables", lambda x: x[0]),
    "tables of more rows": of("block_tables", lambda x: more(x, 0)),
    "tables of no row": of("block_tables", lambda x: x[:0]),
    "int64 lengths": of("lengths", Tensor.long),
    "float lengths": of("lengths", Tensor.float),
    "lengths of more rows": of("lengths", lambda x: more(x, 0)),
    "one length": of("lengths", lambda x: x[0]),
    "int64 starts": of("query_starts", Tensor.long),
    "starts of more rows": of("query_starts", lambda x: more(x, 0)),
    "more columns of q": of("q", lambda x: more(x, 2), some),
    "heads of q that do not fit": lambda a, random: (
        {"q": numbers(random, 2, a["k_pool"].shape[1] + 1, a["q"].shape[2])} if a["k_pool"].shape[1] > 1 else None
    ),
    "q of two dimensions": of("q", lambda x: x[:, 0]),
    "q in float64": of("q", Tensor.double),
    "q of integers": of("q", Tensor.long),
    "one pool in float64": of("v_pool", Tensor.double),
    "pools of other lengths": of("v_pool", lambda x: x[:-1], some),
    "a pool of other heads": of("v_pool", lambda x: more(x, 1), some),
    "a pool of shorter blocks": of("k_pool", lambda x: x[:, :, :-1]),
    "a pool of three dimensions": of("k_pool", lambda x: x[:, 0]),
    "pools without slots": lambda a, random: {name: a[name][:, :, :0] for name in ("k_pool", "v_pool")},
    "no window": given(window=0),
    "a negative window": given(window=-3),
    "half a window": given(window=2.5),
}
PAGED_ODD = {
    "q is every second element": of("q", spread),
    "q is turned": of("q", turned),
    "q is not aligned": of("q", shifted),
    "one query for all": of("q", repeated),
    "pools are turned": lambda a, random: {name: turned(a[name]) for name in ("k_pool", "v_pool")},
    "pools are part of more": lambda a, random: {name: more(a[name], 3)[..., :-1] for name in ("k_pool", "v_pool")},
    "every second column of a table": of("block_tables", spread),
    "tables are turned": of("block_tables", turned),
    "every second length": of("lengths", spread),
    "every second start": of("query_starts", spread),
    "a window past everything": given(window=2**31),
}


# --- writing -------------------------------------------------------------------------------------------------------


def written(step: int | str, **arguments) -> Tensor:
    """Both pools after ``write_cache`` into copies of them."""
    pools = {name: arguments[name].clone(memory_format=torch.preserve_format) for name in ("k_pool", "v_pool")}
    write_cache(**(arguments | pools), step=step)
    return torch.stack((pools["k_pool"], pools["v_pool"]))


def write_call(random: Random) -> Call:
    """A call of ``write_cache``: tokens to slots all over the pool, some of them nowhere, turned or not."""
    block_size, blocks, kv_heads = random.choice((1, 3, 8)), random.randint(1, 6), random.randint(1, 3)
    d, dtype, room = random.choice((2, 5, 8, 33)), random.choice(DTYPES), block_size * blocks
    tokens = random.randint(0, room)
    slots = [slot if random.random() < 0.8 else -1 for slot in random.sample(range(room), tokens)]
    arguments = {name: numbers(random, tokens, kv_heads, d, dtype=dtype) for name in ("k", "v")}
    for name in ("k_pool", "v_pool"):
        arguments[name] = numbers(random, blocks, kv_heads, block_size, d, dtype=dtype)
    arguments["slots"] = torch.tensor(slots, dtype=torch.int64)
    if random.random() < 0.7:
        pairs = random.randint(0, d // 2)
        arguments |= {name: numbers(random, tokens, pairs) for name in ("cos", "sin")}
        arguments["layout"] = random.choice(("half", "interleaved"))
    return changed(Call(written, arguments, exact_writing), WRITE_WRONG, WRITE_ODD, random)


def exact_writing(arguments: dict) -> Tensor:
    """One token after another, one pair of columns after another."""
    k, v, k_pool, v_pool = (arguments[name].double() for name in ("k", "v", "k_pool", "v_pool"))
    k, k_pool, v_pool = k.clone(), k_pool.clone(), v_pool.clone()
    if (cos := arguments.get("cos")) is not None:
        sin, pairs = arguments["sin"].double(), cos.shape[1]
        for pair in range(pairs):
            together = arguments["layout"] == "interleaved"
            i, j = (2 * pair, 2 * pair + 1) if together else (pair, pair + pairs)
            x, y, c, s = k[..., i].clone(), k[..., j].clone(), cos[:, pair, None].double(), sin[:, pair, None]
            k[..., i], k[..., j] = x * c - y * s, y * c + x * s
    for token, slot in enumerate(arguments["slots"].tolist()):
        if slot >= 0:
            block, offset = divmod(slot, k_pool.shape[2])
            k_pool[block, :, offset], v_pool[block, :, offset] = k[token], v[token]
    return torch.stack((k_pool, v_pool))


def past_the_pool(arguments: dict, random: Random) -> dict | None:
    """One slot too far."""
    slots, pool = arguments["slots"].clone(), arguments["k_pool"]
    if not some(slots):
        return None
    slots[random.randrange(len(slots))] = pool.shape[0] * pool.shape[2] + random.choice((0, 1, 2**40))
    return {"slots": slots}


def wide_angles(arguments: dict, random: Random) -> dict:
    """Angles for more columns than a head has."""
    tokens, _, d = arguments["k"].shape
    return {name: numbers(random, tokens, d // 2 + 1) for name in ("cos", "sin")}


WRITE_WRONG = {
    "a slot past the pool": past_the_pool,
    "int32 slots": of("slots", Tensor.int),
    "one slot more": of("slots", lambda x: more(x, 0), some),
    "slots of two dimensions": of("slots", lambda x: x[None]),
    "angles wider than a head": wide_angles,
    "cos wider than sin": of("cos", lambda x: more(x, 1), some),
    "cos of more tokens": of("cos", lambda x: more(x, 0), some),
    "cos in float64": of("cos", Tensor.double),
    "cos of one dimension": of("cos", lambda x: x.flatten(), lambda x: x.dim() == 2),
    "cos alone": lambda a, random: {"sin": None} if "cos" in a else None,
    "an unknown layout": given(layout="neither"),
    "a layout that is a number": given(layout=1),
    "one key more": of("k", lambda x: more(x, 0), some),
    "values of more heads": of("v", lambda x: more(x, 1), some),
    "values of more columns": of("v", lambda x: more(x, 2), some),
    "keys in float64": of("k", Tensor.double),
    "keys of integers": of("k", Tensor.long),
    "keys of two dimensions": of("k", lambda x: x[:, 0]),
    "pools of other lengths": of("v_pool", lambda x: x[:-1]),
    "a pool in float64": of("v_pool", Tensor.double),
    "a pool of shorter blocks": of("k_pool", lambda x: x[:, :, :-1]),
    "a pool of three dimensions": of("k_pool", lambda x: x[:, 0]),
}
WRITE_ODD = {
    "keys are every second element": of("k", spread),
    "values are turned": of("v", turned),
    "keys are not aligned": of("k", shifted),
    "one value for all": of("v", repeated),
    "every second slot": of("slots", spread),
    "cos is every second element": of("cos", spread),
    "sin is turned": of("sin", turned),
    "pools are turned": lambda a, random: {name: turned(a[name]) for name in ("k_pool", "v_pool")},
    "a slot far below 0": lambda a, random: {"slots": a["slots"].masked_fill(a["slots"] < 0, -(2**40))},
}


# --- flash attention -----------------------------------------------------------------------------------------------


def exact_dense(arguments: dict) -> Tensor:
    """Attention with the whole matrix of scores, in float64."""
    q, k, v = (arguments[name].double() for name in "qkv")
    T, S = q.shape[2], k.shape[2]
    before = torch.arange(S - T, S)[:, None] - torch.arange(S)  # how many keys lie between a query's own and a key
    left, right = sides_of(arguments)
    seen = (before <= left) & (-before <= right)
    seen = seen if arguments.get("mask") is None else seen & arguments["mask"]
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    if softcap := arguments.get("softcap"):
        scores = softcap * torch.tanh(scores / softcap)
    if (slopes := arguments.get("alibi_slopes")) is not None:
        scores = scores - slopes.double()[..., None, None] * before.abs()
    weights = torch.exp(scores.masked_fill(~seen, -torch.inf) - scores.amax(-1, keepdim=True) if S else scores)
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0) @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)


def sides_of(arguments: dict) -> tuple[float, float]:
    """How many keys before and after its own a query sees."""
    window, endless = arguments.get("window"), float("inf")
    left, right = window if isinstance(window, tuple) else (window - 1 if window else None, 0 if window else None)
    right = 0 if arguments.get("causal") else right
    return endless if left is None else left, endless if right is None else right


def draw_form(random: Random, heads: int, batch: int) -> dict:
    """What may be asked of scores, a window and values beside the plain."""
    form = {"causal": random.random() < 0.5}
    if random.random() < 0.4:
        sides = tuple(random.choice((None, 0, random.randint(1, 80))) for _ in range(2))
        form["window"] = random.choice((random.randint(1, 80), sides))
    if random.random() < 0.25:
        form["softcap"] = random.choice((0.5, 5.0, 50.0))
    if random.random() < 0.25:
        shape = random.choice(((heads,), (batch, heads)))
        form["alibi_slopes"] = torch.rand(shape, generator=torch.Generator().manual_seed(random.randint(0, 99)))
    return form


def flash_call(random: Random) -> Call:
    """A call of ``flash_attention``."""
    batch, kv_heads, group = random.randint(1, 2), random.randint(1, 2), random.randint(1, 3)
    T, S = (random.choice((0, 1, random.randint(2, 140))) for _ in range(2))
    d, dtype = random.choice((1, 5, 8, 24, 33)), random.choice(DTYPES)
    value_dim = d if random.random() < 0.7 else random.randint(1, 40)
    heads = {"q": (group * kv_heads, T, d), "k": (kv_heads, S, d), "v": (kv_heads, S, value_dim)}
    arguments = {name: numbers(random, batch, *size, dtype=dtype) for name, size in heads.items()}
    arguments |= draw_form(random, group * kv_heads, batch)
    return changed(Call(flash_attention, arguments, exact_dense), FLASH_WRONG, FLASH_ODD, random)


DENSE_WRONG = {
    "more columns of q": of("q", lambda x: more(x, x.dim() - 1), some),
    "more columns of k": of("k", lambda x: more(x, x.dim() - 1), some),
    "no columns": lambda a, random: {name: a[name][..., :0] for name in "qkv"},
    "q in float64": of("q", Tensor.double),
    "v in float64": of("v", Tensor.double),
    "k of integers": of("k", Tensor.long),
    "q of two dimensions": of("q", lambda x: x.flatten(1)[:, :1]),
    "v elsewhere": of("v", lambda x: x.to("meta")),
    "no window": given(window=0),
    "half a window": given(window=2.5),
    "a window of three sides": given(window=(1, 2, 3)),
    "a window that ends before it begins": given(window=(3, -1)),
    "no cap": given(softcap=0.0),
    "a cap below 0": given(softcap=-2.0),
    "slopes of other heads": given(alibi_slopes=torch.ones(7)),
    "slopes in float64": lambda a, random: {"alibi_slopes": torch.ones(a["q"].shape[-3]).double()},
    "slopes elsewhere": lambda a, random: {"alibi_slopes": torch.ones(a["q"].shape[-3], device="meta")},
}
FLASH_WRONG = DENSE_WRONG | {
    "more batches of q": of("q", lambda x: more(x, 0)),
    "more batches of k": of("k", lambda x: more(x, 0)),
    "more heads of v": of("v", lambda x: more(x, 1)),
    "more values than keys": of("v", lambda x: more(x, 2), some),
    "more keys than values": of("k", lambda x: more(x, 2), some),
    "heads of q that do not fit": lambda a, random: {"q": more(a["q"], 1)} if a["k"].shape[1] > 1 else None,
    "a mask of other lengths": lambda a, random: {"mask": torch.ones(a["q"].shape[2] + 2, 2 + a["k"].shape[2]).bool()},
    "a mask of numbers": lambda a, random: {"mask": torch.ones(a["q"].shape[2], a["k"].shape[2])},
}
STRIDES = {"every second element": spread, "turned": turned, "not aligned": shifted, "one for all": repeated}
FLASH_ODD = {f"{name} is {word}": of(name, how) for name in "qkv" for word, how in STRIDES.items()} | {
    "keys are columns": of("k", lambda x: x.mT.contiguous().mT),
    "a window past everything": given(window=2**31),
    "sides past everything": given(window=(2**31, 2**31)),
    "slopes that lie apart": of("alibi_slopes", spread),
}


def varlen_call(random: Random) -> Call:
    """A call of ``flash_attention_varlen``: a few sequences end to end, some of them empty."""
    kv_heads, group = random.randint(1, 2), random.randint(1, 3)
    d, dtype = random.choice((1, 5, 8, 24)), random.choice(DTYPES)
    sequences = random.randint(1, 4)
    counts = {name: [random.choice((0, 1, random.randint(2, 60))) for _ in range(sequences)] for name in "qk"}
    arguments = {f"cu_seqlens_{name}": running_sum(counts[name]) for name in "qk"}
    widths = {"q": d, "k": d, "v": d if random.random() < 0.7 else random.randint(1, 40)}
    for name, heads in (("q", group * kv_heads), ("k", kv_heads), ("v", kv_heads)):
        arguments[name] = numbers(random, sum(counts["q" if name == "q" else "k"]), heads, widths[name], dtype=dtype)
    if random.random() < 0.5:
        arguments |= {f"max_seqlen_{name}": max(counts[name]) + random.randint(0, 3) for name in "qk"}
    arguments |= draw_form(random, group * kv_heads, sequences)
    return changed(Call(flash_attention_varlen, arguments, exact_packed), VARLEN_WRONG, VARLEN_ODD, random)


def exact_packed(arguments: dict) -> Tensor:
    """One sequence after another."""
    rows, columns = (arguments[f"cu_seqlens_{name}"].tolist() for name in "qk")
    q, v, slopes = arguments["q"], arguments["v"], arguments.get("alibi_slopes")
    out = torch.zeros((*q.shape[:2], v.shape[2]), dtype=torch.float64)
    form = {name: arguments.get(name) for name in ("causal", "window", "softcap")}
    for i in range(len(rows) - 1):
        here, there = slice(rows[i], rows[i + 1]), slice(columns[i], columns[i + 1])
        one = {name: arguments[name][here if name == "q" else there].transpose(0, 1)[None] for name in "qkv"}
        own = {"alibi_slopes": slopes if slopes is None or slopes.dim() == 1 else slopes[i]}
        out[here] = exact_dense(one | form | own)[0].transpose(0, 1)
    return out


VARLEN_WRONG = DENSE_WRONG | {
    "sequences that begin late": with_number("cu_seqlens_q", 0, lambda n: n + 1),
    "sequences that begin before": with_number("cu_seqlens_k", 0, lambda n: -5),
    "queries past the end": with_number("cu_seqlens_q", -1, lambda n: n + 1),
    "keys past the end": with_number("cu_seqlens_k", -1, lambda n: n + 100),
    "keys that are left over": of("k", lambda x: more(x, 0), some),
    "queries that rise and fall": with_number("cu_seqlens_q", 1, lambda n: 2**30),
    "keys that fall below 0": with_number("cu_seqlens_k", 1, lambda n: -1),
    "int64 starts": of("cu_seqlens_k", Tensor.long),
    "starts of two dimensions": of("cu_seqlens_q", lambda x: x[None]),
    "no starts": of("cu_seqlens_q", lambda x: x[:0]),
    "more sequences of keys": of("cu_seqlens_k", lambda x: torch.cat((x, x[-1:]))),
    "a longest that is too short": lambda a, random: {"max_seqlen_k": int(a["cu_seqlens_k"].diff().max()) - 1},
}
VARLEN_ODD = {f"{name} is {word}": of(name, how) for name in "qkv" for word, how in STRIDES.items()} | {
    "every second start": of("cu_seqlens_k", spread),
}

DOORS = {
    "paged_attention": {"paged_attention": paged_call, "write_cache": write_call},
    "flash_attention": {"flash_attention": flash_call, "flash_attention_varlen": varlen_call},
}
"""The doors of each topic."""
