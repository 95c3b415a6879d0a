"""From settings to the pieces of a run."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax
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
from geode_jax.runs.data import make_pipelines, prepare_tokenizer
from geode_jax.runs.export import prepare_export, refuse_stand_ins
from geode_jax.runs.identity import open_run
from geode_jax.runs.settings import Settings, refusal
from geode_jax.runs.start import pretrained_folders, start_from_pretrained, start_from_run
from geode_jax.runtime.distributed import is_main, main_first
from geode_jax.sharding import make_mesh, replicated
from geode_jax.training.checkpoint_files import has_checkpoint
from geode_jax.training.optimizer import make_optimizer
from geode_jax.training.step import TrainState, init_state


@dataclasses.dataclass
class Run:
    """Everything that `train` needs."""

    settings: Settings
    export: Export
    tokenizer: Tokenizer
    pipelines: dict[str, Pipeline]  # train, val, test
    objective: Objective
    mesh: jax.sharding.Mesh
    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    state: TrainState  # freshly initialised
    steps: int

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """The evaluation of this run's model, compiled once for the training and for its end."""
        return Evaluator(self.objective, self.graph, self.tokenizer, self.mesh)

    def train_records(self) -> Iterator[dict]:
        """Returns the questions of the training split, from which the frequency baseline counts."""
        return open_question_records(self.export, self.settings.data.on_bad_scene).of_split("train")


def build(settings: Settings, workdir: Path) -> Run:
    """Returns the data, tokenizer, model and optimizer of a run.

    The parameters come from the first of these that there is:
    1. a checkpoint in `workdir`: the training loop restores it, and `init_from` is not read;
    2. pretrained folders in `init_from`: they fill the parts that they hold;
    3. a run in `init_from`: the parts that have learned there are taken over;
    4. nothing: all parts start from random numbers, as do the parts that 2 and 3 do not fill.

    Args:
        settings: of the run.
        workdir: keeps the tokenizer, which must not change between a run and its resumption.

    Raises:
        UserError, ExportError: anything the user can mend, in one line.
    """
    system = settings.system
    if not (settings.init_from or system.starts_fresh):
        words = "a run or folders of pretrained models, from which this stage starts"
        raise refusal("init_from", "", words)
    resumes = has_checkpoint(workdir)
    init_from = "" if resumes else settings.init_from
    pretrained = pretrained_folders(init_from)
    learned = _learned(Path(init_from)) if init_from and not pretrained else frozenset()
    if init_from:
        system.check_start(settings, learned)
    mesh = _mesh(settings)
    with main_first("data"):  # the other processes find what process 0 makes
        export = Export(prepare_export(settings.data))
        if not resumes:
            refuse_stand_ins(settings, export)
        tokenizer = prepare_tokenizer(settings, export, workdir)
        pipelines = make_pipelines(settings.begun() if resumes else settings, export, tokenizer)
    train = pipelines["train"]
    steps = settings.train.steps or settings.train.epochs * train.steps_per_epoch
    objective = system.make_objective(settings, export, tokenizer, train)
    _check_targets(settings, objective, train, resumes)
    optimizer_config = settings.optimizer.over(steps)
    graph, optimizer, state = init_state(
        objective, functools.partial(make_optimizer, optimizer_config), settings.seed, mesh
    )
    if pretrained:
        if objective.internvl is None:
            raise UserError(f"config: init_from: {system.name} starts from no pretrained model")
        text = train.config.question_length + train.config.answer_length
        longest = objective.prefix_length(train.shapes.views) + text
        state = start_from_pretrained(state, pretrained, objective.internvl, mesh, longest)
    elif init_from:
        state = start_from_run(state, Path(init_from), learned)
    if settings.data.vision == "internvit/tokens":
        _check_tokens(nnx.merge(graph, state.params, state.frozen).vlm.vision, export, mesh)
    return Run(
        settings, export, tokenizer, pipelines, objective, mesh, graph, optimizer, state, steps
    )


def _check_targets(
    settings: Settings, objective: Objective, train: Pipeline, resumes: bool
) -> None:
    """Refuses, or prints, terms of the loss that no training scene has a target for.

    Raises:
        UserError: there are some, and the settings do not skip them. A run that resumes goes on.
    """
    missing = objective.missing_targets(train.targets)
    shown = "; ".join(f"{term} learns from {tensors}" for term, tensors in missing.items())
    if missing and settings.data.on_missing_targets == "stop" and not resumes:
        raise UserError(
            f"{train.config.export}: no training scene has what {len(missing)} of the losses need: "
            f"{shown}; data.on_missing_targets=skip trains on the others"
        )
    if missing and is_main():
        print(f"not trained on, as no training scene has it: {shown}", flush=True)
    if is_main() and not resumes:
        for line in target_lines(objective, train):
            print(line, flush=True)


def target_lines(objective: Objective, train: Pipeline) -> list[str]:
    """Returns a line for each term of the loss: the targets that it learns from, and their makers.

    Args:
        objective: of the run.
        train: pipeline of the training split, whose export's producer names the makers.
    """
    producer = Export(train.config.export).manifest["producer"]

    def named(target: str) -> str:
        maker = producer.get(target.replace("/", "_"))
        return f"{target} ({maker})" if maker else target

    return [
        f"{term} learns from {', '.join(map(named, targets))}"
        for term, targets in objective.learned_targets(train.targets).items()
        if targets
    ]


def _learned(run: Path) -> frozenset[str]:
    """Returns the parts that have learned in a run.

    Raises:
        UserError: there is no such run, or none can start from it.
    """
    system = open_run(run)[0].system
    if not system.learned:
        raise UserError(f"config: init_from: {run} is a {system.name} run, not a stage of GEODE")
    return system.learned


_TOKENS_TOLERANCE = 0.05
"""Largest relative error of stored tokens: rounding to bfloat16 gives 0.01, another encoder 1."""


def _check_tokens(encoder: InternViT, export: Export, mesh: jax.sharding.Mesh) -> None:
    """Refuses an export whose InternViT tokens come from another encoder; one frame is compared.

    Raises:
        UserError: the tokens of the first frame differ from this encoder's.
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


def _mesh(settings: Settings) -> jax.sharding.Mesh:
    try:
        return make_mesh(settings.mesh)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"config: mesh: {error}") from None
