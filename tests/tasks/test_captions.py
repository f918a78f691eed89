"""Captions in common formats: joined with their images or reported, never ignored."""

import json
import unicodedata
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks import ingest
from tasks.ingest import _problem
from tasks.pictures.index import CaptionFile
from tasks.runtime.errors import StageError
from tasks.sources import archives, folder, packing, picture_tables
from tasks.sources.entry import TableColumns
from tests.support.data_inputs import picture, write_tree, write_zip

TEXT = {f"x{number}.png": f"a dog, number {number}" for number in range(4)}
PICTURES = {name: picture(number) for number, name in enumerate(TEXT)}
PLAIN = {name: text.replace(",", "") for name, text in TEXT.items()}


@pytest.fixture
def read(tmp_path):
    """Pack files as `download` does and read them: the source, captions by image, problems by other input."""

    def call(files):
        packed = tmp_path / "images.zip"
        packing.pack(write_tree(tmp_path / "in", files), packed)
        return opened(packed)

    return call


def opened(file):
    source = folder.read(file, 1 << 24)
    entries = list(source.entries)
    rows = {entry.key: list(entry.captions) for entry in entries if not _problem(entry, len(source.classes))}
    refused = {entry.key: _problem(entry, len(source.classes)) for entry in entries if entry.key not in rows}
    assert len(entries) == source.count
    return source, rows, refused


def table(delimiter, header=True, quote="", end="\n", texts=TEXT):
    rows = [f"file_name{delimiter}text"] if header else []
    rows += [f"{name}{delimiter}{quote}{text}{quote}" for name, text in texts.items()]
    return end.join(rows) + end


def coco(**others):
    return {
        "images": [{"id": number + 7, "file_name": name} for number, name in enumerate(TEXT)],
        "annotations": [
            {"id": 1, "image_id": number + 7, "caption": text} for number, text in enumerate(TEXT.values())
        ],
        **others,
    }


LISTED = [{"file_name": name, "text": text} for name, text in TEXT.items()]
FORMS = {
    "csv": ("metadata.csv", table(",", quote='"')),
    "tsv": ("a.tsv", table("\t")),
    "semicolons": ("a.csv", table(";")),
    "sep": ("a.csv", "sep=;\r\n" + table(";", end="\r\n")),
    "sep in quotes": ("a.csv", '"sep=|"\n' + table("|")),
    "carriage returns": ("a.csv", table(";", end="\r")),
    "byte order mark": ("a.csv", b"\xef\xbb\xbf" + table(";").encode()),
    "utf-16": ("a.csv", table("\t").encode("utf-16")),
    "utf-16 big end first": ("a.csv", b"\xfe\xff" + table("\t").encode("utf-16-be")),
    "no header": ("a.csv", table(";", header=False)),
    "no header, text first": ("a.csv", "".join(f"{text};{name}\n" for name, text in TEXT.items())),
    "a text file called captions": ("captions.txt", table(",", quote='"')),
    "filepath and prompt": ("a.csv", table(";").replace("file_name;text", "filepath;prompt")),
    "File Path and Caption": ("a.csv", table(";").replace("file_name;text", "File Path;Caption")),
    "a column of file names by its content": ("a.csv", table(";").replace("file_name;text", "image_id;label_text")),
    "names without suffix": ("a.csv", table(";").replace(".png", "").replace("file_name;text", "id;caption")),
    "Windows": ("a.csv", table(";").replace("x", "C:\\My pictures\\x").replace("teC:\\My pictures\\xt", "text")),
    "turns": ("captions.txt", "".join(f"{name}#0\t{text}\n" for name, text in TEXT.items())),
    "jsonl": ("metadata.jsonl", "\n".join(map(json.dumps, LISTED))),
    "captions.jsonl": ("captions.jsonl", "\n".join(map(json.dumps, LISTED)).replace("text", "prompt") + "\n\n"),
    "jsonl in utf-16": ("metadata.jsonl", "\n".join(map(json.dumps, LISTED)).encode("utf-16")),
    "a list": ("captions.json", json.dumps(LISTED)),
    "coco": ("annotations/captions_train.json", json.dumps(coco(info={"description": "x"}))),
    "kohya": ("meta_cap.json", json.dumps({name: {"caption": text} for name, text in TEXT.items()})),
    "kohya without suffix": ("meta_cap.json", json.dumps({name[:2]: {"caption": text} for name, text in TEXT.items()})),
    "kohya, whole paths": ("m.json", json.dumps({f"/a/{name}": {"caption": text} for name, text in TEXT.items()})),
    "a mapping": ("captions.json", json.dumps(TEXT)),
}


