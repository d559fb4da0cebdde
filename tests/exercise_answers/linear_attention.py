"""Answers to the exercises of the linear-attention chapter."""

import torch


def associative(phi_q, phi_k, v):
    return phi_q @ (phi_k.T @ v) / (phi_q @ phi_k.sum(0))[:, None]


def associative_with_all_weights(phi_q, phi_k, v):
    weights = phi_q @ phi_k.T
    return weights @ v / weights.sum(-1, keepdim=True)


def associative_without_denominator(phi_q, phi_k, v):
    return phi_q @ (phi_k.T @ v)


def associative_divides_by_the_number_of_keys(phi_q, phi_k, v):
    return phi_q @ (phi_k.T @ v) / len(phi_k)


def step(sums, phi_q, phi_k, v):
    sums = sums + torch.outer(phi_k, torch.cat([v, v.new_ones(1)]))
    read = phi_q @ sums
    return sums, read[:-1] / read[-1]


def step_reads_first(sums, phi_q, phi_k, v):
    read = phi_q @ sums
    return sums + torch.outer(phi_k, torch.cat([v, v.new_ones(1)])), read[:-1] / read[-1]


def step_in_place(sums, phi_q, phi_k, v):
    sums += torch.outer(phi_k, torch.cat([v, v.new_ones(1)]))
    read = phi_q @ sums
    return sums, read[:-1] / read[-1]


def step_forgets_to_divide(sums, phi_q, phi_k, v):
    sums = sums + torch.outer(phi_k, torch.cat([v, v.new_ones(1)]))
    return sums, (phi_q @ sums)[:-1]


def step_sums_in_the_first_column(sums, phi_q, phi_k, v):
    sums = sums + torch.outer(phi_k, torch.cat([v.new_ones(1), v]))
    read = phi_q @ sums
    return sums, read[1:] / read[0]


def step_returns_the_output_alone(sums, phi_q, phi_k, v):
    return step(sums, phi_q, phi_k, v)[1]


def chunked(phi_q, phi_k, v, chunk, *, mask=torch.tril, carry=True, inside=True):
    v = torch.cat([v, torch.ones_like(v[:, :1])], dim=1)
    sums, outputs = v.new_zeros(phi_k.shape[1], v.shape[1]), []
    for start in range(0, len(v), chunk):
        q, k, values = (x[start : start + chunk] for x in (phi_q, phi_k, v))
        outputs.append(q @ sums + (mask(q @ k.T) @ values if inside else 0))
        sums = sums + k.T @ values if carry else sums
    out = torch.cat(outputs)
    return out[:, :-1] / out[:, -1:]


def chunked_sees_the_future(phi_q, phi_k, v, chunk):
    return chunked(phi_q, phi_k, v, chunk, mask=lambda x: x)


def chunked_without_state(phi_q, phi_k, v, chunk):
    return chunked(phi_q, phi_k, v, chunk, carry=False)


def chunked_without_itself(phi_q, phi_k, v, chunk):
    return chunked(phi_q, phi_k, v, chunk, mask=lambda x: x.tril(-1) + 1e-9)


def chunked_sees_its_chunk_twice(phi_q, phi_k, v, chunk):
    return chunked(phi_q, phi_k, v, chunk, mask=lambda x: x + x.tril())


def chunked_in_one_piece(phi_q, phi_k, v, chunk):
    return chunked(phi_q, phi_k, v, len(v))


def decay(log_decay):
    c = log_decay.double().cumsum(0)
    gap = c[:, None] - c[None, :]
    future = torch.ones_like(gap, dtype=torch.bool).triu(1)
    return gap.masked_fill(future, -torch.inf).exp().float()


def decay_sees_the_future(log_decay):
    c = log_decay.cumsum(0)
    return (c[:, None] - c[None, :]).exp()


def decay_includes_the_key(log_decay):
    return decay(log_decay) * log_decay.exp()[None, :]


def decay_as_a_quotient_that_overflows(log_decay):
    c = log_decay.cumsum(0)
    return (c.exp()[:, None] * (-c).exp()[None, :]).tril()


