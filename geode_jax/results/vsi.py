"""VSI-Bench by a run's own model: predicted over an export and scored in one go."""

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
from geode_jax.runs import systems
from geode_jax.runs.config import load_config
from geode_jax.runs.data import test_split
from geode_jax.runs.trained import Trained, open_trained
from geode_jax.runtime.lock import beside, locked
from geode_jax.sources.rooms import export as rooms
from geode_jax.training.metrics import write_json

_SIZES = ("grid", "token_width", "view_tokens", "camera_width", "image", "point_width")
"""Fields of `SceneShapes` that a model's parameters depend on."""


def evaluate_run(
    workdir: Path, out: Path, *, export: Path | None = None, spatio: int | None = None
) -> dict[str, Any]:
    """Asks a run's best checkpoint the benchmark's questions of a test split, and scores them.

    Greedy; beside the model, the same model with its vision removed, frequency and random.

    Args:
        workdir: of the run.
        out: receives the result; `OUT_predictions.jsonl` beside it the rows that
            `vsi_bench.evaluate` gives the same scores.
        export: folder with the questions; None: the run's own.
        spatio: so many of the rationale tokens are seen (Table 3); None: all.

    Returns:
        The result, as of `vsi_bench.result`.

    Raises:
        UserError, ExportError: the run cannot be asked, the export does not fit its model or has
            no such question, or one that cannot be scored, or `out` cannot be written.
    """
    config = load_config(workdir)
    if systems.answer_field(config) == "rationale":
        raise UserError(
            f"{workdir}: a {config.system} run writes rationales; VSI-Bench wants answers"
        )
    if not out.parent.is_dir() or out.is_dir():  # before the model works for nothing
        raise UserError(f"--out: {out}: its folder is missing, or it is a directory itself")
    with locked(beside(out), f"--out: {out}"):
        return _evaluate(workdir, out, export, spatio)


def _evaluate(workdir: Path, out: Path, export: Path | None, spatio: int | None) -> dict[str, Any]:
    trained = open_trained(workdir, slots=spatio, same_export=export is None)
    asked = trained.export if export is None else Export(export)
    split = test_split(asked)
    pipeline = _pipeline(trained, asked, split)
    with jax.set_mesh(trained.mesh):
        answered = {
            name: trained.evaluator.run(trained.state, pipeline, None, vision=seen, label=label)
            for name, seen, label in (
                ("model", True, f"VSI-Bench, {split}"),
                ("vision_removed", False, "vision removed"),
            )
        }
    columns = {name: vsi_bench.rows_of(found.predictions) for name, found in answered.items()}
    said = out.with_name(f"{out.stem}_predictions.jsonl")
    data = "".join(json.dumps(row) + "\n" for row in columns["model"]).encode()
    files.write_bytes(said, data)
    manifest = asked.folder / "manifest.json"
    producer = asked.manifest["producer"]
    result = vsi_bench.result(
        columns,
        dataset={
            "file": str(manifest),
            "sha256": hashlib.sha256(files.read_bytes(manifest)).hexdigest(),
            "revision": f"{producer['project']} {producer['commit']}, split {split}",
        },
        predictions={"model": {"file": str(said), "sha256": hashlib.sha256(data).hexdigest()}},
        frames=pipeline.shapes.views,
        decoding="greedy",
        notes=_notes(trained, workdir, asked, pipeline, spatio),
    )
    write_json(out, result)
    return result


def _pipeline(trained: Trained, export: Export, split: str) -> Pipeline:
    """All questions of the benchmark, however long, in batches of the run's size."""
    usual = trained.pipeline.config
    records = open_question_records(export, usual.on_bad_scene)
    asked = (record for scene_id in records.scene_ids(split) for record in records.read(scene_id))
    for row in vsi_bench.rows_of({**record, "prediction": ""} for record in asked):
        vsi_bench.check_question(row, f"{export.folder}: question {row['id']}")
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
    question = max(usual.question_length, longest.question)
    answer = max(usual.answer_length, longest.answer)
    config = dataclasses.replace(
        usual.asking_all(),
        export=str(export.folder),
        question_length=question,
        answer_length=answer,
        row_length=max(usual.row_length, question + answer),
        answer_field="answer",
    )
    pipeline = Pipeline(export, trained.tokenizer, config, split, vsi_bench.QUESTION_TYPES)
    own, other = trained.pipeline.shapes, pipeline.shapes
    for name in _SIZES:
        here, there = getattr(own, name), getattr(other, name)
        if here != there:
            raise UserError(f"{export.folder}: {name} is {there}, the run's model has {here}")
    if other.views > own.views:
        raise UserError(
            f"{export.folder}: a scene has {other.views} views, the run's model has {own.views}"
        )
    return pipeline


def _notes(
    trained: Trained, workdir: Path, export: Export, pipeline: Pipeline, spatio: int | None
) -> list[str]:
    notes = [
        f"model: {trained.config.system}, {workdir}, step {trained.state.step}",
        "vision removed: the same model without any view",
    ]
    if spatio is not None:
        notes.append(f"rationale tokens: the first {spatio} of {trained.config.model.drm.slots}")
    if pipeline.split != "test":
        notes.append(f"the export has no test split; these are questions of {pipeline.split}")
    if export.manifest["producer"]["project"] == rooms.PRODUCER["project"]:
        notes.append("rooms are synthetic: nothing here compares with the papers' numbers")
    left_out = {
        reason: count
        for reason, count in pipeline.dropped.items()
        if count and not reason.startswith(("kind ", "boxes "))
    }
    if left_out:
        listed = ", ".join(f"{count} x {reason}" for reason, count in sorted(left_out.items()))
        notes.append(f"left out: {listed}")
    return notes
