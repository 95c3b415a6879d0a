"""The end of a GEODE stage: the VSI-Bench table of the last, the rationale losses of the others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from geode_jax.data.control import BOX, control_of
from geode_jax.evaluate import scores as scoring
from geode_jax.evaluate import vsi_bench
from geode_jax.evaluate.metrics.detection import oriented_iou
from geode_jax.measure.cost import peak_memory
from geode_jax.runs.summary import (
    PREDICTIONS,
    SUMMARY,
    end,
    kept_answers,
    missing,
    read_predictions,
    write_predictions,
)
from geode_jax.runtime.distributed import is_main
from geode_jax.training.step import TrainState


def evaluate_stage(
    run,
    state: TrainState,
    workdir: Path,
    train: dict,
    losses: dict[str, float],
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Scores of a finished stage; writes `predictions.jsonl` of the last stage, and `summary.json`.

    An interrupted call goes on where it stood. `summary.json` is written last.

    Args:
        run: a `runs.build.Run`.
        state: the parameters to judge.
        workdir: receives the files.
        train: facts about the training, for the summary.
        losses: of `state` on the val split, as `Evaluator.losses` gives them.
        check: called between batches; may raise, to leave.

    Returns:
        The summary.
    """
    summary = {"val": dict(losses), "train": train | peak_memory()}
    if run.config.system == "geode_joint":
        summary |= _answers(run, state, workdir, check)
    else:
        val, scenes = run.pipelines["val"], run.config.eval.val_scenes
        for name, vision in (("empty", "none"), ("shuffled", "other")):
            other = run.evaluator.losses(state, val, scenes, vision, check=check)
            summary["val"] |= {f"val/text_prefix_{name}": other["val/text"]}
    return end(workdir, summary)


def show(summary: dict[str, Any], workdir: Path) -> None:
    """Prints what a run has come to, when it ends and whenever it is started again."""
    if "vsi" in summary:
        print(vsi_bench.table(summary["vsi"]))
    elif "val" in summary:
        print("\n".join(f"{name:<28}{x:8.3f}" for name, x in sorted(summary["val"].items())))
    else:
        raise missing(workdir, "val")
    print(f"summary: {workdir / SUMMARY}", flush=True)


def _answers(run, state: TrainState, workdir: Path, check: Callable[[], None]) -> dict[str, Any]:
    pipeline, scenes = run.pipelines["test"], run.config.eval.test_scenes

    def answer(name: str, label: str, **settings) -> list[dict]:
        kept = kept_answers(workdir, name)
        return run.evaluator.run(
            state, pipeline, scenes, label=label, kept=kept, check=check, **settings
        ).predictions

    columns = {"model": answer("model", "test")}
    asked = [dict(record) for record in columns["model"]]
    blind = Path(run.config.eval.blind) / PREDICTIONS
    if blind.exists() and run.config.loss.vision:
        said = {record["id"]: record for record in read_predictions(blind)}
        columns["blind"] = [said[record["id"]] for record in asked if record["id"] in said]
    elif run.config.loss.vision:
        # A model that learned blind says more, where there is one.
        columns["vision_removed"] = answer("vision_removed", "vision removed", vision=False)
    columns["frequency"] = scoring.frequency_baseline(run.train_records(), asked)
    vsi = {
        name: vsi_bench.score(vsi_bench.rows_of(predictions))
        for name, predictions in columns.items()
    }
    scores = {
        name: scoring.score([r for r in predictions if control_of(r) != BOX])
        for name, predictions in columns.items()
    }
    for name in columns.keys() - {"frequency"}:
        scores[name] |= box_scores(columns[name])
    if is_main():
        write_predictions(workdir, columns["model"])
    return {"vsi": vsi, "scores": scores}


def box_scores(predictions: list[dict]) -> dict[str, float]:
    """Of the questions for a box: mean IoU, mean distance of the centres in metres, share answered.

    A question that no box answers counts IoU 0 and is left out of the distance.
    """
    asked = [r for r in predictions if control_of(r) == BOX]
    if not asked:
        return {}
    found = [r for r in asked if "predicted_box" in r]
    overlap, distance = 0.0, []
    for record in found:
        box, true = (np.array([record[key]]) for key in ("predicted_box", "box"))
        overlap += float(oriented_iou(box, true)[0, 0])
        distance.append(float(np.linalg.norm(box[0, :3] - true[0, :3])))
    scores = {"box_iou": overlap / len(asked), "boxes_answered": len(found) / len(asked)}
    return scores | ({"box_centre_error": float(np.mean(distance))} if distance else {})
