"""The documentation: its commands parse, its links lead somewhere, its examples run, it builds."""

import argparse
import copy
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from absl import flags
from ml_collections import config_flags

from geode_jax import exports
from geode_jax.sources.datasets import Request
from geode_jax.sources.datasets.prepare import prepare

MAIN = importlib.import_module("geode_jax.cli.flags")  # defines the flags of training
REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "launch/*.md", "third_party/**/*.md")
    for path in REPOSITORY.glob(pattern)
)
SCRIPT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"][
    "geode-jax"
]
TARGETS = set(re.findall(r"^## make (\S+)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
# ml_collections loads a configuration by a function that Python is about to drop.
LOADS_CONFIGS = pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, without their indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"(?m)^{indent}", "", code) for indent, code in found]


def command_lines(page: Path) -> list[list[str]]:
    """The words of every command in a page's bash blocks and indented lines."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(text, "bash") for line in joined(block)]
    lines += joined(
        "\n".join(re.findall(r"^    ((?:geode-jax|python -m) .*)$", text, re.MULTILINE))
    )
    return [words for line in lines for words in parts(line)]


def mentions(page: Path) -> list[list[str]]:
    """The words of every command that the text names, often without what it requires."""
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"`((?:geode-jax|make) [^`]+)`", prose)
    return [shlex.split(command) for command in found]


def joined(text: str) -> list[str]:
    """Lines, with those that end with a backslash continued."""
    return re.sub(r"\\\n\s*", " ", text).splitlines()


def parts(line: str) -> list[list[str]]:
    """A shell line's commands, apart, without variables that are set before them."""
    found: list[list[str]] = [[]]
    for word in shlex.split(line, comments=True):
        if word in ("&&", ";", "|", "--"):
            found.append([])
        elif found[-1] or not re.match(r"[A-Z_]+=", word):
            found[-1].append(word)
    return [words for words in found if words]


class _ParsedError(Exception):
    """Raised instead of running a command whose arguments were read."""


def parse_geode_jax(words: list[str], monkeypatch, capsys) -> None:
    """Reads the arguments with the command's own parser and runs nothing."""
    read = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        read(self, *args, **kwargs)
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    try:
        pkgutil.resolve_name(SCRIPT)(words)
    except _ParsedError:
        return
    except SystemExit as end:
        assert end.code == 0, capsys.readouterr().err
    finally:
        monkeypatch.undo()


def parse_main(words: list[str]) -> None:
    """Reads the arguments of training with flags of its kinds, the configuration included."""
    if words == ["--help"]:
        return
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=words)
    for flag in flags.FLAGS.get_flags_for_module(MAIN):
        if flag.name != "config":
            values[flag.name] = copy.deepcopy(flag)
    assert values(["main", *words]) == ["main"]
    assert values.config.system


def check_command(words: list[str], monkeypatch, capsys) -> None:
    program, *rest = words
    if program == "geode-jax":
        parse_geode_jax(rest, monkeypatch, capsys)
    elif program == "make":
        goals = [word for word in rest if not word.startswith("-") and "=" not in word]
        assert set(goals) <= TARGETS
        given = dict(word.split("=", 1) for word in rest if "=" in word)
        if {"CONFIG", "ARGS"} & set(given) and goals == ["train"]:
            config = given.get("CONFIG", "configs/hidden_cot.py")
            parse_main([f"--config={config}", *shlex.split(given.get("ARGS", ""))])
    elif program.startswith("python") and rest[:1] == ["-m"]:
        if rest[1] == "geode_jax.main":
            parse_main(rest[2:])
        elif rest[1] not in ("pytest", "venv", "pip"):
            assert importlib.util.find_spec(rest[1]), f"no module {rest[1]}"
    elif program == "python" and rest[0].startswith(("third_party/", "launch/", "docs/")):
        assert (REPOSITORY / rest[0]).is_file(), f"no file {rest[0]}"
    for word in words:
        path = re.match(r"(?:--config=)?(configs/\w+\.py)", word)
        assert path is None or (REPOSITORY / path[1]).is_file(), f"no file {word}"


