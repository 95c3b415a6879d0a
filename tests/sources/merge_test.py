"""Exports that become one: their numbers keep their meaning, and what does not fit is refused."""

import dataclasses
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from geode_jax.data.pipeline import Pipeline
from geode_jax.data.settings import PipelineConfig
from geode_jax.data.tokens import train_tokenizer
from geode_jax.errors import UserError
from geode_jax.exports import Export, ExportError, ExportWriter, validate
from geode_jax.exports.files import Entry
from geode_jax.exports.prompts import prompt
from geode_jax.sources.datasets import Request
from geode_jax.sources.merge import merge, open_part
from geode_jax.sources.rgbd import export as rgbd
from tests.helpers.exports import CATEGORIES, HEADER, tiny_questions, tiny_scene

FRONT_NOUNS = ["bed", "lamp", "wardrobe", "chair", "desk"]
HOUSES = [f"{n:08x}-5f27-4bbf-94cd-1cff7c310ba1" for n in range(3)]
SCANS = {"scene0000_00": "train", "scene0000_01": "train", "scene0001_00": "train"}
SCANS |= {"scene0002_00": "val"}
FRONT = {f"{HOUSES[0]}_Bedroom-1": "train", f"{HOUSES[0]}_Library-2": "train"}
FRONT |= {f"{HOUSES[1]}_Bedroom-1": "val", f"{HOUSES[2]}_Bedroom-7": "train"}


def write_part(
    folder: Path, scenes: dict[str, str], seed: int, teacher=True, **header: Any
) -> Path:
    """Writes an export of random valid scenes with every kind of label."""
    random = np.random.default_rng(seed)
    header = HEADER | header
    with ExportWriter(folder, **header) as writer:
        for n, (scene, split) in enumerate(scenes.items()):
            arrays, taught = tiny_scene(random, 1 + n % 2, 3)
            writer.add_scene(scene, arrays, split=split, teacher=taught if teacher else None)
            writer.add_questions(tiny_questions(random, scene, arrays["target/boxes"]))
    return folder


def producer(project: str, listed: str = "00000000") -> dict[str, str]:
    request = f"of {project}, excluded {listed}"
    return HEADER["producer"] | {"project": project, "request": request}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Path, Path]:
    """A ScanNet-like export and a 3D-FRONT-like one; read only."""
    folder = tmp_path_factory.mktemp("parts")
    front = {"categories": FRONT_NOUNS, "producer": producer("front"), "notes": "of boxes"}
    scans = write_part(folder / "scannet", SCANS, 0, producer=producer("scans"))
    return scans, write_part(folder / "3d-front", FRONT, 1, **front)


def merged(out: Path, *texts: object, **changes) -> Export:
    merge([open_part(str(text)) for text in texts], Request(out, out, **changes))
    return Export(out)


@pytest.fixture(scope="module")
def both(parts, tmp_path_factory) -> Export:
    return merged(tmp_path_factory.mktemp("merged") / "both", *parts)


def splits(export: Export) -> dict[str, str]:
    return {entry["id"]: entry["split"] for entry in export.manifest["scenes"]}


