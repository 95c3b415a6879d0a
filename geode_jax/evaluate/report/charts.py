"""Line charts as inline SVG: no script, no external file, colours from the page's style sheet.

A chart uses the CSS classes `line`, `raw`, `dot`, `grid`, `axis`, `tick`, `label` and, for the
colour of series i, `c<i>` (0 to 7); the page decides what they look like in light and dark.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np

COLOURS = 8
POINTS = 240
"""At most this many points are drawn per series; longer ones become means of equal stretches."""


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
      name: for the legend.
      x: [n] steps, ascending.
      y: [n] values; those that are not finite are not drawn.
      colour: index of the colour, 0 to 7.
      style: "line", "raw" (a faint line behind another) or "dots" (a line with its points marked).
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    style: str = "line"


def smooth(values: Sequence[float], width: int) -> np.ndarray:
    """Moving mean over `width` neighbours, narrower at both ends; ignores what is not finite."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    kernel = np.ones(min(width, len(values)))
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    count = np.convolve(finite.astype(np.float64), kernel, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1.0), np.nan)


def wants_log(values: Sequence[float]) -> bool:
    """A logarithmic axis suits positive values that span more than a factor of 20."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    return bool(values.size and values.min() > 0 and values.max() > 20 * values.min())


def format_number(value: float) -> str:
    """Up to four significant digits without trailing zeros, as axis and legend show it."""
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values (1, 2, 2.5 or 5 times a power of ten) within [low, high]."""
    step = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(step))
    nice = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))
    first = math.ceil(low / nice - 1e-9)
    last = math.floor(high / nice + 1e-9)
    return [round(i * nice, 12) + 0.0 for i in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten within [low, high], every n-th of them; 1-2-5 steps if these are too few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = [10.0**e for e in exponents if low <= 10.0**e <= high]
    if len(decades) >= 3:
        return decades[:: max(1, math.ceil(len(decades) / (count + 1)))]
    steps = [m * 10.0**e for e in exponents for m in (1, 2, 5)]
    return [tick for tick in steps if low <= tick <= high] or linear_ticks(low, high, count)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), POINTS)
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


class _Axes:
    """Maps data to pixels; y may be logarithmic."""

    def __init__(self, x, y, width: int, height: int, left: int, log: bool):
        self.log = log
        self.left, self.right, self.top, self.bottom = left, width - 14, 10, height - 24
        self.x_low, self.x_high = float(np.min(x)), float(np.max(x))
        if self.x_low == self.x_high:
            self.x_low, self.x_high = self.x_low - 0.5, self.x_high + 0.5
        y = np.log10(y) if log else y
        low, high = float(np.min(y)), float(np.max(y))
        # A constant still needs an axis around it.
        margin = 0.06 * (high - low) or (0.1 if log else 0.1 * abs(high) or 1.0)
        self.y_low, self.y_high = low - margin, high + margin

    def px(self, x):
        share = (x - self.x_low) / (self.x_high - self.x_low)
        return self.left + share * (self.right - self.left)

    def py(self, y):
        y = np.log10(y) if self.log else y
        return self.bottom - (y - self.y_low) / (self.y_high - self.y_low) * (
            self.bottom - self.top
        )

    def y_ticks(self) -> list[float]:
        count = max(3, (self.bottom - self.top) // 36)
        if self.log:
            return log_ticks(10.0**self.y_low, 10.0**self.y_high, count)
        return linear_ticks(self.y_low, self.y_high, count)

    def x_ticks(self) -> list[float]:
        return linear_ticks(self.x_low, self.x_high, max(4, (self.right - self.left) // 90))


def _grid(axes: _Axes) -> list[str]:
    parts = []
    for tick in axes.y_ticks():
        y = axes.py(tick)
        parts.append(f'<path class="grid" d="M{axes.left} {y:.1f}H{axes.right}"/>')
        parts.append(
            f'<text class="tick" x="{axes.left - 7}" y="{y + 3.5:.1f}" text-anchor="end">'
            f"{format_number(tick)}</text>"
        )
    parts.append(f'<path class="axis" d="M{axes.left} {axes.bottom}H{axes.right}"/>')
    for tick in axes.x_ticks():
        x = axes.px(tick)
        parts.append(
            f'<path class="axis" d="M{x:.1f} {axes.bottom}v4"/>'
            f'<text class="tick" x="{x:.1f}" y="{axes.bottom + 16}" text-anchor="middle">'
            f"{format_number(tick)}</text>"
        )
    return parts


def line_chart(
    series: Sequence[Series], *, label: str, width: int = 980, height: int = 300, log: bool = False
) -> str:
    """One SVG with all series on common axes; x is the training step.

    Args:
      series: curves; an empty chart is the empty string.
      label: what it shows, for readers who cannot see it.
      width: of the coordinate system; the picture scales with the page.
      height: likewise.
      log: logarithmic y axis; values <= 0 are then not drawn.
    """
    drawn = []
    for one in series:
        x, y = np.asarray(one.x, np.float64), np.asarray(one.y, np.float64)
        keep = np.isfinite(y) & ((y > 0) if log else True)
        if keep.any():
            drawn.append((one, *_thin(x[keep], y[keep])))
    if not drawn:
        return ""
    # From the first to the last step, of which thinning leaves only the middle of a stretch.
    all_x = np.concatenate([np.asarray(one.x, np.float64) for one, _, _ in drawn])
    all_y = np.concatenate([y for _, _, y in drawn])
    axes = _Axes(all_x, all_y, width, height, 52, log)

    parts = _grid(axes)
    for one, x, y in drawn:
        points = [(f"{axes.px(a):.1f}", f"{axes.py(b):.1f}") for a, b in zip(x, y, strict=True)]
        colour = f"c{one.colour % COLOURS}"
        kind = "raw" if one.style == "raw" else "line"
        path = "L".join(f"{a} {b}" for a, b in points)
        parts.append(f'<path class="{kind} {colour}" d="M{path}"/>')
        if one.style == "dots" or len(points) == 1:
            for (a, b), step, value in zip(points, x, y, strict=True):
                title = f"{one.name}, step {format_number(step)}: {format_number(value)}"
                parts.append(
                    f'<circle class="dot {colour}" cx="{a}" cy="{b}" r="3">'
                    f"<title>{html.escape(title)}</title></circle>"
                )
    scale = ", logarithmic" if log else ""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label + scale)}">'
        f"{''.join(parts)}</svg>"
    )


def legend(series: Sequence[Series]) -> str:
    """Names, colours and last values of the series (`raw` ones belong to another's line)."""
    items = []
    for one in series:
        values = [value for value in one.y if math.isfinite(value)]
        if one.style == "raw" or not values:
            continue
        items.append(
            f'<li><span class="swatch c{one.colour % COLOURS}"></span>{html.escape(one.name)} '
            f"<b>{format_number(values[-1])}</b></li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'
