"""Texts of strangers, as lines and as names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.text import MOST_NAME, as_name, name_problem, one_line, plain_lines, plain_text


def test_text_is_made_harmless_and_bounded() -> None:
    """Escapes for what does not print, an ellipsis for what does not end, all else untouched."""
    assert plain_text("a\x1b[31m\r\n\t\x9b") == "a\\x1b[31m\\r\\n\\t\\x9b"
    assert plain_text("\u2028\u202e\ud800") == "\\u2028\\u202e\\ud800"
    assert plain_text("x" * 600) == "x" * 497 + "..."
    assert plain_text("naïve 検証 [red]") == "naïve 検証 [red]"
    assert one_line("two\r\n lines  \x07") == "two lines \\x07"
    assert plain_lines("two\r\n\tlines\x07") == "two\\r\n\tlines\\x07"


@given(st.text(st.characters() | st.characters(categories=["Cs", "Cc", "Cf"])))
def test_a_line_is_printable_and_a_name_is_good(text: str) -> None:
    """Whatever the text was; a good name stays as it is."""
    assert plain_text(text).isprintable()
    name = as_name(text)
    assert name_problem(name) is None or not text
    assert as_name(name) == name
    name.encode()
    assert (name == text) == (name_problem(text) is None) or not text


@pytest.mark.parametrize(
    "text",
    ["val_loss/a b", "Genauigkeit \u00e4", "\u6b63\u78ba\u3000\u5ea6", "\U0001f469\u200d\U0001f52c", "x" * MOST_NAME],
)
def test_names_in_any_script_are_good(text: str) -> None:
    """Wide spaces and joiners belong to scripts and pictures."""
    assert as_name(text) == text


def test_long_names_with_one_beginning_stay_different() -> None:
    """They end in a hash of the whole."""
    assert len({as_name("x" * 1_000 + str(number)) for number in range(100)}) == 100
