"""Captions, from which stage 0 of GEODE learns what the vision tokens show.

A caption answers one fixed instruction. It is the `rationale` too, which is what the stages before
the last learn.
"""

from pathlib import Path

from geode_jax.sources.datasets import Report, Request
from geode_jax.sources.datasets.answers import text_of
from geode_jax.sources.datasets.conversations import media_of, turns_of
from geode_jax.sources.datasets.questions import Asked, Layout, MisfitError, make_questions

INSTRUCTION = "Describe what you see."
"""What every caption answers, in place of the instructions that a data set varies."""


def cambrian_alignment(request: Request) -> Report:
    """Cambrian-Alignment: `jsons/alignment_2.5m.jsonl`, or any file below `jsons/`."""

    def parse(record: dict, path: Path) -> Asked:
        turns = turns_of(record)
        if len(turns) != 1:
            raise MisfitError("has more than one turn, which is no caption")
        return _caption(media_of(record), turns[0][1][0])

    patterns = ("jsons/alignment_2.5m.jsonl", "jsons/*.json*", "*.json*")
    return make_questions(Layout("cambrian-alignment", {"all": patterns}, parse), request)


def s_mit(request: Request) -> Report:
    """Spoken Moments in Time: `*.jsonl` or `*.json` with `video` and `caption`.

    The set is given out on request only, so these names are unverified on the data itself; a file
    that does not match is refused.
    """

    def parse(record: dict, path: Path) -> Asked:
        return _caption(media_of(record), text_of(record.get("caption"), "caption"))

    return make_questions(Layout("s-mit", {"all": ("*.jsonl", "*.json")}, parse), request)


def _caption(place: str, caption: str) -> Asked:
    fields = {"kind": "caption", "question": INSTRUCTION, "answer": caption, "rationale": caption}
    return Asked(place, [fields])
