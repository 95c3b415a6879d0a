"""The decoder that answering reads against the one that training has."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geode_jax.errors import UserError
from geode_jax.models.decoder import Decoder, DecoderConfig
from geode_jax.models.decoding import Matrix, by_layer, for_decoding, with_decoding
from geode_jax.models.layers import Projection
from geode_jax.models.student import Student
from geode_jax.ops.attention import causal
from tests.helpers.own_process import output_of
from tests.helpers.tiny_models import STUDENT, materialize

GELU = dataclasses.replace(STUDENT.decoder, cross_layers=())
QWEN = dataclasses.replace(GELU, mlp="swiglu", norm="rms", linear_bias=False, tied_head=True)


def made(config: DecoderConfig) -> Decoder:
    return materialize(lambda rngs: Decoder(config, rngs=rngs))


@jax.jit
def read(decoder: Decoder, ids_BL):
    return decoder(ids_BL)


@pytest.mark.parametrize("config", [QWEN, GELU], ids=["SwiGLU, tied", "GELU, biases"])
def test_logits_and_keys_are_those_of_training(config):
    decoder = made(config)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 7))
    ready = jax.jit(for_decoding)(decoder)
    assert isinstance(ready.stages[0].blocks, nnx.List) and for_decoding(ready) is ready
    np.testing.assert_allclose(read(ready, ids), read(decoder, ids), rtol=1e-5, atol=1e-5)
    x, positions = decoder.embed(ids), np.tile(np.arange(7), (2, 1))
    stacked = by_layer(decoder.run(x, positions, causal(2, 7))[1])
    apart = ready.run(x, positions, causal(2, 7))[1]
    assert len(apart[0]) == config.layers
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # noqa: E731
    jax.tree.map(close, apart, stacked)


def test_matrices_have_the_dtype_of_the_activations_and_norms_keep_theirs():
    config = dataclasses.replace(QWEN, dtype="bfloat16")
    ready = for_decoding(made(config))
    state = nnx.to_flat_state(nnx.state(ready))
    kinds = {path[-1]: variable[...].dtype for path, variable in state}
    assert kinds["kernel"] == kinds["embedding"] == jnp.bfloat16
    assert kinds["scale"] == jnp.float32
    kernels = [path for path, _ in state if path[-1] == "kernel"]
    # Query, key and value are one; so are gate and up; the head is the embedding.
    assert len(kernels) == 4 * config.layers


def test_int8_rounds_to_the_nearest_step_of_each_column():
    projection = Projection((6,), (3, 5), ("embed", None, None), bias=True, rngs=nnx.Rngs(0))
    projection.kernel[...] = projection.kernel[...].at[:, 0, 0].set(0.0)  # no step at all
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    matrix = Matrix(projection, int8=True)
    assert matrix.kernel.dtype == jnp.int8
    kernel = projection.kernel[...].reshape(6, 15)
    step = np.abs(kernel).max(axis=0) / 127
    error = np.abs(matrix.kernel[...] * matrix.scale[...] - kernel)
    assert (error <= step / 2 + 1e-7).all() and error.max() > 0
    got = matrix(x)[0].reshape(4, 3, 5)
    bound = np.abs(x).sum(axis=1)[:, None] * step / 2 + 1e-5
    assert (np.abs(got - projection(x)).reshape(4, 15) <= bound).all()


def test_int8_decoder_says_nearly_the_same():
    decoder = made(QWEN)
    ids = np.random.default_rng(0).integers(0, QWEN.vocab_size, (4, 7))
    exact, rounded = read(decoder, ids), read(for_decoding(decoder, int8=True), ids)
    difference = float(jnp.abs(rounded - exact).max() / jnp.abs(exact).max())
    assert 0 < difference < 0.05


def test_int8_without_qwix_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[int8\]' in the checkout"):
        for_decoding(made(QWEN), int8=True)


def test_a_model_gets_its_decoder_made_ready():
    student = materialize(lambda rngs: Student(STUDENT, rngs=rngs))
    ready = with_decoding(student)
    assert ready is student and len(ready.decoder.stages) == 2
    assert all(isinstance(stage.blocks, nnx.List) for stage in ready.decoder.stages)


@pytest.mark.slow
def test_spread_matrices_are_gathered_before_the_loop_over_tokens():
    found = json.loads(output_of("tests.models.decoding_mesh_run", devices=8))
    assert found["entry"] > 0 and found["others"] == 0
