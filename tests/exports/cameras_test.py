"""Plausibility checks of cameras, and the warnings that `validate` gives."""

import numpy as np
import pytest

from geode_jax.exports import ExportWriter, cameras, format_summary, validate
from tests.third_party.conftest import scene_arrays


def intrinsic(fx, fy, cx, cy):
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


@pytest.mark.parametrize(
    ("numbers", "size"),
    [
        ((525, 525, 319.5, 239.5), (640, 480)),  # the first Kinects' default
        ((517.3, 516.5, 318.6, 255.3), (640, 480)),  # TUM, freiburg1
        ((520.9, 521.0, 325.1, 249.7), (640, 480)),
        ((535.4, 539.2, 320.1, 247.6), (640, 480)),
        ((481.2, -480.0, 319.5, 239.5), (640, 480)),  # ICL-NUIM
        ((1169.621, 1167.105, 646.295, 489.927), (1296, 968)),  # ScanNet
        ((577.871, 577.871, 319.5, 239.5), (640, 480)),
        ((756.832, 756.026, 492.889, 270.419), (960, 540)),  # 3RScan
        ((365.5, 365.5, 254.9, 205.4), (512, 424)),  # the second Kinects' depth
        ((1445.3, 1445.3, 714.2, 959.1), (1440, 1920)),  # a phone held upright
        ((210.0, 280.0, 127.5, 127.5), (256, 256)),  # 4 : 3 in a square
        ((10, 10.5, 6, 3.5), (12, 8)),
    ],
)
def test_real_cameras_are_plausible(numbers, size):
    assert cameras.fault(intrinsic(*numbers), size) is None


@pytest.mark.parametrize(
    ("numbers", "size", "rule"),
    [
        ((525, 525, 319.5, 239.5), (320, 240), "at 1.00, 1.00 of the sides"),
        ((525, 525, 319.5, 239.5), (1296, 968), "at 0.25, 0.25 of the sides"),
        ((525, 525, 319.5, 239.5), (480, 640), "at 0.67, 0.38 of the sides"),  # turned
        ((525, 525, 319.5, 239.5), (568, 426), "at 0.56, 0.56 of the sides"),
        ((0.8, 1.1, 0.5, 0.5), (640, 480), "at 0.00, 0.00 of the sides"),  # shares of the sides
        ((5.25, 525, 319.5, 239.5), (640, 480), "no camera sees"),
        ((525, 125, 319.5, 239.5), (640, 480), "pixels 4.2 times as high"),
        ((525_000, 525_000, 319.5, 239.5), (640, 480), "no camera sees"),
        ((0, 525, 319.5, 239.5), (640, 480), "are no camera"),
        ((525, np.nan, 319.5, 239.5), (640, 480), "are no camera"),
        ((525, 525, np.inf, 239.5), (640, 480), "are no camera"),
    ],
)
def test_implausible_cameras_are_refused(numbers, size, rule):
    assert rule in cameras.fault(intrinsic(*numbers), size)


def test_validate_warns_of_wrong_cameras(tmp_path):
    random = np.random.default_rng(0)
    about = {"project": "p", "commit": "c", "weights": "w", "licence": "l"}
    options = {"dtype": "float32", "scale": "metric", "token_width": 4, "patch_grid": (2, 2)}
    options |= {"tokens_contain_depth": False, "categories": [], "notes": "n", "producer": about}
    with ExportWriter(tmp_path / "e", **options) as writer:
        for scene in ("scene0001_00", "scene0001_01"):
            arrays = scene_arrays(random, views=3, side=16)
            arrays["images"] = np.full((3, 16, 16, 3), 9, np.uint8)
            arrays["vggt/points"] = random.normal(size=(3, 16, 16, 3)).astype(np.float32)
            if scene == "scene0001_01":
                arrays["camera/intrinsic"][1, :2] *= 2  # as if for pictures twice as large
                arrays["images"][:, 4:] = 0
                arrays["vggt/points"][:, 0] *= 30
            writer.add_scene(scene, arrays, split="val" if scene.endswith("1") else "train")
            record = {"id": scene, "scene_id": scene, "kind": "k", "question": "?"}
            writer.add_questions([record | {"answer": "a"}])
    summary = validate(tmp_path / "e")
    *camera_warnings, rooms = summary["warnings"]
    assert rooms == (
        "scans of 1 rooms are in several splits, the first: scene0001_00 of train, "
        "scene0001_01 of val"
    )
    assert [line.rpartition(" up to ")[0] for line in camera_warnings] == [
        "in 1 of 2 scenes pictures are black where colour saw nothing, share of pixels:",
        "in 1 of 2 scenes points are more than twice as far away as 90 % of them, share of points:",
        "in 1 of 2 scenes the principal point is off the middle of the picture (is the intrinsic "
        "for another size?) by this share of the side:",
    ]
    black, outside, off = (float(line.split()[-1]) for line in camera_warnings)
    assert black == 0.75 and off == pytest.approx(0.53, abs=0.01)
    assert outside == pytest.approx(1 / 16, abs=0.02)
    lines = format_summary(summary).splitlines()
    assert lines[-4:] == [f"warning: {line}" for line in summary["warnings"]]
