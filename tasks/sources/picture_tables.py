"""Parquet tables of pictures, as the Hugging Face hub publishes them and `tasks.sources.laion` writes them -> entries.

A picture is the `bytes` of a struct (what `datasets` writes) or a binary column. The names of the classes
and the kinds of the columns stand in the schema's metadata under "huggingface"; what does not stand
there is found by the usual names, or told by `download.columns`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tasks.runtime.stage import StageError
from tasks.sources.entry import SPLITS, Entry, Problem, Source, settle_splits

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

IMAGE_NAMES = ("image", "img", "jpg", "png", "picture")
LABEL_NAMES = ("label", "labels", "class")
CAPTION_NAMES = ("caption", "captions", "text", "prompt")
MAX_CLASSES = 100_000
"""Numbers up to which a column of labels that nobody named is taken for one."""
ELEMENT = re.compile(r"(?P<column>.+)\[(?P<place>\d+)\]")
"""A label that is one of a list of attributes, such as "attributes[20]"."""
BATCH_ROWS = 64
READ_BUFFER = 1 << 20


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read, and what its labels are called."""

    image: str
    label: str | None
    captions: list[str]
    classes: list[str]
    """Empty where the schema names none."""
    key: str | None = None
    safety: str | None = None
    place: int | None = None
    """Where in the lists of its column the label stands; None where the column holds the labels themselves."""


def count_rows(files: list[Path]) -> int:
    """Rows of all tables, from their footers. Raises `StageError` where one is no Parquet file."""
    return sum(_open(file).metadata.num_rows for file in files)


def read(tables: dict[str, Path], wanted: dict[str, Any], max_bytes: int) -> Source:
    """Tables of one data set, by their published paths -> entries; pictures over `max_bytes` are not kept.

    `wanted` may name the columns `image`, `label`, `captions`, `key`, `safety`, and say `classes`.
    Raises `StageError` where there is no such column, or no column of pictures.
    """
    files = list(tables.values())
    columns = _columns(_open(files[0]).schema_arrow, wanted)
    if columns.label and not columns.classes:
        columns = replace(columns, classes=_classes(files, columns.label, columns.place))
    splits = {name: _split_of(name) for name in tables}
    settled = settle_splits(set(splits.values()))
    entries = (
        entry
        for name, file in sorted(tables.items())
        for entry in _entries(file, name, columns, settled[splits[name]], max_bytes)
    )
    return Source(columns.classes, count_rows(files), entries)


def _open(file: Path) -> pq.ParquetFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, buffer_size=READ_BUFFER)
    except (pa.ArrowInvalid, OSError) as error:
        sentence = f"{file.name} is no Parquet file ({error}); narrow download.hub.files, or get it again"
        raise StageError(sentence) from None


def _columns(schema: pa.Schema, wanted: dict[str, Any]) -> Columns:
    features, place = _features(schema), None
    element = ELEMENT.fullmatch(wanted.get("label") or "")
    if element and wanted["label"] not in schema.names:
        wanted, place = wanted | {"label": element["column"]}, int(element["place"])
    for key in ("image", "label"):
        if wanted.get(key) and wanted[key] not in schema.names:
            raise StageError(_no_column(key, wanted[key], schema))
    if wanted.get("label"):
        _require_labels(schema.field(wanted["label"]), place)
    for name in wanted.get("captions") or ():
        if name not in schema.names:
            raise StageError(_no_column("captions", name, schema))
    image = wanted.get("image") or _found(schema, features, "Image", IMAGE_NAMES, _is_picture)
    if image is None:
        raise StageError(
            f"no column holds pictures (there are {', '.join(schema.names)}); name it in download.columns.image"
        )
    label = wanted.get("label") or _found(schema, features, "ClassLabel", LABEL_NAMES, _is_label)
    captions = list(wanted.get("captions") or ())
    if not captions:
        captions = [name for name in schema.names if name.lower() in CAPTION_NAMES and _is_caption(schema.field(name))]
    classes = list(wanted.get("classes") or ())
    if classes and label is None:
        raise StageError(
            f"no column holds labels for download.columns.classes (there are {', '.join(schema.names)}); name it in "
            "download.columns.label, an element of lists as 'attributes[20]'"
        )
    classes = classes or list((features.get(label, {}) if label else {}).get("names") or ())
    names = [str(name) for name in classes]
    return Columns(image, label, captions, names, wanted.get("key"), wanted.get("safety"), place)


