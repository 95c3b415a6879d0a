"""The rationale module: what is padding is nobody's word, and no slot sees another."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geode_jax.models.drm import Drm, DrmConfig, camera_code, fourier_code, spread
from tests.helpers.tiny_models import materialize

S, FRAMES, TOKENS, POINTS, CAMERAS, L = 2, 3, 2, 5, 3, 4
CONFIG = DrmConfig(
    width=8,
    heads=2,
    layers=2,
    slots=4,
    bands=2,
    visual_width=6,
    point_width=3,
    llm_width=10,
    max_frames=FRAMES,
)


class Room(NamedTuple):
    visual: np.ndarray
    visual_mask: np.ndarray
    place: np.ndarray
    place_mask: np.ndarray
    point: np.ndarray
    coord: np.ndarray
    point_mask: np.ndarray
    extrinsic: np.ndarray
    camera_mask: np.ndarray


def room(frames=(3, 2), points=(5, 3), cameras=(3, 1), seed=0) -> Room:
    rng = np.random.default_rng(seed)
    q = np.stack([np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(S * CAMERAS)])
    poses = np.concatenate([q, rng.normal(size=(S * CAMERAS, 3, 1))], -1)
    return Room(
        rng.normal(size=(S, FRAMES, TOKENS, CONFIG.visual_width)).astype(np.float32),
        np.arange(FRAMES) < np.array(frames)[:, None],
        rng.normal(size=(S, FRAMES, TOKENS, 3)).astype(np.float32),
        np.broadcast_to(np.arange(TOKENS) > 0, (S, FRAMES, TOKENS)),
        rng.normal(size=(S, POINTS, CONFIG.point_width)).astype(np.float32),
        rng.normal(size=(S, POINTS, 3)).astype(np.float32),
        np.arange(POINTS) < np.array(points)[:, None],
        poses.reshape(S, CAMERAS, 3, 4).astype(np.float32),
        np.arange(CAMERAS) < np.array(cameras)[:, None],
    )


@pytest.fixture(scope="module")
def drm():
    return materialize(lambda rngs: Drm(CONFIG, rngs=rngs))


run = jax.jit(lambda module, *arrays: module(*arrays))


def test_what_is_padding_is_nobodys_word(drm):
    a, b = room(), room(seed=1)
    mixed = Room(
        np.where(a.visual_mask[..., None, None], a.visual, b.visual),
        a.visual_mask,
        np.where(a.place_mask[..., None], a.place, b.place),
        a.place_mask,
        np.where(a.point_mask[..., None], a.point, b.point),
        np.where(a.point_mask[..., None], a.coord, b.coord),
        a.point_mask,
        np.where(a.camera_mask[..., None, None], a.extrinsic, b.extrinsic),
        a.camera_mask,
    )
    assert any((x != y).any() for x, y in zip(a, mixed, strict=True))
    np.testing.assert_allclose(run(drm, *a), run(drm, *mixed), atol=1e-6)


def test_a_padded_room_equals_the_room(drm):
    padded = room()
    own = Room(*(x[1:] for x in padded))
    cut = Room(
        own.visual[:, :2], own.visual_mask[:, :2], own.place[:, :2], own.place_mask[:, :2],
        own.point[:, :3], own.coord[:, :3],
        own.point_mask[:, :3], own.extrinsic[:, :1], own.camera_mask[:, :1],
    )  # fmt: skip
    np.testing.assert_allclose(run(drm, *padded)[1:], run(drm, *cut), atol=1e-5)


@pytest.mark.parametrize("field", ["visual", "place", "point", "coord", "extrinsic"])
def test_everything_that_is_there_is_heard(drm, field):
    a = room()
    index = {"extrinsic": (1, 0), "place": (1, 1, 1)}.get(field, (1, 1))
    value = np.array(getattr(a, field))
    value[(*index, ..., 0)] += 0.5  # not all channels: a norm would take that away
    moved = run(drm, *a._replace(**{field: value})) - run(drm, *a)
    assert np.abs(moved[1]).max() > 1e-4
    np.testing.assert_allclose(moved[0], 0, atol=1e-6)  # scenes do not hear each other


def test_points_are_a_set(drm):
    a = room(points=(5, 5))
    order = np.random.default_rng(2).permutation(POINTS)
    shuffled = a._replace(point=a.point[:, order], coord=a.coord[:, order])
    np.testing.assert_allclose(run(drm, *a), run(drm, *shuffled), atol=1e-5)


def test_the_first_slots_are_those_of_a_smaller_module(drm):
    before = np.asarray(run(drm, *room()))
    graph, state = nnx.split(drm)
    small = nnx.merge(graph, jax.tree.map(lambda x: x, state))
    small.config = dataclasses.replace(CONFIG, slots=2)
    small.slots = nnx.Param(drm.slots[...][:2])
    np.testing.assert_allclose(run(small, *room()), before[:, :2], atol=1e-6)


def test_every_parameter_learns(drm):
    graph, state = nnx.split(drm)

    @jax.jit
    def gradients(state, arrays):
        return jax.grad(lambda s: jnp.sum(jnp.sin(nnx.merge(graph, s)(*arrays))))(state)

    for path, gradient in nnx.to_flat_state(gradients(state, room(cameras=(3, 3)))):
        assert np.abs(gradient[...]).max() > 0, path


def test_conditioned_on_the_question():
    config = dataclasses.replace(CONFIG, condition_on_question=True)
    drm = materialize(lambda rngs: Drm(config, rngs=rngs))
    rng = np.random.default_rng(3)
    question = rng.normal(size=(S, L, CONFIG.llm_width)).astype(np.float32)
    mask = np.arange(L) < np.array([[4], [2]])
    out = run(drm, *room(), question, mask)
    assert out.shape == (S, CONFIG.slots, CONFIG.llm_width)
    other = np.where(mask[..., None], question, 7)
    np.testing.assert_allclose(run(drm, *room(), other, mask), out, atol=1e-6)
    question[1, 0] += 1
    moved = np.abs(run(drm, *room(), question, mask) - out).max((1, 2))
    assert moved[0] < 1e-6 < 1e-4 < moved[1]


def test_some_frames_are_spread_over_all():
    mask = np.arange(16) < np.array([[16], [5], [3], [0]])
    kept = [np.flatnonzero(row).tolist() for row in np.asarray(spread(mask, 4))]
    assert kept == [[0, 4, 8, 12], [0, 2, 3, 4], [0, 1, 2], []]
    masks = np.random.default_rng(0).random((50, 9)) < 0.6
    for most in range(1, 10):
        chosen = np.asarray(spread(masks, most))
        assert not (chosen & ~masks).any()
        np.testing.assert_array_equal(chosen.sum(1), np.minimum(masks.sum(1), most))


def test_codes_of_places_and_cameras():
    place = np.array([4.0, -2.0, 0.0], np.float32)
    code = np.asarray(fourier_code(place, 2))
    # 4 m is a quarter of the lowest period, 16 m.
    expected = [1, -0.5, 0, 1, 0, -(0.5**0.5), -1, 0, 0, 0, -1, 0.5**0.5, 0, 1, 1]
    np.testing.assert_allclose(code, expected, atol=1e-6)
    turn = np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1]], np.float32)
    pose = np.concatenate([turn, (-turn @ place)[:, None]], 1)
    code_camera = np.asarray(camera_code(pose, 2))
    np.testing.assert_allclose(code_camera[:9], turn.ravel())
    np.testing.assert_allclose(code_camera[9:], code, atol=1e-6)
