"""Writes the scenes of a source into an export, one after the other.

What questions and the report need of a scene is kept in `.made` of the new export until all scenes
are written. Then come the questions, which depend on all scenes, and the manifest. The same request
continues an interrupted one and ends with the same content.
"""

import dataclasses
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geode_jax import exports
from geode_jax.errors import UserError
from geode_jax.exports import files, made_from
from geode_jax.exports.scene_names import Exclusion, room_of
from geode_jax.runtime.bars import progress_bar
from geode_jax.sources.datasets import Report, Request
from geode_jax.sources.questions.measured import BoxQuestioner
from geode_jax.sources.questions.seen_room import SeenRoom
from geode_jax.sources.rgbd.sequence import Dropped
from geode_jax.sources.splits import SHARES, parse_shares, split_places
from geode_jax.sources.stand_ins import TOKEN_WIDTH

_NOTES_FOLDER = ".made"


@dataclasses.dataclass(frozen=True)
class Scene:
    """One scene, as made by a source.

    Attributes:
        arrays: tensors of the contract.
        seen: what questions are made from; None if nothing is labelled.
        dropped: what is missing and why -> count.
        corrected: corrections on reading.
    """

    arrays: dict[str, np.ndarray]
    seen: SeenRoom | None
    dropped: Counter[str]
    corrected: tuple[str, ...] = ()


def draw_splits(places: Mapping[str, str], request: Request) -> dict[str, str]:
    """Returns scene -> split, drawn by places in the shares of the request.

    Args:
        places: scene -> place, which must not be divided between splits.
        request: its `split` and `seed`.
    """
    shares = parse_shares(request.split) if request.split else SHARES
    drawn = split_places(places.values(), request.seed, shares)
    return {scene: drawn[place] for scene, place in places.items()}


def listed_splits(
    request: Request,
    lists: Mapping[Path, str],
    places: Mapping[str, str],
    folder: Path,
    report: Report,
) -> dict[str, str]:
    """Returns scan -> split: a data set's own if it has a list, else drawn, by places.

    Splits that the request asks for are drawn instead.

    Entries of the lists without a scan on disk are counted, and so are scans in no list.

    Args:
        request: its `split` and the seed of the draw.
        lists: file -> split of the scans that it lists; absent files are ignored.
        places: scan -> place, such as its room, of the scans on disk.
        folder: the folder of the scans, named in messages.
        report: gets the counts of what is dropped.

    Raises:
        UserError: a scan, or two scans of a place, are in lists of different splits, or no list
            names a scan on disk.
    """
    lists = {path: split for path, split in lists.items() if os.path.lexists(path)}
    if request.split or not lists:
        return draw_splits(places, request)
    listed: dict[str, tuple[str, str]] = {}  # place -> split, first scan
    splits: dict[str, str] = {}
    for path, split in lists.items():
        entries = files.read_list(path)
        for where, (scan,) in entries:
            other, before = listed.setdefault(room_of(scan), (split, scan))
            if other != split:
                same = "" if scan == before else f", as {before}, of the same room"
                raise UserError(f"{where}: {scan} is in the list of {other} too{same}")
            splits[scan] = split
        absent = sum(scan not in places for _, (scan,) in entries)
        if absent:
            which = "every entry" if absent == len(entries) else "entry"
            report.dropped[f"{which} of {path.name}: no such scan in {folder.name}/"] += absent
    kept = {scan: splits[scan] for scan in places if scan in splits}
    names = ", ".join(path.name for path in lists)
    if not kept:
        raise UserError(f"{request.root}: {names}: none of the scans in {folder.name}/ is listed")
    if len(kept) < len(places):
        report.dropped[f"scene: in none of {names}"] += len(places) - len(kept)
    return kept


def exclude_from_training(
    splits: dict[str, str], places: Mapping[str, str], request: Request, report: Report
) -> dict[str, str]:
    """Returns `splits` without the training scenes that are excluded, and counts these.

    Args:
        splits: scene -> split of the scenes that would be in the export.
        places: scene -> place of all existing scenes; a place must not be divided between
            splits, such as the room of a scan.
        request: its `exclude` names scenes; all scenes of their places are excluded.
        report: gets the counts of dropped scenes.

    Raises:
        UserError: an entry of the list names no scene, and `request` does not allow that.
    """
    exclusion = Exclusion(request.exclude)
    excluded = {place for scene, place in places.items() if exclusion.covers(scene, place)}
    exclusion.check(str(request.root), request.allow_missing, report.dropped)
    kept = {s: p for s, p in splits.items() if p != "train" or places[s] not in excluded}
    lost = len(splits) - len(kept)
    if lost:
        report.dropped["scene: would be trained on, is on the list of scenes to exclude"] += lost
    return kept


