"""A trained run that answers questions, on the path by which the evaluation answers them."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from geode_jax.build import (
    export_folder,
    keep_compiled_programs,
    load_config,
    pipeline_config,
)
from geode_jax.checkpoint import find_model, load_model
from geode_jax.data.control import BOX, control_of
from geode_jax.data.exports import Export
from geode_jax.data.pipeline import Pipeline
from geode_jax.data.prompts import VSI_CHOICE_KINDS
from geode_jax.data.question_records import open_question_records
from geode_jax.data.tokens import load_tokenizer
from geode_jax.errors import UserError
from geode_jax.evaluate.evaluator import Evaluator
from geode_jax.sharding import activate, make_mesh
from geode_jax.systems import make_objective
from geode_jax.train_step import Objective, TrainState

_WORDINGS_OF = 200
"""So many scenes' questions teach which wording belongs to which kind of question."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the student says, and its K thinking tokens decoded (Sec. V-d, Fig. 4)."""

    text: str
    thinking_tokens: tuple[str, ...]


def open_run_export(workdir: Path) -> Export:
    """The export that a run was trained on.

    Raises:
        UserError, ExportError: no run was started in this folder, or its export is not here.
    """
    folder = export_folder(load_config(workdir).data)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: not here, and {workdir} was trained on it; ask from the folder where "
            "training was started"
        )
    return Export(folder)


class Predictor:
    """The best checkpoint of a run (the latest where none was best yet), ready to be asked.

    Needs neither optimizer nor training data beyond the export's own files. The answering is
    compiled once, with the first question; one longer than any in training compiles again.

    Attributes:
        workdir: of the run.
        export: the scenes that can be asked about.
        step: of training at which the checkpoint was made.
    """

    def __init__(self, workdir: str | Path):
        """Args: workdir: of the run, which may still be training.

        Raises:
            UserError, ExportError: it is no run, has no checkpoint, or its export is not here.
        """
        self.workdir = Path(workdir)
        keep_compiled_programs()
        config = load_config(self.workdir)
        checkpoint = find_model(self.workdir)
        self.step = int(checkpoint.name)
        self.export = open_run_export(self.workdir)
        self._records = open_question_records(self.export, config.data.on_bad_scene)
        self._tokenizer = load_tokenizer(config.tokenizer or self.workdir / "tokenizer")
        one_scene = dataclasses.replace(
            pipeline_config(config, self.export, self._tokenizer), scenes_per_batch=1
        )
        self._pipeline = Pipeline(self.export, self._tokenizer, one_scene, "train")
        objective = make_objective(config, self.export, self._tokenizer, self._pipeline)
        self._objective = objective
        self._mesh = make_mesh()  # this machine's devices, whatever the run trained on
        graph, model = _abstract_model(objective, self._mesh)
        model = load_model(checkpoint, model)
        self._state = TrainState(np.int32(self.step), model["params"], model["frozen"], ())
        self._evaluator = Evaluator(objective, graph, self._tokenizer, self._mesh)

    def questions(self, scene_id: str) -> list[dict]:
        """The question records that the export has of a scene, but those answered by a box.

        Raises:
            UserError: unknown scene.
        """
        self._check_scene(scene_id)
        return [record for record in self._records.read(scene_id) if control_of(record) != BOX]

    def answer(self, scene_id: str, question: str, options: Sequence[str] | None = None) -> Answer:
        """The student's answer.

        A question worded like one of the export's is put as that one was in training: with its
        kind's prompt (`data.prompts`), a question of the scene itself also with its options.

        Args:
            scene_id: any scene of the export.
            question: one or more sentences; how they are broken into lines plays no part.
            options: of a multiple choice, "A. chair" or just "chair".

        Raises:
            UserError: unknown scene, or options are needed.
        """
        record = self.record(scene_id, question, options)
        with activate(self._mesh):
            batch = self._pipeline.one_question(record)
            answers = jax.device_get(self._evaluator.answer_batch(self._state, batch))
        said = self._objective.say(answers, (0, 0), record, self._tokenizer)
        return Answer(said["prediction"], tuple(said["thinking_tokens"]))

    def record(self, scene_id: str, question: str, options: Sequence[str] | None = None) -> dict:
        """The question record that `answer` puts to the student; arguments and errors as there."""
        if not question.strip():
            raise UserError("question: empty")
        record = {"scene_id": scene_id, "kind": "", "question": question}
        for own in self.questions(scene_id):
            if own["question"].split() == question.split():
                record |= {k: own[k] for k in ("kind", "question", "options") if k in own}
                break
        else:
            record["kind"] = self._kinds.get(self._wording(question), "")
        if options:
            record["options"] = _lettered(options)
        elif record["kind"] in VSI_CHOICE_KINDS and "options" not in record:
            raise UserError("question: this kind is a multiple choice; give its --options")
        return record

    def unknown_words(self, text: str) -> list[str]:
        """Words and signs of a text that the student's tokenizer has no id for, in order."""
        words = dict.fromkeys(re.findall(r"[^\W\d_]+|[^\w\s]", text))
        unknown = self._tokenizer.unk_id
        return [word for word in words if unknown in self._tokenizer.encode(" " + word)]

    def _check_scene(self, scene_id: str) -> None:
        if scene_id not in self.export.scene_ids():
            raise UserError(
                f"scene {scene_id}: not in {self.export.folder}; "
                f"list them with: geode-jax scenes --workdir {self.workdir}"
            )

    @functools.cached_property
    def _kinds(self) -> dict[str, str]:
        """Wording -> kind of question."""
        scenes = self._records.scene_ids("train")[:_WORDINGS_OF]
        records = (record for scene_id in scenes for record in self._records.read(scene_id))
        return {self._wording(record["question"]): record["kind"] for record in records}

    def _wording(self, question: str) -> str:
        """The question without what is particular to it: categories and numbers."""
        nouns = sorted(map(re.escape, self.export.categories), key=len, reverse=True)
        particular = "|".join([*(rf"\b{noun}\b" for noun in nouns), r"\d+(?:\.\d+)?"])
        return " ".join(re.sub(particular, "#", question, flags=re.IGNORECASE).lower().split())


def _lettered(options: Sequence[str]) -> list[str]:
    if all(re.match(r"[A-Z]\. ", option) for option in options):
        return list(options)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return [f"{letter}. {option}" for letter, option in zip(letters, options, strict=False)]


def _abstract_model(objective: Objective, mesh: jax.sharding.Mesh) -> tuple[nnx.GraphDef, dict]:
    """The model's structure, and its variables as shapes with shardings: nothing is computed."""
    with activate(mesh):
        model = nnx.eval_shape(lambda: objective.build(nnx.Rngs(0)))
        graph, params, frozen = nnx.split(model, objective.trainable, ...)

        def placed(state):
            return jax.tree.map(
                lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                state,
                nnx.get_named_sharding(state, mesh),
            )

        return graph, {"params": placed(params), "frozen": placed(frozen)}
