"""`geode-jax plan`: a configuration on a topology, as numbers and as text."""

import ast
import contextlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from geode_jax.errors import UserError
from geode_jax.plan.bounds import Bounds, network_seconds
from geode_jax.plan.compiled import Program, Run, make_run
from geode_jax.plan.topology import Topology, devices_of, parse_topology

TRIALS = 8
"""Compilations that a search for the largest batch may take."""


def read_config(text: str, changes: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """`FILE[:ARGUMENTS]`, with `FIELD=VALUE` changes.

    Raises:
        UserError: no such file or field, or the configuration refuses its arguments.
    """
    file, _, argument = text.partition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise UserError(f"--config: {file}: no such file")
    sys.path.insert(0, str(path.parent))  # it may import modules beside it
    try:
        spec = importlib.util.spec_from_file_location(f"plan_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(argument)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a configuration is a program, and may raise or end at will
        raise UserError(f"--config: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(config, ml_collections.ConfigDict) or "system" not in config:
        raise UserError(f"--config: {file}: get_config gives no configuration of a system")
    for change in changes:
        name, _, value = change.partition("=")
        with contextlib.suppress(ValueError, SyntaxError):  # a word stays one
            value = ast.literal_eval(value)
        try:
            config.update_from_flattened_dict({name: value})
        except (KeyError, AttributeError, TypeError, ValueError):
            raise UserError(f"--set: {change}: no such field, or not a value of it") from None
    return config


def plan(
    config: ml_collections.ConfigDict,
    topology: str,
    mesh: Sequence[int] | None = None,
    scenes: int | None = None,
    *,
    search: bool = False,
    decode: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """What `--json` prints; keys as in docs/SCALING.md.

    Args:
        config: of a file in `configs`.
        topology: such as "v5p:4x4x4".
        mesh: sizes of data, fsdp, model, one of them maybe -1; None: the configuration's.
        scenes: of a batch; None: the configuration's.
        search: find the largest batch that fits, and plan with it.
        decode: compile the answering, too.
        say: told what is going on.

    Raises:
        UserError: anything that the user can mend.
    """
    where = parse_topology(topology)
    devices = devices_of(where)

    def planned(count: int | None) -> tuple[Run, Program]:
        run = make_run(config, devices, mesh, count)
        say(f"compiling the training step, {run.config.data.scenes_per_batch} scenes a batch ...")
        return run, run.train_step()

    run, program = planned(scenes)
    largest = None
    if search:
        run, program, largest = _search(planned, run, program, where)
    out = _facts(run, where) | _step_facts(run, program, where)
    out["largest_batch"] = largest
    if decode:
        say("compiling the answering ...")
        out["decode"] = _decode_facts(run, run.answers(), where)
    return out


def fits(program: Program, topology: Topology) -> bool:
    """Whether a device has the memory."""
    return not program.refused and program.peak <= topology.chip.hbm_bytes


def _search(
    planned: Callable, run: Run, program: Program, where: Topology
) -> tuple[Run, Program, int]:
    """The largest batch that fits, in multiples of what the mesh and the microbatches divide.

    Where not even the smallest does, that one and 0.
    """
    unit, room = run.shards * run.config.train.microbatches, where.chip.hbm_bytes
    count = max(1, run.config.data.scenes_per_batch // unit)
    if run.config.data.scenes_per_batch != count * unit:
        run, program = planned(count * unit)
    tried, best = {0: run.state_bytes()}, None
    while len(tried) <= TRIALS:
        tried[count] = max(program.peak, room + 1) if program.refused else program.peak
        if fits(program, where):
            best = run, program, count * unit
        count = next_count(tried, room)
        if count in tried:
            break
        run, program = planned(count * unit)
    return best or (run, program, 0)


def next_count(tried: dict[int, int], room: int) -> int:
    """The batch to try next; one that was tried where the answer is known closely enough (1/8).

    Memory grows with the batch by a straight line, nearly: where the line through the last that
    fits and its neighbour meets the room there is, less a little.

    Args:
        tried: batch -> bytes; an empty batch's, of the state alone, among them.
        room: bytes of a device.
    """
    low = max((count for count in tried if tried[count] <= room), default=0)
    high = min((count for count in tried if tried[count] > room), default=None)
    if high is not None and high - low <= max(1, low // 8):
        return low or high
    neighbour = max(c for c in tried if c < low) if high is None else high
    slope = max(1.0, (tried[neighbour] - tried[low]) / (neighbour - low))
    guess = max(low + 1, low + int(0.97 * (room - tried[low]) / slope))
    return min(guess, 16 * low) if high is None else min(guess, high - 1)


def _facts(run: Run, where: Topology) -> dict[str, Any]:
    data, shapes = run.config.data, run.data.shapes
    tokens = data.scenes_per_batch * data.rows_per_scene * data.row_length
    return {
        "system": run.config.system,
        "topology": where.name,
        "chip": where.chip.name,
        "devices": where.size,
        "mesh": dict(run.mesh.shape),
        "scenes_per_batch": data.scenes_per_batch,
        "scenes_spread": data.scenes_per_batch % run.shards == 0,
        "tokens_per_step": tokens,
        "assumed": {
            "scenes": run.data.scenes,
            "views": shapes.views,
            "patch_grid": list(shapes.grid),
            "points": shapes.points,
            "vocabulary": run.data.vocab_size,
            "question_length": run.data.question_length,
            "answer_length": run.data.answer_length,
        },
        **run.parameters(),
        "steps": run.steps,
        "hbm_bytes": where.chip.hbm_bytes,
        "compiler": run.compiler,
    }


def _memory_facts(program: Program, where: Topology) -> dict[str, Any]:
    return {
        "fits": fits(program, where),
        "argument_bytes": program.arguments,
        "output_bytes": program.outputs,
        "temporary_bytes": program.temporaries,
        "hbm_peak_bytes": program.peak,
        "refused": program.refused,
        "compile_seconds": round(program.seconds, 1),
    }


def _bounds(run: Run, program: Program, where: Topology, least_traffic: int = 0) -> Bounds:
    """Memory: arguments read, results written, what lies there at the peak written and read."""
    traffic = program.arguments + program.outputs + 2 * program.temporaries
    return Bounds(
        compute=program.device_flops / where.chip.flops,
        memory=max(traffic, least_traffic) / where.chip.hbm_bandwidth,
        network=network_seconds(program.collectives, where, list(run.mesh.devices.flat)),
    )


def _work_facts(program: Program, bounds: Bounds) -> dict[str, Any]:
    sent: dict[str, Counter] = {}
    for one in program.collectives:
        sent.setdefault(one.axes, Counter())[one.kind] += one.bytes
    return {
        "flops_per_step": program.flops,
        "flops_per_device": program.device_flops,
        "collective_bytes": {axes: dict(kinds) for axes, kinds in sorted(sent.items())},
        "loops_counted_once": program.unknown_loops,
        "kernels": list(program.kernels),
        "seconds": {
            "compute": bounds.compute,
            "memory": bounds.memory,
            "network": bounds.network,
        },
        "bound": bounds.binding,
        "step_seconds": bounds.seconds,
    }


def _step_facts(run: Run, program: Program, where: Topology) -> dict[str, Any]:
    out = _memory_facts(program, where)
    model = run.model_flops()
    out["model_flops_per_step"] = model
    if program.refused:
        return out | {"flops_per_step": program.flops, "bound": None, "step_seconds": None}
    bounds = _bounds(run, program, where)
    data, steps = run.config.data, run.steps
    tokens = data.scenes_per_batch * data.rows_per_scene * data.row_length
    hours = bounds.seconds * steps / 3600
    return (
        out
        | _work_facts(program, bounds)
        | {
            "mfu_ceiling": model / (where.size * where.chip.flops * bounds.seconds),
            "tokens_per_second": tokens / bounds.seconds,
            "scenes_per_second": data.scenes_per_batch / bounds.seconds,
            "hours": hours,
            "chip_hours": hours * where.size,
            "largest_collectives": [
                {
                    "kind": one.kind,
                    "axes": one.axes,
                    "bytes": one.bytes,
                    "times": one.times,
                    "place": one.place,
                }
                for one in sorted(program.collectives, key=lambda c: -c.bytes)[:8]
            ],
        }
    )


def _decode_facts(run: Run, program: Program, where: Topology) -> dict[str, Any]:
    """Of a whole batch of answers; every token reads the decoder once, wherever its parts lie."""
    out = _memory_facts(program, where)
    if program.refused:
        return out
    tokens = run.data.answer_length
    bounds = _bounds(run, program, where, tokens * run.decoder_bytes() // where.size)
    questions = run.config.data.scenes_per_batch * run.config.data.questions_per_scene
    return (
        out
        | _work_facts(program, bounds)
        | {
            "answers": questions,
            "tokens_per_answer": tokens,
            "tokens_per_second": questions * tokens / bounds.seconds,
        }
    )


# --- Text -----------------------------------------------------------------------------------------


def table(facts: dict[str, Any]) -> str:
    """A plan for the terminal."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in facts["mesh"].items())
    assumed = ", ".join(f"{name.replace('_', ' ')} {v}" for name, v in facts["assumed"].items())
    whole = "" if facts["scenes_spread"] else ", whole on every device: the mesh does not divide it"
    lines = [
        ("topology", f"{facts['topology']}, {facts['devices']} x {facts['chip']}; mesh {mesh}"),
        ("compiler", facts["compiler"]),
        ("assumed data", assumed),
        ("parameters", f"{facts['parameters']:,}, of which {facts['trainable']:,} learn"),
        (
            "a batch",
            f"{facts['scenes_per_batch']} scenes{whole}; {facts['tokens_per_step']:,} columns of "
            "text, padding included",
        ),
        *_memory_lines(facts),
    ]
    if facts.get("largest_batch") is not None:
        lines.append(("largest batch", f"{facts['largest_batch']} scenes"))
    if facts["bound"] is None:
        return _aligned(lines)
    lines += [
        (
            "FLOPs of a step",
            f"{facts['flops_per_step']:.3e}; of the model {facts['model_flops_per_step']:.3e}; "
            f"of a device {facts['flops_per_device']:.3e}",
        ),
        *_work_lines(facts),
        (
            "at best",
            f"{facts['mfu_ceiling']:.1%} of peak (MFU), {facts['tokens_per_second']:,.0f} tokens/s,"
            f" {facts['scenes_per_second']:,.1f} scenes/s",
        ),
        (
            "all steps",
            f"{facts['steps']:,} steps: {facts['hours']:.3g} hours, "
            f"{facts['chip_hours']:.3g} chip-hours, at best",
        ),
    ]
    decode = facts.get("decode")
    if decode:
        lines.append(("answering", ""))
        lines += _memory_lines(decode)
        if not decode["refused"]:
            lines += _work_lines(decode)
            lines.append(
                (
                    "at best",
                    f"{decode['tokens_per_second']:,.0f} tokens/s: {decode['answers']} answers of "
                    f"{decode['tokens_per_answer']} tokens in {_seconds(decode['step_seconds'])}",
                )
            )
    return _aligned(lines)


def _memory_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    verdict = "fits" if facts["fits"] else "DOES NOT FIT"
    if facts["refused"]:
        return [("memory of a device", f"{verdict}: {facts['refused']}")]
    return [
        (
            "memory of a device",
            f"arguments {_bytes(facts['argument_bytes'])}, temporaries "
            f"{_bytes(facts['temporary_bytes'])}, results {_bytes(facts['output_bytes'])}: peak "
            f"{_bytes(facts['hbm_peak_bytes'])}: {verdict}",
        )
    ]


def _work_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for axes, kinds in facts["collective_bytes"].items():
        parts = ", ".join(f"{kind} {_bytes(size)}" for kind, size in sorted(kinds.items()))
        lines.append((f"sent along {axes}", f"{parts} by each device"))
    if facts["kernels"]:
        lines.append(("kernels", ", ".join(facts["kernels"])))
    if facts["loops_counted_once"]:
        lines.append(("unknown loops", f"{facts['loops_counted_once']}, counted once"))
    times = ", ".join(f"{name} {_seconds(s)}" for name, s in facts["seconds"].items())
    lines.append(("no faster than", f"{times}; {facts['bound']} binds"))
    return lines


def _aligned(lines: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {text}".rstrip() for name, text in lines)


def _bytes(count: int) -> str:
    """Decimal, three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
