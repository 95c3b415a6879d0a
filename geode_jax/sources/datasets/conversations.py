"""Data sets in LLaVA's layout: a video or picture, and a conversation about it.

    {"video": "scannet/x.mp4",
     "conversations": [{"from": "human", "value": "<image>\\nHow many chair(s) are in this room?"},
                       {"from": "gpt", "value": "2"}]}

Every turn of a conversation is a question of its own. Where a set was made for VSI-Bench, its
question types get that benchmark's names, and so its prompt, if they are the same task.
"""

from pathlib import Path, PurePosixPath
from typing import Any

from geode_jax.sources.datasets import Report, Request
from geode_jax.sources.datasets.answers import read_prompt, referenced, text_of
from geode_jax.sources.datasets.questions import NAME, Asked, Layout, MisfitError, make_questions

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
"""Names of the same task; all others keep the data set's own."""


def vsi590k(request: Request) -> Report:
    """VSI-590K: `vsi_590k.jsonl`. Its questions about lengths come in several units."""

    def parse(record: dict, path: Path) -> Asked:
        kind = _kind(record)
        return _asked(record, VSI590K_KINDS.get(kind, kind))

    return make_questions(Layout("vsi590k", {"all": ("vsi_590k.jsonl",)}, parse), request)


def vica322k(request: Request) -> Report:
    """ViCA-322K: `{arkitscenes,scannet,scannetpp}/{base,complex}/TYPE.json`.

    `--part base` or `complex` takes one part.
    """

    def parse(record: dict, path: Path) -> Asked:
        return _asked(record, VICA_KINDS.get(path.stem, path.stem))

    parts = {part: (f"*/{part}/*.json", f"*/{part}/*.jsonl") for part in ("base", "complex")}
    return make_questions(Layout("vica322k", parts, parse), request)


def vlm3r(request: Request) -> Report:
    """VLM-3R-DATA: `vsibench_train/*.json` or `merged_qa_*_train.json`, `vstibench_train/*.json`.

    `--part vsibench` or `vstibench` takes one part.
    """

    def parse(record: dict, path: Path) -> Asked:
        return _asked(record, _kind(record))

    parts = {
        "vsibench": ("vsibench_train/*.json", "merged_qa_*_train.json"),
        "vstibench": ("vstibench_train/*.json",),
    }
    return make_questions(Layout("vlm3r", parts, parse), request)


def llava3d(request: Request) -> Report:
    """LLaVA-3D's instruction data: `*.json`, `video` is a scan's folder or a list of its pictures.

    The answer may be a list of references. Questions that point at a place by `<boxes>` are dropped
    and counted.
    """

    def parse(record: dict, path: Path) -> Asked:
        return _asked(record, "instruction")

    return make_questions(Layout("llava3d", {"all": ("*.json",)}, parse), request)


def _kind(record: dict) -> str:
    kind = text_of(record.get("question_type"), "question_type")
    if not NAME.fullmatch(kind):
        raise MisfitError("has a question_type that is no name")
    return kind


def _asked(record: dict, kind: str) -> Asked:
    questions = []
    for said, answers in turns_of(record):
        question, options = read_prompt(said)
        questions.append(referenced(kind, question, answers, options))
    return Asked(media_of(record), questions)


def media_of(record: dict) -> str:
    """The path of a record's one video or picture, or the folder that all its pictures are in.

    Raises:
        MisfitError: it has none, both, or pictures of several folders.
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
    """(what the human says, references of what the model answers), turn by turn.

    Raises:
        MisfitError: the conversation is none.
    """
    said: list[dict[str, Any]] = record.get("conversations")
    if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
        raise MisfitError("has no conversations")
    said = [turn for turn in said if turn.get("from") != "system"]
    speakers = [turn.get("from") for turn in said]
    if not said or speakers != ["human", "gpt"] * (len(said) // 2):
        raise MisfitError("has a conversation that is not human, gpt, human, ...")
    texts = [turn.get("value") for turn in said]
    asked = [text_of(text, "question") for text in texts[::2]]
    answers = [text if isinstance(text, list) else [text] for text in texts[1::2]]
    checked = [[text_of(text, "answer") for text in own] for own in answers]
    if not all(checked):
        raise MisfitError("has no answer")
    return list(zip(asked, checked, strict=True))
