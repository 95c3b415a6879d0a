"""Starting from pretrained folders: every part in its place, in one line what does not fit."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from geode_jax.errors import UserError
from geode_jax.models.decoder import Decoder, DecoderConfig
from geode_jax.models.geode import Geode, GeodeConfig
from geode_jax.models.internvl import InternVL, InternVLConfig
from geode_jax.models.vit import InternViT, VitConfig
from geode_jax.runs.start import pretrained_folders, start_from_pretrained
from geode_jax.sharding import make_mesh
from geode_jax.training.step import TrainState
from geode_jax.weights import load_pretrained, save_pretrained
from tests.helpers.tiny_models import materialize
from tests.helpers.weights import change_config

VLM = InternVLConfig(
    vision=VitConfig(8, 4, width=8, layers=1, heads=2, mlp_width=12),
    decoder=DecoderConfig(
        vocab_size=12, width=8, layers=2, heads=2, kv_heads=1, head_width=4, mlp_width=12,
        mlp="swiglu", norm="rms", linear_bias=False, tied_head=True, norm_eps=1e-6,
    ),
)  # fmt: skip
POSITIONS = 32
CONFIG = GeodeConfig(vlm=VLM, drm=None, drh_width=4, patch_grid=(2, 2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a decoder and a vision encoder in bfloat16, and of an InternVL."""
    root = tmp_path_factory.mktemp("pretrained")
    built = {
        "decoder": lambda rngs: Decoder(VLM.decoder, rngs=rngs),
        "vision": lambda rngs: InternViT(VLM.vision, rngs=rngs),
        "internvl": lambda rngs: InternVL(VLM, rngs=rngs),
    }
    for seed, (name, build) in enumerate(built.items()):
        model = materialize(build, seed=10 + seed)
        if name != "internvl":
            graph, state = nnx.split(model)
            cast = nnx.map_state(lambda _, v: v.replace(v[...].astype(jnp.bfloat16)), state)
            model = nnx.merge(graph, cast)
        save_pretrained(model, root / name)
    return root


@pytest.fixture(scope="module")
def state():
    """Decoder and regression head learn, the rest is frozen."""
    model = materialize(lambda rngs: Geode(CONFIG, rngs=rngs))
    learns = nnx.Any(nnx.PathContains("decoder"), nnx.PathContains("drh"))
    _, params, frozen = nnx.split(model, nnx.All(nnx.Param, learns), ...)
    return TrainState(jnp.zeros((), jnp.int32), params, frozen, ())


def start(state, *sources, config=VLM):
    return start_from_pretrained(state, list(sources), config, make_mesh(), POSITIONS)


def flat(state: TrainState) -> dict:
    both = (*nnx.to_flat_state(state.params), *nnx.to_flat_state(state.frozen))
    return {path: np.asarray(variable[...]) for path, variable in both}


def pretrained(folder) -> dict:
    model = nnx.to_flat_state(nnx.state(load_pretrained(folder)))
    return {path: np.asarray(variable[...]) for path, variable in model}


def test_parts_of_two_folders_take_their_places(state, folders):
    before, after = flat(state), flat(start(state, folders / "decoder", folders / "vision"))
    expected = dict(before)
    for part in ("decoder", "vision"):
        expected |= {("vlm", part, *p): v for p, v in pretrained(folders / part).items()}
    assert after.keys() == before.keys() == expected.keys()
    for path, value in after.items():
        assert value.dtype == np.float32, path
        np.testing.assert_array_equal(value, expected[path].astype(np.float32), err_msg=str(path))
    fresh = [path for path in before if (before[path] == after[path]).all()]
    assert {path[:2] for path in fresh if path[0] == "vlm"} == {("vlm", "projector")}
    assert {path[0] for path in fresh} == {"vlm", "drh"}


def test_an_internvl_has_the_projector_too(state, folders):
    after = flat(start(state, folders / "internvl"))
    for path, value in pretrained(folders / "internvl").items():
        np.testing.assert_array_equal(after["vlm", *path], value, err_msg=str(path))


@pytest.mark.parametrize(
    ("names", "change", "said"),
    [
        (("decoder", "internvl"), {}, "both have decoder"),
        (("decoder",), {"layers": 3}, r"model.decoder.layers: 3, and 2 in .*decoder"),
        (("internvl",), {"rope_theta": 5e5}, r"model.decoder.rope_theta: 500000.0, and 10000.0"),
    ],
)
def test_what_does_not_fit_is_one_line(state, folders, names, change, said):
    config = dataclasses.replace(VLM, decoder=dataclasses.replace(VLM.decoder, **change))
    with pytest.raises(UserError, match=said) as caught:
        start(state, *(folders / name for name in names), config=config)
    assert "\n" not in str(caught.value)


def test_scaled_rotary_positions_fit_rows_of_the_trained_length_alone(state, folders, tmp_path):
    shutil.copytree(folders / "decoder", tmp_path / "a")
    entries = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    change_config(tmp_path / "a", **entries, max_position_embeddings=POSITIONS)
    plain, scaled = (flat(start(state, f)) for f in (folders / "decoder", tmp_path / "a"))
    assert all((plain[path] == scaled[path]).all() for path in plain)
    change_config(tmp_path / "a", max_position_embeddings=POSITIONS - 1)
    with pytest.raises(UserError, match=r"dynamic_rope: None, and \(31, 2.0\) in"):
        start(state, tmp_path / "a")


def test_a_run_is_no_pretrained_folder(folders, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"system": "geode_drm"}))
    both = f"{folders / 'decoder'}, {folders / 'vision'}"
    assert pretrained_folders(both) == [folders / "decoder", folders / "vision"]
    assert pretrained_folders(str(tmp_path)) == pretrained_folders("") == []
    for mixed in (f"{tmp_path},{both}", f"{folders / 'decoder'},{tmp_path / 'nothing'}"):
        with pytest.raises(UserError, match=r"has no config.json of a pretrained model"):
            pretrained_folders(mixed)


def test_an_exported_geode_is_no_start(state, tmp_path):
    save_pretrained(materialize(lambda rngs: Geode(CONFIG, rngs=rngs)), tmp_path)
    with pytest.raises(UserError, match="holds a whole Geode; start from the run"):
        start(state, tmp_path)
