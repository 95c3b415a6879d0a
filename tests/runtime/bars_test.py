"""Progress without a terminal: lines, and no carriage return."""

import io
import sys

from geode_jax.runtime import bars


def test_a_log_gets_lines(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(bars, "LINE_SECONDS", 0.0)
    assert list(bars.progress_bar(range(50), desc="steps")) == list(range(50))
    text = log.getvalue()
    assert "\r" not in text and "\x1b" not in text
    assert len(text.splitlines()) > 50 and "steps: 100%" in text.splitlines()[-1]
    monkeypatch.setattr(bars, "LINE_SECONDS", 30.0)
    for _ in bars.progress_bar(range(10_000), leave=False):
        pass
    assert log.getvalue() == text  # what is done at once says nothing
