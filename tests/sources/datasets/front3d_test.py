"""3D-FRONT: houses written in its layout; boxes against its formula for vertices."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from geode_jax.errors import UserError
from geode_jax.exports import Export, validate
from geode_jax.exports.files import Entry
from geode_jax.geometry.upright_boxes import footprints
from geode_jax.sources.datasets import Request, front3d
from geode_jax.sources.datasets.prepare import prepare
from geode_jax.sources.rooms import raycast

FLOOR = (5.0, 4.0)  # along x and z
CORNER = np.array([10.0, 0.0, -3.0])  # of every room's floor, y up
KINDS = ("Bed", "Nightstand", "Wardrobe", "Desk", "Armchair", "Bookcase / jewelry Armoire", "Stool")
NOUNS = ("bed", "nightstand", "wardrobe", "desk", "armchair", "bookcase", "stool")


def turned(degrees: float) -> list[float]:
    """Returns a rotation about y as 3D-FRONT's quaternion x, y, z, w."""
    return [float(v) for v in Rotation.from_euler("y", degrees, degrees=True).as_quat()]


def furnished(seed: int, room: str = "Bedroom-1") -> tuple[list, list, list]:
    """Returns furniture, meshes and children of a room with seven pieces that do not overlap."""
    rng = np.random.default_rng(seed)
    spots = [(0.8, 0.8), (2.5, 0.7), (4.2, 0.8), (0.8, 3.2), (2.5, 3.3), (4.2, 3.2), (2.5, 2.0)]
    furniture, children = [], []
    for k, spot in enumerate(rng.permutation(spots)):
        uid = f"{room}/{k}"
        furniture.append(
            {"uid": uid, "jid": f"model-{k}", "valid": True,
             "size": rng.uniform(0.3, 0.7, 3).round(3).tolist()}
        )  # fmt: skip
        children.append(
            {"ref": uid, "instanceid": f"furniture/{k}", "rot": turned(rng.uniform(-180, 180)),
             "pos": (CORNER + [spot[0], 0, spot[1]]).tolist(),
             "scale": rng.uniform(0.9, 1.2, 3).tolist()}
        )  # fmt: skip
    (x, z), corners = FLOOR, []
    for dx, dz in ((0, 0), (x, 0), (x, z), (0, z)):
        corners.append(CORNER + [dx, 0, dz])
    walls = np.concatenate([corners, np.array(corners) + [0, 2.8, 0]])
    meshes = [
        {"uid": f"{room}/floor", "type": "Floor", "xyz": np.concatenate(corners).tolist()},
        {"uid": f"{room}/wall", "type": "WallInner", "xyz": walls.reshape(-1).tolist()},
        {"uid": f"{room}/door", "type": "Door", "xyz": [0.0, 0.0, 0.0]},
    ]
    still = {"pos": [0, 0, 0], "rot": [0, 0, 0, 1], "scale": [1, 1, 1]}
    children += [{"ref": mesh["uid"], "instanceid": mesh["uid"], **still} for mesh in meshes]
    return furniture, meshes, children


def house(seed: int, change=None) -> dict:
    """Returns a house of a furnished room, whose parts `change` may break, and an empty room."""
    furniture, meshes, children = furnished(seed)
    if change:
        change(furniture, meshes, children)
    empty = {"type": "Hallway", "instanceid": "Hallway-2", "children": children[-3:]}
    room = {"type": "Bedroom", "instanceid": "Bedroom-1", "children": children}
    return {
        "uid": f"house{seed}",
        "furniture": furniture,
        "mesh": meshes,
        "material": [],
        "scene": {"room": [room, empty]},
    }


def write_front(root: Path, houses: int = 8, change=None) -> Path:
    """Writes houses and the catalogue of their models."""
    (root / "3D-FRONT").mkdir(parents=True)
    (root / "3D-FUTURE-model").mkdir()
    for n in range(houses):
        (root / "3D-FRONT" / f"house{n}.json").write_text(json.dumps(house(n, change)))
    models = [
        {"model_id": f"model-{k}", "super-category": "Other", "category": kind}
        for k, kind in enumerate(KINDS)
    ]
    (root / "3D-FUTURE-model" / "model_info.json").write_text(json.dumps(models))
    return root


@pytest.fixture(autouse=True, scope="module")
def small_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(front3d, "IMAGE_SIDE", 32)
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = write_front(tmp_path_factory.mktemp("front"))
    out = tmp_path_factory.mktemp("exports") / "front"
    report = prepare("3d-front", Request(root, out, views=6))
    return Export(out), report


