"""Answers to the exercises of the tokens chapter."""

import codecs
import math
from collections import Counter, defaultdict
from itertools import pairwise

import torch

from tformer_lib.tokens import MergeTable


def merge(word, pair):
    merged, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            merged.append(pair[0] + pair[1])
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return tuple(merged)


def merge_forgets_to_skip(word, pair):
    merged = []
    for i, token in enumerate(word):
        merged.append(pair[0] + pair[1] if word[i : i + 2] == pair else token)
    return tuple(merged)


def merge_from_the_right(word, pair):
    merged, i = [], len(word)
    while i > 0:
        if word[max(i - 2, 0) : i] == pair:
            merged.append(pair[0] + pair[1])
            i -= 2
        else:
            merged.append(word[i - 1])
            i -= 1
    return tuple(reversed(merged))


def merge_the_first_only(word, pair):
    for i in range(len(word) - 1):
        if word[i : i + 2] == pair:
            return (*word[:i], pair[0] + pair[1], *word[i + 2 :])
    return word


def merge_to_a_list(word, pair):
    return list(merge(word, pair))


def encode(word, merges):
    order = {pair: i for i, pair in enumerate(merges)}
    cut = tuple(bytes([b]) for b in word)
    while True:
        known = [pair for pair in pairwise(cut) if pair in order]
        if not known:
            return list(cut)
        cut = merge(cut, min(known, key=order.get))


def encode_from_left_to_right(word, merges):
    cut = tuple(bytes([b]) for b in word)
    while True:
        known = [pair for pair in pairwise(cut) if pair in set(merges)]
        if not known:
            return list(cut)
        cut = merge(cut, known[0])


def encode_longest_first(word, merges):
    vocabulary = {left + right for left, right in merges}
    cut, start = [], 0
    while start < len(word):
        end = next((e for e in range(len(word), start + 1, -1) if word[start:e] in vocabulary), start + 1)
        cut.append(word[start:end])
        start = end
    return cut


def encode_one_merge(word, merges):
    cut = tuple(bytes([b]) for b in word)
    known = [pair for pair in merges if pair in set(pairwise(cut))]
    return list(merge(cut, known[0]) if known else cut)


def bits_per_byte(loss, token_count, byte_count):
    return loss * token_count / (byte_count * math.log(2))


def nats_per_byte(loss, token_count, byte_count):
    return loss * token_count / byte_count


def bits_per_token(loss, token_count, byte_count):
    return loss / math.log(2)


def bits_upside_down(loss, token_count, byte_count):
    return loss * byte_count / (token_count * math.log(2))


def bits_the_wrong_way(loss, token_count, byte_count):
    return loss * token_count / byte_count * math.log(2)


def stream(pieces):
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)


def stream_each_alone(pieces):
    for piece in pieces:
        yield piece.decode("utf-8", errors="replace")


def stream_dropping_halves(pieces):
    for piece in pieces:
        yield piece.decode("utf-8", errors="ignore")


def stream_all_at_the_end(pieces):
    yield b"".join(pieces).decode("utf-8", errors="replace")


def stream_without_an_end(pieces):
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        yield decoder.decode(piece)


def stream_holding_whole_pieces(pieces):
    waiting = b""
    for piece in pieces:
        waiting += piece
        try:
            text = waiting.decode()
        except UnicodeDecodeError:
            continue
        yield text
        waiting = b""
    yield waiting.decode(errors="replace")


def stream_with_an_end_for_each_byte(pieces):
    decoder = codecs.getincrementaldecoder("utf-8")()
    for piece in pieces:
        yield decoder.decode(piece)
    yield "\ufffd" * len(decoder.getstate()[0])


def stream_by_character(pieces):
    waiting = b""
    for byte in (bytes([b]) for piece in pieces for b in piece):
        waiting += byte
        try:
            character = waiting.decode()
        except UnicodeDecodeError:
            continue
        yield character
        waiting = b""
    if waiting:
        yield "\ufffd"


def bits_per_byte_as_a_tensor(loss, token_count, byte_count):
    return torch.tensor(loss * token_count / byte_count) / math.log(2)


