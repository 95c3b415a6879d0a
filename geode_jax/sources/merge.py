"""One export from several, such as ScanNet's and 3D-FRONT's as one training set.

The scenes of all parts stand in one manifest, in the parts' order, and so do their questions. Parts
must agree in what their numbers mean; a part of pictures alone goes with any other. A scene's files
are hard links where possible. Categories are the union of the parts' nouns, those of the first part
first: its labels keep their numbers. A file of another part whose labels get other numbers is
written anew (`exports.labels`), so the largest part is best named first.

Questions that name no data set (`source`) get the name of their part. `data.mixture` and
`data.fraction` then take the parts apart.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from geode_jax.errors import UserError
from geode_jax.exports import SPLITS, Export, ExportError, ExportWriter, made_from
from geode_jax.exports.contract import PLAIN, QUESTIONS, shown
from geode_jax.exports.scene_names import place_of
from geode_jax.runtime.bars import progress_bar
from geode_jax.sources.datasets import Report, Request, front3d
from geode_jax.sources.datasets.scene_export import (
    draw_splits,
    exclude_from_training,
    unchanged,
)
from geode_jax.sources.rgbd import export as rgbd

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LISTED = re.compile(r"excluded (?!0{8})[0-9a-f]{8}")
"""In the `request` of a producer: scenes of a list were excluded from training, see
`datasets.scene_export`."""
_JOINED = {"categories", "notes", "producer", "teacher_tokenizer"}
"""Fields of a header that may differ between parts."""
_ONE_WIDTH = ("teacher/features", "teacher/depth_bins", "teacher/topk_id")
"""Tensors whose last axis must have one size in all scenes that a run trains on."""


@dataclasses.dataclass(frozen=True)
class Part:
    """An export to merge.

    Attributes:
        name: data set of its questions that name none.
        export: the opened export.
    """

    name: str
    export: Export

    @property
    def folder(self) -> Path:
        """The export's folder."""
        return self.export.folder


def open_part(text: str) -> Part:
    """Opens a part, given as the folder of an export or as NAME=FOLDER.

    The name of a folder without one is that of the folder itself.

    Raises:
        UserError: the name is no name.
        ExportError: the folder is no export.
    """
    name, equals, folder = text.partition("=")
    if not equals or Path(text).is_dir() or not _NAME.fullmatch(name):
        name, folder = Path(text).resolve().name, text
    if not _NAME.fullmatch(name):
        raise UserError(f"--export: {text}: {name!r} cannot name a data set; use NAME={text}")
    return Part(name, Export(folder))


def merge(parts: Sequence[Part], request: Request) -> Report:
    """Writes the export of all parts; the same call continues an interrupted one.

    Everything that is refused but for damaged tensors is refused before anything is written.

    Args:
        parts: two or more.
        request: `root` and `out` are the folder of the new export. With `split`, all splits are
            drawn anew, by rooms; `exclude` names scenes that must not be trained on.

    Returns:
        What was kept and dropped.

    Raises:
        UserError: the parts do not fit together: another meaning of their numbers, a scene or
            question that is in two parts, a room that would be in several splits.
        ExportError: a part is damaged, or the new export cannot be written.
    """
    header = _header(parts)
    report = Report()
    owners = _owners(parts)
    entries = {entry["id"]: entry for part in parts for entry in part.export.manifest["scenes"]}
    splits = {scene: entries[scene]["split"] for scene in owners}
    places = {scene: _place(scene, part) for scene, part in owners.items()}
    if request.split:
        _refuse_forgotten_list(parts, request)
        splits = draw_splits(places, request)
    splits = exclude_from_training(splits, places, request, report)
    _refuse_divided_places(splits, owners)
    report.warnings += _missing_splits(splits, owners)
    _refuse_other_widths(parts)
    _refuse_repeated_questions(parts)
    with ExportWriter(request.out, **header, resume=True) as writer:
        for scene in writer.finished().keys() - splits.keys():
            made_from.forget(writer, scene)  # the list of scenes to exclude has changed
        sources = {s: _fingerprint(entries[s], owners[s]) for s in splits}
        finished = unchanged(writer, sources)
        for scene, split in progress_bar(splits.items(), desc="scenes", unit="scene"):
            part = owners[scene]
            if scene in finished:
                entry = finished[scene] | {"split": split}  # the splits may have changed
                writer.register(entry)
            else:
                made_from.note(writer, scene, sources[scene])
                with _named(part):
                    entry = writer.adopt_scene(part.export, scene, split)
            report.kept[f"scenes of {part.name}"] += 1
            old = entries[scene]
            anew = sum(entry[key] != old[key] for key in ("sha256", "teacher_sha256") if key in old)
            if anew:
                report.corrected["file with labels of other numbers, written anew"] += anew
        for part in parts:
            for record in progress_bar(part.export.questions(), desc=part.name, unit="question"):
                if record["scene_id"] in splits:
                    writer.add_questions([{"source": part.name} | record])
                    report.kept[f"questions of {part.name}"] += 1
                else:
                    report.dropped["question: its scene is excluded from training"] += 1
    return report


