"""Sampling from the exported ONNX network with NumPy and ONNX Runtime (and `tokenizers`, for text).

Copies of this file and of those that it imports form the package `afterimage_bundle`, which lies beside `unet.onnx` and
`bundle.json`. There, without PyTorch and without this project:

    python -m afterimage_bundle.bundle --label 3 --seed 0 --out image.png
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .json_files import Description, JsonObject
from .noise.paths import DiffusionPath, RectifiedFlow
from .noise.samplers import (
    DEFAULT_SAMPLING,
    GUIDANCES,
    SAMPLERS,
    Predict,
    Sampling,
    SchedulerConfig,
    SeededNoise,
    denoiser,
    sample,
)
from .pixels import to_uint8

if TYPE_CHECKING:
    import onnxruntime
    from tokenizers import Tokenizer

    from models.pipeline import PipelineInfo

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
Provider: TypeAlias = str | tuple[str, dict[str, Any]]  # ONNX Runtime's options have values of several types
Condition: TypeAlias = "np.ndarray | None"


@dataclass(frozen=True)
class BundleText:
    """How prompts are tokenised and packed."""

    length: int
    """L: tokens per prompt, padded or truncated."""
    pads: dict[str, int]
    """Suffix of each tokenizer's file name ("" or "_2") -> id of its padding token."""
    pooled: int | None = None
    """P: width of the pooled embedding (SDXL conditioning); None without it."""
    sizes: Sequence[int] = ()
    """Original size, crop and target size, which follow the pooled embedding."""


@dataclass(frozen=True)
class BundleInfo(Description):
    """`bundle.json`: what sampling needs besides the graphs."""

    FORMAT = 4  # not annotated: run as `__main__` by runpy, a dataclass does not recognise the string "ClassVar[int]"
    REMEDY = "export the model again"

    conditioning: str
    """"none", "label" or "text"."""
    classes: list[str]
    prompts: list[str] | None
    """The caption of each class, for a text-conditional model."""
    channels: int
    size: int
    """Height and width of an image, pixels."""
    latent: Sequence[int] | None
    """(channels, side) of the latents; None for a model of pixels."""
    prediction: str
    null_label: int | None
    """Class index of the null condition; None unless the model is class-conditional."""
    train_key: str
    alpha_bar: list[float] | None
    """The diffusion path, [T]; None for a rectified flow."""
    flow: dict[str, float] | None
    """`timesteps` and `shift` of a rectified flow; None for a diffusion path."""
    sampling: dict[str, str | int]
    """`variance`, `spacing` and `steps_offset` of the trained scheduler."""
    text: BundleText | None = None

    @classmethod
    def from_json(cls, values: JsonObject) -> BundleInfo:
        """Build the description, with the text section if there is one."""
        text = values.get("text")
        return cls(**{**values, "text": BundleText(**text) if text else None})

    def to_json(self) -> JsonObject:
        """Return the content of the file; without a text encoder it has no text section."""
        values = super().to_json()
        return values if self.text else {key: value for key, value in values.items() if key != "text"}

    @classmethod
    def of(cls, info: PipelineInfo, scheduler: SchedulerConfig, text: BundleText | None) -> BundleInfo:
        """Describe the bundle of a trained pipeline."""
        path = scheduler.path
        return cls(
            conditioning=info.conditioning,
            classes=info.classes,
            prompts=info.prompts,
            channels=info.channels,
            size=info.size,
            latent=info.latent,
            prediction=info.prediction,
            null_label=info.null_label,
            train_key=info.train_key,
            alpha_bar=[float(level) for level in path.alpha_bar] if isinstance(path, DiffusionPath) else None,
            flow={"timesteps": path.timesteps, "shift": path.shift} if isinstance(path, RectifiedFlow) else None,
            sampling={
                "variance": scheduler.variance_type,
                "spacing": scheduler.timestep_spacing,
                "steps_offset": scheduler.steps_offset,
            },
            text=text,
        )

    @property
    def scheduler(self) -> SchedulerConfig:
        """What the trained model prescribes for sampling."""
        path = (
            RectifiedFlow(int(self.flow["timesteps"]), self.flow["shift"])
            if self.flow
            else DiffusionPath(self.alpha_bar or ())
        )
        return SchedulerConfig(
            path,
            self.prediction,
            clip_sample=self.latent is None and self.flow is None,
            variance_type=str(self.sampling["variance"]),
            timestep_spacing=str(self.sampling["spacing"]),
            steps_offset=int(self.sampling["steps_offset"]),
        )


