"""ScanQA and SQA3D: questions about ScanNet's scans, in the files that their authors give.

`--part train`, `val` or `test` selects one split. A scene's split is that of the export: training
questions about held-out scenes are dropped and counted, and so are evaluation questions about
training scenes. Object ids and the asker's pose are dropped: ids mean nothing without the scan's
segments, and a model does not get the pose.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from geode_jax.errors import UserError
from geode_jax.exports import files
from geode_jax.exports.kinds import KINDS
from geode_jax.sources.datasets import Report, Request
from geode_jax.sources.datasets.answers import referenced, text_of
from geode_jax.sources.datasets.questions import (
    Layout,
    MisfitError,
    RecordQuestions,
    UnansweredError,
    make_questions,
)

_SITUATED = tuple(name[len("sqa3d_") :] for name in KINDS if name.startswith("sqa3d_"))
"""SQA3D reports accuracy by how the question begins ("What's" too); all others are "other"."""


def scanqa(request: Request) -> Report:
    """Prepares ScanQA v1.0: `ScanQA_v1.0_{train,val,test_w_obj,test_wo_obj}.json`, also in `qa/`.

    The test files have no answers; their questions are dropped and counted.
    """
    parts = {"train": "train", "val": "val", "test": "test_w*_obj"}
    folders = ("", "qa/", "data/qa/")
    return make_questions(
        Layout(
            "scanqa",
            {
                part: tuple(f"{folder}ScanQA_v1.0_{name}.json" for folder in folders)
                for part, name in parts.items()
            },
            scanqa_record,
            parts_are_splits=True,
        ),
        request,
    )


def scanqa_record(record: dict, path: Path) -> RecordQuestions:
    """Returns the question of a ScanQA record; see `Layout.parse`."""
    question = text_of(record.get("question"), "question")
    scene = text_of(record.get("scene_id"), "scene_id")
    own = text_of(record.get("question_id"), "question_id")
    for name in ("object_ids", "object_id"):  # the file and its documentation differ
        ids = record.get(name, [])
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise MisfitError(f"has {name} that are no numbers")
    if "answers" not in record:
        raise UnansweredError
    return RecordQuestions(scene, [referenced("scanqa", question, record["answers"])], own)


def sqa3d(request: Request) -> Report:
    """Prepares SQA3D v1: `v1_balanced_{questions,sqa_annotations}_{split}_scannetv2.json`.

    The situation is put before the question. Kinds are `sqa3d_what`, `_is`, `_how`, `_can`,
    `_which` and `_other`, by which the benchmark reports accuracy.
    """
    folders = ("", "balanced/", "sqa_task/balanced/")
    return make_questions(
        Layout(
            "sqa3d",
            {
                split: tuple(f"{f}v1_balanced_questions_{split}_scannetv2.json" for f in folders)
                for split in ("train", "val", "test")
            },
            sqa3d_record,
            _questions_with_annotations,
            parts_are_splits=True,
        ),
        request,
    )


def _questions_with_annotations(path: Path) -> Iterator[Any]:
    """Yields questions with their annotation (or None) in the field "annotation"."""
    beside = path.with_name(path.name.replace("_questions_", "_sqa_annotations_"))
    questions = _list_of(path, "questions")
    annotations = {}
    for annotation in _list_of(beside, "annotations"):
        if isinstance(annotation, dict) and isinstance(annotation.get("question_id"), int | str):
            annotations[annotation["question_id"]] = annotation
    for question in questions:
        if isinstance(question, dict) and isinstance(question.get("question_id"), int | str):
            found = annotations.get(question["question_id"])
            yield {**question, "annotation": found}
        else:
            yield MisfitError("has no question_id")


def _list_of(path: Path, key: str) -> list:
    content = files.read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise UserError(f"{path}: not in the layout of sqa3d: it has no list {key!r}")
    return content[key]


def sqa3d_record(record: dict, path: Path) -> RecordQuestions:
    """Returns the question of an SQA3D record with its "annotation"; see `Layout.parse`."""
    question = text_of(record.get("question"), "question")
    situation = text_of(record.get("situation"), "situation")
    scene = text_of(record.get("scene_id"), "scene_id")
    annotation = record["annotation"]
    if annotation is None:
        raise UnansweredError
    if annotation.get("scene_id") != scene:
        raise MisfitError("has an annotation of another scene")
    answers = annotation.get("answers")
    if not isinstance(answers, list) or not all(isinstance(a, dict) for a in answers):
        raise MisfitError("has no list of answers")
    begin = next((word for word in _SITUATED if question.lower().startswith(word)), "other")
    kind = f"sqa3d_{begin}"
    fields = referenced(kind, question, [answer.get("answer") for answer in answers])
    return RecordQuestions(
        scene, [fields | {"question": f"{situation} {question}"}], str(record["question_id"])
    )
