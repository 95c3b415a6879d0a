"""Checkpoints: the latest two for resuming, the best one for using. Orbax v1, asynchronous, atomic.

Every process writes its own shards; a run may resume on another mesh and with another number of
processes. The position is stored with a fingerprint of every array and a checksum of both, so that
reading finds later damage; a run then resumes from the checkpoint before.

    WORKDIR/checkpoints/latest/<step>   training state + position
    WORKDIR/checkpoints/best/<step>     the model's parameters at the best validation loss

The position is the global step, which determines the data order, and the few other numbers that
the training loop carries. No iterator is pickled.
"""

import errno
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from geode_jax.errors import UserError
from geode_jax.runtime.distributed import is_main, main_first
from geode_jax.sealed import seal, unseal
from geode_jax.training.checkpoint_files import (
    Unreadable,
    checked,
    fingerprint,
    first_line,
    has_metadata,
    open_checkpoint,
    read_quietly,
    refuse_others,
    shapes_of,
    silence_orbax,
    step_folders,
)
from geode_jax.training.step import TrainState


class _EverySave:
    """Orbax's save decision: it saves at every call, since the training loop decides when."""

    def should_save(self, step, previous_steps, *, context) -> bool:
        del step, previous_steps, context
        return True


def _checkpointer(folder: Path, keep: int) -> ocp.training.Checkpointer:
    return ocp.training.Checkpointer(
        str(folder),
        save_decision_policy=_EverySave(),
        # Orbax's own policy does not match Orbax's own protocol.
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),  # pyright: ignore[reportArgumentType]
        cleanup_tmp_directories=True,
    )


