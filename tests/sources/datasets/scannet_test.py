"""ScanNet: scans written in its layout, from cuboids with known boxes."""

import dataclasses
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from plyfile import PlyData, PlyElement

from geode_jax.errors import UserError
from geode_jax.exports import Export, validate
from geode_jax.exports.files import Entry
from geode_jax.sources.datasets import Request, scannet
from geode_jax.sources.datasets.instances import measure_room
from geode_jax.sources.datasets.ply import read_vertices
from geode_jax.sources.datasets.prepare import prepare
from geode_jax.sources.rooms import raycast
from tests.sources.rgbd.sens_test import LOST, encoded, sens_bytes

ROOM = np.array([5.0, 4.0, 2.6])
NAMES = ("table", "chair", "chair", "cabinet", "office chair", "tv", "lamp")
SIZE, FRAMES = (64, 48), 14
K = raycast.pinhole(np.radians(80), SIZE[1], SIZE[0])
ALIGNMENT = np.array([[0.8, -0.6, 0, 1.25], [0.6, 0.8, 0, -2.5], [0, 0, 1, 0.1], [0, 0, 0, 1]])
"""The matrix from a scan's own frame to the aligned frame."""


def boxes_of(seed: int) -> np.ndarray:
    """Returns cuboids [7, 7] in the aligned frame: along two walls and in the middle."""
    rng = np.random.default_rng(seed)
    places = [(0, 0), (1.1, 0.2), (-1.1, 0.2), (-1.8, 1.5), (1.8, 1.5), (1.8, -1.4), (-1.8, -1.4)]
    boxes = np.zeros((len(NAMES), 7))
    boxes[:, :2] = np.array(places)[rng.permutation(len(places))] + rng.uniform(-0.1, 0.1, (7, 2))
    boxes[:, 3:6] = rng.uniform(0.4, 0.9, (7, 3)).round(2)  # halves are whole millimetres
    boxes[:, 2] = boxes[:, 5] / 2
    return boxes.round(3)


def surface(box: np.ndarray, step: float = 0.05) -> np.ndarray:
    """Returns points [n, 3] on the faces of a box, with its corners."""
    axes = [np.linspace(-0.5, 0.5, max(2, int(size / step))) for size in box[3:6]]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    grid = grid[(np.abs(grid) == 0.5).any(-1)]
    return box[:3] + grid * box[3:6]


