"""Answers questions with a trained run, by the same code as the evaluation."""

import dataclasses
import functools
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from geode_jax.data.control import BOX, answer_unit, control_of
from geode_jax.data.pipeline import OneScene
from geode_jax.data.question_records import open_question_records
from geode_jax.errors import UserError
from geode_jax.exports import units
from geode_jax.exports.kinds import VSI_CHOICE_KINDS
from geode_jax.models.decoding import with_decoding
from geode_jax.models.generate import Sampling
from geode_jax.runs.trained import open_trained
from geode_jax.sharding import replicated

_WORDING_SCENES = 200
"""Number of training scenes whose questions map wordings to kinds of questions."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer of the model.

    Attributes:
        text: the answer; each control token is replaced by its value, in the question's unit, or
            by its box.
        kind: of the question, "" if the export has no question of this wording.
        value, box: GEODE's regressed value and box of the last such control token; None without.
        unit: of the value, None if the question has none.
        thinking_tokens: the student's K thinking tokens, decoded (Sec. V-d, Fig. 4); None for other
            systems.
    """

    text: str
    kind: str
    value: float | None = None
    unit: str | None = None
    box: tuple[float, ...] | None = None
    thinking_tokens: tuple[str, ...] | None = None

    @property
    def shown(self) -> str:
        """The text, followed by the unit if the text is nothing but the value."""
        alone = self.value is not None and self.text == units.write_number(self.value, self.unit)
        return f"{self.text} {self.unit}" if alone and self.unit else self.text

    def facts(self) -> dict[str, Any]:
        """Returns the fields that are not None, under the names of a run's `predictions.jsonl`."""
        more = {
            "predicted_value": self.value,
            "unit": self.unit,
            "predicted_box": self.box,
            "thinking_tokens": self.thinking_tokens,
        }
        named = {"kind": self.kind, "prediction": self.text}
        return named | {name: value for name, value in more.items() if value is not None}


@dataclasses.dataclass
class _Scene:
    """The scene of the last question.

    Attributes:
        scene_id: its name.
        records: the questions that the export has of the scene.
        arrays: the arrays of the scene in the form that the model reads.
        encoded: what its questions share, once the first was answered.
    """

    scene_id: str
    records: list[dict]
    arrays: OneScene
    encoded: Any = None


