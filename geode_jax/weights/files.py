"""Hugging Face folders: `config.json` beside one safetensors file, or several and an index.

`config.json` is written last: a folder without it is no model, whatever interrupted the writer.
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

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' names of the dtypes that a parameter can have."""
SHARD_BYTES = 5 * 10**9
"""A file holds at most so much unless a single tensor is larger; the default of huggingface_hub."""

_COMPANIONS = (".json", ".txt", ".jinja", ".model")
_REMOTE = Path(__file__).parent / "remote"


MAX_HEADER = 1 << 25
"""Longest header of a safetensors file, in bytes; published models need a tenth of it."""
MAX_NAME = 500
"""Longest name of a tensor."""


class Tensors:
    """The tensors of a folder; nothing but their names, shapes and dtypes is read until asked for.

    Attributes:
        shapes: name -> shape.
        dtypes: name -> numpy's name of the dtype.
    """

    def __init__(self, folder: Path):
        """Opens all files of the folder.

        Raises:
            UserError: a file is missing or damaged, or holds what is no float; or an adapter (PEFT)
                lies beside the weights, without which they are another model's.
        """
        self._folder = folder
        if adapters := sorted(path.name for path in folder.glob("adapter_*")):
            raise UserError(f"{folder}: has an adapter, {adapters[0]}: merge it first")
        if os.path.lexists(folder / WEIGHTS):
            names, mapped = [WEIGHTS], None
        elif os.path.lexists(folder / INDEX):
            names, mapped = _read_index(folder / INDEX)
        else:
            raise UserError(f"{folder}: neither {WEIGHTS} nor {INDEX} (no other format is read)")
        self._file: dict[str, safe_open] = {}
        for name in names:
            for key, file in _open(folder / name):
                if key in self._file:
                    raise UserError(f"{folder}: {key} stands in two files")
                self._file[key] = file
        if mapped is not None and mapped != set(self._file):
            odd = sorted(mapped ^ set(self._file))
            raise UserError(f"{folder / INDEX}: {len(odd)} names differ from the files': {odd[0]}")
        slices = {key: file.get_slice(key) for key, file in self._file.items()}
        self.shapes = {key: tuple(s.get_shape()) for key, s in slices.items()}
        stored = {key: s.get_dtype() for key, s in slices.items()}
        for key, dtype in stored.items():
            if dtype not in DTYPES:
                raise UserError(f"{folder}: {key} is {dtype}; only {', '.join(DTYPES)} are read")
        self.dtypes = {key: DTYPES[dtype] for key, dtype in stored.items()}

    def read(self, key: str, slices: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor.

        Raises:
            UserError: it has numbers that are not finite.
        """
        found = self._file[key].get_slice(key)[slices]
        if not np.isfinite(found).all():
            raise UserError(f"{self._folder}: {key} has NaN or infinite numbers")
        return found


def _read_index(path: Path) -> tuple[list[str], set[str]]:
    """The files of an index, and the names of the tensors in them."""
    mapped = read_json_object(path, most=MAX_HEADER).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise UserError(f"{path}: no weight_map")
    for name in mapped.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{path}: {name!r} is not a file's name")
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
    """Makes a folder for a model that is to be written.

    Raises:
        UserError: it holds something already; a model of two writings would be neither.
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
        folder: claimed.
        config: content of `config.json`.
        tensors: in one file, or where they are more than `shard_bytes` in several with an index.
        shard_bytes: see there.
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
    """Names in their order, cut before a file becomes larger than `shard_bytes`."""
    shards, size = [[]], 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensor.nbytes
    return shards


def _copy_code(folder: Path, config: dict) -> None:
    """The modelling files of `remote` that a config names, and what they share."""
    modules = {name.partition(".")[0] for name in config.get("auto_map", {}).values()}
    for path in _REMOTE.glob("modeling_*.py"):
        if modules and (path.stem in modules or path.stem == "modeling_parts"):
            write_bytes(folder / path.name, read_bytes(path))


def write_config(folder: Path, config: dict) -> None:
    """Writes `config.json`."""
    write_json(folder / CONFIG, config, indent=2)


def find_companions(folder: Path) -> list[Path]:
    """Files that belong to a model beside its weights and sizes: tokenizer, generation.

    Raises:
        UserError: one of them is no regular file, or a link that leads out of the folder.
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
    """Copies what `find_companions` found into a folder."""
    for path in companions:
        write_bytes(target / path.name, read_bytes(path))