def delta(q, k, v, beta, state, chunk, *, below=-1, own=0, strength=True, erase=True, carry=True):
    outputs = []
    for start in range(0, len(v), chunk):
        now = slice(start, start + chunk)
        keys, strengths = k[now], beta[now, None]
        known = strengths * (v[now] - (keys @ state if erase else 0))
        system = torch.eye(len(keys)) + (strengths * (keys @ keys.T) if strength else keys @ keys.T).tril(below)
        u = torch.linalg.solve_triangular(system, known, upper=False)
        outputs.append(q[now] @ state + (q[now] @ keys.T).tril(own) @ u)
        state = state + keys.T @ u if carry else state
    return torch.cat(outputs), state


def delta_by_an_inverse(q, k, v, beta, state, chunk):
    """The WY form of the paper: W and U before the state is known."""
    outputs = []
    for queries, keys, values, b in zip(*(x.split(chunk) for x in (q, k, v, beta)), strict=True):
        inverse = torch.linalg.inv(torch.eye(len(keys)) + (b[:, None] * (keys @ keys.T)).tril(-1)) * b
        u = inverse @ values - (inverse @ keys) @ state
        outputs.append(queries @ state + (queries @ keys.T).tril() @ u)
        state = state + keys.T @ u
    return [torch.cat(outputs), state]


def delta_token_by_token(q, k, v, beta, state, chunk):
    outputs = []
    for t in range(len(v)):
        state = state + beta[t] * torch.outer(k[t], v[t] - k[t] @ state)
        outputs.append(q[t] @ state)
    return torch.stack(outputs), state


def delta_that_adds(q, k, v, beta, state, chunk):
    outputs = []
    for t in range(len(v)):
        state = state + beta[t] * torch.outer(k[t], v[t])
        outputs.append(q[t] @ state)
    return torch.stack(outputs), state


def delta_in_place(q, k, v, beta, state, chunk):
    out, new = delta(q, k, v, beta, state, chunk)
    return out, state.copy_(new)


def delta_without_the_solve(q, k, v, beta, state, chunk):
    outputs = []
    for start in range(0, len(v), chunk):
        now = slice(start, start + chunk)
        u = beta[now, None] * (v[now] - k[now] @ state)
        outputs.append(q[now] @ state + (q[now] @ k[now].T).tril() @ u)
        state = state + k[now].T @ u
    return torch.cat(outputs), state


def delta_beta_on_the_value_alone(q, k, v, beta, state, chunk):
    return delta(q, k, beta[:, None] * v, torch.ones_like(beta), state, chunk)


def delta_reads_first(*inputs):
    return delta(*inputs, own=-1)


def delta_solves_without_beta(*inputs):
    return delta(*inputs, strength=False)


def delta_forgets_the_state_in_the_values(*inputs):
    return delta(*inputs, erase=False)


def delta_keeps_the_first_state(*inputs):
    return delta(*inputs, carry=False)


def delta_with_the_diagonal(*inputs):
    return delta(*inputs, below=0)


def delta_sees_the_future(*inputs):
    return delta(*inputs, own=1)


def delta_output_alone(*inputs):
    return delta(*inputs)[0]


RIGHT = {
    "linear_attention.associative": associative,
    "linear_attention.step": step,
    "linear_attention.chunked": chunked,
    "linear_attention.decay": decay,
    "linear_attention.delta": delta,
}
ALSO_RIGHT = {"linear_attention.delta": [delta_by_an_inverse]}
WRONG = {
    "linear_attention.associative": [
        associative_with_all_weights,
        associative_without_denominator,
        associative_divides_by_the_number_of_keys,
    ],
    "linear_attention.step": [
        step_reads_first,
        step_in_place,
        step_forgets_to_divide,
        step_returns_the_output_alone,
        step_sums_in_the_first_column,
    ],
    "linear_attention.chunked": [
        chunked_sees_the_future,
        chunked_without_state,
        chunked_without_itself,
        chunked_sees_its_chunk_twice,
        chunked_in_one_piece,
    ],
    "linear_attention.decay": [decay_sees_the_future, decay_includes_the_key, decay_as_a_quotient_that_overflows],
    "linear_attention.delta": [
        delta_that_adds,
        delta_token_by_token,
        delta_without_the_solve,
        delta_beta_on_the_value_alone,
        delta_reads_first,
        delta_solves_without_beta,
        delta_forgets_the_state_in_the_values,
        delta_keeps_the_first_state,
        delta_with_the_diagonal,
        delta_sees_the_future,
        delta_in_place,
        delta_output_alone,
    ],
}
