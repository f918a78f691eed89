"""The registered model, as code that MLflow stores and runs: a request in, a PNG out.

It draws from the ONNX bundle in the model's own artifacts, so it needs neither PyTorch nor this project.
This file is logged by path (`mlflow.pyfunc.log_model(python_model=...)`) and never imported by ours: the
folder it lies in must not become a package.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Optional

import mlflow
import pydantic
from mlflow.exceptions import MlflowException


# MLflow makes the model's signature of these annotations and wants to see `Optional` spelled out.
# ruff: noqa: UP045
class Request(pydantic.BaseModel):
    """One image. A class-conditional model wants `label`, or a `prompt` that names one class, a text-conditional one a
    `prompt`; another neither."""

    model_config = pydantic.ConfigDict(extra="forbid")

    label: Optional[int] = None
    prompt: Optional[str] = None
    seed: Optional[int] = 0
    steps: Optional[int] = 20
    sampler: Optional[str] = "dpm_solver_pp_2m"
    eta: Optional[float] = 0.0
    guidance: Optional[float] = 1.0
    guidance_interval: Optional[list[float]] = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _leave_out_empty(cls, values):
        """An empty cell of a table means the default."""
        return {name: value for name, value in values.items() if value is not None and value == value}


class DiffusionModel(mlflow.pyfunc.PythonModel):
    """Loads the bundle once, then draws one image for each request."""

    def load_context(self, context):
        """Import the sampler that was exported with this network, under a name of its own.

        Two versions of the model may live in one process.
        """
        folder = Path(context.artifacts["model"]) / "onnx"
        name = f"afterimage_bundle_{abs(hash(str(folder)))}"
        package = folder / "afterimage_bundle"
        spec = importlib.util.spec_from_file_location(
            name, package / "__init__.py", submodule_search_locations=[str(package)]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        self.sampler = importlib.import_module(f"{name}.bundle")
        self.bundle = self.sampler.Bundle(folder)

    def predict(self, model_input: list[Request]) -> list[bytes]:
        """PNG files, one for each request. Raises `MlflowException` for a request that this model cannot fulfil: the
        scoring server answers it with its sentence and HTTP 400, any other exception with a stack trace."""
        try:
            return [self._draw(request) for request in model_input]
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None

    def _draw(self, request: Request) -> bytes:
        wish = self.bundle.wish(request.label, request.prompt)
        images = self.bundle.sample(
            [request.seed],
            sampler=request.sampler,
            steps=request.steps,
            guidance_scale=request.guidance,
            eta=request.eta,
            guidance_interval=request.guidance_interval,
            **wish,
        )
        return self.sampler.png_bytes(images[0])


mlflow.models.set_model(DiffusionModel())
