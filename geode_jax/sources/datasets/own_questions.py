"""Your own questions about the scenes of an export: a file of JSON lines.

    {"scene": "livingroom", "question": "How many lamps are there?", "answer": "2"}

The file is written for this reader, so that a record which does not fit is refused with its place
instead of counted.
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
from geode_jax.sources.datasets import Report, Request
from geode_jax.sources.datasets.answers import question_fields, text_of
from geode_jax.sources.datasets.questions import (
    NAME,
    Layout,
    MisfitError,
    RecordQuestions,
    make_questions,
)

FIELDS = {
    "scene": "id of a scene of the export, or the path of its video",
    "question": "the question",
    "answer": "the answer: a text, a number, or with options one of them or its letter",
    "id": "a name of the question, unique in the file; default: file and line",
    "kind": 'what its scores are listed under; default "question", with a box "object_box"',
    "options": 'list of choices, "chair" or "A. chair"',
    "value": "the number that is the answer, with unit",
    "unit": 'such as "m", "cm", "m2", "items"',
    "box": "x, y, z, length, width, height in metres and yaw in radians, world frame",
    "rationale": "the reasoning before the answer, which GEODE's stages 0 and 1 learn",
}
"""Field of a record -> what it holds. The first three are required; a box can be the answer."""


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
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(FIELDS)}"
            raise MisfitError(f"has an unknown field {shown(name)}; {meant}")
    box, kind = (
        record.get("box"),
        record.get("kind", "object_box" if "box" in record else "question"),
    )
    if not isinstance(kind, str) or not NAME.fullmatch(kind):
        raise MisfitError("has a kind that is no name")
    question = text_of(record.get("question"), "question")
    if box is not None and "answer" not in record:
        if not isinstance(box, list) or not all(type(x) in (int, float) for x in box):
            raise MisfitError("has a box that is no list of numbers")
        answer = " ".join(f"{x:.2f}" for x in box)
    else:
        answer = record.get("answer")
        answer = str(answer) if type(answer) in (int, float) else text_of(answer, "answer")
    fields = question_fields(kind, question, answer, _options(record.get("options")))
    if "value" in record:
        fields["kind"] = kind  # its number is given, and need not be read from the answer
        fields.pop("no_value", None)
    if "unit" in record:
        unit = text_of(record["unit"], "text in its unit")
        if "value" not in record:
            raise MisfitError("has a unit without a value")
        if units.read_unit(unit) is None:
            raise MisfitError(f"has an unknown unit {shown(unit)}")
    given = {name: record[name] for name in ("value", "unit", "box") if name in record}
    if "rationale" in record:
        given["rationale"] = text_of(record["rationale"], "rationale")
    own = record.get("id", "")
    return RecordQuestions(
        text_of(record.get("scene"), "scene"), [fields | given], str(own) if own != "" else ""
    )


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
