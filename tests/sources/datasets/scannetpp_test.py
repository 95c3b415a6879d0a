"""ScanNet++: scenes written in its layout, from turned cuboids with known boxes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from geode_jax.errors import UserError
from geode_jax.exports import Export, validate
from geode_jax.sources.datasets import Request, scannetpp
from geode_jax.sources.datasets.prepare import prepare
from geode_jax.sources.rgbd.intrinsics import resized
from geode_jax.sources.rooms import raycast
from tests.sources.datasets.arkitscenes_test import in_world, to_own, turned_boxes
from tests.sources.datasets.scannet_test import ROOM, ply_bytes, surface

NAMES = ("table", "chair", "chair", "cabinet", "office chair", "tv", "lamp")
COLOR, DEPTH, DSLR = (128, 96), (64, 48), (90, 60)
K_COLOR = np.array([[80, 0, 65.0], [0, 81, 46], [0, 0, 1]])
K_DSLR = np.array([[50, 0, 45.0], [0, 50, 29], [0, 0, 1]])
FRAMES = 8


def cameras() -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, FRAMES, endpoint=False)
    spots = np.stack([1.9 * np.cos(angle), 1.5 * np.sin(angle), np.full(FRAMES, 1.5)], -1)
    return raycast.camera_poses(spots, angle + np.pi, np.full(FRAMES, -0.5))


def hits(boxes, camera, matrix, size) -> tuple[np.ndarray, np.ndarray]:
    """Returns depth and surface [h, w] of one view."""
    rays = raycast.pixel_rays(camera[None], matrix, size[1], size[0])
    found = raycast.cast(boxes, ROOM, raycast.camera_centres(camera[None]), rays)
    shape = size[::-1]
    return found.depth[0].reshape(shape), found.surface[0].reshape(shape)


def grey(surface: np.ndarray) -> Image.Image:
    return Image.fromarray(np.repeat((29 * surface % 255)[..., None], 3, -1).astype(np.uint8))


def write_scene(folder: Path, seed: int = 0, floor: float = 0.0) -> Path:
    """Writes both cameras and the scan; the third instance's annotated box is another's.

    Everything is `floor` metres higher than `turned_boxes` and `cameras`.
    """
    boxes = turned_boxes(seed)
    for place in ("iphone/rgb", "iphone/depth", "dslr/undistorted_images", "dslr/nerfstudio"):
        (folder / place).mkdir(parents=True)
    (folder / "dslr" / "colmap").mkdir()
    records, rows, frames = {}, ["# images", ""], []
    for n, camera in enumerate(cameras()):
        name = f"frame_{10 * n:06}"
        k_depth = resized(K_COLOR, COLOR, DEPTH)
        depth, _ = hits(boxes, camera, k_depth, DEPTH)
        _, colour = hits(boxes, camera, K_COLOR, COLOR)
        Image.fromarray(np.round(1000 * depth).astype(np.uint16)).save(
            folder / "iphone" / "depth" / f"{name}.png"
        )
        grey(colour).save(folder / "iphone" / "rgb" / f"{name}.jpg")
        pose = np.linalg.inv(np.vstack([camera, [0, 0, 0, 1]]))
        pose[2, 3] += floor
        lost = {"aligned_pose": [[float("nan")] * 4] * 4} if n == 1 else {}
        records[name] = {
            "pose": np.eye(4).tolist(), "intrinsic": K_COLOR.tolist(),
            "aligned_pose": pose.tolist(), "timestamp": 0.1 * n,
        } | lost  # fmt: skip
        grey(hits(boxes, camera, K_DSLR, DSLR)[1]).save(
            folder / "dslr" / "undistorted_images" / f"DSC{n}.JPG"
        )
        move = camera[:, 3] - camera[:, :3] @ [0, 0, floor]
        x, y, z, w = Rotation.from_matrix(camera[:, :3]).as_quat()
        numbers = " ".join(f"{v:.12f}" for v in (w, x, y, z, *move))
        rows += [f"{n + 1} {numbers} 1 DSC{n}.JPG", "" if n % 2 else "1.5 2.5 -1"]
        # The poses of nerfstudio's file are of another world.
        frames.append({"file_path": f"DSC{n}.JPG", "transform_matrix": np.eye(4).tolist()})
        frames[-1]["is_bad"] = n == 2
    (folder / "iphone" / "pose_intrinsic_imu.json").write_text(json.dumps(records))
    (folder / "dslr" / "colmap" / "images.txt").write_text("\n".join(rows) + "\n")
    lens = {"fl_x": 50, "fl_y": 50, "cx": 45.5, "cy": 29.5, "w": DSLR[0], "h": DSLR[1]}
    lens |= {"k1": 0.0, "camera_model": "PINHOLE"}
    (folder / "dslr" / "nerfstudio" / "transforms_undistorted.json").write_text(
        json.dumps(lens | {"frames": frames[:-1], "test_frames": frames[-1:]})
    )
    scans = folder / "scans"
    scans.mkdir()
    parts = [in_world(b, surface(np.array([0, 0, 0, *b[3:6], 0]), 0.02)) for b in boxes]
    parts.append(surface(np.array([0, 0, ROOM[2] / 2, *ROOM, 0]), 0.03))
    (scans / "mesh_aligned_0.05.ply").write_bytes(ply_bytes(np.concatenate(parts) + [0, 0, floor]))
    segments = [np.full(len(part), 7 * n) for n, part in enumerate(parts)]
    (scans / "segments.json").write_text(
        json.dumps({"segIndices": np.concatenate(segments).tolist()})
    )
    groups = []
    for n, label in enumerate((*NAMES, "wall")):
        groups.append({"id": n, "objectId": n, "label": label, "segments": [7 * n]})
        if n < len(boxes):
            box = boxes[n]
            cos, sin = np.cos(box[6]), np.sin(box[6])
            groups[-1]["obb"] = {
                "centroid": (boxes[n + (n == 2), :3] + [0, 0, floor]).tolist(),
                "axesLengths": box[3:6].tolist(),
                "normalizedAxes": [cos, sin, 0, -sin, cos, 0, 0, 0, 1],
            }
    (scans / "segments_anno.json").write_text(json.dumps({"segGroups": groups}))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scannetpp")
    for n, name in enumerate(("0a5c013435", "1ada7a0617")):
        write_scene(root / "data" / name, n, floor=-0.7 * n)
    (root / "splits").mkdir()
    (root / "splits" / "nvs_sem_train.txt").write_text("0a5c013435\nffffffffff\n")
    (root / "splits" / "nvs_sem_val.txt").write_text("1ada7a0617\n")
    return root


@pytest.fixture(scope="module", params=["iphone", "dslr"])
def prepared(request, root, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / request.param
    parts = () if request.param == "iphone" else ("dslr",)
    report = prepare("scannetpp", Request(root, out, parts=parts))
    return request.param, Export(out), report


def test_boxes_and_cameras_are_those_of_the_scan(prepared):
    part, export, report = prepared
    checked = validate(export.folder)
    assert checked["scenes"] == 2 and report.kept["questions"] > 2 * 8
    assert {e["id"]: e["split"] for e in export.manifest["scenes"]} == {
        "0a5c013435": "train",
        "1ada7a0617": "val",
    }
    assert report.dropped["entry of nvs_sem_train.txt: no such scan in data/"] == 1
    wrong = "an annotated box is not around its vertices: that of the vertices is used"
    assert report.corrected == {wrong: 2}
    lost = {"iphone": "frame: pose not finite", "dslr": "picture: is_bad by the data set"}
    assert report.dropped[lost[part]] == 2
    assert export.manifest["tokens_contain_depth"] is (part == "iphone")
    given = np.delete(cameras(), 1 if part == "iphone" else 2, axis=0)
    for number, scene_id in enumerate(export.scene_ids()):
        truth, scene = turned_boxes(number), export.read_scene(scene_id)
        np.testing.assert_allclose(scene["camera/extrinsic"], given, atol=1e-5)
        names = [export.categories[n] for n in scene["target/labels"]]
        assert len(names) >= 5
        for name, box in zip(names, scene["target/boxes"], strict=True):
            rows = [n for n, other in enumerate(NAMES) if other == name]
            turn = (truth[rows, 6] - box[6]) % np.pi
            apart = np.abs(truth[rows] - box)
            apart[:, 6] = np.minimum(turn, np.pi - turn)
            # The third has the axis-aligned box of its vertices, around the same middle.
            most = apart.max(-1).min() if box[6] or name != "chair" else apart[:, :3].max(-1).min()
            assert most < 1e-4


def test_depth_is_measured_and_pictures_show_what_the_cameras_say(prepared):
    part, export, _ = prepared
    scene, truth = export.read_scene("0a5c013435"), turned_boxes(0)
    if part == "dslr":
        assert not {"vggt/tokens", "vggt/depth", "target/depth"} & scene.keys()
    else:
        points = scene["vggt/points"][scene["vggt/depth"] > 0]
        distance = np.abs(np.abs(points - [0, 0, ROOM[2] / 2]) - ROOM / 2).min(-1)
        for box in truth:
            outside = np.abs(to_own(box, points)) - box[3:6] / 2
            distance = np.minimum(distance, np.abs(outside.max(-1)))
        assert np.median(distance) < 0.001 and np.percentile(distance, 90) < 0.03
    # Rays of the stored cameras hit the surfaces whose greys are in the pictures.
    right = []
    for image, camera, matrix in zip(
        scene["images"], scene["camera/extrinsic"], scene["camera/intrinsic"], strict=True
    ):
        _, surface = hits(truth, camera, matrix, (16, 16))
        side = len(image) // 16
        shown = image[side // 2 :: side, side // 2 :: side, 0].astype(int)
        right.append(np.abs(shown - 29 * surface % 255) < 12)
    assert np.mean(right) > 0.85


def test_damaged_scenes_are_left_out_with_their_lines(tmp_path):
    folders = [write_scene(tmp_path / "data" / f"{n}") for n in range(3)]
    (folders[0] / "scans" / "segments.json").write_text('{"segIndices": [1]}')
    (folders[1] / "dslr" / "colmap" / "images.txt").write_text("1 1 0 0 0 x 0 0 1 DSC0.JPG\n\n")
    (folders[1] / "iphone" / "rgb").rename(folders[1] / "iphone" / "video")
    for part, kept, rule in (
        ("iphone", ["2"], "rgb.mkv and depth.bin are not read"),
        ("dslr", ["2"], "images.txt: line 1: is no pose of a picture"),
    ):
        request = Request(tmp_path, tmp_path / part, parts=(part,), views=2)
        lines = "\n".join(prepare("scannetpp", request).lines())
        assert Export(tmp_path / part).scene_ids() == kept
        assert rule in lines and "1 segIndices for" in lines


@pytest.mark.parametrize("parts", [("x",), ("iphone", "dslr")])
def test_what_the_layout_does_not_know_is_refused(tmp_path, parts):
    with pytest.raises(UserError, match="--part: one of iphone, dslr"):
        prepare("scannetpp", Request(tmp_path, tmp_path / "out", parts=parts))
    with pytest.raises(UserError, match="data: no scene"):
        prepare("scannetpp", Request(tmp_path, tmp_path / "out"))


def test_poses_of_colmap_are_camera_from_world(tmp_path):
    half = np.sqrt(0.5)  # a quarter turn about z: the world's x is the camera's y
    (tmp_path / "images.txt").write_text(f"# a\n\n5 {half} 0 0 {half} 1 2 3 1 a b.JPG\n")
    pose = scannetpp.read_colmap_poses(tmp_path / "images.txt")["a b.JPG"]
    np.testing.assert_allclose(np.linalg.inv(pose) @ [4, 0, 0, 1], [1, 6, 3, 1], atol=1e-9)
