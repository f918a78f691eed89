"""What characters say about a text."""

import pyarrow as pa
import pytest

from tasks.validation.writing_systems import Reader, is_control


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
def test_a_text_is_foreign_where_most_letters_are(text, scripts, foreign):
    found, control = Reader(scripts).read(pa.array(["1", text, "--"]))
    assert found.tolist() == [False, foreign, False]
    assert not control.any()


def test_control_codes_are_no_text_but_line_ends_are():
    texts = ["bell\a", "tab\tand\nlines\r\n", "null\0", "escape\x1b[0m", "c1\x85", "nobody's \U000e0fff"]
    assert Reader(("LATIN",)).read(pa.array(texts))[1].tolist() == [True, False, True, True, True, True]
    assert [any(map(is_control, text)) for text in texts] == [True, False, True, True, True, True]


def test_many_texts_are_read_in_slices():
    texts = ["latin"] * 70_000 + ["кошка"] * 2
    assert Reader(("LATIN",)).read(pa.array(texts))[0].sum() == 2
    assert Reader(("LATIN",)).read(pa.array([], pa.string()))[0].shape == (0,)
