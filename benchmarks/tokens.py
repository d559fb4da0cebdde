"""Speed of the tokenizer: ``python -m benchmarks.tokens``.

Training on n bytes with M merges costs about n for the pre-tokens and at most as many steps as the distinct pre-tokens
have bytes for the merges; the plain algorithm costs M times the latter. Encoding is tiktoken's, in Rust. The text is
the char-rnn Shakespeare if it is in the data folder or can be downloaded, and stories otherwise.
"""

import math
import sys
import time
from collections.abc import Sequence

import tiktoken

from benchmarks.harness import Options, Report, Timing, command_line, measure
from tformer_lib import stories, tokens

SIZES = [512, 1024, 2048, 4096]
PLAIN_SIZES = [280, 300]
CURVE = [257, 300, 400, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192]
ON_A_HOST = "comparisons and look-ups on a host: neither arithmetic nor bandwidth decides"
OFTEN = {"seconds": 1.0, "warmup": 0.0, "min_calls": 3}


def corpus() -> tuple[str, str]:
    """A name and about 1 MB of text."""
    try:
        return "shakespeare", tokens.shakespeare()
    except tokens.CorpusError as error:
        print(f"  {error}: taking stories instead")
        return "stories", tokens.join_stories(stories.stories(1700))


def compression(text: str) -> dict[str, list]:
    """Bytes per token of ``text`` for the vocabulary sizes of ``CURVE`` that it can fill: a smaller one has the first
    merges, and a text of few words has no pair left to merge before the largest size.
    """
    learned = tokens.train_bpe(text, CURVE[-1])
    sizes = [size for size in CURVE if size <= len(learned.vocab)]
    counts = [len(first_tokens(learned, size).encode_ordinary(text)) for size in sizes]
    return {"vocab_size": sizes, "bytes_per_token": [round(len(text.encode()) / count, 4) for count in counts]}


def first_tokens(learned: tokens.BPE, size: int) -> tiktoken.Encoding:
    """The encoding that stopped at ``size`` tokens."""
    learned_ids = range(size - len(learned.special_tokens))
    specials = {token: len(learned_ids) + i for i, token in enumerate(learned.special_tokens)}
    vocab = {i: learned.vocab[i] for i in learned_ids} | {i: token.encode() for token, i in specials.items()}
    return tokens.BPE(vocab, learned.merges, specials, learned.pattern).encoding


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command_line(run, arguments, topic="tokens", description=__doc__)


def run(args: Options) -> None:
    """Training, encoding, and how much a vocabulary compresses; on the CPU, where tokens are made."""
    if args.device != "cpu":
        print("tokens are made on the CPU: nothing to measure here")
        return
    name, text = corpus()
    topic = "tokens" if name == "shakespeare" else "tokens_stories"  # the chapter shows the former
    report = Report(topic, "cpu", args.out)
    report.note(text=name, text_bytes=len(text.encode()))
    for size in SIZES:
        timing = measure(lambda: tokens.train_bpe(text, size), **OFTEN)  # noqa: B023
        facts = {"case": f"{size:,} tokens", "contestant": "train_bpe", "unbounded": ON_A_HOST, "vocab_size": size}
        report.add(f"train_bpe, {size} tokens", timing, alone="the plain algorithm would take minutes", **facts)
    for size in PLAIN_SIZES:
        begin = time.perf_counter()  # once and unwarmed: it takes seconds, so that a first call's extra is nothing
        tokens.train_bpe_plain(text, size)
        timing = Timing(*3 * [time.perf_counter() - begin], 1)
        facts = {"case": f"{size:,} tokens", "contestant": "train_bpe_plain", "unbounded": ON_A_HOST}
        peer = f"train_bpe, {SIZES[0]} tokens"
        report.add(f"train_bpe_plain, {size} tokens", timing, peer=peer, vocab_size=size, **facts)
    for encoding in (tokens.train_bpe(text, 4096).encoding, tokens.gpt2()):
        timing = measure(lambda: encoding.encode_ordinary(text), **OFTEN)  # noqa: B023
        rate = round(len(text.encode()) / timing.median / 1e6, 2)
        facts = {"case": f"encode with {encoding.n_vocab:,} tokens", "contestant": "tiktoken", "unbounded": ON_A_HOST}
        alone, row = "it is tiktoken itself", f"encode, {encoding.n_vocab} tokens, {rate} MB/s"
        report.add(row, timing, alone=alone, megabytes_per_second=rate, **facts)
    report.note(
        compression=compression(text),
        gpt2_bytes_per_token=round(len(text.encode()) / len(tokens.gpt2().encode_ordinary(text)), 4),
        single_character_entropy_bits=round(entropy_of_characters(text), 4),
    )
    report.finish()


def entropy_of_characters(text: str) -> float:
    """Bits per character of the characters' frequencies, taken one by one."""
    shares = [text.count(character) / len(text) for character in set(text)]
    return -sum(share * math.log2(share) for share in shares)


if __name__ == "__main__":
    sys.exit(main())
