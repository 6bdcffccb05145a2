"""The command `prepare`: writes shards and a summary, or says what is wrong and what to do; also through Ray, and after a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import trees
from PIL import Image
from trees import POINTER, save, scene

from cps_ray.datasets.prepare import layouts
from cps_ray.datasets.prepare.assembly import DataSetPlan, write_shards
from cps_ray.datasets.prepare.items import FromFiles
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
def raw(tmp_path: Path, without_ray: None) -> Path:
    raw = tmp_path / "raw"
    for name in ("images/a", "images/b", "more/c"):
        save(raw / f"{name}.png", scene(name, (4, 4)))
    for name in ("a", "b"):
        save(raw / f"masks/{name}.png", np.array([[0, 0, 0, 1]] * 4, np.uint8))
    (raw / "recipe.yaml").write_text(RECIPE)
    return raw


def prepared(raw: Path, *options: str) -> int:
    return main(["folder", str(raw), str(raw.parent / "out"), "--recipe", str(raw / "recipe.yaml"), *options])


def test_a_folder_and_its_summary(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepared(raw) == 0
    shards = open_shards(raw.parent / "out")
    assert shards.manifest.made_by.format == "folder, recipe.yaml"
    assert shards.manifest.splits["train"].class_pixels == (24, 8, 0)
    said = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if "│" in line]
    assert cells == [["images", "3"], ["masks", "2"], ["soil", "75.00 (2)"], ["crop", "25.00 (2)"], ["weed", "- (0)"]]
    assert "note: train: every class should be seen, but no mask shows weed" in said


@pytest.mark.parametrize(
    ("arguments", "train", "made_by"),
    [
        (["camvid", "camvid"], 2, "camvid"),
        (["cityscapes", "city"], 5, "cityscapes"),
        (["cityscapes", "city", "--published", "--unlabeled", "train_extra", "test"], 12,
         "cityscapes, published, train_extra unlabelled, test unlabelled"),
        (["voc", "voc", "--sbd", "sbd", "--published"], 11, "voc, published"),
        (["voc", "voc"], 6, "voc"),
    ],
)  # fmt: skip
def test_every_format(
    tmp_path: Path,
    without_ray: None,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    train: int,
    made_by: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    trees.camvid(tmp_path / "camvid")
    trees.cityscapes(tmp_path / "city")
    trees.voc(tmp_path / "voc")
    trees.sbd(tmp_path / "sbd")
    assert main([*arguments[:2], "out", *arguments[2:]]) == 0
    manifest = open_shards(Path("out")).manifest
    assert manifest.splits["train"].images == train
    assert manifest.made_by.format == made_by


def test_images_and_masks_are_shrunk_together(raw: Path) -> None:
    assert prepared(raw, "--scale", "0.5") == 0
    index = open_shards(raw.parent / "out").index("train")
    assert (set(index.height), set(index.width)) == ({2}, {2})
    assert open_shards(raw.parent / "out").manifest.made_by.format == "folder, recipe.yaml, scale 0.5"


def test_nothing_is_shrunk_away(raw: Path) -> None:
    assert prepared(raw, "--scale", "0.01") == 0
    assert set(open_shards(raw.parent / "out").index("train").width) == {1}


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
        (["cityscapes", "raw", "out"], "error: raw: must hold gtFine/train/CITY/*_gtFine_labelIds.png"),
        (["voc", "raw", "out"], "error: raw: must hold JPEGImages, SegmentationClass and ImageSets/Segmentation"),
        (["synthetic", "out", "--height", "3"], "error: height_px: must be at least 32, but got 3"),
        (["folder", "raw", "out", "--recipe", "none.yaml"], "error: none.yaml"),
        (["camvid", "raw", "out", "--scale", "2"], "error: --scale must be in (0, 1], but is 2"),
        (["synthetic", "raw"], "error: raw: already exists"),
        (["folder", "raw", "raw", "--recipe", "raw/recipe.yaml"], "error: raw: already exists"),
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


def test_bad_files_are_listed_by_problem_and_in_a_file_one_by_one(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("images/a", "images/b"):
        (raw / f"{name}.png").write_bytes(POINTER)
    (raw / "more/c.png").write_bytes(b"")
    assert prepared(raw) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "images/a.png and 1 more: the file is a Git LFS pointer" in line]) == 1
    assert len([line for line in lines if "more/c.png: the file is empty; get the file again." in line]) == 1
    every = raw.parent / "out.findings.txt"
    assert f"Every file is listed in {every}." in lines
    listed = every.read_text().splitlines()
    assert len([line for line in listed if "Git LFS pointer" in line]) == 2
    assert lines[-1].startswith("error: ")
    assert "3 files cannot be used. Fix what is listed and run the same command again" in lines[-1]


def test_skip_bad_continues_and_lists_what_it_left_out(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "images/a.png").write_bytes(POINTER)
    assert prepared(raw) == 2
    capsys.readouterr()
    assert prepared(raw, "--skip-bad") == 0
    said = capsys.readouterr().out
    assert f"left out, and listed in {raw.parent}/out/manifest.json: 1" in said
    assert f"  {raw}/images/a.png: the file is a Git LFS pointer" in said
    assert open_shards(raw.parent / "out").index("train").ids == ("b", "c")


# ---------------------------------------------------------------------------------------------------- through Ray


def descendants(pid: int) -> set[int]:
    """Returns the ids of a process that this test started, of its children, of theirs, and so on."""
    parents = {}
    for entry in Path("/proc").iterdir():
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (ValueError, OSError):
            continue
    found, more = set(), {pid}
    while more:
        found |= more
        more = {child for child, parent in parents.items() if parent in more} - found
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the command and all that Ray has started for it: nobody is left to clean up."""
    os.killpg(process.pid, signal.SIGSTOP)
    group = descendants(process.pid)
    os.killpg(process.pid, signal.SIGKILL)
    for pid in group - {process.pid}:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


