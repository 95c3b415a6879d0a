"""Targets that parse text: answers, mixtures, topologies, configuration fields and programs."""

import functools
import json
import random
import sys
import zlib
from pathlib import Path
from typing import Any

from tests.campaign.damage import Damage
from tests.campaign.machine import Refused, Target, command, shared

WILD = (
    "nan", "inf", "-inf", "1e999", "-1", "0", "1", "3", "0.5", "1e-300", "1e30", "9" * 5000,
    "None", "True", "[]", "()", "{}", "''", "'x'", "(1,)", "(1,2,3)", "('a',)", "[" * 200,
    "../../etc/passwd", "/dev/zero", "\0", "\x1b[31m", "\u202e", "é", "x" * 10_000, "1000000",
    "1000000000", "-0.0", "float32", "vggt/tokens", "images", "text", "2**99", "lambda: 0",
)  # fmt: skip


def _any_change_is_allowed(before: Any, after: Any, done: Damage, folder: Path) -> str:
    return ""  # a changed text may be a valid text with another meaning


# --- Answers of data sets -------------------------------------------------------------------------

_PROMPTS = [
    ["object_abs_distance", "<image>\nHow far is the bed (in meters)?", "2.5 m"],
    ["object_size_estimation", "How long is it in inches?\nPlease answer", "30 inches"],
    ["object_rel_distance", "Which?\nOptions:\nA. chair\nB. table", "B. table"],
    ["room_size_estimation", "How large is this room, in square feet?", "200 sq ft"],
]


