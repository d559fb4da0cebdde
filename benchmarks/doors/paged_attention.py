"""The doors of paged attention and of writing to its pools."""

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from benchmarks.doors.call import (
    DTYPES,
    Call,
    changed,
    given,
    int32,
    more,
    numbers,
    of,
    repeated,
    running_sum,
    shifted,
    some,
    spread,
    turned,
    with_number,
)
from tformer_lib.paged_attention import blocks_for, paged_attention, write_cache


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