class Predictor:
    """Answers questions with the best checkpoint of a run (the latest, if none is best yet).

    It needs no optimizer, and no training data beyond the export's own files. The functions are
    compiled with the first question; a question longer than any in training compiles again. The
    results that all questions of a scene share are computed with the first question of the scene,
    and kept until a question about another scene.

    Attributes:
        workdir: of the run.
        export: with the scenes.
        truth_field: field of a question record that the model was trained to predict.
        step: training step of the checkpoint.
    """

    def __init__(self, workdir: str | Path, *, rationale: bool = False, int8: bool = False):
        """Opens the checkpoint.

        Args:
            workdir: of the run, which may still be training.
            rationale: True to answer with GEODE's rationales, which a run of stage 1 always does.
            int8: True to round the decoder's matrices to 8-bit integers, see `models.decoding`.

        Raises:
            UserError, ExportError: `workdir` is no run or has no checkpoint, its export is missing,
                or its model was not trained on rationales.
        """
        self.workdir = Path(workdir)
        self._trained = trained = open_trained(self.workdir, rationale=rationale)
        self.export, self.step = trained.export, int(trained.state.step)
        self._pipeline, self._tokenizer = trained.pipeline, trained.tokenizer
        self._records = open_question_records(self.export, trained.settings.data.on_bad_scene)
        writes = trained.pipeline.config.answer_field == "rationale"
        self.truth_field = "rationale" if writes else "answer"
        self._int8 = int8
        self._last: _Scene | None = None

    def questions(self, scene_id: str) -> list[dict]:
        """Returns the question records that the export has of a scene.

        Questions for a box are left out if the model has no control tokens, since it cannot answer
        them.

        Raises:
            UserError: the export has no such scene.
        """
        return list(self._scene(scene_id).records)

    def answer(
        self,
        scene_id: str,
        question: str,
        options: Sequence[str] | None = None,
        sampling: Sampling | None = None,
    ) -> Answer:
        """Answers a question about a scene.

        A question with the wording of one in the export gets the prompt of its kind
        (`exports.prompts`) and its unit, as in training; a question of the scene itself also gets
        its options.

        Args:
            scene_id: any scene of the export.
            question: one or more sentences; line breaks do not matter.
            options: of a multiple choice, "A. chair" or just "chair".
            sampling: settings of random decoding; None: greedy decoding.

        Raises:
            UserError: the export has no such scene, or the kind of question needs options.
        """
        record = self.record(scene_id, question, options)
        encode_scene, answer, parameters = self._compiled
        scene = self._scene(scene_id)
        batch = self._pipeline.one_question(record, scene.arrays)
        with jax.set_mesh(self._trained.mesh):
            encoded = scene.encoded
            if encoded is None:
                encoded = encode_scene(parameters, batch)
            if self._trained.objective.caches_scene:
                scene.encoded = encoded
            answers = jax.device_get(answer(parameters, encoded, batch, sampling))
        found = self._trained.objective.decode_answer(answers, (0, 0), record, self._tokenizer)
        box, thinking = found.get("predicted_box"), found.get("thinking_tokens")
        value = found.get("predicted_value")
        return Answer(
            text=found["prediction"],
            kind=record["kind"],
            value=value,
            unit=None if value is None else answer_unit(record),
            box=None if box is None else tuple(box),
            thinking_tokens=None if thinking is None else tuple(thinking),
        )

    def record(self, scene_id: str, question: str, options: Sequence[str] | None = None) -> dict:
        """Returns the question record that `answer` gives to the model; see `answer`."""
        if not question.strip():
            raise UserError("question: must not be empty")
        record: dict[str, Any] = {"scene_id": scene_id, "kind": "", "question": question}
        for own in self.questions(scene_id):
            if own["question"].split() == question.split():
                record |= _kept(own, "kind", "question", "options", "unit")
                break
        else:
            record |= self._kinds.get(self._wording(question), {})
        if options and list(options) != record.get("options"):
            record["options"] = _lettered(options)
        elif record["kind"] in VSI_CHOICE_KINDS and "options" not in record:
            raise UserError("question: this kind is a multiple choice; give its --options")
        return record

    def unknown_words(self, text: str) -> list[str]:
        """Returns words and signs of a text, in order, that the run's tokenizer has no id for."""
        words = dict.fromkeys(re.findall(r"[^\W\d_]+|[^\w\s]", text))
        unknown = self._tokenizer.unk_id
        return [word for word in words if unknown in self._tokenizer.encode(" " + word)]

    def _scene(self, scene_id: str) -> _Scene:
        """Returns a scene with its questions; the last scene is kept in memory."""
        if self._last is None or self._last.scene_id != scene_id:
            if scene_id not in self.export.scene_ids():
                raise UserError(
                    f"scene {scene_id}: not in {self.export.folder}; "
                    f"list them with: geode-jax scenes --workdir {self.workdir}"
                )
            boxes = self._pipeline.config.controls is not None
            records = self._records.read(scene_id)
            records = [record for record in records if boxes or control_of(record) != BOX]
            self._last = _Scene(scene_id, records, self._pipeline.one_scene(scene_id))
        return self._last

    @functools.cached_property
    def _compiled(self) -> tuple[Callable, Callable, nnx.State]:
        """Encoding a scene, answering about it, and the parameters for both."""
        trained, eos_id = self._trained, self._tokenizer.eos_id
        objective = trained.objective
        model = nnx.merge(trained.graph, trained.state.params, trained.state.frozen)
        with jax.set_mesh(trained.mesh):
            ready = jax.jit(functools.partial(with_decoding, int8=self._int8))(model)
        graph, parameters = nnx.split(ready)

        def encode_scene(parameters, batch):
            return objective.encode_scene(nnx.merge(graph, parameters), batch)

        def answer(parameters, encoded, batch, sampling):
            return objective.answer(nnx.merge(graph, parameters), encoded, batch, eos_id, sampling)

        whole = replicated(trained.mesh)
        return jax.jit(encode_scene), jax.jit(answer, out_shardings=whole), parameters

    @functools.cached_property
    def _kinds(self) -> dict[str, dict]:
        """Wording -> kind of question, and its unit if it has one."""
        scenes = self._records.scene_ids("train")[:_WORDING_SCENES]
        records = (record for scene_id in scenes for record in self._records.read(scene_id))
        return {
            self._wording(record["question"]): _kept(record, "kind", "unit") for record in records
        }

    def _wording(self, question: str) -> str:
        """Returns the question with `#` in place of categories and numbers, in lower case."""
        nouns = sorted(map(re.escape, self.export.categories), key=len, reverse=True)
        replaced = "|".join([*(rf"\b{noun}\b" for noun in nouns), r"\d+(?:\.\d+)?"])
        return " ".join(re.sub(replaced, "#", question, flags=re.IGNORECASE).lower().split())


def _kept(record: dict, *fields: str) -> dict:
    return {field: record[field] for field in fields if field in record}


def _lettered(options: Sequence[str]) -> list[str]:
    """Returns options with their letters.

    Raises:
        UserError: there are more options than letters, an option is empty, or some options have
            letters and these are not A, B, ... in order.
    """
    letters = string.ascii_uppercase
    if len(options) > len(letters):
        raise UserError(f"options: must be at most {len(letters)}, are {len(options)}")
    if empty := [i for i, option in enumerate(options, 1) if not option.strip()]:
        raise UserError(f"options: number {empty[0]} must not be empty")
    own = [re.match(r"\(?([A-Z])[.):](?:\s|$)", option) for option in options]
    if not any(own):
        return [f"{letter}. {option}" for letter, option in zip(letters, options, strict=False)]
    if [found and found[1] for found in own] != list(letters[: len(options)]):
        raise UserError("options: their letters must be A, B, ... in order, or none may have one")
    return list(options)
