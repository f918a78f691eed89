"""The page: its inputs, its tabs, and what its buttons do."""

from __future__ import annotations

import html
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import gradio as gr

from infra.demo import form, uploads, view
from infra.demo.choices import Choices
from infra.demo.form import Form
from tasks.drawing.options import Options
from tasks.params import ParamsError
from tasks.params.redaction import redacted
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from infra.demo.catalogue import Entry
    from infra.demo.studio import Drawing, Studio

Values: TypeAlias = Any
"""What the browser sends: any JSON."""
Change: TypeAlias = Callable[[Options, Sequence[Values]], Options]
"""Adds the inputs of a tab to the options."""
EXPECTED = (StageError, ParamsError)
"""Errors whose text is a sentence for the user."""
WORKER = "model"
"""Events with this id run one after the other."""
STYLE = """
.gradio-container { max-width: 1500px !important; }
.result { display: flex; flex-direction: column; gap: 10px; }
.result .tiles { display: flex; flex-wrap: wrap; gap: 6px; }
.result figure { margin: 0; max-width: 100%; }
.result img { display: block; max-width: 100%; height: auto; border-radius: 3px; }
.result img.pixelated { image-rendering: pixelated; }
.result figcaption { font-size: 13px; overflow-wrap: anywhere; }
.result progress { width: 100%; max-width: 512px; accent-color: var(--primary-600); }
.result .status { margin: 0; overflow-wrap: anywhere; }
.result .refused { border-left: 4px solid #dc2626; padding-left: 10px; }
#result .error, #result .clear-status { display: none !important; }
input[role=listbox] { padding-right: 2rem !important; text-overflow: ellipsis; }
.low { align-self: flex-end; }
button[role=tab] { padding-inline: 12px !important; }
footer { display: none !important; }
body:not(.dark) button[role=tab][aria-selected=true] { color: var(--primary-600) !important; }
@media (min-width: 800px) { .side { position: sticky; top: 12px; align-self: flex-start; } }
"""


def theme() -> gr.themes.Base:
    """Return the default theme with the fonts of the system: its own are files of gradio or of Google."""
    base = gr.themes.Default(
        primary_hue="blue", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    )
    # Its own colours of hints and of the main button are fainter than WCAG's 4.5 : 1.
    return base.set(
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )


