"""List files as people have them: ids or paths, one column or more, with and without the last newline."""

from pathlib import Path

import pytest

from cps_ray.datasets.lists import matcher, read_list, write_list
from cps_ray.errors import DataError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train.txt"


@pytest.mark.parametrize(
    "text",
    [
        "a_1\nb_2\n",
        "a_1\nb_2",
        "a_1\r\n\r\nb_2\r\n",
        "\ufeffa_1\n  b_2  \n\n",
        "a_1 masks/a_1.png\nb_2 masks/b_2.png",
        "a_1\tmasks/a_1.png\nb_2\tmasks/b_2.png\n",
    ],
    ids=["lines", "no last newline", "Windows", "byte order mark and spaces", "two columns", "tabs"],
)
def test_the_first_column_of_every_line_counts(path: Path, text: str) -> None:
    path.write_bytes(text.encode())
    assert list(read_list(path)) == ["a_1", "b_2"]


def test_the_line_of_each_entry_is_kept_for_messages(path: Path) -> None:
    path.write_text("a\n\nb\n")
    assert read_list(path) == {"a": 1, "b": 3}


def test_what_was_written_is_read(path: Path) -> None:
    write_list(path.parent / "new/list.txt", ["b", "a"])
    assert list(read_list(path.parent / "new/list.txt")) == ["b", "a"]


def test_an_entry_twice_names_both_lines(path: Path) -> None:
    path.write_text("a\nb\na x\n")
    with pytest.raises(DataError, match=r"train.txt:3: 'a' is listed twice, first in line 1"):
        read_list(path)


@pytest.mark.parametrize("data", [b"", b"\n \n"])
def test_an_empty_list_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train.txt: the list must name at least one image"):
        read_list(path)


def test_what_cannot_be_read_is_refused_with_a_hint(path: Path) -> None:
    with pytest.raises(DataError, match=r"train.txt: the list of ids cannot be read .* A hint\.$"):
        read_list(path, "A hint.")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_list(path)


@pytest.mark.parametrize(
    ("entry", "meant"),
    [
        ("a_1", "a_1"),
        ("a_1.jpg", "a_1"),
        ("JPEGImages/a_1.jpg", "a_1"),
        ("/images/train/a_1.png", "a_1"),
        ("images\\train\\a_1.png", "a_1"),
        ("leftImg8bit/train/bonn/a_1_leftImg8bit.png", "a_1"),
        ("deep/b.2", "deep/b.2"),
        ("a_2", None),
        ("", None),
    ],
)
def test_an_entry_means_an_id(entry: str, meant: str | None) -> None:
    assert matcher(["a_1", "deep/b.2"])(entry) == meant
