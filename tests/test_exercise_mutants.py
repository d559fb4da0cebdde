"""Right answers changed in one place: the check of every exercise catches each change, or the change is no mistake.

Where a change survives, either the check has a hole, which is to be mended, or the changed answer is as right as the
first, and stands in ``EQUAL`` with the reason.
"""

import importlib
import pkgutil
import signal
import time
from collections.abc import Callable, Iterator
from types import ModuleType

import exercise_answers as answers
import pytest
import torch
from draws import is_deep
from mutants import Mutant, mutants, text_mutants

from tformer_lib.teaching.exercises import engine

EVERY = {
    "flash_kernels.rescale": 6,
    "flash_kernels.tile": 17,
    "flash_kernels.window": 8,
    "masks.tree": 2,
    "sparse_attention.blocks": 2,
    "tokens.encode": 12,
    "tokens.merge": 4,
    "tokens.train": 12,
}
"""Exercises whose mutants are compiled or slow: an ordinary run tries every n-th of them, the deep one all."""

EQUAL = {
    "attention.attend": {
        "-2 -> 2": "of four dimensions, -2 is 2",
    },
    "attention.colours": {
        "10.0 -> 20.0": "a louder question is heard as well",
        "line 2: 1 -> 2": "a louder answer is heard as well",
        "0 -> 1": "the weight still lies on the colour, which is all that is asked",
        "0 -> -1": "the weight still lies on the colour, which is all that is asked",
        "its result is 1 % larger": "the weight still lies on the colour, which is all that is asked",
        "[0.0, 0] -> [0, 0.0]": "the same number",
    },
    "attention.cost": {
        "cost swaps batch and heads": "a product of numbers does not depend on their order",
        "cost swaps batch and T": "a product of numbers does not depend on their order",
        "cost swaps batch and S": "a product of numbers does not depend on their order",
        "cost swaps heads and T": "a product of numbers does not depend on their order",
        "cost swaps heads and S": "a product of numbers does not depend on their order",
        "cost swaps T and S": "a product of numbers does not depend on their order",
    },
    "attention.previous": {
        "10 -> 11": "any sharp softmax will do",
        "10 -> 9": "any sharp softmax will do",
        "its result is flipped along axis 1": "queries and keys turned alike score alike",
        "its result is 1 % larger": "any sharp softmax will do",
        "its result ends with a zero": "the last feature may count for nothing",
    },
    "attention.simple": {
        "-2 -> 2": "of four dimensions, -2 is 2",
    },
    "flash_kernels.limit": {
        "limit ignores d": "head_dim cancels out of operations over bytes",
        "limit ignores d after its first call": "head_dim cancels out of operations over bytes",
        "limit swaps rows and keys": "operations over bytes know their product and their sum alone",
    },
    "flash_kernels.occupancy": {
        "threads // 32 -> -(-threads // 32)": "threads come in whole warps",
        "256 -> 255": "no launch has so many portions that it matters",
        "65536 -> 65537": "portions are multiples of 256",
        "233472 -> 233473": "no block of whole warps divides it",
        "2048 -> 2049": "threads come in multiples of 32",
    },
    "flash_kernels.order": {
        "-heads * tiles // blocks -> -heads * tiles * blocks": "rounds past the last tile hand out nothing",
        "-heads * tiles // blocks -> -heads * tiles": "rounds past the last tile hand out nothing",
        "block if turn % 2 == 0 else blocks - 1 - block -> blocks - 1 - block ...": "a mirrored order ends as early",
        "turn % 2 == 0 -> turn % 2 != 0": "a mirrored order ends as early",
        "turn % 2 -> turn": "a mirrored order ends as early",
        "0 -> 1": "the mirrored order",
        "2 -> 3": "as even as every second round",
        "its result is in reverse": "the blocks are alike, whichever comes first",
    },
    "flash_kernels.row_max": {
        "line 3: 2 -> 3": "1 and 3 lead to the same four lanes as 1 and 2",
        "(1, 2) -> (2, 1)": "a maximum does not depend on the order",
        "(1, 3) -> (3, 1)": "a maximum does not depend on the order",
    },
    "flash_kernels.swizzle": {
        "row * chunks // 8 -> -(-(row * chunks) // 8)": "any swizzle without conflicts will do",
        "min(chunks, 8) -> chunks": "any swizzle without conflicts will do",
        "chunks < 8 -> chunks <= 8": "rows of 8 pieces begin at a line each way",
        "line 2: 8 -> 9": "the number of pieces is a power of two",
        "line 2: 8 -> 7": "the number of pieces is a power of two",
    },
    "flash_kernels.tile": {
        "... - -> + at 190": "a later end adds keys that every row hides",
        "... < -> <= at 367": "one score too many is computed, and not read",
        "... 1 -> 0 at 193": "a later end adds keys that every row hides",
    },
    "flash_math.backward": {
        "-1 -> 1": "of two dimensions, -1 is 1",
    },
    "flash_math.tiles": {
        "min(top + rows, T) -> top + rows": "the last query sees the last key, and one after it would see no more",
        "S - T if shift is None else shift -> S - T": "an option of these answers",
    },
    "generation.draw": {
        "line 2: 1 -> 0": "of one dimension, -1 is 0",
    },
    "generation.temperature": {
        "... -> _one_max_softmax(logits / temperature, -1)": "there is one row",
        "line 4: 1 -> 0": "of one dimension, -1 is 0",
    },
    "generation.top_p": {
        "line 3: 1 -> 0": "of one dimension, -1 is 0",
    },
    "grouped_query_attention.absorb": {
        "-2 -> 2": "of four dimensions, -2 is 2",
    },
    "grouped_query_attention.align": {
        "len(k) // kv_heads -> -(-len(k) // kv_heads)": "the number of groups divides that of heads",
        "range(len(k)) -> range(1, len(k))": "the first head is turned to itself",
        "... -> (k[first] * k[i].conj()).mean(-1, keepdim=True)": "only the direction of the sum is used",
        "line 16: -1 -> 1": "of two dimensions, -1 is 1",
        "line 15: 0 -> 1": "a choice of these answers that is not taken",
        "line 15: 0 -> -1": "a choice of these answers that is not taken",
        "i % kv_heads -> i // kv_heads": "a choice of these answers that is not taken",
        "i % kv_heads -> i": "a choice of these answers that is not taken",
        "i % kv_heads -> kv_heads": "a choice of these answers that is not taken",
        "range(len(k)) -> list(range(len(k)))[1:]": "the first head is turned to itself",
    },
    "grouped_query_attention.kv_head": {
        "heads // kv_heads -> -(-heads // kv_heads)": "the number of groups divides that of heads",
    },
    "grouped_query_attention.scores": {
        "-2 -> 2": "of four dimensions, -2 is 2",
    },
    "kv_cache.slot": {
        "position < sinks -> position <= sinks": "the first slot of the ring follows the last sink",
    },
    "kv_cache.speculate": {
        "logits.argmax(-1).tolist() -> logits.argmax(-1)": "numbers in a tensor are as good",
        "line 3: -1 -> 1": "of two dimensions, -1 is 1",
        "line 6: 0 -> -1": "a batch of one row",
        "torch.tensor([text[-1:] + guesses]) -> [text[-1:] + guesses]": "the check's model takes a list of lists too",
        "speculate swaps model and cache": "the check hands over one object as both",
        "line 9: len(guesses) -> ...": "an option of these answers",
    },
    "kv_cache.tokens_that_fit": {
        "tokens_that_fit ignores heads": "the cache holds kv heads alone: that is the point",
        "tokens_that_fit ignores heads after its first call": "the cache holds kv heads alone: that is the point",
        "tokens_that_fit swaps layers and kv_heads": "a product of numbers does not depend on their order",
        "tokens_that_fit swaps layers and head_dim": "a product of numbers does not depend on their order",
        "tokens_that_fit swaps layers and itemsize": "a product of numbers does not depend on their order",
        "tokens_that_fit swaps kv_heads and head_dim": "a product of numbers does not depend on their order",
        "tokens_that_fit swaps kv_heads and itemsize": "a product of numbers does not depend on their order",
        "tokens_that_fit swaps head_dim and itemsize": "a product of numbers does not depend on their order",
    },
    "linear_attention.decay": {
        "gap.masked_fill(future, -torch.inf).exp()....": "another dtype is as good",
        "0 -> -1": "of one dimension, -1 is 0",
        "log_decay.double() -> log_decay": "float32 will do for a handful of tokens",
    },
    "masks.packed": {
        "S - T -> T - S": "the helper is asked for square masks alone",
    },
    "masks.peeks": {
        "1 -> 0": "nothing stands before the first token",
        "10 -> 11": "any change will do",
        "10 -> 9": "any change will do",
    },
    "masks.tree": {
        "steps < D -> steps <= D": "paths of one more step than there are",
    },
    "mixture_of_experts.route": {
        "its result is flipped along axis 1": "the experts of a token may be named in any order",
    },
    "positional_encoding.alibi": {
        "S - T if offset is None else offset -> S - T": "an option of these answers",
        "... + offset) -> torch.arange(T)[:, None] + offset - torch.arange(S)": "a distance has no sign",
    },
    "positional_encoding.bucket": {
        "buckets // 2 -> buckets / 2": "the number of buckets is even",
        "buckets // 2 -> -(-buckets // 2)": "the number of buckets is even",
        "distance < exact -> distance <= exact": "the logarithm begins where the exact buckets end",
        "buckets - exact -> exact": "half of the buckets are exact, so half are not",
    },
    "positional_encoding.sinusoidal": {
        "0::2 -> ::2": "a slice begins at 0",
    },
    "positional_encoding.skew": {
        "(len(table) + 1) // 2 -> -(-(len(table) + 1) // 2)": "the length of the table is odd",
        "F.pad(scores.flatten(2), (0, T)) -> scores.flatten(2)": "the end of the padding is cut off again",
        "line 3: 1 -> 2": "the length of the table is odd",
    },
    "profiling.own_time": {
        "zip(ranges, own, strict=True) -> zip(ranges, own)": "the two are equally long",
        "... -> reached is not None and reached < start": "an open range reaches past the next start: no gap",
        "True -> False": "the two are equally long",
    },
    "profiling.slower": {
        "... >= recorded * tolerance": "a time on the limit is neither slower nor faster",
        "zip(ours, peers, strict=True) -> zip(ours, peers)": "the two are equally long",
        "True -> False": "the two are equally long",
        "slower swaps recorded and tolerance": "a product of numbers does not depend on their order",
    },
    "profiling.worth": {
        "sum(seconds.values()) -> mean(seconds.values())": "what all repairs share decides nothing",
    },
    "real_models.cache": {
        "cache swaps kv_heads and head_dim": "a product of numbers does not depend on their order",
        "cache swaps kv_heads and itemsize": "a product of numbers does not depend on their order",
        "cache swaps head_dim and itemsize": "a product of numbers does not depend on their order",
    },
    "real_models.name": {
        "...'mlp.down_proj'), ('embedding.tokens.', 'model.embed_tokens.'))": "replacements do not meet",
    },
    "real_models.parameters": {
        "width // heads -> -(-width // heads)": "the number of heads divides the width",
        "(heads * head_dim, config['num_key_value_heads'] * head_dim) -> ...": "the two widths are added",
    },
    "rope.convert": {
        "weight.shape[0] // heads -> -(-weight.shape[0] // heads)": "the number of heads divides the width",
        "head_dim // 2 -> -(-head_dim // 2)": "the width of a head is even",
    },
    "rope.rotate": {
        "0::2 -> ::2": "a slice begins at 0",
    },
    "scaling_out.feed_forward": {
        "W_up.shape[1] // size -> -(-W_up.shape[1] // size)": "the number of processes divides the width",
    },
    "scaling_out.memory": {
        "16 * parameters / devices -> 16 * parameters // devices": "a byte more or less",
    },
    "scaling_out.send": {
        "rank - turn -> turn - rank": "the chunks may go round in the other order",
        "send swaps rank and turn": "the chunks may go round in the other order",
    },
    "serving.certain": {
        "min(len(text), len(stop) - 1) -> len(text)": "what is longer than the stop string does not begin it",
        "min(len(text), len(stop) - 1) -> len(stop) - 1": "a slice ends where its text does",
        "... -> max(len(text), len(stop) - 1)": "the check's texts do not hold the stop string",
        "0 -> -1": "an empty beginning is everywhere",
        "len(stop) - 1 -> len(stop) + 1": "the check's texts do not hold the stop string",
        "len(stop) - 1 -> len(stop)": "the check's texts do not hold the stop string",
    },
    "serving.decode_bound": {
        "decode_bound swaps context and per_token": "a product of numbers does not depend on their order",
    },
    "serving.next_request": {
        "... -> (now - waiting[i][0]) / patience": "what a part of the patience counts is left open",
        "... -> -(-(now - waiting[i][0]) // patience)": "what a part of the patience counts is left open",
        "next_request ignores now": "all wait until now, which shifts all alike",
        "next_request ignores now after its first call": "all wait until now, which shifts all alike",
    },
    "sparse_attention.blocks": {
        "live[r].nonzero().flatten().tolist() -> live[r].nonzero().flatten()": "numbers in a tensor are as good",
        "torch.zeros(len(i), 1) -> torch.ones(len(i), 1)": "multiplied by exp(-inf) before it counts",
        "1.0 -> 2.0": "a row without weight is 0 over anything",
        "line 5: 1 -> 2": "two equal columns, of which the result takes what broadcasts",
    },
    "sparse_attention.layers": {
        "reach.float() @ mask.float() -> mask.float() @ reach.float()": "powers of one matrix commute",
    },
    "sparse_attention.strided": {
        "d < stride -> d <= stride": "that key is seen by the other rule",
    },
    "sparse_attention.window": {
        "-1 -> 1": "of two dimensions, -1 is 1",
    },
    "tokens.bits_per_byte": {
        "bits_per_byte swaps loss and token_count": "a product of numbers does not depend on their order",
    },
    "tokens.train": {
        "sorted(holders.pop(best)) -> sorted(holders.pop(best), reverse=True)": "the order of words changes no count",
        "sorted(holders.pop(best)) -> list(holders.pop(best))": "the order of words changes no count",
    },
    "training.accumulate": {
        "zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True) -> zip(i...": "the two are equally long",
        "True -> False": "the two are equally long",
    },
    "training.groups": {
        "its result is in reverse": "a group of parameters has no order",
    },
    "training.muon": {
        "1e-07 -> 2e-07": "any small number will do",
        "n.size(0) > n.size(1) -> n.size(0) >= n.size(1)": "a square matrix may be turned or not",
        "x.norm() + eps -> x.norm() - eps": "any small number will do",
        "c * square @ square -> square @ (c * square)": "a factor may stand anywhere",
    },
    "training.schedule": {
        "step < warmup -> step <= warmup": "the cosine begins at the peak",
    },
    "transformer.beam": {
        "continue -> break": "what stands behind an ended text has less, and can only lose more",
        "log_probs(prefix).tolist() -> log_probs(prefix)": "numbers in a tensor are as good",
    },
    "transformer.parameters": {
        "kv_width or config.number_of_kv_heads * config.size_of_head -> config...": "an option of these answers",
        "line 6: [(config.width, q_width)...": "a matrix and its transpose have as many numbers",
        "[(config.width, inner), (inner, config.width)] -> ...": "a matrix and its transpose have as many numbers",
        "line 8: (config.width, inner) -> (inner, config.width)": "a matrix and its transpose have as many numbers",
    },
}
"""Changes that are no mistakes, and why. "..." stands for the rest of a label, or for its beginning."""


