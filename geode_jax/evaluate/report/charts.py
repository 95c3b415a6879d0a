"""Line charts as SVG for the report, drawn by matplotlib.

A chart is part of the page, and the style sheet of the page gives its colours: wherever matplotlib
wrote the placeholder of a colour, the SVG refers to a CSS variable instead. So one chart is
readable on light and on dark paper.

matplotlib is imported where a chart is drawn, since training and inference do not need it.
"""

import atexit
import dataclasses
import functools
import io
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import numpy as np

from geode_jax.runtime.user_cache import user_cache

COLOURS = 8
"""Number of colours for curves in the style sheet: `--c0` to `--c7`."""
MAX_POINTS = 240
"""Most points that are drawn of one curve; a longer curve becomes the means of equal stretches."""

_CURVE_COLOURS = tuple(f"#c0c0{i:02x}" for i in range(COLOURS))
_TEXT_COLOUR, _GRID_COLOUR, _PAPER_COLOUR = "#c0c0f0", "#c0c0f1", "#c0c0f2"
_CSS_COLOURS = {
    **{placeholder: f"var(--c{i})" for i, placeholder in enumerate(_CURVE_COLOURS)},
    _TEXT_COLOUR: "var(--soft)",
    _GRID_COLOUR: "var(--rule)",
    _PAPER_COLOUR: "var(--paper)",
}
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 10, 40
"""Margins around the axes, in pixels: room for the tick labels and for the name of the x axis."""


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
      name: for the legend.
      x: [n] training steps, ascending.
      y: [n] values; values that are not finite are not drawn.
      colour: index of the colour, 0 to 7.
      style: "line", "raw" (a faint line behind another) or "dots" (a line with its points marked).
    """

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    colour: int = 0
    style: str = "line"


def smooth(values: Sequence[float], width: int) -> np.ndarray:
    """Returns the moving mean over `width` neighbours, fewer at both ends.

    Values that are not finite are left out of the means.
    """
    array = np.asarray(values, np.float64)
    finite = np.isfinite(array)
    kernel = np.ones(min(width, len(array)))
    total = np.convolve(np.where(finite, array, 0.0), kernel, mode="same")
    count = np.convolve(finite.astype(np.float64), kernel, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1.0), np.nan)


def needs_log_axis(values: Sequence[float]) -> bool:
    """Returns whether the values are all positive and span more than a factor of 20."""
    array = np.asarray(values, np.float64)
    array = array[np.isfinite(array)]
    return bool(array.size and array.min() > 0 and array.max() > 20 * array.min())


def format_number(value: float) -> str:
    """Returns the number with up to four significant digits, without trailing zeros."""
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def line_chart(
    series: Sequence[Series], *, label: str, width: int = 980, height: int = 310, log: bool = False
) -> str:
    """Draws all series on common axes, the training step along x.

    The SVG has no ids, no links and no date: several charts can stand in one page, and the same
    series always give the same text.

    Args:
      series: curves; without a value to draw the result is the empty string.
      label: description for readers who cannot see the chart.
      width: of the chart in pixels; the page may scale it.
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
    # From the first to the last step: thinning keeps only the middle of a stretch.
    steps = np.concatenate([np.asarray(one.x, np.float64) for one, _, _ in drawn])

    _set_config_folder()
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    file, titles = io.BytesIO(), {}
    # The defaults first: a user's own matplotlibrc must not change the report.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "geode_jax", "font.family": "DejaVu Sans"}
    with style.context(["default", settings]):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        axes = figure.add_axes(
            (
                _LEFT / width,
                _BOTTOM / height,
                (width - _LEFT - _RIGHT) / width,
                (height - _TOP - _BOTTOM) / height,
            )
        )
        _style_axes(axes, width, height, log)
        for i, (one, x, y) in enumerate(drawn):
            marked = one.style == "dots" or len(x) == 1
            axes.plot(
                x,
                y,
                color=_CURVE_COLOURS[one.colour % COLOURS],
                alpha=0.4 if one.style == "raw" else None,
                linewidth=1.0 if one.style == "raw" else 1.8,
                solid_capstyle="round",
                marker="o" if marked else "",
                markersize=6,
                markeredgecolor=_PAPER_COLOUR,
                markeredgewidth=1,
                clip_on=False,
                gid=f"series{i}",
            )
            if marked:
                titles[f"series{i}"] = [
                    f"{one.name}, step {format_number(step)}: {format_number(value)}"
                    for step, value in zip(x, y, strict=True)
                ]
        if steps.min() < steps.max():
            axes.set_xlim(float(steps.min()), float(steps.max()))
        _set_y_ticks(axes, max(3, (height - _TOP - _BOTTOM) // 36), log)
        FigureCanvasSVG(figure).print_svg(file)
    scale = ", logarithmic" if log else ""
    return _inline(file.getvalue(), f"{label}{scale}", titles)


def depth_colours(depth: np.ndarray, low: float, high: float) -> np.ndarray:
    """Returns depth [h, w] as colours [h, w, 3] uint8: near is bright, unknown pixels are grey."""
    _set_config_folder()
    from matplotlib import colormaps

    known = np.isfinite(depth) & (depth > 0)
    share = np.clip((high - np.where(known, depth, low)) / max(high - low, 1e-9), 0.0, 1.0)
    colours = np.round(255.0 * colormaps["viridis"](share)[..., :3])
    return np.where(known[..., None], colours, 128).astype(np.uint8)


@functools.cache
def _set_config_folder() -> None:
    """Gives matplotlib a folder for its settings and its cache of fonts.

    matplotlib looks for the folder in the home while it is imported, and warns where it cannot
    write there; a container may have no home at all.
    """
    if os.environ.get("MPLCONFIGDIR"):
        return
    folder = user_cache("matplotlib")
    if folder is None:
        folder = tempfile.mkdtemp(prefix="geode_jax_matplotlib_")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["MPLCONFIGDIR"] = str(folder)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= MAX_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), MAX_POINTS)
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


