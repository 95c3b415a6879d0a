"""ARKitScenes: videos written in its layout, from turned cuboids with known boxes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from geode_jax.errors import UserError
from geode_jax.exports import Export, validate
from geode_jax.exports.files import Entry
from geode_jax.sources.datasets import Request
from geode_jax.sources.datasets.instances import upright_box
from geode_jax.sources.datasets.prepare import prepare
from geode_jax.sources.rgbd import arkit
from geode_jax.sources.rgbd.sequence import Dropped
from geode_jax.sources.rooms import raycast
from tests.sources.datasets.scannet_test import ROOM, boxes_of, ply_bytes, surface

NAMES = ("table", "chair", "chair", "cabinet", "tv_monitor", "sofa", "stool")
FLOOR = -1.3
"""Height of the floor in ARKit's world, whose origin is where the device started, metres."""
FRAMES = 12
SKIES = {
    "up": np.eye(3),
    "left": np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1]]),
    "down": np.array([[-1, 0, 0], [0, -1, 0], [0, 0, 1]]),
    "right": np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]]),
}
"""Where the sky is in the stored pictures -> the rows are the stored picture's axes (right, down,
ahead) in those of the upright one. With the sky at the left, right is down and down is left."""


def turned_boxes(seed: int) -> np.ndarray:
    """Returns cuboids [7, 7] in the export's frame, each turned about z."""
    boxes = boxes_of(seed)
    boxes[:, 3:5] *= 0.8
    boxes[:, 6] = np.linspace(-1.2, 1.2, len(boxes))
    return boxes.round(3)


