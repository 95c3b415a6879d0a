"""The PyTorch models of exported folders against ours, on random weights, and what a folder holds.

What is theirs in a GEODE, InternViT and Qwen2, is transformers' own; the rest is written twice, in
JAX and in PyTorch, from the papers' equations.
"""

import ast
import dataclasses
import inspect
import json
import math
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from configs.geode_joint import get_config as geode_joint
from configs.hidden_cot import get_config as hidden_cot
from geode_jax.errors import UserError
from geode_jax.exports.units import BASE_UNIT, UNITS, write_number
from geode_jax.models.drm import DrmConfig
from geode_jax.models.geode import Geode, GeodeConfig
from geode_jax.models.internvl import InternVLConfig
from geode_jax.models.packed import pick
from geode_jax.models.student import Student
from geode_jax.models.vit import VitConfig
from geode_jax.objectives.geode import GeodeStage, GeodeStageConfig
from geode_jax.objectives.hidden_cot import (
    HiddenCoT,
    HiddenCoTConfig,
    HiddenCoTModel,
)
from geode_jax.plan.described import describe
from geode_jax.results.card import inherited
from geode_jax.runs.config import make_settings
from geode_jax.shapes import Batch, without_vision
from geode_jax.targets import LOG_EDGES, LOG_VALUES
from geode_jax.weights import load_pretrained
from geode_jax.weights.convert import write_model
from geode_jax.weights.geode import write_geode
from geode_jax.weights.student import write_student
from tests.helpers.tiny_models import (
    ANSWER,
    EOS_ID,
    PAD_ID,
    QUESTION,
    STUDENT,
    materialize,
    tiny_batch,
)
from tests.helpers.weights import close
from tests.weights.convert_test import QWEN

REMOTE = Path(__file__).resolve().parents[2] / "geode_jax" / "weights" / "remote"
POINTS, REG_ID, BOX_ID = 6, 21, 22
GEODE = GeodeConfig(
    vlm=InternVLConfig(
        vision=VitConfig(8, 2, width=8, layers=2, heads=2, mlp_width=12),
        decoder=dataclasses.replace(QWEN, vocab_size=23, tied_head=True, dtype="float32"),
    ),
    drm=DrmConfig(
        width=8, heads=2, layers=2, slots=3, bands=2,
        visual_width=8, point_width=4, llm_width=8, max_frames=2,
    ),
    drh_width=6,
    patch_grid=(2, 2),
    categories=3,
    views=2,
)  # fmt: skip
OTHER = dataclasses.replace(
    GEODE,
    vlm=dataclasses.replace(
        GEODE.vlm, decoder=dataclasses.replace(GEODE.vlm.decoder, tied_head=False)
    ),
    drm=dataclasses.replace(GEODE.drm, condition_on_question=True, frames=1),
    drh_width=0,
    categories=0,
    views=0,
)
"""Every switch the other way."""
ENTRIES = {
    "bos_token_id": 2,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "answer_length": ANSWER,
    "reg_token_id": REG_ID,
    "box_token_id": BOX_ID,
}


OBJECTIVE = HiddenCoT(HiddenCoTConfig(STUDENT))


@pytest.fixture(scope="module")
def trained() -> HiddenCoTModel:
    return materialize(OBJECTIVE.build, seed=3)  # one that does not always say the same


@pytest.fixture(scope="module")
def student(trained) -> Student:
    return trained.student


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Scenes with pictures and points; of the second one view and two points are padding."""
    made, random = tiny_batch(seed=1), np.random.default_rng(3)
    S, V = made.view_mask_SV.shape
    return dataclasses.replace(
        made,
        image_SVhw3=random.integers(0, 256, (S, V, 8, 8, 3), np.uint8),
        point_SJC=random.normal(size=(S, POINTS, 4)).astype(np.float32),
        coord_SJ3=random.normal(size=(S, POINTS, 3)).astype(np.float32),
        point_frame_SJ=np.broadcast_to(np.arange(POINTS) % V, (S, POINTS)).astype(np.int32),
        point_mask_SJ=np.arange(POINTS) < np.array([[6], [4]]),
        points_mask_SVP=random.random(made.points_mask_SVP.shape) < 0.7,
    )


def loaded(kind, folder: Path):
    """What transformers makes of a folder, which has to be exactly the model's."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def text_of(torch, batch: Batch) -> tuple:
    """Prompts, their mask, and answers but for their last token, as tensors."""
    shown = np.arange(QUESTION) >= QUESTION - batch.question_length_SQ[..., None]
    arrays = (batch.question_SQL.astype(np.int64), shown, batch.answer_SQA[..., :-1])
    return tuple(map(torch.tensor, arrays))


