"""What the page offers for a model: its classes, samplers and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from models.noise import samplers
from tasks.drawing import defaults

if TYPE_CHECKING:
    from models.noise.samplers import Sampling
    from models.pipeline import Pipeline, PipelineInfo
    from tasks.drawing.place import Place


@dataclass(frozen=True)
class Choices:
    """A model's conditions and how it is sampled."""

    info: PipelineInfo
    sampling: Sampling
    samplers: tuple[str, ...]
    has_guide: bool
    has_control: bool

    @classmethod
    def of(cls, place: Place, pipeline: Pipeline) -> Choices:
        """Describe a model that is in memory."""
        return cls(
            pipeline.info,
            defaults.sampling(place, pipeline.info),
            samplers.samplers_of(pipeline.path),
            "guide" in pipeline.companions,
            pipeline.control is not None,
        )

    @property
    def description(self) -> str:
        """One line about the model."""
        info = self.info
        conditions = {"none": "unconditional", "label": f"{len(info.classes)} classes", "text": "text to image"}
        path = "rectified flow" if info.schedule == "rectified_flow" else f"{info.schedule} schedule"
        return f"{conditions[info.conditioning]}, {info.size} × {info.size} pixels, {path}"

    def updates(self) -> list[Any]:  # updates of gradio's components
        """Return the updates of the inputs: those of `Form` without seed and count, and the tab of the ControlNet."""
        conditional, text = self.info.conditioning != "none", self.info.conditioning == "text"
        interval = self.sampling.guidance_interval or (None, None)
        kinds = samplers.GUIDANCES if self.has_guide else samplers.GUIDANCES[:1]
        examples = self.info.prompts or self.info.classes
        cleared: dict[str, Any] = {} if text else {"value": ""}  # what is hidden must not be sent
        return [
            gr.Dropdown(info=self.description),
            gr.Dropdown(choices=self.info.classes, value=[], visible=self.info.conditioning == "label"),
            gr.Textbox(visible=text, placeholder=examples[0] if text and examples else "", **cleared),
            gr.Textbox(visible=text, **cleared),
            gr.Dropdown(choices=list(self.samplers), value=self.sampling.sampler),
            gr.Number(value=self.sampling.steps),
            gr.Number(value=self.sampling.guidance_scale, visible=conditional),
            gr.Number(value=interval[0], visible=conditional),
            gr.Number(value=interval[1], visible=conditional),
            gr.Dropdown(choices=list(kinds), value=self.sampling.guidance, visible=conditional),
            gr.Number(value=self.sampling.eta),
            gr.Tab(visible=self.has_control),
        ]
