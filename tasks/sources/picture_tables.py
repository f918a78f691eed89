"""Parquet tables of images, from the Hugging Face hub or written by `tasks.transfer.laion` -> entries.

Images are the field `bytes` of a struct column (as written by `datasets`) or a binary column. Class names and column
features come from the schema metadata "huggingface"; other columns are selected by `download.columns` or, if that is
not set, by their usual names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.runtime.errors import StageError
from tasks.sources.entry import SPLITS, Entry, Problem, Source, TableColumns, settle_splits
from tasks.sources.text_files import Json, is_damaged, parsed

Value: TypeAlias = Any
"""A value of a column as Python object; its type depends on the column."""
IMAGE_NAMES = ("image", "img", "jpg", "png", "picture")
MAP_NAMES = ("conditioning_image", "control_image")
"""Columns of control maps, as in the data sets of diffusers' training of ControlNets."""
LABEL_NAMES = ("label", "labels", "class")
CAPTION_NAMES = ("caption", "captions", "text", "prompt")
CAPTION_WORDS = {*CAPTION_NAMES, "texts", "prompts", "description", "descriptions", "sentence", "sentences"}
"""Words in the names of possible caption columns, such as "caption_en"."""
MAX_CLASSES = 100_000
"""Largest accepted number of classes in a label column without class names."""
ELEMENT = re.compile(r"(?P<column>.+)\[(?P<position>\d+)\]")
"""An element of a list column as label, such as "attributes[20]"."""
BATCH_ROWS = 64
READ_BUFFER = 1 << 20


@dataclass(frozen=True)
class Columns:
    """Columns of a table to read, and the class names."""

    image: str
    label: str | None
    captions: list[str]
    classes: list[str]
    """Class names in the order of the labels; empty if the schema declares none."""
    key: str | None = None
    safety: str | None = None
    position: int | None = None
    """Position of the label in the lists of its column; None if the column holds labels."""
    control: str | None = None
    """Column of control maps."""


def count_rows(files: list[Path]) -> int:
    """Total number of rows, from the file footers. Raises `StageError` if a file is not Parquet."""
    return sum(_open(file).metadata.num_rows for file in files)


def read(tables: dict[str, Path], wanted: TableColumns, max_bytes: int) -> Source:
    """Open the tables of one dataset, by their published paths; images over `max_bytes` are not kept.

    Raises `StageError` if a requested column is missing, or no column holds images.
    """
    files = list(tables.values())
    columns = _columns(_open(files[0]).schema_arrow, wanted)
    if columns.label and not columns.classes:
        columns = replace(columns, classes=_classes(files, columns.label, columns.position))
    splits = {name: _split_of(name) for name in tables}
    settled = settle_splits(set(splits.values()))
    entries = (
        entry
        for name, file in sorted(tables.items())
        for entry in _entries(file, name, columns, settled[splits[name]], max_bytes)
    )
    notes = () if wanted.captions else tuple(_notes(_open(files[0]).schema_arrow, columns))
    return Source(columns.classes, count_rows(files), entries, notes=notes)


def _notes(schema: pa.Schema, columns: Columns) -> list[str]:
    """Message about columns that seem to hold captions but are not read."""
    read = {*columns.captions, columns.image, columns.label, columns.key, columns.safety}
    left = [name for name in schema.names if name not in read and _is_caption(schema.field(name))]
    similar = [name for name in left if CAPTION_WORDS & set(re.split(r"[^a-z]+", name.lower()))]
    if not similar:
        return []
    return [f"columns that look like captions and are not read: {', '.join(similar)}; see download.columns.captions"]


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, buffer_size=READ_BUFFER)
    except (pa.ArrowInvalid, OSError) as error:
        sentence = f"{file.name} is not a Parquet file ({error}); narrow download.hub.files, or get it again"
        raise StageError(sentence) from None


