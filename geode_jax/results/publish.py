"""Exports a trained run as a Hugging Face folder that runs without JAX."""

from pathlib import Path

import ml_collections
from flax import nnx

from geode_jax.errors import UserError
from geode_jax.exports.files import read_json_object, write_json
from geode_jax.results.card import write_card
from geode_jax.runs.config import load_config
from geode_jax.runs.start import pretrained_folders
from geode_jax.runs.summary import read_summary
from geode_jax.runs.trained import Trained, open_trained
from geode_jax.weights.convert import write_model
from geode_jax.weights.files import CONFIG, SHARD_BYTES

PARTS = ("decoder",)
"""Parts of a GEODE that can be exported alone."""


def export_run(
    workdir: Path, out: Path, part: str | None = None, *, shard_bytes: int = SHARD_BYTES
) -> nnx.Module:
    """Writes the model of a run's best checkpoint as a Hugging Face folder; returns it.

    Args:
        workdir: of the run.
        out: a new folder: weights, configurations, tokenizer, modelling files, model card.
        part: "decoder": GEODE's Qwen2 alone; None: the whole student or GEODE.
        shard_bytes: see `files.write_folder`.

    Raises:
        UserError, ExportError: `workdir` is no run or has no checkpoint, its export is missing, its
            system has no such part or no modelling file, or `out` is not empty.
    """
    config = load_config(workdir)
    system = config.system
    if part and system == "hidden_cot":
        raise UserError("--part: the student's decoder attends to its scene; export the whole")
    if system == "geode_pretrain" and not part:
        raise UserError(
            f"{workdir}: geode_pretrain reads true boxes instead of a room; export a later stage, "
            "or --part decoder"
        )
    if system == "hidden_cot" and not config.loss.vision:
        raise UserError(f"{workdir}: a blind baseline sees no scene; there is nothing to export")
    trained = open_trained(workdir)
    model = nnx.merge(trained.graph, trained.state.params, trained.state.frozen)
    if system == "hidden_cot":
        model = model.student
    elif part == "decoder":
        model = model.vlm.decoder
    write_model(
        model,
        out,
        like=_entries(trained, whole=not part),
        add=lambda folder: _add(trained, workdir, folder, part),
        shard_bytes=shard_bytes,
    )
    return model


def _entries(trained: Trained, *, whole: bool) -> dict:
    """Returns the entries of `config.json` besides the sizes of the model."""
    tokenizer, settings = trained.tokenizer, trained.pipeline.config
    entries = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in _SPECIAL}
    if not whole:
        return entries
    entries["answer_length"] = settings.answer_length
    if trained.config.system == "hidden_cot":
        return entries | {"vision": settings.vision}
    reg, box = settings.controls or (None, None)
    parts = list(trained.objective.parts())
    return entries | {"prefix": parts, "reg_token_id": reg, "box_token_id": box}


_SPECIAL = ("bos", "eos", "pad")


def _add(trained: Trained, workdir: Path, folder: Path, part: str | None) -> None:
    trained.tokenizer.save(folder)
    ids = {f"{name}_token_id": getattr(trained.tokenizer, f"{name}_id") for name in _SPECIAL}
    generation = ids | {
        "do_sample": False,
        "max_new_tokens": trained.pipeline.config.answer_length,
    }
    write_json(folder / "generation_config.json", generation, indent=2)
    write_card(
        folder / "README.md",
        name=workdir.resolve().name,
        system=trained.config.system + (f" ({part})" if part else ""),
        auto_class="AutoModelForCausalLM" if part else "AutoModel",
        manifest=trained.export.manifest,
        origins=_origins(trained.config),
        summary=read_summary(workdir),
        step=int(trained.state.step),
    )


def _origins(config: ml_collections.ConfigDict) -> list[str]:
    """Returns the names of the pretrained models that this run or its predecessors started from."""
    start = config.get("init_from", "")
    if not start:
        return []
    try:
        folders = pretrained_folders(start)
        if not folders:
            return _origins(load_config(Path(start)))
    except UserError:  # the folder is gone, so the name of its model is unknown
        return [f"{start} (not here)"]
    return [
        read_json_object(folder / CONFIG).get("_name_or_path") or folder.name for folder in folders
    ]
