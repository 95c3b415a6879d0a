"""Shared by the exporters of this folder: shards, resuming, one-line error messages.

An exporter runs in the environment of the project whose arrays it exports. So this file and the
folder `geode_jax/exports`, which it loads by path, need only Python 3.9, numpy and safetensors, and
geode_jax is not imported as a package.

A job is a list of scenes, the same in every process. Shard I of N makes the scenes I, I + N, ...;
finished scenes are kept if the process is interrupted. When all are finished, `--merge` (or the
only shard itself) writes the manifest, which makes the folder an export.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

CONTRACT = Path(__file__).resolve().parent.parent / "geode_jax" / "exports"
"""The package `exports` of this checkout."""
_QUESTIONS = ".questions"
"""Folder of the questions of finished scenes, if the exporter adds answers to them."""


class InputError(ValueError):
    """Invalid input; the message is one line: where, what, which rule."""


class Scene(NamedTuple):
    """A scene to export.

    Attributes:
        id: the scene's name.
        split: train, val or test.
        source: input of the exporter, a path or a JSON value. A finished scene is made anew if its
            source has changed.
    """

    id: str
    split: str
    source: Any = None


class Made(NamedTuple):
    """A scene, as made by an exporter.

    Attributes:
        arrays: name -> tensor of the contract, including the teacher's.
        questions: the scene's question records; None if the exporter does not change them.
        report: a few words for the terminal.
        alignment: how well VGGT's reconstruction fits the metric world, for the manifest.
    """

    arrays: dict[str, Any]
    questions: list[dict] | None = None
    report: str = ""
    alignment: dict[str, Any] | None = None


def load_contract(folder: str | Path) -> Any:
    """Returns the package `geode_jax/exports` in a folder, loaded without its parent package.

    Raises:
        InputError: the folder holds no such package.
    """
    path = Path(folder) / "__init__.py"
    if not path.is_file():
        raise InputError(f"{path}: no such file (--contract: geode_jax/exports of the checkout)")
    name = "geode_jax_exports"
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ and Path(loaded.__file__).samefile(path):
        return loaded
    spec = importlib.util.spec_from_file_location(
        name, path, submodule_search_locations=[str(path.parent)]
    )
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for its relative imports
    spec.loader.exec_module(module)
    return module


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that all exporters have."""
    parser.add_argument("--out", required=True, type=Path, help="folder of the new export")
    parser.add_argument("--shard", default="0/1", help="I/N: only scenes I, I + N, ... (I from 0)")
    parser.add_argument(
        "--merge", action="store_true", help="after all shards: write the manifest only"
    )
    parser.add_argument(
        "--skip-missing",
        action="store_true",
        help="merge without the scenes that could not be made",
    )
    parser.add_argument(
        "--contract",
        type=Path,
        default=CONTRACT,
        help="folder geode_jax/exports (%(default)s)",
    )


def shard_of(text: str) -> tuple[int, int]:
    """Returns (I, N) of "I/N".

    Raises:
        InputError: the text has another form.
    """
    with contextlib.suppress(ValueError):
        index, count = (int(part) for part in text.split("/"))
        if 0 <= index < count:
            return index, count
    raise InputError(f"--shard: {text!r} is not I/N with 0 <= I < N")


def run(
    args: argparse.Namespace,
    contract: Any,
    scenes: list[Scene],
    begin: Callable[[], tuple[dict, Callable[[Scene], Made]]],
    questions: Callable[[], Iterable[dict]] = tuple,
) -> int:
    """Makes this shard's scenes, or merges.

    Args:
        args: arguments, including those of `add_arguments`.
        contract: the loaded package `exports`.
        scenes: scenes of all shards, in the manifest's order.
        begin: loads the model; returns the header (keyword arguments of `ExportWriter`) and the
            function that makes a scene.
        questions: returns records for the whole export; `Made.questions` replace those of a scene.

    Returns:
        The process's exit code: 1 if a scene could not be made.

    Raises:
        ExportError, InputError: the job cannot start, or cannot be merged.
    """
    if len({scene.id for scene in scenes}) != len(scenes):
        raise InputError(f"{len(scenes)} scenes have the same id twice: rename a folder")
    index, count = shard_of(args.shard)
    if (args.out / "manifest.json").exists():  # checked before a model is loaded
        raise InputError(f"{args.out}: is an export already; it is not overwritten")
    failed = 0
    if not args.merge:
        failed = _make_scenes(args, contract, scenes[index::count], begin)
    if args.merge or (count == 1 and (not failed or args.skip_missing)):
        _merge(args, contract, scenes, questions)
    return 1 if failed else 0


