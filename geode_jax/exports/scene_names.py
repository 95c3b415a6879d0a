"""By what names data sets call scenes, and which of them a list of scenes to exclude means.

A name is a scene's id, or the path of its folder, video or picture. Whatever stands on a list of
scenes to exclude, too much is excluded rather than too little: letters may be large or small, a
data set's folder may stand before the name or not, and where ScanNet's scan of a room is listed,
no other scan of that room is trained on.

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
"""Folders of data sets, that the ids of scenes may begin with."""
_MEDIA = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".jpg", ".jpeg", ".png", ".webp")
_SCENE_FILES = (*_MEDIA, ".sens", ".ply", ".json", ".txt", ".zip")
"""Ends of what may stand for a scene in a list, by the name of its file."""
_MOST_FOLDERS = 64
_SCAN = re.compile(r"(scene\d{4})_\d{2}(?!\d)", re.IGNORECASE)


class MisfitError(Exception):
    """A record that does not fit its layout, and the reason, without the record's own values."""


def path_parts(place: str, endings: tuple[str, ...] = _MEDIA) -> list[str]:
    """Folders and the stem of a relative path, or a scene's id alone.

    Raises:
        MisfitError: it is no text, absolute, or leaves its folder.
    """
    if not isinstance(place, str) or not place.strip() or "\0" in place:
        raise MisfitError("its scene or path is no text")
    path = PurePosixPath(place.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", place) or not path.parts:
        raise MisfitError("its path is absolute or leaves its folder")
    if len(path.parts) > _MOST_FOLDERS:
        raise MisfitError(f"its path has more than {_MOST_FOLDERS} folders")
    last = path.stem if path.suffix.lower() in endings else path.name
    return [*path.parts[:-1], last]


def bare_names(name: str) -> list[str]:
    """The name without a data set's folder before it, [] where there is none."""
    begins = (f"{folder}_" for folder in _FOLDERS)
    return [name[len(begin) :] for begin in begins if name.startswith(begin) and name != begin]


def room_of(name: str) -> str:
    """The name without the number of ScanNet's scan: scene0000 of scene0000_01 and scene0000_00."""
    return _SCAN.sub(r"\1", name)


def _words(name: str) -> list[str]:
    return re.split(r"[-._/\\]", room_of(name).lower())


def _runs(name: str, most: int) -> set[str]:
    """All runs of at most `most` whole words of a name: of "scannet_s1_00" also "s1_00"."""
    words = _words(name)
    n = len(words)
    return {"_".join(words[i:j]) for i in range(n) for j in range(i + 1, min(i + most, n) + 1)}


class Exclusion:
    """The scenes that a list says must not be trained on, and which of its entries were met."""

    def __init__(self, entries: Iterable[Entry] = ()):
        """Args: entries: of `--exclude-scenes`; each names a scene, alone or as a path.

        Raises:
            UserError: an entry is no such name.
        """
        self._keys: dict[Entry, set[str]] = {}  # an entry -> what names its scene
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
        self._met: set[str] = set()
        self._known: dict[str, bool] = {}

    def covers(self, *names: str) -> bool:
        """Whether a scene's id, or the path of a file, belongs to a scene of the list."""
        return any([self._covers(name) for name in names])  # all of them, to have met all

    def _covers(self, name: str) -> bool:
        if name not in self._known:
            found = self._listed & _runs(name, self._longest) if self._listed else set()
            self._met |= found
            self._known[name] = bool(found)
        return self._known[name]

    def check(self, of: str, allow_missing: bool, dropped: Counter) -> None:
        """Refuses entries that no name given to `covers` belonged to, or counts them.

        Args:
            of: where these names are from.
            allow_missing: whether they are counted, as long as another entry is met.
            dropped: reason -> how many; gets their number.

        Raises:
            UserError: there is such an entry, and they are not allowed.
        """
        missing = [entry for entry, keys in self._keys.items() if not keys & self._met]
        if not missing:
            return
        others = f", and {len(missing) - 1} more entries are none" if len(missing) > 1 else ""
        none_met = len(missing) == len(self._keys)
        if not allow_missing or none_met:
            where, (name,) = missing[0]
            hint = "--allow-missing counts such entries"
            if allow_missing:
                hint = "no entry of the list names one: it would exclude nothing"
            raise UserError(
                f"--exclude-scenes: {where}: {one_line(name, 80)!r} is no "
                f"scene of {of}{others} ({hint})"
            )
        dropped[f"entry of --exclude-scenes: names no scene of {of}"] += len(missing)
