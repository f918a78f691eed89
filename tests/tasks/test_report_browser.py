"""The report in a real browser: every picture loads, nothing complains, nothing is asked of the network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import browser
from tests.support import report_inputs
from tests.support.page_checks import CLIPPED, FAINT, OVERFLOW, UNLOADED, check

EXECUTABLE = browser.find()
pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason=f"no Chromium here (looked for {', '.join(browser.NAMES)})")

UNEVEN = """[...document.querySelectorAll('.tiles img')]
  .filter(image => image.width % image.naturalWidth || image.width !== image.height).length"""

# With these the report has every chart.
TABLES = {
    "samplers.csv": f"{report_inputs.SAMPLERS}ddim,20,0.5,1.0,128,1,24.4,0.01,0.5,0.9,0.8,4,9,80,0.94,\n",
    "timesteps.csv": "timestep,signal,n,squared_error,psnr\n1,0.9,8,0.01,26\n10,0.5,8,0.1,16\n18,0.01,8,0.4,10\n",
    "guidance.csv": """\
guidance,guidance_scale,n,frechet_distance,kid,precision,recall,inception_score,clip_score,label_accuracy,note
,1.0,70,4.0,0.1,0.9,0.8,,80.1,0.9,
classifier_free,2.0,70,6.0,0.2,0.9,0.7,,81.2,0.95,
auto,2.0,70,3.0,0.05,0.9,0.8,,80.5,0.92,
""",
}
FIGURES = (
    "quality_by_cost",
    "quality_by_guidance",
    "between_noises",
    "between_conditions",
    "attention_self",
    "timelapse",
)
MOST_BYTES = 10_000_000


@pytest.fixture(scope="module")
def page() -> Iterator[browser.Page]:
    assert EXECUTABLE is not None
    with browser.browse(EXECUTABLE) as page:
        yield page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    inputs = report_inputs.make(folder, digits)
    for name, table in TABLES.items():
        (folder / "reports" / "evaluation" / name).write_text(table)
    _, path = inputs.draw("out")
    # Elsewhere and alone, as one who got it by mail would open it.
    alone = folder / "mailed" / "report.html"
    alone.parent.mkdir()
    path.rename(alone)
    return alone.as_uri()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280, 1400, 1920])
def test_report_opens_complete_and_quiet(page: browser.Page, report: str, theme: str, width: int) -> None:
    check(page, report, theme, width)
    assert page.evaluate("document.images.length") > 50
    assert page.evaluate(UNEVEN) == 0, "a tile's pixels are not all equally large"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (json.loads(f"[{ground[4:-1]}]")[0] < 128) == (theme == "dark")


def test_further_figures_are_shown_and_small(page: browser.Page, report: str) -> None:
    page.visit(report)
    for name in FIGURES:
        assert page.evaluate(f"document.querySelectorAll('#{name} img, #{name} svg').length") > 0, name
    assert page.evaluate("document.querySelectorAll('#schedules .chart svg').length") == 5
    assert page.evaluate("[...document.images].every(image => image.alt.trim())")
    assert page.evaluate("[...document.querySelectorAll('.chart')].every(chart => chart.getAttribute('aria-label'))")
    assert page.evaluate("document.documentElement.outerHTML.length") < MOST_BYTES


def test_links_of_the_contents_lead_to_their_sections(page: browser.Page, report: str) -> None:
    page.visit(report)
    targets = page.evaluate("[...document.querySelectorAll('nav a')].map(link => !!document.querySelector(link.hash))")
    assert len(targets) >= 6
    assert all(targets)


def test_a_broken_page_would_be_noticed(page: browser.Page, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(
        "<meta charset=utf-8><p style='color:#ccc'>faint</p><div style='width:9000px'>wide</div>"
        "<img src=missing.png alt=lost><script>console.error('out loud'); throw new Error('thrown')</script>"
    )
    page.theme("light")
    page.visit(broken.as_uri())
    assert page.evaluate(UNLOADED) == ["lost"]
    assert page.evaluate(OVERFLOW) > 0
    assert page.evaluate(CLIPPED) == []  # it looks below main, header and footer
    page.evaluate("document.body.innerHTML = `<main>${document.body.innerHTML}</main>`")
    assert page.evaluate(CLIPPED)
    assert page.evaluate(FAINT) == ["faint"]
    assert len(set(page.requests)) == 2
    heard = " ".join(page.errors)
    assert "out loud" in heard
    assert "Uncaught" in heard
    assert "ERR_FILE_NOT_FOUND" in heard