def paid(batch: Batch) -> np.ndarray:
    return np.arange(ANSWER) < batch.answer_length_SQ[..., None]


# --- The student ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sees", [False, True])
def test_the_students_twin_computes_what_the_student_computes(torch, batch, tmp_path, sees):
    from geode_jax.weights.remote.modeling_hidden_cot import HiddenCotModel

    config = dataclasses.replace(STUDENT, question_sees_thinking=sees)
    trained = materialize(HiddenCoT(HiddenCoTConfig(config)).build, seed=3)
    write_model(trained.student, tmp_path / "out", like=ENTRIES)
    twin = loaded(HiddenCotModel, tmp_path / "out")

    @jax.jit
    def ours(model, batch):
        student = model.student
        out = OBJECTIVE.answer(model, student.encode_scene(batch), batch, EOS_ID)
        logits = student.decoder.logits(student.read(student.encode_scene(batch), batch)[0])
        return logits, out["tokens"], out["thinking"], OBJECTIVE.predict_scene(model, batch)

    for shown in (batch, without_vision(batch)):
        logits, tokens, thinking, heads = ours(trained, shown)
        arrays = {
            "vision_tokens": shown.vision_SVPC,
            "view_mask": shown.view_mask_SV,
            "depth_hint": shown.depth_hint_SVP,
            "camera_tokens": shown.camera_SVC,
            "camera_mask": shown.camera_mask_S,
        }
        prompts, mask, answers = text_of(torch, shown)
        with torch.no_grad():
            scene = twin.encode_scene(**{name: torch.tensor(x) for name, x in arrays.items()})
            theirs = twin(scene, prompts, mask, answers)[:, :, QUESTION - 1 :].numpy()
            seen = twin.predict_geometry(scene)
        where = paid(shown)
        close(theirs[where], np.asarray(logits)[where])
        said = twin.answer(scene, prompts, mask).numpy()
        np.testing.assert_array_equal(said, np.asarray(tokens)[..., : said.shape[-1]])
        assert said.shape[-1] == ANSWER and len(np.unique(said)) > 2
        np.testing.assert_array_equal(twin.thinking_tokens(scene), thinking)
        views = shown.view_mask_SV
        for mine, other in zip(heads, seen, strict=True):
            close(other.numpy(), mine)
        assert views.any() or not np.asarray(scene.z).any()


# --- GEODE ----------------------------------------------------------------------------------------


def geode(config: GeodeConfig) -> Geode:
    return materialize(lambda rngs: Geode(config, rngs=rngs), seed=2)


def arrays_of(torch, batch: Batch) -> dict:
    arrays = {
        "images": batch.image_SVhw3,
        "view_mask": batch.view_mask_SV,
        "places": batch.points_SVP3,
        "places_mask": batch.points_mask_SVP,
        "points": batch.point_SJC,
        "coords": batch.coord_SJ3,
        "point_mask": batch.point_mask_SJ,
        "extrinsic": batch.extrinsic_SV34,
        "point_frame": batch.point_frame_SJ,
    }
    return {name: torch.tensor(array) for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("config", "parts"),
    [(GEODE, ("spatio", "visual")), (OTHER, ("spatio", "visual")), (GEODE, ())],
    ids=["all", "other switches", "blind"],
)
def test_geodes_twin_computes_what_geode_computes(torch, batch, tmp_path, config, parts):
    from geode_jax.weights.remote.modeling_geode import GeodeModel

    if config is OTHER:  # frames that must be squeezed
        wide = np.repeat(batch.image_SVhw3, 2, axis=3)
        batch = dataclasses.replace(batch, image_SVhw3=wide)
    model = geode(config)
    write_model(model, tmp_path / "out", like=ENTRIES | {"prefix": list(parts)})
    twin = loaded(GeodeModel, tmp_path / "out")
    objective = GeodeStage(GeodeStageConfig(config, stage="joint", vision=bool(parts)))
    assert objective.prefix_parts() == parts

    @jax.jit
    def ours(model, batch):
        states = model.read(batch, model.prefix(batch, parts))
        logits = model.vlm.decoder.logits(pick(states, batch.answer_column_SQA))
        return logits, objective.answer(model, objective.encode_scene(model, batch), batch, EOS_ID)

    logits, out = ours(model, batch)
    prompts, mask, answers = text_of(torch, batch)
    with torch.no_grad():
        prefix = twin.encode_scene(
            **arrays_of(torch, batch), input_ids=prompts, attention_mask=mask
        )
        theirs = twin(prefix, prompts, mask, answers)[:, :, QUESTION - 1 :].numpy()
    where = paid(batch)
    close(theirs[where], np.asarray(logits)[where])
    said = twin.answer(prefix, prompts, mask)
    length = said.tokens.shape[-1]
    tokens = np.asarray(out["tokens"])[..., :length]
    np.testing.assert_array_equal(said.tokens, tokens)
    assert len(np.unique(tokens)) > 3
    if not config.drh_width:
        assert said.values is said.boxes is None
        return
    asked = batch.answer_length_SQ > 0
    codes = np.clip(np.asarray(out["values"])[..., :length], np.log(0.01), 11)
    close(said.values.log()[asked], codes[asked])
    close(said.boxes[asked], np.asarray(out["boxes"])[..., :length, :][asked])


