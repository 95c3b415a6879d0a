"""GEODE: the losses and what learns in each stage (Sec. 2.3).

| stage | learns | prefix | pays |
|---|---|---|---|
| pretrain | ViT, decoder, layout encoder | the layout | rationales; the patches' categories |
| align | projector | visual tokens | rationales |
| drm (stage 1) | DRM | E_spatio | eq. 4: rationales; * two alignments |
| joint (stage 2) | projector, decoder, DRH | E_spatio, visual | eq. 7: answers, values, boxes |

`pretrain` stands in on a laptop for InternViT's and Qwen's pretraining. A rationale follows its
question, which is given and not paid, since E_spatio does not know what will be asked.

* Not in the paper's equations, weight 0 in `full`. Sec. 2.1.2 names a frozen text encoder's
embedding of the rationale: the decoder's, or on a laptop the layout itself (`models.layout`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from geode_jax import ranges
from geode_jax.data.control import answer_unit
from geode_jax.data.tokens import Tokenizer
from geode_jax.errors import UserError
from geode_jax.exports.units import BASE_UNIT, write_number
from geode_jax.geometry.boxes import decode_boxes, encode_boxes, nearer_code
from geode_jax.models.drh import decode_values, encode_values
from geode_jax.models.generate import Sampling, before_end, generate
from geode_jax.models.geode import Geode, GeodeConfig, Part, Prefix
from geode_jax.models.layout import LayoutEncoder
from geode_jax.models.packed import pick
from geode_jax.objectives import losses
from geode_jax.objectives.base import Terms
from geode_jax.objectives.losses import Pair
from geode_jax.objectives.spatial import asked_terms
from geode_jax.objectives.text import text_term
from geode_jax.shapes import Array, Batch

Stage = Literal["pretrain", "align", "drm", "joint"]

LEARNS = {
    "pretrain": ("vision", "decoder", "layout", "patch_classifier", "spatial_head"),
    "align": ("projector",),
    "drm": ("drm",),
    "joint": ("projector", "decoder", "drh"),
}
"""The parts of `Geode` that learn in a stage; all others are frozen."""


def learned_parts(stage: Stage) -> frozenset[str]:
    """The parts that have learned when a stage has ended."""
    stages = list(LEARNS)
    return frozenset().union(*(LEARNS[s] for s in stages[: stages.index(stage) + 1]))


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
    layout_weight: of E_spatio's squared distance to the layout's columns, stage drm.
    rationale_weight: of `rationale_alignment`, stage drm.
    patch_weight: of the patches' categories, stage pretrain.
    spatial_weight: of what the question is about, `spatial.asked_terms`, stage pretrain.
    vision: False trains the blind baseline: nothing stands before the text.
    controls: ids of `<REG>` and `<3DBBOX>`, where the regression head answers.
    slots: so many of the rationale tokens does an answer see (Table 3); None: all.
    """

    model: GeodeConfig
    stage: Stage
    regression_weight: float = 1.0
    layout_weight: float = 0.0
    rationale_weight: float = 0.0
    patch_weight: float = 1.0
    spatial_weight: float = 1.0
    vision: bool = True
    controls: tuple[int, int] | None = None
    slots: int | None = None

    def __post_init__(self):
        weights = "regression_weight layout_weight rationale_weight patch_weight spatial_weight"
        ranges.check(self, {weights: ranges.real(0), "stage": ranges.one_of(LEARNS)})
        drm = self.model.drm
        if self.slots is not None and not (drm and 0 < self.slots <= drm.slots):
            of = f"of {drm.slots} rationale tokens" if drm else "without a rationale module"
            raise UserError(f"GeodeStageConfig: slots: {self.slots} {of}")


