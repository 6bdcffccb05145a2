"""The command `prepare`: shards, a summary, or one line of error."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cps_ray.datasets.shards import open_shards
from cps_ray.prepare import main

RECIPE = """\
classes:
  - {name: soil, color: [0, 0, 0]}
  - {name: crop, color: [0, 200, 0]}
  - {name: weed, color: [200, 0, 0]}
splits:
  train: {images: images/*, masks: masks/*, unlabeled: more/*}
"""


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    raw = tmp_path / "raw"
    for number, name in enumerate(("images/a.png", "images/b.png", "more/c.png")):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(raw / name)
    (raw / "masks").mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.array([[0, 0, 0, 1]] * 4, np.uint8)).save(raw / f"masks/{name}.png")
    (raw / "recipe.yaml").write_text(RECIPE)
    return raw


def test_folder(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["folder", str(raw), str(tmp_path / "out"), "--recipe", str(raw / "recipe.yaml")]) == 0
    shards = open_shards(tmp_path / "out")
    assert shards.manifest.made_by.format == "folder, recipe.yaml"
    assert shards.manifest.splits["train"].class_pixels == (24, 8, 0)
    said = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if "│" in line]
    assert cells == [["images", "3"], ["masks", "2"], ["soil", "75.00 (2)"], ["crop", "25.00 (2)"], ["weed", "- (0)"]]


def test_synthetic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--train", "3", "--val", "2", "--test", "1", "--height", "32", "--width", "40", "--seed", "5"]
    assert main(["synthetic", str(tmp_path / "out"), *sizes]) == 0
    shards = open_shards(tmp_path / "out")
    assert {name: split.images for name, split in shards.manifest.splits.items()} == {"train": 3, "val": 2, "test": 1}
    assert set(shards.index("train").width) == {40}
    assert "train=3, val=2, test=1, height_px=32, width_px=40, seed=5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["camvid", "nowhere", "out"], "error: nowhere: no such folder; it must be the folder that holds train/*"),
        (["synthetic", "out", "--height", "3"], "error: height_px: must be at least 32, but got 3"),
        (["folder", "raw", "out", "--recipe", "none.yaml"], "error: none.yaml"),
        (["synthetic", "raw"], "error: raw: already exists"),
    ],
)
def test_errors_are_one_line_and_exit_2(
    raw: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(raw.parent)
    assert main(arguments) == 2
    found = capsys.readouterr()
    assert found.err.strip().startswith(said)
    assert found.err.strip().count("\n") == 0
    assert found.out == ""
    assert not Path("out").exists()
