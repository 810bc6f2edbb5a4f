"""The report's charts: the data, axes and labels that matplotlib draws, and the SVG that goes into the page."""

import itertools
import re

import numpy as np
import pytest

from octvideo.evaluation import charts
from octvideo.evaluation.charts import Chart, Series, draw


def axes_of(*series, percent=False):
    (axes,) = draw(Chart("Title", "step", "rate", series, percent)).axes
    return axes


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 299, [0, 100, 200, 300]),
        (0.9, 1.0, [0.9, 0.92, 0.94, 0.96, 0.98, 1.0]),
        (3, 3, [2.8, 2.9, 3, 3.1, 3.2]),
        (1.3e-6, 4.6e-2, [0, 0.01, 0.02, 0.03, 0.04, 0.05]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    axes = axes_of(Series("one", [low, high], [low, high]))
    for ticks, limits in ((axes.get_xticks(), axes.get_xlim()), (axes.get_yticks(), axes.get_ylim())):
        assert ticks == pytest.approx(expected)
        assert limits == pytest.approx((expected[0], expected[-1]))


def test_a_curve_that_is_0_throughout_has_an_axis():
    low, high = axes_of(Series("one", [0, 1], [0, 0])).get_ylim()
    assert low < 0 < high


def test_ticks_of_small_and_large_numbers_are_short():
    axes = axes_of(Series("one", [0, 300_000], [0, 1e-3]))
    axes.figure.draw_without_rendering()
    for axis, texts, power in (
        (axes.xaxis, ["0", "1", "2", "3"], "1e5"),
        (axes.yaxis, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"], "1e\N{MINUS SIGN}3"),
    ):
        assert [label.get_text() for label in axis.get_ticklabels()] == texts
        assert axis.get_offset_text().get_text() == power


def test_a_chart_draws_its_series_and_says_them():
    lines = [Series("one", [0, 50, 100], [0, 40, 100]), Series("two", [100], [20], [(10, 40)], ["here"])]
    chart = Chart("Title", "step", "share (%)", lines, percent=True)
    (axes,) = draw(chart).axes
    one, two, *caps = axes.lines
    assert one.get_xydata().tolist() == [[0, 0], [50, 40], [100, 100]]
    assert two.get_xydata().tolist() == [[100, 20]]
    assert (one.get_marker(), two.get_marker()) == ("None", "o")
    assert (one.get_color(), two.get_color()) == tuple(charts.COLOURS[:2])
    (bars,) = axes.collections
    assert [segment.tolist() for segment in bars.get_segments()] == [[[100, 10], [100, 40]]]
    assert [cap.get_xydata().tolist() for cap in caps] == [[[100, 10]], [[100, 40]]]
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 100), (0, 100))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "share (%)")
    assert [text.get_text() for text in axes.texts] == ["here"]
    assert chart.text == "share (%) over step. one: 0 at 0, 100 at 100, between 0 and 100; " + (
        "two: 20 at 100, 20 at 100, between 20 and 20."
    )


@pytest.mark.parametrize("y", [[100, 100], [0, 0], [97.5, 99], [3, 100]])
def test_an_axis_of_percents_stays_between_0_and_100(y):
    low, high = axes_of(Series("one", [0, 1], y), percent=True).get_ylim()
    assert 0 <= low <= min(y) <= max(y) <= high <= 100
    assert low < high
    low, high = axes_of(Series("one", [0, 1], [100, 100])).get_ylim()
    assert high > 100  # another chart's axis does not


def test_a_single_point_is_a_mark_and_a_seventh_line_is_dashed():
    lines = axes_of(*[Series("one", [0, 1], [0, 1])] * 7).lines
    assert [line.get_linestyle() for line in lines] == ["-"] * 6 + ["--"]
    assert [line.get_color() for line in lines] == [*charts.COLOURS, charts.COLOURS[0]]
    assert {line.get_marker() for line in lines} == {"None"}
    (single,) = axes_of(Series("one", [3], [4])).lines
    assert single.get_marker() == "o"


def test_a_label_that_would_be_taken_for_another_marks_is_left_out():
    x, labels = [1, 1.02, 1.15, 2], ["alpha 0", "alpha 1", "alpha 2", "alpha 3"]
    axes = axes_of(Series("one", x, [1, 1, 1, 2], [(0, 3)] * 4, labels))
    marks = axes.transData.transform(axes.lines[0].get_xydata())
    for text in axes.texts:
        box = text.get_window_extent()
        nearest = np.hypot(*(marks - (box.min + box.max) / 2).T).argmin()
        assert labels[nearest] == text.get_text()
    assert 2 <= len(axes.texts) < 4


def test_labels_of_marks_do_not_cover_one_another_and_like_ones_stand_once():
    x = [1, 1, 2, 2.05, 3, 3]
    labels = ["alpha 0", "alpha 0", "alpha 1", "alpha 2", "alpha 3", "alpha 4"]
    axes = axes_of(Series("one", x, [1, 1, 1.01, 1, 2, 2.1], [(0, 3)] * 6, labels))
    texts = [text.get_text() for text in axes.texts]
    assert texts.count("alpha 0") == 1
    assert {"alpha 3", "alpha 4"} <= set(texts)
    boxes = [text.get_window_extent() for text in axes.texts]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), (one, other)


def test_the_heat_map_has_a_cell_for_every_pair_that_occurs():
    counts = np.zeros((30, 30), np.int64)
    counts[range(30), range(30)] = 9
    counts[3, 5], counts[7, 2] = 1, 9
    pixels = charts.heat_map(counts)
    assert np.count_nonzero(pixels[..., 3]) == 32
    assert {tuple(colour) for colour in pixels[range(30), range(30), :3]} == {charts.RIGHT}
    assert tuple(pixels[3, 5]) == (*charts.WRONG, round(255 * (0.4 + 0.6 * 0.1)))
    assert tuple(pixels[7, 2]) == (*charts.WRONG, round(255 * (0.4 + 0.6 * 0.5)))
    (axes,) = charts.draw_heat_map(counts).axes
    assert np.array_equal(axes.images[0].get_array(), pixels)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class, number", "class, number")


def test_the_svg_has_the_pages_colours_and_is_always_the_same():
    chart = Chart("Title", "step", "rate", [Series("one", [0, 1], [0, 1]), Series("two", [0], [1], [(0, 2)], ["<b>"])])
    svg = chart.svg
    assert svg == chart.svg
    assert svg.startswith("<svg ")
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]*)", svg)) == {
        *("none", "currentColor", "var(--grid)", "var(--s0)", "var(--s1)")
    }
    assert "&lt;b&gt;" in svg
    assert not re.search(r"https?:|url\(|<style|<metadata", svg)
    other = chart._replace(title="Another").svg
    ids = [set(re.findall(r' id="([^"]*)"', text)) for text in (svg, other)]
    assert not ids[0] & ids[1]  # so that charts of one page never refer to each other's parts
