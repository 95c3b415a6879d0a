"""Data sets with a rationale before the answer: SSR-CoT and ViCA-Thinking."""

import re
from pathlib import Path

from geode_jax.sources.datasets import Report, Request
from geode_jax.sources.datasets.answers import question_fields, read_prompt, text_of
from geode_jax.sources.datasets.conversations import media_of, turns_of
from geode_jax.sources.datasets.questions import (
    Layout,
    MisfitError,
    RecordQuestions,
    make_questions,
)

_THOUGHTS = re.compile(r"\W*thoughts?\b", re.IGNORECASE)
_ANSWER = re.compile(r"\bfinal answer\b", re.IGNORECASE)
_HEADING_MARKS = " \n\r\t:*#_<>/"
"""Characters stripped from the text after a heading."""


def ssr_cot(request: Request) -> Report:
    """Prepares SSR-CoT: `ssr-cot.jsonl` with `question`, `rationale`, `answer`, `image_path`."""
    return make_questions(Layout("ssr-cot", {"all": ("ssr-cot.jsonl",)}, ssr_cot_record), request)


def ssr_cot_record(record: dict, path: Path) -> RecordQuestions:
    """Returns the question of an SSR-CoT record; see `Layout.parse`."""
    question, options = read_prompt(text_of(record.get("question"), "question"))
    answer = text_of(record.get("answer"), "answer")
    rationale = text_of(record.get("rationale"), "rationale")
    fields = question_fields("ssr_cot", question, answer, options)
    return RecordQuestions(
        text_of(record.get("image_path"), "image_path"), [fields | {"rationale": rationale}]
    )


def vica_thinking(request: Request) -> Report:
    """Prepares ViCA-Thinking-2.68K: `*.json` or `*.jsonl` with `video` and `conversations`.

    Upstream documents "Thoughts" before a "Final Answer", but not the names of the fields. The
    names are taken from ViCA-322K and have not been verified on the data; a file that does not
    match is refused.
    """
    parts = {"all": ("*.jsonl", "*.json")}
    return make_questions(Layout("vica-thinking", parts, vica_thinking_record), request)


def vica_thinking_record(record: dict, path: Path) -> RecordQuestions:
    """Returns the questions of a ViCA-Thinking record; see `Layout.parse`."""
    questions = []
    for prompt, (reply, *_) in turns_of(record):
        opened, closed = _THOUGHTS.match(reply), _ANSWER.search(reply)
        if not opened or not closed:
            raise MisfitError("has no 'Thoughts' before a 'Final Answer'")
        thoughts = reply[opened.end() : closed.start()].strip(_HEADING_MARKS)
        question, options = read_prompt(prompt)
        answer = text_of(reply[closed.end() :].strip(_HEADING_MARKS), "answer")
        fields = question_fields("vica_thinking", question, answer, options)
        questions.append(fields | {"rationale": text_of(thoughts, "thoughts")})
    return RecordQuestions(media_of(record), questions)
