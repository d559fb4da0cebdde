"""Answers to the exercises of the chapter on mixtures of experts."""

import torch
import torch.nn.functional as F


def route(logits, k):
    chosen = logits.topk(k).indices
    return chosen, logits.gather(1, chosen).softmax(1)


def route_renormalised(logits, k):
    shares, chosen = logits.softmax(1).topk(k)
    return chosen, shares / shares.sum(1, keepdim=True)


def route_all(logits, k):
    shares, chosen = logits.softmax(1).topk(k)
    return chosen, shares


def route_worst(logits, k):
    values, chosen = logits.topk(k, largest=False)
    return chosen, values.softmax(1)


def route_over_tokens(logits, k):
    values, chosen = logits.topk(k)
    return chosen, values.softmax(0)


def route_even(logits, k):
    chosen = logits.topk(k).indices
    return chosen, torch.full(chosen.shape, 1 / k, dtype=logits.dtype)


def route_swapped(logits, k):
    return route(logits, k)[::-1]


def sort(experts, count):
    flat = experts.flatten()
    return flat.argsort() // experts.shape[1], torch.bincount(flat, minlength=count)


def sort_choices(experts, count):
    flat = experts.flatten()
    return flat.argsort(), torch.bincount(flat, minlength=count)


def sort_remainder(experts, count):
    flat = experts.flatten()
    return flat.argsort() % len(experts), torch.bincount(flat, minlength=count)


def sort_not(experts, count):
    flat = experts.flatten()
    return torch.arange(len(flat)) // experts.shape[1], torch.bincount(flat, minlength=count)


def sort_without_the_empty(experts, count):
    flat = experts.flatten()
    return flat.argsort() // experts.shape[1], torch.bincount(flat)


def balance(shares, experts):
    count = shares.shape[1]
    of_choices = torch.bincount(experts.flatten(), minlength=count) / experts.numel()
    return count * (of_choices * shares.mean(0)).sum()


def balance_per_token(shares, experts):
    count = shares.shape[1]
    of_choices = torch.bincount(experts.flatten(), minlength=count) / len(experts)
    return count * (of_choices * shares.mean(0)).sum()


def balance_that_trains_nothing(shares, experts):
    return balance(shares.detach(), experts)


def balance_as_a_number(shares, experts):
    return balance(shares, experts).item()


def balance_of_scores(shares, experts):
    return shares.shape[1] * (shares.mean(0) ** 2).sum()


def balance_unscaled(shares, experts):
    return balance(shares, experts) / shares.shape[1]


def balance_without_the_empty(shares, experts):
    of_choices = torch.bincount(experts.flatten()) / experts.numel()
    return shares.shape[1] * (of_choices * shares.mean(0)[: len(of_choices)]).sum() * len(of_choices) / shares.shape[1]


def keep(experts, capacity):
    flat = experts.flatten()
    place = F.one_hot(flat).cumsum(0).gather(1, flat[:, None])
    return (place <= capacity).view_as(experts)


def keep_one_less(experts, capacity):
    flat = experts.flatten()
    place = F.one_hot(flat).cumsum(0).gather(1, flat[:, None])
    return (place < capacity).view_as(experts)


def keep_the_last(experts, capacity):
    return keep(experts.flip(0, 1), capacity).flip(0, 1)


def keep_first_choices_first(experts, capacity):
    return keep(experts.T, capacity).T


def keep_all(experts, capacity):
    return torch.ones_like(experts, dtype=torch.bool)


def expected(count, per_token, tokens):
    return count * (1 - (1 - per_token / count) ** tokens)


def expected_most(count, per_token, tokens):
    return min(count, per_token * tokens)


def expected_with_replacement(count, per_token, tokens):
    return count * (1 - (1 - 1 / count) ** (per_token * tokens))


def balance_of_the_largest_shares(shares, experts):
    return balance(shares, shares.topk(experts.shape[1]).indices)


RIGHT = {
    "mixture_of_experts.route": route,
    "mixture_of_experts.sort": sort,
    "mixture_of_experts.balance": balance,
    "mixture_of_experts.keep": keep,
    "mixture_of_experts.expected": expected,
}
ALSO_RIGHT = {"mixture_of_experts.route": [route_renormalised]}
WRONG = {
    "mixture_of_experts.route": [route_all, route_worst, route_over_tokens, route_even, route_swapped],
    "mixture_of_experts.sort": [sort_choices, sort_remainder, sort_not, sort_without_the_empty],
    "mixture_of_experts.balance": [
        balance_of_the_largest_shares,
        balance_per_token,
        balance_of_scores,
        balance_unscaled,
        balance_without_the_empty,
        balance_that_trains_nothing,
        balance_as_a_number,
    ],
    "mixture_of_experts.keep": [keep_one_less, keep_the_last, keep_first_choices_first, keep_all],
    "mixture_of_experts.expected": [expected_most, expected_with_replacement],
}
