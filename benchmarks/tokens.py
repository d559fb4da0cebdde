"""Speed of the tokenizer: ``python -m benchmarks.tokens``.

Training on n bytes with M merges costs about n for the pre-tokens and at most as many steps as the distinct pre-tokens
have bytes for the merges; the plain algorithm costs M times the latter. Encoding is tiktoken's, in Rust. The text is
the char-rnn Shakespeare if it is in the data folder or can be downloaded, and stories otherwise.
"""

import argparse
import math
import sys
import time

import tiktoken

from benchmarks.harness import Report, Timing, measure
from tformer_lib import stories, tokens

SIZES = [512, 1024, 2048, 4096]
PLAIN_SIZES = [280, 300]
CURVE = [257, 300, 400, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192]
OFTEN = {"seconds": 1.0, "warmup": 0.0, "min_calls": 3}


def corpus() -> tuple[str, str]:
    """A name and about 1 MB of text."""
    try:
        return "shakespeare", tokens.shakespeare()
    except tokens.CorpusError as error:
        print(f"  {error}: taking stories instead")
        return "stories", tokens.join_stories(stories.stories(1700))


def compression(text: str) -> list[float]:
    """Bytes per token of ``text`` for each vocabulary size of ``CURVE``: a smaller vocabulary has the first merges."""
    learned = tokens.train_bpe(text, CURVE[-1])
    return [len(text.encode()) / len(first_tokens(learned, size).encode_ordinary(text)) for size in CURVE]


def first_tokens(learned: tokens.BPE, size: int) -> tiktoken.Encoding:
    """The encoding that stopped at ``size`` tokens."""
    learned_ids = range(size - len(learned.special_tokens))
    specials = {token: len(learned_ids) + i for i, token in enumerate(learned.special_tokens)}
    vocab = {i: learned.vocab[i] for i in learned_ids} | {i: token.encode() for token, i in specials.items()}
    return tokens.BPE(vocab, learned.merges, specials, learned.pattern).encoding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="only cpu: tokens are made on the CPU")
    if parser.parse_args().device != "cpu":
        sys.exit(print("tokens are made on the CPU: nothing to measure here"))
    name, text = corpus()
    report = Report("tokens" if name == "shakespeare" else "tokens_stories")  # the chapter shows the former
    report.note(text=name, text_bytes=len(text.encode()))
    for size in SIZES:
        report.add(f"train_bpe, {size} tokens", measure(lambda: tokens.train_bpe(text, size), **OFTEN), vocab_size=size)  # noqa: B023
    for size in PLAIN_SIZES:
        begin = time.perf_counter()  # once and unwarmed: it takes seconds, so that a first call's extra is nothing
        tokens.train_bpe_plain(text, size)
        timing = Timing(*3 * [time.perf_counter() - begin], 1)
        report.add(f"train_bpe_plain, {size} tokens", timing, vocab_size=size)
    for encoding in (tokens.train_bpe(text, 4096).encoding, tokens.gpt2()):
        timing = measure(lambda: encoding.encode_ordinary(text), **OFTEN)  # noqa: B023
        rate = round(len(text.encode()) / timing.median / 1e6, 2)
        report.add(f"encode, {encoding.n_vocab} tokens, {rate} MB/s", timing, megabytes_per_second=rate)
    report.note(
        compression={"vocab_size": CURVE, "bytes_per_token": [round(ratio, 4) for ratio in compression(text)]},
        gpt2_bytes_per_token=round(len(text.encode()) / len(tokens.gpt2().encode_ordinary(text)), 4),
        single_character_entropy_bits=round(entropy_of_characters(text), 4),
    )
    report.finish()


def entropy_of_characters(text: str) -> float:
    """Bits per character of the characters' frequencies, taken one by one."""
    shares = [text.count(character) / len(text) for character in set(text)]
    return -sum(share * math.log2(share) for share in shares)


if __name__ == "__main__":
    main()
