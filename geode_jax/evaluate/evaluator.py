"""Evaluates a model over a split: losses and generated answers; a student's depth and boxes."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from geode_jax import __version__
from geode_jax.data.pipeline import Pipeline
from geode_jax.data.tokens import Tokenizer
from geode_jax.evaluate.finished_batches import FinishedBatches
from geode_jax.evaluate.metrics.depth import DepthMetrics
from geode_jax.evaluate.metrics.detection import DetectionMetrics
from geode_jax.exports import Export
from geode_jax.objectives.base import Objective, ScenePrediction
from geode_jax.sealed import checksum
from geode_jax.shapes import Batch, without_vision
from geode_jax.sharding import replicated, rows_of_process, shard_batch
from geode_jax.training.checkpoint_files import fingerprint
from geode_jax.training.metrics import progress
from geode_jax.training.step import TrainState


@dataclasses.dataclass
class Evaluation:
    """The answers of a model to the questions of a split, and its depth and boxes.

    Attributes:
        predictions: question records with the fields that `Objective.decode_answer` adds.
        depth: errors of a student's depth over all valid pixels.
        detection: a student's boxes, in the scenes whose boxes are known.
        depth_maps: scene id -> predicted depth [V, h, w] in metres, of the first scenes.
        scenes: ids of the scenes whose depth and boxes were measured.
    """

    predictions: list[dict]
    depth: DepthMetrics
    detection: DetectionMetrics
    depth_maps: dict[str, np.ndarray]
    scenes: set[str] = dataclasses.field(default_factory=set)

    def add(self, batch: dict[str, Any]) -> None:
        """Adds a batch in the form in which `FinishedBatches` stores it."""
        self.predictions += batch["predictions"]
        for scene in batch["scenes"]:
            self.scenes.add(scene["scene_id"])
            self.depth.add(*scene["depth"])
            if "depth_map" in scene:
                self.depth_maps[scene["scene_id"]] = np.asarray(scene["depth_map"], np.float32)
            if "boxes" in scene:
                self.detection.update(*scene["boxes"])


MAX_DEPTH_MAPS = 16
"""Most scenes whose predicted depth is stored: the report shows a few."""


class Evaluator:
    """Compiled evaluation of one objective.

    The parameters are arguments: one compilation serves the run, its best checkpoint, and the model
    with its vision removed.
    """

    def __init__(self, objective: Objective, graph: nnx.GraphDef, tokenizer: Tokenizer, mesh):
        self._objective, self._tokenizer, self._mesh = objective, tokenizer, mesh

        def model_of(state):
            return nnx.merge(graph, state.params, state.frozen)

        def terms(state, batch):
            return objective.terms(model_of(state), batch)

        def total(state, sums):
            return objective.total(model_of(state), sums)[0]

        def answers(state, batch):
            model = model_of(state)
            return objective.answer(
                model, objective.encode_scene(model, batch), batch, tokenizer.eos_id
            )

        def heads(state, batch):
            true = (batch.target_depth_SVhw, batch.view_mask_SV, batch.boxes_known_S)
            boxes = (batch.target_boxes_SN7, batch.target_labels_SN)
            return objective.predict_scene(model_of(state), batch), (*true, *boxes)

        # Every process scores all answers, so each needs all of them.
        whole = functools.partial(jax.jit, out_shardings=replicated(mesh))
        self._terms, self._total = whole(terms), whole(total)
        self._answers, self._heads = whole(answers), whole(heads)

    def losses(
        self,
        state: TrainState,
        pipeline: Pipeline,
        scenes: int,
        vision: Literal["own", "none", "other"] = "own",
        *,
        check: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Returns validation losses: `val/loss` (eq. 2), `val/text`, every `val/<term>/<part>`.

        Args:
            state: the parameters.
            pipeline: of the split.
            scenes: number of scenes.
            vision: what precedes the questions of a scene: "own" its own vision tokens, "none"
                nothing, "other" the vision tokens of another scene.
            check: called before every batch; may raise to interrupt.
        """
        sums: dict[str, tuple] = {}
        rows = rows_of_process(self._mesh, pipeline.config.scenes_per_batch)
        for _, batch in pipeline.eval_batches(scenes, shuffled=vision == "other", rows=rows):
            check()
            shown = without_vision(batch) if vision == "none" else batch
            terms = jax.device_get(self._terms(state, self._place(shown, pipeline)))
            for name, (part, count) in terms.items():
                before = sums.get(name, (np.float32(0), np.float32(0)))
                sums[name] = (before[0] + part, before[1] + count)
        out = {f"val/{name}": float(p) / max(float(c), 1.0) for name, (p, c) in sums.items()}
        out["val/loss"] = float(self._total(state, sums))
        return out

    def run(
        self,
        state: TrainState,
        pipeline: Pipeline,
        scenes: int | None,
        *,
        vision: bool = True,
        heads: bool = False,
        label: str = "evaluating",
        kept: Path | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        """Generates answers to all questions of `scenes` scenes.

        Args:
            state: the parameters.
            pipeline: of the split.
            scenes: number of scenes; None: all.
            vision: False removes every view from the same model (a cheap blind baseline).
            heads: True to measure depth maps and boxes too.
            label: of the progress bar.
            kept: file of finished batches, from which an interrupted call continues.
            check: called before every batch; may raise to interrupt.
        """
        out = Evaluation([], DepthMetrics(), DetectionMetrics(), {})
        same = None if kept is None else self._identity(state, pipeline, scenes, vision, heads)
        with FinishedBatches(kept, same) as finished:
            for batch in finished.earlier:
                out.add(batch)
            total = pipeline.question_count(scenes)
            bar = progress(total, len(out.predictions), " questions", label)
            rows = rows_of_process(self._mesh, pipeline.config.scenes_per_batch)
            first = len(finished.earlier)
            for records, batch in pipeline.eval_batches(scenes, rows=rows, first=first):
                check()
                shown = self._place(batch if vision else without_vision(batch), pipeline)
                answers = jax.device_get(self._answers(state, shown))
                done: dict[str, Any] = {"predictions": [], "scenes": []}
                for row, own in enumerate(records):
                    for column, record in enumerate(own):
                        answer = self._objective.decode_answer(
                            answers, (row, column), record, self._tokenizer
                        )
                        done["predictions"].append(record | answer)
                if heads:
                    predicted, target = jax.device_get(self._heads(state, shown))
                    if predicted is not None:
                        done["scenes"] = list(
                            _measured_scenes(records, out.scenes, predicted, target)
                        )
                finished.append(done)
                out.add(done)
                bar.update(len(done["predictions"]))
            bar.close()
        return out

    def _identity(self, state: TrainState, pipeline: Pipeline, *settings) -> str:
        """Returns a checksum of everything that the answers depend on."""
        model = fingerprint({"params": state.params, "frozen": state.frozen})
        manifest = Export(pipeline.config.export).manifest
        data = [pipeline.split, repr(pipeline.config), manifest["scenes"], manifest["questions"]]
        ids = [self._tokenizer.sha256, self._tokenizer.eos_id]
        return checksum([__version__, model, *data, *ids, *settings])

    def answer_batch(self, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        """Returns the result of `Objective.answer` for a whole host batch, on the device."""
        scenes = len(batch.view_mask_SV)
        rows = rows_of_process(self._mesh, scenes)
        own = jax.tree.map(lambda x: x[rows], batch)
        return self._answers(state, shard_batch(own, self._mesh, scenes))

    def _place(self, batch: Batch, pipeline: Pipeline) -> Batch:
        return shard_batch(batch, self._mesh, pipeline.config.scenes_per_batch)


def _measured_scenes(
    records: list[list[dict]], before: set[str], predicted: ScenePrediction, target: tuple
) -> Iterator[dict[str, Any]]:
    """Yields the depth errors and boxes of each new scene of a batch, in JSON's types."""
    depth, boxes, labels, scores = predicted
    true_depth, seen, boxes_known, true_boxes, true_labels = target
    measured = set(before)
    for row, own in enumerate(records):
        scene_id = own[0]["scene_id"] if own else None
        if scene_id is None or scene_id in measured:
            continue  # a row without a scene, or the scene's second row
        errors = DepthMetrics.measure(depth[row], true_depth[row], seen[row][:, None, None])
        scene = {"scene_id": scene_id, "depth": errors}
        if len(measured) < MAX_DEPTH_MAPS:
            scene["depth_map"] = depth[row].astype(np.float32).tolist()
        measured.add(scene_id)
        if boxes_known[row]:
            found = (boxes, labels, scores, true_boxes, true_labels)
            scene["boxes"] = [np.asarray(x[row]).tolist() for x in found]
        yield scene