# --- The header -----------------------------------------------------------------------------------


def _header(parts: Sequence[Part]) -> dict:
    """Returns the arguments of the new export's writer.

    Raises:
        UserError: there are not two different parts, or their headers do not fit together.
    """
    if len(parts) < 2:
        raise UserError("--export: name two exports or more")
    folders: set[Path] = set()
    for part in parts:
        if part.folder.resolve() in folders:
            raise UserError(f"--export: {part.folder} is named twice")
        folders.add(part.folder.resolve())
    for part in parts[1:]:
        if part.name in {other.name for other in parts[: parts.index(part)]}:
            rule = "two parts have this name; tell them apart by NAME=FOLDER"
            raise UserError(f"--export: {part.name}: {rule}")
    headers = [part.export.header() for part in parts]
    # The numbers of a part of pictures alone depend on no field.
    bound = [n for n, part in enumerate(parts) if not _is_plain(part)] or [0]
    first = bound[0]
    for n in bound:
        for field in sorted((headers[first].keys() | headers[n].keys()) - _JOINED):
            own, other = headers[first].get(field), headers[n].get(field)
            _refuse_difference(field, parts[first], own, parts[n], other)
    own = {n: header.get("teacher_tokenizer") for n, header in enumerate(headers)}
    known = [n for n, tokenizer in own.items() if tokenizer]
    for n in known[1:]:
        name = "teacher_tokenizer"
        _refuse_difference(name, parts[known[0]], own[known[0]], parts[n], own[n])
    joined = {
        "producer": _producer([header["producer"] for header in headers]),
        "categories": list(dict.fromkeys(noun for h in headers for noun in h["categories"])),
        "notes": "\n".join(dict.fromkeys(h["notes"] for h in headers if h["notes"])),
    }
    if known:
        joined["teacher_tokenizer"] = own[known[0]]
    return headers[first] | joined


def _is_plain(part: Part) -> bool:
    """Returns whether all tensors of all scenes are those of `contract.PLAIN`."""
    with _named(part):
        return all(
            part.export.scene_shapes(scene).keys() <= PLAIN for scene in part.export.scene_ids()
        )


def _refuse_difference(field: str, a: Part, own_a: object, b: Part, own_b: object) -> None:
    if own_a != own_b:
        raise UserError(
            f"{field}: {shown(own_a)} in {a.folder}, {shown(own_b)} in {b.folder}; "
            "the parts of an export must have the same"
        )


def _producer(producers: Sequence[dict[str, str]]) -> dict[str, str]:
    """Returns the producer of the new export: the required fields joined, every part's own beside.

    A part's field has the number of the part before its name: "part 2 project". Parts that were
    merged before keep their own parts so: "part 2 part 1 project".
    """
    joined = {
        field: "; ".join(dict.fromkeys(producer[field] for producer in producers))
        for field in ("project", "commit", "weights", "licence")
    }
    own = {
        f"part {n} {field}": value
        for n, producer in enumerate(producers, 1)
        for field, value in producer.items()
    }
    return joined | own


# --- The scenes -----------------------------------------------------------------------------------


