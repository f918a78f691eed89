"""ICC colour profiles: pictures that are tagged with another colour space than sRGB are converted to it.

An untagged picture is taken for sRGB, as browsers do. The transform of a profile is built once per process.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

Profile = Literal["none", "sRGB", "converted", "not usable"]
"""What became of a picture's profile; a picture whose profile is not usable keeps its pixels as stored."""

MAX_BYTES = 8 << 20
SAME_LEVELS = 3
"""A profile that changes no colour by more levels of 255 than this is taken for sRGB, of which there are variants."""
INPUT_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of a profile, as its header names it -> the mode in which Pillow hands pixels over."""
PROBE_STEPS = 6


@dataclass(frozen=True)
class Conversion:
    """How the pixels of one profile become sRGB."""

    mode: str
    """Mode of the pixels that the transform takes."""
    transform: Any
    """Of `PIL.ImageCms`; None where the profile is sRGB already."""


def profile(image: Image) -> Profile:
    """What `to_srgb` does with a decoded picture."""
    data = image.info.get("icc_profile")
    if not data:
        return "none"
    conversion = _conversion(data)
    if conversion is None or not _fits(image, conversion.mode):
        return "not usable"
    return "converted" if conversion.transform else "sRGB"


def to_srgb(image: Image) -> Image:
    """A decoded picture -> the same in sRGB, its transparency kept; as it is where `profile` is not "converted"."""
    if profile(image) != "converted":
        return image
    conversion = _conversion(image.info["icc_profile"])
    assert conversion is not None
    alpha = None
    if image.has_transparency_data:
        image = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
        alpha = image.getchannel("A")
    converted = conversion.transform.apply(eight_bits(image).convert(conversion.mode))
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _fits(image: Image, mode: str) -> bool:
    """Whether the pixels of a picture are of the colour space of its profile."""
    bands = {"1": "L", "L": "L", "LA": "L", "I;16": "L", "I;16B": "L", "CMYK": "CMYK"}
    return bands.get(image.mode, "RGB") == mode


def eight_bits(image: Image) -> Image:
    """A decoded picture of 16 bits scaled to 8; any other as it is."""
    if not image.mode.startswith("I;16"):
        return image
    import numpy as np
    import PIL.Image

    return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


@functools.lru_cache(maxsize=64)
def _conversion(data: bytes) -> Conversion | None:
    """The bytes of a profile -> how to convert from it; None where it cannot be used."""
    if len(data) > MAX_BYTES:
        return None
    from PIL import ImageCms

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


def _is_srgb(transform: Any, mode: str) -> bool:
    """Whether a transform leaves colours spread over the whole cube (or greys) as they are."""
    import numpy as np
    import PIL.Image

    if mode == "CMYK":
        return False
    levels = np.linspace(0, 255, PROBE_STEPS).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(PROBE_STEPS, -1, 3)
    probe = PIL.Image.fromarray(np.ascontiguousarray(cube if mode == "RGB" else cube[..., 0]))
    shown, seen = (np.asarray(image).astype(int) for image in (probe.convert("RGB"), transform.apply(probe)))
    return int(np.abs(shown - seen).max()) <= SAME_LEVELS


def sentences(counts: Mapping[str, int], examples: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """What to tell about the profiles of a data set: pictures of each kind, and the first of them where it is known."""
    texts = {
        "converted": "images have a colour profile other than sRGB and are converted to sRGB",
        "not usable": "images have a colour profile that cannot be used (damaged, or of another colour space than the "
        "pixels) and keep their colours as stored; export them again as sRGB if the colours matter",
    }
    shown = {name: f" (first {ascii(examples[name])[1:-1]})" if name in examples else "" for name in texts}
    return [f"{counts[name]} {text}{shown[name]}" for name, text in texts.items() if counts.get(name)]
