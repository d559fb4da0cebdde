"""The exercises of the linear-attention chapter."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tformer_lib.contract import counted
from tformer_lib.teaching.exercises.engine import (
    exercise,
    is_close,
    require,
    require_close,
    require_finite,
    require_shape,
)


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that any tensor made inside it has, and how many matrix products were taken."""

    def __init__(self):
        super().__init__()
        self.most, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket.__name__ in ("mm", "bmm", "mv", "addmm", "baddbmm", "dot")
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
    title="Without the table of weights",
    hints=(
        "(A B) C = A (B C). Which of the two products gives the smaller matrix in between?",
        "phi_k.T @ v is (features, width), whatever the number of keys. The denominator needs phi_k.sum(0).",
        "(phi_q @ (phi_k.T @ v)) / (phi_q @ phi_k.sum(0))[:, None]",
    ),
)
def check_associative(fn):
    for T, S, features, width in ((5, 5, 4, 3), (1, 7, 4, 3), (6, 2, 5, 2)):
        phi_q, phi_k, v = draw(T, S, features, width)
        found, case = fn(phi_q, phi_k, v), f"for {counted(T, 'query', 'queries')} and {counted(S, 'key')}"
        require_shape(found, (T, width), f"the output {case}")
        unnormalised = phi_q @ phi_k.T @ v
        if is_close(found, unnormalised):
            require(False, "the weights of a query do not sum to 1: divide by their sum")
        require_close(found, by_weights(phi_q, phi_k, v, False), f"the output is wrong {case}")
    with LargestTensor() as seen:
        fn(*draw(300))
    require(
        seen.most < 300 * 300,
        f"right, but for 300 tokens a tensor of {seen.most:,} numbers was made: multiply phi_k and v first",
    )


@exercise(
    "linear_attention.step",
    title="One step of the recurrence",
    hints=(
        "Two things happen to a token: its key and value enter the state, its query reads it. In which order?",
        "Append a 1 to v, so that the last column of the state collects the denominator.",
        "new = sums + torch.outer(phi_k, torch.cat([v, v.new_ones(1)])); read = phi_q @ new; read[:-1] / read[-1]",
    ),
)
def check_step(fn):
    check_steps(fn, features=4, width=3)
    check_steps(fn, features=3, width=5)


def check_steps(fn, features: int, width: int) -> None:
    """Feed six tokens, one after the other."""
    phi_q, phi_k, v = draw(6, None, features, width)
    expected = by_weights(phi_q, phi_k, v, True)
    sums = torch.zeros(features, width + 1)
    for t in range(6):
        before = sums.clone()
        result = fn(sums, phi_q[t], phi_k[t], v[t])
        is_pair = isinstance(result, (tuple, list)) and len(result) == 2
        require(is_pair, "return two things: the new state and the output")
        require(torch.equal(sums, before), "your step changes the state that it was given: make a new one")
        sums, out = result
        require_shape(sums, (features, width + 1), "the new state, (features, width + 1),")
        sums = sums.detach().to(before.dtype)  # goes into the next step
        require_shape(out, (width,), "the output")
        if t == 0 and not bool(torch.isfinite(out).all()):
            require(False, "the first output is 0/0: a token sees itself, so add before you read")
        require_close(out, expected[t], f"the output of token {t} is wrong")
    words = "the last column of the state should be the sum of the keys' features"
    require_close(sums[:, -1], phi_k.sum(0), words, name="the last column")


