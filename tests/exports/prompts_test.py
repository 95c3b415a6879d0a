import json

import pytest

from geode_jax.exports.kinds import VSI_CHOICE_KINDS, VSI_NUMERIC_KINDS
from geode_jax.exports.prompts import prompt


def snapshot(data_root, name: str) -> str:
    file = data_root / "vsibench_prompt_snapshots" / f"vsibench__{name}.json"
    return json.loads(file.read_text())["prompt_text"]


@pytest.mark.parametrize("kind", sorted(VSI_NUMERIC_KINDS))
def test_numeric_prompt_is_the_benchmarks_own(kind, data_root):
    record = {"kind": kind, "question": "How many chairs are visible in this room?"}
    assert prompt(record) == snapshot(data_root, "na")


@pytest.mark.parametrize("kind", sorted(VSI_CHOICE_KINDS))
def test_choice_prompt_is_the_benchmarks_own(kind, data_root):
    record = {
        "kind": kind,
        "question": "Which direction is the sofa relative to the dining table?",
        "options": ["To the left", "To the right", "In front", "Behind"],
    }
    assert prompt(record) == snapshot(data_root, "mca")


def test_other_kinds_are_asked_as_they_stand():
    record = {"kind": "proximity", "question": "Which is closer?"}
    assert prompt(record) == "Which is closer?"
    assert prompt(record | {"options": ["A. bed", "B. sofa"]}) == (
        "Which is closer?\nA. bed\nB. sofa"
    )
