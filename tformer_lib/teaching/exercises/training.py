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
    rate = lambda t: fn(t, peak=peak, min_rate=least, warmup=warmup, steps=steps)  # noqa: E731
    require(rate(0) != 0, "the first step has rate 0: it changes nothing, and is wasted")
    require(math.isclose(rate(0), peak / 10), f"step 0 should have 1/10 of the peak, 0.001, and has {rate(0):.4g}")
    require(
        math.isclose(rate(8), 0.9 * peak), f"step 8, the last of the warm-up, should have 0.009, and has {rate(8):.4g}"
    )
    require(math.isclose(rate(9), peak), f"step 9 should have the peak, 0.01, and has {rate(9):.4g}")
    require(
        math.isclose(rate(59), (peak + least) / 2),
        f"half way down, at step 59, the rate should be midway, 0.006, and is {rate(59):.4g}: does the cosine start at "
        "the end of the warm-up?",
    )
    require(
        math.isclose(rate(34), least + (peak - least) * 0.8535533905932737),
        f"step 34 should have 0.008828, and has {rate(34):.4g}: is it a cosine?",
    )
    require(math.isclose(rate(109), least), f"the end should have min_rate, 0.002, and has {rate(109):.4g}")
    require(
        math.isclose(rate(150), least),
        f"after the end the rate should stay at 0.002, and is {rate(150):.4g}: it rises again",
    )
    require(
        math.isclose(fn(0, peak=1.0, min_rate=0.1, warmup=0, steps=10), 1.0),
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
        result = fn(before, gradient.clone(), m, v, t, **settings)
        require(isinstance(result, tuple) and len(result) == 3, "return three tensors: the new w, m and v")
        w, m, v = result
        state = optimizer.state[theirs]
        require_close(m, state["exp_avg"], f"m after step {t} is not the running mean of the gradient", name="m")
        require_close(
            v, state["exp_avg_sq"], f"v after step {t} is not the running mean of the squared gradient", name="v"
        )
        explain_step(w, before, gradient, m, v, t, settings)
        require_close(w, theirs.detach(), f"the weights after step {t} differ", tolerance=1e-9, name="w")


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
    loss_of = lambda x, y: F.cross_entropy(model(x), y)  # noqa: E731
    whole = torch.autograd.grad(loss_of(inputs, targets), list(model.parameters()))
    for pieces in (1, 2, 5, 3):
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
    require(isinstance(result, tuple) and len(result) == 2, "return two lists: the decayed parameters and the others")
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
