"""Your own questions about the scenes of an export: a file of JSON lines.

    {"scene_id": "livingroom", "question": "Where is the lamp?", "answer": "on the table"}

A record has the fields of the array contract (`docs/how-to/questions.md`), with some freedom: `id`
and `kind` may be absent, an answer may be a number, options may lack their letters and the answer
then be one of them, and a `box` needs no answer in words. The file is written for this reader, so
that a record which does not fit is refused with its place instead of counted.
"""

import dataclasses
import difflib
import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from geode_jax.errors import UserError
from geode_jax.exports import files, units
from geode_jax.exports.contract import shown
from geode_jax.exports.records import QUESTION_FIELDS
from geode_jax.sources.datasets import Report, Request
from geode_jax.sources.datasets.answers import NO_VALUE, question_fields, text_of
from geode_jax.sources.datasets.questions import (
    NAME,
    Layout,
    MisfitError,
    RecordQuestions,
    make_questions,
)


def own_questions(request: Request) -> Report:
    """Adds the questions of a file, or of all `*.jsonl` of a folder, to the scenes of an export.

    Raises:
        UserError: a record does not fit, or is about a scene that the export does not have.
    """
    pattern = "*.jsonl"
    if request.root.is_file():
        pattern = glob.escape(request.root.name)
        request = dataclasses.replace(request, root=request.root.parent)
    layout = Layout("jsonl", {"all": (pattern,)}, own_question, records=_lines, strict=True)
    return make_questions(layout, request)


def _lines(path: Path) -> Iterator[Any]:
    for _, value in files.json_lines(path):
        yield MisfitError("is not JSON") if isinstance(value, UserError) else value


def own_question(record: dict, path: Path) -> RecordQuestions:
    """Returns the question of a record; see `Layout.parse`."""
    for name in record:
        if name not in QUESTION_FIELDS:
            near = difflib.get_close_matches(name, QUESTION_FIELDS, n=1)
            known = ", ".join(QUESTION_FIELDS)
            meant = f"did you mean {near[0]}?" if near else f"there are {known}"
            raise MisfitError(f"has an unknown field {shown(name)}; {meant}")
    kind = record.get("kind", "object_box" if "box" in record else "question")
    if not isinstance(kind, str) or not NAME.fullmatch(kind):
        raise MisfitError("has a kind that is no name")
    question = text_of(record.get("question"), "question")
    fields = question_fields(kind, question, _answer(record), _options(record.get("options")))
    if "value" in record:
        fields["kind"] = kind  # its number is given, and need not be read from the answer
        fields.pop(NO_VALUE, None)
    if "unit" in record:
        unit = text_of(record["unit"], "text in its unit")
        if "value" not in record:
            raise MisfitError("has a unit without a value")
        if units.read_unit(unit) is None:
            raise MisfitError(f"has an unknown unit {shown(unit)}")
    read = ("id", "scene_id", "kind", "question", "answer", "options")
    given = {name: value for name, value in record.items() if name not in read}
    scene, own = text_of(record.get("scene_id"), "scene_id"), str(record.get("id", ""))
    return RecordQuestions(scene, [fields | given], own)


def _answer(record: dict) -> str:
    """Returns the answer as text, or that of a box."""
    answer, box = record.get("answer"), record.get("box")
    if answer is None and isinstance(box, list) and all(type(x) in (int, float) for x in box):
        return " ".join(f"{x:.2f}" for x in box)
    return str(answer) if type(answer) in (int, float) else text_of(answer, "answer")


def _options(options: Any) -> list[str]:
    """Returns options as "A. chair" and so on."""
    if options is None:
        return []
    if not isinstance(options, list) or len(options) < 2:
        raise MisfitError("has options that are no list of two or more")
    texts = [text_of(option, "text in an option") for option in options]
    letters = [chr(ord("A") + i) for i in range(len(texts))]
    if all(text.startswith(f"{x}. ") for text, x in zip(texts, letters, strict=True)):
        return texts
    return [f"{x}. {text}" for text, x in zip(texts, letters, strict=True)]
