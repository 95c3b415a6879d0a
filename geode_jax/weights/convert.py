"""Converts Hugging Face folders to models and to checkpoints of this package, and back.

`config.json` determines the model of a folder. Parameters keep the dtypes of their tensors. Each
device reads its own part of a parameter, so no host or device needs memory for the whole model.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from tabulate import tabulate

from geode_jax.errors import UserError
from geode_jax.exports.files import one_line, read_json_object
from geode_jax.models.decoder import Decoder
from geode_jax.models.geode import Geode
from geode_jax.models.internvl import InternVL
from geode_jax.models.student import Student
from geode_jax.models.vit import InternViT
from geode_jax.sharding import abstract_model, make_mesh
from geode_jax.training.checkpoint import load_model, save_model, stored_dtypes
from geode_jax.weights import geode, internvit, qwen2, student
from geode_jax.weights.fields import check_depth, check_layers, check_parameters
from geode_jax.weights.files import (
    CONFIG,
    SHARD_BYTES,
    Tensors,
    claim,
    copy_companions,
    find_companions,
    write_config,
    write_folder,
)
from geode_jax.weights.rules import Rule, find_problems

PARAMETERS = "parameters"
"""Name of the checkpoint in an imported folder."""

_MAX_SHOWN = 3
"""Maximum number of problems of a checkpoint in an error message."""

Model = Decoder | InternViT | InternVL | Student | Geode


class Format(NamedTuple):
    """A `model_type` of Hugging Face.

    Attributes:
        build: class of the model, constructed from (config, rngs=...).
        read: (content of `config.json`, names of the tensors) -> config.
        write: config -> content of `config.json`.
        rules: config -> rules.
    """

    build: type[Any]
    read: Callable[[Mapping, Collection[str]], Any]
    write: Callable[[Any], dict]
    rules: Callable[[Any], tuple[Rule, ...]]


_DECODER = Format(Decoder, qwen2.read_decoder, qwen2.write_decoder, qwen2.decoder_rules)


def _vision(model_type: str) -> Format:
    return Format(
        InternViT,
        lambda json, tensors: internvit.read_vision(json, model_type),
        functools.partial(internvit.write_vision, model_type=model_type),
        functools.partial(internvit.vision_rules, model_type=model_type),
    )


def _internvl(model_type: str) -> Format:
    return Format(
        InternVL,
        functools.partial(internvit.read_internvl, model_type=model_type),
        functools.partial(internvit.write_internvl, model_type=model_type),
        functools.partial(internvit.internvl_rules, model_type=model_type),
    )


FORMATS = {
    "qwen2": _DECODER,
    "llama": _DECODER,
    "internvl_vision": _vision("internvl_vision"),
    "intern_vit_6b": _vision("intern_vit_6b"),
    "internvl": _internvl("internvl"),
    "internvl_chat": _internvl("internvl_chat"),
    student.MODEL_TYPE: Format(
        Student, student.read_student, student.write_student, student.student_rules
    ),
    geode.MODEL_TYPE: Format(Geode, geode.read_geode, geode.write_geode, geode.geode_rules),
}
"""Model type -> format. If a model has several, it is saved as the first, which transformers itself
reads. Folders of the last two, this package's own, hold the modelling files of `remote`."""


