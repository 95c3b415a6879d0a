"""The array contract. The package can be loaded by path in other projects' environments.

* `contract` specifies the tensors, `records` the JSON files, `kinds` the kinds of questions.
* `reader`, `writer` and `validation` read, write and check an export.
* `files` reads and writes small files, `pictures` reads pictures.
* `scene_names` matches names of scenes, `cameras` checks whether cameras are plausible, `frames`
  transforms a VGGT reconstruction, `alignment` fits one to a metric world.
* `prompts` words the questions for the model, `units` reads numbers with units, `question_rules`
  finds contradictions in a question.
* `made_from` detects that the source of a scene has changed.

The package stands alone: Python 3.9, numpy and safetensors (tqdm for the progress bar if
installed), relative imports only. `pictures` needs Pillow, so it is not imported here.
"""

from . import (
    alignment,
    cameras,
    files,
    frames,
    kinds,
    made_from,
    prompts,
    question_rules,
    scene_names,
    units,
)
from .contract import (
    PROBABILITY_TOLERANCE,
    ROTATION_TOLERANCE,
    SCHEMA_VERSION,
    SPECS,
    SPLITS,
    ExportError,
    TensorSpec,
)
from .files import UserError
from .kinds import NUMERIC_KINDS, RELATIONS
from .reader import Export
from .validation import format_summary, validate
from .writer import ExportWriter, write_scene

__all__ = [
    "NUMERIC_KINDS",
    "PROBABILITY_TOLERANCE",
    "RELATIONS",
    "ROTATION_TOLERANCE",
    "SCHEMA_VERSION",
    "SPECS",
    "SPLITS",
    "Export",
    "ExportError",
    "ExportWriter",
    "TensorSpec",
    "UserError",
    "alignment",
    "cameras",
    "files",
    "format_summary",
    "frames",
    "kinds",
    "made_from",
    "prompts",
    "question_rules",
    "scene_names",
    "units",
    "validate",
    "write_scene",
]
