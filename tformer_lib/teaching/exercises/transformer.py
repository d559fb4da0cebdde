"""The exercises of the Transformer chapter."""

import math

import torch
from torch import nn

from tformer_lib.contract import counted
from tformer_lib.teaching.exercises.engine import exercise, require, require_close, require_number, require_shape
from tformer_lib.transformer import ModelConfig, count_parameters, label_smoothed_loss, make_norm


@exercise(
    "transformer.rms_norm",
    title="RMSNorm in one line",
    hints=(
        "Divide each token by its root mean square, then multiply by the learned gain.",
        "The mean is over the last dimension alone; keepdim=True keeps the shapes fitting.",
        "x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * gain",
    ),
)
def check_rms_norm(fn):
    x, gain = 3 * torch.randn(2, 5, 16) + 1, torch.rand(16) + 0.5
    found = fn(x, gain, 1e-5)
    require_shape(found, x.shape)
    norm = nn.functional.rms_norm(x, (16,), gain, 1e-5)
    mean_removed = nn.functional.layer_norm(x, (16,), gain, eps=1e-5)
    require(not torch.allclose(found.double(), mean_removed.double(), atol=1e-3), "the mean is subtracted: LayerNorm")
    require(not torch.allclose(found.double(), (norm / gain).double(), atol=1e-3), "the gain is missing")
    require_close(found, norm, "a token is not divided by its own root mean square")
    faint = nn.functional.rms_norm(0.002 * x, (16,), gain, 1e-3)
    require_close(fn(0.002 * x, gain, 1e-3), faint, "a token of small numbers: epsilon goes inside the root")
    x, other = torch.randn(1, 3, 10), torch.rand(10) + 0.5
    norm = nn.functional.rms_norm(x, (10,), other, 1e-5)
    require_close(fn(x, other, 1e-5), norm, "width 16 was right, width 10 is not", name="the result for width 10")
    zeros = fn(torch.zeros(1, 1, 16), gain, 1e-5)
    require_close(zeros, torch.zeros(1, 1, 16), "a token of zeros should stay zeros: epsilon goes inside the root")


@exercise(
    "transformer.shift",
    title="Inputs and targets",
    hints=(
        "At every place the model sees the tokens up to it and must name the next one.",
        "From n + 1 tokens come n pairs: the inputs leave the last token out, the targets the first.",
        "return tokens[:, :-1], tokens[:, 1:]",
    ),
)
def check_shift(fn):
    for batch, length in ((3, 9), (5, 12), (1, 2)):
        tokens = torch.randint(0, 50, (batch, length))
        pair = fn(tokens)
        require(isinstance(pair, tuple | list) and len(pair) == 2, "return two tensors: inputs, targets")
        inputs, targets = pair
        for name, x in (("inputs", inputs), ("targets", targets)):
            require_shape(x, (batch, length - 1), f"for tokens ({batch}, {length}), {name}")
            require(not x.is_floating_point(), f"{name} are {x.dtype}: tokens are whole numbers")
        same = length > 2 and torch.equal(inputs, targets)
        require(not same, "inputs and targets are the same: the model would learn to copy")
        require(torch.equal(inputs, tokens[:, :-1]), "inputs should be all tokens but the last")
        require(torch.equal(targets, tokens[:, 1:]), "target t should be the token that follows input t")


