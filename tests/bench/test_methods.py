"""`bench methods`: its variants, its runs on record, and what it refuses."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from support import changed

from cps_ray.bench import methods
from cps_ray.bench.__main__ import main
from cps_ray.bench.comparison import Comparison, Figures
from cps_ray.bench.labels import ShuffledLabels, TrueMasks
from cps_ray.bench.methods import VARIANTS, impossible, train_and_evaluate, variants
from cps_ray.config.train import TrainConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.datasets.shards import Shards, open_shards
from cps_ray.search.records import environment


@pytest.fixture
def file(tiny: TrainConfig, tmp_path: Path) -> Path:
    path = tmp_path / "t.yaml"
    path.write_text(dump_yaml(tiny.dump(str(tmp_path))))
    return path


def error(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_every_variant_is_a_training_and_changes_something(tiny: TrainConfig) -> None:
    found = variants(tiny, VARIANTS)
    assert [*found] == [*VARIANTS]
    # These two differ from `cps + cutmix` in what networks are told, which is no setting.
    settings = {name: config for name, config in found.items() if name not in ("oracle", "shuffled control")}
    assert len({config.model_dump_json() for config in settings.values()}) == len(settings)
    assert found["oracle"] == found["shuffled control"] == found["cps + cutmix"]


def test_trainings_at_once_share_the_threads_that_the_environment_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)  # OMP_NUM_THREADS=3
    assert [methods.threads_of(jobs) for jobs in (1, 2, 4, 16)] == [3, 3, 2, 1]


def test_a_variant_with_other_steps_is_evaluated_at_its_end(tiny: TrainConfig) -> None:
    schedule = variants(tiny, {"long": {"schedule.steps": 25}})["long"].schedule
    assert (schedule.steps, schedule.eval_every) == (25, 25)


def test_a_variant_is_trained_and_evaluated_on_the_split(tiny: TrainConfig) -> None:
    raw = changed(variants(tiny, VARIANTS)["cps + cutmix"], cps__class_weights=0.5).dump()
    figures = train_and_evaluate(raw, "test", threads=1)
    assert figures["step"] == 6
    assert figures["seconds"] > 0.0
    assert {"test/miou", "test/b/miou", "test/ensemble/miou", "pseudo/miou", "pseudo/agreement"} <= {*figures}
    assert not [name for name in figures if name.startswith("val/")]
    oracle, shuffled = (train_and_evaluate(raw, "test", 1, told) for told in (TrueMasks, ShuffledLabels))
    assert oracle["pseudo/agreement"] == 1.0
    assert len({each["train/cps"] for each in (figures, oracle, shuffled)}) == 3


def test_controls_that_the_data_cannot_have_are_left_out(
    tiny: TrainConfig, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = open_shards(tiny.data.shards)
    assert not impossible(tiny, shards)
    alone = changed(tiny, data__unlabeled_batch=2, compute__accumulate=2)
    assert [*impossible(alone, shards)] == ["shuffled control"]
    index = Shards.index

    def without_some_masks(self: Shards, split: str) -> object:
        found = index(self, split)
        spans = found.locations.mask.copy()
        spans[:5] = 0
        return replace(found, locations=replace(found.locations, mask=spans))

    monkeypatch.setattr(Shards, "index", without_some_masks)
    assert [*impossible(tiny, shards)] == ["upper bound", "oracle"]
    assert main(["methods", str(file), "--control", "oracle"]) == 2
    expected = "--control oracle: it needs the masks of all unlabelled images, but 5 of 18 have none."
    assert expected in error(capsys)


def test_what_is_compared_is_checked_before_anything_is_trained(
    file: Path, tiny: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    subset = str(file.with_name("labelled.txt"))
    for words, message in [
        (["--only", "cutmix"], "--only 'cutmix': must be one of supervised, upper bound, "),
        (["--control", "cutmix"], "--control 'cutmix': must be one of supervised, upper bound, "),
        (["--set", "optim.lr"], "--set optim.lr: must be KEY=VALUE"),
        (["--set", "optim.rate=1"], "--set: optim.rate: no such setting"),
        (["--variant", "cps.weight=0.5"], "--variant 'cps.weight=0.5': must be 'NAME: KEY=VALUE ...'"),
        (["--variant", "half: cps.weight"], "--variant half: cps.weight: must be KEY=VALUE"),
        (["--variant", "half: cps.wait=0.5"], "half: cps.wait: no such setting. Did you mean"),
        (["--variant", "half: 'cps.weight=0.5"], "cannot be divided into words: No closing quotation"),
        (["--variant", "cps: cps.weight=0.5"], "--variant cps: there is a variant of this name already"),
        (["--variant", "half:", "--variant", "half:"], "--variant half: there is a variant of this name already"),
        (["--variant", "few: method=cps data.labeled=24"], "needs unlabelled images, but all 24"),
        (["--variant", "rare: loss.class_weights=[1,2]"], "must have one weight for each of the 7 classes"),
        (
            ["--draws", "2", "--set", "data.labeled=1.0"],
            "--draws: `data.labeled` must be a count, or a fraction below 1",
        ),
        (
            ["--draws", "2", "--set", "data.labeled=null", "--set", f"data.labeled_list={subset}"],
            f"but it is {subset}",
        ),
    ]:
        assert main(["methods", str(file), *words]) == 2, words
        assert message in error(capsys)
    for words in (["--draws", "0"], ["--jobs", "0"], ["--png", "no-folder/a.png"], ["--png", "a.jpg"]):
        with pytest.raises(SystemExit):
            main(["methods", str(file), *words])


def test_a_killed_comparison_goes_on_from_its_record(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_file = file.with_name("methods.json")
    # 5 is no multiple of the file's `eval_every`.
    words = ["methods", str(file), "--only", "supervised", "--draws", "2", "--seeds", "1", "--set", "schedule.steps=5"]
    words += ["--json", str(record_file)]
    bench = subprocess.Popen([sys.executable, "-m", "cps_ray.bench", *words], stdout=subprocess.PIPE, text=True)
    assert bench.stdout is not None
    assert bench.stdout.readline().startswith("supervised draw 0 seed 1: ")
    children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children").read_text().split()
    bench.kill()
    bench.wait()
    bench.stdout.close()
    first = json.loads(record_file.read_text())["runs"]
    assert [*first] == ["supervised draw 0 seed 1"]
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a training outlives the benchmark"
        time.sleep(0.1)

    assert main(words) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "supervised draw 0 seed 1: " not in out
    assert "supervised draw 1 seed 1: " in out
    assert "mean and sd over 2 draws of labelled images, each the mean of 1 seed" in out
    runs = json.loads(record_file.read_text())["runs"]
    assert runs["supervised draw 0 seed 1"] == first["supervised draw 0 seed 1"]
    assert runs["supervised draw 0 seed 1"]["test/miou"] != runs["supervised draw 1 seed 1"]["test/miou"]


def test_runs_on_record_are_kept_and_other_runs_refused(
    tiny: TrainConfig, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def scores_without_training(
        comparison: Comparison, jobs: int, runs: Mapping[str, Figures]
    ) -> Iterator[tuple[str, Figures]]:
        for name in comparison.trainings:
            if (key := comparison.key(name, (0, 1))) not in runs:
                yield key, {"test/miou": 0.25 if name == "supervised" else 0.35}

    monkeypatch.setattr(methods, "_run_all", scores_without_training)
    record_file = file.with_name("methods.json")
    words = ["methods", str(file), "--only", "supervised", "--seeds", "1", "--json", str(record_file)]
    half = ["--variant", f"half weight: cps.weight=0.5 'data.crop_px=[32, 32]' data.shards={tiny.data.shards}"]
    assert main([*words, *half]) == 0
    record = json.loads(record_file.read_text())
    assert record["comparison"]["half weight"]["difference"]["n"] == 1
    out = capsys.readouterr().out
    assert "Intervals are over seeds, and hold for this draw of labelled images only." in " ".join(out.split())
    (line,) = (line for line in out.splitlines() if "│ half weight" in line)
    cells = [cell.strip() for cell in line.split("│")]
    assert cells[2:5] == ["35.0", "+10.0", "1 of 1"]
    for shards in (record["config"]["data"]["shards"], record["variants"]["half weight"]["data.shards"]):
        assert not Path(shards).is_absolute(), "a record may be published"
    assert record["runs"]["supervised draw 0 seed 1"]["commit"] == environment()["commit"]

    # The record alone shows the same.
    monkeypatch.chdir("/")
    picture = file.with_name("gains.png")
    assert main(["methods", str(record_file), "--png", str(picture)]) == 0
    assert Image.open(picture).width > 300
    assert line in capsys.readouterr().out.splitlines()
    assert main(["methods", str(record_file), "--along", "cps.weight", "--png", str(picture)]) == 2
    assert "--along cps.weight: needs two variants with other positive numbers there" in error(capsys)
    for change, message in [
        (["--set", "optim.lr=0.5"], "is a record and is only shown; --set would change nothing"),
        (["--split", "val"], "is a record and is only shown; --split would change nothing"),
        (["--seeds", "7"], "is a record and is only shown; --seeds would change nothing"),
        (["--json", "other.json"], "is a record and is only shown; --json would change nothing"),
        (["--along", "cps.weight"], "--along: is drawn into the file of --png. Name one."),
        (["--only", "cps"], "has no variant 'cps'; it has supervised, half weight."),
        (["--control", "cps"], "has no variant 'cps'; it has supervised, half weight."),
    ]:
        assert main(["methods", str(record_file), *change]) == 2
        assert message in error(capsys)

    # A variant that is not asked for stays on record.
    assert main(words) == 0
    assert json.loads(record_file.read_text())["runs"] == record["runs"]
    capsys.readouterr()
    assert main([*words, *half]) == 0
    assert "seed 1: " not in capsys.readouterr().out

    for change, message in [
        (["--set", "optim.lr=0.5"], "`optim` was {'name': 'sgd', 'lr': 0.01"),
        (["--split", "val"], "evaluated on test, not on val"),
        (["--variant", "half weight: cps.weight=0.25"], "the runs of 'half weight' must have the same changes"),
    ]:
        assert main([*words, *change]) == 2
        assert message in error(capsys)
    record_file.write_text(json.dumps({**record, "data": "other"}))
    assert main(words) == 2
    assert "trained on other shards" in error(capsys)
    for spoilt in ([], {**record, "variants": ["half weight"]}, {**record, "variants": {"half weight": None}}):
        record_file.write_text(json.dumps(spoilt))
        assert main(words) == 2
        assert "must be a record of `bench methods`" in error(capsys)


def test_a_shipped_sweep_goes_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["methods", "camvid"]) == 2
    assert error(capsys).startswith(f"error: {tmp_path}/data/camvid/shards: no shards here")


def test_a_misspelt_name_of_a_shipped_sweep_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["methods", "camvit"]) == 2
    assert error(capsys) == "error: camvit: no such file, and there is no sweep 'camvit'. Did you mean camvid?"