class Plan(NamedTuple):
    """The model that a folder's `config.json` describes, before any array exists.

    Attributes:
        json: content of `config.json`.
        config: config of the model.
        graph: structure of the model.
        leaves: path of each parameter -> variable with a sharded `jax.ShapeDtypeStruct`.
        rules: rules between the parameters and the tensors.
    """

    json: dict
    config: Any
    graph: nnx.GraphDef
    leaves: dict[str, nnx.Variable]
    rules: tuple[Rule, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path of each parameter -> shape."""
        return {leaf: variable.shape for leaf, variable in self.leaves.items()}

    def fill(self, values: Mapping[str, jax.Array]) -> Model:
        """Returns the model with these parameters."""
        flat = [
            (_path(leaf), variable.replace(values[leaf])) for leaf, variable in self.leaves.items()
        ]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))


def _path(leaf: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdecimal() else part for part in leaf.split("."))


def _leaves(state: nnx.State) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def plan(
    folder: Path, tensors: Collection[str] = (), mesh: jax.sharding.Mesh | None = None
) -> Plan:
    """Returns the model that `config.json` describes.

    Args:
        folder: a Hugging Face folder, or one that was imported from there.
        tensors: names of the tensors in the checkpoint; () = not known.
        mesh: mesh of the shardings; None: all devices.

    Raises:
        UserError: `config.json` is missing or damaged, or asks for something unsupported.
    """
    json = read_json_object(folder / CONFIG)
    kind = json.get("model_type")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise UserError(f"{folder / CONFIG}: model_type {kind!r} is none of {', '.join(FORMATS)}")
    form = FORMATS[kind]
    try:
        check_depth(json)
        if tensors:
            check_layers(json, len(tensors))
        config = form.read(json, tensors)
        model = abstract_model(lambda rngs: form.build(config, rngs=rngs), mesh or make_mesh())
        graph, state = nnx.split(model)
    except KeyError as error:
        raise UserError(f"{folder / CONFIG}: {error} is missing") from None
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    made = Plan(json, config, graph, _leaves(state), form.rules(config))
    try:
        check_parameters(made.shapes)
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    return made


def load_pretrained(folder: str | Path, *, mesh: jax.sharding.Mesh | None = None) -> Model:
    """Returns the model of a folder.

    Args:
        folder: a Hugging Face folder, or one that `import_folder` made.
        mesh: devices that get the parameters; None: all of them.

    Raises:
        UserError: the folder is damaged or unsupported; one line names the problems.
    """
    folder = Path(folder)
    if (folder / PARAMETERS).is_dir():
        return _load_imported(folder, mesh)
    _check_folder(folder)
    tensors = Tensors(folder)
    made = plan(folder, tensors.shapes, mesh)
    _refuse(folder, _problems(made, tensors))
    rules = {rule.leaf: rule for rule in made.rules}

    def read(leaf: str, variable: nnx.Variable) -> jax.Array:
        rule, shape = rules[leaf], variable.shape

        def read_part(part: tuple[slice, ...] | None) -> np.ndarray:
            return rule.read(shape, part or (slice(None),) * len(shape), tensors.read)

        return jax.make_array_from_callback(shape, variable.get_value().sharding, read_part)

    return made.fill({leaf: read(leaf, variable) for leaf, variable in made.leaves.items()})


def _load_imported(folder: Path, mesh: jax.sharding.Mesh | None) -> Model:
    made, checkpoint = plan(folder, mesh=mesh), folder / PARAMETERS
    dtypes = stored_dtypes(checkpoint)
    like = {
        leaf: jax.ShapeDtypeStruct(
            x.shape, dtypes.get(leaf, x.dtype), sharding=x.get_value().sharding
        )
        for leaf, x in made.leaves.items()
    }
    return made.fill(load_model(checkpoint, {"params": like})["params"])


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")


def _problems(made: Plan, tensors: Tensors) -> list[str]:
    found = find_problems(made.rules, made.shapes, tensors.shapes, qwen2.IGNORED)
    if found:
        return found
    for rule in made.rules:
        dtypes = {tensors.dtypes[key] for key, _ in rule.tensors(made.shapes[rule.leaf])}
        if len(dtypes) > 1:
            found.append(f"{rule.key}: has several dtypes, {', '.join(sorted(dtypes))}")
    return found


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        more = len(problems) - _MAX_SHOWN
        rest = f"; and {more} more (geode-jax convert inspect lists them)" if more > 0 else ""
        raise UserError(
            f"{folder}: does not fit its {CONFIG}: {'; '.join(problems[:_MAX_SHOWN])}{rest}"
        )


def save_pretrained(model: Model, folder: str | Path, *, model_type: str | None = None) -> None:
    """Writes a model as a Hugging Face folder: `config.json` and `model.safetensors`.

    Args:
        model: the model.
        folder: a folder that is new or empty.
        model_type: a key of `FORMATS`; None: the one that transformers itself reads.

    Raises:
        UserError: the folder is not empty, or the model cannot have this type.
    """
    write_model(model, Path(folder), model_type)


def write_model(
    model: Model,
    folder: Path,
    model_type: str | None = None,
    *,
    like: Mapping = MappingProxyType({}),
    add: Callable[[Path], None] = lambda folder: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Does the same as `save_pretrained`, with further files and entries of `config.json`.

    Args:
        model, folder, model_type: as in `save_pretrained`.
        like: further entries of `config.json`; those of the model replace them.
        add: writes further files into the folder; called before `config.json` is written.
        shard_bytes: as in `files.write_folder`.
    """
    json, form = _describe(model, model_type)
    leaves = {leaf: np.asarray(v[...]) for leaf, v in _leaves(nnx.state(model)).items()}
    tensors = {
        key: tensor
        for rule in form.rules(model.config)
        for key, tensor in rule.write(leaves[rule.leaf])
    }
    claim(folder)
    add(folder)
    write_folder(folder, _merged(like, json), tensors, shard_bytes)


def _describe(model: Model, model_type: str | None) -> tuple[dict, Format]:
    """Returns the `config.json` of a model, and its format."""
    forms = {kind: form for kind, form in FORMATS.items() if isinstance(model, form.build)}
    if not forms:
        raise UserError(f"{type(model).__name__}: no Hugging Face model has this form")
    try:
        described = [form.write(model.config) for form in forms.values()]
    except ValueError as error:
        raise UserError(f"{type(model).__name__}: {error}") from None
    json = next((j for j in described if model_type in (None, j["model_type"])), None)
    if json is None:
        kinds = ", ".join(dict.fromkeys(j["model_type"] for j in described))
        raise UserError(f"model_type {model_type!r}: this {type(model).__name__} can be {kinds}")
    counts = Counter(v.dtype.name for v in _leaves(nnx.state(model)).values())
    json["dtype"] = counts.most_common(1)[0][0]
    return json, forms[json["model_type"]]


def _merged(old: Mapping, new: Mapping) -> dict:
    """Returns `old` with the entries of `new`; nested dicts are merged, too."""
    both = {key: _merged(old[key], new[key]) for key in old.keys() & new.keys()
            if isinstance(old[key], dict) and isinstance(new[key], dict)}  # fmt: skip
    return {**old, **new, **both}


# --- the command ----------------------------------------------------------------------------------


def import_folder(source: Path, out: Path) -> Model:
    """Makes a checkpoint of this package from a Hugging Face folder, and returns the model.

    `out` gets `config.json`, the checkpoint in `parameters`, and the other files of the source,
    such as its tokenizer.

    Raises:
        UserError: the source is damaged, or `out` is not empty.
    """
    _check_folder(source)
    companions = find_companions(source)
    model = load_pretrained(source)
    json = read_json_object(source / CONFIG)
    described, _ = _describe(model, json["model_type"])
    claim(out)
    save_model(out / PARAMETERS, {k: v[...] for k, v in _leaves(nnx.state(model)).items()})
    copy_companions(companions, out)
    write_config(out, _merged(json, described))
    return model


def export_folder(source: Path, out: Path, model_type: str | None = None) -> Model:
    """Makes a Hugging Face folder from an imported one, and returns the model.

    Args:
        source: an imported folder, or a Hugging Face folder of another layout.
        out: a folder that is new or empty.
        model_type: a key of `FORMATS`; None: that of the source.

    Raises:
        UserError: the source is damaged, the model cannot have this type, or `out` is not empty.
    """
    _check_folder(source)
    companions = find_companions(source)
    model = load_pretrained(source)
    json = read_json_object(source / CONFIG)
    same = model_type in (None, json["model_type"])
    write_model(
        model,
        out,
        json["model_type"] if same else model_type,
        like=json if same else {},
        add=lambda folder: copy_companions(companions, folder),
    )
    return model


def inspect_folder(folder: Path) -> tuple[str, list[str]]:
    """Returns a table of the parameters of a Hugging Face folder, and its problems.

    Raises:
        UserError: a file is missing or damaged.
    """
    _check_folder(folder)
    tensors = Tensors(folder)
    made = plan(folder, tensors.shapes)
    rows = []
    for rule in made.rules:
        shape = made.shapes[rule.leaf]
        key, _ = next(rule.tensors(shape))
        size = " x ".join(map(str, shape))
        rows.append((rule.leaf, size, tensors.dtypes.get(key, "-"), rule.key))
    table = tabulate(rows, tablefmt="plain", disable_numparse=True)
    count = sum(math.prod(shape) for shape in made.shapes.values())
    total = f"{made.json['model_type']}: {count:,} parameters, {len(tensors.shapes)} tensors"
    # A problem may quote names of the folder's tensors.
    return f"{table}\n{total}", [one_line(problem) for problem in _problems(made, tensors)]