def _owners(parts: Sequence[Part]) -> dict[str, Part]:
    """Returns scene -> part, in order; raises UserError if a scene is in two parts."""
    owners: dict[str, Part] = {}
    for part in parts:
        for scene in part.export.scene_ids():
            other = owners.setdefault(scene, part)
            if other is not part:
                raise UserError(
                    f"scene {scene} is in {other.folder} and in {part.folder}; a scene can be in "
                    "one part only (questions about the scenes of an export: geode-jax prepare "
                    "--scenes)"
                )
    return owners


def _place(scene: str, part: Part) -> str:
    """Returns the place of a scene, for drawing.

    The pieces of an RGB-D recording overlap, so that all of them are one place.
    """
    place, project = place_of(scene), part.export.manifest["producer"]["project"]
    if place == scene.lower() and (rgbd.PROJECT in project or front3d.PROJECT in project):
        return place.rpartition("_")[0] or place
    return place


def _refuse_divided_places(splits: dict[str, str], owners: dict[str, Part]) -> None:
    """Refuses that a model would be scored in a room that it was trained in."""
    first: dict[str, str] = {}
    for scene, split in splits.items():
        other = first.setdefault(place_of(scene), scene)
        if splits[other] != split:
            raise UserError(
                f"scene {other} of {owners[other].folder} is in {splits[other]}, scene {scene} of "
                f"{owners[scene].folder}, the same room or house, in {split}; --split draws the "
                "splits anew, by rooms"
            )


def _refuse_forgotten_list(parts: Sequence[Part], request: Request) -> None:
    """Refuses to draw splits anew where scenes may have been held out for an evaluation."""
    for part in parts:
        listed = any(map(_LISTED.search, part.export.manifest["producer"].values()))
        if listed and not request.exclude:
            raise UserError(
                f"--split: {part.folder} was prepared with --exclude-scenes; give that list again, "
                "or held-out scenes of it may come into training"
            )


def _missing_splits(splits: dict[str, str], owners: dict[str, Part]) -> list[str]:
    """Returns a warning for every part that lacks a split which another part has."""
    has = {part.name: {splits[s] for s in splits if owners[s] is part} for part in owners.values()}
    return [
        f"{name} has no scene in {split}; scores on {split} are of the other parts alone"
        for split in SPLITS
        for name, own in has.items()
        if split not in own and split in splits.values()
    ]


def _refuse_other_widths(parts: Sequence[Part]) -> None:
    """Refuses scenes that no run could train on together, from the headers of all files."""
    first: dict[str, tuple[int, str, Part]] = {}
    for part in parts:
        for scene in progress_bar(part.export.scene_ids(), desc=f"sizes {part.name}", unit="scene"):
            with _named(part):
                shapes = part.export.scene_shapes(scene)
            for name in shapes.keys() & set(_ONE_WIDTH):
                width = shapes[name][-1]
                before, other_scene, other = first.setdefault(name, (width, scene, part))
                if width != before:
                    raise UserError(
                        f"tensor {name}: width {before} in scene {other_scene} of {other.folder}, "
                        f"{width} in scene {scene} of {part.folder}; an export has one"
                    )


def _fingerprint(entry: dict, part: Part) -> str:
    return made_from.fingerprint([entry | {"split": ""}, part.export.categories])


# --- The questions --------------------------------------------------------------------------------


def _refuse_repeated_questions(parts: Sequence[Part]) -> None:
    """Refuses a question's id that is in two parts, and questions that break the contract.

    Ids stay as they are, because predictions and the data sets' own scorers refer to them.
    """
    owners: dict[str, Part] = {}
    for part in parts:
        with _named(part):
            for record in progress_bar(
                part.export.questions(), desc=f"ids {part.name}", unit="question"
            ):
                other = owners.setdefault(record["id"], part)
                if other is not part:
                    own = shown(record["id"])
                    raise UserError(
                        f"question {own} is in {other.folder} and in {part.folder}; ids of "
                        "questions must differ"
                    )


@contextlib.contextmanager
def _named(part: Part) -> Iterator[None]:
    """Adds the part's folder to errors of its scenes and questions."""
    try:
        yield
    except ExportError as error:
        if error.where.startswith(("scene ", QUESTIONS)):
            raise ExportError(f"{part.folder}: {error}") from None
        raise  # of the new export's files; it has their path
