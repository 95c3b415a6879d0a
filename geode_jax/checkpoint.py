"""Checkpoints: the latest two for resuming, the best one for using. Orbax v1, asynchronous, atomic.

Every process writes its own shards; a run may go on with another mesh and another number of
processes. Beside the position stand a fingerprint of every array and a checksum of all that, so
that a file that was damaged later is seen whenever it is read; whoever resumes uses the checkpoint
before.

    WORKDIR/checkpoints/latest/<step>   training state + position
    WORKDIR/checkpoints/best/<step>     the model's parameters at the best validation loss

The position is the global step (the data order is a pure function of it) plus the few numbers the
loop carries: no iterator is ever pickled.
"""

import contextlib
import errno
import functools
import gc
import inspect
import itertools
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from geode_jax.distributed import is_main, main_first
from geode_jax.errors import UserError
from geode_jax.exports import files
from geode_jax.sealed import is_sealed, seal, unseal
from geode_jax.train_step import TrainState

logging.getLogger("absl").setLevel(logging.WARNING)
# Its threads log a traceback, one after the other, before the error is raised here.
logging.getLogger("absl").addFilter(
    lambda record: not (record.exc_info and "orbax" in record.pathname)
)


class _WhenAsked:
    """Save decision: the loop decides, Orbax does as told."""

    def should_save(self, step, previous_steps, *, context) -> bool:
        del step, previous_steps, context
        return True


def _checkpointer(folder: Path, keep: int) -> ocp.training.Checkpointer:
    return ocp.training.Checkpointer(
        folder,
        save_decision_policy=_WhenAsked(),
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=True,
    )


