"""The scatter of the points as SVG: drawn for one pair of rewards, with all that the page's script needs for others.

Every circle carries, for each reward, where it lies on that reward's axis, as a share of its length; so the script
places circles without knowing a score, and nothing that a user wrote is part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from marble.pareto.fronts import label_of
from marble.report.figures import COLOURS

LEFT, TOP, WIDTH, HEIGHT = 66, 12, 470, 400
"""The plot's area in the figure's units."""
BASE_COLOUR = "#222222"
RIMS = ("#111111", "#9a9aa5", "#f2c200")
"""Around points (inside hollow ones) whose colour another method has already."""
RADIUS = 6.0


@dataclass(frozen=True)
class Axis:
    """A reward's axis, long enough for all points and their intervals."""

    name: str
    low: float
    high: float

    @classmethod
    def of(cls, name: str, content: dict[str, Any]) -> Axis:
        """With a margin of a twentieth on both sides."""
        ends = [v for point in content["points"] for v in (ends_of(content, point, name) or [])]
        ends += [mean for point in content["points"] if (mean := point["means"][name]) is not None]
        low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
        margin = 0.05 * (high - low) or 0.05 * abs(low) or 1.0
        return cls(name, low - margin, high + margin)

    def share(self, value: float) -> float:
        """Where on the axis, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(share, label) of about five round numbers."""
        values = [v for v in MaxNLocator(5).tick_values(self.low, self.high) if self.low <= v <= self.high]
        digits = max(0, 1 - int(np.floor(np.log10(values[1] - values[0])))) if len(values) > 1 else 3
        return [(self.share(v), f"{v:.{digits}f}") for v in values]


def ends_of(content: dict[str, Any], point: dict[str, Any], name: str) -> tuple[float, float] | None:
    """The interval of a point's score beside the base's: that of its gain, prompts paired, around its mean."""
    if point["means"][name] is None or point["gain_intervals"][name] is None:
        return None
    spread = content["spreads"][name]
    low, high = (spread * (end - point["gains"][name]) for end in point["gain_intervals"][name])
    return point["means"][name] + low, point["means"][name] + high


