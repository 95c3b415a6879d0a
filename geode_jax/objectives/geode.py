"""GEODE: the losses and what learns in each stage (Sec. 2.3).

| stage | learns | prefix | losses |
|---|---|---|---|
| pretrain | ViT, decoder, layout encoder | the layout | rationales; the patches' categories |
| align | projector | visual tokens | rationales |
| drm (stage 1) | DRM | E_spatio | eq. 4: rationales; * two alignments |
| joint (stage 2) | projector, decoder, DRH | E_spatio, visual | eq. 7: answers, values, boxes |

On a laptop, `pretrain` replaces the pretraining of InternViT and Qwen. A rationale follows its
question, which has no loss of its own: E_spatio does not depend on the question.

* Not in the paper's equations; the weights are 0 in `full`. Sec. 2.1.2 aligns E_spatio with a
frozen text encoder's embedding of the rationale. Here that is the decoder's embedding or, on a
laptop, the layout itself (`models.layout`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Bool, Float, Int, Shaped

from geode_jax import ranges
from geode_jax.data.control import answer_unit
from geode_jax.data.tokens import Tokenizer
from geode_jax.errors import UserError
from geode_jax.exports.units import BASE_UNIT, write_number
from geode_jax.geometry.boxes import decode_boxes, encode_boxes, nearer_code
from geode_jax.models.drh import decode_values, encode_values
from geode_jax.models.generate import Sampling, before_end, generate
from geode_jax.models.geode import Geode, GeodeConfig, Part, Prefix
from geode_jax.models.internvl import InternVLConfig
from geode_jax.models.layout import LayoutEncoder
from geode_jax.models.packed import pick
from geode_jax.objectives import losses, totals
from geode_jax.objectives.base import Pair, Terms
from geode_jax.objectives.spatial import spatial_head_terms
from geode_jax.objectives.text import text_term
from geode_jax.shapes import Array, Batch

Stage = Literal["pretrain", "align", "drm", "joint"]

LEARNS = {
    "pretrain": ("vision", "decoder", "layout", "patch_classifier", "spatial_head"),
    "align": ("projector",),
    "drm": ("drm",),
    "joint": ("projector", "decoder", "drh"),
}
"""Stage -> the parts of `Geode` that are trained; all others are frozen."""


def learned_parts(stage: Stage) -> frozenset[str]:
    """Returns the parts that a stage and those before it have trained."""
    stages = list(LEARNS)
    return frozenset().union(*(LEARNS[s] for s in stages[: stages.index(stage) + 1]))


PREFIX: dict[str, tuple[Part, ...]] = {
    "pretrain": ("layout",),
    "align": ("visual",),
    "drm": ("spatio",),
    "joint": ("spatio", "visual"),
}
"""Stage -> the parts before the text."""


@dataclasses.dataclass(frozen=True)
class GeodeStageConfig:
    """Attributes:
    model: sizes of the parts.
    stage: see the module's docstring.
    regression_weight: lambda of eq. 7, of values and boxes.
    regression: what eq. 6 compares: "codes" of values and boxes (logarithms of values and sizes),
        or the "raw" numbers, a value in its question's unit.
    layout_weight: of E_spatio's squared distance to the layout's columns, stage drm.
    rationale_weight: of `rationale_alignment`, stage drm.
    patch_weight: of the patches' categories, stage pretrain.
    spatial_weight: of the losses of `spatial.spatial_head_terms`, stage pretrain.
    vision: False trains the blind baseline, without a prefix.
    controls: ids of `<REG>` and `<3DBBOX>`, at which the regression head gives the answer.
    slots: number of rationale tokens that an answer sees (Table 3); None: all.
    """

    model: GeodeConfig
    stage: Stage
    regression_weight: float = 1.0
    regression: Literal["codes", "raw"] = "codes"
    layout_weight: float = 0.0
    rationale_weight: float = 0.0
    patch_weight: float = 1.0
    spatial_weight: float = 1.0
    vision: bool = True
    controls: tuple[int, int] | None = None
    slots: int | None = None

    def __post_init__(self):
        weights = "regression_weight layout_weight rationale_weight patch_weight spatial_weight"
        fields = {weights: ranges.real(0), "stage": ranges.one_of(LEARNS)}
        ranges.check(self, fields | {"regression": ranges.one_of(("codes", "raw"))})
        drm = self.model.drm
        if self.slots is not None and not (drm and 0 < self.slots <= drm.slots):
            of = f"of {drm.slots} rationale tokens" if drm else "without a rationale module"
            raise UserError(f"GeodeStageConfig: slots: {self.slots} {of}")


@dataclasses.dataclass(frozen=True)
class GeodeStage:
    """The `Objective` of one stage."""

    config: GeodeStageConfig

    selection_metric = "loss"  # its weights are fixed

    @property
    def trainable(self):
        """nnx filter of the parameters of the stage's parts."""
        parts = [nnx.PathContains(name) for name in LEARNS[self.config.stage]]
        return nnx.All(nnx.Param, nnx.Any(*parts))

    def build(self, rngs: nnx.Rngs) -> Geode:
        """Returns the model with all parts, frozen ones too."""
        return Geode(self.config.model, rngs=rngs)

    def prefix_parts(self) -> tuple[Part, ...]:
        """Returns the names of the parts before the text; none for the blind baseline."""
        c = self.config
        if not c.vision:
            return ()
        return tuple(p for p in PREFIX[c.stage] if p != "spatio" or c.model.drm is not None)

    def terms(self, model: Geode, batch: Batch) -> Terms:
        """Returns all losses of the stage as (sum, count)."""
        c = self.config
        prefix = model.prefix(batch, self.prefix_parts())
        hidden = model.read(batch, prefix)
        A = batch.answer_SQA.shape[-1]
        counted = jnp.arange(A) < jnp.asarray(batch.answer_length_SQ)[..., None]
        states_SQAD = pick(hidden, batch.answer_column_SQA)
        terms = {"text": text_term(model.vlm.decoder, states_SQAD, batch)}
        if c.stage == "pretrain":
            label = jnp.asarray(batch.target_segmentation_SVP)
            logits = model.patch_logits(batch)
            # UNLABELLED (-2) is left out; NO_CATEGORY (-1) is the last class.
            label = jnp.where(label == -1, logits.shape[-1] - 1, label)
            terms["patches"] = losses.cross_entropy(logits, label, label >= 0)
            assert model.spatial_head is not None  # the stage's model has stand-ins
            spatial = model.spatial_head(
                pick(hidden, batch.encoding_column_SQ), pick(hidden, batch.object_column_SQO)
            )
            terms |= {
                f"spatial/{k}": term for k, term in spatial_head_terms(spatial, batch).items()
            }
        if c.stage == "drm" and c.layout_weight:
            assert prefix.spatio_SRD is not None and model.layout is not None
            terms["layout"] = layout_alignment(prefix.spatio_SRD, model.layout, batch)
        if c.stage == "drm" and c.rationale_weight:
            terms["rationale_alignment"] = self._rationale_alignment(model, batch, prefix, counted)
        if c.stage == "joint" and model.drh is not None:
            # The state where the control token, an answer's first, is the input.
            state_SQD = states_SQAD[:, :, 1]
            raw = c.regression == "raw"
            terms["values"] = value_regression(
                model.drh.values(state_SQD),
                batch.value_SQ,
                batch.base_unit_SQ,
                batch.value_mask_SQ,
                raw=raw,
            )
            terms["boxes"] = box_regression(
                model.drh.boxes(state_SQD), batch.box_SQ7, batch.box_mask_SQ, raw=raw
            )
        return terms

    def _rationale_alignment(self, model: Geode, batch: Batch, prefix: Prefix, counted) -> Pair:
        """1 - cosine of the mean of E_spatio and of the rationales' embeddings (Sec. 2.1.2).

        The frozen text encoder is the frozen decoder, which reads the rationales without a prefix.
        Its states are averaged over all rationales of a scene, since E_spatio serves all of them.
        """
        text = model.read(batch, model.prefix(batch, ()))
        states_SQAD = pick(text, batch.answer_column_SQA)
        own = jnp.mean(states_SQAD, axis=(1, 2), where=counted[..., None])
        known_S = jnp.any(counted, axis=(1, 2))
        embedding = jax.lax.stop_gradient(jnp.where(known_S[:, None], own, 1.0))
        assert prefix.spatio_SRD is not None
        spatio = jnp.mean(prefix.spatio_SRD.astype(jnp.float32), axis=1)
        cosine_S = optax.losses.cosine_similarity(spatio, embedding, epsilon=1e-6)
        return losses.masked_sum(1 - cosine_S, known_S)

    @property
    def internvl(self) -> InternVLConfig:
        """Sizes of the vision encoder and the decoder."""
        return self.config.model.vlm

    def missing_targets(self, targets: frozenset[str]) -> dict[str, str]:
        """Returns nothing: what a stage learns from is in the questions."""
        del targets
        return {}

    def learned_targets(self, targets: frozenset[str]) -> dict[str, list[str]]:
        """Returns nothing: a stage learns from the questions' own fields."""
        del targets
        return {}

    def prefix_length(self, views: int) -> int:
        """Returns the number of positions of all parts together, whichever a stage uses."""
        c = self.config.model
        visual = views * (c.vlm.vision.grid // 2) ** 2
        return c.categories + (c.drm.slots if c.drm else 0) + visual

    def with_slots(self, slots: int) -> "GeodeStage":
        """Returns the stage whose answers see only the first `slots` rationale tokens (Table 3)."""
        return GeodeStage(dataclasses.replace(self.config, slots=slots))

    def hub_config(self) -> dict[str, Any]:
        """Returns entries of an exported `config.json` that are not sizes of the model.

        They are `prefix`, the names of the parts before the text, and ids of control tokens.
        """
        reg, box = self.config.controls or (None, None)
        return {
            "prefix": list(self.prefix_parts()),
            "reg_token_id": reg,
            "box_token_id": box,
        }

    @property
    def caches_scene(self) -> bool:
        """False if the rationale module reads the question."""
        drm = self.config.model.drm
        return drm is None or not drm.condition_on_question

    def encode_scene(self, model: Geode, batch: Batch) -> Prefix:
        """Returns what the questions of a scene share."""
        return model.prefix(batch, self.prefix_parts(), self.config.slots)

    def predict_scene(self, model: Geode, batch: Batch) -> None:
        """Returns None: GEODE has no dense heads."""
        del model, batch

    def answer(
        self,
        model: Geode,
        encoded: Prefix,
        batch: Batch,
        eos_id: Int[Array, ""] | int,
        sampling: Sampling | None = None,
    ) -> dict[str, Shaped[Array, "S ..."]]:
        """Generates answers to a batch's questions, at most A tokens each.

        Returns:
            `tokens` [S, Q, A]; with a regression head also its output at every token, of which only
            that at control tokens has a meaning: `values` [S, Q, A], codes of `drh.encode_values`,
            and `boxes` [S, Q, A, 7].
        """
        generated = generate(
            model.vlm.decoder,
            encoded.keys,
            batch.question_SQL,
            batch.question_length_SQ,
            max_new_tokens=batch.answer_SQA.shape[-1],
            eos_id=eos_id,
            states=model.drh is not None,
            prefix_length_S=encoded.length_S,
            sampling=sampling,
        )
        out = {"tokens": generated.tokens_SQA}
        if model.drh is not None and generated.hidden_SQAD is not None:
            out["values"] = model.drh.values(generated.hidden_SQAD)
            out["boxes"] = decode_boxes(model.drh.boxes(generated.hidden_SQAD))
        return out

    def decode_answer(
        self,
        answers: Mapping[str, Shaped[np.ndarray, "S ..."]],
        place: tuple[int, int],
        record: Mapping[str, Any],
        tokenizer: Tokenizer,
    ) -> dict[str, Any]:
        """Returns one answer as text, with values in place of control tokens.

        Returns:
            `prediction`; where there is a control token, of the last one of its kind
            `predicted_value` (in the unit of `control.answer_unit`) or `predicted_box` (7 numbers).
        """
        reg, box = self.config.controls or (-1, -1)
        regressed, text, words = {}, "", []
        base_unit = np.array(BASE_UNIT.get(answer_unit(record) or "", 1.0), np.float32)
        for i, token in enumerate(before_end(answers["tokens"][place], tokenizer.eos_id)):
            if token not in (reg, box):
                words.append(token)
                continue
            text, words = text + tokenizer.decode(words), []
            if token == reg:
                value = float(decode_values(answers["values"][*place, i], base_unit))
                regressed["predicted_value"] = value
                text += f" {write_number(value, record.get('unit'))}"
            else:
                numbers = [round(float(x), 4) for x in answers["boxes"][*place, i]]
                regressed["predicted_box"] = numbers
                text += " " + " ".join(f"{x:.2f}" for x in numbers)
        return {"prediction": (text + tokenizer.decode(words)).strip()} | regressed

    def total(self, model: Geode, terms: Terms) -> tuple[Float[Array, ""], dict]:
        """Returns eq. 4 or eq. 7, and the weights for the log."""
        c = self.config
        weights = {
            "text": 1.0,
            "patches": c.patch_weight,
            "spatial": c.spatial_weight,
            "layout": c.layout_weight,
            "rationale_alignment": c.rationale_weight,
            "values": c.regression_weight,
            "boxes": c.regression_weight,
        }
        return totals.static_total(terms, {name: weights[name.split("/")[0]] for name in terms})


def layout_alignment(
    spatio_SRD: Float[Array, "S R D"], layout: LayoutEncoder, batch: Batch
) -> Pair:
    """`LayoutEncoder.distance` of E_spatio, in scenes whose boxes are known; count = slots.

    Slot i is compared with category i; further slots or categories are left out.
    """
    error_SR = layout.distance(spatio_SRD, batch)
    known_SR = jnp.broadcast_to(jnp.asarray(batch.boxes_known_S)[:, None], error_SR.shape)
    return losses.masked_sum(error_SR, known_SR)


def value_regression(
    codes: Float[Array, "*axes"],
    values: Float[Array, "*axes"],
    base_unit: Float[Array, "*axes"],
    mask: Bool[Array, "*axes"],
    *,
    raw: bool = False,
) -> Pair:
    """Eq. 6 on values: squared error of the codes of `drh.encode_values`; count = values.

    With `raw` it is that of the numbers themselves in the question's unit, as eq. 6 is printed.
    """
    mask = jnp.asarray(mask)
    values = losses.keep(values, mask, 1.0)
    if raw:
        error = decode_values(losses.keep(codes, mask), base_unit) - values
    else:
        error = codes - encode_values(values, base_unit)
    error = jnp.where(mask, error, 0.0)
    return jnp.sum(jnp.square(error)), jnp.sum(mask, dtype=jnp.float32)


def box_regression(
    codes_8: Float[Array, "*axes 8"],
    boxes_7: Float[Array, "*axes 7"],
    mask: Bool[Array, "*axes"],
    *,
    raw: bool = False,
) -> Pair:
    """Eq. 6 on boxes: squared error to the nearer of a box's two codes; count = boxes.

    The codes are those of `geometry.boxes.encode_boxes`, see `geometry.boxes.nearer_code`. With
    `raw` the error is that of the seven numbers (metres, and radians up to half a turn).
    """
    mask = jnp.asarray(mask)
    codes_8 = losses.keep(codes_8, mask, 1.0)  # at a code of zeros the yaw has no derivative
    target_8 = encode_boxes(losses.keep(boxes_7, mask, 1.0))

    def to_code(code_8: Array) -> jax.Array:
        if not raw:
            return jnp.sum(jnp.square(codes_8 - code_8), axis=-1)
        error_7 = decode_boxes(codes_8) - decode_boxes(code_8)
        yaw = jnp.mod(error_7[..., 6] + jnp.pi / 2, jnp.pi) - jnp.pi / 2
        return jnp.sum(jnp.square(error_7[..., :6]), axis=-1) + jnp.square(yaw)

    return losses.masked_sum(nearer_code(to_code, target_8), mask)