class Words:
    """A tokenizer that says the ids."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(f" w{i}" for i in ids)


def test_values_and_boxes_are_said_in_place_of_their_tokens(torch):
    from geode_jax.weights.remote import modeling_geode

    class Twin(modeling_geode.GeodeModel):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.config = modeling_geode.GeodeConfig(**ENTRIES)

    tokens = torch.tensor([[[3, REG_ID, 4, EOS_ID], [BOX_ID, EOS_ID, 5, 6]]])
    values = torch.full((1, 2, 4), 1.234)
    boxes = torch.arange(7.0).expand(1, 2, 4, 7)
    answers = modeling_geode.Answers(tokens, values, boxes)
    ((value, box),) = Twin().decode_answers(answers, Words(), [["cm", None]])
    assert value["text"] == "w3 123 w4" and value["value"] == pytest.approx(123.4)
    assert value["text"].split()[1] == write_number(value["value"], "cm")
    assert box == {"text": "0.00 1.00 2.00 3.00 4.00 5.00 6.00", "box": list(range(7))}


# --- Sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["hidden_cot", "geode"])
def test_default_sizes_are_those_of_the_full_configs(torch, system):
    """All but the ids of the categories' nouns, which are the tokenizer's."""
    from geode_jax.weights.remote.modeling_geode import GeodeConfig as GeodeSizes
    from geode_jax.weights.remote.modeling_hidden_cot import HiddenCotConfig as StudentSizes

    if system == "hidden_cot":
        kind, written = StudentSizes, write_student(full(hidden_cot("full")).student)
    else:
        kind, written = GeodeSizes, write_geode(full(geode_joint("full")).model)
    for part in ("vision_config", "text_config"):
        written.get(part, {}).pop("architectures", None)
    default, exported = kind().to_dict(), kind(**written).to_dict()
    for name in set(inspect.signature(kind).parameters) - {"category_ids", "kwargs"}:
        assert default[name] == exported[name], name


def full(config):
    """The sizes of a full configuration's objective, on the data that a plan describes."""
    settings = make_settings(config)
    data = describe(settings)
    return settings.system.make_objective(settings, data, data, data).config


# --- Folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["student", "geode", "geode, other switches"])
def test_a_folder_in_shards_comes_back_bit_by_bit(student, tmp_path, kind):
    model = {"student": student, "geode": geode(GEODE)}.get(kind) or geode(OTHER)
    write_model(model, tmp_path / "out", like=ENTRIES, shard_bytes=4000)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 2 and shards[0].startswith("model-00001-of-000")
    sizes = [(tmp_path / "out" / name).stat().st_size for name in shards]
    assert max(sizes) < 4000 + 5000  # and a header of names
    code = "modeling_hidden_cot.py" if kind == "student" else "modeling_geode.py"
    assert set(files) == {
        *("config.json", "model.safetensors.index.json", "modeling_parts.py", code),
        *shards,
    }
    again = load_pretrained(tmp_path / "out")
    assert again.config == model.config
    mine, theirs = (nnx.to_flat_state(nnx.state(m)) for m in (model, again))
    for (path, a), (other, b) in zip(mine, theirs, strict=True):
        assert path == other and a.dtype == b.dtype
        assert np.asarray(a[...]).tobytes() == np.asarray(b[...]).tobytes(), path


