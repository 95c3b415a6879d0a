"""Writes an export scene by scene, resumable, from one process or several."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import files, labels, tensor_files
from .contract import (
    ENTRIES,
    FILES,
    FRAME,
    MANIFEST,
    PLAIN,
    QUESTIONS,
    SCHEMA_VERSION,
    ExportError,
    check_frame,
    check_layout,
    check_values,
)
from .reader import Export
from .records import (
    HEADER_FIELDS,
    MEANING,
    check_entry,
    check_fields,
    check_manifest,
    check_question,
    parse,
    required_fields,
)
from .tensor_files import BoxCounts, damage, tensor_file, to_stored

_MARKER = ".unfinished.json"


_WRITTEN = ("scenes/*.safetensors", "teacher/*.safetensors")


_LEFTOVERS = ("scenes/*.part", "teacher/*.part", f"{ENTRIES}/*.part", f"{ENTRIES}/*.from")


def _write_file(path: Path, chunks: Iterable[Any], durable: bool = False) -> str:
    """Writes a file whole or not at all and returns its sha256."""
    digest = hashlib.sha256()
    try:
        with files.writing(path, durable=durable) as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
    except ExportError:
        raise
    except files.UserError as error:
        raise ExportError(str(error)) from None
    return digest.hexdigest()


def _cannot_write(path: Path, error: OSError) -> ExportError:
    return ExportError(str(files.cannot_write(path, error)))


def _json_bytes(value: Any, indent: int | None = None) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    return text.encode() + b"\n"


def write_scene(
    folder: str | os.PathLike,
    scene_id: str,
    arrays: Mapping[str, np.ndarray],
    teacher: Mapping[str, np.ndarray] | None = None,
    *,
    split: str,
    manifest: Mapping[str, Any],
    alignment: Mapping[str, Any] | None = None,
) -> dict:
    """Checks one scene and writes its files; several processes may do so in one folder.

    Args:
        folder: the export's folder, opened by an `ExportWriter`.
        scene_id: letters, digits, `.`, `_`, `-`.
        arrays: tensors of `SPECS` by name, in the shapes given there. The token tensors are
            converted to the manifest's dtype (any float in, bf16 without ml_dtypes too); all
            others must have one of their dtypes already.
        teacher: the `teacher/` tensors, names without `teacher/`.
        split: train, val or test.
        manifest: `ExportWriter.manifest`.
        alignment: how well a reconstruction fits the metric world that it was aligned to, for the
            scene's entry in the manifest.

    Returns:
        The scene's entry for `ExportWriter.register`.

    Raises:
        ExportError: a tensor breaks a rule, or the file cannot be written.
    """
    entry: dict[str, Any] = {"id": scene_id, "split": split, "sha256": "0" * 64}
    if alignment is not None:
        entry["alignment"] = dict(alignment)
    check_entry(entry, set())
    given = {"": arrays, "teacher/": teacher or {}}
    stored: dict[str, dict] = {}
    layout: dict[str, tuple] = {}
    for prefix, tensors in given.items():
        stored[prefix] = {}
        for name, array in tensors.items():
            full = f"{prefix}{name}"
            dtype, array = to_stored(scene_id, full, array, manifest)
            stored[prefix][name] = dtype, array
            layout[full] = dtype, array.shape
        check_layout(scene_id, layout, manifest, with_teacher=bool(prefix))
    for prefix, tensors in stored.items():
        for name, (dtype, array) in tensors.items():
            check_values(scene_id, prefix + name, dtype, array, manifest)
    if FRAME in stored[""]:
        check_frame(scene_id, stored[""][FRAME][1], layout)
    for prefix, kind, key in FILES:
        if stored[prefix]:
            chunks = tensor_files.chunks(stored[prefix])
            entry[key] = _write_file(tensor_file(Path(folder), kind, scene_id), chunks)
    return entry


def _link(source: Path, target: Path) -> None:
    """Makes a hard link to a file, or a copy if the file system cannot link.

    If `source` is a symbolic link, the file that it points to is linked: a relative link would
    point elsewhere from the new folder.
    """
    os.stat(source)  # raises FileNotFoundError for a dangling link
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, one without hard links, or the name is taken
        with open(source, "rb") as file:
            _write_file(target, iter(lambda: file.read(1 << 20), b""))


class ExportWriter:
    """Writes an export; a context manager.

    `manifest.json` is written last (temporary file, fsync, rename), so a folder without it is not
    an export, even if the writer is interrupted. An existing export, or a folder with anything
    else in it, is never touched. An unfinished export with the same header (producer, dtype, ...)
    is started over: its files are removed.

    With `resume`, several processes may fill one folder, one after the other or at once, each
    scene once: a scene that `add_scene` has finished is kept, and `finished` lists it in all these
    processes and in later ones. One more writer then registers the finished scenes in the order
    of the manifest, adds the questions, and closes.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        producer: dict,
        dtype: str,
        scale: str,
        token_width: int,
        patch_grid: Sequence[int],
        tokens_contain_depth: bool,
        categories: Sequence[str],
        notes: str = "",
        teacher_tokenizer: str = "",
        resume: bool = False,
    ):
        """Opens the folder.

        Args:
            folder: absent, empty, or an unfinished export of the same producer.
            producer: strings `project`, `commit`, `weights`, `licence`, and optionally others.
            dtype: float16, bfloat16 or float32, of the token tensors.
            scale: metric (metres) or scene (the producer's own units).
            token_width: C.
            patch_grid: (gh, gw), P = gh * gw.
            tokens_contain_depth: whether the tokens are made from the true depth; reports must
                then state that depth metrics are not meaningful.
            categories: nouns; label i means categories[i].
            notes: any text.
            teacher_tokenizer: sha256 of the `tokenizer.json` of the teacher's token ids; needed if
                a scene has such ids.
            resume: whether to keep the scenes of an unfinished export with the same header.

        Raises:
            ExportError: a bad argument, or a folder that may not be written to.
        """
        self.folder = Path(folder)
        header = {
            "schema_version": SCHEMA_VERSION,
            "producer": producer,
            "dtype": dtype,
            "scale": scale,
            "token_width": token_width,
            "patch_grid": list(patch_grid),
            "tokens_contain_depth": tokens_contain_depth,
            "categories": categories if isinstance(categories, str) else list(categories),
            "notes": notes,
        }
        if teacher_tokenizer:
            header["teacher_tokenizer"] = teacher_tokenizer
        created = datetime.datetime.now(datetime.timezone.utc)
        self.manifest = {**header, "created": created.isoformat(timespec="seconds")}
        check_fields(MANIFEST, self.manifest, HEADER_FIELDS, required_fields(HEADER_FIELDS))
        self._resume = resume
        self._take_folder(_json_bytes(header))
        self._entries: list[dict] = []
        self._scenes: set[str] = set()
        self._box_counts = BoxCounts(self.folder, self._scenes)
        self._question_ids: set[str] = set()
        self._digest = hashlib.sha256()
        # With `resume`, only the writer that adds questions or closes may open their file.
        self._questions = None if resume else self._open_questions()

    @classmethod
    def reopen(cls, folder: str | os.PathLike) -> ExportWriter:
        """Resumes an unfinished export with its own header.

        Raises:
            ExportError: the folder is no unfinished export.
        """
        if not (Path(folder) / _MARKER).is_file():
            raise ExportError(str(folder), "", "is no unfinished export")
        header = parse(_MARKER, files.read_bytes(Path(folder) / _MARKER))
        check_fields(_MARKER, header, HEADER_FIELDS, ("schema_version",))
        del header["schema_version"]
        return cls(folder, **header, resume=True)

    def _open_questions(self) -> Any:
        try:
            return open(self.folder / QUESTIONS, "wb" if self._resume else "xb")
        except OSError as error:
            raise _cannot_write(self.folder / QUESTIONS, error) from None

    def _take_folder(self, header: bytes) -> None:
        folder, marker = self.folder, self.folder / _MARKER
        try:
            present = sorted(os.listdir(folder)) if folder.exists() else []
            if self._resume:  # another process may be about to begin the same export
                present = [name for name in present if not name.endswith(".part")]
            if MANIFEST in present:
                raise ExportError(str(folder), "", "is an export already; it is not overwritten")
            if present and _MARKER not in present:
                raise ExportError(str(folder), "", "is not empty and not an unfinished export")
            if present and files.read_bytes(marker) != header:
                raise ExportError(str(folder), "", "is an unfinished export of another producer")
            if not self._resume:
                for pattern in (*_LEFTOVERS, *_WRITTEN, f"{ENTRIES}/*.json", QUESTIONS):
                    for path in folder.glob(pattern):
                        path.unlink()
        except OSError as error:
            raise _cannot_write(folder, error) from None
        if not present:
            _write_file(marker, [header])

    def add_scene(
        self,
        scene_id: str,
        arrays: Mapping[str, np.ndarray],
        *,
        split: str,
        teacher: Mapping[str, np.ndarray] | None = None,
        alignment: Mapping[str, Any] | None = None,
    ) -> None:
        """Checks and writes one scene; see `write_scene`."""
        if scene_id in self._scenes:
            raise ExportError(MANIFEST, "id", f"duplicate scene {scene_id}")
        entry = write_scene(
            self.folder,
            scene_id,
            arrays,
            teacher,
            split=split,
            manifest=self.manifest,
            alignment=alignment,
        )
        self._finish(entry)

    def _finish(self, entry: dict) -> None:
        """Marks a scene whose files are written as finished, and adds it."""
        if self._resume:
            _write_file(self.folder / ENTRIES / f"{entry['id']}.json", [_json_bytes(entry)])
        self.register(entry)

    def finished(self) -> dict[str, dict]:
        """Returns {scene: entry} of all scenes that writers with `resume` have finished here.

        Raises:
            ExportError: an entry is damaged.
        """
        entries: dict[str, dict] = {}
        for path in sorted((self.folder / ENTRIES).glob("*.json")):
            entry = parse(f"{ENTRIES}/{path.name}", files.read_bytes(path))
            check_entry(entry, set(), f"{ENTRIES}/{path.name}: ")
            entries[entry["id"]] = entry
        return entries

    def adopt_scene(self, export: Export, scene_id: str, split: str = "") -> dict:
        """Adds a scene of another export whose header has the same meaning.

        Its files become hard links if the file system allows it, else copies. They are not checked
        here: readers of the new export check them against the same sha256. This export may have
        more categories than the other one. A file whose labels then have other numbers is checked
        and written anew, see `labels`.

        Args:
            export: the other export.
            scene_id: a scene of it.
            split: split of the scene in this export; the same as in the other one if empty.

        Returns:
            The scene's entry. Its sha256 differ from those of the other export's entry for the
            files that were written anew.

        Raises:
            ExportError: the scene is unknown, the headers differ, or a file is missing, damaged, or
                cannot be linked.
        """
        entry = dict(export._entry(scene_id))
        entry["split"] = split or entry["split"]
        self._refuse_other_meaning(export, scene_id)
        if scene_id in self._scenes:
            raise ExportError(MANIFEST, "id", f"duplicate scene {scene_id}")
        nouns = export.categories, self.manifest["categories"]
        shapes = export.scene_shapes(scene_id) if nouns[0] != nouns[1] else {}
        for prefix, kind, key in FILES:
            if key not in entry:
                continue
            target = tensor_file(self.folder, kind, scene_id)
            names = [name for name in shapes if name.startswith("teacher/") == bool(prefix)]
            if any(labels.must_change(name, *nouns) for name in names):
                entry[key] = self._write_renumbered(export, scene_id, names, target)
            else:
                self._link_file(scene_id, tensor_file(export.folder, kind, scene_id), target)
        self._finish(entry)
        return entry

    def _refuse_other_meaning(self, export: Export, scene_id: str) -> None:
        """Refuses a scene whose numbers would mean something else in this export."""
        for name in MEANING:
            theirs, own = export.manifest.get(name), self.manifest.get(name)
            if name == "categories":
                same = set(export.categories) <= set(self.manifest["categories"])
            else:  # scenes of an export without the tokenizer have no ids
                same = theirs == own or (name == "teacher_tokenizer" and theirs is None)
            if not same and not export.scene_shapes(scene_id).keys() <= PLAIN:
                rule = f"differs from that of {export.folder}, whose scenes are taken over"
                raise ExportError(MANIFEST, name, rule)

    def _write_renumbered(
        self, export: Export, scene_id: str, names: Sequence[str], target: Path
    ) -> str:
        """Writes one of a scene's files with this export's labels and returns its sha256."""
        stored = {}
        for name, array in export.read_scene(scene_id, names).items():
            if labels.must_change(name, export.categories, self.manifest["categories"]):
                nouns = export.categories, self.manifest["categories"]
                array = labels.renumbered(name, array, *nouns)
            short = name[len("teacher/") :] if name.startswith("teacher/") else name
            dtype, array = to_stored(scene_id, name, array, self.manifest)
            check_values(scene_id, name, dtype, array, self.manifest)
            stored[short] = dtype, array
        return _write_file(target, tensor_files.chunks(stored))

    def _link_file(self, scene_id: str, source: Path, target: Path) -> None:
        """Makes one of a scene's files a link to that of another export, or a copy of it."""
        if source.exists() and not source.is_file():  # copying a pipe or device may not end
            raise ExportError(str(source), "", "is not a regular file")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if self._resume:  # a call that was interrupted may have left a link of this name
                target.unlink(missing_ok=True)
            _link(source, target)
        except FileNotFoundError:
            raise damage(scene_id, source, "is missing") from None
        except OSError as error:
            raise _cannot_write(target, error) from None

    def register(self, entry: dict) -> None:
        """Adds a scene that `write_scene` has written, here or in another process."""
        check_entry(entry, self._scenes)
        self._entries.append(dict(entry))

    def add_questions(self, records: Iterable[dict]) -> None:
        """Checks and appends questions of scenes that were added before.

        Args:
            records: {id, scene_id, kind, question, answer} and optional {teacher_answer, options,
                value, unit, box, rationale, relation, teacher_relation, objects, answers, source};
                the source is the name of the question's data set.

        Raises:
            ExportError: `questions.jsonl:LINE: field: rule`; the records before it were added.
        """
        for record in records:
            where = f"{QUESTIONS}:{len(self._question_ids) + 1}"
            check_question(where, record, self._question_ids, self._box_counts)
            line = _json_bytes(record)
            self._digest.update(line)
            try:
                self._questions = self._questions or self._open_questions()
                self._questions.write(line)
            except OSError as error:
                raise _cannot_write(self.folder / QUESTIONS, error) from None

    def close(self) -> None:
        """Writes the manifest, which makes the folder an export."""
        try:
            with self._questions or self._open_questions() as file:
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _cannot_write(self.folder / QUESTIONS, error) from None
        questions = {"count": len(self._question_ids), "sha256": self._digest.hexdigest()}
        manifest = {**self.manifest, "scenes": self._entries, "questions": questions}
        check_manifest(manifest)
        _write_file(self.folder / MANIFEST, [_json_bytes(manifest, indent=1)], durable=True)
        with contextlib.suppress(OSError):  # the export is complete; a leftover marker is ignored
            (self.folder / _MARKER).unlink()
            if self._resume:
                for pattern in (*_LEFTOVERS, f"{ENTRIES}/*.json"):
                    for path in self.folder.glob(pattern):
                        path.unlink()
                (self.folder / ENTRIES).rmdir()

    def __enter__(self) -> ExportWriter:
        """Returns itself."""
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        """Closes after success; after an exception the folder stays unfinished."""
        if exc_type is None:
            self.close()
        else:
            with contextlib.suppress(OSError):
                if self._questions:
                    self._questions.close()
