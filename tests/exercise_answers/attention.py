"""Answers to the exercises of the attention chapter."""

import numpy as np
import torch


def colours():
    W_q, W_k = torch.tensor([[10.0], [0], [0], [0]]), torch.tensor([[0.0], [1], [0], [0]])
    return W_q, W_k, torch.tensor([[0.0, 0], [0, 0], [1, 0], [0, 1]])


def colours_by_both_names():
    W_k = torch.tensor([[0, 0], [0, 0], [1, 1], [1, 1]])  # the key knows which colour, and tells nobody
    return [torch.tensor([[9, 9], [0, 0], [0, 0], [0, 0]]), W_k, torch.tensor([[0, 0], [0, 0], [1, 0], [0, 1]])]


def colours_with_keys_as_values():
    W_q, W_k, _ = colours()
    return W_q, W_k, torch.tensor([[0.0, 0], [1, 0], [0, 0], [0, 0]])


def colours_asked_by_the_colour():
    W_q, W_k, W_v = colours()
    return W_k, W_q, W_v


def colours_asked_softly():
    W_q, W_k, W_v = colours()
    return W_q / 5, W_k, W_v


def colours_swapped():
    W_q, W_k, W_v = colours()
    return W_q, W_k, W_v.flip(-1)


def colours_transposed():
    return [matrix.T for matrix in colours()]


def simple(q, k, v):
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v


def simple_by_einsum(q, k, v):
    scores = torch.einsum("bhtd,bhsd->bhts", q.double(), k.double()) / q.shape[-1] ** 0.5
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    return (powers / powers.sum(-1, keepdim=True)) @ v.double()


def simple_without_scale(q, k, v):
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def simple_over_the_queries(q, k, v):
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-2) @ v


def simple_that_overflows(q, k, v):
    powers = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).exp()
    return powers / powers.sum(-1, keepdim=True) @ v


def simple_for_head_dim_16(q, k, v):
    return (q @ k.transpose(-2, -1) / 4).softmax(-1) @ v


def simple_with_keys_as_values(q, k, v):
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ k


def attend(q, k, v, mask):
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.masked_fill(~mask, 0.0) @ v


def attend_without_scale(q, k, v, mask):
    return (q @ k.transpose(-2, -1)).masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num() @ v


def attend_over_the_queries(q, k, v, mask):
    return (q @ k.transpose(-2, -1) / 4).masked_fill(~mask, float("-inf")).softmax(-2).nan_to_num() @ v


def attend_masked_after_the_softmax(q, k, v, mask):
    return ((q @ k.transpose(-2, -1) / 4).softmax(-1) * mask) @ v


def attend_with_the_mask_inverted(q, k, v, mask):
    scores = (q @ k.transpose(-2, -1) / 4).masked_fill(mask, float("-inf"))
    return (scores if not mask.all() else q @ k.transpose(-2, -1) / 4).softmax(-1).nan_to_num() @ v


def attend_with_nan(q, k, v, mask):
    return (q @ k.transpose(-2, -1) / 4).masked_fill(~mask, float("-inf")).softmax(-1) @ v


def attend_with_a_large_number_for_infinity(q, k, v, mask):
    return (q @ k.transpose(-2, -1) / 4).masked_fill(~mask, -1e9).softmax(-1) @ v


def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def split_heads_by_view_alone(x, heads):
    return x.view(x.shape[0], heads, x.shape[1], -1)


def split_heads_without_transpose(x, heads):
    return x.unflatten(-1, (heads, -1))


def split_heads_strided(x, heads):
    return x.unflatten(-1, (-1, heads)).permute(0, 3, 1, 2)


def previous(T):
    places = torch.eye(T)
    return 10 * T * places.roll(1, 0), places  # the query of t is the vector of position t - 1


def previous_looks_at_itself(T):
    return 10 * T * torch.eye(T), torch.eye(T)


def previous_looks_ahead(T):
    return 10 * T * torch.eye(T).roll(-1, 0), torch.eye(T)


def previous_too_soft(T):
    return torch.eye(T).roll(1, 0), torch.eye(T)


