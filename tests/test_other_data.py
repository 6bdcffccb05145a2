"""Sweeps and trainings whose shards were prepared anew from other images: refused, and each way out that a message names tried."""

import json
import shutil
from pathlib import Path

import pytest
import trees
from support import TINY_DATA

from cps_ray import sweep, train
from cps_ray.config.reader import load_sweep, load_train
from cps_ray.datasets.open import HASHES_FILE, fingerprints
from cps_ray.datasets.prepare.assembly import write_shards
from cps_ray.datasets.shards import open_shards
from cps_ray.results import BEGUN_FILE
from cps_ray.search.export import write_best
from cps_ray.search.study import SweepStudy

SWEEP = (
    "version: 1\nname: s\noutput: runs\ntrain:\n"
    + TINY_DATA.replace("SHARDS", "own")
    + """\
  model: {encoder: tu-test_efficientnet, options: {decoder_channels: 16}}
  optim: {lr: 0.01}
  schedule: {steps: 4, eval_every: 2}
  resources: {cpus_per_worker: 0.5}
budget: {trials: 2}
early_stopping: {type: none}
search_space:
  cps.weight: {type: float, low: 0.5, high: 2.0}
final: {seeds: [1]}
baselines: {full: {method: supervised, data.shards: full}}
"""
)
CHANGED = "train differs in 1 image(s): 1 added, 0 gone, 0 changed."
COUNTED = "train had 7 images, has 8."


def prepare(out: str, images: int) -> None:
    """Prepares a data set, anew where there is one, with this many training images."""
    shutil.rmtree(out, ignore_errors=True)
    train_keys = [f"a{number}" for number in range(images)]
    keys = {"train": train_keys, "val": ["b"], "test": ["c"]}
    splits = {split: [trees.pair(Path("raw"), key) for key in names] for split, names in keys.items()}
    write_shards(Path(out), trees.plan(splits))


def found(shards: str) -> dict[str, str]:
    return fingerprints(open_shards(Path(shards)))


