"""Trains a system: python -m geode_jax.main --config=configs/hidden_cot.py [--workdir=DIR].

`geode-jax train` is the same command.
"""

import sys

from absl import flags

from geode_jax.cli import flags as training_flags

flags.adopt_module_key_flags(training_flags)  # --help lists them

if __name__ == "__main__":
    training_flags.run(sys.argv)
