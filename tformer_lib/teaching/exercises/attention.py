"""The exercises of the attention chapter."""

import torch
from torch.overrides import TorchFunctionMode

from tformer_lib import attention, masks
from tformer_lib.teaching.exercises.engine import (
    INVERTED,
    exercise,
    has_parts,
    is_close,
    require,
    require_close,
    require_finite,
    require_shape,
)


@exercise(
    "attention.colours",
    title="A thing finds its colour",
    hints=(
        "Say it in words first: who asks (the thing), for what (a colour), and what is the answer (which colour)?",
        "W_q must turn the column `thing` into a query that fits the key that W_k makes from the column `colour`.",
        "W_v copies the last two columns. With head_dim 1, W_q = [[10], [0], [0], [0]] is a query that asks loudly; "
        "W_k looks at the column `colour` in the same manner.",
    ),
)
def check_colours(fn):
    three = fn()
    require(isinstance(three, tuple | list) and len(three) == 3, "return three matrices: W_q, W_k and W_v")
    W_q, W_k, W_v = three
    for name, matrix in (("W_q", W_q), ("W_k", W_k), ("W_v", W_v)):
        require(isinstance(matrix, torch.Tensor), f"{name} should be a tensor, and is a {type(matrix).__name__}")
        fits = matrix.dim() == 2 and matrix.shape[0] == 4 and matrix.shape[1] > 0
        require(fits, f"{name} should have a row for each of the 4 columns of x, and has shape {tuple(matrix.shape)}")
        require_finite(matrix, name)
    require(W_q.shape == W_k.shape, f"W_q has shape {tuple(W_q.shape)} and W_k {tuple(W_k.shape)}: they must agree")
    require(W_v.shape[1] == 2, f"a value has two numbers, red and blue, and W_v makes {W_v.shape[1]}")
    W_q, W_k, W_v = (matrix.double() for matrix in three)
    for story in (["red", "ball"], ["blue", "ball"], ["the", "blue", "ball"], ["ball", "red", "the", "the", "the"]):
        x = torch.stack([COLOURS[token] for token in story])  # (T, 4)
        q, k, v = x @ W_q, x @ W_k, x @ W_v
        ball, colour = story.index("ball"), 1 if "blue" in story else 0
        weights = attention.scaled_scores(q[None, None], k[None, None])[0, 0].softmax(-1)[ball]  # (T,)
        share = weights[story.index(("red", "blue")[colour])].item()
        case = f"in {' '.join(story)!r} the ball"
        require(share > 0.9, f"{case} gives its colour a weight of {share:.2f}; make it more than 0.9")
        out = weights @ v  # (2,)
        got = f"({out[0]:.2f}, {out[1]:.2f})"
        wrong = "the ball finds its colour, but hears the same from red and from blue: what should the value hold?"
        require(abs(v[story.index(("red", "blue")[colour])].diff().item()) > 0.01, wrong)
        right = abs(out[colour] - 1) < 0.1 and abs(out[1 - colour]) < 0.1
        require(right, f"{case} should get about {('(1, 0)', '(0, 1)')[colour]}, and gets {got}")


COLOURS = {
    "the": torch.tensor([0.0, 0.0, 0.0, 0.0], dtype=torch.float64),
    "ball": torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64),
    "red": torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64),
    "blue": torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64),
}
"""Token -> its columns: thing, colour, red, blue."""


@exercise(
    "attention.simple",
    title="Scaled dot-product attention",
    hints=(
        "Three steps: scores (T, S), a softmax over the keys, and the mean of the values by those weights.",
        "The scores are q @ k.transpose(-2, -1) / sqrt(head_dim); the softmax runs along the last dimension.",
        "softmax(-1) subtracts the largest score first. Exponentials by hand overflow for scores above 88 in float32.",
    ),
)
def check_simple(fn):
    q, k, v = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 6, 16), torch.randn(2, 3, 6, 8)
    found = fn(q, k, v)
    require_shape(found, (2, 3, 4, 8))
    diagnose(found, q, k, v)
    require_close(found, attention.attend(q, k, v), "the result is not softmax(q k^T / sqrt(d)) v")
    found, expected = fn(300 * q, k, v), attention.attend(300 * q, k, v)
    require_finite(found, "with scores in the thousands, whose exponentials overflow, the result")
    require_close(found, expected, "with scores in the thousands, the result differs", tolerance=1e-3)
    q, k, v = torch.randn(1, 1, 2, 64), torch.randn(1, 1, 3, 64), torch.randn(1, 1, 3, 5)
    require_close(
        fn(q, k, v), attention.attend(q, k, v), "with head_dim 64 the result differs: is the scale for 16 only?"
    )