def paint(points: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A colour for every method, as the value of `--c`; the base's is nearly black. Used again, it has a rim."""
    methods = [m for m in dict.fromkeys(p["method"] for p in points) if m]
    rounds, count = ["", *(f";--rim:{rim}" for rim in RIMS)], len(COLOURS)
    return {"": BASE_COLOUR} | {
        method: COLOURS[i % count] + rounds[i // count % len(rounds)] for i, method in enumerate(methods)
    }


def scatter(content: dict[str, Any]) -> str:
    """The figure of `pareto.json`'s content, showing the first two of its chosen rewards, a third as the size."""
    names, points = content["names"], content["points"]
    axes = [Axis.of(name, content) for name in names]
    x, y, *third = (names.index(name) for name in content["rewards"])
    colours = paint(points)
    marks = [_mark(content, i, axes, (x, y, *third), colours[point["method"]]) for i, point in enumerate(points)]
    bottom, right = TOP + HEIGHT, LEFT + WIDTH
    front = sorted(
        (LEFT + axes[x].share(p["means"][names[x]]) * WIDTH, TOP + (1 - axes[y].share(p["means"][names[y]])) * HEIGHT)
        for p in points
        if _letter(content, p, names[x], names[y]) == "f"
    )
    return (
        f'<svg id="plot" viewBox="0 0 {right + 14} {bottom + 46}" role="group" aria-label="Points by two rewards" '
        f'data-box="{LEFT} {TOP} {WIDTH} {HEIGHT}" data-rewards="{len(names)}">'
        + "".join(_x_axis(k, axis, k != x) + _y_axis(k, axis, k != y) for k, axis in enumerate(axes))
        + f'<path class="edge" d="M{LEFT} {TOP}V{bottom}H{right}"/>'
        + f'<path id="front" d="{_steps(front)}"/>'
        + "".join(cross for cross, _ in marks)
        + "".join(circle for _, circle in marks)
        + "</svg>"
    )


def _mark(content: dict[str, Any], i: int, axes: Sequence[Axis], shown: Sequence[int], colour: str) -> tuple[str, str]:
    """A point's cross of intervals and its circle, for the rewards `shown`: across, up and maybe size."""
    point, names = content["points"][i], content["names"]
    x, y, *third = shown
    letters = [_letter(content, point, a, b) if a != b else "-" for a in names for b in names]
    shares: dict[str, list[str]] = {"at": [], "low": [], "high": []}
    for axis in axes:
        low, high = ends_of(content, point, axis.name) or (axis.low, axis.low)
        mean = axis.low if point["means"][axis.name] is None else point["means"][axis.name]
        for key, value in (("low", low), ("at", mean), ("high", high)):
            shares[key].append(f"{axis.share(value):.4f}")
    letter = letters[x * len(names) + y]
    hidden = _none(letter == "-")
    (cx, cy), (left, down), (right, up) = (
        (LEFT + float(shares[key][x]) * WIDTH, TOP + (1 - float(shares[key][y])) * HEIGHT)
        for key in ("at", "low", "high")
    )
    radius = RADIUS if not third else 3 + 9 * float(shares["at"][third[0]])
    data = "".join(f' data-{key}="{" ".join(values)}"' for key, values in shares.items())
    scores = (f"{name} {mean:.4g}" for name, mean in point["means"].items() if mean is not None)
    title = escape(f"{point['name']} ({point['kind']}): {', '.join(scores) or 'no score'}")
    paint = f'style="--c:{colour}"'
    cross = f"M{left:.1f} {cy:.1f}H{right:.1f}M{cx:.1f} {down:.1f}V{up:.1f}"
    return (
        f'<path class="cross" {paint} d="{cross}"{hidden}/>',
        f'<circle data-index="{i}" data-states="{"".join(letters)}"{data} class="{point["kind"]} {letter}" {paint} '
        f'cx="{cx:.1f}" cy="{cy:.1f}" r="{radius:.1f}" tabindex="0" role="button" aria-label="{title}"{hidden}>'
        f"<title>{title}</title></circle>",
    )


def _letter(content: dict[str, Any], point: dict[str, Any], a: str, b: str) -> str:
    row = point["fronts"][_pair(content, a, b)]
    if row is None:
        return "-"
    return "f" if row["front"] else "d" if row["told_apart"] else "n"


def _pair(content: dict[str, Any], a: str, b: str) -> str:
    """What two rewards' set is called, in whichever order."""
    return label_of((a, b)) if label_of((a, b)) in content["sets"] else label_of((b, a))


def _steps(front: Sequence[tuple[float, float]]) -> str:
    """The edge of what a front dominates: level up to a point, then down to the next one's height."""
    parts = [f"M{LEFT} {y:.1f}H{x:.1f}" if i == 0 else f"V{y:.1f}H{x:.1f}" for i, (x, y) in enumerate(front)]
    return "".join(parts) + (f"V{TOP + HEIGHT}" if parts else "")


def _x_axis(k: int, axis: Axis, hidden: bool) -> str:
    bottom = TOP + HEIGHT
    ticks = "".join(
        f'<path d="M{LEFT + share * WIDTH:.1f} {TOP}V{bottom}"/>'
        f'<text x="{LEFT + share * WIDTH:.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>'
        for share, label in axis.ticks
    )
    title = (
        f'<text class="name" x="{LEFT + WIDTH / 2}" y="{bottom + 38}" text-anchor="middle">{escape(axis.name)}</text>'
    )
    return f'<g class="axis" data-axis="x{k}"{_none(hidden)}>{ticks}{title}</g>'


def _y_axis(k: int, axis: Axis, hidden: bool) -> str:
    ticks = "".join(
        f'<path d="M{LEFT} {TOP + (1 - share) * HEIGHT:.1f}H{LEFT + WIDTH}"/>'
        f'<text x="{LEFT - 7}" y="{TOP + (1 - share) * HEIGHT + 4:.1f}" text-anchor="end">{label}</text>'
        for share, label in axis.ticks
    )
    turned = f'transform="translate(14 {TOP + HEIGHT / 2}) rotate(-90)"'
    title = f'<text class="name" {turned} text-anchor="middle">{escape(axis.name)}</text>'
    return f'<g class="axis" data-axis="y{k}"{_none(hidden)}>{ticks}{title}</g>'


def _none(hidden: bool) -> str:
    return ' display="none"' if hidden else ""
