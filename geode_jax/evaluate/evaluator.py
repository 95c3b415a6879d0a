"""Runs a student over a split: losses, generated answers, depth, boxes, thinking tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from geode_jax import losses
from geode_jax.boxes import decode_boxes
from geode_jax.data.pipeline import Pipeline
from geode_jax.data.tokens import Tokenizer
from geode_jax.evaluate.depth_metrics import DepthMetrics
from geode_jax.evaluate.detection_metrics import DetectionMetrics
from geode_jax.inference.generate import answer
from geode_jax.metrics import progress
from geode_jax.objectives.hidden_cot import HiddenCoT
from geode_jax.shapes import Batch
from geode_jax.sharding import shard_batch
from geode_jax.train_step import TrainState


@dataclasses.dataclass
class Evaluation:
    """What a student said about a split.

    Attributes:
        predictions: question records with `prediction` and `thinking_tokens` (K strings).
        depth: errors over all pixels.
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

    def __init__(self, objective: HiddenCoT, graph: nnx.GraphDef, tokenizer: Tokenizer, mesh):
        self._tokenizer, self._mesh = tokenizer, mesh

        def model_of(state):
            return nnx.merge(graph, state.params, state.frozen)

        def terms(state, batch):
            return objective.terms(model_of(state), batch)

        def total(state, sums):
            return objective.total(model_of(state), sums, 1.0)[0]

        def answers(state, batch):
            batch = objective.prepare(batch)
            generated, thinking = answer(model_of(state).student, batch, eos_id=tokenizer.eos_id)
            return generated.tokens_SQA, thinking

        def heads(state, batch):
            student = model_of(state).student
            scene = student.look(objective.prepare(batch))
            S, V, P, D = scene.z_SVPD.shape
            logits = student.depth_head(scene.z_SVPD, student.config.patch_grid)
            centres = losses.depth_bin_centres(logits.shape[-1])
            found = student.detection_head(scene.z_SVPD.reshape(S, V * P, D), scene.seen_length_S)
            probability = jax.nn.sigmoid(found.class_logits_SMc)
            return (
                losses.expected_depth(logits.astype(jnp.float32), centres),
                decode_boxes(found.boxes_SMb),
                jnp.argmax(probability, axis=-1),
                jnp.max(probability, axis=-1),
            )

        self._terms, self._total = jax.jit(terms), jax.jit(total)
        self._answers, self._heads = jax.jit(answers), jax.jit(heads)

    def losses(self, state: TrainState, pipeline: Pipeline, scenes: int) -> dict[str, float]:
        """Validation losses: `val/loss` (eq. 2), `val/text` and every `val/<term>/<part>`."""
        sums: dict[str, tuple] = {}
        for _, batch in pipeline.eval_batches(scenes):
            terms = jax.device_get(self._terms(state, shard_batch(batch, self._mesh)))
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
        scenes: int,
        *,
        vision: bool = True,
        heads: bool = False,
        label: str = "evaluating",
    ) -> Evaluation:
        """Generated answers to all questions of `scenes` scenes.

        Args:
            state: whose parameters answer.
            pipeline: of the split.
            scenes: how many of its scenes.
            vision: False removes every view from the same model (a cheap blind baseline).
            heads: also depth maps and boxes.
            label: of the progress bar.
        """
        out = Evaluation([], DepthMetrics(), DetectionMetrics(), {})
        bar = progress(total=None, initial=0, unit=" questions", label=label)
        for records, batch in pipeline.eval_batches(scenes):
            shown = shard_batch(batch if vision else _numpy_blind(batch), self._mesh)
            tokens, thinking = jax.device_get(self._answers(state, shown))
            for row, own in enumerate(records):
                words = [self._tokenizer.decode([i]).strip() for i in thinking[row]]
                for record, ids in zip(own, tokens[row], strict=False):
                    said = decode_answer(self._tokenizer, ids)
                    out.predictions.append({**record, "prediction": said, "thinking_tokens": words})
                bar.update(len(own))
            if heads:
                self._measure_heads(out, state, records, batch, shown)
        bar.close()
        return out

    def answer_batch(self, state: TrainState, batch: Batch):
        """Tokens [S, Q, A] and thinking tokens [S, K] of a host batch, on the device."""
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


def decode_answer(tokenizer: Tokenizer, ids) -> str:
    """The text before the first end token."""
    ids = [int(i) for i in ids]
    if tokenizer.eos_id in ids:
        ids = ids[: ids.index(tokenizer.eos_id)]
    return tokenizer.decode(ids).strip()


def _numpy_blind(batch: Batch) -> Batch:
    return dataclasses.replace(batch, view_mask_SV=np.zeros_like(batch.view_mask_SV))
