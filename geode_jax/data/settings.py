"""Settings of a pipeline, and the lengths of its questions and answers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from geode_jax.data.control import BOX
from geode_jax.data.question_records import (
    ANSWER_FIELDS,
    answer_lengths,
    open_question_records,
    question_lengths,
)
from geode_jax.data.scene_arrays import GEODE_VISION
from geode_jax.data.tokens import Tokenizer
from geode_jax.errors import UserError
from geode_jax.exports import Export


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Settings of a pipeline.

    Attributes:
        export: folder of the export.
        scenes_per_batch, questions_per_scene: S and Q.
        question_length, answer_length: L (prompt + bos) and A (answer + eos). A longer question
            is left out and counted in `Pipeline.dropped`, never truncated.
        max_boxes: N.
        rows_per_scene, row_length: W and T of the packed text; the Q drawn questions are packed in
            the order in which they were drawn, as far as they fit.
        vision: the tensor the model sees: "vggt/tokens" or "teacher/features" (the student),
            "images" or "internvit/tokens" (GEODE, which also sees `sonata/features` if the export
            has them).
        seed: seed of the order of scenes and the draw of questions, >= 0.
        workers: threads that prepare batches ahead of the training step. Reading and copying large
            tensors releases Python's lock, so threads run in parallel. On a CPU that also trains,
            more than one thread takes cores from the step.
        on_bad_scene: "stop" raises at a scene that breaks the contract, "skip" counts it and puts
            the epoch's next good scene in its place.
        answer_field: "answer", or "teacher_answer" to learn from and score against the teacher, or
            "rationale"; questions without this field are left out and counted.
        asks_rationales: whether its question precedes a "rationale"; other answers always have one.
        controls: ids of `<REG>` and `<3DBBOX>`, which replace an "answer" that is a number or a
            box. Without them, questions whose answer is a box are left out and counted.
        kind_weights: {kind: weight of its questions in the draw}, 1 by default; 0 leaves them out.
        source_weights: {data set: weight of its questions}, see `data.mixture`.
        fraction: share of the questions of every source and kind that is used, drawn by `seed`; or
            {data set: share of its questions of every kind}, 1 for data sets that are not named.
        min_learned: smallest share of a source's training questions that must have the learned
            field and fit; a smaller one is refused, so that no data set is lost in silence.
        logits: whether to read the teacher's logits if the export has them; logits over another
            vocabulary are refused.
        depth_ratio: r; target depth is [gh * r, gw * r].
    """

    export: str
    scenes_per_batch: int
    questions_per_scene: int
    question_length: int
    answer_length: int
    max_boxes: int
    rows_per_scene: int
    row_length: int
    vision: str = "vggt/tokens"
    seed: int = 0
    workers: int = 1
    on_bad_scene: str = "stop"
    answer_field: str = "answer"
    asks_rationales: bool = True
    controls: tuple[int, int] | None = None
    kind_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    source_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    fraction: float | Mapping[str, float] = 1.0
    min_learned: float = 0.5
    logits: bool = True
    depth_ratio: int = 2

    def __post_init__(self):
        smallest = dict(
            scenes_per_batch=1,
            questions_per_scene=1,
            question_length=1,
            answer_length=1,
            max_boxes=0,
            rows_per_scene=1,
            row_length=1,
            seed=0,
            workers=1,
            depth_ratio=1,
        )
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise UserError(f"data: {name}: {getattr(self, name)} is less than {least}")
        choices = {
            "vision": ("vggt/tokens", "teacher/features", *GEODE_VISION),
            "on_bad_scene": ("stop", "skip"),
            "answer_field": ANSWER_FIELDS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"data: {name}: {getattr(self, name)!r} is not one of {allowed}")
        if self.controls and len(set(self.controls)) != 2:
            raise UserError(f"data: controls: {self.controls} are not two different ids")
        for field in ("kind_weights", "source_weights"):
            for name, weight in getattr(self, field).items():
                if type(weight) not in (int, float) or not 0 <= weight < float("inf"):
                    raise UserError(f"data: {field}: {name}: {weight} is no weight >= 0")
        shares = self.fraction if isinstance(self.fraction, Mapping) else {"all": self.fraction}
        for name, share in shares.items():
            if not 0 < share <= 1:
                raise UserError(f"data: fraction: {name}: {share} is not in (0, 1]")
        if not 0 <= self.min_learned <= 1:
            raise UserError(f"data: min_learned: {self.min_learned} is not in [0, 1]")

    @property
    def asks(self) -> bool:
        """Whether questions precede the answers."""
        return self.asks_rationales or self.answer_field != "rationale"

    def asking_all(self) -> "PipelineConfig":
        """Returns the settings without weights and fraction, which only training uses."""
        return dataclasses.replace(self, kind_weights={}, source_weights={}, fraction=1.0)


class Longest(NamedTuple):
    """Tokens of the longest prompt with its bos, and of the longest answer with its eos."""

    question: int
    answer: int


def measure_lengths(
    export: Export,
    tokenizer: Tokenizer,
    split: str = "train",
    kinds: Sequence[str] | None = None,
    answer_field: str = "answer",
    on_bad_scene: str = "stop",
    controls: tuple[int, int] | None = None,
) -> Longest | None:
    """Measures the longest question and answer of a split, from which L and A are chosen.

    Args:
        export: opened export.
        tokenizer: the tokenizer of the run.
        split: name of the split.
        kinds: kinds of questions to measure; None for all.
        answer_field: field that is learned; questions without it are not measured.
        on_bad_scene, controls: as in `PipelineConfig`; questions that they leave out are not
            measured.

    Returns:
        The lengths; None if there is no question.
    """
    lengths = question_lengths(open_question_records(export, on_bad_scene), split, tokenizer)
    answer = answer_lengths(lengths, answer_field, bool(controls))
    keep = answer > 0
    if not controls:
        keep &= lengths["control"] != BOX
    if kinds is not None:
        keep &= np.isin(lengths["kind"], list(kinds))
    if not keep.any():
        return None
    return Longest(int(lengths["question"][keep].max()), int(answer[keep].max()))
