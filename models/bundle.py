"""Sampling from the exported ONNX network with NumPy and ONNX Runtime (and `tokenizers`, for text).

Copies of this file and of those that it imports form the package `afterimage_bundle`, which lies beside `unet.onnx` and
`bundle.json`. There, without PyTorch and without this project:

    python -m afterimage_bundle.bundle --label 3 --seed 0 --out image.png
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib
import io
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .bundle_info import BundleInfo, BundleText
from .images.pixels import from_uint8, to_uint8
from .masks import FEATHER, at_resolution, composite, for_images, require_images
from .noise.editing import Start
from .noise.samplers import (
    DEFAULT_SAMPLING,
    GUIDANCES,
    SAMPLERS,
    Callback,
    Predict,
    Sampling,
    SeededNoise,
    denoiser,
    sample,
)
from .request import Drawing, Request, draw

if TYPE_CHECKING:
    import onnxruntime
    from tokenizers import Tokenizer

# ONNX Runtime reads it when it is imported. Without it, Linux and macOS builds of 1.29 and later keep an identifier of
# the machine in the home folder and send events to Microsoft, among them the name of the model.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
Provider: TypeAlias = str | tuple[str, dict[str, Any]]  # ONNX Runtime's options have values of several types
Feed: TypeAlias = Mapping[str, np.ndarray]

OUTPUT = "output"
GRAPH_ID = "gpu_graph_id"
"""Option of a call: the number of the CUDA graph that is captured or replayed."""
NO_GRAPH = "-1"
MOST_SHAPES = 8
"""Shapes of the inputs that have a place in the memory, at most; calls with further ones copy as on a CPU."""
Condition: TypeAlias = "np.ndarray | None"


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

        def optional(name: str, captured: bool = False) -> Session | None:
            file = folder / f"{name}.onnx"
            return Session(file, options, use, captured) if file.exists() else None

        self.session = Session(folder / "unet.onnx", options, use, captured=True)
        self.decoder, self.text_encoder = optional("decoder"), optional("text_encoder")
        self.encoder = optional("encoder")
        guide = optional("guide", captured=True)
        self.guide: Predict | None = functools.partial(self._evaluate, guide) if guide else None
        """`predict` with the weights of the guide; None if the model has none."""
        self.tokenizers = _load_tokenizers(folder, self.info.text) if self.info.text else []

    @property
    def providers(self) -> list[str]:
        """The execution providers that ONNX Runtime uses, in order of priority."""
        return self.session.providers

    def predict(self, x: np.ndarray, t: float, condition: Condition = None) -> np.ndarray:
        """Evaluate the network at one timestep.

        x: float32 [N, C, H, W]. condition: labels int64 [N] or embedded text float32 [N, L, D]. Returns float32
        [N, C, H, W].
        """
        return self._evaluate(self.session, x, t, condition)

    def _evaluate(self, session: Session, x: np.ndarray, t: float, condition: Condition) -> np.ndarray:
        feed = {"sample": x, "timestep": np.full(len(x), t, np.float32 if self.info.flow else np.int64)}
        if condition is not None:
            feed[self.info.conditioning] = condition
        return session.run(feed)

    def sample(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None = None,
        sampling: Sampling = DEFAULT_SAMPLING,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompt: str = "",
        callback: Callback | None = None,
    ) -> np.ndarray:
        """Draw len(seeds) images, float32 [N, C, H, W] in [-1, 1].

        Image i depends on seeds[i] and on labels[i], or for a text-conditional model prompts[i]. Classifier-free
        guidance refers to `negative_prompt`.

        Raises:
            ValueError: for labels or prompts that do not match the model, guidance that the model does not have, or a
                number of steps that it does not support.
        """
        condition = self._condition(labels, prompts, len(seeds), negative_prompt)
        return self._draw(seeds, condition, sampling, None, callback)

    def edit(
        self,
        seeds: Sequence[int],
        images: np.ndarray,
        strength: float,
        mask: np.ndarray | None = None,
        labels: Sequence[int] | None = None,
        sampling: Sampling = DEFAULT_SAMPLING,
        *,
        prompts: Sequence[str] | None = None,
        resampling: int = 1,
        jump: int = 1,
        feather: int = FEATHER,
        negative_prompt: str = "",
        callback: Callback | None = None,
    ) -> np.ndarray:
        """Draw images from given ones, float32 [N, C, S, S]: image-to-image, or with a mask inpainting.

        The arguments are those of `models/editing.py`: `images` uint8 [N, C, S, S], `strength` in (0, 1], `mask` bool
        [N, S, S] or [S, S], true where the image is painted anew.

        Raises:
            ValueError: as `sample`, and for images or a mask that do not fit the model or each other, or a strength
                outside (0, 1] or without any step.
        """
        require_images(images, (len(seeds), self.info.channels, self.info.size, self.info.size))
        chosen = None if mask is None else for_images(mask, images)
        if chosen is not None and not chosen.any():
            return from_uint8(images)
        given = from_uint8(images)
        x0 = self.encoder.run({"image": given}) if self.encoder else given
        at_input = None if chosen is None else at_resolution(chosen, *x0.shape[2:])
        condition = self._condition(labels, prompts, len(seeds), negative_prompt)
        start = Start(x0, strength, at_input, resampling, jump)
        drawn = self._draw(seeds, condition, sampling, start, callback)
        return drawn if chosen is None else composite(images, drawn, chosen, feather)

    def _draw(
        self,
        seeds: Sequence[int],
        condition: tuple[Condition, Condition],
        sampling: Sampling,
        start: Start | None,
        callback: Callback | None,
    ) -> np.ndarray:
        info = self.info
        denoise = denoiser(self.predict, info.scheduler, sampling, *condition, self.guide)
        channels, size = info.latent or (info.channels, info.size)
        noise = SeededNoise(seeds, (channels, size, size))
        drawn = sample(denoise, noise, info.scheduler, sampling, callback, start)
        return self.decoder.run({"latent": drawn}) if self.decoder else np.asarray(drawn)

    def paint(self, drawing: Drawing, callback: Callback | None = None) -> np.ndarray:
        """Draw the images of a checked request, float32 [N, C, H, W] in [-1, 1]; see `models/request.py`.

        Raises:
            ValueError: as `sample` and `edit` do, and for a control map.
        """
        if drawing.control is not None:
            raise ValueError("a bundle has no ControlNet; draw from the pipeline")
        rest: dict[str, Any] = {  # keyword arguments of several types
            "labels": drawing.labels,
            "sampling": drawing.sampling,
            "prompts": drawing.prompts,
            "negative_prompt": drawing.negative_prompt,
            "callback": callback,
        }
        if drawing.given is None:
            return self.sample(drawing.seeds, **rest)
        return self.edit(drawing.seeds, drawing.given.images, drawing.given.strength, drawing.given.mask, **rest)

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
        embedded = self.text_encoder.run(feed)
        if text.pooled is not None:
            embedded[[not prompt for prompt in prompts]] = 0  # the empty prompt is the null condition
            embedded[:, -1, text.pooled : text.pooled + len(text.sizes)] = text.sizes
        return embedded

    def _condition(
        self, labels: Sequence[int] | None, prompts: Sequence[str] | None, count: int, negative_prompt: str = ""
    ) -> tuple[Condition, Condition]:
        """Return (condition, null condition) for `count` images, or two Nones."""
        info = self.info
        if info.conditioning == "none":
            if labels is not None or prompts is not None:
                raise ValueError("this model is unconditional; ask for images without a label")
            return None, None
        if prompts is not None:
            embedded = self.embed([*prompts, negative_prompt])
            return embedded[:-1], np.repeat(embedded[-1:], len(embedded) - 1, axis=0)
        last, names = len(info.classes) - 1, ", ".join(info.classes)
        if labels is None or len(labels) != count:
            raise ValueError(f"this model needs a label for each image: 0 to {last} ({names})")
        # The index after the last class is the null condition.
        if min(labels) < 0 or max(labels) > len(info.classes):
            raise ValueError(f"labels must lie between 0 and {last} ({names})")
        if info.conditioning == "text":
            captions = [[*(info.prompts or ()), ""][label] for label in labels]
            return self._condition(None, captions, count, negative_prompt)
        chosen = np.asarray(labels, np.int64)
        return chosen, np.full_like(chosen, info.null_label)


class Session:
    """One graph of a bundle in ONNX Runtime, with one output, called with NumPy arrays.

    On a GPU inputs and output keep their place in its memory (IO binding), so that a CUDA graph can replay all kernels
    of a call by one launch.

    Args:
        file: the graph.
        options: of ONNX Runtime.
        providers: in order of priority.
        captured: whether a GPU captures a CUDA graph for each shape of the inputs. A graph with operators that run on
            the CPU cannot be captured, and is then launched operator by operator.
        bound: the device whose memory the inputs stay in, "cuda" or "cpu"; None is "cuda" if ONNX Runtime uses it.
    """

    def __init__(
        self,
        file: Path,
        options: onnxruntime.SessionOptions,
        providers: Sequence[Provider],
        captured: bool = False,
        bound: str | None = None,
    ) -> None:
        self.session, self.captured = _open(file, options, providers, captured)
        self.providers = list(self.session.get_providers())
        """Execution providers that ONNX Runtime uses, in order of priority."""
        self.device = bound or ("cuda" if CUDA in self.providers else None)
        self._places: dict[tuple[object, ...], _Place] = {}
        self._lock = threading.Lock()

    def run(self, feed: Feed) -> np.ndarray:
        """Return the output for the inputs by name."""
        if self.device is None:
            return self._copied(feed)
        shapes = tuple((name, value.shape, value.dtype) for name, value in feed.items())
        with self._lock:  # the places are shared by all calls
            place = self._places.get(shapes)
            if place is not None:
                return place.run(feed)
            output = self._copied(feed)  # the first call shows the shape of the output, and allocates what kernels need
            if len(self._places) < MOST_SHAPES:
                graph = str(len(self._places) + 1) if self.captured else None
                self._places[shapes] = _Place(self.session, feed, output, self.device, graph)
            return output

    def _copied(self, feed: Feed) -> np.ndarray:
        return np.asarray(self.session.run([OUTPUT], dict(feed), _run_options(NO_GRAPH if self.captured else None))[0])


class _Place:
    """The memory of the inputs and the output of one shape, and the CUDA graph that works on it, if any."""

    def __init__(
        self, session: onnxruntime.InferenceSession, feed: Feed, output: np.ndarray, device: str, graph: str | None
    ) -> None:
        from onnxruntime import OrtValue

        self.session, self.options = session, _run_options(graph)
        # On a CPU the place is the array itself, so it must not be one of the caller's.
        self.inputs = {name: OrtValue.ortvalue_from_numpy(np.array(value), device) for name, value in feed.items()}
        self.output = OrtValue.ortvalue_from_numpy(np.array(output), device)
        self.binding = session.io_binding()
        for name, value in self.inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        self.binding.bind_ortvalue_output(OUTPUT, self.output)

    def run(self, feed: Feed) -> np.ndarray:
        for name, value in feed.items():
            self.inputs[name].update_inplace(np.ascontiguousarray(value))
        self.session.run_with_iobinding(self.binding, self.options)
        return np.array(self.output.numpy())


def _open(
    file: Path, options: onnxruntime.SessionOptions, providers: Sequence[Provider], captured: bool
) -> tuple[onnxruntime.InferenceSession, bool]:
    """Return a session, and whether it captures CUDA graphs."""
    import onnxruntime

    names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
    if captured and CUDA in names:
        with_graph = [
            (CUDA, {**(provider[1] if isinstance(provider, tuple) else {}), "enable_cuda_graph": "1"})
            if name == CUDA
            else provider
            for name, provider in zip(names, providers, strict=True)
        ]
        try:
            return onnxruntime.InferenceSession(str(file), options, providers=with_graph), True
        except Exception as error:  # its class differs: Fail, NotImplemented, RuntimeException
            if "graph" not in str(error).lower():
                raise
    return onnxruntime.InferenceSession(str(file), options, providers=list(providers)), False


def _run_options(graph: str | None) -> onnxruntime.RunOptions | None:
    if graph is None:
        return None
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry(GRAPH_ID, graph)
    return options


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


def given(image: bytes, mask: bytes | None, info: BundleInfo) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode the image file that a drawing begins with, and its mask, for the model. Needs Pillow.

    Returns:
        The image, uint8 [C, S, S], and the mask, bool [S, S], or None.

    Raises:
        ValueError: for what is not an image, or a mask of another size than the image.
    """
    found = files().read(image, mask, info.channels, info.size)
    return found.image, found.mask


