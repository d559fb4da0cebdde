"""Serving: many requests on one model, each answered as if it were alone.

    llm = LLM(model, encoding)
    for request in llm.generate(["Once upon", "One day"], {"max_new_tokens": 40}): print(request.text)
    for piece in llm.stream(["Once upon"], {"max_new_tokens": 40}): print(piece.text, end="")

    engine = Engine(model, encoding)                    # the same, step by step
    request = engine.add("Once upon", {"stop": ["."]})
    while engine.busy: pieces = engine.step()

Each step runs one pass over whatever rows there are: the next token of those that write, a piece of the prompt of those
that are being read, up to a budget of tokens (Yu et al. 2022, "Orca"; Agrawal et al. 2023, "Sarathi"). Keys and values
live in blocks (Kwon et al. 2023, arXiv:2309.06180). Where blocks run out, the request that came last gives its own back
and is computed again later.

- :class:`Scheduler` decides who computes what; it knows blocks and counts, no tensors.
- :class:`Runner` does it: one copy to the device, one pass, the next tokens. On a GPU, steps in which all rows write
  are CUDA graphs.
- :class:`Engine` joins them, one step ahead on a GPU: step n + 1 is launched before the tokens of step n are read.
- :class:`TextStream` makes text of tokens as they come.
- :class:`Speculation` lets somebody cheaper guess tokens that a step then checks: ``Engine(..., speculation=...)``.

Each has a room: ``request``, ``scheduler``, ``runner``, ``engine``, ``speculation``, ``calibration`` (the scales of
float8 pools). The others are ``turns`` (one thread at a time), ``protocol`` and ``server`` (OpenAI's API over HTTP,
with the extra ``serve``), and ``command``:

    python -m tformer_lib.serving --prompt "Once upon a time"
    python -m tformer_lib.serving serve --model stories
"""

from tformer_lib.generation import TextStream, overlap
from tformer_lib.serving.calibration import calibrate
from tformer_lib.serving.engine import (
    DEFAULT_MEMORY,
    LLM,
    STEPS_REMEMBERED,
    Engine,
    Step,
    blocks_that_fit,
    check_servable,
    freeze_heap,
    graph_sizes,
)
from tformer_lib.serving.fused import FusedPass
from tformer_lib.serving.request import LogProbabilities, Params, Piece, Request
from tformer_lib.serving.runner import (
    SAMPLED,
    Inputs,
    JoinedFeedForward,
    JoinedProjections,
    Launched,
    PackedLayer,
    PackedPass,
    Runner,
    compile_blocks,
    join_projections,
)
from tformer_lib.serving.scheduler import Row, Scheduler
from tformer_lib.serving.speculation import Speculation, accepted, expected_tokens

__all__ = [
    "DEFAULT_MEMORY",
    "Engine",
    "FusedPass",
    "Inputs",
    "JoinedFeedForward",
    "JoinedProjections",
    "LLM",
    "Launched",
    "LogProbabilities",
    "PackedLayer",
    "PackedPass",
    "Params",
    "Piece",
    "Request",
    "Row",
    "Runner",
    "SAMPLED",
    "STEPS_REMEMBERED",
    "Scheduler",
    "Speculation",
    "Step",
    "TextStream",
    "accepted",
    "blocks_that_fit",
    "calibrate",
    "check_servable",
    "compile_blocks",
    "expected_tokens",
    "freeze_heap",
    "graph_sizes",
    "join_projections",
    "overlap",
]