class Checkpoints:
    """Saves and restores a run; use as a context manager, so that writes are finished.

    Raises:
        UserError: a checkpoint could not be written (disk full, say); the ones before it stay.
    """

    def __init__(self, workdir: Path, made_with: Mapping[str, str] | None = None):
        """Args:
        workdir: of the run.
        made_with: what a checkpoint belongs to -> its checksum, as of `build.made_with`; one
            that names other checksums is refused.
        """
        self._folder = workdir.absolute() / "checkpoints"
        self._made_with = dict(made_with or {})
        self._open()

    def _open(self) -> None:
        _silence_failed_reads()
        for kind in ("latest", "best"):
            self._put_unreadable_aside(kind)
        self._latest = _checkpointer(self._folder / "latest", _KEPT["latest"])
        self._best = _checkpointer(self._folder / "best", _KEPT["best"])

    def _put_unreadable_aside(self, kind: str) -> None:
        """Of checkpoints whose metadata Orbax, which reads all of it at once, would fail at."""
        with main_first(f"unreadable {kind} {next(_OPENED)}"):
            folders = _steps(self._folder.parent, kind)
            readable = {int(folder.name) for folder in folders if _has_metadata(folder)}
            damaged = [folder for folder in folders if int(folder.name) not in readable]
            if damaged and not readable:
                raise UserError(f"{self._folder / kind}: every checkpoint is damaged")
            # A process that was killed while it deleted a checkpoint, which newer ones replace,
            # leaves some of its files.
            kept = sorted(readable)[-_KEPT[kind] :]
            half_deleted = [
                folder
                for folder in damaged
                if len(kept) == _KEPT[kind] and int(folder.name) < kept[0]
            ]
            damaged = [folder for folder in damaged if folder not in half_deleted]
            if is_main():
                for folder in half_deleted:
                    shutil.rmtree(folder, ignore_errors=True)
                for folder in damaged:
                    print(f"{folder}: damaged", flush=True)
                    _rename_damaged(folder)
                if damaged:
                    newest = max(int(folder.name) for folder in _steps(self._folder.parent, kind))
                    print(f"going on from step {newest} instead", flush=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is not None and kind is not SystemExit and jax.process_count() > 1:
            return  # the others may wait elsewhere, and all end: `distributed.ends_together`
        try:
            self.finish()
        finally:
            self._latest.close()
            self._best.close()

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Save the training state at its step, in the background."""
        self._save(self._latest, int(position["step"]), state, position)

    def save_best(self, state: TrainState, position: dict[str, Any]) -> None:
        """Save the model's parameters as the best so far, in the background."""
        model = {"params": state.params, "frozen": state.frozen}
        self._save(self._best, int(position["step"]), model, position)

    def _save(self, checkpointer, step: int, tree, position: dict[str, Any]) -> None:
        if any(c.step == step for c in checkpointer.checkpoints):
            return  # a resumed run passes this step again with the same state
        self.finish()
        # A copy: the loop goes on counting in `position` while this is being written.
        own = {"made_with": self._made_with, "fingerprint": fingerprint(tree)}
        metadata = seal({**position, **own})
        try:
            checkpointer.save_checkpointables_async(step, {"state": tree}, custom_metadata=metadata)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failure(error) from error

    def finish(self) -> None:
        """Finish background writes; a failure of theirs surfaces here."""
        try:
            self._latest.wait()
            self._best.wait()
        except Exception as error:  # Orbax re-raises whatever its writer thread met
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> UserError:
        _silence_failed_reads()
        reason = _first_line(error)
        for known in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)):
            if known in str(error):  # TensorStore says much before it
                reason = known
        return UserError(
            f"{self._folder}: the checkpoint could not be written ({reason}); earlier ones are "
            "intact"
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The latest undamaged training state, sharded as `like`, and its position.

        Returns:
            None at the start.

        Raises:
            UserError: all are damaged, or of another configuration.
        """
        return self._restore("latest", like)

    def restore_best(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """`like` with the best parameters, and their position; None if none was saved."""
        found = self._restore("best", {"params": like.params, "frozen": like.frozen})
        if found is None:
            return None
        model, position = found
        return TrainState(like.step, model["params"], model["frozen"], like.opt_state), position

    def _restore(self, kind: str, like) -> tuple[Any, dict[str, Any]] | None:
        self.finish()
        checkpointer = {"latest": self._latest, "best": self._best}[kind]
        steps = sorted((c.step for c in checkpointer.checkpoints), reverse=True)
        damaged: list[int] = []
        found = None
        for step in steps:
            found = self._load(checkpointer, step, like)
            if found is not None:
                break
            damaged.append(step)
            print(f"{self._folder / kind / str(step)}: damaged", flush=True)
        if damaged and found is None:
            raise UserError(f"{self._folder / kind}: every checkpoint is damaged")
        if damaged:
            self._put_aside(kind, damaged)
            print(f"going on from step {found[1]['step']} instead", flush=True)
        return found

    def _put_aside(self, kind: str, steps: list[int]) -> None:
        """Renames them, so that their steps can be saved again."""
        self._latest.close()
        self._best.close()
        with main_first(f"damaged {kind} {steps}"):
            if is_main():
                for step in steps:
                    _rename_damaged(self._folder / kind / str(step))
        self._open()

    def _load(self, checkpointer, step: int, like) -> tuple[Any, dict[str, Any]] | None:
        """A checkpoint and its position; None where it is damaged, for any process."""
        state, metadata = None, None
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        fits = True
        try:
            stored = _read(checkpointer.checkpointables_metadata, step)
            metadata = _checked(stored.custom_metadata, step)
            shapes = _shapes(stored.metadata["state"])
            fits = not shapes or shapes == _shapes(abstract)
            if shapes and fits:
                wanted = {"state": abstract}
                state = _read(checkpointer.load_checkpointables, step, wanted)["state"]
        except (_Unreadable, KeyError, TypeError, AttributeError) as error:
            print(f"{self._folder}: step {step}: {_first_line(error)}", flush=True)
        if not fits:
            raise UserError(
                f"{self._folder}: the checkpoint of step {step} does not fit this "
                "configuration (another model size or optimizer?); use another --workdir"
            )
        whole = state is not None and metadata is not None
        if not np.all(multihost_utils.process_allgather(np.array(whole))):
            return None
        refuse_others(f"{self._folder}: step {step}", metadata.made_with, self._made_with)
        return (state, metadata.position) if metadata.fingerprint == fingerprint(state) else None


_METADATA = "_CHECKPOINT_METADATA"
_KEPT = {"latest": 2, "best": 1}
"""How many checkpoints of a kind are kept."""
_OPENED = itertools.count()


def _has_metadata(folder: Path) -> bool:
    """Whether a checkpoint has metadata, which is a JSON object of fields that Orbax knows."""
    try:
        _opened(folder)
    except _Unreadable:
        return False
    return (folder / _METADATA).exists()


def _rename_damaged(folder: Path) -> None:
    """To `damaged_STEP`, or the next free name after it."""
    names = (f"damaged_{folder.name}", *(f"damaged_{folder.name}_{n}" for n in range(2, 1000)))
    folder.rename(next(p for n in names if not (p := folder.with_name(n)).exists()))


class Metadata(NamedTuple):
    """What stands beside the arrays of a checkpoint.

    Attributes:
        position: of the loop; has `step`.
        fingerprint: a number of every array, in the order of the saved tree's leaves.
        made_with: what the checkpoint belongs to -> its checksum; empty in older ones.
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


def _checked(metadata: Any, step: int) -> Metadata:
    """A checkpoint's metadata, of the step that its folder names.

    Raises:
        _Unreadable: it is damaged.
    """
    if not isinstance(metadata, dict):
        raise _Unreadable("no position is stored")
    if is_sealed(metadata):
        position = unseal(metadata)
        if position is None:
            raise _Unreadable("its position is not what was stored")
    else:
        position = dict(metadata)
        wrong = [n for n, holds in _UNSEALED.items() if n not in position or not holds(position[n])]
        if wrong := [*wrong, *(position.keys() - _UNSEALED.keys())]:
            raise _Unreadable(f"its position has no, or a wrong, {wrong[0]}")
    if position.get("step") != step:
        raise _Unreadable(f"its position is of step {position.get('step')}")
    return Metadata(position, position.pop("fingerprint"), position.pop("made_with", {}))


def refuse_others(where: str, stored: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Refuses a checkpoint that belongs to another configuration, tokenizer or export.

    Args:
        where: begins the message.
        stored: of `Metadata.made_with`.
        own: the same of what is here.

    Raises:
        UserError: a name that both have stands for another checksum.
    """
    for name in stored.keys() & own.keys():
        if stored[name] != own[name]:
            raise UserError(
                f"{where}: was made with another {name} than the one here ({stored[name]}, not "
                f"{own[name]}): it was changed or damaged since"
            )


class _Unreadable(Exception):
    """What the reading of damaged files ended in, in one line."""


def _read(read: Callable[..., Any], *arguments) -> Any:
    """`read(*arguments)`, a function of Orbax's.

    Raises:
        _Unreadable: the files are damaged, or not what was asked for.
    """
    _silence_failed_reads()
    try:
        return read(*arguments)
    except Exception as error:  # damaged files raise whatever they end in
        failure = _first_line(error)
    gc.collect()  # abandoned reads, which the error's traceback kept
    raise _Unreadable(failure)


@functools.cache
def _silence_failed_reads() -> None:
    """Keeps Orbax's failed reads from printing more than their error, from now on.

    It warns of every file that it cannot read. At the first failure it closes its event loop: a
    read still under way then ends in an error that nobody waits for, in TensorStore's thread, which
    finds the loop closed, or when its coroutine is collected, or in one that asyncio logs.
    """

    def no_warning(record):
        return record.levelno > logging.WARNING or "orbax" not in record.pathname

    def no_abandoned_read(record):
        said = record.getMessage()
        return not ("orbax" in said or "tensorstore" in said)

    # Filters, and no levels: absl's are set anew where its flags are parsed.
    logging.getLogger("absl").addFilter(no_warning)
    logging.getLogger("asyncio").addFilter(no_abandoned_read)
    others = sys.unraisablehook

    def hook(unraisable):
        of, error = unraisable.object, unraisable.exc_value
        abandoned = inspect.iscoroutine(of) and "orbax" in of.cr_code.co_filename
        half_made = "'_ssock'" in str(error)  # an event loop for which there was no file left
        if not (abandoned or half_made or str(error) == "Event loop is closed"):
            others(unraisable)

    sys.unraisablehook = hook


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def fingerprint(tree) -> list[int]:
    """A number of every array: the sum of its bits read as integers, the same on every mesh."""
    return np.asarray(_bit_sums(jax.tree.leaves(tree))).tolist()


@jax.jit
def _bit_sums(leaves: list[jax.Array]) -> jax.Array:
    def bits(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        return x

    return jnp.stack([jnp.sum(bits(x).astype(jnp.uint32), dtype=jnp.uint32) for x in leaves])


def _shapes(tree) -> list[tuple[int, ...]]:
    """The shapes of a tree, to be compared before reading: Orbax's failed read leaves tasks behind.

    Sorted, because a stored tree is of dicts, whose order is another.
    """
    return sorted(tuple(x.shape) for x in jax.tree.leaves(tree))


def _steps(workdir: Path, kind: str) -> list[Path]:
    """The finished checkpoints of a kind, "best" or "latest"."""
    # A checkpoint gets its final name, the step, when it is complete.
    found = (workdir / "checkpoints" / kind).glob("*")
    return [path for path in found if path.name.isdecimal()]


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run in this folder would resume."""
    return bool(_steps(workdir, "latest"))


def has_model(workdir: Path) -> bool:
    """Whether a folder has any checkpoint of a run."""
    return any(_steps(workdir, kind) for kind in ("best", "latest"))


def find_model(workdir: Path) -> Path:
    """The folder of a run's best checkpoint, or of its latest where none was best yet.

    Raises:
        UserError: there is none.
    """
    for kind in ("best", "latest"):
        if steps := _steps(workdir, kind):
            return max(steps, key=lambda path: int(path.name))
    raise UserError(f"{workdir}: no checkpoint yet; training has not come to its first one")


def stored_made_with(workdir: Path) -> dict[str, str]:
    """What a run's checkpoints say they were made with; empty where none can be read."""
    for kind in ("latest", "best"):
        for folder in _steps(workdir, kind):
            with contextlib.suppress(UserError):  # damage is said where the arrays are read
                return read_metadata(folder).made_with
    return {}


def read_metadata(folder: Path) -> Metadata:
    """What stands beside the arrays of a run's checkpoint.

    Args:
        folder: from `find_model`.

    Raises:
        UserError: it is damaged.
    """
    try:
        return _checked(_opened(folder).custom_metadata, int(folder.name))
    except _Unreadable as error:
        raise UserError(f"{folder}: damaged: {_first_line(error)}") from None


def save_model(folder: Path, params: dict[str, jax.Array]) -> None:
    """Writes parameters as a checkpoint that `load_model` reads.

    Raises:
        UserError: it could not be written.
    """
    model = {"params": params}
    metadata = seal({"fingerprint": fingerprint(model)})
    try:
        ocp.save_checkpointables(folder.absolute(), {"state": model}, custom_metadata=metadata)
    except OSError as error:
        raise UserError(f"{folder}: the checkpoint could not be written ({error})") from error


def stored_dtypes(folder: Path) -> dict[str, Any]:
    """The dtypes of what `save_model` wrote, by name; empty where it is damaged."""
    try:
        params = _stored(_opened(folder))["params"]
        return {name: stored.dtype for name, stored in params.items()}
    except (_Unreadable, KeyError, TypeError, AttributeError):
        return {}  # `load_model` says it


def load_model(folder: Path, like: dict[str, Any]) -> dict[str, Any]:
    """The model of a checkpoint, to be used; nothing is written, the run may still be going on.

    Args:
        folder: from `find_model`, or of `save_model`.
        like: "params" and "frozen" with `jax.ShapeDtypeStruct` leaves that have shardings.

    Raises:
        UserError: the checkpoint cannot be read, is damaged, or is one of another model.
    """
    try:
        opened = _opened(folder)
        stored = _stored(opened)
        if _shapes({name: stored[name] for name in like}) != _shapes(like):
            raise ValueError("other shapes")
        return _load_state(folder, like, opened)
    except (_Unreadable, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}: damaged, or a checkpoint of another model ({_first_line(error)})"
        ) from error


def load_leaves(
    folder: Path, like: Sequence[tuple[tuple, nnx.Variable]]
) -> list[tuple[tuple, nnx.Variable]]:
    """Variables by their path, from wherever a checkpoint has them, trainable or frozen there.

    Args:
        folder: from `find_model`.
        like: paths and variables, as of `nnx.to_flat_state`; shapes and shardings are theirs.

    Raises:
        UserError: the checkpoint cannot be read, is damaged, lacks a path or has it in another
            shape.
    """
    try:
        opened = _opened(folder)
        stored = _stored(opened)
    except (_Unreadable, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: damaged, or no checkpoint") from error
    wanted: dict[str, Any] = {}
    for path, variable in like:
        keys = [*map(str, path), "value"]
        place = next((p for p in ("params", "frozen") if _at(stored.get(p), keys)), None)
        name = ".".join(keys[:-1])
        if place is None:
            raise UserError(f"{folder}: its model has no {name}")
        there = _at(stored[place], keys)
        if tuple(there.shape) != variable.shape:
            shape = tuple(there.shape)
            raise UserError(f"{folder}: {name} is {shape} there and {variable.shape} here")
        node = wanted
        for key in (place, *keys[:-1]):
            node = node.setdefault(key, {})
        sharding = variable.get_value().sharding
        node["value"] = jax.ShapeDtypeStruct(there.shape, there.dtype, sharding=sharding)
    try:
        loaded = _load_state(folder, wanted, opened)
    except _Unreadable as error:
        raise UserError(f"{folder}: damaged ({_first_line(error)})") from error
    found = []
    for path, variable in like:
        keys = [*map(str, path), "value"]
        value = next(v for p in loaded if (v := _at(loaded[p], keys)) is not None)
        found.append((path, variable.replace(value.astype(variable.get_value().dtype))))
    return found


def _opened(folder: Path) -> Any:
    """Orbax's description of a checkpoint.

    Raises:
        _Unreadable: it is damaged, or one of its files is a pipe, a device or a link to nothing:
            Orbax would wait for the first and fill the memory from the second.
    """
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            if not path.is_file():
                raise _Unreadable(f"{path.relative_to(folder)} is not a regular file")
    try:
        if (folder / _METADATA).exists():
            files.read_json_object(folder / _METADATA, nan=True)
    except UserError as error:
        raise _Unreadable(str(error)) from None
    return _read(ocp.checkpointables_metadata, folder.absolute())


def _stored(opened: Any) -> Any:
    """The tree that a checkpoint holds, of shapes and dtypes; errors as of `_read`."""
    stored = opened.metadata["state"]
    if stored is None:  # Orbax goes on without what it cannot read
        raise _Unreadable("no metadata")
    return stored


def _load_state(folder: Path, like: Any, opened: Any) -> Any:
    """A part of a checkpoint's tree, found to have the values that were saved.

    Raises:
        _Unreadable: the files are damaged.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # a run's latest also holds the optimizer's state
    with context:
        loaded = _read(ocp.load_checkpointables, folder.absolute(), {"state": like})["state"]
    metadata = opened.custom_metadata
    if metadata is None and not folder.name.isdecimal():
        return loaded  # a pretrained model, converted before it got a fingerprint
    if folder.name.isdecimal():
        stored = _checked(metadata, int(folder.name)).fingerprint
    else:
        unsealed = unseal(metadata) if isinstance(metadata, dict) else None
        if unsealed is None:
            raise _Unreadable("its fingerprint is not what was stored")
        stored = unsealed["fingerprint"]
    # As a bag: a part of the tree has no place of its own in the list.
    if Counter(fingerprint(loaded)) - Counter(stored):
        raise _Unreadable("its values are not what was stored")
    return loaded


def _at(tree: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
