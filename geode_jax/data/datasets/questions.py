"""Questions about the scenes of an export: what all sources of questions share.

A source says where its files lie and what one of their records asks (`Layout`). Here the records
are read, joined with the scenes, and written behind the questions that the export had. Nothing
that a record names is ever opened as a path: it only tells which scene is meant.
"""

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from geode_jax.data.datasets import Report, Request
from geode_jax.errors import UserError
from geode_jax.exports import Export, ExportError, ExportWriter

_FOLDERS = ("scannet", "scannetpp", "scannetppv2", "arkitscenes", "s3dis", "adt", "hypersim")
_FOLDERS += ("procthor", "robotics", "ytb_roomtour", "matterport3d")
"""Folders of data sets, that the ids of scenes may begin with."""
_MEDIA = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".jpg", ".jpeg", ".png", ".webp")
NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")
"""What a name in a record may be; a path is none."""


class MisfitError(Exception):
    """A record that does not fit its layout, and the reason, without the record's own values."""


class UnansweredError(Exception):
    """A record that fits but has no answer, as in the test files of benchmarks."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What one record of a data set asks.

    Attributes:
        place: a scene's id, or the path of the video or picture.
        questions: records of the contract without `id`, `scene_id` and `source`.
        id: the data set's own, where it has one to find an answer by.
    """

    place: str
    questions: list[dict[str, Any]]
    id: str = ""


def _records_of(path: Path) -> Iterator[Any]:
    """The records of a JSON list, or of JSON lines; a broken line is a `MisfitError`, yielded.

    Raises:
        UserError: the file cannot be read, or is no list of records.
    """
    try:
        if path.suffix != ".jsonl":
            records = read_json(path)
            if not isinstance(records, list):
                raise UserError(f"{path}: must be a list of records")
            yield from records
            return
        with open(path, "rb") as lines:
            for line in filter(bytes.strip, lines):
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    yield MisfitError("is not JSON")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None


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


def _path_parts(place: str) -> list[str]:
    """Folders and the stem of a relative path, or a scene's id alone.

    Raises:
        MisfitError: it is no text, absolute, or leaves its folder.
    """
    if not isinstance(place, str) or not place.strip() or "\0" in place:
        raise MisfitError("its scene or path is no text")
    path = PurePosixPath(place.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", place) or not path.parts:
        raise MisfitError("its path is absolute or leaves its folder")
    last = path.stem if path.suffix.lower() in _MEDIA else path.name
    return [*path.parts[:-1], last]


def _runs(name: str) -> set[str]:
    """All runs of whole words of a name: of "scannet_s1_00" also "s1_00" and "scannet_s1"."""
    words = re.split(r"[-._/]", name)
    n = len(words)
    return {"_".join(words[i:j]) for i in range(n) for j in range(i + 1, n + 1)}


def _bare_names(name: str) -> list[str]:
    """The name without a data set's folder before it, [] where there is none."""
    begins = (f"{folder}_" for folder in _FOLDERS)
    return [name[len(begin) :] for begin in begins if name.startswith(begin) and name != begin]


class Scenes:
    """The scenes of an export by the names that data sets have for them.

    "scannet/videos/x.mp4" is the scene `scannet_videos_x`, or `scannet_x`, `videos_x`, `x`, the
    first that there is; "x" alone is `x`, or `scannet_x` if no other data set's `x` is there.
    """

    def __init__(self, export: Export, exclude: frozenset[str] = frozenset()):
        """Args: exclude: names of scenes, in any of these forms.

        Raises:
            UserError: a line of `exclude` is no such name.
        """
        self.split: dict[str, str] = {e["id"]: e["split"] for e in export.manifest["scenes"]}
        bare: dict[str, list[str]] = {}
        for scene_id in self.split:
            for rest in _bare_names(scene_id):
                bare.setdefault(rest, []).append(scene_id)
        self._bare = {name: ids[0] for name, ids in bare.items() if len(ids) == 1}
        self._folder: dict[str, str] = {}
        try:
            named = {re.sub(r"[-./]", "_", _path_parts(name)[-1]) for name in exclude}
        except MisfitError as misfit:
            raise UserError(f"--exclude-scenes: a line: {misfit}") from None
        self._excluded = named.union(*map(_bare_names, named))

    def find(self, place: str) -> str | None:
        """The scene that is meant, None where the export does not have it.

        Raises:
            MisfitError: `place` is no name or relative path.
            UserError: files of one name in different folders would be the same scene.
        """
        parts = _path_parts(place)
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

    def is_excluded(self, *names: str) -> bool:
        """Whether a scene's id, or the path of a file, belongs to a scene of the list."""
        return bool(self._excluded) and any(self._excluded & _runs(name) for name in names)


# --- The whole ------------------------------------------------------------------------------------


def make_questions(layout: Layout, request: Request) -> Report:
    """Writes the export with its scenes, its old questions, and those of a data set.

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
    files = layout.files(request)
    export = Export(request.scenes)
    scenes = Scenes(export, request.exclude)
    report = Report()
    with ExportWriter(request.out, **export.header()) as writer:
        for scene_id in tqdm(export.scene_ids(), desc="scenes", unit="scene"):
            writer.adopt_scene(export, scene_id)
            if scenes.split[scene_id] == "train" and scenes.is_excluded(scene_id):
                report.dropped["scene: excluded from training"] += 1
        report.kept["scenes"] = len(scenes.split)
        for record in export.questions():
            place = record["scene_id"]
            if _may_train(scenes, place, place):
                writer.add_questions([record])
                report.kept["old questions"] += 1
            else:
                report.dropped["old question: its scene is excluded from training"] += 1
        for part, path in files:
            _add_file(layout, part, path, request.root, scenes, writer, report)
        if not report.kept["questions"]:
            raise UserError(
                f"{request.root}: no question of {layout.source} is about a scene of "
                f"{request.scenes}; {'; '.join(report.lines()[1:])}"
            )
    return report


def _may_train(scenes: Scenes, scene_id: str, place: str) -> bool:
    return scenes.split[scene_id] != "train" or not scenes.is_excluded(scene_id, place)


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
    for count, record in enumerate(tqdm(layout.records(path), desc=path.name, unit="record"), 1):
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
    if not _may_train(scenes, scene_id, place):
        return "its scene is excluded from training"
    return None


def _add(writer: ExportWriter, record: dict, report: Report) -> None:
    """Adds a question; one that breaks the contract is dropped and counted."""
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
