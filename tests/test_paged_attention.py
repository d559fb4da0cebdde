"""Blocks are never lost, leaked, shared by mistake or freed twice, and attention over them is attention.

The oracle of the memory is a plain dictionary of what every sequence has written. What is written at a slot is the
whole text up to that token, since keys and values depend on all of it: a block that is shared by mistake shows at once.
The oracle of attention is the reference over contiguous tensors in float64. The kernels have a file of their own.
"""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from draws import draws
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from tformer_lib import masks
from tformer_lib.attention import attend
from tformer_lib.generation import StaticStep, generate, prefill, stream
from tformer_lib.kv_cache import CacheShape, PreallocatedCache
from tformer_lib.paged_attention import (
    FP8,
    BlockAllocator,
    BlockTable,
    OutOfBlocks,
    PagedKVCache,
    blocks_for,
    paged_attention,
    write_cache,
)
from tformer_lib.rope import Rope
from tformer_lib.transformer import Decoder, ModelConfig

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64


# ---- the allocator and the tables under any sequence of operations

TOKENS = st.lists(st.integers(0, 1), max_size=11)
"""Two different tokens only, so that prompts often begin alike."""


class Memory(RuleBasedStateMachine):
    """Tables over one small pool, against a dictionary."""

    hash_of = staticmethod(hash)
    tables = Bundle("tables")

    @initialize(blocks=st.integers(1, 9), block_size=st.integers(1, 4))
    def make_pool(self, blocks, block_size):
        self.allocator = BlockAllocator(blocks, block_size, hash_of=self.hash_of)
        self.written = {}  # slot -> the whole text up to the token there
        self.texts = {}  # table -> its tokens

    @rule(target=tables)
    def new(self):
        table = BlockTable(self.allocator)
        self.texts[table] = ()
        return table

    @rule(target=tables, prompt=TOKENS)
    def new_from_the_prefix_cache(self, prompt):
        table = self.new()
        reused = table.reuse(prompt)
        assert reused % self.allocator.block_size == 0
        assert reused < max(len(prompt), 1), "a token must be left, for its logits"
        self.texts[table] = tuple(prompt[:reused])
        self.append(table, prompt[reused:], ahead=0)
        table.publish(self.texts[table])
        return table

    @rule(table=tables, tokens=TOKENS, ahead=st.integers(0, 5))
    def append(self, table, tokens, ahead):
        before, start = self.books(), table.length
        wanted = table.blocks_wanted(len(tokens) + ahead)
        try:
            copies = table.reserve(len(tokens) + ahead)
        except OutOfBlocks:
            assert wanted > self.allocator.available
            assert self.books() == before, "a refused reservation changes nothing"
            return
        assert self.allocator.held == before[0] + wanted
        for source, target in copies:
            self.copy(source, target)
        assert table.reserve(len(tokens)) == [], "what is reserved is not reserved again"
        for i, slot in enumerate(table.slots(start, start + len(tokens)), start=1):
            self.written[slot] = self.texts[table] + tuple(tokens[:i])
        table.advance(len(tokens))
        self.texts[table] += tuple(tokens)

    def copy(self, source, target):
        size = self.allocator.block_size
        for offset in range(size):
            self.written[target * size + offset] = self.written.get(source * size + offset)

    def books(self):
        holders = self.allocator.holders
        return self.allocator.held, list(holders), {t: (list(t.blocks), t.length) for t in self.texts}

    @rule(target=tables, table=tables)
    def fork(self, table):
        held = self.allocator.held
        other = table.fork()
        assert self.allocator.held == held, "a fork takes no memory"
        self.texts[other] = self.texts[table]
        return other

    @rule(table=tables, data=st.data())
    def truncate(self, table, data):
        length = data.draw(st.integers(0, table.length))
        table.truncate(length)
        self.texts[table] = self.texts[table][:length]

    @rule(table=tables)
    def publish(self, table):
        table.publish(self.texts[table])

    @rule(target=tables, table=consumes(tables))
    def free(self, table):
        table.free()
        assert table.blocks == []
        del self.texts[table]
        return multiple()

    @invariant()
    def every_sequence_reads_what_it_wrote(self):
        for table, text in getattr(self, "texts", {}).items():
            assert table.length == len(text)
            read = [self.written[slot] for slot in table.slots(0, table.length)]
            assert read == [text[: i + 1] for i in range(len(text))]

    @invariant()
    def every_block_is_held_cached_or_empty(self):
        if not hasattr(self, "allocator"):
            return
        a = self.allocator
        holders = [0] * a.blocks
        for table in self.texts:
            assert len(set(table.blocks)) == len(table.blocks)
            for block in table.blocks:
                holders[block] += 1
        assert holders == a.holders
        free = [*a.empty, *a.unheld]
        assert sorted(free) == [block for block in range(a.blocks) if holders[block] == 0]
        assert a.available == len(free)
        assert a.held == a.blocks - len(free)

    @invariant()
    def what_is_cached_is_what_it_is_said_to_be(self):
        if not hasattr(self, "allocator"):
            return
        a, size = self.allocator, self.allocator.block_size
        assert {a.block_of[p.key]: p for p in a.prefix_of if p is not None} == {
            block: p for block, p in enumerate(a.prefix_of) if p is not None
        }
        assert len(a.block_of) == sum(p is not None for p in a.prefix_of)
        assert all(a.prefix_of[block] is not None for block in a.unheld)
        assert all(a.prefix_of[block] is None for block in a.empty)
        for block, prefix in enumerate(a.prefix_of):
            if prefix is not None:
                text = whole_text(prefix)
                assert self.written[block * size + size - 1] == text
                assert len(text) % size == 0

    def teardown(self):
        for table in getattr(self, "texts", {}):
            table.free()
        if hasattr(self, "allocator"):
            assert self.allocator.available == self.allocator.blocks


