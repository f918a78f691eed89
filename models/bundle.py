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
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .bundle_info import BundleInfo, BundleText
from .masks import FEATHER, at_resolution, composite, default_strength, for_images, require_images
from .noise.editing import Start
from .noise.samplers import (
    DEFAULT_SAMPLING,
    GUIDANCES,
    SAMPLERS,
    Predict,
    Sampling,
    SeededNoise,
    denoiser,
    sample,
)
from .pixels import from_uint8, to_uint8

if TYPE_CHECKING:
    import onnxruntime
    from tokenizers import Tokenizer

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
Provider: TypeAlias = str | tuple[str, dict[str, Any]]  # ONNX Runtime's options have values of several types
WHITE = 127
"""Largest grey value that a mask keeps."""
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

        def optional(name: str) -> onnxruntime.InferenceSession | None:
            file = folder / f"{name}.onnx"
            return onnxruntime.InferenceSession(str(file), options, providers=use) if file.exists() else None

        self.session = onnxruntime.InferenceSession(str(folder / "unet.onnx"), options, providers=use)
        self.decoder, self.text_encoder = optional("decoder"), optional("text_encoder")
        self.encoder = optional("encoder")
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
        return self._draw(seeds, labels, sampling, prompts, None)

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
        x0 = np.asarray(self.encoder.run(["output"], {"image": given})[0]) if self.encoder else given
        at_input = None if chosen is None else at_resolution(chosen, *x0.shape[2:])
        drawn = self._draw(seeds, labels, sampling, prompts, Start(x0, strength, at_input, resampling, jump))
        return drawn if chosen is None else composite(images, drawn, chosen, feather)

    def _draw(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None,
        sampling: Sampling,
        prompts: Sequence[str] | None,
        start: Start | None,
    ) -> np.ndarray:
        info = self.info
        condition, null = self._condition(labels, prompts, len(seeds))
        denoise = denoiser(self.predict, info.scheduler, sampling, condition, null, self.guide)
        channels, size = info.latent or (info.channels, info.size)
        drawn = sample(denoise, SeededNoise(seeds, (channels, size, size)), info.scheduler, sampling, start=start)
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


def read_image(file: Path | IO[bytes], channels: int) -> np.ndarray:
    """Read an image file as uint8 [channels, H, W], grey or RGB. Needs Pillow.

    Raises:
        ValueError: if it is not an image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except UnidentifiedImageError:
        raise ValueError("the file is not an image that Pillow reads; give a PNG or JPEG file") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def read_mask(file: Path | IO[bytes]) -> np.ndarray:
    """Read a mask, bool [H, W]: the light half of the grey values is painted anew. Needs Pillow.

    Raises:
        ValueError: if it is not an image.
    """
    return np.asarray(read_image(file, 1)[0] > WHITE)


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
    parser.add_argument("--image", type=Path, help="image to begin with, of the size of the model's images")
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
        condition = bundle.condition_arguments(chosen.label, chosen.prompt)
        if chosen.image is None:
            if chosen.mask or chosen.strength is not None:
                parser.error("--strength and --mask change an image; give --image")
            images = bundle.sample([chosen.seed], sampling=sampling, **condition)
        else:
            given = read_image(chosen.image, bundle.info.channels)[None]
            mask = read_mask(chosen.mask) if chosen.mask else None
            strength = chosen.strength if chosen.strength is not None else default_strength(mask)
            images = bundle.edit([chosen.seed], given, strength, mask, sampling=sampling, **condition)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    try:
        out.write_bytes(png_bytes(images[0]))
    except OSError as error:
        parser.error(f"--out {out} cannot be written ({error.strerror}); choose another place")
    print(out)


if __name__ == "__main__":
    main()