def bytes_below(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def with_nouns(name: str, array: np.ndarray, nouns: list[str]):
    """Returns an array whose labels are nouns, and whose columns are named by nouns."""
    if name in ("target/labels", "target/segmentation"):
        return np.array([*nouns, "none"])[array].tolist()
    if name == "detection_probs":
        return {n: c.tolist() for n, c in zip(nouns, array.T, strict=True) if c.any()}
    return array.tobytes(), array.dtype, array.shape


def test_numbers_of_a_merged_export_mean_what_they_did(parts, both):
    assert both.categories == [*CATEGORIES, "bed", "wardrobe", "desk"]
    assert splits(both) == SCANS | FRONT and list(splits(both)) == [*SCANS, *FRONT]
    for folder, scenes in zip(parts, (SCANS, FRONT), strict=True):
        old = Export(folder)
        for scene in scenes:
            for kind in ("scenes", "teacher"):
                path = Path(kind) / f"{scene}.safetensors"
                # Read by the library, not by this package.
                was, now = (load_file(f / path) for f in (folder, both.folder))
                assert was.keys() == now.keys()
                for name, array in was.items():
                    before = with_nouns(name, array, old.categories)
                    assert with_nouns(name, now[name], both.categories) == before
                kept = os.path.samefile(folder / path, both.folder / path)
                assert kept == (kind == "scenes" and scenes is SCANS)
    before = [{"source": f.name} | record for f in parts for record in Export(f).questions()]
    assert list(both.questions()) == before
    summary = validate(both.folder)
    assert not summary["warnings"] and summary["scenes"] == 8
    assert sum(summary["questions"].values()) == len(before)
    made_by = both.manifest["producer"]
    assert made_by["project"] == "scans; front" and made_by["licence"] == "CC0-1.0"
    assert made_by["part 1 request"].startswith("of scans") and made_by["part 2 project"] == "front"
    assert both.manifest["notes"] == "of boxes"


def test_a_run_draws_from_all_parts_in_the_shares_asked_for(both):
    texts = [f"{prompt(r)} {r['answer']}" for r in both.questions()]
    tokenizer = train_tokenizer(texts, [], min_count=1)
    config = PipelineConfig(str(both.folder), 1, 1, 128, 64, 3, 1, 256)
    first = {float(both.read_scene(s)["vggt/tokens"][0, 0, 0]): s for s in both.scene_ids()}

    def share_of_front(**changes) -> float:
        pipeline = Pipeline(both, tokenizer, dataclasses.replace(config, **changes), "train")
        steps = range(12 * pipeline.steps_per_epoch)
        seen = [first[float(pipeline.batch(step).vision_SVPC[0, 0, 0, 0])] for step in steps]
        assert set(seen) <= set(both.scene_ids("train"))
        return sum(scene in FRONT for scene in seen) / len(seen)

    assert share_of_front() == 0.5  # three training scenes of each
    assert share_of_front(source_weights={"scannet": 0.0}) == 1
    assert share_of_front(source_weights={"scannet": 1 / 3}) == pytest.approx(0.75, abs=0.1)


def test_a_call_that_was_cut_off_goes_on_and_leaves_the_parts_as_they_were(
    parts, both, tmp_path, monkeypatch
):
    before = [bytes_below(folder) for folder in parts]
    out, adopt, made = tmp_path / "out", ExportWriter.adopt_scene, []

    def adopted(writer, export, scene, split=""):
        if len(made) == 6:
            adopt(writer, export, scene, split)
            for name in (scene, "scene0000_01"):  # as if cut off just before
                (writer.folder / ".entries" / f"{name}.json").unlink()
            raise KeyboardInterrupt
        made.append(scene)
        return adopt(writer, export, scene, split)

    with monkeypatch.context() as patch:
        patch.setattr(ExportWriter, "adopt_scene", adopted)
        with pytest.raises(KeyboardInterrupt):
            merged(out, *parts)
        with pytest.raises(ExportError, match="unfinished"):
            Export(out)
        changed = [shutil.copytree(folder, tmp_path / folder.name) for folder in parts]
        shutil.rmtree(changed[0])
        write_part(changed[0], SCANS, 2, producer=producer("scans"))  # made anew
        made.clear()
        merged(out, *changed)
    assert made == [*SCANS, *list(FRONT)[2:]]  # the others were finished and are the same
    whole = bytes_below(merged(tmp_path / "whole", *changed).folder)
    assert bytes_below(out) == whole
    for scene in SCANS:
        path = Path("scenes") / f"{scene}.safetensors"
        assert os.path.samefile(out / path, changed[0] / path)
    with pytest.raises(ExportError, match="is an export already; it is not overwritten"):
        merged(out, *parts)
    assert bytes_below(out) == whole and [bytes_below(folder) for folder in parts] == before


def test_splits_are_drawn_by_rooms_whatever_the_order(parts, tmp_path):
    one = splits(merged(tmp_path / "one", *parts, split="50/25/25", seed=5))
    assert splits(merged(tmp_path / "two", *reversed(parts), split="50/25/25", seed=5)) == one
    assert one["scene0000_00"] == one["scene0000_01"] and set(one.values()) == {
        "train",
        "val",
        "test",
    }
    assert one[f"{HOUSES[0]}_Bedroom-1"] == one[f"{HOUSES[0]}_Library-2"]
    pieces = {f"hall_{n:04d}": "train" for n in range(9)}
    recording = write_part(tmp_path / "hall", pieces, 7, producer=producer(rgbd.PROJECT))
    every = splits(merged(tmp_path / "all", *parts, recording, split="50/25/25", seed=5))
    assert one.items() <= every.items() and len({every[piece] for piece in pieces}) == 1
    # A list of an evaluation's scenes also binds scenes that were held out before.
    listed = (Entry("line 1", ("scene0000_00",)), Entry("line 2", ("scene0002_00",)))
    for seed in range(4):
        left = merged(tmp_path / f"{seed}", *parts, split="50/50", seed=seed, exclude=listed)
        trained = set(left.scene_ids("train"))
        assert not trained & {"scene0000_00", "scene0000_01", "scene0002_00"}
        assert {r["scene_id"] for r in left.questions()} == set(left.scene_ids())


def test_parts_without_a_teacher_or_with_one_name_are_merged(parts, tmp_path):
    other = write_part(tmp_path / "scannet", {"x_1": "train"}, 3, teacher=False)
    own = {"teacher_tokenizer": "7" * 64, "producer": producer("third", "0000abcd")}
    third = write_part(tmp_path / "c", {"y_1": "train"}, 4, **own)
    found = merged(tmp_path / "out", parts[0], f"more={other}", third)
    assert found.manifest["teacher_tokenizer"] == "7" * 64
    assert {r["source"] for r in found.questions()} == {"scannet", "more", "c"}
    twice = merged(tmp_path / "again", f"first={found.folder}", parts[1])
    assert {r["source"] for r in twice.questions()} == {"scannet", "more", "c", "3d-front"}
    assert twice.manifest["producer"]["part 1 part 3 project"] == "third"
    validate(twice.folder)
    # A list that held scenes out binds what is drawn anew.
    last = write_part(tmp_path / "last", {"v_1": "train"}, 6)
    with pytest.raises(UserError, match="again was prepared with --exclude-scenes; give that"):
        merged(tmp_path / "no", twice.folder, last, split="80/20")


def test_pictures_alone_go_with_any_other_part(parts, tmp_path):
    other = {"dtype": "float16", "scale": "scene", "token_width": 76, "patch_grid": (8, 8)}
    pictures = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), np.uint8)
    with ExportWriter(tmp_path / "pictures", **HEADER | other | {"categories": []}) as writer:
        writer.add_scene("picture", {"images": pictures}, split="train")
    for n, order in enumerate(
        ((parts[0], tmp_path / "pictures"), (tmp_path / "pictures", parts[0]))
    ):
        export = merged(tmp_path / f"both{n}", *order)
        assert validate(export.folder)["scenes"] == 5
        assert export.manifest["scale"] == "metric" and export.token_width == 5
        np.testing.assert_array_equal(export.read_scene("picture")["images"], pictures)
    with ExportWriter(tmp_path / "posed", **HEADER | other | {"categories": []}) as writer:
        poses = np.tile(np.eye(3, 4, dtype=np.float32), (2, 1, 1))
        writer.add_scene("a", {"images": pictures, "camera/extrinsic": poses}, split="train")
    with pytest.raises(UserError, match=r"dtype: 'float32' in .*, 'float16' in"):
        merged(tmp_path / "refused", parts[0], tmp_path / "posed")


