"""What targets hold gives finite losses and gradients; what they do not hold is masked, counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geode_jax import targets
from geode_jax.data.control import NoNumberError, number_of
from geode_jax.data.scene_arrays import SceneShapes, batch_rows
from geode_jax.exports.units import BASE_UNIT, UNITS
from geode_jax.geometry.boxes import decode_boxes, encode_boxes
from geode_jax.models.task_heads import GAP_FLOOR
from geode_jax.objectives import losses
from geode_jax.objectives.geode import box_regression, value_regression

ANY = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False, width=32)
# Numbers of rooms, and any at all; both ends of every domain among them.
NUMBER = st.one_of(
    st.floats(0.0625, 5, width=32), ANY, st.sampled_from([0.0, -0.0, 1e-45, 1e-3, 1e3, 5e4, 1e30])
)
BOX = st.tuples(*[NUMBER] * 7)
CENTRES = losses.depth_bin_centres(8)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(dtype, values, bases, value_mask, boxes, box_mask, depth):
    """The sum of every loss that follows one of these targets, and its gradient."""

    def loss(weight):
        said = (weight.astype(dtype) * jnp.arange(1, 9, dtype=dtype)).astype(jnp.float32)
        codes = jnp.broadcast_to(said, (3, 8))
        held = jnp.where(box_mask[:, None], boxes, 1.0)
        gaps = jnp.linalg.norm(held[:, :3] - held[:1, :3], axis=-1)
        pairs = [
            value_regression(codes[:, 0], values, bases, value_mask),
            box_regression(codes, boxes, box_mask),
            losses.box_loss(codes, boxes, box_mask),
            losses.huber(codes, encode_boxes(held), box_mask),
            losses.huber(codes[:, :1], jnp.log(gaps + GAP_FLOOR)[:, None], box_mask),
            losses.depth_l1(codes[:, 0], depth, depth > 0),
            losses.depth_bin_ce(codes, depth, depth > 0, CENTRES),
        ]
        return sum(total for total, _ in pairs)

    return jax.value_and_grad(loss)(jnp.ones(8, jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(NUMBER, st.sampled_from(sorted(BASE_UNIT))), min_size=3, max_size=3),
    st.lists(BOX, min_size=3, max_size=3),
    st.lists(NUMBER, min_size=3, max_size=3),
)
def test_what_is_held_has_finite_losses_and_gradients(dtype, numbers, boxes, depths):
    values, bases, masks = np.zeros(3, np.float32), np.ones(3, np.float32), np.zeros(3, bool)
    for i, (value, unit) in enumerate(numbers):
        record = {"kind": "x", "question": "?", "answer": "a", "value": value, "unit": unit}
        try:
            values[i], bases[i] = number_of(record)
            masks[i] = True
        except NoNumberError:
            size = value * UNITS[unit].base
            likely = targets.plausible(value, UNITS[unit].dimension, UNITS[unit].base)
            assert not (likely and 0.0101 < size < 59_000)
    boxes, depths = np.array(boxes, np.float32), np.array(depths, np.float32)
    depths = np.where(targets.held_depth(depths), depths, 0)
    loss, gradient = loss_and_gradient(
        dtype, values, bases, masks, boxes, targets.held_boxes(boxes), depths
    )
    assert np.isfinite(loss) and np.isfinite(gradient).all()


@given(BOX)
def test_a_held_box_comes_back_from_its_code(box):
    box = np.array(box, np.float32)
    if targets.held_boxes(box):
        back = decode_boxes(encode_boxes(box))
        np.testing.assert_allclose(np.prod(back[3:6]), np.prod(box[3:6], dtype=float), rtol=1e-3)
        np.testing.assert_allclose(back[:3], box[:3])


@pytest.mark.parametrize(
    ("place", "number"),
    [(0, 1e20), (2, -1001.0), (3, 1e30), (4, 1e-30), (5, 1e-45), (5, 55.0), (6, 1e20)],
)
def test_a_box_that_no_code_holds_is_masked_and_counted(place, number):
    shapes = SceneShapes(views=1, grid=(1, 1), token_width=2, depth_ratio=1, boxes=2, features=2)
    boxes = np.array([[1, 2, 0.5, 0.6, 0.4, 1, 0]] * 2, np.float32)
    tensors = {"vggt/tokens": np.ones((1, 1, 2), np.float32), "target/boxes": boxes}
    tensors |= {"target/labels": np.zeros(2, np.int32), "target/depth": np.ones((1, 2, 2), "f4")}
    assert targets.left_out(tensors) == {}
    assert batch_rows(tensors, shapes)["boxes_known_S"]
    boxes[1, place] = number
    tensors["target/depth"][0, 0] = 1e30, 1e-30
    tensors["vggt/points"] = np.full((1, 2, 2, 3), 1e20, np.float32)
    tensors["teacher/features"] = np.full((1, 1, 1, 2), -1e20, np.float32)
    rows = batch_rows(tensors, shapes)
    assert rows["target_labels_SN"].tolist() == [0, -1] and not rows["boxes_known_S"]
    assert rows["target_depth_SVhw"].item() == 1  # the mean of what is known
    assert not rows["points_mask_SVP"].any() and not rows["points_SVP3"].any()
    assert all(np.isfinite(row).all() for row in rows.values())
    assert targets.left_out(tensors) == {
        "pixel of target/depth beyond 0.001 to 1000": 2,
        "pixel of vggt/points beyond 1000 m": 4,
        "box of target/boxes that cannot be encoded": 1,
        "teacher/features of a scene beyond 1e+06": 1,
    }


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_half_precision_is_read_as_it_is(dtype):
    numbers = jnp.asarray([0, 1e-4, 0.5, 900, 2000, 60000], dtype)  # none is 1e-3 or 1,000
    stored = np.asarray(numbers)
    assert targets.held_depth(stored).tolist() == [False, False, True, True, False, False]
    assert targets.held_features(stored)
    assert targets.held_places(stored.reshape(2, 3)).tolist() == [True, False]


def test_the_published_pytorch_code_has_the_same_depth_bins():
    """The code of an exported model stands alone, so it has the bins' range again."""
    pytest.importorskip("torch")
    from geode_jax.weights.remote import modeling_hidden_cot as remote

    assert (remote.NEAREST_DEPTH, remote.FARTHEST_DEPTH) == targets.BIN_RANGE
