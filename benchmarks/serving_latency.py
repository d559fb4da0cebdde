"""How long requests wait: they arrive one by one or in bursts, and policies are compared under the same arrivals.

``benchmarks/serving.py`` calls it as the part "latency". TTFT is the time from a request's arrival to its first token,
TPOT the time per token after it; goodput counts the requests a second for which neither was several times as long as on
an idle engine.

The policies (names: Agrawal et al. 2024, arXiv:2403.02310) are those of the scheduler: prompts first and alone, those
that write first, and both in one step under budgets of several sizes. The prefix cache is switched on and off where
prompts begin alike, and where people talk: each question then brings the whole dialogue so far.

The part "knee" raises the rate of one kind of requests from light load to past saturation, beside the waits that the
cost model of a step predicts for the same arrivals (:func:`predicted`): once with a step's bound, and once with the
steps that were measured at the lightest load (:func:`fit_steps`).
"""

import heapq
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from statistics import median
from typing import NamedTuple

import numpy as np

from tformer_lib.serving import Engine, Params, Request, Scheduler, Step

TTFT_SLACK, TPOT_SLACK = 10, 3
"""How many times as long as on an idle engine a request may wait for its first token, and for each one after it."""

THINKING = 0.1
"""Seconds between an answer and the next question."""


@dataclass(frozen=True)
class Load:
    """Requests, and how they arrive."""

    prompts: list[list[int]]
    new: list[int]
    """Tokens that each one writes."""
    engine: Callable[..., Engine]
    """Makes an engine of these options, warmed up."""
    later: Sequence[Sequence[list[int]]] = ()
    """What each one asks after that, question by question; each brings the dialogue so far along."""


@dataclass(frozen=True)
class Wait:
    """What one request had to wait, in seconds."""

    first: float
    """TTFT."""
    each: float
    """TPOT."""
    whole: float
    """From its arrival to its last token."""
    arrived: float = 0.0
    """After the run's beginning."""
    tokens: int = 0
    """How many it wrote."""


def arrivals(count: int, rate: float, *, burst: int = 1, seed: int = 0) -> list[float]:
    """When each request arrives, in seconds: groups of ``burst`` at once, with exponential gaps between groups.

    Args:
        count: how many requests.
        rate: of requests a second, on average.
        burst: 1 is a Poisson process.
        seed: of the gaps.
    """
    random, now, times = Random(seed), 0.0, []
    while len(times) < count:
        now += random.expovariate(rate / burst)
        times += [now] * burst
    return times[:count]


def drive(engine: Engine, load: Load, times: Sequence[float]) -> list[Wait]:
    """Add each request when its time has come, and step in between; what each one waited, later questions included."""
    heard: list[tuple[float, list[float]]] = []  # each request's arrival, and when its tokens came
    later = load.later or [()] * len(times)
    coming = [(when, place, load.prompts[place], later[place]) for place, when in enumerate(times)]
    heapq.heapify(coming)
    begin = time.perf_counter()

    def send(when: float, place: int, prompt: list[int], questions: Sequence[list[int]]) -> None:
        stamps: list[float] = []
        heard.append((when, stamps))

        def listen(piece) -> None:
            stamps.append(time.perf_counter() - begin)
            if piece.finish_reason and questions:
                dialogue = [*piece.request.tokens, *questions[0]]
                heapq.heappush(coming, (stamps[-1] + THINKING, place, dialogue, questions[1:]))

        engine.add(prompt, {"max_new_tokens": load.new[place]}, listener=listen)

    while coming or engine.busy:
        while coming and coming[0][0] <= time.perf_counter() - begin:
            send(*heapq.heappop(coming))
        if engine.busy:
            engine.step()
        elif coming:
            time.sleep(max(coming[0][0] - (time.perf_counter() - begin), 0.0))
    return [wait_of(arrived, stamps) for arrived, stamps in heard]


def wait_of(arrived: float, stamps: list[float]) -> Wait:
    """The waits of a request, from the times at which its tokens came."""
    each = (stamps[-1] - stamps[0]) / max(len(stamps) - 1, 1)
    return Wait(stamps[0] - arrived, each, stamps[-1] - arrived, arrived, len(stamps))


