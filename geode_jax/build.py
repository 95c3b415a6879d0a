"""From a configuration to the pieces of a run; the one place that reads a ConfigDict's sections."""

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx

from geode_jax import systems
from geode_jax.checkpoint import find_model
from geode_jax.checkpoint_files import (
    has_checkpoint,
    has_model,
    read_metadata,
    refuse_others,
    stored_made_with,
)
from geode_jax.data.control import BOX, REG, control_of
from geode_jax.data.mixture import parse_mixture
from geode_jax.data.pipeline import Pipeline, PipelineConfig, measure_lengths
from geode_jax.data.question_records import open_question_records
from geode_jax.data.rooms import PRODUCER, make_rooms
from geode_jax.data.sources import VERSION as RGBD_VERSION
from geode_jax.data.sources import make_rgbd_export
from geode_jax.data.tokens import Tokenizer, load_tokenizer, train_tokenizer
from geode_jax.distributed import is_main, main_first
from geode_jax.errors import UserError
from geode_jax.evaluate.evaluator import Evaluator
from geode_jax.evaluate.summary import SUMMARY
from geode_jax.exports import Export
from geode_jax.exports.files import read_json_object
from geode_jax.exports.prompts import prompt
from geode_jax.lock import beside, locked
from geode_jax.metrics import write_json
from geode_jax.models.geode import encode_frames
from geode_jax.models.internvl import INTERNVL_TOKENS
from geode_jax.models.vit import InternViT
from geode_jax.objectives.geode import learned_parts
from geode_jax.optimizer import OptimizerConfig, make_optimizer
from geode_jax.sealed import checksum
from geode_jax.sharding import make_mesh, replicated
from geode_jax.start import pretrained_folders, start_from_pretrained, start_from_run
from geode_jax.train_step import Objective, TrainState, init_state
from geode_jax.user_cache import user_cache

MIN_PIECE_COUNT = 50
"""A run of words that occurs less often in the training texts is no token of its own."""


@dataclasses.dataclass
class Run:
    """Everything `train` needs and `ask` shares with it."""

    config: ml_collections.ConfigDict
    export: Export
    tokenizer: Tokenizer
    pipelines: dict[str, Pipeline]  # train, val, test
    objective: Objective
    mesh: jax.sharding.Mesh
    graph: nnx.GraphDef
    optimizer: object
    state: TrainState  # freshly initialised
    steps: int

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """Compiled evaluation of this run's model, once for training and for the end."""
        return Evaluator(self.objective, self.graph, self.tokenizer, self.mesh)

    def train_records(self) -> Iterator[dict]:
        """The questions of the training split, which the frequency baseline knows."""
        return open_question_records(self.export, self.config.data.on_bad_scene).of_split("train")


def build(config: ml_collections.ConfigDict, workdir: Path) -> Run:
    """Data, tokenizer, model and optimizer of a run.

    Args:
        config: of a file in `configs`.
        workdir: keeps the tokenizer, which must not change between a run and its resumption.

    Raises:
        UserError, ExportError: anything the user can mend, in one line.
    """
    check_config(config)
    init_from = "" if has_checkpoint(workdir) else config.get("init_from", "")
    pretrained = pretrained_folders(init_from)
    learned = _learned(Path(init_from)) if init_from and not pretrained else frozenset()
    freezes_drm = config.system == "geode_joint" and config.model.drm.on and config.loss.vision
    if init_from and freezes_drm and "drm" not in learned:
        raise UserError(
            f"config: init_from: the rationale module has not learned in {init_from}; "
            "start from a geode_drm run, or with :drm=off"
        )
    mesh = _mesh(config)
    with main_first("data"):  # what it makes, the other processes find
        export = Export(prepare_export(config.data))
        tokenizer = prepare_tokenizer(config, export, workdir)
        pipelines = make_pipelines(config, export, tokenizer)
    train = pipelines["train"]
    steps = config.train.steps or config.train.epochs * train.steps_per_epoch
    objective = systems.make_objective(config, export, tokenizer, train)
    optimizer_config = OptimizerConfig(steps=steps, **config.optimizer.to_dict())
    graph, optimizer, state = init_state(
        objective, functools.partial(make_optimizer, optimizer_config), config.seed, mesh
    )
    if pretrained:
        sizes = objective.config.model
        longest = systems.longest_row(sizes, train)
        state = start_from_pretrained(state, pretrained, sizes.vlm, mesh, longest)
    elif init_from:
        state = start_from_run(state, Path(init_from), learned)
    if config.data.vision == "internvit/tokens":
        _check_tokens(nnx.merge(graph, state.params, state.frozen).vlm.vision, export, mesh)
    return Run(
        config, export, tokenizer, pipelines, objective, mesh, graph, optimizer, state, steps
    )