@pytest.mark.parametrize("where", ["", "images/"])
@pytest.mark.parametrize("form", FORMS)
def test_every_common_format_is_read(read, form, where):
    name, content = FORMS[form]
    content = content.encode() if isinstance(content, str) else content
    source, rows, refused = read({where + key: data for key, data in PICTURES.items()} | {name: content})
    assert rows == {where + key: [text] for key, text in TEXT.items()}
    assert (refused, source.unmatched_captions) == ({}, 0)
    assert source.caption_files == [CaptionFile(name, captions=4, matched=4)]
    assert source.notes == (f"4 captions from {name}",)


def test_an_image_name_that_is_not_utf_8_is_reported_as_unmatched(read):
    lines = b"image,caption\nx0.png,a dog\ncaf\xe9.png,a cup\n\n,\n"
    source, rows, refused = read(PICTURES | {"c.csv": lines})
    assert (rows["x0.png"], refused, source.unmatched_captions) == (["a dog"], {}, 1)
    assert source.caption_files[0].first_unmatched == "line 3: caf%udce9.png"


def test_a_path_of_another_machine_distinguishes_images_of_the_same_name(read):
    files = {"a/1.png": picture(1), "b/1.png": picture(2)}
    lines = "image,caption\nC:\\set\\a\\1.png,one\n/home/set/b/1.png,two\n"
    _, rows, _ = read(files | {"c.csv": lines.encode()})
    assert rows == {"a/1.png": ["one"], "b/1.png": ["two"]}


def test_the_delimiter_is_the_one_that_gives_columns_of_names_and_captions(read):
    """More semicolons than commas in the first line, and yet a table of commas."""
    lines = "".join(f"{name},a dog; brown; big {number}\n" for number, name in enumerate(TEXT))
    _, rows, _ = read(PICTURES | {"captions.csv": lines.encode()})
    assert rows["x3.png"] == ["a dog; brown; big 3"]


def test_all_caption_columns_are_read(read):
    lines = "image,caption,prompt\n" + "".join(f"{name},one {name},two {name}\n" for name in TEXT)
    _, rows, _ = read(PICTURES | {"c.csv": lines.encode()})
    assert rows["x2.png"] == ["one x2.png", "two x2.png"]


def test_a_quoted_caption_may_span_lines(read):
    lines = "image,caption\n" + "".join(f'{name},"one {name}\nx, and two"\n' for name in TEXT)
    _, rows, _ = read(PICTURES | {"c.csv": lines.encode()})
    assert rows["x1.png"] == ["one x1.png\nx, and two"]


MELTING = {
    "to the next quote": 'image,caption\nx0.png,"a dog\nx1.png,"a cat"\nx2.png,a bird\n',
    "to a quote at an end": 'image,caption\nx0.png,"a dog\nx1.png,a cat\nx2.png,a nail of 5"\nx3.png,a\n',
    "to the end": 'image,caption\nx0.png,a dog\nx1.png,"a cat\nx2.png,a bird\nx3.png,a cow\n',
    "in the first column": 'image,caption\n"x0.png,a dog\nx1.png,a cat\nx2.png,a bird\n',
    "captions first": 'caption;image\n"a dog;x0.png\na cat;x1.png\na bird;x2.png\n',
    "no header": 'x0.png,"a dog\nx1.png,a cat\n',
    "names without suffix": 'id,caption\nx0,"a dog\nx1,a cat\nx2,a bird\n',
    "a whole megabyte": 'image,caption\nx0.png,"a dog\n' + "x1.png,a cat\n" * 100_000,
}


@pytest.mark.parametrize("kind", MELTING)
def test_an_unclosed_quote_is_refused(read, kind):
    with pytest.raises(StageError, match=r"c\.csv.*quote.*not closed"):
        read(PICTURES | {"c.csv": MELTING[kind].encode()})


def test_a_caption_is_not_cut_at_a_delimiter(read):
    with pytest.raises(StageError, match="line 3 has 3 cells"):
        read(PICTURES | {"c.csv": b"image,caption\nx0.png,a dog\nx1.png,a cat, asleep\n"})


