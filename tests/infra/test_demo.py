"""The page of `make demo` in a real browser and through its API: the same images as `python -m tasks.draw`."""

from __future__ import annotations

import base64
import io
import os
import shutil
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra import browser
from tasks.drawing.options import Options
from tasks.drawing.run import run
from tasks.drawing.settings import read_settings
from tests.support import model_outputs

# Not imported here: each test process collects this file, and one of them runs it.
pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="the extra demo is not installed")

EXECUTABLE = browser.find()
in_a_browser = pytest.mark.skipif(EXECUTABLE is None, reason=f"no Chromium here (looked for {browser.NAMES})")
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
CLIPPED = """[...document.querySelectorAll('main button, main input, main textarea, main label, .result *')]
  .filter(e => e.offsetParent && e.getBoundingClientRect().width > 2)
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
    || e.getBoundingClientRect().left < -1)
  .map(e => `${e.tagName} ${e.className} ${e.innerText}`)"""
READY = "!![...document.querySelectorAll('input')].find(e => e.value === 'dpm_solver_pp_2m')"
DRAWN = "!!document.querySelector('.result [role=status]')"
PRESSED = """[...document.querySelectorAll('button')]
  .filter(e => e.innerText.trim() === %r && e.offsetParent).pop().click()"""
COMMON = {
    "param_0": "outputs/pipeline",
    "param_1": ["dog"],
    "param_2": "",
    "param_3": "",
    "param_4": 3,
    "param_5": 1,
    "param_6": "ddim",
    "param_7": 4,
    "param_8": 1.5,
    "param_9": None,
    "param_10": None,
    "param_11": "classifier_free",
    "param_12": 0,
}
"""Inputs of every tab, in the order of `infra.demo.form.Form`."""
SAME: dict[str, Any] = {"label": ["dog"], "seed": [3], "sampler": "ddim", "steps": 4, "guidance": 1.5}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page in a work tree with a tiny class-conditional model, served for all tests of this file."""
    before, tree = dict(os.environ), tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        model_outputs.write_pipeline(tree / "outputs" / "pipeline")
        patch.chdir(tree)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tree / 'none.db'}")
        patch.setenv("AFTERIMAGE_SCRATCH", str(tree / ".scratch"))
        from infra.demo import environment

        environment.prepare()
        from infra.demo.server import running

        with running(None, "127.0.0.1", None) as address:
            yield address
        shutil.rmtree(os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture(scope="module")
def client(address: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from gradio_client import Client

    return Client(address, verbose=False, analytics_enabled=False, download_files=tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="module")
def page() -> Iterator[browser.Page]:
    assert EXECUTABLE is not None
    with browser.browse(EXECUTABLE) as page:
        yield page


def pixels(file: str | Path | io.BytesIO) -> np.ndarray:
    return np.asarray(Image.open(file))


def drawn(out: str, **options: Any) -> Path:
    """What the command draws."""
    run(Options(**{**SAME, **options}, out=Path(out), force=True))
    return Path(out)


def given(name: str) -> Path:
    """An image of another size than the model's, unlike any that it draws."""
    values = np.random.default_rng(5).integers(0, 256, (12, 12), np.uint8)
    Image.fromarray(values).save(name)
    return Path(name).resolve()


