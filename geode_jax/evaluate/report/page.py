"""The report of a run: one self-contained HTML page without scripts or external files.

`templates/report.html` has the page, `templates/report.css` how it looks; the functions here make
the values that the template shows.
"""

import base64
import io
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from geode_jax.evaluate import scores as scoring
from geode_jax.evaluate.metrics import spatial
from geode_jax.evaluate.report import charts
from geode_jax.exports import files, units

_HEADLINE_KEYS = ("spatial_accuracy", "mra", "rouge1")


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    origin: str,
    config_text: str,
    metrics_rows: Sequence[Mapping],
    scores: Mapping[str, Mapping[str, float]],
    examples: Sequence[dict],
    depth_examples: Sequence[Mapping] = (),
    efficiency: Mapping | None = None,
    notes: Sequence[str] = (),
    score_notes: Mapping[str, str] | None = None,
) -> None:
    """Writes the page, whole or not at all.

    All text is escaped. A section with nothing to show is left out.

    Args:
      path: of the HTML file.
      title: of the run.
      origin: software, seed and whatever else the run was made with; a line under the title.
      config_text: the configuration as text, shown folded.
      metrics_rows: rows of `metrics.jsonl`: `step` and any of `loss`, `loss/<term>`,
        `weight/<term>` or `sigma/<term>`, `val/<score>`.
      scores: column ("model", "vision_removed", "frequency") to its scores. The first column is
        drawn as bars, the others as marks on them.
      examples: question records with `prediction`, and optionally `image` [h, w, 3] uint8,
        `thinking_tokens` (list of str), `metrics` (name to number).
      depth_examples: `image` [h, w, 3] uint8, `target` and `prediction` maps of one size in metres
        (0 or non-finite is unknown), optionally `caption`.
      efficiency: name to number or text; `_quantity` has the units that names imply.
      notes: sentences above the scores: what a reader must know to trust them.
      score_notes: score key to a remark beside it, such as "input contains depth".

    Raises:
      UserError: the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("geode_jax.evaluate.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        title=title,
        origin=origin,
        tiles=_tiles(scores),
        notes=notes,
        columns=[_column_title(name) for name in scores],
        score_groups=_score_groups(scores, score_notes or {}),
        training=_training(metrics_rows) if metrics_rows else None,
        examples=[_example(example) for example in examples],
        depth=[_depth_row(example) for example in depth_examples],
        efficiency=[(_quantity_label(k), _quantity(k, v)) for k, v in (efficiency or {}).items()],
        config_text=config_text,
    )
    files.write_text(path, page)


# --- Scores ---------------------------------------------------------------------------------------


def _column_title(name: str) -> str:
    return scoring.COLUMN_TITLES.get(name, name)


def _short_label(key: str) -> str:
    return scoring.row_of(key).label.removesuffix(" (mean)")


def _tiles(columns: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Returns the two or three most important scores, each with its baselines."""
    names = list(columns)
    tiles = []
    for key in _HEADLINE_KEYS:
        if not names or key not in columns[names[0]]:
            continue
        row = scoring.row_of(key)
        others = [
            f"{_column_title(name)} {scoring.format_score(columns[name][key], row)}"
            for name in names[1:]
            if key in columns[name]
        ]
        value = scoring.format_score(columns[names[0]][key], row)
        tiles.append({"label": _short_label(key), "value": value, "others": others})
    return tiles