def build(studio: Studio, entries: Sequence[Entry]) -> gr.Blocks:
    """Return the page for some models; the first is chosen."""
    with gr.Blocks(title="Afterimage", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.Markdown("# Afterimage\nDraw with a trained model. The same seed gives the same image.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                common = _common(entries)
                tabs = _tabs()
            with gr.Column(scale=6, min_width=320, elem_classes="side"):
                with gr.Row():
                    stop = gr.Button("Stop", interactive=False, min_width=90, size="md")
                    download = gr.DownloadButton("Download", interactive=False, min_width=90, size="md")
                    reuse = gr.Button("Edit", interactive=False, min_width=90, size="md")
                result = gr.HTML(view.EMPTY, elem_id="result", label="Result")
        page = _Page(studio, common, tabs, result, stop, download, reuse)
        page.connect(blocks)
    return blocks


@dataclass(frozen=True)
class _Common:
    """The inputs of every tab, those of `Form` in its order."""

    inputs: list[gr.components.Component]
    random_seed: gr.Button

    @property
    def model(self) -> gr.components.Component:
        return self.inputs[0]


def _common(entries: Sequence[Entry]) -> _Common:
    model = gr.Dropdown(
        [(entry.title, entry.name) for entry in entries], value=entries[0].name, label="Model", info=" "
    )
    labels = gr.Dropdown([], label="Labels", multiselect=True, allow_custom_value=True, info="None: the first ten.")
    prompts = gr.Textbox(label="Prompts", lines=2, max_lines=8, info="One in each line.", visible=False)
    negative = gr.Textbox(label="Negative prompt", visible=False)
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, min_width=90)
        count = gr.Number(1, label="Count", precision=0, min_width=90)
        random_seed = gr.Button("Random", min_width=80, size="md", elem_classes="low")
    with gr.Row():
        sampler = gr.Dropdown([], label="Sampler", scale=2, min_width=200)
        steps = gr.Number(None, label="Steps", precision=0, min_width=100)
        guidance = gr.Number(None, label="Guidance", step=0.5, min_width=100)
    with gr.Accordion("More settings", open=False):
        with gr.Row():
            low = gr.Number(None, label="Guidance above noise level", min_width=150)
            high = gr.Number(None, label="Guidance up to noise level", min_width=150)
        with gr.Row():
            kind = gr.Dropdown([], label="Kind of guidance", min_width=150)
            eta = gr.Number(None, label="Eta (sampler ddim)", min_width=150, step=0.1)
    inputs = [model, labels, prompts, negative, seed, count, sampler, steps, guidance, low, high, kind, eta]
    return _Common(inputs, random_seed)


@dataclass(frozen=True)
class _Tabs:
    """The inputs of each tab, and its button."""

    draw: gr.Button
    change: gr.Button
    image: gr.Image
    strength: gr.Slider
    paint: gr.Button
    damaged: gr.Image
    canvas_column: gr.Column
    canvas: gr.ImageEditor
    paint_strength: gr.Slider
    control_tab: gr.Tab
    control: gr.Button
    map: gr.Image
    is_map: gr.Radio
    control_scale: gr.Slider


def _image(label: str, height: int = 240) -> gr.Image:
    return gr.Image(label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=height)


def _tabs() -> _Tabs:
    with gr.Tabs():
        with gr.Tab("Noise"):
            draw = gr.Button("Draw", variant="primary")
        with gr.Tab("Image"):
            image = _image("Image to change")
            strength = gr.Slider(0.05, 1, 0.8, step=0.05, label="Strength", info="Share of the steps that change it.")
            change = gr.Button("Change the image", variant="primary")
        with gr.Tab("Inpainting"):
            damaged = _image("Image to repair", 200)
            with gr.Column(visible=False) as canvas_column:
                canvas = gr.ImageEditor(
                    label="Mask",
                    sources=(),
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(default_size=40, colors=["rgba(225, 80, 0, 0.6)"], color_mode="fixed"),
                    canvas_size=(uploads.CANVAS_SIDE, uploads.CANVAS_SIDE),
                    height=480,
                    format="png",
                )
            paint_strength = gr.Slider(0.05, 1, 1, step=0.05, label="Strength")
            paint = gr.Button("Paint anew", variant="primary")
        with gr.Tab("Control", visible=False) as control_tab:
            control_map = _image("Control image")
            is_map = gr.Radio([("make a map of it", False), ("is a map already", True)], value=False, label="The image")
            control_scale = gr.Slider(0, 2, 1, step=0.05, label="Weight of the ControlNet")
            control = gr.Button("Draw with control", variant="primary")
    return _Tabs(
        draw,
        change,
        image,
        strength,
        paint,
        damaged,
        canvas_column,
        canvas,
        paint_strength,
        control_tab,
        control,
        control_map,
        is_map,
        control_scale,
    )


@dataclass(frozen=True)
class _Page:
    """Connects the inputs to the studio."""

    studio: Studio
    common: _Common
    tabs: _Tabs
    result: gr.HTML
    stop: gr.Button
    download: gr.DownloadButton
    reuse: gr.Button

    def connect(self, blocks: gr.Blocks) -> None:
        """Define what each button does."""
        tabs, one = self.tabs, {"concurrency_id": WORKER, "concurrency_limit": 1}
        chosen = [*self.common.inputs[:4], *self.common.inputs[6:], tabs.control_tab]
        for event in (blocks.load, self.common.model.input):
            event(self.choose, [self.common.model], chosen, api_name="choose", **one)
        self._button(tabs.draw, "draw", [], lambda options, values: options)
        self._button(tabs.change, "change", [tabs.image, tabs.strength], _changed)
        self._button(tabs.paint, "paint", [tabs.damaged, tabs.canvas, tabs.paint_strength], self.painted)
        self._button(tabs.control, "control", [tabs.map, tabs.is_map, tabs.control_scale], _controlled)
        tabs.damaged.change(
            self.prepare_canvas,
            [self.common.model, tabs.damaged],
            [tabs.canvas_column, tabs.canvas],
            preprocess=False,
            **one,
        )
        self.common.random_seed.click(lambda: random.randrange(2**31), None, self.common.inputs[4], queue=False)
        self.reuse.click(
            lambda file: [file["path"]] * 2,
            [self.download],
            [tabs.image, tabs.damaged],
            preprocess=False,
            queue=False,
            api_visibility="private",
        )
        self.stop.click(self.end, None, None, queue=False)

    def _button(self, button: gr.Button, name: str, inputs: list[gr.components.Component], change: Change) -> None:
        fields = len(self.common.inputs)

        def draw(request: gr.Request, *values: Values) -> Iterator[tuple[Values, ...]]:
            try:
                filled = form.read(Form, values[:fields])
                options = change(filled.options(), values[fields:])
                drawing = None
                for drawing in self.studio.draw(options, filled.interval, request.session_hash or ""):
                    yield _outputs(drawing)
                if drawing is not None and drawing.file is None:
                    yield (view.shown(drawing, stopped=True), *[gr.skip()] * 3)
            except EXPECTED as error:
                yield (view.refused(_sentence(error)), *[gr.skip()] * 3)
                raise _error(error) from None

        button.click(
            draw,
            [*self.common.inputs, *inputs],
            [self.result, self.download, self.stop, self.reuse],
            api_name=name,
            preprocess=False,
            show_progress="minimal",
            scroll_to_output=True,
            concurrency_id=WORKER,
            concurrency_limit=1,
        ).then(lambda: gr.Button(interactive=False), None, self.stop, queue=False, api_visibility="private")

    def choose(self, name: str) -> list[Values]:
        """Return the choices and defaults of a model for the inputs."""
        try:
            opened = self.studio.open(name)
            return Choices.of(opened.place, opened.pipeline).updates()
        except EXPECTED as error:
            raise _error(error) from None

    def painted(self, options: Options, values: Sequence[Values]) -> Options:
        """Add an image, the mask painted over it and a strength."""
        image, editor, strength = values
        data = uploads.read(image, "an image")
        side = self.studio.open(options.model or "").pipeline.info.size
        mask = uploads.mask(_layers(self.tabs.canvas, editor), side)
        return replace(options, image=uploads.keep(data), mask=uploads.keep(mask), strength=_number(strength))

    def prepare_canvas(self, name: str, image: Values) -> tuple[Values, Values]:
        """Show the canvas with an image, as the model sees it, or hide it without one."""
        if image is None:
            return gr.Column(visible=False), None
        try:
            info = self.studio.open(name).pipeline.info
            background = uploads.canvas(uploads.read(image, "an image"), info.channels, info.size)
        except EXPECTED as error:
            raise _error(error) from None
        return gr.Column(visible=True), {"background": background, "layers": [], "composite": None}

    def end(self, request: gr.Request) -> None:
        """End the drawing of this browser."""
        self.studio.stop(request.session_hash or "")


def _outputs(drawing: Drawing) -> tuple[Values, ...]:
    """Return the result, and the buttons Download, Stop and Edit in their states."""
    ready = drawing.file is not None
    return (
        view.shown(drawing),
        gr.DownloadButton(value=drawing.file, interactive=ready),
        gr.Button(interactive=not ready),
        gr.Button(interactive=ready and len(drawing.progress.images) == 1),
    )


def _changed(options: Options, values: Sequence[Values]) -> Options:
    """Add an image and a strength."""
    image, strength = values
    return replace(options, image=uploads.keep(uploads.read(image, "an image")), strength=_number(strength))


def _controlled(options: Options, values: Sequence[Values]) -> Options:
    """Add a control map, or an image to make one from."""
    image, is_map, scale = values
    file = uploads.keep(uploads.read(image, "a control image"))
    options = replace(options, control_scale=_number(scale))
    return replace(options, control=file) if is_map else replace(options, control_from=file)


def _number(value: Values) -> float | None:
    if value is None or isinstance(value, int | float):
        return value
    raise StageError(f"{value!r} is not a number")


def _layers(canvas: gr.ImageEditor, value: Values) -> list[bytes]:
    """Return the layers of an image editor, as PNG or WebP files."""
    if not isinstance(value, dict):
        return []
    stored = canvas.blob_storage.pop(value["id"], None) if value.get("id") else None
    if stored is not None:
        return [layer for layer in stored.layers if layer]
    return [uploads.read(layer, "the mask") for layer in value.get("layers") or [] if layer]


def _sentence(error: Exception) -> str:
    return html.escape(redacted(str(error)), quote=False)


def _error(error: Exception) -> gr.Error:
    """Convert an error of the functions of `tasks.draw` to a message in a corner of the page."""
    return gr.Error(_sentence(error), title="Nothing was drawn", print_exception=False)
