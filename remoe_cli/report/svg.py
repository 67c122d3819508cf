"""Drawing charts as SVG text: axes, marks and tables.

Colours and textures are classes of page.css, so that dark mode and print change them.

Every text goes through `escape`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape as _escape

WIDTH, HEIGHT = 400, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 48
_SHAPES = {  # around 0, 0
    "square": '<rect x="-5" y="-5" width="10" height="10"/>',
    "triangle": '<path d="M0-6.5 6 5H-6Z"/>',
    "diamond": '<path d="M0-7 7 0 0 7-7 0Z"/>',
    "down": '<path d="M0 6.5 6-5H-6Z"/>',
    "plus": '<path d="M-2.2-6.5h4.4v4.3h4.3v4.4h-4.3v4.3h-4.4v-4.3h-4.3v-4.4h4.3Z"/>',
    "ring": '<circle r="5.5"/>',
    "cross": '<path d="M-5.5-5.5 5.5 5.5M5.5-5.5-5.5 5.5" class="open"/>',
    "star": '<path d="M0-9 2.4-3 8.6-2.8 3.8 1.2 5.3 7.3 0 3.8-5.3 7.3-3.8 1.2-8.6-2.8-2.4-3Z"/>',
    "dot": '<circle r="3.2"/>',
}


def escape(text: object) -> str:
    """Escape a text for HTML and SVG, between tags and in quotes."""
    return _escape(str(text), quote=True)


@dataclass(frozen=True)
class Axis:
    """One axis of a chart: its label, its ends, and where it has ticks."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Compute how far a value is from the low end to the high one."""
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def x(self, value: float) -> float:
        """Place a value on a horizontal axis, in pixels."""
        return _LEFT + self.share(value) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Place a value on a vertical axis, in pixels."""
        return HEIGHT - _BOTTOM - self.share(value) * (HEIGHT - _TOP - _BOTTOM)


def linear(label: str, low: float, high: float, form: str = "{:g}", parts: int = 5) -> Axis:
    """Make an axis with round ticks.

    >>> [text for _, text in linear("share", 0, 1).ticks]
    ['0', '0.2', '0.4', '0.6', '0.8', '1']
    """
    high = high if high > low else low + 1
    raw = (high - low) / parts
    step = min((unit * 10.0 ** math.floor(math.log10(raw)) for unit in (1, 2, 2.5, 5, 10)), key=lambda one: abs(one - raw))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(label, low, high, tuple((n * step, form.format(round(n * step, 12))) for n in range(first, last + 1)))


def short(value: float) -> str:
    """Write a tick's value in few characters.

    >>> short(0.5), short(2000.0), short(20000.0), short(5e6)
    ('0.5', '2,000', '20K', '5M')
    """
    unit, letter = (1e6, "M") if value >= 1e6 else (1e3, "K") if value >= 1e4 else (1.0, "")
    return f"{value / unit:,g}{letter}"


def logarithmic(label: str, values: Iterable[float], before: str = "") -> Axis:
    """Make a logarithmic axis around values above 0, with ticks at 1, 2 and 5 times powers of ten.

    >>> [text for _, text in logarithmic("ms", [3, 40]).ticks]
    ['5', '10', '20', '50']
    """
    found = [value for value in values if value > 0] or [1.0]
    low, high = min(found) / 1.25, max(found) * 1.25
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    units: tuple[int, ...] = (1, 2, 5) if high / low < 300 else (1,)
    ticks = [unit * 10.0**decade for decade in decades for unit in units]
    return Axis(label, low, high, tuple((tick, before + short(tick)) for tick in ticks if low <= tick <= high), log=True)


def chart(title: str, x: Axis, y: Axis, marks: Iterable[str], description: str) -> str:
    """Draw a chart: axes, grid, and marks that are already placed.

    `description` is read aloud in place of the picture.
    """
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    grid = [f'<path class="grid" d="M{x.x(at):.1f} {_TOP}V{bottom}"/>' for at, _ in x.ticks]
    grid += [f'<path class="grid" d="M{_LEFT} {y.y(at):.1f}H{right}"/>' for at, _ in y.ticks]
    texts = [f'<text x="{x.x(at):.1f}" y="{bottom + 16}" class="tick mid">{escape(text)}</text>' for at, text in x.ticks]
    texts += [f'<text x="{_LEFT - 6}" y="{y.y(at) + 4:.1f}" class="tick end">{escape(text)}</text>' for at, text in y.ticks]
    middle = (_TOP + bottom) / 2
    labels = [
        f'<text x="{(_LEFT + right) / 2}" y="{HEIGHT - 8}" class="label mid">{escape(x.label)}</text>',
        f'<text transform="translate(9 {middle}) rotate(-90)" class="label mid">{escape(y.label)}</text>',
    ]
    frame = f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>'
    return picture(title, description, WIDTH, HEIGHT, [*grid, frame, *marks, *texts, *labels])


def picture(title: str, description: str, width: float, height: float, marks: Iterable[str]) -> str:
    """Wrap marks into an SVG picture with a name and a description."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(f"{title}. {description}")}">' + "".join(marks) + "</svg>"
    )


def line(points: Sequence[tuple[float, float]], kind: str) -> str:
    """Draw a line through points in pixels."""
    return f'<path class="line {kind}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>'


def area(upper: Sequence[tuple[float, float]], lower: Sequence[tuple[float, float]], kind: str) -> str:
    """Fill between two lines."""
    points = [*upper, *reversed(lower)]
    return f'<path class="area {kind}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}Z"/>'


def marker(x: float, y: float, shape: str, kind: str, hint: str = "") -> str:
    """Draw a marker; `hint` shows where the pointer rests on it."""
    return f'<g class="mark {kind}" transform="translate({x:.1f} {y:.1f})">{_SHAPES[shape]}{_title(hint)}</g>'


def box(x: float, y: float, width: float, height: float, kind: str, hint: str = "") -> str:
    """Draw a rectangle, with the texture of its kind on it where it has one."""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.0):.2f}" height="{height:.1f}"'
    texture = f'<rect {place} class="texture {kind}"/>' if kind in ("remote", "gpu", "idle") else ""
    return f'<g class="box {kind}"><rect {place}/>{texture}{_title(hint)}</g>'


def text(x: float, y: float, words: object, kind: str = "") -> str:
    """Write a text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(words)}</text>'


def _title(hint: str) -> str:
    return f"<title>{escape(hint)}</title>" if hint else ""


def key(shape: str, kind: str) -> str:
    """Draw the sample of a legend: a marker, or a filled box."""
    inner = f'<g class="mark {kind}" transform="translate(9 9)">{_SHAPES[shape]}</g>' if shape in _SHAPES else box(1, 3, 16, 12, kind)
    if shape in ("line", "dashed"):
        inner = f'<path class="line {kind}" d="M1 9H17"/>'
    return f'<svg class="key" viewBox="0 0 18 18" aria-hidden="true">{inner}</svg>'


def legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """Write a legend of (shape, kind, text)."""
    return '<ul class="legend">' + "".join(f"<li>{key(shape, kind)}{escape(words)}</li>" for shape, kind, words in entries) + "</ul>"


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a table that scrolls sideways where it is too wide."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        "<tr>" + f'<th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def details(summary: str, inner: str) -> str:
    """Fold something away under a summary."""
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"
