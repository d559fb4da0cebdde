"""Who holds each block of a pool, and which blocks each sequence has: plain Python, no tensor.

- :class:`BlockAllocator` counts who holds each block, and finds blocks again by the tokens that they hold.
- :class:`BlockTable` is one sequence's list of blocks: append, fork, truncate, free.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral

BLOCK_SIZE = 16


class OutOfBlocks(ValueError):
    """Every block is held by some sequence. Nothing was changed: free or preempt a sequence, then try again."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """What a cached block holds: these tokens, after the tokens of all blocks before it.

    Keys and values depend on everything before them, so the tokens of one block do not name its contents; the chain
    does.
    """

    parent: "Prefix | None" = field(repr=False)
    tokens: tuple[int, ...]
    key: int
    """The hash of the parent's key and these tokens. Equal keys prove nothing: hashes collide."""


def same_prefix(a: Prefix | None, b: Prefix | None) -> bool:
    """Whether two chains hold the same tokens. Most often they are one object, and the first look tells."""
    while a is not b:
        if a is None or b is None or a.tokens != b.tokens:
            return False
        a, b = a.parent, b.parent
    return True


class BlockAllocator:
    """Who holds each block of a pool, and which tokens the blocks hold that nobody holds any more.

    A block is in one of three states: held (its count of holders is above 0), cached (nobody holds it, but its
    contents are known and may be found again), or empty. A new block is taken from the empty ones, then from the cached
    ones, the least recently used first. Every operation takes constant time per block.

    Args:
        blocks: how many there are.
        block_size: tokens in a block.
        hash_of: the hash of (parent's key, tokens); Python's own if not given.
    """

    def __init__(self, blocks: int, block_size: int = BLOCK_SIZE, *, hash_of: Callable[[tuple], int] = hash):
        if not all(isinstance(number, Integral) and number >= 1 for number in (blocks, block_size)):
            raise ValueError(f"there must be at least 1 block of at least 1 token, got {blocks} of {block_size}")
        self.blocks, self.block_size, self.hash_of = blocks, block_size, hash_of
        self.evictions = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything, as if just made; tables that still hold blocks must not be used afterwards."""
        self.holders = [0] * self.blocks
        self.empty = list(range(self.blocks - 1, -1, -1))  # the last one is taken first
        self.unheld: OrderedDict[int, None] = OrderedDict()  # cached blocks that nobody holds, the oldest first
        self.prefix_of: list[Prefix | None] = [None] * self.blocks
        self.block_of: dict[int, int] = {}  # the key of a prefix -> the block that holds it

    def __getstate__(self) -> dict:
        """What a copy or a file gets. Prefixes come first, each after its parent: to reach the parent of a parent from
        the child would take as many calls inside each other as a text has blocks."""
        chains: dict[int, Prefix] = {}
        for prefix in self.prefix_of:
            chain = []
            while prefix is not None and id(prefix) not in chains:
                chain.append(prefix)
                prefix = prefix.parent
            chains.update((id(link), link) for link in reversed(chain))
        return {"prefixes": list(chains.values()), **self.__dict__}

    def __setstate__(self, state: dict) -> None:
        del state["prefixes"]  # they are in the other fields
        self.__dict__.update(state)

    @property
    def available(self) -> int:
        """How many blocks can be taken."""
        return len(self.empty) + len(self.unheld)

    @property
    def held(self) -> int:
        """How many blocks somebody holds."""
        return self.blocks - self.available

    def take(self, count: int = 1) -> list[int]:
        """Blocks for the caller alone to write.

        Raises:
            OutOfBlocks: fewer are available; then none is taken.
            ValueError: the count is negative.
        """
        check_count("blocks that are taken", count)
        if count > self.available:
            needed = "1 block is" if count == 1 else f"{count} blocks are"
            raise OutOfBlocks(f"{needed} needed, {self.available} of {self.blocks} are available")
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self.empty:
            block = self.empty.pop()
        else:
            block, _ = self.unheld.popitem(last=False)
            self._forget(block)
            self.evictions += 1
        self.holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder; a cached block that nobody held comes back to life.

        Raises:
            ValueError: the block is empty, or there is no such block.
        """
        self._check(block)
        if self.holders[block] == 0:
            if block not in self.unheld:
                raise ValueError(f"block {block} is empty: there is nothing to share")
            del self.unheld[block]
        self.holders[block] += 1

    def free(self, block: int) -> None:
        """One holder fewer; a block without holders is cached if its contents are known, else empty.

        Raises:
            ValueError: nobody holds it, or there is no such block.
        """
        self._check(block)
        if self.holders[block] == 0:
            raise ValueError(f"block {block} is freed, but nobody holds it")
        self.holders[block] -= 1
        if self.holders[block] == 0:
            if self.prefix_of[block] is None:
                self.empty.append(block)
            else:
                self.unheld[block] = None

    def make_writable(self, block: int) -> bool:
        """Whether its one holder may write into the block. If so, what was known of its contents is forgotten.

        Raises:
            ValueError: there is no such block.
        """
        self._check(block)
        if self.holders[block] != 1:
            return False
        if self.prefix_of[block] is not None:
            self._forget(block)
        return True

    def _check(self, block: int) -> None:
        """Refuse what is no block; Python would take -1 for the last one."""
        if not 0 <= block < self.blocks:
            raise ValueError(f"there are blocks 0 to {self.blocks - 1}, got {block}")

    def _forget(self, block: int) -> None:
        del self.block_of[self.prefix_of[block].key]
        self.prefix_of[block] = None

    def publish(self, block: int, parent: Prefix | None, tokens: Sequence[int]) -> Prefix:
        """Make a full block findable by its contents.

        If another block has the same contents already, that one stays the one that is found; if another prefix has the
        same key, this block is not published.

        Args:
            block: held by the caller, all its slots written.
            parent: the prefix that ends just before this block; None for the first block.
            tokens: the block_size tokens whose keys and values it holds.

        Returns:
            The prefix that ends with this block: the parent of the next.

        Raises:
            ValueError: the block is not full, nobody holds it, it is known to hold other tokens, or there is none such.
        """
        self._check(block)
        if len(tokens) != self.block_size:
            raise ValueError(
                f"only a full block can be found again: block_size is {self.block_size}, got tokens: {len(tokens)}"
            )
        if self.holders[block] == 0:
            raise ValueError(f"block {block} is published, but nobody holds it")
        known = self.find(parent, tokens)
        if known is not None:
            return self.prefix_of[known]
        if self.prefix_of[block] is not None:
            raise ValueError(f"block {block} holds other tokens already")
        prefix = Prefix(parent, tuple(tokens), self._key(parent, tokens))
        if prefix.key not in self.block_of:
            self.block_of[prefix.key], self.prefix_of[block] = block, prefix
        return prefix

    def unpublish(self, block: int) -> None:
        """Let nobody find a block any more, because its contents are not to be trusted; who holds it goes on.

        Raises:
            ValueError: there is no such block.
        """
        self._check(block)
        if self.prefix_of[block] is not None:
            self._forget(block)
        if block in self.unheld:
            del self.unheld[block]
            self.empty.append(block)

    def find(self, parent: Prefix | None, tokens: Sequence[int]) -> int | None:
        """The block that holds these tokens after that prefix; None if there is none. A hit is proved, not believed."""
        block = self.block_of.get(self._key(parent, tokens))
        if block is None:
            return None
        prefix = self.prefix_of[block]
        return block if prefix.tokens == tuple(tokens) and same_prefix(prefix.parent, parent) else None

    def _key(self, parent: Prefix | None, tokens: Sequence[int]) -> int:
        before = () if parent is None else parent.key  # the hash of None differs from process to process in Python 3.11
        return self.hash_of((before, tuple(tokens)))

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The blocks that hold the longest cached beginning of a prompt. Nobody holds them by this: share each.

        At least one token is left over. Its logits are what the prompt was given for, so it must be computed, even
        where the prompt fills its last block exactly and all of it is cached.
        """
        found, parent = [], None
        for start in range(0, len(tokens) - self.block_size, self.block_size):
            block = self.find(parent, tokens[start : start + self.block_size])
            if block is None:
                break
            found.append(block)
            parent = self.prefix_of[block]
        return found


Copies = list[tuple[int, int]]
"""(from, to) pairs of blocks whose contents the pools must copy before anything is written."""


class BlockTable:
    """The blocks of one sequence, in order: block i holds its tokens i * block_size and on.

    Args:
        allocator: where blocks come from and go back to.
    """

    __slots__ = ("allocator", "blocks", "length", "prefixes")

    def __init__(self, allocator: BlockAllocator):
        self.allocator = allocator
        self.blocks: list[int] = []
        self.length = 0
        self.prefixes: list[Prefix] = []  # of the first blocks, as far as their contents are published

    @property
    def slack(self) -> int:
        """Slots that are reserved and hold no token."""
        return len(self.blocks) * self.allocator.block_size - self.length

    def blocks_wanted(self, tokens: int) -> int:
        """How many blocks :meth:`reserve` would take."""
        missing = blocks_for(self.length + tokens, self.allocator.block_size) - len(self.blocks)
        return max(missing, 0) + (tokens > 0 and self._last_is_shared())

    def _last_is_shared(self) -> bool:
        """Whether the next token falls into a block that others hold too."""
        place, offset = divmod(self.length, self.allocator.block_size)
        return offset > 0 and self.allocator.holders[self.blocks[place]] > 1

    def reserve(self, tokens: int) -> Copies:
        """Make room to write so many tokens after those held; asking twice takes nothing twice.

        A block that is shared and partly filled is not written into: the table gets a copy of its own (copy on write).

        Returns:
            The block copies to be done before the tokens are written.

        Raises:
            OutOfBlocks: there are too few; then nothing has changed.
            ValueError: the number is negative.
        """
        check_count("tokens that are written", tokens)
        wanted = self.blocks_wanted(tokens)
        taken = self.allocator.take(wanted) if wanted else []
        copies = []
        place, offset = divmod(self.length, self.allocator.block_size)
        if tokens > 0 and offset > 0 and not self.allocator.make_writable(self.blocks[place]):
            shared, own = self.blocks[place], taken.pop()
            self.allocator.free(shared)
            self.blocks[place] = own
            copies.append((shared, own))
        self.blocks += taken
        return copies

    def advance(self, tokens: int) -> None:
        """So many reserved tokens have been written.

        Raises:
            ValueError: more than were reserved, or fewer than none.
        """
        check_count("tokens that are written", tokens)
        if tokens > self.slack:
            raise ValueError(f"tokens written: {tokens}, slots reserved: {self.slack}")
        self.length += tokens

    def append(self, tokens: int) -> Copies:
        """:meth:`reserve`, then :meth:`advance`: for a caller who writes them in any case."""
        copies = self.reserve(tokens)
        self.length += tokens
        return copies

    def slots(self, start: int, stop: int) -> list[int]:
        """The slots of the tokens from start to stop: block * block_size + offset.

        Raises:
            ValueError: some of them have no block.
        """
        size = self.allocator.block_size
        if start < 0 or stop > len(self.blocks) * size:
            raise ValueError(f"there are slots 0 to {len(self.blocks) * size}, got {start} to {stop}")
        return [self.blocks[i // size] * size + i % size for i in range(start, stop)]

    def fork(self) -> "BlockTable":
        """A second sequence with the same tokens, which holds the same blocks. Nothing is copied until one writes."""
        other = BlockTable(self.allocator)
        other.blocks = self.blocks[: blocks_for(self.length, self.allocator.block_size)]
        other.length, other.prefixes = self.length, list(self.prefixes)
        for block in other.blocks:
            self.allocator.share(block)
        return other

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens. Blocks are freed from the end, so that a cached beginning, which
        more prompts have in common, outlives what follows it.

        Raises:
            ValueError: the sequence is shorter.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"a sequence of length {self.length} cannot be truncated to {length}")
        kept = blocks_for(length, self.allocator.block_size)
        for block in reversed(self.blocks[kept:]):
            self.allocator.free(block)
        del self.blocks[kept:]
        del self.prefixes[length // self.allocator.block_size :]
        self.length = length

    def free(self) -> None:
        """Give all blocks back."""
        self.truncate(0)

    def reuse(self, tokens: Sequence[int]) -> int:
        """Hold the cached blocks of a prompt's beginning; the table must be empty.

        Args:
            tokens: the whole prompt.

        Returns:
            How many of its tokens need not be computed: fewer than all, see :meth:`BlockAllocator.match`.

        Raises:
            ValueError: the table holds blocks.
        """
        if self.blocks:
            raise ValueError(f"only an empty table can reuse blocks, this one has length {self.length}")
        for block in self.allocator.match(tokens):
            self.allocator.share(block)
            self.blocks.append(block)
            self.prefixes.append(self.allocator.prefix_of[block])
        self.length = len(self.blocks) * self.allocator.block_size
        return self.length

    def publish(self, tokens: Sequence[int]) -> None:
        """Let later prompts find the full blocks.

        Args:
            tokens: what the sequence holds, from its beginning; more than it holds may be given.
        """
        size = self.allocator.block_size
        for place in range(len(self.prefixes), min(self.length, len(tokens)) // size):
            parent = self.prefixes[-1] if self.prefixes else None
            part = tokens[place * size : (place + 1) * size]
            self.prefixes.append(self.allocator.publish(self.blocks[place], parent, part))

    def unpublish(self) -> None:
        """Let no later prompt find these blocks, because what they hold is not to be trusted."""
        for block in self.blocks:
            self.allocator.unpublish(block)
        self.prefixes.clear()


def check_count(what: str, count: int) -> None:
    """Refuse a negative number."""
    if count < 0:
        raise ValueError(f"the number of {what} must be at least 0, got {count}")


def blocks_for(tokens: int, block_size: int) -> int:
    """How many blocks hold so many tokens."""
    return -(-tokens // block_size)