@exercise(
    "linear_attention.chunked",
    title="Chunk by chunk",
    hints=(
        "A query sees two groups of keys: all those of earlier chunks, and those of its own chunk up to itself.",
        "Earlier chunks: phi_q @ sums. Its own: (phi_q @ phi_k.T).tril() @ v. Then the chunk enters the sums.",
        "Append a column of ones to v first, and divide by the last column at the end. The last slice may be short.",
    ),
)
def check_chunked(fn):
    for T, chunk, width in ((8, 4, 3), (8, 8, 3), (8, 1, 3), (10, 4, 7), (3, 16, 3), (1, 4, 3)):
        phi_q, phi_k, v = draw(T, features=5, width=width)
        found = fn(phi_q, phi_k, v, chunk)
        require_shape(found, (T, width), f"the output for {counted(T, 'token')} in chunks of {chunk}")
        expected = by_weights(phi_q, phi_k, v, True)
        wrong = ~((found - expected).abs().amax(1) <= 1e-4)  # NaN is wrong too
        for t in wrong.nonzero()[:, 0].tolist()[:1]:
            place = f"token {t % chunk} of chunk {t // chunk}, with {counted(T, 'token')} in chunks of {chunk}"
            require(False, f"{place}, is wrong: {reason(found, phi_q, phi_k, v, t, chunk)}")
    with LargestTensor() as seen:
        fn(*draw(300), 10)
    require(
        seen.most < 300 * 300, f"right, but a tensor of {seen.most:,} numbers was made for 300 tokens: work by chunks"
    )
    with LargestTensor() as seen:
        fn(*draw(300), 100)
    words = f"right, but 3 chunks of 100 tokens took {seen.products} matrix products"
    require(seen.products <= 30, f"{words}: a chunk is a few large ones, whatever its length")


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
        if weights.numel() and is_close(found[t], weights @ v[seen] / weights.sum()):
            return words
    return "it should see every earlier chunk once, and its own up to itself"


@exercise(
    "linear_attention.decay",
    title="The mask of decays",
    hints=(
        "Between key s and query t the state is multiplied by exp(g) once for each of the tokens s + 1 .. t.",
        "With a running sum c of the log decays, that product is exp(c[t] - c[s]).",
        "Take the difference for all pairs, set the pairs with s > t to -inf, and take the exponential last.",
    ),
)
def check_decay(fn):
    for log_decay in (
        torch.full((4,), -0.5),
        -torch.rand(6),
        torch.tensor([-1.0, -60.0, -60.0, -0.1, -60.0]),
        -torch.ones(1),
    ):
        T = len(log_decay)
        found = fn(log_decay)
        require_shape(found, (T, T), f"the mask for {counted(T, 'token')}")
        require_finite(found, f"the mask for {counted(T, 'token')}, some with strong decays,")
        for t in range(T):
            for s in range(T):
                expected = log_decay.double()[s + 1 : t + 1].sum().exp().float() if s <= t else torch.tensor(0.0)
                between = f"between them lie the decays of tokens {s + 1} .. {t}" if s < t else "no decay yet"
                words = "the future leaks" if s > t else between
                require_close(found[t, s], expected, f"query {t} and key {s}: {words}", tolerance=1e-4)


def delta_by_steps(q, k, v, beta, state):
    """The delta rule, one token after the other, in float64: outputs (T, e) and the last state (d, e)."""
    q, k, v, beta, state = (x.double() for x in (q, k, v, beta, state))
    outputs = []
    for t in range(len(v)):
        state = state + beta[t] * torch.outer(k[t], v[t] - k[t] @ state)
        outputs.append(q[t] @ state)
    return torch.stack(outputs), state


def delta_mistakes(q, k, v, beta, state, chunk):
    """What some wrong rules give, each with the words for it."""
    q, k, v, beta, state = (x.double() for x in (q, k, v, beta, state))
    adding, late, blunt, stale, old = (state.clone() for _ in range(5))
    rows = {name: [] for name in ("add", "late", "blunt", "stale")}
    for t in range(len(v)):
        rows["late"].append(q[t] @ late)
        late = late + beta[t] * torch.outer(k[t], v[t] - k[t] @ late)
        adding = adding + beta[t] * torch.outer(k[t], v[t])
        blunt = blunt + torch.outer(k[t], beta[t] * v[t] - k[t] @ blunt)
        old = stale.clone() if t % chunk == 0 else old
        stale = stale + beta[t] * torch.outer(k[t], v[t] - k[t] @ old)
        for name, now in (("add", adding), ("blunt", blunt), ("stale", stale)):
            rows[name].append(q[t] @ now)
    words = {
        "add": "the new values are added and nothing is erased: take away what the state holds under the key",
        "late": "a query reads the state before its own token has written",
        "blunt": "beta scales the new value alone: it must scale what is erased as well",
        "stale": "a token erases what the state held before its chunk: earlier tokens of the chunk have written since",
    }
    return {words[name]: torch.stack(outputs) for name, outputs in rows.items()}


