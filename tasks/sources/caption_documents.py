"""Captions as JSON: documents and lines of objects -> lines of (name of an image, captions).

metadata.jsonl, captions.jsonl   an object a line, with a key such as file_name and one such as text (Hugging Face)
captions.json                    a list of such objects
meta_cap.json                    an object of image -> caption, captions, or an object with one (kohya)
captions_train2017.json          "images" with id and file_name, "annotations" with image_id and caption (COCO)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tasks.sources.caption_tables import FILE_COLUMNS, TEXT_COLUMNS, DamagedLine, Line, UnreadError, column_name
from tasks.sources.image_names import Names, is_image_name
from tasks.sources.text_files import lines, parsed

CAPTION_WORDS = {"caption", "captions", "prompt", "prompts"}


def texts_of(value: Any) -> tuple[str, ...]:
    """The captions that a JSON value holds: a text, or a list of them."""
    texts = value if isinstance(value, list) else [value]
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())


def captions_in(said: dict[str, Any]) -> tuple[str, ...]:
    """The captions that stand in a JSON object under the usual names."""
    return tuple(text for key, value in said.items() if column_name(key) in TEXT_COLUMNS for text in texts_of(value))


def mentions_caption(said: dict[str, Any]) -> bool:
    """Whether a JSON object has something under a key that is called like a caption, such as "caption_en"."""
    return any(
        CAPTION_WORDS & set(column_name(key).split("_")) and isinstance(value, (str, list, dict)) and bool(value)
        for key, value in said.items()
    )


def read_lines(text: str) -> Iterator[Line | DamagedLine] | None:
    """Lines of a file with an object a line; None where no line names an image. Raises `UnreadError` where the lines
    name images, but hold no captions."""
    rows = list(enumerate(lines(text), 1))
    for _, row in rows:
        try:
            said = parsed(row)
        except ValueError:
            continue
        name = _name_in(said) if isinstance(said, dict) else None
        if name is None:
            return None
        if not any(column_name(key) in TEXT_COLUMNS for key in said):
            raise UnreadError(f"no key is called caption, text or prompt (there are {', '.join(said)})"[:500])
        return map(_line, rows)
    return None


def _line(row: tuple[int, str]) -> Line | DamagedLine:
    number, text = row
    try:
        said = parsed(text)
    except ValueError as error:
        return DamagedLine(number, str(error))
    name = _name_in(said) if isinstance(said, dict) else None
    if name is None:
        return DamagedLine(number, "it holds no object with the name of an image")
    return Line(number, name, captions_in(said))


def _name_in(said: dict[str, Any]) -> str | None:
    """What an object calls its image."""
    return next((value for key, value in said.items() if column_name(key) in FILE_COLUMNS and _is_text(value)), None)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def read_document(text: str, names: Names) -> list[Line] | None:
    """Lines of a document; None where it does not name images. Raises `ValueError` where it is no JSON,
    `UnreadError` where it seems to hold captions in a form that is not known here."""
    said = parsed(text)
    found = _of_coco(said)
    if isinstance(said, list):
        found = _of_list(said)
    elif isinstance(said, dict) and found is None:
        found = _of_mapping(said, names)
    if found is None and _mentions_captions(said):
        raise UnreadError(
            "it has captions, but not in a form that is known here: see tasks/sources/caption_documents.py"
        )
    return found


def _of_coco(said: Any) -> list[Line] | None:
    """COCO: captions that name their image by its number."""
    if not isinstance(said, dict) or not all(isinstance(said.get(key), list) for key in ("images", "annotations")):
        return None
    files = {
        image["id"]: image["file_name"]
        for image in said["images"]
        if isinstance(image, dict) and isinstance(image.get("id"), (int, str)) and _is_text(image.get("file_name"))
    }
    notes = [note for note in said["annotations"] if isinstance(note, dict) and "caption" in note]
    return [
        Line(number, files.get(note.get("image_id"), f"image_id {note.get('image_id')}"), texts_of(note["caption"]))
        for number, note in enumerate(notes, 1)
        if isinstance(note.get("image_id"), (int, str))
    ] or None


def _of_list(said: list[Any]) -> list[Line] | None:
    """A list of objects, every one with the name of its image; some with captions."""
    named = [(_name_in(each), captions_in(each)) for each in said if isinstance(each, dict)]
    if len(named) != len(said) or not any(texts for _, texts in named):
        return None
    return [Line(number, name, texts) for number, (name, texts) in enumerate(named, 1) if name] or None


def _of_mapping(said: dict[str, Any], names: Names) -> list[Line] | None:
    """Image -> caption; the images may be named without their suffix."""
    if not any(is_image_name(name) or names.knows(name) for name in said):
        return None
    rows = [
        Line(number, name, captions_in(value) if isinstance(value, dict) else texts_of(value))
        for number, (name, value) in enumerate(said.items(), 1)
    ]
    return rows if any(row.texts for row in rows) else None


def _mentions_captions(said: Any) -> bool:
    """Whether an object in the first levels of a document has a key that is called like a caption."""
    level = [said]
    for _ in range(4):
        if any(isinstance(each, dict) and mentions_caption(each) for each in level):
            return True
        level = [value for each in level for value in _some(each) if isinstance(value, (dict, list))]
    return False


def _some(holder: Any) -> list[Any]:
    values = list(holder.values()) if isinstance(holder, dict) else holder
    return values[:100] if isinstance(values, list) else []
