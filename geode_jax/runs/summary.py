"""The files of a finished run: predictions, and `summary.json` with its facts and scores.

The summary is written last: it marks the run as finished, and has the checksums of the other files.
"""

import json
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from geode_jax.errors import UserError
from geode_jax.exports import files
from geode_jax.runtime.distributed import is_main
from geode_jax.sealed import is_sealed, seal, unseal
from geode_jax.training.metrics import plain_value
from geode_jax.version import software

SUMMARY, PREDICTIONS, REPORT = "summary.json", "predictions.jsonl", "report.html"

_FIELDS: dict[str, type] = {
    "scores": dict,
    "train": dict,
    "efficiency": dict,
    "reference": str,
    "test_scenes": int,
    "notes": list,
    "remarks": dict,
    "val": dict,
    "vsi": dict,
    "software": str,
}


def kept_answers(workdir: Path, name: str) -> Path:
    """Returns the file that keeps finished batches of the final evaluation until it ends."""
    return workdir / "evaluation" / f"{name}.jsonl"


def end(workdir: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Writes the summary after all other files; returns it as `read_summary` will."""
    kept = json.loads(json.dumps(summary, default=plain_value))
    if is_main():
        kept["software"] = software()
        kept["files"] = {
            name: _checksum(workdir / name)
            for name in (PREDICTIONS, REPORT)
            if (workdir / name).exists()
        }
        shutil.rmtree(workdir / "evaluation", ignore_errors=True)
        files.write_json(workdir / SUMMARY, seal(kept), durable=True)
    return kept


def write_predictions(workdir: Path, predictions: Iterable[dict]) -> None:
    """Writes `predictions.jsonl`."""
    lines = (json.dumps(record, default=plain_value) + "\n" for record in predictions)
    files.write_text(workdir / PREDICTIONS, "".join(lines))


def lost_files(workdir: Path, summary: dict[str, Any]) -> list[str]:
    """Returns a line for every file beside a summary that is missing or was changed."""
    lost = []
    for name, stored in summary.get("files", {}).items():
        try:
            found = _checksum(workdir / name)
        except (UserError, OSError):
            lost.append(f"{name} is missing or cannot be read")
            continue
        if found != stored:
            lost.append(f"{name} is not what was written beside {SUMMARY}")
    return lost


def _checksum(path: Path) -> str:
    return f"{zlib.crc32(files.read_bytes(path)):08x}"


def read_predictions(path: Path) -> list[dict]:
    """Returns the records of a run's `predictions.jsonl`.

    Raises:
        UserError: the file is damaged, or is not the one that the summary was written with.
    """
    found = []
    for number, record in files.json_lines(path, nan=True):
        if isinstance(record, UserError):
            raise record
        if not isinstance(record, dict) or not isinstance(record.get("id"), str | int):
            raise UserError(f"{path}:{number}: must be an object with an id")
        if not isinstance(record.get("prediction"), str):
            raise UserError(f"{path}:{number}: prediction: must be text")
        found.append(record)
    stored = read_summary(path.parent).get("files", {})
    if stored and stored.get(path.name) != _checksum(path):
        raise UserError(f"{path}: is not what was written beside {SUMMARY}")
    return found


def read_summary(workdir: Path) -> dict[str, Any]:
    """Returns the content of a run's `summary.json`; empty if there is none.

    Raises:
        UserError: the file is damaged.
    """
    path = workdir / SUMMARY
    if not path.exists():
        return {}
    summary = files.read_json_object(path, nan=True)
    if is_sealed(summary):
        found = unseal(summary)
        if found is None:
            raise UserError(f"{path}: is not what was written; delete it to evaluate again")
        return found
    _check(path, summary)  # written before summaries had a checksum
    return summary


def read_ended(workdir: Path) -> dict[str, Any]:
    """Returns the summary of a run that has ended.

    Raises:
        UserError: the run has not ended, or the file is damaged.
    """
    summary = read_summary(workdir)
    if not summary:
        raise UserError(f"{workdir / SUMMARY}: missing: the run has not ended")
    return summary


def missing(workdir: Path, name: str) -> UserError:
    """Returns the error for a summary without a field."""
    return UserError(f"{workdir / SUMMARY}: has no {name}; delete it to evaluate again")


def _check(path: Path, summary: dict[str, Any]) -> None:
    for name, value in summary.items():
        if name not in _FIELDS or type(value) is not _FIELDS[name]:
            raise UserError(
                f"{path}: {name}: is unknown, or not {_FIELDS.get(name, dict).__name__}"
            )
    if not summary.keys() & {"scores", "val", "vsi"}:
        raise UserError(f"{path}: has neither scores, nor val, nor vsi")
    columns = [*summary.get("scores", {}).values(), *summary.get("vsi", {}).values()]
    if not all(isinstance(column, dict) for column in columns):
        raise UserError(f"{path}: a column of scores must be an object")
    if not all(isinstance(x.get("per_type"), dict) for x in summary.get("vsi", {}).values()):
        raise UserError(f"{path}: vsi: a column must have per_type")
    for name in ("scores", "val", "vsi"):
        _check_numbers(f"{path}: {name}", summary.get(name, {}))
    if not all(isinstance(note, str) for note in summary.get("notes", ())):
        raise UserError(f"{path}: notes: must be texts")


def _check_numbers(where: str, value: dict) -> None:
    for name, item in value.items():
        if isinstance(item, dict):
            _check_numbers(f"{where}: {name}", item)
        elif type(item) not in (int, float) and name != "missing":  # names of VSI-Bench's types
            raise UserError(f"{where}: {name}: must be a number")
