"""What a pass of a model costs at least."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The least that a pass must do: floating-point operations, and bytes read from or written to memory."""

    flops: int
    bytes: int


def pass_cost(config, *, held: int, new: int, itemsize: int = 4) -> Cost:
    """What one row's pass of a ``Decoder`` costs, embeddings and norms left out.

    Of a mixture of experts, those that one token passes through are read: a row of several tokens may read more.

    Args:
        config: the model's ``ModelConfig``.
        held: tokens whose keys and values are in the cache already; 0 without a cache.
        new: tokens that the pass brings: 1 for a cached decode step, the whole text without a cache.
        itemsize: bytes of a number.
    """
    q_width = config.heads * config.size_of_head
    kv_width = config.number_of_kv_heads * config.size_of_head
    projections = config.layers * 2 * config.width * (q_width + kv_width)
    weights = projections + config.active_feed_forward_weights + config.width * config.vocab_size
    pairs = new * held + new * (new + 1) // 2  # of a query with a key that it may see
    attention = config.layers * 4 * q_width * pairs  # a multiply and an add, in the scores and in the mix of values
    kv_numbers = 2 * config.layers * kv_width * (held + new)
    return Cost(2 * weights * new + attention, (weights + kv_numbers) * itemsize)


def cache_bytes(config, tokens: int, *, itemsize: int = 2) -> int:
    """Bytes of keys and values that one row of ``tokens`` tokens takes in a ``Decoder``'s cache.

    A window layer keeps no more than its window, a linear layer a state of one size.

    Args:
        config: the model's ``ModelConfig``.
        tokens: how many tokens the row holds.
        itemsize: bytes of a number.
    """
    kept = {"full": tokens, "nope": tokens, "window": min(tokens, config.window or 0), "linear": 0}
    heads, head_dim, value_dim = config.cached_dims
    keys_and_values = heads * (head_dim + value_dim) * sum(kept[kind] for kind in config.types_of_layers) * itemsize
    return keys_and_values + config.types_of_layers.count("linear") * state_bytes(config.linear, itemsize)


def state_bytes(linear, itemsize: int) -> int:
    """Bytes that one row's state of a linear layer takes, given its ``LinearConfig``: matrices in float32 or better."""
    if linear is None:
        return 0
    heads, head_dim, value_dim = linear.state
    return linear.channels * (linear.kernel - 1) * itemsize + heads * head_dim * value_dim * max(itemsize, 4)
