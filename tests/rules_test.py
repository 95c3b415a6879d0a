"""Rules that keep faults from coming back: what may stand in which file, found as by grep.

CONTRIBUTING has the same table, in words. A rule's pattern is searched in every line of the
package, `third_party` and `launch`, but for the PyTorch files of `weights/remote`, which run
elsewhere.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES = [
    (path.relative_to(ROOT).as_posix(), number, line)
    for folder in ("geode_jax", "third_party", "launch")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "remote" not in path.parts
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
]

RULES = {
    # what is searched: names of the files that may have it
    r"\bImage\.open\(": {"pictures.py"},
    r"(?<!files)\.(read_text|read_bytes)\(": set(),
    r"(?<!files)\.(write_text|write_bytes)\(": set(),
    r"os\.replace\(|mkdtemp\(|NamedTemporaryFile\(|\bsave_file\(": {"files.py", "charts.py"},
    r"Path\.home\(|expanduser\(|XDG_CACHE_HOME": {"user_cache.py"},
    r"\bfcntl\b": {"lock.py"},
    r"\bsignal\.signal\(": {"stop.py", "workers.py", "local.py"},
    r"\btqdm\(": {"bars.py", "contract.py", "validation.py", "export_job.py"},
    r"\bAuto\w+\.from_pretrained\(": {"tokens.py", "card.py"},
    r"\bjax\.devices\(\)": {"devices.py"},
    r"\bos\.link\(|\bshutil\.copy": {"contract.py", "writer.py"},
    r"- encode_boxes\(": set(),
    r"\bml_collections\b|\bConfigDict\b": {"config.py", "config_file.py", "train.py", "flags.py"},
    r"(?<!--)(?<!self\.)\bconfig\.(data|model|loss|optimizer|train|eval)\.\w": set(),
    r"(==|!=|\bin) \W*(hidden_cot|geode_(pretrain|align|drm|joint))\b": set(),
    r"\bsystem(\.name)? (==|!=|in|not in) ": set(),
}


@pytest.mark.parametrize("pattern", RULES)
def test_a_rule_of_contributing_holds(pattern):
    broken = [
        f"{name}:{number}: {line.strip()}"
        for name, number, line in LINES
        if re.search(pattern, line) and Path(name).name not in RULES[pattern]
    ]
    assert not broken, "\n".join(broken)
    assert re.search(pattern, "\n".join(line for _, _, line in LINES)) or not RULES[pattern]
    assert f"`{pattern}`".replace("|", "\\|") in (ROOT / "CONTRIBUTING.md").read_text(
        encoding="utf-8"
    )
