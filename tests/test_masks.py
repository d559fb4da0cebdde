"""Masks against brute-force loops, and the one convention: True may look, aligned to the bottom right."""

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st

from tformer_lib import masks

lengths = st.integers(0, 9)
few = draws(60)


def brute_force(T, S, may_look):
    """(T, S) boolean from a loop over every pair; ``may_look(position of the query, position of the key)``."""
    grid = [[may_look(S - T + t, s) for s in range(S)] for t in range(T)]
    return torch.tensor(grid, dtype=torch.bool).reshape(T, S)


@few
@given(T=lengths, S=lengths)
def test_causal(T, S):
    assert torch.equal(masks.causal(T, S), brute_force(T, S, lambda query, key: key <= query))


@few
@given(T=lengths, S=lengths, window=st.integers(1, 12))
def test_sliding_window(T, S, window):
    expected = brute_force(T, S, lambda query, key: key in range(query - window + 1, query + 1))
    assert torch.equal(masks.sliding_window(T, S, window=window), expected)


@few
@given(T=lengths, S=lengths, prefix_length=st.integers(0, 12))
def test_prefix(T, S, prefix_length):
    expected = brute_force(T, S, lambda query, key: key <= query or key < prefix_length)
    assert torch.equal(masks.prefix(T, S, prefix_length=prefix_length), expected)


@few
@given(data=st.data(), S=st.integers(0, 9))
def test_padding(data, S):
    real = data.draw(st.lists(st.integers(0, S), max_size=4))
    mask = masks.padding(torch.tensor(real, dtype=torch.long), S)
    assert mask.shape == (len(real), 1, 1, S)
    assert mask[:, 0, 0].tolist() == [[s < length for s in range(S)] for length in real]


@few
@given(data=st.data(), batch=st.integers(1, 3), S=st.integers(0, 8))
def test_document(data, batch, S):
    ids = [data.draw(st.lists(st.integers(0, 2), min_size=S, max_size=S)) for _ in range(batch)]
    T = data.draw(st.integers(0, S))
    mask = masks.document(torch.tensor(ids, dtype=torch.long), T)
    assert mask.shape == (batch, 1, T, S)
    for row, names in zip(mask, ids, strict=True):
        expected = brute_force(T, S, lambda query, key, names=names: names[query] == names[key])
        assert torch.equal(row[0], expected)
        assert torch.equal(masks.document(torch.tensor(names, dtype=torch.long), T), expected)


@few
@given(T=st.integers(1, 9), S=st.integers(0, 9), window=st.integers(1, 9), prefix_length=st.integers(0, 9))
def test_the_last_queries_see_what_they_see_in_a_full_pass(T, S, window, prefix_length):
    """A mask of fewer queries is the bottom of the mask of more: what makes a cache and a full pass agree."""
    for mask in (
        lambda T: masks.causal(T, S),
        lambda T: masks.sliding_window(T, S, window=window),
        lambda T: masks.prefix(T, S, prefix_length=prefix_length),
    ):
        assert torch.equal(mask(T)[1:], mask(T - 1))


def test_one_query_sees_everything_in_its_cache():
    assert masks.causal(1, 5).all()
    assert masks.sliding_window(1, 5, window=2).tolist() == [[False, False, False, True, True]]


def test_special_cases_are_the_causal_mask():
    assert torch.equal(masks.sliding_window(6, window=6), masks.causal(6))
    assert torch.equal(masks.prefix(6, prefix_length=0), masks.causal(6))
    assert torch.equal(masks.prefix(6, prefix_length=1), masks.causal(6))
    assert masks.prefix(6, prefix_length=6).all()
    assert torch.equal(masks.sliding_window(6, window=1), torch.eye(6, dtype=torch.bool))


def test_combine_is_and_and_ignores_none():
    causal, padding = masks.causal(4), masks.padding(torch.tensor([4, 2]), 4)
    documents = masks.document(torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]))
    both = masks.combine(causal, None, padding, documents)
    assert both.shape == (2, 1, 4, 4)
    for b, t, s in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4)).tolist():
        assert both[b, 0, t, s] == (causal[t, s] and padding[b, 0, 0, s] and documents[b, 0, t, s])
    assert masks.combine() is None
    assert masks.combine(None, None) is None
    assert masks.combine(None, causal) is causal


def test_describe_draws_who_sees_whom():
    assert masks.describe(masks.causal(2, 3)) == "# # .\n# # #"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masks.sliding_window(4, window=0), "window must be at least 1.*got 0"),
        (lambda: masks.prefix(4, prefix_length=-1), "prefix_length must be at least 0, got -1"),
        (lambda: masks.causal(-1), "got T = -1"),
        (lambda: masks.causal(2.5), "T must be an integer, got 2.5"),
        (lambda: masks.causal(2, 3.0), "S must be an integer, got 3.0"),
        (lambda: masks.sliding_window(4, window=float("nan")), "window must be an integer, got nan"),
        (lambda: masks.sliding_window(4, window=2.5), "window must be an integer, got 2.5"),
        (lambda: masks.prefix(4, prefix_length=float("nan")), "prefix_length must be an integer, got nan"),
        (lambda: masks.padding(torch.tensor([1]), 2.5), "S must be an integer, got 2.5"),
        (lambda: masks.document(torch.tensor([0.5])), "integers, got .*float32"),
        (lambda: masks.combine([[True]]), "masks must be boolean.*got list"),
        (lambda: masks.combine(masks.causal(2), masks.causal(2, device="meta")), "on one device, got cpu and meta"),
        (lambda: masks.padding(torch.tensor([5]), 4), r"lengths must lie in 0 \.\. 4, got 5"),
        (lambda: masks.padding(torch.tensor([1.0]), 4), "integers, got .*float32"),
        (lambda: masks.padding(torch.tensor([[1]]), 4), r"must be \(batch,\) integers, got \(1, 1\)"),
        (lambda: masks.document(torch.tensor(1)), r"ids must be \(batch, S\) or \(S,\)"),
        (lambda: masks.document(torch.tensor([1, 1]), 3), "T is 3: the queries must be among the 2 positions"),
        (lambda: masks.combine(torch.zeros(2, 2)), "masks must be boolean.*got torch.float32"),
        (
            lambda: masks.combine(masks.causal(2), masks.causal(3)),
            r"with one another, got \(2, 2\), \(3, 3\)",
        ),
        (lambda: masks.describe(torch.zeros(1, 2, 2).bool()), r"one \(T, S\) boolean mask, got \(1, 2, 2\)"),
    ],
)
def test_wrong_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_mask_builder_holds_the_masks_of_the_library():
    from tformer_lib.teaching.widgets.masks import TOKENS, mask_builder

    data, S = mask_builder().data, len(TOKENS)
    read = lambda rows: torch.tensor([[bit == "1" for bit in row] for row in rows])  # noqa: E731
    assert torch.equal(read(data["causal"]), masks.causal(S))
    for size in range(1, S + 1):
        assert torch.equal(read(data["window"][size - 1]), masks.sliding_window(S, window=size))
        assert torch.equal(read(data["prefix"][size - 1]), masks.prefix(S, prefix_length=size))
        assert torch.equal(read(data["padding"][size - 1])[0], masks.padding(torch.tensor([size]), S)[0, 0, 0])
    with pytest.raises(ValueError, match="each token needs a document, got 2 tokens and 1 documents"):
        mask_builder(("a", "b"), (0,))
