"""Measures the pipeline's reading speed against a PyTorch DataLoader on the same files.

    python -m benchmarks.loader [--scenes 12] [--workers 1 2] [--rounds 5]

The script makes an export with the sizes of VGGT's of ScanNet: 8 frames of 37 x 37 tokens of width
2,048 in bfloat16, with depth and cameras, 45 MB a scene. A sample is a scene. The DataLoader reads
the same tensors with safetensors and stacks them. It does not pad, mask or check anything and has
no questions, which is the least that a PyTorch project would do. Rounds of the two alternate; after
the first round, files come from the page cache. Each round starts its own workers (threads here,
processes of the DataLoader) and is timed from its second batch on. Our first round is reported on
its own: it alone checks the sha256 of every file and the values of every tensor.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset

from benchmarks import ledger
from geode_jax.data.pipeline import Pipeline
from geode_jax.data.settings import PipelineConfig
from geode_jax.data.tokens import train_tokenizer
from geode_jax.exports import Export, ExportWriter

VIEWS, GRID, WIDTH, SIDE = 8, (37, 37), 2048, 74
QUESTIONS, SCENES_PER_BATCH = 16, 2
TENSORS = ("vggt/tokens", "vggt/depth", "camera/extrinsic", "camera/intrinsic")


def make_export(folder: Path, scenes: int) -> Export:
    """Writes an export of random arrays with the sizes of VGGT's."""
    import ml_dtypes

    random = np.random.default_rng(0)
    producer = dict.fromkeys(("project", "commit", "weights", "licence"), "benchmark")
    header = {
        "producer": producer,
        "dtype": "bfloat16",
        "scale": "metric",
        "token_width": WIDTH,
        "patch_grid": list(GRID),
        "tokens_contain_depth": False,
        "categories": ["chair"],
    }
    with ExportWriter(folder, **header) as writer:
        for i in range(scenes):
            tokens = random.standard_normal((VIEWS, GRID[0] * GRID[1], WIDTH), np.float32)
            arrays = {
                "vggt/tokens": tokens.astype(ml_dtypes.bfloat16),
                "vggt/depth": random.uniform(1, 4, (VIEWS, SIDE, SIDE)).astype(np.float32),
                "camera/extrinsic": np.tile(np.eye(3, 4, dtype=np.float32), (VIEWS, 1, 1)),
                "camera/intrinsic": np.tile(
                    np.array([[60, 0, 37], [0, 60, 37], [0, 0, 1]], np.float32), (VIEWS, 1, 1)
                ),
            }
            writer.add_scene(f"scene{i:04d}_00", arrays, split="train")
            writer.add_questions(
                {
                    "id": f"{i}-{q}",
                    "scene_id": f"scene{i:04d}_00",
                    "kind": "object_counting",
                    "question": "How many chair(s) are in this room?",
                    "answer": str(1 + q % 4),
                }
                for q in range(QUESTIONS)
            )
    return Export(folder)


class Scenes(Dataset):
    """The scenes of an export as a PyTorch data set."""

    def __init__(self, export: Export):
        self.paths = [export.folder / "scenes" / f"{i}.safetensors" for i in export.scene_ids()]

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self.paths)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """Returns the tensors of a scene."""
        with safe_open(self.paths[i], framework="pt") as file:
            return {name: file.get_tensor(name) for name in TENSORS}


def torch_batches(export: Export, workers: int, steps: int) -> Iterator:
    """Yields batches of a DataLoader in random order."""
    loader = DataLoader(
        Scenes(export), SCENES_PER_BATCH, shuffle=True, num_workers=workers, drop_last=True
    )
    while steps > 0:
        for batch in loader:
            if steps > 0:
                yield batch
            steps -= 1


def our_batches(pipeline: Pipeline, steps: int) -> Iterator:
    """Yields batches of the pipeline."""
    for _, batch in pipeline.iterate(0, steps):
        yield batch


def scenes_per_second(batches: Iterator) -> float:
    """Returns the rate from the second batch on."""
    next(batches)
    started, seen = time.perf_counter(), 0
    for _ in batches:
        seen += SCENES_PER_BATCH
    return seen / (time.perf_counter() - started)


def main() -> None:
    """Measures, prints a table and writes `loader.json`."""
    parser = ledger.parser(__doc__, rounds=5)
    parser.add_argument("--scenes", type=int, default=12)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as folder:
        export = make_export(Path(folder), arguments.scenes)
        texts = [record["question"] for record in export.questions()]
        tokenizer = train_tokenizer(texts, export.categories, min_count=2)
        for workers in arguments.workers:
            config = PipelineConfig(
                str(export.folder), SCENES_PER_BATCH, QUESTIONS, 64, 8, 4, 4, 256, workers=workers
            )
            pipeline = Pipeline(Export(export.folder), tokenizer, config, "train")
            steps, found = arguments.scenes // SCENES_PER_BATCH, {"ours": [], "theirs": []}
            for _ in range(1 + arguments.rounds):
                found["ours"].append(scenes_per_second(our_batches(pipeline, steps)))
                found["theirs"].append(scenes_per_second(torch_batches(export, workers, steps)))
            ours, theirs = ([*rates] for rates in found.values())
            checked, unchecked = ours.pop(0), theirs.pop(0)
            rows.append(
                ledger.row(
                    f"loader, {workers} workers",
                    ours,
                    theirs,
                    unit="scenes/s",
                    dtype="bfloat16",
                    shape=[VIEWS, GRID[0] * GRID[1], WIDTH],
                    more_is_better=True,
                )
            )
            notes.append(
                f"with {workers} workers the first round, in which ours checks every byte, was "
                f"{checked:.2f} against {unchecked:.2f} scenes/s"
            )
            print(ledger.table(rows)[-1], flush=True)
    ledger.write("loader", rows, notes)


if __name__ == "__main__":
    main()
