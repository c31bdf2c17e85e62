"""Charts as inline SVG: curves, bars with intervals, histograms, confusion matrix, reliability, grades.

Pure functions from numbers to `Markup`. Colors are `currentColor` and the variables of templates/base.html, so that
charts follow the page into dark mode; every chart has a title for screen readers, and curves are named at their ends.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from run.files import shortened

WIDTH, HEIGHT = 380, 240
LABEL_HEIGHT = 13
NUM_COLORS = 8  # --series-1 ... of templates/base.html
TEXT_UP_TO = 25  # classes; the cells of larger confusion matrices are too small for text
MATRIX_SIDE = 900  # pixels of the cells of a large one
MAX_POINTS = 1000  # of a curve or a scatter plot
BINS = 30  # of a histogram


@dataclass
class Curve:
    """xs, ys: (n,) numbers; points that are not finite are left out. color: 1 to NUM_COLORS.

    faint: thin and pale, for the background of others. A curve with an empty name has none at its end.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int = 1
    dashed: bool = False
    faint: bool = False


class _Plane:
    """Pixel coordinates of a rectangle with axes. x_range, y_range: (low, high) of the data."""

    def __init__(self, x_range, y_range, log=False, width=WIDTH, height=HEIGHT, margins=(20, 12, 38, 44)):
        top, right, bottom, left = margins
        self.width, self.height, self.log = width, height, log
        self.left, self.right, self.top, self.bottom = left, width - right, top, height - bottom
        self.x_range, self.y_range = _widened(*x_range), _widened(*map(self._scaled, y_range))

    def _scaled(self, y):
        return math.log10(y) if self.log else y

    def x(self, value):
        low, high = self.x_range
        return round(self.left + (value - low) / (high - low) * (self.right - self.left), 1)

    def y(self, value):
        low, high = self.y_range
        return round(self.bottom - (self._scaled(value) - low) / (high - low) * (self.bottom - self.top), 1)

    def axes(self, x_label, x_ticks, y_ticks, y_label=""):
        """Grid, tick labels and axis labels. ticks: [(value, text)]"""
        parts = []
        for value, text in y_ticks:
            y = self.y(value)
            parts.append(_line(self.left, y, self.right, y, "var(--line)"))
            parts.append(_text(self.left - 6, y + 4, text, "end", muted=True))
        for value, text in x_ticks:
            parts.append(_text(self.x(value), self.bottom + 16, text, "middle", muted=True))
        parts.append(_line(self.left, self.bottom, self.right, self.bottom, "var(--muted)"))
        parts.append(_text((self.left + self.right) / 2, self.bottom + 33, x_label, "middle", muted=True))
        if y_label:
            parts.append(_text(0, 10, y_label, muted=True))
        return parts


def line_chart(
    title: str,
    curves: Sequence[Curve],
    x_label: str,
    *,
    y_label: str = "",
    y_range: tuple[float, float] | None = None,
    log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    width: int = WIDTH,
    height: int = HEIGHT,
) -> Markup:
    """Curves with their names at their right ends. marks: (x, text or "") of vertical lines; log: the axis of y."""
    points = [_thinned([(x, y) for x, y in _pairs(curve) if y > 0 or not log]) for curve in curves]
    xs = [x for curve in points for x, _ in curve] or [0, 1]
    ys = [y for curve in points for _, y in curve] or [1, 2]
    low, high = y_range or (min(ys), max(ys))
    room = 12 + min(130, max((_text_width(shortened(curve.name, 22)) for curve in curves), default=0))
    plane = _Plane((min(xs), max(xs)), (low, high), log, width, height, (32 if y_label else 20, room, 38, 44))
    y_ticks = _log_ticks(low, high) if log else _ticks(low, high)
    x_ticks = _ticks(min(xs), max(xs), 5 if width > 250 else 2, whole=x_label == "epoch")
    parts = plane.axes(x_label, x_ticks, y_ticks, y_label)
    for x, text in marks:
        parts.append(_line(plane.x(x), plane.top, plane.x(x), plane.bottom, "var(--muted)", "2 3"))
        half = _text_width(text) / 2
        # beside the numbers of the axis and the names of the curves, not on them
        anchor = "start" if plane.x(x) - half < plane.left else "end" if plane.x(x) + half > plane.right else "middle"
        parts.append(_text(plane.x(x), plane.top - 5, text, anchor, muted=True))
    labels = []
    for curve, line in zip(curves, points, strict=True):
        if not line:
            continue
        color, dashes = f"var(--series-{(curve.color - 1) % NUM_COLORS + 1})", ' stroke-dasharray="5 3"'
        path = " ".join(f"{plane.x(x)},{plane.y(min(max(y, low), high))}" for x, y in line)
        stroke = 'stroke-width="1" stroke-opacity=".45"' if curve.faint else 'stroke-width="1.8"'
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" {stroke}{dashes * curve.dashed}/>')
        if curve.faint:
            continue
        x, y = plane.x(line[-1][0]), plane.y(min(max(line[-1][1], low), high))
        parts.append(f'<circle cx="{x}" cy="{y}" r="2.2" fill="{color}"/>')
        if curve.name:
            labels.append((y, shortened(curve.name, 22), color))
    for y, text, color in _spread(labels, plane.top, plane.bottom):
        parts.append(_text(plane.right + 6, y + 4, text, color=color))
    return _svg(title, width, height, parts)


