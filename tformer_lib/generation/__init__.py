"""Generation: prefill the prompt, then decode token by token, choosing each by the rules asked for.

    generate(model, [[1, 2, 3], [4, 5]], max_new_tokens=20)                                  # greedy
    generate(model, prompts, max_new_tokens=20, temperature=0.8, top_p=0.95, seed=1)         # sampled
    for tokens in stream(model, [prompt], max_new_tokens=20): ...                            # as they come
    conversation = Conversation(model, encoding)                                             # in turns
    for piece in conversation.say("Hello", max_new_tokens=20): ...

    python -m tformer_lib.generation --prompt "Once upon a time"                             # the same in a terminal
    python -m tformer_lib.generation --chat

A row's text does not depend on what else is in the batch: prompts of different lengths are padded on the right and the
cache never sees the padding, and row i draws from its own random stream, seeded with ``seed + i``.

On a GPU, a small model's decode step is bound by launching its kernels. ``cuda_graph=True`` records the step once and
replays it with one launch (:class:`StaticStep`); ``compile=True`` fuses its kernels first.

Each topic has a room: ``sampling`` (the rules), ``steps`` (one decode step, and its recording), ``decoding`` (the
loop), ``text`` (characters from tokens as they come), ``conversation`` (turns that share a cache) and ``command`` (the
command line).
"""

from tformer_lib.generation.conversation import Conversation
from tformer_lib.generation.decoding import (
    STEPS_BETWEEN_CHECKS,
    cache_of,
    check_memory,
    cut,
    decode,
    generate,
    generate_uncached,
    prefill,
    stops_of,
    stream,
)
from tformer_lib.generation.sampling import (
    Sampler,
    Sampling,
    check_number,
    distribution,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    random_stream,
)
from tformer_lib.generation.steps import StaticStep, changing_shapes, decode_step, one_row
from tformer_lib.generation.text import TextStream, overlap

__all__ = [
    "Conversation",
    "STEPS_BETWEEN_CHECKS",
    "Sampler",
    "Sampling",
    "StaticStep",
    "TextStream",
    "cache_of",
    "changing_shapes",
    "check_memory",
    "check_number",
    "cut",
    "decode",
    "decode_step",
    "distribution",
    "draw",
    "generate",
    "generate_uncached",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "one_row",
    "overlap",
    "penalise_repetition",
    "prefill",
    "random_stream",
    "stops_of",
    "stream",
]
