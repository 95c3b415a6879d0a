"""VSI-Bench as an export: its questions about its videos, all of them in the test split.

The layout is that of the data set's repository, with the archives of videos unpacked:

    test.jsonl, or test-*.parquet           id, dataset, scene_name, question_type, question,
                                            options, ground_truth
    pruned_ids.txt                          ids that VSI-Bench-Debiased leaves out
    arkitscenes/*.mp4  scannet/*.mp4  scannetpp/*.mp4

A scene is a video, its views are the frames that the benchmark's harness shows to models of a fixed
number of frames (`exports.videos.uniform_indices`); `frame_index` has their numbers. There is no
depth, camera or box. Pictures are squeezed into squares. The id of a question is `vsi-bench-<id>`.
"""

from collections import Counter
from pathlib import Path

from geode_jax import exports
from geode_jax.errors import UserError
from geode_jax.exports import made_from
from geode_jax.exports.kinds import VSI_CHOICE_KINDS, VSI_NUMERIC_KINDS
from geode_jax.exports.scene_names import MisfitError, path_parts
from geode_jax.exports.units import KIND_UNITS
from geode_jax.row_files import read_rows, require
from geode_jax.runtime.bars import progress_bar
from geode_jax.sources.datasets import Report, Request
from geode_jax.sources.datasets.images import IMAGE_SIDE, video_arrays
from geode_jax.sources.datasets.scene_export import unchanged
from geode_jax.sources.stand_ins import TOKEN_WIDTH

VERSION = 1
"""Version of an export's content; goes up with every change of this converter."""
DATASETS = ("arkitscenes", "scannet", "scannetpp")
"""Folders of videos."""
PARTS = ("full", "debiased")
_TYPES = (*VSI_NUMERIC_KINDS, *VSI_CHOICE_KINDS)


def prepare(request: Request) -> Report:
    """Writes the export, see the module; the same request continues an interrupted one.

    Args:
        request: its `views` are the frames of a video, its part "full" (all questions) or
            "debiased". With `allow_missing`, questions about missing videos are counted.

    Raises:
        UserError: the rows are missing or break a rule, or a video is missing or damaged.
        ExportError: the folder cannot be written, or holds something else.
    """
    if request.scenes:
        raise UserError("--scenes: VSI-Bench has scenes of its own")
    if request.exclude:
        raise UserError("--exclude-scenes: VSI-Bench is never trained on")
    report = Report()
    rows, source = _rows(request, report)
    videos_of = {row["scene_name"]: _video(request.root, row) for row in rows}
    missing = [scene for scene, path in videos_of.items() if not path.is_file()]
    if (missing and not request.allow_missing) or len(missing) == len(videos_of):
        first = videos_of[missing[0]]
        archive = request.root / f"{first.parent.name}.zip"
        hint = f"unpack {archive}" if archive.is_file() else "--allow-missing counts such videos"
        more = f", nor are {len(missing) - 1} more videos" if len(missing) > 1 else ""
        raise UserError(f"{first}: is not there{more} ({hint})")
    kept = [row for row in rows if row["scene_name"] not in missing]
    report.dropped["question: its video is missing"] += len(rows) - len(kept)
    report.dropped = +report.dropped
    writer = exports.ExportWriter(
        request.out,
        producer={
            "project": "geode_jax VSI-Bench",
            "commit": f"vsi-bench version {VERSION}, rows {source[:12]}",
            "weights": "none",
            "licence": "questions Apache-2.0; videos: terms of ScanNet, ScanNet++, ARKitScenes",
            "request": f"{request.views} frames, {_part(request)}",
        },
        dtype="float16",
        scale="scene",
        token_width=TOKEN_WIDTH,
        patch_grid=request.patch_grid,
        tokens_contain_depth=False,
        categories=[],
        notes=f"VSI-Bench, {_part(request)}: {request.views} frames of each video, evenly spaced "
        "from the first to the last and rounded down (np.linspace), repeated in shorter videos; "
        f"squeezed to {IMAGE_SIDE} x {IMAGE_SIDE} pixels. A test set: never to be trained on.",
        resume=True,
    )
    with writer:
        sources = {
            scene: made_from.fingerprint(videos_of[scene])
            for scene in dict.fromkeys(row["scene_name"] for row in kept)
        }
        finished = unchanged(writer, sources)
        for scene in progress_bar(sources, desc="videos", unit="video"):
            if scene in finished:
                writer.register(finished[scene])
            else:
                made_from.note(writer, scene, sources[scene])
                arrays = video_arrays(videos_of[scene], request.views)
                writer.add_scene(scene, arrays, split="test")
        order = {scene: place for place, scene in enumerate(sources)}
        kept.sort(key=lambda row: order[row["scene_name"]])
        writer.add_questions(_question(row["scene_name"], row) for row in kept)
    report.kept = Counter(scenes=len(sources), questions=len(kept))
    return report


