"""Answers to the exercises of the tokens chapter."""

import codecs
import math
from itertools import pairwise

import torch


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


RIGHT = {
    "tokens.merge": merge,
    "tokens.encode": encode,
    "tokens.bits_per_byte": bits_per_byte,
    "tokens.stream": stream,
}
ALSO_RIGHT = {"tokens.bits_per_byte": [bits_per_byte_as_a_tensor], "tokens.stream": [stream_by_character]}
WRONG = {
    "tokens.merge": [merge_forgets_to_skip, merge_from_the_right, merge_the_first_only, merge_to_a_list],
    "tokens.encode": [encode_from_left_to_right, encode_longest_first, encode_one_merge],
    "tokens.bits_per_byte": [nats_per_byte, bits_per_token, bits_upside_down, bits_the_wrong_way],
    "tokens.stream": [stream_each_alone, stream_dropping_halves, stream_all_at_the_end, stream_without_an_end],
}
