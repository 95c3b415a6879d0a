"""The exporters, loaded by path as their users do, and stand-ins for the projects they run in."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from geode_jax.exports import ExportWriter

HERE = Path(__file__).resolve().parent
THIRD_PARTY = HERE.parent.parent / "third_party"
SCRIPTS = ("vggt/export_vggt.py", "sonata/export_sonata.py", "llava3d/export_llava3d.py")


@pytest.fixture(scope="session")
def upstream():
    """`vggt`, `sonata` and `llava` are the small random-weight ones of `fakes`."""
    pytest.importorskip("torch")
    before = list(sys.path)
    sys.path[:0] = [str(HERE / "fakes"), str(THIRD_PARTY)]
    yield
    sys.path[:] = before


@pytest.fixture(scope="session")
def load(upstream):
    """The module of an exporter, by its path below third_party."""

    def load(script: str):
        path = THIRD_PARTY / script
        if path.stem not in sys.modules:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            sys.modules[path.stem] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[path.stem])
        return sys.modules[path.stem]

    return load


GRID = (2, 2)
QUESTIONS = ("chair near", "chair near the chair", "near", "no near the near")


@pytest.fixture
def write_base():
    """Writes an export of two scenes with views in it: metric with boxes, or without scale."""

    def write(
        folder: Path,
        scale="metric",
        images=True,
        boxes=None,
        questions=4,
        views=3,
        kind="proximity",
        **header,
    ) -> Path:
        random = np.random.default_rng(0)
        boxes = scale == "metric" if boxes is None else boxes
        about = {"project": "p", "commit": "c", "weights": "w", "licence": "l"}
        header = {"dtype": "bfloat16", "categories": ["chair"], "notes": "base.", **header}
        options = {"token_width": 4, "patch_grid": GRID, "tokens_contain_depth": False}
        with ExportWriter(folder, producer=about, scale=scale, **options, **header) as writer:
            for scene, split in (("a", "train"), ("b", "val")):
                arrays = scene_arrays(random, views=views, side=12)
                if images:
                    arrays["images"] = random.integers(0, 256, (views, 24, 24, 3)).astype(np.uint8)
                if boxes:
                    arrays["target/boxes"] = random.uniform(0.5, 2, (1, 7)).astype(np.float32)
                    arrays["target/labels"] = np.zeros(1, np.int32)
                writer.add_scene(scene, arrays, split=split)
                for i in range(questions):
                    record = {"id": f"{scene}{i}", "scene_id": scene, "kind": kind}
                    record.update(question=f"Is the {QUESTIONS[i]} ?", answer="yes")
                    if boxes:
                        record["box"] = [0, 0, 0, 1, 1, 1, 0]
                    writer.add_questions([record])
        return folder

    return write


def scene_arrays(random: np.random.Generator, views: int, side: int) -> dict[str, np.ndarray]:
    """Smooth depths seen by cameras that look about: an export's tensors."""
    v, u = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    slopes = random.uniform(0.01, 0.03, (views, 2, 1, 1))
    depth = (2 + slopes[:, 0] * u + slopes[:, 1] * v).astype(np.float32)
    depth[:, 0, 0] = 0
    rotation = Rotation.from_euler("xyz", random.normal(scale=0.2, size=(views, 3))).as_matrix()
    shift = random.normal(scale=0.3, size=(views, 3, 1))
    focal = np.array([[side, 0, side / 2], [0, side, side / 2], [0, 0, 1]], np.float32)
    return {
        "vggt/tokens": random.normal(size=(views, 4, 4)).astype(np.float32),
        "vggt/depth": depth,
        "vggt/depth_conf": random.uniform(1, 2, depth.shape).astype(np.float32),
        "target/depth": depth,
        "camera/extrinsic": np.concatenate([rotation, shift], -1).astype(np.float32),
        "camera/intrinsic": np.tile(focal, (views, 1, 1)),
    }
