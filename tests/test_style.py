"""The figures' style: what every plot shares draws what it says."""

import matplotlib.pyplot as plt
import pytest

from tformer_lib.teaching import style


@pytest.mark.parametrize("log_y", [False, True])
def test_an_axis_in_powers_of_two_has_the_ticks_that_are_asked_for(log_y):
    fig, ax = plt.subplots()
    ax.plot([256, 512, 1024, 2048], [1.0, 2.0, 4.0, 8.0])
    style.log2_axis(ax, (256, 1024), log_y=log_y)
    assert ax.get_xscale() == "log"
    assert ax.xaxis.get_transform().base == 2
    assert ax.get_yscale() == ("log" if log_y else "linear")
    assert list(ax.get_xticks()) == [256, 1024]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["256", "1,024"]
    assert len(ax.yaxis.get_minorticklocs()) == 0
    style.log2_axis(ax, [512], ["half"], log_y=log_y)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["half"]
    plt.close(fig)