def _columns(schema: pa.Schema, wanted: TableColumns) -> Columns:
    features, position = _features(schema), None
    element = ELEMENT.fullmatch(wanted.label or "")
    if element and wanted.label not in schema.names:
        wanted, position = replace(wanted, label=element["column"]), int(element["position"])
    _require_columns(schema, wanted)
    if wanted.label:
        _require_labels(schema.field(wanted.label), position)
    control = next((name for name in schema.names if name in MAP_NAMES and _is_image(schema.field(name))), None)
    others = {name: feature for name, feature in features.items() if name != control}
    image = wanted.image or _find(schema, others, "Image", IMAGE_NAMES, _is_image)
    if image is None:
        raise StageError(
            f"no column holds images (found {', '.join(schema.names)}); set download.columns.image to its name"
        )
    label = wanted.label or _find(schema, features, "ClassLabel", LABEL_NAMES, _is_label)
    if wanted.classes and label is None:
        raise StageError(
            f"no column holds labels for download.columns.classes (found {', '.join(schema.names)}); set "
            "download.columns.label to its name, or to an element of a list column such as 'attributes[20]'"
        )
    usual = [name for name in schema.names if name.lower() in CAPTION_NAMES and _is_caption(schema.field(name))]
    declared = features.get(label, {}).get("names") if label else None
    classes = wanted.classes or (declared if isinstance(declared, list) else [])
    names = [str(name) for name in classes]
    control = None if control == image else control
    return Columns(image, label, list(wanted.captions) or usual, names, wanted.key, wanted.safety, position, control)


def _require_columns(schema: pa.Schema, wanted: TableColumns) -> None:
    """Raise `StageError` if a column that `download.columns` names is missing."""
    columns: dict[str, Sequence[str | None]]
    columns = {"image": [wanted.image], "label": [wanted.label], "captions": wanted.captions}
    for key, names in columns.items():
        for name in names:
            if name and name not in schema.names:
                raise StageError(
                    f"the tables have no column '{name}' (found {', '.join(schema.names)}); correct "
                    f"download.columns.{key}"
                )