@dataclasses.dataclass(frozen=True)
class GeodeStage:
    """The `training.step.Objective` of one stage."""

    config: GeodeStageConfig

    judge = "loss"  # its weights are fixed

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
        terms = {"text": text_term(model.vlm.decoder, states_SQAD, batch)}
        if c.stage == "pretrain":
            label = jnp.asarray(batch.target_segmentation_SVP)
            logits = model.patch_logits(batch)
            # UNLABELLED (-2) is nobody's word; NO_CATEGORY (-1) is the last class.
            label = jnp.where(label == -1, logits.shape[-1] - 1, label)
            terms["patches"] = losses.cross_entropy(logits, label, label >= 0)
            asked = model.spatial_head(
                pick(hidden, batch.encoding_column_SQ), pick(hidden, batch.object_column_SQO)
            )
            terms |= {f"spatial/{k}": term for k, term in asked_terms(asked, batch).items()}
        if c.stage == "drm" and c.layout_weight:
            terms["layout"] = layout_alignment(prefix.spatio_SRD, model.layout, batch)
        if c.stage == "drm" and c.rationale_weight:
            terms["rationale_alignment"] = self._rationale_alignment(model, batch, prefix, paid)
        if c.stage == "joint" and model.drh is not None:
            # The state where the control token, an answer's first, is the input.
            state_SQD = states_SQAD[:, :, 1]
            terms["values"] = value_loss(
                model.drh.values(state_SQD), batch.value_SQ, batch.base_unit_SQ, batch.value_mask_SQ
            )
            terms["boxes"] = box_loss(model.drh.boxes(state_SQD), batch.box_SQ7, batch.box_mask_SQ)
        return terms

    def _rationale_alignment(self, model: Geode, batch: Batch, prefix: Prefix, paid) -> losses.Pair:
        """1 - cosine of the mean of E_spatio and that of its rationales' embeddings (Sec. 2.1.2).

        The frozen text encoder is the frozen decoder, which reads the rationales with nothing
        before them; of a scene's rationales the mean, since E_spatio is of all of them.
        """
        text = model.read(batch, model.prefix(batch, ()))
        states_SQAD = pick(text, batch.answer_column_SQA)
        own = jnp.mean(states_SQAD, axis=(1, 2), where=paid[..., None])
        known_S = jnp.any(paid, axis=(1, 2))
        embedding = jax.lax.stop_gradient(jnp.where(known_S[:, None], own, 1.0))
        spatio = jnp.mean(prefix.spatio_SRD.astype(jnp.float32), axis=1)
        cosine_S = optax.losses.cosine_similarity(spatio, embedding, epsilon=1e-6)
        return jnp.sum(jnp.where(known_S, 1 - cosine_S, 0.0)), jnp.sum(known_S, dtype=jnp.float32)

    @property
    def looks_before_asked(self) -> bool:
        """Unless the rationale module reads the question."""
        drm = self.config.model.drm
        return drm is None or not drm.condition_on_question

    def look(self, model: Geode, batch: Batch) -> Prefix:
        """What the questions of a scene share."""
        return model.prefix(batch, self.parts(), self.config.slots)

    def answer(
        self,
        model: Geode,
        prefix: Prefix,
        batch: Batch,
        eos_id: int,
        sampling: Sampling | None = None,
    ) -> dict[str, Array]:
        """Answers to a batch's questions, at most A tokens each.

        Returns:
            `tokens` [S, Q, A]; with a regression head, what it reads at each of them, whether it
            is a control token or not: `values` [S, Q, A], codes as of `drh.encode_values`, and
            `geometry.boxes` [S, Q, A, 7].
        """
        generated = generate(
            model.vlm.decoder,
            prefix.keys,
            batch.question_SQL,
            batch.question_length_SQ,
            max_new_tokens=batch.answer_SQA.shape[-1],
            eos_id=eos_id,
            states=model.drh is not None,
            prefix_length_S=prefix.length_S,
            sampling=sampling,
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
            `prediction`; `predicted_value` (in the unit of `control.answer_unit`) or
            `predicted_box` (7 numbers) of the last control token, where there is one.
        """
        reg, box = self.config.controls or (-1, -1)
        said, text, words = {}, "", []
        unit = answer_unit(record)
        for i, token in enumerate(before_end(out["tokens"][place], tokenizer.eos_id)):
            if token not in (reg, box):
                words.append(token)
                continue
            text, words = text + tokenizer.decode(words), []
            if token == reg:
                value = decode_values(out["values"][*place, i], BASE_UNIT.get(unit, 1.0))
                said["predicted_value"] = float(value)
                text += f" {write_number(said['predicted_value'], record.get('unit'))}"
            else:
                said["predicted_box"] = [round(float(x), 4) for x in out["boxes"][*place, i]]
                text += " " + " ".join(f"{x:.2f}" for x in said["predicted_box"])
        return {"prediction": (text + tokenizer.decode(words)).strip()} | said

    def total(self, model: Geode, terms: Terms) -> tuple[Array, dict]:
        """Eq. 4 or eq. 7; the weights for the log."""
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
        return losses.static_total(terms, {name: weights[name.split("/")[0]] for name in terms})


def layout_alignment(spatio_SRD: Array, layout: LayoutEncoder, batch: Batch) -> losses.Pair:
    """`LayoutEncoder.distance` of E_spatio; count = slots.

    The first slots are to the first categories, whichever of them are more. Of scenes whose boxes
    are known.
    """
    error_SM = layout.distance(spatio_SRD, batch)
    known_SM = jnp.broadcast_to(jnp.asarray(batch.boxes_known_S)[:, None], error_SM.shape)
    return jnp.sum(jnp.where(known_SM, error_SM, 0.0)), jnp.sum(known_SM, dtype=jnp.float32)


def value_loss(codes: Array, values: Array, base_unit: Array, mask: Array) -> Pair:
    """Eq. 6 on values: squared error of the codes as (sum, count) where `mask`."""
    target = encode_values(jnp.where(mask, values, 1.0), base_unit)
    error = jnp.where(mask, codes - target, 0.0)
    return jnp.sum(jnp.square(error)), jnp.sum(mask, dtype=jnp.float32)


def box_loss(codes_8: Array, boxes_7: Array, mask: Array) -> Pair:
    """Eq. 6 on boxes: squared error to the nearer code of each, `geometry.boxes.nearer_code`.

    As (sum, count) where `mask`.
    """
    codes_8 = jnp.where(mask[..., None], codes_8, 0.0)
    target = encode_boxes(jnp.where(mask[..., None], boxes_7, 1.0))
    error = nearer_code(lambda code: jnp.sum(jnp.square(codes_8 - code), axis=-1), target)
    return jnp.sum(jnp.where(mask, error, 0.0)), jnp.sum(mask, dtype=jnp.float32)