def write_scenes(
    request: Request,
    splits: dict[str, str],
    make: Callable[[str], Scene],
    report: Report,
    *,
    source: Callable[[str], Any],
    producer: dict[str, str],
    categories: Sequence[str],
    tokens_contain_depth: bool,
    notes: str,
    scale: str = "metric",
) -> Report:
    """Writes the export of a source of scenes.

    Args:
        request: the user's arguments.
        splits: scene -> split, in the export's order.
        make: returns a scene; scenes for which it raises UserError or Dropped are left out and
            counted.
        report: gets what is kept and dropped.
        source: returns what a scene is made from, as `exports.made_from.fingerprint` takes it.
            Scenes that an interrupted call made from something else are made again.
        producer, categories, tokens_contain_depth, notes, scale: see `exports.ExportWriter`.

    Returns:
        `report`.

    Raises:
        UserError: no scene is left.
        ExportError: the folder cannot be written, or holds something else.
    """
    names = sorted(name for entry in request.exclude for name in entry.fields)
    excluded = zlib.crc32("\n".join(names).encode())
    drawn = f", split {request.split}" if request.split else ""
    arguments = f"{request.views} views, seed {request.seed}{drawn}, {len(splits)} scenes"
    writer = exports.ExportWriter(
        request.out,
        producer={**producer, "request": f"{arguments}, excluded {excluded:08x}"},
        dtype="float16",
        scale=scale,
        token_width=TOKEN_WIDTH,
        patch_grid=request.patch_grid,
        tokens_contain_depth=tokens_contain_depth,
        categories=categories,
        notes=notes,
        resume=True,
    )
    with writer:
        sources = {scene_id: made_from.fingerprint(source(scene_id)) for scene_id in splits}
        finished = unchanged(writer, sources)
        written: dict[str, dict] = {}
        check = exports.cameras.CameraCheck(metric=scale == "metric")
        for scene_id, split in progress_bar(splits.items(), desc="scenes", unit="scene"):
            try:
                if scene_id not in finished:
                    made_from.note(writer, scene_id, sources[scene_id])
                note = _make_once(writer, finished, scene_id, split, make, check)
            except (UserError, Dropped) as error:
                # A Dropped's reason is shared by many scenes, which are counted together.
                name = "scene" if isinstance(error, Dropped) else f"scene {scene_id}"
                report.dropped[f"{name}: {error}"] += 1
                continue
            written[scene_id] = note | {"split": split}
            report.dropped.update(note["dropped"])
            report.corrected.update(note.get("corrected", ()))
        if not written:
            first = next(iter(report.dropped), "there is none")
            raise UserError(f"{request.root}: no scene is left; {first}")
        report.kept["scenes"] = len(written)
        report.warnings += check.lines()
        _add_questions(writer, written, request.seed, report)
        shutil.rmtree(writer.folder / _NOTES_FOLDER)
    return report


def unchanged(writer: exports.ExportWriter, sources: Mapping[str, str]) -> dict[str, dict]:
    """Returns scene -> entry of the scenes that were made before from the present sources.

    Their number is printed. Scenes whose sources have changed are removed.

    Args:
        writer: writer of the unfinished export.
        sources: scene -> fingerprint of its source, see `exports.made_from`.
    """
    changed = made_from.changed(writer, sources)
    for scene_id in changed:
        made_from.forget(writer, scene_id)
    finished = {s: entry for s, entry in writer.finished().items() if s in sources}
    if finished:
        print(f"{len(finished)} of {len(sources)} scenes were made before", flush=True)
    if changed:
        print(f"{len(changed)} scenes are made anew: their sources have changed", flush=True)
    return finished


def _make_once(
    writer: exports.ExportWriter,
    finished: dict[str, dict],
    scene_id: str,
    split: str,
    make: Callable[[str], Scene],
    check: exports.cameras.CameraCheck,
) -> dict:
    """Returns the note of a scene; makes, checks and adds the scene if it is not finished."""
    path = writer.folder / _NOTES_FOLDER / f"{scene_id}.json"
    if scene_id in finished:
        note = exports.files.read_json_object(path)
        writer.register(finished[scene_id] | {"split": split})  # the lists may have changed
        return note
    scene = make(scene_id)
    seen = None if scene.seen is None else _to_json(scene.seen)
    note = {"seen": seen, "dropped": scene.dropped, "corrected": scene.corrected}
    # The note is written first, so that a finished scene has a complete note.
    exports.files.write_json(path, note, indent=None)
    writer.add_scene(scene_id, scene.arrays, split=split)
    check.add(scene.arrays)
    return exports.files.read_json_object(path)


def _add_questions(
    writer: exports.ExportWriter, written: dict[str, dict], seed: int, report: Report
) -> None:
    """Adds the questions about all scenes, in the scenes' order."""
    seen = {
        scene_id: _from_json(note["seen"]) for scene_id, note in written.items() if note["seen"]
    }
    trained = [room for s, room in seen.items() if written[s]["split"] == "train"]
    questioner = BoxQuestioner(trained, seed)
    for scene_id, room in progress_bar(seen.items(), desc="questions", unit="scene"):
        records = questioner.ask(scene_id, room)
        writer.add_questions(records)
        report.kept["questions"] += len(records)


_ARRAYS = ("room", "boxes", "rays", "extrinsic")
"""Fields of a SeenRoom that are arrays."""


def _to_json(seen: SeenRoom) -> dict:
    """Returns a room as JSON; without `larger` and `typical`, which belong to the data set."""
    facts = {name: np.asarray(getattr(seen, name)).tolist() for name in _ARRAYS}
    return {
        **facts,
        "scene_id": seen.scene_id,
        "floor": seen.floor,
        "names": seen.names,
        "vague": sorted(seen.vague),
        "contacts": [[*pair, gap] for pair, gap in seen.contacts.items()],
    }


def _from_json(facts: dict) -> SeenRoom:
    """Returns the room of `_to_json`."""
    arrays = {name: np.array(facts[name]) for name in _ARRAYS}
    arrays["boxes"] = arrays["boxes"].reshape(-1, 7)
    return SeenRoom(
        **arrays,
        scene_id=facts["scene_id"],
        floor=facts["floor"],
        names=tuple(facts["names"]),
        vague=frozenset(facts["vague"]),
        contacts={(a, b): gap for a, b, gap in facts["contacts"]},
        larger={},
        typical={},
    )