NOT_READ = {
    "another column": ("c.csv", "image,words\nx0.png,a dog\n", "no column is called caption"),
    "no header and three columns": ("c.csv", "x0.png,1,a dog\nx1.png,2,a cat\n", "no header"),
    "a table of a spreadsheet": ("captions.xlsx", b"PK", "not as .xlsx"),
    "Parquet": ("metadata.parquet", b"PAR1", "not as .parquet"),
    "lines without captions": ("m.jsonl", '{"file_name": "x0.png", "words": "a dog"}\n', "no key is called caption"),
    "COCO of another set": ("captions.json", json.dumps(coco()).replace("x", "y"), "names none of the 4 images"),
    "captions deeper in a document": (
        "a.json",
        json.dumps({"data": {"x0": {"caption": "a dog"}}}),
        "unsupported format",
    ),
    "a document that is cut": ("meta_cap.json", '{"x0.png": {"capt', "Unterminated string"),
    "a text of the name of an image elsewhere": ("words/x0.txt", "a dog", "does not lie beside it"),
    "a text of the name in other case": ("X0.TXT", "a dog", "does not lie beside it"),
    "another kind of text": ("x0.md", "a dog", "does not lie beside it"),
    "nested lines": ("m.jsonl", "[" * 100_000, None),
    "a nested document": ("m_captions.json", "[" * 100_000, "nested deeper than 64 levels"),
    "a nested file beside an image": ("x0.json", '{"caption":' * 90_000, "nested deeper than 64 levels"),
    "a damaged file beside an image": ("x0.json", "{broken", "Expecting property name"),
    "a key beside an image": ("x0.json", '{"caption_en": "a dog"}', "no key is called caption"),
    "a text of no image": ("captions/y0.txt", "a dog", "no image has the same name"),
    "an oversized text": ("x0.txt", "a" * 2_000_000, "over the limit"),
}


@pytest.mark.parametrize("kind", NOT_READ)
def test_files_that_look_like_captions_and_are_not_read_are_reported(read, kind):
    name, content, reason = NOT_READ[kind]
    _, rows, refused = read(PICTURES | {name: content if isinstance(content, bytes) else content.encode()})
    assert rows == {image: [] for image in PICTURES}
    assert list(refused) == [name]
    if reason:
        assert refused[name].reason == "captions not read"
        assert reason in refused[name].detail


def test_other_files_are_not_reported_as_captions(read):
    files = {
        "README.txt": b"about these pictures",
        "scores.csv": b"model,score\na,1\n",
        "config.json": b'{"text": "no captions", "size": 3}',
        "labels/x0.txt": b"0 0.5 0.5 0.1 0.2\n1 0.1 0.2 0.3 0.4\n",
        "instances.json": json.dumps(coco(annotations=[{"id": 1, "image_id": 7, "bbox": [0, 0, 1, 1]}])).encode(),
    }
    _, _, refused = read(PICTURES | files)
    assert {name: problem.reason for name, problem in refused.items()} == dict.fromkeys(files, "no image file")


def test_bounding_boxes_beside_an_image_are_not_captions(read):
    _, rows, refused = read(PICTURES | {"x0.txt": b"0 0.5 0.5 0.1 0.2\n"})
    assert (rows["x0.png"], refused["x0.txt"].reason) == ([], "no image file")


def test_a_damaged_line_is_skipped_and_reported(read):
    lines = [json.dumps(each) for each in LISTED]
    lines[1], lines[2] = "{broken", '{"a":' * 100_000
    _, rows, refused = read(PICTURES | {"metadata.jsonl": "\n".join(lines).encode()})
    assert rows == {"x0.png": [TEXT["x0.png"]], "x1.png": [], "x2.png": [], "x3.png": [TEXT["x3.png"]]}
    assert {name: problem.reason for name, problem in refused.items()} == {
        "metadata.jsonl, line 2": "captions not read",
        "metadata.jsonl, line 3": "captions not read",
    }
    assert "nested deeper than 64 levels" in refused["metadata.jsonl, line 3"].detail


