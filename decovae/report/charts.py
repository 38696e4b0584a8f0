"""Charts as inline SVG: they need no script, scale with the page, print sharply, and their text is text.

A chart is drawn 360 units wide, the width of a phone; a page sets several side by side, so that labels keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

WIDTH = 360
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34
LINE_HEIGHT = 208
ROW = 24
LABELS = 132
"""Room for the names of a spread chart's rows."""

DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2")
"""So that lines differ without their colours too."""


@dataclass(frozen=True)
class Line:
    """A curve: its name, its colour, its place among the curves of all charts, and x and y in ascending x."""

    label: str
    colour: str
    place: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Spread:
    """A row of values, one a volume."""

    label: str
    colour: str
    values: Sequence[float]


def line_chart(lines: Sequence[Line], *, name: str, x_label: str) -> Markup:
    """Curves in one pair of axes, the vertical one linear; values that are not finite are left out.

    Args:
        lines: at least one of them with a point.
        name: of what is drawn, for who cannot see it; each curve's last value follows it.
        x_label: under the horizontal axis.
    """
    lines = [Line(line.label, line.colour, line.place, _finite(line.points)) for line in lines]
    lines = [line for line in lines if line.points]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_scale = _Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, tight=True)
    y_scale = _Scale(min(ys), max(ys), LINE_HEIGHT - BOTTOM, TOP)
    parts = [*_horizontal_axis(x_scale, LINE_HEIGHT - BOTTOM, x_label)]
    for tick in y_scale.ticks:
        y = y_scale(tick)
        parts.append(_svg("line", cls="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(_text(_number(tick, y_scale.step), LEFT - 6, y + 3.5, anchor="end"))
    for line in lines:
        path = " ".join(f"{x_scale(x):.1f},{y_scale(y):.1f}" for x, y in line.points)
        dash = DASHES[line.place % len(DASHES)]
        parts.append(_svg("polyline", cls="curve", points=path, stroke=line.colour, stroke_dasharray=dash))
        if len(line.points) <= 12:
            parts += [_svg("circle", cx=x_scale(x), cy=y_scale(y), r=2.2, fill=line.colour) for x, y in line.points]
    last = "; ".join(f"{line.label}: {line.points[-1][1]:.4g}" for line in lines)
    return _figure(parts, LINE_HEIGHT, f"Line chart of {name}. Last values: {last}.")


def spread_chart(rows: Sequence[Spread], *, name: str, x_label: str) -> Markup:
    """Values as dots, a row a set, over a bar from the lower to the upper quartile with a line at the median.

    Args:
        rows: each with at least one value.
        name: of what is drawn; each row's median and quartiles follow it.
        x_label: under the axis, with the unit.
    """
    values = [value for row in rows for value in row.values]
    scale = _Scale(min(values), max(values), LABELS, WIDTH - RIGHT)
    bottom = TOP + ROW * len(rows)
    parts = [*_horizontal_axis(scale, bottom, x_label, top=TOP)]
    told = []
    for place, row in enumerate(rows):
        middle = TOP + ROW * (place + 0.5)
        low, median, high = (float(value) for value in np.quantile(row.values, (0.25, 0.5, 0.75)))
        told.append(f"{row.label}: median {median:.4g}, quartiles {low:.4g} to {high:.4g}, {len(row.values)} volumes")
        parts.append(_text(_shortened(row.label), LABELS - 8, middle + 3.5, anchor="end", cls="row"))
        width = max(scale(high) - scale(low), 1)
        parts.append(_svg("rect", cls="box", x=scale(low), y=middle - 8, width=width, height=16, fill=row.colour))
        for number, value in enumerate(row.values):
            off = 5 * math.sin(2.4 * number)  # spread evenly enough, and the same on every page
            parts.append(_svg("circle", cls="dot", cx=scale(value), cy=middle + off, r=2, fill=row.colour))
        x = scale(median)
        parts.append(_svg("line", cls="median", x1=x, x2=x, y1=middle - 9, y2=middle + 9))
    return _figure(parts, bottom + BOTTOM, f"Distribution of {name}. {'; '.join(told)}.")


def legend(entries: Iterable[tuple[str, str, int]]) -> Markup:
    """A list that says which line is whose: label, colour and place of each."""
    items = [
        Markup('<li><svg viewBox="0 0 28 10" aria-hidden="true" focusable="false">{}</svg>{}</li>').format(
            _svg("line", cls="curve", x1=1, x2=27, y1=5, y2=5, stroke=colour, stroke_dasharray=DASHES[place % 6]),
            label,
        )
        for label, colour, place in entries
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


class _Scale:
    """From values between `low` and `high` to places between `start` and `stop`, with some room and round ticks."""

    def __init__(self, low: float, high: float, start: float, stop: float, *, tight: bool = False) -> None:
        span = high - low or abs(high) or 1.0
        if not tight or high == low:
            low, high = low - 0.04 * span, high + 0.04 * span
        self.low, self.high, self.start, self.stop = low, high, start, stop
        self.step = _round_step((high - low) / 5)
        first, last = math.ceil(low / self.step - 1e-9), math.floor(high / self.step + 1e-9)
        self.ticks = [count * self.step for count in range(first, last + 1)]

    def __call__(self, value: float) -> float:
        return self.start + (self.stop - self.start) * (value - self.low) / (self.high - self.low)


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= 0.999 * least)


def _number(value: float, step: float) -> str:
    if step >= 1000:
        return f"{value / 1000:g}k" if value else "0"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step, decimals) != step and abs(round(step, decimals) - step) > 1e-9 * step:
        decimals += 1  # 0.25
    return f"{value:.{decimals}f}".replace("-", "−") if value else "0"


def _finite(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _shortened(label: str, most: int = 23) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def _horizontal_axis(scale: _Scale, y: float, label: str, *, top: float | None = None) -> Iterator[Markup]:
    for tick in scale.ticks:
        x = scale(tick)
        yield _svg("line", cls="grid", x1=x, x2=x, y1=y + 4 if top is None else top, y2=y)
        yield _text(_number(tick, scale.step), x, y + 15)
    yield _svg("line", cls="axis", x1=scale.start, x2=scale.stop, y1=y, y2=y)
    yield _text(label, (scale.start + scale.stop) / 2, y + 30)


def _text(text: str, x: float, y: float, *, anchor: str = "middle", cls: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        cls, f"{x:.1f}", f"{y:.1f}", anchor, text
    )


def _svg(tag: str, *, cls: str = "", **attributes: float | str) -> Markup:
    given = {"class": cls, **{name.replace("_", "-"): value for name, value in attributes.items()}}
    texts = {name: f"{value:.4g}" if isinstance(value, int | float) else value for name, value in given.items()}
    inside = "".join(f' {name}="{escape(text)}"' for name, text in texts.items() if text != "")
    return Markup(f"<{tag}{inside}/>")


def _figure(parts: Iterable[Markup], height: float, description: str) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, round(height), description, Markup("").join(parts)
    )
