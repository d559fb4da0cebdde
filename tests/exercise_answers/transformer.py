"""Right answers and plausible wrong ones to the exercises of the Transformer chapter."""

import math

import torch

from tformer_lib.teaching.exercises.transformer import beam_search


def rms_norm(x, gain, epsilon):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * gain


def whole_batch_norm(x, gain, epsilon):
    return x * torch.rsqrt(x.pow(2).mean() + epsilon) * gain


def layer_norm(x, gain, epsilon):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + epsilon) * gain


def shift(tokens):
    return tokens[:, :-1], tokens[:, 1:]


def smoothing(vocabulary, smoothing):
    right, rest = 1 - smoothing + smoothing / vocabulary, smoothing / vocabulary
    return -right * math.log(right) - ((vocabulary - 1) * rest * math.log(rest) if rest else 0.0)


def parameters(config, *, kv_width=None, norms=2):
    bias = int(config.bias)
    q_width = config.heads * config.size_of_head
    kv_width = kv_width or config.number_of_kv_heads * config.size_of_head
    inner = config.size_of_feed_forward
    linears = [(config.width, q_width), (config.width, kv_width), (config.width, kv_width), (q_width, config.width)]
    linears += [(config.width, inner), (inner, config.width)]
    linears += [(config.width, inner)] if config.feed_forward == "swiglu" else []
    norm = config.width * (2 if config.norm == "layernorm" and config.bias else 1)
    return sum((n_in + bias) * n_out for n_in, n_out in linears) + norms * norm


def longest_beam(log_probs, start, end, beams, steps):
    """Forgets that an ended hypothesis is carried on."""
    alive = [([start], 0.0)]
    for _ in range(steps):
        extended = [([*p, t], s + lp) for p, s in alive for t, lp in enumerate(log_probs(p).tolist())]
        alive = sorted(extended, key=lambda e: -e[1])[:beams]
    return alive[0][0][1:]


def smoothing_on_the_others_alone(vocabulary, smoothing):
    return -sum(p * math.log(p) for p in (1 - smoothing, *[smoothing / (vocabulary - 1)] * (vocabulary - 1)) if p)


def beam_that_ends_where_it_begins(log_probs, start, end, beams, steps):
    return [] if start == end else beam_search(log_probs, start, end, beams, steps)


RIGHT = {
    "transformer.rms_norm": rms_norm,
    "transformer.shift": shift,
    "transformer.smoothing": smoothing,
    "transformer.parameters": parameters,
    "transformer.beam": beam_search,
}

ALSO_RIGHT = {
    "transformer.rms_norm": [lambda x, gain, epsilon: rms_norm(x.double(), gain, epsilon)],
    "transformer.shift": [lambda tokens: [tokens[:, :-1], tokens[:, 1:]]],
}

WRONG = {
    "transformer.rms_norm": [
        layer_norm,
        whole_batch_norm,
        lambda x, gain, epsilon: rms_norm(x, 1.0, epsilon),
        lambda x, gain, epsilon: x / x.pow(2).mean(-1, keepdim=True).sqrt() * gain,
        lambda x, gain, epsilon: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + epsilon) * gain,
    ],
    "transformer.shift": [
        lambda tokens: (tokens[:, :-1], tokens[:, :-1]),
        lambda tokens: (tokens[:, 1:], tokens[:, :-1]),
        lambda tokens: (tokens, tokens),
    ],
    "transformer.smoothing": [
        lambda vocabulary, smoothing: 0.0,
        lambda vocabulary, smoothing: -(1 - smoothing) * math.log(1 - smoothing),
        smoothing_on_the_others_alone,
    ],
    "transformer.parameters": [
        lambda config: parameters(config, norms=0),
        lambda config: parameters(config, kv_width=config.heads * config.size_of_head),
    ],
    "transformer.beam": [
        beam_that_ends_where_it_begins,
        lambda log_probs, start, end, beams, steps: beam_search(log_probs, start, end, 1, steps),
        longest_beam,
    ],
}