@pytest.mark.parametrize(
    ("scenes", "header", "rule"),
    [
        ({"scene0001_00": "train"}, {}, r"scene scene0001_00 is in .*scannet and in .*b; a scene"),
        (
            {"scannet_Scene0000_02": "val"},
            {},
            "scene scene0000_00 of .*scannet is in train, scene scannet_Scene0000_02 of .*b, the "
            "same room or house, in val; --split",
        ),
        ({"x": "train"}, {"token_width": 6}, "token_width: 5 in .*scannet, 6 in .*b; the parts"),
        ({"x": "train"}, {"patch_grid": (1, 3)}, r"patch_grid: \[2, 3\] in .*, \[1, 3\] in"),
        ({"x": "train"}, {"dtype": "float16"}, "dtype: 'float32' in .*, 'float16' in"),
        ({"x": "train"}, {"scale": "scene"}, "scale: 'metric' in .*, 'scene' in"),
        ({"x": "train"}, {"tokens_contain_depth": True}, "tokens_contain_depth: False in .*, True"),
        ({"x": "train"}, {"teacher_tokenizer": "1" * 64}, "teacher_tokenizer: '000.*, '111.* in"),
        ({"x": "train"}, {"features": 8}, "tensor teacher/features: width 7 in scene scene0000_00"),
        ({"x": "train"}, {"own_id": "scene0000_00_0"}, "question 'scene0000_00_0' is in .* and in"),
    ],
)
def test_what_does_not_fit_together_is_one_line_before_anything_is_written(
    parts, tmp_path, scenes, header, rule
):
    a, b, (scene, split) = parts[0], tmp_path / "b", *scenes.items()
    if "teacher_tokenizer" in header:
        a = write_part(tmp_path / "scannet", {"w": "train"}, 0, teacher_tokenizer="0" * 64)
    header = dict(header)
    width, own_id = header.pop("features", 7), header.pop("own_id", f"{scene}_0")
    with ExportWriter(b, **{**HEADER, **header}) as writer:
        grid = header.get("patch_grid", (2, 3))
        features = np.zeros((1, *grid, width), np.float32)
        depth = {"target/depth": np.ones((1, 2 * grid[0], 2 * grid[1]), np.float32)}
        writer.add_scene(scene, depth, split=split, teacher={"features": features})
        asked = {"scene_id": scene, "kind": "own", "question": "Is it big?", "answer": "Yes."}
        writer.add_questions([{"id": own_id} | asked])
    with pytest.raises(UserError, match=rule) as refused:
        merged(tmp_path / "out", a, b)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_the_command_merges_and_refuses_in_one_line(parts, tmp_path, run):
    scans, front = parts
    out = tmp_path / "out"
    status, printed, _ = run("merge", "--export", scans, "--export", f"front={front}", "--out", out)
    assert status == 0 and "4 scenes of scannet" in printed and "4 scenes of front" in printed
    assert (
        "warning" not in printed
        and "corrected 12: file with labels of other numbers, written anew" in printed
    )
    assert f"{out}: 8 scenes (6 train, 2 val)" in printed
    held = write_part(tmp_path / "held", {"z_1": "test"}, 5)
    _, printed, _ = run("merge", "--export", scans, "--export", held, "--out", tmp_path / "three")
    assert "warning: held has no scene in train; scores" in printed
    assert "warning: scannet has no scene in test; scores on test are of the other" in printed
    # A file that must be written anew is damaged: once it is repaired, the same command goes on.
    mended = shutil.copytree(front, tmp_path / "mended")
    damaged = mended / "scenes" / f"{HOUSES[1]}_Bedroom-1.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    command = ["merge", "--export", scans, "--export", mended, "--out", tmp_path / "four"]
    status, _, said = run(*command)
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert status == 2 and f"error: {mended}: scene {HOUSES[1]}_Bedroom-1: tensor *: scenes" in line
    assert not (tmp_path / "four" / "manifest.json").exists()
    damaged.write_bytes(whole)
    status, printed, _ = run(*command)
    assert status == 0 and "6 of 8 scenes were made before" in printed
    broken = shutil.copytree(front, tmp_path / "broken")
    (broken / "questions.jsonl").write_text("{}\n")
    for arguments, rule in (
        ([scans], "name two exports or more"),
        ([scans, scans], "is named twice"),
        ([scans, f"scannet={front}"], "scannet: two parts have this name"),
        ([scans, tmp_path / "none"], "none: no such folder"),
        ([scans, broken], f"{broken}: questions.jsonl: does not have the manifest's sha256"),
        ([scans, front, "--split", "80/30"], "'80/30' is not percentages"),
    ):
        given = [str(a) for a in arguments]
        flags = [x for a in given if not re.match("--|80", a) for x in ("--export", a)]
        flags += given[2:] if "--split" in given else []
        status, _, said = run("merge", *flags, "--out", tmp_path / "no")
        assert status == 2 and rule in said.splitlines()[-1]
        assert not (tmp_path / "no").exists()
