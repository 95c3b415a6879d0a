"""Where pictures, patches and vision tokens go; the numbers are tested in tests/weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geode_jax.models.decoder import DecoderConfig
from geode_jax.models.internvl import InternVL, InternVLConfig
from geode_jax.models.vit import InternViT, VitConfig, pixel_shuffle
from tests.helpers.tiny_models import materialize

VIT = VitConfig(image_size=12, patch_size=3, width=8, layers=2, heads=2, mlp_width=12)
DECODER = DecoderConfig(
    vocab_size=11, width=6, layers=1, heads=1, kv_heads=1, head_width=6, mlp_width=8
)
IMAGE_ID = 10


@pytest.fixture(scope="module")
def model() -> InternVL:
    config = InternVLConfig(VIT, DECODER, image_id=IMAGE_ID)
    return materialize(lambda rngs: InternVL(config, rngs=rngs))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 12, 12, 3), np.float32)


def test_four_neighbours_become_one_token_row_by_row():
    x = jnp.arange(2 * 4 * 6 * 5, dtype=jnp.float32).reshape(2, 4, 6, 5)
    y = np.asarray(pixel_shuffle(x))
    assert y.shape == (2, 2, 3, 20)
    for r, c in np.ndindex(2, 3):
        square = x[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(2, 20)
        np.testing.assert_array_equal(y[:, r, c], square)


def test_patches_are_row_major_behind_the_class_token(model, pixels):
    """Blocks that add nothing leave the embedding."""
    graph, state = nnx.split(model.vision)
    still = nnx.map_state(
        lambda path, v: v.replace(v[...] * 0) if path[-1].endswith("_scale") else v, state
    )
    vision = nnx.merge(graph, still)
    hidden = np.asarray(jax.jit(lambda m, x: m(x))(vision, pixels))
    assert hidden.shape == (3, 17, 8)
    positions = np.asarray(vision.positions[...])
    first = np.asarray(vision.class_token[...]) + positions[0]
    np.testing.assert_allclose(hidden[:, 0], np.tile(first, (3, 1)), atol=1e-6)
    kernel, bias = np.asarray(vision.patches.kernel[...]), np.asarray(vision.patches.bias[...])
    for r, c in np.ndindex(4, 4):
        patch = pixels[:, 3 * r : 3 * r + 3, 3 * c : 3 * c + 3]
        expected = np.einsum("bijc,ijcd->bd", patch, kernel) + bias + positions[1 + 4 * r + c]
        np.testing.assert_allclose(hidden[:, 1 + 4 * r + c], expected, atol=1e-5)


def test_the_nth_image_token_reads_the_nth_vision_token(model, pixels):
    """Two pictures in the first row, one in the second."""
    tokens = np.random.default_rng(1).integers(0, IMAGE_ID, (2, 11))
    tokens[0, 1:5] = tokens[0, 6:10] = tokens[1, 7:11] = IMAGE_ID

    @jax.jit
    def both(model, tokens, pixels, order):
        seen = model.vision_tokens(pixels)
        rows = model.decoder.embed(jnp.where(tokens == IMAGE_ID, 0, tokens))
        rows = rows.at[0, 1:5].set(seen[0]).at[0, 6:10].set(seen[1]).at[1, 7:11].set(seen[2])
        hidden, _ = model.decoder.run_prefix(rows, None, None)
        return model(tokens, pixels), model.decoder.logits(hidden), model(tokens, pixels[order])

    order = np.array([1, 0, 2])
    logits, expected, swapped = map(np.asarray, both(model, tokens, pixels, order))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_array_equal(logits[0, 0], swapped[0, 0])  # before the first picture
    assert np.abs(logits[0, 1:] - swapped[0, 1:]).max(-1).min() > 1e-4
    np.testing.assert_allclose(logits[1], swapped[1], atol=1e-5)


def test_activations_have_the_dtype_of_the_config(pixels):
    config = dataclasses.replace(VIT, layers=1, dtype="bfloat16")
    vision = materialize(lambda rngs: InternViT(config, rngs=rngs))
    assert jax.jit(lambda m, x: m(x))(vision, pixels).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("changes", "said"), [({"patch_size": 5}, "5"), ({"heads": 3}, "heads, 3")]
)
def test_impossible_sizes_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        InternViT(dataclasses.replace(VIT, **changes), rngs=nnx.Rngs(0))
