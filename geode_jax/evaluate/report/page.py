"""The report of a run: one self-contained HTML page without scripts or external files."""

import base64
import html
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from geode_jax.evaluate import scores
from geode_jax.evaluate.metrics import spatial
from geode_jax.evaluate.report import charts
from geode_jax.evaluate.report.style import STYLE
from geode_jax.exports import files

_HEADLINES = ("spatial_accuracy", "mra", "rouge1")


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    config_text: str,
    metrics_rows: Sequence[Mapping],
    scores: Mapping[str, Mapping[str, float]],
    examples: Sequence[Mapping],
    depth_examples: Sequence[Mapping] = (),
    efficiency: Mapping | None = None,
    notes: Sequence[str] = (),
    score_notes: Mapping[str, str] | None = None,
) -> None:
    """Writes the page, at once or not at all (a crash leaves no half report).

    All text is escaped. A section with nothing to show is left out.

    Args:
      path: of the HTML file.
      title: of the run.
      config_text: the configuration as text, shown folded.
      metrics_rows: rows of `metrics.jsonl`: `step` and any of `loss`, `loss/<term>`,
        `weight/<term>` or `sigma/<term>`, `val/<score>`; a row need not have them all.
      scores: column ("model", "vision_removed", "frequency") to scores; the first is the one that
        is drawn as a bar, the others as marks on it.
      examples: question records with `prediction`, and optionally `image` [H, W, 3] uint8,
        `thinking_tokens` (list of str), `metrics` (name to number).
      depth_examples: `image` [H, W, 3] uint8, `target` and `prediction` [h, w] metres (0 or
        non-finite is unknown), optionally `caption`.
      efficiency: name to number or text, see `_quantity` for the units that names imply.
      notes: sentences below the scores: what a reader must know to trust them.
      score_notes: score key to a remark beside it, such as "input contains depth".
    """
    sections = [
        _header(title, scores),
        _scores(scores, score_notes or {}, notes),
        _training(metrics_rows),
        _examples(examples),
        _depth(depth_examples),
        _efficiency(efficiency or {}),
        _config(config_text),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )
    path = Path(path)
    files.write_text(path, page)


def _text(value) -> str:
    return html.escape(str(value), quote=True)