@exercise(
    "transformer.smoothing",
    title="The lowest loss that smoothing allows",
    hints=(
        "The best the model can do is to predict the smoothed target itself; the loss is then that target's entropy.",
        "One token has probability 1 - e + e / V, each of the other V - 1 has e / V.",
        "Add -p log p over the V tokens, and mind e = 0, where 0 log 0 is 0.",
    ),
)
def check_smoothing(fn):
    for vocabulary, smoothing in ((28, 0.1), (1000, 0.1), (5, 0.5), (7, 0.0)):
        found = require_number(fn(vocabulary, smoothing), "the loss")
        target = torch.full((vocabulary,), smoothing / vocabulary, dtype=torch.float64)
        target[0] += 1 - smoothing
        entropy = -(target * target.log()).nan_to_num().sum()
        best = label_smoothed_loss(target.log().clamp(min=-700)[None], torch.tensor([0]), smoothing=smoothing)
        require(math.isfinite(found), f"for {vocabulary} tokens and smoothing {smoothing} the result is {found}")
        others = 1 - smoothing, smoothing / (vocabulary - 1)  # the mistake: the right token gets no part of it
        wrong = -sum(p * math.log(p) * n for p, n in zip(others, (1, vocabulary - 1), strict=True) if p)
        require(
            abs(found - wrong) > 1e-4 or not smoothing,
            "the smoothing is spread over all tokens, the right one included: that has 1 - e + e / V",
        )
        require(
            abs(found - entropy.item()) < 1e-4,
            f"{vocabulary} tokens, smoothing {smoothing}: the loss goes down to {best.item():.4f}; you say {found:.4g}",
        )


@exercise(
    "transformer.parameters",
    title="Count a block",
    hints=(
        "Four projections in attention, two matrices in the feed-forward (three for SwiGLU), two norms.",
        "k_proj and v_proj have kv_heads * head_dim columns, not width.",
        "A bias adds as many numbers as its matrix has outputs; RMSNorm has a gain alone, LayerNorm a bias too.",
    ),
)
def check_parameters(fn):
    from tformer_lib.transformer import Block

    modern = {"norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rope", "bias": False}
    for choices in (
        {},
        {"head_dim": 8},
        modern,
        {**modern, "kv_heads": 1},
        {"feed_forward_width": 40, "kv_heads": 2},
        {"bias": False},
        {"norm": "rmsnorm"},
    ):
        config = ModelConfig(vocab_size=10, width=48, heads=4, layers=1, **choices)
        expected = count_parameters(Block(config))
        found = fn(config)
        if found == expected - 2 * count_parameters(make_norm(config)):
            require(False, "the two norms are missing")
        require(
            found == expected, f"a block with {choices or 'the defaults'} has {expected} parameters; you say {found}"
        )


@exercise(
    "transformer.beam",
    title="Beam search",
    hints=(
        "Keep `beams` partial outputs with the sum of their log-probabilities; greedy search is beams = 1.",
        "Extend each by every token, keep the best `beams` of all beams * vocabulary sums.",
        "A hypothesis that has ended is carried on unchanged: give it one extension, with log-probability 0.",
    ),
)
def check_beam(fn):
    for case in range(12):
        steps, start = 3 + case % 2, case % 3
        end = {3: (case + 1) % 3, 1: start}.get(case % 4, 3)
        same = ", whose start and end are the same token," if start == end else ""
        table = torch.randn(steps, 4, 4).mul(2).log_softmax(-1)  # step, previous token, next token
        log_probs = lambda prefix, table=table: table[len(prefix) - 1, prefix[-1]]  # noqa: E731
        for beams in (1, 2, 3, 64):
            found = fn(log_probs, start, end, beams, steps)
            require(isinstance(found, list), "return the tokens after the start token, as a list")
            best = beam_search(log_probs, start, end, beams, steps)
            require(
                found == best,
                f"with {counted(beams, 'beam')} the best output of case {case}{same} is {best} "
                f"(log-probability {total(log_probs, best):.3f}), you return {found}",
            )


def beam_search(log_probs, start: int, end: int, beams: int, steps: int) -> list[int]:
    """The best of ``beams`` hypotheses after ``steps`` tokens; see the exercise."""
    alive = [([start], 0.0)]
    for _ in range(steps):
        extended = []
        for prefix, score in alive:
            if prefix[-1] == end and len(prefix) > 1:
                extended.append((prefix, score))
                continue
            extended += [([*prefix, t], score + p) for t, p in enumerate(log_probs(prefix).tolist())]
        alive = sorted(extended, key=lambda e: -e[1])[:beams]
    return alive[0][0][1:]


def total(log_probs, tokens: list[int], start: int = 0) -> float:
    """The log-probability of an output."""
    prefix = [start, *tokens]
    return sum(log_probs(prefix[: i + 1])[t].item() for i, t in enumerate(tokens))
