"""The command `predict`: what it prints and returns, that it goes on after a real kill, and that a cluster writes the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import changed, write_untrained

from cps_ray.config.train import TrainConfig
from cps_ray.model.description import read_description, write_description
from cps_ray.predict import main
from cps_ray.text import display_path

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of several sizes in subfolders."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    for number in range(60):
        path = folder / f"day {number % 3}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40 + 8 * (number % 5), 48 + 8 * (number % 7), 3), np.uint8)).save(path)
    return folder


def contents(out: Path) -> dict[str, bytes]:
    """Returns what the files say, without the records' order."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "predicted.jsonl"
    }


@pytest.fixture(scope="module")
def whole(best: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run writes, in a process of its own, as a user does."""
    out = tmp_path_factory.mktemp("whole")
    command = [sys.executable, "-m", "cps_ray.predict", str(best), str(photos), str(out), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("60 image(s) in ")
    return contents(out)


def test_one_line_on_success_and_nothing_twice(best: Path, photos: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    words = [str(best), str(photos / "day 0"), str(out), "--device", "cpu", "--no-overlays", "--certainty"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("20 image(s) in ")
    assert said.out.rstrip().endswith(f"images/s): {display_path(out)}")
    assert said.out.count("\n") == 1
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"labels", "certainty"}
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.err == "20 of 20 images were done before.\n"
    assert said.out.startswith("0 image(s) in ")


def test_bad_files_end_in_1_and_one_line(best: Path, photos: Path, tmp_path: Path, capsys: Capture) -> None:
    source, out = Path(shutil.copytree(photos / "day 1", tmp_path / "in")), tmp_path / "out"
    (source / "1.png").write_bytes(b"nothing")
    assert main([str(best), str(source), str(out), "--device", "cpu"]) == 1
    assert (
        capsys.readouterr().err
        == f"error: 1 of 20 images could not be read; {display_path(out)}/failed.csv says why.\n"
    )
    assert len((out / "index.csv").read_text().splitlines()) == 20


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--network", "c"], "network must be one of a, b, ensemble, but got 'c'"),
        (["--device", "cuda:9"], "device must be one that torch has here"),
        (["--address", "auto"], "--address is of use with --ray only"),
    ],
)
def test_wrong_options(
    best: Path, photos: Path, tmp_path: Path, capsys: Capture, options: list[str], text: str
) -> None:
    assert main([str(best), str(photos), str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert text in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_wrong_input(best: Path, photos: Path, tmp_path: Path, capsys: Capture, tiny: TrainConfig) -> None:
    (tmp_path / "empty").mkdir()
    alone = tmp_path / "alone"
    supervised = changed(tiny, method="supervised")
    write_untrained(supervised, alone)
    out = str(tmp_path / "out")
    for words, text in [
        ([str(best), str(tmp_path / "empty"), out], "must hold images"),
        ([str(tmp_path), str(photos), out], "must be the folder of a model"),
        ([str(alone), str(photos), out, "--disagreement"], "needs a model of networks a and b"),
    ]:
        assert main([*words, "--device", "cpu"]) == 2
        said = capsys.readouterr().err
        assert text in said
        assert said.count("\n") == 1
        assert not Path(out).exists()
    with pytest.raises(SystemExit):
        main([str(best), str(photos), out, "--sure", "1.5"])
    assert "must be a probability above 0, at most 1, but got '1.5'" in capsys.readouterr().err


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_stopped_it_goes_on(best: Path, photos: Path, tmp_path: Path, whole: dict[str, bytes], ending: int) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cps_ray.predict", str(best), str(photos), str(out), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # Slow enough to be met at work.
    slow = (
        "import sys, time; from cps_ray import predict; from cps_ray.model import predicting; write = predicting._write\n"
        "def slow(*args): time.sleep(0.05); return write(*args)\n"
        "predicting._write = slow; sys.exit(predict.main())"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", slow, *command[3:]], env=environment, stderr=subprocess.PIPE, text=True
    )
    records = out / "predicted.jsonl"
    while running.poll() is None and not (records.exists() and records.stat().st_size):
        time.sleep(0.005)
    running.send_signal(ending)
    _, said = running.communicate()
    assert running.returncode == (-9 if ending == signal.SIGKILL else 130), said
    if ending == signal.SIGINT:
        assert said == "stopped; the same command continues from here.\n"
    assert not (out / "index.csv").exists()
    complete = {json.loads(line)["name"] for line in records.read_text().splitlines()}
    assert 0 < len(complete) < 60
    before = {name: (out / f"labels/{name}.png").stat().st_ino for name in complete}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == f"{len(complete)} of 60 images were done before.\n"
    assert done.stdout.startswith(f"{60 - len(complete)} image(s) in ")
    assert {name: (out / f"labels/{name}.png").stat().st_ino for name in complete} == before
    assert contents(out) == whole


def test_ray_is_not_imported_without_the_flag(best: Path, photos: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from cps_ray import predict; assert predict.main() == 0\n"
        "print(sorted({'ray', 'optuna', 'pandas', 'albumentations'} & {*sys.modules}))"
    )
    words = [str(best), str(photos / "day 0/0.png"), str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.ray
def test_a_cluster_writes_the_same_bytes(
    best: Path, photos: Path, tmp_path: Path, whole: dict[str, bytes], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(photos.parent)  # paths are those of this process, wherever a worker stands
    (photos / "bad.png").write_bytes(b"nothing")
    try:
        assert main([str(best), photos.name, str(tmp_path / "out"), "--ray", "--device", "cpu"]) == 1
    finally:
        (photos / "bad.png").unlink()
    said = capsys.readouterr()
    assert said.out.startswith("61 image(s) in ")
    assert "1 of 61 images could not be read" in said.err
    found, expected = contents(tmp_path / "out"), dict(whole)
    assert found.pop("failed.csv").decode().splitlines()[1].startswith(f'{photos.name}/bad.png,"the file is no image')
    index, alone = found.pop("index.csv").decode(), expected.pop("index.csv").decode()
    assert index == alone.replace(str(photos), photos.name)
    assert found == expected


def test_an_export_of_the_model_does_not_begin_it_anew(
    best: Path, photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder, out = tmp_path / "best", tmp_path / "out"
    shutil.copytree(best, folder)
    words = [str(folder), str(photos / "day 0"), str(out), "--device", "cpu", "--no-overlays"]
    assert main(words) == 0
    description = read_description(folder)
    write_description(folder, description.model_copy(update={"exports": {"model.onnx": {"format": "onnx"}}}))
    assert main(words) == 0
    assert "20 of 20 images were done before." in capsys.readouterr().err
    write_description(folder, description.model_copy(update={"palette": description.palette[::-1]}))
    assert main(words) == 2
    assert "which is another network or has changed since" in capsys.readouterr().err