def interval_bar(value: float, interval: Sequence[float] | None, width: int = 84) -> Markup:
    """A bar from 0 to `value`, 0..1, with its interval as a line."""
    parts = [f'<rect x="0" y="3" width="{width}" height="10" rx="2" fill="var(--line)" fill-opacity=".5"/>']
    parts.append(f'<rect x="0" y="3" width="{value * width:.1f}" height="10" rx="2" fill="var(--accent)" '
                 'fill-opacity=".55"/>')  # fmt: skip
    title = f"{value:.3f}"
    if interval is not None:
        low, high = (min(max(bound, 0), 1) * width for bound in interval)
        title += f", 95 % interval {interval[0]:.3f} to {interval[1]:.3f}"
        for x in (low, high):
            parts.append(_line(x, 4.5, x, 11.5, "currentColor"))
        parts.append(_line(low, 8, high, 8, "currentColor"))
    return _svg(title, width, 16, parts, fixed=True)


def count_bar(count: int, largest: int, width: int = 70) -> Markup:
    """A bar as long as a count is compared with the largest one."""
    length = max(1.0 if count else 0.0, width * count / max(1, largest))
    bar = f'<rect x="0" y="3" width="{length:.1f}" height="10" rx="2" fill="var(--muted)" fill-opacity=".55"/>'
    return _svg(f"{count}", width, 16, [bar], fixed=True)


