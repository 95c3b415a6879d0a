import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geode_jax.evaluate.report import charts


def points(svg, css_class):
    """Coordinates of every path of this class."""
    paths = [p for p in ElementTree.fromstring(svg).iter("path") if css_class in p.get("class")]
    return [[tuple(map(float, pair.split())) for pair in p.get("d")[1:].split("L")] for p in paths]


def test_ticks():
    assert charts.linear_ticks(-0.1, 1.05, 5) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert charts.linear_ticks(0.0, 2995.0, 10) == [0.0, 500.0, 1000.0, 1500.0, 2000.0, 2500.0]
    assert charts.log_ticks(0.02, 500.0, 5) == [0.1, 1.0, 10.0, 100.0]
    assert charts.log_ticks(0.3, 6.0, 5) == [0.5, 1.0, 2.0, 5.0]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 12))
def test_linear_ticks_are_round_evenly_spaced_and_inside(low, span, count):
    ticks = charts.linear_ticks(low, low + span, count)
    assert len(ticks) <= count + 1
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)
    if len(ticks) > 2:
        assert np.ptp(np.diff(ticks)) <= 1e-6 * span


def test_format_number():
    written = [charts.format_number(x) for x in (0.0, 0.25, 1.0, 1234.5, 2e6, 1.5e-5, -0.98, 0.1)]
    assert written == ["0", "0.25", "1", "1,234", "2e6", "1.5e-5", "-0.98", "0.1"]
    assert charts.format_number(float("nan")) == "nan"


def test_a_curve_is_drawn_where_its_values_are():
    svg = charts.line_chart([charts.Series("a", [0, 50, 100], [1.0, 3.0, 2.0])], label="a chart")
    ((first, middle, last),) = points(svg, "line")
    assert middle[0] == pytest.approx((first[0] + last[0]) / 2, abs=0.1)
    # Up is less in SVG; 3 is twice as far above 1 as 2 is.
    assert first[1] > last[1] > middle[1]
    assert first[1] - middle[1] == pytest.approx(2 * (first[1] - last[1]), abs=0.2)


def test_decades_are_equally_far_apart_on_a_log_axis():
    svg = charts.line_chart(
        [charts.Series("a", [0, 1, 2, 3], [0.1, 1.0, 10.0, -5.0])], label="", log=True
    )
    ((a, b, c),) = points(svg, "line")  # the negative value is not drawn
    assert a[1] - b[1] == pytest.approx(b[1] - c[1], abs=0.2)


def test_nothing_to_draw():
    assert charts.line_chart([], label="") == ""
    assert charts.line_chart([charts.Series("a", [0, 1], [np.nan, np.inf])], label="") == ""
    assert charts.line_chart([charts.Series("a", [0], [-1.0])], label="", log=True) == ""


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [1e-12, 3e12], [1.0, np.nan, 4.0]])
def test_awkward_curves_stay_inside_the_picture(values, log):
    svg = charts.line_chart(
        [charts.Series("a", range(len(values)), values, style="dots")], label="", log=log
    )
    for x, y in [point for path in points(svg, "line") for point in path]:
        assert 0 <= x <= 980
        assert 0 <= y <= 300


def test_long_curves_are_thinned_but_keep_their_extent():
    x = np.arange(10_000)
    svg = charts.line_chart([charts.Series("a", x, np.sin(x / 900))], label="")
    (path,) = points(svg, "line")
    assert len(path) == charts.POINTS
    assert path[-1][0] - path[0][0] > 0.98 * (980 - 52 - 14)


def test_smooth_is_a_moving_mean_that_skips_gaps():
    np.testing.assert_allclose(charts.smooth([1, 2, 3, 4, 5], 3), [1.5, 2, 3, 4, 4.5])
    np.testing.assert_allclose(charts.smooth([1, np.nan, 3], 3), [1, 2, 3])
    np.testing.assert_allclose(charts.smooth([7.0], 5), [7.0])


def test_wants_log():
    assert charts.wants_log([0.1, 30.0])
    assert not charts.wants_log([1.0, 10.0])
    assert not charts.wants_log([0.0, 100.0])
    assert not charts.wants_log([])


def test_names_are_escaped():
    series = [charts.Series("<b>&", [0, 1], [1.0, 2.0], style="dots")]
    for text in (charts.line_chart(series, label='"<i>'), charts.legend(series)):
        assert "<b>&" not in text
        assert "<i>" not in text
        ElementTree.fromstring(text)
