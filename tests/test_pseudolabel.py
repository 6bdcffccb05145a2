"""`cps-ray pseudolabel` from its arguments to shards."""

from pathlib import Path

import pytest

from cps_ray import inspect, pseudolabel
from cps_ray.datasets.shards import open_shards


def test_thresholds_by_class(best: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pseudo"
    words = ["--threshold", "0.99", "--threshold-class", "car=0.01", "--threshold-class", "road=0.02"]
    assert pseudolabel.main([str(best), str(shards), str(out), *words]) == 0
    printed = capsys.readouterr().out
    assert "6 training images keep their mask (those of the model's training), 18 are predicted." in printed
    assert "6 true and " in printed
    note = next(note for note in open_shards(out).manifest.notes if "not made by people" in note)
    assert "certainty is at least 0.99, of car 0.01, of road 0.02" in note


def test_a_kept_fraction_passes_inspect_and_trains(
    best: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pseudo"
    assert pseudolabel.main([str(best), str(shards), str(out), "--keep", "0.6", "--network", "ensemble"]) == 0
    printed = capsys.readouterr().out
    assert "right" in printed
    assert "6 true and 18 pseudo-labelled training masks, 0 images without." in printed
    assert "among the most certain 60 % of its class" in "".join(open_shards(out).manifest.notes)
    assert inspect.main([str(out), "--labeled", "true-masks", "--output", str(tmp_path / "page")]) == 0
    assert "not made by people" in capsys.readouterr().out
    command = next(line for line in printed.splitlines() if line.startswith("Train: cps-ray train "))
    from cps_ray import train

    words = command.removeprefix("Train: cps-ray train ").replace("NEW", str(tmp_path / "run")).split()
    assert train.main([*words, "--dry-run"]) == 0
    assert "24 labelled, 0 unlabelled" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["FULL"], "must not hold anything yet"),
        (["OUT", "--keep", "0.5", "--threshold", "0.5"], "--keep makes the thresholds"),
        (["OUT", "--keep", "0.5", "--threshold-class", "car=0.5"], "--keep makes the thresholds"),
        (
            ["OUT", "--threshold-class", "cra=0.5"],
            "--threshold-class cra: must name a class of the model. Did you mean car?",
        ),
        (["OUT", "--labeled", "24"], "there must be unlabelled training images"),
        (["OUT", "--network", "c"], "network must be one of a, b, ensemble"),
    ],
)
def test_what_does_not_go_is_one_line(
    best: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    given = {"FULL": str(tmp_path / "full"), "OUT": str(tmp_path / "out")}
    assert pseudolabel.main([str(best), str(shards), *(given.get(word, word) for word in words)]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--threshold", "0"], ["--keep", "1.5"], ["--threshold-class", "car"]])
def test_numbers_are_checked(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as err:
        pseudolabel.main(["best", "shards", "out", *words])
    assert err.value.code == 2
    assert "must be " in capsys.readouterr().err