def _make_scenes(args: argparse.Namespace, contract: Any, scenes: list[Scene], begin) -> int:
    """Makes the scenes that are not finished; returns the number of those that failed."""
    header, make = begin()
    writer = contract.ExportWriter(args.out, **header, resume=True)
    sources = _sources(contract, scenes)
    changed = contract.made_from.changed(writer, sources)
    for scene_id in changed:
        contract.made_from.forget(writer, scene_id)
        with contextlib.suppress(FileNotFoundError):
            _questions_file(args.out, scene_id).unlink()
    if changed:
        print(f"{len(changed)} scenes are made anew: their sources have changed")
    done = writer.finished()
    left = [scene for scene in scenes if scene.id not in done]
    if len(left) < len(scenes):
        print(f"{len(scenes) - len(left)} of {len(scenes)} scenes were made before")
    failed = 0
    for scene in _bar(left):
        try:
            contract.made_from.note(writer, scene.id, sources[scene.id])
            made = make(scene)
            if made.questions is not None:
                _write_questions(contract, args.out, scene.id, made.questions)
            own = {n: a for n, a in made.arrays.items() if not n.startswith("teacher/")}
            teacher = {n[8:]: a for n, a in made.arrays.items() if n.startswith("teacher/")}
            writer.add_scene(
                scene.id, own, split=scene.split, teacher=teacher, alignment=made.alignment
            )
        except (ValueError, OSError, RuntimeError) as error:
            # A scene that does not fit in memory or cannot be decoded does not stop the others.
            failed += 1
            text = " ".join(str(error).split())
            place = "" if text.startswith("scene ") else f"scene {scene.id}: "
            print(f"{place}{text[:300]}", file=sys.stderr)
        else:
            if made.report:
                print(f"scene {scene.id}: {made.report}")
            for warning, share in contract.cameras.scene_warnings(made.arrays).items():
                print(f"scene {scene.id}: warning: {warning} {share:.2f}", file=sys.stderr)
    print(f"{len(left) - failed} scenes made, {failed} could not be")
    return failed


def _sources(contract: Any, scenes: list[Scene]) -> dict[str, str]:
    return {scene.id: contract.made_from.fingerprint(scene.source) for scene in scenes}


def _merge(args: argparse.Namespace, contract: Any, scenes: list[Scene], questions) -> None:
    """Writes the manifest and the questions of an export whose scenes are finished."""
    writer = contract.ExportWriter.reopen(args.out)
    changed = set(contract.made_from.changed(writer, _sources(contract, scenes)))
    if changed:
        print(f"{args.out}: {len(changed)} scenes were made from sources that have changed since")
    done = {s: entry for s, entry in writer.finished().items() if s not in changed}
    missing = [scene.id for scene in scenes if scene.id not in done]
    if missing and not args.skip_missing:
        names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(
            f"{args.out}: {len(missing)} of {len(scenes)} scenes are not made: {names} "
            "(make them, or --skip-missing)"
        )
    kept = [scene for scene in scenes if scene.id in done]
    for scene in kept:
        writer.register({**done[scene.id], "split": scene.split})
    dropped = 0
    for record in questions():
        scene_id = str(record.get("scene_id"))
        if scene_id in missing:
            dropped += 1
        elif scene_id not in done or not _questions_file(args.out, scene_id).exists():
            writer.add_questions([record])
    for scene in kept:
        if _questions_file(args.out, scene.id).exists():
            writer.add_questions(read_records(contract, _questions_file(args.out, scene.id)))
    writer.close()
    with contextlib.suppress(OSError):
        for path in (args.out / _QUESTIONS).iterdir():
            path.unlink()
        (args.out / _QUESTIONS).rmdir()
    print(
        f"{args.out}: an export of {len(kept)} scenes; left out: {len(missing)} scenes that are "
        f"not made, {dropped} questions about them"
    )


def _questions_file(out: Path, scene_id: str) -> Path:
    return out / _QUESTIONS / f"{scene_id}.jsonl"


def _write_questions(contract: Any, out: Path, scene_id: str, records: list[dict]) -> None:
    # Complete whenever it is read, because the scene's entry is written after it.
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    contract.files.write_text(_questions_file(out, scene_id), text)


