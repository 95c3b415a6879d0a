"""Checks a whole export, and formats the summary for a terminal."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence

from . import cameras, files, scene_names
from .contract import ASKED, SPECS, SPLITS, ExportError, scene_error, shown
from .reader import Export


def validate(folder: str | os.PathLike, *, on_error: str = "stop", progress: bool = False) -> dict:
    """Reads everything in an export and checks every rule.

    Args:
        folder: the export.
        on_error: stop raises at the first bad scene or question, skip counts and lists them.
        progress: show a progress bar on stderr if tqdm is installed.

    Returns:
        {"producer": dict, "scenes": int, "splits": {split: scenes}, "questions": {kind: count},
        "alignment": {scene: dict} (of scenes that were aligned to a metric world, as in the
        manifest), "tensors": [{"name", "shape", "dtype", "scenes"}], "bytes": int,
        "warnings": [str] (signs of wrong cameras, see `cameras.CameraCheck`, and rooms that are in
        several splits),
        "dropped_questions": int (bad questions and those of dropped scenes; `questions` has
        neither),
        "dropped": [(scene or questions.jsonl:LINE, tensor or field, rule)]}. A size that differs
        between scenes is written low-high.

    Raises:
        ExportError: see `on_error`; a bad manifest or a questions.jsonl that is not the manifest's
            is always raised.
    """
    if on_error not in ("stop", "skip"):
        raise ExportError("validate", "on_error", f"must be stop or skip, is {shown(on_error)}")
    export = Export(folder)
    errors: list[ExportError] = []
    splits: Counter = Counter()
    shapes: dict[str, list[tuple]] = {}
    dtypes: dict[str, set] = {}
    check = cameras.CameraCheck(export.manifest["scale"] == "metric")
    answered: dict[str, int] = {}  # scene -> last question that the teacher answered
    for scene_id in _bar(export.scene_ids(), progress):
        try:
            arrays = export.read_scene(scene_id)
        except ExportError as error:
            if on_error == "stop":
                raise
            errors.append(error)
            continue
        splits[export._entries[scene_id]["split"]] += 1
        if len(arrays.get(ASKED, ())):
            answered[scene_id] = int(arrays[ASKED].max())
        for name, array in arrays.items():
            shapes.setdefault(name, []).append(array.shape)
            dtypes.setdefault(name, set()).add(array.dtype.name)
        check.add(arrays)
    dropped_questions = None if on_error == "stop" else errors
    dropped_scenes = {error.where[len("scene ") :] for error in errors}
    kinds: Counter = Counter()
    asked: Counter = Counter()
    for record in export.questions(dropped_questions):
        asked[record["scene_id"]] += 1
        if record["scene_id"] not in dropped_scenes:
            kinds[record["kind"]] += 1
    for scene_id, last in answered.items():
        if last >= asked[scene_id] and not dropped_questions:
            rule = f"question {last} does not exist, the scene has {asked[scene_id]}"
            error = scene_error(scene_id, ASKED, rule)
            if on_error == "stop":
                raise error
            errors.append(error)
    tensors = [
        {
            "name": name,
            "shape": [_range(sizes) for sizes in zip(*shapes[name])],
            "dtype": "/".join(sorted(dtypes[name])),
            "scenes": len(shapes[name]),
        }
        for name in SPECS
        if name in shapes
    ]
    aligned = {s: e["alignment"] for s, e in export._entries.items() if "alignment" in e}
    return {
        "alignment": {s: found for s, found in aligned.items() if s not in dropped_scenes},
        "producer": export.manifest["producer"],
        "scenes": sum(splits.values()),
        "splits": {split: splits[split] for split in SPLITS if splits[split]},
        "questions": dict(sorted(kinds.items())),
        "tensors": tensors,
        "warnings": [
            *check.lines(),
            *_divided_rooms(export),
        ],
        "bytes": sum(path.stat().st_size for path in export.files() if path.is_file()),
        "dropped_questions": export.manifest["questions"]["count"] - sum(kinds.values()),
        # Without repetitions: a scene that cannot be opened fails again with each of its questions.
        "dropped": list(dict.fromkeys((e.where, e.field, e.rule) for e in errors)),
    }


def _divided_rooms(export: Export) -> list[str]:
    """Returns [a warning about rooms whose scans are in several splits], [] if there are none."""
    rooms: dict[str, list[str]] = {}
    for scene_id in export.scene_ids():
        rooms.setdefault(scene_names.place_of(scene_id), []).append(scene_id)
    split_of = {scene_id: entry["split"] for scene_id, entry in export._entries.items()}
    divided = [scans for scans in rooms.values() if len({split_of[s] for s in scans}) > 1]
    if not divided:
        return []
    scans = ", ".join(f"{scan} of {split_of[scan]}" for scan in divided[0][:4])
    return [f"scans of {len(divided)} rooms are in several splits, the first: {scans}"]


def _range(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low}-{high}"


def _bar(items: Sequence[str], progress: bool) -> Iterable[str]:
    if progress:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            return tqdm(items, desc="scenes", unit="scene")
    return items


_RESIDUALS = (
    ("residual_m", "displacement", "m", 1),
    ("centres_m", "camera centres", "m", 1),
    ("rotations_deg", "rotations", "degrees", 1),
    ("depth_relative", "depth", "%", 100),
)
"""Residual -> its name, its unit, and the factor to that unit."""


def _alignment_lines(aligned: dict[str, dict]) -> list[str]:
    """Returns lines about the residuals of scenes that were aligned to a metric world."""
    methods = Counter(found["method"] for found in aligned.values())
    targets = Counter(found["depth_target"] for found in aligned.values())
    views, kept = (sum(found[name] for found in aligned.values()) for name in ("views", "kept"))
    ways = " and ".join(f"{count} by {method}" for method, count in sorted(methods.items()))
    lines = [f"aligned to the metric world: {len(aligned)} scenes, {ways}"]
    for name, words, unit, factor in _RESIDUALS:
        values = {s: found[name] * factor for s, found in aligned.items() if name in found}
        if values:
            worst = max(values, key=lambda scene: values[scene])
            middle = sorted(values.values())[len(values) // 2]
            lines.append(
                f"  {words}: median {middle:.3g} {unit}, most {values[worst]:.3g} {unit} in {worst}"
            )
    lines.append(f"  views that do not fit, without VGGT's geometry: {views - kept} of {views}")
    if targets["vggt"]:
        lines.append(f"  depth targets are VGGT's own, weighted, in {targets['vggt']} scenes")
    return lines


def format_summary(summary: dict) -> str:
    """Returns the summary of `validate` as text for a terminal."""
    producer = ", ".join(f"{key} {value}" for key, value in summary["producer"].items())
    splits = ", ".join(f"{count} {split}" for split, count in summary["splits"].items())
    rows = [("tensor", "shape", "dtype", "scenes")]
    for tensor in summary["tensors"]:
        shape = "[" + ", ".join(tensor["shape"]) + "]"
        rows.append((tensor["name"], shape, tensor["dtype"], str(tensor["scenes"])))
    rows += [("", "", "", ""), ("questions", "", "", str(sum(summary["questions"].values())))]
    rows += [
        (f"  {files.one_line(kind, 80)}", "", "", str(count))
        for kind, count in summary["questions"].items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"producer: {producer}",
        f"scenes: {summary['scenes']} ({splits}), {summary['bytes'] / 1e6:.1f} MB",
        "",
    ]
    for row in rows:
        cells = [f"{row[column]:<{widths[column]}}" for column in range(3)]
        lines.append("  ".join((*cells, f"{row[3]:>8}")).rstrip())
    if summary["alignment"]:
        lines += ["", *_alignment_lines(summary["alignment"])]
    if summary["warnings"]:
        lines += ["", *(f"warning: {warning}" for warning in summary["warnings"])]
    if summary["dropped"]:
        lines += ["", f"dropped, with {summary['dropped_questions']} questions:"]
        lines += ["  " + ": ".join(filter(None, parts)) for parts in summary["dropped"]]
    return "\n".join(lines)