FOLDERS = {
    "beside the folder": ("images/{}.png", "captions/{}.txt"),
    "beside the images": ("{}.png", "captions/{}.txt"),
    "in a split": ("train/images/{}.png", "train/Captions/{}.txt"),
    "splits in it": ("images/train/{}.png", "texts/train/{}.caption"),
    "objects": ("images/{}.png", "prompts/{}.json"),
    "the whole name": ("{}.png", "{}.png.txt"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_text_files_in_a_captions_folder_are_read(read, kind):
    image, text = FOLDERS[kind]
    files = {image.format(number): picture(number) for number in range(3)}
    said = '{{"caption": "cap {}"}}' if text.endswith(".json") else "cap {}"
    files |= {text.format(number): said.format(number).encode() for number in range(3)}
    _, rows, refused = read(files)
    assert rows == {image.format(number): [f"cap {number}"] for number in range(3)}
    assert refused == {}


def test_a_text_file_that_matches_two_images_is_not_read(read):
    files = {"images/1.png": picture(1), "masks/1.png": picture(2), "captions/1.txt": b"a dog"}
    _, rows, refused = read(files)
    assert rows == {"images/1.png": [], "masks/1.png": []}
    assert refused["captions/1.txt"].reason == "captions not read"


def test_names_are_compared_after_unicode_normalisation(read):
    nfd, nfc = (unicodedata.normalize(form, "Zürich") for form in ("NFD", "NFC"))
    files = {f"{nfd} 1.png": picture(1), f"{nfc} 2.png": picture(2), f"{nfd} 3.png": picture(3), "4.png": picture(4)}
    files |= {"c.csv": f"image,caption\n{nfc} 1.png,one\n{nfd} 2.png,two\n".encode(), f"{nfc} 3.txt": b"three"}
    _, rows, refused = read(files)
    assert sorted(rows.values()) == [[], ["one"], ["three"], ["two"]]
    assert refused == {}
    source, _, _ = read({f"{nfc}/a.png": picture(1), f"{nfd}/b.png": picture(2), "Bern/c.png": picture(3)})
    assert source.classes == ["Bern", nfc]


def test_names_that_differ_only_in_their_unicode_form_are_distinguished_by_it(read):
    nfd, nfc = (unicodedata.normalize(form, "Zürich.png") for form in ("NFD", "NFC"))
    files = {nfc: picture(1), nfd: picture(2), "4.png": picture(4)}
    _, rows, refused = read(files | {"c.csv": f"image,caption\n{nfc},one\n{nfd},two\n".encode()})
    assert (rows, refused) == ({nfc: ["one"], nfd: ["two"], "4.png": []}, {})
    with pytest.raises(StageError, match=r"'Zürich' in c\.csv matches 2 images .* Unicode form .*rename"):
        read(files | {"c.csv": "image,caption\nZürich,one\n4,two\n".encode()})


def test_utf_8_names_in_a_zip_are_read_without_the_utf_8_flag(tmp_path):
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("ZZZrich.png", picture(1))
        archive.writestr("captions.csv", "image,caption\nZürich.png,a lake\n")
    data = (tmp_path / "in.zip").read_bytes()
    (tmp_path / "in.zip").write_bytes(data.replace(b"ZZZrich", "Zürich".encode()))
    assert opened(tmp_path / "in.zip")[1] == {"Zürich.png": ["a lake"]}
    (tmp_path / "in.zip").write_bytes(data.replace(b"ZZZrich", b"Z\x81Zrich"))
    assert [member.name for member in archives.list_members(tmp_path / "in.zip")] == ["ZüZrich.png", "captions.csv"]


TEXTS = {
    "one\u2028line": ["one\u2028line"],
    "one\vline": ["one\vline"],
    "one\x85line\x0c": ["one\x85line"],
    "new emoji \U0001fae9": ["new emoji \U0001fae9"],
    "of no Unicode yet \U000e0fff": ["of no Unicode yet \U000e0fff"],
    "first\r\n\r\nsecond\rthird\n": ["first", "second", "third"],
}


@pytest.mark.parametrize("text", TEXTS)
def test_each_line_of_a_text_file_is_one_caption(read, text):
    _, rows, refused = read({"1.png": picture(1), "1.txt": text.encode()})
    assert (rows, refused) == ({"1.png": TEXTS[text]}, {})
    _, rows, _ = read({"1.png": picture(1), "1.txt": text.encode("utf-16")})
    assert rows == {"1.png": TEXTS[text]}


@pytest.mark.parametrize("content", [b"caf\xe9", b"it\x92s", b"\xff\xfea", b"\xff\xfe\x00\xd8a\x00"])
def test_an_undecodable_text_file_quarantines_its_image(read, content):
    _, rows, refused = read({"1.png": picture(1), "1.txt": content})
    assert (rows, refused["1.png"].reason) == ({}, "caption not UTF-8")


def test_text_files_with_several_lines_give_one_note(read):
    wrapped = b"A woman in red\nstands there.\n\nThe light is warm."
    source, rows, _ = read(PICTURES | {"x0.txt": wrapped, "x1.txt": b"a dog\na brown dog", "x2.txt": b"one"})
    assert [len(texts) for texts in rows.values()] == [3, 2, 1, 0]
    (note,) = source.notes
    assert "2 caption files have several lines, and each line is a separate caption (x0.txt: 3 captions)" in note
    assert "1 of them may be one wrapped text (x0.txt)" in note
    help_text = " ".join((ingest.ingest.__doc__ or "").split())
    assert "Each line of a text file is a separate caption" in help_text


def table_of(tmp_path, metadata=None, **columns):
    values = {"image": [picture(1)], **{name: [text] for name, text in columns.items()}}
    schema = pa.schema([(name, pa.binary() if name == "image" else pa.string()) for name in values], metadata)
    pq.write_table(pa.table(values, schema), tmp_path / "0.parquet")
    return picture_tables.read({"train/0.parquet": tmp_path / "0.parquet"}, TableColumns(), 1 << 20)


def test_unread_columns_of_a_hub_table_that_look_like_captions_are_named(tmp_path):
    source = table_of(tmp_path, caption="a dog", caption_en="a dog", url="x")
    assert source.notes == (
        "columns that look like captions and are not read: caption_en; see download.columns.captions",
    )
    assert table_of(tmp_path, caption="a dog", url="x").notes == ()


@pytest.mark.parametrize("said", [b"[" * 100_000, b'{"info":' * 100_000, b"[]", b'{"info": {"features": 3}}'])
def test_unreadable_metadata_of_a_hub_table_is_ignored(tmp_path, said):
    source = table_of(tmp_path, {b"huggingface": said}, caption="a dog")
    assert [entry.captions for entry in source.entries] == [("a dog",)]


@pytest.mark.parametrize("listed", [False, True])
def test_undecodable_captions_of_a_hub_table_quarantine_their_image(tmp_path, listed):
    """Nothing in a Parquet file makes its texts UTF-8."""
    texts = [[text] if listed else text for text in (b"caf\xe9", "café".encode(), b"a dog")]
    kind = (pa.list_ if listed else lambda its: its)(pa.binary())
    captions = pa.array(texts, kind).view((pa.list_ if listed else lambda its: its)(pa.string()))
    pq.write_table(pa.table({"image": [picture(1)] * 3, "caption": captions}), tmp_path / "0.parquet")
    entries = list(picture_tables.read({"0.parquet": tmp_path / "0.parquet"}, TableColumns(), 1 << 20).entries)
    assert [entry.problem.reason if entry.problem else None for entry in entries] == ["caption not UTF-8", None, None]
    assert [entry.captions for entry in entries[1:]] == [("café",), ("a dog",)]


def places(*folders):
    return {f"{name}/{number}.png": picture(number) for name in folders for number in range(2)}


CLASSES = {
    "train among vehicles": (("bus", "car", "train"), ["bus", "car", "train"], {None}, "count as classes"),
    "in splits": (
        ("train/bus", "train/train", "test/bus", "test/train"),
        ["bus", "train"],
        {"train", "test"},
        "count as classes",
    ),
    "both splits beside folders": (("bus", "car", "train", "test"), ["bus", "car"], {None, "train", "test"}, "rename"),
    "splits alone": (("train", "test"), [], {"train", "test"}, None),
    "kaggle": (("train/cat", "train/dog", "test"), ["cat", "dog"], {"train", "test"}, None),
    "kaggle with samples": (("train/cat", "train/dog", "test", "sample"), None, {None, "train", "test"}, "rename"),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_a_folder_called_like_a_split_may_be_a_class(tmp_path, kind):
    folders, classes, splits, note = CLASSES[kind]
    packing.pack(write_tree(tmp_path / "in", places(*folders)), tmp_path / "images.zip")
    source = folder.read(tmp_path / "images.zip", 1 << 20)
    entries = list(source.entries)
    assert classes is None or source.classes == classes
    assert {entry.split for entry in entries} == splits
    if note is None:
        assert source.notes == ()
    else:
        assert note in source.notes[0]
    if kind in ("train among vehicles", "in splits"):
        assert all(entry.label is not None for entry in entries)


def test_the_order_of_files_does_not_matter(tmp_path):
    files = PICTURES | {"c.csv": table(";").encode(), "m.jsonl": "\n".join(map(json.dumps, LISTED)).encode()}
    one = opened(write_zip(tmp_path / "one.zip", files))
    two = opened(write_zip(tmp_path / "two.zip", dict(reversed(files.items()))))
    assert (one[1], one[0].caption_files) == (two[1], two[0].caption_files)
