"""CVAT's `labelmap.txt` says which colour means which class."""

from pathlib import Path

import pytest
from fuzzing import fuzz

from cps_ray.datasets.prepare.annotations.labelmap import read_labelmap
from cps_ray.datasets.prepare.findings import BadItemError

HEADER = "# label:color_rgb:parts:actions\n"


def read(folder: Path, content: str | bytes) -> list[tuple[str, tuple[int, int, int]]]:
    path = folder / "labelmap.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_labelmap(str(path))


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_names_and_colours_in_order(tmp_path: Path, start: str, end: str) -> None:
    text = start + HEADER + "background:0,0,0::\n\nPkw: rot:250, 50,83:head,hand:act\nStraße:1,2,3::"
    expected = [("background", (0, 0, 0)), ("Pkw: rot", (250, 50, 83)), ("Straße", (1, 2, 3))]
    assert read(tmp_path, text.replace("\n", end)) == expected


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a:1,2::", ":2: a line must be name:r,g,b:parts:actions with r, g and b in 0..255, but is 'a:1,2::'"),
        ("a:1,2,256::", ":2: a line must be name:r,g,b:parts:actions"),
        ("a:1,2,-3::", ":2: a line must be name:r,g,b:parts:actions"),
        ("a:1,2,٣::", ":2: a line must be name:r,g,b:parts:actions"),
        ("a:::", ":2: a line must be name:r,g,b:parts:actions"),
        (":1,2,3::", ":2: a line must be name:r,g,b:parts:actions"),
        ("a:1,2,3", ":2: a line must be name:r,g,b:parts:actions"),
        ("a:1,2,3::\na:1,2,4::", ":3: names and colours must be unique, but 'a' is in line 2 too"),
        ("a:1,2,3::\nb:1,2,3::", ":3: names and colours must be unique, but (1, 2, 3) is in line 2 too"),
        ("", ": it must have 1 class a line"),
        pytest.param("\n" * 2**20, ": it must have 1 class a line", id="long"),
    ],
)
def test_lines_that_say_nothing_clear(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(BadItemError) as caught:
        read(tmp_path, HEADER + text)
    assert str(caught.value).startswith(f"{tmp_path / 'labelmap.txt'}{line}")
    assert str(caught.value).endswith("; export it again as `Segmentation mask 1.1`.")


def test_it_must_be_utf8(tmp_path: Path) -> None:
    with pytest.raises(BadItemError, match=r"it must be UTF-8, but byte 0 is not; save it as UTF-8\."):
        read(tmp_path, b"\xff\xfea")


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    data = f"{HEADER}background:0,0,0::\nroad:128,64,128::\n".encode()
    fuzz(data, lambda changed: read(tmp_path, changed))
