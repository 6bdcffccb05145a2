"""The command `subsets`: drawn lists, published lists in the formats they have, and names of earlier versions."""

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import trees
from support import changed

from cps_ray.__main__ import main as cps_ray
from cps_ray.config.train import TrainConfig
from cps_ray.datasets.loader import train_data
from cps_ray.datasets.prepare.assembly import write_shards
from cps_ray.datasets.shards import open_shards
from cps_ray.datasets.subsets import labeled_subset
from cps_ray.errors import DataError
from cps_ray.subsets import main


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> Path:
    """The shards in a folder of their own, because lists are written beside them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for file in shards.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def lines(folder: Path, name: str, kind: str) -> list[str]:
    return (folder / "subsets" / name / f"{kind}.txt").read_text().splitlines()


def write_file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_draw_written_out_is_the_draw_that_a_config_asks_for(own_shards: Path, tiny: TrainConfig) -> None:
    assert main(["draw", str(own_shards), "--labeled", "6", "--seed", "3"]) == 0
    assert main(["draw", str(own_shards), "--labeled", "0.25", "--seed", "3", "--name", "quarter"]) == 0
    config = changed(tiny, data__shards=str(own_shards), data__subset_seed=3)
    index = open_shards(own_shards).index("train")
    drawn = labeled_subset(config.data, index)
    named = train_data(open_shards(own_shards), changed(config, data__labeled="drawn_6_seed_3")).subset
    assert named.labeled.tolist() == drawn.labeled.tolist()
    assert named.unlabeled.tolist() == drawn.unlabeled.tolist()
    assert sorted(lines(own_shards, "quarter", "labeled")) == sorted(index.ids[row] for row in drawn.labeled)
    assert len(lines(own_shards, "quarter", "unlabeled")) == 18


def test_a_draw_of_odd_names_is_read_back_exactly(tmp_path: Path, tiny: TrainConfig) -> None:
    names = [
        "photo 1",
        "photo",
        " a",
        "a",
        "tab\there",
        "# 1",
        "drive_a/0",
        "drive_b/0",
        "0",
        "m\u00fcnchen",
        "v1.2",
        "v1",
    ]
    sources = {
        split: [replace(trees.pair(tmp_path, f"{split}{number}"), id=name) for number, name in enumerate(ids)]
        for split, ids in {"train": names, "val": ["val"], "test": ["test"]}.items()
    }
    write_shards(tmp_path / "shards", trees.plan(sources))
    assert main(["draw", str(tmp_path / "shards"), "--labeled", "6", "--name", "odd"]) == 0
    opened = open_shards(tmp_path / "shards")
    config = changed(tiny, data__shards=str(tmp_path / "shards"), data__labeled=6)
    drawn = train_data(opened, config).subset
    named = train_data(opened, changed(config, data__labeled="odd")).subset
    assert (named.labeled.tolist(), named.unlabeled.tolist()) == (drawn.labeled.tolist(), drawn.unlabeled.tolist())


def test_published_lists_come_in_under_their_own_names(
    own_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = tmp_path / "lists"
    # UniMatch: a folder per subset, image and mask separated by a space. The CPS repository: by a tab, ratio in the file name.
    # And lists of ids alone.
    write_file(lists / "1_8/labeled.txt", "leftImg8bit/train/x/train_00001_leftImg8bit.png gtFine/train/x/y.png\n")
    write_file(lists / "1_8/unlabeled.txt", "leftImg8bit/train/x/train_00002_leftImg8bit.png gtFine/train/x/y.png")
    write_file(
        lists / "subset/train_aug_labeled_1-16.txt", "/images/train/train_00003.png\t/segmentation/train/z.png\n"
    )
    write_file(lists / "subset/pseudoseg_labeled_1-4.txt", "train_00004\ntrain_00005\n")
    write_file(lists / "subset/pseudoseg_unlabeled_1-4.txt", "train_00005\ntrain_00006")
    write_file(lists / "92/labeled.txt", "train_00007\nval_00000\n")
    assert main(["import", str(lists), str(own_shards)]) == 0
    assert sorted(path.name for path in (own_shards / "subsets").iterdir()) == ["1_16", "1_8", "92", "pseudoseg_1_4"]
    assert lines(own_shards, "1_8", "labeled") == ["train_00001"]
    assert lines(own_shards, "1_8", "unlabeled") == ["train_00002"]
    assert lines(own_shards, "1_16", "labeled") == ["train_00003"]
    assert len(lines(own_shards, "1_16", "unlabeled")) == 23
    assert lines(own_shards, "pseudoseg_1_4", "unlabeled") == ["train_00006"]
    assert lines(own_shards, "92", "labeled") == ["train_00007"]
    output = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "1 of 2 are in val here" in output
    assert "train_00005 is in both lists" in output
    assert 'data: {labeled: "92"}' in output
    assert "no labelled mask shows" in output


def test_a_subset_is_not_replaced_by_one_of_other_images(
    own_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_file(first / "1_16/labeled.txt", "train_00001\n")
    write_file(second / "1_8/labeled.txt", "train_00004\n")
    write_file(second / "train_aug_labeled_1-16.txt", "train_00003\n")
    assert main(["import", str(first), str(own_shards)]) == 0
    assert main(["import", str(first), str(own_shards)]) == 0  # the same again
    capsys.readouterr()
    assert main(["import", str(second), str(own_shards)]) == 2
    assert "rename it to keep both" in capsys.readouterr().err
    assert lines(own_shards, "1_16", "labeled") == ["train_00001"]
    assert not (own_shards / "subsets/1_8").exists()
    (own_shards / "subsets/1_16").rename(own_shards / "subsets/first_1_16")
    assert main(["import", str(second), str(own_shards)]) == 0
    assert lines(own_shards, "1_16", "labeled") == ["train_00003"]


def test_two_lists_of_one_name_are_refused(
    own_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_file(tmp_path / "lists/1_16/labeled.txt", "train_00001\n")
    write_file(tmp_path / "lists/train_aug_labeled_1-16.txt", "train_00003\n")
    assert main(["import", str(tmp_path / "lists"), str(own_shards)]) == 2
    assert "must not mean the subset 1_16" in capsys.readouterr().err
    write_file(tmp_path / "lists/train_aug_labeled_1-16.txt", "train_00001\n")
    assert main(["import", str(tmp_path / "lists"), str(own_shards)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "nowhere", "shards"], "error: nowhere: no such folder"),
        (["import", "empty", "shards"], "error: empty: must hold lists named labeled.txt"),
        (
            ["import", "foreign", "shards"],
            "labeled.txt:1: 'aachen_000000_000019' is no image of these shards, whose ids look like 'train_00000'. Are the lists of",
        ),
        (["import", "mixed", "shards"], "labelled images must be in train, with masks"),
        (["draw", "nothing", "--labeled", "6"], "no shards here"),
        (["draw", "shards", "--labeled", "600"], "must be at most 24"),
    ],
)
def test_errors_are_one_line_and_exit_2(
    own_shards: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(own_shards.parent)
    Path("empty").mkdir()
    write_file(Path("foreign/1_8/labeled.txt"), "aachen_000000_000019\n")
    write_file(Path("mixed/1_8/labeled.txt"), "val_00000\n")
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (own_shards / "subsets").exists()


def test_the_former_name_of_the_command_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cps-ray", "splits", "draw", "shards", "--labeled", "6"])
    assert cps_ray() == 2
    assert capsys.readouterr().err == "error: `splits` is called `subsets` now: cps-ray subsets ...\n"


@pytest.mark.parametrize("both_folders", [False, True])
def test_a_subset_in_the_former_folder_is_refused_with_the_command_that_moves_it(
    own_shards: Path, tiny: TrainConfig, both_folders: bool
) -> None:
    write_file(own_shards / "splits/1_12/labeled.txt", "train_00004\ntrain_00011\n")
    if both_folders:
        write_file(own_shards / "subsets/2/labeled.txt", "train_00005\n")
    write_file(own_shards / "splits/1_6/labeled.txt", "train_00005\n")
    config = changed(tiny, data__shards=str(own_shards), data__labeled="1_12")
    opened = open_shards(own_shards)
    with pytest.raises(DataError) as caught:
        train_data(opened, config)
    message, _, command = str(caught.value).partition(" Move them: ")
    assert message == f"{own_shards}/splits: lists of labelled subsets must lie in subsets/ now."
    assert "\n" not in command

    subprocess.run(shlex.split(command), check=True)
    assert train_data(opened, config).subset.labeled.tolist() == [4, 11]
    if not both_folders:
        assert train_data(opened, changed(config, data__labeled="1_6")).subset.labeled.tolist() == [5]
        assert not (own_shards / "splits").exists()
