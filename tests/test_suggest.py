"""`cps-ray suggest` from its arguments to its files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import csv

from cps_ray import suggest
from cps_ray.config.train import SyntheticConfig, TrainConfig
from cps_ray.datasets.shards import open_shards
from cps_ray.datasets.subsets import labeled_rows, labeled_subset, read_ids
from cps_ray.datasets.synthetic import write_synthetic
from cps_ray.text import shell_path


def test_files_of_a_suggestion(
    best: Path, shards: Path, tiny: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "next 3"
    assert suggest.main([str(best), str(shards), "--count", "3", "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "24 images, 6 labelled (those of the model's training), 18 candidates" in printed
    assert f"append {shell_path(out / 'suggested.txt')} to the list" in printed
    assert {path.name for path in out.iterdir()} == {"suggested.txt", "suggested.csv", "sheet.png", "drafts"}
    assert [path.name for path in tmp_path.iterdir()] == ["next 3"]
    index = open_shards(shards).index("train")
    rows = read_ids(out / "suggested.txt", index)
    assert len(rows) == 3
    assert not {*rows.tolist()} & {*labeled_rows(shards, index, 6, 0).tolist()}
    table = csv.read_csv(out / "suggested.csv").to_pydict()
    assert [*table] == ["id", "score", "disagreement", "entropy", "classes"]
    assert table["id"] == [index.ids[row] for row in rows]
    assert all(" %" in text for text in table["classes"])
    assert Image.open(out / "sheet.png").width >= 960
    for row in rows:
        (encoded,) = index.locations.read([int(row)], masks=False)
        assert (out / f"drafts/images/{encoded.id}.png").read_bytes() == encoded.image
    # Appended to a list, they are labelled images.
    listed = tmp_path / "list.txt"
    known = "".join(f"{index.ids[row]}\n" for row in labeled_rows(shards, index, 6, 0))
    listed.write_text(known + (out / "suggested.txt").read_text())
    data = tiny.data.model_copy(update={"labeled": None, "labeled_list": listed})
    assert len(labeled_subset(data, index).labeled) == 9


def test_excluded_and_named_images(
    best: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = open_shards(shards).index("train")
    (tmp_path / "not.txt").write_text("".join(f"{name}\n" for name in index.ids[4:22]))
    (tmp_path / "labeled.txt").write_text("".join(f"{name}\n" for name in index.ids[:4]))
    words = ["--exclude", str(tmp_path / "not.txt"), "--labeled", str(tmp_path / "labeled.txt")]
    assert suggest.main([str(best), str(shards), *words, "--output", str(tmp_path / "o")]) == 0
    printed = capsys.readouterr().out
    assert "4 labelled (--labeled " in printed
    assert "2 candidates" in printed
    assert "Only " in printed
    assert {*(tmp_path / "o/suggested.txt").read_text().split()} <= {*index.ids[22:]}


def without_masks(shards: Path, out: Path, kept: int) -> Path:
    """A copy of the data whose training images have no mask, but for the first ones, made as `prepare` makes it."""
    from dataclasses import dataclass, replace

    from cps_ray.datasets import synthetic
    from cps_ray.datasets.prepare.assembly import DataSetPlan, write_shards
    from cps_ray.datasets.prepare.items import Item, Source

    config = SyntheticConfig(train=24, val=6, test=6, height_px=32, width_px=48)

    @dataclass(frozen=True)
    class Stripped:
        def __call__(self, source: Source) -> Item:
            item = synthetic.FromDrawing(config)(source)
            bare = source.id.startswith("train") and int(source.id[-5:]) >= kept
            nothing = np.zeros_like(item.pixels)
            return replace(item, mask=None, train_ids_sha256=None, pixels=nothing) if bare else item

    splits = {name: [Source(f"{name}_{n:05d}") for n in range(count)] for name, count in (("train", 24), ("val", 6))}
    write_shards(out, DataSetPlan(splits, Stripped(), synthetic.CLASSES, synthetic.PALETTE, "test"))
    return out


def test_of_other_data_the_images_without_a_mask(
    best: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = without_masks(shards, tmp_path / "data", 20)
    assert suggest.main([str(best), str(data), "--count", "1", "--output", str(tmp_path / "o")]) == 0
    assert "20 labelled (all that have a mask), 4 candidates" in capsys.readouterr().out
    assert int((tmp_path / "o/suggested.txt").read_text().strip()[-5:]) >= 20


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["SHARDS", "--output", "FULL"], "must not hold anything yet"),
        (["SHARDS", "--output", "."], "must not be the working directory, a link or a mount point"),
        (["SHARDS", "--output", "LINK"], "must not be the working directory, a link or a mount point"),
        (["SHARDS", "--output", "FULL/mine.txt/out"], "mine.txt cannot; name another folder"),
        (
            ["SHARDS", "--output", "OUT", "--labeled", "24"],
            "there must be unlabelled images in split train, but there are none left",
        ),
        (["SHARDS", "--output", "OUT", "--split", "val"], "there must be unlabelled images in split val"),
        (["SHARDS", "--output", "OUT", "--split", "val", "--labeled", "3"], "--labeled names images of split train"),
        (["SHARDS", "--output", "OUT", "--split", "no"], "no split 'no'"),
        (["SHARDS", "--output", "OUT", "--exclude", "no.txt"], "no.txt: the list of ids cannot be read"),
        (["OTHER", "--output", "OUT"], "must have the model's classes in its order"),
        (["OTHER/none", "--output", "OUT"], "no shards here"),
    ],
)
def test_what_does_not_go_is_one_line(
    best: Path,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    text: str,
) -> None:
    full, other, empty = tmp_path / "full", tmp_path / "other", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    monkeypatch.chdir(empty)
    (tmp_path / "link").symlink_to(empty)
    monkeypatch.setattr("cps_ray.model.suggesting.score_images", None)  # nothing is predicted before it is refused
    (full / "mine.txt").write_text("mine")
    write_synthetic(other, SyntheticConfig(train=4, val=1, test=1, height_px=32, width_px=32))
    manifest = json.loads((other / "manifest.json").read_text()) | {"classes": [*"abcdefg"], "sha256": ""}
    (other / "manifest.json").write_text(json.dumps(manifest))
    given = {"SHARDS": str(shards), "OUT": str(tmp_path / "out"), "LINK": str(tmp_path / "link")}
    words = [given.get(word, word.replace("OTHER", str(other)).replace("FULL", str(full))) for word in words]
    assert suggest.main([str(best), *words]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_training_whose_list_is_gone(
    best: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "best"
    shutil.copytree(best, folder)
    text = (folder / "config.yaml").read_text()
    assert "labeled: 6" in text
    (folder / "config.yaml").write_text(text.replace("labeled: 6", "labeled: 1_16"))
    assert suggest.main([str(folder), str(shards), "--output", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err
    assert "no subset named '1_16'" in err
    assert "Say it: --labeled WHICH" in err
    assert err.count("\n") == 1
