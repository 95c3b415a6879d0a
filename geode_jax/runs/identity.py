"""Whether two runs are the same: a folder continues its own run and refuses another."""

from pathlib import Path
from typing import Any

from geode_jax.data.tokens import Tokenizer, load_tokenizer
from geode_jax.errors import UserError
from geode_jax.exports import Export
from geode_jax.runs.config import flat, is_begun, load_settings
from geode_jax.runs.export import export_folder
from geode_jax.runs.settings import Settings
from geode_jax.sealed import checksum
from geode_jax.training.checkpoint import find_model
from geode_jax.training.checkpoint_files import read_metadata, refuse_others, stored_made_with

MAY_CHANGE = (
    "mesh",
    "data/workers",
    "data/root",
    "data/on_bad_scene",
    "data/on_missing_targets",
    "data/stand_in_tokens",
    "data/min_learned",
    "eval/blind",
    "eval/examples",
    "eval/test_scenes",
    "train/checkpoint_every",
    "train/checkpoint_minutes",
)
"""Fields that a resumed run may change: they do not affect what is learned."""

LATER = {
    "data/asks_rationales": True,
    "loss/cross_view_weight": 0.1,
    "loss/eq_1": True,
    "loss/regression": "codes",
    "model/question_sees_thinking": False,
}
"""Fields that affect what is learned and came after runs had been saved, with the value that runs
had before. A run without the field is one with that value."""

_PLACES = ("data/export", "data/rgbd", "tokenizer", "init_from", "eval/blind")
"""Fields that name files, which may move."""


def made_with(
    settings: Settings, tokenizer: Tokenizer | None, export: Export | None = None
) -> dict[str, str]:
    """Returns the checksums that are stored with a checkpoint (`checkpoint_files.Metadata`):
    of the configuration, the tokenizer and the export that it belongs to.
    """
    left_out, nothing = (*MAY_CHANGE, *_PLACES), object()
    learned = {
        n: x
        for n, x in flat(settings.values).items()
        if n not in left_out and LATER.get(n, nothing) != x
    }
    return (
        {"configuration": checksum(learned)}
        | (_tokenizer_made(tokenizer) if tokenizer else {})
        | (export_made(export) if export else {})
    )


_NO_CONTENT = ("producer", "notes", "created")
"""Fields of a manifest that the content of an export does not depend on."""


def export_made(export: Export) -> dict[str, str]:
    """Returns a checksum of an export's content; the manifest has the sha256 of all its files."""
    manifest = export.manifest
    content = {name: value for name, value in manifest.items() if name not in _NO_CONTENT}
    scenes, questions = len(manifest["scenes"]), manifest["questions"]["count"]
    return {"export": f"{scenes} scenes, {questions} questions, checksum {checksum(content)}"}


def refuse_another_run(settings: Settings, workdir: Path) -> None:
    """Refuses to mix two runs in one folder.

    Files and folders that the configuration names may have moved: their content is compared where
    a checkpoint has its checksum.

    Raises:
        UserError: the folder holds a run of another configuration, or on another export.
        ExportError: the export is damaged.
    """
    if not is_begun(workdir):
        return
    before, stored = load_settings(workdir), stored_made_with(workdir)
    old, new = flat(before.values), flat(settings.values)
    for name in sorted(old.keys() | new.keys()):
        was, now = (of.get(name, LATER.get(name)) for of in (old, new))
        if name in MAY_CHANGE or was == now or (name in _PLACES and _same_place(was, now)):
            continue
        if name in ("data/export", "data/rgbd") and was and now and "export" in stored:
            continue  # compared below
        if (
            name == "tokenizer"
            and was
            and now
            and settings.system.tokenizer.shares_folder
            and _tokenizer_made(load_tokenizer(now)).items() <= stored.items()
        ):
            continue
        raise UserError(
            f"{workdir}: holds a run with {name} = {was}, not {now}; use another --workdir, or "
            "delete this one"
        )
    folder = export_folder(settings.data)
    if "export" in stored and (folder / "manifest.json").exists():
        here = export_made(Export(folder))
        if here["export"] != stored["export"]:
            raise UserError(
                f"{workdir}: holds a run on another export ({stored['export']}) than {folder} "
                f"({here['export']}); put the run's own there, or use another --workdir"
            )


def _same_place(was: Any, now: Any) -> bool:
    """Returns whether two texts name one file or folder."""
    both = isinstance(was, str) and isinstance(now, str) and was and now
    return bool(both) and Path(was).resolve() == Path(now).resolve()


def same_run(settings: Settings, workdir: Path) -> bool:
    """Returns whether a run that `refuse_another_run` accepts has exactly these settings."""
    old, new = (LATER | flat(of.values) for of in (load_settings(workdir), settings))
    for name in _PLACES:
        old.pop(name, None)
        new.pop(name, None)
    return old == new


def _tokenizer_made(tokenizer: Tokenizer) -> dict[str, str]:
    ids = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id)
    return {"tokenizer": checksum([tokenizer.sha256, *ids])}


def open_run(workdir: Path) -> tuple[Settings, Path]:
    """Returns the settings of a run and the folder of its model, which belong together.

    Raises:
        UserError: the folder is no run, it has no checkpoint, or one of the two is damaged.
    """
    settings, folder = load_settings(workdir), find_model(workdir)
    stored = read_metadata(folder).made_with
    refuse_others(str(folder), stored, made_with(settings, None))
    return settings, folder


def load_run_tokenizer(folder: str | Path, checkpoint: Path) -> Tokenizer:
    """Returns the tokenizer of a run, after a check that its checkpoint was trained with it.

    Args:
        folder: of the tokenizer.
        checkpoint: from `open_run`.

    Raises:
        UserError: the tokenizer is missing, damaged or another one.
    """
    tokenizer = load_tokenizer(folder)
    stored = read_metadata(checkpoint).made_with
    refuse_others(str(checkpoint), stored, _tokenizer_made(tokenizer))
    return tokenizer
