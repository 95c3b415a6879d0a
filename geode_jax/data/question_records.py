"""The questions of an export as ArrayRecord, for random access by scene.

`questions.jsonl` is for people and other programs; training reads all questions of one scene at
once. A TFDS builder (TensorFlow is never imported) writes them once as ArrayRecord, one record per
scene. Per question that takes 17 us to write and 4 us to read (30 questions per scene); one record
per question took 127 us and 180 us.

    records = open_question_records(Export(folder))
    records.read("scene0042")        # [{"id": ..., "question": ...}, ...]
"""

import atexit
import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from geode_jax.data.control import control_of, why_not_regressed
from geode_jax.data.mixture import OWN
from geode_jax.data.tokens import Tokenizer
from geode_jax.errors import UserError
from geode_jax.exports import Export, files
from geode_jax.exports.prompts import prompt
from geode_jax.runtime.bars import progress_bar
from geode_jax.runtime.lock import LOCK, locked
from geode_jax.runtime.user_cache import user_cache
from geode_jax.sealed import seal, unseal
from geode_jax.targets import held_boxes

_FORMAT = "1.0.1"  # of the records; part of the cache key, so a change makes new records
_INDEX = "index.json"
_LENGTHS = "lengths6"  # the number changes with what `question_lengths` keeps

ANSWER_FIELDS = ("answer", "teacher_answer", "rationale")
"""Fields of a question record that a model can learn to answer with."""
SPATIAL_FIELDS = ("objects", "relation", "value")
"""Fields of a question record that the spatial head learns from."""


class SceneQuestions(tfds.core.GeneratorBasedBuilder):
    """TFDS builder: one record per scene, `questions` = its question records as JSON lines.

    Splits are the export's. Record i of a split belongs to the i-th of its scenes in sorted
    order; scenes without a question have no record.
    """

    VERSION = tfds.core.Version(_FORMAT)

    def __init__(self, *, scenes: dict[str, dict[str, list[str]]] | None = None, **kwargs):
        """Args: scenes: split -> scene id -> the scene's question records, each as JSON."""
        self._scenes = scenes or {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description="Questions of an export, grouped by scene.",
            features=tfds.features.FeaturesDict({"scene_id": text, "questions": text}),
            disable_shuffling=True,  # keeps record i = scene i
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in self._scenes}

    def _generate_examples(self, split: str) -> Iterator:
        scenes = self._scenes[split]
        bar = progress_bar(sorted(scenes), desc=f"questions of {split}", unit="scene", leave=False)
        for i, scene_id in enumerate(bar):
            yield i, {"scene_id": scene_id, "questions": "\n".join(scenes[scene_id])}


class QuestionRecords:
    """Reads the questions of an export by scene; several threads may read at the same time.

    Attributes:
        folder: folder of the records.
        dropped: one line for every question that breaks the contract and was skipped.
    """

    def __init__(self, folder: str | Path):
        """Args: folder: folder in which `open_question_records` wrote the records.

        Raises:
            UserError: the records are damaged.
        """
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.dropped: list[str] = index["dropped"]
        self._scene_ids: dict[str, list[str]] = index["scenes"]
        self._position = {
            scene_id: (split, i)
            for split, ids in self._scene_ids.items()
            for i, scene_id in enumerate(ids)
        }
        self._sources: dict[str, Any] = {}

    def scene_ids(self, split: str | None = None) -> list[str]:
        """Returns the scenes that have questions, sorted within a split; None for all splits."""
        if split is not None:
            return list(self._scene_ids.get(split, ()))
        return list(self._position)

    def read(self, scene_id: str) -> list[dict]:
        """Returns the question records of a scene, in the order of `questions.jsonl`.

        A scene without questions gives an empty list.

        Raises:
            UserError: the records belong to another scene: the cache is damaged.
        """
        if scene_id not in self._position:
            return []
        split, i = self._position[scene_id]
        if split not in self._sources:
            builder = tfds.builder_from_directory(self._dataset_folder())
            # TFDS decorates the method, which hides its arguments from type checkers.
            found = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
            self._sources[split] = found
        record = self._sources[split][i]
        if record["scene_id"].decode() != scene_id:
            raise UserError(f"{self.folder}: scene {scene_id}: damaged cache, delete this folder")
        return [json.loads(line) for line in record["questions"].decode().split("\n")]

    def of_split(self, split: str) -> Iterator[dict]:
        """Yields all question records of a split, scene by scene."""
        for scene_id in self.scene_ids(split):
            yield from self.read(scene_id)

    def _dataset_folder(self) -> str:
        return os.fspath(self.folder / "scene_questions" / _FORMAT)