def corners_by_the_rule(seed: int) -> dict[str, np.ndarray]:
    """Returns {noun: corners [8, 3]} by v' = R(quat) (v * scale) + pos, then z up."""
    furniture, _, children = furnished(seed)
    found = {}
    for piece, child, noun in zip(furniture, children, NOUNS, strict=False):
        x, y, z = piece["size"]
        unit = np.stack(np.meshgrid([-0.5, 0.5], [0, 1], [-0.5, 0.5]), -1).reshape(-1, 3)
        placed = Rotation.from_quat(child["rot"]).apply(unit * [x, y, z] * child["scale"])
        placed = placed + child["pos"] - CORNER - [FLOOR[0] / 2, 0, FLOOR[1] / 2]
        found[noun] = np.stack([placed[:, 0], -placed[:, 2], placed[:, 1]], -1)
    return found


def corners_of(box: np.ndarray) -> np.ndarray:
    """Returns the corners [8, 3] of a box [7]."""
    level = footprints(np.asarray(box, np.float64)[None])[:, 0]
    low, high = box[2] - box[5] / 2, box[2] + box[5] / 2
    return np.array([(c.real, c.imag, z) for c in level for z in (low, high)])


def test_boxes_are_where_the_rule_for_vertices_puts_them(prepared):
    export, report = prepared
    checked = validate(export.folder)
    assert checked["scenes"] == report.kept["scenes"] == 8
    assert report.dropped["scene: fewer than 3 pieces of furniture"] == 8  # the hallways
    assert set(export.categories) == set(NOUNS)
    for scene_id in export.scene_ids():
        truth = corners_by_the_rule(int(scene_id.removeprefix("house").partition("_")[0]))
        scene = export.read_scene(scene_id)
        assert len(scene["target/boxes"]) >= 3
        for label, box in zip(scene["target/labels"], scene["target/boxes"], strict=True):
            wanted, found = truth[export.categories[label]], corners_of(box)
            apart = np.linalg.norm(wanted[:, None] - found[None], axis=-1)
            assert apart.min(0).max() < 1e-3 and apart.min(1).max() < 1e-3


def test_views_show_the_boxes_from_inside_the_room(prepared):
    export, _ = prepared
    room = np.array([*FLOOR, 2.8])
    for scene_id in export.scene_ids():
        scene = export.read_scene(scene_id)
        assert scene["vggt/tokens"].shape == (6, 64, 76)
        assert scene["images"].shape == (6, 32, 32, 3)
        centres = raycast.camera_centres(scene["camera/extrinsic"])
        assert (np.abs(centres[:, :2]) < room[:2] / 2).all()
        assert (np.abs(centres[:, 2] - 1.5) < 0.3).all()
        shown = set(scene["target/segmentation"].reshape(-1)) - {-1}
        assert set(scene["target/labels"]) <= shown


def test_answers_are_those_of_the_layout(prepared):
    export, _ = prepared
    kinds = set()
    for record in export.questions():
        kinds.add(record["kind"])
        if record["kind"] == "room_size_estimation":
            assert record["value"] == FLOOR[0] * FLOOR[1]
        elif record["kind"] == "object_box":
            truth = corners_by_the_rule(int(record["scene_id"][5]))
            wanted = truth[record["question"].removeprefix("Locate the ").removesuffix(".")]
            apart = np.linalg.norm(wanted[:, None] - corners_of(record["box"])[None], axis=-1)
            assert apart.min(0).max() < 1e-3
    assert {"room_size_estimation", "object_box", "object_abs_distance", "proximity"} <= kinds


