"""YOLO's text becomes what is inside of its polygons, and text without outlines is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import fuzz
from numpy.typing import NDArray

from cps_ray.datasets.prepare.annotations.shapes import paint
from cps_ray.datasets.prepare.annotations.yolo import read_yolo_names, yolo_shapes
from cps_ray.datasets.prepare.findings import BadItemError, Finding

SIZE = HEIGHT, WIDTH = 60, 90
NAMES = {0: "road", 1: "car", 12: "sky"}
TRAIN_IDS = {"car": 1, "road": 0, "sky": 255}


def mask_of(data: bytes, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    shapes = yolo_shapes("a.txt", data, size, NAMES, TRAIN_IDS)
    return paint(shapes, size, uncovered=9, overlaps="later")


def line(category: int, points: NDArray[np.float64]) -> bytes:
    return f"{category} {' '.join(f'{number:.6f}' for number in points.ravel())}\n".encode()


def inside(points: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether the middle of each pixel is inside, by counting the edges to its right, and whether an edge is within 1 px."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    odd, near = np.zeros(SIZE, np.bool_), np.zeros(SIZE, np.bool_)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            odd ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * (bx - ax) / (by - ay))
        along = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2), 0, 1)
        near |= np.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay)) <= 1
    return odd, near


@pytest.mark.parametrize("seed", range(40))
def test_pixels_are_those_inside_of_the_polygon(seed: int) -> None:
    draw = np.random.default_rng(seed)
    fractions = draw.uniform(0, 1, (draw.integers(3, 9), 2)).round(6)  # many cross themselves
    odd, near = inside(fractions * (WIDTH, HEIGHT))
    found = mask_of(line(1, fractions)) == 1
    assert near.mean() < 0.5
    assert np.array_equal(found[~near], odd[~near])


def test_later_lines_lie_on_top_and_lines_may_end_in_any_way() -> None:
    left, all_of_it = b"0 0 0 0.5 0 0.5 1 0 1", b"1 0 0 1 0 1 1 0 1"
    for end in (b"\n", b"\r\n", b"\n\n \n"):
        found = mask_of(all_of_it + end + left + end)
        assert (found[:, :45] == 0).all()
        assert (found[:, 45:] == 1).all()
    assert (mask_of(left + b"\n" + all_of_it) == 1).all()
    assert (mask_of(b"12 -0.005 -0.005 1.005 0 1 1 0 1") == 255).all(), "rounded beyond the border"


@pytest.mark.parametrize("data", [b"", b"\n", b" \r\n\n"])
def test_empty_files_have_no_objects(data: bytes) -> None:
    assert (mask_of(data) == 9).all()


@pytest.mark.parametrize(
    ("text", "found", "remedy"),
    [
        (b"1 0.5 0.5 0.1 0.1", "but this is a box, with no outline", "export it again for segmentation"),
        (b"1 0.1 0.1", "at least 3 points, but this has 1", "remove it"),
        (b"1", "at least 3 points, but this has 0", "remove it"),
        (b"1 0 0 1 0 1 1 0.9", "pairs x y, but this line has 7 numbers", "without confidences"),
        (b"7 0 0 1 0 1 1", "begins with '7'", "use the data.yaml of this export"),
        (b"1.0 0 0 1 0 1 1", "begins with '1.0'", "use the data.yaml of this export"),
        (b"-1 0 0 1 0 1 1", "begins with '-1'", "use the data.yaml of this export"),
        (b"car 0 0 1 0 1 1", "begins with 'car'", "use the data.yaml of this export"),
        (b"\xff\xfe1 0 0 1 0 1 1", "begins with", "use the data.yaml of this export"),
        (b"1 0 0 90 0 90 60", "0..1, of the sides, but are 0..90", "divide x by the width"),
        (b"1 0 0 1 0 1 -0.02", "0..1, of the sides, but are -0.02..1", "divide x by the width"),
        (b"1 0 0 1 0 1 nan", "but one is nan", "draw it again"),
        (b"1 0 0 1 0 1 x", "some are not", "draw it again"),
    ],
)
def test_lines_that_are_no_polygon(text: bytes, found: str, remedy: str) -> None:
    finding = refused(b"1 0 0 1 0 1 1\n\n" + text + b"\n")
    assert found in finding.found
    assert remedy in finding.remedy
    assert finding.where == "a.txt:3"


def refused(data: bytes, **more: Any) -> Finding:
    with pytest.raises(BadItemError) as caught:
        mask_of(data, **more)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return caught.value.finding


def test_long_lines_are_refused() -> None:
    assert "at most 1000000 points" in refused(b"1 " + b"0 0 " * 1_000_001).found
    assert "at most 1000000 points" in refused(b"1 " + b"0 0 " * 3_000_000).found
    assert "begins with '1111" in refused(b"1" * 5000 + b" 0 0 1 0 1 1").found


def test_names_must_be_labels() -> None:
    with pytest.raises(BadItemError, match=r"a.txt:1: every label must be one of a class, but 'sky' is of none"):
        yolo_shapes("a.txt", b"12 0 0 1 0 1 1", SIZE, NAMES, {"car": 1})


def test_damaged_files_are_refused_or_read() -> None:
    fuzz(b"1 0.1 0.2 0.9 0.25 0.5 0.75\n0 0.5 0.2 0.9 0.25 0.5 0.5 0.1 0.3\n", mask_of)


# -------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("names: [road, car]\nnc: 2\n", {0: "road", 1: "car"}),
        ("names:\n- road\n- 'no'\n- no\n- 1\n", {0: "road", 1: "no", 2: "no", 3: "1"}),
        ("names:\n  0: road\n  12: sky\n", {0: "road", 12: "sky"}),
        ("\ufeffpath: ../x\nnames: {1: 'Straße: A'}", {1: "Straße: A"}),
    ],
)
def test_names_of_a_data_yaml(tmp_path: Path, text: str, names: dict[int, str]) -> None:
    (tmp_path / "data.yaml").write_text(text)
    assert read_yolo_names(str(tmp_path / "data.yaml")) == names


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nc: 2",
        b"names: road",
        b"names: []",
        b"names: {}",
        b"names: [[a], b]",
        b"names: {a: b}",
        b"names: {1: a, 01: b}",
        b"names: ['', b]",
        b"names: [a, b",
        b"\xff\xfe",
        b"- names",
        b"a: &a [x]\nnames: [*a]",
        pytest.param(b"names: " + b"[" * 5000, id="deep"),
        pytest.param(b"names: [" + b"a," * 600_000 + b"]", id="long"),
    ],
)
def test_files_without_names(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "data.yaml"
    path.write_bytes(data)
    with pytest.raises(BadItemError) as caught:
        read_yolo_names(str(path))
    assert str(caught.value).startswith(f"{path}: it must ")
    assert str(caught.value).endswith("; give it `names: [road, car]`.")


def test_damaged_names_are_refused_or_read(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"

    def use(changed: bytes) -> None:
        path.write_bytes(changed)
        read_yolo_names(str(path))

    fuzz(b"path: ../x\nnc: 3\nnames: {0: road, 1: 'car', 12: sky}\nroboflow: {version: 3}\n", use)