class Bundle:
    """An ONNX network with its noise schedule.

    `threads` is the number of ONNX Runtime's threads; 0 leaves it to ONNX Runtime.

    Raises:
        ValueError: for a bundle of another format.
    """

    def __init__(self, folder: Path, providers: Sequence[Provider] | None = None, threads: int = 0) -> None:
        import onnxruntime

        self.info = BundleInfo.read(folder / "bundle.json")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        use = list(providers or usable_providers())

        def optional(name: str) -> onnxruntime.InferenceSession | None:
            file = folder / f"{name}.onnx"
            return onnxruntime.InferenceSession(str(file), options, providers=use) if file.exists() else None

        self.session = onnxruntime.InferenceSession(str(folder / "unet.onnx"), options, providers=use)
        self.decoder, self.text_encoder = optional("decoder"), optional("text_encoder")
        guide = optional("guide")
        self.guide: Predict | None = functools.partial(self._evaluate, guide) if guide else None
        """`predict` with the weights of the guide; None if the model has none."""
        self.tokenizers = _load_tokenizers(folder, self.info.text) if self.info.text else []

    @property
    def providers(self) -> list[str]:
        """The execution providers that ONNX Runtime uses, in order of priority."""
        return list(self.session.get_providers())

    def predict(self, x: np.ndarray, t: float, condition: Condition = None) -> np.ndarray:
        """Evaluate the network at one timestep.

        x: float32 [N, C, H, W]. condition: labels int64 [N] or embedded text float32 [N, L, D]. Returns float32
        [N, C, H, W].
        """
        return self._evaluate(self.session, x, t, condition)

    def _evaluate(
        self, session: onnxruntime.InferenceSession, x: np.ndarray, t: float, condition: Condition
    ) -> np.ndarray:
        feed = {"sample": x, "timestep": np.full(len(x), t, np.float32 if self.info.flow else np.int64)}
        if condition is not None:
            feed[self.info.conditioning] = condition
        return np.asarray(session.run(["output"], feed)[0])

    def sample(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None = None,
        sampling: Sampling = DEFAULT_SAMPLING,
        *,
        prompts: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Draw len(seeds) images, float32 [N, C, H, W] in [-1, 1].

        Image i depends on seeds[i] and on labels[i], or for a text-conditional model prompts[i].

        Raises:
            ValueError: for labels or prompts that do not match the model, guidance that the model does not have, or a
                number of steps that it does not support.
        """
        info = self.info
        condition, null = self._condition(labels, prompts, len(seeds))
        denoise = denoiser(self.predict, info.scheduler, sampling, condition, null, self.guide)
        channels, size = info.latent or (info.channels, info.size)
        drawn = sample(denoise, SeededNoise(seeds, (channels, size, size)), info.scheduler, sampling)
        return np.asarray(self.decoder.run(["output"], {"latent": drawn})[0] if self.decoder else drawn)

    def embed(self, prompts: Sequence[str]) -> np.ndarray:
        """Encode prompts to float32 [N, L, D].

        With two text encoders the result is [N, L + 1, D]; its last row holds the pooled embedding, then the sizes.

        Raises:
            ValueError: if the model is not text-conditional.
        """
        text = self.info.text
        if self.text_encoder is None or text is None:
            raise ValueError("this model is class-conditional and takes no text; give labels")
        feed = {
            name: np.array([encoding.ids for encoding in tokenizer.encode_batch(list(prompts))], np.int64)
            for name, tokenizer in zip(("ids", "ids_2"), self.tokenizers, strict=False)
        }
        embedded = np.asarray(self.text_encoder.run(["output"], feed)[0])
        if text.pooled is not None:
            embedded[[not prompt for prompt in prompts]] = 0  # the empty prompt is the null condition
            embedded[:, -1, text.pooled : text.pooled + len(text.sizes)] = text.sizes
        return embedded

    def _condition(
        self, labels: Sequence[int] | None, prompts: Sequence[str] | None, count: int
    ) -> tuple[Condition, Condition]:
        """Return (condition, null condition) for `count` images, or two Nones."""
        info = self.info
        if info.conditioning == "none":
            if labels is not None or prompts is not None:
                raise ValueError("this model is unconditional; ask for images without a label")
            return None, None
        if prompts is not None:
            embedded = self.embed([*prompts, ""])
            return embedded[:-1], np.repeat(embedded[-1:], len(embedded) - 1, axis=0)
        last, names = len(info.classes) - 1, ", ".join(info.classes)
        if labels is None or len(labels) != count:
            raise ValueError(f"this model needs a label for each image: 0 to {last} ({names})")
        # The index after the last class is the null condition.
        if min(labels) < 0 or max(labels) > len(info.classes):
            raise ValueError(f"labels must lie between 0 and {last} ({names})")
        if info.conditioning == "text":
            return self._condition(None, [[*(info.prompts or ()), ""][label] for label in labels], count)
        chosen = np.asarray(labels, np.int64)
        return chosen, np.full_like(chosen, info.null_label)

    def condition_arguments(
        self, label: int | None, prompt: str | None
    ) -> dict[str, Any]:  # keyword arguments of two types
        """Turn one label or one prompt into the keyword arguments `labels` or `prompts` of `sample`.

        A text-conditional model takes the prompt; a class-conditional one takes the class that the prompt names.

        Raises:
            ValueError: if both are given, or if the prompt does not name exactly one class.
        """
        if label is not None and prompt is not None:
            raise ValueError("give label or prompt, not both")
        if prompt is not None and self.info.conditioning == "text":
            return {"prompts": [prompt]}
        chosen = self.label_of(prompt) if prompt is not None else label
        return {} if chosen is None else {"labels": [chosen]}

    def label_of(self, prompt: str) -> int:
        """Return the class whose name `prompt` contains as whole words, in any case.

        If one name contains another ("hot dog", "dog"), the longer one counts.

        Raises:
            ValueError: if no class or more than one is named.
        """
        classes = self.info.classes
        spans = [
            (match.start(), match.end(), label)
            for label, name in enumerate(classes)
            for match in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", prompt, re.IGNORECASE)
        ]
        named = {
            label
            for start, end, label in spans
            if not any(s <= start and end <= e and (s, e) != (start, end) for s, e, _ in spans)
        }
        if len(named) != 1:
            found = f"names {', '.join(classes[label] for label in sorted(named))}" if named else "names no class"
            raise ValueError(f"prompt {prompt!r} {found}; name exactly one of: {', '.join(classes) or '(none known)'}")
        return named.pop()


def _load_tokenizers(folder: Path, text: BundleText) -> list[Tokenizer]:
    """Load one tokenizer for each text encoder, each with its own padding token."""
    from tokenizers import Tokenizer

    tokenizers = []
    for suffix, pad in text.pads.items():
        tokenizer = Tokenizer.from_file(str(folder / f"tokenizer{suffix}.json"))
        tokenizer.enable_truncation(text.length)
        tokenizer.enable_padding(pad_id=pad, pad_token=tokenizer.id_to_token(pad), length=text.length)
        tokenizers.append(tokenizer)
    return tokenizers


def usable_providers() -> list[Provider]:
    """Return CUDA, if its driver finds a GPU, then the CPU.

    ONNX Runtime lists CUDA whenever it was compiled in, and logs errors if there is no GPU.
    """
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers() or not _has_gpu():
        return [CPU]
    onnxruntime.preload_dlls()
    return [(CUDA, {"use_tf32": 0}), CPU]  # full float32, so that the images match those of the CPU


def _has_gpu() -> bool:
    """Return whether the NVIDIA driver is installed and finds a device."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    return False


def png_bytes(image: np.ndarray) -> bytes:
    """Encode one image, float [C, H, W] in [-1, 1] with C = 1 or 3, as a PNG file. Needs Pillow."""
    from PIL import Image

    pixels = to_uint8(image).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    """Draw one image from the bundle that contains this package."""
    defaults = DEFAULT_SAMPLING
    parser = argparse.ArgumentParser(prog="python -m afterimage_bundle.bundle", description=main.__doc__)
    parser.add_argument("--label", type=int, help="class index")
    parser.add_argument("--prompt", help="text; for a class-conditional model, text that names one class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", choices=SAMPLERS, default=defaults.sampler)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--eta", type=float, default=defaults.eta, help="stochasticity of the sampler 'ddim', 0 to 1")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale; 1 disables it")
    parser.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels with guidance"
    )
    parser.add_argument(
        "--guidance-kind", choices=GUIDANCES, default=defaults.guidance, help="'auto' needs a model with a guide"
    )
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    chosen = parser.parse_args()
    out: Path = chosen.out
    if out.is_dir() or not out.parent.is_dir():
        wrong = "is a folder" if out.is_dir() else f"lies in {out.parent}, which is no folder"
        parser.error(f"--out {out} {wrong}; name a PNG file in a folder that exists")
    bundle = Bundle(Path(__file__).resolve().parent.parent)
    try:
        interval, kind = chosen.guidance_interval, chosen.guidance_kind
        sampling = Sampling(chosen.sampler, chosen.steps, chosen.eta, chosen.guidance, interval, kind)
        images = bundle.sample(
            [chosen.seed], sampling=sampling, **bundle.condition_arguments(chosen.label, chosen.prompt)
        )
    except ValueError as error:
        parser.error(str(error))
    try:
        out.write_bytes(png_bytes(images[0]))
    except OSError as error:
        parser.error(f"--out {out} cannot be written ({error.strerror}); choose another place")
    print(out)


if __name__ == "__main__":
    main()