def whole_text(prefix):
    return () if prefix is None else whole_text(prefix.parent) + prefix.tokens


class CollidingMemory(Memory):
    """All prefixes have one hash."""

    hash_of = staticmethod(lambda _: 7)


class NarrowMemory(Memory):
    """Prefixes have three hashes."""

    hash_of = staticmethod(lambda content: hash(content) % 3)


OFTEN, RARELY = (draws(n, stateful_step_count=40, suppress_health_check=list(HealthCheck)) for n in (120, 50))
TestMemory, TestCollidingMemory, TestNarrowMemory = Memory.TestCase, CollidingMemory.TestCase, NarrowMemory.TestCase
TestMemory.settings, TestCollidingMemory.settings, TestNarrowMemory.settings = OFTEN, RARELY, RARELY


# ---- the allocator, case by case


def table_of(allocator, tokens):
    """A table that holds these tokens, published."""
    table = BlockTable(allocator)
    table.append(len(tokens) - table.reuse(tokens))
    table.publish(tokens)
    return table


def test_running_out_says_how_many_there_are_and_takes_none():
    allocator = BlockAllocator(3, 4)
    table = BlockTable(allocator)
    table.append(9)
    with pytest.raises(OutOfBlocks, match="1 block is needed, 0 of 3 are available"):
        table.append(4)
    assert (table.length, allocator.available) == (9, 0)
    table.append(3)  # the last block has room for these
    table.free()
    assert allocator.available == 3


def test_a_block_is_not_freed_twice_and_nothing_is_shared_that_is_not_there():
    allocator = BlockAllocator(2, 4)
    (block,) = allocator.take()
    allocator.free(block)
    with pytest.raises(ValueError, match=f"block {block} is freed, but nobody holds it"):
        allocator.free(block)
    with pytest.raises(ValueError, match=f"block {block} is empty: there is nothing to share"):
        allocator.share(block)


@pytest.mark.parametrize("block", [-1, -3, 3, 10**9])
@pytest.mark.parametrize("call", ["free", "share", "make_writable", "publish"])
def test_what_is_no_block_is_refused_and_changes_nothing(call, block):
    """Python reads -1 as the last one: freed by that name, it would be lent to two under two names."""
    allocator = BlockAllocator(3, 1)
    allocator.take(3)
    more = (None, [1]) if call == "publish" else ()
    with pytest.raises(ValueError, match=f"there are blocks 0 to 2, got {block}"):
        getattr(allocator, call)(block, *more)
    assert (allocator.holders, allocator.available) == ([1, 1, 1], 0)


def test_blocks_that_are_not_to_be_trusted_are_found_no_more():
    allocator = BlockAllocator(4, 1)
    table, rest = table_of(allocator, [1, 2]), table_of(allocator, [1, 3])
    table.unpublish()
    assert (allocator.match([1, 2, 0]), allocator.match([1, 3, 0])) == ([], [])
    table.free()
    assert (allocator.held, rest.length) == (2, 2)
    rest.free()
    (block,) = allocator.unheld  # of the token 3, whose beginning nobody finds
    allocator.unpublish(block)
    assert (len(allocator.empty), len(allocator.unheld)) == (4, 0)


def pickled(x):
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_long_texts_is_a_pool_of_its_own(copied):
    """The second text gets the blocks of the first in the reverse order: the child of each prefix comes before it."""
    allocator, count = BlockAllocator(1200, 1), 1200
    table_of(allocator, range(count)).free()
    text = range(count, 2 * count)
    other = copied(table_of(allocator, text))
    assert other.blocks == allocator.match([*text, 0])
    other.truncate(3)
    assert other.allocator.match([*text, 0]) == other.blocks + allocator.match([*text, 0])[3:]
    other.append(1)  # takes the last of the text's blocks
    assert len(other.allocator.match([*text, 0])) == count - 1
    assert (allocator.held, len(allocator.match([*text, 0]))) == (count, count)
    assert len(repr(allocator.prefix_of[0])) < 100


