"""Questions about the scenes of an export: what all sources of questions share.

A source says where its files lie and what one of their records asks (`Layout`). Here the records
are read, joined with the scenes, and written behind the questions that the export had. Nothing
that a record names is ever opened as a path: it only tells which scene is meant.
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
from geode_jax.exports.scene_names import Exclusion, MisfitError, bare_names, path_parts
from geode_jax.runtime.bars import progress_bar
from geode_jax.sources.datasets import Report, Request

NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")
"""What a name in a record may be; a path is none."""


class UnansweredError(Exception):
    """A record that fits but has no answer, as in the test files of benchmarks."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What one record of a data set asks.

    Attributes:
        place: a scene's id, or the path of the video or picture.
        questions: records of the contract without `id`, `scene_id` and `source`; `no_value` beside
            their fields says why a number has no value, and is counted, not written.
        id: the data set's own, where it has one to find an answer by.
    """

    place: str
    questions: list[dict[str, Any]]
    id: str = ""


MAX_BYTES = 1 << 33
"""Largest JSON file of a data set, which is read whole; lines have no such limit."""


def _records_of(path: Path) -> Iterator[Any]:
    """The records of a JSON list, or of JSON lines; a broken line is a `MisfitError`, yielded.

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
    """How a data set lies on disk.

    Attributes:
        source: its name.
        parts: part -> patterns of its files below the root; the first that matches counts.
        parse: a record and its file -> what it asks; raises `MisfitError` or `UnansweredError`.
        records: a file -> its records.
        parts_are_splits: the parts are the official splits, by which training questions must be
            about training scenes and all others about held-out ones.
    """

    source: str
    parts: Mapping[str, tuple[str, ...]]
    parse: Callable[[dict, Path], Asked]
    records: Callable[[Path], Iterator[Any]] = _records_of
    parts_are_splits: bool = False

    def files(self, request: Request) -> list[tuple[str, Path]]:
        """(part, file) of the parts that were asked for, of all where none was.

        Raises:
            UserError: an unknown part, or a part without a file; without `request.parts` it is
                enough that one part has files.
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
    """What has such a name below a folder; what is no file too, of which reading says so."""
    found = sorted(root.glob(pattern))
    # glob passes over a dangling link where the pattern is a plain name.
    return found or ([root / pattern] if os.path.lexists(root / pattern) else [])


# --- Scenes ---------------------------------------------------------------------------------------


class Scenes:
    """The scenes of an export by the names that data sets have for them.

    "scannet/videos/x.mp4" is the scene `scannet_videos_x`, or `scannet_x`, `videos_x`, `x`, the
    first that there is; "x" alone is `x`, or `scannet_x` if no other data set's `x` is there.
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
        """The scene that is meant, None where the export does not have it.

        Raises:
            MisfitError: `place` is no name or relative path.
            UserError: files of one name in different folders would be the same scene.
        """
        parts = path_parts(place)
        self._exclusion.covers(place)  # an entry is met, too, where the export lacks its scene
        if len(parts) == 1:
            return parts[0] if parts[0] in self.split else self._bare.get(parts[0])
        names = ["_".join(parts[i:]) for i in range(len(parts))]
        names.insert(1, f"{parts[0]}_{parts[-1]}")
        scene_id = next((name for name in names if name in self.split), None)
        if scene_id == parts[-1]:
            before = self._folder.setdefault(scene_id, parts[0])
            if before != parts[0]:
                raise UserError(
                    f"scene {scene_id}: is it {before}/ or {parts[0]}/? Both have a file of this "
                    f"name; name the export's scenes {before}_{scene_id} and so on"
                )
        return scene_id

    def may_train(self, scene_id: str, place: str) -> bool:
        """Whether a question about a scene, found under `place`, may be in the export."""
        excluded = self._exclusion.covers(scene_id, place)
        return self.split[scene_id] != "train" or not excluded


# --- The whole ------------------------------------------------------------------------------------


def make_questions(layout: Layout, request: Request) -> Report:
    """Writes the export with its scenes, its old questions, and those of a data set.

    Scenes of the training split that are excluded are left out.

    The scenes' files are hard links where possible. The folder is an export only when all is
    written; the same request starts an unfinished one over.

    Args:
        layout: the data set.
        request: what shall be prepared; views and patch grid are those of the scenes.

    Returns:
        What was kept and dropped. Ids are `<source>-<the data set's own id>`, or file and number.

    Raises:
        UserError: there are no files, a file is not in the layout, or no question fits a scene.
        ExportError: the export of the scenes breaks the contract, or `out` may not be written.
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
            # What is not in the new export, no later one made from it can train on.
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
        # Only now: an entry may name what a record calls the scene.
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
            asked = _parsed(layout, record, path)
            scene_id = scenes.find(asked.place)
        except MisfitError as misfit:
            misfits[str(misfit)] += 1
            continue
        except UnansweredError:
            report.dropped["question: has no answer"] += 1
            continue
        number = len(asked.questions)
        why = _why_not(layout, part, scenes, scene_id, asked.place)
        if why:
            report.dropped[f"question: {why}"] += number
            continue
        for i, question in enumerate(asked.questions):
            own = (asked.id or f"{stem}-{count}") + (f"-{i}" if number > 1 else "")
            named = {"id": f"{layout.source}-{own}", "scene_id": scene_id, "source": layout.source}
            _add(writer, {**named, **question}, report)
    if misfits.total() == count:
        why = f"no record fits, {misfits.most_common(1)[0][0]}" if misfits else "it has no record"
        raise UserError(f"{path}: not in the layout of {layout.source}: {why}")
    report.dropped.update({f"record: {why}": n for why, n in misfits.items()})


def _parsed(layout: Layout, record: Any, path: Path) -> Asked:
    if isinstance(record, MisfitError):
        raise record
    if not isinstance(record, dict):
        raise MisfitError("is no JSON object")
    asked = layout.parse(record, path)
    if asked.id and not NAME.fullmatch(asked.id):
        raise MisfitError("has an id that is no name")
    return asked


def _why_not(
    layout: Layout, part: str, scenes: Scenes, scene_id: str | None, place: str
) -> str | None:
    """Why questions about a scene are left out, None where they are not."""
    if scene_id is None:
        return "its scene is not in the export"
    split = scenes.split[scene_id]
    if layout.parts_are_splits and (part == "train") != (split == "train"):
        return f"of {part}, but its scene is of {split} in the export"
    if not scenes.may_train(scene_id, place):
        return "its scene is excluded from training"
    return None


def _add(writer: ExportWriter, record: dict, report: Report) -> None:
    """Adds a question; one that breaks the contract is dropped and counted."""
    no_value = record.pop("no_value", None)
    try:
        writer.add_questions([record])
    except ExportError as error:
        if not error.where.startswith("questions.jsonl:"):  # it cannot be written
            raise
        twice = error.rule.startswith("duplicate")
        why = "its id is there already" if twice else f"{error.field} breaks the contract"
        report.dropped[f"question: {why}"] += 1
    else:
        report.kept["questions"] += 1
        if no_value:
            report.dropped[f"value, its question is kept as words: {no_value}"] += 1
