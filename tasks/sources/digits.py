"""The source `digits`: 1,797 handwritten digits of 8x8 pixels, a part of scikit-learn.

E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (1998).
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import PIL.Image

from models.hashing import file_sha256
from tasks.runtime.errors import StageError
from tasks.sources.entry import Entry, Source

FILE = "digits.csv.gz"
SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
ORIGIN = "scikit-learn, datasets/data/digits.csv.gz"
COUNT = 1797
CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def copy(raw: Path) -> None:
    """Copy the published file into `raw`. Raises `StageError` if it is missing or has another checksum."""
    package = importlib.util.find_spec("sklearn")  # importing it would take a second
    published = Path(str(package.origin)).parent / "datasets" / "data" / FILE if package else None
    if published is None or not published.is_file():
        raise StageError("scikit-learn's digits.csv.gz is not installed; run 'make repro', which installs it")
    found = file_sha256(published)
    if found != SHA256:
        raise StageError(
            f"the checksum of scikit-learn's {FILE} is {found[:16]}..., not {SHA256[:16]}...; reinstall scikit-learn"
        )
    shutil.copyfile(published, raw / FILE)


def read(file: Path) -> Source:
    """The published table -> one labelled 8x8 grey PNG per row."""
    return Source(CLASSES, COUNT, _entries(file))


def _entries(file: Path) -> Iterator[Entry]:
    with gzip.open(file, "rt", encoding="ascii") as text:
        for row, numbers in enumerate(csv.reader(text)):
            values = [int(float(number)) for number in numbers]
            data = _png(values[:64])
            yield Entry(f"digits-{row:04d}", data, len(data), label=values[64])


def _png(inks: list[int]) -> bytes:
    """64 values from 0 (paper) to 16 (ink) -> an 8x8 grey PNG with values from 0 to 255."""
    png = io.BytesIO()
    PIL.Image.frombytes("L", (8, 8), bytes(round(ink * 255 / 16) for ink in inks)).save(png, "PNG")
    return png.getvalue()
