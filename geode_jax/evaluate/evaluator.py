"""Runs a model over a split: losses, generated answers; a student's depth and boxes too."""

import dataclasses
import functools
from typing import Literal

import jax
import numpy as np
from flax import nnx

from geode_jax.data.pipeline import Pipeline
from geode_jax.data.tokens import Tokenizer
from geode_jax.evaluate.depth_metrics import DepthMetrics
from geode_jax.evaluate.detection_metrics import DetectionMetrics
from geode_jax.metrics import progress
from geode_jax.shapes import Batch, without_vision
from geode_jax.sharding import replicated, rows_of_process, shard_batch
from geode_jax.train_step import Objective, TrainState


@dataclasses.dataclass
class Evaluation:
    """What a model said about a split.

    Attributes:
        predictions: question records with what `Objective.say` adds, `prediction` at least.
        depth: a student's errors over all pixels.
        detection: boxes found, over the scenes whose boxes are known.
        depth_maps: scene id -> predicted depth [V, h, w], metres, for the report.
    """

    predictions: list[dict]
    depth: DepthMetrics
    detection: DetectionMetrics
    depth_maps: dict[str, np.ndarray]


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
            return objective.answer(model, objective.look(model, batch), batch, tokenizer.eos_id)

        def heads(state, batch):
            true = (batch.target_depth_SVhw, batch.view_mask_SV, batch.boxes_known_S)
            boxes = (batch.target_boxes_SN7, batch.target_labels_SN)
            return objective.perceive(model_of(state), batch), (*true, *boxes)

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
    ) -> dict[str, float]:
        """Validation losses: `val/loss` (eq. 2), `val/text` and every `val/<term>/<part>`.

        Args:
            state: whose parameters are judged.
            pipeline: of the split.
            scenes: how many of its scenes.
            vision: what a scene's questions stand behind: the scene, nothing, or another scene.
        """
        sums: dict[str, tuple] = {}
        rows = rows_of_process(self._mesh, pipeline.config.scenes_per_batch)
        for _, batch in pipeline.eval_batches(scenes, shuffled=vision == "other", rows=rows):
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
    ) -> Evaluation:
        """Generated answers to all questions of `scenes` scenes.

        Args:
            state: whose parameters answer.
            pipeline: of the split.
            scenes: how many of its scenes; None: all.
            vision: False removes every view from the same model (a cheap blind baseline).
            heads: also depth maps and boxes.
            label: of the progress bar.
        """
        out = Evaluation([], DepthMetrics(), DetectionMetrics(), {})
        bar = progress(total=None, initial=0, unit=" questions", label=label)
        rows = rows_of_process(self._mesh, pipeline.config.scenes_per_batch)
        for records, batch in pipeline.eval_batches(scenes, rows=rows):
            shown = self._place(batch if vision else without_vision(batch), pipeline)
            answers = jax.device_get(self._answers(state, shown))
            for row, own in enumerate(records):
                for column, record in enumerate(own):
                    said = self._objective.say(answers, (row, column), record, self._tokenizer)
                    out.predictions.append(record | said)
                bar.update(len(own))
            if heads:
                self._measure_heads(out, records, *jax.device_get(self._heads(state, shown)))
        bar.close()
        return out

    def answer_batch(self, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        """What `Objective.answer` gives for a whole host batch, on the device."""
        scenes = len(batch.view_mask_SV)
        rows = rows_of_process(self._mesh, scenes)
        own = jax.tree.map(lambda x: x[rows], batch)
        return self._answers(state, shard_batch(own, self._mesh, scenes))

    def _place(self, batch: Batch, pipeline: Pipeline) -> Batch:
        return shard_batch(batch, self._mesh, pipeline.config.scenes_per_batch)

    @staticmethod
    def _measure_heads(out: Evaluation, records: list[list[dict]], said: tuple, true: tuple):
        depth, boxes, labels, scores = said
        true_depth, seen, boxes_known, true_boxes, true_labels = true
        for row, own in enumerate(records):
            scene_id = own[0]["scene_id"] if own else None
            if scene_id is None or scene_id in out.depth_maps:
                continue  # a row without a scene, or the scene's second row
            out.depth_maps[scene_id] = depth[row]
            out.depth.update(depth[row], true_depth[row], seen[row][:, None, None])
            if boxes_known[row]:
                found = (boxes[row], labels[row], scores[row])
                out.detection.update(*found, true_boxes[row], true_labels[row])
