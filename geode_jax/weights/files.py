"""Reads and writes Hugging Face folders: `config.json` and one safetensors file, or several and an
index.

`config.json` is written last, so a folder of an interrupted writer has none and is no model.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from geode_jax.exports import tensor_files
from geode_jax.exports.files import (
    UserError,
    cannot_write,
    open_regular,
    read_bytes,
    read_json_object,
    refuse_foreign_link,
    write_bytes,
    write_json,
)
from geode_jax.weights.fields import PARAMETER_DTYPES

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {tensor_files.STORED[name]: name for name in PARAMETER_DTYPES}
"""safetensors' name of each dtype that a parameter can have -> numpy's name."""
SHARD_BYTES = 5 * 10**9
"""Maximum size of a file unless a single tensor is larger; the default of huggingface_hub."""

_COMPANIONS = (".json", ".txt", ".jinja", ".model")
_REMOTE = Path(__file__).parent / "remote"


MAX_HEADER = 1 << 25
"""Maximum length of the header of a safetensors file, in bytes; published models need a tenth."""
MAX_NAME = 500
"""Maximum length of the name of a tensor."""


class Tensors:
    """The tensors of a folder; opening it reads their names, shapes and dtypes alone.

    Attributes:
        shapes: name -> shape.
        dtypes: name -> numpy's name of the dtype.
    """

    def __init__(self, folder: Path):
        """Opens all files of the folder.

        Raises:
            UserError: a file is missing or damaged, or has a tensor that is not float, or the
                folder has an adapter (PEFT), without which the weights are another model's.
        """
        self._folder = folder
        if adapters := sorted(path.name for path in folder.glob("adapter_*")):
            raise UserError(f"{folder}: has an adapter, {adapters[0]}: merge it first")
        if os.path.lexists(folder / WEIGHTS):
            names, mapped = [WEIGHTS], None
        elif os.path.lexists(folder / INDEX):
            names, mapped = _read_index(folder / INDEX)
        else:
            raise UserError(
                f"{folder}: has neither {WEIGHTS} nor {INDEX} (no other format is read)"
            )
        self._file: dict[str, safe_open] = {}
        for name in names:
            for key, file in _open(folder / name):
                if key in self._file:
                    raise UserError(f"{folder}: two files have a tensor {key}")
                self._file[key] = file
        if mapped is not None and mapped != set(self._file):
            odd = sorted(mapped ^ set(self._file))
            raise UserError(f"{folder / INDEX}: {len(odd)} names differ from the files: {odd[0]}")
        slices = {key: file.get_slice(key) for key, file in self._file.items()}
        self.shapes = {key: tuple(s.get_shape()) for key, s in slices.items()}
        stored = {key: s.get_dtype() for key, s in slices.items()}
        for key, dtype in stored.items():
            if dtype not in DTYPES:
                raise UserError(f"{folder}: {key} is {dtype}; only {', '.join(DTYPES)} are read")
        self.dtypes = {key: DTYPES[dtype] for key, dtype in stored.items()}

    def read(self, key: str, slices: tuple[slice, ...]) -> np.ndarray:
        """Returns a part of a tensor.

        Raises:
            UserError: the part has NaN or infinite numbers.
        """
        found = self._file[key].get_slice(key)[slices]
        if not np.isfinite(found).all():
            raise UserError(f"{self._folder}: {key} has NaN or infinite numbers")
        return found


def _read_index(path: Path) -> tuple[list[str], set[str]]:
    """Returns the files of an index, and the names of the tensors in them."""
    mapped = read_json_object(path, most=MAX_HEADER).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise UserError(f"{path}: no weight_map")
    for name in mapped.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{path}: {name!r} is not the name of a file")
    return sorted(set(mapped.values())), set(mapped)


def _open(path: Path) -> list[tuple[str, safe_open]]:
    if not os.path.lexists(path):
        raise UserError(f"{path}: missing, and {INDEX} names it")
    with open_regular(path) as file:  # the library would wait for a pipe
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise UserError(f"{path}: damaged: a header of {length:,} bytes, at most {MAX_HEADER:,}")
    try:
        file = safe_open(path, framework="np")
        keys = file.keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or cut off ({error})") from None
    if long := next((key for key in keys if len(key) > MAX_NAME), None):
        raise UserError(f"{path}: a name of {len(long):,} characters, at most {MAX_NAME}")
    return [(key, file) for key in keys]


def claim(folder: Path) -> None:
    """Makes a folder for a model that is about to be written.

    Raises:
        UserError: the folder is not empty, so it could end with files of two models.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty = not any(folder.iterdir())
    except OSError as error:
        raise cannot_write(folder, error) from None
    if not empty:
        raise UserError(f"{folder}: not empty; name a new folder")


def write_folder(
    folder: Path, config: dict, tensors: Mapping[str, np.ndarray], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the tensors, the modelling files that `auto_map` names, and `config.json`.

    Args:
        folder: an empty folder, see `claim`.
        config: content of `config.json`.
        tensors: name -> array.
        shard_bytes: tensors that need more are written to several files and an index.
    """
    shards = _shards(tensors, shard_bytes)
    names = [WEIGHTS]
    if len(shards) > 1:
        stem = WEIGHTS.removesuffix(".safetensors")
        names = [
            f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
        ]
    for name, keys in zip(names, shards, strict=True):
        stored = {}
        for key in keys:
            array = np.ascontiguousarray(tensors[key]).reshape(tensors[key].shape)
            stored[key] = tensor_files.STORED[array.dtype.name], array
        write_bytes(folder / name, tensor_files.chunks(stored, {"format": "pt"}))
    if len(shards) > 1:
        mapped = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": mapped}
        write_json(folder / INDEX, index, indent=2)
    _copy_code(folder, config)
    write_config(folder, config)


def _shards(tensors: Mapping[str, np.ndarray], shard_bytes: int) -> list[list[str]]:
    """Returns the names in their order, split so that no file exceeds `shard_bytes`."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensor.nbytes
    return shards


def _copy_code(folder: Path, config: dict) -> None:
    """Copies the modelling files of `remote` that a config names, and the one that they share."""
    modules = {name.partition(".")[0] for name in config.get("auto_map", {}).values()}
    for path in _REMOTE.glob("modeling_*.py"):
        if modules and (path.stem in modules or path.stem == "modeling_parts"):
            write_bytes(folder / path.name, read_bytes(path))


def write_config(folder: Path, config: dict) -> None:
    """Writes `config.json`."""
    write_json(folder / CONFIG, config, indent=2)


def find_companions(folder: Path) -> list[Path]:
    """Returns the files of a model beside weights and `config.json`, such as its tokenizer.

    Raises:
        UserError: one of them is not a regular file, or is a link that leads out of the folder.
    """
    found = []
    for path in sorted(folder.iterdir()):
        index = path.name.endswith(".index.json")
        if path.suffix in _COMPANIONS and path.name != CONFIG and not index:
            refuse_foreign_link(path)
            open_regular(path).close()
            found.append(path)
    return found


def copy_companions(companions: Sequence[Path], target: Path) -> None:
    """Copies the result of `find_companions` into a folder."""
    for path in companions:
        write_bytes(target / path.name, read_bytes(path))