def _require_labels(field: pa.Field, place: int | None) -> None:
    """Raise `StageError` where a column cannot hold labels: texts, numbers, or lists of them with a place in them."""
    import pyarrow as pa

    kind, listed = field.type, pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type)
    kind = kind.value_type if listed else kind
    scalar = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if listed != (place is not None) or not (scalar or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise StageError(
            f"download.columns.label: the column '{field.name}' holds {field.type}; name one of texts or whole "
            f"numbers, or one element of lists as '{field.name}[0]'"
        )


def _no_column(key: str, name: str, schema: pa.Schema) -> str:
    return f"the tables have no column '{name}' (there are {', '.join(schema.names)}); correct download.columns.{key}"


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What `datasets` wrote about each column; nothing where it did not write the file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {name: its for name, its in features.items() if isinstance(its, dict)}


def _found(schema: pa.Schema, features: dict[str, Any], kind: str, names: tuple[str, ...], fits: Any) -> str | None:
    """The column of a `kind` of feature, or else of one of the usual names."""
    declared = [name for name in schema.names if features.get(name, {}).get("_type") == kind]
    usual = [name for name in schema.names if name.lower() in names and fits(schema.field(name))]
    return next(iter(declared + usual), None)


def _is_picture(field: pa.Field) -> bool:
    import pyarrow as pa

    kind = field.type
    if pa.types.is_struct(kind):
        return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_label(field: pa.Field) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(field.type) or pa.types.is_string(field.type))


def _is_caption(field: pa.Field) -> bool:
    import pyarrow as pa

    kind = field.type.value_type if pa.types.is_list(field.type) else field.type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _classes(files: list[Path], label: str, place: int | None) -> list[str]:
    """Names of classes that nobody named: the texts that occur, sorted, or the numbers up to the largest one.

    Raises `StageError` where the numbers are too large to be labels.
    """
    found = {value for file in files for value in _labels_of(file, label, place) if value is not None}
    texts = sorted(value for value in found if isinstance(value, str))
    if texts:
        return texts
    largest = max((int(value) for value in found if _is_whole(value)), default=-1)
    if largest >= MAX_CLASSES:
        raise StageError(
            f"the column '{label}' holds numbers up to {largest}, which are no labels; choose another in "
            "download.columns.label, or name download.columns.classes"
        )
    return [str(number) for number in range(largest + 1)]


def _labels_of(file: Path, label: str, place: int | None) -> list[Any]:
    """The different values of a table's labels."""
    import pyarrow.compute as pc

    column = _open(file).read([label])[label]
    if place is None:
        return pc.unique(column).to_pylist()
    return list({_element(value, place) for value in column.to_pylist()})


def _element(value: Any, place: int | None) -> Any:
    """A label, or the one at a `place` of a list; None where the list ends before it."""
    if place is None or value is None:
        return value
    return value[place] if place < len(value) else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _split_of(name: str) -> str | None:
    """The split that a path says: data/train-00000-of-00006.parquet by its file, train/0000.parquet by its folder."""
    *folders, file = PurePosixPath(name.lower()).parts
    words = [re.split(r"[-_.]", file)[0], *reversed(folders)]
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _entries(file: Path, name: str, columns: Columns, split: str | None, max_bytes: int) -> Iterator[Entry]:
    labels = {text: number for number, text in enumerate(columns.classes)}
    single = [name for name in (columns.key, columns.image, columns.label, columns.safety) if name]
    read = list(dict.fromkeys([*single, *columns.captions]))
    stem, row = PurePosixPath(name).with_suffix(""), 0
    for batch in _open(file).iter_batches(BATCH_ROWS, columns=read):
        for values in batch.to_pylist():
            key = values[columns.key] if columns.key else f"{stem}/{row:07d}"
            yield _entry(key, values, columns, labels, split, max_bytes)
            row += 1


def _entry(
    key: str, values: dict[str, Any], columns: Columns, labels: dict[str, int], split: str | None, max_bytes: int
) -> Entry:
    picture = values[columns.image]
    data = picture.get("bytes") if isinstance(picture, dict) else picture
    size = len(data or b"")
    said = _element(values[columns.label], columns.place) if columns.label else None
    label, problem = _label(said, columns, labels)
    if data is None:
        problem = Problem("no bytes", "the table holds no bytes of this picture")
    elif size > max_bytes:
        problem, data = Problem("oversized", f"{size} bytes are over the limit of {max_bytes}"), None
    captions = [text for column in columns.captions for text in _texts(values[column])]
    safety = values[columns.safety] if columns.safety else None
    return Entry(key, data, size, label, tuple(captions), split, problem, safety)


def _label(value: Any, columns: Columns, labels: dict[str, int]) -> tuple[int | None, Problem | None]:
    """A value of the label column -> its number; -1, null and NaN are no label, others must be of a class."""
    if value is None or value != value or value == -1:
        return None, None
    number = labels.get(value, -1) if isinstance(value, str) else int(value) if _is_whole(value) else -1
    if not 0 <= number < len(columns.classes):
        return None, Problem("label out of range", f"{value!r} is none of the {len(columns.classes)} classes")
    return number, None


def _texts(value: Any) -> list[str]:
    """One caption, or a list of them; empty ones, null and NaN are none."""
    texts = value if isinstance(value, list) else [value]
    return [str(text).strip() for text in texts if text is not None and text == text and str(text).strip()]
