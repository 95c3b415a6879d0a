"""A pickle in place of any file that a command reads is never executed (exports: exports_test)."""

import json
import pickle
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from geode_jax.cli.command import main
from geode_jax.errors import UserError
from geode_jax.weights import load_pretrained

QWEN = {
    "model_type": "qwen2",
    "vocab_size": 7,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
}


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        """What a pickle of it calls."""
        return open, (str(self.path), "w")


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "executed"


@pytest.fixture
def poison(mark):
    """A pickle that leaves a mark when it is loaded, which is tried here."""
    data = pickle.dumps(Touch(mark))
    pickle.loads(data).close()
    assert mark.exists()
    mark.unlink()
    return data


def refused(mark, capfd, *arguments) -> None:
    """The command fails in one line, and what it read was not executed."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1
    assert not mark.exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pretrained_folder(name, poison, mark, tmp_path, capfd):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN))
    (folder / name).write_bytes(poison)
    for command in (
        ("inspect", folder),
        ("import", "--source", folder, "--out", tmp_path / "out"),
        ("export", "--source", folder, "--out", tmp_path / "out"),
    ):
        refused(mark, capfd, "convert", *command)


def test_pytorchs_own_format_is_not_read(poison, mark, tmp_path, capfd):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    (tmp_path / "pytorch_model.bin").write_bytes(poison)
    refused(mark, capfd, "convert", "inspect", tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors"])
def test_an_index_names_files_of_its_own_folder(name, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "outside.safetensors")
    (folder / "config.json").write_text(json.dumps(QWEN))
    index = {"weight_map": {"x": name.replace("/outside", f"{tmp_path}/outside", name[0] == "/")}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"outside.safetensors.* is not the name of a file"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["predictions.jsonl", "rows.jsonl", "rows.parquet", "ids.txt"])
def test_predictions(name, poison, mark, tmp_path, capfd):
    row = {
        "id": 1,
        "question_type": "object_counting",
        "ground_truth": "4",
        "prediction": "4",
    }
    for file in ("predictions.jsonl", "rows.jsonl"):
        (tmp_path / file).write_text(json.dumps(row) + "\n")
    (tmp_path / name).write_bytes(poison)
    rows = name if name.startswith("rows") else "rows.jsonl"
    arguments = ["--predictions", tmp_path / "predictions.jsonl", "--dataset", tmp_path / rows]
    if name == "ids.txt":
        arguments += ["--debiased-ids", tmp_path / name]
    refused(mark, capfd, "evaluate", "vsi", *arguments)


@pytest.mark.parametrize("name", ["config.json", "tokenizer/tokenizer.json", "checkpoint"])
def test_a_run(name, tiny_run, poison, mark, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(tiny_run.workdir, run)
    files = [run / name]
    if name == "checkpoint":
        files = [path for path in (run / "checkpoints").rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(poison)
    refused(mark, capfd, "ask", "--workdir", run, "--scene", "x", "--question", "How many?")
