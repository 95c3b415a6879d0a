"""Exports of RGB-D folders: geometry against the ground truth, broken frames, splits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from geode_jax.errors import UserError
from geode_jax.exports import Export, validate
from geode_jax.sources.rgbd.export import estimate_up, group_views, make_rgbd_export
from geode_jax.sources.rgbd.folder import open_folder
from geode_jax.sources.rgbd.frame import read_frame
from geode_jax.sources.rgbd.questions import KINDS, PLACES
from geode_jax.sources.rooms.arrays import tokens
from geode_jax.sources.rooms.scene import make_and_observe
from geode_jax.sources.splits import split_frames
from geode_jax.sources.stand_ins import patch_tokens

# A synthetic hall, y down as in the first camera's frame: x in [-3, 3], y in [-1.5, 1.2] (floor at
# 1.2), z in [-4, 4]. The world point p has the colour SHADE * (p - LOW).
LOW, HIGH = np.array([-3, -1.5, -4]), np.array([3, 1.2, 4])
SHADE = 250 / (HIGH - LOW)
DEPTH_SIZE, COLOR_SIZE = (160, 128), (180, 128)  # width, height
DEPTH_K = np.array([[120, 0, 82.5], [0, 124, 60.5], [0, 0, 1.0]])
COLOR_K = np.array([[121, 0, 85], [0, 123, 60], [0, 0, 1.0]])  # not a scaled DEPTH_K


def camera_pose(n: int) -> np.ndarray:
    """Returns the world-from-camera pose [4, 4] of frame n of a walk with a turning camera."""
    pose = np.eye(4)
    turn = [-0.25 - 0.1 * np.sin(0.9 * n), 0.5 * np.sin(0.4 * n), 0.02 * np.cos(n)]
    pose[:3, :3] = Rotation.from_euler("xyz", turn).as_matrix()
    pose[:3, 3] = 0.12 * n - 1, 0.1 * np.sin(0.7 * n), 0.2 * np.cos(0.5 * n)
    return pose


def look(pose: np.ndarray, intrinsic: np.ndarray, size: tuple[int, int]):
    """Returns depth [h, w] and world points [h, w, 3] of the hall's walls."""
    u, v = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    x, y = (u - intrinsic[0, 2]) / intrinsic[0, 0], (v - intrinsic[1, 2]) / intrinsic[1, 1]
    rays = np.stack([x, y, np.ones_like(x)], -1) @ pose[:3, :3].T
    walls = np.where(rays > 0, HIGH, LOW)
    depth = ((walls - pose[:3, 3]) / rays).min(-1)
    return depth, pose[:3, 3] + depth[..., None] * rays


def write_hall(folder: Path, frames: int = 24) -> Path:
    """Writes the hall in the layout of a ScanNet export, frames 0, 10, 20, ..."""
    for kind in ("color", "depth", "pose", "intrinsic"):
        (folder / kind).mkdir(parents=True)
    for n in range(frames):
        pose = camera_pose(n)
        depth, _ = look(pose, DEPTH_K, DEPTH_SIZE)
        _, points = look(pose, COLOR_K, COLOR_SIZE)
        stored = np.round(depth * 1000).astype(np.uint16)
        Image.fromarray(stored).save(folder / "depth" / f"{10 * n}.png")
        colour = np.round((points - LOW) * SHADE).astype(np.uint8)
        Image.fromarray(colour).save(folder / "color" / f"{10 * n}.png")
        np.savetxt(folder / "pose" / f"{10 * n}.txt", pose)
    for kind, matrix in (("depth", DEPTH_K), ("color", COLOR_K)):
        whole = np.eye(4)
        whole[:3, :3] = matrix
        np.savetxt(folder / "intrinsic" / f"intrinsic_{kind}.txt", whole)
    return folder


@pytest.fixture(scope="module")
def hall(tmp_path_factory) -> Path:
    return write_hall(tmp_path_factory.mktemp("hall") / "hall")


