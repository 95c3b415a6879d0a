"""Answers VSI-Bench questions of an export with the model of a run, and scores the answers."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax

from geode_jax.data.pipeline import Pipeline
from geode_jax.data.question_records import open_question_records
from geode_jax.data.settings import measure_lengths
from geode_jax.errors import UserError
from geode_jax.evaluate import vsi_bench
from geode_jax.exports import Export, files
from geode_jax.exports.scene_names import room_of
from geode_jax.results.notes import left_out_notes, synthetic_notes
from geode_jax.row_files import RowFile, check_prediction, read_rows
from geode_jax.runs.config import load_settings
from geode_jax.runs.data import test_split
from geode_jax.runs.geode import GeodeSettings, with_rationale_module
from geode_jax.runs.settings import Settings
from geode_jax.runs.trained import Trained, open_trained
from geode_jax.runtime.lock import beside, locked
from geode_jax.training.metrics import write_json

_SIZES = ("grid", "token_width", "view_tokens", "camera_width", "image", "point_width")
"""Fields of `SceneShapes` that determine shapes of a model's parameters."""


def evaluate_run(
    workdir: Path,
    out: Path,
    *,
    export: Path | None = None,
    spatio: int | None = None,
    blind: Path | None = None,
) -> dict[str, Any]:
    """Answers the benchmark's questions of a test split with a run's best checkpoint, and scores.

    Decoding is greedy. What a scene's questions share is computed once for all of them. The
    baselines are the same model without vision, frequency and random. The same call continues an
    interrupted one.

    Args:
        workdir: of the run.
        out: result file; `OUT_predictions.jsonl` beside it gets the rows, which
            `vsi_bench.evaluate` can score again.
        export: folder with the questions; None: the export of the run.
        spatio: number of rationale tokens that the decoder sees (Table 3); None: all.
        blind: rows with `id` and `prediction` of a model that was trained without vision.

    Returns:
        The result, in the form of `vsi_bench.result`.

    Raises:
        UserError, ExportError: the run cannot be opened, the export does not fit its model, has a
            room that the run was trained on, no question of the benchmark or one that cannot be
            scored, or `out` cannot be written.
    """
    system = load_settings(workdir).system
    if system.learns_rationales:
        raise UserError(
            f"{workdir}: a {system.name} run writes rationales; VSI-Bench needs answers"
        )
    if not out.parent.is_dir() or out.is_dir():  # before the model runs in vain
        raise UserError(f"--out: {out}: its folder is missing, or it is a directory itself")
    with locked(beside(out), f"--out: {out}"):
        return _evaluate(workdir, out, export, spatio, blind)


def _evaluate(
    workdir: Path, out: Path, export: Path | None, spatio: int | None, blind: Path | None
) -> dict[str, Any]:
    trained = open_trained(workdir, slots=spatio, same_export=export is None)
    source = trained.export if export is None else Export(export)
    split = test_split(source)
    if export is not None:
        _refuse_trained_rooms(trained.export, source, split)
    pipeline = _pipeline(trained, source, split)
    told = None if blind is None else read_rows(blind, check_prediction)
    kept = {
        name: out.with_name(f".{out.stem}_{name}.jsonl") for name in ("model", "vision_removed")
    }
    with jax.set_mesh(trained.mesh):
        answered = {
            name: trained.evaluator.run(
                trained.state, pipeline, None, vision=seen, label=label, kept=kept[name]
            )
            for name, seen, label in (
                ("model", True, f"VSI-Bench, {split}"),
                ("vision_removed", False, "vision removed"),
            )
        }
    columns = {name: vsi_bench.rows_of(found.predictions) for name, found in answered.items()}
    sources = {}
    if told is not None:
        columns = {"model": columns["model"], "blind": _told(told, columns["model"]), **columns}
        sources["blind"] = told.source()
    predictions = out.with_name(f"{out.stem}_predictions.jsonl")
    data = "".join(json.dumps(row) + "\n" for row in columns["model"]).encode()
    files.write_bytes(predictions, data)
    manifest = source.folder / "manifest.json"
    producer = source.manifest["producer"]
    result = vsi_bench.result(
        columns,
        dataset={
            "file": str(manifest),
            "sha256": hashlib.sha256(files.read_bytes(manifest)).hexdigest(),
            "revision": f"{producer['project']} {producer['commit']}, split {split}",
        },
        predictions={
            "model": {"file": str(predictions), "sha256": hashlib.sha256(data).hexdigest()},
            **sources,
        },
        frames=pipeline.shapes.views,
        decoding="greedy",
        notes=_notes(trained, workdir, source, pipeline, spatio),
    )
    write_json(out, result)
    for path in kept.values():
        path.unlink(missing_ok=True)
    return result