def check_config(config: ml_collections.ConfigDict) -> None:
    """Refuse values that would fail later, in words that do not name the field.

    Raises:
        UserError: the first field that breaks its rule. The data pipeline checks its own fields.
    """
    if config.get("system") not in systems.SYSTEMS:
        known = ", ".join(systems.SYSTEMS)
        raise UserError(f"config: system: {config.get('system')!r} is not one of {known}")
    _check_fields(config, missing_ok=False)


def _check_fields(config: ml_collections.ConfigDict, *, missing_ok: bool) -> None:
    for names, holds, rule in systems.rules(config.system):
        for name in names.split():
            try:
                value = functools.reduce(lambda part, key: part[key], name.split("."), config)
            except (KeyError, TypeError):
                if missing_ok:  # a run of before the field existed
                    continue
                raise UserError(f"config: {name}: missing") from None
            try:
                good = holds(value, config)
            except UserError:
                raise
            except (TypeError, ValueError, AttributeError, ArithmeticError):  # of another type
                good = False
            if not good:
                raise UserError(
                    f"config: {name}: {value if value != '' else repr(value)} is not {rule}"
                )


def _learned(run: Path) -> frozenset[str]:
    """The parts that a run has learned which a stage of GEODE starts from.

    Raises:
        UserError: there is no such run.
    """
    system = open_run(run)[0].system
    if system not in systems.GEODE_STAGES:
        raise UserError(f"config: init_from: {run} is a {system} run, not a stage of GEODE")
    return learned_parts(systems.GEODE_STAGES[system])


_TOKENS_TOLERANCE = 0.05
"""Relative error of stored tokens: bfloat16's rounding makes 0.01, another encoder 1."""


def _check_tokens(encoder: InternViT, export: Export, mesh: jax.sharding.Mesh) -> None:
    """Refuses InternViT's tokens of another encoder, judged by the export's first frame.

    Raises:
        UserError: they are.
    """
    scene_id = export.scene_ids()[0]
    found = export.read_scene(scene_id, ("images", "internvit/tokens"))
    if len(found) < 2:
        return  # nothing to compare
    stored = np.asarray(found["internvit/tokens"][0], np.float32)
    with jax.set_mesh(mesh):
        encode = jax.jit(encode_frames, out_shardings=replicated(mesh))
        made = np.asarray(encode(encoder, found["images"][:1])[0], np.float32)
    if np.linalg.norm(made - stored) > _TOKENS_TOLERANCE * np.linalg.norm(stored):
        raise UserError(
            f"{export.folder}: scene {scene_id}: internvit/tokens are of another vision encoder "
            "than this model's; geode-jax internvit makes them anew"
        )


def _mesh(config) -> jax.sharding.Mesh:
    try:
        return make_mesh(tuple(config.mesh))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"config: mesh: {error}") from None


def prepare_export(data: ml_collections.ConfigDict) -> Path:
    """The folder of the export; rooms and real RGB-D folders are made where they are missing."""
    folder = export_folder(data)
    makes = data.rgbd or data.export == "rooms"
    if makes and not (folder / "manifest.json").exists():
        with locked(beside(folder), str(folder), wait=True):
            if not (folder / "manifest.json").exists():  # made while this process waited
                _make_export(data, folder)
    elif data.export == "rooms" and not data.rgbd:
        producer = Export(folder).manifest["producer"]
        if producer != PRODUCER:
            raise UserError(
                f"{folder}: made by {producer['commit']}, this is {PRODUCER['commit']}; delete it"
            )
    return folder