def confusion_chart(title: str, matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Markup:
    """Rows: true classes, columns: predictions; the color is the share of the true class. Cells of 0 are empty.

    matrix: (C, C) int.
    """
    matrix, names = np.asarray(matrix), [shortened(name, 20) for name in classes]
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    with_text = len(names) <= TEXT_UP_TO
    cell = 46 if with_text else max(8, MATRIX_SIDE // len(names))
    size = min(12, cell)
    label_room = math.ceil(max(map(_text_width, names)) * size / 12) + 8
    slanted = label_room > cell
    left, top = label_room, 10 + (math.ceil(label_room * 0.75) if slanted else 12)
    width, height = left + cell * len(names) + (label_room if slanted else 4), top + cell * len(names) + 4
    parts = []
    for c, name in enumerate(names):
        middle = (c + 0.5) * cell
        x, y = left + middle, top - 6
        parts.append(_text(left - 6, top + middle + size * 0.35, name, "end", size=size))
        label = _text(x, y, name, "start" if slanted else "middle", size=size)
        parts.append(f'<g transform="rotate(-40 {x:.1f} {y})">{label}</g>' if slanted else label)
    parts.append(f'<rect x="{left}" y="{top}" width="{cell * len(names)}" height="{cell * len(names)}" fill="none" '
                 'stroke="var(--line)"/>')  # fmt: skip
    for row, column in np.argwhere(matrix).tolist():
        share, x, y = shares[row, column], left + column * cell, top + row * cell
        about = f"{names[row]} predicted as {names[column]}: {matrix[row, column]} ({share:.1%})"
        parts.append(f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" fill="var(--accent)" '
                     f'fill-opacity="{0.08 + 0.92 * share:.2f}"><title>{escape(about)}</title></rect>')  # fmt: skip
        if with_text:
            color = "var(--page)" if share > 0.65 else "currentColor"
            parts.append(_text(x + cell / 2, y + cell / 2 - 2, f"{share:.0%}", "middle", color=color))
            parts.append(
                _text(x + cell / 2, y + cell / 2 + 12, f"{matrix[row, column]}", "middle", color=color, size=11)
            )
    return _svg(title, width, height, parts, fixed=True)


def reliability_chart(title: str, bins: Sequence[tuple[float, float, int]]) -> Markup:
    """bins: (mean confidence, share of right predictions, number of images) of bins of the confidence."""
    plane = _Plane((0, 1), (0, 1), height=310, margins=(32, 12, 78, 44))
    ticks = [(tick / 5, f"{tick / 5:.1f}") for tick in range(6)]
    parts = plane.axes("", ticks, ticks, "share of right predictions")
    parts.append(_line(plane.x(0), plane.y(0), plane.x(1), plane.y(1), "var(--muted)", "4 4"))
    parts.append(_text(plane.x(0.02), plane.y(0.93), "too careful", muted=True))
    parts.append(_text(plane.x(0.98), plane.y(0.04), "too sure", "end", muted=True))
    most = max((number for *_, number in bins), default=1)
    for confidence, right, number in bins:
        x, y, height = plane.x(confidence), plane.y(right), 26 * number / most
        parts.append(_line(x, plane.y(confidence), x, y, "var(--series-2)"))
        about = f"confidence {confidence:.2f}: {right:.2f} right, {number} images"
        radius = 2.5 + 5 * math.sqrt(number / most)
        parts.append(f'<circle cx="{x}" cy="{y}" r="{radius:.1f}" fill="var(--accent)" fill-opacity=".75">'
                     f'<title>{about}</title></circle>')  # fmt: skip
        base = plane.bottom + 50
        parts.append(f'<rect x="{x - 4}" y="{base - height:.1f}" width="8" height="{height:.1f}" fill="var(--muted)" '
                     f'fill-opacity=".55"><title>{about}</title></rect>')  # fmt: skip
    parts.append(_line(plane.left, plane.bottom + 50, plane.right, plane.bottom + 50, "var(--muted)"))
    parts.append(_text(plane.left - 6, plane.bottom + 46, "images", "end", muted=True))
    parts.append(_text((plane.left + plane.right) / 2, plane.bottom + 67, "confidence", "middle", muted=True))
    return _svg(title, plane.width, plane.height, parts)


def histogram_chart(title: str, values: np.ndarray, x_label: str, *, log: bool = False) -> Markup:
    """How often values occur. values: (n,) numbers; log: the axis of x, for values above 0."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    low, high = (float(values.min()), float(values.max())) if len(values) else (1.0, 2.0)

    def place(x):
        return math.log10(x) if log else x

    edges = np.linspace(*_widened(place(low), place(high)), BINS + 1)
    counts = np.histogram(np.log10(values) if log else values, edges)[0].tolist()
    plane = _Plane((edges[0], edges[-1]), (0, max(1, *counts)), margins=(32, 12, 38, 52))
    ticks = _log_ticks(low, high) if log else _ticks(low, high)
    y_ticks = _ticks(0, max(1, *counts), whole=True)
    parts = plane.axes(x_label, [(place(x), text) for x, text in ticks], y_ticks, "photographs")
    for count, left, right in zip(counts, edges, edges[1:], strict=False):
        if count:
            x, y = plane.x(left), plane.y(count)
            bounds = f"{10**left:.4g} to {10**right:.4g}" if log else f"{left:.4g} to {right:.4g}"
            parts.append(f'<rect x="{x}" y="{y}" width="{max(1, plane.x(right) - x - 1):.1f}" '
                         f'height="{plane.bottom - y:.1f}" fill="var(--accent)" fill-opacity=".75">'
                         f'<title>{bounds}: {count}</title></rect>')  # fmt: skip
    return _svg(title, plane.width, plane.height, parts)


def grade_chart(title: str, grades: np.ndarray, answers: np.ndarray, classes: Sequence[str]) -> Markup:
    """The grade of the expert against the expected grade of the model, one dot per image, and the mean per grade.

    grades: (N,) int; answers: (N,) float; of more than MAX_POINTS images, some are drawn at random.
    """
    rng, last = np.random.default_rng(0), len(classes) - 1
    plane = _Plane((-0.5, last + 0.5), (-0.3, last + 0.3), height=310, margins=(32, 12, 38, 44))
    ticks = [(c, shortened(name, 8)) for c, name in enumerate(classes)]
    step = math.ceil(len(ticks) / 12)
    parts = plane.axes("grade of the expert", ticks[::step], ticks[::step], "expected grade of the model")
    parts.append(_line(plane.x(0), plane.y(0), plane.x(last), plane.y(last), "var(--muted)", "4 4"))
    shown = np.arange(len(grades))
    if len(grades) > MAX_POINTS:
        shown = np.sort(rng.choice(len(grades), MAX_POINTS, replace=False))
    jitter = rng.uniform(-0.3, 0.3, len(shown))
    for i, shift in zip(shown.tolist(), jitter.tolist(), strict=True):
        x, y = plane.x(grades[i] + shift), plane.y(float(answers[i]))
        parts.append(f'<circle cx="{x}" cy="{y}" r="2.4" fill="var(--accent)" fill-opacity=".4"/>')
    for grade in np.unique(grades).tolist():
        mean = float(answers[grades == grade].mean())
        y = plane.y(mean)
        parts.append(f'<line x1="{plane.x(grade - 0.38)}" y1="{y}" x2="{plane.x(grade + 0.38)}" y2="{y}" '
                     f'stroke="var(--series-2)" stroke-width="3"><title>mean {mean:.2f}</title></line>')  # fmt: skip
    return _svg(title, plane.width, plane.height, parts)


# ------------------------------------------------------------------------------------------------------------ pieces


def _svg(title, width, height, parts, fixed=False):
    size = f' width="{width}" height="{height}"' if fixed else ""
    return Markup(
        f'<svg role="img" viewBox="0 0 {width} {height}"{size}><title>{escape(title)}</title>{"".join(parts)}</svg>'
    )


def _text(x, y, text, anchor="start", *, muted=False, color=None, size=None):
    style = f"fill:{color or 'var(--muted)'};" if color or muted else ""
    style += f"font-size:{size}px;" if size else ""
    style = f' style="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def _line(x1, y1, x2, y2, color, dashes=""):
    dashes = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"{dashes}/>'


def _text_width(text):
    """Pixels, roughly, at 12 px."""
    return sum(12.5 if unicodedata.east_asian_width(letter) in "WF" else 6.8 for letter in text)


def _pairs(curve):
    return [(x, y) for x, y in zip(curve.xs, curve.ys, strict=True) if math.isfinite(x) and math.isfinite(y)]


def _thinned(points):
    """At most MAX_POINTS of them, with the first and the last."""
    if len(points) <= MAX_POINTS:
        return points
    return [points[i] for i in np.linspace(0, len(points) - 1, MAX_POINTS).round().astype(int).tolist()]


def _widened(low, high):
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _ticks(low, high, most=5, whole=False):
    """[(value, text)]: round numbers with at most this many steps between them. whole: only whole numbers"""
    if high <= low:
        return [(low, f"{low:g}")]
    size = 10 ** math.floor(math.log10((high - low) / most))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (size * factor) <= most)
    step = max(1, math.ceil(step)) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(k * step, f"{k * step:.6g}") for k in range(first, last + 1)]


def _log_ticks(low, high):
    """Powers of ten, or round numbers where there are too few of them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [(10.0**power, f"{10.0**power:g}") for power in powers if low <= 10.0**power <= high]
    return ticks[:: math.ceil(len(ticks) / 6)] if len(ticks) > 2 else _ticks(low, high)


def _spread(labels, top, bottom):
    """Move labels (y, text, color) apart so that they do not overlap, as far as there is room."""
    labels = sorted(labels)
    step = min(LABEL_HEIGHT, (bottom - top) / max(1, len(labels) - 1))
    places = []
    for y, *_ in labels:
        places.append(max(y, places[-1] + step) if places else max(y, top))
    for i in reversed(range(len(places))):
        places[i] = min(places[i], places[i + 1] - step if i + 1 < len(places) else bottom)
    return [(y, *rest) for y, (_, *rest) in zip(places, labels, strict=True)]
