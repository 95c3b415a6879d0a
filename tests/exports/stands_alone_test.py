"""The package `exports` works in other environments, without the rest of the project."""

import ast
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import pytest

from geode_jax import exports
from geode_jax.exports import Export

ALONE = """
import importlib.util, sys, warnings
warnings.simplefilter("error")
spec = importlib.util.spec_from_file_location(
    "exports", sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]]
)
exports = importlib.util.module_from_spec(spec)
sys.modules["exports"] = exports
spec.loader.exec_module(exports)
import numpy as np
sys.modules["ml_dtypes"] = sys.modules["tqdm"] = None
producer = dict(project="p", commit="c", weights="w", licence="l")
with exports.ExportWriter(sys.argv[2], producer=producer, dtype="bfloat16", scale="scene",
        token_width=2, patch_grid=(1, 1), tokens_contain_depth=False, categories=[]) as writer:
    writer.add_scene("a", {"vggt/tokens": np.ones((1, 1, 2), np.float32)}, split="test")
summary = exports.validate(sys.argv[2], progress=True)
assert summary["tensors"][0]["dtype"] == "float32", summary
loaded = {"jax", "torch", "tensorflow", "geode_jax", "flax"} & set(sys.modules)
assert not loaded, loaded
"""


FOLDER = Path(exports.__file__).parent


def test_the_package_stands_alone(tmp_path):
    """The package is loaded by path in an isolated interpreter, as by an exporter elsewhere."""
    command = [sys.executable, "-I", "-c", ALONE, str(FOLDER), str(tmp_path / "e")]
    subprocess.run(command, check=True, timeout=120)
    tokens = Export(tmp_path / "e").read_scene("a")["vggt/tokens"]
    assert tokens.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_the_package_is_python_3_9_and_imports_little(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    top = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [node.names[0].name])
    }
    known = {"numpy", "safetensors", "ml_dtypes", "tqdm"}
    # The package does not import these two.
    known |= {"pictures.py": {"PIL"}, "videos.py": {"av"}}.get(path.name, set())
    assert top - sys.stdlib_module_names <= known