def _write_prompts(folder: Path) -> None:
    lines = [json.dumps(prompt, ensure_ascii=False) for prompt in _PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")


def _read_prompts(folder: Path) -> list:
    from geode_jax.exports.files import json_lines
    from geode_jax.sources.datasets.answers import question_fields, read_prompt, text_of
    from geode_jax.sources.datasets.questions import MisfitError

    found = []
    for _, record in json_lines(folder / "prompts.jsonl"):
        if not isinstance(record, list) or len(record) != 3:
            found.append("no record")
            continue
        kind, text, answer = record
        try:
            question, options = read_prompt(text_of(text, "question"))
            fields = question_fields(str(kind), question, text_of(answer, "answer"), options)
        except MisfitError as misfit:
            fields = {"misfit": str(misfit)}
        value = fields.get("value", 1.0)
        assert isinstance(value, float) and abs(value) < float("inf"), fields
        found.append(fields)
    return found


# --- Small languages ------------------------------------------------------------------------------


def _text(path: Path) -> str:
    """Returns the text of a file, or "none" if it is no regular file."""
    return path.read_bytes().decode(errors="replace") if path.is_file() else "none"


def _write_words(folder: Path) -> None:
    (folder / "mixture.txt").write_text("scanqa=2,own=0.5,vsi590k=1")


def _read_mixture(folder: Path) -> dict:
    from geode_jax.data.mixture import parse_mixture

    weights = parse_mixture(_text(folder / "mixture.txt"))
    assert all(0 <= weight < float("inf") for weight in weights.values()), weights
    return weights


def _write_topology(folder: Path) -> None:
    (folder / "topology.txt").write_text("v5p:4x4x4")


def _read_topology(folder: Path) -> Any:
    from geode_jax.plan.topology import parse_topology

    found = parse_topology(_text(folder / "topology.txt"))
    return [found.chip.name, found.shape, found.size]


# --- Configurations -------------------------------------------------------------------------------

CONFIGS = ("hidden_cot", "geode_pretrain", "geode_drm", "geode_joint", "geode_align")


@functools.cache
def _fields(name: str) -> list[str]:
    from geode_jax.runs.config import flat
    from geode_jax.runs.config_file import read_settings

    values = read_settings(f"configs/{name}.py").values
    return [field.replace("/", ".") for field in flat(values)]


_INTACT = bytes(range(64))


def _write_draw(folder: Path) -> None:
    (folder / "draw.txt").write_bytes(_INTACT)


def _drawn(folder: Path) -> random.Random | None:
    """Returns a generator seeded by the damaged file, None if it is intact."""
    path = folder / "draw.txt"
    data = path.read_bytes() if path.is_file() else b""
    return random.Random(zlib.crc32(data)) if data != _INTACT else None


def _read_flags(folder: Path) -> list:
    """Reads the command line of training, up to the model's shapes, which needs no compilation."""
    from geode_jax.cli import flags

    draw = _drawn(folder)
    name, argument, changed = "hidden_cot", "", []
    if draw:
        name, count = draw.choice(CONFIGS), draw.choice((1, 1, 2))
        fields = [(draw.choice(_fields(name)), draw.choice(WILD)) for _ in range(count)]
        changed = [f"--config.{field}={value}" for field, value in fields]
        argument = draw.choice(("", "", "", ":thinking=2", ":drm=off", f":{draw.choice(WILD)}"))
    _parse([f"--config=configs/{name}.py{argument}", *changed])
    from geode_jax.runs.config import make_settings

    config = flags.CONFIG.value

    make_settings(config)
    config.data.export = str(_export())
    if "init_from" in config:
        config.init_from = ""  # no run to start from here
    _build_to_shapes(make_settings(config), folder / "run")
    return changed


def _parse(arguments: list[str]) -> None:
    from geode_jax.cli import flags

    # As in a new process: ml_collections defines a flag for every override in the arguments.
    for name in [name for name in flags.flags.FLAGS if name.startswith("config.")]:
        delattr(flags.flags.FLAGS, name)
    sys.argv = ["main", *arguments]
    flags.read_flags(sys.argv)


def _export() -> Path:
    from tests.helpers.runs import tiny_rooms

    return shared("tiny_rooms", lambda folder: tiny_rooms(folder / "rooms", images=32)) / "rooms"


def _build_to_shapes(settings, workdir: Path) -> None:
    """Builds objective, shapes of the model and optimizer as `runs.build` does, without values."""
    from geode_jax.exports import Export
    from geode_jax.runs.data import make_pipelines, prepare_tokenizer
    from geode_jax.sharding import make_mesh
    from geode_jax.training.optimizer import make_optimizer
    from geode_jax.training.step import blueprint

    export = Export(settings.data.export)
    tokenizer = prepare_tokenizer(settings, export, workdir)
    pipelines = make_pipelines(settings, export, tokenizer)
    steps = settings.train.steps or settings.train.epochs * pipelines["train"].steps_per_epoch
    objective = settings.system.make_objective(settings, export, tokenizer, pipelines["train"])
    optimizer = settings.optimizer.over(steps)
    blueprint(objective, functools.partial(make_optimizer, optimizer), make_mesh())


def _read_changes(folder: Path) -> list:
    """Reads `geode-jax plan --set FIELD=VALUE`."""
    from geode_jax.runs.config_file import read_settings

    draw = _drawn(folder)
    name, changes = "hidden_cot", []
    if draw:
        name = draw.choice(CONFIGS)
        field = draw.choice((*_fields(name), "nothing", "", "model", "model.", "train.steps.x"))
        changes = [f"{field}{draw.choice(('=', '=', '', '=='))}{draw.choice(WILD)}"]
    read_settings(f"configs/{name}.py", changes)
    return changes


_PROGRAMS = {
    "no function": "x = 1\n",
    "nothing": "",
    "syntax": "def get_config(:\n",
    "raises": "def get_config(arg=''):\n    raise RuntimeError('a\\nb')\n",
    "exits": "import sys\n\ndef get_config(arg=''):\n    sys.exit('no')\n",
    "exits at once": "raise SystemExit(0)\n",
    "interrupts": "def get_config(arg=''):\n    raise GeneratorExit\n",
    "recursion": "def get_config(arg=''):\n    return get_config(arg)\n",
    "a list": "def get_config(arg=''):\n    return [1]\n",
    "a dict": "def get_config(arg=''):\n    return {'system': 'hidden_cot'}\n",
    "None": "def get_config(arg=''):\n    return None\n",
    "empty": "import ml_collections\n\ndef get_config(arg=''):\n"
    "    return ml_collections.ConfigDict()\n",
    "another system": "import ml_collections\n\ndef get_config(arg=''):\n"
    "    return ml_collections.ConfigDict({'system': 'x'})\n",
    "half": "import ml_collections\n\ndef get_config(arg=''):\n"
    "    return ml_collections.ConfigDict({'system': 'hidden_cot', 'seed': 0})\n",
    "a number": "import ml_collections\n\ndef get_config(arg=''):\n"
    "    return ml_collections.ConfigDict({'system': 7})\n",
    "no arguments": "def get_config():\n    return None\n",
    "imports": "import no_such_module\n",
    "a string": "get_config = 'x'\n",
}


def _write_program(folder: Path) -> None:
    _write_draw(folder)
    (folder / "program.py").write_text(
        "from configs.hidden_cot import get_config as given\n\n\n"
        "def get_config(arg=''):\n    config = given(arg)\n    config.train.steps = 5\n"
        "    return config\n"
    )


def _read_program(folder: Path) -> list:
    from geode_jax.runs.config import make_settings

    draw = _drawn(folder)
    program = folder / "program.py"
    if draw and draw.random() < 0.5 and not program.is_dir():
        program.unlink(missing_ok=True)
        program.write_text(_PROGRAMS[draw.choice(list(_PROGRAMS))])
    if draw and draw.random() < 0.3:
        try:
            command(["plan", "--config", program, "--topology", "v5p:0x0"])
        except Refused:
            raise
        return []
    _parse([f"--config={program}"])
    from geode_jax.cli import flags

    make_settings(flags.CONFIG.value)
    return [flags.CONFIG.value.train.steps]


TARGETS = {
    "texts/answers": Target(_write_prompts, _read_prompts, 3, silent=_any_change_is_allowed),
    "texts/mixture": Target(_write_words, _read_mixture, 1, silent=_any_change_is_allowed),
    "texts/topology": Target(_write_topology, _read_topology, 0.5, silent=_any_change_is_allowed),
    "config/flags": Target(_write_draw, _read_flags, 2, silent=_any_change_is_allowed),
    "config/set": Target(_write_draw, _read_changes, 1.5, silent=_any_change_is_allowed),
    "config/program": Target(_write_program, _read_program, 1, silent=_any_change_is_allowed),
}
"""The targets of this module by name."""
