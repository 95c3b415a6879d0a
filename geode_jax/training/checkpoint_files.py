"""Reads and checks the folder of a checkpoint: its position, fingerprint and checksum.

Damage raises `Unreadable`, in one line, before Orbax waits for a file or prints about it.
"""

import contextlib
import functools
import gc
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from geode_jax.errors import UserError
from geode_jax.exports import files
from geode_jax.runtime.devices import find_devices
from geode_jax.sealed import is_sealed, unseal

_METADATA = "_CHECKPOINT_METADATA"


def has_metadata(folder: Path) -> bool:
    """Returns whether a checkpoint has metadata that Orbax can read."""
    try:
        open_checkpoint(folder)
    except Unreadable:
        return False
    return (folder / _METADATA).exists()


class Metadata(NamedTuple):
    """What a checkpoint stores besides its arrays.

    Attributes:
        position: of the training loop; has `step`.
        fingerprint: one number per array, in the order of the saved tree's leaves.
        made_with: name -> checksum of what the run is made with; empty in older checkpoints.
    """

    position: dict[str, Any]
    fingerprint: list[int]
    made_with: dict[str, str]


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


_UNSEALED: dict[str, Callable[[Any], bool]] = {
    "step": _count,
    "seconds": lambda value: _number(value) and 0 <= value < float("inf"),
    "skipped": _count,
    "best": lambda value: isinstance(value, dict) and all(map(_number, value.values())),
    "worse": _count,
    "stopped_early": lambda value: type(value) is bool,
    "fingerprint": lambda value: isinstance(value, list) and all(map(_count, value)),
}
"""The fields of checkpoints that were written before they had a checksum."""


def checked(metadata: Any, step: int) -> Metadata:
    """Returns a checkpoint's metadata, checked against the step that its folder names.

    Raises:
        Unreadable: it is damaged.
    """
    if not isinstance(metadata, dict):
        raise Unreadable("no position is stored")
    if is_sealed(metadata):
        position = unseal(metadata)
        if position is None:
            raise Unreadable("its position is not what was stored")
    else:
        position = dict(metadata)
        wrong = [n for n, holds in _UNSEALED.items() if n not in position or not holds(position[n])]
        if wrong := [*wrong, *(position.keys() - _UNSEALED.keys())]:
            raise Unreadable(f"its position has no, or a wrong, {wrong[0]}")
    if position.get("step") != step:
        raise Unreadable(f"its position is of step {position.get('step')}")
    return Metadata(position, position.pop("fingerprint"), position.pop("made_with", {}))


