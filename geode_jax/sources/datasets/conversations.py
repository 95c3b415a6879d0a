"""Data sets in LLaVA's layout: a video or picture, and a conversation about it.

    {"video": "scannet/x.mp4",
     "conversations": [{"from": "human", "value": "<image>\\nHow many chair(s) are in this room?"},
                       {"from": "gpt", "value": "2"}]}

Every turn of a conversation becomes a question. Question types that are tasks of VSI-Bench get that
benchmark's names, and so its prompts.
"""

from pathlib import Path, PurePosixPath
from typing import Any

from geode_jax.sources.datasets import Report, Request
from geode_jax.sources.datasets.answers import (
    learned_before_stage_2,
    read_prompt,
    referenced,
    text_of,
)
from geode_jax.sources.datasets.questions import (
    NAME,
    Layout,
    MisfitError,
    RecordQuestions,
    make_questions,
)

VSI590K_KINDS = {
    "absolute_count": "object_counting",
    "absolute_distance_object": "object_abs_distance",
    "absolute_size_object": "object_size_estimation",
    "absolute_size_room": "room_size_estimation",
    "relative_distance_object": "object_rel_distance",
    "appearance_order": "obj_appearance_order",
}
VICA_KINDS = {
    "object_count": "object_counting",
    "object_relative_distance": "object_rel_distance",
    "room_size": "room_size_estimation",
}
"""A data set's question type -> VSI-Bench's name of the same task; others keep their name."""


def vsi590k(request: Request) -> Report:
    """Prepares VSI-590K: `vsi_590k.jsonl`. Its questions about lengths have several units."""

    def parse(record: dict, path: Path) -> RecordQuestions:
        kind = question_type(record)
        return conversation_questions(record, VSI590K_KINDS.get(kind, kind))

    return make_questions(Layout("vsi590k", {"all": ("vsi_590k.jsonl",)}, parse), request)


def vica322k(request: Request) -> Report:
    """Prepares ViCA-322K: `{arkitscenes,scannet,scannetpp}/{base,complex}/TYPE.json`.

    `--part base` or `complex` selects one part. GEODE's stage 0 learns the answers of the base
    part and its stage 1 those of the complex part (Sec. 3.1), so that every answer is also the
    `rationale`, which is what these stages learn.
    """

    def parse(record: dict, path: Path) -> RecordQuestions:
        found = conversation_questions(record, VICA_KINDS.get(path.stem, path.stem))
        return RecordQuestions(
            found.place, [learned_before_stage_2(fields) for fields in found.questions]
        )

    parts = {part: (f"*/{part}/*.json", f"*/{part}/*.jsonl") for part in ("base", "complex")}
    return make_questions(Layout("vica322k", parts, parse), request)


def vlm3r(request: Request) -> Report:
    """Prepares VLM-3R-DATA.

    Files are `vsibench_train/*.json` or `merged_qa_*_train.json`, and `vstibench_train/*.json`.
    `--part vsibench` or `vstibench` selects one part.
    """

    def parse(record: dict, path: Path) -> RecordQuestions:
        return conversation_questions(record, question_type(record))

    parts = {
        "vsibench": ("vsibench_train/*.json", "merged_qa_*_train.json"),
        "vstibench": ("vstibench_train/*.json",),
    }
    return make_questions(Layout("vlm3r", parts, parse), request)


def llava3d(request: Request) -> Report:
    """Prepares LLaVA-3D's instruction data: `*.json`.

    `video` is a scan's folder or a list of its pictures. The answer may be a list of references.
    Questions that refer to a place by `<boxes>` are dropped and counted.
    """

    def parse(record: dict, path: Path) -> RecordQuestions:
        return conversation_questions(record, "instruction")

    return make_questions(Layout("llava3d", {"all": ("*.json",)}, parse), request)


def question_type(record: dict) -> str:
    """Returns a record's question type; raises MisfitError if it has none, or no valid name."""
    kind = text_of(record.get("question_type"), "question_type")
    if not NAME.fullmatch(kind):
        raise MisfitError("has a question_type that is no name")
    return kind


def conversation_questions(record: dict, kind: str) -> RecordQuestions:
    """Returns the questions of a record, all of the given kind; see `Layout.parse`."""
    questions = []
    for prompt, answers in turns_of(record):
        question, options = read_prompt(prompt)
        questions.append(referenced(kind, question, answers, options))
    return RecordQuestions(media_of(record), questions)


def media_of(record: dict) -> str:
    """Returns the path of a record's only video or picture, or the folder of all its pictures.

    Raises:
        MisfitError: the record has none, both, or pictures in several folders.
    """
    found = [record[name] for name in ("video", "image") if record.get(name)]
    if len(found) == 1 and isinstance(found[0], str):
        return found[0]
    pictures = found[0] if len(found) == 1 and isinstance(found[0], list) else [None]
    folders = {PurePosixPath(p).parent if isinstance(p, str) else None for p in pictures}
    if len(folders) != 1 or None in folders:
        raise MisfitError("has not just one video, image or folder of images")
    return str(folders.pop())


def turns_of(record: dict) -> list[tuple[str, list[str]]]:
    """Returns (the human's prompt, reference answers) of each turn.

    Raises:
        MisfitError: the record has no conversation of a human and a model.
    """
    turns: Any = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise MisfitError("has no conversations")
    turns = [turn for turn in turns if turn.get("from") != "system"]
    speakers = [turn.get("from") for turn in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise MisfitError("has a conversation that is not human, gpt, human, ...")
    texts = [turn.get("value") for turn in turns]
    prompts = [text_of(text, "question") for text in texts[::2]]
    answers = [text if isinstance(text, list) else [text] for text in texts[1::2]]
    checked = [[text_of(text, "answer") for text in own] for own in answers]
    if not all(checked):
        raise MisfitError("has no answer")
    return list(zip(prompts, checked, strict=True))
