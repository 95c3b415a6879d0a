"""The array contract, and what it stands on; loaded by path in other projects' environments, too.

`contract` is the contract itself, `files` reads and writes small files, `prompts` has the words in
which questions are put, `units` reads numbers with units, and `frames` has the frame of a VGGT
reconstruction. The package stands alone: Python 3.9, numpy and safetensors (tqdm for the progress
bar when installed), relative imports only.
"""

from . import files, frames, prompts, units
from .contract import (
    NUMERIC_KINDS,
    PROBABILITY_TOLERANCE,
    RELATIONS,
    ROTATION_TOLERANCE,
    SCHEMA_VERSION,
    SPECS,
    SPLITS,
    Export,
    ExportError,
    ExportWriter,
    TensorSpec,
    format_summary,
    validate,
    write_scene,
)
from .files import UserError

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
    "files",
    "format_summary",
    "frames",
    "prompts",
    "units",
    "validate",
    "write_scene",
]