@pytest.fixture(autouse=True)
def _data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep, its data and those of its baseline, in the working directory. What would start a cluster exits instead."""

    def connect(address: str | None, *_: str) -> object:
        raise SystemExit("a cluster is started")

    monkeypatch.setattr("cps_ray.search.sweep.connected", connect)
    monkeypatch.setattr("cps_ray.on_ray.cluster.connected", connect)
    monkeypatch.chdir(tmp_path)
    prepare("own", 7)
    prepare("full", 9)
    Path("s.yaml").write_text(SWEEP)


@pytest.fixture
def root() -> Path:
    """The folder of a sweep that has begun, with one trial."""
    starts(sweep, "s.yaml")
    root = Path("runs/s").absolute()
    config = load_sweep(root / "sweep.yaml")
    study = SweepStudy(config, root)
    study.ask()
    (root / "trials").mkdir()
    write_best(root, config.train, "The best.")
    return root


def starts(command: object, *words: object) -> None:
    with pytest.raises(SystemExit, match="a cluster is started"):
        command.main([str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], command: object, *words: object) -> str:
    """Returns the one line with which the command refuses."""
    capsys.readouterr()
    assert command.main([str(word) for word in words]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def way_out(message: str) -> list[str]:
    return message.strip().partition("Go on with them all the same: ")[2].split()


def test_a_sweep_keeps_the_fingerprints_of_what_it_began_with(root: Path) -> None:
    config = load_sweep(root / "sweep.yaml")
    assert config.train.data.fingerprint == found("own")
    assert config.baselines["full"]["data.fingerprint"] == found("full")
    assert (root / HASHES_FILE).exists()
    assert load_train(root / "best.yaml").data.fingerprint == found("own")
    starts(sweep, "resume", root)


def test_a_resume_on_other_data_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare("own", 8)
    before = (root / "sweep.yaml").read_text()
    message = refused(capsys, sweep, "resume", root)
    assert CHANGED in message
    assert "already holds a sweep" in refused(capsys, sweep, "s.yaml"), "no second sweep into the same folder"
    assert CHANGED in refused(capsys, sweep, "resume", root, "--trials", "5")
    assert (root / "sweep.yaml").read_text() == before, "what is refused changes nothing"

    starts(sweep, "resume", root, *way_out(message))
    starts(sweep, "resume", root)
    assert load_sweep(root / "sweep.yaml").train.data.fingerprint == found("own")
    prepare("own", 9)
    assert "1 added, 0 gone" in refused(capsys, sweep, "resume", root), "the hashes are those of the second data"


def test_the_data_of_a_baseline_are_checked_too(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare("full", 8)
    message = refused(capsys, sweep, "resume", root)
    assert "full: other data" in message
    assert "train had 9 images, has 8." in message
    starts(sweep, "resume", root, *way_out(message))
    starts(sweep, "resume", root)


def test_a_sweep_of_an_earlier_commit_is_not_checked(root: Path) -> None:
    text = "\n".join(
        line for line in (root / "sweep.yaml").read_text().splitlines() if not any(f"{n}-" in line for n in (7, 9, 1))
    )
    (root / "sweep.yaml").write_text(text.replace("fingerprint:", "fingerprint: null"))
    (root / BEGUN_FILE).unlink()
    prepare("own", 8)
    prepare("full", 8)
    starts(sweep, "resume", root)
    assert load_sweep(root / "sweep.yaml").train.data.fingerprint is None


def test_a_resume_takes_no_other_setting(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sweep.main(["resume", str(root), "--set", "train.optim.lr=1"])
    assert "train.data.fingerprint=null" in capsys.readouterr().err


def test_a_sweep_file_with_a_fingerprint(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare("own", 8)
    Path("copy.yaml").write_text((root / "sweep.yaml").read_text().replace("../../", ""))
    words = ("copy.yaml", "--output", "other")
    message = refused(capsys, sweep, *words)
    assert COUNTED in message
    assert COUNTED in refused(capsys, sweep, *words, "--dry-run", "1")
    assert not Path("other").exists()
    assert sweep.main([*words, "--dry-run", "1", *way_out(message)]) == 0
    starts(sweep, *words, *way_out(message))
    assert load_sweep(Path("other/s/sweep.yaml")).train.data.fingerprint == found("own")


def test_best_yaml_on_other_data_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare("own", 8)
    Path("best.yaml").write_text((root / "best.yaml").read_text().replace("../../", ""))
    for words in ((), ("--dry-run",)):
        assert CHANGED in refused(capsys, train, root / "best.yaml", *words)
        message = refused(capsys, train, "best.yaml", *words)
        assert COUNTED in message
    assert not (root / "train-best").exists()
    assert train.main(["best.yaml", "--dry-run", *way_out(message)]) == 0
    starts(train, "best.yaml", *way_out(message))
    starts(train, root / "best.yaml", *way_out(message))


def test_other_test_images_do_not_stop_a_training(root: Path) -> None:
    trees.save(Path("raw/c.png"), trees.scene("other"))
    splits = {
        split: [trees.Source(key, f"raw/{key}.png", (trees.MaskFile(f"raw/{key}_mask.png"),)) for key in keys]
        for split, keys in {"train": [f"a{n}" for n in range(7)], "val": ["b"], "test": ["c"]}.items()
    }
    shutil.rmtree("own")
    write_shards(Path("own"), trees.plan(splits))
    assert found("own")["test"] != load_train(root / "best.yaml").data.fingerprint["test"]
    starts(train, root / "best.yaml")
    with pytest.raises(SystemExit):
        sweep.main(["resume", str(root), "--set", "train.data.fingerprint=null"])


@pytest.mark.parametrize("file", ["t.yaml", "runs/t/config.yaml"])
def test_a_training_goes_on_with_the_data_that_it_began_with(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    inner = SWEEP.partition("train:\n")[2].partition("budget:")[0]
    Path("t.yaml").write_text("".join(line[2:] + "\n" for line in inner.splitlines()))
    starts(train, "t.yaml", "--output", "runs/t")
    resume = (file, "--output", "runs/t", "--resume")
    starts(train, *resume)
    assert load_train(Path("runs/t/config.yaml")).data.fingerprint == found("own")
    prepare("own", 8)
    message = refused(capsys, train, *resume)
    assert CHANGED in message
    starts(train, *resume, *way_out(message))
    assert load_train(Path("runs/t/config.yaml")).data.fingerprint == found("own")
    starts(train, *resume)


def test_a_run_of_an_earlier_commit_is_not_checked() -> None:
    inner = SWEEP.partition("train:\n")[2].partition("budget:")[0]
    Path("runs/t").mkdir(parents=True)
    text = "".join(line[2:] + "\n" for line in inner.splitlines()).replace("shards: own", "shards: ../../own")
    Path("runs/t/config.yaml").write_text(text)
    starts(train, "runs/t/config.yaml", "--output", "runs/t", "--resume")


def test_no_shipped_sweep_has_a_fingerprint() -> None:
    for path in (Path(__file__).parents[1] / "sweeps").glob("*.yaml"):
        assert load_sweep(path).train.data.fingerprint is None, path
        assert "fingerprint" not in json.dumps(path.read_text())


def test_a_baseline_is_tested_on_the_images_of_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    for name, images in (("own", 7), ("full", 9)):
        prepare(name, images)
    with pytest.raises(SystemExit, match="a cluster is started"):
        sweep.main(["s.yaml", "--name", "same"])
    assert sweep.main(["s.yaml", "--set", "final.folds=2"]) == 2
    assert "must have the classes and held-out images" in capsys.readouterr().err
    keys = {"train": [f"a{number}" for number in range(9)], "val": ["b"], "test": ["a9"]}
    shutil.rmtree("full")
    write_shards(Path("full"), trees.plan({n: [trees.pair(Path("raw"), key) for key in k] for n, k in keys.items()}))
    assert sweep.main(["s.yaml"]) == 2
    said = capsys.readouterr().err
    assert "baselines.full: must have the classes and test images of the best configuration" in said
    assert said.startswith("error: s.yaml:")
