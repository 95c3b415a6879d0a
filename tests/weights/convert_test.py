"""Folders without PyTorch: round trips, shards, devices, refusals, and the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from geode_jax.cli.command import main
from geode_jax.errors import UserError
from geode_jax.models.decoder import Decoder, DecoderConfig
from geode_jax.models.internvl import InternVL, InternVLConfig
from geode_jax.models.vit import VitConfig
from geode_jax.weights import load_pretrained, save_pretrained
from tests.helpers.tiny_models import STUDENT, materialize
from tests.helpers.weights import change_config, same_tensors

REPOSITORY = Path(__file__).resolve().parents[2]
QWEN = DecoderConfig(
    vocab_size=20,
    width=8,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=4,
    mlp_width=12,
    mlp="swiglu",
    norm="rms",
    linear_bias=False,
    rope_theta=1e6,
    norm_eps=1e-6,
    dtype="bfloat16",
)
VIT = VitConfig(
    image_size=8, patch_size=2, width=8, layers=2, heads=2, mlp_width=12, dtype="bfloat16"
)


def in_bfloat16(model: nnx.Module) -> nnx.Module:
    graph, state = nnx.split(model)
    return nnx.merge(
        graph, nnx.map_state(lambda _, v: v.replace(v[...].astype(jnp.bfloat16)), state)
    )


@pytest.fixture(scope="module")
def qwen() -> Decoder:
    return in_bfloat16(materialize(lambda rngs: Decoder(QWEN, rngs=rngs)))


@pytest.fixture(scope="module")
def internvl() -> InternVL:
    return in_bfloat16(materialize(lambda rngs: InternVL(InternVLConfig(VIT, QWEN), rngs=rngs)))


@pytest.fixture
def folder(qwen, tmp_path) -> Path:
    """A bf16 Qwen2 in one file."""
    save_pretrained(qwen, tmp_path / "qwen")
    return tmp_path / "qwen"


def in_shards(folder: Path) -> None:
    """Splits a folder's file in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(tensors)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, part in zip(names, (keys[::2], keys[1::2]), strict=True):
        save_file({key: tensors[key] for key in part}, folder / name)
    where = {key: names[i % 2] for i, key in enumerate(keys)}
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# --- Round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "model_type"),
    [
        ("decoder", "qwen2"),
        ("vision", "internvl_vision"),
        ("vision", "intern_vit_6b"),
        ("whole", "internvl"),
        ("whole", "internvl_chat"),
    ],
)
def test_every_layout_comes_back_bit_by_bit(internvl, tmp_path, part, model_type):
    model = internvl if part == "whole" else getattr(internvl, part)
    save_pretrained(model, tmp_path / "a", model_type=model_type)
    again = load_pretrained(tmp_path / "a")
    assert again.config == model.config
    mine, theirs = (nnx.to_flat_state(nnx.state(m)) for m in (model, again))
    for (path, a), (other, b) in zip(mine, theirs, strict=True):
        assert path == other and a.get_metadata() == b.get_metadata()
        assert a.dtype == b.dtype == jnp.bfloat16
        assert np.asarray(a[...]).tobytes() == np.asarray(b[...]).tobytes()
    save_pretrained(again, tmp_path / "b", model_type=model_type)
    same_tensors(tmp_path / "a", tmp_path / "b")
    configs = [(tmp_path / name / "config.json").read_text() for name in "ab"]
    assert configs[0] == configs[1] and json.loads(configs[0])["dtype"] == "bfloat16"


def test_every_tensor_keeps_its_dtype_and_several_files_are_one(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in tensors.items():
        if "norm" in key:
            tensors[key] = tensor.astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    model = load_pretrained(folder)
    assert model.norm.scale.dtype == np.float32
    assert model.head.kernel.dtype == ml_dtypes.bfloat16
    before = os.umask(0o027)
    save_pretrained(model, tmp_path / "one")
    os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "one").iterdir()} == {0o640}
    same_tensors(folder, tmp_path / "one")
    in_shards(folder)
    save_pretrained(load_pretrained(folder), tmp_path / "two")
    same_tensors(tmp_path / "one", tmp_path / "two")


def test_the_file_decides_whether_the_head_is_tied(folder, tmp_path):
    change_config(folder, tie_word_embeddings=True)
    model = load_pretrained(folder)
    assert not model.config.tied_head and model.head is not None
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    # What old checkpoints hold besides.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(tensors, folder / "model.safetensors")
    tied = load_pretrained(folder)
    assert tied.config.tied_head and tied.head is None
    save_pretrained(tied, tmp_path / "tied")
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"]


