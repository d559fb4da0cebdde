"""Answers to the exercises of the chapter on several devices."""

import torch


def send(rank, turn, size):
    return (rank - turn) % size


def send_own(rank, turn, size):
    return rank


def send_forwards(rank, turn, size):
    return (rank + turn) % size


def send_stops(rank, turn, size):
    return (rank - min(turn, size - 2)) % size


def send_restarts(rank, turn, size):
    return (rank - turn % (size - 1)) % size


def feed_forward(x, W_up, W_down, rank, size):
    inner = W_up.shape[1] // size
    mine = slice(rank * inner, (rank + 1) * inner)
    return torch.relu(x @ W_up[:, mine]) @ W_down[mine]


def feed_forward_whole(x, W_up, W_down, rank, size):
    return torch.relu(x @ W_up) @ W_down


def feed_forward_cut_at_the_end(x, W_up, W_down, rank, size):
    inner = W_up.shape[1] // size
    mine = slice(rank * inner, (rank + 1) * inner)
    return torch.relu(x @ W_up)[:, mine] @ W_down[mine]


def feed_forward_strided(x, W_up, W_down, rank, size):
    return torch.relu(x @ W_up[:, rank::size]) @ W_down[rank::size]


def feed_forward_without_relu(x, W_up, W_down, rank, size):
    inner = W_up.shape[1] // size
    mine = slice(rank * inner, (rank + 1) * inner)
    return x @ W_up[:, mine] @ W_down[mine]


def feed_forward_mean(x, W_up, W_down, rank, size):
    return feed_forward(x, W_up, W_down, rank, size) / size


def feed_forward_inner(x, W_up, W_down, rank, size):
    inner = W_up.shape[1] // size
    return torch.relu(x @ W_up[:, rank * inner : (rank + 1) * inner])


def merge(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    return (lse_a - lse).exp()[:, None] * out_a + (lse_b - lse).exp()[:, None] * out_b, lse


def merge_naive(out_a, lse_a, out_b, lse_b):
    a, b = lse_a.exp(), lse_b.exp()
    return (a[:, None] * out_a + b[:, None] * out_b) / (a + b)[:, None], (a + b).log()


def merge_mean(out_a, lse_a, out_b, lse_b):
    return (out_a + out_b) / 2, torch.logaddexp(lse_a, lse_b)


def merge_swapped(out_a, lse_a, out_b, lse_b):
    out, lse = merge(out_b, lse_a, out_a, lse_b)
    return out, lse


def merge_added(out_a, lse_a, out_b, lse_b):
    return merge(out_a, lse_a, out_b, lse_b)[0], lse_a + lse_b


def merge_largest(out_a, lse_a, out_b, lse_b):
    return merge(out_a, lse_a, out_b, lse_b)[0], torch.maximum(lse_a, lse_b)


def memory(parameters, block, devices):
    gathered = 2 * 4 * block if devices > 1 else 0
    return 16 * parameters / devices + gathered


def memory_of_ddp(parameters, block, devices):
    return 16 * parameters


def memory_without_gathered(parameters, block, devices):
    return 16 * parameters / devices


def memory_one_block(parameters, block, devices):
    return 16 * parameters / devices + 4 * block


def memory_weights_alone(parameters, block, devices):
    return 4 * parameters / devices + 8 * block


def memory_always_gathered(parameters, block, devices):
    return 16 * parameters / devices + 8 * block


RIGHT = {
    "scaling_out.send": send,
    "scaling_out.feed_forward": feed_forward,
    "scaling_out.merge": merge,
    "scaling_out.memory": memory,
}
WRONG = {
    "scaling_out.send": [send_own, send_forwards, send_stops, send_restarts, lambda rank, turn, size: rank - turn],
    "scaling_out.feed_forward": [
        feed_forward_whole,
        feed_forward_cut_at_the_end,
        feed_forward_strided,
        feed_forward_without_relu,
        feed_forward_mean,
        feed_forward_inner,
    ],
    "scaling_out.merge": [merge_naive, merge_mean, merge_swapped, merge_added, merge_largest],
    "scaling_out.memory": [
        memory_of_ddp,
        memory_without_gathered,
        memory_one_block,
        memory_weights_alone,
        memory_always_gathered,
    ],
}
