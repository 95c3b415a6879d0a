"""Writes questions about the scenes of an export; shared by all sources of questions.

A source defines its files and how to parse a record (`Layout`). Here the records are read, joined
with the scenes, and written after the export's own questions. Names and paths in records identify
scenes only; they are never opened.
"""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from geode_jax.errors import UserError
from geode_jax.exports import Export, ExportError, ExportWriter, files
from geode_jax.exports.contract import shown
from geode_jax.exports.scene_names import Exclusion, MisfitError, bare_names, path_parts
from geode_jax.runtime.bars import progress_bar
from geode_jax.sources.datasets import Report, Request

NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")
"""Valid names in records; paths are not valid."""


class UnansweredError(Exception):
    """A valid record without an answer, as in the test files of benchmarks."""


@dataclasses.dataclass(frozen=True)
class RecordQuestions:
    """The questions of one record of a data set.

    Attributes:
        place: a scene's id, or the path of the video or picture.
        questions: records of the contract without `id`, `scene_id` and `source`. An additional
            field `no_value` gives the reason why a number has no value; it is counted, not written.
        id: the data set's own id, empty if it has none.
    """

    place: str
    questions: list[dict[str, Any]]
    id: str = ""


MAX_BYTES = 1 << 33
"""Largest JSON file, which is read as a whole; files of JSON lines have no limit."""


def _records_of(path: Path) -> Iterator[Any]:
    """Yields the records of a JSON list or of JSON lines, a `MisfitError` for a broken line.

    Raises:
        UserError: the file cannot be read, or is no list of records.
    """
    if path.suffix == ".jsonl":
        for _, value in files.json_lines(path):
            yield MisfitError("is not JSON") if isinstance(value, UserError) else value
        return
    records = files.read_json(path, most=MAX_BYTES)
    if not isinstance(records, list):
        raise UserError(f"{path}: must be a list of records")
    yield from records


@dataclasses.dataclass(frozen=True)
class Layout:
    """Layout of a data set on disk.

    Attributes:
        source: name of the data set.
        parts: part -> patterns of its files below the root; the first with a match is used.
        parse: returns the questions of a record and its file; raises `MisfitError` or
            `UnansweredError`.
        records: returns the records of a file.
        parts_are_splits: whether the parts are official splits. Questions of "train" must then be
            about training scenes, and all others about held-out scenes.
        strict: whether a record that does not fit, or whose scene is unknown, is refused with its
            place instead of counted.
    """

    source: str
    parts: Mapping[str, tuple[str, ...]]
    parse: Callable[[dict, Path], RecordQuestions]
    records: Callable[[Path], Iterator[Any]] = _records_of
    parts_are_splits: bool = False
    strict: bool = False

    def files(self, request: Request) -> list[tuple[str, Path]]:
        """Returns (part, file) of the requested parts, by default of all.

        Raises:
            UserError: a requested part is unknown or has no file, or no part has a file.
        """
        for part in request.parts:
            if part not in self.parts:
                known = ", ".join(self.parts)
                raise UserError(f"--part: {self.source} has no part {part!r}, but {known}")
        found = []
        for part in request.parts or self.parts:
            globbed = (_named(request.root, pattern) for pattern in self.parts[part])
            paths = next(filter(None, globbed), [])
            if request.parts and not paths:
                raise UserError(f"{request.root}: no {' or '.join(self.parts[part])}")
            found += [(part, path) for path in paths]
        if not found:
            patterns = (pattern for of_part in self.parts.values() for pattern in of_part)
            raise UserError(f"{request.root}: no file of {self.source}: {', '.join(patterns)}")
        return found


def _named(root: Path, pattern: str) -> list[Path]:
    """Returns the paths below a folder that match a pattern, also those that are no files."""
    found = sorted(root.glob(pattern))
    # glob omits a dangling link if the pattern is a plain name. Reading it gives the message.
    return found or ([root / pattern] if os.path.lexists(root / pattern) else [])


