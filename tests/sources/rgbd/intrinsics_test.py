"""Matching of intrinsics to sizes of pictures: accepted, corrected or refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geode_jax.errors import UserError
from geode_jax.sources.rgbd.intrinsics import Given, of_one_view

SCANNET_COLOR = (1169.621, 1167.105, 646.295, 489.927)
SCANNET_DEPTH = (577.871, 577.871, 319.5, 239.5)
PHONE = (1445, 1445, 719, 961)
TUM = (517.3, 516.5, 318.6, 255.3)
KINECT = (525, 525, 319.5, 239.5)
ARKIT_DEPTH, ARKIT = (211.9, 211.9, 127.9, 95.5), (1589, 1589, 959.5, 716)


def given_for(what, numbers, size):
    fx, fy, cx, cy = numbers
    return Given(what, np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]]), size)


def scaled(numbers, old, new):
    """Returns the intrinsic of a resized picture, whose edges stay edges."""
    fx, fy, cx, cy = numbers
    x, y = new[0] / old[0], new[1] / old[1]
    return [[fx * x, 0, (cx + 0.5) * x - 0.5], [0, fy * y, (cy + 0.5) * y - 0.5], [0, 0, 1]]


def together(depth, depth_size, color, color_size):
    depth = depth and given_for("depth.txt", depth, depth_size)
    color = color and given_for("color.txt", color, color_size)
    return of_one_view(depth, color, (depth_size, color_size))


@pytest.mark.parametrize(
    ("depth", "depth_size", "depth_was", "color", "color_size", "color_was"),
    [
        # Correct ones.
        (SCANNET_DEPTH, (640, 480), None, SCANNET_COLOR, (1296, 968), None),
        (SCANNET_DEPTH, (640, 480), None, None, (1296, 968), None),
        (TUM, (640, 480), None, TUM, (640, 480), None),
        # ScanNet's two pictures resized to one size, or halved, with unchanged intrinsics.
        (SCANNET_DEPTH, (640, 480), None, SCANNET_COLOR, (640, 480), (1296, 968)),
        (SCANNET_DEPTH, (640, 480), None, SCANNET_COLOR, (648, 484), (1296, 968)),
        (SCANNET_DEPTH, (320, 240), (640, 480), SCANNET_COLOR, (1296, 968), None),
        (SCANNET_DEPTH, (1296, 968), (640, 480), SCANNET_COLOR, (1296, 968), None),
        (SCANNET_DEPTH, (320, 240), (640, 480), SCANNET_COLOR, (648, 484), (1296, 968)),
        (SCANNET_DEPTH, (320, 240), (640, 480), None, (1296, 968), None),
        # Resized by so little that the centre is still plausible.
        (SCANNET_DEPTH, (576, 432), (640, 480), SCANNET_COLOR, (1296, 968), None),
        (SCANNET_DEPTH, (672, 504), (640, 480), None, (1296, 968), None),
        (SCANNET_DEPTH, (700, 525), (640, 480), SCANNET_COLOR, (960, 720), (1296, 968)),
        (KINECT, (960, 720), (640, 480), KINECT, (576, 432), (640, 480)),
        (KINECT, (640, 480), None, KINECT, (672, 504), (640, 480)),
        (TUM, (640, 480), None, TUM, (672, 504), (640, 480)),
        (SCANNET_DEPTH, (640, 480), None, SCANNET_COLOR, (1248, 936), (1296, 968)),
        # Resized by an odd factor: among the possible sizes, that of the sensor is chosen.
        (ARKIT_DEPTH, (256, 192), None, ARKIT, (576, 432), (1920, 1440)),
        (ARKIT_DEPTH, (256, 192), None, ARKIT, (616, 462), (1920, 1440)),
        # The centre is off the middle: the other camera decides.
        (TUM, (320, 240), (640, 480), TUM, (640, 480), None),
        (PHONE, (192, 256), (1440, 1920), PHONE, (1440, 1920), None),
    ],
)  # fmt: skip
def test_intrinsics_are_brought_to_their_pictures(
    depth, depth_size, depth_was, color, color_size, color_was
):
    k_depth, k_color, notes = together(depth, depth_size, color, color_size)
    np.testing.assert_allclose(k_depth, scaled(depth, depth_was or depth_size, depth_size))
    if color is None:
        assert k_color is None
    else:
        np.testing.assert_allclose(k_color, scaled(color, color_was or color_size, color_size))
    wanted = [
        f"{what}.txt: is for pictures of {was[0]} x {was[1]}, these are {now[0]} x {now[1]}: scaled"
        for what, was, now in (("depth", depth_was, depth_size), ("color", color_was, color_size))
        if was
    ]
    assert notes == wanted


@pytest.mark.parametrize(
    ("depth", "depth_size", "color", "color_size", "rule"),
    [
        # The centre is off, and the original size is unknown.
        (TUM, (320, 240), None, (320, 240), "at 1.00, 1.07 of the sides"),
        ((700, 700, 399.5, 299.5), (500, 375), None, (500, 375), "at 0.80, 0.80 of the sides"),
        (SCANNET_DEPTH, (448, 448), SCANNET_COLOR, (1296, 968), "at 0.71, 0.54"),  # squeezed
        (SCANNET_DEPTH, (480, 640), None, (968, 1296), "at 0.67, 0.38"),  # turned
        (SCANNET_DEPTH, (320, 480), None, (320, 480), "at 1.00, 0.50"),  # cut
        # Resized a little from a size that no sensor has; squeezed a little.
        (
            (630, 630, 352.5, 264),
            (672, 504),
            (1260, 1260, 699.5, 524.5),
            (1400, 1050),
            "same factor",
        ),
        (SCANNET_DEPTH, (672, 448), None, (672, 448), "of 640 x 480, .* cut or squeezed"),
        # Centred, but with different fields of view.
        ((1155, 1155, 319.5, 239.5), (640, 480), SCANNET_COLOR, (1296, 968), "2.00 times as wide"),
        (SCANNET_DEPTH, (640, 480), (900, 1167, 647, 484), (1296, 968), "1.30 times as wide"),
        (SCANNET_DEPTH, (640, 480), None, (1920, 1080), "of different shapes"),
        (None, (640, 480), (1400, 1400, 959.5, 539.5), (1920, 1080), "of different shapes"),
    ],
)
def test_what_is_not_sure_is_refused(depth, depth_size, color, color_size, rule):
    with pytest.raises(UserError, match=rule) as caught:
        together(depth, depth_size, color, color_size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("color", [None, TUM])
def test_what_nothing_shows_is_said(color):
    _, _, notes = together(TUM, (650, 490), color, (650, 490))
    line = "taken to be for pictures of 650 x 490; nothing shows it, the centre is"
    assert notes and all(line in note for note in notes)
    assert not together(TUM, (640, 480), None, (1296, 968))[2]


@given(
    st.sampled_from([(640, 480), (1296, 968), (320, 240), (960, 540), (256, 192)]),
    st.floats(0.6, 1.5),
    st.tuples(st.floats(-0.03, 0.03), st.floats(-0.03, 0.03)),
    st.sampled_from([1 / 8, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1, 3 / 2, 2, 3, 4]),
)
def test_a_resized_picture_is_right_or_refused(size, focal, off, factor):
    """A resized picture of any camera never keeps its intrinsic and never gets a wrong one."""
    width, height = size
    numbers = (focal * width, focal * width, width * (0.5 + off[0]), height * (0.5 + off[1]))
    now = (round(width * factor), round(height * factor))
    try:
        found, _, notes = together(numbers, now, numbers, size)
    except UserError:
        assert factor != 1
        return
    assert bool(notes) == (factor != 1)
    right = np.array(scaled(numbers, size, now))
    np.testing.assert_allclose(found[[0, 1], [0, 1]], right[[0, 1], [0, 1]], rtol=0.02)
    np.testing.assert_allclose(found[:2, 2], right[:2, 2], atol=0.02 * max(now))