@pytest.fixture(scope="module")
def small_hall(tmp_path_factory) -> Path:
    return write_hall(tmp_path_factory.mktemp("hall") / "hall", frames=8)


@pytest.fixture(scope="module")
def hall_export(hall, tmp_path_factory) -> tuple[Export, dict]:
    folder = tmp_path_factory.mktemp("exports") / "hall"
    summary = make_rgbd_export(hall, folder, image_side=80, progress=False)
    return Export(folder), summary


def frame_numbers(export: Export, scene_id: str, pose=camera_pose, frames: int = 24) -> list[int]:
    """Returns the frames of the hall that are a scene's views."""
    extrinsic = export.read_scene(scene_id, ["camera/extrinsic"])["camera/extrinsic"]
    truth = np.array([np.linalg.inv(pose(n))[:3] for n in range(frames)])
    error = np.abs(extrinsic[:, None] - truth).max((2, 3))
    assert error.min(1).max() < 1e-5
    return error.argmin(1).tolist()


def copy_of(hall: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hall, tmp_path / "hall"))


# --- Writing --------------------------------------------------------------------------------------


def test_the_export_obeys_the_contract(hall_export):
    export, summary = hall_export
    report = validate(export.folder)
    assert report["splits"] == summary["scenes"] == {"train": 32, "val": 8, "test": 8}
    kinds = {kind for counts in summary["questions"].values() for kind in counts}
    assert report["questions"].keys() == kinds == set(KINDS)
    tensors = {t["name"]: t["shape"] for t in report["tensors"]}
    assert tensors["vggt/tokens"] == ["4", "64", "76"]
    assert tensors["target/depth"] == tensors["vggt/depth"] == ["4", "16", "16"]
    assert tensors["images"] == ["4", "64", "80", "3"]
    assert not any("boxes" in name for name in tensors)
    assert export.manifest["tokens_contain_depth"] is True
    assert "CONTAIN THE DEPTH" in export.manifest["notes"]
    assert summary["frames"] == {"found": 24, "thinned_out": 0, "used": 24, "dropped": {}}


def test_depth_points_and_cameras_are_those_of_the_hall(hall_export):
    export, _ = hall_export
    for scene_id in export.scene_ids()[::9]:
        arrays = export.read_scene(scene_id)
        for view, n in enumerate(frame_numbers(export, scene_id)):
            intrinsic = arrays["camera/intrinsic"][view].astype(np.float64)
            depth, points = look(camera_pose(n), intrinsic, (16, 16))
            known = arrays["vggt/depth"][view] > 0
            assert known.all()
            # Stored in millimetres; where two walls meet, the median is on one of them.
            error = np.abs(arrays["vggt/depth"][view] / depth - 1)
            assert np.median(error) < 5e-4 and np.percentile(error, 95) < 2e-3
            assert error.max() < 0.03
            assert np.abs(arrays["vggt/points"][view] - points).max() < 0.1
        assert (arrays["target/depth"] == arrays["vggt/depth"]).all()


def test_normals_are_those_of_the_walls(hall):
    frame = read_frame(open_folder(hall), "20", (8, 8), 80)
    axis = np.abs(frame.normals).argmax(-1)
    aligned = np.take_along_axis(np.abs(frame.normals), axis[..., None], -1)[..., 0] > 0.999
    assert aligned.mean() > 0.7  # the others straddle an edge of the hall
    to_camera = frame.view.centre - frame.points
    assert ((frame.normals * to_camera).sum(-1)[aligned] > 0).all()
    on_wall = np.minimum(np.abs(frame.points - LOW), np.abs(frame.points - HIGH)).argmin(-1)
    assert (on_wall == axis)[aligned].all()


