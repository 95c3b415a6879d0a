"""Questions about RGB-D views: answers against other measurements, and no hints in the wording."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation

from geode_jax.exports import NUMERIC_KINDS, Export
from geode_jax.sources.rgbd.export import make_rgbd_export
from geode_jax.sources.rgbd.questions import KINDS, PLACES, Questioner, SeenView, space_size

PLACE = "(" + "|".join(sorted(PLACES, key=len, reverse=True)) + ")"
WORDING = {
    "surface_distance": rf"How far is the surface at the {PLACE} of view (\d) from the camera, .*",
    "nearer_view": rf"Which view sees the nearer surface at its {PLACE}, view (\d) or view (\d)\?",
    "camera_motion": r"How far did the camera move between view (\d) and view (\d), in meters\?",
    "space_size": r"What is the longest horizontal extent of the space seen in (.*), in meters\?",
    "left_right": rf"Seen from the camera of view (\d), is the surface at the {PLACE} of view (\d) "
    rf"to the left or to the right of the surface at the {PLACE} of view (\d)\?",
    "above_below": rf"Is the surface at the {PLACE} of view (\d) higher or lower than the surface "
    rf"at the {PLACE} of view (\d)\?",
}


class Truth:
    """Answers measured from the raw files, without code of the package."""

    def __init__(self, folder, names, intrinsic, poses, scale=1000):
        (self.fx, self.fy, self.cx, self.cy), self.scale = intrinsic, scale
        self.paths = {name: next((folder / "depth").glob(f"{name}.*")) for name in names}
        self.poses, self.views, self._depth = dict(zip(names, poses, strict=True)), [], {}

    def depth(self, view):
        name = self.views[view]
        if name not in self._depth:
            self._depth[name] = np.asarray(Image.open(self.paths[name])) / self.scale
        return self._depth[name]

    def pose(self, view):
        return self.poses[self.views[view]]

    def points(self, view, v, u, z):
        local = np.stack([(u - self.cx) * z / self.fx, (v - self.cy) * z / self.fy, z, 0 * z + 1])
        return (self.pose(view) @ local)[:3].T

    def place(self, view, name):
        """Returns the mean of the few known pixels in the middle of the place."""
        depth = self.depth(view)
        u, v = (round(f * n) for f, n in zip(PLACES[name], depth.shape[::-1], strict=True))
        window = depth[v - 2 : v + 2, u - 2 : u + 2]
        return self.points(view, v - 0.5, u - 0.5, window[window > 0].mean())

    def surface(self, view):
        v, u = 5 * np.array(np.nonzero(self.depth(view)[::5, ::5]))
        return self.points(view, v, u, self.depth(view)[v, u])

    def distance(self, view, place):
        return np.linalg.norm(self.place(view, place) - self.pose(view)[:3, 3])


def check_record(record, truth, up):
    """Asserts that the record's answer is right; returns the views and places of the question."""
    found = re.fullmatch(WORDING[record["kind"]], record["question"])
    assert found, record["question"]
    words = [int(word) - 1 if word.isdigit() else word for word in found.groups()]
    match record["kind"], words:
        case "surface_distance", [place, view]:
            assert record["value"] == pytest.approx(truth.distance(view, place), rel=0.04, abs=0.06)
        case "nearer_view", [place, a, b]:
            near = a if truth.distance(a, place) < truth.distance(b, place) else b
            assert record["answer"] == f"view {near + 1}"
        case "camera_motion", [a, b]:
            motion = np.linalg.norm(truth.pose(a)[:3, 3] - truth.pose(b)[:3, 3])
            assert record["value"] == pytest.approx(motion, abs=0.0051 if motion < 1 else 0.051)
        case "space_size", [where]:
            views = [*range(len(truth.views))] if "all" in where else [int(where[-1]) - 1]
            points = np.concatenate([truth.surface(view) for view in views])
            level = Rotation.align_vectors([0, 0, 1], up)[0].apply(points)[:, :2]
            angle = np.radians(np.arange(0, 180, 6))
            spans = np.stack([np.cos(angle), np.sin(angle)], -1) @ level.T
            extent = np.diff(np.percentile(spans, (1, 99), axis=1), axis=0).max()
            assert record["value"] == pytest.approx(extent, rel=0.04, abs=0.06)
        case "left_right", [seer, place, a, other, b]:
            assert place == other
            inverse = np.linalg.inv(truth.pose(seer))
            one, two = (inverse @ [*truth.place(view, place), 1] for view in (a, b))
            assert one[2] > 0 and two[2] > 0
            # Image columns of both points in that view.
            columns = [point[0] / point[2] for point in (one, two)]
            assert record["answer"] == ("left" if columns[0] < columns[1] else "right")
            assert record["relation"] == {"left_right": float(columns[0] < columns[1])}
        case "above_below", [place, a, other, b]:
            assert place == other
            rise = (truth.place(a, place) - truth.place(b, place)) @ up
            assert record["answer"] == ("higher" if rise > 0 else "lower")
            assert record["relation"] == {"above_below": float(rise > 0)}
    assert ("value" in record) == (record["kind"] in NUMERIC_KINDS)
    if "value" in record:
        assert record["unit"] == "m" and float(record["answer"]) == record["value"] > 0
        assert record["answer"] in record["rationale"]
    assert record["rationale"].endswith(".")