def test_a_folder_that_was_cut_off_is_no_model(student, tmp_path):
    def fail(folder: Path) -> None:
        (folder / "README.md").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_model(student, tmp_path / "out", add=fail)
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor"):
        load_pretrained(tmp_path / "out")
    with pytest.raises(UserError, match="not empty"):
        write_model(student, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heads": {"width": 8}}, "missing"),
        ({"thinking_tokens": 3}, "thinking: 1x2x16 is not the model's 1x3x16"),
        ({"hidden_size": None}, "config.json: "),
    ],
)
def test_a_config_that_is_no_students_is_refused(student, tmp_path, changes, said):
    write_model(student, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError) as error:
        load_pretrained(tmp_path / "out")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_both_sides_know_the_same_units():
    tree = ast.parse((REMOTE / "modeling_geode.py").read_text())
    assigned = {
        node.targets[0].id: ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert eval(assigned["BASE_UNIT"]) == pytest.approx(BASE_UNIT)  # literals, merged
    decimals = {name: UNITS[name].decimals for name in BASE_UNIT if UNITS[name].decimals != 1}
    assert eval(assigned["DECIMALS"]) == decimals
    assert eval(assigned["LOG_VALUES"]) == LOG_VALUES
    assert "LOG_EDGES = (math.log(1e-4), 4.0)" in (REMOTE / "modeling_parts.py").read_text()
    assert (math.log(1e-4), 4.0) == LOG_EDGES


def test_modelling_files_import_torch_and_transformers_alone():
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for path in REMOTE.glob("modeling_*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        froms = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
        assert {name.partition(".")[0] for name in names | froms} <= allowed
        own = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.level}
        assert own <= {"modeling_parts"}


# --- The licence of a model -----------------------------------------------------------------------

ROOMS = {"project": "geode_jax rooms", "weights": "none", "licence": "CC0-1.0"}
VGGT = {"project": "vggt", "weights": "facebook/VGGT-1B", "licence": "CC-BY-NC-4.0"}


@pytest.mark.parametrize(
    ("producer", "origins", "sources", "identifier", "assets"),
    [
        (ROOMS, [], [], "apache-2.0", []),
        (ROOMS, ["Qwen2.5-1.5B-Instruct"], [], "apache-2.0", ["Qwen2.5-1.5B"]),
        (ROOMS, ["somebody's model"], [], "other", []),
        (VGGT, [], [], "cc-by-nc-4.0", ["VGGT-1B weights"]),
        (VGGT | {"project": "vggt on ScanNet"}, [], [], "cc-by-nc-4.0",
         ["VGGT-1B weights", "ScanNet, ScanNet++"]),
        (ROOMS | {"licence": "that of the data"}, [], [], "other", []),
        (ROOMS, [], ["scanqa"], "cc-by-nc-sa-3.0", ["ScanQA"]),
        (ROOMS, [], ["sqa3d"], "apache-2.0", ["SQA3D"]),
        (ROOMS, ["Qwen2.5-1.5B"], ["somebody's questions"], "other", ["Qwen2.5-1.5B"]),
    ],
)  # fmt: skip
def test_a_model_inherits_the_strictest_terms(producer, origins, sources, identifier, assets):
    found = inherited(producer, origins, sources)
    assert (found[0], [term.asset for term in found[1]]) == (identifier, assets)


@pytest.mark.parametrize(
    ("kind", "entries", "said"),
    [
        ("geode", {"drm": {"layers": 10**6}}, "1,000,000 layers, but the folder has only"),
        ("geode", {"drm": {"slots": [3]}}, "drm.slots must be a whole number from 0 to"),
        ("geode", {"drm": {"speed": 3}}, "unknown: drm.'speed'"),
        ("geode", {"drm": {"condition_on_question": 1}}, "must be true or false: 1"),
        ("geode", {"patch_grid": [2]}, "patch_grid must be a list of 2: [2]"),
        ("geode", {"memory": True}, "unknown: 'memory'"),
        ("student", {"heads": {"detection_layers": 10**9}}, "1,000,000,000 layers"),
        ("student", {"cross_attention_layers": [9]}, "cross_layers: (9,) are not layers below 3"),
        ("student", {"category_ids": [[1]]}, "category_ids must be a list of heads.categories"),
        ("student", {"norm": "rms"}, "unknown: 'norm'"),
        ("student", {"thinking_tokens": -1}, "thinking_tokens must be a whole number from 0"),
    ],
)
def test_a_config_of_ours_is_checked_before_anything_is_described(
    kind, entries, said, student, tmp_path
):
    model = student if kind == "student" else materialize(lambda r: Geode(GEODE, rngs=r))
    write_model(model, tmp_path / "a", like=ENTRIES)
    path = tmp_path / "a" / "config.json"
    config = json.loads(path.read_text())
    for name, value in entries.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=re.escape(said)):
        load_pretrained(tmp_path / "a")
