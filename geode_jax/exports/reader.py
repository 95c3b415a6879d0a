"""The reader of exports, which checks everything that it reads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import files
from .contract import (
    FILES,
    FRAME,
    MANIFEST,
    QUESTIONS,
    SPECS,
    ExportError,
    check_frame,
    check_layout,
    check_values,
    scene_error,
    shown,
)
from .records import check_manifest, check_question, parse
from .tensor_files import (
    BoxCounts,
    damage,
    layout_of,
    opened,
    presented,
    read_tensor,
    refuse_irregular,
    tensor_file,
)


def _sha256_of(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal."""
    digest = hashlib.sha256()
    refuse_irregular(path)
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


class Export:
    """Reads an export. Holds no open file: threads may share it, and it can be pickled.

    Attributes:
        folder: folder of the export.
        manifest: the checked manifest.
        categories: nouns; label i is categories[i].
        patch_grid: (gh, gw).
        token_width: C.
    """

    def __init__(self, folder: str | os.PathLike):
        """Reads and checks the manifest.

        Raises:
            ExportError: it is missing (not an export, or an unfinished one), empty, broken, or of
                an unknown schema version.
        """
        self.folder = Path(folder)
        try:
            refuse_irregular(self.folder / MANIFEST)
            data = files.read_bytes(self.folder / MANIFEST)
        except FileNotFoundError:
            why = "not an export, or an unfinished one"
            why = why if self.folder.is_dir() else "no such folder"
            rule = f"missing in {self.folder}: {why}"
            raise ExportError(MANIFEST, "", rule) from None
        except OSError as error:
            rule = f"cannot be read in {self.folder}: {error.strerror}"
            raise ExportError(MANIFEST, "", rule) from None
        self.manifest: dict = parse(MANIFEST, data)
        check_manifest(self.manifest)
        self.categories: list[str] = self.manifest["categories"]
        rows, columns = self.manifest["patch_grid"]
        self.patch_grid: tuple[int, int] = (rows, columns)
        self.token_width: int = self.manifest["token_width"]
        self._entries = {entry["id"]: entry for entry in self.manifest["scenes"]}
        self._verified: set[tuple[str, str]] = set()  # (scene, tensor or file) that passed
        self._box_counts = BoxCounts(self.folder, self._entries)

    def scene_ids(self, split: str | None = None) -> list[str]:
        """Returns the scene ids of a split (None for all), in the manifest's order."""
        return [i for i, entry in self._entries.items() if split in (None, entry["split"])]

    def header(self) -> dict[str, Any]:
        """Returns the arguments of an `ExportWriter` for another export of these scenes."""
        left_out = ("schema_version", "created", "scenes", "questions")
        return {name: value for name, value in self.manifest.items() if name not in left_out}

    def files(self) -> list[Path]:
        """Returns the paths of all files of the export."""
        paths = [self.folder / MANIFEST, self.folder / QUESTIONS]
        for entry in self._entries.values():
            paths += [
                tensor_file(self.folder, kind, entry["id"])
                for _, kind, key in FILES
                if key in entry
            ]
        return paths

    def scene_shapes(self, scene_id: str) -> dict[str, tuple[int, ...]]:
        """Returns {name: shape} of all tensors of a scene, from file headers alone (unchecked).

        Raises:
            ExportError: a file is missing or its header is damaged.
        """
        entry = self._entry(scene_id)
        layout: dict[str, tuple] = {}
        for prefix, kind, key in FILES:
            if key in entry:
                with opened(scene_id, tensor_file(self.folder, kind, scene_id)) as file:
                    layout.update(layout_of(file, prefix))
        return {name: shape for name, (_, shape) in layout.items()}

    def _entry(self, scene_id: str) -> dict:
        if scene_id not in self._entries:
            raise ExportError(f"scene {shown(scene_id)}", "", "unknown scene")
        return self._entries[scene_id]

    def read_scene(
        self, scene_id: str, names: Sequence[str] | None = None, *, verify: bool = True
    ) -> dict[str, np.ndarray]:
        """Reads tensors of one scene; other tensors are not read.

        Args:
            scene_id: a scene of the manifest.
            names: names in `SPECS`; None for all. Tensors that the scene lacks are left out.
            verify: whether to check the sha256 of files and the values of tensors, each at its
                first reading. Names, dtypes and shapes are always checked.

        Returns:
            {name: array}. bf16 comes as ml_dtypes.bfloat16, or as float32 without ml_dtypes.

        Raises:
            ExportError: `scene X: tensor Y: rule`.
        """
        entry = self._entry(scene_id)
        for name in names or ():
            if name not in SPECS:
                raise scene_error(scene_id, shown(name), "unknown tensor name")
        wants_teacher = names is None or any(name.startswith("teacher/") for name in names)
        layout: dict[str, tuple] = {}
        stored: dict[str, np.ndarray] = {}
        for prefix, kind, key in FILES:
            if key not in entry or (prefix and not wants_teacher):
                continue
            path = tensor_file(self.folder, kind, scene_id)
            if verify and (scene_id, key) not in self._verified:
                self._verify_file(scene_id, path, entry[key])
                self._verified.add((scene_id, key))
            with opened(scene_id, path) as file:
                found = layout_of(file, prefix)
                layout.update(found)
                check_layout(scene_id, layout, self.manifest, with_teacher=bool(prefix))
                for name in found if names is None else [n for n in names if n in found]:
                    stored[name] = read_tensor(file, path, name[len(prefix) :], found[name][0])
        for name, array in stored.items():
            if verify and (scene_id, name) not in self._verified:
                check_values(scene_id, name, layout[name][0], array, self.manifest)
                if name == FRAME:
                    check_frame(scene_id, array, layout)
                self._verified.add((scene_id, name))
        return {name: presented(layout[name][0], array) for name, array in stored.items()}

    def _verify_file(self, scene_id: str, path: Path, sha256: str) -> None:
        try:
            good = _sha256_of(path) == sha256
        except FileNotFoundError:
            raise damage(scene_id, path, "is missing") from None
        except OSError as error:
            raise damage(scene_id, path, f"cannot be read: {error.strerror}") from None
        if not good:
            raise damage(scene_id, path, "does not have the manifest's sha256")

    def questions(self, dropped: list[ExportError] | None = None) -> Iterator[dict]:
        """Yields the checked questions in the file's order.

        Args:
            dropped: list that collects the errors of bad questions, which are then skipped; None
                raises the first error.

        Raises:
            ExportError: `questions.jsonl:LINE: field: rule`, or the file itself is not the
                manifest's (always raised).
        """
        path = self.folder / QUESTIONS
        try:
            if _sha256_of(path) != self.manifest["questions"]["sha256"]:
                rule = "does not have the manifest's sha256; to add any: docs/how-to/questions.md"
                raise ExportError(QUESTIONS, "", rule)
            with open(path, "rb") as file:
                yield from self._checked(file, dropped)
        except OSError as error:
            raise ExportError(QUESTIONS, "", f"cannot be read: {error.strerror}") from None

    def _checked(self, lines: Iterable[bytes], dropped: list | None) -> Iterator[dict]:
        seen: set[str] = set()
        count = 0
        for count, line in enumerate(lines, start=1):
            where = f"{QUESTIONS}:{count}"
            try:
                record = parse(where, line)
                check_question(where, record, seen, self._box_counts)
            except ExportError as error:
                if dropped is None:
                    raise
                dropped.append(error)
                continue
            yield record
        if count != self.manifest["questions"]["count"]:
            wanted = self.manifest["questions"]["count"]
            raise ExportError(QUESTIONS, "count", f"{count} lines, the manifest has {wanted}")
