"""The end of a run: scores beside their baselines, `summary.json`, `report.html`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from geode_jax.errors import UserError
from geode_jax.evaluate import scores as scoring
from geode_jax.evaluate.evaluator import Evaluation
from geode_jax.evaluate.metrics.text import answer_rows, with_reference
from geode_jax.evaluate.report.charts import depth_colours
from geode_jax.evaluate.report.page import write_report
from geode_jax.exports import Export
from geode_jax.measure.cost import measure_speed, parameter_counts, peak_memory
from geode_jax.objectives.hidden_cot import HiddenCoTModel
from geode_jax.results.blind import blind_column
from geode_jax.results.notes import left_out_notes, synthetic_notes
from geode_jax.runs.build import Run, target_lines
from geode_jax.runs.settings import Settings
from geode_jax.runs.summary import REPORT, SUMMARY, end, kept_answers, missing, write_predictions
from geode_jax.runs.trained import Trained
from geode_jax.runtime.distributed import is_main
from geode_jax.sources.rooms.scene import render, scene_from_id
from geode_jax.training.metrics import read_metrics
from geode_jax.training.step import TrainState
from geode_jax.version import software
from geode_jax.weights.convert import Model

PICTURE_SIDE = 240
"""Side in pixels of a rendered view in the report."""


def evaluate_and_report(
    run: Run,
    state: TrainState,
    workdir: Path,
    train: dict,
    losses: dict[str, float],
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Scores the model, its baselines and the frequency baseline on the test split.

    The baselines are the same model without vision, and a blind run where there is one.

    An interrupted call continues with the next batch. `summary.json` is written last.

    Args:
        run: the finished run.
        state: the parameters.
        workdir: receives `summary.json`, `predictions.jsonl` and `report.html`.
        train: facts about the training, for the summary.
        losses: of `state` on the val split, from `Evaluator.losses`.
        check: called between batches; may raise to interrupt.

    Returns:
        The summary.
    """
    settings, pipeline = run.settings, run.pipelines["test"]
    reference, scenes = settings.eval.reference, settings.eval.test_scenes

    def answer(name: str, label: str, **options) -> Evaluation:
        kept = kept_answers(workdir, name)
        return run.evaluator.run(
            state, pipeline, scenes, label=label, kept=kept, check=check, **options
        )

    model = answer("model", "test", heads=True)
    removed = answer("vision_removed", "vision removed", vision=False)
    answered = [dict(p) for p in model.predictions]
    frequency = scoring.frequency_baseline(run.train_records(), answered, reference)
    columns = {"model": model.predictions, **blind_column(settings, answered)}
    columns |= {"vision_removed": removed.predictions, "frequency": frequency}
    scores = {name: scoring.score(p, reference) for name, p in columns.items()}
    scores["model"] |= model.depth.result() | model.detection.result()
    scores["model"] |= {
        f"{scoring.PERCENT_PREFIX}{key}": value
        for key, value in scoring.percent_of_teacher(answered).items()
    }
    scores["model"] |= {"val_loss": losses["val/loss"]}
    if "val/text" in losses:
        scores["model"] |= {"val_text_loss": losses["val/text"]}
    efficiency = _efficiency(run, state)
    notes = _notes(run)
    summary = {
        "scores": scores,
        "train": train | peak_memory(),
        "efficiency": efficiency,
        "reference": reference,
        "test_scenes": min(scenes, len(model.scenes)),
        "notes": notes,
        "remarks": _score_notes(run.export),
    }
    if is_main():
        write_predictions(workdir, model.predictions)
        write_report(
            workdir / REPORT,
            title=f"{settings.system.name}: {workdir.name}",
            origin=f"{software()}, jax {jax.__version__}, seed {settings.seed}",
            config_text=json.dumps(settings.values, indent=1),
            metrics_rows=read_metrics(workdir / "metrics.jsonl"),
            scores=scores,
            examples=_examples(run.export, model, reference, settings.eval.examples),
            depth_examples=_depth_examples(run, model),
            efficiency=efficiency | {"training_seconds": train["seconds"], "steps": train["steps"]},
            notes=notes,
            score_notes=summary["remarks"],
        )
    return end(workdir, summary)


def show(summary: dict[str, Any], workdir: Path) -> None:
    """Prints the results of a run, at its end and whenever it is started again."""
    if not any(summary.get("scores", {}).values()):
        raise missing(workdir, "scores")
    print(scoring.score_table(summary["scores"], summary.get("remarks")))
    print("\n".join(f"note: {note}" for note in summary.get("notes", ())))
    if (workdir / REPORT).exists():
        print(f"report: {workdir / REPORT}", flush=True)
    else:
        print(
            f"report: {REPORT} is missing; delete {SUMMARY} and start the run again to write it",
            flush=True,
        )