def _make_export(data: ml_collections.ConfigDict, folder: Path) -> None:
    if data.rgbd:
        make_rgbd_export(
            data.rgbd,
            folder,
            intrinsic=tuple(data.rgbd_intrinsic) or None,
            depth_scale=data.rgbd_depth_scale,
        )
    else:
        make_rooms(folder, scenes=data.rooms_scenes, seed=data.rooms_seed, images=data.rooms_images)


def export_folder(data: ml_collections.ConfigDict) -> Path:
    """Where the export of a run lies, or will."""
    if data.rgbd:
        source = Path(data.rgbd).resolve()
        what = f"{RGBD_VERSION} {source} {tuple(data.rgbd_intrinsic)} {data.rgbd_depth_scale}"
        # Folders of the same name, other options, another converter: other exports.
        return Path(data.root) / f"rgbd_{source.name}_{zlib.crc32(what.encode()):08x}"
    if data.export == "rooms":
        pictures = f"_i{data.rooms_images}" if data.rooms_images else ""
        return Path(data.root) / f"rooms_{data.rooms_scenes}_s{data.rooms_seed}{pictures}"
    if not data.export:
        raise UserError("config: data.export: this size trains on your export; name its folder")
    return Path(data.export)


def prepare_tokenizer(config, export: Export, workdir: Path) -> Tokenizer:
    """The run's tokenizer: the folder in the config, or one trained on the training questions.

    GEODE's has the control tokens, and learns rationales and questions about boxes too, which the
    student is not asked. A run that starts from another takes over its tokenizer.
    """
    folder = workdir / "tokenizer"
    # Without a checkpoint nothing has learned its tokens, and what they were made of may differ.
    made = has_checkpoint(workdir) or not is_main()
    if made and (folder / "tokenizer.json").exists():
        return load_tokenizer(folder)
    geode = config.system in systems.GEODE_STAGES
    if geode and config.init_from and not pretrained_folders(config.init_from):
        start = Path(config.init_from)
        tokenizer = load_run_tokenizer(start / "tokenizer", open_run(start)[1])
    elif config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
        if not geode:
            return tokenizer
        tokenizer = tokenizer.with_tokens((*INTERNVL_TOKENS, REG, BOX))
    else:
        records = open_question_records(export, config.data.on_bad_scene)
        tokenizer = _train_tokenizer(records.of_split("train"), export.categories, geode)
    tokenizer.save(folder)
    return tokenizer


