"""The registered model as code that MLflow stores and runs: a request in, a PNG file out.

It samples from the ONNX bundle among the model's artifacts, so it needs neither PyTorch nor this project. The file is
logged by path (`mlflow.pyfunc.log_model(python_model=...)`) and never imported: its folder must not become a package.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Optional

import mlflow
import pydantic
from mlflow.exceptions import MlflowException

FOLDER = "AFTERIMAGE_IMAGES"
"""Environment variable with the folder whose files requests may name. Without it a server reads no file."""


# MLflow derives the model's signature from these annotations and requires `Optional` in this form.
# ruff: noqa: UP045
class Request(pydantic.BaseModel):
    """One image.

    A class-conditional model takes `label`, or a `prompt` that names one class; a text-conditional one takes a
    `prompt`; an unconditional one takes neither. `image` is what drawing begins with, and `mask` its part that is
    painted anew: base64 of a PNG or JPEG file (also as a data URI), or `file:NAME` of a file in the folder that the
    environment variable AFTERIMAGE_IMAGES names.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    label: Optional[int] = None
    prompt: Optional[str] = None
    image: Optional[str] = None
    strength: Optional[float] = None
    mask: Optional[str] = None
    negative_prompt: Optional[str] = None
    seed: Optional[int] = 0
    steps: Optional[int] = 20
    sampler: Optional[str] = "dpm_solver_pp_2m"
    eta: Optional[float] = 0.0
    guidance: Optional[float] = 1.0
    guidance_interval: Optional[list[float]] = None
    guidance_kind: Optional[str] = "classifier_free"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _leave_out_empty(cls, values):
        """Drop empty cells of a table (None or NaN), so that they take the default."""
        return {name: value for name, value in values.items() if value is not None and value == value}


class Refusal(MlflowException):
    """A request that the model does not support.

    It keeps its first message: the scoring server would put the whole request before it, also an encoded image.
    """

    @property
    def message(self):
        """The sentence."""
        return self._message

    @message.setter
    def message(self, value):
        self.__dict__.setdefault("_message", value)


class DiffusionModel(mlflow.pyfunc.PythonModel):
    """Loads the bundle once, then draws one image for each request."""

    def load_context(self, context):
        """Import the sampling code that was exported with this network, under a name of its own.

        Two versions of the model can be loaded in one process.
        """
        folder = Path(context.artifacts["model"]) / "onnx"
        name = f"afterimage_bundle_{abs(hash(str(folder)))}"
        package = folder / "afterimage_bundle"
        spec = importlib.util.spec_from_file_location(
            name, package / "__init__.py", submodule_search_locations=[str(package)]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        self.code = importlib.import_module(f"{name}.bundle")
        self.bundle = self.code.Bundle(folder)

    def predict(self, model_input: list[Request]) -> list[bytes]:
        """Return one PNG file for each request.

        Raises `MlflowException` for a request that the model does not support: the scoring server answers it with one
        sentence and HTTP 400, any other exception with a stack trace.
        """
        try:
            return [self._draw(request) for request in model_input]
        except ValueError as error:
            raise Refusal.invalid_parameter_value(str(error)) from None

    def _draw(self, request: Request) -> bytes:
        sampling = self.code.Sampling(
            request.sampler,
            request.steps,
            request.eta,
            request.guidance,
            request.guidance_interval,
            request.guidance_kind,
        )
        drawing = self.code.request_of(
            self.bundle.info,
            sampling,
            seed=request.seed,
            label=request.label,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            image=self._bytes(request.image, "image"),
            strength=request.strength,
            mask=self._bytes(request.mask, "mask"),
        )
        images = self.code.draw(self.bundle, drawing)
        return self.code.png_bytes(images[0])

    def _bytes(self, text: Optional[str], name: str) -> Optional[bytes]:
        """Return the content of an image: decoded from base64, or read from a file in the folder of `FOLDER`."""
        if text is None or not text.startswith("file:"):
            return None if text is None else self.code.files().from_base64(text, name)
        folder = os.environ.get(FOLDER)
        if not folder:
            raise ValueError(f"files are read only from the folder in {FOLDER}; set it, or send the {name} as base64")
        file = (Path(folder) / text.removeprefix("file:")).resolve()
        if not file.is_relative_to(Path(folder).resolve()) or not file.is_file():
            raise ValueError(f"the folder in {FOLDER} holds no such {name}; name a file in it, or send base64")
        with file.open("rb") as opened:
            return opened.read(self.code.files().MAX_BYTES + 1)


mlflow.models.set_model(DiffusionModel())
