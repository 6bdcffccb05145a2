"""Wrong input is one line, with where, what was found and how to fix it, and the documented exit code."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trees
from support import TINY_DATA

from cps_ray import prepare, sweep, train
from cps_ray.config.reader import load_sweep
from cps_ray.datasets.prepare.assembly import write_shards
from cps_ray.files import read_json, write_json
from cps_ray.on_ray.cluster import connected
from cps_ray.results import BEGUN_FILE
from cps_ray.search import sweep_folder
from cps_ray.search.records import write_summary
from cps_ray.search.study import SweepStudy

SWEEP = (
    """\
version: 1
name: bad
output: runs
train:
"""
    + TINY_DATA
    + """\
  model: {encoder: tu-test_efficientnet, options: {decoder_channels: 16}}
  optim: {lr: 0.01}
  schedule: {steps: 4, eval_every: 2}
  resources: {cpus_per_worker: 0.5}
budget: {trials: 2}
early_stopping: {type: none}
search_space:
  cps.weight: {type: float, low: 0.5, high: 2.0}
final: {retrain: none}
"""
)

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes the sweep above, with (old, new) parts replaced, into the working directory; returns the file's name."""
    monkeypatch.chdir(tmp_path)

    def written(*changes: tuple[str, str], name: str = "bad.yaml") -> str:
        text = SWEEP
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        Path(name).write_text(text.replace("SHARDS", str(shards)))
        return name

    return written


