"""What a configuration asks for, before anything is trained."""

import dataclasses
import functools
import importlib
import json
import math
from types import SimpleNamespace

import jax
import ml_collections
import numpy as np
import pytest
from flax import nnx

from configs.hidden_cot import get_config
from geode_jax.data.scene_arrays import SceneShapes
from geode_jax.errors import UserError
from geode_jax.exports import Export, ExportWriter
from geode_jax.exports.files import write_json
from geode_jax.runs import build
from geode_jax.runs import export as run_export
from geode_jax.runs.config import flat, load_settings, make_settings
from geode_jax.runs.data import make_pipelines, prepare_tokenizer
from geode_jax.runs.export import export_folder, prepare_export, refuse_stand_ins
from geode_jax.runs.systems import SYSTEMS
from geode_jax.sharding import abstract_model, make_mesh, spec
from tests.helpers.exports import HEADER, tiny_questions, tiny_scene
from tests.helpers.runs import tiny_config, tiny_geode_config, tiny_rooms


def test_rooms_with_pictures_are_another_export():
    data = make_settings(get_config("laptop")).data
    assert export_folder(data).name == "rooms_8000_s0"
    pictures = dataclasses.replace(data, rooms_images=32)
    assert export_folder(pictures).name == "rooms_8000_s0_i32"


def test_rooms_are_made_with_the_pictures_asked_for(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        run_export, "make_rooms", lambda *args, **kwargs: made.append((args, kwargs))
    )
    data = make_settings(get_config("laptop")).data
    folder = prepare_export(dataclasses.replace(data, root=str(tmp_path), rooms_images=32))
    assert made == [((folder,), {"scenes": 8000, "seed": 0, "images": 32})]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rooms_images", -1, "data.rooms_images: -1 is not at least 0"),
        ("vision", "images", "data.vision: images is not what the student sees"),
        ("root", "ok/" + "x" * 5000, r"data.root: ok/x+\.\.\. is not a path: file systems hold"),
    ],
)
def test_what_the_data_cannot_be_is_refused_by_name(field, value, said):
    config = get_config("laptop")
    make_settings(config)
    with config.unlocked():
        config.data[field] = value
    with pytest.raises(UserError, match=said):
        make_settings(config)


def test_the_students_tokenizer_learns_nothing_of_boxes(tmp_path):
    settings, export = make_settings(get_config("laptop")), Export(tiny_rooms(tmp_path / "rooms"))
    assert any(record["kind"] == "object_box" for record in export.questions())
    tokenizer = prepare_tokenizer(settings, export, tmp_path)
    assert tokenizer.unk_id in tokenizer.encode("What is the 3D bounding box of the bed?")
    pipelines = make_pipelines(settings, export, tokenizer)
    for split, pipeline in pipelines.items():
        ids = set(export.scene_ids(split))
        boxes = [r for r in export.questions() if r["scene_id"] in ids and "box" in r]
        assert pipeline.dropped == {"kind object_box": len(boxes)} and boxes
        for records, _ in pipeline.eval_batches():
            assert not any("box" in record for row in records for record in row)


# --- GEODE ----------------------------------------------------------------------------------------

CLIP = SceneShapes(
    views=32, grid=(37, 37), token_width=0, depth_ratio=1, boxes=64, vision="images",
    image=(448, 448), points=2048, point_width=512,
)  # fmt: skip
"""Scenes as of VGGT at 518 and InternViT at 448 pixels, with Sonata's features."""
WIDE = dataclasses.replace(CLIP, image=(480, 640))


def geode_objective(stage: str, arg: str, shapes: SceneShapes, **changes):
    config = importlib.import_module(f"configs.geode_{stage}").get_config(arg)
    with config.unlocked():
        config.update_from_flattened_dict({"init_from": "run"} | changes)
    settings = make_settings(config)
    tokenizer = SimpleNamespace(vocab_size=151_676, id_of={"<REG>": 7, "<3DBBOX>": 8}.__getitem__)
    export = SimpleNamespace(categories=["chair", "table"])
    pipeline = SimpleNamespace(shapes=shapes)
    return settings.system.make_objective(settings, export, tokenizer, pipeline)


