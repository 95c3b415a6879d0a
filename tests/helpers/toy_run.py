"""The program that `survival_test` starts: the real loop and checkpoints with a one-matrix model.

    python -m tests.helpers.toy_run WORKDIR STEPS [FAULT]

FAULT is the moment at which the process is killed by SIGKILL, as if the machine had failed:
    before:NAME:N, after:NAME:N     the N-th call of one of `POINTS`
    event:NAME:N                    the N-th audit event of Python about a file in WORKDIR, such as
                                    `os.rename`, which gives a checkpoint its final name
"""

import functools
import os
import signal
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from geode_jax import train
from geode_jax.models.layers import param
from geode_jax.runs.settings import TrainSettings
from geode_jax.runtime.stop import Stop
from geode_jax.sharding import make_mesh
from geode_jax.training import checkpoint, metrics
from geode_jax.training.checkpoint import Checkpoints
from geode_jax.training.optimizer import OptimizerConfig, make_optimizer
from geode_jax.training.step import init_state

WIDTH, EVERY = 64, 3

POINTS = {
    "save": (Checkpoints, "save"),
    "save_best": (Checkpoints, "save_best"),
    "finish": (Checkpoints, "finish"),
    "restore": (Checkpoints, "restore"),
    "fingerprint": (checkpoint, "fingerprint"),
    "write": (metrics.MetricsWriter, "write"),
    "shard_batch": (train, "shard_batch"),
}


class Line:
    """Learns y = W x from random batches, so that every step changes the result."""

    selection_metric = "text"
    trainable = nnx.Param

    def build(self, rngs):
        return nnx.Dict(w=param(jax.random.normal(rngs.params(), (WIDTH, WIDTH)), None, "embed"))

    def terms(self, model, batch):
        error = batch.x @ model.w[...] - batch.y
        return {"text": (jnp.sum(error**2), jnp.float32(error.size))}

    def total(self, model, terms):
        part, count = terms["text"]
        return part / count, {}


@jax.tree_util.register_pytree_node_class
class ToyBatch(types.SimpleNamespace):
    """x, y [S, WIDTH], and the fields of `measure.meter.Meter`: one token per row, no padding."""

    def tree_flatten(self):
        return [self.__dict__[n] for n in sorted(self.__dict__)], sorted(self.__dict__)

    @classmethod
    def tree_unflatten(cls, names, leaves):
        return cls(**dict(zip(names, leaves, strict=True)))


class Pipeline:
    """Batches as a pure function of the step."""

    def iterate(self, first, count, rows):
        for step in range(first, first + count):
            x, y = np.random.default_rng(step).standard_normal((2, 4, WIDTH), np.float32)
            ones = np.ones((4, 1), np.int32)
            lengths = {"question_length_SQ": ones, "answer_length_SQ": ones}
            starts = np.zeros((4, 1, 1), np.int32)
            yield step, ToyBatch(x=x, y=y, packed_start_SWT=starts, **lengths)


def kill(fault: str, workdir: Path) -> None:
    """Kills this process later, at a fault; see the module."""
    kind, name, nth = fault.split(":")
    calls = 0

    def count() -> bool:
        nonlocal calls
        calls += 1
        return calls == int(nth)

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    if kind == "event":

        def hook(event, args):
            if event == name and any(str(workdir) in str(arg) for arg in args) and count():
                die()

        sys.addaudithook(hook)
        return
    owner, attribute = POINTS[name]
    function = getattr(owner, attribute)

    @functools.wraps(function)
    def faulty(*args, **kwargs):
        mine = count()
        if mine and kind == "before":
            die()
        out = function(*args, **kwargs)
        if mine:
            die()
        return out

    setattr(owner, attribute, faulty)


def main(workdir: Path, steps: int) -> None:
    """Trains to the end, or until the fault."""
    workdir.mkdir(exist_ok=True)
    config = OptimizerConfig("adamw", 0.01, weight_decay=0.1, warmup_steps=0, steps=steps)
    mesh, line = make_mesh(), Line()
    make = functools.partial(make_optimizer, config)
    graph, optimizer, state = init_state(line, make, 0, mesh)
    run = types.SimpleNamespace(
        settings=types.SimpleNamespace(
            train=TrainSettings(
                steps=steps, epochs=1, microbatches=1, eval_every=2 * EVERY,
                checkpoint_every=EVERY, checkpoint_minutes=0, patience=0, max_skipped=1,
            ),
            data=types.SimpleNamespace(scenes_per_batch=4, questions_per_scene=1),
            eval=types.SimpleNamespace(val_scenes=1),
        ),
        objective=line, graph=graph, optimizer=optimizer, state=state, mesh=mesh, steps=steps,
        pipelines={"train": Pipeline(), "val": None},
        # Falls every time, so that a best checkpoint is written every time.
        evaluator=types.SimpleNamespace(
            losses=lambda state, *_, **__: {"val/text": 1 / float(state.step), "val/loss": 0.0}
        ),
    )  # fmt: skip
    with jax.set_mesh(mesh), Checkpoints(workdir) as checkpoints, Stop() as stop:
        state, *_ = train.run_loop(run, workdir, checkpoints, stop, profile=False)
        best, position = checkpoints.restore_best(state)
    assert position["step"] == steps and np.array_equal(*map(_weights, (state, best)))
    np.save(workdir / "weights.npy", _weights(state))
    assert optax.tree.norm(state.params) > 0


def _weights(state) -> np.ndarray:
    return np.asarray(state.params["w"][...])


if __name__ == "__main__":
    folder, count, *faults = sys.argv[1:]
    if faults:
        kill(faults[0], Path(folder))
    main(Path(folder), int(count))
