"""Names of scenes in data sets, and the matching of scenes with a list of scenes to exclude.

A name is a scene's id, or the path of its folder, video or picture. The matching excludes too much
rather than too little: it ignores case and a data set's folder before the name, and an entry for
one ScanNet scan excludes all scans of the same room.

This module stands alone (Python 3.9, standard library), as the whole package does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

from .files import Entry, UserError, one_line

_FOLDERS = ("scannet", "scannetpp", "scannetppv2", "arkitscenes", "s3dis", "adt", "hypersim")
_FOLDERS += ("procthor", "robotics", "ytb_roomtour", "matterport3d")
"""Folders of data sets; ids of scenes may begin with one."""
_MEDIA = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".jpg", ".jpeg", ".png", ".webp")
_SCENE_FILES = (*_MEDIA, ".sens", ".ply", ".json", ".txt", ".zip")
"""Endings of the files by which a list may name scenes."""
_MAX_FOLDERS = 64
_SCAN = re.compile(r"(scene\d{4})_\d{2}(?!\d)", re.IGNORECASE)
_HOUSE = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})_.*", re.IGNORECASE)
"""A room of a 3D-FRONT house, whose file is named by a UUID."""


class MisfitError(Exception):
    """A record does not fit its layout. The message is the reason, without the record's values."""


def path_parts(place: str, endings: tuple[str, ...] = _MEDIA) -> list[str]:
    """Splits a relative path, or a scene's id, into its folders and its stem.

    Args:
        place: the path or id.
        endings: file endings that are cut off.

    Raises:
        MisfitError: it is no text, absolute, leaves its folder, or has too many folders.
    """
    if not isinstance(place, str) or not place.strip() or "\0" in place:
        raise MisfitError("its scene or path is no text")
    path = PurePosixPath(place.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", place) or not path.parts:
        raise MisfitError("its path is absolute or leaves its folder")
    if len(path.parts) > _MAX_FOLDERS:
        raise MisfitError(f"its path has more than {_MAX_FOLDERS} folders")
    last = path.stem if path.suffix.lower() in endings else path.name
    return [*path.parts[:-1], last]


def bare_names(name: str) -> list[str]:
    """Returns [the name without the data set's folder before it], [] if it has none."""
    prefixes = (f"{folder}_" for folder in _FOLDERS)
    return [name[len(p) :] for p in prefixes if name.startswith(p) and name != p]


def room_of(name: str) -> str:
    """Returns a name without the number of a ScanNet scan: scene0000 for scene0000_01."""
    return _SCAN.sub(r"\1", name)


def place_of(scene_id: str) -> str:
    """Returns the place of a scene, which must not be divided between splits.

    It is the room of a ScanNet scan or the house of a 3D-FRONT room, whatever data set's folder
    and case its id has; every other scene is a place of its own.
    """
    bare = next(iter(bare_names(scene_id)), scene_id).lower()
    return room_of(_HOUSE.sub(r"\1", bare))


def _words(name: str) -> list[str]:
    return re.split(r"[-._/\\]", room_of(name).lower())


def _runs(name: str, most: int) -> set[str]:
    """Returns all runs of at most `most` whole words of a name: "s1_00" of "scannet_s1_00"."""
    words = _words(name)
    n = len(words)
    return {"_".join(words[i:j]) for i in range(n) for j in range(i + 1, min(i + most, n) + 1)}


class Exclusion:
    """The scenes of a list, which must not be trained on; records which entries matched a scene."""

    def __init__(self, entries: Iterable[Entry] = ()):
        """Args: entries: entries of `--exclude-scenes`, each the id of a scene or a path.

        Raises:
            UserError: an entry is neither.
        """
        self._keys: dict[Entry, set[str]] = {}  # entry -> names of its scene
        for entry in entries:
            where, (name,) = entry
            try:
                last = "_".join(_words(path_parts(name, _SCENE_FILES)[-1]))
            except MisfitError as misfit:
                rule = f"{one_line(name, 80)!r} names no scene: {misfit}"
                raise UserError(f"--exclude-scenes: {where}: {rule}") from None
            self._keys[entry] = {last, *bare_names(last)}
        self._listed = set().union(*self._keys.values())
        self._longest = max((key.count("_") + 1 for key in self._listed), default=0)
        self._matched: set[str] = set()
        self._known: dict[str, bool] = {}

    def covers(self, *names: str) -> bool:
        """Returns whether an id of a scene, or a path of a file, belongs to a scene of the list."""
        return any([self._covers(name) for name in names])  # a list, so that all are recorded

    def _covers(self, name: str) -> bool:
        if name not in self._known:
            found = self._listed & _runs(name, self._longest) if self._listed else set()
            self._matched |= found
            self._known[name] = bool(found)
        return self._known[name]

    def check(self, of: str, allow_missing: bool, dropped: Counter) -> None:
        """Refuses or counts the entries that matched none of the names given to `covers`.

        Args:
            of: the source of these names, for messages.
            allow_missing: whether such entries are counted, provided that another entry matched.
            dropped: {reason: count}, to which their number is added.

        Raises:
            UserError: there are such entries, and they are not allowed.
        """
        missing = [entry for entry, keys in self._keys.items() if not keys & self._matched]
        if not missing:
            return
        others = f", nor are {len(missing) - 1} more entries" if len(missing) > 1 else ""
        none_matched = len(missing) == len(self._keys)
        if not allow_missing or none_matched:
            where, (name,) = missing[0]
            hint = "--allow-missing counts such entries"
            if allow_missing:
                hint = "no entry names one, so the list would exclude nothing"
            raise UserError(
                f"--exclude-scenes: {where}: {one_line(name, 80)!r} is no "
                f"scene of {of}{others} ({hint})"
            )
        dropped[f"entry of --exclude-scenes: names no scene of {of}"] += len(missing)
