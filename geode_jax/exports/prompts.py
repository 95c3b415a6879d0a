"""Questions as the model reads them.

The eight VSI-Bench tasks get VSI-Bench's own prompt, so a model reads the same words in training
and in the benchmark. The question of every other kind is the prompt. Exporters load this file
(Python 3.9), so a teacher reads the same words too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .kinds import VSI_CHOICE_KINDS, VSI_NUMERIC_KINDS

PRE_PROMPT = "These are frames of a video."
NUMERIC_POST_PROMPT = "Please answer the question using a single word or phrase."
CHOICE_POST_PROMPT = "Answer with the option's letter from the given choices directly."


def prompt(record: Mapping[str, Any]) -> str:
    """Returns the prompt of a question record.

    The VSI-Bench wording is that of the benchmark's own evaluation (`vsibench_doc_to_text` of
    thinking-in-space and of lmms-eval, which agree): pre-prompt, question, for a choice the
    options one a line, post-prompt.

    Args:
        record: a question record; `kind` and `question` are read, and `options` where present.

    Returns:
        The prompt, lines joined by a newline, no newline at the end.
    """
    lines: list[str] = [record["question"]]
    options: list[str] = record.get("options") or []
    kind = record["kind"]
    if kind in VSI_NUMERIC_KINDS:
        lines = [PRE_PROMPT, *lines, NUMERIC_POST_PROMPT]
    elif kind in VSI_CHOICE_KINDS:
        lines = [PRE_PROMPT, *lines, "Options:", *options, CHOICE_POST_PROMPT]
    else:
        lines += options
    return "\n".join(lines)
