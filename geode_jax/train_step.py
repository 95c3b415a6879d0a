"""One jitted training step: exact gradient accumulation, clipping, non-finite guard."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from geode_jax.data.tokens import Tokenizer
from geode_jax.shapes import Array, Batch

Terms = dict[str, tuple[Array, Array]]
"""Loss name -> (sum, count) over the examples that carry its target."""


class Objective(Protocol):
    """What differs between the systems; see `objectives/`.

    Attributes:
        judge: the validation loss whose lowest value is of the best checkpoint.
    """

    judge: str

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The model with freshly initialised parameters."""
        ...

    @property
    def trainable(self) -> Any:
        """nnx filter of the parameters that learn; the others get no gradient and no moments."""
        ...

    def terms(self, model: nnx.Module, batch: Batch) -> Terms:
        """Every loss as (sum, count)."""
        ...

    def total(self, model: nnx.Module, terms: Terms, share: float) -> tuple[Array, dict]:
        """The loss of `terms`, and weights for the log; `share` = this microbatch's part."""
        ...

    def answer(self, model: nnx.Module, batch: Batch, eos_id: int) -> dict[str, Array]:
        """Greedy answers to the batch's questions: `tokens` [S, Q, A], and what `say` reads."""
        ...

    def say(
        self, out: dict, place: tuple[int, int], record: Mapping[str, Any], tokenizer: Tokenizer
    ) -> dict[str, Any]:
        """What `answer`, fetched, says to the question of a record that stands at (row, column):
        `prediction` and whatever goes with it."""
        ...


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


def init_state(
    objective: Objective, make_optimizer: Callable, seed: int
) -> tuple[nnx.GraphDef, optax.GradientTransformation, TrainState]:
    """The model and optimizer state, created under jit: sharded from birth, reproducible by seed.

    Call inside `sharding.activate(mesh)`.
    """
    # Hundreds of random arrays: half of the compiler's time on a CPU, and the same bits.
    quick = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    build = jax.jit(lambda key: objective.build(nnx.Rngs(key)), compiler_options=quick)
    model = build(jax.random.key(seed))
    graph, params, frozen = nnx.split(model, objective.trainable, ...)
    optimizer = make_optimizer(params)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=frozen,
        opt_state=jax.jit(optimizer.init)(params),
    )
    return graph, optimizer, state


def make_train_step(
    objective: Objective,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    microbatches: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """A jitted step: (state, batch) -> (state, metrics); the state is donated.

    The batch's scenes are split into `microbatches`. The counts of all microbatches are summed
    first (they depend on the masks only, so the compiler drops the model from that pass), and every
    microbatch then pays sum / total count: the gradient equals the whole batch's exactly, however
    unevenly the answer tokens fall.

    Metrics: `loss`, `loss/<term>`, `count/<term>`, `weight/<name>`, `grad_norm`, `skipped`.
    """

    def accumulate(params, frozen, batch):
        micro = jax.tree.map(
            lambda x: x.reshape(microbatches, x.shape[0] // microbatches, *x.shape[1:]), batch
        )

        def counts(one):
            terms = objective.terms(nnx.merge(graph, params, frozen), one)
            return {name: count for name, (_, count) in terms.items()}

        total_counts = jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(counts, micro))

        def loss(params, one):
            model = nnx.merge(graph, params, frozen)
            sums = {name: part for name, (part, _) in objective.terms(model, one).items()}
            terms = {name: (part, total_counts[name]) for name, part in sums.items()}
            total, weights = objective.total(model, terms, 1.0 / microbatches)
            return total, (sums, weights)

        def body(carry, one):
            (total, (sums, weights)), grads = jax.value_and_grad(loss, has_aux=True)(params, one)
            return jax.tree.map(jnp.add, carry, (total, sums, grads)), weights

        shapes = jax.eval_shape(loss, params, jax.tree.map(lambda x: x[0], micro))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[1][0]))
        start = (*zeros, jax.tree.map(jnp.zeros_like, params))
        (total, sums, grads), weights = jax.lax.scan(body, start, micro)
        weights = jax.tree.map(lambda x: x[0], weights)
        return total, sums, total_counts, weights, grads

    def step(state: TrainState, batch: Batch):
        total, sums, counts, weights, grads = accumulate(state.params, state.frozen, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": total, "grad_norm": optax.tree.norm(grads)}
        metrics["skipped"] = opt_state.total_notfinite
        metrics["skipped_in_a_row"] = opt_state.notfinite_count
        for name in sums:
            metrics[f"loss/{name}"] = sums[name] / jnp.maximum(counts[name], 1)
            metrics[f"count/{name}"] = counts[name]
        metrics |= {f"weight/{name}": weight for name, weight in weights.items()}
        return TrainState(state.step + 1, params, state.frozen, opt_state), metrics

    return jax.jit(step, donate_argnames="state")