# --- Publishing -----------------------------------------------------------------------------------


def refuse_to_publish(settings: Settings, workdir: Path, part: str | None) -> None:
    """Refuses a part of a student, and a student that sees no scene.

    Args:
        settings: of the run.
        workdir: of the run.
        part: of the model; None: all of it.

    Raises:
        UserError: see above.
    """
    if part:
        raise UserError("--part: the student's decoder attends to its scene; export the whole")
    if not settings.loss.vision:
        raise UserError(f"{workdir}: a blind baseline sees no scene; there is nothing to export")


def published(model: nnx.Module, part: str | None) -> Model:
    """Returns the student without the log-variances of its losses."""
    del part
    assert isinstance(model, HiddenCoTModel)
    return model.student


def entries(trained: Trained) -> dict[str, Any]:
    """Returns what `config.json` has of a run beside the model's sizes."""
    return {"vision": trained.pipeline.config.vision}


# --- Parts of the report --------------------------------------------------------------------------


def _notes(run: Run) -> list[str]:
    """Returns what a reader must know to trust the scores."""
    return [
        "vision removed: the same model without any view; the true blind baseline is the run "
        "eval.blind, trained with vision=off, and a column of its own where it exists",
        "frequency: the most common training answer of each kind of question",
        *synthetic_notes(run.export),
        *target_lines(run.objective, run.pipelines["train"]),
        *left_out_notes(run.pipelines["test"].dropped),
    ]


def _score_notes(export: Export) -> dict[str, str]:
    remarks = ["input contains depth"] if export.manifest["tokens_contain_depth"] else []
    aligned = (entry.get("alignment", {}) for entry in export.manifest["scenes"])
    estimated = sum(found.get("depth_target") == "vggt" for found in aligned)
    if estimated:
        remarks.append(f"the target is VGGT's own depth in {estimated} scenes of the export")
    remark = "; ".join(remarks)
    if not remark:
        return {}
    return {key: remark for key in ("depth_rmse", "depth_mae", "depth_delta1")}


def _efficiency(run: Run, state: TrainState) -> dict[str, float]:
    """Returns the columns of Table IV for this machine: size, time per answer, memory."""
    student = jax.tree.leaves(state.params["student"])
    _, batch = next(iter(run.pipelines["test"].eval_batches(run.settings.data.scenes_per_batch)))
    questions = int(np.sum(np.asarray(batch.answer_length_SQ) > 0))
    speed = measure_speed(lambda: run.evaluator.answer_batch(state, batch), questions)
    return parameter_counts(student) | speed | peak_memory()


def _examples(export: Export, model: Evaluation, reference: str, count: int) -> list[dict]:
    """Returns answers of different kinds from different scenes, each with its first view."""
    chosen, kinds, seen = [], set(), set()
    for record in model.predictions:
        if record["kind"] not in kinds and record["scene_id"] not in seen:
            chosen.append(record)
            kinds.add(record["kind"])
            seen.add(record["scene_id"])
    rest = [r for r in model.predictions if r["scene_id"] not in seen]
    chosen = (chosen + rest)[:count]
    if not chosen:
        return []
    chosen = with_reference(chosen, reference)
    rows = answer_rows(chosen, reference)
    images = {r["scene_id"]: view_images(export, r["scene_id"]) for r in chosen}
    examples = []
    for record, row in zip(chosen, rows, strict=True):
        image = images[record["scene_id"]]
        metrics = {k: v for k, v in row.items() if isinstance(v, float)}
        example = dict(record) | {"metrics": metrics}
        examples.append(example if image is None else example | {"image": image[0]})
    return examples


def view_images(export: Export, scene_id: str) -> np.ndarray | None:
    """Returns images [V, h, w, 3] uint8 of a scene, stored or rendered; None if it has none."""
    stored = export.read_scene(scene_id, ["images"]).get("images")
    if stored is not None:
        return stored
    try:
        scene = scene_from_id(scene_id)
    except ValueError:
        return None
    return render(scene, PICTURE_SIDE, PICTURE_SIDE)["rgb"]


def _depth_examples(run: Run, model: Evaluation, count: int = 3) -> list[dict]:
    """Returns the first views of some scenes with their true and predicted depth."""
    examples = []
    for scene_id, predicted in list(model.depth_maps.items())[:count]:
        target = run.export.read_scene(scene_id, ["target/depth"]).get("target/depth")
        if target is None:
            continue
        image = view_images(run.export, scene_id)
        if image is None:
            image = depth_colours(target, float(target.min()), float(target.max()))
        examples.append(
            {
                "image": image[0],
                "target": target[0],
                "prediction": predicted[0],
                "caption": scene_id,
            }
        )
    return examples
