"""Helpers for tiny PyTorch models: weights that all have an effect, and comparisons."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from geode_jax.weights.files import CONFIG, WEIGHTS


def randomize(torch, model):
    """Sets weights so large that attention is far from uniform and every bias and norm counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(value + ("norm" in name and name.endswith("weight")))
    return model.eval()


def reload(kind, folder: Path):
    """Loads a folder with transformers; no tensor may be missing or unexpected."""
    model, info = kind.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


def close(actual, expected, share: float = 2e-5) -> None:
    """Asserts that the largest difference is within a share of the largest expected number."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    difference = np.abs(actual - expected).max() / np.abs(expected).max()
    print(f"largest difference: {difference:.1e} of the largest number")
    assert difference <= share


def same_tensors(folder: Path, other: Path) -> None:
    """Asserts that two single-file folders hold the same names, dtypes and bits."""
    a, b = (load_file(f / WEIGHTS) for f in (folder, other))
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key].dtype, a[key].shape) == (b[key].dtype, b[key].shape), key
        assert a[key].tobytes() == b[key].tobytes(), key


def change_config(folder: Path, **changes) -> None:
    """Sets entries of a folder's `config.json`; None removes one."""
    config = json.loads((folder / CONFIG).read_text()) | changes
    text = json.dumps({key: value for key, value in config.items() if value is not None})
    (folder / CONFIG).write_text(text)
