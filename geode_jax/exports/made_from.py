"""Fingerprints of the sources of an unfinished export's finished scenes.

A scene whose source has changed since it was finished is removed and made again.

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
    """Returns a text that changes with a source.

    Args:
        source: path of a file or folder, or a value that JSON can hold. A path counts by its place
            and by the sizes and modification times of its files; their content, which may be many
            gigabytes, is not read.
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
    """Writes the fingerprint of a scene's source; to be called before the scene is added."""
    files.write_text(_note_file(writer, scene_id), source)


def changed(writer: ExportWriter, sources: Mapping[str, str]) -> list[str]:
    """Returns the finished scenes whose sources have changed.

    Scenes without a fingerprint count as unchanged.

    Args:
        writer: writer of the unfinished export.
        sources: {scene: fingerprint of its source}; other scenes are ignored.
    """
    noted = {s: _note_file(writer, s) for s in writer.finished() if s in sources}
    return [s for s, file in noted.items() if file.exists() and files.read_text(file) != sources[s]]


def forget(writer: ExportWriter, scene_id: str) -> None:
    """Removes a finished scene from an unfinished export, its entry first.

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
