"""Checks of chapter 06."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from tformer_lib.contract import counted
from tformer_lib.teaching.exercises.engine import (
    exercise,
    is_close,
    require,
    require_close,
    require_number,
    require_tensor,
)


@exercise(
    "training.schedule",
    title="Warm-up and cosine",
    hints=(
        "Three stretches: before the end of the warm-up, the cosine, and after the last step.",
        "The cosine's argument goes from 0 at step `warmup` to pi at step `steps`.",
        "min_rate + (peak - min_rate) * (1 + cos(pi * done)) / 2, with done in [0, 1].",
    ),
)
def check_schedule(fn):
    peak, least, warmup, steps = 0.01, 0.002, 9, 109
    rate = lambda t: require_number(fn(t, peak=peak, min_rate=least, warmup=warmup, steps=steps), "the rate")  # noqa: E731
    close = lambda a, b: math.isclose(a, b, rel_tol=1e-5)  # noqa: E731 (float32 will do)
    require(rate(0) != 0, "the first step has rate 0: it changes nothing, and is wasted")
    require(
        not close(rate(0), peak / 9),
        "the warm-up has one step too few: at (step + 1) / warmup its last step is at the peak already",
    )
    require(close(rate(0), peak / 10), f"step 0 should have 1/10 of the peak, 0.001, and has {rate(0):.6g}")
    require(close(rate(8), 0.9 * peak), f"step 8, the last of the warm-up, should have 0.009, and has {rate(8):.6g}")
    require(
        close(rate(9), peak),
        f"step 9, the first after the warm-up, should have the peak, 0.01, and has {rate(9):.6g}: does the cosine "
        "start there?",
    )
    require(
        close(rate(59), (peak + least) / 2),
        f"half way down, at step 59, the rate should be midway, 0.006, and is {rate(59):.6g}: does the cosine end at "
        "min_rate, and not at 0?",
    )
    require(
        close(rate(34), least + (peak - least) * 0.8535533905932737),
        f"step 34 should have 0.008828, and has {rate(34):.6g}: is it a cosine?",
    )
    require(close(rate(109), least), f"the end should have min_rate, 0.002, and has {rate(109):.6g}")
    require(
        close(rate(150), least),
        f"after the end the rate should stay at 0.002, and is {rate(150):.6g}: it rises again",
    )
    peak, least, warmup, steps = 0.02, 0.006, 0, 20
    require(close(rate(0), peak), "without warm-up, step 0 should have the peak")
    require(
        close(rate(10), 0.013),
        f"from 0.02 to a min_rate of 0.006, without warm-up, step 10 of 20 should have 0.013, and has {rate(10):.6g}",
    )


@exercise(
    "training.adamw",
    title="One step of AdamW",
    hints=(
        "Update m and v first, then correct both for their start at zero: t = 1 in the first step.",
        "m_hat = m / (1 - beta1**t), v_hat = v / (1 - beta2**t).",
        "The decay acts on the weight, not on the gradient: w - lr * decay * w - lr * m_hat / (sqrt(v_hat) + eps).",
    ),
)
def check_adamw(fn):
    check_steps_of_adamw(fn, (5,), {"lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "decay": 0.2})
    check_steps_of_adamw(fn, (3, 5), {"lr": 0.05, "beta1": 0.7, "beta2": 0.9, "eps": 2e-3, "decay": 0.5})


def check_steps_of_adamw(fn, shape: tuple[int, ...], settings: dict) -> None:
    """Hold four steps against PyTorch's optimizer."""
    betas = settings["beta1"], settings["beta2"]
    w = torch.randn(shape, dtype=torch.float64)
    theirs = nn.Parameter(w.clone())
    optimizer = torch.optim.AdamW(
        [theirs], lr=settings["lr"], betas=betas, eps=settings["eps"], weight_decay=settings["decay"]
    )
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, 5):
        gradient = torch.randn(shape, dtype=torch.float64) * 10.0 ** torch.arange(-3, 2)
        theirs.grad = gradient.clone()
        optimizer.step()
        before = w.clone()
        result = fn(w, gradient.clone(), m, v, t, **settings)
        require(isinstance(result, (tuple, list)) and len(result) == 3, "return three tensors: the new w, m and v")
        w, m, v = result
        state = optimizer.state[theirs]
        explain_means(m, gradient, before, state, t, settings)
        require_close(m, state["exp_avg"], f"m after step {t} is not the running mean of the gradient", name="m")
        require_close(
            v, state["exp_avg_sq"], f"v after step {t} is not the running mean of the squared gradient", name="v"
        )
        explain_step(w, before, gradient, m, v, t, settings)
        require_close(w, theirs.detach(), f"the weights after step {t} differ", tolerance=1e-6, name="w")


