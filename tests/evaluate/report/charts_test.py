import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from geode_jax.evaluate.report import charts


def curves(svg, colour=0):
    """Points of every path of this colour that is no marker."""
    found = []
    for path in ElementTree.fromstring(svg).iter("path"):
        style, data = path.get("style", ""), path.get("d", "")
        if f"stroke: var(--c{colour})" in style and "transform" not in path.attrib:
            numbers = list(map(float, re.findall(r"[-\d.]+", data)))
            found.append(list(zip(numbers[::2], numbers[1::2], strict=True)))
    return found


def ticks(svg):
    return ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter("text")]


def test_format_number():
    written = [charts.format_number(x) for x in (0.0, 0.25, 1.0, 1234.5, 2e6, 1.5e-5, -0.98, 0.1)]
    assert written == ["0", "0.25", "1", "1,234", "2e6", "1.5e-5", "-0.98", "0.1"]
    assert charts.format_number(float("nan")) == "nan"


def test_a_curve_is_drawn_where_its_values_are():
    svg = charts.line_chart([charts.Series("a", [0, 50, 100], [1.0, 3.0, 2.0])], label="a chart")
    ((first, middle, last),) = curves(svg)
    assert middle[0] == pytest.approx((first[0] + last[0]) / 2, abs=0.1)
    # Up is less in SVG; 3 is twice as far above 1 as 2 is.
    assert first[1] > last[1] > middle[1]
    assert first[1] - middle[1] == pytest.approx(2 * (first[1] - last[1]), abs=0.2)


def test_the_axes_have_numbers_and_a_name():
    svg = charts.line_chart([charts.Series("a", [0, 1000], [0.0, 1.0])], label="")
    assert {"0", "200", "1,000", "0.2", "1", "training step"} <= set(ticks(svg))
    log = charts.line_chart([charts.Series("a", [0, 1], [0.3, 6.0])], label="", log=True)
    assert {"0.5", "1", "2", "5"} <= set(ticks(log))
    decades = charts.line_chart([charts.Series("a", [0, 1], [0.02, 500.0])], label="", log=True)
    assert {"0.1", "1", "10", "100"} <= set(ticks(decades))
    # Less than a factor of 2: round numbers instead of powers of ten.
    narrow = charts.line_chart([charts.Series("a", [0, 1], [0.31, 0.39])], label="", log=True)
    assert len([tick for tick in ticks(narrow) if re.fullmatch(r"0\.3\d*", tick)]) >= 2


def test_decades_are_equally_far_apart_on_a_log_axis():
    svg = charts.line_chart(
        [charts.Series("a", [0, 1, 2, 3], [0.1, 1.0, 10.0, -5.0])], label="", log=True
    )
    ((a, b, c),) = curves(svg)  # the negative value is not drawn
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
    paths = curves(svg)
    assert paths
    for x, y in [point for path in paths for point in path]:
        assert 0 <= x <= 980
        assert 0 <= y <= 310


def test_long_curves_are_thinned_but_keep_their_extent():
    x = np.arange(10_000)
    svg = charts.line_chart([charts.Series("a", x, np.sin(x / 900))], label="")
    (path,) = curves(svg)
    assert 20 < len(path) <= charts.MAX_POINTS
    assert path[-1][0] - path[0][0] > 0.98 * (980 - 52 - 16)


def test_every_marker_has_its_value_as_a_tooltip():
    series = [
        charts.Series("loss", [10, 2000], [1.0, 0.5], style="dots"),
        charts.Series("line", [10, 2000], [1.0, 0.5], 1),
    ]
    root = ElementTree.fromstring(charts.line_chart(series, label=""))
    titles = [title.text for title in root.iter("title")]
    assert titles == ["loss, step 10: 1", "loss, step 2,000: 0.5"]


def test_a_chart_is_the_same_every_time_and_can_stand_beside_others():
    series = [charts.Series("a", range(50), np.cos(np.arange(50)), style="dots")]
    svg = charts.line_chart(series, label="a chart")
    assert svg == charts.line_chart(series, label="a chart")
    # Only colours of the page's style sheet, which has one set for light and one for dark.
    assert set(re.findall(r"(?:stroke|fill): ([^;\"]+)", svg)) <= {
        *("none", "var(--c0)", "var(--soft)", "var(--rule)", "var(--paper)")
    }
    for word in (" id=", "url(", "http", "<style", "#", "date"):
        assert word not in svg


def test_smooth_is_a_moving_mean_that_skips_gaps():
    np.testing.assert_allclose(charts.smooth([1, 2, 3, 4, 5], 3), [1.5, 2, 3, 4, 4.5])
    np.testing.assert_allclose(charts.smooth([1, np.nan, 3], 3), [1, 2, 3])
    np.testing.assert_allclose(charts.smooth([7.0], 5), [7.0])


def test_needs_log_axis():
    assert charts.needs_log_axis([0.1, 30.0])
    assert not charts.needs_log_axis([1.0, 10.0])
    assert not charts.needs_log_axis([0.0, 100.0])
    assert not charts.needs_log_axis([])


def test_names_are_escaped():
    series = [charts.Series("<b>&$_$", [0, 1], [1.0, 2.0], style="dots")]
    svg = charts.line_chart(series, label='"<i>')
    assert "<b>&" not in svg
    assert "<i>" not in svg
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == '"<i>'
    assert next(root.iter("title")).text.startswith("<b>&$_$, step 0")


def test_depth_colours():
    found = charts.depth_colours(np.array([[1.0, 5.0, 0.0, np.nan, 9.0]]), 1.0, 5.0)[0]
    near, far, unknown = (253, 231, 37), (68, 1, 84), (128, 128, 128)
    assert [tuple(map(int, pixel)) for pixel in found] == [near, far, unknown, unknown, far]


@pytest.mark.parametrize("home", [None, "/dev/null/home"])
def test_a_process_without_a_home_draws_without_a_warning(home, tmp_path):
    names = ("MPLCONFIGDIR", "HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"TMPDIR": str(tmp_path)} | ({} if home is None else {"HOME": home})
    code = """if 1:
        import sys
        from geode_jax.evaluate.report import charts, page
        assert "matplotlib" not in sys.modules
        assert charts.line_chart([charts.Series("a", [0, 1], [1, 2])], label="")
    """
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert not [path for path in tmp_path.iterdir() if "matplotlib" in path.name]