# --- Scenes ---------------------------------------------------------------------------------------


class Scenes:
    """The scenes of an export, found by the names that data sets use for them.

    "scannet/videos/x.mp4" is the first existing scene of `scannet_videos_x`, `scannet_x`,
    `videos_x` and `x`. "x" alone is `x`, or `scannet_x` if no other data set has an `x`.
    """

    def __init__(self, export: Export, exclusion: Exclusion):
        self.split: dict[str, str] = {e["id"]: e["split"] for e in export.manifest["scenes"]}
        bare: dict[str, list[str]] = {}
        for scene_id in self.split:
            for rest in bare_names(scene_id):
                bare.setdefault(rest, []).append(scene_id)
        self._bare = {name: ids[0] for name, ids in bare.items() if len(ids) == 1}
        self._folder: dict[str, str] = {}
        self._exclusion = exclusion

    def find(self, place: str) -> str | None:
        """Returns the scene's id, None if the export does not have it.

        Raises:
            MisfitError: `place` is no name or relative path.
            UserError: files of the same name in different folders would be the same scene.
        """
        parts = path_parts(place)
        self._exclusion.covers(place)  # marks entries as used even without the scene
        if len(parts) == 1:
            return parts[0] if parts[0] in self.split else self._bare.get(parts[0])
        names = ["_".join(parts[i:]) for i in range(len(parts))]
        names.insert(1, f"{parts[0]}_{parts[-1]}")
        scene_id = next((name for name in names if name in self.split), None)
        if scene_id is not None and scene_id == parts[-1]:
            before = self._folder.setdefault(scene_id, parts[0])
            if before != parts[0]:
                raise UserError(
                    f"scene {scene_id}: is it {before}/ or {parts[0]}/? Both have a file of this "
                    f"name; name the export's scenes {before}_{scene_id} and so on"
                )
        return scene_id

    def may_train(self, scene_id: str, place: str) -> bool:
        """Returns whether a question about a scene, named `place` in its record, is allowed."""
        excluded = self._exclusion.covers(scene_id, place)
        return self.split[scene_id] != "train" or not excluded


# --- Export ---------------------------------------------------------------------------------------


def make_questions(layout: Layout, request: Request) -> Report:
    """Writes an export with the scenes and questions of another, and those of a data set.

    Excluded training scenes are left out. The scenes' files are hard links where possible. The
    folder is a valid export only when everything is written; the same request starts an unfinished
    one over.

    Args:
        layout: the data set.
        request: the user's arguments; views and patch grid are those of the scenes.

    Returns:
        What was kept and dropped. Ids of questions are `<source>-<id>`, the id being the data set's
        own, or else file and number.

    Raises:
        UserError: there are no files, a file is not in the layout, or no question has a scene.
        ExportError: the export of the scenes is not valid, or `out` cannot be written.
    """
    if request.scenes is None:
        raise UserError(f"--scenes: {layout.source} asks about scenes: name an export of them")
    paths = layout.files(request)
    export = Export(request.scenes)
    exclusion = Exclusion(request.exclude)
    scenes = Scenes(export, exclusion)
    report = Report()
    with ExportWriter(request.out, **export.header()) as writer:
        for scene_id in progress_bar(export.scene_ids(), desc="scenes", unit="scene"):
            # Exports that are made from the new one must not train on excluded scenes either.
            if scenes.may_train(scene_id, scene_id):
                writer.adopt_scene(export, scene_id)
                report.kept["scenes"] += 1
            else:
                report.dropped["scene: excluded from training"] += 1
        for record in export.questions():
            place = record["scene_id"]
            if scenes.may_train(place, place):
                writer.add_questions([record])
                report.kept["old questions"] += 1
            else:
                report.dropped["old question: its scene is excluded from training"] += 1
        for part, path in paths:
            _add_file(layout, part, path, request.root, scenes, writer, report)
        # Checked last, because entries may also be names that records use.
        where = f"{request.scenes} or {layout.source}"
        exclusion.check(where, request.allow_missing, report.dropped)
        if not report.kept["questions"]:
            raise UserError(
                f"{request.root}: no question of {layout.source} is about a scene of "
                f"{request.scenes}; {'; '.join(report.lines()[1:])}"
            )
    return report