def test_what_a_file_keeps_of_prefixes_is_found_by_another_process(tmp_path):
    """In Python 3.11 the hash of None is an address, and is another one there."""
    allocator = BlockAllocator(4, 2)
    table_of(allocator, [1, 2, 3, 4])
    file = tmp_path / "allocator"
    file.write_bytes(pickle.dumps(allocator))
    program = f"import pickle; print(pickle.load(open({str(file)!r}, 'rb')).match([1, 2, 3, 4, 5]))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(allocator.match([1, 2, 3, 4, 5])) == "[0, 1]"


def test_a_fork_copies_on_write_and_only_the_block_that_is_written():
    allocator = BlockAllocator(8, 4)
    table = BlockTable(allocator)
    table.append(10)
    fork = table.fork()
    assert fork.blocks == table.blocks
    assert allocator.held == 3
    last = table.blocks[2]
    ((source, target),) = fork.append(1)
    assert (source, fork.blocks, allocator.held) == (last, [*table.blocks[:2], target], 4)
    assert table.append(1) == []  # the other one is alone on the old block by now


def test_a_fork_of_full_blocks_copies_nothing():
    table = BlockTable(BlockAllocator(8, 4))
    table.append(8)
    fork = table.fork()
    assert fork.append(1) == table.append(1) == []
    assert fork.blocks[2] != table.blocks[2]


@pytest.mark.parametrize(("prompt", "reused"), [(8, 4), (9, 8), (4, 0), (1, 0), (0, 0), (12, 8), (13, 12), (20, 12)])
def test_a_prompt_that_is_wholly_cached_leaves_a_token_to_compute(prompt, reused):
    allocator, text = BlockAllocator(10, 4), list(range(20))
    table_of(allocator, text[:12]).free()
    assert BlockTable(allocator).reuse(text[:prompt]) == reused


def test_a_hash_goes_stale_when_its_block_is_given_away():
    allocator = BlockAllocator(2, 4)
    table_of(allocator, [1] * 8).free()
    assert allocator.match([1] * 9) != []
    other = BlockTable(allocator)
    other.append(8)  # evicts both
    assert allocator.evictions == 2
    assert allocator.match([1] * 9) == []
    other.publish([2] * 8)
    assert allocator.match([1] * 9) == []
    assert allocator.match([2] * 9) == other.blocks


def test_what_was_used_least_recently_goes_first_and_tails_before_heads():
    allocator = BlockAllocator(6, 2)
    texts = [[n] * 4 for n in range(3)]
    for text in texts:
        table_of(allocator, text).free()
    table_of(allocator, [*texts[0], 9]).free()  # text 0 is used again, so text 1 is now the oldest
    assert allocator.evictions == 1  # its tail made room for the 9
    found = [len(allocator.match([*text, 8])) for text in texts]
    assert found == [2, 1, 2]


def test_equal_tokens_after_different_beginnings_are_different_blocks():
    allocator = BlockAllocator(8, 2)
    table_of(allocator, [1, 1, 5, 5])
    assert allocator.match([2, 2, 5, 5, 0]) == []
    assert len(allocator.match([1, 1, 5, 5, 0])) == 2


@pytest.mark.parametrize("hash_of", [lambda _: 0, lambda content: len(content[1])])
def test_a_collision_never_shares_wrong_contents(hash_of):
    allocator = BlockAllocator(8, 2, hash_of=hash_of)
    first = table_of(allocator, [1, 1, 5, 5])
    second = table_of(allocator, [2, 2, 5, 5])
    assert not set(first.blocks) & set(second.blocks)
    assert allocator.match([2, 2, 5, 5, 0]) == []
    assert allocator.match([1, 1, 9]) == first.blocks[:1]


def test_a_chain_is_found_again_after_its_first_block_was_evicted_and_written_anew():
    allocator = BlockAllocator(4, 2)
    table = table_of(allocator, [1, 1, 2, 2])
    tail = table.blocks[1]
    table.free()
    allocator.share(tail)  # somebody still holds the tail
    filler = BlockTable(allocator)
    filler.append(6)  # evicts the head
    filler.free()
    assert allocator.match([1, 1, 2, 2, 0]) == []
    again = table_of(allocator, [1, 1, 0])
    assert allocator.match([1, 1, 2, 2, 0]) == [again.blocks[0], tail]