def ply_bytes(vertices: np.ndarray, count: int | None = None) -> bytes:
    """Returns a mesh in ScanNet's layout: points, colours, one face."""
    header = (
        "ply\nformat binary_little_endian 1.0\ncomment VCGLIB generated\n"
        f"element vertex {len(vertices) if count is None else count}\n"
        "property float x\nproperty float y\nproperty float z\n"
        "property uchar red\nproperty uchar green\nproperty uchar blue\nproperty uchar alpha\n"
        "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    )
    rows = b"".join(struct.pack("<3f4B", *row, 1, 2, 3, 255) for row in vertices)
    return header.encode() + rows + struct.pack("<B3i", 3, 0, 1, 2)


def moved(points: np.ndarray, motion: np.ndarray) -> np.ndarray:
    return points @ motion[:3, :3].T + motion[:3, 3]


def write_scan(scans: Path, scan: str, seed: int = 0, sens: bool = True, labels: bool = True):
    """Writes a scan of random cuboids; frame 1 has no pose, the mesh is in the scan's own frame."""
    folder = scans / scan
    folder.mkdir(parents=True)
    boxes, from_aligned = boxes_of(seed), np.linalg.inv(ALIGNMENT)
    angle = np.linspace(0, 2 * np.pi, FRAMES, endpoint=False)
    spots = np.stack([1.9 * np.cos(angle), 1.5 * np.sin(angle), np.full(FRAMES, 1.5)], -1)
    cameras = raycast.camera_poses(spots, angle + np.pi, np.full(FRAMES, -0.5))
    rays = raycast.pixel_rays(cameras, K, *SIZE[::-1])
    hits = raycast.cast(boxes, ROOM, spots, rays)
    frames = []
    for n, camera in enumerate(cameras):
        pose = from_aligned @ np.linalg.inv(np.vstack([camera, [0, 0, 0, 1]]))
        depth = np.round(1000 * hits.depth[n]).astype("<u2").reshape(SIZE[::-1])
        shade = (29 * hits.surface[n] % 255).reshape(SIZE[::-1]).astype(np.uint8)
        frames.append((LOST if n == 1 else pose, np.repeat(shade[..., None], 3, -1), depth))
    matrix = np.eye(4)
    matrix[:3, :3] = K
    if sens:
        packed = [(p, encoded(c, "JPEG"), zlib.compress(d.tobytes())) for p, c, d in frames]
        data = sens_bytes(packed, color_k=matrix, depth_k=matrix, sizes=SIZE * 2)
        (folder / f"{scan}.sens").write_bytes(data)
    else:
        for kind in ("color", "depth", "pose", "intrinsic"):
            (folder / kind).mkdir()
        np.savetxt(folder / "intrinsic" / "intrinsic_depth.txt", matrix)
        for n, (pose, colour, depth) in enumerate(frames):
            np.savetxt(folder / "pose" / f"{n}.txt", pose)
            Image.fromarray(colour).save(folder / "color" / f"{n}.jpg")
            Image.fromarray(depth).save(folder / "depth" / f"{n}.png")
    if not labels:
        return
    numbers = " ".join(f"{x:.6f}" for x in ALIGNMENT.reshape(-1))
    (folder / f"{scan}.txt").write_text(f"numDepthFrames = {FRAMES}\naxisAlignment = {numbers}\n")
    parts = [surface(box) for box in boxes]
    parts.append(surface(np.array([0, 0, ROOM[2] / 2, *ROOM, 0]), 0.06))  # walls and floor
    vertices = moved(np.concatenate(parts), from_aligned)
    (folder / f"{scan}_vh_clean_2.ply").write_bytes(ply_bytes(vertices))
    # Two segments an object, the numbers with gaps as ScanNet's.
    segments = [10 * k + (np.arange(len(p)) > len(p) // 2) for k, p in enumerate(parts)]
    groups = [
        {"id": k, "objectId": k, "segments": [10 * k, 10 * k + 1], "label": label}
        for k, label in enumerate((*NAMES, "wall"))
    ]
    (folder / f"{scan}_vh_clean_2.0.010000.segs.json").write_text(
        json.dumps({"sceneId": scan, "segIndices": np.concatenate(segments).tolist()})
    )
    (folder / f"{scan}.aggregation.json").write_text(
        json.dumps({"sceneId": scan, "segGroups": groups})
    )


def write_scannet(root: Path, rooms: int = 8) -> Path:
    """Writes eight rooms, the first with two scans, one of them as extracted folders.

    The pictures in these folders are halved, with an unchanged intrinsic.
    """
    for n in range(rooms):
        write_scan(root / "scans", f"scene{n:04d}_00", seed=n)
    write_scan(root / "scans", "scene0000_01", seed=0, sens=False)
    whole = np.array([[2, 0, 0.5], [0, 2, 0.5], [0, 0, 1]]) @ K
    np.savetxt(root / "scans" / "scene0000_01" / "intrinsic" / "intrinsic_depth.txt", whole)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_scannet(tmp_path_factory.mktemp("scannet"))


@pytest.fixture(scope="module")
def prepared(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "scannet"
    report = prepare("scannet", Request(root, out))
    return Export(out), report


def scan_copy(tmp_path: Path, **kwargs) -> Path:
    write_scan(tmp_path / "scans", "scene0000_00", **kwargs)
    return tmp_path / "scans" / "scene0000_00"


# --- Reading --------------------------------------------------------------------------------------


def test_vertices_are_those_of_the_mesh(tmp_path):
    vertices = np.random.default_rng(0).normal(size=(50, 3)).astype("f4")
    (tmp_path / "a.ply").write_bytes(ply_bytes(vertices))
    np.testing.assert_array_equal(read_vertices(tmp_path / "a.ply"), vertices)


@pytest.mark.parametrize("dtype", ["f4", "f8", "i2"])
def test_vertices_are_those_that_plyfile_writes(tmp_path, dtype):
    places = np.arange(60).reshape(20, 3)
    rows = np.zeros(20, [("nx", "f4"), *((axis, dtype) for axis in "zxy"), ("alpha", "u1")])
    for k, axis in enumerate("xyz"):
        rows[axis] = places[:, k]
    faces = np.array([([0, 1, 2],), ([3, 4, 5, 6],)], [("vertex_indices", object)])
    elements = [PlyElement.describe(rows, "vertex"), PlyElement.describe(faces, "face")]
    PlyData(elements, byte_order="<", comments=["made here"]).write(tmp_path / "a.ply")
    np.testing.assert_array_equal(read_vertices(tmp_path / "a.ply"), places)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda data: data[:400], "truncated: 50 vertices do not fit"),
        (lambda data: data[:100], "no end_header"),
        (lambda data: b"\x80\x04cos\nsystem\n" + data, "not a PLY file"),
        (lambda data: data.replace(b"binary_little_endian", b"ascii"), "only binary_little_endian"),
        (lambda data: data.replace(b"element vertex 50", b"element vertex many"), "first element"),
        (lambda data: data.replace(b"property float x\n", b""), "one x, y and z"),
        (lambda data: data.replace(b"float y", b"float x"), "one x, y and z"),
        (lambda data: data.replace(b"float y", b"list uchar int y"), "no property of vertices"),
        (lambda data: data.replace(b"vertex 50", b"vertex 999999999999"), "truncated"),
    ],
)
def test_damaged_meshes_are_refused_in_one_line(tmp_path, change, rule):
    data = ply_bytes(np.zeros((50, 3)))
    (tmp_path / "a.ply").write_bytes(change(data))
    with pytest.raises(UserError, match=rule) as caught:
        read_vertices(tmp_path / "a.ply")
    assert "\n" not in str(caught.value)


def test_boxes_are_the_cuboids_in_the_aligned_frame(tmp_path):
    folder = scan_copy(tmp_path, seed=3)
    labels = scannet.read_labels(folder, scannet.read_alignment(folder))
    assert labels.names == NAMES and labels.lost == ()
    np.testing.assert_allclose(labels.boxes, boxes_of(3), atol=1e-5)
    room, floor = measure_room(labels.vertices)
    np.testing.assert_allclose(room, ROOM, atol=1e-5)
    assert floor == pytest.approx(ROOM[0] * ROOM[1], rel=0.03)


def test_a_missing_corner_is_no_floor():
    cells = np.stack(np.meshgrid(np.arange(0, 4, 0.05), np.arange(0, 3, 0.05)), -1).reshape(-1, 2)
    ell = cells[(cells[:, 0] < 2) | (cells[:, 1] < 1)]  # 2 x 3 and 2 x 1
    under = (np.abs(ell - 1) > 0.3).any(-1)  # a hole under a table stays floor
    vertices = np.concatenate([ell[under], np.zeros((under.sum(), 1))], -1)
    assert measure_room(vertices)[1] == pytest.approx(8.0, rel=0.03)


# --- Writing --------------------------------------------------------------------------------------


def test_the_export_obeys_the_contract_and_is_the_rooms(prepared, root):
    export, report = prepared
    checked = validate(export.folder)
    assert checked["scenes"] == report.kept["scenes"] == 9
    assert sum(checked["questions"].values()) == report.kept["questions"] > 9 * 8
    assert report.dropped["frame: pose not finite"] == 9
    tensors = {t["name"]: t["shape"] for t in checked["tensors"]}
    assert tensors["vggt/tokens"] == ["8", "64", "76"]
    assert tensors["target/depth"] == ["8", "16", "16"]
    assert tensors["images"] == ["8", "64", "64", "3"]  # InternViT's input
    assert export.manifest["tokens_contain_depth"] is True
    assert not (export.folder / ".made").exists()
    for scene_id in export.scene_ids():
        truth = boxes_of(int(scene_id[5:9]))
        scene = export.read_scene(scene_id)
        names = [export.categories[n] for n in scene["target/labels"]]
        assert len(names) >= 4
        for name, box in zip(names, scene["target/boxes"], strict=True):
            candidates = truth[[n for n, other in enumerate(NAMES) if other == name]]
            assert np.abs(candidates - box).max(-1).min() < 1e-4
        # Measured points lie on the cuboids, the walls or the floor: nowhere inside a wall.
        points = scene["vggt/points"][scene["vggt/depth"] > 0]
        inside = np.abs(points - [0, 0, ROOM[2] / 2]) - ROOM / 2
        assert inside.max() < 0.01
        distance = np.abs(inside).min(-1)
        for box in truth:
            outside = np.abs(points - box[:3]) - box[3:6] / 2
            distance = np.minimum(distance, np.abs(outside.max(-1)))
        assert np.median(distance) < 0.005 and np.percentile(distance, 90) < 0.02


def test_folders_and_sens_files_are_the_same_scan(prepared):
    export, report = prepared
    size, whole = (f"{f * SIZE[0]} x {f * SIZE[1]}" for f in (1, 2))
    line = f"intrinsic/intrinsic_depth.txt: is for pictures of {whole}, these are {size}: scaled"
    assert report.corrected == {line: 1} and f"corrected 1: {line}" in report.lines()
    one, two = export.read_scene("scene0000_00"), export.read_scene("scene0000_01")
    assert one.keys() == two.keys()
    for name in ("target/depth", "target/boxes", "target/labels", "images"):
        np.testing.assert_array_equal(one[name], two[name])
    for name in ("camera/extrinsic", "vggt/points"):
        np.testing.assert_allclose(one[name], two[name], atol=1e-5)


def test_answers_are_those_of_the_cuboids(prepared):
    export, _ = prepared
    kinds = set()
    for record in export.questions():
        truth = boxes_of(int(record["scene_id"][5:9]))
        kind = record["kind"]
        kinds.add(kind)
        if kind == "object_counting":
            name = record["question"].removeprefix("How many ").partition("(")[0]
            assert record["value"] == NAMES.count(name)
        elif kind == "room_size_estimation":
            assert record["value"] == pytest.approx(ROOM[0] * ROOM[1], rel=0.03)
        elif kind == "object_box":
            name = record["question"].removeprefix("Locate the ").removesuffix(".")
            assert NAMES.count(name) == 1  # otherwise the question would be ambiguous
            np.testing.assert_allclose(record["box"], truth[NAMES.index(name)], atol=1e-3)
        elif kind == "object_size_estimation":
            (item,) = record["objects"]
            longest = 100 * truth[NAMES.index(item["name"]), 3:6].max()
            assert record["value"] == pytest.approx(longest, abs=0.6)
        elif kind == "object_abs_distance":
            a, b = (truth[NAMES.index(item["name"])] for item in record["objects"])
            apart = np.maximum(np.abs(a[:3] - b[:3]) - (a[3:6] + b[3:6]) / 2, 0)
            assert record["value"] == pytest.approx(np.linalg.norm(apart), abs=0.06)
    assert {
        "object_counting", "room_size_estimation", "object_box", "object_abs_distance",
        "object_rel_distance", "object_size_estimation",
    } <= kinds  # fmt: skip


def test_scans_of_a_room_are_in_one_split(prepared):
    export, _ = prepared
    splits = {entry["id"]: entry["split"] for entry in export.manifest["scenes"]}
    assert splits["scene0000_00"] == splits["scene0000_01"]
    assert sorted(splits.values()).count("val") >= 1 and "test" in splits.values()


# --- Refusals -------------------------------------------------------------------------------------


def small_root(tmp_path: Path, scans=("scene0000_00", "scene0001_00", "scene0002_00")) -> Path:
    for n, scan in enumerate(scans):
        write_scan(tmp_path / "in" / "scans", scan, seed=n)
    return tmp_path / "in"


def test_lists_decide_and_excluded_scenes_are_not_trained_on(tmp_path):
    root = small_root(tmp_path)
    (root / "scannetv2_train.txt").write_text("scene0000_00\nscene0001_00\nscene9999_00\n")
    (root / "scannetv2_val.txt").write_text("scene0002_00\n")
    exclude = tuple(Entry(f"line {n}", (f"Scene000{n}_00",)) for n in (1, 2))
    report = prepare("scannet", Request(root, tmp_path / "out", exclude=exclude, views=2))
    entries = Export(tmp_path / "out").manifest["scenes"]
    assert {e["id"]: e["split"] for e in entries} == {
        "scene0000_00": "train",
        "scene0002_00": "val",
    }
    excluded = [n for why, n in report.dropped.items() if "scenes to exclude" in why]
    assert excluded == [1]
    assert report.dropped["entry of scannetv2_train.txt: no such scan in scans/"] == 1
    again = Request(root, tmp_path / "other")
    for text, rule in (
        ("scene0000_00\n", "line 1: scene0000_00 is in the list of train too"),
        ("\nscene0000_01\n", "line 2: scene0000_01 is in .* train too, as scene0000_00, of the"),
    ):
        (root / "scannetv2_val.txt").write_text(text)
        with pytest.raises(UserError, match=rule):
            prepare("scannet", again)
    (root / "scannetv2_val.txt").unlink()
    (root / "scannetv2_train.txt").write_text("scene,split\n")
    with pytest.raises(UserError, match=r"train\.txt: none of the scans in scans/ is listed"):
        prepare("scannet", again)
    again = dataclasses.replace(again, exclude=(Entry("list: line 3", ("scene0003_00",)),))
    (root / "scannetv2_train.txt").write_text("scene0000_00\n")
    with pytest.raises(UserError, match=r"list: line 3: 'scene0003_00' is no scene of .*/in"):
        prepare("scannet", again)
    with pytest.raises(UserError, match=r"'scene0003_00' is no scene .* would exclude nothing"):
        prepare("scannet", dataclasses.replace(again, allow_missing=True, views=2))


def test_no_other_scan_of_an_excluded_room_is_trained_on(tmp_path):
    root = small_root(tmp_path, ("scene0000_00", "scene0000_01", "scene0001_00"))
    (root / "scannetv2_train.txt").write_text("scene0000_00\nscene0000_01\nscene0001_00\n")
    request = Request(root, tmp_path / "out", exclude=(Entry("", ("scene0000_00",)),), views=2)
    report = prepare("scannet", request)
    assert Export(tmp_path / "out").scene_ids() == ["scene0001_00"]
    assert [n for why, n in report.dropped.items() if "scenes to exclude" in why] == [2]


def test_a_damaged_scan_is_left_out_with_its_line(tmp_path):
    root = small_root(tmp_path)
    sens = root / "scans" / "scene0000_00" / "scene0000_00.sens"
    sens.write_bytes(sens.read_bytes()[:-3000])
    (root / "scans" / "scene0001_00" / "scene0001_00.txt").write_text("axisAlignment = 1 2 3\n")
    report = prepare("scannet", Request(root, tmp_path / "out", views=2))
    assert Export(tmp_path / "out").scene_ids() == ["scene0002_00"]
    lines = "\n".join(report.lines())
    assert f"truncated in frame {FRAMES - 1} of {FRAMES}" in lines
    assert "axisAlignment must be the 16 numbers" in lines


@pytest.mark.parametrize(
    ("suffix", "change", "rule"),
    [
        (".aggregation.json", lambda t: t[:50], "not JSON"),
        (".aggregation.json", lambda t: "[1]", "must be a JSON object"),
        (".aggregation.json", lambda t: "{}", "no segGroups"),
        (".aggregation.json", lambda t: t.replace('"label"', '"lable"'), "a label and segments"),
        (".aggregation.json", lambda t: t.replace("[0, 1]", '["x"]'), "list of whole numbers"),
        ("_vh_clean_2.0.010000.segs.json", lambda t: '{"segIndices": [1, 2]}', "2 segIndices for"),
        ("_vh_clean_2.0.010000.segs.json", lambda t: None, "cannot be read: No such"),
        ("_vh_clean_2.ply", lambda t: None, "cannot be read"),
        (".sens", lambda t: None, "no RGB-D folder"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path, suffix, change, rule):
    folder = scan_copy(tmp_path)
    path = folder / f"{folder.name}{suffix}"
    text = change(path.read_text()) if suffix.endswith("json") else None
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=rule):
        prepare("scannet", Request(tmp_path, tmp_path / "out", views=2))
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (
            ply_bytes(np.diag([1e30, 1, 1])),
            r"a mesh of \de\+\d\d m; must be more than 0, at most 400",
        ),
        (ply_bytes(np.zeros((0, 3))), "a mesh of 0 m"),
        (
            ply_bytes(np.zeros((0, 3))).replace(b"vertex 0", b"vertex " + b"9" * 5000),
            "not the vert",
        ),
    ],
)
def test_a_mesh_that_no_room_has_is_refused(tmp_path, data, rule):
    folder = scan_copy(tmp_path)
    (folder / f"{folder.name}_vh_clean_2.ply").write_bytes(data)
    with pytest.raises(UserError, match=rule):
        prepare("scannet", Request(tmp_path, tmp_path / "out", views=2))


