"""Targets made from an export: their values, what they leave out, and that the losses use them."""

import numpy as np
import pytest
from scipy.stats import laplace

from geode_jax.data.pipeline import Pipeline
from geode_jax.data.settings import PipelineConfig
from geode_jax.data.tokens import train_tokenizer
from geode_jax.errors import UserError
from geode_jax.exports import Export, ExportError, ExportWriter, validate
from geode_jax.exports.prompts import prompt
from geode_jax.objectives.hidden_cot import HiddenCoT, HiddenCoTConfig
from geode_jax.sources.questions.seen_room import pair_relations
from geode_jax.sources.teacher_targets import (
    CONFIDENCE_SPREAD,
    TeacherRequest,
    add_teacher_targets,
    depth_distribution,
    matched_detections,
    smoothed_labels,
)
from geode_jax.targets import depth_bin_centres
from tests.helpers.command import one_error
from tests.helpers.exports import CATEGORIES, HEADER, tiny_questions, tiny_scene
from tests.helpers.tiny_models import STUDENT

ALIGNMENT = {
    **{"method": "cameras", "views": 2, "kept": 2, "scale": 1.5, "residual_m": 0.01},
    **{"centres_m": 0.01, "rotations_deg": 0.2, "depth_target": "sensor"},
}


def test_a_pixel_has_a_laplace_distribution_over_the_bins():
    depth = np.array([[[2.0, 0.5], [20.0, 0.1]]])
    confidence = np.array([[[1.0, 4.0], [1.0, 1e9]]])
    found = depth_distribution(depth, confidence, (2, 2), bins=8)[0]
    centres = np.log(depth_bin_centres(8))
    step = centres[1] - centres[0]
    edges = [-np.inf, *(centres[:-1] + step / 2), np.inf]
    for place in np.ndindex(2, 2):
        scale = max(CONFIDENCE_SPREAD / confidence[0][place], step / 2)
        wanted = np.diff(laplace.cdf(edges, np.log(depth[0][place]), scale))
        np.testing.assert_allclose(found[place], wanted, atol=1e-3)
    assert found[1, 0].argmax() == 7 and found[1, 1].argmax() == 0


def test_a_patch_is_the_mean_of_its_pixels_and_unknown_where_few_have_a_depth():
    depth = np.array([[[1.0, 3.0, 2.0, 0.0], [0.0, 1.0, 0.0, 0.0]]])
    found = depth_distribution(depth, None, (1, 2), bins=16)[0, 0]
    one, three = (
        depth_distribution(np.array([[[d]]]), None, (1, 1), 16)[0, 0, 0] for d in (1.0, 3.0)
    )
    np.testing.assert_allclose(found[0], (2 * one + three) / 3, atol=1e-3)
    assert not found[1].any()


def test_labels_are_smoothed_over_the_other_categories():
    found = smoothed_labels(np.array([2, 0]), 5, 0.2)
    np.testing.assert_allclose(
        found, [[0.05, 0.05, 0.8, 0.05, 0.05], [0.8, *[0.05] * 4]], atol=1e-3
    )
    assert smoothed_labels(np.array([0]), 1, 0.2).tolist() == [[1.0]]


def test_a_detection_belongs_to_the_box_that_it_shares_its_centre_with():
    turned = [0, 0, 1, 2.0, 0.2, 1, np.pi / 2]  # long along y
    boxes = np.array([turned, [5, 0, 1, 1, 1, 1, 0], [9, 0, 1, 1, 1, 1, 0]])
    found = np.array(
        [[0, 0.8, 1, 2, 0.2, 1, np.pi / 2], [0.8, 0, 1, 2, 2, 1, 0], [5.4, 0, 1, 0.5, 1, 1, 0],
         [5.2, 0, 1, 1, 1, 1, 0]]
    )  # fmt: skip
    probs = np.array([[1.0, 3.0], [1, 0], [9, 1], [2, 2]])
    out = matched_detections(boxes, found, probs)
    # The second is not inside the turned box, the third does not hold the second box's centre.
    np.testing.assert_allclose(out, [[0.25, 0.75], [0.5, 0.5], [0, 0]], atol=1e-3)
    assert not matched_detections(boxes, found[:0], probs[:0]).any()


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """An export of what VGGT's and LLaVA-3D's exporters write: no other teacher's array."""
    folder, random = tmp_path_factory.mktemp("taught") / "export", np.random.default_rng(0)
    with ExportWriter(folder, **HEADER) as writer:
        for i in range(3):
            arrays, teacher = tiny_scene(random, 2, 3)
            arrays["vggt/depth_conf"] = random.uniform(1, 9, arrays["vggt/depth"].shape)
            arrays["vggt/depth_conf"] = arrays["vggt/depth_conf"].astype(np.float16)
            features = {"features": teacher["features"]}
            fit = ALIGNMENT if i == 1 else None
            split = "train" if i < 2 else "val"
            writer.add_scene(f"s{i}", arrays, split=split, teacher=features, alignment=fit)
            writer.add_questions(tiny_questions(random, f"s{i}", arrays["target/boxes"]))
    return Export(folder)


