"""Caption files in JSON and JSON lines -> lines of (image name, captions).

metadata.jsonl, captions.jsonl   one object per line, with keys such as file_name and text (Hugging Face)
captions.json                    a list of such objects
meta_cap.json                    an object that maps an image to a caption, captions, or an object with one (kohya)
captions_train2017.json          "images" with id and file_name, "annotations" with image_id and caption (COCO)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tasks.sources.caption_tables import FILE_COLUMNS, TEXT_COLUMNS, DamagedLine, Line, UnreadError, column_name
from tasks.sources.image_names import Names, is_image_name
from tasks.sources.text_files import Json, lines, parsed

CAPTION_WORDS = {"caption", "captions", "prompt", "prompts"}


def texts_of(value: Json) -> tuple[str, ...]:
    """Captions in a JSON value: a string, or a list of strings."""
    texts = value if isinstance(value, list) else [value]
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())


def captions_in(record: Mapping[str, Json]) -> tuple[str, ...]:
    """Captions under the usual keys of a JSON object."""
    return tuple(text for key, value in record.items() if column_name(key) in TEXT_COLUMNS for text in texts_of(value))


def mentions_caption(record: Mapping[str, Json]) -> bool:
    """Whether a JSON object has a value under a key that resembles a caption, such as "caption_en"."""
    return any(
        CAPTION_WORDS & set(column_name(key).split("_")) and isinstance(value, (str, list, dict)) and bool(value)
        for key, value in record.items()
    )


def read_lines(text: str) -> Iterator[Line | DamagedLine] | None:
    """Read JSON lines; None if no line names an image.

    Raises `UnreadError` if the lines name images but hold no captions.
    """
    rows = list(enumerate(lines(text), 1))
    for _, row in rows:
        try:
            record = parsed(row)
        except ValueError:
            continue
        if not isinstance(record, dict) or _image_name(record) is None:
            return None
        if not any(column_name(key) in TEXT_COLUMNS for key in record):
            raise UnreadError(f"no key is called caption, text or prompt (found {', '.join(record)})"[:500])
        return map(_line, rows)
    return None


def _line(row: tuple[int, str]) -> Line | DamagedLine:
    number, text = row
    try:
        record = parsed(text)
    except ValueError as error:
        return DamagedLine(number, str(error))
    name = _image_name(record) if isinstance(record, dict) else None
    if name is None or not isinstance(record, dict):
        return DamagedLine(number, "it holds no object with the name of an image")
    return Line(number, name, captions_in(record))


def _image_name(record: Mapping[str, Json]) -> str | None:
    """The image that a JSON object names."""
    return next(
        (name for key, value in record.items() if column_name(key) in FILE_COLUMNS if (name := _text(value))), None
    )


def _text(value: Json) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def read_document(text: str, names: Names) -> list[Line] | None:
    """Read a JSON document; None if it does not name images.

    Raises `ValueError` if it is not JSON, `UnreadError` if it seems to hold captions in an unsupported format.
    """
    document = parsed(text)
    if isinstance(document, list):
        found = _of_list(document)
    elif isinstance(document, dict):
        found = _of_coco(document) or _of_mapping(document, names)
    else:
        found = None
    if found is None and _mentions_captions(document):
        raise UnreadError("its captions are in an unsupported format: see tasks/sources/caption_documents.py")
    return found


def _of_coco(document: Mapping[str, Json]) -> list[Line] | None:
    """COCO: captions refer to their image by its id."""
    images, annotations = document.get("images"), document.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        return None
    files = {
        image_id: name
        for image in images
        if isinstance(image, dict)
        if isinstance(image_id := image.get("id"), (int, str)) and (name := _text(image.get("file_name")))
    }
    captioned = [note for note in annotations if isinstance(note, dict) and "caption" in note]
    return [
        Line(number, files.get(image_id, f"image_id {image_id}"), texts_of(note["caption"]))
        for number, note in enumerate(captioned, 1)
        if isinstance(image_id := note.get("image_id"), (int, str))
    ] or None


def _of_list(records: list[Json]) -> list[Line] | None:
    """A list of objects that name their image; some have captions."""
    named = [(_image_name(record), captions_in(record)) for record in records if isinstance(record, dict)]
    if len(named) != len(records) or not any(texts for _, texts in named):
        return None
    return [Line(number, name, texts) for number, (name, texts) in enumerate(named, 1) if name] or None


def _of_mapping(document: Mapping[str, Json], names: Names) -> list[Line] | None:
    """Image -> caption; the images may be named without suffix."""
    if not any(is_image_name(name) or names.has(name) for name in document):
        return None
    rows = [
        Line(number, name, captions_in(value) if isinstance(value, dict) else texts_of(value))
        for number, (name, value) in enumerate(document.items(), 1)
    ]
    return rows if any(row.texts for row in rows) else None


def _mentions_captions(document: Json) -> bool:
    """Whether an object in the first four levels of a document has a key that resembles a caption."""
    level = [document]
    for _ in range(4):
        if any(isinstance(value, dict) and mentions_caption(value) for value in level):
            return True
        level = [child for value in level for child in _first_items(value) if isinstance(child, (dict, list))]
    return False


def _first_items(container: Json) -> list[Json]:
    values = list(container.values()) if isinstance(container, dict) else container
    return values[:100] if isinstance(values, list) else []