def test_instances_without_an_extent_are_counted_and_not_asked_about(tmp_path):
    folder = scan_copy(tmp_path)
    path = folder / f"{folder.name}.aggregation.json"
    groups = json.loads(path.read_text())
    groups["segGroups"].append({"id": 99, "objectId": 99, "segments": [999], "label": "tv"})
    path.write_text(json.dumps(groups))
    report = prepare("scannet", Request(tmp_path, tmp_path / "out"))
    assert report.dropped["box: no vertex, or flat"] == 1
    questions = [q["question"] for q in Export(tmp_path / "out").questions()]
    assert questions and not any("Locate the tv" in question for question in questions)


def test_a_scan_without_labels_has_no_boxes_and_no_questions(tmp_path):
    scan_copy(tmp_path, labels=False)
    report = prepare("scannet", Request(tmp_path, tmp_path / "out", views=3))
    assert report.dropped["alignment: a scan has none, its own frame is used"] == 1
    export = Export(tmp_path / "out")
    assert export.manifest["questions"]["count"] == 0
    assert "target/boxes" not in export.scene_shapes("scene0000_00")


def test_nothing_to_read_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no scan"):
        prepare("scannet", Request(tmp_path, tmp_path / "out"))
    with pytest.raises(UserError, match="ScanNet has none"):
        prepare("scannet", Request(tmp_path, tmp_path / "out", parts=("base",)))


