"""The command `subsets`: lists drawn, and lists that others published, in the forms they have."""

from pathlib import Path

import pytest
from support import changed

from cps_ray.config.train import TrainConfig
from cps_ray.datasets.loader import train_data
from cps_ray.datasets.shards import open_shards
from cps_ray.datasets.subsets import labeled_subset
from cps_ray.subsets import main


@pytest.fixture
def mine(shards: Path, tmp_path: Path) -> Path:
    """The shards, in a folder of their own: lists are written beside them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for file in shards.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def lines(folder: Path, name: str, kind: str) -> list[str]:
    return (folder / "subsets" / name / f"{kind}.txt").read_text().splitlines()


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_draw_written_out_is_the_draw_that_a_config_asks_for(mine: Path, tiny: TrainConfig) -> None:
    assert main(["draw", str(mine), "--labeled", "6", "--seed", "3"]) == 0
    assert main(["draw", str(mine), "--labeled", "0.25", "--seed", "3", "--name", "quarter"]) == 0
    config = changed(tiny, data__shards=str(mine), data__subset_seed=3)
    index = open_shards(mine).index("train")
    drawn = labeled_subset(config.data, index)
    named = train_data(open_shards(mine), changed(config, data__labeled="drawn_6_seed_3")).subset
    assert named.labeled.tolist() == drawn.labeled.tolist()
    assert named.unlabeled.tolist() == drawn.unlabeled.tolist()
    assert sorted(lines(mine, "quarter", "labeled")) == sorted(index.ids[row] for row in drawn.labeled)
    assert len(lines(mine, "quarter", "unlabeled")) == 18


def test_published_lists_come_in_under_their_own_names(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = tmp_path / "lists"
    # UniMatch: a folder a split, image and mask by space; the CPS repository: by tab, ratio in the name; ids alone.
    put(lists / "1_8/labeled.txt", "leftImg8bit/train/x/train_00001_leftImg8bit.png gtFine/train/x/y.png\n")
    put(lists / "1_8/unlabeled.txt", "leftImg8bit/train/x/train_00002_leftImg8bit.png gtFine/train/x/y.png")
    put(lists / "subset/train_aug_labeled_1-16.txt", "/images/train/train_00003.png\t/segmentation/train/z.png\n")
    put(lists / "subset/pseudoseg_labeled_1-4.txt", "train_00004\ntrain_00005\n")
    put(lists / "subset/pseudoseg_unlabeled_1-4.txt", "train_00005\ntrain_00006")
    put(lists / "92/labeled.txt", "train_00007\nval_00000\n")
    assert main(["import", str(lists), str(mine)]) == 0
    assert sorted(path.name for path in (mine / "subsets").iterdir()) == ["1_16", "1_8", "92", "pseudoseg_1_4"]
    assert lines(mine, "1_8", "labeled") == ["train_00001"]
    assert lines(mine, "1_8", "unlabeled") == ["train_00002"]
    assert lines(mine, "1_16", "labeled") == ["train_00003"]
    assert len(lines(mine, "1_16", "unlabeled")) == 23
    assert lines(mine, "pseudoseg_1_4", "unlabeled") == ["train_00006"]
    assert lines(mine, "92", "labeled") == ["train_00007"]
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "1 of 2 are in val here" in said
    assert "train_00005 is in both lists" in said
    assert 'data: {labeled: "92"}' in said
    assert "no labelled mask shows" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["import", "nowhere", "shards"], "error: nowhere: no such folder"),
        (["import", "empty", "shards"], "error: empty: must hold lists named labeled.txt"),
        (
            ["import", "foreign", "shards"],
            "labeled.txt: every entry must be an image of these shards, whose ids look like",
        ),
        (["import", "mixed", "shards"], "labelled images must be in train, with masks"),
        (["draw", "nothing", "--labeled", "6"], "no shards here"),
        (["draw", "shards", "--labeled", "600"], "must be at most 24"),
    ],
)
def test_errors_are_one_line_and_exit_2(
    mine: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(mine.parent)
    Path("empty").mkdir()
    put(Path("foreign/1_8/labeled.txt"), "aachen_000000_000019\n")
    put(Path("mixed/1_8/labeled.txt"), "val_00000\n")
    assert main(arguments) == 2
    found = capsys.readouterr().err.strip()
    assert said in found
    assert "\n" not in found
    assert not (mine / "subsets").exists()
