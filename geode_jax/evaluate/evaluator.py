"""Runs a model over a split: losses, generated answers; a student's depth and boxes too."""

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
from geode_jax.evaluate.answered import Answered
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
    """What a model said about a split.

    Attributes:
        predictions: question records with the fields that `Objective.decode_answer` adds.
        depth: a student's errors over all pixels.
        detection: boxes found, over the scenes whose boxes are known.
        depth_maps: scene id -> predicted depth [V, h, w], metres, of the first scenes.
        scenes: ids of those whose depth and boxes were judged.
    """

    predictions: list[dict]
    depth: DepthMetrics
    detection: DetectionMetrics
    depth_maps: dict[str, np.ndarray]
    scenes: set[str] = dataclasses.field(default_factory=set)

    def take(self, batch: dict[str, Any]) -> None:
        """Adds a batch, as `Evaluator.run` measures it and `Answered` keeps it."""
        self.predictions += batch["predictions"]
        for scene in batch["scenes"]:
            self.scenes.add(scene["scene_id"])
            self.depth.add(*scene["depth"])
            if "depth_map" in scene:
                self.depth_maps[scene["scene_id"]] = np.asarray(scene["depth_map"], np.float32)
            if "boxes" in scene:
                self.detection.update(*scene["boxes"])


DEPTH_MAPS = 16
"""Of so many scenes, at most, the predicted depth is kept: the report shows a few."""


class Evaluator:
    """Compiled evaluation of one objective; parameters are arguments, so that one compile serves
    the run, its best checkpoint, and the model with its vision removed."""

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

        # Every process fetches all that is said: each of them scores it.
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
        """Validation losses: `val/loss` (eq. 2), `val/text` and every `val/<term>/<part>`.

        Args:
            state: whose parameters are judged.
            pipeline: of the split.
            scenes: how many of its scenes.
            vision: what a scene's questions stand behind: the scene, nothing, or another scene.
            check: called before every batch; may raise, to leave.
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
        """Generated answers to all questions of `scenes` scenes.

        Args:
            state: whose parameters answer.
            pipeline: of the split.
            scenes: how many of its scenes; None: all.
            vision: False removes every view from the same model (a cheap blind baseline).
            heads: also depth maps and boxes.
            label: of the progress bar.
            kept: file of finished batches, with which an interrupted call goes on.
            check: called before every batch; may raise, to leave.
        """
        out = Evaluation([], DepthMetrics(), DetectionMetrics(), {})
        of = None if kept is None else self._identity(state, pipeline, scenes, vision, heads)
        with Answered(kept, of) as answered:
            for batch in answered.before:
                out.take(batch)
            bar = progress(None, len(out.predictions), " questions", label)
            rows = rows_of_process(self._mesh, pipeline.config.scenes_per_batch)
            first = len(answered.before)
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
                    predicted, true = jax.device_get(self._heads(state, shown))
                    if predicted is not None:
                        done["scenes"] = list(_judged(records, out.scenes, predicted, true))
                answered.keep(done)
                out.take(done)
                bar.update(len(done["predictions"]))
            bar.close()
        return out

    def _identity(self, state: TrainState, pipeline: Pipeline, *settings) -> str:
        """A checksum of all that the answers depend on."""
        model = fingerprint({"params": state.params, "frozen": state.frozen})
        manifest = Export(pipeline.config.export).manifest
        asked = [pipeline.split, repr(pipeline.config), manifest["scenes"], manifest["questions"]]
        ids = [self._tokenizer.sha256, self._tokenizer.eos_id]
        return checksum([__version__, model, *asked, *ids, *settings])

    def answer_batch(self, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        """What `Objective.answer` gives for a whole host batch, on the device."""
        scenes = len(batch.view_mask_SV)
        rows = rows_of_process(self._mesh, scenes)
        own = jax.tree.map(lambda x: x[rows], batch)
        return self._answers(state, shard_batch(own, self._mesh, scenes))

    def _place(self, batch: Batch, pipeline: Pipeline) -> Batch:
        return shard_batch(batch, self._mesh, pipeline.config.scenes_per_batch)


def _judged(
    records: list[list[dict]], before: set[str], predicted: ScenePrediction, true: tuple
) -> Iterator[dict[str, Any]]:
    """Depth and boxes of the scenes of a batch, each once, as JSON holds them."""
    depth, boxes, labels, scores = predicted
    true_depth, seen, boxes_known, true_boxes, true_labels = true
    judged = set(before)
    for row, own in enumerate(records):
        scene_id = own[0]["scene_id"] if own else None
        if scene_id is None or scene_id in judged:
            continue  # a row without a scene, or the scene's second row
        measured = DepthMetrics.measure(depth[row], true_depth[row], seen[row][:, None, None])
        scene = {"scene_id": scene_id, "depth": measured}
        if len(judged) < DEPTH_MAPS:
            scene["depth_map"] = depth[row].astype(np.float32).tolist()
        judged.add(scene_id)
        if boxes_known[row]:
            found = (boxes, labels, scores, true_boxes, true_labels)
            scene["boxes"] = [np.asarray(x[row]).tolist() for x in found]
        yield scene