def test_pictures_show_what_the_depth_map_shows(hall_export):
    # Colour and depth differ in resolution, focal length and centre: only a picture resampled to
    # the depth camera has the colour of the point at the same place.
    export, _ = hall_export
    arrays = export.read_scene(export.scene_ids()[0])
    cells = arrays["images"].reshape(4, 16, 4, 16, 5, 3).astype(np.float64).mean((2, 4))
    inside = cells.min(-1) > 0.5  # the depth camera sees a little more than the colour camera
    assert inside.mean() > 0.85
    error = np.abs(cells - (arrays["vggt/points"] - LOW) * SHADE).max(-1)[inside]
    assert np.median(error) < 2
    assert np.percentile(error, 95) < 12


def test_frames_are_what_a_person_sees_whatever_they_are_called(small_hall, tmp_path):
    folder = copy_of(small_hall, tmp_path)
    for path in sorted((folder / "color").iterdir()):
        pixels = np.asarray(Image.open(path))
        path.unlink()
        if path.stem == "10":  # with an opaque alpha channel
            opaque = np.full((*pixels.shape[:2], 1), 255, np.uint8)
            Image.fromarray(np.concatenate([pixels, opaque], -1)).save(path.with_suffix(".PNG"))
        else:
            _flagged(path.with_suffix(".JPG"), 8, pixels.swapaxes(0, 1)[:, ::-1])
    for path in sorted((folder / "depth").iterdir()):
        path.rename(path.with_suffix(".Png"))
    written = {}
    for name, root in (("plain", small_hall), ("other", folder)):
        made = make_rgbd_export(root, tmp_path / name, image_side=80, progress=False)
        assert made["frames"]["used"] == 8
        export = Export(tmp_path / name)
        written[name] = [export.read_scene(scene_id) for scene_id in export.scene_ids()]
        assert validate(tmp_path / name)["warnings"] == []
    for plain, other in zip(written["plain"], written["other"], strict=True):
        for tensor, array in plain.items():
            np.testing.assert_array_equal(array, other[tensor])


def test_square_pictures_show_the_same_squeezed(hall):
    frame = read_frame(open_folder(hall), "20", (8, 8), 80, square=True)
    assert frame.image.shape == (80, 80, 3)
    cells = frame.image.reshape(16, 5, 16, 5, 3).astype(np.float64).mean((1, 3))
    inside = cells.min(-1) > 0.5
    assert inside.mean() > 0.85
    error = np.abs(cells - (frame.points - LOW) * SHADE).max(-1)[inside]
    assert np.median(error) < 2


def test_missing_depth_is_zero_and_nothing_else(hall, tmp_path):
    folder = copy_of(hall, tmp_path)
    for n in range(24):
        path = folder / "depth" / f"{10 * n}.png"
        stored = np.asarray(Image.open(path)).copy()
        stored[:64] = 0
        stored[64:, :80] = 65535  # another value for unknown depth
        Image.fromarray(stored).save(path)
    make_rgbd_export(folder, tmp_path / "out", image_side=80, progress=False)
    export = Export(tmp_path / "out")
    arrays = export.read_scene(export.scene_ids()[0])
    unknown = arrays["vggt/depth"] == 0
    assert unknown[:, :8].all() and unknown[:, 8:, :8].all() and not unknown[:, 9:, 9:].any()
    assert (arrays["vggt/points"][unknown] == 0).all()
    asked = "".join(q["question"] for q in export.questions())
    assert "at the lower right of" in asked
    assert not any(f"at the {place} of" in asked for place in PLACES if place != "lower right")


def test_tokens_are_the_same_function_as_those_of_rooms():
    _, seen = make_and_observe(0, 3)
    cells, grid = (4, 16, 16), (4, 8, 8)
    colour = seen.colour.reshape(4, 16, 2, 16, 2, 3)
    light = colour @ np.array([0.299, 0.587, 0.114])
    ours = patch_tokens(
        seen.cells.point.reshape(*cells, 3),
        seen.cells.depth.reshape(cells),
        seen.cells.normal.reshape(*cells, 3),
        colour.mean((2, 4)),
        light.std((2, 4)),
        seen.slopes.reshape(4, 16, 2, 16, 2, 2).mean((2, 4)),
        seen.patches.point.reshape(*grid, 3),
    )
    theirs = tokens(seen)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), atol=2e-3)


