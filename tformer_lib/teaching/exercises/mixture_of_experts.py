"""The exercises of the chapter on mixtures of experts."""

import torch
from torch import Tensor

from tformer_lib.contract import counted
from tformer_lib.mixture_of_experts import balance_loss, expected_experts
from tformer_lib.teaching.exercises.engine import (
    exercise,
    in_digits,
    require,
    require_close,
    require_number,
    require_shape,
)


@exercise(
    "mixture_of_experts.route",
    title="Route",
    hints=(
        "topk returns values and indices. Which of the two are the experts?",
        "The weights sum to 1 over the chosen experts: over which logits does the softmax run?",
        "chosen = logits.topk(k).indices, and the weights are logits.gather(1, chosen).softmax(1)",
    ),
)
def check_route(fn):
    for tokens, count, k, offset in ((5, 8, 2, 0.0), (4, 6, 3, 1000.0), (3, 4, 1, 0.0), (2, 4, 4, 0.0), (1, 5, 2, 0.0)):
        logits = torch.randn(tokens, count, dtype=torch.float64) + offset * torch.arange(1, tokens + 1)[:, None]
        found = fn(logits.clone(), k)
        require(
            isinstance(found, tuple | list) and len(found) == 2, "return two tensors: the experts and their weights"
        )
        experts, weights = found
        place = f"with {count} experts and k = {k}"
        require_shape(experts, (tokens, k), f"{place}, the tensor of experts")
        require_shape(weights, (tokens, k), f"{place}, the tensor of weights")
        require(not experts.is_floating_point(), f"{place}, the experts are {experts.dtype}: they are indices")
        best = logits.topk(k).indices
        wanted = torch.zeros_like(logits).scatter(1, best, logits.gather(1, best).softmax(1))
        require(
            torch.equal(experts.sort(1).values, best.sort(1).values),
            f"{place}, a token gets the experts {experts[0].tolist()}, expected {best[0].tolist()} in any order",
        )
        sums = weights.sum(1)
        explain = f"{place}, the weights of a token sum to {sums[0]:.3f}, and should sum to 1"
        require(torch.allclose(sums.double(), torch.ones(tokens, dtype=torch.float64), atol=1e-6), explain)
        require_close(
            torch.zeros_like(logits).scatter(1, experts, weights.to(logits.dtype)),
            wanted,
            f"{place}, an expert has the wrong weight",
            name=f"{place}, the weights by expert",
        )


@exercise(
    "mixture_of_experts.sort",
    title="Sort the choices",
    hints=(
        "Flatten the choices: choice i belongs to token i // k. Which order puts equal experts side by side?",
        "experts.flatten().argsort() is that order. Whose token does each place of it belong to?",
        "order // k are the tokens; torch.bincount(experts.flatten(), minlength=count) are the counts",
    ),
)
def check_sort(fn):
    for tokens, count, chosen, k in ((6, 4, 4, 2), (9, 6, 5, 1), (3, 12, 10, 3)):
        experts = torch.rand(tokens, chosen).argsort(1)[:, :k]  # the experts after the chosen ones have no token
        found = fn(experts.clone(), count)
        require(isinstance(found, tuple | list) and len(found) == 2, "return two tensors: the tokens and the counts")
        token, counts = found
        place = f"with {counted(tokens, 'token')}, {count} experts and k = {k}"
        require_shape(token, (tokens * k,), f"{place}, the tensor of tokens")
        require_shape(counts, (count,), f"{place}, the tensor of counts")
        for name, x in (("tokens", token), ("counts", counts)):
            require(not x.is_floating_point(), f"{place}, the {name} are {x.dtype}: they must be whole numbers")
        wanted = [int((experts == e).sum()) for e in range(count)]
        explain = f"{place}, the counts are {counts.tolist()}, expected {wanted}"
        require(counts.tolist() == wanted, explain)
        explain_groups(token, wanted, experts, place)


def explain_groups(token: Tensor, counts: list[int], experts: Tensor, place: str) -> None:
    """The rows of each expert are its tokens, in any order."""
    for expert, rows in enumerate(token.split(counts)):
        own = (experts == expert).any(1).nonzero()[:, 0].tolist()
        found = sorted(rows.tolist())
        require(found == own, f"{place}, the rows of expert {expert} are tokens {found}, expected {own}")