# --- Resuming -------------------------------------------------------------------------------------


def test_an_interrupted_prepare_goes_on_to_the_same_export(tmp_path, monkeypatch, capsys):
    root = small_root(tmp_path)
    prepare("scannet", Request(root, tmp_path / "whole", views=2))
    made, make = [], scannet.make_scene

    def interrupted(folder, *args):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(folder.name)
        return make(folder, *args)

    monkeypatch.setattr(scannet, "make_scene", interrupted)
    request = Request(root, tmp_path / "out", views=2)
    with pytest.raises(KeyboardInterrupt):
        prepare("scannet", request)
    assert not (tmp_path / "out" / "manifest.json").exists()
    made.clear()
    changed = root / "scans" / "scene0001_00" / "scene0001_00.txt"
    os.utime(changed, ns=(1, 1))
    capsys.readouterr()
    prepare("scannet", request)
    assert made == ["scene0001_00", "scene0002_00"]  # what was complete is not made again
    printed = capsys.readouterr().out
    assert "1 of 3 scenes were made before" in printed and "1 scenes are made anew" in printed
    assert sorted(path.name for path in request.out.iterdir()) == [
        "manifest.json",
        "questions.jsonl",
        "scenes",
    ]
    whole, resumed = (Export(tmp_path / name).manifest for name in ("whole", "out"))
    assert whole["scenes"] == resumed["scenes"] and whole["questions"] == resumed["questions"]