@pytest.mark.parametrize(("stage", "shapes"), [("align", CLIP), ("drm", WIDE), ("joint", CLIP)])
def test_geode_of_the_papers_size(stage, shapes):
    objective = geode_objective(stage, "full", shapes)
    state = nnx.state(abstract_model(objective.build, make_mesh()))
    sizes: dict[tuple, int] = {}
    for path, variable in nnx.to_flat_state(state):
        part = path[:2] if path[0] == "vlm" else path[:1]
        sizes[part] = sizes.get(part, 0) + math.prod(variable.shape)
    assert sizes[("vlm", "decoder")] == 1_543_714_304
    assert sizes[("vlm", "vision")] == 304_012_288
    assert sizes[("vlm", "projector")] == 8_662_016
    assert set(sizes) == {*(("vlm", p) for p in ("decoder", "vision", "projector")),
                          ("drm",), ("drh",)}  # fmt: skip
    # On a large mesh every device holds its part alone.
    mesh = {"data": 2, "fsdp": 16, "model": 4}
    whole = [v for _, v in nnx.to_flat_state(state)
             if not any(spec(v.get_metadata("out_sharding"), v.shape, mesh))]  # fmt: skip
    assert sum(math.prod(v.shape) for v in whole) < 0.002 * sum(sizes.values())
    learned = nnx.filter_state(state, objective.trainable)
    own = {"align": 8_662_016, "drm": sizes["drm",],
           "joint": 8_662_016 + 1_543_714_304 + sizes["drh",]}  # fmt: skip
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(learned)) == own[stage]


@pytest.mark.parametrize(
    ("stage", "arg", "shapes", "changes", "said"),
    [
        ("drm", "drm=off", CLIP, {}, "model.drm.on: False is not what geode_drm trains"),
        ("drm", "full,drm_frames=8", CLIP, {}, "model.drm.frames: the export has points without"),
        ("drm", "full", CLIP, {"loss.layout_weight": 1.0}, "layout_weight: 1.0 is not 0 without"),
        ("drm", "full", CLIP, {"model.drm.condition_on_question": True}, "questions_per_scene: 4"),
        ("joint", "full", CLIP, {"model.vision.patch_size": 64}, "a picture of 448 x 448 .* even"),
        ("pretrain", "", CLIP, {"model.vision.patch_size": 14}, "32 x 32 patches, .* 37 x 37"),
        ("pretrain", "", CLIP, {"data.vision": "internvit/tokens"}, "is not what geode_pretrain"),
        ("align", "", WIDE, {}, "model.vision.image_size: 0 .* 640 x 480 pixels are no square"),
    ],
)
def test_what_geode_cannot_be_is_refused_by_name(stage, arg, shapes, changes, said):
    with pytest.raises(UserError, match=said) as caught:
        geode_objective(stage, arg, shapes, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", ["align", "drm", "joint"])
def test_a_stage_that_starts_from_nothing_is_refused(stage, tmp_path):
    settings = make_settings(tiny_geode_config(stage, tmp_path / "nothing"))
    with pytest.raises(UserError, match="config: init_from: '' is not a run or folders"):
        build.build(settings, tmp_path / "run")


def test_a_term_of_the_loss_that_no_scene_has_a_target_for_is_refused(tmp_path, monkeypatch):
    """Two views with cameras, true depth and boxes, and no teacher."""
    random = np.random.default_rng(0)
    with ExportWriter(tmp_path / "export", **HEADER) as writer:
        for i, split in enumerate(("train", "train", "train", "val")):
            arrays, _ = tiny_scene(random, 2, 3)
            writer.add_scene(f"scene{i}", arrays, split=split)
            writer.add_questions(tiny_questions(random, f"scene{i}", arrays["target/boxes"]))

    def built(arg, **data):
        config = tiny_config(tmp_path / "export", arg)
        config.data.update(data)
        build.build(make_settings(config), tmp_path / "run")

    class IsBuiltError(Exception):
        """The check has passed."""

    def init(*_):
        raise IsBuiltError

    monkeypatch.setattr(build, "init_state", init)
    said = (
        "no training scene has what 2 of the losses need: depth_kl learns from "
        "teacher/depth_bins; feature learns from teacher/depth_bins or target/boxes with "
        "teacher/detection_probs or teacher/relations or teacher_relation of a question; "
        "data.on_missing_targets=skip"
    )
    with pytest.raises(UserError, match=said):
        built("")
    with pytest.raises(UserError, match="what 1 of the losses need: feature learns from"):
        built("only=feature")
    with pytest.raises(IsBuiltError):
        built("", on_missing_targets="skip")
    with pytest.raises(IsBuiltError):
        built("vision=off")  # learns from answers alone
    monkeypatch.setattr(build, "has_checkpoint", lambda _: True)
    with pytest.raises(IsBuiltError):  # a run that was saved before goes on
        built("")


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({}, True),
        ({"data.stand_in_tokens": True}, False),
        ({"data.rgbd": "FOLDER"}, False),  # asks by its nature
        ({"loss.vision": False}, False),  # sees nothing
    ],
)
def test_tokens_made_from_the_true_depth_of_real_scenes_must_be_asked_for(change, refused):
    config = tiny_config("export")
    with config.unlocked():
        for name, value in change.items():
            group, field = name.split(".")
            config[group][field] = value
    settings = make_settings(config)

    def made_by(project: str, contain: bool = True):
        manifest = {"producer": {"project": project}, "tokens_contain_depth": contain}
        return SimpleNamespace(folder="export", manifest=manifest)

    real = made_by("geode_jax ScanNet")
    if refused:
        with pytest.raises(UserError, match=r"^export: its .* --export export --out DIR") as caught:
            refuse_stand_ins(settings, real)
        assert "\n" not in str(caught.value)
    else:
        refuse_stand_ins(settings, real)
    refuse_stand_ins(settings, made_by("geode_jax rooms"))
    refuse_stand_ins(settings, made_by("geode_jax ScanNet", contain=False))


