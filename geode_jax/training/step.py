"""One jitted training step: exact gradient accumulation, clipping, non-finite guard."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from geode_jax.objectives.base import TrainingObjective
from geode_jax.shapes import Array, Batch
from geode_jax.sharding import abstract_model, placed, shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes.

    Attributes:
        step: number of steps taken, int32.
        params: the trainable parameters.
        frozen: all other variables of the model.
        opt_state: optimizer state of `params`.
    """

    step: Array
    params: nnx.State
    frozen: nnx.State
    opt_state: Any


Blueprint = tuple[nnx.GraphDef, optax.GradientTransformation, TrainState]
"""Structure of a model, its optimizer, and the state: arrays, or shapes with shardings."""


def blueprint(
    objective: TrainingObjective,
    make_optimizer: Callable[[nnx.State], optax.GradientTransformation],
    mesh: jax.sharding.Mesh,
) -> Blueprint:
    """Returns what `init_state` returns, as shapes with shardings: nothing is computed.

    The optimizer's moments have the shardings of their parameters.
    """
    model = abstract_model(objective.build, mesh)
    graph, params, frozen = nnx.split(model, objective.trainable, ...)
    optimizer = make_optimizer(params)
    step = jax.eval_shape(lambda: jnp.zeros((), jnp.int32))
    state = TrainState(step, params, frozen, jax.eval_shape(optimizer.init, params))
    return graph, optimizer, placed(state, mesh)


def init_state(
    objective: TrainingObjective,
    make_optimizer: Callable[[nnx.State], optax.GradientTransformation],
    seed: int,
    mesh: jax.sharding.Mesh,
) -> Blueprint:
    """Returns the model and optimizer state, created sharded; the same values on every mesh."""
    graph, optimizer, like = blueprint(objective, make_optimizer, mesh)

    def build(key):
        model = objective.build(nnx.Rngs(key))
        _, params, frozen = nnx.split(model, objective.trainable, ...)
        return params, frozen

    # On CPUs this halves the time to compile hundreds of random arrays, and gives the same bits.
    quick = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    out = shardings((like.params, like.frozen))
    make = jax.jit(build, out_shardings=out, compiler_options=quick)
    params, frozen = make(jax.random.key(seed))

    def begin(params):
        return jnp.zeros((), jnp.int32), optimizer.init(params)

    step, opt_state = jax.jit(begin, out_shardings=shardings((like.step, like.opt_state)))(params)
    return graph, optimizer, TrainState(step, params, frozen, opt_state)


def make_train_step(
    objective: TrainingObjective,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    like: TrainState,
    microbatches: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Returns a jitted step: (state, batch) -> (state, metrics); the state is donated.

    The batch's scenes are split into `microbatches`, each with a part of every device's scenes. The
    gradient is exactly that of the whole batch, however unevenly answer tokens are spread:

    1. The counts of all microbatches are summed. They depend on the masks only, so the compiler
       drops the model from this pass.
    2. The loss of a microbatch is its sum / total count; the gradients are added up.
    3. The parameters of the total itself, the uncertainties of eq. 2, are differentiated once, at
       the summed terms, because `totals.bounded` needs the sign of the whole gradient.

    Args:
        objective: of the model.
        graph, optimizer: of `init_state`.
        like: the state, or its `blueprint`; the new state has its shardings.
        microbatches: their number.

    Metrics: `loss`, `loss/<term>`, `count/<term>`, `weight/<name>`, `grad_norm`, `skipped`,
    `skipped_in_a_row`.
    """

    def accumulate(params, frozen, batch):
        def split(x):
            x = x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:])
            return jnp.swapaxes(x, 0, 1)

        micro = jax.tree.map(split, batch)

        def counts(one):
            terms = objective.terms(nnx.merge(graph, params, frozen), one)
            return {name: count for name, (_, count) in terms.items()}

        total_counts = jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(counts, micro))

        def total(params, sums):
            model = nnx.merge(graph, params, frozen)
            terms = {name: (part, total_counts[name]) for name, part in sums.items()}
            return objective.total(model, terms)

        def loss(params, one):
            terms = objective.terms(nnx.merge(graph, params, frozen), one)
            sums = {name: part for name, (part, _) in terms.items()}
            return total(jax.lax.stop_gradient(params), sums)[0], sums

        def body(carry, one):
            grads, sums = jax.grad(loss, has_aux=True)(params, one)
            return jax.tree.map(jnp.add, carry, (sums, grads)), None

        sums = jax.eval_shape(loss, params, jax.tree.map(lambda x: x[0], micro))[1]
        sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
        start = sums, jax.tree.map(jnp.zeros_like, params)
        (sums, grads), _ = jax.lax.scan(body, start, micro)
        (value, weights), own = jax.value_and_grad(total, has_aux=True)(params, sums)
        return value, sums, total_counts, weights, jax.tree.map(jnp.add, grads, own)

    def step(state: TrainState, batch: Batch):
        total, sums, counts, weights, grads = accumulate(state.params, state.frozen, batch)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            # optax's types do not say that it returns the tree of its argument.
            params = cast(nnx.State, optax.apply_updates(state.params, updates))
        assert isinstance(opt_state, optax.ApplyIfFiniteState)  # of `optimizer.make_optimizer`
        metrics = {"loss": total, "grad_norm": optax.tree.norm(grads)}
        metrics["skipped"] = opt_state.total_notfinite
        metrics["skipped_in_a_row"] = opt_state.notfinite_count
        for name in sums:
            metrics[f"loss/{name}"] = sums[name] / jnp.maximum(counts[name], 1)
            metrics[f"count/{name}"] = counts[name]
        metrics |= {f"weight/{name}": weight for name, weight in weights.items()}
        return TrainState(state.step + 1, params, state.frozen, opt_state), metrics

    return jax.jit(step, donate_argnames="state", out_shardings=(shardings(like), None))
