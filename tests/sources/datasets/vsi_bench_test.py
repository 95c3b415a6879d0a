"""VSI-Bench in its own layout: rows, videos, parts, and what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from geode_jax.errors import UserError
from geode_jax.exports import Export, prompts, validate
from geode_jax.exports.videos import read_frames
from geode_jax.results import vsi
from geode_jax.sources.datasets import vsi_bench as source
from tests.helpers.command import one_error
from tests.helpers.videos import write_video

NUMBERS = {
    "object_counting": ("How many table(s) are in this room?", "4"),
    "object_abs_distance": ("What is the distance between the sofa and the tv (in meters)?", "2.1"),
    "object_size_estimation": ("What is the length of the longest dimension of the bed?", "201"),
    "room_size_estimation": ("What is the size of this room (in square meters)?", "19.4"),
}
CHOICES = (
    "object_rel_distance", "object_rel_direction_easy", "object_rel_direction_medium",
    "object_rel_direction_hard", "route_planning", "obj_appearance_order",
)  # fmt: skip
SCENES = {"41069025": "arkitscenes", "scene0015_00": "scannet", "09c1414f1b": "scannetpp"}


def rows(scenes: dict[str, str] = SCENES) -> list[dict]:
    """Every question type about every scene, scenes interleaved as in the data set."""
    found = []
    for kind in (*NUMBERS, *CHOICES):
        for scene, folder in scenes.items():
            question, truth = NUMBERS.get(kind, (f"Which one, by {kind}?", "B"))
            options = None if kind in NUMBERS else ["A. chair", "B. sofa", "C. bed", "D. tv"]
            found.append(
                {"id": len(found), "dataset": folder, "scene_name": scene, "question_type": kind,
                 "question": question, "ground_truth": truth, "options": options}
            )  # fmt: skip
    return found


def write_vsi_bench(root, own=None, scenes: dict[str, str] = SCENES) -> None:
    """Writes rows and short videos of {scene: folder}; one video has a rotation flag."""
    root.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row) + "\n" for row in own or rows(scenes))
    (root / "test.jsonl").write_text("".join(lines))
    for n, (scene, folder) in enumerate(scenes.items()):
        write_video(root / folder / f"{scene}.mp4", 5 + 30 * n, turned=90 * (n == 0))


@pytest.fixture
def root(tmp_path):
    write_vsi_bench(tmp_path / "raw")
    return tmp_path / "raw"


@pytest.fixture
def prepare(run, tmp_path, root):
    """The command on the data set; its folder is `tmp_path / out`."""

    def call(*options, out="out"):
        given = ("--source", "vsi-bench", "--root", root, "--out", tmp_path / out, "--views", 8)
        return run("prepare", *given, *options)

    return call


def test_all_rows_are_test_questions_about_the_frames_of_the_harness(prepare, root, tmp_path):
    status, out, _ = prepare()
    assert status == 0 and "3 scenes, 30 questions" in out
    export = Export(tmp_path / "out")
    assert validate(export.folder)["splits"] == {"test": 3}
    for scene, folder in SCENES.items():
        arrays = export.read_scene(scene)
        frames, indices = read_frames(root / folder / f"{scene}.mp4", 8)
        assert arrays["frame_index"].tolist() == indices.tolist()
        wanted = Image.fromarray(np.ascontiguousarray(frames[3])).resize((448, 448), 2)
        np.testing.assert_array_equal(arrays["images"][3], np.asarray(wanted))
    asked = {record["id"]: record for record in export.questions()}
    for row in rows():
        record = asked[f"vsi-bench-{row['id']}"]
        assert (record["scene_id"], record["kind"]) == (row["scene_name"], row["question_type"])
        text = prompts.prompt(record)
        assert text.startswith(f"These are frames of a video.\n{row['question']}\n")
        assert ("C. bed" in text) == (row["options"] is not None)
        assert record["answer"] == row["ground_truth"]
    assert "is an export already" in one_error(prepare())
    assert prepare(out="again")[0] == 0
    for path in (tmp_path / "out").rglob("*.safetensors"):
        other = tmp_path / "again" / path.relative_to(tmp_path / "out")
        assert path.read_bytes() == other.read_bytes()


def test_the_debiased_part_leaves_out_the_pruned_ids(prepare, root, tmp_path):
    assert "pruned_ids.txt: is missing" in one_error(prepare("--part", "debiased"))
    (root / "pruned_ids.txt").write_text("0\n7\n")
    status, out, _ = prepare("--part", "debiased")
    assert status == 0 and "dropped 2: question: VSI-Bench-Debiased leaves it out" in out
    ids = {record["id"] for record in Export(tmp_path / "out").questions()}
    assert len(ids) == 28 and not ids & {"vsi-bench-0", "vsi-bench-7"}
    (root / "pruned_ids.txt").write_text("0\n99\n")
    assert "'99' is no id of" in one_error(prepare("--part", "debiased", out="b"))
    assert "--part: hard is not one of full, debiased" in one_error(
        prepare("--part", "hard", out="b")
    )


def test_rows_may_be_parquet(prepare, root, tmp_path):
    (root / "test.jsonl").unlink()
    table = pa.Table.from_pylist(rows())
    pyarrow.parquet.write_table(table, root / "test-00000-of-00001.parquet")
    assert prepare()[0] == 0 and len(list(Export(tmp_path / "out").questions())) == 30


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("question_type", "object_colour", "test.jsonl:4: question_type: must be one of object_"),
        ("ground_truth", "many", "test.jsonl:4: ground_truth: must be a positive number"),
        ("dataset", "matterport", "test.jsonl:4: dataset: must be one of arkitscenes"),
        ("scene_name", "../x", "test.jsonl:4: scene_name: must be a name without folders"),
        ("question", "", "test.jsonl:4: question: must be a text"),
    ],
)
def test_a_row_of_another_kind_is_refused(prepare, root, tmp_path, field, value, rule):
    own = rows()
    own[3][field] = value
    write_vsi_bench(root, own)
    assert rule in one_error(prepare())
    assert not (tmp_path / "out").exists()


def test_videos_that_are_missing_or_cut_off(prepare, root, tmp_path):
    video = root / "scannet" / "scene0015_00.mp4"
    data = video.read_bytes()
    video.unlink()
    assert "scene0015_00.mp4: is not there (--allow-missing counts" in one_error(prepare())
    (root / "scannet.zip").write_bytes(b"PK")
    assert f"(unpack {root / 'scannet.zip'})" in one_error(prepare())
    status, out, _ = prepare("--allow-missing", out="fewer")
    assert status == 0 and "dropped 10: question: its video is missing" in out
    video.write_bytes(data[: len(data) // 2])
    assert "scene0015_00.mp4: no whole video" in one_error(prepare())
    assert not (tmp_path / "out" / "manifest.json").exists()
    video.write_bytes(data)
    status, out, _ = prepare()  # goes on
    assert status == 0 and "1 of 3 scenes were made before" in out
    assert "--scenes: VSI-Bench has scenes" in one_error(prepare("--scenes", tmp_path, out="x"))


def test_rooms_of_the_training_are_not_scored():
    def export(folder, **scenes):
        return SimpleNamespace(
            folder=folder, scene_ids=lambda split: [s for s, own in scenes.items() if own == split]
        )

    asked = export("bench", scene0015_00="test", scene0100_00="test")
    learned = export("data", scene0015_01="train", scene0100_02="val")
    with pytest.raises(UserError, match=r"scene scene0015_00: the run was trained on this room"):
        vsi._refuse_trained_rooms(learned, asked, "test")
    vsi._refuse_trained_rooms(export("data", scene0100_02="val"), asked, "test")


def test_source_has_the_benchmarks_types():
    assert set(source._TYPES) == {row["question_type"] for row in rows()}