def test_devices_get_their_own_parts(folder, tmp_path):
    """Four devices, in a process of its own; what it writes is what it read."""
    script = """
import sys
import numpy as np
from geode_jax.sharding import make_mesh
from geode_jax.weights import load_pretrained, save_pretrained

model = load_pretrained(sys.argv[1], mesh=make_mesh((1, 2, 2)))
for variable, spec, share in (
    (model.embedding, ("model", "fsdp"), 4),
    (model.stages[0].blocks.attention.q.kernel, (None, "fsdp", "model", None), 4),
    (model.stages[0].blocks.mlp.down.kernel, (None, "model", "fsdp"), 4),
    (model.stages[0].blocks.attention.k.bias, (None, "model", None), 2),
):
    array = variable[...]
    assert tuple(array.sharding.spec) == spec, array.sharding
    assert len(array.addressable_shards) == 4
    assert all(s.data.size == array.size // share for s in array.addressable_shards)
save_pretrained(model, sys.argv[2])
"""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", script, folder, tmp_path / "out"],
        cwd=REPOSITORY,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        check=True,
        timeout=600,
    )
    same_tensors(folder, tmp_path / "out")


# --- Refusals -------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_a_shard(folder: Path) -> None:
    in_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def link(folder: Path, target: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(target)


def long_name(folder: Path) -> None:
    save_file({"a." * 100_000: np.ones(2, np.float32)}, folder / "model.safetensors")


def long_header(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + data[8:])


def lie_in_the_index(folder: Path) -> None:
    in_shards(folder)
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"lm_head.weight"', '"lm_head.wait"'))


def store_integers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(QWEN.width, np.int32)
    save_file(tensors, folder / "model.safetensors")


def not_finite(folder: Path, number: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    tensors[key][1, 2] = number
    save_file(tensors, folder / "model.safetensors")


def mix_dtypes(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    tensors[key] = tensors[key].astype(np.float32)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "model.safetensors: damaged or cut off"),
        (lose_a_shard, "model-00002-of-00002.safetensors: missing"),
        (lie_in_the_index, "2 names differ from the files: lm_head.wait"),
        (store_integers, "model.norm.weight is I32; only F32, F16, BF16 are read"),
        (mix_dtypes, "mlp.up_proj.weight: has several dtypes, bfloat16, float32"),
        (lambda f: not_finite(f, np.nan), "mlp.up_proj.weight has NaN or infinite numbers"),
        (lambda f: not_finite(f, -np.inf), "mlp.up_proj.weight has NaN or infinite numbers"),
        (
            lambda f: (f / "adapter_config.json").write_text("{}"),
            "has an adapter, adapter_config.json: merge it first",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (pipe, "model.safetensors: cannot be read: not a regular file"),
        (lambda f: link(f, "/dev/zero"), "cannot be read: not a regular file"),
        (long_name, "model.safetensors: a name of 200,000 characters, at most 500"),
        (long_header, "damaged: a header of 1,099,511,627,776 bytes, at most 33,554,432"),
        (lambda f: (f / "config.json").unlink(), "config.json: cannot be read: No such file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON: "),
        (
            lambda f: (f / "config.json").write_text("[]"),
            "config.json: must be a JSON object, is a list",
        ),
        (lambda f: change_config(f, model_type="mamba"), "model_type 'mamba' is none of qwen2,"),
        (lambda f: change_config(f, hidden_size=None), "'hidden_size' is missing"),
        (
            lambda f: change_config(f, num_key_value_heads=3),
            "num_key_value_heads 3 does not divide num_attention_heads 4",
        ),
        (
            lambda f: change_config(f, num_key_value_heads=None),
            "num_key_value_heads 32 (the default of transformers) does not divide num_atten",
        ),
        (lambda f: change_config(f, hidden_act="gelu"), "not supported: hidden_act 'gelu'"),
        (
            lambda f: change_config(f, rope_scaling={"type": "yarn"}),
            "not supported: rope_type 'yarn'",
        ),
        (
            lambda f: change_config(f, hidden_size=12, head_dim=4, intermediate_size=16),
            "model.embed_tokens.weight: 20x8 is not the model's 20x12; ",
        ),
        (
            lambda f: change_config(f, num_hidden_layers=3),
            "model.layers.2.input_layernorm.weight: missing; ",
        ),
        (
            lambda f: change_config(f, num_hidden_layers=1),
            "model.layers.1.input_layernorm.weight: unknown; ",
        ),
    ],
)
def test_a_folder_that_is_no_model_is_refused_in_one_line(folder, damage, said):
    damage(folder)
    with pytest.raises(UserError) as error:
        load_pretrained(folder)
    text = str(error.value)
    assert said in text and str(folder) in text
    assert "\n" not in text and len(text) < 600


def test_all_problems_are_counted(folder):
    change_config(folder, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"; and 9 more \(geode-jax convert inspect"):
        load_pretrained(folder)


def test_what_cannot_be_written_is_refused(qwen, folder, tmp_path):
    with pytest.raises(UserError, match="not empty"):
        save_pretrained(qwen, folder)
    with pytest.raises(UserError, match="this Decoder can be qwen2"):
        save_pretrained(qwen, tmp_path / "new", model_type="llama")
    student = materialize(lambda rngs: Decoder(STUDENT.decoder, rngs=rngs))
    with pytest.raises(UserError, match="neither Qwen2 nor Llama"):
        save_pretrained(student, tmp_path / "new")
    with pytest.raises(UserError, match="Projector: no Hugging Face model has this form"):
        save_pretrained(
            materialize(lambda rngs: InternVL(InternVLConfig(VIT, QWEN), rngs=rngs)).projector,
            tmp_path / "new",
        )
    assert not (tmp_path / "new").exists()


# --- The command ----------------------------------------------------------------------------------


def run(*arguments) -> None:
    main(["convert", *map(str, arguments)])


def test_imported_and_exported_it_is_what_it_was(internvl, tmp_path, capsys):
    source, middle, out = (tmp_path / name for name in ("source", "middle", "out"))
    save_pretrained(internvl, source, model_type="internvl_chat")
    change_config(source, template="internvl2_5")  # what our config knows nothing of stays
    (source / "tokenizer.json").write_text("{}")
    (source / "modeling.py").write_text("")
    run("import", "--source", source, "--out", middle)
    assert not list(middle.glob("*.safetensors"))
    run("export", "--source", middle, "--out", out)
    same_tensors(source, out)
    assert json.loads((source / "config.json").read_text()) == json.loads(
        (out / "config.json").read_text()
    )
    names = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in out.iterdir()} == names
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[1].startswith(f"{out}: InternVL, ")

    # From one layout to the other, without a checkpoint between.
    run("export", "--source", source, "--out", tmp_path / "theirs", "--model-type", "internvl")
    save_pretrained(internvl, tmp_path / "expected")
    same_tensors(tmp_path / "theirs", tmp_path / "expected")
    assert "template" not in json.loads((tmp_path / "theirs" / "config.json").read_text())


