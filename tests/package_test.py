"""The package as installed: versions, dependencies, entry point, and what importing it costs."""

import ast
import importlib.metadata
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import geode_jax

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"]]
PYTHON = ".".join(map(str, sys.version_info[:2]))
CARD = {
    "absl-py",
    "flax",
    "grain",
    "jax",
    "ml-collections",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "transformers",
}
# Named by extras: `torch`, imported by parity tests and by readers of PyTorch's own files; `int8`.
OPTIONAL = {"av", "torch", "qwix"}


def required(python: str) -> dict[str, Requirement]:
    """Distribution -> requirement for a Python version such as "3.12"; refuses a second one."""
    chosen: dict[str, Requirement] = {}
    for requirement in REQUIREMENTS:
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            name = canonicalize_name(requirement.name)
            assert name not in chosen, f"{name} is required twice on Python {python}"
            chosen[name] = requirement
    return chosen


def sources() -> list[Path]:
    return sorted((REPOSITORY / "geode_jax").rglob("*.py"))


def imported(source: Path) -> set[str]:
    """Top-level names of the absolute imports anywhere in a file, functions included."""
    roots = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots.add(node.module.partition(".")[0])
    return roots


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_versions_of_jax_and_flax_are_one_coherent_set(python):
    chosen = required(python)
    assert set(chosen) >= CARD
    jax, flax = chosen["jax"].specifier, chosen["flax"].specifier
    if python == "3.11":
        candidates = {"0.10.0", "0.10.1", "0.10.2", "0.11.1", "0.12.0.1"}
        assert set(jax.filter(candidates)) == {"0.10.2"}
        assert set(flax.filter({"0.12.7", "0.12.8", "0.12.9", "0.12.12"})) == {"0.12.8"}
    else:
        assert set(jax.filter({"0.10.2", "0.11.0", "0.11.1", "0.12.0.1"})) == {"0.11.1", "0.12.0.1"}
        assert set(flax.filter({"0.12.8", "0.12.9", "0.12.12"})) == {"0.12.9", "0.12.12"}


@pytest.mark.parametrize("name", sorted(required(PYTHON)))
def test_installed_version_is_the_required_one(name):
    requirement = required(PYTHON)[name]
    assert requirement.specifier.contains(importlib.metadata.version(name), prereleases=True)


def test_torch_is_asked_for_on_python_3_11_only():
    (torch,) = map(Requirement, PROJECT["optional-dependencies"]["torch"])
    assert str(torch.specifier) == "==2.13.0"
    answers = [torch.marker.evaluate({"python_version": p}) for p in ("3.11", "3.12", "3.13")]
    assert answers == [True, False, False]


def test_console_script_resolves():
    assert callable(pkgutil.resolve_name(PROJECT["scripts"]["geode-jax"]))


def test_installed_distribution_is_this_checkout():
    try:
        distribution = importlib.metadata.distribution("geode-jax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("geode-jax is not installed here, only importable")
    assert distribution.version == geode_jax.__version__
    scripts = distribution.entry_points.select(group="console_scripts", name="geode-jax")
    assert [script.value for script in scripts] == [PROJECT["scripts"]["geode-jax"]]


def test_every_import_is_declared():
    providers = importlib.metadata.packages_distributions()
    declared = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}
    known = set(sys.stdlib_module_names) | {"geode_jax"} | OPTIONAL
    undeclared = {
        f"{source.relative_to(REPOSITORY)}: {root}"
        for source in sources()
        for root in imported(source) - known
        if declared.isdisjoint(map(canonicalize_name, providers.get(root, [])))
    }
    assert not undeclared


def test_no_source_imports_tensorflow_or_pickle():
    banned = {"tensorflow", "pickle", "cloudpickle", "dill"}
    assert {str(s): imported(s) & banned for s in sources() if imported(s) & banned} == {}


def test_importing_everything_warns_of_nothing_and_needs_no_tensorflow(tmp_path):
    """A stand-in TensorFlow tells on whoever imports it, inside try/except ImportError too."""
    stand_in = tmp_path / "tensorflow" / "__init__.py"
    stand_in.parent.mkdir()
    stand_in.write_text("raise SystemExit('tensorflow was imported')\n")
    modules = [
        re.sub(r"(/__init__)?\.py$", "", str(source.relative_to(REPOSITORY))).replace("/", ".")
        for source in sources()
        if source.parent.name != "remote"  # for another environment, with torch
    ]
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import {', '.join(modules)}"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
