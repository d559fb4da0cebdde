"""Answers to the exercises of the paged attention chapter."""

from collections import OrderedDict

import torch


def slots(block_table, block_size, start, stop):
    return [block_table[p // block_size] * block_size + p % block_size for p in range(start, stop)]


def slots_without_a_table(block_table, block_size, start, stop):
    return list(range(start, stop))


def slots_without_offsets(block_table, block_size, start, stop):
    return [block_table[p // block_size] * block_size for p in range(start, stop)]


def slots_in_a_run(block_table, block_size, start, stop):
    first = block_table[start // block_size] * block_size + start % block_size
    return list(range(first, first + stop - start))


def append(blocks, length, holders, empty, size):
    if length % size == 0:
        blocks.append(take(holders, empty))
        return []
    last = blocks[-1]
    if holders[last] == 1:
        return []
    holders[last] -= 1
    blocks[-1] = take(holders, empty)
    return [(last, blocks[-1])]


def take(holders, empty):
    block = empty.pop()
    holders[block] = 1
    return block


def append_in_place(blocks, length, holders, empty, size):
    if length % size == 0:
        blocks.append(take(holders, empty))
    return []


def append_always_copies(blocks, length, holders, empty, size):
    if length % size == 0:
        blocks.append(take(holders, empty))
        return []
    last = blocks[-1]
    holders[last] -= 1
    blocks[-1] = take(holders, empty)
    return [(last, blocks[-1])]


def append_keeps_the_count(blocks, length, holders, empty, size):
    last = blocks[-1] if blocks else None
    copies = append(blocks, length, holders, empty, size)
    if copies:
        holders[last] += 1
    return copies


def append_to_a_new_list(blocks, length, holders, empty, size):
    return append(list(blocks), length, holders, empty, size)


def append_copies_full_blocks(blocks, length, holders, empty, size):
    if length and holders[blocks[-1]] > 1:
        last = blocks[-1]
        holders[last] -= 1
        blocks[-1] = take(holders, empty)
        return [(last, blocks[-1])]
    return append(blocks, length, holders, empty, size)


def match(tokens, cached, size, key_of):
    found, key = [], None
    for start in range(0, len(tokens) - size, size):
        end = start + size
        key = key_of(key, tokens[start:end])
        if key not in cached or cached[key][1] != tuple(tokens[:end]):
            break
        found.append(cached[key][0])
    return found


def match_all(tokens, cached, size, key_of):
    return match([*tokens, None], cached, size, key_of)


def match_believes(tokens, cached, size, key_of):
    found, key = [], None
    for start in range(0, len(tokens) - size, size):
        key = key_of(key, tokens[start : start + size])
        if key not in cached:
            break
        found.append(cached[key][0])
    return found


def match_over_holes(tokens, cached, size, key_of):
    found, key = [], None
    for start in range(0, len(tokens) - size, size):
        key = key_of(key, tokens[start : start + size])
        if key in cached and cached[key][1] == tuple(tokens[: start + size]):
            found.append(cached[key][0])
    return found


def match_compares_the_block_alone(tokens, cached, size, key_of):
    found, key = [], None
    for start in range(0, len(tokens) - size, size):
        part = tuple(tokens[start : start + size])
        key = key_of(key, part)
        if key not in cached:
            break
        if cached[key][1][-size:] == part:
            found.append(cached[key][0])
    return found


def match_compares_and_stops_by_the_block_alone(tokens, cached, size, key_of):
    found, key = [], None
    for start in range(0, len(tokens) - size, size):
        part = tuple(tokens[start : start + size])
        key = key_of(key, part)
        if key not in cached or cached[key][1][-size:] != part:
            break
        found.append(cached[key][0])
    return found


def combine(outs, lses):
    lse = lses.logsumexp(0)
    anchor = lse.masked_fill(lse == -torch.inf, 0.0)
    return (torch.exp(lses - anchor)[..., None] * outs).sum(0), lse


def combine_mean(outs, lses):
    return outs.mean(0), lses.logsumexp(0)


def combine_overflows(outs, lses):
    weights = lses.exp() / lses.exp().sum(0)
    return (weights[..., None] * outs).sum(0), lses.exp().sum(0).log()


def combine_blind(outs, lses):
    weights = lses.softmax(0)
    return (weights[..., None] * outs).sum(0), lses.logsumexp(0)


def combine_forgets_the_lse(outs, lses):
    return combine(outs, lses)[0], lses.amax(0)


class LRU:
    def __init__(self, blocks):
        self.empty, self.cached = list(range(blocks)), OrderedDict()

    def take(self):
        if self.empty:
            return self.empty.pop()
        return self.cached.popitem(last=False)[1] if self.cached else None

    def free(self, block, key=None):
        if key is None:
            self.empty.append(block)
        else:
            self.cached[key] = block

    def find(self, key):
        return self.cached.pop(key, None)


class LatestFirst(LRU):
    def take(self):
        if self.empty:
            return self.empty.pop()
        return self.cached.popitem(last=True)[1] if self.cached else None


class CachedFirst(LRU):
    def take(self):
        if self.cached:
            return self.cached.popitem(last=False)[1]
        return self.empty.pop() if self.empty else None


class NeverEvicts(LRU):
    def take(self):
        return self.empty.pop() if self.empty else None


class FindsButLeaves(LRU):
    def find(self, key):
        return self.cached.get(key)


class LooksForTheOldest(LRU):
    def __init__(self, blocks):
        super().__init__(blocks)
        self.freed, self.cached = 0, {}

    def take(self):
        if self.empty:
            return self.empty.pop()
        return self.cached.pop(min(self.cached, key=self.cached.get))[1] if self.cached else None

    def free(self, block, key=None):
        self.freed += 1
        if key is None:
            self.empty.append(block)
        else:
            self.cached[key] = self.freed, block

    def find(self, key):
        return self.cached.pop(key, (0, None))[1]


def combine_without_the_last(outs, lses):
    return combine(outs[:-1], lses[:-1])


def combine_without_the_first(outs, lses):
    return combine(outs[1:], lses[1:])


RIGHT = {
    "paged_attention.slots": slots,
    "paged_attention.append": append,
    "paged_attention.match": match,
    "paged_attention.combine": combine,
    "paged_attention.lru": LRU,
}
WRONG = {
    "paged_attention.slots": [slots_without_a_table, slots_without_offsets, slots_in_a_run],
    "paged_attention.append": [
        append_in_place,
        append_always_copies,
        append_keeps_the_count,
        append_copies_full_blocks,
        append_to_a_new_list,
    ],
    "paged_attention.match": [
        match_all,
        match_believes,
        match_over_holes,
        match_compares_the_block_alone,
        match_compares_and_stops_by_the_block_alone,
    ],
    "paged_attention.combine": [
        combine_without_the_last,
        combine_without_the_first,
        combine_mean,
        combine_overflows,
        combine_blind,
        combine_forgets_the_lse,
    ],
    "paged_attention.lru": [LooksForTheOldest, LatestFirst, CachedFirst, NeverEvicts, FindsButLeaves],
}