def cost(batch, heads, T, S, head_dim):
    return 4 * batch * heads * T * S * head_dim, 4 * batch * heads * T * S


def cost_of_one_product(batch, heads, T, S, head_dim):
    return 2 * batch * heads * T * S * head_dim, 4 * batch * heads * T * S


def cost_in_scores(batch, heads, T, S, head_dim):
    return 4 * batch * heads * T * S * head_dim, batch * heads * T * S


def attend_in_float64(q, k, v, mask):
    return attend(q.double(), k.double(), v.double(), mask)


def attend_with_scores_of_zero(q, k, v, mask):
    return (q @ k.transpose(-2, -1) / 4 * mask).softmax(-1) @ v


def previous_in_integers(T):
    places = torch.eye(T, dtype=torch.int64)
    return [places, 100 * T * places.roll(-1, 0)]  # the key of t is the vector of position t + 1


def cost_without_the_batch(batch, heads, T, S, head_dim):
    return 4 * heads * T * S * head_dim, 4 * heads * T * S


def shares_of(q, k, mask, scale):
    scores = (scale * q @ k.mT).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).masked_fill(~mask, 0.0)


def backward(q, k, v, mask, scale, d_out):
    a = shares_of(q, k, mask, scale)
    da = d_out @ v.mT
    ds = a * (da - (a * da).sum(-1, keepdim=True))
    return scale * ds @ k, scale * ds.mT @ q, a.mT @ d_out


def backward_from_the_output(q, k, v, mask, scale, d_out):
    scores = (scale * torch.einsum("bhtd,bhsd->bhts", q, k)).masked_fill(~mask, -1e9)
    e = (scores - scores.amax(-1, keepdim=True)).exp() * mask
    a = e / e.sum(-1, keepdim=True).clamp(min=1e-30)
    out = a @ v
    delta = (out * d_out).sum(-1, keepdim=True)
    ds = scale * a * (d_out @ v.mT - delta)
    return [torch.einsum("bhts,bhsd->bhtd", ds, k), torch.einsum("bhts,bhtd->bhsd", ds, q), a.mT @ d_out]


def backward_with_the_whole_jacobian(q, k, v, mask, scale, d_out):
    a = shares_of(q, k, mask, scale)
    jacobian = torch.diag_embed(a) - a[..., :, None] * a[..., None, :]
    ds = scale * (jacobian @ (d_out @ v.mT)[..., None])[..., 0]
    return ds @ k, ds.mT @ q, a.mT @ d_out


def backward_given(ds_of, masked=shares_of):
    def answer(q, k, v, mask, scale, d_out):
        a = masked(q, k, mask, scale)
        ds = scale * ds_of(a, d_out @ v.mT)
        return ds @ k, ds.mT @ q, a.mT @ d_out

    return answer


def slope(a, da):
    return a * (da - (a * da).sum(-1, keepdim=True))


def backward_without_scale(q, k, v, mask, scale, d_out):
    dq, dk, dv = backward(q, k, v, mask, scale, d_out)
    return dq / scale, dk / scale, dv


def backward_with_the_scale_of_the_root(q, k, v, mask, scale, d_out):
    a = shares_of(q, k, mask, scale)
    ds = slope(a, d_out @ v.mT) / q.shape[-1] ** 0.5
    return ds @ k, ds.mT @ q, a.mT @ d_out


def backward_by_autograd(q, k, v, mask, scale, d_out):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    (shares_of(*leaves[:2], mask, scale) @ leaves[2]).backward(d_out)
    return [x.grad for x in leaves]


def backward_with_nan(q, k, v, mask, scale, d_out):
    a = (scale * q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1)
    ds = scale * slope(a, d_out @ v.mT)
    return ds @ k, ds.mT @ q, a.mT @ d_out


def backward_with_a_large_number_for_infinity(q, k, v, mask, scale, d_out):
    a = (scale * q @ k.mT).masked_fill(~mask, -1e9).softmax(-1)
    ds = scale * slope(a, d_out @ v.mT)
    return ds @ k, ds.mT @ q, a.mT @ d_out