def test_tokens_carry_the_point_the_depth_and_the_colour_of_their_cell(hall_export):
    export, _ = hall_export
    arrays = export.read_scene(export.scene_ids()[2])
    cell = arrays["vggt/tokens"].astype(np.float32)[:, 8 * 3 + 5, 13:26]  # patch (3, 5), cell 1
    np.testing.assert_allclose(cell[:, :3] * 4, arrays["vggt/points"][:, 6, 11], atol=0.01)
    np.testing.assert_allclose(cell[:, 3] * 4, arrays["vggt/depth"][:, 6, 11], atol=0.01)
    pixels = arrays["images"][:, 24:28, 55:60].astype(np.float32) / 255
    np.testing.assert_allclose(cell[:, 7:10], pixels.mean((1, 2)), atol=2e-3)


# --- Splits and order -----------------------------------------------------------------------------


def test_held_out_scenes_share_no_frame_with_training(hall_export):
    export, _ = hall_export
    used = {
        split: {n for i in export.scene_ids(split) for n in frame_numbers(export, i)}
        for split in ("train", "val", "test")
    }
    assert max(used["train"]) < min(used["val"]) and max(used["val"]) < min(used["test"])
    assert used["train"] == set(range(16)) and used["test"] == set(range(20, 24))


@pytest.mark.parametrize("count", (2, 3, 5, 19, 20, 21, 43))
@pytest.mark.parametrize("views", (1, 4))
def test_splits_are_contiguous_and_complete(count, views):
    parts = split_frames(count, views)
    assert [n for part in parts.values() for n in part] == list(range(count))
    assert all(len(part) for part in parts.values())
    if "test" in parts:
        assert min(len(part) for part in parts.values()) >= views
    assert len(parts["train"]) >= count // 2


def test_groups_differ_and_overlap():
    groups = group_views(range(10, 40), 4, 60, np.random.default_rng(0))
    assert len(groups) == len(set(groups)) == 60
    assert {n for group in groups for n in group} <= set(range(10, 40))
    assert all(max(g) - min(g) < 12 and len(set(g)) == 4 for g in groups)
    assert np.mean([g[0] < g[1] for g in groups]) < 0.75  # the order does not reveal the time
    assert len(group_views(range(2), 4, 60, np.random.default_rng(0))) == 2


def test_the_seed_decides(small_hall, tmp_path):
    def made(name, seed):
        make_rgbd_export(small_hall, tmp_path / name, image_side=16, seed=seed, progress=False)
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        return manifest["scenes"], manifest["questions"]

    first = made("a", 0)
    assert made("b", 0) == first
    assert made("c", 1) != first


def test_long_sequences_are_thinned_out(hall, tmp_path):
    summary = make_rgbd_export(hall, tmp_path / "out", max_frames=6, image_side=16, progress=False)
    assert summary["frames"] == {"found": 24, "thinned_out": 18, "used": 6, "dropped": {}}
    export = Export(tmp_path / "out")
    used = sorted({n for i in export.scene_ids() for n in frame_numbers(export, i)})
    assert used == [0, 5, 9, 14, 18, 23]


# --- Bad frames -----------------------------------------------------------------------------------


def _pose_with(change):
    def damage(folder):
        pose = camera_pose(5)
        change(pose)
        np.savetxt(folder / "pose" / "50.txt", pose)

    return damage


def _depth_of(stored):
    return lambda folder: Image.fromarray(stored).save(folder / "depth" / "50.png")


def _truncate(path):
    path.write_bytes(path.read_bytes()[:200])