def _style_axes(axes, width: int, height: int, log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set(color=_TEXT_COLOUR, linewidth=0.6)
    axes.set_yscale("log" if log else "linear")
    axes.margins(x=0, y=0.06)
    axes.grid(axis="y", color=_GRID_COLOUR, linewidth=1, clip_on=False)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=11, labelcolor=_TEXT_COLOUR, color=_TEXT_COLOUR)
    axes.tick_params(axis="x", length=4, width=0.6)
    axes.tick_params(axis="y", which="both", length=0, pad=7)
    axes.set_xlabel("training step", color=_TEXT_COLOUR, fontsize=11, loc="right", labelpad=2)
    number = FuncFormatter(lambda value, _: format_number(value))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(number)
    inside = width - _LEFT - _RIGHT
    axes.xaxis.set_major_locator(MaxNLocator(max(4, inside // 90), steps=[1, 2, 2.5, 5, 10]))


def _set_y_ticks(axes, count: int, log: bool) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    linear = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10])
    if not log:
        axes.yaxis.set_major_locator(linear)
        return
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    # Powers of ten; 1-2-5 steps where fewer than three powers are inside the range.
    powers = math.floor(math.log10(high)) - math.ceil(math.log10(low)) + 1
    locator = LogLocator(subs=(1.0,) if powers >= 3 else (1.0, 2.0, 5.0), numticks=count + 1)
    inside = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
    axes.yaxis.set_major_locator(locator if len(inside) >= 2 else linear)


def _inline(svg: bytes, label: str, titles: Mapping[str, Sequence[str]]) -> str:
    """Returns matplotlib's SVG as an element of an HTML page.

    Ids are unique in a page, so that several charts can have none: a marker that is referred to by
    its id is repeated instead. A style element would apply to the whole page.

    Args:
      svg: the file.
      label: becomes `aria-label`.
      titles: id of a series -> the tooltip of each of its markers.
    """
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg.decode()).replace("xlink:href", "href")
    for placeholder, colour in _CSS_COLOURS.items():
        text = text.replace(placeholder, colour)
    root = ElementTree.fromstring(text)
    shapes = {f"#{path.get('id')}": path.attrib for path in root.iterfind(".//defs/path")}
    for group in root.iter("g"):
        tooltips = titles.get(group.get("id", ""), [])
        for marker, tooltip in zip(group.iter("use"), tooltips, strict=bool(tooltips)):
            ElementTree.SubElement(marker, "title").text = tooltip
    for use in root.iter("use"):
        use.tag = "path"
        x, y = use.attrib.pop("x"), use.attrib.pop("y")
        use.attrib.update(d=shapes[use.attrib.pop("href")]["d"], transform=f"translate({x} {y})")
    for parent in list(root.iter()):
        parent.attrib.pop("id", None)
        for child in [child for child in parent if child.tag in ("defs", "metadata")]:
            parent.remove(child)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")