def predicted(load: Load, times: Sequence[float], scheduler: Scheduler, step_seconds: Callable) -> list[Wait]:
    """The same by the cost model: the scheduler plans, no model runs, and each step takes what the formula says.

    Args:
        load: later questions are left out.
        times: of the arrivals.
        scheduler: of an engine like the one that is driven; nothing runs in it.
        step_seconds: (tokens of a step, keys that its rows hold) -> seconds.
    """
    made = [Request(i, prompt, Params(max_new_tokens=load.new[i])) for i, prompt in enumerate(load.prompts)]
    coming = list(zip(times, made, strict=True))[::-1]
    heard: dict[Request, list[float]] = {request: [] for request in made}
    clock = 0.0
    while coming or scheduler.running or scheduler.waiting:
        if not scheduler.running and not scheduler.waiting:
            clock = max(clock, coming[-1][0])
        while coming and coming[-1][0] <= clock:
            scheduler.add(coming.pop()[1])
        rows = scheduler.plan()
        clock += step_seconds(sum(row.count for row in rows), sum(row.request.table.length for row in rows))
        for row in rows:
            if row.samples:
                write_token(row.request, scheduler)
                heard[row.request].append(clock)
    return [wait_of(arrived, heard[request]) for arrived, request in zip(times, made, strict=True)]


