"""The documentation site: formulas, links to the code, diagrams, the reference of parameters, and a strict build."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import yaml

from infra import reference
from infra.site import code_links, diagrams, formulas
from tasks.params import Params
from tests.support.documents import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))


class Loader(yaml.SafeLoader):
    """Reads `mkdocs.yml`, whose `!ENV` tags name variables."""


Loader.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node)[-1])


def test_a_formula_is_drawn_in_the_colour_of_the_text_with_its_source_as_text():
    drawn = formulas.drawn(r'<p>Let <span class="arithmatex">\(x_t &lt; \sqrt{1}\)</span> be</p>')
    element = ElementTree.fromstring(drawn).find("span")  # noqa: S314 - our own
    assert element.get("aria-label") == r"x_t < \sqrt{1}" and element.get("role") == "math"
    path = element.find("svg/path")
    assert path.get("d").startswith("M") and path.get("d").count("Z") >= 5, "x, t, <, the root and 1"
    assert path.get("fill") is None, "the style sheet gives it the colour of the text"


def test_the_baseline_of_a_formula_is_that_of_the_text():
    depth = {tex: float(re.search(r"vertical-align:(-?[\d.]+)em", formulas.svg(tex))[1]) for tex in ("x", "x_t")}
    assert depth["x_t"] < depth["x"] <= 0


def test_a_displayed_formula_is_a_block():
    assert formulas.drawn(r'<div class="arithmatex">\[x\]</div>').startswith('<div class="formula displayed"')


def test_punctuation_after_a_formula_stays_on_its_line():
    assert re.search(
        r'<span class="unbroken"><span class="formula".*</span>,</span> and',
        formulas.drawn(r'<span class="arithmatex">\(x\)</span>, and'),
    )


def test_a_formula_that_cannot_be_drawn_is_named():
    with pytest.raises(ValueError, match=r"cannot draw the formula.*\\begin"):
        formulas.svg(r"\begin{cases} a \end{cases}")


def test_links_to_code_have_the_line_of_the_definition():
    text = (ROOT / "models" / "noise" / "paths.py").read_text(encoding="utf-8").splitlines()
    for name, start in (
        ("to_x0", "def to_x0("),
        ("Level.log_snr", "    def log_snr("),
        ("CLEAN", "CLEAN = "),
        ("Level.alpha", "    alpha: float"),
    ):
        assert text[code_links.line_of("models/noise/paths.py", name) - 1].startswith(start)


def test_links_are_resolved_from_the_folder_of_their_page():
    others = "[b](reverse.md#x) [c](https://x.org/a.py) `[e](../../no.py)`"
    markdown = f"[a](../../models/noise/paths.py#to_x0) {others} [d](../../SECURITY.md)"
    line = code_links.line_of("models/noise/paths.py", "to_x0")
    resolved = code_links.resolved(markdown, "theory/forward.md", {"SECURITY.md": "security.md"})
    assert resolved == f"[a](code:models/noise/paths.py#{line}) {others} [d](../security.md)"


@pytest.mark.parametrize(
    ("link", "complaint"),
    [
        ("../models/noise/paths.py#nothing", "index.md: models/noise/paths.py defines no nothing"),
        ("../models/noise/paths.py#Level.nothing", "defines no Level.nothing"),
        ("../models/nothing.py", "index.md links to models/nothing.py, which is not a file"),
    ],
)
def test_a_dead_link_to_code_is_refused(link, complaint):
    with pytest.raises(code_links.DeadLinkError, match=complaint):
        code_links.resolved(f"[x]({link})", "index.md", {})


def test_a_flowchart_is_a_table_of_its_arrows():
    chart = "```mermaid\nflowchart LR\n  subgraph one [infra/]\n    a[first]\n  end\n  a --> b & c --> d\n```\n"
    assert diagrams.as_tables(chart).splitlines()[2:] == ["| infra / first | b, c |", "| b | d |", "| c | d |"]


def test_the_reference_has_every_key_with_a_description():
    described = {key.name: key.description for part in reference.parts(Params) for key in part.keys}
    values = yaml.safe_load((ROOT / "tasks" / "presets" / "base.yaml").read_text(encoding="utf-8"))

    def leaves(document, prefix=""):
        for name, value in document.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name

    known = set(leaves(values)) - {"defaults", "preset", "encode.control", "train.distil"}
    assert known <= set(described)
    assert [name for name, text in described.items() if not text] == [], "add a docstring below the field"


def test_the_reference_states_type_limits_and_default(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = reference.page()
    row = next(line for line in page.splitlines() if 'id="image.resolution"' in line)
    assert "*integer > 0; required; `16` in `digits`*" in row
    row = next(line for line in page.splitlines() if 'id="train.optimizer"' in line)
    assert "*`adamw`, `muon`; default `adamw`; `muon` in `digits`*" in row
    row = next(line for line in page.splitlines() if 'id="download.s3.connections"' in line)
    assert "*integer > 0; default `8`*" in row


def test_the_tour_without_results_names_the_command(tmp_path):
    pytest.importorskip("jupytext")
    pytest.importorskip("nbclient")
    from infra.site import tour

    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / tour.SCRIPT, tmp_path / "docs")
    pages = tour.pages(tmp_path)
    assert list(pages) == ["tour.md"] and "make repro" in pages["tour.md"] and "load_pipeline(" in pages["tour.md"]


def test_every_page_of_a_folder_has_its_place_in_the_navigation():
    """Pages at the top of docs/ that are not named are listed under "More"."""
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]  # noqa: S506 - a safe loader
    text = str(nav)
    for page in (page for page in PAGES if page.parent != ROOT / "docs"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name in text or f"{page.parent.relative_to(ROOT / 'docs').as_posix()}/*" in text, name


def test_the_workflow_builds_and_deploys_the_site():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "docs.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["build"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["make repro", "make docs"]
    assert workflow["permissions"] == {"contents": "read"}, "only the deployment may write"
    used = [step["uses"] for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step]
    assert all(re.search(r"@[0-9a-f]{40}$", action) for action in used)


@pytest.mark.slow
def test_the_site_is_built_strictly_and_loads_nothing_from_the_network(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings", "jupytext", "nbclient"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    built = sorted((tmp_path / "site").rglob("*.html"))
    assert len(built) > 30
    for file in built:
        loaded = re.findall(r'<(?:script|img|link|iframe)[^>]+?(?:src|href)="?(https?://[^" >]+)', file.read_text())
        assert not [address for address in loaded if not address.startswith("http://www.w3.org")], file
    forward = (tmp_path / "site" / "theory" / "forward.html").read_text(encoding="utf-8")
    line = code_links.line_of("models/noise/paths.py", "Level")
    assert f"source/models/noise/paths.py.html#__codelineno-0-{line}" in forward.replace("../", "")
    assert "arithmatex" not in forward and forward.count('role="math"') > 20
