"""The Python in the documentation runs: the blocks of a page in their order, in one namespace.

A block with the mark `{.slow}` runs with the drills. A block that needs what a page cannot make is listed in ELSEWHERE,
with the test that covers it.
"""

from __future__ import annotations

import shutil
from functools import cache

import pytest

from tests.support import documents
from tests.support.documents import ROOT

PAGES = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
ELSEWHERE = {
    "load_dataset": "tests/tasks/test_picture_kinds.py",
    "mlflow.pyfunc": "tests/tasks/test_registered_model.py",
    "prompt_embeds": "tests/tasks/test_text_to_image.py",
    "load_lora_weights": "tests/models/test_lora.py",
    "mlflow.diffusers": "tests/tasks/test_text_to_image.py",
    "control=edges": "tests/tasks/test_controlnet.py",
}
"""A word of a block, and the tests of what it does."""


@cache
def blocks(page: str) -> list[tuple[bool, str]]:
    """(whether it is slow, code) of each Python block that runs here."""
    found = documents.marked_blocks((ROOT / "docs" / page).read_text(encoding="utf-8"))
    code = [(marks, block) for kind, marks, block in found if kind == "python"]
    return [(marks == "{.slow}", block) for marks, block in code if not any(word in block for word in ELSEWHERE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A work tree with the default parameters and a pipeline of random weights."""
    from tests.support import random_digits

    root = tmp_path_factory.mktemp("docs")
    shutil.copy(ROOT / "params.yaml", root)
    random_digits.save(root / "outputs" / "pipeline")
    return root


def run(page: str, slow: bool) -> None:
    """Run the blocks of a page, up to the last one of that kind."""
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for is_slow, code in blocks(page):
        if slow or not is_slow:
            exec(compile(code, page, "exec"), namespace)  # noqa: S102 - our own documentation


@pytest.mark.parametrize("page", [page for page in PAGES if any(not slow for slow, _ in blocks(page))])
def test_python_of_a_page_runs(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    run(page, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(slow for slow, _ in blocks(page))])
def test_slow_python_of_a_page_runs(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    run(page, slow=True)


@pytest.mark.parametrize(("word", "file"), ELSEWHERE.items())
def test_blocks_that_run_elsewhere_exist(word, file):
    assert (ROOT / file).is_file()
    assert any(word in (ROOT / "docs" / page).read_text(encoding="utf-8") for page in PAGES)


def test_marks_of_blocks_are_known():
    for page in PAGES:
        for kind, marks, _ in documents.marked_blocks((ROOT / "docs" / page).read_text(encoding="utf-8")):
            assert marks in ("", "{.slow}") or kind != "python", f"{page}: {marks}"
