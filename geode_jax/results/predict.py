"""A trained run that answers questions, on the path by which the evaluation answers them."""

import dataclasses
import functools
import re
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

_WORDINGS_OF = 200
"""So many scenes' questions teach which wording belongs to which kind of question."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model says.

    Attributes:
        text: the words; a value, in its question's unit, or a box stands for its control token.
        kind: of the question, "" where its wording is none of the export's.
        value, box: GEODE's, of the last control token of each, where there is one.
        unit: of the value, where the question has one.
        thinking_tokens: the student's K, decoded (Sec. V-d, Fig. 4); None of other systems.
    """

    text: str
    kind: str
    value: float | None = None
    unit: str | None = None
    box: tuple[float, ...] | None = None
    thinking_tokens: tuple[str, ...] | None = None

    @property
    def shown(self) -> str:
        """The text, with its unit where the whole of it is a value."""
        alone = self.value is not None and self.text == units.write_number(self.value, self.unit)
        return f"{self.text} {self.unit}" if alone and self.unit else self.text

    def facts(self) -> dict[str, Any]:
        """What there is of it, for JSON, under the names of a run's `predictions.jsonl`."""
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
    """The scene that was asked about last.

    Attributes:
        scene_id: its name.
        records: its own questions.
        arrays: as the model reads them.
        encoded: what its questions share, once the first was asked.
    """

    scene_id: str
    records: list[dict]
    arrays: OneScene
    encoded: Any = None


class Predictor:
    """The best checkpoint of a run (the latest where none was best yet), ready to be asked.

    Needs neither optimizer nor training data beyond the export's own files. The answering is
    compiled once, with the first question; one longer than any in training compiles again. What a
    scene's questions share is computed with the first of them, and kept until another scene is
    asked about.

    Attributes:
        workdir: of the run.
        export: the scenes that can be asked about.
        truth_field: of a question's record, what the model was taught to say.
        step: of training at which the checkpoint was made.
    """

    def __init__(self, workdir: str | Path, *, rationale: bool = False, int8: bool = False):
        """Opens the checkpoint.

        Args:
            workdir: of the run, which may still be training.
            rationale: answer with GEODE's rationales, which a run of stage 1 does anyway.
            int8: round the decoder's matrices to a byte a number, see `models.decoding`.

        Raises:
            UserError, ExportError: it is no run, has no checkpoint, its export is not here, or
                its model learned no rationales.
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
        """The question records that the export has of a scene.

        Without control tokens, those that are answered by a box are left out: nothing else can say
        one.

        Raises:
            UserError: unknown scene.
        """
        return list(self._scene(scene_id).records)

    def answer(
        self,
        scene_id: str,
        question: str,
        options: Sequence[str] | None = None,
        sampling: Sampling | None = None,
    ) -> Answer:
        """The model's answer.

        A question worded like one of the export's is put as that one was in training: with its
        kind's prompt (`exports.prompts`) and in its unit, a question of the scene itself also with
        its options.

        Args:
            scene_id: any scene of the export.
            question: one or more sentences; how they are broken into lines plays no part.
            options: of a multiple choice, "A. chair" or just "chair".
            sampling: None: greedy.

        Raises:
            UserError: unknown scene, or options are needed.
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
        said = self._trained.objective.decode_answer(answers, (0, 0), record, self._tokenizer)
        box, thinking = said.get("predicted_box"), said.get("thinking_tokens")
        value = said.get("predicted_value")
        return Answer(
            text=said["prediction"],
            kind=record["kind"],
            value=value,
            unit=None if value is None else answer_unit(record),
            box=None if box is None else tuple(box),
            thinking_tokens=None if thinking is None else tuple(thinking),
        )

    def record(self, scene_id: str, question: str, options: Sequence[str] | None = None) -> dict:
        """The question record that `answer` puts to the model; arguments and errors as there."""
        if not question.strip():
            raise UserError("question: empty")
        record: dict[str, Any] = {"scene_id": scene_id, "kind": "", "question": question}
        for own in self.questions(scene_id):
            if own["question"].split() == question.split():
                record |= _kept(own, "kind", "question", "options", "unit")
                break
        else:
            record |= self._kinds.get(self._wording(question), {})
        if options:
            record["options"] = _lettered(options)
        elif record["kind"] in VSI_CHOICE_KINDS and "options" not in record:
            raise UserError("question: this kind is a multiple choice; give its --options")
        return record

    def unknown_words(self, text: str) -> list[str]:
        """Words and signs of a text that the run's tokenizer has no id for, in order."""
        words = dict.fromkeys(re.findall(r"[^\W\d_]+|[^\w\s]", text))
        unknown = self._tokenizer.unk_id
        return [word for word in words if unknown in self._tokenizer.encode(" " + word)]

    def _scene(self, scene_id: str) -> _Scene:
        """All there is of a scene; that of the last one is kept."""
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
        """Wording -> kind of question, and its unit where it has one."""
        scenes = self._records.scene_ids("train")[:_WORDINGS_OF]
        records = (record for scene_id in scenes for record in self._records.read(scene_id))
        return {
            self._wording(record["question"]): _kept(record, "kind", "unit") for record in records
        }

    def _wording(self, question: str) -> str:
        """The question without what is particular to it: categories and numbers."""
        nouns = sorted(map(re.escape, self.export.categories), key=len, reverse=True)
        particular = "|".join([*(rf"\b{noun}\b" for noun in nouns), r"\d+(?:\.\d+)?"])
        return " ".join(re.sub(particular, "#", question, flags=re.IGNORECASE).lower().split())


def _kept(record: dict, *fields: str) -> dict:
    return {field: record[field] for field in fields if field in record}


def _lettered(options: Sequence[str]) -> list[str]:
    """Options with their letters.

    Raises:
        UserError: more than there are letters, an empty one, or letters that some already have and
            that are not A, B, ...
    """
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    if len(options) > len(letters):
        raise UserError(f"options: {len(options)}, at most {len(letters)}: each has a letter")
    if empty := [i for i, option in enumerate(options, 1) if not option.strip()]:
        raise UserError(f"options: number {empty[0]} is empty")
    own = [re.match(r"\(?([A-Z])[.):](?:\s|$)", option) for option in options]
    if not any(own):
        return [f"{letter}. {option}" for letter, option in zip(letters, options, strict=False)]
    if [found and found[1] for found in own] != list(letters[: len(options)]):
        raise UserError("options: some have letters, and they are not A, B, ... in order")
    return list(options)