def train(words, count):
    cut = [tuple(bytes([b]) for b in word) for word in words]
    times, counts, holders, merges = list(words.values()), Counter(), defaultdict(set), []

    def tally(i, sign):
        for pair in pairwise(cut[i]):
            counts[pair] += sign * times[i]
            holders[pair].add(i)
            if not counts[pair]:
                del counts[pair]

    for i in range(len(cut)):
        tally(i, 1)
    while counts and len(merges) < count:
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for i in sorted(holders.pop(best)):
            tally(i, -1)
            cut[i] = merge(cut[i], best)
            tally(i, 1)
    return merges


def train_with_a_heap(words, count):
    table, merges = MergeTable(words), []
    while len(merges) < count and (pair := table.most_frequent()):
        table.merge(pair)
        merges.append(pair)
    return tuple(map(list, merges))


def train_by_recounting(words, count, *, weighted=True, greatest=True, overlaps=True, endless=False):
    cut = {tuple(bytes([b]) for b in word): times for word, times in words.items()}
    merges = []
    while len(merges) < count:
        counts = Counter()
        for word, times in cut.items():
            last = None
            for at, pair in enumerate(pairwise(word)):
                if overlaps or last != (at - 1, pair):
                    counts[pair] += times if weighted else 1
                    last = (at, pair)
        if not counts and not endless:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair if greatest else 0))
        merges.append(best)
        cut = {merge(word, best): times for word, times in cut.items()}
    return merges


def train_searching_all_words(words, count):
    cut = [[tuple(bytes([b]) for b in word), times] for word, times in words.items()]
    counts, merges = Counter(), []
    for word, times in cut:
        for pair in pairwise(word):
            counts[pair] += times
    while +counts and len(merges) < count:
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for entry in cut:
            if best in pairwise(entry[0]):
                for pair in pairwise(entry[0]):
                    counts[pair] -= entry[1]
                entry[0] = merge(entry[0], best)
                for pair in pairwise(entry[0]):
                    counts[pair] += entry[1]
    return merges


def train_from_the_first_counts(words, count):
    counts = Counter()
    for word, times in words.items():
        for pair in pairwise(bytes([b]) for b in word):
            counts[pair] += times
    return sorted(counts, key=lambda pair: (counts[pair], pair), reverse=True)[:count]


def train_without_neighbours(words, count):
    """Counts the new pairs, and leaves the old neighbours' counts as they were."""
    cut = {tuple(bytes([b]) for b in word): times for word, times in words.items()}
    counts, merges = Counter(), []
    for word, times in cut.items():
        for pair in pairwise(word):
            counts[pair] += times
    while counts and len(merges) < count:
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        del counts[best]
        cut = {merge(word, best): times for word, times in cut.items()}
        for word, times in cut.items():
            for pair in pairwise(word):
                if b"".join(best) in pair:
                    counts[pair] += times
    return merges


def train_emptying_the_words(words, count):
    merges = train(words, count)
    words.clear()
    return merges


RIGHT = {
    "tokens.merge": merge,
    "tokens.encode": encode,
    "tokens.bits_per_byte": bits_per_byte,
    "tokens.stream": stream,
    "tokens.train": train,
}
ALSO_RIGHT = {
    "tokens.bits_per_byte": [bits_per_byte_as_a_tensor],
    "tokens.stream": [stream_by_character],
    "tokens.train": [train_with_a_heap],
}
WRONG = {
    "tokens.merge": [merge_forgets_to_skip, merge_from_the_right, merge_the_first_only, merge_to_a_list],
    "tokens.encode": [encode_from_left_to_right, encode_longest_first, encode_one_merge],
    "tokens.bits_per_byte": [nats_per_byte, bits_per_token, bits_upside_down, bits_the_wrong_way],
    "tokens.stream": [
        stream_each_alone,
        stream_dropping_halves,
        stream_all_at_the_end,
        stream_without_an_end,
        stream_holding_whole_pieces,
        stream_with_an_end_for_each_byte,
    ],
    "tokens.train": [
        train_by_recounting,
        train_searching_all_words,
        lambda words, count: train_by_recounting(words, count, weighted=False),
        lambda words, count: train_by_recounting(words, count, greatest=False),
        lambda words, count: train_by_recounting(words, count, overlaps=False),
        lambda words, count: train_by_recounting(words, count, endless=True),
        train_from_the_first_counts,
        train_without_neighbours,
        train_emptying_the_words,
    ],
}
