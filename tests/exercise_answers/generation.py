"""Answers to the exercises of chapter 07."""

import torch
import torch.nn.functional as F


def temperature(logits, temperature):
    if temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).double()
    return (logits / temperature).softmax(-1)


def multiplies(logits, t):
    return temperature(logits, 1 / t if t else 0)


def divides_probabilities(logits, t):
    return (logits.softmax(-1) / t).softmax(-1) if t else temperature(logits, 0)


def divides_by_zero(logits, t):
    return ((logits - logits.max()) / t).softmax(-1)


def overflows(logits, t):
    if t == 0:
        return temperature(logits, 0)
    powers = (logits / t).exp()
    return powers / powers.sum()


def shares_the_ties(logits, t):
    if t == 0:
        best = (logits == logits.max()).double()
        return best / best.sum()
    return temperature(logits, t)


def all_ties(logits, t):
    return (logits == logits.max()).double() if t == 0 else temperature(logits, t)


def top_p(probabilities, p):
    ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probabilities)
    kept[order] = torch.where(before < p, ordered, 0.0)
    return kept / kept.sum()


def drops_the_one_that_reaches(probabilities, p):
    ordered, order = probabilities.sort(descending=True)
    kept = torch.zeros_like(probabilities)
    kept[order] = torch.where(ordered.cumsum(-1) <= p, ordered, 0.0)
    return kept / kept.sum().clamp_min(1e-9)


def one_too_many(probabilities, p):
    ordered, order = probabilities.sort(descending=True)
    kept = torch.zeros_like(probabilities)
    kept[order] = torch.where(ordered.cumsum(-1) - ordered <= p, ordered, 0.0)
    return kept / kept.sum()


def in_order_of_size(probabilities, p):
    ordered = probabilities.sort(descending=True).values
    kept = torch.where(ordered.cumsum(-1) - ordered < p, ordered, 0.0)
    return kept / kept.sum()


def not_divided(probabilities, p):
    return torch.where(top_p(probabilities, p) > 0, probabilities, 0.0)


def as_min_p(probabilities, p):
    kept = torch.where(probabilities >= p * probabilities.max(), probabilities, 0.0)
    return kept / kept.sum()


def draw(probabilities, u):
    return int((probabilities.cumsum(-1) <= u).sum())


def draw_by_loop(probabilities, u):
    total = 0.0
    for token, p in enumerate(probabilities.tolist()):
        total += p
        if u < total:
            return token
    return token


def draw_from_the_left(probabilities, u):
    return int((probabilities.cumsum(-1) < u).sum())


def draw_the_likeliest(probabilities, u):
    return int(probabilities.argmax())


def draw_evenly(probabilities, u):
    return int(u * len(probabilities))


def draw_in_order_of_size(probabilities, u):
    return draw(probabilities.sort(descending=True).values, u)


def draw_by_chance(probabilities, u):
    return int(torch.multinomial(probabilities, 1))


def z_scores(counts, probabilities):
    n = counts.sum()
    difference = counts - n * probabilities
    deviation = (n * probabilities * (1 - probabilities)).sqrt()
    return torch.where(difference == 0, 0.0, difference / deviation)


def z_by_variance(counts, probabilities):
    n = counts.sum()
    return (counts - n * probabilities) / (n * probabilities * (1 - probabilities))


def z_of_poisson(counts, probabilities):
    n = counts.sum()
    return (counts - n * probabilities) / (n * probabilities).sqrt()


def z_that_is_nan(counts, probabilities):
    n = counts.sum()
    return (counts - n * probabilities) / (n * probabilities * (1 - probabilities)).sqrt()


def z_without_sign(counts, probabilities):
    return z_scores(counts, probabilities).abs()


def z_of_impossible_is_zero(counts, probabilities):
    return z_scores(counts, probabilities).nan_to_num(0.0, posinf=0.0)


def penalty(logits, tokens, presence, frequency):
    counts = torch.bincount(tokens, minlength=len(logits))
    return logits - presence * (counts > 0) - frequency * counts


