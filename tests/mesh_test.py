"""A run on eight devices is the run on one: losses, answers, and where everything lies."""

import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from geode_jax import sharding
from geode_jax.models.layers import param
from tests.helpers.own_process import output_of
from tests.helpers.runs import tiny_rooms
from tests.mesh_run import STEPS

MESHES = ("1x8x1", "2x4x1", "2x2x2", "1x1x8")


@pytest.fixture(scope="module", params=["student", "joint"])
def found(request, tmp_path_factory) -> dict:
    """What a system does on every mesh, "1x1x1" too; "hlo" is where the compiled steps are."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "student":
        export, start = tiny_rooms(folder / "rooms"), ""
    else:
        runs = request.getfixturevalue("geode_runs")
        export, start = runs["drm"].export, runs["drm"].workdir
    told = (request.param, str(export), str(start), str(folder), "1x1x1", *MESHES)
    output_of("tests.mesh_run", *told, devices=8)
    return json.loads((folder / "found.json").read_text()) | {"hlo": folder}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_the_losses_are_those_of_one_device(found, mesh):
    one, many = found["1x1x1"], found[mesh]
    assert len(one["losses"]) == STEPS and len(set(one["losses"])) == STEPS
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
    assert many["val"].keys() == one["val"].keys()
    for name, value in one["val"].items():
        np.testing.assert_allclose(many["val"][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_the_answers_are_those_of_one_device(found, mesh):
    one, many = found["1x1x1"], found[mesh]
    assert one["said"] and many["said"] == one["said"]
    for name, value in one["depth"].items():
        np.testing.assert_allclose(many["depth"][name], value, rtol=1e-4, err_msg=name)
    for a, b in zip(many["values"], one["values"], strict=True):
        assert (a is None) == (b is None) and (a is None or abs(a - b) <= 1e-3 * abs(b))


@pytest.mark.slow
def test_parameters_and_moments_lie_where_the_rules_say(found):
    def of(mesh: str, end: str) -> list:
        rows = found[mesh]["params"]
        (name,) = (n for n in rows if n.endswith(end) and "stages.0.blocks" in n)
        return rows[name][1]

    up, down = "mlp.up.kernel", "mlp.down.kernel"
    assert of("1x8x1", up) == of("2x4x1", up) == [[], ["fsdp"], []]
    assert of("2x2x2", up) == [[], ["fsdp"], ["model"]]
    assert of("2x2x2", down) == [[], ["model"], ["fsdp"]]
    assert of("1x1x8", up) == [[], [], ["model"]]
    for mesh in MESHES:
        params, moments = list(found[mesh]["params"].values()), found[mesh]["moments"]
        assert moments and all(row in params for row in moments)
        assert any(any(axes) for _, axes in moments)


@pytest.mark.slow
def test_no_optimizer_state_is_gathered(found):
    """Adam's arithmetic goes on where the moments lie (Muon's needs whole matrices)."""
    if "student" in found["hlo"].name:
        pytest.skip("the student's optimizer is Muon")
    for mesh in MESHES:
        text = (found["hlo"] / f"{mesh}.hlo").read_text()
        names = re.findall(r"= [^=]*all-gather(?:-start)?\([^\n]*op_name=\"([^\"]*)\"", text)
        assert "/optimizer/" in text
        assert names or mesh == "1x1x8"
        assert not [name for name in names if "/optimizer/" in name], mesh


# --- The rules, without devices -------------------------------------------------------------------

SIZES = {"data": 2, "fsdp": 4, "model": 8}


def test_an_axis_that_is_not_divided_is_left_whole():
    assert sharding.spec(("embed", "heads", "head_dim"), (64, 16, 4), SIZES) == PartitionSpec(
        ("fsdp",), ("model",), None
    )
    assert sharding.spec(("embed", "kv_heads"), (64, 2), SIZES) == PartitionSpec(("fsdp",), None)
    assert sharding.spec(("batch", None), (8, 3), SIZES) == PartitionSpec(("data", "fsdp"), None)
    assert sharding.spec(("batch",), (4,), SIZES) == PartitionSpec(None)
    assert sharding.spec(("batch",), (4,), SIZES | {"fsdp": 1}) == PartitionSpec(("data",))
    with pytest.raises(KeyError, match="colour"):
        sharding.spec(("colour",), (4,), SIZES)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((-1, -1, 1), "at most one"), ((1, 3, 1), "multiply"), ((0, -1, 1), "multiply")],
)
def test_a_mesh_that_cannot_be(shape, words):
    with pytest.raises(ValueError, match=words):
        sharding.make_mesh(shape)


def test_a_model_as_shapes_computes_nothing():
    def build(rngs):
        return nnx.Dict(w=param(jax.random.normal(rngs.params(), (2, 3)), "embed", "mlp"))

    abstract = sharding.abstract_model(build, sharding.make_mesh())
    leaf = abstract.w.get_value()
    assert isinstance(leaf, jax.ShapeDtypeStruct) and leaf.shape == (2, 3)
    assert leaf.sharding.spec == PartitionSpec(None, None)  # one device
