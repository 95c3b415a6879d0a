"""Captions, by which stage 0 of GEODE aligns vision tokens with language.

A caption is the answer to one fixed instruction.
"""

from pathlib import Path

from geode_jax.sources.datasets import Report, Request
from geode_jax.sources.datasets.answers import learned_before_stage_2, text_of
from geode_jax.sources.datasets.conversations import media_of, turns_of
from geode_jax.sources.datasets.questions import (
    Layout,
    MisfitError,
    RecordQuestions,
    make_questions,
)

INSTRUCTION = "Describe what you see."
"""The question of every caption; it replaces a data set's varied instructions."""


def cambrian_alignment(request: Request) -> Report:
    """Prepares Cambrian-Alignment: `jsons/alignment_2.5m.jsonl`, or any file below `jsons/`."""

    def parse(record: dict, path: Path) -> RecordQuestions:
        turns = turns_of(record)
        if len(turns) != 1:
            raise MisfitError("has more than one turn, which is no caption")
        return caption_question(media_of(record), turns[0][1][0])

    patterns = ("jsons/alignment_2.5m.jsonl", "jsons/*.json*", "*.json*")
    return make_questions(Layout("cambrian-alignment", {"all": patterns}, parse), request)


def s_mit(request: Request) -> Report:
    """Prepares Spoken Moments in Time: `*.jsonl` or `*.json` with `video` and `caption`.

    The data set is available on request only, so these names have not been verified on the data;
    a file that does not match is refused.
    """

    def parse(record: dict, path: Path) -> RecordQuestions:
        return caption_question(media_of(record), text_of(record.get("caption"), "caption"))

    return make_questions(Layout("s-mit", {"all": ("*.jsonl", "*.json")}, parse), request)


def caption_question(place: str, caption: str) -> RecordQuestions:
    """Returns the question of which a caption of the scene at `place` is the answer."""
    fields = {"kind": "caption", "question": INSTRUCTION, "answer": caption}
    return RecordQuestions(place, [learned_before_stage_2(fields)])
