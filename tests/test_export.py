"""The command `export`: what it prints, and that the lines it prints run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import write_untrained

from cps_ray.config.train import TrainConfig
from cps_ray.export import main
from cps_ray.model.model import load_model

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tiny: TrainConfig, tmp_path: Path) -> Path:
    return write_untrained(tiny, tmp_path / "best")


@pytest.mark.parametrize(("format", "file"), [("onnx", "model.onnx"), ("torch", "other.pt2")])
def test_the_lines_that_are_printed_run(
    folder: Path, shards: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, format: str, file: str
) -> None:
    monkeypatch.chdir(folder.parent)
    name = ["--opset", "18"] if format == "onnx" else ["best/other.pt2"]
    assert main(["best", f"--{format}", *name, "--size", "40", "50"]) == 0
    printed = capsys.readouterr().out
    entry = json.loads((folder / "model.json").read_text())["exports"][file]
    assert f"best/{file}: network a, float32, {entry['bytes'] / 1e6:.1f} MB" in printed
    assert ", opset 18, " in printed or format == "torch"
    assert "one image of 40x50 px" in printed
    assert "100.000 % of the labels are equal" in printed
    assert "Left out: windows of 32x48 px of larger images." in printed
    _, lines = printed.split("Use it:\n\n")
    assert len(lines.strip().splitlines()) == 5
    photo = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo).save("photo.jpg", exif=exif, quality=100, subsampling=0)
    names: dict[str, Any] = {}
    exec(lines, names)
    upright = Image.fromarray(load_model(folder, device="cpu").to_rgb("photo.jpg")).resize((50, 40))
    assert np.array_equal(np.asarray(names["labels"])[0], load_model(folder, device="cpu").predict(upright))
    assert names["probabilities"].shape == (1, 7, 40, 50)


def test_faults_are_one_line(folder: Path, shards: Path, capsys: Capture) -> None:
    best = str(folder)
    for words, text in (
        ([best], "give --onnx, --torch or both"),
        ([best, "--onnx", "--network", "c"], "network must be one of a, b, ensemble, but got 'c'"),
        ([best, "--onnx", "--opset", "9"], "--opset must be at least 18"),
        ([str(shards), "--onnx"], "must be the folder of a model"),
        ([best, "--torch", "no/such/model.pt2", "--size", "32", "48"], "must be in a folder that exists"),
        ([best, "--torch", "--images", "no/such"], "no/such: must be an image or a folder of images"),
    ):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert text in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
