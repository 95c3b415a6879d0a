"""Commands that make, check and list exports."""

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from geode_jax import exports
from geode_jax.cli.options import Commands, add_command, positive, seed
from geode_jax.errors import UserError

# A command imports what it needs when it runs, so that checking a folder does not wait for JAX.


def add_commands(commands: Commands) -> None:
    """Adds the commands of this file."""
    _add_validate(commands)
    _add_rooms(commands)
    _add_rgbd(commands)
    _add_prepare(commands)
    _add_merge(commands)
    _add_internvit(commands)
    _add_teacher(commands)
    _add_scenes(commands)


def making(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Holds the lock of a folder that is being made, so that no other process makes it too."""
    from geode_jax.runtime.lock import beside, locked

    return locked(beside(folder), f"--out: {folder}")


def _made(folder: Path, started: float) -> str:
    """Returns the line that ends the making of an export."""
    manifest = exports.Export(folder).manifest
    splits = [scene["split"] for scene in manifest["scenes"]]
    counts = ", ".join(f"{splits.count(s)} {s}" for s in exports.SPLITS if s in splits)
    return (
        f"{folder}: {len(splits)} scenes ({counts}), {manifest['questions']['count']} questions, "
        f"{time.monotonic() - started:.0f} s"
    )


def _add_validate(commands: Commands) -> None:
    parser = add_command(
        commands,
        "validate",
        _validate,
        "Check an export and print a summary of its scenes, tensors and questions.",
        "geode-jax validate data/rooms\ngeode-jax validate data/rooms --skip",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the export")
    parser.add_argument(
        "--skip", action="store_true", help="list bad scenes instead of stopping at the first"
    )


def _validate(arguments: argparse.Namespace) -> None:
    on_error = "skip" if arguments.skip else "stop"
    summary = exports.validate(arguments.folder, on_error=on_error, progress=True)
    print(exports.format_summary(summary))


def _add_rooms(commands: Commands) -> None:
    parser = add_command(
        commands,
        "rooms",
        _rooms,
        "Make an export of synthetic rooms with questions about them.\n\n"
        "Training makes the rooms that its configuration needs by itself; this command makes\n"
        "others, for example with pictures to look at.",
        "geode-jax rooms --scenes 100 --out data/demo\n"
        "geode-jax rooms --scenes 6 --images 320 --out data/pictures",
    )
    add = parser.add_argument
    add(
        "--scenes",
        type=positive,
        default=8000,
        metavar="N",
        help="number of scenes for training and validation; default 8000",
    )
    add("--seed", type=seed, default=0, metavar="S", help="seed of the rooms; default 0")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the new export")
    add(
        "--images",
        type=positive,
        nargs="?",
        const=448,
        default=0,
        metavar="SIDE",
        help="store pictures of SIDE x SIDE pixels; 448 without a number (2.4 MB, 0.5 s a scene)",
    )
    add("--workers", type=positive, metavar="W", help="number of processes; default: all cores")


def _rooms(arguments: argparse.Namespace) -> None:
    from geode_jax.sources.rooms.export import make_rooms

    started = time.monotonic()
    try:
        with making(arguments.out):
            make_rooms(
                arguments.out,
                scenes=arguments.scenes,
                seed=arguments.seed,
                images=arguments.images,
                workers=arguments.workers,
            )
    except exports.ExportError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
    print(_made(arguments.out, started))


def _add_rgbd(commands: Commands) -> None:
    parser = add_command(
        commands,
        "rgbd",
        _rgbd,
        "Make an export of an RGB-D recording, a folder with color/, depth/, pose/, intrinsic/.\n\n"
        "The questions are measured from the recording's own geometry.",
        "geode-jax rgbd --source livingroom --out data/livingroom\n"
        "geode-jax rgbd --source livingroom --out data/livingroom --depth-scale 5000 \\\n"
        "    --intrinsic 525 525 319.5 239.5",
    )
    add = parser.add_argument
    add("--source", type=Path, required=True, metavar="DIR", help="folder of the recording")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the new export")
    add("--views", type=positive, default=4, help="views of a scene; default 4")
    _add_grid(add)
    add("--questions", type=positive, default=24, help="most questions of a scene; default 24")
    add("--max-frames", type=positive, default=300, help="most frames that are read; default 300")
    add(
        "--intrinsic",
        type=float,
        nargs=4,
        metavar=("FX", "FY", "CX", "CY"),
        help="of the depth camera in pixels, if the folder has none",
    )
    add("--depth-scale", type=float, default=1000.0, help="stored depth of 1 m; default 1000")
    add("--seed", type=seed, default=0, help="seed of the questions; default 0")


def _rgbd(arguments: argparse.Namespace) -> None:
    from geode_jax.sources.rgbd.export import make_rgbd_export

    started = time.monotonic()
    with making(arguments.out):
        make_rgbd_export(  # prints on stderr what it dropped and why
            arguments.source,
            arguments.out,
            views_per_scene=arguments.views,
            patch_grid=tuple(arguments.grid),
            questions_per_scene=arguments.questions,
            max_frames=arguments.max_frames,
            intrinsic=arguments.intrinsic,
            depth_scale=arguments.depth_scale,
            seed=arguments.seed,
        )
    print(_made(arguments.out, started))


def _add_grid(add: Callable[..., Any]) -> None:
    add(
        "--grid",
        type=positive,
        nargs=2,
        default=(8, 8),
        metavar=("GH", "GW"),
        help="rows and columns of patches in a view; default 8 8",
    )


def _add_prepare(commands: Commands) -> None:
    parser = add_command(
        commands,
        "prepare",
        _prepare,
        "Make an export of a data set on disk.\n\n"
        "A data set of scenes (scannet, scannetpp, arkitscenes, 3d-front), or folders of your own\n"
        "pictures (images), becomes an export of scenes. A data set of questions (scanqa, sqa3d,\n"
        "vsi590k, ...) needs such an export as --scenes and becomes a copy of it with these\n"
        "questions.\n\n"
        "Your own questions are the source jsonl: --root is a file of JSON lines with scene_id,\n"
        "question and answer and, if you like, id, kind, options, value, unit, box, rationale;\n"
        "docs/how-to/questions.md has all fields.",
        "geode-jax prepare --source scannet --root ScanNet --out data/scannet\n"
        "geode-jax prepare --source images --root pictures --out data/pictures\n"
        "geode-jax prepare --source scanqa --root ScanQA --scenes data/scannet --out data/scanqa\n"
        "geode-jax prepare --source jsonl --root mine.jsonl --scenes data/room --out data/mine",
    )
    add = parser.add_argument
    add("--source", required=True, metavar="NAME", help="such as scannet, scanqa, vsi590k")
    add("--root", type=Path, required=True, metavar="DIR", help="where the data set is")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the new export")
    add("--scenes", type=Path, metavar="DIR", help="export whose scenes the questions are about")
    add("--part", action="append", metavar="PART", help="a part of the data set; may be repeated")
    _add_exclusion(add)
    _add_split(add, "scannet's lists or, without any, 70/15/15")
    add("--views", type=positive, default=8, help="views of a scene; default 8")
    _add_grid(add)
    add("--seed", type=seed, default=0, help="seed of the splits and views; default 0")
    add(
        "--metric",
        action="store_true",
        help="images: the cameras in transforms.json are in metres, with z up",
    )


def _add_exclusion(add: Callable[..., Any]) -> None:
    add(
        "--exclude-scenes",
        type=Path,
        metavar="FILE",
        help="list of scenes that must never be trained on",
    )
    add(
        "--allow-missing",
        action="store_true",
        help="count entries of that list that the data set lacks, instead of refusing them",
    )


def _excluded(arguments: argparse.Namespace) -> tuple[exports.files.Entry, ...]:
    """Returns the entries of `--exclude-scenes`."""
    exclude = arguments.exclude_scenes
    return tuple(exports.files.read_list(exclude)) if exclude else ()


def _add_split(add: Callable[..., Any], default: str) -> None:
    add(
        "--split",
        default="",
        metavar="SHARES",
        help="draw the splits by rooms, as 80/20 (train/val) or 70/15/15 (train/val/test); "
        f"default: {default}",
    )


def _prepare(arguments: argparse.Namespace) -> None:
    from geode_jax.sources.datasets import Request
    from geode_jax.sources.datasets.prepare import prepare

    started = time.monotonic()
    request = Request(
        arguments.root,
        arguments.out,
        arguments.scenes,
        tuple(arguments.part or ()),
        _excluded(arguments),
        arguments.views,
        tuple(arguments.grid),
        arguments.seed,
        arguments.allow_missing,
        arguments.split,
        arguments.metric,
    )
    with making(arguments.out):
        report = prepare(arguments.source, request)
    print("\n".join(report.lines()))
    print(_made(arguments.out, started))


def _add_merge(commands: Commands) -> None:
    parser = add_command(
        commands,
        "merge",
        _merge,
        "Make one export from several, such as ScanNet's and 3D-FRONT's as one training set.\n\n"
        "Scene files are linked, not copied, except where labels get other numbers; those of the\n"
        "first export keep theirs. Questions that belong to no data set get the name of their\n"
        "export, its folder's or NAME=DIR, for data.mixture and data.fraction.",
        "geode-jax merge --export data/scannet --export data/3d-front --out data/both\n"
        "geode-jax merge --export scannet=exports/a --export 3d-front=exports/b --split 80/20 \\\n"
        "    --out data/both",
    )
    add = parser.add_argument
    add(
        "--export",
        action="append",
        required=True,
        metavar="[NAME=]DIR",
        help="an export to merge; given two times or more",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the new export")
    _add_split(add, "every scene stays in its split")
    add("--seed", type=seed, default=0, help="seed of the splits that are drawn; default 0")
    _add_exclusion(add)


def _merge(arguments: argparse.Namespace) -> None:
    from geode_jax.sources.datasets import Request
    from geode_jax.sources.merge import merge, open_part

    started = time.monotonic()
    request = Request(
        arguments.out,
        arguments.out,
        exclude=_excluded(arguments),
        seed=arguments.seed,
        allow_missing=arguments.allow_missing,
        split=arguments.split,
    )
    with making(arguments.out):
        report = merge([open_part(text) for text in arguments.export], request)
    print("\n".join(report.lines()))
    print(_made(arguments.out, started))


def _add_internvit(commands: Commands) -> None:
    parser = add_command(
        commands,
        "internvit",
        _internvit,
        "Copy an export and add the InternViT tokens of its frames.\n\n"
        "Stages of GEODE then train without running the vision encoder, which they keep frozen.",
        "geode-jax internvit --weights internvl --export data/scannet --out data/scannet_tokens",
    )
    add = parser.add_argument
    add("--weights", type=Path, required=True, metavar="DIR", help="a GEODE run, or pretrained")
    add("--export", type=Path, required=True, metavar="DIR", help="an export with images")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the new export")


def _internvit(arguments: argparse.Namespace) -> None:
    from geode_jax.results.encode_frames import encode_export

    started = time.monotonic()
    with making(arguments.out):
        encode_export(arguments.weights, arguments.export, arguments.out)
    print(_made(arguments.out, started))


def _add_teacher(commands: Commands) -> None:
    parser = add_command(
        commands,
        "teacher",
        _teacher,
        "Copy an export and add the teacher's targets that LLaVA-3D does not give.\n\n"
        "Distributions over depth bins come from VGGT's depth and confidence, probabilities of\n"
        "categories from a detector or from smoothed labels, left/right and above/below from the\n"
        "boxes. The manifest's producer says what each was made from; tensors that a scene has\n"
        "already are kept.",
        "geode-jax teacher --export data/taught --out data/targets\n"
        "geode-jax teacher --export data/taught --out data/targets --detections votenet",
    )
    add = parser.add_argument
    add("--export", type=Path, required=True, metavar="DIR", help="the export")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the new export")
    add(
        "--depth-bins",
        type=int,
        default=64,
        metavar="N",
        help="bins, as model.depth_bins of the student; 0: none; default 64",
    )
    add(
        "--detections",
        type=Path,
        metavar="DIR",
        help="SCENE.npz of a detector: boxes [M, 7] in the export's world, probs [M, categories]",
    )
    add(
        "--smoothing",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="without --detections: probability of the other categories; default 0.1",
    )


def _teacher(arguments: argparse.Namespace) -> None:
    from geode_jax.sources.teacher_targets import TeacherRequest, add_teacher_targets

    started = time.monotonic()
    request = TeacherRequest(
        arguments.export,
        arguments.out,
        arguments.depth_bins,
        arguments.detections,
        arguments.smoothing,
    )
    with making(arguments.out):
        counts = add_teacher_targets(request)
    for what, count in counts.items():
        print(f"{count:,} {what}")
    print(_made(arguments.out, started))


def _add_scenes(commands: Commands) -> None:
    parser = add_command(
        commands,
        "scenes",
        _scenes,
        "List the scenes that a run can be asked about, or those of an export, one id a line.",
        "geode-jax scenes --workdir runs/hidden_cot --split test\n"
        "geode-jax scenes --export data/vsi-bench > never_train_on_these.txt",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--workdir", type=Path, metavar="RUN", help="a run's folder")
    where.add_argument("--export", type=Path, metavar="DIR", help="an export")
    parser.add_argument("--split", choices=exports.SPLITS, help="default: all splits")


def _scenes(arguments: argparse.Namespace) -> None:
    if arguments.export:
        export = exports.Export(arguments.export)
    else:
        from geode_jax.runs.trained import open_run_export

        export = open_run_export(arguments.workdir)
    for scene_id in export.scene_ids(arguments.split):
        print(scene_id)
