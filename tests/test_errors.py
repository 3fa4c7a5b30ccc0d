"""The one error that users see."""

from minti.errors import LONGEST, InputError


def test_a_very_long_message_keeps_its_beginning_and_end() -> None:
    text = str(InputError(f"{'value ' * 9000}; remove it"))
    assert len(text) <= LONGEST + 5 and text.startswith("value ") and text.endswith("; remove it")
    assert str(InputError("a.txt: is empty; remove it")) == "a.txt: is empty; remove it"


def test_a_line_break_of_a_value_does_not_make_two_lines() -> None:
    assert str(InputError("a\nb: is unknown;\r\n  remove it")) == "a b: is unknown; remove it"