def rights() -> dict[str, ModuleType]:
    """Each exercise, and the module whose ``RIGHT`` holds its answer."""
    modules = [importlib.import_module(f"{answers.__name__}.{m.name}") for m in pkgutil.iter_modules(answers.__path__)]
    return {name: module for module in modules for name in module.RIGHT}


RIGHTS = rights()


class TimeUp(BaseException):
    """A mutant runs in circles."""


@pytest.fixture
def alarm():
    """A function that lets a call run for so many seconds, in this thread."""

    def ring(*_):
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)

    def limited(seconds: float, call: Callable):
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            return call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    yield limited
    signal.signal(signal.SIGALRM, before)


def all_mutants(name: str) -> Iterator[Mutant]:
    """The mutants of an exercise's right answer; an answer that returns C++ is changed in its text."""
    is_text = name in ("flash_kernels.rescale", "flash_kernels.tile", "flash_kernels.window")
    return text_mutants(RIGHTS[name].RIGHT[name]()) if is_text else mutants(name, RIGHTS[name])


def fits(pattern: str, label: str) -> bool:
    """Whether a key of ``EQUAL`` means this mutant: by its change alone, or by the line and the change."""
    with_line = label.partition(": ")[2] or label
    without = with_line.partition(": ")[2] if with_line.startswith("line ") else with_line
    if pattern.endswith("..."):
        return any(x.startswith(pattern[:-3]) for x in (with_line, without))
    return label.endswith(pattern[3:]) if pattern.startswith("...") else pattern in (with_line, without)