DAMAGE = {
    "pose not finite": _pose_with(lambda pose: pose.fill(-np.inf)),
    "pose not finite (nan)": _pose_with(lambda pose: pose[0, :1].fill(np.nan)),
    "pose not rigid": _pose_with(lambda pose: pose[:3, 0].__imul__(1.01)),
    "pose not rigid (mirror)": _pose_with(lambda pose: pose[:3, 0].__imul__(-1)),
    "pose not rigid (last row)": _pose_with(lambda pose: pose[3, :1].fill(0.5)),
    "no pose": lambda folder: (folder / "pose" / "50.txt").unlink(),
    "unreadable pose": lambda folder: (folder / "pose" / "50.txt").write_text("1 2 three"),
    "no colour image": lambda folder: (folder / "color" / "50.png").unlink(),
    "unreadable colour image": lambda folder: _truncate(folder / "color" / "50.png"),
    "no depth image": lambda folder: (folder / "depth" / "50.png").unlink(),
    "unreadable depth image": lambda folder: _truncate(folder / "depth" / "50.png"),
    "unreadable depth image (text)": lambda f: (f / "depth" / "50.png").write_text("no image"),
    "no depth in the depth image": _depth_of(np.zeros((128, 160), np.uint16)),
    "depth image not 16 bit": _depth_of(np.ones((128, 160), np.uint8)),
    "depth image of another size": _depth_of(np.ones((127, 160), np.uint16)),
}