def _require_labels(field: pa.Field, position: int | None) -> None:
    """Raise `StageError` unless a column holds strings or numbers, or lists of them if `position` is set."""
    kind, listed = field.type, pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type)
    kind = kind.value_type if listed else kind
    scalar = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if listed != (position is not None) or not (scalar or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise StageError(
            f"download.columns.label: the column '{field.name}' holds {field.type}; use a column of strings or "
            f"integers, or an element of lists such as '{field.name}[0]'"
        )


def _features(schema: pa.Schema) -> dict[str, dict[str, Json]]:
    """Feature of each column as declared by `datasets`; empty if it did not write the file."""
    try:
        document: Any = parsed((schema.metadata or {})[b"huggingface"])  # of any form; the except clause handles all
        features = document["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _find(
    schema: pa.Schema,
    features: dict[str, dict[str, Json]],
    kind: str,
    names: tuple[str, ...],
    accepts: Callable[[pa.Field], bool],
) -> str | None:
    """The first column declared with a `kind` of feature, or else the first with a usual name and accepted type."""
    declared = [name for name in schema.names if features.get(name, {}).get("_type") == kind]
    usual = [name for name in schema.names if name.lower() in names and accepts(schema.field(name))]
    return next(iter(declared + usual), None)


def _is_image(field: pa.Field) -> bool:
    kind = field.type
    if pa.types.is_struct(kind):
        return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_label(field: pa.Field) -> bool:
    return bool(pa.types.is_integer(field.type) or pa.types.is_string(field.type))


def _is_caption(field: pa.Field) -> bool:
    kind = field.type.value_type if _is_list(field.type) else field.type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _classes(files: list[Path], label: str, position: int | None) -> list[str]:
    """Class names of an undeclared label column: the sorted strings, or the integers from 0 to the largest one.

    Raises `StageError` if the integers are too large to be labels.
    """
    found = {value for file in files for value in _labels_of(file, label, position) if value is not None}
    texts = sorted(value for value in found if isinstance(value, str))
    if texts:
        return texts
    largest = max((int(value) for value in found if _is_whole(value)), default=-1)
    if largest >= MAX_CLASSES:
        raise StageError(
            f"the column '{label}' holds numbers up to {largest}, too large for labels; set "
            "download.columns.label to another column, or set download.columns.classes"
        )
    return [str(number) for number in range(largest + 1)]


def _labels_of(file: Path, label: str, position: int | None) -> list[Value]:
    """Distinct labels of a table."""
    column = _open(file).read([label])[label]
    if position is None:
        return _values(pc.unique(column))
    return list({_element(value, position) for value in _values(column)})


def _element(value: Value, position: int | None) -> Value:
    """The value itself, or its element at `position`; None if the list is shorter."""
    if position is None or value is None:
        return value
    return value[position] if position < len(value) else None


def _is_whole(value: Value) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _split_of(name: str) -> str | None:
    """Split by file name (data/train-00000-of-00006.parquet) or folder (train/0000.parquet), or None."""
    *folders, file = PurePosixPath(name.lower()).parts
    words = [re.split(r"[-_.]", file)[0], *reversed(folders)]
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _entries(file: Path, name: str, columns: Columns, split: str | None, max_bytes: int) -> Iterator[Entry]:
    labels = {text: number for number, text in enumerate(columns.classes)}
    single = [name for name in (columns.key, columns.image, columns.label, columns.safety, columns.control) if name]
    read = list(dict.fromkeys([*single, *columns.captions]))
    stem, row = PurePosixPath(name).with_suffix(""), 0
    for batch in _open(file).iter_batches(BATCH_ROWS, columns=read):
        for values in _records(batch):
            key = values[columns.key] if columns.key else f"{stem}/{row:07d}"
            yield _entry(key, values, columns, labels, split, max_bytes)
            if columns.control and (data := _bytes(values[columns.control])):
                yield Entry(f"{key}#{columns.control}", data, len(data), map_of=key)
            row += 1


def _records(batch: pa.RecordBatch) -> list[dict[str, Value]]:
    """Rows of a batch; invalid UTF-8 in strings becomes lone surrogates."""
    try:
        rows: list[dict[str, Value]] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        columns = map(_values, batch.columns)
        return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: pa.Array | pa.ChunkedArray) -> list[Value]:
    try:
        values: list[Value] = column.to_pylist()
        return values
    except UnicodeDecodeError:
        kind = pa.list_(pa.binary()) if _is_list(column.type) else pa.binary()
        return [_escaped(value) for value in column.cast(kind).to_pylist()]


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _escaped(value: Value) -> Value:
    """Decode bytes, or a list of them; invalid UTF-8 becomes lone surrogates."""
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _entry(
    key: str, values: dict[str, Value], columns: Columns, labels: dict[str, int], split: str | None, max_bytes: int
) -> Entry:
    data = _bytes(values[columns.image])
    size = len(data or b"")
    published = _element(values[columns.label], columns.position) if columns.label else None
    label, problem = _label(published, columns, labels)
    if data is None:
        problem = Problem("no bytes", "the table holds no bytes of this image")
    elif size > max_bytes:
        problem, data = Problem("oversized", f"{size} bytes are over the limit of {max_bytes}"), None
    captions = [text for column in columns.captions for text in _texts(values[column])]
    if any(map(is_damaged, captions)):
        problem = problem or Problem("caption not UTF-8", "a caption of this image is not UTF-8 text")
    safety = values[columns.safety] if columns.safety else None
    return Entry(key, data, size, label, tuple(captions), split, problem, safety)


def _bytes(image: Value) -> Value:
    """Return the encoded image of a cell, a struct of bytes and path or the bytes alone."""
    return image.get("bytes") if isinstance(image, dict) else image


def _label(value: Value, columns: Columns, labels: dict[str, int]) -> tuple[int | None, Problem | None]:
    """A value of the label column -> class index; -1, null and NaN mean unlabelled, other values must be a class."""
    if value is None or value != value or value == -1:
        return None, None
    number = labels.get(value, -1) if isinstance(value, str) else int(value) if _is_whole(value) else -1
    if not 0 <= number < len(columns.classes):
        return None, Problem("label out of range", f"{value!r} is none of the {len(columns.classes)} classes")
    return number, None


def _texts(value: Value) -> list[str]:
    """Captions in a string or a list of strings, without empty strings, null and NaN."""
    texts = value if isinstance(value, list) else [value]
    return [str(text).strip() for text in texts if text is not None and text == text and str(text).strip()]
