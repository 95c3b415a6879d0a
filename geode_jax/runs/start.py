"""Where a stage's parameters come from: another run, or folders of pretrained models.

`init_from` names a run, or pretrained folders with commas between them (from Hugging Face, or
imported by `geode-jax convert`): a decoder, a vision encoder, or an InternVL, which has both and
their projector. Parts that are in no folder start from random numbers.
"""

import dataclasses
import os
from collections.abc import Set
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from geode_jax.errors import UserError
from geode_jax.exports.files import read_json_object
from geode_jax.models.decoder import Decoder
from geode_jax.models.internvl import InternVL, InternVLConfig
from geode_jax.models.vit import InternViT
from geode_jax.training.checkpoint import find_model, load_leaves
from geode_jax.training.step import TrainState
from geode_jax.weights.convert import load_pretrained
from geode_jax.weights.files import CONFIG

PLACE: dict[type, tuple[str, ...]] = {
    InternVL: ("vlm",),
    Decoder: ("vlm", "decoder"),
    InternViT: ("vlm", "vision"),
}
"""Class of a pretrained model -> its path in `Geode`."""

_RUN_FIELDS = ("dtype", "remat", "image_id")
"""Fields of a model's configuration in which a run may differ from the pretrained model."""


def pretrained_folders(init_from: str) -> list[Path]:
    """Returns the pretrained folders that `init_from` names; none if it names a run.

    Raises:
        UserError: a folder is missing, or several are named and one is a run.
    """
    folders = [Path(part.strip()) for part in init_from.split(",") if part.strip()]
    kinds = [is_pretrained(folder) for folder in folders]
    if not all(kinds) and (any(kinds) or len(kinds) > 1):
        wrong = folders[kinds.index(False)]
        raise UserError(f"config: init_from: {wrong} has no {CONFIG} of a pretrained model")
    return folders if any(kinds) else []


def is_pretrained(folder: Path) -> bool:
    """Returns whether a folder holds a pretrained model, and not a run."""
    return os.path.lexists(folder / CONFIG) and "model_type" in read_json_object(folder / CONFIG)


def start_from_run(state: TrainState, run: Path, parts: Set[str]) -> TrainState:
    """Returns the state with the learned parts of another run, trainable and frozen.

    Args:
        state: freshly initialised.
        run: its work directory.
        parts: names of parts; a parameter that belongs to none of them is left as it is.

    Raises:
        UserError: the run has no checkpoint, or its model lacks a part of this one.
    """
    folder = find_model(run)

    def filled(state):
        flat = dict(nnx.to_flat_state(state))
        learned = [(path, leaf) for path, leaf in flat.items() if parts & {*path}]
        if learned:  # Orbax reads no empty tree
            flat |= dict(load_leaves(folder, learned))
        return nnx.from_flat_state(list(flat.items()))

    return dataclasses.replace(state, params=filled(state.params), frozen=filled(state.frozen))


def start_from_pretrained(
    state: TrainState,
    folders: list[Path],
    config: InternVLConfig,
    mesh: jax.sharding.Mesh,
    positions: int,
) -> TrainState:
    """Returns the state with the parameters of pretrained models; shardings and dtypes stay.

    Args:
        state: freshly initialised.
        folders: of `pretrained_folders`.
        config: of the vision encoder and decoder in `state`.
        mesh: of its shardings.
        positions: the most positions of a row of text in the run.

    Raises:
        UserError: a folder is damaged, its sizes differ from the run's, its rotary positions would
            differ in so long a row, or two folders hold the same part.
    """
    params, frozen = (dict(nnx.to_flat_state(part)) for part in (state.params, state.frozen))
    filled: dict[tuple, Path] = {}
    for folder in folders:
        model = load_pretrained(folder, mesh=mesh)
        if type(model) not in PLACE:
            raise UserError(
                f"config: init_from: {folder} holds a whole {type(model).__name__}; start from the "
                "run that it was exported from, or from a decoder, a vision encoder or an InternVL"
            )
        _refuse_other_sizes(folder, model, config, positions)
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            place = (*PLACE[type(model)], *path)
            if place in filled:
                raise UserError(
                    f"config: init_from: {folder} and {filled[place]} both have {place[1]}"
                )
            filled[place] = folder
            part = params if place in params else frozen
            own = part[place].get_value()
            value = jax.device_put(variable.get_value().astype(own.dtype), own.sharding)
            part[place] = part[place].replace(value)
    params, frozen = (nnx.from_flat_state(list(flat.items())) for flat in (params, frozen))
    return dataclasses.replace(state, params=params, frozen=frozen)


def _refuse_other_sizes(
    folder: Path, model: nnx.Module, config: InternVLConfig, positions: int
) -> None:
    for place, theirs in _described(model):
        ours: Any = config
        for name in place:
            ours = getattr(ours, name)
        for field in dataclasses.fields(ours):
            here, there = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name == "dynamic_rope" and there and positions <= there[0]:
                continue  # rows of up to the trained length have plain rotary positions
            if here != there and field.name not in _RUN_FIELDS:
                name = f"model.{'.'.join(place)}.{field.name}"
                raise UserError(f"config: {name}: {here}, and {there} in {folder}")


def _described(model: nnx.Module) -> list[tuple[tuple[str, ...], Any]]:
    """Returns parts of a model, as `InternVLConfig` names them, with their configurations."""
    if isinstance(model, InternVL):
        return [(("vision",), model.config.vision), (("decoder",), model.config.decoder)]
    assert isinstance(model, Decoder | InternViT)
    return [(PLACE[type(model)][1:], model.config)]