@pytest.fixture(scope="module")
def living_room(data_root, tmp_path_factory):
    folder = data_root / "open3d_livingroom1"
    if not folder.is_dir():
        pytest.skip(f"real data: no folder {folder}")
    out = tmp_path_factory.mktemp("exports") / "livingroom"
    summary = make_rgbd_export(folder, out, image_side=16, progress=False)
    names = sorted((p.stem for p in (folder / "pose").iterdir()), key=int)
    poses = [np.loadtxt(folder / "pose" / f"{name}.txt") for name in names]
    return Export(out), Truth(folder, names, (525, 525, 319.5, 239.5), poses), summary


@pytest.fixture(scope="module")
def dining_room(data_root, tmp_path_factory):
    folder = data_root / "slambook2_rgbd/ch5"
    if not folder.is_dir():
        pytest.skip(f"real data: no folder {folder}")
    camera = (518.0, 519.0, 325.5, 253.5)
    out = tmp_path_factory.mktemp("exports") / "ch5"
    summary = make_rgbd_export(folder, out, image_side=16, intrinsic=camera, progress=False)
    rows = np.loadtxt(folder / "rgbd" / "pose.txt")
    poses = np.tile(np.eye(4), (5, 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = Rotation.from_quat(rows[:, 3:]).as_matrix(), rows[:, :3]
    return Export(out), Truth(folder / "rgbd", list("12345"), camera, poses), summary


@pytest.mark.parametrize("name", ("living_room", "dining_room"))
def test_answers_are_what_the_raw_files_measure(request, name):
    export, truth, summary = request.getfixturevalue(name)
    by_scene = defaultdict(list)
    for record in export.questions():
        by_scene[record["scene_id"]].append(record)
    checked = Counter()
    centres = {name: pose[:3, 3] for name, pose in truth.poses.items()}
    for scene_id in [*by_scene][::5]:
        extrinsic = export.read_scene(scene_id, ["camera/extrinsic"])["camera/extrinsic"]
        here = -np.einsum("vji,vj->vi", extrinsic[:, :, :3], extrinsic[:, :, 3])
        truth.views = [min(centres, key=lambda n: np.abs(centres[n] - c).max()) for c in here]
        for record in by_scene[scene_id]:
            check_record(record, truth, summary["up"])
            checked[record["kind"]] += 1
    assert checked.keys() == set(KINDS)
    assert summary["up"] @ -truth.poses[truth.views[0]][:3, 1] > 0.8  # against gravity


def masked(record) -> str:
    """Returns the question with the numbers of views masked."""
    return re.sub(r"view \d", "view #", record["question"])


def test_the_wording_does_not_tell_binary_answers(living_room):
    export, _, _ = living_room
    splits = {i: split for split in ("train", "val", "test") for i in export.scene_ids(split)}
    answers = defaultdict(Counter)
    by_numbers = defaultdict(Counter)
    for record in export.questions():
        answer = record["answer"]
        if record["kind"] == "nearer_view":
            first, _ = re.findall(r"view \d", record["question"])
            by_numbers["nearer_view", first][answer == first] += 1
            answer = "first" if answer == first else "second"
        elif "value" in record:
            continue
        answers[splits[record["scene_id"]], record["kind"], masked(record)][answer] += 1
    for counts in answers.values():
        one, two = (counts + Counter()).most_common(2) if len(counts) == 2 else (*counts.items(), 0)
        assert one[1] - (two[1] if two else 0) <= 1
    total = sum(sum(c.values()) for (split, *_), c in answers.items() if split == "train")
    majority = sum(max(c.values()) for (split, *_), c in answers.items() if split == "train")
    assert total > 400 and majority / total < 0.53
    for counts in by_numbers.values():  # the numbers of the views do not reveal it either
        assert 0.3 < counts[True] / counts.total() < 0.7


def test_near_and_far_surfaces_are_asked_about_alike(living_room):
    """Values spread widely, so the best constant per wording is a bad answer."""
    export, _, _ = living_room
    values = defaultdict(list)
    for record in export.questions():
        if record["kind"] in ("surface_distance", "camera_motion"):
            values[record["kind"]].append(record["value"])
    for kind, least in (("surface_distance", 1.45), ("camera_motion", 4)):
        low, high = np.percentile(values[kind], (10, 90))
        assert high / low > least


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 40))
def test_any_views_give_right_records(seed, count, wanted):
    random = np.random.default_rng(seed)
    views = []
    for _ in range(count):
        pose = np.eye(4)
        pose[:3, :3] = Rotation.random(rng=random).as_matrix()
        pose[:3, 3] = random.normal(size=3)
        names = [name for name in PLACES if random.random() < 0.7]
        depth = random.uniform(0.3, 5, len(names))
        local = random.uniform(-0.5, 0.5, (len(names), 3))
        local[:, 2] = 1
        points = (depth[:, None] * local) @ pose[:3, :3].T + pose[:3, 3]
        surface = pose[:3, 3] + random.uniform(-3, 3, (50, 3))
        views.append(SeenView(pose, dict(zip(names, points, strict=True)), surface))
    up = Rotation.random(rng=random).as_matrix()[0]

    class Given(Truth):
        def __init__(self):
            self.views = views

        def pose(self, view):
            return views[view].world_from_camera

        def place(self, view, name):
            return views[view].places[name]

        def surface(self, view):
            return views[view].surface

    questioner = Questioner(views, up, random)
    for scene in range(2):
        records = questioner.ask(f"s{scene}", views, wanted)
        assert len(records) <= wanted
        assert [r["id"] for r in records] == [f"s{scene}_{n:02d}" for n in range(len(records))]
        assert len({r["question"] for r in records}) == len(records) or any(
            r["kind"] in ("left_right", "nearer_view", "above_below") for r in records
        )
        for record in records:
            check_record(record, Given(), up)


def test_the_size_of_a_box_is_its_diagonal():
    random = np.random.default_rng(0)
    turn = Rotation.random(rng=random)
    box = random.uniform(-1, 1, (4000, 3)) * [2.0, 1.5, 7.0]  # z is up: 7 m high does not count
    hull = box[ConvexHull(box[:, :2]).vertices, :2]
    longest = np.linalg.norm(hull[:, None] - hull, axis=-1).max()
    size = space_size(turn.apply(box), turn.apply([0.0, 0, 1]))
    assert 0.85 * longest < size < longest
    faces = np.concatenate([box, np.repeat([[2, 1.5, 0], [-2, -1.5, 0]], 100, axis=0)])
    assert space_size(turn.apply(faces), turn.apply([0.0, 0, 1])) == pytest.approx(5, rel=0.01)
    outlier = np.concatenate([faces, [[100, 0, 0]]])
    assert space_size(turn.apply(outlier), turn.apply([0.0, 0, 1])) == pytest.approx(5, rel=0.01)
