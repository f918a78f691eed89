"""Draw images from the exported ONNX network with NumPy and ONNX Runtime alone (and `tokenizers`, for text).

This file and `samplers.py` are copied as they stand into the bundle, as the package `afterimage_bundle`
beside `unet.onnx` and `bundle.json`. There, without PyTorch and without this project:

    python -m afterimage_bundle.bundle --label 3 --seed 0 --out image.png
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .samplers import SAMPLERS, Interval, SeededNoise, denoiser, sample

FORMAT = 3
CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"


class Bundle:
    """An ONNX network with the schedule it was trained on. `info` is `bundle.json`.

    `threads` 0 leaves their number to ONNX Runtime. Raises `ValueError` for another format.
    """

    def __init__(self, folder: Path, providers: Sequence[Any] | None = None, threads: int = 0) -> None:
        import onnxruntime

        self.info: dict[str, Any] = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        if self.info["format"] != FORMAT:
            raise ValueError(f"{folder} has format {self.info['format']}, this version reads {FORMAT}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        use = list(providers or usable_providers())

        def session(name: str) -> Any:
            file = folder / f"{name}.onnx"
            return onnxruntime.InferenceSession(str(file), options, providers=use) if file.exists() else None

        self.session, self.decoder, self.text_encoder = map(session, ("unet", "decoder", "text_encoder"))
        self.tokenizers = self._load_tokenizers(folder) if self.text_encoder else []

    def _load_tokenizers(self, folder: Path) -> list[Any]:
        """One for each encoder, each with a padding of its own."""
        from tokenizers import Tokenizer

        text, tokenizers = self.info["text"], []
        for suffix, pad in text["pads"].items():
            tokenizer = Tokenizer.from_file(str(folder / f"tokenizer{suffix}.json"))
            tokenizer.enable_truncation(text["length"])
            tokenizer.enable_padding(pad_id=pad, pad_token=tokenizer.id_to_token(pad), length=text["length"])
            tokenizers.append(tokenizer)
        return tokenizers

    @property
    def providers(self) -> list[str]:
        """What ONNX Runtime really uses, first choice first."""
        return self.session.get_providers()

    def predict(self, x: np.ndarray, t: int, condition: np.ndarray | None = None) -> np.ndarray:
        """The network's raw output: x float32 [N, C, H, W], one timestep, condition int64 [N] (labels) or float32
        [N, L, D] (embedded text) -> float32 [N, C, H, W]."""
        feed = {"sample": x, "timestep": np.full(len(x), t, np.int64)}
        if condition is not None:
            feed[self.info["conditioning"]] = condition
        return self.session.run(["output"], feed)[0]

    def sample(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None = None,
        sampler: str = "dpm_solver_pp_2m",
        steps: int = 20,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        guidance_interval: Interval = None,
        prompts: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Draw len(seeds) images, float32 [N, C, H, W] in [-1, 1]; image i depends on seeds[i] and labels[i] (or, of a
        text-conditional model, prompts[i]) alone.

        `eta` belongs to `ddim`; `guidance_interval` (low, high) limits guidance to these noise levels, see
        `samplers.denoiser`. Raises `ValueError` for labels that do not fit, guidance without a condition, an
        unknown sampler, an eta that it does not have, or a number of steps that the model does not have.
        """
        condition, null = self._condition(labels, prompts, len(seeds))
        if guidance_scale != 1.0 and condition is None:
            raise ValueError("guidance needs a conditional model; use guidance 1")
        info = self.info
        clip, levels = info["latent"] is None, info["alpha_bar"]
        denoise = denoiser(
            self.predict, info["prediction"], levels, condition, null, guidance_scale, guidance_interval, clip
        )
        channels, size = info["latent"] or (info["channels"], info["size"])
        noise = SeededNoise(seeds, (channels, size, size))
        drawn = sample(sampler, denoise, noise, levels, steps, eta=eta, **info["sampling"])
        return self.decoder.run(["output"], {"latent": drawn})[0] if self.decoder else drawn

    def embed(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts -> float32 [N, L, D]; of two encoders [N, L + 1, D], whose last row holds the pooled embedding, then
        sizes and crop. Raises `ValueError` where the model knows no text."""
        if self.text_encoder is None:
            raise ValueError("this model knows classes and no text; give labels")
        feed = {
            name: np.array([encoding.ids for encoding in tokenizer.encode_batch(list(prompts))], np.int64)
            for name, tokenizer in zip(("ids", "ids_2"), self.tokenizers, strict=False)
        }
        embedded: np.ndarray = self.text_encoder.run(["output"], feed)[0]
        pooled = self.info["text"]["pooled"]
        if pooled is not None:
            embedded[[not prompt for prompt in prompts]] = 0  # the empty text stands for none
            embedded[:, -1, pooled : pooled + len(self.info["text"]["sizes"])] = self.info["text"]["sizes"]
        return embedded

    def _condition(
        self, labels: Sequence[int] | None, prompts: Sequence[str] | None, count: int
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        if self.info["conditioning"] == "none":
            if labels is not None or prompts is not None:
                raise ValueError("this model is unconditional; ask for images without a label")
            return None, None
        if prompts is not None:
            embedded = self.embed([*prompts, ""])
            return embedded[:-1], np.repeat(embedded[-1:], len(embedded) - 1, axis=0)
        classes = self.info["classes"]
        if labels is None or len(labels) != count:
            raise ValueError(f"this model needs a label for each image: 0 to {len(classes) - 1} ({', '.join(classes)})")
        # The index after the last class is the null condition: an image of no class in particular.
        if min(labels) < 0 or max(labels) > len(classes):
            raise ValueError(f"labels must lie between 0 and {len(classes) - 1} ({', '.join(classes)})")
        if self.info["conditioning"] == "text":
            return self._condition(None, [[*self.info["prompts"], ""][label] for label in labels], count)
        wanted = np.asarray(labels, np.int64)
        return wanted, np.full_like(wanted, self.info["null_label"])

    def wish(self, label: int | None, prompt: str | None) -> dict[str, Any]:
        """What `sample` is asked for one image by a label or a prompt: a text-conditional model reads the prompt, one
        of classes takes the class that it names. Raises `ValueError` where both are given or the class is unclear."""
        if label is not None and prompt is not None:
            raise ValueError("give label or prompt, not both")
        if prompt is not None and self.info["conditioning"] == "text":
            return {"prompts": [prompt]}
        wanted = self.label_of(prompt) if prompt is not None else label
        return {} if wanted is None else {"labels": [wanted]}

    def label_of(self, prompt: str) -> int:
        """The class whose name stands in `prompt` as whole words, whatever their case.

        Where one name holds another ("hot dog", "dog") the longer counts. Raises `ValueError` where no
        class or more than one is named.
        """
        classes: list[str] = self.info["classes"]
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


def usable_providers() -> list[Any]:
    """CUDA where its driver finds a GPU, then the CPU.

    ONNX Runtime offers CUDA wherever it was compiled in, and complains at length where there is none.
    """
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers() or not _has_gpu():
        return [CPU]
    onnxruntime.preload_dlls()
    return [(CUDA, {"use_tf32": 0}), CPU]  # full float32, so that the images are those of the CPU


def _has_gpu() -> bool:
    """Whether the NVIDIA driver is here and finds a device."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    return False


def to_pixels(images: np.ndarray) -> np.ndarray:
    """float [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C], rounded; what lies outside is clipped."""
    return np.clip(np.round((images + 1) * 127.5), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def png_bytes(image: np.ndarray) -> bytes:
    """One image, float [C, H, W] in [-1, 1], C = 1 or 3 -> a PNG file of its own size. Needs Pillow."""
    import io

    from PIL import Image

    pixels = to_pixels(image[None])[0]
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    """Draw one image from the bundle that this package lies in."""
    parser = argparse.ArgumentParser(prog="python -m afterimage_bundle.bundle", description=main.__doc__)
    parser.add_argument("--label", type=int, help="class index")
    parser.add_argument("--prompt", help="text, or for a model of classes text that names one, instead of --label")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", choices=SAMPLERS, default="dpm_solver_pp_2m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eta", type=float, default=0.0, help="noise of the sampler 'ddim', 0 to 1")
    parser.add_argument("--guidance", type=float, default=1.0, help="1 is none; needs a conditional model")
    parser.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels to guide at"
    )
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if out.is_dir() or not out.parent.is_dir():
        wrong = "is a folder" if out.is_dir() else f"lies in {out.parent}, which is no folder"
        parser.error(f"--out {out} {wrong}; name a PNG file in a folder that exists")
    bundle = Bundle(Path(__file__).resolve().parent.parent)
    try:
        wish = bundle.wish(arguments.label, arguments.prompt)
        images = bundle.sample(
            [arguments.seed],
            sampler=arguments.sampler,
            steps=arguments.steps,
            guidance_scale=arguments.guidance,
            eta=arguments.eta,
            guidance_interval=arguments.guidance_interval,
            **wish,
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
