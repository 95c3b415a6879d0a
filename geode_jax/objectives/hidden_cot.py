"""Hidden-CoT: the student's losses of Sec. III-D under the uncertainties of eq. 2.

What each term of eq. 2 is made of (* = not in the paper, ours):

text        cross-entropy on the answer; where a teacher answered, KL to its top-k logits at a
            temperature and of the probability it left to all other tokens
            (`objectives.losses.distillation`)
depth_ce, depth_reg, depth_kl
            bin cross-entropy, L1 of the expected depth, KL to the teacher's bins
detection   focal + box loss of matched queries;
            * the category of every patch against the nouns' embeddings, so that a question's noun
            finds its patches
spatial     eq. 1 (features to the teacher's, cross-view); KL of left/right, above/below and the
            four relations;
            * the boxes of the objects it names, regressed from the states at their names; their
            places, gaps from the first of them (from what distances are asked from), the turn and
            the number asked for, from the question's encoding
multiview   L2 between depths predicted by two views, reprojected onto each other
feature     detector probabilities, spatial distributions, depth hints of student and teacher
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from geode_jax import ranges
from geode_jax.data.tokens import Tokenizer
from geode_jax.errors import UserError
from geode_jax.geometry.boxes import decode_boxes
from geode_jax.geometry.correspondence import correspondences
from geode_jax.models.generate import Sampling, before_end, generate
from geode_jax.models.layers import param
from geode_jax.models.student import Scene, Student, StudentConfig, StudentOutput
from geode_jax.objectives import losses
from geode_jax.objectives.base import Terms
from geode_jax.objectives.spatial import asked_terms
from geode_jax.objectives.text import text_term
from geode_jax.shapes import Array, Batch, without_vision

GROUPS = {
    "depth": ("depth_ce", "depth_reg", "depth_kl"),
    "detection": ("detection",),
    "spatial": ("spatial",),
    "multiview": ("multiview",),
    "feature": ("feature",),
}
"""What `drop=` and `only=` name (Table II) -> terms of eq. 2."""

WEIGHTS_INSIDE = {
    "spatial/features": 0.5,
    "spatial/cross_view": 0.1,
    "detection/patches": 4.0,
}
"""Weights inside a term of eq. 2 other than 1. `cross_view` is eq. 1's lambda_cross; the patches
would drown beside the boxes, and every question needs them."""


@dataclasses.dataclass(frozen=True)
class HiddenCoTConfig:
    """Attributes:
    student: the model.
    terms: the terms of eq. 2 that are paid.
    weights: "uncertainty" (eq. 2) or "static" (all 1).
    temperature: T of the teacher's logits, see `objectives.losses.distillation`.
    literal_cross_view: the sign of eq. 1 as printed; see `objectives.losses.cross_view`.
    vision: False trains the blind baseline: no vision tokens, no V, answers only.
    log_variance_bounds: of log sigma^2.
    """

    student: StudentConfig
    terms: tuple[str, ...] = losses.TERMS
    weights: Literal["uncertainty", "static"] = "uncertainty"
    temperature: float = 1.0
    literal_cross_view: bool = False
    vision: bool = True
    log_variance_bounds: tuple[float, float] = losses.LOG_VARIANCE_BOUNDS

    def __post_init__(self):
        fields = {"weights": ranges.one_of(("uncertainty", "static"))}
        ranges.check(self, {**fields, "temperature": ranges.real(0, above=True)})
        unknown = sorted(set(self.terms) - set(losses.TERMS))
        if unknown or not self.terms:
            shown = ", ".join(losses.TERMS)
            raise UserError(f"HiddenCoTConfig: terms: {self.terms} are not some of {shown}")
        bounds = self.log_variance_bounds
        if len(bounds) != 2 or not -math.inf < bounds[0] < bounds[1] < math.inf:
            raise UserError(f"HiddenCoTConfig: log_variance_bounds: {bounds} are not low, high")


class HiddenCoTModel(nnx.Module):
    """The student and the learned log-variances of eq. 2."""

    def __init__(self, config: HiddenCoTConfig, *, rngs: nnx.Rngs):
        self.student = Student(config.student, rngs=rngs)
        self.log_variance = nnx.Dict({name: param(jnp.zeros(())) for name in losses.TERMS})


@dataclasses.dataclass(frozen=True)
class HiddenCoT:
    """The `training.step.Objective` of the Hidden-CoT student."""

    config: HiddenCoTConfig

    trainable = nnx.Param
    # Eq. 2's own value moves with the uncertainties: two evaluations of it do not compare.
    judge = "text"
    looks_before_asked = True

    def build(self, rngs: nnx.Rngs) -> HiddenCoTModel:
        """The student and its log-variances."""
        return HiddenCoTModel(self.config, rngs=rngs)

    def prepare(self, batch: Batch) -> Batch:
        """The batch as the model may see it: without vision for the blind baseline."""
        return batch if self.config.vision else without_vision(batch)

    def terms(self, model: HiddenCoTModel, batch: Batch) -> Terms:
        """All losses that are paid, named `term/part`, as (sum, count)."""
        batch = self.prepare(batch)
        out = model.student(batch)
        decoder, said = model.student.decoder, out.answer_hidden_SQAD
        terms = {"text": text_term(decoder, said, batch, self.config.temperature)}
        if self.config.vision:
            terms |= depth_terms(out, batch, self.config.literal_cross_view)
            terms |= detection_terms(out, batch)
            terms |= spatial_terms(out, batch)
        return {name: pair for name, pair in terms.items() if term_of(name) in self.config.terms}

    def look(self, model: HiddenCoTModel, batch: Batch) -> Scene:
        """What the questions of a scene share."""
        return model.student.encode_scene(self.prepare(batch))

    def answer(
        self,
        model: HiddenCoTModel,
        scene: Scene,
        batch: Batch,
        eos_id: int,
        sampling: Sampling | None = None,
    ) -> dict[str, Array]:
        """Answers to a batch's questions, at most A tokens each.

        Returns:
            `tokens` [S, Q, A], and the decoded thinking tokens `thinking` [S, K] of the diagnostic
            mode (Sec. V-d): argmax over the vocabulary at the K thinking positions, never part of
            an answer.
        """
        student = model.student
        generated = generate(
            student.decoder,
            scene.prefix,
            batch.question_SQL,
            batch.question_length_SQ,
            max_new_tokens=batch.answer_SQA.shape[-1],
            eos_id=eos_id,
            prompt_prefix=student.config.vision_prefix,
            seen=scene.seen,
            seen_length_S=scene.seen_length_S,
            sampling=sampling,
        )
        thinking = jnp.argmax(student.thinking_logits(scene), axis=-1)
        return {"tokens": generated.tokens_SQA, "thinking": thinking}

    def say(
        self,
        out: dict[str, np.ndarray],
        place: tuple[int, int],
        record: Mapping[str, Any],
        tokenizer: Tokenizer,
    ) -> dict[str, Any]:
        """An answer of `answer` as text: `prediction` and `thinking_tokens` (K strings)."""
        words = [tokenizer.decode([i]) for i in out["thinking"][place[0]]]
        text = tokenizer.decode(before_end(out["tokens"][place], tokenizer.eos_id))
        return {"prediction": text.strip(), "thinking_tokens": words}

    def perceive(self, model: HiddenCoTModel, batch: Batch) -> tuple[Array, ...]:
        """What the heads see: depth [S, V, h, w] in metres, and of M detected objects boxes
        [S, M, 7], categories [S, M] and their probabilities [S, M]."""
        student = model.student
        scene = student.encode_scene(self.prepare(batch))
        S, V, P, D = scene.z_SVPD.shape
        logits = student.depth_head(scene.z_SVPD, student.config.patch_grid)
        centres = losses.depth_bin_centres(logits.shape[-1])
        found = student.detection_head(scene.z_SVPD.reshape(S, V * P, D), scene.seen_length_S)
        probability = jax.nn.sigmoid(found.class_logits_SYc)
        return (
            losses.expected_depth(logits.astype(jnp.float32), centres),
            decode_boxes(found.boxes_SYb),
            jnp.argmax(probability, axis=-1),
            jnp.max(probability, axis=-1),
        )

    def total(self, model: HiddenCoTModel, terms: Terms) -> tuple[Array, dict]:
        """Eq. 2, or the static ablation; weights by `term/part` for the log."""
        grouped = {}
        for term in self.config.terms:
            parts = {name: pair for name, pair in terms.items() if term_of(name) == term}
            if parts:
                inside = [WEIGHTS_INSIDE.get(name, 1.0) for name in parts]
                grouped[term] = losses.combine(list(parts.values()), inside)
        if self.config.weights == "static":
            total, weights = losses.static_total(grouped, dict.fromkeys(grouped, 1.0))
        else:
            log_variance = {name: model.log_variance[name][...] for name in grouped}
            total, weights = losses.uncertainty_total(
                grouped, log_variance, self.config.log_variance_bounds
            )
        return total, weights


def term_of(name: str) -> str:
    """`detection/boxes` -> `detection`."""
    return name.split("/")[0]


def patch_depth_logits(depth_logits_SVhwZ: Array, grid: tuple[int, int]) -> jax.Array:
    """Log of the mean bin probabilities of every patch's r x r cells, [S, V, P, B]."""
    S, V, h, w, B = depth_logits_SVhwZ.shape
    gh, gw = grid
    prob = jax.nn.softmax(depth_logits_SVhwZ, axis=-1)
    prob = prob.reshape(S, V, gh, h // gh, gw, w // gw, B).mean(axis=(3, 5))
    return jnp.log(prob.reshape(S, V, gh * gw, B) + 1e-9)


def _grid(out: StudentOutput, batch: Batch) -> tuple[int, int]:
    h, w = out.depth_logits_SVhwZ.shape[2:4]
    r = round((h * w / batch.vision_SVPC.shape[2]) ** 0.5)
    return h // r, w // r


def depth_terms(out: StudentOutput, batch: Batch, literal_cross_view: bool = False) -> Terms:
    """Depth and what two views must agree on, Sec. III-D.2 and the second term of eq. 1."""
    grid = _grid(out, batch)
    centres = losses.depth_bin_centres(out.depth_logits_SVhwZ.shape[-1])
    target, logits = batch.target_depth_SVhw, out.depth_logits_SVhwZ
    seen_SV11 = jnp.asarray(batch.view_mask_SV)[..., None, None]
    patch_logits = patch_depth_logits(logits, grid)
    patch_depth = losses.expected_depth(patch_logits, centres)
    taught = jnp.asarray(batch.teacher_depth_bins_mask_S)[:, None, None] & seen_SV11[..., 0]
    index, visible = correspondences(
        batch.points_SVP3,
        batch.points_mask_SVP,
        batch.depth_hint_SVP,
        batch.extrinsic_SV34,
        batch.intrinsic_SV33,
        grid,
    )
    depth_m = losses.expected_depth(logits, centres)
    terms = {
        "depth_ce": losses.depth_bin_ce(
            logits, target, jnp.broadcast_to(seen_SV11, target.shape), centres
        ),
        "depth_reg": losses.depth_l1(depth_m, target, jnp.broadcast_to(seen_SV11, target.shape)),
        "multiview": losses.multi_view_consistency(
            patch_depth, batch.extrinsic_SV34, batch.intrinsic_SV33, grid, index, visible
        ),
    }
    if batch.teacher_depth_bins_SVPZ.shape[-1]:
        taught = jnp.broadcast_to(taught, patch_depth.shape)
        terms["depth_kl"] = losses.depth_bin_kl(patch_logits, batch.teacher_depth_bins_SVPZ, taught)
        teacher_depth = losses.expected_depth(
            jnp.log(jnp.asarray(batch.teacher_depth_bins_SVPZ) + 1e-9), centres
        )
        terms["feature/depth"] = losses.feature_alignment(
            depth=(patch_depth, teacher_depth, taught)
        )["depth"]
    if out.features_SVPF is not None:
        terms["spatial/cross_view"] = losses.cross_view(
            out.features_SVPF, index, visible, literal_sign=literal_cross_view
        )
    return terms


def detection_terms(out: StudentOutput, batch: Batch) -> Terms:
    """Boxes and categories, Sec. III-D.2."""
    found = losses.detection(
        out.detection.class_logits_SYc,
        out.detection.boxes_SYb,
        batch.target_boxes_SN7,
        batch.target_labels_SN,
        batch.boxes_known_S,
    )
    classes = out.patch_logits_SVPc.shape[-1]
    labels = jnp.asarray(batch.target_segmentation_SVP)
    terms = {
        "detection/classes": found.classes,
        "detection/boxes": found.boxes,
        # UNLABELLED (-2) is nobody's word; NO_CATEGORY (-1) is the last class.
        "detection/patches": losses.cross_entropy(
            out.patch_logits_SVPc, jnp.where(labels == -1, classes - 1, labels), labels >= -1
        ),
    }
    if batch.teacher_detection_SNc.shape[-1]:
        taught = (found.query_SN >= 0) & jnp.asarray(batch.teacher_detection_mask_S)[:, None]
        probabilities = jax.nn.sigmoid(out.detection.class_logits_SYc)
        terms["feature/detection"] = losses.feature_alignment(
            detection=(
                losses.take_matched(probabilities, found.query_SN),
                batch.teacher_detection_SNc,
                taught,
            )
        )["detection"]
    return terms


def spatial_terms(out: StudentOutput, batch: Batch) -> Terms:
    """Eq. 1's features, relations, and what the question is about, Sec. III-D.2 and III-D.3."""
    terms = {f"spatial/{name}": term for name, term in asked_terms(out.spatial, batch).items()}
    terms["feature/spatial"] = losses.feature_alignment(
        spatial=(
            jax.nn.sigmoid(out.spatial.relations_SQr),
            batch.teacher_relations_SQr,
            batch.teacher_relations_mask_SQr,
        )
    )["spatial"]
    if out.features_SVPF is not None:
        mask = jnp.asarray(batch.teacher_features_mask_S)[:, None] & batch.view_mask_SV
        terms["spatial/features"] = losses.spatial_features(
            out.features_SVPF, batch.teacher_features_SVPF, mask
        )
    return terms