def write_token(request: Request, scheduler: Scheduler) -> None:
    """A token of no meaning has come back for a request, which may be its last."""
    request.pending -= 1
    request.tokens.append(0)
    if len(request.tokens) == request.end:
        scheduler.remove(request)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds: the smallest value that so many percent do not pass."""
    ordered = sorted(values)
    ranks = {f"p{p}": ordered[max(math.ceil(p / 100 * len(ordered)) - 1, 0)] for p in (50, 90, 99)}
    return {name: round(1e3 * value, 2) for name, value in ranks.items()}


def latency_row(case: str, policy: str, waits: list[Wait], objective: Wait, **extra) -> dict:
    """A run as a row: its timing is that of whole requests."""
    whole = sorted(wait.whole for wait in waits)
    ends = max(wait.arrived + wait.whole for wait in waits)
    good = sum(wait.first <= objective.first and wait.each <= objective.each for wait in waits)
    return {
        "name": f"{case}: {policy}",
        "case": case,
        "contestant": policy,
        "timing": (median(whole), whole[len(whole) // 10], whole[9 * len(whole) // 10], len(whole)),
        "unbounded": "a wait in a queue",
        "ttft_ms": percentiles([wait.first for wait in waits]),
        "tpot_ms": percentiles([wait.each for wait in waits]),
        "e2e_ms": percentiles([wait.whole for wait in waits]),
        "tokens_per_second": round(sum(wait.tokens for wait in waits) / ends),
        "requests_per_second": round(len(waits) / ends, 2),
        "goodput_per_second": round(good / ends, 2),
        **extra,
    }


def compare_policies(load: Load, shared: Load, chats: Load, budgets: Sequence[int]) -> dict:
    """Every policy under every load, and the prefix cache where prompts share a beginning and where people talk."""
    engines = {budget: load.engine(budget=budget) for budget in budgets}
    policies = [("mixed", budget) for budget in budgets] + [(p, budgets[-1]) for p in ("prefill first", "decode first")]
    engine = engines[budgets[1]]
    together = [drive(engine, load, [0.0] * len(load.prompts)) for _ in range(2)]
    capacity = max(len(waits) / max(wait.whole for wait in waits) for waits in together)
    idle = [
        drive(engine, Load([p], [n], load.engine), [0.0])[0] for p, n in zip(load.prompts[:6], load.new, strict=False)
    ]
    objective = Wait(TTFT_SLACK * median(w.first for w in idle), TPOT_SLACK * median(w.each for w in idle), math.inf)
    rows: list[dict] = []
    for case, times in loads(len(load.prompts), capacity).items():
        for policy, budget in policies:
            engines[budget].scheduler.policy = policy
            waits = drive(engines[budget], load, times)
            name = f"{budget} tokens a step" if policy == "mixed" else policy
            rows.append(latency_row(case, name, waits, objective))
            engines[budget].scheduler.policy = "mixed"
    for case, some in (("a shared beginning", shared), ("a talk", chats)):
        times = arrivals(len(some.prompts), capacity * (1 if some is shared else 0.5))
        for policy, cache in (("no prefix cache", False), ("prefix cache", True)):
            engine.scheduler.prefix_cache = cache
            engine.forget()
            rows.append(latency_row(case, policy, drive(engine, some, times), objective))
            engine.scheduler.prefix_cache = False
    facts = {"ttft_objective_ms": round(1e3 * objective.first, 1), "tpot_objective_ms": round(1e3 * objective.each, 2)}
    return {"rows": rows, "capacity_requests_per_second": round(capacity, 2), **facts}


def loads(count: int, capacity: float) -> dict[str, list[float]]:
    """The arrivals of each case."""
    steady = {f"Poisson, {share:g} of capacity": arrivals(count, share * capacity) for share in (0.4, 0.8, 2.0)}
    return steady | {"bursts of 8, 0.8 of capacity": arrivals(count, 0.8 * capacity, burst=8)}


def find_knee(engine: Engine, load: Load, rates: Sequence[float], step_seconds: Callable) -> dict:
    """The waits over the rate of arrivals, driven and predicted.

    Args:
        engine: whose scheduler the prediction copies.
        load: enough requests that a queue can grow.
        rates: requests a second, from light load to past saturation.
        step_seconds: see :func:`predicted`; the bound.
    """
    rows, nothing, models = [], Wait(math.inf, math.inf, math.inf), {"predicted by the bound": step_seconds}
    for rate in rates:
        times, case = arrivals(len(load.prompts), rate), f"{rate:g} requests a second"
        engine.log.clear()
        rows.append(latency_row(case, "driven", drive(engine, load, times), nothing, rate=rate))
        if rate == rates[0]:
            models["predicted by its steps"] = fitted = fit_steps(list(engine.log))
        for who, model in models.items():
            waits = predicted(load, times, scheduler_like(engine), model)
            why = {"alone": "the cost model's clock", "rate": rate}
            rows.append(latency_row(case, who, waits, nothing, **why))
    return {"rows": rows, "step_microseconds": {name: 1e6 * seconds for name, seconds in fitted._asdict().items()}}


class StepCost(NamedTuple):
    """What a step takes, in seconds."""

    each: float
    """In any case."""
    token: float
    """For each token that it computes."""
    key: float
    """For each key that its rows hold."""

    def __call__(self, tokens: int, held: int) -> float:
        return self.each + tokens * self.token + held * self.key


def fit_steps(log: Sequence[Step]) -> StepCost:
    """The cost of a step by the least sum of errors over an engine's log. A step begins when the one before has ended.

    A few steps that something else held up would decide a fit by least squares. Here each step's squared error is
    divided by the size of the error that the fit before left, so that what is summed is the error itself.
    """
    known = np.array([(1.0, step.tokens, step.live_tokens) for step in log[1:]])
    seconds = np.array([now.finished - max(now.started, before.finished) for before, now in pairwise(log)])
    weights = np.ones(len(seconds))
    for _ in range(50):
        root = np.sqrt(weights)
        found, *_ = np.linalg.lstsq(known * root[:, None], seconds * root, rcond=None)
        weights = 1 / np.maximum(np.abs(seconds - known @ found), 1e-7)  # of no error, a tenth of a microsecond
    return StepCost(*map(float, found))


def scheduler_like(engine: Engine) -> Scheduler:
    """An empty scheduler with the settings of an engine's."""
    ours, blocks = engine.scheduler, engine.allocator
    return Scheduler(
        type(blocks)(blocks.blocks, blocks.block_size),
        max_num_seqs=len(ours.tables) - 1,
        budget=ours.budget,
        max_blocks=ours.tables.shape[1],
        prefix_cache=ours.prefix_cache,
        spare_blocks=ours.spare_blocks,
        policy=ours.policy,
    )


def skewed_lengths(random: Random, count: int, shortest: int, longest: int) -> list[int]:
    """Lengths of which every order of magnitude is as likely."""
    return [round(math.exp(random.uniform(math.log(shortest), math.log(longest)))) for _ in range(count)]
