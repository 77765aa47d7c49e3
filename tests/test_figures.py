"""Figures: a single point is seen, legends hide nothing, and where nothing could be read it is said."""

import matplotlib.pyplot as plt
import pytest

from bonelib.views import figures

NAN = float("nan")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def outside(axis):
    """Whether the legend lies above what the axis shows."""
    axis.get_figure().canvas.draw()
    return axis.get_legend().get_window_extent().y0 >= axis.get_window_extent().y1 - 1


def test_a_curve_of_one_point_is_seen_and_one_of_none_is_said():
    table = [{"seen": 3, "a": 1.0, "b": 2.0, "none": NAN}]
    one, none = figures.curves(table, "seen", [("one", ["a", "b"]), ("none", ["none"])]).axes
    assert all(line.get_marker() == "o" for line in one.lines) and outside(one) and not one.texts
    assert [t.get_text() for t in none.texts] == ["nothing could be read"]
    many = figures.curves([{"seen": i, "a": i} for i in range(100)], "seen", [("a", ["a"])]).axes[0]
    assert many.lines[0].get_marker() in ("None", None) and not many.texts


def test_bands_of_one_point_have_an_interval_and_a_title_above_their_legend():
    row, lost = dict(at=1, value=0.5, low=0.2, high=0.8), dict(at=1, value=None, low=None, high=None)
    panels = [dict(title="t", x="x", y="y", lines={f"a long name of line {i}": [r] for i, r in enumerate((row, lost))})]
    (axis,) = figures.bands(panels, "at").axes
    assert outside(axis) and len(axis.collections) == 2 and not axis.texts
    title, legend = axis.title.get_window_extent(), axis.get_legend().get_window_extent()
    assert title.y0 >= legend.y1 - 1
    (empty,) = figures.bands([panels[0] | dict(lines={"lost": [lost]})], "at").axes
    assert empty.texts


def test_histograms_and_dots_of_nothing_say_so():
    full, none = figures.histograms({"a": {"x": [1.0, 2.0], "y": []}, "b": {"x": [], "y": []}}).axes
    assert outside(full) and not full.texts and none.texts
    dots = [dict(x="x", y="y", sets={"": ([], [])}), dict(x="x", y="y", sets={"": ([1], [1])})]
    none, one = figures.scatter(dots).axes
    assert none.texts and not one.texts
