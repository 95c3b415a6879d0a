"""The model of a run's checkpoint, ready to answer on this machine's devices."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from geode_jax.data.pipeline import Pipeline
from geode_jax.data.tokens import Tokenizer
from geode_jax.errors import UserError
from geode_jax.evaluate.evaluator import Evaluator
from geode_jax.exports import Export
from geode_jax.objectives.base import Objective
from geode_jax.runs.config import load_settings
from geode_jax.runs.data import pipeline_config
from geode_jax.runs.export import export_folder
from geode_jax.runs.geode import as_stage_1, with_rationale_module
from geode_jax.runs.identity import export_made, load_run_tokenizer, open_run
from geode_jax.runs.settings import Settings
from geode_jax.runtime.process import keep_compiled_programs, keep_freed_memory
from geode_jax.sharding import abstract_model, make_mesh
from geode_jax.training.checkpoint import load_model
from geode_jax.training.checkpoint_files import read_metadata, refuse_others
from geode_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run's model with everything that answering needs; no optimizer and no training data.

    Attributes:
        settings: of the run.
        export: the export that it was trained on.
        tokenizer: of the run.
        pipeline: of the train split, with the lengths and sizes of the training.
        objective: computes the model's answers and turns them into text.
        mesh: this machine's devices, which may differ from those of the training.
        graph: structure of the model.
        state: the parameters.
        evaluator: compiled with the first batch.
    """

    settings: Settings
    export: Export
    tokenizer: Tokenizer
    pipeline: Pipeline
    objective: Objective
    mesh: jax.sharding.Mesh
    graph: nnx.GraphDef
    state: TrainState
    evaluator: Evaluator


def open_run_export(workdir: Path) -> Export:
    """Returns the export that a run was trained on.

    Raises:
        UserError, ExportError: no run was started in this folder, or its export is not here.
    """
    folder = export_folder(load_settings(workdir).data)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: not here, and {workdir} was trained on it; ask from the folder where "
            "training was started"
        )
    return Export(folder)


def open_trained(
    workdir: Path,
    *,
    rationale: bool = False,
    slots: int | None = None,
    same_export: bool = False,
) -> Trained:
    """Returns the best checkpoint of a run; the latest if none was best yet.

    Args:
        workdir: of the run, which may still be training.
        rationale: the model writes rationales behind E_spatio alone, as in stage 1.
        slots: number of rationale tokens that answers see (Table 3); None: all.
        same_export: an export whose content has changed since the training is refused, as scores
            depend on it; otherwise a line on stderr warns of it.

    Raises:
        UserError, ExportError: the folder is no run, has no checkpoint, its export is not here, or
            its model has no rationale module or fewer than `slots` tokens.
    """
    keep_compiled_programs()
    keep_freed_memory()
    settings = load_settings(workdir)
    if rationale:
        with_rationale_module(settings, "--rationale", workdir)
    if slots is not None:
        there = with_rationale_module(settings, "--spatio", workdir).model.drm.slots
        if slots > there:
            raise UserError(f"--spatio {slots}: {workdir} has {there} rationale tokens")
    settings, checkpoint = open_run(workdir)
    export = open_run_export(workdir)
    try:
        refuse_others(str(export.folder), read_metadata(checkpoint).made_with, export_made(export))
    except UserError as error:
        if same_export:
            raise
        print(f"warning: {error}", file=sys.stderr, flush=True)
    system = settings.system
    # A system that adds tokens to a tokenizer folder keeps the result with the run.
    shared = settings.tokenizer if system.tokenizer.shares_folder else ""
    tokenizer = load_run_tokenizer(shared or workdir / "tokenizer", checkpoint)
    stage = (as_stage_1(settings) if rationale else settings).begun()
    pipeline = Pipeline(export, tokenizer, pipeline_config(stage, export, tokenizer), "train")
    mesh = make_mesh()
    # The checkpoint separates learned from frozen parameters as the run's own stage does.
    learned = system.make_objective(settings, export, tokenizer, pipeline)
    graph, params, frozen = nnx.split(abstract_model(learned.build, mesh), learned.trainable, ...)
    model = load_model(checkpoint, {"params": params, "frozen": frozen})
    step = np.array(int(checkpoint.name), np.int32)
    state = TrainState(step, model["params"], model["frozen"], ())
    objective = stage.system.make_objective(stage, export, tokenizer, pipeline)
    if slots is not None:
        objective = objective.with_slots(slots)
    evaluator = Evaluator(objective, graph, tokenizer, mesh)
    return Trained(settings, export, tokenizer, pipeline, objective, mesh, graph, state, evaluator)