def refuse_others(where: str, stored: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Refuses a checkpoint that was made with another configuration, tokenizer or export.

    Args:
        where: start of the message.
        stored: `Metadata.made_with` of the checkpoint.
        own: that of the run.

    Raises:
        UserError: the checksums of a name that both have differ.
    """
    for name in stored.keys() & own.keys():
        if stored[name] != own[name]:
            raise UserError(
                f"{where}: was made with another {name} than the one here ({stored[name]}, not "
                f"{own[name]}): it was changed or damaged since"
            )


class Unreadable(Exception):
    """The files are damaged; the message is one line."""


def read_quietly(read: Callable[..., Any], *arguments) -> Any:
    """Returns `read(*arguments)`, a function of Orbax.

    Raises:
        Unreadable: the files are damaged, or hold something else.
        UserError: there is no device, without which Orbax reads nothing.
    """
    silence_orbax()
    find_devices()  # a device that is missing is no damage
    try:
        return read(*arguments)
    except Exception as error:  # damaged files raise errors of any type
        failure = first_line(error)
    gc.collect()  # collects abandoned reads that the error's traceback kept alive
    raise Unreadable(failure)


def silence_orbax() -> None:
    """Drops what Orbax logs and prints besides the errors that it raises, from now on.

    It logs every save, warns of every file that it cannot read, and its threads log the traceback
    of an error before it is raised. At the first failed read it closes its event loop. Reads still
    under way then end in errors of their own: in TensorStore's thread, which finds the loop closed;
    in a coroutine that is collected; or in one that asyncio logs. Records of other libraries, and
    the levels of their loggers, stay as they are.
    """
    _filter_records()
    others = sys.unraisablehook
    if getattr(others, "drops_abandoned_reads", False):
        return

    def hook(unraisable):
        of, error = unraisable.object, unraisable.exc_value
        abandoned = inspect.iscoroutine(of) and "orbax" in of.cr_code.co_filename
        half_made = "'_ssock'" in str(error)  # an event loop for which there was no file left
        if not (abandoned or half_made or str(error) == "Event loop is closed"):
            others(unraisable)

    hook.drops_abandoned_reads = True  # another library may have put its own hook in place
    sys.unraisablehook = hook


@functools.cache
def _filter_records() -> None:
    """Filters what Orbax logs by absl and by asyncio, once."""

    def not_of_orbax(record):
        serious = record.levelno > logging.WARNING and not record.exc_info
        return serious or "orbax" not in record.pathname

    def no_abandoned_read(record):
        message = record.getMessage()
        return not ("orbax" in message or "tensorstore" in message)

    # Filters, and no levels: absl's are set anew where its flags are parsed.
    logging.getLogger("absl").addFilter(not_of_orbax)
    logging.getLogger("asyncio").addFilter(no_abandoned_read)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def fingerprint(tree) -> list[int]:
    """Returns one number per array, the sum of its bits as integers; the same on every mesh."""
    return np.asarray(_bit_sums(jax.tree.leaves(tree))).tolist()


@jax.jit
def _bit_sums(leaves: list[jax.Array]) -> jax.Array:
    def bits(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        return x

    return jnp.stack([jnp.sum(bits(x).astype(jnp.uint32), dtype=jnp.uint32) for x in leaves])


def shapes_of(tree) -> list[tuple[int, ...]]:
    """Returns the sorted shapes of a tree, to compare before reading.

    A failed read of Orbax leaves tasks behind. Sorted, because a stored tree is made of dicts in
    another order.
    """
    return sorted(tuple(x.shape) for x in jax.tree.leaves(tree))


def step_folders(workdir: Path, kind: str) -> list[Path]:
    """Returns the folders of the finished checkpoints of a kind, "best" or "latest"."""
    # A checkpoint gets its final name, the step, when it is complete.
    found = (workdir / "checkpoints" / kind).glob("*")
    return [path for path in found if path.name.isdecimal()]


def has_checkpoint(workdir: Path) -> bool:
    """Returns whether a run in this folder would resume."""
    return bool(step_folders(workdir, "latest"))


def has_model(workdir: Path) -> bool:
    """Returns whether a folder has any checkpoint of a run."""
    return any(step_folders(workdir, kind) for kind in ("best", "latest"))


def stored_made_with(workdir: Path) -> dict[str, str]:
    """Returns `Metadata.made_with` of a run's checkpoints; empty if none can be read."""
    for kind in ("latest", "best"):
        for folder in step_folders(workdir, kind):
            with contextlib.suppress(UserError):  # reading the arrays reports damage
                return read_metadata(folder).made_with
    return {}


def read_metadata(folder: Path) -> Metadata:
    """Returns the metadata of a run's checkpoint.

    Args:
        folder: from `find_model`.

    Raises:
        UserError: it is damaged.
    """
    try:
        return checked(open_checkpoint(folder).custom_metadata, int(folder.name))
    except Unreadable as error:
        raise UserError(f"{folder}: damaged: {first_line(error)}") from None


def open_checkpoint(folder: Path) -> Any:
    """Returns Orbax's description of a checkpoint.

    Raises:
        Unreadable: it is damaged, or one of its files is a pipe, on which Orbax would wait, a
            device, from which it would fill the memory, or a broken link.
    """
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            if not path.is_file():
                raise Unreadable(f"{path.relative_to(folder)} is not a regular file")
    try:
        if (folder / _METADATA).exists():
            files.read_json_object(folder / _METADATA, nan=True)
    except UserError as error:
        raise Unreadable(str(error)) from None
    return read_quietly(ocp.checkpointables_metadata, folder.absolute())