def _score_groups(
    columns: Mapping[str, Mapping[str, float]], remarks: Mapping[str, str]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Returns the rows of the table of scores under the names of their groups."""

    def shown(row: scoring.Row) -> dict[str, Any]:
        values = [column.get(row.key) for column in columns.values()]
        cells = ["–" if value is None else scoring.format_score(value, row) for value in values]
        remark = ["lower is better"] if row.better == "lower" else []
        remark += [remarks[row.key]] if row.key in remarks else []
        bar = _bar(values) if row.bounded else None
        return {"label": row.label, "remark": ", ".join(remark), "cells": cells, "bar": bar}

    groups = itertools.groupby(scoring.rows_of(columns), key=lambda row: row.group)
    return [(group, [shown(row) for row in rows]) for group, rows in groups]


def _bar(values: Sequence[float | None]) -> list[tuple[str, str]]:
    """Returns CSS classes and places: the first value as a bar, the others as marks across it."""
    parts = []
    for i, value in enumerate(values):
        if value is not None and math.isfinite(value):
            percent = 100.0 * min(max(value, 0.0), 1.0)
            style, side = (f"mark m{i}", "left") if i else ("fill", "width")
            parts.append((style, f"{side}:{percent:.1f}%"))
    return parts


# --- Training -------------------------------------------------------------------------------------


def _column(rows: Sequence[Mapping], key: str) -> tuple[list[float], list[float]]:
    """Returns steps and values of the rows that have this key."""
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [float(step) for step, _ in found], [float(value) for _, value in found]


def _smoothed(name: str, x: list[float], y: list[float], colour: int) -> list[charts.Series]:
    """Returns a short curve itself, of a long one a faint trace and its moving mean."""
    if len(y) < 40:
        return [charts.Series(name, x, y, colour)]
    mean = charts.smooth(y, max(5, len(y) // 40))
    return [charts.Series(name, x, y, colour, "raw"), charts.Series(name, x, mean, colour)]


def _charts(
    title: str, series: Sequence[charts.Series], *, log: bool | None = None, **size: int
) -> list[dict[str, Any]]:
    """Returns a chart with its title and legend; an empty list where there is nothing to draw.

    The legend has the last value of every curve.
    """
    if log is None:
        log = charts.needs_log_axis([value for one in series for value in one.y])
    svg = charts.line_chart(series, label=f"{title} by training step", log=log, **size)
    if not svg:
        return []
    legend = []
    for one in series:
        values = [value for value in one.y if math.isfinite(value)]
        if values and one.style != "raw":  # a raw curve belongs to the line before it
            last = charts.format_number(values[-1])
            name = "last" if one.name == title else one.name
            legend.append({"name": name, "colour": one.colour % charts.COLOURS, "last": last})
    return [{"title": title, "log": log, "legend": legend, "svg": svg}]


def _keys(rows: Sequence[Mapping], prefix: str) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row if key.startswith(prefix)))


def _small_charts(
    rows: Sequence[Mapping], keys: Sequence[str], *, dots: bool
) -> list[dict[str, Any]]:
    """Returns a small chart per key, each with its own range but all linear or all logarithmic."""
    columns = [_column(rows, key) for key in keys]
    values = [value for _, y in columns for value in y if math.isfinite(value)]
    log = bool(values) and min(values) > 0 and any(charts.needs_log_axis(y) for _, y in columns)
    found = []
    for key, (x, y) in zip(keys, columns, strict=True):
        name = _short_label(key.split("/", 1)[1])
        series = [charts.Series(name, x, y, 0, "dots")] if dots else _smoothed(name, x, y, 0)
        found += _charts(name, series, log=log, width=340, height=180)
    return found


def _training(rows: Sequence[Mapping]) -> dict[str, Any]:
    total = _smoothed("training", *_column(rows, "loss"), 0)
    val_steps, val_losses = _column(rows, "val/loss")
    if val_losses:
        total.append(charts.Series("validation", val_steps, val_losses, 1, "dots"))
    curves = _charts("Total loss", total)
    for prefix, name in (
        ("weight/", "Uncertainty weights 1 / (2 σ²) over time"),
        ("sigma/", "Uncertainties σ over time"),
    ):
        series = [
            charts.Series(_short_label(key.removeprefix(prefix)), *_column(rows, key), i)
            for i, key in enumerate(_keys(rows, prefix))
        ]
        curves += _charts(name, series)
    held_out = [key for key in _keys(rows, "val/") if key != "val/loss"]
    small = [
        ("Terms of the loss", _small_charts(rows, _keys(rows, "loss/"), dots=False)),
        ("Validation during training", _small_charts(rows, held_out, dots=True)),
    ]
    return {"curves": curves, "small": small}


# --- Examples -------------------------------------------------------------------------------------


def _png(image: np.ndarray) -> str:
    """Returns an [h, w, 3] uint8 image as PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image, np.uint8)).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _grade(example: dict) -> tuple[str, str]:
    """Returns a CSS class and a text for how the prediction was scored."""
    score = spatial.question_score(example)
    rule = spatial.rule(example)
    if rule in ("relation", "letter"):
        return ("right", "✓ right") if score == 1.0 else ("wrong", "✗ wrong")
    name = "MRA" if rule == "number" else "ROUGE-1"
    grade = "right" if score >= 0.8 else "wrong" if score < 0.4 else "partly"
    return grade, f"{name} {score:.2f}"


def _example(example: dict) -> dict[str, Any]:
    grade, verdict = _grade(example)
    quantity = units.read_quantity(example["answer"])
    unit = f" {example['unit']}" if example.get("unit") and not (quantity and quantity.unit) else ""
    metrics = example.get("metrics") or {}
    return {
        "image": _png(example["image"]) if example.get("image") is not None else None,
        "kind": example["kind"].replace("_", " "),
        "grade": grade,
        "verdict": verdict,
        "question": "\n".join([example["question"], *(example.get("options") or [])]),
        "answer": example["answer"] + unit,
        "prediction": example["prediction"],
        "thinking": [
            {"exact": repr(token), "shown": token.strip() or "␣"}
            for token in example.get("thinking_tokens") or []
        ],
        "metrics": [
            f"{scoring.row_of(key).label} {charts.format_number(float(value))}"
            for key, value in metrics.items()
        ],
    }


def _depth_row(example: Mapping) -> dict[str, Any]:
    target = np.asarray(example["target"], np.float64)
    prediction = np.asarray(example["prediction"], np.float64)
    known = target[np.isfinite(target) & (target > 0)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    caption = f"{example['caption']}, " if example.get("caption") else ""
    return {
        "pictures": [
            ("view", _png(example["image"])),
            ("true depth", _png(charts.depth_colours(target, low, high))),
            ("predicted depth", _png(charts.depth_colours(prediction, low, high))),
        ],
        "caption": f"{caption}{low:.2f} m (bright) to {high:.2f} m (dark)",
    }


# --- Efficiency -----------------------------------------------------------------------------------


def _quantity(name: str, value: float | str) -> str:
    """Returns a number with the unit that the end of its name implies (bytes, seconds, ms)."""
    if isinstance(value, str):
        return value
    if name.endswith("bytes"):
        power = min(int(math.log(max(value, 1), 1024)), 4)
        unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
        return f"{value / 1024**power:.{0 if power == 0 else 1}f} {unit}"
    if name.endswith("seconds") and value >= 60:
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes} min {seconds} s"
    if name.endswith("seconds"):
        return f"{value:.3g} s"
    if name.startswith("ms_"):
        return f"{value:.3g} ms"
    return f"{value:,}" if isinstance(value, int) else charts.format_number(float(value))


def _quantity_label(name: str) -> str:
    label = name.removesuffix("_bytes").removeprefix("ms_").replace("_", " ")
    if label.endswith(" seconds"):
        return label.removesuffix("seconds") + "time"
    return {"bytes": "size", "per sample": "time per sample"}.get(label, label)
