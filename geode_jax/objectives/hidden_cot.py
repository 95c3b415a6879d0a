"""Hidden-CoT: the student's losses of Sec. III-D, weighted by the uncertainties of eq. 2.

The losses of each term of eq. 2 (* = not in the paper):

text        cross-entropy on the answer, or distillation of the teacher's top-k logits where there
            are any (`objectives.losses.distillation`)
depth_ce, depth_reg, depth_kl
            bin cross-entropy, L1 of the expected depth, KL to the teacher's bins
detection   focal + box loss of matched queries;
            * the category of every patch, classified by the embeddings of the categories' nouns
spatial     eq. 1 (features to the teacher's, cross-view); KL of left/right, above/below and the
            four relations;
            * the boxes of the objects that a question names, from the states at their names; from
            the question's encoding the objects' places, their distances from the first of them,
            and the turn and the number that are the answer
multiview   L2 between depths predicted by two views, reprojected onto each other
feature     L2 between detector probabilities, spatial distributions and depths of student and
            teacher
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, Shaped

from geode_jax import ranges
from geode_jax.data.pipeline import QUESTION_TARGETS, TEACHER_RELATION
from geode_jax.data.tokens import Tokenizer
from geode_jax.errors import UserError
from geode_jax.geometry.boxes import decode_boxes
from geode_jax.geometry.correspondence import correspondences
from geode_jax.models.generate import Sampling, before_end, generate
from geode_jax.models.layers import param
from geode_jax.models.student import Scene, Student, StudentConfig, StudentOutput
from geode_jax.objectives import losses, totals
from geode_jax.objectives.base import ScenePrediction, Terms
from geode_jax.objectives.spatial import spatial_head_terms
from geode_jax.objectives.text import text_term
from geode_jax.shapes import Array, Batch, without_vision

GROUPS = {
    "depth": ("depth_ce", "depth_reg", "depth_kl"),
    "detection": ("detection",),
    "spatial": ("spatial",),
    "multiview": ("multiview",),
    "feature": ("feature",),
}
"""Name in `drop=` and `only=` (Table II) -> terms of eq. 2."""

EQ_1 = frozenset({"spatial/features", "spatial/cross_view"})
"""The parts of the term `spatial` that are eq. 1; the others are the relations' and questions'."""

WEIGHTS_INSIDE = {"spatial/features": 0.5, "detection/patches": 4.0}
"""Weights inside a term of eq. 2 other than 1; that of `spatial/cross_view` is lambda_cross of eq.
1, `HiddenCoTConfig.cross_view_weight`. Every question needs the patches' categories, whose loss is
small beside that of the boxes."""

_DEPTH = frozenset({"target/depth"})
_CAMERA = frozenset({"camera/extrinsic", "camera/intrinsic"})
TARGETS: Mapping[str, tuple[frozenset[str], ...]] = {
    "depth_ce": (_DEPTH,),
    "depth_reg": (_DEPTH,),
    "depth_kl": (frozenset({"teacher/depth_bins"}),),
    "detection": (frozenset({"target/boxes"}), frozenset({"target/segmentation"})),
    "spatial": (frozenset({"teacher/features"}), frozenset({QUESTION_TARGETS})),
    "multiview": tuple(_CAMERA | {of} for of in ("vggt/depth", "vggt/points", "target/depth")),
    "feature": (
        frozenset({"teacher/depth_bins"}),
        frozenset({"target/boxes", "teacher/detection_probs"}),
        frozenset({"teacher/relations"}),
        frozenset({TEACHER_RELATION}),
    ),
}
"""Term of eq. 2 -> the sets of tensors of a scene, any one of which it can learn from."""


@dataclasses.dataclass(frozen=True)
class HiddenCoTConfig:
    """Attributes:
    student: the model.
    terms: the terms of eq. 2 that are used.
    weights: "uncertainty" (eq. 2) or "static" (all 1).
    temperature: T of the teacher's logits, see `objectives.losses.distillation`.
    eq_1: False leaves eq. 1 out of the term `spatial`.
    cross_view_weight: lambda_cross of eq. 1.
    literal_cross_view: True uses the printed sign of eq. 1; see `objectives.losses.cross_view`.
    vision: False trains the blind baseline: no vision tokens or prefix of them, answers only.
    log_variance_bounds: of log sigma^2.
    """

    student: StudentConfig
    terms: tuple[str, ...] = losses.TERMS
    weights: Literal["uncertainty", "static"] = "uncertainty"
    temperature: float = 1.0
    eq_1: bool = True
    cross_view_weight: float = 0.1
    literal_cross_view: bool = False
    vision: bool = True
    log_variance_bounds: tuple[float, float] = totals.LOG_VARIANCE_BOUNDS

    def __post_init__(self):
        fields = {"weights": ranges.one_of(("uncertainty", "static"))}
        fields |= {"temperature": ranges.real(0, above=True), "cross_view_weight": ranges.real(0)}
        ranges.check(self, fields)
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
    """The `Objective` of the Hidden-CoT student."""

    config: HiddenCoTConfig

    trainable = nnx.Param
    # The value of eq. 2 moves with the learned uncertainties, so two evaluations do not compare.
    selection_metric = "text"
    caches_scene = True
    internvl = None

    def build(self, rngs: nnx.Rngs) -> HiddenCoTModel:
        """Returns the student and its log-variances."""
        return HiddenCoTModel(self.config, rngs=rngs)

    def prepare(self, batch: Batch) -> Batch:
        """Returns the batch, without vision for the blind baseline."""
        return batch if self.config.vision else without_vision(batch)

    def terms(self, model: HiddenCoTModel, batch: Batch) -> Terms:
        """Returns the losses of all used terms, named `term/part`, as (sum, count)."""
        batch = self.prepare(batch)
        out = model.student(batch)
        decoder, hidden = model.student.decoder, out.answer_hidden_SQAD
        terms = {"text": text_term(decoder, hidden, batch, self.config.temperature)}
        if self.config.vision:
            terms |= depth_terms(out, batch, self.config.literal_cross_view)
            terms |= detection_terms(out, batch)
            terms |= spatial_terms(out, batch)
        return {
            name: pair
            for name, pair in terms.items()
            if term_of(name) in self.config.terms and (self.config.eq_1 or name not in EQ_1)
        }

    def missing_targets(self, targets: frozenset[str]) -> dict[str, str]:
        """Returns the used terms of eq. 2 without a target: {term: the tensors that it needs}."""
        if not self.config.vision:
            return {}
        return {
            term: " or ".join(" with ".join(sorted(needed)) for needed in TARGETS[term])
            for term in self.config.terms
            if term in TARGETS and not any(needed <= targets for needed in TARGETS[term])
        }

    def learned_targets(self, targets: frozenset[str]) -> dict[str, list[str]]:
        """Returns the targets of each used term of eq. 2: {term: those of `targets`, sorted}."""
        if not self.config.vision:
            return {}
        return {
            term: sorted(set().union(*(needed for needed in TARGETS[term] if needed <= targets)))
            for term in self.config.terms
            if term in TARGETS
        }

    def prefix_length(self, views: int) -> int:
        """Returns the number of positions before a question, for any number of views."""
        del views
        return self.config.student.prefix_length

    def with_slots(self, slots: int) -> "HiddenCoT":
        """Raises: the student has no rationale tokens."""
        raise UserError(f"slots: {slots}: the hidden_cot student has no rationale tokens")

    def encode_scene(self, model: HiddenCoTModel, batch: Batch) -> Scene:
        """Returns what the questions of a scene share."""
        return model.student.encode_scene(self.prepare(batch))

    def answer(
        self,
        model: HiddenCoTModel,
        encoded: Scene,
        batch: Batch,
        eos_id: Int[Array, ""] | int,
        sampling: Sampling | None = None,
    ) -> dict[str, Shaped[Array, "S ..."]]:
        """Generates answers to a batch's questions, at most A tokens each.

        Returns:
            `tokens` [S, Q, A], and the decoded thinking tokens `thinking` [S, K] of the diagnostic
            mode (Sec. V-d): argmax over the vocabulary at the K thinking positions, never part of
            an answer.
        """
        student = model.student
        generated = generate(
            student.decoder,
            encoded.prefix,
            batch.question_SQL,
            batch.question_length_SQ,
            max_new_tokens=batch.answer_SQA.shape[-1],
            eos_id=eos_id,
            prompt_prefix=student.config.prompt_prefix,
            seen=encoded.seen,
            seen_length_S=encoded.seen_length_S,
            sampling=sampling,
        )
        thinking = jnp.argmax(student.thinking_logits(encoded), axis=-1)
        return {"tokens": generated.tokens_SQA, "thinking": thinking}

    def decode_answer(
        self,
        answers: Mapping[str, Shaped[np.ndarray, "S ..."]],
        place: tuple[int, int],
        record: Mapping[str, Any],
        tokenizer: Tokenizer,
    ) -> dict[str, Any]:
        """Returns one answer as text: `prediction` and `thinking_tokens` (K strings)."""
        words = [tokenizer.decode([i]) for i in answers["thinking"][place[0]]]
        text = tokenizer.decode(before_end(answers["tokens"][place], tokenizer.eos_id))
        return {"prediction": text.strip(), "thinking_tokens": words}

    def predict_scene(self, model: HiddenCoTModel, batch: Batch) -> ScenePrediction:
        """Returns the depth and the objects that the task heads predict."""
        student = model.student
        scene = student.encode_scene(self.prepare(batch))
        S, V, P, D = scene.z_SVPD.shape
        logits = student.depth_head(scene.z_SVPD, student.config.patch_grid)
        centres = losses.depth_bin_centres(logits.shape[-1])
        found = student.detection_head(scene.z_SVPD.reshape(S, V * P, D), scene.seen_length_S)
        probability = jax.nn.sigmoid(found.class_logits_SYc)
        return ScenePrediction(
            losses.expected_depth(logits.astype(jnp.float32), centres),
            decode_boxes(found.boxes_SYb),
            jnp.argmax(probability, axis=-1),
            jnp.max(probability, axis=-1),
        )

    def total(self, model: HiddenCoTModel, terms: Terms) -> tuple[Float[Array, ""], dict]:
        """Returns eq. 2, or the static ablation, and the weight of each term for the log."""
        grouped = {}
        weights_inside = WEIGHTS_INSIDE | {"spatial/cross_view": self.config.cross_view_weight}
        for term in self.config.terms:
            parts = {name: pair for name, pair in terms.items() if term_of(name) == term}
            if parts:
                inside = [weights_inside.get(name, 1.0) for name in parts]
                grouped[term] = totals.combine(list(parts.values()), inside)
        if self.config.weights == "static":
            total, weights = totals.static_total(grouped, dict.fromkeys(grouped, 1.0))
        else:
            log_variance = {name: model.log_variance[name][...] for name in grouped}
            total, weights = totals.uncertainty_total(
                grouped, log_variance, self.config.log_variance_bounds
            )
        return total, weights


def term_of(name: str) -> str:
    """Returns the term of a loss: `detection` for `detection/boxes`."""
    return name.split("/")[0]


def patch_depth_logits(
    depth_logits_SVhwZ: Float[Array, "S V h w Z"], grid: tuple[int, int]
) -> Float[jax.Array, "S V P Z"]:
    """Returns the log of the mean bin probabilities of each patch's r x r cells."""
    S, V, h, w, Z = depth_logits_SVhwZ.shape
    gh, gw = grid
    prob = jax.nn.softmax(depth_logits_SVhwZ, axis=-1)
    prob = prob.reshape(S, V, gh, h // gh, gw, w // gw, Z).mean(axis=(3, 5))
    return jnp.log(prob.reshape(S, V, gh * gw, Z) + 1e-9)


def _grid(out: StudentOutput, batch: Batch) -> tuple[int, int]:
    h, w = out.depth_logits_SVhwZ.shape[2:4]
    r = round((h * w / batch.vision_SVPC.shape[2]) ** 0.5)
    return h // r, w // r


def depth_terms(out: StudentOutput, batch: Batch, literal_cross_view: bool = False) -> Terms:
    """Returns the losses of depth and of cross-view consistency (Sec. III-D.2, eq. 1)."""
    grid = _grid(out, batch)
    centres = losses.depth_bin_centres(out.depth_logits_SVhwZ.shape[-1])
    target, logits = batch.target_depth_SVhw, out.depth_logits_SVhwZ
    weight = batch.target_depth_weight_SVhw
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
            logits, target, jnp.broadcast_to(seen_SV11, target.shape), centres, weight
        ),
        "depth_reg": losses.depth_l1(
            depth_m, target, jnp.broadcast_to(seen_SV11, target.shape), weight
        ),
        "multiview": losses.multi_view_consistency(
            patch_depth, batch.extrinsic_SV34, batch.intrinsic_SV33, grid, index, visible
        ),
    }
    if batch.teacher_depth_bins_SVPZ.shape[-1]:
        # Zeros where the teacher knows no depth.
        taught = taught & (jnp.sum(batch.teacher_depth_bins_SVPZ, axis=-1) > 0)
        terms["depth_kl"] = losses.depth_bin_kl(patch_logits, batch.teacher_depth_bins_SVPZ, taught)
        teacher_depth = losses.expected_depth(
            jnp.log(jnp.asarray(batch.teacher_depth_bins_SVPZ) + 1e-9), centres
        )
        terms["feature/depth"] = losses.log_depth_distance(patch_depth, teacher_depth, taught)
    if out.features_SVPF is not None:
        terms["spatial/cross_view"] = losses.cross_view(
            out.features_SVPF, index, visible, literal_sign=literal_cross_view
        )
    return terms


