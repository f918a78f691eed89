"""Detection of unexpected scripts and of control characters in captions."""

import pyarrow as pa
import pytest

from tasks.sources.entry import is_control
from tasks.validation.writing_systems import Reader


@pytest.mark.parametrize(
    ("text", "scripts", "foreign"),
    [
        ("a café, 3 µm wide", ("LATIN",), False),
        ("кошка", ("LATIN",), True),
        ("кошка", ("LATIN", "CYRILLIC"), False),
        ("a cat (кот)", ("LATIN",), False),
        ("кошка (cat)", ("LATIN",), True),
        ("猫が好き", ("CJK", "HIRAGANA"), False),
        ("猫が好き", ("LATIN",), True),
        ("12:30 \U0001f408", ("LATIN",), False),
        ("", ("LATIN",), False),
    ],
)
def test_a_text_is_foreign_if_most_letters_are(text, scripts, foreign):
    found, control = Reader(scripts).read(pa.array(["1", text, "--"]))
    assert found.tolist() == [False, foreign, False]
    assert not control.any()


def test_control_codes_are_detected_except_line_ends():
    texts = ["bell\a", "tab\tand\nlines\r\n", "null\0", "escape\x1b[0m", "c1\x80", "never \ufffe"]
    assert Reader(("LATIN",)).read(pa.array(texts))[1].tolist() == [True, False, True, True, True, True]
    assert [any(map(is_control, text)) for text in texts] == [True, False, True, True, True, True]


@pytest.mark.parametrize(
    "text",
    ["ein Bild\u2028zweite Zeile", "vertical\vtab", "next\x85line", "new \U0001fae9", "not yet \U000e0fff", "\uf8ff"],
)
def test_white_space_and_unassigned_code_points_are_text(text):
    """Python 3.11 knows Unicode 14, 3.13 knows 15.1: a code point that one of them does not know is no fault."""
    assert not any(map(is_control, text))
    assert not Reader(("LATIN",)).read(pa.array([text]))[1].any()


def test_many_texts_are_read_in_slices():
    texts = ["latin"] * 70_000 + ["кошка"] * 2
    assert Reader(("LATIN",)).read(pa.array(texts))[0].sum() == 2
    assert Reader(("LATIN",)).read(pa.array([], pa.string()))[0].shape == (0,)
