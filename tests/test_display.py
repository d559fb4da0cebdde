"""What a chapter shows of the library's source."""

import textwrap

import pytest
import torch

from tformer_lib.attention import attend
from tformer_lib.contract import counted
from tformer_lib.teaching.display import are_identifiers, part, row_name, show_source, under

SOURCE = '''    def area(self):
        """The area."""
        if self.side < 0:
            raise ValueError
        return self.side**2
'''


@pytest.mark.parametrize(
    ("first", "last", "shown"),
    [
        (
            "",
            "",
            textwrap.dedent(SOURCE).rstrip(),
        ),
        ("if self", "raise", "if self.side < 0:\n    raise ValueError"),
        ("return", "", "return self.side**2"),
        ("if", "if", "if self.side < 0:"),
    ],
)
def test_part_of_a_source(first, last, shown):
    assert part(SOURCE, first, last) == shown


@pytest.mark.parametrize(("first", "last"), [("perimeter", ""), ("return", "raise")])
def test_a_line_that_is_not_there_is_named(first, last):
    with pytest.raises(ValueError, match=last or first):
        part(SOURCE, first, last)


def test_show_source_says_the_file(capsys):
    show_source(attend, first="check_inputs", last="scores =")
    shown = capsys.readouterr().out
    assert shown.startswith("From `tformer_lib/attention.py`:\n\n```python\ncheck_inputs(q, k, v, mask)\nscores =")
    assert len(shown.strip().splitlines()) == 6


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["vocab_size", "head_dim", "layers"], True),
        (["model", "beta1, beta2", "weight_decay"], True),
        (["256", "1,024"], False),  # a number is not code
        (["matrix products", "norms, activations, residual sums"], False),
        (["reading the files", "from_hub, bfloat16"], False),
    ],
)
def test_only_identifiers_are_set_as_code(names, code):
    assert are_identifiers(names) == code
    assert row_name("a<b", code) == ("<code>a&lt;b</code>" if code else "a&lt;b")


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (0, "under 1e-5"),
        (torch.tensor(9.9e-6), "under 1e-5"),
        (-1.1e-5, "1.1e-5"),
        (torch.tensor(2.5), "2.5"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_a_difference_is_told_as_a_bound_or_as_it_is(difference, said):
    assert under(difference, 1e-5) == said
    assert under(0, 1e-12) == "under 1e-12"


@pytest.mark.parametrize(
    ("number", "thing", "said"),
    [(0, "block", "0 blocks"), (1, "block", "1 block"), (2, "new token", "2 new tokens")],
)
def test_a_number_of_things_is_said_in_words(number, thing, said):
    assert counted(number, thing) == said
    assert counted(number, "query", "queries") == f"{number} {'query' if number == 1 else 'queries'}"
