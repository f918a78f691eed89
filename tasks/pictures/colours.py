"""ICC colour profiles: images with another profile than sRGB are converted to sRGB.

Images without a profile are treated as sRGB, as in browsers. The transform of a profile is built once per process.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import numpy as np
import PIL.Image
from PIL import ImageCms

if TYPE_CHECKING:
    from PIL.Image import Image

Profile = Literal["none", "sRGB", "converted", "not usable"]
"""How the profile of an image is handled. Pixels keep their stored values unless it is "converted"."""

MAX_BYTES = 8 << 20
SAME_LEVELS = 3
"""Largest change of any probed colour, in levels of 255, at which a profile counts as a variant of sRGB."""
INPUT_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space in the header of a profile -> Pillow mode of the pixels to convert."""
PROBE_STEPS = 6


@dataclass(frozen=True)
class Conversion:
    """How to convert pixels of one profile to sRGB."""

    mode: str
    """Pillow mode of the input of the transform."""
    transform: ImageCms.ImageCmsTransform | None
    """None if the profile is a variant of sRGB."""


def profile(image: Image) -> Profile:
    """How `to_srgb` handles the profile of a decoded image."""
    data = image.info.get("icc_profile")
    if not data:
        return "none"
    conversion = _conversion(data)
    if conversion is None or not _fits(image, conversion.mode):
        return "not usable"
    return "converted" if conversion.transform else "sRGB"


def to_srgb(image: Image) -> Image:
    """Convert a decoded image to sRGB and keep its transparency; a no-op unless `profile` is "converted"."""
    if profile(image) != "converted":
        return image
    conversion = _conversion(image.info["icc_profile"])
    assert conversion is not None and conversion.transform is not None
    alpha = None
    if image.has_transparency_data:
        image = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
        alpha = image.getchannel("A")
    converted: Image = conversion.transform.apply(eight_bits(image).convert(conversion.mode))
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _fits(image: Image, mode: str) -> bool:
    """Whether the pixels of an image have the colour space of its profile."""
    bands = {"1": "L", "L": "L", "LA": "L", "I;16": "L", "I;16B": "L", "CMYK": "CMYK"}
    return bands.get(image.mode, "RGB") == mode


def eight_bits(image: Image) -> Image:
    """Scale a decoded image from 16 to 8 bits; a no-op for other images."""
    if not image.mode.startswith("I;16"):
        return image
    return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


@functools.lru_cache(maxsize=64)
def _conversion(data: bytes) -> Conversion | None:
    """The bytes of a profile -> how to convert from it; None if it cannot be used."""
    if len(data) > MAX_BYTES:
        return None
    mode = INPUT_MODES.get(data[16:20].decode("latin-1"))
    if mode is None:
        return None
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(data)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        return Conversion(mode, None if _is_srgb(transform, mode) else transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _is_srgb(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform changes no probed colour (a grid over the RGB cube, or greys) by more than `SAME_LEVELS`."""
    if mode == "CMYK":
        return False
    levels = np.linspace(0, 255, PROBE_STEPS).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(PROBE_STEPS, -1, 3)
    probe = PIL.Image.fromarray(np.ascontiguousarray(cube if mode == "RGB" else cube[..., 0]))
    shown, seen = (np.asarray(image).astype(int) for image in (probe.convert("RGB"), transform.apply(probe)))
    return int(np.abs(shown - seen).max()) <= SAME_LEVELS


def sentences(counts: Mapping[str, int], examples: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """Messages about converted and unusable profiles: number of images, and an example if `examples` has one."""
    texts = {
        "converted": "images have a colour profile other than sRGB and are converted to sRGB",
        "not usable": "images have a colour profile that cannot be used (damaged, or of another colour space than the "
        "pixels) and keep their colours as stored; export them again as sRGB if the colours matter",
    }
    shown = {name: f" (first {ascii(examples[name])[1:-1]})" if name in examples else "" for name in texts}
    return [f"{counts[name]} {text}{shown[name]}" for name, text in texts.items() if counts.get(name)]