def test_links_are_followed_within_a_folder_and_a_hub_cache_alone(folder, tmp_path, capsys):
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, path in enumerate([folder / "config.json", folder / "model.safetensors"]):
        path.rename(cache / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    (cache / "blobs" / "2").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/2")
    (snapshot / "same.txt").symlink_to("tokenizer.json")
    run("import", "--source", snapshot, "--out", tmp_path / "out")
    copies = [tmp_path / "out" / name for name in ("tokenizer.json", "same.txt")]
    assert all(copy.read_text() == "{}" and not copy.is_symlink() for copy in copies)

    secret = tmp_path / "secret"
    secret.write_text("secret")
    for number, target in enumerate([secret, "/dev/zero", "../../../secret", "/proc/self/mem"]):
        (snapshot / "vocab.txt").symlink_to(target)
        with pytest.raises(SystemExit):
            run("import", "--source", snapshot, "--out", tmp_path / f"no{number}")
        assert "vocab.txt: a link to " in capsys.readouterr().err
        assert not (tmp_path / f"no{number}").exists()
        (snapshot / "vocab.txt").unlink()


def test_a_damaged_checkpoint_is_refused_in_one_line(folder, tmp_path, capsys):
    run("import", "--source", folder, "--out", tmp_path / "middle")
    (tmp_path / "middle" / "parameters" / "state" / "_METADATA").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run("export", "--source", tmp_path / "middle", "--out", tmp_path / "out")
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(said) == 1
    assert "parameters: damaged, or a checkpoint of another model" in said[0]


def test_inspect_prints_no_control_characters(folder, capsys):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"a\x1b[2J\nb": np.ones(2, np.float32)}, folder / "model.safetensors")
    with pytest.raises(SystemExit):
        run("inspect", folder)
    assert capsys.readouterr().out.splitlines()[-1] == "a\\x1b[2J b: unknown"


def test_inspect_lists_parameters_and_all_that_is_wrong(folder, capsys):
    run("inspect", folder)
    table = capsys.readouterr().out.splitlines()
    assert " ".join(table[0].split()) == "embedding 20 x 8 bfloat16 model.embed_tokens.weight"
    assert table[-1] == "qwen2: 1,768 parameters, 27 tensors"
    change_config(folder, num_hidden_layers=3)
    with pytest.raises(SystemExit) as end:
        run("inspect", folder)
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert out.count(": missing\n") == 12
    assert err == f"error: {folder}: 12 problems, listed above\n"
