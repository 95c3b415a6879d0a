"""Stores InternViT's hidden states of all frames of an export, for stages that freeze InternViT.

The array `internvit/tokens` has them in bfloat16, the class token first.
"""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from geode_jax.errors import UserError
from geode_jax.exports import Export, ExportWriter
from geode_jax.models.geode import Geode, encode_frames
from geode_jax.models.internvl import InternVL
from geode_jax.models.vit import InternViT
from geode_jax.runs.start import is_pretrained
from geode_jax.runs.trained import open_trained
from geode_jax.runtime.bars import progress_bar
from geode_jax.weights.convert import load_pretrained

TOKENS = "internvit/tokens"
_FRAMES_PER_BATCH = 8
"""Number of frames that are encoded at a time."""


def open_encoder(source: Path) -> InternViT:
    """Returns the vision encoder of a GEODE run, or of a pretrained InternViT or InternVL.

    Raises:
        UserError: the model has no InternViT.
    """
    if is_pretrained(source):
        model = load_pretrained(source)
    else:
        trained = open_trained(source)
        model = nnx.merge(trained.graph, trained.state.params, trained.state.frozen)
    if isinstance(model, InternViT):
        return model
    if isinstance(model, Geode):
        return model.vlm.vision
    if isinstance(model, InternVL):
        return model.vision
    raise UserError(f"--weights: {source} is a {type(model).__name__}, which has no InternViT")


def encode_export(source: Path, export: Path, out: Path) -> None:
    """Copies an export and adds the hidden states of all its frames.

    Repeating an interrupted call continues with the next scene.

    Args:
        source: see `open_encoder`.
        export: folder with `images`.
        out: the new export.

    Raises:
        UserError: `source` has no encoder, or a scene no images.
        ExportError: the export is damaged, or `out` cannot be written.
    """
    old = Export(export)
    encoder = open_encoder(source)
    graph, state = nnx.split(encoder)
    encode = jax.jit(lambda state, frames: encode_frames(nnx.merge(graph, state), frames))
    header = old.header()
    header["producer"] = {**header["producer"], "internvit": str(source)}
    with ExportWriter(out, **header, resume=True) as writer:
        finished = writer.finished()
        for entry in progress_bar(old.manifest["scenes"], desc="scenes", unit="scene"):
            scene_id, split = entry["id"], entry["split"]
            if scene_id in finished:
                writer.register(finished[scene_id])
                continue
            stored = old.read_scene(scene_id)
            if "images" not in stored:
                raise UserError(f"{export}: scene {scene_id} has no images to encode")
            frames = stored["images"]
            # The last batch is padded to the full size: the encoder is compiled once.
            padding = np.repeat(frames[-1:], -len(frames) % _FRAMES_PER_BATCH, axis=0)
            padded = np.concatenate([frames, padding])
            batches = padded.reshape(-1, _FRAMES_PER_BATCH, *frames.shape[1:])
            made = [encode(state, batch) for batch in batches]
            tokens = np.concatenate([np.asarray(x) for x in made])[: len(frames)]
            teacher = {n[8:]: array for n, array in stored.items() if n.startswith("teacher/")}
            arrays = {n: array for n, array in stored.items() if not n.startswith("teacher/")}
            arrays[TOKENS] = tokens.astype("bfloat16")
            alignment = entry.get("alignment")
            writer.add_scene(scene_id, arrays, split=split, teacher=teacher, alignment=alignment)
        writer.add_questions(old.questions())