def explain_means(m, gradient, before, state, t, s) -> None:
    """Name the usual mistakes in the running mean of the gradient; told in the first step, from m = 0."""
    mistakes = {
        "the decay was added to the gradient: that is an L2 penalty, which Adam then divides by sqrt(v)": (
            (1 - s["beta1"]) * (gradient + s["decay"] * before)
        ),
        "the corrected mean was returned as m: the correction is made anew in each step, and not kept": (
            state["exp_avg"] / (1 - s["beta1"] ** t)
        ),
    }
    require_tensor(m, "m")
    for words, wrong in mistakes.items():
        require(t > 1 or not is_close(m, wrong, 1e-9), words)


def explain_step(w, before, gradient, m, v, t, s) -> None:
    """Name the usual mistakes in a step of AdamW."""

    def step(m_hat, v_hat, decay):
        return before - s["lr"] * (m_hat / (v_hat.sqrt() + s["eps"]) + decay * before)

    m_hat, v_hat = m / (1 - s["beta1"] ** t), v / (1 - s["beta2"] ** t)
    mistakes = {
        "m and v start at zero, and that is not corrected: the first steps are far off": step(m, v, s["decay"]),
        "there is no weight decay": step(m_hat, v_hat, 0.0),
        "the weights move up the gradient": 2 * before - step(m_hat, v_hat, -s["decay"]),
        "the decay is not multiplied by the learning rate": step(m_hat, v_hat, s["decay"] / s["lr"]),
        "m is corrected for its start at zero, and v is not": step(m_hat, v, s["decay"]),
        "v is corrected for its start at zero, and m is not": step(m, v_hat, s["decay"]),
        "the square root of v is missing": step(m_hat, v_hat**2, s["decay"]),
        "epsilon is inside the root; it belongs outside": (
            before - s["lr"] * (m_hat / (v_hat + s["eps"]).sqrt() + s["decay"] * before)
        ),
        "the decay acts on the weight after the step; it belongs to the weight before": (
            (1 - s["lr"] * s["decay"]) * step(m_hat, v_hat, 0.0)
        ),
    }
    require_tensor(w, "w")
    for words, wrong in mistakes.items():
        require(not is_close(w, wrong, 1e-9), words)


@exercise(
    "training.accumulate",
    title="A large batch in pieces",
    hints=(
        "backward() adds to .grad: the gradients of the pieces sum up by themselves.",
        "The mean over a batch is a weighted mean of the pieces' means: by how many rows each has.",
        "(loss * len(x) / len(inputs)).backward()",
    ),
)
def check_accumulate(fn):
    model = nn.Linear(4, 3).double()
    given = torch.randn(10, 4, dtype=torch.float64), torch.randint(0, 3, (10,))

    def loss_of(x, y):
        require(
            len(x) <= -(-len(inputs) // pieces),
            f"in {pieces} pieces, the loss of {len(x)} of the {len(inputs)} rows is asked at once: they would have to "
            "fit in memory together",
        )
        gradient = model.weight.grad
        require(
            not asked or (gradient is not None and not torch.equal(gradient, asked[-1])),
            "a piece begins before backward() of the piece before: the activations of both are in memory",
        )
        asked.append(torch.zeros_like(model.weight) if gradient is None else gradient.clone())
        return F.cross_entropy(model(x), y)

    for rows, pieces in ((10, 1), (10, 2), (10, 5), (10, 3), (6, 3)):
        inputs, targets = (x[:rows] for x in given)
        whole = torch.autograd.grad(F.cross_entropy(model(inputs), targets), list(model.parameters()))
        asked: list[torch.Tensor] = []  # the gradient that stood there at each call of loss_of
        model.zero_grad()
        fn(loss_of, inputs, targets, pieces)
        require(model.weight.grad is not None, "no gradient arrived: is a backward() missing?")
        ratio = float((model.weight.grad * whole[0]).sum() / (whole[0] ** 2).sum())
        if pieces > 1 and rows % pieces == 0:
            require(
                not math.isclose(ratio, pieces, rel_tol=1e-6),
                f"in {pieces} pieces the gradient is {pieces} times too long",
            )
        uneven = f": {rows} rows in {pieces} pieces are not equally many in each" if rows % pieces else ""
        what = f"that of the whole batch{uneven}"
        require_close(
            model.weight.grad, whole[0], f"in {pieces} pieces the gradient is not {what}", name="the gradient"
        )


@exercise(
    "training.groups",
    title="Which weights decay",
    hints=(
        "A matrix has two dimensions; a bias and the gain of a norm have one.",
        "Keep what has requires_grad; model.parameters() gives a tied table once.",
    ),
)
def check_groups(fn):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm, self.map = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 4)
            self.out = nn.Linear(4, 7, bias=False)
            self.out.weight = self.table.weight
            self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)

    check_one_model(fn, copy.deepcopy(Small()))
    check_one_model(fn, nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2, bias=False)))