# --- Every rule of a configuration ----------------------------------------------------------------

BAD = (
    -2, 0, 1, 3, 7, 2**63, 0.5, 1.5, float("nan"), "", "nothing", "scanqa=-1", "images",
    "vggt/tokens", "internvit/tokens", 256 * "x",
    (), (1, 2), (9, 9, -9), (3, 1), [99], ["nothing"], False,
)  # fmt: skip
"""Values of which at least one breaks any rule."""


def changed(system: str, name: str, value) -> ml_collections.ConfigDict:
    """The system's own configuration with one field changed, of whatever type."""
    stage = "hidden_cot" if system == "hidden_cot" else system
    config = importlib.import_module(f"configs.{stage}").get_config("").to_dict()
    if system != "geode_pretrain" and "init_from" in config:
        config["init_from"] = "run"
    *parents, last = name.split(".")
    functools.reduce(lambda part, key: part[key], parents, config)[last] = value
    return ml_collections.ConfigDict(config)


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_every_rule_can_be_broken_and_is_then_named(system):
    make_settings(changed(system.name, "seed", 0))
    unbroken = set()
    for names, _, rule in (*system.settings.RULES, *system.rules):
        for name in names.split():
            refused = (refusal(system.name, name, value) for value in BAD)
            if not any(said.endswith(f" is not {rule}") for said in refused):
                unbroken.add(name)
    # The first has words of its own, the others depend on other fields:
    # `test_what_geode_cannot_be_is_refused_by_name`.
    assert unbroken <= {"data.mixture", "data.questions_per_scene", "loss.layout_weight"}
    assert refusal(system.name, "data.mixture", "scanqa=-1").endswith(
        "is not SOURCE=WEIGHT, weight >= 0"
    )


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_every_field_refuses_another_type_by_its_name(system):
    values = changed(system.name, "seed", 0).to_dict()
    for name in flat(values | {"data": values["data"] | {"kind_weights": 1}}):
        assert refusal(system.name, name.replace("/", "."), None), name


