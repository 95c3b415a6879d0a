"""Finds the devices of JAX, and reports in one line why there are none.

JAX is imported only where devices are needed, so that checking a folder does not wait for it.
"""

import logging
import os
import sys
from pathlib import Path

from geode_jax.exports.files import UserError, one_line

_refused: list[str] = []
"""Reasons of JAX's plug-ins that did not start."""


def _keep_reason(record: logging.LogRecord) -> bool:
    """Returns whether to print a record; keeps, instead, the reason of a plug-in's traceback."""
    message = record.getMessage() if record.args or not record.exc_info else str(record.msg)
    if not message.startswith("Jax plugin configuration error"):
        return True
    error = record.exc_info[1] if record.exc_info else None
    _refused.append(one_line(str(error or message), 200))
    return False


# `geode-jax plan` uses the compiler of the GPU plug-in, which starts only where there is a GPU.
logging.getLogger("jax._src.xla_bridge").addFilter(_keep_reason)


def find_devices() -> list:
    """Returns the devices of all processes; call it before anything else that needs a device.

    Raises:
        UserError: there are no devices of the platform that JAX_PLATFORMS names.
    """
    import jax

    try:
        found = jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where a plug-in is missing
        first = str(error).strip().splitlines()[:1]
        reasons = [*_refused, *first] or ["there is no plug-in of JAX for it, or no device"]
        # JAX adds this attribute when it is imported, so its stubs lack it.
        wanted = jax.config.jax_platforms or "any"  # pyright: ignore[reportAttributeAccessIssue]
        raise UserError(f"JAX_PLATFORMS={wanted}: no such device: {'; '.join(reasons)}") from None
    if _refused and found[0].platform == "cpu" and Path("/proc/driver/nvidia").exists():
        asked_for_cpu = "cpu" in os.environ.get("JAX_PLATFORMS", "")
        if not asked_for_cpu:
            print(f"warning: the GPU is not used: {_refused[0]}", file=sys.stderr)
    _refused.clear()
    return found
