"""The deep profile in pieces: all of it is drawn, no more, and cheap tests first; what ended is not drawn again."""

import json
import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from tools.deep import DEEP, PIECE, Drawn, pieces, read, run_pytest, table
from tools.deep_plugin import draws

KNOWN = st.dictionaries(
    st.text("abc", min_size=1, max_size=2),
    st.builds(Drawn, multiple=st.integers(1, DEEP + 5), examples=st.just(7), seconds=st.floats(0.001, 500)),
)


@given(KNOWN, st.sampled_from([1.0, 7.5, PIECE]))
def test_pieces_are_what_is_left(known, length):
    cut = list(pieces(known, length))
    drawn = {test: sum(piece.multiple for piece in cut if test in piece.tests) for test in known}
    assert drawn == {test: max(DEEP - one.multiple, 0) for test, one in known.items()}
    cost = {test: one.seconds / one.multiple for test, one in known.items()}
    for piece in cut:
        takes = sum(cost[test] * piece.multiple for test in piece.tests)
        assert takes <= length * 1.001 or len(piece.tests) == 1, "several are together only where they take little"
        assert takes <= length + cost[piece.tests[0]] * 1.001, "no piece is longer than its last multiple asks for"
    whole = [cost[piece.tests[0]] * drawn[piece.tests[0]] for piece in cut]
    assert whole == pytest.approx(sorted(whole))


def test_what_ended_is_read_and_told(tmp_path):
    rows = [("a", 1, 60, ""), ("a", 99, 5_900, ""), ("b", 1, 20, "AssertionError")]
    names = ("test", "multiple", "examples", "failure")
    lines = [json.dumps(dict(zip(names, row, strict=True)) | {"seconds": 2.0}) for row in rows]
    (tmp_path / "deep.jsonl").write_text("\n".join(lines) + "\n")
    known = read(tmp_path / "deep.jsonl")
    assert known == {"a": Drawn(100, 5_960, 4.0, 0), "b": Drawn(1, 20, 2.0, 1)}
    assert [piece.tests for piece in pieces(known)] == [("b",)] * len(list(pieces(known)))
    told = table(known).splitlines()
    assert told[0].endswith("1 b")
    assert told[-1] == "1 of 2 tests whole, 5,980 examples, failures: 1"
    assert read(tmp_path / "none.jsonl") == {}


def test_a_process_draws_its_multiple_and_counts(tmp_path):
    name, out = "tests/test_profiling.py::test_roofline_bounds_time_and_rate", tmp_path / "deep.jsonl"
    run_pytest(["-q", name], subprocess.DEVNULL, DEEP_MULTIPLE="2", DEEP_OUT=str(out))
    drawn = read(out)[name]
    assert (drawn.multiple, drawn.examples, drawn.failures) == (2, 100, 0)


def test_what_draws_is_known_under_any_decorator():
    def by_a_machine():
        run_state_machine_as_test(None)

    def plain():
        pass

    drawn = (by_a_machine, given(st.integers())(plain))
    assert all(
        draws(wrap(test)) for test in drawn for wrap in (lambda test: test, torch.no_grad(), torch.enable_grad())
    )
    assert not draws(plain)
    assert not draws(torch.no_grad()(plain))