class Operations(TorchDispatchMode):
    """Counts the operations on tensors that are done inside it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def draw_delta(T, features=6, width=3):
    """q and unit keys (T, features), v (T, width), beta (T,) between 0 and 1, and a state (features, width)."""
    q, k = torch.randn(2, T, features)
    return q, k / k.norm(dim=1, keepdim=True), torch.randn(T, width), torch.rand(T), torch.randn(features, width)


def run_delta(fn, inputs, chunk):
    """The answer's output and state, of the right shapes, with its inputs left as they were."""
    before = [x.clone() for x in inputs]
    result = fn(*inputs, chunk)
    require(isinstance(result, (tuple, list)) and len(result) == 2, "return two things: the output and the new state")
    for name, old, new in zip(("q", "k", "v", "beta", "state"), before, inputs, strict=True):
        require(torch.equal(old, new), f"your function changes the {name} that it was given: make a new tensor")
    T, place = len(inputs[2]), f"for {counted(len(inputs[2]), 'token')} in chunks of {chunk}"
    for name, x, rows in (("the output", result[0], T), ("the new state", result[1], inputs[1].shape[1])):
        require_shape(x, (rows, inputs[2].shape[1]), f"{name} {place}")
        require_finite(x, f"{name} {place}")
    return result


@exercise(
    "linear_attention.delta",
    title="The delta rule in chunks",
    hints=(
        "Write the loop over tokens first, and test the rest against it. Each token adds outer(k[t], u[t]) to the "
        "state; what is u[t]?",
        "Inside a chunk the state before token t is the chunk's first one plus the sum of outer(k[s], u[s]) for s < t. "
        "Put that into u[t] = beta[t] * (v[t] - k[t] @ state).",
        "Now every u[t] is something known less a weighted sum of earlier u[s]. Bring the sum to the left: "
        "(I + A) U = B, with A strictly lower triangular. torch.linalg.solve_triangular solves it.",
        "With U, the chunk is ordinary linear attention whose values are U: the state, and a triangle that holds its "
        "diagonal.",
    ),
)
def check_delta(fn):
    overwritten(fn)
    for T, chunk, *sizes in ((6, 1), (8, 4), (10, 4), (3, 16), (24, 8), (9, 4, 4, 5), (1, 1), (1, 8)):
        inputs = draw_delta(T, *sizes)
        found, state = run_delta(fn, inputs, chunk)
        place = f"for {counted(T, 'token')} in chunks of {chunk}"
        expected, last = delta_by_steps(*inputs)
        for words, wrong in delta_mistakes(*inputs, chunk).items():
            apart = not torch.allclose(wrong, expected, atol=1e-3)
            require(not (apart and torch.allclose(found.double(), wrong, atol=1e-4)), f"{place}: {words}")
        future = [x.clone() for x in inputs]
        for x in future[:4]:
            x[-1] = torch.rand_like(x[-1])
        other = run_delta(fn, future, chunk)[0]
        leaks = not is_close(other[:-1], found[:-1])
        require(not leaks, f"{place}, earlier outputs change with the last token: the future leaks")
        require_close(other, delta_by_steps(*future)[0], f"{place}, the output is wrong when the last token is another")
        require_close(found, expected, f"{place}, the output differs from the loop over tokens")
        require_close(state, last, f"{place}, the outputs are right and the new state is not")
    inputs, counts = draw_delta(96), []
    for chunk in (8, 48):
        with Operations() as seen:
            fn(*inputs, chunk)
        counts.append(seen.count)
    words = f"right, but chunks of 48 take {counts[1]} operations and chunks of 8 take {counts[0]}: "
    require(counts[1] < counts[0] / 2, words + "there is still a loop over the tokens; solve for a chunk's at once")


def overwritten(fn):
    """Fail unless a key that is written twice at full strength holds its second value, and others keep theirs."""
    keys = torch.linalg.qr(torch.randn(6, 6))[0][:3]
    k, v = keys[[0, 1, 0, 2]], torch.randn(4, 3)
    q = torch.zeros(4, 6)
    q[3] = keys[0]
    for chunk, how in ((1, "in a chunk of its own"), (4, "in one chunk")):
        read = run_delta(fn, (q, k, v, torch.ones(4), torch.zeros(6, 3)), chunk)[0][3]
        both = is_close(read, v[0] + v[2])
        require(not both, f"a key written twice, {how}, holds the sum of its two values: erase the first one")
        require_close(read, v[2], f"a key written twice with beta 1, {how}, does not give back its second value")
