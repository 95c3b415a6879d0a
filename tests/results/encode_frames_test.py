"""InternViT's tokens, made before training: the same states, and of the same encoder only."""

import numpy as np
import pytest
from flax import nnx

from geode_jax.cli.command import main
from geode_jax.errors import UserError
from geode_jax.exports import Export
from geode_jax.models.decoder import Decoder
from geode_jax.models.geode import encode_frames
from geode_jax.models.vit import InternViT
from geode_jax.results.encode_frames import encode_export
from geode_jax.runs.trained import open_trained
from geode_jax.train import train_and_evaluate
from geode_jax.weights import save_pretrained
from tests.helpers.runs import tiny_geode_config, tiny_rooms
from tests.helpers.tiny_models import materialize

pytestmark = pytest.mark.slow  # a stage of GEODE is compiled


@pytest.fixture(scope="module")
def encoder(geode_runs) -> InternViT:
    trained = open_trained(geode_runs["drm"].workdir)
    return nnx.merge(trained.graph, trained.state.params, trained.state.frozen).vlm.vision


@pytest.fixture(scope="module")
def encoded(geode_runs, tmp_path_factory) -> Export:
    run, out = geode_runs["drm"], tmp_path_factory.mktemp("encoded") / "out"
    arguments = ("--weights", run.workdir, "--export", run.export, "--out", out)
    main(["internvit", *map(str, arguments)])
    return Export(out)


def test_they_are_the_encoders_states_of_the_frames(geode_runs, encoded, encoder):
    old = Export(geode_runs["drm"].export)
    assert encoded.scene_ids("val") == old.scene_ids("val")
    assert list(encoded.questions()) == list(old.questions())
    for scene_id in (old.scene_ids()[0], old.scene_ids()[-1]):
        before, after = old.read_scene(scene_id), encoded.read_scene(scene_id)
        tokens = np.asarray(after.pop("internvit/tokens"), np.float32)
        assert before.keys() == after.keys() and any(n.startswith("teacher/") for n in after)
        for name, array in before.items():
            np.testing.assert_array_equal(array, after[name])
        expected = encode_frames(encoder, before["images"])
        np.testing.assert_allclose(tokens, expected, rtol=2**-8, atol=1e-3)  # bfloat16


def test_an_interrupted_encoding_goes_on(geode_runs, encoded, tmp_path, monkeypatch):
    run, read = geode_runs["drm"], Export.read_scene
    stop = Export(run.export).scene_ids()[5]

    def interrupted(self, scene_id, *arguments, **options):
        if scene_id == stop:
            raise KeyboardInterrupt
        return read(self, scene_id, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Export, "read_scene", interrupted)
        encode_export(run.workdir, run.export, tmp_path / "out")
    seen = []
    monkeypatch.setattr(
        Export, "read_scene", lambda s, i, *a, **o: (seen.append(i), read(s, i, *a, **o))[1]
    )
    encode_export(run.workdir, run.export, tmp_path / "out")
    assert Export(tmp_path / "out").manifest["scenes"] == encoded.manifest["scenes"]
    assert stop in seen and not {*Export(run.export).scene_ids()[:5]} & {*seen}


def test_a_stage_learns_from_them_as_from_the_frames(geode_runs, encoded, tmp_path):
    config = tiny_geode_config("joint", encoded.folder, geode_runs["drm"].workdir)
    with config.unlocked():
        config.data.vision = "internvit/tokens"
    learned = train_and_evaluate(config, tmp_path / "run")["val"]
    for name, loss in geode_runs["joint"].summary["val"].items():
        assert learned[name] == pytest.approx(loss, rel=0.02), name


def test_tokens_of_another_encoder_are_refused(geode_runs, encoder, tmp_path):
    other = materialize(lambda rngs: InternViT(encoder.config, rngs=rngs), seed=9)
    save_pretrained(other, tmp_path / "other")
    out, run = tmp_path / "out", geode_runs["drm"]
    encode_export(tmp_path / "other", run.export, out)
    config = tiny_geode_config("joint", out, run.workdir)
    with config.unlocked():
        config.data.vision = "internvit/tokens"
    with pytest.raises(UserError, match="internvit/tokens are of another vision encoder"):
        train_and_evaluate(config, tmp_path / "run")
    with config.unlocked():
        config.model.vision.width = 32
    with pytest.raises(UserError, match=r"config: model.vision: width 32, .* width 16 a view"):
        train_and_evaluate(config, tmp_path / "wide")


def test_what_cannot_be_encoded_is_refused(geode_runs, tmp_path):
    run = geode_runs["drm"]
    blind = tiny_rooms(tmp_path / "rooms")
    with pytest.raises(UserError, match="has no images to encode"):
        encode_export(run.workdir, blind, tmp_path / "out")
    config = open_trained(run.workdir).objective.internvl.decoder
    save_pretrained(materialize(lambda rngs: Decoder(config, rngs=rngs)), tmp_path / "decoder")
    with pytest.raises(UserError, match=r"--weights: .* is a Decoder, which has no InternViT"):
        encode_export(tmp_path / "decoder", run.export, tmp_path / "out2")