def _train_tokenizer(records: Iterable[dict], nouns: list[str], geode: bool) -> Tokenizer:
    texts = []
    for record in records:
        if geode:
            texts += [prompt(record), " " + record["answer"], " " + record.get("rationale", "")]
        elif control_of(record) != BOX:
            texts += [prompt(record), " " + record["answer"]]
    count = min(MIN_PIECE_COUNT, max(2, len(texts) // 1000))
    tokenizer = train_tokenizer(texts, nouns, min_count=count)
    return tokenizer.with_tokens((REG, BOX)) if geode else tokenizer


def pipeline_config(config, export: Export, tokenizer: Tokenizer) -> PipelineConfig:
    """What training batches look like; lengths of 0 are measured on the train split."""
    data = config.data
    field, controls = systems.answer_field(config), systems.controls(config, tokenizer)
    question, answer = data.question_length, data.answer_length
    if not (question and answer):
        lengths = measure_lengths(export, tokenizer, "train", answer_field=field, controls=controls)
        if not lengths:
            raise UserError(f"{export.folder}: no question of the train split has a {field}")
        question = question or lengths["all"].question_max
        answer = answer or lengths["all"].answer_max
    return PipelineConfig(
        export=str(export.folder),
        scenes_per_batch=data.scenes_per_batch,
        questions_per_scene=data.questions_per_scene,
        question_length=question,
        answer_length=answer,
        max_boxes=data.max_boxes,
        rows_per_scene=data.rows_per_scene,
        row_length=data.row_length,
        seed=config.seed,
        workers=data.workers,
        on_bad_scene=data.on_bad_scene,
        answer_field=field,
        controls=controls,
        kind_weights=data.kind_weights.to_dict(),
        source_weights=parse_mixture(data.get("mixture", "")),
        fraction=data.get("fraction", 1.0),
        logits=config.loss.get("logits", False),
        depth_ratio=config.model.get("depth_cells", 1),
        vision=data.vision,
    )


def make_pipelines(config, export: Export, tokenizer: Tokenizer) -> dict[str, Pipeline]:
    """Pipelines of the train, val and test splits."""
    common = pipeline_config(config, export, tokenizer)
    splits = {"train": "train", "val": "val", "test": test_split(export)}
    # Evaluation asks every question once: how often training draws one plays no part.
    asked = common.asking_all()
    return {
        name: Pipeline(export, tokenizer, common if name == "train" else asked, split)
        for name, split in splits.items()
    }


def test_split(export: Export) -> str:
    """The split that is scored: val where an export has no test."""
    return "test" if export.scene_ids("test") else "val"


def save_config(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Keep the configuration beside the run, for `ask` and for whoever reads the results."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", config.to_dict())


def is_begun(workdir: Path) -> bool:
    """Whether a folder holds a run, or what is left of one without its `config.json`."""
    return (workdir / "config.json").exists() or (workdir / SUMMARY).exists() or has_model(workdir)


_SECTIONS = ("data", "model", "loss", "optimizer", "train", "eval")


def load_config(workdir: Path) -> ml_collections.ConfigDict:
    """The configuration a run was started with.

    Raises:
        UserError: the folder is no run, or the file is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        if is_begun(workdir):
            raise UserError(
                f"{path}: missing, though the folder has a run's checkpoints or summary: put the "
                "file back from a copy, or use another --workdir"
            )
        raise UserError(f"{path}: no run was started in this folder")
    values = read_json_object(path)
    if values.get("system") not in systems.SYSTEMS:
        raise UserError(f"{path}: system: must be one of {', '.join(systems.SYSTEMS)}")
    for name in _SECTIONS:
        if not isinstance(values.get(name), dict):
            raise UserError(f"{path}: {name}: must be an object")
    try:
        config = ml_collections.ConfigDict(values)
        _check_fields(config, missing_ok=True)
    except (UserError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {error}") from None
    return config


MAY_CHANGE = ("mesh", "data/workers", "data/root", "data/on_bad_scene", "eval/examples",
              "eval/test_scenes", "train/checkpoint_every",
              "train/checkpoint_minutes")  # fmt: skip
"""Fields that a resumed run may change: they do not touch what is learned."""

_PLACES = ("data/export", "data/rgbd", "tokenizer", "init_from", "eval/blind")
"""Fields that name files, which may move."""


def made_with(
    config: ml_collections.ConfigDict, tokenizer: Tokenizer | None, export: Export | None = None
) -> dict[str, str]:
    """Checksums of what belongs to a checkpoint; stored with it (`checkpoint_files.Metadata`)."""
    left_out = (*MAY_CHANGE, *_PLACES)
    learned = {n: x for n, x in flat(plain(config)).items() if n not in left_out}
    return (
        {"configuration": checksum(learned)}
        | (_tokenizer_made(tokenizer) if tokenizer else {})
        | (export_made(export) if export else {})
    )


_TELLS_NOTHING = ("producer", "notes", "created")
"""Fields of a manifest that the content of an export does not depend on."""


def export_made(export: Export) -> dict[str, str]:
    """The export's content, wherever it lies: the sha256 of all its files are in its manifest."""
    manifest = export.manifest
    content = {name: value for name, value in manifest.items() if name not in _TELLS_NOTHING}
    scenes, questions = len(manifest["scenes"]), manifest["questions"]["count"]
    return {"export": f"{scenes} scenes, {questions} questions, checksum {checksum(content)}"}


def refuse_another_run(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Refuse to mix two runs in one folder.

    What the configuration names by its place may have moved: its content counts, where a
    checkpoint knows it.

    Raises:
        UserError: the folder holds a run of another configuration, or on another export.
        ExportError: the export is damaged.
    """
    if not is_begun(workdir):
        return
    before, stored = load_config(workdir), stored_made_with(workdir)
    old, new = flat(before.to_dict()), flat(plain(config))
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if name in MAY_CHANGE or was == now or (name in _PLACES and _same_place(was, now)):
            continue
        if name in ("data/export", "data/rgbd") and was and now and "export" in stored:
            continue  # compared below
        shared = name == "tokenizer" and was and now and config.system == "hidden_cot"
        if shared and _tokenizer_made(load_tokenizer(now)).items() <= stored.items():
            continue
        raise UserError(
            f"{workdir}: holds a run with {name} = {was}, not {now}; use another --workdir, or "
            "delete this one"
        )
    folder = export_folder(config.data)
    if "export" in stored and (folder / "manifest.json").exists():
        here = export_made(Export(folder))
        if here["export"] != stored["export"]:
            raise UserError(
                f"{workdir}: holds a run on another export ({stored['export']}) than {folder} "
                f"({here['export']}); put the run's own there, or use another --workdir"
            )


def _same_place(was: Any, now: Any) -> bool:
    """Whether two texts name one file or folder."""
    both = isinstance(was, str) and isinstance(now, str) and was and now
    return bool(both) and Path(was).resolve() == Path(now).resolve()


def same_run(config: ml_collections.ConfigDict, workdir: Path) -> bool:
    """Whether a run that `refuse_another_run` lets pass has just this configuration."""
    old, new = flat(load_config(workdir).to_dict()), flat(plain(config))
    for name in _PLACES:
        old.pop(name, None)
        new.pop(name, None)
    return old == new


def _tokenizer_made(tokenizer: Tokenizer) -> dict[str, str]:
    ids = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id)
    return {"tokenizer": checksum([tokenizer.sha256, *ids])}


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """A configuration as it is read back from a file: lists in place of tuples."""
    return json.loads(config.to_json())


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """A tree of dicts as one, with names such as `data/root`."""
    out = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{name}/")
        else:
            out[prefix + name] = value
    return out


def open_run(workdir: Path) -> tuple[ml_collections.ConfigDict, Path]:
    """The configuration of a run and the folder of its model, which belong together.

    Raises:
        UserError: the folder is no run, it has no checkpoint, or one of the two is damaged.
    """
    config, folder = load_config(workdir), find_model(workdir)
    stored = read_metadata(folder).made_with
    refuse_others(str(folder), stored, made_with(config, None))
    return config, folder


def load_run_tokenizer(folder: str | Path, checkpoint: Path) -> Tokenizer:
    """The tokenizer of a run, found to be the one that its checkpoint was trained with.

    Args:
        folder: of the tokenizer.
        checkpoint: from `open_run`.

    Raises:
        UserError: it is missing, damaged or another.
    """
    tokenizer = load_tokenizer(folder)
    stored = read_metadata(checkpoint).made_with
    refuse_others(str(checkpoint), stored, _tokenizer_made(tokenizer))
    return tokenizer


_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8  # of mallopt, malloc.h


def keep_freed_memory() -> None:
    """Memory that is freed stays with the process, where glibc manages it.

    XLA asks for a program's buffers anew at every call on a CPU. Left alone, glibc hands large ones
    back to the system each time, which then clears all pages of the next: a tenth of all CPU time.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_ARENA_MAX, 1)  # the others' heaps hold nothing that large


def keep_compiled_programs() -> None:
    """Keep them between processes: where JAX is told to, or in the user's cache if there is one."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or user_cache("xla")
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
