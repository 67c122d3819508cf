"""The look of reports and pictures: colours for light and dark, textures, markers.

Colours differ in lightness, and each has a texture or a marker of its own, so that a grey print and eyes that see colours in another way
tell them apart too. The page takes its colours from here, and so do the pictures that matplotlib draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.colors import LinearSegmentedColormap

Kind = Literal["light", "dark", "print"]

# Name: (light, dark). Text has a contrast of at least 4.5 against its ground, marks one of 3.
COLOURS = {
    "ground": ("#ffffff", "#14181f"),
    "card": ("#f6f7f9", "#1c222c"),
    "text": ("#1a1f29", "#e8ebf0"),
    "soft": ("#525c6b", "#a9b3c1"),
    "line": ("#d4d9e0", "#353e4c"),
    "plan": ("#b3460f", "#ff9d5c"),
    "other": ("#2a6fad", "#7ab8ee"),
    "cpu": ("#4a90c2", "#5fa8dc"),
    "gpu": ("#15406b", "#b9dcf7"),
    "remote": ("#cf6d12", "#e8862c"),
    "stripe": ("#8a3f02", "#6b3200"),
    "idle": ("#a9bfd2", "#4d6175"),
    "fees": ("#6b7280", "#9aa4b2"),
}
# From rare to frequent, evenly spaced: lightness changes in one direction, so that a grey print reads alike.
RAMP = (
    ("#f4f7fb", "#cfe0f0", "#8fbbe0", "#3f84bd", "#174a7e", "#08203e"),
    ("#171d26", "#1d3a58", "#24659b", "#4b9bd4", "#a5d3f3", "#f2faff"),
)
MARKERS = ("square", "triangle", "diamond", "down", "plus", "ring", "cross")
_OF_MATPLOTLIB = {"square": "s", "triangle": "^", "diamond": "D", "down": "v", "plus": "P", "ring": "o", "cross": "X", "star": "*"}
HATCHES = {"cpu": "", "gpu": "xxx", "remote": "////", "idle": "...", "fees": "", "other": ""}


def light(name: str) -> str:
    """Look up a colour on a light ground."""
    return COLOURS[name][0]


def matplotlib_marker(name: str) -> str:
    """Translate a marker's name."""
    return _OF_MATPLOTLIB[name]


def colours(kind: Kind) -> dict[str, str | tuple[str, ...]]:
    """List the colours on a light ground, on a dark one, or in a grey print, with the ramp."""
    at, change = (1, str) if kind == "dark" else (0, grey if kind == "print" else str)
    found: dict[str, str | tuple[str, ...]] = {name: change(pair[at]) for name, pair in COLOURS.items()}
    return found | {"ramp": tuple(change(colour) for colour in RAMP[at])}


def css_colours(kind: Kind) -> str:
    """Write the colours as properties of CSS."""
    found = colours(kind)
    ramp = (f"--ramp-{step}:{colour}" for step, colour in enumerate(found.pop("ramp")))
    return ";".join([*(f"--{name}:{colour}" for name, colour in found.items()), *ramp])


def luminance(colour: str) -> float:
    """Compute the relative luminance of a colour, from 0 (black) to 1 (white).

    Source: WCAG 2.2, relative luminance.
    """
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def grey(colour: str) -> str:
    """Turn a colour into the grey of the same luminance."""
    y = luminance(colour)
    part = round(255 * (12.92 * y if y <= 0.0031308 else 1.055 * y ** (1 / 2.4) - 0.055))
    return f"#{part:02x}{part:02x}{part:02x}"


def ramp() -> LinearSegmentedColormap:
    """Make the ramp a colour map of matplotlib."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("remoe", list(RAMP[0]))


@contextmanager
def pictures(size: float = 9.0) -> Iterator[None]:
    """Draw pictures in this look within the context. `size` is that of the text, in points."""
    from matplotlib import rc_context

    with rc_context(
        {
            "font.size": size,
            "axes.titlesize": size + 1,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": size,
            "axes.labelcolor": light("text"),
            "axes.edgecolor": light("soft"),
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "xtick.color": light("soft"),
            "ytick.color": light("soft"),
            "xtick.labelcolor": light("text"),
            "ytick.labelcolor": light("text"),
            "xtick.labelsize": size - 1,
            "ytick.labelsize": size - 1,
            "grid.color": light("line"),
            "grid.linewidth": 0.7,
            "legend.frameon": False,
            "legend.fontsize": size - 1,
            "hatch.linewidth": 0.6,
            "svg.hashsalt": "remoe",
            "text.parse_math": False,
        }
    ):
        yield


def markers(count: int) -> Sequence[str]:
    """List so many markers, again from the first where there are more than that."""
    return [MARKERS[index % len(MARKERS)] for index in range(count)]


def log_axes(panel: Any, x: str = "{x:,g}", y: str = "{x:,g}") -> None:
    """Make both axes of a picture logarithmic, with so few ticks that their labels do not overlap."""
    panel.set_xscale("log")
    panel.set_yscale("log")
    few_ticks(panel.xaxis, x, 6)
    few_ticks(panel.yaxis, y, 8)


def few_ticks(axis: Any, form: str, most: int) -> None:
    """Give a logarithmic axis of a picture at most so many ticks, without an exponent."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    low, high = sorted(axis.get_data_interval())
    subs = (1.0, 2.0, 5.0) if low > 0 and high / low < 10 ** (most / 3) else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=most))
    axis.set_major_formatter(form)
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
