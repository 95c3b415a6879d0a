"""Writes the commit into wheels and archives; everything else stands in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

VERSION = runpy.run_path(str(Path(__file__).parent / "geode_jax" / "version.py"))


def stamp(package: Path) -> None:
    """Writes the file that `geode_jax.version.commit` reads."""
    (package / VERSION["STAMP"]).write_text(VERSION["commit"]() + "\n")


class BuildPackage(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # there, git knows
            stamp(Path(self.build_lib) / "geode_jax")


class BuildArchive(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        stamp(Path(base_dir) / "geode_jax")


setup(cmdclass={"build_py": BuildPackage, "sdist": BuildArchive})