@exercise(
    "attention.attend",
    title="Attention with a mask",
    hints=(
        "Three steps: scores (T, S), a softmax over the keys, and the mean of the values by those shares.",
        "The scores are q @ k.transpose(-2, -1) / sqrt(head_dim); hidden ones become -inf before the softmax (dim=-1).",
        "A row with nothing to see is a softmax over -inf alone, which is NaN: set the weights of such rows to zero.",
    ),
)
def check_attend(fn):
    q, k, v = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 6, 16), torch.randn(2, 3, 6, 16)
    everything, window = torch.ones(4, 6, dtype=torch.bool), masks.sliding_window(4, 6, window=2)
    found = fn(q, k, v, window)
    require_shape(found, (2, 3, 4, 16))
    upside_down = is_close(found, attention.attend(q, k, v, mask=~window))
    require(not upside_down, f"the mask {INVERTED}")
    found = fn(q, k, v, everything)
    require_shape(found, (2, 3, 4, 16))
    diagnose(found, q, k, v)
    require_close(found, attention.attend(q, k, v), "with nothing masked, the result is not softmax(q k^T / sqrt(d)) v")
    found = fn(q, k, v, window)
    hidden_first = attention.attend(q, k, v, mask=window)
    hidden_last = (attention.scaled_scores(q, k).softmax(-1) * window) @ v
    require(not is_close(found, hidden_last), "hidden keys still count in the softmax's sum: mask before it, not after")
    no_score = (attention.scaled_scores(q, k) * window).softmax(-1) @ v
    require(not is_close(found, no_score), "a hidden score of 0 still counts, since e^0 = 1: hide it with -inf")
    require_close(found, hidden_first, "with a mask, the result differs")
    blind = everything.clone()
    blind[0] = False
    found = fn(q, k, v, blind)
    require_finite(found, "the result of a query that may look at nothing")
    require((found[:, :, 0] == 0).all(), "a query that may look at nothing should get zeros, and gets something else")
    require_close(found, attention.attend(q, k, v, mask=blind), "beside a blind query, the others change")
    found, expected = fn(300 * q, k, v, window), attention.attend(300 * q, k, v, mask=window)
    require_finite(found, "with scores in the thousands, whose exponentials overflow, the result")
    require_close(found, expected, "with scores in the thousands, the result differs", tolerance=1e-3)
    q, k, v = torch.randn(1, 2, 3, 9), torch.randn(1, 2, 5, 9), torch.randn(1, 2, 5, 4)
    mask, sizes = masks.causal(3, 5), "with heads of 9 numbers and values of 4,"
    require_close(fn(q, k, v, mask), attention.attend(q, k, v, mask=mask), f"{sizes} the result differs", name=sizes)
    q, k = far_below_zero((2, 3), 4, 6)
    v = torch.randn(2, 3, 6, 16)
    expected = attention.attend(q, k, v, mask=window)
    require_close(fn(q, k, v, window), expected, f"with all scores near -16,000, the result differs: {BELOW}")


BELOW = "a hidden score must lie below every score that there can be, and only -inf does"