def check_one_model(fn, model: nn.Module) -> None:
    """Fail unless the parameters of a model are where they belong."""
    result = fn(model)
    require(
        isinstance(result, (tuple, list)) and len(result) == 2,
        "return two lists: the decayed parameters and the others",
    )
    result = [list(group) for group in result]
    require(
        all(isinstance(p, nn.Parameter) for group in result for p in group),
        "the lists should hold the parameters themselves, neither their names nor an optimizer's groups",
    )
    decayed, spared = ([id(p) for p in group] for group in result)
    names = {id(p): name for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found = [*decayed, *spared].count(id(p))
        if name == "frozen":
            require(found == 0, "`frozen` does not train (its requires_grad is off): it belongs in neither list")
            continue
        require(found > 0, f"{name} is in neither list: it would never be trained")
        require(found == 1, f"{name} is there {found} times: the optimizer would refuse it")
        right = decayed if p.dim() >= 2 else spared
        require(
            id(p) in right,
            f"{name} has {counted(p.dim(), 'dimension')}: it should {'' if p.dim() >= 2 else 'not '}be decayed",
        )
    require(set(decayed + spared) <= names.keys(), "there is a tensor that is no parameter of the model")


@exercise(
    "training.muon",
    title="One step of Muon",
    hints=(
        "In the order of the formulas: the new m, Nesterov's n from it, n divided by its norm, five rounds, the step.",
        "(X X^T)^2 X is A @ A @ X with A = X @ X.mT: a round is a * X + (b * A + c * A @ A) @ X.",
        "A tiny number beside the norm, 1e-7 say, keeps a gradient of zero from becoming 0 / 0.",
        "A tall X makes A large; the transposed one has the same singular values. Turn it back before the step.",
    ),
)
def check_muon(fn):
    settings = {"lr": 0.1, "momentum": 0.9, "decay": 0.0}
    for shape, mu in (((30, 16), 0.9), ((8, 24), 0.7), ((96, 6), 0.9)):
        w, m = torch.randn(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        first, second = spread(*shape), spread(*shape)  # what is to be orthogonalised in the first two steps
        gradients = (first, (second - mu**2 * first) / (1 + mu))  # n = g + mu (mu m + g), and m is the first gradient
        sums, scale = torch.zeros_like(w), 1.0
        for step, (gradient, n) in enumerate(zip(gradients, (first, second), strict=True), start=1):
            result = muon_step(fn, w, gradient, m, settings | {"momentum": mu})
            scale = explain_momentum(result[1], m, gradient, step, scale, mu)
            sums = mu * sums + gradient
            if step == 2:
                explain_direction(w - result[0], gradient, sums, mu)
            explain_update(w - result[0], n, step)
            w, m = result
    explain_size(fn, settings)
    explain_decay(fn, settings)
    explain_rank(fn, settings)
    explain_vector(fn, settings)


def spread(rows, columns):
    """A random matrix whose largest singular value is 30 times its smallest."""
    u, _, vt = torch.linalg.svd(torch.randn(rows, columns, dtype=torch.float64), full_matrices=False)
    return u * torch.logspace(0, -math.log10(30), len(vt), dtype=torch.float64) @ vt


def muon_step(fn, w, gradient, m, settings):
    """One step of the learner's, on copies, so that a step in place is as good."""
    result = fn(w.clone(), gradient.clone(), m.clone(), **settings)
    require(isinstance(result, (tuple, list)) and len(result) == 2, "return two tensors: the new w and m")
    for x, name in zip(result, ("w", "m"), strict=True):
        require_tensor(x, name)
        require(x.shape == w.shape, f"{name} should keep its shape {tuple(w.shape)}, and has {tuple(x.shape)}")
    require(
        torch.isfinite(result[0]).all() or not gradient.any(),
        "the new w is not finite: the iteration runs away from singular values far above 1: is n divided by its norm?",
    )
    return [x.detach().double() for x in result]


def explain_momentum(m, before, gradient, step, scale, mu) -> float:
    """Fail unless m is the running sum, or the running mean, of the gradients; return the weight of the new one."""
    kept = "what is kept as m is n: Nesterov's step ahead is made anew each time, and not kept"
    require(not torch.allclose(m, before), f"m is the same after step {step} as before: return the new one")
    if step == 1:
        scale = round(float((m * gradient).sum() / (gradient**2).sum()), 3)
        require(scale not in (round(1 + mu, 3), round(1 - mu**2, 3)), kept)
        require(
            scale in (1, round(1 - mu, 3)),
            "after the first step, from m = 0, m should be the gradient (or, as a running mean, 1 - momentum times it)",
        )
    require_close(m, mu * before + scale * gradient, f"m after step {step} is not momentum * m + gradient", name="m")
    return scale


def in_axes(moved, n):
    """What moved a weight at lr = 0.1, in the singular vectors of n, and the part of it that is not on the diagonal."""
    u, _, vt = torch.linalg.svd(n, full_matrices=False)
    found = u.mT @ (moved / 0.1) @ vt.mT
    outside = (moved / 0.1).norm() ** 2 - found.diagonal().norm() ** 2
    return found.diagonal(), (outside.clamp(min=0) ** 0.5 / (moved / 0.1).norm().clamp(min=1e-9))


def explain_direction(moved, gradient, sums, mu) -> None:
    """Name the matrix that was orthogonalised in place of n = gradient + momentum * m."""
    mistakes = {
        "m itself was orthogonalised: Nesterov's n looks a step ahead, gradient + momentum * m with the new m": sums,
        "the gradient of this step was orthogonalised: m has no effect": gradient,
        "m is a running mean, and n takes the gradient in full: then it is (1 - momentum) * gradient + momentum * m": (
            gradient + mu * (1 - mu) * sums
        ),
    }
    aside = {words: in_axes(moved, wrong)[1] for words, wrong in mistakes.items()}
    likely = min(aside, key=aside.__getitem__)
    require(aside[likely] > 0.2, likely)


def explain_update(moved, n, step) -> None:
    """Name the usual mistakes in an update at lr = 0.1 and without decay."""
    rows, columns = n.shape
    what = f"the update of a matrix of {rows} x {columns}"
    values, aside = in_axes(moved, n)
    require(moved.norm() > 1e-6, "the weights did not move")
    require(values.mean() > -0.1, "the weights move up the gradient")
    each = values / torch.linalg.svdvals(n)
    require(
        each.max() > 1.05 * each.min(),
        f"{what} is n itself, times a number: its largest singular value is {values.max() / values.min():.0f} times "
        "its smallest, and they should be nearly equal",
    )
    require(
        aside < 0.2,
        f"{what} in step {step} does not have the singular vectors of n: is it made of X, X X^T X and (X X^T)^2 X "
        "only, and n of the new m?",
    )
    require(
        values.max() < 2.2 * values.min(),
        f"{what} has singular values from {values.min():.2f} to {values.max():.2f}; five rounds with these "
        "coefficients bring the largest and the smallest within a factor of 1.7: are rounds or a coefficient missing?",
    )
    factor = max(1.0, rows / columns) ** 0.5
    why = "sqrt(rows / columns)" if rows > columns else "a wide matrix is not scaled"
    require(
        0.65 * factor < values.mean() < 1.25 * factor,
        f"{what} has singular values near {values.mean():.2f}; they should be near {factor:.0f}: {why}",
    )
    wanted = factor * after_five_rounds(n)
    off = (values - wanted).abs().max().item()
    require(
        off < 0.1 * factor,
        f"{what} has singular values that differ by up to {off:.2f} from those of X_5 (bfloat16 alone makes it 0.05): "
        "are there five rounds, and are the three coefficients right?",
    )


def after_five_rounds(n):
    """What becomes of the singular values of n: a s + b s^3 + c s^5, five times, from s over the norm of n."""
    s = torch.linalg.svdvals(n) / n.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def explain_size(fn, settings) -> None:
    """Fail where the step depends on the size of the gradient."""
    w, gradient = torch.randn(8, 6, dtype=torch.float64), spread(8, 6)
    one, *others = (
        w - muon_step(fn, w, gradient * size, torch.zeros_like(w), settings)[0] for size in (1, 4096, 1 / 64)
    )
    for other, words in zip(others, ("4096 times as large", "64 times as small"), strict=True):
        require(
            (one - other).norm() < 0.1 * one.norm(),
            f"a gradient {words} should move the weights just as far, and moves them {other.norm() / one.norm():.3g} "
            "times as far: is n divided by its own norm?",
        )


def explain_decay(fn, settings) -> None:
    """Name the usual mistakes in what the decay takes off the weights."""
    w, gradient = torch.randn(8, 6, dtype=torch.float64), spread(8, 6)
    m = spread(8, 6)
    plain, decayed = (muon_step(fn, w, gradient, m, settings | {"decay": d})[0] for d in (0.0, 0.5))
    taken = plain - decayed  # should be lr * decay * w
    mistakes = {
        "there is no weight decay": torch.zeros_like(w),
        "the decay is not multiplied by the learning rate": 0.5 * w,
        "the decay acts on the weight after the step; it belongs to the weight before": 0.05 * plain,
        "the decay makes the weights grow": -0.05 * w,
    }
    slow = muon_step(fn, w, gradient, m, settings | {"lr": 0.02, "decay": 0.0})[0]
    require_close(
        w - slow,
        (w - plain) / 5,
        "a fifth of the learning rate should move the weights a fifth as far",
        name="the step",
    )
    for words, wrong in mistakes.items():
        require(not torch.allclose(taken, wrong, atol=1e-6), words)
    require_close(
        taken,
        0.05 * w,
        "the decay should take lr * decay * w off the weights and leave the update: was it added to the gradient?",
        tolerance=1e-5,
        name="what the decay takes off",
    )


def explain_rank(fn, settings) -> None:
    """Fail where a gradient of rank 1, or of rank 0, moves the weights in other directions."""
    w, zero = torch.randn(6, 4, dtype=torch.float64), torch.zeros(6, 4, dtype=torch.float64)
    signs = torch.outer(torch.randn(6), torch.randn(4)).sign().double()  # of rank 1 in bfloat16 too
    values = torch.linalg.svdvals(w - muon_step(fn, w, signs, zero, settings)[0])
    require(
        values[1] < 0.1 * values[0],
        "a gradient of rank 1 gives an update of a higher rank: directions of which the gradient says nothing. U V^T "
        "of an SVD does that; five rounds of products leave a singular value of 0 where it is",
    )
    result = muon_step(fn, w, zero, zero, settings)[0]
    require(torch.isfinite(result).all(), "a gradient of zero makes the weights NaN: 0 is divided by its norm, 0")
    require(torch.allclose(result, w), "a gradient of zero should not move the weights, and does")


def explain_vector(fn, settings) -> None:
    """Fail unless a vector is refused, or left as it is."""
    w, gradient = torch.randn(2, 5, dtype=torch.float64)
    said = "a vector (a bias, the gain of a norm) has no singular values to level, and belongs to AdamW: "
    try:
        result = fn(w.clone(), gradient.clone(), torch.zeros_like(w), **settings)
    except ValueError:
        return
    except Exception as error:
        require(False, f"{said}raise a ValueError; here {type(error).__name__} is raised")
    left = isinstance(result, (tuple, list)) and isinstance(result[0], torch.Tensor) and torch.equal(result[0], w)
    require(left, f"{said}raise a ValueError; here it was moved")