def _part(request: Request) -> str:
    if len(request.parts) > 1 or any(part not in PARTS for part in request.parts):
        raise UserError(f"--part: {' '.join(request.parts)} is not one of {', '.join(PARTS)}")
    return request.parts[0] if request.parts else PARTS[0]


def _rows(request: Request, report: Report) -> tuple[list[dict], str]:
    """Returns the checked rows of the requested part, and the sha256 of their file.

    Raises:
        UserError: there is no file of rows, or none of the pruned ids, or a row breaks a rule.
    """
    root = request.root
    found = [p for p in (root / "test.jsonl", *sorted(root.glob("test-*.parquet"))) if p.exists()]
    if not found:
        raise UserError(f"{root}: no test.jsonl and no test-*.parquet of VSI-Bench")
    if found[1:] and found[0].suffix == ".parquet":
        raise UserError(f"{root}: several files of rows: {', '.join(p.name for p in found)}")
    file = read_rows(found[0], _check_row)
    rows = file.rows
    if _part(request) == "debiased":
        path = root / "pruned_ids.txt"
        if not path.exists():
            raise UserError(f"{path}: is missing, which --part debiased needs")
        pruned = {key for _, (key,) in exports.files.read_list(path)}
        unknown = pruned - rows.keys()
        if unknown:
            raise UserError(f"{path}: {sorted(unknown)[0]!r} is no id of {found[0]}")
        rows = {key: row for key, row in rows.items() if key not in pruned}
        report.dropped["question: VSI-Bench-Debiased leaves it out"] += len(pruned)
    if not rows:
        raise UserError(f"{root}: no question is left")
    return list(rows.values()), file.sha256


def _check_row(row: dict, where: str) -> None:
    """Checks what `_question` and `_video` read; the export's contract checks the rest."""
    kind = row.get("question_type")
    require(kind in _TYPES, row, "question_type", f"one of {', '.join(_TYPES)}", where)
    known = row.get("dataset") in DATASETS
    require(known, row, "dataset", f"one of {', '.join(DATASETS)}", where)
    for name in ("scene_name", "question", "ground_truth"):
        value = row.get(name)
        good = isinstance(value, str) and value.strip()
        require(bool(good), row, name, "a text", where)
    try:
        plain = path_parts(row["scene_name"]) == [row["scene_name"]]
    except MisfitError:
        plain = False
    require(plain, row, "scene_name", "a name without folders", where)
    if kind in VSI_CHOICE_KINDS:
        options = row.get("options")
        good = isinstance(options, list) and options and all(isinstance(o, str) for o in options)
        require(bool(good), row, "options", "a list of texts", where)
        return
    try:
        positive = 0 < float(row["ground_truth"]) < float("inf")
    except ValueError:
        positive = False
    require(positive, row, "ground_truth", "a positive number", where)


def _video(root: Path, row: dict) -> Path:
    return root / row["dataset"] / f"{row['scene_name']}.mp4"


def _question(scene: str, row: dict) -> dict:
    """Returns a row as a record of the contract."""
    kind, truth = row["question_type"], row["ground_truth"].strip()
    record = {
        "id": f"vsi-bench-{row['id']}",
        "scene_id": scene,
        "kind": kind,
        "question": row["question"],
        "answer": truth,
        "source": "vsi-bench",
    }
    if kind in VSI_CHOICE_KINDS:
        return record | {"options": row["options"]}
    return record | {"value": float(truth), "unit": KIND_UNITS[kind]}
