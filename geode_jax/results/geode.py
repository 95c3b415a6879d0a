"""Scores of a finished GEODE stage: VSI-Bench for the last stage, rationale losses for others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx

from geode_jax.data.control import BOX, control_of
from geode_jax.errors import UserError
from geode_jax.evaluate import scores as scoring
from geode_jax.evaluate import vsi_bench
from geode_jax.evaluate.metrics.detection import oriented_iou
from geode_jax.measure.cost import peak_memory
from geode_jax.models.geode import Geode
from geode_jax.objectives.geode import GeodeStage
from geode_jax.results.blind import blind_column
from geode_jax.runs.build import Run
from geode_jax.runs.settings import Settings
from geode_jax.runs.summary import SUMMARY, end, kept_answers, missing, write_predictions
from geode_jax.runs.trained import Trained
from geode_jax.runtime.distributed import is_main
from geode_jax.training.step import TrainState
from geode_jax.weights.convert import Model


def evaluate_stage(
    run: Run,
    state: TrainState,
    workdir: Path,
    train: dict,
    losses: dict[str, float],
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Scores a finished stage; writes `summary.json`, and `predictions.jsonl` of the last stage.

    An interrupted call continues with the next batch. `summary.json` is written last.

    Args:
        run: the finished run.
        state: the parameters.
        workdir: receives the files.
        train: facts about the training, for the summary.
        losses: of `state` on the val split, from `Evaluator.losses`.
        check: called between batches; may raise to interrupt.

    Returns:
        The summary.
    """
    summary = {"val": dict(losses), "train": train | peak_memory()}
    if not run.settings.system.learns_rationales:
        summary |= _answers(run, state, workdir, check)
    else:
        val, scenes = run.pipelines["val"], run.settings.eval.val_scenes
        others: dict[str, Literal["none", "other"]] = {"empty": "none", "shuffled": "other"}
        for name, vision in others.items():
            other = run.evaluator.losses(state, val, scenes, vision, check=check)
            summary["val"] |= {f"val/text_prefix_{name}": other["val/text"]}
    return end(workdir, summary)


def show(summary: dict[str, Any], workdir: Path) -> None:
    """Prints the results of a run, at its end and whenever it is started again."""
    if "vsi" in summary:
        print(vsi_bench.table(summary["vsi"]))
    elif "val" in summary:
        print(scoring.loss_table(summary["val"]))
    else:
        raise missing(workdir, "val")
    print(f"summary: {workdir / SUMMARY}", flush=True)


def _answers(
    run: Run, state: TrainState, workdir: Path, check: Callable[[], None]
) -> dict[str, Any]:
    pipeline, scenes = run.pipelines["test"], run.settings.eval.test_scenes

    def answer(name: str, label: str, **settings) -> list[dict]:
        kept = kept_answers(workdir, name)
        return run.evaluator.run(
            state, pipeline, scenes, label=label, kept=kept, check=check, **settings
        ).predictions

    columns = {"model": answer("model", "test")}
    questions = [dict(record) for record in columns["model"]]
    columns |= blind_column(run.settings, questions)
    if run.settings.loss.vision and "blind" not in columns:
        # The cheap baseline, where no model was trained without vision.
        columns["vision_removed"] = answer("vision_removed", "vision removed", vision=False)
    columns["frequency"] = scoring.frequency_baseline(run.train_records(), questions)
    vsi = {
        name: vsi_bench.score(vsi_bench.rows_of(predictions))
        for name, predictions in columns.items()
    }
    # An export may ask for boxes alone.
    others = {n: [r for r in own if control_of(r) != BOX] for n, own in columns.items()}
    scores = {name: scoring.score(own) if own else {} for name, own in others.items()}
    for name in columns.keys() - {"frequency"}:
        scores[name] |= box_scores(columns[name])
    if is_main():
        write_predictions(workdir, columns["model"])
    return {"vsi": vsi, "scores": scores}


def box_scores(predictions: list[dict]) -> dict[str, float]:
    """Returns the scores of the questions for a box.

    Returns:
        `box_iou`: mean IoU; a question without a predicted box counts 0.
        `boxes_answered`: share of the questions with a predicted box.
        `box_centre_error`: mean distance of the centres in metres, over the predicted boxes.
    """
    questions = [r for r in predictions if control_of(r) == BOX]
    if not questions:
        return {}
    found = [r for r in questions if "predicted_box" in r]
    overlap, distance = 0.0, []
    for record in found:
        box, true = (np.array([record[key]]) for key in ("predicted_box", "box"))
        overlap += float(oriented_iou(box, true)[0, 0])
        distance.append(float(np.linalg.norm(box[0, :3] - true[0, :3])))
    scores = {"box_iou": overlap / len(questions), "boxes_answered": len(found) / len(questions)}
    return scores | ({"box_centre_error": float(np.mean(distance))} if distance else {})


# --- Publishing -----------------------------------------------------------------------------------


def refuse_to_publish(settings: Settings, workdir: Path, part: str | None) -> None:
    """Refuses the whole model of a stage that reads true boxes.

    Args:
        settings: of the run.
        workdir: of the run.
        part: of the model; None: all of it.

    Raises:
        UserError: see above.
    """
    if settings.system.reads_true_boxes and not part:
        raise UserError(
            f"{workdir}: {settings.system.name} reads true boxes instead of a room; export a later "
            "stage, or --part decoder"
        )


def published(model: nnx.Module, part: str | None) -> Model:
    """Returns a GEODE, or its decoder alone."""
    assert isinstance(model, Geode)
    return model.vlm.decoder if part else model


def entries(trained: Trained) -> dict[str, Any]:
    """Returns what `config.json` has of a run beside the model's sizes."""
    assert isinstance(trained.objective, GeodeStage)
    return trained.objective.hub_config()