def _refuse_trained_rooms(trained: Export, source: Export, split: str) -> None:
    """Refuses to score a run on rooms that it was trained on.

    Raises:
        UserError: a scene of the split is, by its id, in a room of the run's training split.
    """
    learned = {room_of(scene): scene for scene in trained.scene_ids("train")}
    both = [scene for scene in source.scene_ids(split) if room_of(scene) in learned]
    if both:
        more = f" and {len(both) - 1} more" if len(both) > 1 else ""
        raise UserError(
            f"{source.folder}: scene {both[0]}{more}: the run was trained on this room "
            f"({learned[room_of(both[0])]}); prepare its data with --exclude-scenes"
        )


def _told(blind: RowFile, rows: list[dict]) -> list[dict]:
    """Returns the rows with the predictions of a blind model.

    Raises:
        UserError: it has not answered one of them.
    """
    absent = [row["id"] for row in rows if str(row["id"]) not in blind.rows]
    if absent:
        raise UserError(
            f"--blind: {blind.path}: no prediction for {len(absent)} of {len(rows)} questions, the "
            f"first is {absent[0]}"
        )
    return [row | {"prediction": blind.rows[str(row["id"])]["prediction"]} for row in rows]


def _pipeline(trained: Trained, export: Export, split: str) -> Pipeline:
    """Returns a pipeline of all benchmark questions of any length.

    A row of a batch asks all questions of a scene, so that what they share is computed once; a
    batch has at most about as many questions as in training.
    """
    usual = trained.pipeline.config
    records = open_question_records(export, usual.on_bad_scene)
    most = 1
    for scene in records.scene_ids(split):
        asked = [{**record, "prediction": ""} for record in records.read(scene)]
        rows = vsi_bench.rows_of(asked)
        most = max(most, len(rows))
        for row in rows:
            vsi_bench.check_question(row, f"{export.folder}: question {row['id']}")
    shards = trained.mesh.shape["data"] * trained.mesh.shape["fsdp"]
    scenes = usual.scenes_per_batch * usual.questions_per_scene // most // shards * shards
    longest = measure_lengths(
        export,
        trained.tokenizer,
        split,
        kinds=vsi_bench.QUESTION_TYPES,
        on_bad_scene=usual.on_bad_scene,
        controls=usual.controls,
    )
    if not longest:
        raise UserError(f"{export.folder}: split {split} has no question of VSI-Bench")
    question_length = max(usual.question_length, longest.question)
    answer_length = max(usual.answer_length, longest.answer)
    config = dataclasses.replace(
        usual.asking_all(),
        export=str(export.folder),
        scenes_per_batch=max(scenes, min(shards, usual.scenes_per_batch)),
        questions_per_scene=most,
        rows_per_scene=most,
        question_length=question_length,
        answer_length=answer_length,
        row_length=max(usual.row_length, question_length + answer_length),
        answer_field="answer",
    )
    pipeline = Pipeline(export, trained.tokenizer, config, split, vsi_bench.QUESTION_TYPES)
    own, other = trained.pipeline.shapes, pipeline.shapes
    for name in _SIZES:
        if name == "image" and _squeezes(trained.settings):
            continue
        here, there = getattr(own, name), getattr(other, name)
        if here != there:
            raise UserError(f"{export.folder}: {name} is {there}, the run's model has {here}")
    if other.views > own.views:
        raise UserError(
            f"{export.folder}: a scene has {other.views} views, the run's model has {own.views}"
        )
    return pipeline


def _squeezes(settings: Settings) -> bool:
    """Returns whether a model brings pictures of any size to its own."""
    return isinstance(settings, GeodeSettings) and settings.model.vision.image_size > 0


def _notes(
    trained: Trained, workdir: Path, export: Export, pipeline: Pipeline, spatio: int | None
) -> list[str]:
    notes = [
        f"model: {trained.settings.system.name}, {workdir}, step {trained.state.step}",
        "vision removed: the same model without any view",
    ]
    if spatio is not None:
        slots = with_rationale_module(trained.settings, "--spatio", workdir).model.drm.slots
        notes.append(f"rationale tokens: the first {spatio} of {slots}")
    if pipeline.split != "test":
        notes.append(f"the export has no test split; these are questions of {pipeline.split}")
    # Questions of other kinds and for boxes are no part of the benchmark.
    left_out = {
        reason: count
        for reason, count in pipeline.dropped.items()
        if not reason.startswith(("kind ", "boxes "))
    }
    return notes + synthetic_notes(export) + left_out_notes(left_out)
