"""From a configuration to the pieces of a run; the one place that reads a ConfigDict's sections."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections
import numpy as np
from flax import nnx

from geode_jax.data.pipeline import Pipeline
from geode_jax.data.question_records import open_question_records
from geode_jax.data.tokens import Tokenizer
from geode_jax.errors import UserError
from geode_jax.evaluate.evaluator import Evaluator
from geode_jax.exports import Export
from geode_jax.models.geode import encode_frames
from geode_jax.models.vit import InternViT
from geode_jax.objectives.base import Objective
from geode_jax.objectives.geode import learned_parts
from geode_jax.runs import systems
from geode_jax.runs.config import check_config
from geode_jax.runs.data import make_pipelines, prepare_tokenizer
from geode_jax.runs.export import prepare_export
from geode_jax.runs.identity import open_run
from geode_jax.runs.start import pretrained_folders, start_from_pretrained, start_from_run
from geode_jax.runtime.distributed import main_first
from geode_jax.sharding import make_mesh, replicated
from geode_jax.training.checkpoint_files import has_checkpoint
from geode_jax.training.optimizer import OptimizerConfig, make_optimizer
from geode_jax.training.step import TrainState, init_state


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
        if objective.internvl is None:
            raise UserError(f"config: init_from: {config.system} starts from no pretrained model")
        longest = systems.longest_row(objective, train)
        state = start_from_pretrained(state, pretrained, objective.internvl, mesh, longest)
    elif init_from:
        state = start_from_run(state, Path(init_from), learned)
    if config.data.vision == "internvit/tokens":
        _check_tokens(nnx.merge(graph, state.params, state.frozen).vlm.vision, export, mesh)
    return Run(
        config, export, tokenizer, pipelines, objective, mesh, graph, optimizer, state, steps
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
