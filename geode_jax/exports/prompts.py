"""Questions as the model reads them.

The eight VSI-Bench task types get VSI-Bench's own prompt, so that a model trained here reads at
test time what it read in training. Every other kind is asked as it stands.

This file stands alone (Python 3.9), so that a teacher is asked in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .kinds import VSI_CHOICE_KINDS, VSI_NUMERIC_KINDS

PRE_PROMPT = "These are frames of a video."
NUMERIC_POST_PROMPT = "Please answer the question using a single word or phrase."
CHOICE_POST_PROMPT = "Answer with the option's letter from the given choices directly."


def prompt(record: Mapping[str, Any]) -> str:
    """The text that is asked for a question record.

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