def _add_file(
    layout: Layout,
    part: str,
    path: Path,
    root: Path,
    scenes: Scenes,
    writer: ExportWriter,
    report: Report,
) -> None:
    """Adds the questions of one file and counts them."""
    stem = "-".join(path.relative_to(root).with_suffix("").parts)
    misfits: Counter[str] = Counter()
    count = 0
    for count, record in enumerate(
        progress_bar(layout.records(path), desc=path.name, unit="record"), 1
    ):
        try:
            found = _parsed(layout, record, path)
            scene_id = scenes.find(found.place)
        except MisfitError as misfit:
            if layout.strict:
                rule = f"not in the layout of {layout.source}: record {count} {misfit}"
                raise UserError(f"{path}: {rule}") from None
            misfits[str(misfit)] += 1
            continue
        except UnansweredError:
            report.dropped["question: has no answer"] += 1
            continue
        number = len(found.questions)
        why = _exclusion_reason(layout, part, scenes, scene_id, found.place)
        if why and layout.strict and scene_id is None:
            raise UserError(f"{path}: record {count}: scene {shown(found.place)}: {why}")
        if why:
            report.dropped[f"question: {why}"] += number
            continue
        for i, question in enumerate(found.questions):
            own = (found.id or f"{stem}-{count}") + (f"-{i}" if number > 1 else "")
            named = {"id": f"{layout.source}-{own}", "scene_id": scene_id, "source": layout.source}
            fault = _add(writer, {**named, **question}, report)
            if fault and layout.strict:
                raise UserError(f"{path}: record {count}: {fault.field}: {fault.rule}")
    if misfits.total() == count:
        why = f"no record fits, {misfits.most_common(1)[0][0]}" if misfits else "it has no record"
        raise UserError(f"{path}: not in the layout of {layout.source}: {why}")
    report.dropped.update({f"record: {why}": n for why, n in misfits.items()})


def _parsed(layout: Layout, record: Any, path: Path) -> RecordQuestions:
    """Returns the questions of a record; raises `MisfitError` or `UnansweredError`."""
    if isinstance(record, MisfitError):
        raise record
    if not isinstance(record, dict):
        raise MisfitError("is no JSON object")
    found = layout.parse(record, path)
    if found.id and not NAME.fullmatch(found.id):
        raise MisfitError("has an id that is no name")
    return found


def _exclusion_reason(
    layout: Layout, part: str, scenes: Scenes, scene_id: str | None, place: str
) -> str | None:
    """Returns why questions about a scene are left out, None if they are not."""
    if scene_id is None:
        return "its scene is not in the export"
    split = scenes.split[scene_id]
    if layout.parts_are_splits and (part == "train") != (split == "train"):
        return f"of {part}, but its scene is of {split} in the export"
    if not scenes.may_train(scene_id, place):
        return "its scene is excluded from training"
    return None


def _add(writer: ExportWriter, record: dict, report: Report) -> ExportError | None:
    """Adds a question, or drops and counts it if it breaks the contract, and returns the rule."""
    no_value = record.pop("no_value", None)
    try:
        writer.add_questions([record])
    except ExportError as error:
        if not error.where.startswith("questions.jsonl:"):  # it cannot be written
            raise
        twice = error.rule.startswith("duplicate")
        why = "its id is there already" if twice else f"{error.field} breaks the contract"
        report.dropped[f"question: {why}"] += 1
        return error
    report.kept["questions"] += 1
    if no_value:
        report.dropped[f"value, its question is kept as words: {no_value}"] += 1
    return None
