"""The JSON of an export: the manifest and the questions, every field with its rule.

A rule is a function that takes a value and returns a description of the violation, or None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import files, question_rules
from .contract import (
    BOXES,
    DTYPES,
    LONGEST_NAME,
    MANIFEST,
    SCHEMA_VERSION,
    SPLITS,
    ExportError,
    shown,
)
from .kinds import NUMERIC_KINDS, RELATIONS

_SCENE_ID = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")


_SHA256 = re.compile(r"[0-9a-f]{64}")


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()  # JSON can spell lone surrogates, which nothing downstream can print
    except UnicodeEncodeError:
        return False
    return True


def _is_name(value: Any) -> bool:
    return _is_text(value) and len(value) <= LONGEST_NAME


def _is_number(value: Any) -> bool:
    # Compared, not converted: JSON has integers that no float can hold.
    return type(value) in (int, float, np.float64) and abs(value) <= 1e300


def _is_count(value: Any, lowest: int) -> bool:
    return type(value) is int and lowest <= value < 2**31


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_text(item) for item in value)


def _is_box(value: Any) -> bool:
    is_list = isinstance(value, (list, tuple)) and len(value) == 7
    return is_list and all(_is_number(v) for v in value) and min(value[3:6]) > 0


_AT_MOST = f" of at most {LONGEST_NAME} characters"


def _must(condition: Callable[[Any], bool], rule: str) -> Callable[[Any], str | None]:
    return lambda value: None if condition(value) else f"must be {rule}, is {shown(value)}"


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _check_producer(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "must be an object"
    if not all(len(key) <= LONGEST_NAME for key in value):
        return f"a key has more than {LONGEST_NAME} characters"
    for key in ("project", "commit", "weights", "licence"):
        if not _is_text(value.get(key)):
            return f"{key} must be a non-empty string"
    return None if _is_texts(list(value.values())) else "values must be non-empty strings"


def _check_objects(value: Any) -> str | None:
    if not isinstance(value, (list, tuple)) or not value:
        return "must be a non-empty list"
    for i, item in enumerate(value):
        if not isinstance(item, dict) or set(item) - {"index"} != {"name", "box"}:
            return f"[{i}] must have name, box and at most index"
        if not _is_name(item["name"]):
            return f"[{i}] name must be a non-empty string{_AT_MOST}"
        if not _is_box(item["box"]):
            return f"[{i}] box must be 7 finite numbers with positive sizes"
        if not _is_count(item.get("index", 0), 0):
            return f"[{i}] index must be a row of {BOXES}"
    return None


def _check_alignment(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "must be an object"
    counts, numbers = ("views", "kept"), ("scale", "residual_m", "centres_m", "rotations_deg")
    for name in ("method", "depth_target", *counts, *numbers):
        if name not in value:
            return f"{name} is missing"
    for name, found in value.items():
        if name in _ALIGNMENT_WORDS:
            good = found in _ALIGNMENT_WORDS[name]
        elif name in counts:
            good = _is_count(found, 0)
        else:
            good = name in (*numbers, "depth_relative") and _is_number(found) and found >= 0
        if not good:
            return f"{shown(name)}: {shown(found)} is not allowed"
    return None


def _check_relation(value: Any) -> str | None:
    if not isinstance(value, dict) or not value:
        return "must be an object of relation names"
    for name, probability in value.items():
        if name not in RELATIONS:
            return f"unknown relation {shown(name)}"
        if not _is_number(probability) or not 0 <= probability <= 1:
            return f"{name} must be a probability in [0, 1]"
    return None


def _check_questions_entry(value: Any) -> str | None:
    if not isinstance(value, dict) or set(value) != {"count", "sha256"}:
        return "must have count and sha256"
    if not _is_count(value["count"], 0):
        return "count must be a non-negative integer"
    return None if _is_sha256(value["sha256"]) else "sha256 must be a sha256 in hexadecimal"


def _is_unique_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_name, value)) and len(set(value)) == len(value)


def _is_grid(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_count(v, 1) for v in value)


_TEXT = _must(_is_text, "a non-empty string")

_NAME = _must(_is_name, f"a non-empty string{_AT_MOST}")

_SCENE_NAME = _must(
    lambda value: isinstance(value, str) and _SCENE_ID.fullmatch(value) is not None,
    "letters, digits, '.', '_', '-' without a leading dot",
)

_HASH = _must(_is_sha256, "a sha256 in hexadecimal")

_ALIGNMENT_WORDS = {"method": ("cameras", "depth"), "depth_target": ("sensor", "vggt")}

HEADER_FIELDS = {
    "schema_version": _must(
        lambda v: type(v) is int and v == SCHEMA_VERSION,
        f"{SCHEMA_VERSION}, the version known here",
    ),
    "producer": _check_producer,
    "dtype": _must(lambda v: v in tuple(DTYPES), "float16, bfloat16 or float32"),
    "scale": _must(lambda v: v in ("metric", "scene"), "metric or scene"),
    "token_width": _must(lambda v: _is_count(v, 1), "a positive integer"),
    "patch_grid": _must(_is_grid, "two positive integers"),
    "tokens_contain_depth": _must(lambda v: type(v) is bool, "true or false"),
    "categories": _must(_is_unique_names, f"a list of different non-empty strings{_AT_MOST}"),
    "notes": _must(lambda v: v == "" or _is_text(v), "a string"),
    "created": _TEXT,
    "teacher_tokenizer": _HASH,
}

_OPTIONAL = ("teacher_tokenizer",)

MEANING = ("dtype", "scale", "token_width", "patch_grid", "categories", "teacher_tokenizer")
"""Fields of the header on which the meaning of a scene's numbers depends."""