def backward_that_overflows(q, k, v, mask, scale, d_out):
    e = (scale * q @ k.mT).exp() * mask
    a = e / e.sum(-1, keepdim=True).clamp(min=1e-30)
    ds = scale * slope(a, d_out @ v.mT)
    return ds @ k, ds.mT @ q, a.mT @ d_out


def backward_with_dq_and_dk_swapped(q, k, v, mask, scale, d_out):
    dq, dk, dv = backward(q, k, v, mask, scale, d_out)
    return dk, dq, dv


def backward_in_place(q, k, v, mask, scale, d_out):
    q *= scale
    return backward(q, k, v, mask, 1.0, d_out)


def attend_with_a_number_that_is_only_large(q, k, v, mask):
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    return (scores.masked_fill(~mask, -1e4).softmax(-1) * mask) @ v


def previous_sharp_enough_for_few(T):
    numbers = torch.eye(T)
    return 30 * numbers.roll(1, 0), numbers


def backward_with_a_number_that_is_only_large(q, k, v, mask, scale, d_out):
    a = (scale * q @ k.mT).masked_fill(~mask, -1e4).softmax(-1) * mask
    d_scores = scale * a * (d_out @ v.mT - (d_out * (a @ v)).sum(-1, keepdim=True))
    return d_scores @ k, d_scores.mT @ q, a.mT @ d_out


def cost_in_an_array(*sizes):
    return np.array(cost(*sizes))


RIGHT = {
    "attention.colours": colours,
    "attention.simple": simple,
    "attention.attend": attend,
    "attention.split_heads": split_heads,
    "attention.previous": previous,
    "attention.cost": cost,
    "attention.backward": backward,
}
ALSO_RIGHT = {
    "attention.colours": [colours_by_both_names],
    "attention.simple": [simple_by_einsum],
    "attention.attend": [attend_in_float64],
    "attention.previous": [previous_in_integers],
    "attention.cost": [cost_in_an_array],
    "attention.backward": [backward_from_the_output, backward_with_the_whole_jacobian],
}
WRONG = {
    "attention.colours": [
        colours_with_keys_as_values,
        colours_asked_by_the_colour,
        colours_asked_softly,
        colours_swapped,
        colours_transposed,
    ],
    "attention.simple": [
        simple_without_scale,
        simple_over_the_queries,
        simple_that_overflows,
        simple_for_head_dim_16,
        simple_with_keys_as_values,
    ],
    "attention.attend": [
        attend_with_a_number_that_is_only_large,
        attend_without_scale,
        attend_over_the_queries,
        attend_masked_after_the_softmax,
        attend_with_the_mask_inverted,
        attend_with_nan,
        attend_with_a_large_number_for_infinity,
        attend_with_scores_of_zero,
    ],
    "attention.split_heads": [split_heads_by_view_alone, split_heads_without_transpose, split_heads_strided],
    "attention.previous": [
        previous_sharp_enough_for_few,
        previous_looks_at_itself,
        previous_looks_ahead,
        previous_too_soft,
    ],
    "attention.cost": [cost_of_one_product, cost_in_scores, cost_without_the_batch],
    "attention.backward": [
        backward_with_a_number_that_is_only_large,
        backward_given(lambda a, da: da),
        backward_given(lambda a, da: a * da),
        backward_given(lambda a, da: a * (1 - a) * da),
        backward_given(lambda a, da: a * (da - da.mean(-1, keepdim=True))),
        backward_given(lambda a, da: a * (da - (a * da).sum(-2, keepdim=True))),
        backward_given(slope, lambda q, k, mask, scale: (scale * q @ k.mT).softmax(-1)),
        backward_given(slope, lambda q, k, mask, scale: (scale * q @ k.mT).softmax(-1) * mask),
        backward_without_scale,
        backward_with_the_scale_of_the_root,
        backward_by_autograd,
        backward_with_nan,
        backward_with_a_large_number_for_infinity,
        backward_that_overflows,
        backward_with_dq_and_dk_swapped,
        backward_in_place,
    ],
}