def test_writing_into_a_published_block_takes_its_name_away():
    allocator = BlockAllocator(4, 2)
    table = table_of(allocator, [1, 1, 2, 2])
    table.truncate(3)
    assert table.append(1) == []  # alone on the block: no copy
    assert len(allocator.match([1, 1, 2, 2, 0])) == 1


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: BlockAllocator(0), "at least 1 block of at least 1 token, got 0 of 16"),
        (lambda: BlockAllocator(4, 0), "got 4 of 0"),
        (lambda: BlockAllocator(4, 2.5), "got 4 of 2.5"),
        (lambda: BlockAllocator(float("nan")), "got nan of 16"),
        (lambda: BlockAllocator(4).take(-1), "the number of blocks that are taken must be at least 0, got -1"),
        (
            lambda: BlockAllocator(4, 2).publish(0, None, [1]),
            "only a full block can be found again: block_size is 2, got tokens: 1",
        ),
        (lambda: BlockAllocator(4, 2).publish(0, None, [1, 1]), "block 0 is published, but nobody holds it"),
        (lambda: BlockTable(BlockAllocator(4)).advance(1), "tokens written: 1, slots reserved: 0"),
        (lambda: table_of(BlockAllocator(4, 2), [1, 2]).advance(-1), "must be at least 0, got -1"),
        (lambda: table_of(BlockAllocator(4, 2), [1, 2]).append(-1), "must be at least 0, got -1"),
        (lambda: table_of(BlockAllocator(4, 2), [1, 2]).slots(-1, 1), "there are slots 0 to 2, got -1 to 1"),
        (lambda: table_of(BlockAllocator(4, 2), [1, 2]).slots(0, 3), "there are slots 0 to 2, got 0 to 3"),
        (lambda: BlockTable(BlockAllocator(4)).truncate(1), "a sequence of length 0 cannot be truncated to 1"),
        (lambda: table_of(BlockAllocator(4, 2), [1, 2]).reuse([1]), "only an empty table can reuse blocks"),
    ],
)
def test_wrong_calls_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# ---- attention over blocks


def pools_of(keys, values, lengths, block_size, *, spare=3, seed=0, fill=float("nan")):
    """Contiguous keys and values (batch, kv_heads, S, head_dim) cut into blocks and shuffled; all else is NaN.

    Returns:
        k_pool, v_pool, and block tables whose unused entries are out of range.
    """
    batch, kv_heads, _, head_dim = keys.shape
    generator = torch.Generator().manual_seed(seed)
    used = [blocks_for(n, block_size) for n in lengths]
    order = torch.randperm(sum(used) + spare, generator=generator).tolist()
    pools = [torch.full((sum(used) + spare, kv_heads, block_size, head_dim), fill, dtype=keys.dtype) for _ in "kv"]
    tables = torch.full((batch, max([*used, 1])), 10**6, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for place in range(used[row]):
            block, start = order.pop(), place * block_size
            tables[row, place] = block
            here = min(block_size, length - start)
            for pool, x in zip(pools, (keys, values), strict=True):
                pool[block, :, :here] = x[row, :, start : start + here]
    return *pools, tables


def dense(q, keys, values, length, count, scale=None, window=None):
    """The reference: the last ``count`` of a row's tokens over its keys; q (count, heads, head_dim)."""
    mask = None if window is None else masks.sliding_window(count, length, window=window)
    parts = (x[None, :, :length] for x in (keys, values))
    return attend(q.transpose(0, 1)[None], *parts, causal=True, scale=scale, mask=mask)[0].transpose(0, 1)


@st.composite
def workloads(draw):
    """Rows of different lengths and numbers of queries, every ratio of heads, any block size, window and scale."""
    kv_heads, group, head_dim = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4])), 4
    lengths = draw(st.lists(st.integers(0, 21), min_size=1, max_size=5))
    counts = [draw(st.integers(0, n)) for n in lengths]
    block_size, seed = draw(st.sampled_from([1, 2, 3, 8, 16])), draw(st.integers(0, 9))
    scale, window = draw(st.sampled_from([None, 0.3])), draw(st.sampled_from([None, 1, 5, 30]))
    generator = torch.Generator().manual_seed(seed)
    S = max([*lengths, 1])
    keys, values = torch.randn(2, len(lengths), kv_heads, S, head_dim, generator=generator, dtype=F64)
    q = torch.randn(sum(counts), kv_heads * group, head_dim, generator=generator, dtype=F64)
    return q, keys, values, lengths, counts, block_size, scale, window


