"""The regression head: codes are relative, units are the question's, one box is one code."""

import jax.numpy as jnp
import numpy as np
import pytest

from geode_jax.exports.units import BASE_UNIT
from geode_jax.geometry.boxes import encode_boxes
from geode_jax.models.drh import Drh, decode_values, encode_values
from geode_jax.objectives.geode import box_regression, value_regression
from geode_jax.targets import LOG_VALUES
from tests.helpers.tiny_models import materialize


@pytest.mark.parametrize("unit", BASE_UNIT)
def test_values_come_back_in_their_unit(unit):
    values = np.array([0.3, 1.0, 7.5, 56.0, 240.0], np.float32)
    low, high = np.exp(LOG_VALUES)
    values = np.clip(values, low / BASE_UNIT[unit], high / BASE_UNIT[unit]).astype(np.float32)
    base = np.full_like(values, BASE_UNIT[unit])
    np.testing.assert_allclose(decode_values(encode_values(values, base), base), values, rtol=1e-5)


def test_a_size_in_centimetres_weighs_like_a_distance_in_metres():
    metres = encode_values(jnp.float32(1.74), jnp.float32(BASE_UNIT["m"]))
    centimetres = encode_values(jnp.float32(174.0), jnp.float32(BASE_UNIT["cm"]))
    np.testing.assert_allclose(metres, centimetres, rtol=1e-6)


def test_value_loss_is_the_squared_relative_error_of_what_is_masked_in():
    values = np.array([2.0, 200.0, 5.0], np.float32)
    base = np.array([1.0, 0.01, 1.0], np.float32)
    codes = encode_values(np.array([2.2, 200.0, 1.0], np.float32), base)
    total, count = value_regression(codes, values, base, np.array([True, True, False]))
    assert count == 2
    np.testing.assert_allclose(total, np.log(1.1) ** 2, rtol=1e-4)


def test_box_loss_is_zero_for_any_name_of_the_box():
    box = np.array([1.0, -2.0, 0.5, 1.6, 0.8, 0.9, 0.3], np.float32)
    turned = np.array([1.0, -2.0, 0.5, 0.8, 1.6, 0.9, 0.3 + np.pi / 2], np.float32)
    code = encode_boxes(box)[None]
    total, count = box_regression(code, turned[None], np.array([True]))
    assert count == 1
    np.testing.assert_allclose(total, 0.0, atol=1e-9)
    moved = box.copy()
    moved[0] += 0.5
    np.testing.assert_allclose(
        box_regression(code, moved[None], np.array([True]))[0], 0.25, rtol=1e-5
    )
    assert box_regression(code, moved[None], np.array([False])) == (0.0, 0.0)


def test_the_head_reads_the_state():
    drh = materialize(lambda rngs: Drh(6, 8, rngs=rngs))
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 6)), jnp.float32)
    assert drh.values(hidden).shape == (2, 3) and drh.boxes(hidden).shape == (2, 3, 8)
    assert np.std(drh.values(hidden)) > 0
