"""Exports for the tests of the contract."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.contract import write


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Path:
    """Returns an export that tests read or copy but do not change."""
    return write(tmp_path_factory.mktemp("exports") / "pristine")


@pytest.fixture
def export(pristine, tmp_path) -> Path:
    """Returns a copy that the test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "export"))


@pytest.fixture(scope="module")
def workbench(pristine, tmp_path_factory) -> Path:
    """Returns a copy for property tests; each example first replaces the files that it needs."""
    return Path(shutil.copytree(pristine, tmp_path_factory.mktemp("exports") / "workbench"))