def open_question_records(export: Export, on_bad: str = "stop") -> QuestionRecords:
    """Opens the records of an export's questions; the first call makes them.

    They are in `.questions/` of the export, or in the user's cache folder if the export is read
    only, under a key of the questions' checksum and the splits. Records get their final name once
    complete, so a killed process leaves no partial ones. Of two processes one waits for the other.

    Args:
        export: an opened export.
        on_bad: "stop" raises at a question that breaks the contract (or whose scene's file is
            damaged), "skip" leaves it out and lists it in `QuestionRecords.dropped`.

    Raises:
        ExportError: see `on_bad`; a questions.jsonl that is not the manifest's is always refused.
    """
    manifest = export.manifest
    split_of = {scene["id"]: scene["split"] for scene in manifest["scenes"]}
    key = json.dumps([_FORMAT, manifest["questions"], sorted(split_of.items())])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    # With "stop", records from which bad questions were skipped are not used.
    names = [name] if on_bad == "stop" else [name, name + "-skip"]
    places = _places(export)
    found = _find(places, names)
    if found:
        return found
    parent = _writable(places, names)
    with _lock(parent):
        found = _find([parent], names)  # made while this process waited
        if found:
            return found
        _remove_unfinished(parent)
        dropped = None if on_bad == "stop" else []
        scenes = _questions_by_scene(export, split_of, dropped)
        final = parent / names[-1 if dropped else 0]
        try:
            _write_records(scenes, [str(error) for error in dropped or ()], parent, final)
        except OSError as error:
            raise UserError(f"{parent}: cannot write records: {error.strerror}") from error
    return QuestionRecords(final)


def _places(export: Export) -> list[Path]:
    """Returns the folders that may hold records: beside the questions, or in a cache."""
    return [Path(export.folder) / ".questions", user_cache("questions") or _of_this_process()]


@functools.cache
def _of_this_process() -> Path:
    """Returns a temporary folder that is removed with the process, for users without a cache."""
    folder = Path(tempfile.gettempdir()) / f"geode_jax-{uuid.uuid4().hex}"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _find(places: list[Path], names: list[str]) -> QuestionRecords | None:
    for folder in (place / name for name in names for place in places):
        if _readable(folder):
            try:
                return QuestionRecords(folder)
            except UserError as error:
                print(f"{error}; made again", file=sys.stderr, flush=True)
                _discard(folder)
    return None


def _readable(folder: Path) -> bool:
    """Returns whether there are records that this user may read."""
    if not os.access(folder / _INDEX, os.R_OK):
        return False
    return all(
        os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK)
        for path in folder.rglob("*")
        if path.suffix != ".npz"  # token counts, which are made again
    )


def _discard(folder: Path) -> None:
    """Removes damaged records if permitted, unless another process has replaced them."""
    with contextlib.suppress(OSError, UserError), _lock(folder.parent):
        try:
            QuestionRecords(folder)
        except UserError:
            shutil.rmtree(folder)


def _writable(places: list[Path], names: list[str]) -> Path:
    for place in places:
        with contextlib.suppress(OSError):  # a read-only export
            place.mkdir(parents=True, exist_ok=True)
            # `_find` could not read what is there under these names: another user's records.
            taken = any(os.path.lexists(place / name) for name in names)
            if os.access(place, os.W_OK | os.X_OK) and not taken:
                return place
    raise UserError(f"{places[0]}: cannot be written, nor can {places[1]}")