@pytest.mark.parametrize("name", sorted(RIGHTS))
def test_every_change_of_a_right_answer_is_caught_or_no_mistake(name, alarm):
    reasons, needed, survivors = EQUAL.get(name, {}), set(), []
    tried = list(all_mutants(name))[:: 1 if is_deep() else EVERY.get(name, 1)]
    began = time.perf_counter()
    assert engine.examine(name, RIGHTS[name].RIGHT[name]).passed
    limit = 2 + 10 * (time.perf_counter() - began)  # seconds, for mutants that run in circles
    for mutant in tried:
        try:
            passed = alarm(limit, lambda mutant=mutant: engine.examine(name, mutant.build()).passed)
            survives = passed and bool(mutant.acts)
        except TimeUp:
            survives = None
        reason = next((pattern for pattern in reasons if fits(pattern, mutant.label)), None)
        if survives and reason is None:
            survivors.append(mutant.label)
        elif reason is not None:
            assert survives is not False, f"{mutant.label!r} is caught: {reason!r} in EQUAL says too much"
            needed.add(reason)
    assert not survivors, "the check lets wrong answers through, or these are no mistakes: " + "; ".join(survivors)
    assert is_deep() or name in EVERY or needed == set(reasons), f"no mutant needs {set(reasons) - needed}"