@exercise(
    "mixture_of_experts.balance",
    title="The load-balancing loss",
    hints=(
        "Two vectors with a number for each expert: its share of the choices, and the mean of its scores.",
        "An expert that nobody chose must be counted too, with share 0: see minlength of torch.bincount.",
        "E * (bincount(experts.flatten(), minlength=E) / experts.numel() * shares.mean(0)).sum()",
    ),
)
def check_balance(fn):
    for tokens, count, k in ((8, 4, 1), (10, 6, 2), (5, 16, 3)):
        logits = torch.randn(tokens, count, dtype=torch.float64) + torch.linspace(2, -2, count, dtype=torch.float64)
        shares = logits.softmax(1)
        chosen_by = shares if k == 1 else torch.rand(tokens, count)  # as a bias of the selection would have it
        experts = chosen_by.topk(k).indices
        counts = torch.bincount(experts.flatten(), minlength=count)
        place = f"with {count} experts and k = {k}"
        given = shares.clone().requires_grad_()
        found = fn(given, experts.clone())
        number = torch.tensor(require_number(found, f"{place}, the loss"), dtype=torch.float64)
        require_close(number, balance_loss(shares, counts), f"{place}, the loss is wrong", name=f"{place}, the loss")
        require_gradient(found, given, counts, k)
    even = torch.full((4, 4), 0.25, dtype=torch.float64)
    found = torch.tensor(require_number(fn(even, torch.arange(4)[:, None]), "the loss"), dtype=torch.float64)
    require_close(found, torch.tensor(1.0, dtype=torch.float64), "an even load has the loss 1", name="the loss")


def require_gradient(loss, shares: Tensor, counts: Tensor, k: int) -> None:
    """Fail unless the loss moves the shares of the experts that have too many tokens."""
    said = "the number is right, and no gradient flows from it to the shares, so nothing would be trained"
    require(isinstance(loss, Tensor) and loss.requires_grad, f"{said}: do not take the number out of its tensor")
    (found,) = torch.autograd.grad(loss.sum(), shares, allow_unused=True)
    require(found is not None, f"{said}: was it detached?")
    wanted = (shares.shape[1] * counts / (k * len(shares)) / len(shares)).expand_as(shares)
    require_close(found, wanted, "the number is right, and its gradient is not E f / N", name="the gradient")


@exercise(
    "mixture_of_experts.keep",
    title="Who finds a place?",
    hints=(
        "A choice is kept if fewer than `capacity` choices before it went to the same expert.",
        "One-hot rows of the flattened choices, summed up from the top, count how many each expert has had so far.",
        "F.one_hot(flat).cumsum(0).gather(1, flat[:, None]) is 1 for an expert's first choice, 2 for its second, ...",
    ),
)
def check_keep(fn):
    for tokens, count, k, capacity in ((6, 2, 1, 2), (8, 4, 2, 3), (5, 3, 3, 1), (7, 5, 2, 20), (1, 4, 2, 1)):
        experts = torch.rand(tokens, count).argsort(1)[:, :k]
        experts[0, 0] = count - 1 if (experts[0] != count - 1).all() else experts[0, 0]
        found = fn(experts.clone(), capacity)
        place = f"with choices {experts.tolist()} and {capacity} places for each expert"
        require_shape(found, (tokens, k), f"{place}, the mask")
        require(found.dtype == torch.bool, f"{place}, the mask is {found.dtype}, expected torch.bool")
        explain_places(found, experts, capacity, place)


def explain_places(mask: Tensor, experts: Tensor, capacity: int, place: str) -> None:
    """First come, first served; names the first choice for which that does not hold."""
    had = [0] * (int(experts.max()) + 1)
    for token, row in enumerate(experts.tolist()):
        for choice, expert in enumerate(row):
            had[expert] += 1
            wanted = "kept" if had[expert] <= capacity else "dropped"
            found = "kept" if mask[token, choice] else "dropped"
            explain = f"{place}: token {token} is number {had[expert]} at expert {expert}, and its choice is {found}"
            require(found == wanted, f"{explain}, expected {wanted}")


@exercise(
    "mixture_of_experts.expected",
    title="What a step reads",
    hints=(
        "One token leaves a given expert out with probability 1 - k / E. What about all tokens?",
        "All tokens leave it out with that probability to the power of their number.",
        "count * (1 - (1 - per_token / count) ** tokens)",
    ),
)
def check_expected(fn):
    for count, k, tokens in ((8, 2, 1), (8, 2, 16), (128, 8, 32), (16, 16, 3), (256, 8, 500)):
        found = require_number(fn(count, k, tokens), "the number of experts")
        wanted = expected_experts(count, k, tokens)
        place = f"with {k} of {count} experts for each of {counted(tokens, 'token')},"
        mine, right = in_digits(found, wanted, ".3f")
        require(abs(found - wanted) < 1e-6 * count, f"{place} {mine} are read on average, expected {right}")
