"""The prompts words are learned in."""

from pathlib import Path

import pytest

from minti.errors import InputError
from minti.inversion.templates import OBJECT, load_templates


@pytest.mark.parametrize(("name", "count"), [("object", 27), ("style", 17)])
def test_lists(name: str, count: int) -> None:
    """The sizes that other projects ship: 27 prompts for objects, 17 for styles, none of them twice."""
    templates = load_templates(name)
    assert len(templates) == len(set(templates)) == count
    for template in templates:
        assert template.count("{}") == 1
        assert template == template.strip().lower()
        assert template.isascii()


def test_what_the_lists_are_for() -> None:
    style = load_templates("style")
    assert load_templates("object") == OBJECT
    assert "a photo of a {}" in OBJECT
    assert all(template.endswith(" in the style of {}") for template in style)
    assert not set(OBJECT) & set(style)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("a drawing of {}\r\n\n   {} on a table  \n   \n„{}“, 写真\n", encoding="utf-8")
    assert load_templates(str(path)) == ("a drawing of {}", "{} on a table", "„{}“, 写真")
    path.write_text("{} here\n", encoding="utf-8-sig")  # as Windows' editor does
    assert load_templates(str(path)) == ("{} here",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a photo of {}\na photo of it\n", "'a photo of it' needs exactly one {}"),
        ("{} and {}\n", "'{} and {}' needs exactly one {}"),
        ("\n  \n", "is empty"),
    ],
)
def test_files_that_are_no_use(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        load_templates(str(path))
    assert str(path) in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
def test_what_is_no_list_and_no_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "objekt"
    if kind == "folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="neither object nor style, nor a text file") as error:
        load_templates(str(path))
    assert str(path) in str(error.value)