def in_world(box: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Returns points [n, 3], given along a box's own axes from its centre, in the world."""
    cos, sin = np.cos(box[6]), np.sin(box[6])
    x, y, z = points.T
    return np.stack([cos * x - sin * y, sin * x + cos * y, z], -1) + box[:3]


def to_own(box: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Returns world points [n, 3] along a box's own axes, from its centre."""
    back = np.array([0, 0, 0, 0, 0, 0, -box[6]])
    return in_world(back, points - box[:3])


def write_video(folder: Path, seed: int = 0, sky: str = "up", labels: bool = True) -> Path:
    """Writes a video of cuboids; its last frame has no pose and its third none of its own."""
    video = folder.name
    for kind in ("lowres_wide", "lowres_depth", "lowres_wide_intrinsics"):
        (folder / kind).mkdir(parents=True)
    boxes = turned_boxes(seed)
    size = (64, 48)  # the sensor's, whichever way the device was held
    angle = np.linspace(0, 2 * np.pi, FRAMES, endpoint=False)
    spots = np.stack([1.9 * np.cos(angle), 1.5 * np.sin(angle), np.full(FRAMES, 1.5)], -1)
    cameras = raycast.camera_poses(spots, angle + np.pi, np.full(FRAMES, -0.5))
    cameras = np.einsum("ab,nbc->nac", SKIES[sky], cameras)
    rows = []
    for n, camera in enumerate(cameras):
        # Every frame has another focal length, and a principal point off the middle.
        fx, fy, cx, cy = 40.0 + n, 41.0 + n, size[0] / 2 + 1, size[1] / 2 - 2
        matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
        rays = raycast.pixel_rays(camera[None], matrix, size[1], size[0])
        hits = raycast.cast(boxes, ROOM, spots[n : n + 1], rays)
        depth = np.round(1000 * hits.depth[0]).astype(np.uint16).reshape(size[::-1])
        shade = (29 * hits.surface[0] % 255).reshape(size[::-1]).astype(np.uint8)
        time = 6845.706 + 0.1 * n
        name = f"{video}_{time:.3f}"
        Image.fromarray(depth).save(folder / "lowres_depth" / f"{name}.png")
        Image.fromarray(np.repeat(shade[..., None], 3, -1)).save(
            folder / "lowres_wide" / f"{name}.png"
        )
        slip = 0.001 if n == 5 else 0.0
        (folder / "lowres_wide_intrinsics" / f"{video}_{time + slip:.3f}.pincam").write_text(
            f"{size[0]} {size[1]} {fx} {fy} {cx} {cy}\n"
        )
        # In ARKit's world the floor is at FLOOR: R (x - (0, 0, FLOOR)) + t.
        turn, move = camera[:, :3], camera[:, 3] - camera[:, :3] @ [0, 0, FLOOR]
        numbers = [time, *Rotation.from_matrix(turn).as_rotvec(), *move]
        rows.append(" ".join(f"{x:.9f}" for x in numbers))
    (folder / "lowres_wide.traj").write_text("\n".join(rows[:-1]) + "\n")
    moved = [in_world(b, surface(np.array([0, 0, 0, *b[3:6], 0]))) for b in boxes]
    mesh = np.concatenate([*moved, surface(np.array([0, 0, ROOM[2] / 2, *ROOM, 0]), 0.06)])
    (folder / f"{video}_3dod_mesh.ply").write_bytes(ply_bytes(mesh + [0, 0, FLOOR]))
    if labels:
        (folder / f"{video}_3dod_annotation.json").write_text(json.dumps(annotation(boxes)))
    return folder


def annotation(boxes: np.ndarray) -> dict:
    """Returns boxes as the data set has them, the second with its axes in another order."""
    data = []
    for n, (label, box) in enumerate(zip(NAMES, boxes, strict=True)):
        cos, sin = np.cos(box[6]), np.sin(box[6])
        axes = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        order = [2, 0, 1] if n == 1 else [0, 1, 2]
        obb = {
            "centroid": (box[:3] + [0, 0, FLOOR]).tolist(),
            "axesLengths": box[3:6][order].tolist(),
            "normalizedAxes": axes[order].reshape(-1).tolist(),
        }
        data.append({"label": label, "uid": str(n), "segments": {"obbAligned": obb}})
    return {"data": data, "skipped": False, "stats": {}}


def write_arkitscenes(root: Path, videos: int = 4) -> Path:
    """Writes videos with the sky at all four sides, three in Training and one in Validation."""
    rows = ["video_id,visit_id,fold"]
    for n in range(videos):
        fold, video = ("Validation", "Training")[n > 0], f"4106902{n}"
        folder = write_video(root / fold / video, n, [*SKIES][n])
        if n == 2:  # as in 3dod
            frames = folder / f"{video}_frames"
            frames.mkdir()
            for path in folder.glob("lowres_*"):
                path.rename(frames / path.name)
        rows.append(f"{video},{420000 + n // 2},{fold}")
    (root / "metadata.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_arkitscenes(tmp_path_factory.mktemp("arkitscenes"))


@pytest.fixture(scope="module")
def prepared(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "arkitscenes"
    report = prepare("arkitscenes", Request(root, out))
    return Export(out), report


def test_the_export_is_the_rooms_whichever_way_the_device_was_held(prepared):
    export, report = prepared
    checked = validate(export.folder)
    assert checked["scenes"] == report.kept["scenes"] == 4
    assert sum(checked["questions"].values()) == report.kept["questions"] > 4 * 8
    assert report.dropped["frame: no pose at its time"] == 4 and not report.warnings
    splits = {entry["id"]: entry["split"] for entry in export.manifest["scenes"]}
    assert splits == {
        "41069020": "val",
        **dict.fromkeys(("41069021", "41069022", "41069023"), "train"),
    }
    for scene_id in export.scene_ids():
        truth, scene = turned_boxes(int(scene_id[-1])), export.read_scene(scene_id)
        # Cameras look down by 0.5 radians, without roll: y is down, and x is level.
        assert np.abs(scene["camera/extrinsic"][:, 0, 2]).max() < 1e-3
        assert scene["camera/extrinsic"][:, 1, 2] == pytest.approx(-np.cos(0.5), abs=1e-3)
        names = [export.categories[n] for n in scene["target/labels"]]
        assert len(names) >= 4
        for name, box in zip(names, scene["target/boxes"], strict=True):
            rows = [n for n, other in enumerate(NAMES) if other.replace("_", " ") == name]
            apart = np.abs(truth[rows] - box)
            turn = (truth[rows, 6] - box[6]) % np.pi  # half a turn does not change a box
            apart[:, 6] = np.minimum(turn, np.pi - turn)
            assert apart.max(-1).min() < 1e-4
        points = scene["vggt/points"][scene["vggt/depth"] > 0]
        inside = np.abs(points - [0, 0, ROOM[2] / 2]) - ROOM / 2
        assert inside.max() < 0.01
        distance = np.abs(inside).min(-1)
        for box in truth:
            outside = np.abs(to_own(box, points)) - box[3:6] / 2
            distance = np.minimum(distance, np.abs(outside.max(-1)))
        assert np.median(distance) < 0.001 and np.percentile(distance, 90) < 0.03
        # The picture shows what the depth map measures: a surface has one colour.
        assert scene["images"].shape[1:3] == (64, 64)
        known = scene["vggt/depth"] > 0
        shades = scene["images"][:, 2::4, 2::4, 0][known][np.abs(points[:, 2]) < 0.003]
        assert len(shades) > 100 and (shades == np.median(shades)).mean() > 0.8


def test_a_pose_between_two_rows_turns_and_moves_evenly():
    poses = np.tile(np.eye(4), (2, 1, 1))
    poses[1, :3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]  # a quarter turn about z
    poses[1, :3, 3] = [1, 2, 4]
    times = np.array([10.0, 10.2])
    pose = arkit.pose_at(times, poses, 10.05)
    eighth = np.pi / 8
    np.testing.assert_allclose(pose[:2, 0], [np.cos(eighth), np.sin(eighth)], atol=1e-9)
    np.testing.assert_allclose(pose[:3, 3], [0.25, 0.5, 1])
    np.testing.assert_array_equal(arkit.pose_at(times, poses, 9.997), poses[0])
    for time, apart in ((9.99, 0.2), (10.3, 0.2), (10.1, 0.4)):
        with pytest.raises(Dropped, match="no pose at its time"):
            arkit.pose_at(np.array([10.0, 10 + apart]), poses, time)


BOX = {
    "centroid": [0, 0, 0],
    "axesLengths": [1, 2, 3],
    "normalizedAxes": np.eye(3).ravel().tolist(),
}
LEANING = [1, 0, 0, 0, 0.96, 0.28, 0, -0.28, 0.96]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"centroid": [0, 0]}, "without a centre"),
        ({"axesLengths": [1, True, 3]}, "without a centre"),
        ({"axesLengths": [1, 0, 3]}, "without an extent"),
        ({"normalizedAxes": [1] * 9}, "not orthonormal"),
        ({"normalizedAxes": LEANING}, "leaning"),
    ],
)
def test_a_box_that_is_none_is_dropped_with_its_reason(change, rule):
    assert upright_box(BOX).tolist() == [0, 0, 0, 1, 2, 3, 0]
    with pytest.raises(Dropped, match=rule):
        upright_box(BOX | change)
    with pytest.raises(Dropped, match="without a centre"):
        upright_box(None)


