"""The array contract, and what it stands on; loaded by path in other projects' environments, too.

`contract` is the contract itself, `files` reads and writes small files, `scene_names` knows which
scene a name means, `cameras` what a pinhole camera can be, `prompts` has the words in which
questions are put, `units` reads numbers with units, `question_rules` finds contradictions in a
question, `made_from` knows what scenes were made from, and `frames` has the frame of a VGGT
reconstruction. The package stands alone: Python 3.9, numpy and safetensors (tqdm for the progress
bar when installed), relative imports only; `pictures`, which needs Pillow, is imported by name.
"""

from . import cameras, files, frames, made_from, prompts, question_rules, scene_names, units
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
    "cameras",
    "files",
    "format_summary",
    "frames",
    "made_from",
    "prompts",
    "question_rules",
    "scene_names",
    "units",
    "validate",
    "write_scene",
]