def _section(title: str, *body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{''.join(body)}</section>"


def _column_title(name: str) -> str:
    return scores.COLUMN_TITLES.get(name, name)


def _short_label(key: str) -> str:
    return scores.row_of(key).label.removesuffix(" (mean)")


def _header(title: str, columns: Mapping[str, Mapping[str, float]]) -> str:
    """Title, and the two or three figures that matter beside their baselines."""
    names = list(columns)
    tiles = []
    for key in _HEADLINES:
        if not names or key not in columns[names[0]]:
            continue
        row = scores.row_of(key)
        others = [
            f"{_text(_column_title(name))} {scores.format_score(columns[name][key], row)}"
            for name in names[1:]
            if key in columns[name]
        ]
        tiles.append(
            f'<div class="tile"><p>{_text(_short_label(key))}</p>'
            f"<strong>{scores.format_score(columns[names[0]][key], row)}</strong>"
            f"<small>{'<br>'.join(others)}</small></div>"
        )
    tiles = f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""
    return f"<header><h1>{_text(title)}</h1>{tiles}</header>"


def _share(value: float | None) -> float | None:
    """Position of a score on a bar from 0 to 1, in percent."""
    if value is None or not math.isfinite(value):
        return None
    return 100.0 * min(max(value, 0.0), 1.0)


def _bar(values: Sequence[float | None]) -> str:
    """The first value as a bar, the others as marks across it."""
    first = _share(values[0])
    fill = "" if first is None else f'<i class="fill" style="width:{first:.1f}%"></i>'
    marks = [
        f'<i class="mark m{i}" style="left:{share:.1f}%"></i>'
        for i, share in enumerate(map(_share, values[1:]), start=1)
        if share is not None
    ]
    return f'<div class="bar">{fill}{"".join(marks)}</div>'


def _scores(
    columns: Mapping[str, Mapping[str, float]], remarks: Mapping[str, str], notes: Sequence[str]
) -> str:
    rows = scores.rows_of(columns)
    body = [f"<li>{_text(note)}</li>" for note in notes]
    notes_list = f'<ul class="notes">{"".join(body)}</ul>' if body else ""
    if not rows:
        return _section("Notes", notes_list) if notes_list else ""

    names = list(columns)
    classes = ["fill", *(f"mark m{i}" for i in range(1, len(names)))]
    marks = "".join(
        f'<li><i class="key {style}"></i>{_text(_column_title(name))}</li>'
        for style, name in zip(classes, names, strict=True)
    )
    heads = "".join(f'<th scope="col">{_text(_column_title(name))}</th>' for name in names)
    lines = []
    group = None
    for row in rows:
        if row.group != group:
            group = row.group
            lines.append(
                f'<tr class="group"><th colspan="{len(names) + 2}" scope="rowgroup">'
                f"{_text(group)}</th></tr>"
            )
        values = [columns[name].get(row.key) for name in names]
        remark = [remarks[row.key]] if row.key in remarks else []
        if row.better == "lower":
            remark.insert(0, "lower is better")
        small = f" <small>{_text(', '.join(remark))}</small>" if remark else ""
        cells = "".join(
            f"<td>{_text(scores.format_score(value, row)) if value is not None else '–'}</td>"
            for value in values
        )
        bar = _bar(values) if row.bounded else ""
        lines.append(
            f'<tr><th scope="row">{_text(row.label)}{small}</th>'
            f'<td class="bars">{bar}</td>{cells}</tr>'
        )
    table = (
        f'<div class="wide"><table class="scores"><thead><tr><th></th>'
        f'<th class="bars"><ul class="legend">{marks}</ul></th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
    return _section("Scores", notes_list, table)


def _column(rows: Sequence[Mapping], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have this key."""
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [float(step) for step, _ in found], [float(value) for _, value in found]


def _smoothed(name: str, x, y, colour: int) -> list[charts.Series]:
    """A curve as itself, or as a faint trace and its moving mean where it is long."""
    if len(y) < 40:
        return [charts.Series(name, x, y, colour)]
    mean = charts.smooth(y, max(5, len(y) // 40))
    return [charts.Series(name, x, y, colour, "raw"), charts.Series(name, x, mean, colour)]


def _figure(title: str, svg: str, legend: str = "", *, log: bool = False) -> str:
    if not svg:
        return ""
    scale = " <small>log scale</small>" if log else ""
    return f"<figure><figcaption><b>{_text(title)}</b>{scale}{legend}</figcaption>{svg}</figure>"


def _chart(title: str, series: Sequence[charts.Series], *, log: bool | None = None, **size) -> str:
    values = [value for one in series for value in one.y]
    log = charts.wants_log(values) if log is None else log
    svg = charts.line_chart(series, label=f"{title} by training step", log=log, **size)
    return _figure(title, svg, charts.legend(series), log=log)


def _keys(rows: Sequence[Mapping], prefix: str) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row if key.startswith(prefix)))


def _small_charts(rows: Sequence[Mapping], keys: Sequence[str], style: str) -> str:
    """One small chart per key, each with its own range but all linear or all logarithmic."""
    columns = [_column(rows, key) for key in keys]
    values = [value for _, y in columns for value in y if math.isfinite(value)]
    log = bool(values) and min(values) > 0 and any(charts.wants_log(y) for _, y in columns)
    figures = []
    for key, (x, y) in zip(keys, columns, strict=True):
        name = key.split("/", 1)[1]
        if style == "dots":
            series = [charts.Series(_short_label(name), x, y, 0, "dots")]
        else:
            series = _smoothed(name, x, y, 0)
        figures.append(_chart(series[0].name, series, log=log, width=340, height=170))
    return f'<div class="small">{"".join(figures)}</div>' if any(figures) else ""


def _training(rows: Sequence[Mapping]) -> str:
    if not rows:
        return ""
    x, y = _column(rows, "loss")
    val_x, val_y = _column(rows, "val/loss")
    total = [*_smoothed("training", x, y, 0)]
    if val_y:
        total.append(charts.Series("validation", val_x, val_y, 1, "dots"))
    parts = [_chart("Total loss", total)]

    for prefix, name in (
        ("weight/", "Uncertainty weights 1 / (2 σ²) over time"),
        ("sigma/", "Uncertainties σ over time"),
    ):
        keys = _keys(rows, prefix)
        series = [
            charts.Series(key.removeprefix(prefix), *_column(rows, key), i)
            for i, key in enumerate(keys)
        ]
        if series:
            parts.append(_chart(name, series))
    terms = _small_charts(rows, _keys(rows, "loss/"), "line")
    if terms:
        parts += ["<h3>Terms of the loss</h3>", terms]
    held_out = [key for key in _keys(rows, "val/") if key != "val/loss"]
    held_out = _small_charts(rows, held_out, "dots")
    if held_out:
        parts += ["<h3>Validation during training</h3>", held_out]
    return _section("Training", *parts)


def _picture(image: np.ndarray, alt: str) -> str:
    """An [H, W, 3] uint8 image as PNG inside the page."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image, np.uint8)).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{_text(alt)}">'


def _verdict(example: Mapping) -> str:
    """How the prediction was scored, as a word and a colour."""
    score = spatial.question_score(example)
    rule = spatial.rule(example)
    if rule in ("relation", "letter"):
        grade, sign = ("right", "✓") if score == 1.0 else ("wrong", "✗")
        return f'<span class="{grade}">{sign} {grade}</span>'
    name = "MRA" if rule == "number" else "ROUGE-1"
    grade = "right" if score >= 0.8 else "wrong" if score < 0.4 else "partly"
    return f'<span class="{grade}">{name} {score:.2f}</span>'


def _card(example: Mapping) -> str:
    image = example.get("image")
    picture = "" if image is None else _picture(image, "the rendered view")
    options = "\n".join(example.get("options") or [])
    question = f"{example['question']}\n{options}" if options else example["question"]
    unit = f" {example['unit']}" if example.get("unit") else ""
    parts = [
        f'<p class="kind">{_text(example["kind"].replace("_", " "))} {_verdict(example)}</p>',
        f'<p class="question">{_text(question)}</p>',
        f"<dl><dt>answer</dt><dd>{_text(example['answer'] + unit)}</dd>",
        f"<dt>model</dt><dd><b>{_text(example['prediction'])}</b></dd></dl>",
    ]
    thinking = example.get("thinking_tokens") or []
    if thinking:
        chips = "".join(
            f'<code title="T{i} = {_text(repr(token))}">{_text(token.strip() or "␣")}</code>'
            for i, token in enumerate(thinking, start=1)
        )
        parts.append(f'<p class="thinking"><span>thinking</span>{chips}</p>')
    metrics = example.get("metrics") or {}
    if metrics:
        values = " · ".join(
            f"{_text(scores.row_of(key).label)} {charts.format_number(float(value))}"
            for key, value in metrics.items()
        )
        parts.append(f'<p class="metrics">{values}</p>')
    return f'<article class="card">{picture}<div>{"".join(parts)}</div></article>'


def _examples(examples: Sequence[Mapping]) -> str:
    if not examples:
        return ""
    lead = ""
    if any(example.get("thinking_tokens") for example in examples):
        lead = (
            "<p>Thinking tokens are decoded here for diagnosis only: the most likely word at each"
            " of their positions. They are never part of an answer.</p>"
        )
    cards = "".join(map(_card, examples))
    return _section("Answers on held-out scenes", lead, f'<div class="cards">{cards}</div>')


# Viridis at nine equal steps (matplotlib's, CC0).
_VIRIDIS = np.array(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ],
    np.float64,
)


def depth_colours(depth: np.ndarray, low: float, high: float) -> np.ndarray:
    """Depth [h, w] as colours [h, w, 3] uint8, near is bright; unknown pixels are grey."""
    known = np.isfinite(depth) & (depth > 0)
    share = np.clip((high - np.where(known, depth, low)) / max(high - low, 1e-9), 0.0, 1.0)
    stops = np.linspace(0.0, 1.0, len(_VIRIDIS))
    colours = np.stack([np.interp(share, stops, channel) for channel in _VIRIDIS.T], axis=-1)
    return np.where(known[..., None], np.round(colours), 128).astype(np.uint8)


def _depth_row(example: Mapping) -> str:
    target = np.asarray(example["target"], np.float64)
    prediction = np.asarray(example["prediction"], np.float64)
    known = target[np.isfinite(target) & (target > 0)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    pictures = [
        ("view", example["image"]),
        ("true depth", depth_colours(target, low, high)),
        ("predicted depth", depth_colours(prediction, low, high)),
    ]
    figures = "".join(
        f"<figure>{_picture(image, name)}<figcaption>{name}</figcaption></figure>"
        for name, image in pictures
    )
    caption = f"{example['caption']}, " if example.get("caption") else ""
    text = f"{caption}{low:.2f} m (bright) to {high:.2f} m (dark)"
    return f'<div class="depth">{figures}<p>{_text(text)}</p></div>'


def _depth(examples: Sequence[Mapping]) -> str:
    return _section("Depth", *map(_depth_row, examples)) if examples else ""


def _quantity(name: str, value) -> str:
    """A number with the unit that the end of its name implies (bytes, seconds, ms)."""
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


def _efficiency(values: Mapping) -> str:
    if not values:
        return ""
    cells = "".join(
        f"<div><dt>{_text(_quantity_label(name))}</dt>"
        f"<dd>{_text(_quantity(name, value))}</dd></div>"
        for name, value in values.items()
    )
    return _section("Efficiency", f'<dl class="quantities">{cells}</dl>')


def _quantity_label(name: str) -> str:
    label = name.removesuffix("_bytes").removeprefix("ms_").replace("_", " ")
    if label.endswith(" seconds"):
        return label.removesuffix("seconds") + "time"
    return {"bytes": "size", "per sample": "time per sample"}.get(label, label)


def _config(text: str) -> str:
    if not text:
        return ""
    return _section(
        "Configuration", f"<details><summary>Show</summary><pre>{_text(text)}</pre></details>"
    )