@pytest.fixture(autouse=True)
def _refused_before_any_cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a sweep that should be refused fail at once where it is not: it would start a cluster, and train."""

    def connect(address: str | None, *_: str) -> object:
        if address is None:
            raise SystemExit("a cluster is started")  # the one exception that no command turns into a line
        return connected(address)

    if request.node.get_closest_marker("ray") is None:
        monkeypatch.setattr("cps_ray.search.sweep.connected", connect)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1, text
    return text


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("crop_px", "crop_size"), ["bad.yaml:8", "train.data.crop_size", "no such setting", "crop_px"]),
        (("labeled: 6", "labeled: 6\n    labeled: 7"), ["bad.yaml:8", "labeled", "twice"]),
        (("lr: 0.01", "lr: fast"), ["bad.yaml:12", "train.optim.lr", "number", "fast"]),
        (("lr: 0.01", "lr: -1"), ["bad.yaml:12", "train.optim.lr", "-1", "greater than 0"]),
        (
            ("eval_every: 2", "eval_every: 3"),
            ["bad.yaml:13", "schedule.steps % train.schedule.eval_every == 0", "steps=4, eval_every=3"],
        ),
        (("cps.weight:", "cps.wait:"), ["bad.yaml:18", "search_space.cps.wait", "Did you mean cps.weight?"]),
        (("low: 0.5,", "low: 0, log: true,"), ["bad.yaml:18", "low > 0", "baselines"]),
        (("low: 0.5", "low: 3.0"), ["bad.yaml:18", "3.0", "2.0"]),
        (("budget:", "objective: {metric: test/miou}\nbudget:"), ["bad.yaml:15", "test/miou", "val/miou"]),
        (
            ("cps.weight: {type: float, low: 0.5, high: 2.0}", "data.labeled_batch: {type: int, low: 2, high: 4}"),
            ["bad.yaml:18", "search_space.data.labeled_batch"],
        ),
        (("cpus_per_worker: 0.5", "workers: 3"), ["labeled_batch", "== 0` must hold", "4 images for 3 x 1"]),
        (("resources:", "compute: {autocast: fp16}\n  resources:"), ["fp16", "gpus_per_worker", "bf16"]),
        (
            ("final: {retrain: none}", "baselines:\n  best: {method: supervised}"),
            ["bad.yaml:20", "baselines.best", "the name of the best configuration itself"],
        ),
        (("retrain: none", "seeds: [1, 2, 1]"), ["bad.yaml:19", "final.seeds", "lists 1 twice"]),
        (("version: 1", "version: 1\n\tname: x"), ["bad.yaml:2"]),
    ],
    ids=lambda value: value[1].strip()[:30] if isinstance(value, tuple) else "",
)
def test_settings(write: Write, capsys: pytest.CaptureFixture[str], change: tuple[str, str], parts: list[str]) -> None:
    assert sweep.main([write(change)]) == 2
    text = one_line(capsys)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("tu-test_efficientnet", "resnet5O"), ["model.encoder", "'resnet5O'", "Did you mean resnet50?"]),
        (("decoder_channels: 16", "decoder_chanels: 16"), ["model", "decoder_chanels", "cannot be built"]),
        (("model: {", "model: {weights_file: none.pt, "), ["none.pt", "does not exist", "relative to the config file"]),
        (("labeled: 6", "labeled: 600"), ["data.labeled", "at most 24", "600"]),
        (("labeled: 6", "labeled_list: ids.txt"), ["ids.txt", "cannot be read"]),
        (("budget:", "objective: {metric: val/mIoU}\nbudget:"), ["objective.metric", "Did you mean val/miou?"]),
        (("retrain: none", "set: {model.encoder: resnet5}"), ["'resnet5'", "Did you mean resnet50?"]),
        (("SHARDS", "nowhere\n    prepare: make them so"), ["nowhere", "no shards here", "make them so"]),
        (
            (
                "cps.weight: {type: float, low: 0.5, high: 2.0}",
                "model.encoder: {type: choice, values: [tu-test_resnet, resnt18]}",
            ),
            ["'resnt18'", "Did you mean resnet18?"],
        ),
    ],
    ids=lambda value: value[1].strip()[:30] if isinstance(value, tuple) else "",
)
def test_networks_and_data(
    write: Write, capsys: pytest.CaptureFixture[str], change: tuple[str, str], parts: list[str]
) -> None:
    assert sweep.main([write(change)]) == 2
    text = one_line(capsys)
    assert all(part in text for part in parts), text
    assert not Path("runs").exists(), "nothing may be left behind that stands in the way of the next try"


@pytest.mark.parametrize(("nested", "image"), [("false", "val_00002"), ("true", "val_00001")])
def test_what_one_fold_alone_lacks_is_found_before_the_first_trial(
    write: Write, capsys: pytest.CaptureFixture[str], nested: str, image: str
) -> None:
    # Of the folds one alone holds the image; that is the one that trials are evaluated on.
    sliced = ("crop_px: [32, 48]", f"crop_px: [32, 48]\n    slices: {{one: {image}}}")
    folds = ("final: {retrain: none}", f"final: {{folds: 3, nested: {nested}}}\nobjective: {{metric: val/one/miou}}")
    assert sweep.main([write(sliced, folds)]) == 2
    text = one_line(capsys)
    assert "objective.metric: must be measured in each fold, but the " in text
    assert " of 0 to 2 have no val/one/miou. Take another metric, such as val/miou, or fewer folds." in text
    assert not Path("runs").exists()


def test_a_missing_file(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write()
    assert sweep.main(["none.yaml"]) == 2
    assert "none.yaml" in one_line(capsys)


def test_an_override_without_a_value(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([write(), "--set", "budget.trials"]) == 2
    assert "--set budget.trials: must be NAME=VALUE" in one_line(capsys)


def test_an_override_with_a_typo(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([write(), "--set", "budget.trails=3"]) == 2
    text = one_line(capsys)
    assert "--set budget.trails=3" in text
    assert "trials" in text


def test_a_sweep_given_as_a_training(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([write()]) == 2
    assert "python -m cps_ray.sweep bad.yaml" in one_line(capsys)


def test_an_unknown_id_in_a_list(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    Path("ids.txt").write_text("train_00001\ntrain_99999\n")
    assert sweep.main([write(("labeled: 6", "labeled_list: ids.txt"))]) == 2
    text = one_line(capsys)
    assert "ids.txt:2: 'train_99999' is no image of the training split" in text


def test_an_existing_run_folder(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/bad/trials/0000").mkdir(parents=True)
    Path("runs/bad/sweep.source.yaml").touch()
    assert sweep.main([write()]) == 2
    text = one_line(capsys)
    assert "already holds a sweep" in text
    assert "--fresh" in text
    assert Path("runs/bad/trials/0000").is_dir()


def test_a_folder_of_something_else_is_left_alone(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/bad").mkdir(parents=True)
    Path("runs/bad/sweep.yaml").write_text("mine")
    assert sweep.main([write()]) == 2
    assert "holds other files" in one_line(capsys)
    assert Path("runs/bad/sweep.yaml").read_text() == "mine"


def test_an_existing_training_folder(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line[2:] for line in SWEEP.replace("SHARDS", str(shards)).splitlines() if line.startswith("  ")]
    path = tmp_path / "t.yaml"
    path.write_text("\n".join(line for line in lines if "cps.weight" not in line) + "\n")
    (tmp_path / "train-t").mkdir()
    (tmp_path / "train-t" / "log.txt").touch()
    assert train.main([str(path)]) == 2
    text = one_line(capsys)
    assert "already holds a training" in text
    assert "--resume" in text


def test_resuming_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["resume", str(tmp_path)]) == 2
    assert "must be the folder of a sweep" in one_line(capsys)


@pytest.fixture
def finished(write: Write) -> Path:
    """A finished sweep of two trials without final runs."""
    path = Path(write())
    config = load_sweep(path)
    with sweep_folder.begun(config, path, fresh=False) as root:
        pass
    study = SweepStudy(config, root)
    for number in range(2):
        study.ask()
        study.report(number, 4, 0.5 - 0.1 * number)
        study.tell(number, failure=None)
    (root / "best").mkdir()
    (root / "best.yaml").touch()
    write_summary(root, study, config, "finished", final=None)
    return root


def test_a_budget_below_what_is_done(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "sweep.yaml").read_text()
    assert sweep.main(["resume", str(finished), "--trials", "1"]) == 2
    assert "--trials 1: must be at least 2, as many trials as" in one_line(capsys)
    assert (finished / "sweep.yaml").read_text() == before


def test_nothing_to_do_starts_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = finished / "events.jsonl"
    assert sweep.main(["resume", str(finished), "--trials", "2"]) == 0
    out = capsys.readouterr().out
    assert "Nothing to do" in out
    assert "Best trial 0: val/miou 0.5000" in out
    assert not events.exists()
    with pytest.raises(SystemExit, match="a cluster is started"):
        sweep.main(["resume", str(finished), "--trials", "3"])


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            ("mix", "values: [none, cutmix, classmix]"),
            "a choice of ['none', 'cutmix'],|but is a choice of ['none', 'cutmix', 'classmix']",
        ),
        (("mix", "values: [cutmix]"), "must stay a choice of ['none', 'cutmix'],|but is a choice of ['cutmix']"),
        (("weight", "log: true"), "must stay float, as|but is float, log"),
        (("boxes", "log: true"), "must stay int, as|but is int, log"),
    ],
)
def test_a_resume_in_a_space_that_optuna_cannot_go_on_in(
    write: Write, capsys: pytest.CaptureFixture[str], change: tuple[str, str], parts: str
) -> None:
    space = (
        "  cps.mix: {type: choice, values: [none, cutmix]}\n"
        "  cps.cutmix_boxes: {type: int, low: 1, high: 4, log: false}\n"
        "final: {retrain: none}"
    )
    path = Path(write(("final: {retrain: none}", space)))
    config = load_sweep(path)
    with sweep_folder.begun(config, path, fresh=False) as root:
        pass
    study = SweepStudy(config, root)
    study.ask()
    (root / BEGUN_FILE).unlink()  # as in a folder of before; else the setting itself is named
    resolved = (root / "sweep.yaml").read_text()
    name, new = change
    section = next(part for part in resolved.split("\n  cps.") if part.startswith((name, f"cutmix_{name}")))
    key = new.partition(":")[0]
    (old,) = (line for line in section.splitlines() if line.strip().startswith(f"{key}:"))
    (root / "sweep.yaml").write_text(resolved.replace(section, section.replace(old, f"    {new}")))
    assert sweep.main(["resume", str(root)]) == 2
    line = one_line(capsys)
    for part in parts.split("|"):
        assert part in line
    assert line.startswith(f"error: {root}/sweep.yaml:")
    assert len(SweepStudy(config, root).trials) == 1
    # The way out that the message names, tried.
    assert sweep.main([str(root / "sweep.yaml"), "--name", "other", "--dry-run", "2"]) == 0
    assert sweep.main(["status", str(root)]) == 0


def test_a_table_that_was_cut_short_is_written_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "trials.jsonl").write_text('{"num\n')
    assert sweep.main(["status", str(finished)]) == 2
    assert "written again by: python -m cps_ray.sweep resume runs/bad\n" in one_line(capsys)
    assert sweep.main(["resume", str(finished)]) == 0
    assert sweep.main(["status", str(finished)]) == 0
    assert "finished, 2 complete, of 2 trials" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["best", "best.yaml", "study.db"])
def test_what_is_missing_or_has_changed_is_made_again(finished: Path, name: str) -> None:
    """A deleted result, and another best trial than the summary's."""
    if name == "study.db":
        summary = read_json(finished / "summary.json") or {}
        write_json(finished / "summary.json", {**summary, "best": {**summary["best"], "trial": 1}})
    elif name == "best":
        (finished / name).rmdir()
    else:
        (finished / name).unlink()
    with pytest.raises(SystemExit, match="a cluster is started"):
        sweep.main(["resume", str(finished)])


