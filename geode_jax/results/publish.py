"""Exports a trained run as a Hugging Face folder that runs without JAX."""

from pathlib import Path
from typing import Any

from flax import nnx

from geode_jax.data.question_records import open_question_records
from geode_jax.errors import UserError
from geode_jax.exports.files import read_json_object, write_json
from geode_jax.results.card import write_card
from geode_jax.results.systems import results_of
from geode_jax.runs.config import load_settings
from geode_jax.runs.settings import Settings
from geode_jax.runs.start import pretrained_folders
from geode_jax.runs.summary import read_summary
from geode_jax.runs.trained import Trained, open_trained
from geode_jax.weights.convert import write_model
from geode_jax.weights.files import CONFIG, SHARD_BYTES


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
    settings = load_settings(workdir)
    results = results_of(settings)
    results.refuse(settings, workdir, part)
    trained = open_trained(workdir)
    whole = nnx.merge(trained.graph, trained.state.params, trained.state.frozen)
    model = results.published(whole, part)
    write_model(
        model,
        out,
        like=_entries(trained, None if part else results.entries(trained)),
        add=lambda folder: _add(trained, workdir, folder, part),
        shard_bytes=shard_bytes,
    )
    return model


def _entries(trained: Trained, own: dict[str, Any] | None) -> dict[str, Any]:
    """Returns what `config.json` has of a run beside the model's sizes.

    Args:
        trained: the run.
        own: its system's entries; None for a part.
    """
    tokenizer = trained.tokenizer
    entries = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in _SPECIAL}
    if own is None:
        return entries
    return entries | {"answer_length": trained.pipeline.config.answer_length} | own


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
        system=trained.settings.system.name + (f" ({part})" if part else ""),
        auto_class="AutoModelForCausalLM" if part else "AutoModel",
        manifest=trained.export.manifest,
        origins=_origins(trained.settings),
        sources=_sources(trained),
        summary=read_summary(workdir),
        step=int(trained.state.step),
    )


def _sources(trained: Trained) -> list[str]:
    """Returns the names of the data sets whose questions were added to the run's export."""
    records = open_question_records(trained.export, trained.settings.data.on_bad_scene)
    return sorted({r["source"] for r in records.of_split("train") if "source" in r})


def _origins(settings: Settings) -> list[str]:
    """Returns the names of the pretrained models that this run or its predecessors started from."""
    start = settings.init_from
    if not start:
        return []
    try:
        folders = pretrained_folders(start)
        if not folders:
            return _origins(load_settings(Path(start)))
    except UserError:  # the folder is gone, so the name of its model is unknown
        return [f"{start} (not here)"]
    return [
        read_json_object(folder / CONFIG).get("_name_or_path") or folder.name for folder in folders
    ]
