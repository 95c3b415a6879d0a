"""GEODE: the losses and what learns in each stage (Sec. 2.3).

| stage | learns | prefix | pays |
|---|---|---|---|
| pretrain | ViT, decoder, layout encoder | the layout | rationales; the patches' categories |
| align | projector | visual tokens | rationales |
| drm (stage 1) | DRM | E_spatio | eq. 4: rationales; * alignment, correspondence |
| joint (stage 2) | projector, decoder, DRH | E_spatio, visual | eq. 7: answers, values, boxes |

`pretrain` stands in on a laptop for InternViT's and Qwen's pretraining. A rationale follows its
question, which is given and not paid, since E_spatio does not know what will be asked.

* Not in the paper's equations, weight 0 in `full`. Alignment: Sec. 2.1.2 names a frozen text
encoder's embedding of the rationale; ours is `models.layout`. Correspondence: a frozen token looks
at the points near the place that it shows; without it the cross-attention of Sec. 2.1.1 finds no
places in a laptop's steps.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from geode_jax import losses
from geode_jax.boxes import decode_boxes
from geode_jax.data.control import base_unit
from geode_jax.data.tokens import Tokenizer
from geode_jax.inference.generate import before_end, generate
from geode_jax.models.drh import box_loss, decode_values, value_loss
from geode_jax.models.geode import Geode, GeodeConfig, Part
from geode_jax.models.packed import pick
from geode_jax.ops.attention import MASKED
from geode_jax.shapes import Array, Batch
from geode_jax.train_step import Terms

Stage = Literal["pretrain", "align", "drm", "joint"]

LEARNS = {
    "pretrain": ("vision", "decoder", "layout", "patch_classifier"),
    "align": ("projector",),
    "drm": ("drm",),
    "joint": ("projector", "decoder", "drh"),
}
"""The parts of `Geode` that learn in a stage; all others are frozen."""

PREFIX: dict[str, tuple[Part, ...]] = {
    "pretrain": ("layout",),
    "align": ("visual",),
    "drm": ("spatio",),
    "joint": ("spatio", "visual"),
}
"""What stands before the text in a stage."""


@dataclasses.dataclass(frozen=True)
class GeodeStageConfig:
    """Attributes:
    model: sizes of the parts.
    stage: see the module's docstring.
    regression_weight: lambda of eq. 7, of values and boxes.
    alignment_weight: of E_spatio's squared distance to the layout's columns, stage drm.
    correspondence_weight: of `correspondence_loss`, stage drm.
    patch_weight: of the patches' categories, stage pretrain.
    vision: False trains the blind baseline: nothing stands before the text.
    controls: ids of `<REG>` and `<3DBBOX>`, where the regression head answers.
    slots: so many of the rationale tokens does an answer see (Table 3); None: all.
    """

    model: GeodeConfig
    stage: Stage
    regression_weight: float = 1.0
    alignment_weight: float = 0.0
    correspondence_weight: float = 0.0
    patch_weight: float = 1.0
    vision: bool = True
    controls: tuple[int, int] | None = None
    slots: int | None = None


@dataclasses.dataclass(frozen=True)
class GeodeStage:
    """The `train_step.Objective` of one stage."""

    config: GeodeStageConfig

    @property
    def trainable(self):
        """The parameters of the stage's parts."""
        parts = [nnx.PathContains(name) for name in LEARNS[self.config.stage]]
        return nnx.All(nnx.Param, nnx.Any(*parts))

    def build(self, rngs: nnx.Rngs) -> Geode:
        """All parts, frozen ones too."""
        return Geode(self.config.model, rngs=rngs)

    def parts(self, *, vision: bool = True) -> tuple[Part, ...]:
        """What stands before the text; nothing without vision."""
        c = self.config
        if not (c.vision and vision):
            return ()
        return tuple(p for p in PREFIX[c.stage] if p != "spatio" or c.model.drm is not None)

    def terms(self, model: Geode, batch: Batch) -> Terms:
        """All losses of the stage as (sum, count)."""
        c = self.config
        prefix = model.prefix(batch, self.parts())
        hidden = model.read(batch, prefix)
        A = batch.answer_SQA.shape[-1]
        paid = jnp.arange(A) < jnp.asarray(batch.answer_length_SQ)[..., None]
        states_SQAD = pick(hidden, batch.answer_column_SQA)
        logits = model.vlm.decoder.logits(states_SQAD)
        terms = {"text": losses.cross_entropy(logits, batch.answer_SQA, paid)}
        if c.stage == "pretrain":
            label = jnp.asarray(batch.target_segmentation_SVP)
            logits = model.patch_logits(batch)
            # UNLABELLED (-2) is nobody's word; NO_CATEGORY (-1) is the last class.
            label = jnp.where(label == -1, logits.shape[-1] - 1, label)
            terms["patches"] = losses.cross_entropy(logits, label, label >= 0)
        if c.stage == "drm" and c.alignment_weight:
            # The first tokens are to the first categories, whichever of them are more.
            columns = model.layout(batch)
            both = min(columns.shape[1], prefix.spatio_SMD.shape[1])
            error = prefix.spatio_SMD[:, :both] - columns[:, :both]
            error_SM = jnp.mean(jnp.square(error), axis=-1)
            known_S1 = jnp.asarray(batch.boxes_known_S)[:, None]
            terms["alignment"] = (
                jnp.sum(jnp.where(known_S1, error_SM, 0.0)),
                jnp.sum(jnp.broadcast_to(known_S1, error_SM.shape), dtype=jnp.float32),
            )
        if c.stage == "drm" and c.correspondence_weight:
            looks = model.drm.correspondence(
                prefix.features_SVLC[:, :, 1:],
                batch.point_SGC,
                batch.coord_SG3,
                batch.point_mask_SG,
            )
            terms["correspondence"] = correspondence_loss(looks, batch)
        if c.stage == "joint" and model.drh is not None:
            # The state where the control token, an answer's first, is the input.
            state_SQD = states_SQAD[:, :, 1]
            terms["values"] = value_loss(
                model.drh.values(state_SQD), batch.value_SQ, batch.base_unit_SQ, batch.value_mask_SQ
            )
            terms["boxes"] = box_loss(model.drh.boxes(state_SQD), batch.box_SQ7, batch.box_mask_SQ)
        return terms

    def answer(self, model: Geode, batch: Batch, eos_id: int) -> dict[str, Array]:
        """Greedy answers to a batch's questions, at most A tokens each.

        Returns:
            `tokens` [S, Q, A]; with a regression head, what it reads at each of them, whether it
            is a control token or not: `values` [S, Q, A], codes as of `drh.encode_values`, and
            `boxes` [S, Q, A, 7].
        """
        prefix = model.prefix(batch, self.parts(), self.config.slots)
        generated = generate(
            model.vlm.decoder,
            prefix.keys,
            batch.question_SQL,
            batch.question_length_SQ,
            max_new_tokens=batch.answer_SQA.shape[-1],
            eos_id=eos_id,
            prefix_length_S=prefix.length_S,
        )
        out = {"tokens": generated.tokens_SQA}
        if model.drh is not None:
            out["values"] = model.drh.values(generated.hidden_SQAD)
            out["boxes"] = decode_boxes(model.drh.boxes(generated.hidden_SQAD))
        return out

    def say(
        self,
        out: dict[str, np.ndarray],
        place: tuple[int, int],
        record: Mapping[str, Any],
        tokenizer: Tokenizer,
    ) -> dict[str, Any]:
        """An answer of `answer` as text, in which a value stands for its control token.

        Returns:
            `prediction`; `predicted_value` (in the question's unit) or `predicted_box` (7 numbers)
            of the last control token, where there is one.
        """
        reg, box = self.config.controls or (-1, -1)
        said, text, words = {}, "", []
        for i, token in enumerate(before_end(out["tokens"][place], tokenizer.eos_id)):
            if token not in (reg, box):
                words.append(token)
                continue
            text, words = text + tokenizer.decode(words), []
            if token == reg:
                value = decode_values(out["values"][*place, i], base_unit(record))
                said["predicted_value"] = float(value)
                text += f" {render_value(said['predicted_value'], record.get('unit'))}"
            else:
                said["predicted_box"] = [round(float(x), 4) for x in out["boxes"][*place, i]]
                text += " " + " ".join(f"{x:.2f}" for x in said["predicted_box"])
        return {"prediction": (text + tokenizer.decode(words)).strip()} | said

    def total(self, model: Geode, terms: Terms, share: float) -> tuple[Array, dict]:
        """Eq. 4 or eq. 7; the weights for the log."""
        c = self.config
        weights = {
            "text": 1.0,
            "patches": c.patch_weight,
            "alignment": c.alignment_weight,
            "correspondence": c.correspondence_weight,
            "values": c.regression_weight,
            "boxes": c.regression_weight,
        }
        return losses.static_total(terms, {name: weights[name] for name in terms})


