"""Counted FLOPs against formulas, and against XLA's own count where it has no loops to miss."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from geode_jax.measure.flops import count_flops, model_flops, without_remat
from geode_jax.models.decoder import Decoder, DecoderConfig
from geode_jax.objectives.hidden_cot import HiddenCoT, HiddenCoTConfig
from geode_jax.ops.cross_entropy import token_loss
from geode_jax.sharding import abstract_model, make_mesh
from geode_jax.training.optimizer import OptimizerConfig, make_optimizer
from geode_jax.training.step import blueprint, make_train_step
from tests.helpers.tiny_models import STUDENT, tiny_batch

TINY = DecoderConfig(
    vocab_size=31, width=16, layers=3, heads=4, kv_heads=2, head_width=4, mlp_width=24
)


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def decoder_flops(config, batch, length):
    """A forward pass by hand: 2 x matrix elements x tokens, and scores and sums of attention."""
    c = config
    attention = c.width * c.head_width * (2 * c.heads + 2 * c.kv_heads)
    matrices = c.layers * (attention + 2 * c.width * c.mlp_width) + c.width * c.vocab_size
    scores = c.layers * 2 * 2 * batch * c.heads * length * length * c.head_width
    return 2 * batch * length * matrices + scores


def decoder(config):
    return nnx.split(abstract_model(lambda rngs: Decoder(config, rngs=rngs), make_mesh()))


def loss(graph):
    return lambda state, ids: jnp.sum(nnx.merge(graph, state)(ids))


def test_products():
    assert count_flops(jnp.matmul, array(3, 5), array(5, 7)) == 2 * 3 * 5 * 7
    assert count_flops(jnp.matmul, array(2, 3, 5), array(2, 5, 7)) == 2 * 2 * 3 * 5 * 7
    assert count_flops(lambda x: jnp.sum(jnp.sort(x)) + x @ x, array(9)) == 2 * 9


def test_convolution():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    # A patch embedding: as the matrix product of patches and kernel.
    assert count_flops(convolve, array(1, 8, 8, 3), array(2, 2, 3, 5)) == 2 * 16 * (2 * 2 * 3) * 5


@pytest.mark.parametrize("remat", ["none", "full"])
def test_forward_pass_of_a_decoder(remat):
    config = dataclasses.replace(TINY, remat=remat)
    graph, state = decoder(config)
    ids = jax.ShapeDtypeStruct((2, 6), jnp.int32)
    assert count_flops(loss(graph), state, ids) == decoder_flops(config, 2, 6)


def test_training_costs_three_forward_passes_and_rematerialisation_a_fourth():
    ids = jax.ShapeDtypeStruct((2, 6), jnp.int32)
    forward = decoder_flops(TINY, 2, 6)
    head = 2 * 2 * 6 * TINY.width * TINY.vocab_size
    counted = {}
    for remat in ("none", "full"):
        graph, state = decoder(dataclasses.replace(TINY, remat=remat))
        counted[remat] = count_flops(jax.grad(loss(graph)), state, ids)
    # Nobody needs the logits for the gradient of their sum.
    assert counted["none"] == 3 * forward - head
    # The last product of a layer is not needed again.
    down = TINY.layers * 2 * 2 * 6 * TINY.width * TINY.mlp_width
    assert counted["full"] == 4 * forward - 2 * head - down
    assert without_remat(dataclasses.replace(TINY, remat="full")) == TINY


def test_loops_branches_and_what_nobody_needs():
    x = array(4, 4)
    once = 2 * 4**3

    def repeat(body, trips=5):
        return lambda x: jax.lax.scan(lambda c, _: (body(c), None), x, length=trips)[0]

    assert count_flops(repeat(lambda c: c @ c), x) == 5 * once
    assert count_flops(repeat(repeat(lambda c: c @ c)), x) == 25 * once
    assert count_flops(lambda x: jax.lax.fori_loop(0, 5, lambda i, c: c @ c, x), x) == 5 * once

    def until(x):
        return jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ c, x)

    assert count_flops(until, x) == once
    assert count_flops(until, x, while_trips=3) == 3 * once

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert count_flops(either, x) == 2 * once

    def two_carries(x):
        def body(carry, _):
            a, b, c = carry
            return (a + b, b, c @ c), None  # c is dropped below: its product is never computed

        return jax.lax.scan(body, (x, x, x), length=5)[0][0]

    assert count_flops(two_carries, x) == 0

    def late(x):  # b reaches the result after a pass
        def body(carry, _):
            _, b = carry
            return (b, b @ b), None

        return jax.lax.scan(body, (x, x), length=5)[0][0]

    assert count_flops(late, x) == 5 * once
    assert count_flops(jax.jit(lambda x: (x @ x, x)[1]), x) == 0
    assert count_flops(lambda x: jax.jit(lambda x: (x @ x, x @ x @ x))(x)[0], x) == once


def test_custom_derivatives():
    @jax.custom_vjp
    def square(x):
        return x @ x

    square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
    x = array(4, 4)
    assert count_flops(square, x) == 2 * 4**3
    assert count_flops(jax.grad(lambda x: jnp.sum(square(x) ** 2)), x) == 3 * 2 * 4**3


def test_no_logits_are_made_twice():
    S, T, D, X = 2, 9, 8, 11

    def loss(hidden, head):
        label, paid = jnp.zeros((S, T, 1), jnp.int32), jnp.ones((S, T), bool)
        return token_loss(lambda s, _: jnp.sum(s.lse_n), hidden, head, label, paid, tied=False)

    once, args = 2 * S * T * D * X, (array(S, T, D), array(D, X))
    assert count_flops(loss, *args) == once
    assert count_flops(jax.grad(loss), *args) == 2 * once  # the head is frozen
    assert count_flops(jax.grad(loss, argnums=(0, 1)), *args) == 3 * once


def test_shard_map_counts_all_devices():
    mesh = make_mesh()
    spec = PartitionSpec("fsdp")
    product = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    devices = jax.device_count()
    assert count_flops(product, array(3 * devices, 5)) == devices * 2 * 3 * 5 * 3


def test_pallas_calls():
    def kernel(x_ref, out_ref):
        out_ref[...] = jnp.dot(x_ref[...], x_ref[...])

    def call(cost):
        def run(x):
            block = pl.BlockSpec((1, 4, 4), lambda i: (i, 0, 0))
            return pl.pallas_call(
                lambda x, o: kernel(x.at[0], o.at[0]),
                out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
                grid=(6,),
                in_specs=[block],
                out_specs=block,
                cost_estimate=cost,
                interpret=True,
            )(x)

        return count_flops(run, array(6, 4, 4))

    assert call(None) == 6 * 2 * 4**3
    assert call(pl.CostEstimate(flops=77, bytes_accessed=0, transcendentals=0)) == 77


def test_xla_counts_the_same_without_loops():
    def gradient(w, x):
        return jax.grad(lambda w: jnp.sum(jnp.maximum(x @ w, 0) @ w.T))(w)

    args = array(64, 128), array(96, 64)
    analysis = jax.jit(gradient).lower(*args).compile().cost_analysis()
    # Its figure has the elementwise work, too.
    assert count_flops(gradient, *args) == pytest.approx(analysis["flops"], rel=0.05)


def test_model_flops_of_a_step_do_not_depend_on_rematerialisation():
    batch, mesh = tiny_batch(scenes=2), make_mesh()
    optimizer = OptimizerConfig("adamw", 1e-3, 0.01, warmup_steps=1, steps=4)

    def make(params):
        return make_optimizer(optimizer, params)

    def objective(remat):
        decoder = dataclasses.replace(STUDENT.decoder, remat=remat)
        return HiddenCoT(HiddenCoTConfig(dataclasses.replace(STUDENT, decoder=decoder)))

    none, full = (model_flops(objective(r), make, mesh, batch, 1) for r in ("none", "full"))
    assert none == full > 0
    graph, opt, like = blueprint(objective("full"), make, mesh)
    issued = count_flops(make_train_step(objective("full"), graph, opt, like, 1), like, batch)
    assert none < issued < 4 / 3 * none
