"""Files are complete or not there at all."""

from pathlib import Path
from typing import NoReturn

import pytest

from cps_ray.files import read_json, write_json, write_text, write_whole


def half_written(path: Path) -> NoReturn:
    path.write_text("half")
    raise OSError("no space left")


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, half_written)
    assert path.read_text() == "old"


def test_a_writer_that_fails_leaves_no_new_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no space left"):
        write_whole(tmp_path / "a.txt", half_written)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    assert write_whole(path, lambda temporary: temporary.write_text("newer")) == len("newer")
    assert path.read_text() == "newer"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"name": "µ", "values": [1, 2.5, None]})
    assert read_json(path) == {"name": "µ", "values": [1, 2.5, None]}
    assert path.read_text(encoding="utf-8").endswith("}\n")


def test_a_missing_file_is_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") is None