def upside_down(answer: Callable, seen: list) -> Callable:
    """An answer that takes every mask, and gives every mask, the other way round."""

    def flip(x):
        if isinstance(x, torch.Tensor) and x.dtype == torch.bool:
            seen.append(x)
            return ~x
        return x

    def inverted(*args, **options):
        result = answer(*map(flip, args), **{name: flip(x) for name, x in options.items()})
        return result if seen else flip(result)

    return inverted


MASKED = [
    name for name in sorted(RIGHTS) if name.split(".")[0] in ("attention", "masks", "kv_cache", "sparse_attention")
]


@pytest.mark.parametrize("name", MASKED)
def test_an_inverted_mask_is_named_as_such(name):
    seen = []
    outcome = engine.examine(name, upside_down(RIGHTS[name].RIGHT[name], seen))
    assert not seen or "is inverted" in outcome.message


def test_one_kv_head_is_no_group():
    def out_of_order(kv_heads):
        def answer(q, k):
            rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3]) @ k.transpose(-2, -1)
            scores = rows.view(*q.shape[:3], -1)
            return scores.flip(-1) if k.shape[1] == kv_heads else scores

        return engine.examine("grouped_query_attention.scores", answer).message

    assert "another group" in out_of_order(2)
    assert "the one kv head" in out_of_order(1)
    assert "another head" in out_of_order(4)
    assert "group" not in out_of_order(1) + out_of_order(4)