def int32(numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def starts_of(counts):
    return int32([0, *torch.tensor(counts).cumsum(0).tolist()])


@draws(80)
@given(workloads())
def test_packed_queries_equal_dense_attention_whatever_lies_in_unused_slots(workload):
    q, keys, values, lengths, counts, block_size, scale, window = workload
    k_pool, v_pool, tables = pools_of(keys, values, lengths, block_size)
    starts = starts_of(counts)
    out, lse = paged_attention(
        q, k_pool, v_pool, tables, int32(lengths), query_starts=starts, scale=scale, window=window, checked=True,
        return_lse=True,
    )  # fmt: skip
    assert out.shape == q.shape
    assert lse.shape == q.shape[:2]
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        here = slice(starts[row], starts[row + 1])
        wanted = dense(q[here], keys[row], values[row], length, count, scale, window)
        torch.testing.assert_close(out[here], wanted, rtol=0, atol=1e-12)


@draws(40)
@given(workloads())
def test_decode_equals_dense_attention_and_an_empty_row_gives_zeros(workload):
    _, keys, values, lengths, _, block_size, scale, window = workload
    k_pool, v_pool, tables = pools_of(keys, values, lengths, block_size)
    q = torch.randn(len(lengths), 2 * keys.shape[1], 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    out, lse = paged_attention(q, k_pool, v_pool, tables, int32(lengths), scale=scale, window=window, return_lse=True)
    for row, length in enumerate(lengths):
        if length == 0:
            assert (out[row] == 0).all()
            assert (lse[row] == -torch.inf).all()
            continue
        torch.testing.assert_close(
            out[row : row + 1], dense(q[row : row + 1], keys[row], values[row], length, 1, scale, window)
        )
        first = max(0, length - (window or length))
        scores = q[row].unflatten(0, (-1, 2)) @ keys[row, :, first:length].mT * (scale or 0.5)
        torch.testing.assert_close(lse[row], scores.logsumexp(-1).flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_sums_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 2, 300, 16, generator=generator).to(dtype)
    q = torch.randn(2, 4, 16, generator=generator).to(dtype)
    lengths = [300, 41]
    k_pool, v_pool, tables = pools_of(keys, values, lengths, 16)
    out = paged_attention(q, k_pool, v_pool, tables, int32(lengths))
    assert out.dtype == dtype
    for row, length in enumerate(lengths):
        truth = dense(q[row : row + 1].double(), keys[row].double(), values[row].double(), length, 1)[0]
        torch.testing.assert_close(out[row].double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_pools_may_have_vllms_layout():
    keys, values = torch.randn(2, 2, 3, 20, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
    k_pool, v_pool, tables = pools_of(keys, values, [20, 7], 4)
    q = torch.randn(2, 6, 8, dtype=F64)
    turned = [pool.transpose(1, 2).contiguous().transpose(1, 2) for pool in (k_pool, v_pool)]
    lengths = int32([20, 7])
    assert torch.equal(
        paged_attention(q, *turned, tables, lengths), paged_attention(q, k_pool, v_pool, tables, lengths)
    )


# ---- writing


@draws(40)
@given(data=st.data(), block_size=st.sampled_from([1, 3, 16]), dtype=st.sampled_from([F64, torch.bfloat16]))
def test_tokens_land_in_their_slots_and_nothing_else_changes(data, block_size, dtype):
    blocks, kv_heads = 7, 2
    slots = data.draw(st.permutations(range(blocks * block_size)))[: data.draw(st.integers(0, 9))]
    dropped = [data.draw(st.booleans()) for _ in slots]
    slots = [-1 if drop else slot for slot, drop in zip(slots, dropped, strict=True)]
    k, v = torch.randn(2, len(slots), kv_heads, 4).to(dtype)
    pools = torch.randn(2, blocks, kv_heads, block_size, 4).to(dtype)
    wanted = pools.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            for pool, x in zip(wanted, (k, v), strict=True):
                pool[slot // block_size, :, slot % block_size] = x[token]
    write_cache(k, v, *pools, torch.tensor(slots, dtype=torch.int64))
    assert torch.equal(pools, wanted)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_keys_are_turned_on_the_way_as_rope_turns_them(layout, rotary_dim):
    rope = Rope(8, layout=layout, rotary_dim=rotary_dim)
    positions = torch.tensor([0, 5, 100, 7])
    k, v = torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(0))
    pools = torch.zeros(2, 2, 3, 4, 8)
    write_cache(
        k,
        v,
        *pools,
        torch.tensor([7, 1, -1, 2]),
        **dict(zip(("cos", "sin"), rope(positions), strict=True)),
        layout=layout,
    )
    turned = rope.at(positions)(k.transpose(0, 1)[None])[0].transpose(0, 1)
    for token, slot in ((0, 7), (1, 1), (3, 2)):
        torch.testing.assert_close(pools[0, slot // 4, :, slot % 4], turned[token], rtol=1e-6, atol=1e-6)
        assert torch.equal(pools[1, slot // 4, :, slot % 4], v[token])


def test_a_float8_pool_holds_x_over_scale_and_saturates():
    k, v = torch.randn(2, 6, 2, 16, generator=torch.Generator().manual_seed(0))
    k[0, 0, 0], k[1, 0, 0] = 1e6, -1e6
    pools = torch.zeros(2, 2, 2, 4, 16).to(FP8)
    write_cache(k, v, *pools, torch.arange(6), k_scale=0.5, v_scale=2.0)
    stored = pools.float().transpose(2, 3).flatten(1, 2)[:, :6]  # (2, tokens, kv_heads, head_dim)
    assert (stored[0, 0, 0, 0], stored[0, 1, 0, 0]) == (448.0, -448.0)
    torch.testing.assert_close(stored[1] * 2.0, v, rtol=2**-4, atol=2**-9)
    q, (keys, values) = torch.randn(1, 4, 16), (stored * torch.tensor([0.5, 2.0])[:, None, None, None]).transpose(1, 2)
    tables = int32([[0, 1]])
    out = paged_attention(q, *pools, tables, int32([6]), k_scale=0.5, v_scale=2.0)
    torch.testing.assert_close(out, dense(q, keys, values, 6, 1), rtol=1e-5, atol=1e-5)


# ---- refusals


def good():
    pool = torch.zeros(5, 2, 4, 8)
    return {
        "q": torch.zeros(2, 4, 8),
        "k_pool": pool,
        "v_pool": pool.clone(),
        "block_tables": int32([[0, 1], [2, 9]]),
        "lengths": int32([8, 3]),
    }


WRONG_READS = {
    "q has 2 dimensions": ({"q": torch.zeros(2, 8)}, r"q must have shape \(queries, heads, 8\), got \(2, 8\)"),
    "head_dim": ({"q": torch.zeros(2, 4, 16)}, r"q must have shape \(queries, heads, 8\)"),
    "heads": ({"q": torch.zeros(2, 3, 8)}, "q has 3 heads, which 2 kv heads do not divide"),
    "dtype of q": ({"q": torch.zeros(2, 4, 8).half()}, "the pools hold torch.float32, q came in torch.float16"),
    "device of q": ({"q": torch.zeros(2, 4, 8, device="meta")}, "the pools are on cpu, q came on meta"),
    "pools differ": ({"v_pool": torch.zeros(5, 2, 8, 8)}, "the pools differ in shape"),
    "a pool of 3 dimensions": ({"k_pool": torch.zeros(5, 4, 8)}, "k_pool must have shape"),
    "a pool of integers": ({"k_pool": torch.zeros(5, 2, 4, 8).int()}, "k_pool must be float64"),
    "int64 tables": ({"block_tables": torch.zeros(2, 2).long()}, r"block_tables must be torch.int32 of shape \(2, max"),
    "int64 lengths": ({"lengths": torch.tensor([8, 3])}, r"lengths must be torch.int32 of shape \(2,\)"),
    "lengths of three rows": ({"lengths": int32([8, 3, 1])}, r"lengths must be torch.int32 of shape \(2,\)"),
    "starts": ({"query_starts": int32([0, 2])}, r"query_starts must be torch.int32 of shape \(3,\)"),
    "window": ({"window": 0}, "window must be a whole number of keys, at least 1, got 0"),
    "block id": (
        {"block_tables": int32([[0, 1], [7, 0]])},
        "row 1 names block 7 at place 0, the pool has blocks 0 to 4",
    ),
    "negative block id": ({"block_tables": int32([[0, -1], [2, 0]])}, "row 0 names block -1 at place 1"),
    "length past the table": ({"lengths": int32([8, 9])}, "row 1 has length 9, its table has room for 0 to 8 tokens"),
    "negative length": ({"lengths": int32([-1, 3])}, "row 0 has length -1"),
    "starts end elsewhere": ({"query_starts": int32([0, 1, 1])}, "query_starts must go from 0 to 2, got 0 to 1"),
    "starts fall": ({"query_starts": int32([0, 3, 2])}, "query_starts must not fall, row 1 goes from 3 to 2"),
}


@pytest.mark.parametrize("checked", [False, True])  # on a CPU every call is checked
@pytest.mark.parametrize("case", WRONG_READS)
def test_wrong_reads_are_refused_by_name(case, checked):
    change, match = WRONG_READS[case]
    with pytest.raises(ValueError, match=match):
        paged_attention(**(good() | change), checked=checked)


def test_checked_mode_lets_good_indices_pass():
    paged_attention(**good(), checked=True)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": torch.zeros(3, 1, 8)}, r"k must have shape \(tokens, 2, 8\), got \(3, 1, 8\)"),
        ({"v": torch.zeros(2, 2, 8)}, r"v must have shape"),
        ({"k": torch.zeros(3, 2, 8).half()}, "the pools hold torch.float32, k came in torch.float16"),
        ({"v": torch.zeros(3, 2, 8, device="meta")}, "the pools are on cpu, v came on meta"),
        ({"slots": int32([0, 1, 2])}, r"slots must be torch.int64 of shape \(3,\), got torch.int32"),
        ({"slots": torch.zeros(2).long()}, r"slots must be torch.int64 of shape \(3,\)"),
        ({"cos": torch.zeros(3, 4)}, "cos and sin must be given together"),
        ({"cos": torch.zeros(2, 4), "sin": torch.zeros(3, 4)}, r"cos must be float32 of shape \(3, rotary_dim / 2\)"),
    ],
)
def test_wrong_writes_are_refused_by_name(change, match):
    pool = torch.zeros(5, 2, 4, 8)
    arguments = {"k": torch.zeros(3, 2, 8), "v": torch.zeros(3, 2, 8), "k_pool": pool, "v_pool": pool.clone()}
    arguments |= {"slots": torch.arange(3)}
    with pytest.raises(ValueError, match=match):
        write_cache(**(arguments | change))


# ---- the cache; what every cache must do is asked of it in test_kv_cache.py


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(7)
    options = {"positions": "rope", "kv_heads": 2, "norm": "rmsnorm", "feed_forward": "swiglu", "bias": False}
    return Decoder(ModelConfig(vocab_size=23, max_length=64, width=32, layers=2, heads=4, **options)).double().eval()


PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8], [9], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("step", [0, None])
@pytest.mark.parametrize("slot", [16, 2**40])
def test_a_slot_past_the_pool_is_refused_and_nothing_is_written(step, slot):
    k, pools = torch.randn(2, 2, 8), torch.zeros(2, 4, 2, 4, 8)
    with pytest.raises(ValueError, match=f"slots hold {slot}, the pool has slots 0 to 15"):
        write_cache(k, k, *pools, torch.tensor([0, slot]), step=step)
    assert not pools.any()


@pytest.mark.parametrize("block_size", [1, 4, 8, 16])
def test_generation_is_token_for_token_that_of_a_contiguous_cache(model, block_size):
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 3}
    wanted = generate(model, PROMPTS, **options)
    for chunk in (None, 3):
        cache = PagedKVCache(CacheShape.of(model, 3), 90 // block_size + 3, block_size)
        assert generate(model, PROMPTS, cache=cache, chunk=chunk, **options) == wanted
        assert cache.allocator.held == sum(blocks_for(n, block_size) for n in cache.host_lengths)
    cache.reset()
    assert [list(t) for t in zip(*stream(model, PROMPTS, cache=cache, **options), strict=True)] == wanted


@pytest.mark.parametrize("compile", [False, True])
def test_a_static_step_takes_blocks_as_it_goes(model, compile):
    caches = [PreallocatedCache(CacheShape.of(model, 3), 40), PagedKVCache(CacheShape.of(model, 3), 30, 4)]
    steps = [StaticStep(model, cache, compile=compile, capture=False, backend="eager") for cache in caches]
    logits = [prefill(model, PROMPTS, cache) for cache in caches]
    for _ in range(15):
        torch.testing.assert_close(*logits, rtol=0, atol=1e-12)
        logits = [step(logits[0].argmax(-1)[:, None]).clone() for step in steps]
    assert caches[0].lengths.tolist() == caches[1].lengths.tolist() == caches[1].host_lengths


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_step_writes_what_an_eager_one_writes(model, dtype):
    on_gpu = copy.deepcopy(model).to("cuda", dtype)
    written = []
    for cuda_graph in (False, True):
        cache = PagedKVCache(CacheShape.of(on_gpu, 3), 40, 4, max_length=60)
        written.append(generate(on_gpu, PROMPTS, max_new_tokens=20, cache=cache, cuda_graph=cuda_graph))
    assert written[0] == written[1]


@torch.no_grad()
def test_a_mask_on_top_of_causality_is_obeyed(model):
    tokens = torch.randint(23, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.rand(12, 12, generator=torch.Generator().manual_seed(3)) < 0.6
    cache = PagedKVCache(CacheShape.of(model, 2), 8, 4)
    got = [model(tokens[:, :7], mask=mask[:7, :7], cache=cache), model(tokens[:, 7:], mask=mask[7:], cache=cache)]
    torch.testing.assert_close(torch.cat(got, dim=1), model(tokens, mask=mask), rtol=0, atol=1e-12)


def test_beams_share_their_past_and_copy_on_write(model):
    tokens = torch.randint(23, (1, 10), generator=torch.Generator().manual_seed(1))
    cache = PagedKVCache(CacheShape.of(model, 1), 12, 4)
    with torch.no_grad():
        model(tokens, cache=cache)
        cache.reorder([0, 0, 0, 0])
        assert cache.allocator.held == 3
        new = torch.tensor([[1], [2], [3], [4]])
        got = model(new, cache=cache)[:, -1]
        assert cache.allocator.held == 3 + 3  # each wrote into a last block of its own; one kept the old one
        torch.testing.assert_close(got, model(torch.cat([tokens.expand(4, -1), new], 1))[:, -1], rtol=0, atol=1e-12)
        cache.reorder([2, 2])
        got = model(new[:2], cache=cache)[:, -1]
        text = torch.cat([tokens.expand(2, -1), new[[2, 2]], new[:2]], 1)
        torch.testing.assert_close(got, model(text)[:, -1], rtol=0, atol=1e-12)
        assert cache.allocator.held == 4


def test_running_out_names_the_row_and_the_others_keep_their_contents(model):
    cache = PagedKVCache(CacheShape.of(model, 2), 5, 4)
    tokens = torch.randint(23, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(tokens[:, :8], cache=cache)
        match = "the cache is full: row 1 holds 8 tokens, and 1 more came: 1 block is needed, 0 of 5 are available"
        with pytest.raises(OutOfBlocks, match=match):
            model(tokens[:, 8:], cache=cache)
        cache.truncate([8, 4])
        cache.expect([1, 1])
        got = model(torch.stack([tokens[0, 8:9], tokens[1, 4:5]]), cache=cache)
        torch.testing.assert_close(got[0, 0], model(tokens)[0, 8], rtol=0, atol=1e-12)
        torch.testing.assert_close(got[1, 0], model(tokens)[1, 4], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="row 0 would hold 9 of at most 8 tokens"):
        model(tokens, cache=PagedKVCache(CacheShape.of(model, 2), 50, 4, max_length=8))


def test_a_refused_pass_still_copies_for_the_rows_before(model):
    tokens = torch.randint(23, (1, 7), generator=torch.Generator().manual_seed(1))
    cache = PagedKVCache(CacheShape.of(model, 1), 3, 4)
    with torch.no_grad():
        model(tokens[:, :6], cache=cache)
        cache.reorder([0, 0, 0])
        with pytest.raises(OutOfBlocks):
            model(tokens[:, 6:].expand(3, 1), cache=cache)  # row 0 gets a copy, row 1 none
        cache.reorder([0])
        torch.testing.assert_close(model(tokens[:, 6:], cache=cache), model(tokens)[:, 6:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [16, 17, 13, 4, 3])
def test_a_cached_prompt_is_computed_from_where_it_differs(model, length):
    """With 16 tokens in blocks of 4, the prompt fills its last block exactly and all of it is cached."""
    tokens = torch.randint(23, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    cache = PagedKVCache(CacheShape.of(model, 2), 14, 4)
    prefill(model, [tokens[:16], tokens[4:6]], cache)
    cache.publish(0, tokens[:16])
    cache.truncate([0, 2])
    reused = cache.reuse(0, tokens[:length])
    assert reused == (length - 1) // 4 * 4
    with torch.no_grad():
        rest = torch.tensor([tokens[reused:length]] * 2)
        cache.expect([length - reused, 0])
        got = model(rest, cache=cache)[0, -1]
        torch.testing.assert_close(got, model(torch.tensor([tokens[:length]]))[0, -1], rtol=0, atol=1e-12)


def test_prompts_may_be_tensors(model):
    tokens = torch.arange(12)
    cache = PagedKVCache(CacheShape.of(model, 2), 8, 4)
    prefill(model, [tokens.tolist(), [1]], cache)
    cache.publish(0, tokens)
    cache.truncate([12, 0])
    assert cache.reuse(1, tokens) == 8


def test_bytes_are_those_of_the_pool_and_of_the_blocks_held(model):
    shape = CacheShape.of(model, 2)
    cache = PagedKVCache(shape, 10, 4)
    assert cache.nbytes == 40 * shape.bytes_per_token
    prefill(model, PROMPTS[:2], cache)
    assert cache.nbytes_held == (8 + 4) * shape.bytes_per_token
    cache.reorder([0, 0])
    assert cache.nbytes_held == 8 * shape.bytes_per_token
    cache.reset()
    assert (cache.nbytes_held, cache.host_lengths) == (0, [0, 0])


@pytest.mark.parametrize("step", [0, "cpu"])
def test_batch_invariant_rows_have_the_same_bits_in_any_company(step):
    torch.manual_seed(0)
    pools = [torch.randn(40, 2, 4, 16) for _ in range(2)]
    tables, lengths = torch.randperm(40)[:36].view(4, 9).int(), torch.tensor([33, 0, 7, 36], dtype=torch.int32)
    q = torch.randn(4, 6, 16)
    options = {"batch_invariant": True, "step": step}
    together = paged_attention(q, *pools, tables, lengths, **options)
    torch.testing.assert_close(together, paged_attention(q, *pools, tables, lengths, step=0))
    for rows in ([0], [3, 0], [2, 3, 1], [1]):
        apart = paged_attention(q[rows], *pools, tables[rows], lengths[rows], **options)
        assert torch.equal(apart, together[rows])
    starts = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="batch_invariant takes one query a row"):
        paged_attention(q, *pools, tables[:1], lengths[:1], query_starts=starts, max_queries=4, **options)
