"""The documents against the code: links, commands, parameters, paths, packages, versions."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from infra import architecture
from infra.site import code_links
from tests.support import documents
from tests.support.documents import ROOT

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
DOCUMENTS += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
CHECKED = [name for name in DOCUMENTS if name not in ("README.md", "CHANGELOG.md")]
"""The commands of README.md have a test of their own; those of the changelog were right when they were written."""
COMMANDS = sorted({(name, command) for name in CHECKED for command in documents.commands(TEXTS[name])})
MADE = ("data/", "outputs/", "reports/", "captions/")
GENERATED = {"tour.md", "reference/parameters.md", "reference/api/models.md"}
"""Pages that exist in the built site only."""
RENAMED = {"image.size"}
"""Parameters of earlier versions, which the changelog names."""


def keys(document: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of every key of a parameter file."""
    for name, value in document.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", documents.without_blocks(text), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def inline(name: str) -> list[str]:
    """The inline code of a document."""
    return re.findall(r"`([^`\n]+)`", documents.without_blocks(TEXTS[name]))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files_and_headings(name):
    for link in re.findall(r"\]\(([^)]+)\)", code_links.CODE.sub("", TEXTS[name])):
        if link.startswith("https://") or link in GENERATED:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if target.suffix == ".py":
            assert not anchor or code_links.line_of(target.resolve().relative_to(ROOT).as_posix(), anchor)
            continue
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_command_has_a_form_that_its_program_takes(name, command, tmp_path):
    documents.require_form(command, tmp_path)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_blocks_are_of_known_kinds_and_parse(name):
    for kind, block in documents.blocks(TEXTS[name]):
        assert kind in ("bash", "python", "mermaid", "text", "yaml"), block
        if kind == "python":
            compile(block, name, "exec")
        if kind == "yaml":
            assert isinstance(yaml.safe_load(block), dict), block


@pytest.mark.parametrize("name", DOCUMENTS)
def test_parameters_exist(name):
    named = ("base.yaml", "digits_ect.yaml", "flickr_control_tiny.yaml")  # train.distil and encode.control are null
    presets = [ROOT / "tasks" / "presets" / name for name in named]
    known = {key for preset in presets for key in keys(yaml.safe_load(preset.read_text(encoding="utf-8")))}
    sections = "|".join(sorted(key for key in known if "." not in key))
    code = " ".join([*inline(name), *(block for kind, block in documents.blocks(TEXTS[name]) if kind == "bash")])
    found = set(re.findall(rf"(?<![\w./-])((?:{sections})(?:\.[a-z0-9_]+)+)(?![\w/-]|\.[a-z])", code))
    files = {key for key in found if re.search(r"\.(py|json|csv|md|png|yaml)$", key)}
    assert not found - known - files - RENAMED


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_of_the_repository_exist(name):
    for code in inline(name):
        for path in re.findall(r"(?<![\w/.-])((?:tasks|models|flows|infra|tests|docs|mlflow)/[\w./-]*)", code):
            assert "NAME" in path or (ROOT / path.rstrip("/.")).exists(), path


def test_readme_stays_short():
    assert len(TEXTS["README.md"].splitlines()) < 250


def test_the_diagram_of_packages_is_what_the_imports_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = TEXTS["docs/architecture.md"]
    assert architecture.updated(text, architecture.diagram()) == text, "run 'python -m infra.architecture'"


def test_the_table_of_packages_names_every_package():
    named = set(re.findall(r"^\| `((?:tasks|models)[\w.]*)` \|", TEXTS["docs/architecture.md"], re.M))
    markers = [
        path.parent.relative_to(ROOT) for top in ("tasks", "models") for path in (ROOT / top).rglob("__init__.py")
    ]
    assert named == {".".join(folder.parts) for folder in markers} - {"tasks"}


def test_the_table_of_stages_names_every_stage():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    table = TEXTS["docs/architecture.md"].partition("## The chain")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == set(stages)


def test_the_citation_has_the_version_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == project["version"] and citation["license"] == project["license"]
