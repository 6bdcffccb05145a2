"""Every shipped sweep loads, and its draws are valid trainings."""

from pathlib import Path

import pytest

from cps_ray import sweep
from cps_ray.config.reader import load_sweep
from cps_ray.search import sweep as search

SWEEPS = sorted((Path(__file__).parents[1] / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_dry_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([str(path), "--dry-run", "20"]) == 0
    out = capsys.readouterr().out
    assert "Every draw is a valid" in out


def test_cityscapes_says_how_to_get_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = [p for p in SWEEPS if p.stem == "cityscapes"]
    assert "model.encoder" in load_sweep(path).search_space
    if load_sweep(path).train.data.shards.exists():
        pytest.skip("the Cityscapes shards are there")
    sweep.main([str(path), "--dry-run"])
    assert "python -m cps_ray.prepare cityscapes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        "--dry-run 2 FILE",
        "--dry-run FILE",
        "FILE --dry-run",
        "--set budget.trials=3 FILE --dry-run 2",
        "--name other --dry-run FILE --set budget.trials=3",
        "run FILE --dry-run",
    ],
)
def test_flags_stand_where_they_like(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = [str(path) for path in SWEEPS if path.stem == "quickstart"]
    assert sweep.main(words.replace("FILE", file).split()) == 0
    drawn = 2 if "run 2" in words else 5
    assert f": {drawn} random draws of {3 if 'trials=3' in words else 6} trials" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--trials 3 resume nowhere", "nowhere: must be the folder of a sweep"),
        ("statsu runs/x", "there is no file statsu. Did you mean status?"),
        ("--dry-run -3 FILE", "argument --dry-run: must be a whole number of at least 0, but got '-3'."),
        ("FILE --dry-run=-3", "argument --dry-run: must be a whole number of at least 0, but got '-3'."),
        ("--dry-run", "the following arguments are required: file"),
        ("", "the following arguments are required: FILE | resume | status | best"),
    ],
)
def test_a_verb_is_found_behind_flags_and_a_wrong_one_named(
    words: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = sweep.main(words.split())
    except SystemExit as err:  # argparse's
        code = err.code
    assert code == 2
    assert why in capsys.readouterr().err


def test_a_sweep_called_by_its_name_begins_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    class Begun:
        def __init__(self, config: object, root: Path, *_: object) -> None:
            begun.append(root)

        def run(self, _: object) -> int:
            return 0

    monkeypatch.setattr(search, "Sweep", Begun)
    monkeypatch.chdir(tmp_path)
    small = "train.data.synthetic={train: 24, val: 6, test: 6}"
    assert sweep.main(["quickstart", "--set", small]) == 0
    assert begun == [tmp_path / "runs/quickstart"]
    (file,) = [path for path in SWEEPS if path.stem == "quickstart"]
    assert (begun[0] / "sweep.source.yaml").read_text() == file.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"data", "runs"}