def _flagged(path: Path, flag: int, stored: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = flag
    Image.fromarray(np.ascontiguousarray(stored)).save(path, "PNG", exif=exif)


DAMAGE |= {
    "depth image with an orientation flag": lambda folder: _flagged(
        folder / "depth" / "50.png", 3, np.asarray(Image.open(folder / "depth" / "50.png"))
    ),
    # As shown it is turned by 90 degrees against the depth.
    "colour image of another size": lambda folder: _flagged(
        folder / "color" / "50.png", 6, np.asarray(Image.open(folder / "color" / "50.png"))
    ),
    "colour image with an orientation flag that depth does not confirm": lambda folder: _flagged(
        folder / "color" / "50.png", 3, np.asarray(Image.open(folder / "color" / "50.png"))
    ),
    "colour image of another size (halved)": lambda folder: Image.new("RGB", (90, 64)).save(
        folder / "color" / "50.png"
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_bad_frame_is_dropped_and_counted(small_hall, tmp_path, name):
    folder = copy_of(small_hall, tmp_path)
    DAMAGE[name](folder)
    summary = make_rgbd_export(
        folder, tmp_path / "out", scenes_per_frame=1, image_side=16, progress=False
    )
    assert summary["frames"]["dropped"] == {name.partition(" (")[0]: 1}
    assert summary["frames"]["used"] == 7
    export = Export(tmp_path / "out")
    used = {n for i in export.scene_ids() for n in frame_numbers(export, i)}
    assert 5 not in used
    assert "1 dropped (1 " + name.partition(" (")[0] in export.manifest["notes"]


@pytest.mark.parametrize(
    ("change", "depth_scale", "parts"),
    [
        (None, 1000, ()),
        (
            np.linalg.inv,
            1000,
            ("views disagree", "with inverted poses only 0% differ: are they camera-to"),
        ),
        (
            lambda pose: pose @ np.diag([1, -1, -1, 1]),
            1000,
            ("views disagree", "axes as OpenGL's (y up, z back) only 0% differ: are the axes"),
        ),
        (lambda pose: np.eye(4), 1000, ("all views have the same pose (is it known?)",)),
        (None, 5000, ("views disagree", "with depth times 5 only 0% differ: is the depth scale")),
        (None, 1, ("the room extends over more than 30 m",)),
        (None, 1e6, ("the room extends over less than 0.5 m",)),
    ],
)
def test_wrong_poses_and_depth_scales_are_warned_of(
    small_hall, tmp_path, capsys, change, depth_scale, parts
):
    folder = copy_of(small_hall, tmp_path)
    for path in (folder / "pose").iterdir():
        pose = np.loadtxt(path)
        np.savetxt(path, change(pose) if change else pose)
    options = {"depth_scale": depth_scale, "scenes_per_frame": 1, "image_side": 16}
    made = make_rgbd_export(folder, tmp_path / "out", **options)
    warnings = made["warnings"]
    assert warnings == validate(tmp_path / "out")["warnings"]
    assert bool(warnings) == bool(parts) == ("warning: " in capsys.readouterr().err)
    assert all(any(part in line for line in warnings) for part in parts)


@pytest.mark.parametrize("flag", [2, 4, 6])
def test_flags_that_nothing_confirms_are_refused(small_hall, tmp_path, flag):
    folder = copy_of(small_hall, tmp_path)
    for path in (folder / "color").iterdir():
        _flagged(path, flag, np.asarray(Image.open(path)))
    rule = rf"color: pictures have the orientation flag {flag} and depth has none"
    with pytest.raises(UserError, match=rule):
        open_folder(folder)


def test_without_usable_frames_there_is_no_export(hall, tmp_path):
    folder = copy_of(hall, tmp_path)
    for n in range(1, 24):
        (folder / "pose" / f"{10 * n}.txt").write_text("-inf " * 16)
    with pytest.raises(UserError) as error:
        make_rgbd_export(folder, tmp_path / "out", progress=False)
    assert str(error.value) == (
        f"{folder}: 1 of 24 frames usable, at least 2 are needed (23 pose not finite)"
    )
    assert not (tmp_path / "out").exists()


def _without(*names):
    def damage(folder):
        for name in names:
            shutil.rmtree(folder / name)

    return damage


def _intrinsic(folder, kind, matrix):
    np.savetxt(folder / "intrinsic" / f"intrinsic_{kind}.txt", matrix)


BAD_FOLDERS = {
    "no such folder": _without(""),
    "color/ and depth/ are needed": _without("color"),
    "camera unknown": _without("intrinsic"),
    "no poses": _without("pose"),
    "no readable image": lambda f: [p.write_text("") for p in (f / "depth").iterdir()],
    "names in color/ and depth/ must be numbers": lambda f: [
        p.rename(p.with_stem("frame" + p.stem))
        for kind in ("color", "depth", "pose")
        for p in list((f / kind).iterdir())
    ],
    "3x3 or 4x4": lambda f: (f / "intrinsic" / "intrinsic_depth.txt").write_text("1 2 3"),
    "are no camera": lambda f: _intrinsic(f, "depth", 0 * DEPTH_K + np.diag([0, 0, 1])),
    "as of a pinhole": lambda f: _intrinsic(f, "depth", DEPTH_K.T),
    "fy has another sign": lambda f: _intrinsic(f, "color", COLOR_K * [[1], [-1], [1]]),
    "at 0.78, 0.48 of the sides of": lambda f: _intrinsic(
        f, "depth", DEPTH_K + [[0, 0, 42], [0, 0, 0], [0, 0, 0]]
    ),
}


@pytest.mark.parametrize("rule", BAD_FOLDERS)
def test_a_bad_folder_is_refused_in_one_line(small_hall, tmp_path, rule):
    folder = copy_of(small_hall, tmp_path)
    BAD_FOLDERS[rule](folder)
    with pytest.raises(UserError) as error:
        make_rgbd_export(folder, tmp_path / "out", progress=False)
    assert rule in str(error.value) and str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_two_folders_in_one_are_not_guessed_between(hall, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(hall, tmp_path / "both" / name)
    with pytest.raises(UserError, match="holds 2 RGB-D folders"):
        open_folder(tmp_path / "both")
    assert open_folder(tmp_path / "both" / "b").folder == tmp_path / "both" / "b"


# --- Cameras and layouts --------------------------------------------------------------------------


def test_one_intrinsic_serves_both_sizes(hall, tmp_path):
    folder = copy_of(hall, tmp_path)
    (folder / "intrinsic" / "intrinsic_depth.txt").unlink()
    with pytest.raises(UserError, match="pictures of different shapes need an intrinsic each"):
        open_folder(folder)
    for path in (folder / "color").iterdir():
        Image.new("RGB", (240, 192)).save(path)
    color_k = [[180, 0, 114.5], [0, 181, 98], [0, 0, 1]]
    _intrinsic(folder, "color", color_k)
    source = open_folder(folder)
    # 240 x 192 to 160 x 128; edges stay edges: (114.5 + 1/2) * 160 / 240 - 1/2.
    expected = [[120, 0, 230 / 3 - 0.5], [0, 181 / 1.5, 98.5 / 1.5 - 0.5], [0, 0, 1]]
    np.testing.assert_allclose(source.depth_intrinsic, expected)
    np.testing.assert_allclose(source.color_intrinsic, color_k)
    (folder / "intrinsic" / "intrinsic_depth.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"intrinsic_depth\.txt: must be a 3x3"):
        open_folder(folder)


def test_pose_rows_are_the_same_poses(hall, tmp_path):
    folder = copy_of(hall, tmp_path)
    shutil.rmtree(folder / "pose")
    poses = [camera_pose(n) for n in range(24)]
    rows = [[*p[:3, 3], *(-2 * Rotation.from_matrix(p[:3, :3]).as_quat())] for p in poses]
    np.savetxt(folder / "pose.txt", rows)
    source = open_folder(folder)
    for name, pose in zip(source.names, poses, strict=True):
        np.testing.assert_allclose(source.read_pose(name), pose, atol=1e-9)
    rows[3][3:] = [0] * 4
    np.savetxt(folder / "pose.txt", rows)
    summary = make_rgbd_export(folder, tmp_path / "out", image_side=16, progress=False)
    assert summary["frames"]["dropped"] == {"pose not finite": 1}
    np.savetxt(folder / "pose.txt", rows[:-1])
    with pytest.raises(UserError, match="23 rows for 24 frames"):
        open_folder(folder)
    np.savetxt(folder / "pose.txt", np.array(rows)[:, :6])
    with pytest.raises(UserError, match="rows must be tx ty tz qx qy qz qw"):
        open_folder(folder)


def test_up_is_found_from_level_surfaces():
    random = np.random.default_rng(0)
    world = Rotation.random(rng=random).as_matrix()
    # Cameras that all look down by 30 degrees, walls, and a floor seen with 2 degrees of noise.
    turns = random.uniform(-180, 180, 30)
    poses = np.tile(np.eye(4), (30, 1, 1))
    poses[:, :3, :3] = (
        world @ Rotation.from_euler("YX", [(t, -30) for t in turns], True).as_matrix()
    )
    angle = random.uniform(0, 2 * np.pi, 500)
    walls = np.stack([np.cos(angle), 0 * angle, np.sin(angle)], -1)
    floor = [0, -1, 0] + 0.035 * random.normal(size=(300, 3))
    slanted = [0.5, -0.8, 0] + 0.01 * random.normal(size=(100, 3))
    normals = np.concatenate([walls, floor, -floor, slanted, np.zeros((50, 3))])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    up = estimate_up(poses, normals @ world.T)
    assert np.degrees(np.arccos(up @ world @ [0, -1, 0])) < 1
    alone = estimate_up(poses, np.zeros((4, 3)))
    assert np.degrees(np.arccos(alone @ world @ [0, -1, 0])) < 15


def test_up_in_the_hall(hall_export):
    _, summary = hall_export
    assert np.degrees(np.arccos(np.dot(summary["up"], [0, -1, 0]))) < 1