def refusal(system: str, name: str, value) -> str:
    """The refusal of a value of a field by its name; "" where there is none."""
    try:
        make_settings(changed(system, name, value))
    except UserError as error:
        return str(error) if str(error).startswith(f"config: {name}: ") else ""
    return ""


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**32),  # would be seed 0
        ("seed", 2**63),
        ("data.rooms_seed", -1),
        ("data.rooms_seed", 1_000_000),
        ("data.scenes_per_batch", 2**31),
        ("data.question_length", 2**63 - 1),
        ("data.workers", 1_000_000),
        ("train.steps", 2**31),
    ],
)
def test_numbers_beyond_all_bounds_are_refused(system, name, value):
    assert refusal(system.name, name, value)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("model.vision_prefix", 2**31 - 1, "at most 1,048,576"),
        ("seed", 0.5, "a whole number"),
        ("seed", True, "a whole number"),
        ("data.fraction", True, "a number, or text such as s-mit=0.25,own=0.5"),
        ("data.min_learned", "1", "a number"),
        ("data.kind_weights", {"room_size": "much"}, "a section, each field a number"),
        ("data.rgbd_intrinsic", (1, 2), "fx, fy, cx, cy, or empty"),
        ("loss.vision", 1, "True or False"),
        ("loss.terms", "text", "a list, each text"),
        ("tokenizer", 1, "text"),
        ("optimizer.name", "sgd", "one of adamw, muon"),
        ("model", 3, "a section of fields"),
    ],
)
def test_another_type_is_refused_in_words(name, value, rule):
    said = refusal("hidden_cot", name, value)
    assert said == f"config: {name}: {value} is not {rule}"


def test_an_unknown_field_is_named():
    with pytest.raises(UserError, match=r"config: train\.stepz: no such field"):
        make_settings(changed("hidden_cot", "train.stepz", 1))


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_saved_before_a_field_existed_loads_and_keeps_its_checksum(system, tmp_path):
    config = changed(system, "data.field_of_then", 1).to_dict()
    late = {"rooms_images": 0, "rgbd_depth_scale": 1000.0, "mixture": "", "fraction": 1.0}
    for name in late:
        del config["data"][name]
    config["train"].pop("checkpoint_minutes")
    write_json(tmp_path / "config.json", config)
    settings = load_settings(tmp_path)
    assert {name: getattr(settings.data, name) for name in late} == late
    assert settings.train.checkpoint_minutes == 0
    assert settings.values == json.loads((tmp_path / "config.json").read_text())
    del config["train"]["steps"]
    write_json(tmp_path / "config.json", config)
    with pytest.raises(UserError, match=r"config\.json: config: train\.steps: missing"):
        load_settings(tmp_path)


def test_settings_that_are_changed_are_checked_again():
    settings = make_settings(get_config("laptop"))
    assert settings.with_scenes(3).data.scenes_per_batch == 3
    train = dataclasses.replace(settings.train, microbatches=8)
    with pytest.raises(UserError, match=r"microbatches: 8 is not a divisor of data\.scenes_per_"):
        dataclasses.replace(settings, train=train).with_scenes(4)


@pytest.mark.parametrize("name", ["data", "train.steps", "model.layers", "mesh"])
def test_a_missing_field_is_named(name):
    config = changed("hidden_cot", "seed", 0).to_dict()
    *parents, last = name.split(".")
    del functools.reduce(lambda part, key: part[key], parents, config)[last]
    with pytest.raises(UserError, match=f"config: {name}.*: missing"):
        make_settings(ml_collections.ConfigDict(config))


def test_an_unknown_system_is_refused():
    with pytest.raises(UserError, match="config: system: 'student' is not one of hidden_cot"):
        make_settings(changed("hidden_cot", "system", "student"))