class Checkpoints:
    """Saves and restores a run; as a context manager it finishes all writes at the end.

    Raises:
        UserError: a checkpoint could not be written (full disk); the ones before it stay.
    """

    def __init__(self, workdir: Path, made_with: Mapping[str, str] | None = None):
        """Args:
        workdir: of the run.
        made_with: name -> checksum of what the run is made with (`runs.identity`); a
            checkpoint that stores other checksums is refused.
        """
        self._folder = workdir.absolute() / "checkpoints"
        self._made_with = dict(made_with or {})
        self._open()

    def _open(self) -> None:
        silence_orbax()
        for kind in ("latest", "best"):
            self._put_unreadable_aside(kind)
        self._latest = _checkpointer(self._folder / "latest", _KEPT["latest"])
        self._best = _checkpointer(self._folder / "best", _KEPT["best"])

    def _put_unreadable_aside(self, kind: str) -> None:
        """Renames checkpoints with unreadable metadata: Orbax reads all metadata when it opens."""
        with main_first(f"unreadable {kind} {next(_OPENED)}"):
            folders = step_folders(self._folder.parent, kind)
            readable = {int(folder.name) for folder in folders if has_metadata(folder)}
            damaged = [folder for folder in folders if int(folder.name) not in readable]
            if damaged and not readable:
                raise UserError(f"{self._folder / kind}: every checkpoint is damaged")
            # A process that is killed while it deletes an old checkpoint leaves some of its files.
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
                    newest = max(
                        int(folder.name) for folder in step_folders(self._folder.parent, kind)
                    )
                    print(f"going on from step {newest} instead", flush=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is not None and kind is not SystemExit and jax.process_count() > 1:
            return  # a wait for the other processes could hang: `distributed.ends_together`
        try:
            self.finish()
        finally:
            self._latest.close()
            self._best.close()

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Saves the training state at its step, in the background."""
        self._save(self._latest, int(position["step"]), state, position)

    def save_best(self, state: TrainState, position: dict[str, Any]) -> None:
        """Saves the model's parameters as the best so far, in the background."""
        model = {"params": state.params, "frozen": state.frozen}
        self._save(self._best, int(position["step"]), model, position)

    def _save(self, checkpointer, step: int, tree, position: dict[str, Any]) -> None:
        if any(c.step == step for c in checkpointer.checkpoints):
            return  # a resumed run passes this step again with the same state
        self.finish()
        # A copy: the loop changes `position` while the copy is written.
        own = {"made_with": self._made_with, "fingerprint": fingerprint(tree)}
        metadata = seal({**position, **own})
        try:
            checkpointer.save_checkpointables_async(step, {"state": tree}, custom_metadata=metadata)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failure(error) from error

    def finish(self) -> None:
        """Waits for background writes and raises their errors."""
        try:
            self._latest.wait()
            self._best.wait()
        except Exception as error:  # Orbax re-raises any error of its writer thread
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> UserError:
        silence_orbax()
        reason = first_line(error)
        for known in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)):
            if known in str(error):  # after much text of TensorStore's
                reason = known
        return UserError(
            f"{self._folder}: the checkpoint could not be written ({reason}); earlier ones are "
            "intact"
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns the latest undamaged training state, sharded as `like`, and its position.

        Returns:
            None if no checkpoint was saved.

        Raises:
            UserError: all are damaged, or of another configuration.
        """
        return self._restore("latest", like)

    def restore_best(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns `like` with the best parameters, and their position; None if none was saved."""
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
        if damaged:
            if found is None:
                raise UserError(f"{self._folder / kind}: every checkpoint is damaged")
            self._put_aside(kind, damaged)
            print(f"going on from step {found[1]['step']} instead", flush=True)
        return found

    def _put_aside(self, kind: str, steps: list[int]) -> None:
        """Renames damaged checkpoints, so that their steps can be saved again."""
        self._latest.close()
        self._best.close()
        with main_first(f"damaged {kind} {steps}"):
            if is_main():
                for step in steps:
                    _rename_damaged(self._folder / kind / str(step))
        self._open()

    def _load(self, checkpointer, step: int, like) -> tuple[Any, dict[str, Any]] | None:
        """Returns a checkpoint and its position; None if it is damaged for any process."""
        state, metadata = None, None
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        fits = True
        try:
            stored = read_quietly(checkpointer.checkpointables_metadata, step)
            metadata = checked(stored.custom_metadata, step)
            shapes = shapes_of(stored.metadata["state"])
            fits = not shapes or shapes == shapes_of(abstract)
            if shapes and fits:
                wanted = {"state": abstract}
                state = read_quietly(checkpointer.load_checkpointables, step, wanted)["state"]
        except (Unreadable, KeyError, TypeError, AttributeError) as error:
            print(f"{self._folder}: step {step}: {first_line(error)}", flush=True)
        if not fits:
            raise UserError(
                f"{self._folder}: the checkpoint of step {step} does not fit this "
                "configuration (another model size or optimizer?); use another --workdir"
            )
        everywhere = multihost_utils.process_allgather(np.array(state is not None))
        if metadata is None or not np.all(everywhere):
            return None
        refuse_others(f"{self._folder}: step {step}", metadata.made_with, self._made_with)
        return (state, metadata.position) if metadata.fingerprint == fingerprint(state) else None


_KEPT = {"latest": 2, "best": 1}
"""Number of checkpoints that are kept."""
_OPENED = itertools.count()


def _rename_damaged(folder: Path) -> None:
    """Renames a checkpoint to `damaged_STEP`, or to the next free name after it."""
    names = (f"damaged_{folder.name}", *(f"damaged_{folder.name}_{n}" for n in range(2, 1000)))
    folder.rename(next(p for n in names if not (p := folder.with_name(n)).exists()))


def find_model(workdir: Path) -> Path:
    """Returns the folder of a run's best checkpoint, or of its latest if it has no best one.

    Raises:
        UserError: there is none.
    """
    for kind in ("best", "latest"):
        if steps := step_folders(workdir, kind):
            return max(steps, key=lambda path: int(path.name))
    raise UserError(f"{workdir}: no checkpoint yet; training has not come to its first one")


def save_model(folder: Path, params: dict[str, jax.Array]) -> None:
    """Writes parameters as a checkpoint that `load_model` reads.

    Raises:
        UserError: it could not be written.
    """
    silence_orbax()
    model = {"params": params}
    metadata = seal({"fingerprint": fingerprint(model)})
    try:
        ocp.save_checkpointables(str(folder.absolute()), {"state": model}, custom_metadata=metadata)
    except OSError as error:
        raise UserError(f"{folder}: the checkpoint could not be written ({error})") from error


def stored_dtypes(folder: Path) -> dict[str, Any]:
    """Returns name -> dtype of what `save_model` wrote; empty if it is damaged."""
    try:
        params = _stored(open_checkpoint(folder))["params"]
        return {name: stored.dtype for name, stored in params.items()}
    except (Unreadable, KeyError, TypeError, AttributeError):
        return {}  # `load_model` raises the error


def load_model(folder: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Returns the model of a checkpoint without writing, so that a run may train at the same time.

    Args:
        folder: from `find_model`, or of `save_model`.
        like: "params" and "frozen" with `jax.ShapeDtypeStruct` leaves that have shardings.

    Raises:
        UserError: the checkpoint cannot be read, is damaged, or is one of another model.
    """
    try:
        opened = open_checkpoint(folder)
        stored = _stored(opened)
        if shapes_of({name: stored[name] for name in like}) != shapes_of(like):
            raise ValueError("other shapes")
        return _load_state(folder, like, opened)
    except (Unreadable, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}: damaged, or a checkpoint of another model ({first_line(error)})"
        ) from error


def load_leaves(
    folder: Path, like: Sequence[tuple[tuple, nnx.Variable]]
) -> list[tuple[tuple, nnx.Variable]]:
    """Returns variables by their path, whether the checkpoint has them as trainable or as frozen.

    Args:
        folder: from `find_model`.
        like: paths and variables, as of `nnx.to_flat_state`; shapes and shardings are theirs.

    Raises:
        UserError: the checkpoint cannot be read, is damaged, lacks a path or has it in another
            shape.
    """
    try:
        opened = open_checkpoint(folder)
        stored = _stored(opened)
    except (Unreadable, KeyError, TypeError, AttributeError) as error:
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
    except Unreadable as error:
        raise UserError(f"{folder}: damaged ({first_line(error)})") from error
    found = []
    for path, variable in like:
        keys = [*map(str, path), "value"]
        value = next(v for p in loaded if (v := _at(loaded[p], keys)) is not None)
        found.append((path, variable.replace(value.astype(variable.get_value().dtype))))
    return found


def _stored(opened: Any) -> Any:
    """Returns the shapes and dtypes of a checkpoint's tree; raises as `read_quietly`."""
    stored = opened.metadata["state"]
    if stored is None:  # Orbax leaves out what it cannot read
        raise Unreadable("no metadata")
    return stored


def _load_state(folder: Path, like: Any, opened: Any) -> Any:
    """Returns a part of a checkpoint's tree, checked against the fingerprint of the saved values.

    Raises:
        Unreadable: the files are damaged.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # a run's latest also holds the optimizer's state
    with context:
        loaded = read_quietly(ocp.load_checkpointables, folder.absolute(), {"state": like})["state"]
    metadata = opened.custom_metadata
    if metadata is None and not folder.name.isdecimal():
        return loaded  # a pretrained model, converted before it got a fingerprint
    if folder.name.isdecimal():
        stored = checked(metadata, int(folder.name)).fingerprint
    else:
        unsealed = unseal(metadata) if isinstance(metadata, dict) else None
        if unsealed is None:
            raise Unreadable("its fingerprint is not what was stored")
        stored = unsealed["fingerprint"]
    # As a multiset: the list does not name its arrays, and `loaded` is a part of the tree.
    if Counter(fingerprint(loaded)) - Counter(stored):
        raise Unreadable("its values are not what was stored")
    return loaded


def _at(tree: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