def _lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Holds the folder's lock.

    On a file system without locks two processes may do the same work; the first result is kept.
    """
    return locked(folder / LOCK, f"{folder}: records", wait=True)


def _remove_unfinished(folder: Path) -> None:
    """Deletes the leftovers of killed processes; only the holder of the lock writes here."""
    for leftover in folder.glob("tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _questions_by_scene(
    export: Export, split_of: dict[str, str], dropped: list | None
) -> dict[str, dict[str, list[str]]]:
    """Returns {split: {scene: its question records as JSON}}."""
    scenes: dict[str, dict[str, list[str]]] = {}
    to_json = json.JSONEncoder(separators=(",", ":")).encode
    total = export.manifest["questions"]["count"]
    for record in progress_bar(
        export.questions(dropped), desc="questions", total=total, leave=False
    ):
        of_split = scenes.setdefault(split_of[record["scene_id"]], {})
        of_split.setdefault(record["scene_id"], []).append(to_json(record))
    return scenes


def _write_records(scenes: dict, dropped: list[str], parent: Path, final: Path) -> None:
    temporary = parent / f"tmp{uuid.uuid4().hex}"
    temporary.mkdir()  # with the umask's mode, for others who read the export
    try:
        if scenes:
            data_dir = os.fspath(temporary)
            builder = SceneQuestions(scenes=scenes, data_dir=data_dir, file_format="array_record")
            with _quiet_tfds():
                builder.download_and_prepare()
        index = {"scenes": {split: sorted(scenes[split]) for split in scenes}, "dropped": dropped}
        index["files"] = _checksums(temporary)
        files.write_json(temporary / _INDEX, seal(index), indent=None)
        if not (final / _INDEX).is_file():
            os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_index(folder: Path) -> dict:
    index = unseal(files.read_json_object(folder / _INDEX))
    if index is None:
        raise UserError(f"{folder / _INDEX}: damaged")
    key = (os.fspath(folder), os.stat(folder / _INDEX).st_mtime_ns)
    if key not in _INTACT:
        found = _checksums(folder)
        for name, checksum in index["files"].items():
            if found.get(name) != checksum:
                raise UserError(f"{folder / name}: missing or damaged")
        _INTACT.add(key)
    return index


_INTACT: set[tuple[str, int]] = set()
"""Records that this process has checked: (folder, modification time of the index)."""


def _checksums(folder: Path) -> dict[str, str]:
    """Returns {path in the folder: CRC-32} of every file of the records."""
    found = {}
    for path in sorted((folder / "scene_questions").rglob("*")):
        if path.is_file():
            checksum = 0
            with files.open_regular(path) as file:
                while chunk := file.read(1 << 20):
                    checksum = zlib.crc32(chunk, checksum)
            found[path.relative_to(folder).as_posix()] = f"{checksum:08x}"
    return found


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Suppresses the messages and progress bars of TFDS."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def question_lengths(
    records: QuestionRecords, split: str, tokenizer: Tokenizer
) -> dict[str, np.ndarray]:
    """Returns token counts of every question of a split, computed once per tokenizer and cached.

    Args:
        records: the opened questions.
        split: name of the split.
        tokenizer: tokenizer of the run.

    Returns:
        Arrays over the n questions of the split, scenes in `records.scene_ids(split)` order:
        `scene` [n] int32 index of the scene, `kind` and `source` [n] strings (`mixture.OWN` for a
        question without a source), `question` [n] int32 prompt + bos, each of `ANSWER_FIELDS`
        [n] int32 text + eos, 0 if absent, `control` [n] strings of `control.control_of`,
        `not_regressed` [n] strings of `control.why_not_regressed`, `bad_objects` [n] int32: named
        objects whose boxes cannot be encoded, `spatial` [n] bool: whether it has one of
        `SPATIAL_FIELDS`, `teacher_relation` [n] bool: whether it has that field.
    """
    name = f"{_LENGTHS}-{split}-{tokenizer.sha256[:16]}.npz"
    own = user_cache("questions")
    places = [records.folder / name]
    if own:  # used if the records are in another user's folder
        places.append(own / f"{records.folder.name}-lengths" / name)
    for file in places:
        kept = _read_lengths(file) if os.access(file, os.R_OK) else None
        if kept is not None:
            return kept
    scenes, kinds, sources, controls = [], [], [], []
    not_regressed, bad_objects, spatial, teacher_relation = [], [], [], []
    texts: dict[str, list] = {"question": [], **{field: [] for field in ANSWER_FIELDS}}
    ids = records.scene_ids(split)
    for i, scene_id in enumerate(
        progress_bar(ids, desc=f"tokens of {split}", unit="scene", leave=False)
    ):
        found = records.read(scene_id)
        scenes += [i] * len(found)
        kinds += [record["kind"] for record in found]
        sources += [record.get("source", OWN) for record in found]
        controls += [control_of(record) for record in found]
        not_regressed += map(why_not_regressed, found)
        bad_objects += [
            sum(not held_boxes(item["box"]) for item in record.get("objects", ()))
            for record in found
        ]
        spatial += [not record.keys().isdisjoint(SPATIAL_FIELDS) for record in found]
        teacher_relation += ["teacher_relation" in record for record in found]
        texts["question"] += [prompt(record) for record in found]
        for field in ANSWER_FIELDS:
            texts[field] += [record.get(field) for record in found]
    arrays = {
        "scene": np.array(scenes, np.int32),
        "kind": np.array(kinds, np.str_),
        "source": np.array(sources, np.str_),
        "control": np.array(controls, np.str_),
        "not_regressed": np.array(not_regressed, np.str_),
        "bad_objects": np.array(bad_objects, np.int32),
        "spatial": np.array(spatial, bool),
        "teacher_relation": np.array(teacher_relation, bool),
        "question": _token_counts(texts["question"], tokenizer.encode_batch),
        **{f: _token_counts(texts[f], tokenizer.encode_answers) for f in ANSWER_FIELDS},
    }
    _keep(places, arrays)
    return arrays


_LENGTH_KINDS = {"scene": "i", "kind": "U", "source": "U", "control": "U", "question": "i"}
_LENGTH_KINDS |= {"not_regressed": "U", "bad_objects": "i", **dict.fromkeys(ANSWER_FIELDS, "i")}
_LENGTH_KINDS |= {"spatial": "b", "teacher_relation": "b"}


def _read_lengths(file: Path) -> dict[str, np.ndarray] | None:
    """Returns the cached result of `question_lengths`; None if there is none or it is damaged."""
    if not file.is_file():
        return None
    try:
        data = io.BytesIO(files.read_bytes(file))
        if zipfile.ZipFile(data).testzip() is not None:  # NumPy ignores a wrong checksum
            return None
        data.seek(0)
        with np.load(data, allow_pickle=False) as arrays:
            found = dict(arrays)
    except Exception:  # a damaged archive can raise any error
        return None
    kinds = {name: array.dtype.kind for name, array in found.items()}
    sizes = {array.shape for array in found.values()}
    return found if kinds == _LENGTH_KINDS and len(sizes) == 1 else None


def answer_lengths(lengths: dict[str, np.ndarray], field: str, controls: bool) -> np.ndarray:
    """Returns the tokens of every question's learned answer, eos included; 0 without an answer.

    Args:
        lengths: result of `question_lengths`.
        field: one of `ANSWER_FIELDS`.
        controls: whether an "answer" that is a number or a box is a control token.
    """
    if controls and field == "answer":
        return np.where(lengths["control"] == "", lengths[field], 2).astype(np.int32)
    return lengths[field]


def _token_counts(texts: list[str | None], encode: Callable) -> np.ndarray:
    """Returns the ids of each text plus one special id; every distinct text is encoded once."""
    distinct = sorted({text for text in texts if text is not None})
    count: dict[str | None, int]
    count = {text: len(ids) + 1 for text, ids in zip(distinct, encode(distinct), strict=True)}
    return np.array([count.get(text, 0) for text in texts], np.int32)


def _keep(places: list[Path], arrays: dict[str, np.ndarray]) -> None:
    """Writes the arrays to the first writable file; if there is none, nothing is cached."""
    for file in places:
        with contextlib.suppress(UserError), files.writing(file) as out:
            np.savez(out, **arrays)  # pyright: ignore[reportArgumentType]: numpy types only one name
            return
