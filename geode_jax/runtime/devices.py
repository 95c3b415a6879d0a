"""The devices that JAX finds, and in one line why it finds none.

JAX is imported by what needs devices alone: checking a folder shall not wait for it.
"""

import logging
import os
import sys
from pathlib import Path

from geode_jax.exports.files import UserError, one_line

_refused: list[str] = []
"""What plug-ins of JAX say of why they do not start."""


def _keep_reason(record: logging.LogRecord) -> bool:
    """Whether JAX's record is to be printed: not the traceback of a plug-in that does not start."""
    said = record.getMessage() if record.args or not record.exc_info else str(record.msg)
    if not said.startswith("Jax plugin configuration error"):
        return True
    error = record.exc_info[1] if record.exc_info else None
    _refused.append(one_line(str(error or said), 200))
    return False


# `geode-jax plan` needs the compiler in a plug-in of GPUs, which starts only where there is one.
logging.getLogger("jax._src.xla_bridge").addFilter(_keep_reason)


def find_devices() -> list:
    """All devices of all processes; call before anything else that needs one.

    Raises:
        UserError: there are none of the platform that JAX_PLATFORMS names.
    """
    import jax

    try:
        found = jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where a plug-in is missing
        first = str(error).strip().splitlines()[:1]
        reasons = [*_refused, *first] or ["there is no plug-in of JAX for it, or no device"]
        wanted = jax.config.jax_platforms or "any"
        raise UserError(f"JAX_PLATFORMS={wanted}: no such device: {'; '.join(reasons)}") from None
    if _refused and found[0].platform == "cpu" and Path("/proc/driver/nvidia").exists():
        asked_for_cpu = "cpu" in os.environ.get("JAX_PLATFORMS", "")
        if not asked_for_cpu:
            print(f"warning: the GPU is not used: {_refused[0]}", file=sys.stderr)
    _refused.clear()
    return found
