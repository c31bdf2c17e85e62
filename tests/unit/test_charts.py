"""Charts as inline SVG: right numbers at right places, whatever the names."""

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from charts import (
    MAX_POINTS,
    Curve,
    confusion_chart,
    count_bar,
    grade_chart,
    histogram_chart,
    interval_bar,
    line_chart,
    reliability_chart,
)

NAMES = ["<script>alert(1)</script>", "주름 & 기미", "x" * 200]
CHARTS = {
    "curves": line_chart("<b>", [Curve(name, [0, 1, 2], [1, 0.5, 0.2], c) for c, name in enumerate(NAMES)], "epoch"),
    "one epoch": line_chart("t", [Curve("a", [0], [0.5])], "epoch", log=True),
    "nothing finite": line_chart("t", [Curve("a", [0, 1], [math.nan, math.inf])], "epoch", log=True),
    "no curve": line_chart("t", [], "epoch"),
    "matrix": confusion_chart("t", [[5, 1, 0], [0, 0, 0], [2, 0, 7]], NAMES),
    "bar": interval_bar(0.5, [0.2, 0.9]),
    "bar without an interval": interval_bar(0.0, None),
    "count": count_bar(3, 0),
    "reliability": reliability_chart("t", [(0.3, 0.0, 1), (0.9, 1.0, 500)]),
    "grades": grade_chart("t", np.array([0, 2, 2]), np.array([0.4, 1.5, 2.0]), NAMES),
}


def elements(chart, tag):
    return list(ElementTree.fromstring(chart).iter(tag))


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_is_valid_has_a_title_and_takes_its_colors_from_the_page(name):
    root = ElementTree.fromstring(CHARTS[name])
    assert root.tag == "svg" and root.attrib["role"] == "img" and root[0].tag == "title" and root[0].text
    assert "nan" not in CHARTS[name] and "inf" not in CHARTS[name]
    colors = re.findall(r'(?:fill|stroke)(?:="|:)([^";]+)', CHARTS[name])
    assert {color for color in colors if not re.fullmatch(r"none|currentColor|var\(--[a-z0-9-]+\)", color)} == set()


def test_the_points_of_a_curve_are_at_their_values():
    chart = line_chart("t", [Curve("a", [0, 5, 10], [0, 0.5, 1])], "epoch", y_range=(0, 1))
    (line,) = elements(chart, "polyline")
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in line.attrib["points"].split())
    assert x0 < x1 < x2 and y0 > y1 > y2
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.2) and y1 == pytest.approx((y0 + y2) / 2, abs=0.2)


def test_a_logarithmic_axis_puts_equal_factors_at_equal_distances():
    (line,) = elements(line_chart("t", [Curve("a", [0, 1, 2], [100, 10, 1])], "epoch", log=True), "polyline")
    y0, y1, y2 = (float(point.split(",")[1]) for point in line.attrib["points"].split())
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2) and y1 > y0


def test_names_at_the_ends_of_close_curves_do_not_overlap():
    curves = [Curve(f"curve {i}", [0, 1], [0.5, 0.5 + i / 1000]) for i in range(6)]
    texts = elements(line_chart("t", curves, "epoch", y_range=(0, 1)), "text")
    heights = sorted(float(text.attrib["y"]) for text in texts if text.text.startswith("curve"))
    assert len(heights) == 6 and min(np.diff(heights)) >= 12


def test_a_chart_of_a_long_training_stays_small():
    epochs = range(100_000)
    assert len(line_chart("t", [Curve("a", epochs, epochs)], "epoch")) < 30 * MAX_POINTS
    grades = np.arange(100_000) % 5
    assert len(grade_chart("t", grades, grades.astype(float), list("01234"))) < 150 * MAX_POINTS


def test_a_confusion_matrix_has_shares_and_counts_of_each_cell_that_is_not_empty():
    texts = [text.text for text in elements(CHARTS["matrix"], "text")]
    assert {"83%", "5", "17%", "1", "22%", "2", "78%", "7"} <= set(texts) and "0" not in texts
    titles = [title.text for title in elements(CHARTS["matrix"], "title")[1:]]
    assert titles[0].startswith("<script>") and titles[0].endswith(": 5 (83.3%)") and len(titles) == 4


def test_a_matrix_of_a_hundred_classes_is_drawn_without_text_in_its_cells():
    chart = confusion_chart("t", np.eye(100, dtype=int) * 3, [f"class {c}" for c in range(100)])
    assert len(elements(chart, "rect")) == 101 and len(elements(chart, "text")) == 200


def test_a_bar_and_its_interval_are_as_long_as_their_values():
    bars = elements(interval_bar(0.25, [0.1, 0.5], width=200), "rect")
    assert float(bars[1].attrib["width"]) == 50
    lines = elements(interval_bar(0.25, [0.1, 0.5], width=200), "line")
    assert {float(line.attrib["x1"]) for line in lines} == {20, 100}
    assert float(elements(count_bar(1, 10**6), "rect")[0].attrib["width"]) >= 1  # a class with one image is seen


@pytest.mark.parametrize(("epoch", "anchor"), [(0, "start"), (50, "middle"), (99, "end")])
def test_the_name_of_a_mark_stays_inside_the_axes(epoch, anchor):
    chart = line_chart("t", [Curve("a", [0, 99], [0, 1])], "epoch", marks=[(epoch, "best epoch")])
    (mark,) = (text for text in elements(chart, "text") if text.text == "best epoch")
    assert mark.get("text-anchor") == anchor


@pytest.mark.parametrize("log", [False, True])
def test_a_histogram_counts_each_value_once(log):
    values = np.array([1, 2, 2, 3, 40, 1000, np.nan, np.inf] + [0, -1] * log)
    svg = histogram_chart("sizes", values, "pixels", log=log)
    ElementTree.fromstring(svg)
    assert sum(map(int, re.findall(r": (\d+)</title>", svg))) == 6


@pytest.mark.parametrize("values", [[], [5], [7, 7], [0], [np.nan]])
def test_a_histogram_of_few_values_is_a_chart(values):
    for log in (False, True):
        ElementTree.fromstring(histogram_chart("sizes", np.array(values), "pixels", log=log))
