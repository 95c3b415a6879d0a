"""Exports that the tests of the contract read and damage."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.contract import write


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Path:
    """An export that tests read or copy, never change."""
    return write(tmp_path_factory.mktemp("exports") / "pristine")


@pytest.fixture
def export(pristine, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "export"))


@pytest.fixture(scope="module")
def workbench(pristine, tmp_path_factory) -> Path:
    """A copy that property tests damage; each example replaces what it needs first."""
    return Path(shutil.copytree(pristine, tmp_path_factory.mktemp("exports") / "workbench"))