def penalty_for_each(logits, tokens, presence, frequency):
    return logits - (presence + frequency) * torch.bincount(tokens, minlength=len(logits))


def penalty_once(logits, tokens, presence, frequency):
    seen = torch.bincount(tokens, minlength=len(logits)) > 0
    return logits - (presence + frequency) * seen


def penalty_in_place(logits, tokens, presence, frequency):
    counts = torch.bincount(tokens, minlength=len(logits))
    logits -= presence * (counts > 0) + frequency * counts
    return logits


def penalty_of_the_others(logits, tokens, presence, frequency):
    counts = torch.bincount(tokens, minlength=len(logits))
    return logits - presence * (counts == 0) - frequency * counts


def penalty_by_index(logits, tokens, presence, frequency):
    logits = logits.clone()
    logits[tokens] -= presence + frequency
    return logits


def penalty_by_loop(logits, tokens, presence, frequency):
    logits, seen = logits.clone(), set()
    for token in tokens.tolist():
        logits[token] -= frequency + (0 if token in seen else presence)
        seen.add(token)
    return logits


def shown(text, stops):
    found = [text.find(stop) for stop in stops if stop in text]
    if found:
        return min(found)
    for start in range(len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return start
    return len(text)


def shown_by_length(text, stops):
    places = [text.find(stop) for stop in stops if stop in text]
    held = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return min(places) if places else len(text) - max(held, default=0)


def shows_too_early(text, stops):
    found = [text.find(stop) for stop in stops if stop in text]
    return min(found) if found else len(text)


def shows_by_the_first_stop(text, stops):
    return next((text.find(stop) for stop in stops if stop in text), len(text))


def holds_back_too_little(text, stops):
    found = [text.find(stop) for stop in stops if stop in text]
    if found:
        return min(found)
    return next((s for s in range(len(text) - 1, -1, -1) if any(x.startswith(text[s:]) for x in stops)), len(text))


def holds_back_a_whole_stop(text, stops):
    found = [text.find(stop) for stop in stops if stop in text]
    return min(found) if found else max(0, len(text) - max((len(stop) - 1 for stop in stops), default=0))


def with_all_that_are_as_likely(probabilities, p):
    ordered = probabilities.sort(descending=True).values
    least = ordered[(ordered.cumsum(0) - ordered < p).sum() - 1]
    kept = torch.where(probabilities >= least, probabilities, 0.0)
    return kept / kept.sum()


def temperature_that_is_at_least_a_hundredth(logits, degree):
    return temperature(logits, max(degree, 0.01) if degree else 0)


RIGHT = {
    "generation.temperature": temperature,
    "generation.top_p": top_p,
    "generation.draw": draw,
    "generation.z_scores": z_scores,
    "generation.penalty": penalty,
    "generation.shown": shown,
}
ALSO_RIGHT = {
    "generation.temperature": [shares_the_ties],
    "generation.draw": [draw_by_loop, lambda p, u: torch.searchsorted(p.cumsum(-1), u, right=True)],
    "generation.penalty": [penalty_by_loop],
    "generation.shown": [shown_by_length],
}
WRONG = {
    "generation.temperature": [
        temperature_that_is_at_least_a_hundredth,
        multiplies,
        divides_probabilities,
        divides_by_zero,
        overflows,
        all_ties,
    ],
    "generation.top_p": [
        drops_the_one_that_reaches,
        one_too_many,
        in_order_of_size,
        not_divided,
        as_min_p,
        with_all_that_are_as_likely,
    ],
    "generation.draw": [
        draw_from_the_left,
        draw_the_likeliest,
        draw_evenly,
        draw_in_order_of_size,
        draw_by_chance,
    ],
    "generation.z_scores": [z_by_variance, z_of_poisson, z_that_is_nan, z_without_sign, z_of_impossible_is_zero],
    "generation.penalty": [
        penalty_for_each,
        penalty_once,
        penalty_in_place,
        penalty_of_the_others,
        penalty_by_index,
    ],
    "generation.shown": [
        shows_too_early,
        shows_by_the_first_stop,
        holds_back_too_little,
        holds_back_a_whole_stop,
    ],
}