def wait(page: browser.Page, script: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not page.evaluate(script):
        assert time.monotonic() < until, f"not within {seconds} s: {script}"
        time.sleep(0.1)


def press(page: browser.Page, name: str) -> None:
    page.evaluate("document.activeElement.blur()")
    page.evaluate(PRESSED % name)


def upload(page: browser.Page, file: Path) -> None:
    """Choose a file in the open tab."""
    wait(page, "!!document.querySelector('[role=tabpanel] input[type=file]')")
    root = page.command("DOM.getDocument")["root"]["nodeId"]
    node = page.command("DOM.querySelector", nodeId=root, selector="[role=tabpanel] input[type=file]")["nodeId"]
    page.command("DOM.setFileInputFiles", nodeId=node, files=[str(file)])
    wait(page, f"!!document.querySelector('[role=tabpanel] img[src*=\"{file.name}\"]')")


def download(page: browser.Page, folder: Path) -> Path:
    """Press the button and return the file that the browser saves."""
    page.command("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    wait(page, "[...document.querySelectorAll('button')].some(e => e.innerText.trim() === 'Download' && !e.disabled)")
    press(page, "Download")
    until = time.monotonic() + 30
    while not (files := list(folder.glob("*.png"))):
        assert time.monotonic() < until, "nothing was downloaded"
        time.sleep(0.1)
    return files[0]


@in_a_browser
def test_a_label_is_drawn_in_a_browser_as_by_the_command(page: browser.Page, address: str, tmp_path: Path) -> None:
    page.theme("light")
    page.size(1280, 900)
    page.visit(address, timeout=60)
    wait(page, READY)
    page.evaluate("document.querySelector('input[aria-label=Labels]').focus()")
    page.command("Input.insertText", text="cat")
    for kind in ("keyDown", "keyUp"):
        page.command("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)
    press(page, "Draw")
    wait(page, DRAWN)
    options = {"label": ["cat"], "seed": [0], "sampler": "dpm_solver_pp_2m", "steps": 20, "guidance": 1.0}
    wanted = drawn("cat.png", **options)
    assert download(page, tmp_path).read_bytes() == wanted.read_bytes()
    source = page.evaluate("document.querySelector('.result img').src")
    assert np.array_equal(pixels(io.BytesIO(base64.b64decode(source.partition(",")[2])))[..., 0], pixels(wanted))
    assert page.evaluate("document.querySelector('.result img').alt") == "cat"
    for theme in ("light", "dark"):
        page.theme(theme)
        for width in (390, 1280, 1920):
            page.size(width, 900)
            assert page.evaluate(OVERFLOW) <= 0, f"the page scrolls sideways at {width} px"
            assert page.evaluate(CLIPPED) == [], f"something is cut off at {width} px"
    # Leaving an event stream, and a download, count as aborted requests.
    assert [error for error in page.errors if "ERR_ABORTED" not in error] == []
    assert [request for request in page.requests if not request.startswith(address)] == []


@in_a_browser
def test_an_uploaded_image_is_changed_in_a_browser_as_by_the_command(
    page: browser.Page, address: str, tmp_path: Path
) -> None:
    file = given("given.png")
    page.size(1280, 900)
    page.visit(address, timeout=60)
    wait(page, READY)
    press(page, "Image")
    upload(page, file)
    press(page, "Change the image")
    wait(page, DRAWN)
    changed = download(page, tmp_path)
    options = {"label": None, "seed": [0], "sampler": "dpm_solver_pp_2m", "steps": 20, "guidance": 1.0}
    wanted = drawn("wanted.png", **options, image=file, strength=0.8)
    assert np.array_equal(pixels(changed), pixels(wanted))
    stored = read_settings(changed)
    assert stored.image is not None and Path(stored.image.path).read_bytes() == file.read_bytes()


@in_a_browser
@pytest.mark.slow
def test_what_the_brush_covers_is_drawn_anew_and_nothing_else(page: browser.Page, address: str, tmp_path: Path) -> None:
    file = given("given.png")
    page.size(1280, 900)
    page.visit(address, timeout=60)
    wait(page, READY)
    press(page, "Inpainting")
    upload(page, file)
    canvas = "[...document.querySelectorAll('canvas')].find(e => e.offsetParent)"
    wait(page, f"!!{canvas}")
    page.settle()
    page.evaluate(f"{canvas}.scrollIntoView({{block: 'center'}})")
    box = page.evaluate(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({canvas}.getBoundingClientRect())")
    for kind, shift in (("mouseMoved", -60), ("mousePressed", -60), ("mouseMoved", 0), ("mouseReleased", 40)):
        point = {"x": box[0] + shift, "y": box[1], "button": "left", "clickCount": 1}
        page.command("Input.dispatchMouseEvent", type=kind, buttons=int(kind != "mouseReleased"), **point)
        time.sleep(0.2)
    page.settle()
    press(page, "Paint anew")
    wait(page, DRAWN)
    painted = download(page, tmp_path)
    stored = read_settings(painted)
    assert stored.mask is not None
    mask = pixels(stored.mask.path)
    assert mask.shape == (8, 8) and 2 <= mask.sum() <= 16
    assert mask[3:5].any() and not mask[:2].any() and not mask[6:].any()
    options = {"label": None, "seed": [0], "sampler": "dpm_solver_pp_2m", "steps": 20, "guidance": 1.0}
    wanted = drawn("wanted.png", **options, image=file, mask=Path(stored.mask.path))
    assert np.array_equal(pixels(painted), pixels(wanted))


def test_the_api_gives_the_file_of_the_command(client: Any, address: str) -> None:
    file = client.predict(**COMMON, api_name="/draw")[1]["value"]
    assert Path(file).read_bytes() == drawn("one.png").read_bytes()
    several = COMMON | {"param_1": ["dog", "2"], "param_5": 2, "param_9": 0.1, "param_10": 5}
    html, file, *_ = client.predict(**several, api_name="/draw")
    wanted = drawn("four.png", label=["dog", "2"], count=2, guidance_interval=[0.1, 5.0])
    assert Path(file["value"]).read_bytes() == wanted.read_bytes()
    assert html.count("<figure") == 4 and "cat · seed 4" in html


def test_a_painted_mask_repaints_its_part_alone(client: Any, address: str) -> None:
    from gradio_client import handle_file

    image = given("given.png")
    painted = np.zeros((64, 64, 4), np.uint8)
    painted[:32] = 225, 80, 0, 150
    Image.fromarray(painted).save("layer.png")
    Image.fromarray((np.arange(64) < 32).reshape(8, 8)).save("mask.png")
    canvas = {"background": None, "layers": [handle_file("layer.png")], "composite": None}
    inputs = COMMON | {"param_13": handle_file(image), "param_14": canvas, "param_15": 1}
    file = client.predict(**inputs, api_name="/paint")[1]["value"]
    wanted = drawn("wanted.png", image=image, mask=Path("mask.png"))
    assert np.array_equal(pixels(file), pixels(wanted))


def test_what_cannot_be_drawn_is_one_sentence(client: Any, address: str) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    Path("text.png").write_text("no image")
    image, text = handle_file(given("given.png")), handle_file("text.png")
    nothing = {"background": None, "layers": [], "composite": None}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("/draw", {"param_1": ["<b>"]}, "label '&lt;b&gt;' is no class of this model; labels must lie between 0 and 2"),
        ("/draw", {"param_3": "ugly"}, "a negative prompt needs a text-conditional model"),
        ("/draw", {"param_4": -1}, "must be one or more integers from 0 on"),
        ("/draw", {"param_5": 10**9}, "count 1000000000 must lie between 1 and 31"),
        ("/draw", {"param_5": 16, "param_1": ["cat", "dog"]}, "32 images are more than 31; draw fewer labels"),
        ("/draw", {"param_7": 10**9}, "steps 1000000000 must lie between 1 and 10000"),
        ("/draw", {"param_6": "plms"}, "unknown sampler 'plms'"),
        ("/draw", {"param_7": 21}, "sampling steps 21"),
        ("/draw", {"param_7": "many"}, "steps 'many' is not valid"),
        ("/draw", {"param_9": 1}, "the guidance interval has two ends; give both"),
        ("/draw", {"param_12": 2}, "eta 2 is not valid"),
        ("/draw", {"param_0": "nowhere"}, "'nowhere' is none of the models of this page"),
        ("/change", {"param_13": None, "param_14": 0.5}, "choose an image first"),
        ("/change", {"param_13": text, "param_14": 0.5}, "the image cannot be read (not an image"),
        ("/change", {"param_13": image, "param_14": 0}, "strength 0 must lie above 0 and not above 1"),
        ("/paint", {"param_13": image, "param_14": nothing, "param_15": 1}, "paint over the part of the image"),
        ("/control", {"param_13": image, "param_14": True, "param_15": 1}, "this model has no ControlNet"),
    ]
    for name, changes, complaint in cases:
        with pytest.raises(AppError) as refused:
            client.predict(**COMMON | changes, api_name=name)
        assert complaint in str(refused.value), name
        assert "\n" not in str(refused.value)


def test_intermediate_images_are_shown_and_a_drawing_can_be_stopped(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infra.demo import live
    from infra.demo.studio import Studio

    monkeypatch.setattr(live, "PREVIEW_SECONDS", 0)
    options = Options(**SAME | {"steps": 20}, model="outputs/pipeline")
    states = list(Studio(frozenset({"outputs/pipeline"})).draw(options, None, "mine"))
    assert [state.file is not None for state in states] == [False] * (len(states) - 1) + [True]
    shown = [state.progress.images for state in states]
    assert len(shown) >= 3 and not np.array_equal(shown[0], shown[1])
    assert [state.progress.done for state in states] == sorted(state.progress.done for state in states)
    studio = Studio(frozenset({"outputs/pipeline"}))
    running = studio.draw(options, None, "mine")
    next(running)
    studio.stop("another")
    assert not studio.stops["mine"].is_set()
    studio.stop("mine")
    assert all(state.file is None for state in running)
    assert studio.stops == {} and not [t for t in threading.enumerate() if t.name == "drawing"]