@LOADS_CONFIGS
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_is_accepted_by_its_own_parser(page, monkeypatch, capsys):
    for words in command_lines(page):
        monkeypatch.chdir(REPOSITORY)
        try:
            check_command(words, monkeypatch, capsys)
        except Exception as error:
            raise AssertionError(f"{shlex.join(words)}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_that_the_text_names_has_these_options(page, monkeypatch, capsys):
    for words in mentions(page):
        options = {word for word in words if word.startswith("--")}
        named = [word for word in words if not word.startswith("-") and word != "..."]
        if words[0] == "make":
            check_command(named, monkeypatch, capsys)
            continue
        capsys.readouterr()
        parse_geode_jax([*named[1:3], "--help"], monkeypatch, capsys)
        missing = options - set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        assert not missing, f"{shlex.join(words)}: no {missing}"


@pytest.mark.parametrize(
    "line", ["geode-jax rooms --sceens 3 --out DIR", "geode-jax nosuch", "make tain"]
)
def test_a_wrong_command_is_noticed(line, monkeypatch, capsys):
    with pytest.raises(AssertionError):
        check_command(shlex.split(line), monkeypatch, capsys)


@LOADS_CONFIGS
def test_a_wrong_flag_or_field_of_training_is_noticed(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    parse_main(["--config=configs/hidden_cot.py:thinking=0", "--config.train.steps=5", "--profile"])
    for wrong in ("--wrkdir=runs/x", "--config.train.step=5", "--config.train.steps=many"):
        with pytest.raises(Exception, match=r"wrkdir|step"):
            parse_main(["--config=configs/hidden_cot.py", wrong])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_and_picture_is_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path = target.partition("#")[0]
            assert not path or (page.parent / path).exists(), f"{name_of(page)}: {target}"


def test_every_file_that_a_page_names_is_there():
    named = {
        (name_of(page), path)
        for page in PAGES
        if page.name != "CHANGELOG.md"
        for path in re.findall(
            r"`((?:geode_jax|configs|launch|third_party|tests)/[\w/.-]+\.\w+)`", page.read_text()
        )
    }
    invented = {"my_qa.py", "x.py", "x_test.py"}  # of the worked examples
    missing = {(page, path) for page, path in named if not (REPOSITORY / path).is_file()}
    assert not {one for one in missing if Path(one[1]).name not in invented}


def test_every_module_of_the_api_page_is_there():
    names = re.findall(r"^::: (\S+)$", (DOCS / "reference" / "api.md").read_text(), re.MULTILINE)
    assert len(names) > 20 and len(names) == len(set(names))
    assert [name for name in names if not importlib.util.find_spec(name)] == []


def test_the_readme_is_a_front_page():
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for link in ("2605.09719", "2511.11239", "facebookresearch/vggt", "facebookresearch/sonata"):
        assert link in text
    assert "thinking-in-space" in text and "CPUs only" in text


def test_citation_file_has_what_the_format_requires():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["message"] and citation["title"] and citation["license"] == "Apache-2.0"
    for work in (citation, *citation["references"]):
        assert work["title"] and work["type"]
        assert all("name" in one or "family-names" in one for one in work["authors"])
    assert [work["url"][-10:] for work in citation["references"]] == ["2605.09719", "2511.11239"]


def documented_fields(*headings: str) -> set[str]:
    """Fields in the first column of tables; a name without a section has that of the row's first.

    `model.decoder.*` stands for all fields of that section.
    """
    text = (DOCS / "reference" / "configurations.md").read_text()
    found = set()
    for heading in headings:
        table = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
            names = re.findall(r"`([\w.*]+)`", row)
            section = names[0].rpartition(".")[0]
            found |= {n if "." in n or not section else f"{section}.{n}" for n in names}
    return found


@pytest.mark.parametrize(
    ("config", "heading"),
    [("hidden_cot", "Fields of the Hidden-CoT student"), ("geode_joint", "Fields of GEODE")],
)
def test_every_field_of_a_configuration_is_documented_and_no_other(config, heading):
    def leaves(tree, prefix=""):
        for name, value in tree.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    tree = importlib.import_module(f"configs.{config}").get_config("full").to_dict()
    documented = documented_fields("Fields that both systems share", heading)
    whole = tuple(name[:-1] for name in documented if name.endswith(".*"))
    fields = {name for name in leaves(tree) if not name.startswith(whole)} - {"system"}
    assert fields == {name for name in documented if not name.endswith(".*")}


def test_every_tensor_of_the_contract_is_documented():
    text = (DOCS / "reference" / "array_contract.md").read_text()
    rows = [row for row in text.splitlines() if row.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([a-z_]+(?:/[a-z_]+)?)`", row)}
    assert set(exports.SPECS) <= named


@pytest.fixture(scope="module")
def tiny_rooms(tmp_path_factory):
    """An export of three rooms."""
    folder = tmp_path_factory.mktemp("docs") / "rooms"
    pkgutil.resolve_name(SCRIPT)(["rooms", "--scenes", "2", "--out", str(folder), "--workers", "1"])
    return folder


def test_every_field_of_a_question_is_documented():
    page = (DOCS / "how-to" / "questions.md").read_text()
    documented = re.findall(
        r"^\| `(\w+)` \|", page.partition("\n\nUnknown fields")[0], re.MULTILINE
    )
    braces = re.findall(r"\{([^}]*)\}", exports.ExportWriter.add_questions.__doc__)
    assert sorted(documented) == sorted(re.findall(r"\w+", " ".join(braces)))


class TestExamples:
    """The code that CONTRIBUTING and the pages show, run as it stands there."""

    contributing = (REPOSITORY / "CONTRIBUTING.md").read_text()

    def block(self, holds: str) -> str:
        (found,) = [code for code in blocks(self.contributing, "python") if holds in code]
        return found

    def test_a_loss(self):
        losses = importlib.import_module("geode_jax.objectives.losses")
        names = dict(vars(losses))
        exec(self.block("def depth_gradient"), names)
        depth, target = jnp.array([[1.0, 2.0, 4.0, jnp.nan]]), jnp.array([[1.0, 1.0, 2.0, 3.0]])
        total, count = names["depth_gradient"](depth, target, jnp.isfinite(depth))
        assert (float(total), float(count)) == (2.0, 2.0)

    def test_a_question_kind(self):
        relations = importlib.import_module("geode_jax.sources.questions.relations")
        arrays = importlib.import_module("geode_jax.sources.rooms.arrays")
        scene = importlib.import_module("geode_jax.sources.rooms.scene")
        names = dict(vars(relations))
        exec(self.block("def taller"), names)
        seen = arrays.seen_room(*scene.make_and_observe(0, 0))
        random = np.random.default_rng(0)
        drafts = list(names["taller"](relations.Asker(seen, random, random)))
        assert drafts
        for draft in drafts:
            heights = {item["name"]: item["box"][5] for item in draft["objects"]}
            assert draft["answer"] == max(heights, key=heights.get)

    def test_a_reader(self, tiny_rooms, tmp_path, monkeypatch):
        datasets = importlib.import_module("geode_jax.sources.datasets.prepare")
        module = types.ModuleType("geode_jax.sources.datasets.my_qa")
        exec(self.block("def my_qa"), vars(module))
        monkeypatch.setitem(datasets.SOURCES, "my-qa", vars(module)["my_qa"])
        scene = exports.Export(tiny_rooms).scene_ids("train")[0]
        asked = [{"scan": scene, "q": "Is it tidy?", "a": "yes"}, {"scan": scene, "q": "And now?"}]
        (tmp_path / "my_qa_train.json").write_text(json.dumps(asked))
        request = datasets.Request(tmp_path, tmp_path / "out", tiny_rooms)
        report = datasets.prepare("my-qa", request)
        assert report.kept["questions"] == 1 and sum(report.dropped.values()) == 1
        records = [one for one in exports.Export(tmp_path / "out").questions() if "source" in one]
        assert [(one["question"], one["answer"]) for one in records] == [("Is it tidy?", "yes")]

    def test_questions_of_ones_own(self, tiny_rooms, tmp_path):
        page = (DOCS / "how-to" / "questions.md").read_text()
        (lines,) = blocks(page, "json")
        old = exports.Export(tiny_rooms)
        (tmp_path / "mine.jsonl").write_text(
            lines.replace('"kitchen"', json.dumps(old.scene_ids()[0]))
        )
        request = Request(tmp_path / "mine.jsonl", tmp_path / "new", tiny_rooms)
        prepare("jsonl", request)
        questions = list(exports.Export(tmp_path / "new").questions())
        assert [one["id"] for one in questions[-2:]] == ["jsonl-kitchen-1", "jsonl-kitchen-2"]
        assert questions[:-2] == list(old.questions())

    @pytest.mark.slow  # needs a trained run
    def test_an_exported_run_answers_in_pytorch_as_in_jax(self, tiny_run, tmp_path, capsys):
        pytest.importorskip("torch")
        command = pkgutil.resolve_name(SCRIPT)
        out = tmp_path / "exported"
        command(["convert", "export", "--workdir", str(tiny_run.workdir), "--out", str(out)])
        scene = exports.Export(tiny_run.export).scene_ids("test")[0]
        (code,) = blocks((DOCS / "tutorials" / "export_to_pytorch.md").read_text(), "python")
        for name, value in (("DIR", out), ("EXPORT", tiny_run.export), ("SCENE", scene)):
            code = re.sub(rf"\b{name}\b", str(value), code)
        child = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd="/"
        )
        assert child.returncode == 0, child.stderr
        ((first, second),) = eval(child.stdout.splitlines()[-1])
        for question, said in (
            ("How many chair(s) are in this room?", first),
            ("Which is larger, the sofa or the cabinet?", second),
        ):
            capsys.readouterr()
            asked = ["--scene", scene, "--question", question, "--json"]
            command(["ask", "--workdir", str(tiny_run.workdir), *asked])
            assert json.loads(capsys.readouterr().out)["prediction"] == said


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[docs]'")
    child = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=REPOSITORY,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = r"<(?:link[^>]*rel=\"?stylesheet[^>]*href|script[^>]*src|img[^>]*src)=\"?(https?:)"
        assert not re.search(loaded, page.read_text()), f"{page.name} loads from the network"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """The first run of the tutorials, 60 rooms and 120 steps: about three minutes of CPU."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("NOTEBOOK_FOLDER", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.read(DOCS / "tutorials" / "first_run.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "committed with its outputs"
    nbclient.NotebookClient(notebook, timeout=1200).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2  # a room, and the loss
    assert (tmp_path / "run" / "report.html").exists()
