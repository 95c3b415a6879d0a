"""Progress bars on stderr; a line now and then where stderr is not a terminal."""

import sys
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30
"""Time between two lines of a bar in a log."""


class _Lines:
    """Writes the states of a bar as lines, without the carriage returns that redraw a bar."""

    def __init__(self, file):
        self._file = file

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            self._file.write(f"{text}\n")

    def flush(self) -> None:
        self._file.flush()


def progress_bar(iterable: Any = None, **settings: Any) -> tqdm:
    """Returns a bar of tqdm with the given settings; it is first drawn after the first step.

    Compilation before the first step may print warnings, which would break the bar's line.
    """
    settings = {"dynamic_ncols": True, "delay": 1e-3, **settings}
    if not sys.stderr.isatty():
        slow = {"mininterval": LINE_SECONDS, "maxinterval": 2 * LINE_SECONDS, "miniters": 1}
        slow |= {"delay": LINE_SECONDS, "dynamic_ncols": False, "ncols": 100}
        settings |= slow | {"file": _Lines(sys.stderr)}
    return tqdm(iterable, **settings)