def detection_terms(out: StudentOutput, batch: Batch) -> Terms:
    """Returns the losses of boxes and categories (Sec. III-D.2)."""
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
        # UNLABELLED (-2) is left out; NO_CATEGORY (-1) is the last class.
        "detection/patches": losses.cross_entropy(
            out.patch_logits_SVPc, jnp.where(labels == -1, classes - 1, labels), labels >= -1
        ),
    }
    if batch.teacher_detection_SNc.shape[-1]:
        taught = (found.query_SN >= 0) & jnp.asarray(batch.teacher_detection_mask_S)[:, None]
        taught &= jnp.sum(batch.teacher_detection_SNc, axis=-1) > 0  # zeros where it found none
        probabilities = jax.nn.sigmoid(out.detection.class_logits_SYc)
        terms["feature/detection"] = losses.squared_distance(
            losses.take_matched(probabilities, found.query_SN), batch.teacher_detection_SNc, taught
        )
    return terms


def spatial_terms(out: StudentOutput, batch: Batch) -> Terms:
    """Returns the losses of features (eq. 1), relations and the question's targets (Sec. III-D)."""
    terms = {
        f"spatial/{name}": term for name, term in spatial_head_terms(out.spatial, batch).items()
    }
    terms["feature/spatial"] = losses.squared_distance(
        jax.nn.sigmoid(out.spatial.relations_SQr)[..., None],
        batch.teacher_relations_SQr[..., None],
        batch.teacher_relations_mask_SQr,
    )
    if out.features_SVPF is not None:
        mask = jnp.asarray(batch.teacher_features_mask_S)[:, None] & batch.view_mask_SV
        terms["spatial/features"] = losses.squared_distance(
            out.features_SVPF, batch.teacher_features_SVPF, mask
        )
    return terms