def test_a_sweep_without_a_best_trial_starts_nothing_for_it(
    write: Write, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(finished)
    path = Path(write())
    config = load_sweep(path)
    with sweep_folder.begun(config, path, fresh=False) as root:
        pass
    study = SweepStudy(config, root)
    for number in range(2):
        study.ask()
        study.tell(number, failure="one class takes all", collapsed=number == 0)
    assert sweep.main(["resume", str(root)]) == 3
    assert "no trial completed (1 collapsed, 1 failed)" in one_line(capsys)


def test_a_test_split_without_masks(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    splits = {
        "train": [trees.pair(raw, f"a{number}") for number in range(7)],
        "val": [trees.pair(raw, "b")],
        "test": [trees.pair(raw, "c", masked=False)],
    }
    write_shards(tmp_path / "own", trees.plan(splits))
    assert sweep.main([write(("SHARDS", "own"))]) == 2
    assert "split 'test' must have masks" in one_line(capsys)


@pytest.fixture
def camvid(tmp_path: Path, without_ray: None) -> Path:
    """Two images per split in CamVid's layout."""
    return trees.camvid(tmp_path / "raw")


def prepared(raw: Path) -> int:
    return prepare.main(["camvid", str(raw), str(raw.parent / "out")])


def two_lines(capsys: pytest.CaptureFixture[str], out: Path) -> str:
    """Returns the line about the file; the second line says that nothing was written."""
    first, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"error: {out}: not written, as 1 file cannot be used")
    return first


def test_the_layout_itself_is_fine(camvid: Path) -> None:
    assert prepared(camvid) == 0


def without_an_image(raw: Path) -> None:
    (raw / "val/val1.png").unlink()


def without_a_mask(raw: Path) -> None:
    (raw / "valannot/val1.png").unlink()


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (
            lambda raw: trees.save(raw / "trainannot/train1.png", np.zeros((12, 16), np.uint8)),
            ["trainannot/train1.png", "32x24 px", "16x12 px", "export both at one size"],
        ),
        (
            lambda raw: trees.save(raw / "trainannot/train1.png", np.full((24, 32), 77, np.uint8)),
            ["trainannot/train1.png", "77 (768 px)", "map them"],
        ),
        (without_a_mask, ["val/val1.png", "'val1' has none", "add the mask"]),
        (without_an_image, ["valannot/val1.png", "'val1' has no image"]),
        (
            lambda raw: (raw / "train/train0.png").write_bytes(b"\x89PNG"),
            ["train/train0.png", "is cut short (4 bytes)"],
        ),
        (lambda raw: shutil.copy(raw / "test/test0.png", raw / "train/train0.png"), ["train/train0.png", "test/test0"]),
    ],
    ids=["another size", "an unknown value", "no mask", "no image", "damaged", "in two splits"],
)
def test_one_bad_file(
    camvid: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object], parts: list[str]
) -> None:
    spoil(camvid)
    assert prepared(camvid) == 2
    text = two_lines(capsys, camvid.parent / "out")
    assert all(part in text for part in parts), text
    assert not (camvid.parent / "out").exists()


def test_an_empty_split(camvid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(camvid / "test")
    shutil.rmtree(camvid / "testannot")
    assert prepared(camvid) == 2
    assert "test" in one_line(capsys)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            ("cpus_per_worker: 0.5", "cpus_per_worker: 9000"),
            ["1 workers x (9000 CPUs", "the cluster has", "Lower resources"],
        ),
        (("cpus_per_worker: 0.5", "gpus_per_worker: 64"), ["64 GPUs", "the cluster has"]),
        (("budget:", "concurrency: 4000\nbudget:"), ["concurrency: 4000", "one whole CPU for Ray Data", "fit"]),
    ],
    ids=["cpus", "gpus", "concurrency"],
)
def test_a_plan_that_can_never_run(
    write: Write, capsys: pytest.CaptureFixture[str], change: tuple[str, str], parts: list[str]
) -> None:
    name = write(change)
    assert sweep.main([name]) == 5
    text = one_line(capsys)
    assert all(part in text for part in parts), text
    assert sweep.main([name]) == 5, "the folder it left is no sweep: the next try is not refused"


def test_a_cluster_that_does_not_answer(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([write(), "--address", "127.0.0.1:1"]) == 5
    assert "no Ray cluster answers" in one_line(capsys)