@pytest.mark.ray
def test_killed_and_finished_through_ray_the_shards_are_those_of_threads(tmp_path: Path) -> None:
    raw = trees.camvid(tmp_path / "raw")
    noise = np.random.default_rng(0).integers(0, 256, (1100, 6, 8, 3), np.uint8)
    for number, coarse in enumerate(noise):
        image = Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)
        image.save(raw / f"train/many{number:04}.png", compress_level=1)
        save(raw / f"trainannot/many{number:04}.png", np.resize(np.arange(12, dtype=np.uint8), (120, 160)))
    # So few images would be prepared by threads.
    through_ray = "import sys; from cps_ray import prepare; prepare._MANY_IMAGES = 0; sys.exit(prepare.main())"
    command = [sys.executable, "-c", through_ray, "camvid", str(raw), str(tmp_path / "shards")]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}

    growing = tmp_path / ".shards.unfinished"
    with (tmp_path / "said").open("w") as said:
        running = subprocess.Popen(command, env=environment, start_new_session=True, stdout=said, stderr=said)
    while running.poll() is None and not list(growing.glob("*.json")):
        time.sleep(0.002)
    assert running.poll() is None, (tmp_path / "said").read_text()
    kill(running)
    assert not (tmp_path / "shards").exists(), "it was killed before it was finished"
    before = {
        f"{path.name.partition('.')[0]}.parquet": path.with_suffix(".parquet").stat().st_ino
        for path in growing.glob("*.json")
    }
    assert before

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = layouts.camvid(raw)
    data = DataSetPlan(
        found.splits, FromFiles(found.reader), found.classes, found.palette, "camvid", found.findings, found.notes
    )
    write_shards(tmp_path / "undisturbed", data)
    files = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "undisturbed").iterdir()}
    assert len([name for name in files if name.startswith("train-")]) == 3
    reused = {name: (tmp_path / "shards" / name).stat().st_ino for name in before}
    assert reused == before, "what was finished is not done again"