def read_records(contract: Any, path: Path) -> Iterator[dict]:
    """Yields JSON objects, one a line.

    Args:
        contract: the loaded package `exports`.
        path: the file.

    Raises:
        UserError: the file cannot be read, or a line is not JSON.
        InputError: a line is no JSON object.
    """
    for number, record in contract.files.json_lines(path):
        if isinstance(record, ValueError):
            raise record
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: must be a JSON object")
        yield record


def splits_of(
    ids: Iterable[str],
    split: str,
    table: Path | None,
    *,
    allow_missing: bool = False,
    contract: str | Path = CONTRACT,
) -> dict[str, str]:
    """Returns {scene: split}.

    Args:
        ids: the scenes.
        split: split of scenes that the table does not name.
        table: list of pairs of a scene and its split, read by `files.read_list`.
        allow_missing: whether entries that name no scene are counted on the terminal instead of
            refused. At least one entry must name a scene.
        contract: folder of the package `exports`.

    Raises:
        UserError: the table cannot be read.
        InputError: an entry names no split, or no scene, or two scans of a room would have
            different splits.
    """
    splits = dict.fromkeys(ids, split)
    if table is None:
        return splits
    package = load_contract(contract)
    missing, entries = [], package.files.read_list(table, 2)
    for where, (scene, name) in entries:
        if name not in package.SPLITS:
            raise InputError(f"{where}: {name!r} is none of {', '.join(package.SPLITS)}")
        if scene in splits:
            splits[scene] = name
        else:
            missing.append(f"{where}: {scene!r} is no scene of this job")
    named = len(entries) - len(missing)
    if missing and not (allow_missing and named):
        others = f", nor are {len(missing) - 1} more entries" if len(missing) > 1 else ""
        hint = (
            "no entry of the table is" if allow_missing else "--allow-missing counts such entries"
        )
        raise InputError(f"{missing[0]}{others} ({hint})")
    if missing:
        print(f"{table}: {len(missing)} entries name no scene of this job", file=sys.stderr)
    first: dict[str, str] = {}  # room -> the first of its scans
    for scene, name in splits.items():
        other = first.setdefault(package.scene_names.room_of(scene), scene)
        if splits[other] != name:
            raise InputError(
                f"{table}: {other} would be of {splits[other]} and {scene}, a scan of the same "
                f"room, of {name}: list both"
            )
    return splits


def commit_of(module: Any, given: str) -> str:
    """Returns the commit of an installed project: the given one, or that of its git checkout.

    Raises:
        InputError: none is given, and the project is in no git checkout.
    """
    if given:
        return given
    folder = str(Path(module.__file__ or next(iter(module.__path__))).resolve().parent)
    command = ["git", "-C", folder, "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        # A copy inside another project's checkout must not get that project's commit.
        tracked = subprocess.run([*command[:3], "ls-files"], capture_output=True, check=True)
        if tracked.stdout.strip():
            return subprocess.run(
                command, capture_output=True, check=True, text=True
            ).stdout.strip()
    raise InputError(f"{folder} is no git checkout: give its commit with --commit")


def name_of(weights: str) -> str:
    """Returns the name of weights for a manifest: that on a hub, or the file's name and sha256."""
    path = Path(weights)
    if not path.is_file():
        return weights if not path.exists() else path.resolve().name
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return f"{path.name} sha256 {digest.hexdigest()}"


def load_weights(torch: Any, path: Path) -> Any:
    """Returns the content of a .pt, .pth, .bin or .safetensors file, without running code in it.

    Raises:
        InputError: the file has more than tensors and plain values, or cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(str(path))
        return torch.load(str(path), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise many types of errors
        reason = str(error).strip().splitlines()
        raise InputError(f"{path}: no weights: {reason[0][:200] if reason else error!r}") from None


def guarded(name: str, main: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """Returns `main` with errors of input printed as one line, and exit status 1."""

    def guarded_main(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except OSError as error:
            print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
        except ValueError as error:
            # Compared by name, because the classes belong to the package that `main` has loaded.
            if not isinstance(error, InputError) and type(error).__name__ not in (
                "ExportError",
                "UserError",
            ):
                raise
            print(f"{name}: {error}", file=sys.stderr)
            return 1

    return guarded_main


def _bar(items: list[Scene]) -> Iterable[Scene]:
    """Returns the scenes with a progress bar, if tqdm is installed."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        return tqdm(items, desc="scenes", unit="scene", file=sys.stderr)
    return items
