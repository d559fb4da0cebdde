"""Answers to the exercises of chapter 06."""

import math

import torch


def schedule(step, *, peak, min_rate, warmup, steps):
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = min((step - warmup) / (steps - warmup), 1.0)
    return min_rate + (peak - min_rate) * (1 + math.cos(math.pi * done)) / 2


def starts_at_zero(step, *, peak, min_rate, warmup, steps):
    return (
        peak * step / max(warmup, 1)
        if step < warmup
        else schedule(step, peak=peak, min_rate=min_rate, warmup=warmup, steps=steps)
    )


def cosine_from_step_zero(step, *, peak, min_rate, warmup, steps):
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return min_rate + (peak - min_rate) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def rises_again(step, *, peak, min_rate, warmup, steps):
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return min_rate + (peak - min_rate) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def straight_line(step, *, peak, min_rate, warmup, steps):
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return max(min_rate, peak - (peak - min_rate) * (step - warmup) / (steps - warmup))


def adamw(w, gradient, m, v, t, *, lr, beta1, beta2, eps, decay):
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return w - lr * (m_hat / (v_hat.sqrt() + eps) + decay * w), m, v


def not_corrected(w, gradient, m, v, t, *, lr, beta1, beta2, eps, decay):
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient**2
    return w - lr * (m / (v.sqrt() + eps) + decay * w), m, v


def adam_with_l2(w, gradient, m, v, t, *, lr, beta1, beta2, eps, decay):
    return adamw(w, gradient + decay * w, m, v, t, lr=lr, beta1=beta1, beta2=beta2, eps=eps, decay=0.0)


def no_decay(w, gradient, m, v, t, *, lr, beta1, beta2, eps, decay):
    return adamw(w, gradient, m, v, t, lr=lr, beta1=beta1, beta2=beta2, eps=eps, decay=0.0)


def accumulate(loss_of, inputs, targets, pieces):
    for x, y in zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True):
        (loss_of(x, y) * len(x) / len(inputs)).backward()


def sums(loss_of, inputs, targets, pieces):
    for x, y in zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True):
        loss_of(x, y).backward()


def divides_by_pieces(loss_of, inputs, targets, pieces):
    for x, y in zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True):
        (loss_of(x, y) / pieces).backward()


def last_piece_only(loss_of, inputs, targets, pieces):
    loss_of(inputs.chunk(pieces)[-1], targets.chunk(pieces)[-1]).backward()


def whole_batch_at_once(loss_of, inputs, targets, pieces):
    loss_of(inputs, targets).backward()


def backward_at_the_end(loss_of, inputs, targets, pieces):
    parts = zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True)
    sum(loss_of(x, y) * len(x) / len(inputs) for x, y in parts).backward()


def groups(model):
    training = [p for p in model.parameters() if p.requires_grad]
    return [p for p in training if p.dim() >= 2], [p for p in training if p.dim() < 2]


def groups_by_name(model):
    named = list(model.named_parameters())
    return [p for n, p in named if "bias" not in n], [p for n, p in named if "bias" in n]


def groups_all_decayed(model):
    return [p for p in model.parameters() if p.requires_grad], []


def groups_forget_the_rest(model):
    return groups(model)[0], []


def groups_of_names(model):
    named = list(model.named_parameters())
    return [n for n, p in named if p.dim() >= 2], [n for n, p in named if p.dim() < 2]


def keeps_the_corrected_mean(w, gradient, m, v, t, *, lr, beta1, beta2, eps, decay):
    m = (beta1 * m + (1 - beta1) * gradient) / (1 - beta1**t)
    v = beta2 * v + (1 - beta2) * gradient**2
    return w - lr * (m / ((v / (1 - beta2**t)).sqrt() + eps) + decay * w), m, v


def adamw_in_place(w, gradient, m, v, t, *, lr, beta1, beta2, eps, decay):
    m.mul_(beta1).add_(gradient, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    w.mul_(1 - lr * decay).addcdiv_(m / (1 - beta1**t), (v / (1 - beta2**t)).sqrt() + eps, value=-lr)
    return [w, m, v]


RIGHT = {
    "training.schedule": schedule,
    "training.adamw": adamw,
    "training.accumulate": accumulate,
    "training.groups": groups,
}
ALSO_RIGHT = {
    "training.schedule": [lambda step, **settings: torch.tensor(schedule(step, **settings))],
    "training.adamw": [adamw_in_place],
    "training.groups": [lambda model: list(groups(model))],
}
WRONG = {
    "training.schedule": [starts_at_zero, cosine_from_step_zero, rises_again, straight_line],
    "training.adamw": [not_corrected, adam_with_l2, no_decay, keeps_the_corrected_mean],
    "training.accumulate": [
        sums,
        divides_by_pieces,
        last_piece_only,
        whole_batch_at_once,
        backward_at_the_end,
    ],
    "training.groups": [groups_by_name, groups_all_decayed, groups_forget_the_rest, groups_of_names],
}