def render_value(value: float, unit: str | None) -> str:
    """A number as answers are written: whole centimetres and items, else one decimal."""
    return f"{value:.0f}" if unit in ("cm", "items") else f"{value:.1f}"


NEAR = 0.25
"""Metres: standard deviation of what counts as the same place."""


def correspondence_loss(log_weights_STG: Array, batch: Batch) -> losses.Pair:
    """Cross-entropy of where a patch looks to the points near the place that it shows.

    Needs patches that are those of the batch, and points in the frame of its world.

    Args:
        log_weights_STG: of `Drm.correspondence`, T = V * P.
        batch: its `points_SVP3` are the patches' places.
    """
    S, T, _ = log_weights_STG.shape
    place = jnp.asarray(batch.points_SVP3).reshape(S, T, 1, 3)
    coord, mask = jnp.asarray(batch.coord_SG3), jnp.asarray(batch.point_mask_SG)
    distance = jnp.sum(jnp.square(place - coord[:, None]), axis=-1)
    near = jnp.where(mask[:, None], -distance / (2 * NEAR**2), MASKED)
    target = jax.nn.softmax(near, axis=-1)
    known = jnp.asarray(batch.points_mask_SVP).reshape(S, T) & jnp.any(mask, axis=1)[:, None]
    entropy = -jnp.sum(target * log_weights_STG, axis=-1)
    return jnp.sum(jnp.where(known, entropy, 0.0)), jnp.sum(known, dtype=jnp.float32)
