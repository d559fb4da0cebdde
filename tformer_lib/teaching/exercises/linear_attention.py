"""The exercises of the linear-attention chapter."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tformer_lib.teaching.exercises.engine import exercise, require, require_close, require_finite, require_shape


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that any tensor made inside it has."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        many = result if isinstance(result, (tuple, list)) else (result,)
        self.most = max([self.most, *(x.numel() for x in many if isinstance(x, torch.Tensor))])
        return result


def draw(T: int, S: int | None = None, features: int = 4, width: int = 3):
    """Positive features of queries and keys, and values: (T, features), (S, features), (S, width)."""
    S = T if S is None else S
    return torch.rand(T, features) + 0.1, torch.rand(S, features) + 0.1, torch.randn(S, width)


def by_weights(phi_q, phi_k, v, causal):
    """Linear attention with all its weights written out."""
    weights = phi_q @ phi_k.T
    weights = weights.tril() if causal else weights
    return weights @ v / weights.sum(-1, keepdim=True)


@exercise(
    "linear_attention.associative",
    title="Attention to all keys without the table of weights",
    hints=(
        "(A B) C = A (B C). Which of the two products gives the smaller matrix in between?",
        "phi_k.T @ v is (features, width), whatever the number of keys. The denominator needs phi_k.sum(0).",
        "(phi_q @ (phi_k.T @ v)) / (phi_q @ phi_k.sum(0))[:, None]",
    ),
)
def check_associative(fn):
    for T, S in ((5, 5), (1, 7), (6, 2)):
        phi_q, phi_k, v = draw(T, S)
        found = fn(phi_q, phi_k, v)
        require_shape(found, (T, 3), f"the output for {T} queries and {S} keys")
        unnormalised = phi_q @ phi_k.T @ v
        if torch.allclose(found, unnormalised, atol=1e-4):
            require(False, "the weights of a query do not sum to 1: divide by their sum")
        require_close(found, by_weights(phi_q, phi_k, v, False), f"the output is wrong for {T} queries and {S} keys")
    with LargestTensor() as seen:
        fn(*draw(300))
    require(
        seen.most < 300 * 300,
        f"right, but for 300 tokens a tensor of {seen.most:,} numbers was made: multiply phi_k and v first",
    )


@exercise(
    "linear_attention.step",
    title="One step of linear attention as an RNN",
    hints=(
        "Two things happen to a token: its key and value enter the state, its query reads it. In which order?",
        "Append a 1 to v, so that the last column of the state collects the denominator.",
        "new = sums + torch.outer(phi_k, torch.cat([v, v.new_ones(1)])); read = phi_q @ new; read[:-1] / read[-1]",
    ),
)
def check_step(fn):
    phi_q, phi_k, v = draw(6)
    expected = by_weights(phi_q, phi_k, v, True)
    sums = torch.zeros(4, 4)
    for t in range(6):
        before = sums.clone()
        result = fn(sums, phi_q[t], phi_k[t], v[t])
        is_pair = isinstance(result, (tuple, list)) and len(result) == 2
        require(is_pair, "return two things: the new state and the output")
        require(torch.equal(sums, before), "your step changes the state that it was given: make a new one")
        sums, out = result
        require_shape(sums, (4, 4), "the new state, (features, width + 1),")
        require_shape(out, (3,), "the output")
        if t == 0 and not bool(torch.isfinite(out).all()):
            require(False, "the first output is 0/0: a token sees itself, so add before you read")
        require_close(out, expected[t], f"the output of token {t} is wrong")
    words = "the last column of the state should be the sum of the keys' features"
    require_close(sums[:, -1], phi_k.sum(0), words, name="the last column")


@exercise(
    "linear_attention.chunked",
    title="Causal linear attention, chunk by chunk",
    hints=(
        "A query sees two groups of keys: all those of earlier chunks, and those of its own chunk up to itself.",
        "Earlier chunks: phi_q @ sums. Its own: (phi_q @ phi_k.T).tril() @ v. Then the chunk enters the sums.",
        "Append a column of ones to v first, and divide by the last column at the end. The last slice may be short.",
    ),
)
def check_chunked(fn):
    for T, chunk in ((8, 4), (8, 8), (8, 1), (10, 4), (3, 16)):
        phi_q, phi_k, v = draw(T)
        found = fn(phi_q, phi_k, v, chunk)
        require_shape(found, (T, 3), f"the output for {T} tokens in chunks of {chunk}")
        expected = by_weights(phi_q, phi_k, v, True)
        wrong = (found - expected).abs().amax(1) > 1e-4
        for t in wrong.nonzero()[:, 0].tolist()[:1]:
            place = f"token {t % chunk} of chunk {t // chunk}, with {T} tokens in chunks of {chunk}, is wrong"
            require(False, f"{place}: {reason(found, phi_q, phi_k, v, t, chunk)}")
    with LargestTensor() as seen:
        fn(*draw(300), 10)
    require(
        seen.most < 300 * 300, f"right, but a tensor of {seen.most:,} numbers was made for 300 tokens: work by chunks"
    )


def reason(found, phi_q, phi_k, v, t, chunk):
    """What a wrong token seems to see."""
    start = t // chunk * chunk
    own, all_of_it = list(range(start, t + 1)), list(range(min(start + chunk, len(v))))
    candidates = {
        "it sees the future inside its chunk": all_of_it,
        "it sees its own chunk alone": own,
        "it sees earlier chunks alone": all_of_it[:start],
        "it sees its own chunk twice, from the state and beside it": all_of_it + own,
    }
    for words, seen in candidates.items():
        weights = phi_q[t] @ phi_k[seen].T
        if weights.numel() and torch.allclose(found[t], weights @ v[seen] / weights.sum(), atol=1e-4):
            return words
    return "it should see every earlier chunk once, and its own up to itself"


@exercise(
    "linear_attention.decay",
    title="The mask of a state that forgets",
    hints=(
        "Between key s and query t the state is multiplied by exp(g) once for each of the tokens s + 1 .. t.",
        "With a running sum c of the log decays, that product is exp(c[t] - c[s]).",
        "Take the difference for all pairs, set the pairs with s > t to -inf, and take the exponential last.",
    ),
)
def check_decay(fn):
    for log_decay in (torch.full((4,), -0.5), -torch.rand(6), torch.tensor([-1.0, -60.0, -60.0, -0.1, -60.0])):
        T = len(log_decay)
        found = fn(log_decay)
        require_shape(found, (T, T), f"the mask for {T} tokens")
        require_finite(found, f"the mask for {T} tokens, some with strong decays,")
        for t in range(T):
            for s in range(T):
                expected = log_decay.double()[s + 1 : t + 1].sum().exp().float() if s <= t else torch.tensor(0.0)
                between = f"between them lie the decays of tokens {s + 1} .. {t}" if s < t else "no decay yet"
                words = "the future leaks" if s > t else between
                require_close(found[t, s], expected, f"query {t} and key {s}: {words}", tolerance=1e-4)