_MANIFEST_FIELDS = {
    **HEADER_FIELDS,
    "scenes": _must(lambda v: isinstance(v, list) and len(v) > 0, "a non-empty list"),
    "questions": _check_questions_entry,
}

_ENTRY_FIELDS = {
    "id": _SCENE_NAME,
    "split": _must(lambda v: v in SPLITS, f"one of {', '.join(SPLITS)}"),
    "sha256": _HASH,
    "teacher_sha256": _HASH,
    "alignment": _check_alignment,
}

QUESTION_FIELDS = {
    **dict.fromkeys(("id", "scene_id", "kind", "source", "unit"), _NAME),
    **dict.fromkeys(("question", "answer", "teacher_answer", "rationale"), _TEXT),
    **dict.fromkeys(
        ("options", "answers"), _must(lambda v: bool(v) and _is_texts(v), "a list of strings")
    ),
    "value": _must(_is_number, "a finite number"),
    "box": _must(_is_box, "7 finite numbers with positive sizes"),
    **dict.fromkeys(("relation", "teacher_relation"), _check_relation),
    "objects": _check_objects,
}
"""Field of a question -> its rule."""


def check_fields(where: str, record: Any, fields: dict, required: Sequence[str], at="") -> None:
    if not isinstance(record, dict):
        raise ExportError(where, at, "must be a JSON object")
    for name in required:
        if name not in record:
            raise ExportError(where, at + name, "missing")
    for name, value in record.items():
        if name not in fields:
            raise ExportError(where, at + shown(name), "unknown field")
        wrong = fields[name](value)
        if wrong:
            raise ExportError(where, at + name, wrong)


def check_question(
    where: str, record: Any, seen: set[str], box_count: Callable[[str], int | None]
) -> None:
    """Checks one question and adds its id to `seen`.

    Args:
        where: `questions.jsonl:LINE`.
        record: the parsed line.
        seen: ids of the questions before.
        box_count: returns the number of boxes of a scene, None for an unknown scene.

    Raises:
        ExportError: a field breaks its rule.
    """
    required = ("id", "scene_id", "kind", "question", "answer")
    check_fields(where, record, QUESTION_FIELDS, required)
    if record["id"] in seen:
        raise ExportError(where, "id", f"duplicate question id {shown(record['id'])}")
    boxes = box_count(record["scene_id"])
    if boxes is None:
        raise ExportError(where, "scene_id", f"unknown scene {shown(record['scene_id'])}")
    for i, item in enumerate(record.get("objects", ())):
        if item.get("index", -1) >= boxes:
            rule = f"[{i}] index {item['index']} is not a row of the {boxes} {BOXES}"
            raise ExportError(where, "objects", rule)
    if record["kind"] in NUMERIC_KINDS and "value" not in record:
        try:
            number = float(record["answer"])
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            rule = f"missing, and the answer {shown(record['answer'])} is no number"
            raise ExportError(where, "value", rule)
    fault = question_rules.contradiction(record, record["kind"] in NUMERIC_KINDS)
    if fault:
        raise ExportError(where, *fault)
    seen.add(record["id"])


def parse(where: str, data: bytes) -> Any:
    """Returns the value of a JSON text; raises ExportError if it is not JSON."""
    try:
        return files.parse_json(
            where, data, nan=True
        )  # the rules of the fields have better messages
    except files.UserError as error:
        raise ExportError(where, "", str(error)[len(where) + 2 :]) from None


def required_fields(fields: dict) -> list[str]:
    return [name for name in fields if name not in _OPTIONAL]


def check_manifest(manifest: Any) -> None:
    """Checks a manifest; raises ExportError with the first violation."""
    if (
        isinstance(manifest, dict) and "schema_version" in manifest
    ):  # the most informative error comes first
        wrong = HEADER_FIELDS["schema_version"](manifest["schema_version"])
        if wrong:
            raise ExportError(MANIFEST, "schema_version", wrong)
    check_fields(MANIFEST, manifest, _MANIFEST_FIELDS, required_fields(_MANIFEST_FIELDS))
    seen = set()
    for i, entry in enumerate(manifest["scenes"]):
        check_entry(entry, seen, f"scenes[{i}].")


def check_entry(entry: Any, seen: set[str], at: str = "") -> None:
    """Checks the manifest's entry of a scene and adds its id to `seen`; raises ExportError."""
    check_fields(MANIFEST, entry, _ENTRY_FIELDS, ("id", "split", "sha256"), at)
    if entry["id"] in seen:
        raise ExportError(MANIFEST, at + "id", f"duplicate scene {entry['id']}")
    seen.add(entry["id"])
