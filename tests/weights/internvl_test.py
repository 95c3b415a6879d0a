"""InternViT, its projector and InternVL against transformers, in both layouts of the weights."""

import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from geode_jax.errors import UserError
from geode_jax.models.vit import VitConfig
from geode_jax.weights import load_pretrained, save_pretrained
from geode_jax.weights.convert import plan
from tests.helpers.weights import close, randomize, reload, same_tensors

IMAGE, PATCH, IMAGE_ID, VOCABULARY = 28, 7, 40, 41
LAYERS = 2
VISION = dict(
    hidden_size=32,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    intermediate_size=40,
    image_size=(IMAGE, IMAGE),
    patch_size=(PATCH, PATCH),
    attention_bias=True,
    attn_implementation="eager",
)
TEXT = dict(
    model_type="qwen2",
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def case(torch, tmp_path_factory):
    """(PyTorch's InternVL, the folder that transformers saved, ours from that folder)."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        vision_config=VISION,
        text_config=TEXT,
        image_token_id=IMAGE_ID,
        image_seq_length=4,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    reference = randomize(torch, InternVLForConditionalGeneration(config))
    folder = tmp_path_factory.mktemp("transformers")
    reference.save_pretrained(folder)
    return reference, folder, load_pretrained(folder)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, IMAGE, IMAGE, 3), np.float32)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """Two rows, a picture in each at another place."""
    tokens = np.random.default_rng(1).integers(0, IMAGE_ID, (2, 9))
    tokens[0, 1:5] = tokens[1, 4:8] = IMAGE_ID
    return tokens


def test_hidden_states_vision_tokens_and_logits_are_those_of_transformers(
    torch, case, pixels, tokens
):
    reference, _, model = case

    @jax.jit
    def all_of_it(model, pixels, tokens):
        return model.vision(pixels), model.vision_tokens(pixels), model(tokens, pixels)

    hidden, seen, logits = all_of_it(model, pixels, tokens)
    picture = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        tower = reference.model.vision_tower(picture).last_hidden_state
        features = reference.model.get_image_features(picture).pooler_output
        expected = reference(torch.from_numpy(tokens), pixel_values=picture).logits
    close(hidden, tower.numpy())
    close(seen, features.numpy())
    close(logits, expected.numpy())


def test_our_export_is_transformers_own(torch, case, tmp_path, pixels, tokens):
    reference, folder, model = case
    save_pretrained(model, tmp_path)
    same_tensors(folder, tmp_path)
    again = reload(type(reference), tmp_path)
    inputs = dict(
        input_ids=torch.from_numpy(tokens),
        pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
    )
    with torch.no_grad():
        np.testing.assert_array_equal(again(**inputs).logits, reference(**inputs).logits)


def test_a_vision_tower_alone(torch, case, tmp_path):
    from transformers import InternVLVisionModel

    reference, _, model = case
    save_pretrained(model.vision, tmp_path / "vision")
    again = reload(InternVLVisionModel, tmp_path / "vision")
    for (name, ours), theirs in zip(
        again.named_parameters(), reference.model.vision_tower.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


# --- config.json ----------------------------------------------------------------------------------


def edited(folder: Path, target: Path, changes: dict) -> Path:
    """A copy of a folder whose `config.json` has other entries; dotted names are nested."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    for name, value in changes.items():
        *above, last = name.split(".")
        place = config
        for key in above:
            place = place[key]
        place[last] = value
        if value is None:
            del place[last]
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_fields_are_read_as_transformers_reads_them(torch, case, tmp_path, pixels, tokens):
    reference, folder, model = case
    forward = jax.jit(lambda model, tokens, pixels: model(tokens, pixels))
    picture = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    plain = np.asarray(forward(model, tokens, pixels))
    older = {
        "dtype": None,
        "torch_dtype": "float32",
        "text_config.rope_parameters": None,
        "text_config.rope_theta": 10_000.0,
        "text_config.rope_scaling": {"type": "default"},
        "vision_config.image_size": IMAGE,
        "vision_config.drop_path_rate": 0.3,
    }
    newer = {
        "vision_config.layer_norm_eps": 0.1,
        "text_config.rms_norm_eps": 0.2,
        "text_config.rope_parameters.rope_theta": 50.0,
    }
    for number, changes in enumerate((older, newer)):
        changed = edited(folder, tmp_path / str(number), changes)
        with torch.no_grad():
            expected = reload(type(reference), changed)(
                torch.from_numpy(tokens), pixel_values=picture
            ).logits.numpy()
        ours = np.asarray(forward(load_pretrained(changed), tokens, pixels))
        close(ours, expected)
        assert np.allclose(ours, plain, rtol=0, atol=1e-6) == (changes is older)


@pytest.mark.parametrize(
    ("own", "changes", "said"),
    [
        (False, {"vision_config.use_qk_norm": True}, "vision_config: not supported: use_qk_norm"),
        (False, {"vision_config.qkv_bias": True}, "qkv_bias, which is called attention_bias"),
        (False, {"vision_config.norm_type": "rms_norm"}, "norm_type 'rms_norm'"),
        (False, {"vision_config.gate": 1}, "vision_config: unknown: 'gate'"),
        (False, {"vision_config.image_size": [28, 14]}, "image_size [28, 14], which is not square"),
        (False, {"vision_config.image_size": [[1], [1]]}, "image_size must be a whole number"),
        (False, {"vision_config.layer_norm_eps": "x"}, "layer_norm_eps must be a number"),
        (False, {"vision_config.hidden_size": 31}, "width: 31 is no multiple of heads, 4"),
        (False, {"vision_config": [1]}, "vision_config must be an object"),
        (False, {"text_config.rope_scaling": {"type": "yarn"}}, "text_config: not supported: rope"),
        (False, {"text_config.hidden_size": None}, "'text_config.hidden_size' is missing"),
        (False, {"vision_feature_layer": [-1, -2]}, "vision_feature_layer [-1, -2]"),
        (False, {"downsample_ratio": 0.25}, "downsample_ratio 0.25"),
        (False, {"moe": True}, "unknown: 'moe'"),
        (True, {"vision_config.norm_type": None}, "not supported: norm_type 'rms_norm'"),
        (True, {"vision_config.qk_normalization": None}, "qk_normalization True"),
        (True, {"vision_config.use_moe": True}, "use_moe True"),
        (True, {"force_image_size": 56}, "force_image_size 56 beside image_size 28"),
        (True, {"ps_version": None}, "not supported: ps_version 'v1'"),
        (True, {"use_llm_lora": 16}, "use_llm_lora 16"),
        (True, {"llm_config.model_type": "internlm2"}, "llm_config: not supported: model_type"),
    ],
)
def test_a_field_that_would_make_another_model_is_refused(own, changes, said, case, tmp_path):
    _, folder, model = case
    if own:
        folder = tmp_path / "own"
        save_pretrained(model, folder, model_type="internvl_chat")
    with pytest.raises(UserError, match=re.escape(said)):
        plan(edited(folder, tmp_path / "edited", changes))


# --- InternVL's own layout ------------------------------------------------------------------------

# Names of InternVL and of transformers, as the latter's converter has them.
OWN_BLOCK = {
    "attn.proj": "attention.projection_layer",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def own_tensors(folder) -> dict[str, np.ndarray]:
    """A transformers folder's tensors by InternVL's own names."""
    source = load_file(folder / "model.safetensors")
    own = {key: x for key, x in source.items() if key.startswith("language_model.")}
    for part in ("weight", "bias"):
        for i, name in ((0, "layer_norm"), (1, "linear_1"), (3, "linear_2")):
            own[f"mlp1.{i}.{part}"] = source[f"multi_modal_projector.{name}.{part}"]
        own[f"vision_model.embeddings.patch_embedding.{part}"] = source[
            f"vision_tower.embeddings.patch_embeddings.projection.{part}"
        ]
    own["vision_model.embeddings.class_embedding"] = source["vision_tower.embeddings.cls_token"]
    own["vision_model.embeddings.position_embedding"] = source[
        "vision_tower.embeddings.position_embeddings"
    ]
    for i in range(LAYERS):
        ours, theirs = f"vision_model.encoder.layers.{i}", f"vision_tower.encoder.layer.{i}"
        for part in ("weight", "bias"):
            qkv = [source[f"{theirs}.attention.{name}_proj.{part}"] for name in "qkv"]
            own[f"{ours}.attn.qkv.{part}"] = np.concatenate(qkv)
            for name, called in OWN_BLOCK.items():
                own[f"{ours}.{name}.{part}"] = source[f"{theirs}.{called}.{part}"]
        for name, called in (("ls1", "lambda_1"), ("ls2", "lambda_2")):
            own[f"{ours}.{name}"] = source[f"{theirs}.{called}"]
    return own


def test_internvls_own_layout_holds_the_same_model(case, tmp_path):
    _, folder, model = case
    save_pretrained(model, tmp_path / "own", model_type="internvl_chat")
    written, expected = load_file(tmp_path / "own" / "model.safetensors"), own_tensors(folder)
    assert written.keys() == expected.keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)
    again = load_pretrained(tmp_path / "own")
    save_pretrained(again, tmp_path / "back")
    same_tensors(folder, tmp_path / "back")
    assert again.config == model.config


# --- The real ones --------------------------------------------------------------------------------

INTERNVIT_CONFIG = dict(
    architectures=["InternVisionModel"],
    attention_dropout=0.0,
    drop_path_rate=0.1,
    hidden_act="gelu",
    hidden_size=1024,
    image_size=448,
    intermediate_size=4096,
    layer_norm_eps=1e-06,
    model_type="intern_vit_6b",
    norm_type="layer_norm",
    num_attention_heads=16,
    num_channels=3,
    num_hidden_layers=24,
    patch_size=14,
    qk_normalization=False,
    qkv_bias=True,
    torch_dtype="bfloat16",
    use_flash_attn=True,
)


def test_internvit_300m_and_its_projector_have_their_parameters(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(INTERNVIT_CONFIG))
    made = plan(tmp_path)
    sizes = dict(image_size=448, patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096)
    assert made.config == VitConfig(**sizes, dtype="bfloat16")
    assert sum(map(math.prod, made.shapes.values())) == 304_012_288

    text = TEXT | dict(hidden_size=1536, rms_norm_eps=1e-6)
    parts = dict(vision_config=INTERNVIT_CONFIG, llm_config=text)
    whole = dict(model_type="internvl_chat", ps_version="v2", **parts)
    (tmp_path / "config.json").write_text(json.dumps(whole))
    shapes = plan(tmp_path).shapes
    mlp1 = [math.prod(shape) for leaf, shape in shapes.items() if re.match(r"projector\.", leaf)]
    assert sum(mlp1) == 8_662_016