def test_broken_furniture_is_skipped_and_counted_by_reason(tmp_path):
    def broken(furniture, meshes, children):
        furniture[0]["valid"] = False
        del furniture[1]["size"]
        children[2]["scale"] = [1, 0, 1]
        children[3]["rot"] = [float(v) for v in Rotation.from_euler("x", 0.4).as_quat()]
        furniture += [
            {"uid": "a", "jid": "nobody", "valid": True, "size": [1, 1, 1]},
            {"uid": "b", "jid": "model-1", "valid": True, "size": [1, 1, 1]},
            {"uid": "c", "jid": "model-1", "valid": True, "bbox": [0.5, 0.5, 0.5]},
        ]
        for uid, pos in (("a", [0, 0, 0]), ("b", [99, 0, 0]), ("c", [2.5, 0, 2.0])):
            pos = (CORNER + pos).tolist()
            children.append({"ref": uid, "pos": pos, "rot": [0, 0, 0, 1], "scale": [1, 1, 1]})
        children.append({"ref": "b", "pos": [0, None, 0], "rot": "x", "scale": []})
        children.append({"ref": ["nothing"]})

    root = write_front(tmp_path / "in", houses=1, change=broken)
    report = prepare("3d-front", Request(root, tmp_path / "out", views=4))
    dropped = {why: n for why, n in report.dropped.items() if why.startswith("furniture")}
    assert dropped == {
        "furniture: not valid": 1,
        "furniture: no size": 1,
        "furniture: without extent, or larger than its room": 1,
        "furniture: leaning or upside down": 1,
        "furniture: no category": 1,
        "furniture: outside its room": 1,
        "furniture: without a valid pose": 1,
        "furniture: not in its house": 1,
    }
    (scene_id,) = Export(tmp_path / "out").scene_ids()
    assert scene_id == "house0_Bedroom-1"


def test_without_the_catalogue_the_house_names_its_furniture(tmp_path):
    def named(furniture, meshes, children):
        for piece in furniture:
            piece["title"] = "sofa/chaise longue sofa"

    root = write_front(tmp_path / "in", houses=1, change=named) / "3D-FRONT"
    prepare("3d-front", Request(root, tmp_path / "out", views=2))
    assert Export(tmp_path / "out").categories == ["sofa"]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{", "not JSON"),
        ("[]", "not a house"),
        ('{"furniture": [1], "mesh": [], "scene": {"room": []}}', "not a house"),
        ('{"furniture": [], "mesh": [], "scene": {}}', "not a house"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_damaged_house_is_left_out_with_its_line(tmp_path, text, rule):
    root = write_front(tmp_path / "in", houses=1)
    (root / "3D-FRONT" / "bad.json").write_text(text)
    report = prepare("3d-front", Request(root, tmp_path / "out", views=2))
    assert any(rule in line and "bad.json" in line for line in report.lines())
    assert len(Export(tmp_path / "out").scene_ids()) == 1


JUNK = ("null", "true", '""', '"x"', "[]", "{}", "[[]]", "[null, 1, 2]", "-1", "0", "1e308", "NaN")


@given(st.data())
def test_whatever_a_house_holds_it_is_read_or_refused(tmp_path_factory, data):
    content = house(0)
    for _ in range(data.draw(st.integers(1, 4))):
        place = content
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = data.draw(st.sampled_from(keys))
            below = place[key]
            if not isinstance(below, dict | list) or not below or data.draw(st.integers(0, 4)) == 0:
                place[key] = json.loads(data.draw(st.sampled_from(JUNK)))
                break
            place = below
    path = tmp_path_factory.mktemp("houses") / "h.json"
    path.write_text(json.dumps(content))
    models = {f"model-{k}": noun for k, noun in enumerate(NOUNS)}
    try:
        rooms = front3d.read_house(path, models, Counter())
    except UserError as error:
        assert "\n" not in str(error)
        return
    for room in rooms.values():
        assert len(room.names) == len(room.boxes) >= 3
        assert np.isfinite(room.boxes).all() and (room.boxes[:, 3:6] > 0).all()


def test_what_cannot_be_made_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no house"):
        prepare("3d-front", Request(tmp_path, tmp_path / "out"))
    root = write_front(tmp_path / "in", houses=1)
    with pytest.raises(UserError, match="must the grid be"):
        prepare("3d-front", Request(root, tmp_path / "out", patch_grid=(8, 6)))
    (root / "3D-FUTURE-model" / "model_info.json").write_text("{}")
    with pytest.raises(UserError, match="must be a list of models"):
        prepare("3d-front", Request(root, tmp_path / "out"))


def test_excluded_rooms_are_not_trained_on(tmp_path):
    root = write_front(tmp_path / "in", houses=3)
    names = ("house0", "house1_bedroom-1", "house2.json")  # the house, a room of it, its file
    every = tuple(Entry(f"line {n}", (name,)) for n, name in enumerate(names))
    request = Request(root, tmp_path / "out", exclude=every, views=2, split="80/20")
    report = prepare("3d-front", request)
    assert "train" not in {e["split"] for e in Export(tmp_path / "out").manifest["scenes"]}
    assert [n for why, n in report.dropped.items() if "scenes to exclude" in why] == [2]
