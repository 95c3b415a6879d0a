"""What the finished scenes of an unfinished export were made from, so that none stays that is old.

Beside each finished scene stands a fingerprint of its source. A scene whose source has changed
since is forgotten, and so made anew.

This module stands alone (Python 3.9, standard library), as the whole package does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import files
from .tensor_files import scene_files
from .writer import ExportWriter


def fingerprint(source: Any) -> str:
    """A text that changes with a source.

    Args:
        source: a path, of a file or a folder: where it is, and the size and the time of the last
            change of each file there count, not the content, which may be many gigabytes. Or a
            value that JSON can say.
    """
    value = _files_of(source) if isinstance(source, Path) else source
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _files_of(path: Path) -> list:
    found: list[Any] = [str(path.resolve())]
    names = [path] if not path.is_dir() else []
    for folder, _, inside in os.walk(path, followlinks=True):
        names += [Path(folder) / name for name in inside]
    for name in sorted(names):
        try:
            stat = name.stat()
        except OSError:
            continue  # gone, or a link to nothing
        found.append([str(name.relative_to(path)), stat.st_size, stat.st_mtime_ns])
    return found


def note(writer: ExportWriter, scene_id: str, source: str) -> None:
    """Keeps the fingerprint of a scene's source; before the scene is made and added."""
    files.write_text(_note_file(writer, scene_id), source)


def changed(writer: ExportWriter, sources: Mapping[str, str]) -> list[str]:
    """The finished scenes that were made from other sources than those that are there now.

    Scenes of before there were such notes count as unchanged.

    Args:
        writer: of the unfinished export.
        sources: scene -> fingerprint of its source; other scenes are not looked at.
    """
    noted = {s: _note_file(writer, s) for s in writer.finished() if s in sources}
    return [s for s, file in noted.items() if file.exists() and files.read_text(file) != sources[s]]


def forget(writer: ExportWriter, scene_id: str) -> None:
    """Removes a finished scene from an unfinished export, its mark of being finished first.

    Raises:
        UserError: a file cannot be removed.
    """
    for path in scene_files(writer.folder, scene_id):
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise files.cannot_write(path, error) from None


def _note_file(writer: ExportWriter, scene_id: str) -> Path:
    return scene_files(writer.folder, scene_id)[0].with_name(f"{scene_id}.from")
