"""Checks of chapter 06."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from tformer_lib.teaching.exercises.engine import exercise, require, require_close, require_tensor


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
    rate = lambda t: float(fn(t, peak=peak, min_rate=least, warmup=warmup, steps=steps))  # noqa: E731
    close = lambda a, b: math.isclose(a, b, rel_tol=1e-5)  # noqa: E731 (float32 will do)
    require(rate(0) != 0, "the first step has rate 0: it changes nothing, and is wasted")
    require(
        not close(rate(0), peak / 9),
        "the warm-up has one step too few: at (step + 1) / warmup its last step is at the peak already",
    )
    require(close(rate(0), peak / 10), f"step 0 should have 1/10 of the peak, 0.001, and has {rate(0):.4g}")
    require(close(rate(8), 0.9 * peak), f"step 8, the last of the warm-up, should have 0.009, and has {rate(8):.4g}")
    require(
        close(rate(9), peak),
        f"step 9, the first after the warm-up, should have the peak, 0.01, and has {rate(9):.4g}: does the cosine "
        "start there?",
    )
    require(
        close(rate(59), (peak + least) / 2),
        f"half way down, at step 59, the rate should be midway, 0.006, and is {rate(59):.4g}: does the cosine end at "
        "min_rate, and not at 0?",
    )
    require(
        close(rate(34), least + (peak - least) * 0.8535533905932737),
        f"step 34 should have 0.008828, and has {rate(34):.4g}: is it a cosine?",
    )
    require(close(rate(109), least), f"the end should have min_rate, 0.002, and has {rate(109):.4g}")
    require(
        close(rate(150), least),
        f"after the end the rate should stay at 0.002, and is {rate(150):.4g}: it rises again",
    )
    require(
        close(float(fn(0, peak=1.0, min_rate=0.1, warmup=0, steps=10)), 1.0),
        "without warm-up, step 0 should have the peak",
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
    settings = {"lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "decay": 0.2}
    w = torch.randn(5, dtype=torch.float64)
    theirs = nn.Parameter(w.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, 5):
        gradient = torch.randn(5, dtype=torch.float64) * 10.0 ** torch.arange(-3, 2)
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
        require_close(w, theirs.detach(), f"the weights after step {t} differ", tolerance=1e-9, name="w")


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
        require(t > 1 or m.shape != wrong.shape or not torch.allclose(m.double(), wrong, atol=1e-9), words)


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
        require(w.shape != wrong.shape or not torch.allclose(w, wrong, atol=1e-9), words)


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
    inputs, targets = torch.randn(10, 4, dtype=torch.float64), torch.randint(0, 3, (10,))
    whole = torch.autograd.grad(F.cross_entropy(model(inputs), targets), list(model.parameters()))

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

    for pieces in (1, 2, 5, 3):
        asked: list[torch.Tensor] = []  # the gradient that stood there at each call of loss_of
        model.zero_grad()
        fn(loss_of, inputs, targets, pieces)
        require(model.weight.grad is not None, "no gradient arrived: is a backward() missing?")
        ratio = float((model.weight.grad * whole[0]).sum() / (whole[0] ** 2).sum())
        if pieces in (2, 5):
            require(
                not math.isclose(ratio, pieces, rel_tol=1e-6),
                f"in {pieces} pieces the gradient is {pieces} times too long",
            )
        what = "that of the whole batch" + (": 10 rows in 3 pieces are not equally many in each" if pieces == 3 else "")
        require_close(
            model.weight.grad, whole[0], f"in {pieces} pieces the gradient is not {what}", name="the gradient"
        )


@exercise(
    "training.groups",
    title="Who is decayed",
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

    model = copy.deepcopy(Small())
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
            require(found == 0, "`frozen` does not train (requires_grad is False): it belongs in neither list")
            continue
        require(found > 0, f"{name} is in neither list: it would never be trained")
        require(found == 1, f"{name} is there {found} times: the optimizer would refuse it")
        right = decayed if p.dim() >= 2 else spared
        require(
            id(p) in right, f"{name} has {p.dim()} dimensions: it should {'' if p.dim() >= 2 else 'not '}be decayed"
        )
    require(set(decayed + spared) <= names.keys(), "there is a tensor that is no parameter of the model")