def far_below_zero(leading: tuple[int, ...], T: int, S: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q (..., T, 16) and k (..., S, 16) whose scores are -16,384 and less, by quarters: float32 has them exactly."""
    q, k = torch.ones(*leading, T, 16), torch.full((*leading, S, 16), -4096.0)
    k[..., 0] -= torch.arange(S)
    return q, k


def diagnose(found, q, k, v) -> None:
    """Name the classic mistakes, each by the result that it gives."""
    scores = q @ k.transpose(-2, -1)  # (batch, heads, T, S)
    root = q.shape[-1] ** 0.5
    mistakes = {
        "the scale is missing: divide the scores by sqrt(head_dim)": scores.softmax(-1) @ v,
        "the scores are divided by head_dim: by its square root, please": (scores / root**2).softmax(-1) @ v,
        "the softmax runs over the queries: a query's shares must sum to 1": (scores / root).softmax(-2) @ v,
        "the softmax runs over the heads: a query's shares must sum to 1": (scores / root).softmax(1) @ v,
        "the softmax is missing": (scores / root) @ v,
    }
    for message, result in mistakes.items():
        require(not is_close(found, result), message)


@exercise(
    "attention.split_heads",
    title="Take the heads apart",
    hints=(
        "The last dimension holds the heads one after another: width = heads * head_dim. Take it apart first.",
        "view or unflatten gives (batch, T, heads, head_dim). Which two dimensions are still the wrong way round?",
        "x.unflatten(-1, (heads, -1)).transpose(1, 2)",
    ),
)
def check_split_heads(fn):
    for batch, T, heads, head_dim in ((2, 5, 3, 4), (1, 3, 2, 5)):
        x = torch.arange(batch * T * heads * head_dim, dtype=torch.float32).view(batch, T, heads * head_dim)
        found = fn(x, heads)
        require_shape(found, (batch, heads, T, head_dim))
        mixed = x.view(batch, heads, T, head_dim)
        require(not torch.equal(found, mixed), "view alone mixes tokens: row 1 of head 0 holds a part of token 0")
        strided = x.unflatten(-1, (head_dim, heads)).permute(0, 3, 1, 2)
        apart = f"a head is head_dim neighbouring numbers, and yours takes numbers that stand {heads} apart"
        require(not torch.equal(found, strided), apart)
        for b, h, t in torch.cartesian_prod(torch.arange(batch), torch.arange(heads), torch.arange(T)).tolist():
            expected = x[b, t, h * head_dim : (h + 1) * head_dim]
            require(torch.equal(found[b, h, t], expected), f"head {h} of token {t} in row {b} holds others' numbers")


@exercise(
    "attention.previous",
    title="A head that looks one token back",
    hints=(
        "Give each position a vector of its own, such as a row of the identity. What is the dot product of two?",
        "Query t must match key t - 1: let the query of t be the vector of position t - 1.",
        "Shares must come near 1, so the right score must stand well above the others after the division by sqrt(T): "
        "multiply by a large number.",
    ),
)
def check_previous(fn):
    for T in (4, 9, 2, 100):
        pair = fn(T)
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2
        require(is_pair, "return two tensors: the queries and the keys")
        q, k = pair
        require_shape(q, (T, T), "q")
        require_shape(k, (T, T), "k")
        scores = attention.scaled_scores(q[None, None].double(), k[None, None].double())
        weights = attention.masked_softmax(scores, masks.causal(T))[0, 0]
        for t in range(1, T):
            share, most = weights[t, t - 1].item(), weights[t].argmax().item()
            require(most == t - 1 or share > 0.9, f"token {t} looks mostly at token {most}, not at token {t - 1}")
            require(
                share > 0.9, f"of {T}, token {t} gives the one before it a share of {share:.3f}; make it more than 0.9"
            )


@exercise(
    "attention.cost",
    title="What one attention costs",
    hints=(
        "A product of (n, m) and (m, p) matrices takes n * m * p multiplications and as many additions.",
        "There are two such products a head: q k^T, and weights times v. The softmax is not counted.",
        "Sharing keys and values between heads changes neither count: every query head has its own scores.",
    ),
)
def check_cost(fn):
    for batch, heads, T, S, head_dim in ((1, 1, 1, 1, 1), (3, 8, 128, 128, 64), (5, 12, 1, 1000, 64)):
        pair = fn(batch, heads, T, S, head_dim)
        require(has_parts(pair, 2), "return two numbers: the FLOPs and the bytes of the scores")
        flops, size = pair
        products = batch * heads * T * S * head_dim
        case = f"for batch = {batch}, heads = {heads}, T = {T}, S = {S}, head_dim = {head_dim}"
        scores = batch * heads * T * S
        require(flops != 2 * products, f"{case}: that is one product, q k^T; weights times v costs the same again")
        require(flops == 4 * products, f"{case} the FLOPs are {4 * products:,}, not {flops:,}")
        require(size != scores, f"{case}: that counts the scores; a float32 takes 4 bytes")
        require(size == 4 * scores, f"{case} the scores take {4 * scores:,} bytes, not {size:,}")


@exercise(
    "attention.backward",
    title="The gradients of attention, by hand",
    hints=(
        "Go backwards through out = a @ v, a = softmax(s), s = scale * q @ k^T, one step at a time. Where c = a @ b, "
        "a's gradient is dc @ b^T and b's is a^T @ dc: the shapes leave no other choice.",
        "The softmax: a_j moves with every score of its row. Sum da_j times the derivative of a_j by s_l over j; the "
        "matrix never needs to be built.",
        "ds = a * (da - the row's mean of da, weighted by a). Then once more the rule for a product, and the scale.",
        "A blind row has shares of zero, and then everything in its row is zero: see to it that no 0/0 is made before.",
    ),
)
def check_backward(fn):
    everything = torch.ones(5, 7, dtype=torch.bool)
    data = draw()
    window = masks.sliding_window(5, 7, window=2)
    pairs = zip(by_hand(fn, *data, window, 0.25), true_gradients(*data, ~window, 0.25), strict=True)
    require(not all(is_close(x, other) for x, other in pairs), f"the mask {INVERTED}")
    found, expected = by_hand(fn, *data, everything, 0.25), true_gradients(*data, everything, 0.25)
    name_the_mistake(found, data, expected)
    compare(found, expected, "with nothing masked")
    compare(by_hand(fn, *data, everything, 0.7), true_gradients(*data, everything, 0.7), "with a scale of 0.7")
    found = by_hand(fn, *data, window, 0.25)
    for name, tensor in zip(("dk", "dv"), found[1:], strict=True):
        leak = f"key 0 is hidden from every query, and still it gets a gradient in {name}: hide it before the softmax"
        require(not tensor[:, :, 0].any(), leak)  # the first of 5 queries on 7 keys stands at position 2
    compare(found, true_gradients(*data, window, 0.25), "with a window for the mask")
    padding = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])[:, None, None]  # (batch, 1, 1, S)
    compare(by_hand(fn, *data, padding, 0.25), true_gradients(*data, padding, 0.25), "with a mask (batch, 1, 1, S)")
    blind = masks.causal(5, 3)
    short = [x[:, :, :3] if i in (1, 2) else x for i, x in enumerate(data)]
    found = by_hand(fn, *short, blind, 0.25)
    for name, tensor in zip(("dq", "dk", "dv"), found, strict=True):
        require_finite(tensor, f"beside a query that may look at nothing, {name}")
    require(not found[0][:, :, :2].any(), "a query that may look at nothing moves nothing: its dq should be zero")
    compare(found, true_gradients(*short, blind, 0.25), "beside a query that may look at nothing")
    found, sharp = by_hand(fn, *data, everything, 900.0), true_gradients(*data, everything, 900.0)
    for name, tensor in zip(("dq", "dk", "dv"), found, strict=True):
        require_finite(tensor, f"with scores in the thousands, whose exponentials overflow, {name}")
    require_close(found[2], sharp[2], "with scores in the thousands, dv is wrong", tolerance=1e-3)
    data, mask = draw(1, 2, 3, 4, 9, 2), masks.causal(3, 4)
    compare(by_hand(fn, *data, mask, 0.25), true_gradients(*data, mask, 0.25), "with heads of 9 numbers, values of 2")
    q, k = (x.double() for x in far_below_zero((1, 2), 3, 4))
    found, low = by_hand(fn, q, k, *data[2:], mask, 0.25), true_gradients(q, k, *data[2:], mask, 0.25)
    require_close(found[2], low[2], f"with all scores near -16,000, dv is wrong: {BELOW}", tolerance=1e-5)


def draw(batch: int = 2, heads: int = 3, T: int = 5, S: int = 7, d: int = 4, d_v: int = 6) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output; values are wider than keys, or narrower."""
    shapes = (T, d), (S, d), (S, d_v), (T, d_v)
    return [torch.randn(batch, heads, *shape, dtype=torch.float64) for shape in shapes]


def by_hand(fn, q, k, v, d_out, mask, scale) -> list[torch.Tensor]:
    """The answer's dq, dk, dv; it gets copies, and no autograd."""
    given = [x.clone() for x in (q, k, v, mask, d_out)]
    with NoAutograd():
        three = fn(*given[:4], scale, given[4])
    same = all(map(torch.equal, given, (q, k, v, mask, d_out)))
    require(same, "your function changes the tensors that it was given: work on new ones")
    require(isinstance(three, tuple | list) and len(three) == 3, "return three tensors: dq, dk and dv")
    for name, found, x in zip(("dq", "dk", "dv"), three, (q, k, v), strict=True):
        require_shape(found, x.shape, f"{name}, the gradient of {name[1]},")
        require(found.is_floating_point(), f"{name} should hold real numbers, and is {found.dtype}")
    return [x.detach().double() for x in three]


class NoAutograd(TorchFunctionMode):
    """While it is on, whoever asks autograd for a gradient is told not to."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        asks = func in (torch.Tensor.backward, torch.autograd.grad, torch.autograd.backward)
        require(not asks, "by hand, please: your function asks autograd for the gradient")
        return func(*args, **(kwargs or {}))


def true_gradients(q, k, v, d_out, mask, scale) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv by autograd, through the library's attention."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(attention.attend(*leaves, mask=mask, scale=scale), leaves, d_out)


def name_the_mistake(found, data, expected) -> None:
    """Name the classic mistakes of a row's derivative, each by the dq that it gives; the scale is 0.25."""
    q, k, v, d_out = data
    a = (0.25 * q @ k.mT).softmax(-1)  # (batch, heads, T, S)
    da = d_out @ v.mT
    mean = "the shares sum to 1, so raising one score lowers all the others"
    mistakes = {
        "ds is da alone: the softmax's own derivative is missing": da,
        f"ds is a * da: {mean}. Something must be subtracted from da": a * da,
        f"a * (1 - a) * da is the slope of each share by its own score: {mean}": a * (1 - a) * da,
        "what is subtracted from da is the row's mean weighted by a, not the plain one": a * (da - da.mean(-1, True)),
        "the mean that is subtracted runs over the keys, within one query's row": a * (da - (a * da).sum(-2, True)),
    }
    right = zip(("dq", "dk"), found, expected, strict=False)
    for name, mine, true in right:
        require(not is_close(mine, 4 * true), f"{name} is right but for the scale: s = scale * q k^T passes it on")
        require(not is_close(mine, 0.25 * true), f"{name} is right, and then multiplied by the scale once more")
        require(not is_close(mine, -true), f"{name} has the wrong sign")
    for message, ds in mistakes.items():
        require(not is_close(found[0], 0.25 * ds @ k), message)


def compare(found, expected, case: str) -> None:
    """Fail unless the three gradients agree, the one that needs least first."""
    reasons = {
        "dv": "a value collects d_out from all the queries that looked at it, by the shares after the mask",
        "dq": "dv is right, so the shares are; look at the way back through the softmax, and at the scale",
        "dk": "dq is right, so the scores' gradient is; a key collects from all the queries that scored it",
    }
    named = dict(zip(("dq", "dk", "dv"), zip(found, expected, strict=True), strict=True))
    for name, reason in reasons.items():
        require_close(*named[name], f"{case}, {name} is wrong: {reason}", tolerance=1e-5, name=name)
