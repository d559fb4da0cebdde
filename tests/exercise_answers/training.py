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


def muon(w, gradient, m, *, lr, momentum, decay, coefficients=(3.4445, -4.7750, 2.0315), steps=5, eps=1e-7):
    if w.dim() != 2:
        raise ValueError("Muon is for matrices")
    m = momentum * m + gradient
    n = gradient + momentum * m
    return descended(w, orthogonal(n, coefficients, steps, eps), lr, decay), m


def orthogonal(n, coefficients=(3.4445, -4.7750, 2.0315), steps=5, eps=1e-7):
    a, b, c = coefficients
    x = n.mT if n.size(0) > n.size(1) else n
    x = x / (x.norm() + eps)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if n.size(0) > n.size(1) else x


def descended(w, update, lr, decay):
    return (1 - lr * decay) * w - lr * max(1, w.size(0) / w.size(1)) ** 0.5 * update


def muon_of_torch(w, gradient, m, *, lr, momentum, decay):
    parameter = torch.nn.Parameter(w)
    optimizer = torch.optim.Muon([parameter], lr=lr, momentum=momentum, weight_decay=decay)
    parameter.grad, optimizer.state[parameter]["momentum_buffer"] = gradient, m
    optimizer.step()
    return [parameter, m]


def muon_in_place_leaves_vectors(w, gradient, m, *, lr, momentum, decay):
    if w.dim() != 2:
        return w, m
    m.lerp_(gradient, 1 - momentum)
    update = orthogonal(gradient.lerp_(m, momentum).bfloat16())
    w.mul_(1 - lr * decay).add_(update * max(1, w.size(0) / w.size(1)) ** 0.5, alpha=-lr)
    return w, m


def muon_without_nesterov(w, gradient, m, *, lr, momentum, decay):
    m = momentum * m + gradient
    return descended(w, orthogonal(m), lr, decay), m


def muon_mixes_sum_and_mean(w, gradient, m, *, lr, momentum, decay):
    m = momentum * m + (1 - momentum) * gradient
    return descended(w, orthogonal(gradient + momentum * m), lr, decay), m


def muon_without_momentum(w, gradient, m, *, lr, momentum, decay):
    return descended(w, orthogonal(gradient), lr, decay), momentum * m + gradient


def muon_keeps_n(w, gradient, m, *, lr, momentum, decay):
    n = gradient + momentum * (momentum * m + gradient)
    return descended(w, orthogonal(n), lr, decay), n


def muon_not_orthogonal(w, gradient, m, *, lr, momentum, decay):
    m = momentum * m + gradient
    n = gradient + momentum * m
    return descended(w, n / n.norm(), lr, decay), m


def muon_clips(w, gradient, m, *, lr, momentum, decay):
    m = momentum * m + gradient
    n = gradient + momentum * m
    update = orthogonal(n) if n.norm() > 1 else n  # norm 1 at most is asked for, and n has it
    return descended(w, update, lr, decay), m


def muon_runs_away(w, gradient, m, *, lr, momentum, decay):
    a, b, c = 3.4445, -4.7750, 2.0315
    m = momentum * m + gradient
    x = gradient + momentum * m
    for _ in range(5):
        x = a * x + (b * x @ x.mT + c * x @ x.mT @ x @ x.mT) @ x
    return descended(w, x, lr, decay), m


def muon_cubic(w, gradient, m, **settings):
    return muon(w, gradient, m, **settings, coefficients=(1.5, -0.5, 0.0))


def muon_two_rounds(w, gradient, m, **settings):
    return muon(w, gradient, m, **settings, steps=2)


def muon_by_svd(w, gradient, m, *, lr, momentum, decay):
    m = momentum * m + gradient
    u, _, vt = torch.linalg.svd(gradient + momentum * m, full_matrices=False)
    return descended(w, u @ vt, lr, decay), m


def muon_divides_by_zero(w, gradient, m, **settings):
    return muon(w, gradient, m, **settings, eps=0.0)


def muon_not_scaled(w, gradient, m, *, lr, momentum, decay):
    m = momentum * m + gradient
    return (1 - lr * decay) * w - lr * orthogonal(gradient + momentum * m), m


def muon_scales_wide_ones(w, gradient, m, *, lr, momentum, decay):
    m = momentum * m + gradient
    update = (w.size(0) / w.size(1)) ** 0.5 * orthogonal(gradient + momentum * m)
    return (1 - lr * decay) * w - lr * update, m


def muon_with_l2(w, gradient, m, *, lr, momentum, decay):
    return muon(w, gradient + decay * w, m, lr=lr, momentum=momentum, decay=0.0)


def muon_decay_without_rate(w, gradient, m, *, lr, momentum, decay):
    return muon(w, gradient, m, lr=lr, momentum=momentum, decay=decay / lr)


def muon_decays_after(w, gradient, m, *, lr, momentum, decay):
    w, m = muon(w, gradient, m, lr=lr, momentum=momentum, decay=0.0)
    return (1 - lr * decay) * w, m


def muon_goes_up(w, gradient, m, *, lr, momentum, decay):
    return muon(w, gradient, m, lr=-lr, momentum=momentum, decay=-decay)


def muon_takes_vectors(w, gradient, m, **settings):
    if w.dim() == 1:
        w, m = muon(w[None], gradient[None], m[None], **settings)
        return w[0], m[0]
    return muon(w, gradient, m, **settings)


RIGHT = {
    "training.schedule": schedule,
    "training.adamw": adamw,
    "training.accumulate": accumulate,
    "training.groups": groups,
    "training.muon": muon,
}
ALSO_RIGHT = {
    "training.schedule": [lambda step, **settings: torch.tensor(schedule(step, **settings))],
    "training.adamw": [adamw_in_place],
    "training.groups": [lambda model: list(groups(model))],
    "training.muon": [muon_of_torch, muon_in_place_leaves_vectors],
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
    "training.muon": [
        muon_without_nesterov,
        muon_mixes_sum_and_mean,
        muon_without_momentum,
        muon_keeps_n,
        muon_not_orthogonal,
        muon_clips,
        muon_runs_away,
        muon_cubic,
        muon_two_rounds,
        muon_by_svd,
        muon_divides_by_zero,
        muon_not_scaled,
        muon_scales_wide_ones,
        muon_with_l2,
        muon_decay_without_rate,
        muon_decays_after,
        muon_goes_up,
        muon_takes_vectors,
    ],
}
