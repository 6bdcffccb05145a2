"""List files as people have them: ids or paths, one column or more, with and without the last newline."""

import codecs
from pathlib import Path

import pytest

from cps_ray.datasets.lists import listed_ids, matcher, read_list, write_list
from cps_ray.errors import DataError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train.txt"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    "text",
    [
        "\u00e4_1\nb_2\n",
        "\u00e4_1\nb_2",
        "\u00e4_1\r\n\r\nb_2\r\n",
        "\u00e4_1\rb_2\r",
        "\u00e4_1\n  b_2  \n\n",
        "\u00e4_1 masks/\u00e4_1.png\nb_2 masks/b_2.png",
        "\u00e4_1\tmasks/\u00e4_1.png\nb_2\tmasks/b_2.png\n",
        "a\u0308_1\nb_2\n",
    ],
    ids=["lines", "no last newline", "Windows", "old Mac", "spaces", "two columns", "tabs", "decomposed"],
)
def test_lists_as_people_have_them(path: Path, text: str, encoding: str) -> None:
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(encoding, b"")
    path.write_bytes(mark + text.encode(encoding))
    assert list(listed_ids(path, ["\u00e4_1", "b_2"], "a test")) == ["\u00e4_1", "b_2"]


ODD = [
    "photo 1",
    "photo",
    "photo 1 copy",
    " leads with a space",
    "ends with one ",
    "tab\there",
    "# no comment",
    "a,b;c",
    "m\u00fcnchen",
    "\u6771\u4eac",
    "\u0645\u062f\u06cc\u0646\u0647",
    "drive_a/00000",
    "drive_b/00000",
    "00000",
    "back\\slash",
    "v1.2",
    "v1.2.png",
    "v1",
    "set [v2]/*",
    "50%/what?",
    "'quoted'",
    "line\u2028separator\x0b\x85",
    "./dot",
    "x_leftImg8bit",
    "x",
]


def test_what_was_written_is_read_whatever_the_names(path: Path) -> None:
    write_list(path.parent / "new/list.txt", ODD)
    assert list(listed_ids(path.parent / "new/list.txt", ODD[::-1], "a test")) == ODD


def test_an_id_of_two_lines_cannot_be_written(path: Path) -> None:
    with pytest.raises(DataError, match=r"train.txt: ids must be of one line each, but 'a\\nb' is not"):
        write_list(path, ["a\nb"])
    assert not path.exists()


def test_the_line_of_each_entry_is_kept_for_messages(path: Path) -> None:
    path.write_text("a\n\nb\n")
    assert read_list(path) == {"a": 1, "b": 3}


@pytest.mark.parametrize("text", ["a\nb\na\n", "a\nb\na x\n", "a\nb\nimages/a.png\n"])
def test_an_image_twice_names_both_lines(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(DataError, match=r"train.txt:3: '.*' is listed twice, first in line 1"):
        listed_ids(path, ["a", "b"], "a test")


def test_an_entry_that_fits_several_ids_names_both_and_the_way_out(path: Path) -> None:
    ids = ["drive_a/00000", "drive_b/00000"]
    path.write_text("drive_a/00001\n00000\n")
    message = r"train.txt:2: '00000' must mean one image of a test, but fits 'drive_a/00000' and 'drive_b/00000'; write the whole id"
    with pytest.raises(DataError, match=message):
        listed_ids(path, [*ids, "drive_a/00001"], "a test")
    path.write_text("drive_b/00000\n")
    assert list(listed_ids(path, ids, "a test")) == ids[1:]


def test_an_unknown_entry_names_its_line_and_an_id(path: Path) -> None:
    path.write_text("a\nc.png\nd\n")
    with pytest.raises(
        DataError, match=r"train.txt:2: 'c.png' is no image of a test, whose ids look like 'a', nor are 1 more of 3"
    ):
        listed_ids(path, ["a", "b"], "a test")


@pytest.mark.parametrize("data", [b"", b"\n \n"])
def test_an_empty_list_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train.txt: the list must name at least one image"):
        read_list(path)


def test_what_is_no_text_is_refused(path: Path) -> None:
    path.write_bytes("a\nb\n".encode("utf-32"))
    with pytest.raises(
        DataError, match=r"train.txt: a list of ids must be text, but this file is not; save it as UTF-8"
    ):
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
        ("a_1", ["a_1"]),
        ("a_1.jpg", ["a_1"]),
        ("./a_1", ["a_1"]),
        ("JPEGImages/a_1.jpg", ["a_1"]),
        ("/images/train/a_1.png", ["a_1"]),
        ("images\\train\\a_1.png", ["a_1"]),
        ("leftImg8bit/train/bonn/a_1_leftImg8bit.png", ["a_1"]),
        ("deep/b.2", ["deep/b.2"]),
        ("b.2", ["deep/b.2"]),
        ("raw/deep/b.2.png masks/b.2.png", ["deep/b.2"]),
        ("other/b.2.png", []),  # deep/b.2 is another image
        ("a_1_7.png", []),  # a number is no suffix of a data set, but another image
        ("a_2", []),
        ("", []),
        ("images/a_1.jpg masks/c_3.png", ["a_1"]),
        ("my images/c_3.jpg", ["c_3"]),
        ("my images/c_3.jpg my masks/c_3.png", ["c_3"]),
        ("my images/c_3.jpg my masks/a_1.png", ["a_1", "c_3"]),  # nothing tells columns from a folder with a space
        ("a_1\tc_3", ["a_1"]),
    ],
)
def test_an_entry_means_an_id(entry: str, meant: list[str]) -> None:
    assert sorted(matcher(["a_1", "deep/b.2", "c_3"])(entry)) == meant


@pytest.mark.parametrize(
    ("entry", "meant"),
    [
        ("photo 1.jpg", ["photo 1"]),
        ("raw/photo 1.jpg masks/photo 1.png", ["photo 1"]),
        ("photo 3.jpg", []),  # and not `photo` before a second column
        ("photo.jpg 3", ["photo"]),
    ],
)
def test_names_with_spaces(entry: str, meant: list[str]) -> None:
    assert list(matcher(["photo", "photo 1", "photo 2"])(entry)) == meant
