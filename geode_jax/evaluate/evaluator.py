"""Runs a model over a split: losses, generated answers; a student's depth and boxes too."""

import dataclasses
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
from geode_jax.sharding import shard_batch
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
            return objective.total(model_of(state), sums, 1.0)[0]

        def answers(state, batch):
            return objective.answer(model_of(state), batch, tokenizer.eos_id)

        def heads(state, batch):
            return objective.perceive(model_of(state), batch)

        self._terms, self._total = jax.jit(terms), jax.jit(total)
        self._answers, self._heads = jax.jit(answers), jax.jit(heads)

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
        for _, batch in pipeline.eval_batches(scenes, shuffled=vision == "other"):
            shown = without_vision(batch) if vision == "none" else batch
            terms = jax.device_get(self._terms(state, shard_batch(shown, self._mesh)))
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
        for records, batch in pipeline.eval_batches(scenes):
            shown = shard_batch(batch if vision else without_vision(batch), self._mesh)
            answers = jax.device_get(self._answers(state, shown))
            for row, own in enumerate(records):
                for column, record in enumerate(own):
                    said = self._objective.say(answers, (row, column), record, self._tokenizer)
                    out.predictions.append(record | said)
                bar.update(len(own))
            if heads:
                self._measure_heads(out, state, records, batch, shown)
        bar.close()
        return out

    def answer_batch(self, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        """What `Objective.answer` gives for a host batch, on the device."""
        return self._answers(state, shard_batch(batch, self._mesh))

    def _measure_heads(self, out: Evaluation, state, records, batch: Batch, shown) -> None:
        depth, boxes, labels, scores = jax.device_get(self._heads(state, shown))
        for row, own in enumerate(records):
            scene_id = own[0]["scene_id"] if own else None
            if scene_id is None or scene_id in out.depth_maps:
                continue  # a row without a scene, or the scene's second row
            out.depth_maps[scene_id] = depth[row]
            mask = batch.view_mask_SV[row][:, None, None]
            out.depth.update(depth[row], batch.target_depth_SVhw[row], mask)
            if batch.boxes_known_S[row]:
                out.detection.update(
                    boxes[row],
                    labels[row],
                    scores[row],
                    batch.target_boxes_SN7[row],
                    batch.target_labels_SN[row],
                )