def test_what_the_exporters_write_and_this_command_feeds_every_term(taught, run, tmp_path):
    status, out, _ = run("teacher", "--export", taught.folder, "--out", tmp_path / "out",
                         "--depth-bins", 6)  # fmt: skip
    assert status == 0
    for name in ("depth_bins", "detection_probs", "relations"):
        assert f"3 scenes with new teacher/{name}" in out
    found = Export(tmp_path / "out")
    validate(found.folder)
    assert "pseudo-teacher" in found.manifest["producer"]["teacher_detection_probs"]
    assert found.manifest["producer"]["teacher_depth_bins"] == "vggt/depth and its confidence"
    for scene_id in found.scene_ids():
        old, new = taught.read_scene(scene_id), found.read_scene(scene_id)
        for name, array in old.items():
            np.testing.assert_array_equal(new[name], array)
        wanted = pair_relations(old["target/boxes"], old["camera/extrinsic"][0]).reshape(-1, 4)
        np.testing.assert_allclose(new["teacher/relations"], wanted, atol=1e-3)
    assert list(found.questions()) == list(taught.questions())
    assert [scene.get("alignment") for scene in found.manifest["scenes"]] == [None, ALIGNMENT, None]

    records = list(found.questions())
    texts = [prompt(r) for r in records] + [" " + r["answer"] for r in records]
    config = PipelineConfig(
        export=str(found.folder), scenes_per_batch=2, questions_per_scene=4, question_length=64,
        answer_length=48, max_boxes=6, rows_per_scene=4, row_length=128,
    )  # fmt: skip
    tokenizer = train_tokenizer(texts, CATEGORIES, min_count=2)
    objective = HiddenCoT(HiddenCoTConfig(STUDENT))
    pipeline = Pipeline(found, tokenizer, config, "train")
    assert objective.missing_targets(pipeline.targets) == {}
    learned = objective.learned_targets(pipeline.targets)
    assert (
        learned["depth_kl"] == ["teacher/depth_bins"] and "teacher/relations" in learned["feature"]
    )
    before = Pipeline(taught, tokenizer, config, "train")
    assert set(objective.missing_targets(before.targets)) == {"depth_kl", "feature"}
    batch = pipeline.batch(0)
    assert batch.teacher_depth_bins_mask_S.all() and batch.teacher_detection_mask_S.all()
    assert batch.teacher_relations_mask_SQr.any()


def test_a_detectors_boxes_are_read(taught, run, tmp_path):
    folder = tmp_path / "detector"
    folder.mkdir()
    for n, scene_id in enumerate(taught.scene_ids()):
        boxes = taught.read_scene(scene_id, ["target/boxes"])["target/boxes"][n:]
        np.savez(folder / f"{scene_id}.npz", boxes=boxes, probs=np.eye(5)[: len(boxes)] + 0.25)
    command = ("teacher", "--export", taught.folder, "--detections", folder, "--out")
    status, out, _ = run(*command, tmp_path / "out")
    assert status == 0 and "3 boxes without a detection" in out
    found = Export(tmp_path / "out").read_scene("s1", ["teacher/detection_probs"])
    probs = found["teacher/detection_probs"]
    assert not probs[0].any() and np.isclose(probs[1:].max(-1), 1.25 / 2.25, atol=1e-3).all()
    for content, rule in (
        ({"boxes": np.ones((1, 6)), "probs": np.ones((1, 5))}, r"not \[M, 7\]"),
        ({"boxes": np.ones((1, 7))}, "not an .npz with boxes and probs"),
        ({"boxes": np.ones((1, 7)), "probs": np.zeros((1, 5))}, "have no mass"),
        ({"boxes": np.full((1, 7), np.nan), "probs": np.ones((1, 5))}, "not finite"),
    ):
        np.savez(folder / "s0.npz", **content)
        with pytest.raises(ExportError, match=rule):
            add_teacher_targets(TeacherRequest(taught.folder, tmp_path / "bad", 6, folder))
    (folder / "s0.npz").unlink()
    assert "no such file" in one_error(run(*command, tmp_path / "bad"))
    assert not (tmp_path / "bad" / "manifest.json").exists()


def test_depth_without_scale_and_exports_without_sources_are_refused(taught, tmp_path, run):
    with ExportWriter(tmp_path / "scene", **HEADER | {"scale": "scene"}) as writer:
        arrays = {"vggt/tokens": np.zeros((1, 6, 5), np.float32)}
        writer.add_scene("s", arrays, split="train")
    line = one_error(run("teacher", "--export", tmp_path / "scene", "--out", tmp_path / "out"))
    assert "no metric scale" in line
    options = ("--depth-bins", 0, "--out", tmp_path / "out")
    line = one_error(run("teacher", "--export", tmp_path / "scene", *options))
    assert "no scene has vggt/depth, target/labels or target/boxes" in line
    with pytest.raises(UserError, match=r"smoothing: 1\.5 is not a number"):
        TeacherRequest(tmp_path, tmp_path, smoothing=1.5)
