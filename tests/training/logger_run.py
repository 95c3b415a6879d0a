"""Prints the level of absl's logger and its messages around the import and use of checkpoints."""

import logging
import sys
from pathlib import Path

import absl.logging
from orbax.checkpoint import v1 as ocp

assert ocp  # imported first: what it does to the logger is not this package's change
logger = logging.getLogger("absl")
logger.handlers = [logging.StreamHandler(sys.stdout)]
logger.propagate = False
logger.setLevel(logging.INFO)

from geode_jax.training.checkpoint import Checkpoints  # noqa: E402

with Checkpoints(Path(sys.argv[1])):
    absl.logging.info("a message of another library")
print(logger.level)
