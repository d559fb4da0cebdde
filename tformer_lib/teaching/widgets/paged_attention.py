"""The block-table animator of chapter 18: what the library's allocator does, one operation at a time."""

from collections.abc import Callable

from tformer_lib.paged_attention import BlockAllocator, BlockTable, OutOfBlocks
from tformer_lib.teaching.widgets import Interactive, module

BLOCK_SIZE = 4


class BlockTableStepper(Interactive):
    """Choose a story, go from operation to operation, and see the tables and the pool change."""

    _esm = module("paged_attention.js")


def stepper() -> BlockTableStepper:
    """The stepper with three stories; every state was read off a ``BlockAllocator``."""
    stories = {
        "append and free": append_and_free,
        "fork and copy on write": fork_and_copy,
        "cached prefix and eviction": prefix_and_eviction,
    }
    return BlockTableStepper(
        label="Block-table animator: sequences above, the pool below",
        data={"block_size": BLOCK_SIZE, "stories": {name: tell(story) for name, story in stories.items()}},
    )


class Stage:
    """A pool of a few blocks, the words in its slots, and the states that the audience saw.

    Args:
        blocks: of BLOCK_SIZE words each.
    """

    def __init__(self, blocks: int):
        self.allocator = BlockAllocator(blocks, BLOCK_SIZE)
        self.words: list[str | None] = [None] * (blocks * BLOCK_SIZE)
        self.tables: dict[str, BlockTable] = {}
        self.texts: dict[str, list[str]] = {}
        self.states: list[dict] = []
        self.fresh: set[int] = set()

    def start(self, name: str) -> BlockTable:
        """A new sequence."""
        self.tables[name], self.texts[name] = BlockTable(self.allocator), []
        return self.tables[name]

    def append(self, name: str, text: str) -> list[tuple[int, int]]:
        """Append the words of a text; returns the block copies that it took."""
        table, words = self.tables[name], text.split()
        start = table.length
        copies = table.append(len(words))
        for source, target in copies:
            for offset in range(BLOCK_SIZE):
                self.words[target * BLOCK_SIZE + offset] = self.words[source * BLOCK_SIZE + offset]
            self.fresh |= {target * BLOCK_SIZE + offset for offset in range(start % BLOCK_SIZE)}
        for slot, word in zip(table.slots(start, table.length), words, strict=True):
            self.words[slot] = word
            self.fresh.add(slot)
        self.texts[name] += words
        return copies

    def finish(self, name: str, *, publish: bool = False) -> None:
        """A sequence ends; with ``publish`` its full blocks may be found again."""
        table = self.tables.pop(name)
        if publish:
            table.publish(self.texts[name])
        table.free()

    def live(self, block: int) -> list[bool]:
        """Which slots of a block somebody may still read: those that a holder has filled, or all of a cached block."""
        if self.allocator.prefix_of[block] is not None:
            return [True] * BLOCK_SIZE
        ends = [t.length - BLOCK_SIZE * t.blocks.index(block) for t in self.tables.values() if block in t.blocks]
        return [offset < max(ends, default=0) for offset in range(BLOCK_SIZE)]

    def show(self, sentence: str) -> None:
        """Record what is there now, and what the audience is told about it."""
        a = self.allocator
        holders = [[n for n, t in self.tables.items() if block in t.blocks] for block in range(a.blocks)]
        pool = [
            {
                "holders": holders[block],
                "state": "held" if holders[block] else "cached" if a.prefix_of[block] else "empty",
                "words": self.words[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE],
                "fresh": [block * BLOCK_SIZE + offset in self.fresh for offset in range(BLOCK_SIZE)],
                "live": self.live(block),
            }
            for block in range(a.blocks)
        ]
        tables = {name: {"blocks": list(t.blocks), "length": t.length} for name, t in self.tables.items()}
        self.states.append({"said": sentence, "pool": pool, "tables": tables})
        self.fresh = set()


def tell(story: Callable[[Stage], None]) -> list[dict]:
    """The states of a story."""
    stage = Stage(6)
    story(stage)
    return stage.states


def append_and_free(stage: Stage) -> None:
    """Sequences take blocks one at a time, from anywhere."""
    stage.show("Six blocks of four slots, all empty. Nobody has reserved anything.")
    stage.start("A")
    stage.append("A", "Once upon a time there")
    stage.show("A brings five tokens and takes two blocks. Three slots of the second wait for A: all that A can waste.")
    stage.start("B")
    stage.append("B", "The fox ran")
    stage.show("B brings three tokens and takes one block.")
    stage.append("A", "was a little")
    stage.show("A grows by three tokens. They fit into its second block: no memory is taken.")
    stage.append("A", "dog")
    stage.show(
        "A's second block is full, so the ninth token takes a block. B's lies in between, and that is no matter."
    )
    stage.finish("B")
    stage.show("B ends. Its block goes back to the empty ones; what is written there is stale.")
    stage.start("C")
    stage.append("C", "Two owls met in")
    stage.show("C takes the block that B had, and overwrites what was stale.")
    stage.append("C", "spring")
    stage.show("C goes on in another block. The pool never has a gap that is too small: all blocks are alike.")


def fork_and_copy(stage: Stage) -> None:
    """Beams share their past."""
    stage.start("A")
    stage.append("A", "The cat sat on the mat")
    stage.show("A holds six tokens in two blocks.")
    stage.tables["B"], stage.texts["B"] = stage.tables["A"].fork(), list(stage.texts["A"])
    stage.show("B forks from A. Only the table is copied: each block now counts two holders.")
    ((source, target),) = stage.append("B", "and")
    stage.show(
        f"B writes into a block that A reads too. So it gets a copy of its own, {source} to {target}: copy on write."
    )
    stage.append("A", "all")
    stage.show("A writes. It is alone on its block by now, and copies nothing.")
    stage.append("B", "purred then")
    stage.show("B fills its block and takes a new one. The first block still serves both.")
    stage.finish("A")
    stage.show("A ends. Its last block is empty again; the shared one lives on with one holder.")


def prefix_and_eviction(stage: Stage) -> None:
    """Prompts that begin alike, and what is forgotten first."""
    system = "You are a kind old wise owl"
    stage.start("A")
    stage.append("A", f"{system} : Who are you")
    stage.show("A begins with a system prompt of eight tokens, which fill two blocks. A question follows.")
    stage.finish("A", publish=True)
    stage.show("A ends. Full blocks stay findable by their tokens: cached, held by nobody. The rest is empty.")
    question = "Why do owls"
    table = stage.start("B")
    reused = table.reuse(f"{system} : {question}".split())
    stage.texts["B"] = f"{system} :".split()
    stage.show(f"B begins alike. It finds two blocks and holds them: {reused} tokens are not computed again.")
    stage.append("B", question)
    stage.show("Only B's own three tokens are computed and written.")
    stage.finish("B", publish=True)
    stage.show("B ends. It gives its blocks back from the end, so that the head of the prompt is evicted last.")
    stage.start("C")
    stage.append("C", "A long text that is new from its very first word to the last and never ends")
    stage.show("C takes the empty blocks, then evicts the cached one that was freed first: the tail of the prompt.")
    table = stage.start("D")
    prompt = f"{system} : Hoo".split()
    reused = table.reuse(prompt)
    stage.texts["D"] = prompt[:reused]
    stage.show(f"D begins like A and B, and finds what is left of that: {reused} tokens.")
    try:
        stage.append("D", " ".join(prompt[reused:]))
    except OutOfBlocks as refusal:
        stage.show(f"D cannot go on: {refusal}. It waits, or somebody's blocks are taken: the next chapter.")