def files() -> ModuleType:
    """Return the module that reads images: `tasks/drawing/given.py`, which `export` copies beside this file."""
    return importlib.import_module(".given", __package__)


def request_of(
    info: BundleInfo,
    sampling: Sampling,
    *,
    seed: int = 0,
    label: int | None = None,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    image: bytes | None = None,
    strength: float | None = None,
    mask: bytes | None = None,
) -> Request:
    """Return the request for one image; absent parts are None, `image` and `mask` the content of files.

    Raises:
        ValueError: for a mask without an image, or files that are not images.
    """
    if image is None and mask is not None:
        raise ValueError("a mask changes an image; give one")
    pixels, painted = (None, None) if image is None else given(image, mask, info)
    return Request(
        seeds=(seed,),
        labels=() if label is None else (label,),
        prompts=() if prompt is None else (prompt,),
        negative_prompt=negative_prompt or "",
        sampling=sampling,
        image=pixels,
        strength=strength,
        mask=painted,
    )


def main() -> None:
    """Draw one image from the bundle that contains this package."""
    defaults = DEFAULT_SAMPLING
    parser = argparse.ArgumentParser(prog="python -m afterimage_bundle.bundle", description=main.__doc__)
    parser.add_argument("--label", type=int, help="class index")
    parser.add_argument("--prompt", help="text; for a class-conditional model, text that names one class")
    parser.add_argument("--negative-prompt", help="what guidance leads away from; for text-conditional models")
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
    parser.add_argument("--image", type=Path, help="image to begin with; brought to the size of the model's images")
    parser.add_argument("--strength", type=float, help="how much of --image is changed, above 0 to 1; default 0.8")
    parser.add_argument("--mask", type=Path, help="white is painted anew, at strength 1 by default; needs --image")
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
        request = request_of(
            bundle.info,
            sampling,
            seed=chosen.seed,
            label=chosen.label,
            prompt=chosen.prompt,
            negative_prompt=chosen.negative_prompt,
            image=chosen.image and chosen.image.read_bytes(),
            strength=chosen.strength,
            mask=chosen.mask and chosen.mask.read_bytes(),
        )
        images = draw(bundle, request)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        out.write_bytes(png_bytes(images[0]))
    except OSError as error:
        parser.error(f"--out {out} cannot be written ({error.strerror}); choose another place")
    print(out)


if __name__ == "__main__":
    main()