def test_no_other_video_of_an_excluded_visit_is_trained_on(root, tmp_path):
    exclude = (Entry("list: line 1", ("arkitscenes/41069022.mp4",)),)
    report = prepare("arkitscenes", Request(root, tmp_path / "out", exclude=exclude, views=2))
    assert Export(tmp_path / "out").scene_ids() == ["41069020", "41069021"]
    assert [n for why, n in report.dropped.items() if "scenes to exclude" in why] == [2]


def test_damaged_videos_are_left_out_with_their_lines(tmp_path):
    videos = {n: write_video(tmp_path / "in" / "raw" / f"4000000{n}") for n in range(6)}
    (videos[0] / "lowres_wide.traj").write_text("1 2 3 4 5 6\n")
    (videos[1] / "lowres_wide.traj").unlink()
    path = videos[2] / "40000002_3dod_annotation.json"
    path.write_text(path.read_text()[:99])
    path = videos[3] / "40000003_3dod_annotation.json"
    path.write_text(path.read_text().replace('"obbAligned"', '"obb"', 2))
    for path in (videos[4] / "lowres_wide_intrinsics").iterdir():
        path.write_text("64 48 40 40 3 24")  # the middle of another picture
    (videos[5] / "40000005_3dod_mesh.ply").unlink()
    report = prepare("arkitscenes", Request(tmp_path / "in", tmp_path / "out", views=2))
    export = Export(tmp_path / "out")
    assert export.scene_ids() == ["40000003", "40000005"]
    assert {record["scene_id"] for record in export.questions()} == {"40000003"}
    lines = "\n".join(report.lines())
    for rule in (
        "line 1: must be seven numbers", "lowres_wide.traj: no trajectory", "not JSON",
        "no intrinsic of a frame (impossible intrinsic)", "2: box: without a centre",
        "1: mesh: a video has none",
    ):  # fmt: skip
        assert rule in lines, rule


def test_what_contradicts_the_layout_is_refused_in_one_line(root, tmp_path):
    with pytest.raises(UserError, match=r"no video: .*lowres_wide is looked for"):
        prepare("arkitscenes", Request(tmp_path, tmp_path / "out"))
    (tmp_path / "raw").symlink_to(root)
    table = tmp_path / "metadata.csv"
    for text, rule in (
        ("video_id,fold\n1,Training\n", "must have the columns video_id, visit_id, fold"),
        ("video_id,visit_id,fold\n1,2,train\n", "line 2: fold 'train' is none of"),
        ("video_id,visit_id,fold\n41069021,2,Training\n", "41069021 has another visit or fold"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=rule):
            prepare("arkitscenes", Request(tmp_path, tmp_path / "out"))
    table.unlink()
    write_video(tmp_path / "Training" / "41069021")
    with pytest.raises(UserError, match="video 41069021 is in two places"):
        prepare("arkitscenes", Request(tmp_path, tmp_path / "out"))
