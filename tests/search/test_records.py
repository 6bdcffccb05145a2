"""Tables, events and pictures of a sweep, from a study and folders made by hand."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from cps_ray.config.space import apply
from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.datasets.shards import open_shards
from cps_ray.model.examples import write_examples
from cps_ray.on_ray.evaluate_runs import CheckpointScores
from cps_ray.results import verdict_lines
from cps_ray.search.display import LiveTable, make_display
from cps_ray.search.final_phase import EvaluatedRun, FinalRun, drop_stale, plan_final_runs
from cps_ray.search.records import Events, write_summary, write_tables
from cps_ray.search.study import SweepStudy
from cps_ray.search.tune_session import TrainingJob
from cps_ray.search.verdict import compare, spread


@pytest.fixture
def config(tiny: TrainConfig, tmp_path: Path) -> SweepConfig:
    return SweepConfig.model_validate(
        {
            "version": 1,
            "name": "s",
            "output": str(tmp_path),
            "train": tiny.dump(),
            "budget": {"trials": 4},
            "early_stopping": {"type": "none"},
            "search_space": {
                "optim.lr": {"type": "float", "low": 0.001, "high": 0.1},
                "model.options.decoder_atrous_rates": {"type": "choice", "values": [1, "a"]},
            },
            "baselines": {"supervised-only": {"method": "supervised"}},
            "final": {"seeds": [5, 6], "set": {"schedule.steps": 8}},
        }
    )


def fill(study: SweepStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cps_ray.search.study.apply", lambda train, changes, where: train)
    for number, curve in enumerate(({2: 0.1, 4: 0.4, 6: 0.3}, {2: 0.2}, {}, {2: 0.5})):
        study.ask()
        for step, value in curve.items():
            study.report(number, step, value)
        failure = {2: "boom", 3: "one class takes all"}.get(number)
        study.tell(number, failure=failure, collapsed=number == 3)


def test_tables_and_summary_say_what_happened(
    config: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = SweepStudy(config, tmp_path)
    fill(study, monkeypatch)
    folder = tmp_path / "trials" / "0000"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 2, "val/miou": 0.1}\n{"step": 4, "val/miou": 0.4, "new": 1}\n')
    write_tables(tmp_path, study, config)
    rows = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    assert [row["state"] for row in rows] == ["complete", "pruned", "failed", "collapsed"]
    assert [row["score"] for row in rows] == [0.4, None, None, 0.0]
    assert (rows[0]["score_best"], rows[0]["step_best"], rows[0]["score_last"]) == (0.4, 4, 0.3)
    assert [row["failure"] for row in rows] == [None, None, "boom", "one class takes all"]
    assert {row["params.model.options.decoder_atrous_rates"] for row in rows} <= {"1", "a"}, "a mixed choice is text"
    history = pq.read_table(tmp_path / "history.parquet").to_pylist()
    assert [(row["run"], row["step"], row["new"]) for row in history] == [("0000", 2, None), ("0000", 4, 1)]
    summary = write_summary(tmp_path, study, config, "finished", final={"x": 1})
    states = {"complete": 1, "pruned": 1, "collapsed": 1, "failed": 1, "running": 0}
    assert summary["trials"] == {"budget": 4, **states}
    assert (summary["best"]["trial"], summary["best"]["value"], summary["best"]["step"]) == (0, 0.4, 4)
    assert write_summary(tmp_path, study, config, "running")["final"] == {"x": 1}, "it is of this best trial"


def test_final_results_of_another_best_are_forgotten(
    config: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = SweepStudy(config, tmp_path)
    fill(study, monkeypatch)
    earlier = {"best": {"trial": 7}, "final": {"x": 1}}
    (tmp_path / "summary.json").write_text(json.dumps(earlier))
    assert write_summary(tmp_path, study, config, "running")["final"] is None


def test_final_runs_differ_in_seed_and_change_only(config: SweepConfig, tmp_path: Path) -> None:
    runs = plan_final_runs(tmp_path, config, config.train, 0, {})
    assert [run.job.name for run in runs] == [
        "best-seed5",
        "best-seed6",
        "supervised-only-seed5",
        "supervised-only-seed6",
    ]
    own, other = runs[0].job.config, runs[2].job.config
    assert own.schedule.steps == other.schedule.steps == 8
    assert own.model_copy(update={"method": "supervised"}) == other


def test_runs_of_an_earlier_best_are_removed(config: SweepConfig, tmp_path: Path) -> None:
    from cps_ray.config.yaml_reader import dump_yaml

    first, second, *_ = plan_final_runs(tmp_path, config, config.train, 0, {})
    for run, trained in ((first, first.job.config), (second, config.train)):
        run.job.folder.mkdir(parents=True)
        (run.job.folder / "config.yaml").write_text(dump_yaml(trained.dump(str(run.job.folder))))
    drop_stale([first, second])
    assert first.job.folder.exists()
    assert not second.job.folder.exists()
    # One that has gone on in smaller micro-batches is the same training.
    halved = apply(first.job.config, {"compute.accumulate": 2}, "test")
    (first.job.folder / "config.yaml").write_text(dump_yaml(halved.dump(str(first.job.folder))))
    drop_stale([first])
    assert first.job.folder.exists()


def evaluated(arm: str, seed: int, miou: float, config: TrainConfig) -> EvaluatedRun:
    run = FinalRun(arm, seed, TrainingJob(f"{arm}-{seed}", Path(), config))
    counts = np.array([[[round(100 * miou)], [100], [round(100 * miou)]]] * 2)
    metrics = {"test/miou": miou, "test/iou/road": miou / 2}
    return EvaluatedRun(run, Path(), 6, 0.5, CheckpointScores(metrics, [], ids=("x", "y"), counts=counts), 6, 0)


def test_gain_is_in_points_of_the_means(config: SweepConfig, tiny: TrainConfig) -> None:
    pairs = (("best", (0.5, 0.6)), ("supervised-only", (0.4, 0.5)))
    runs = [evaluated(arm, n + 1, v, tiny) for arm, values in pairs for n, v in enumerate(values)]
    table = compare(runs, config, ["road"], tuned=[], chosen=True)
    assert table["gain"] == {"supervised-only": pytest.approx(10.0)}
    own = table["arms"]["best"]["test/miou"]
    assert (own["mean"], own["sd"], own["n"]) == (pytest.approx(0.55), pytest.approx(0.0707107, rel=1e-5), 2)
    assert spread([0.3])["sd"] is None
    assert json.loads(json.dumps(table)) == table, "it goes into summary.json"


def test_the_verdict_names_classes_that_vanished_from_the_pseudo_labels_of_the_best(
    config: SweepConfig, tiny: TrainConfig
) -> None:
    runs = [evaluated(arm, seed, 0.5, tiny) for arm in ("best", "supervised-only") for seed in (1, 2)]
    runs[0] = replace(runs[0], vanished="sign (0.12), car (0.31)")
    runs[2] = replace(runs[2], vanished="sign (0.00)")
    best = {"trial": 3, "value": 0.5, "step": 6, "params": {}}
    final = compare(runs, config, ["road"], tuned=[], chosen=True)
    lines = verdict_lines(Path(), {"best": best, "objective": "val/miou", "final": final})
    assert [line for line in lines if "pseudo labels" in line] == [
        "Vanished from the pseudo labels (fraction there by that in the masks), seed 1: sign (0.12), car (0.31)"
    ]


def test_pictures_of_any_shape_fit_on_one_sheet(shards: Path, tmp_path: Path) -> None:
    manifest = open_shards(shards).manifest
    examples = []
    for height, width in ((32, 48), (40, 20)):
        mask = np.zeros((height, width), np.uint8)
        examples.append(("x", np.zeros((height, width, 3), np.uint8), mask, mask + 1))
    write_examples(tmp_path / "p.png", {"a": examples, "b": examples}, manifest.palette)
    sheet = cv2.imread(str(tmp_path / "p.png"))
    assert sheet.shape[0] > 2 * 192
    truth, answer = sheet[34 + 60, int(1.5 * 294)], sheet[34 + 60, int(2.5 * 294)]
    assert truth.tolist() == list(reversed(manifest.palette[0]))
    assert answer.tolist() == list(reversed(manifest.palette[1]))


EVENTS = (
    {"event": "phase", "text": "search"},
    {"event": "started", "run": "0000", "params": {"optim.lr": 0.01}, "steps": 6},
    {"event": "report", "run": "0000", "step": 2, "steps": 6, "value": 0.25},
    {"event": "pruned", "run": "0000", "step": 2, "value": 0.25},
    {"event": "started", "run": "0001", "params": {}, "steps": 6},
    {"event": "failed", "run": "0001", "failure": "boom [try]"},
    {"event": "started", "run": "0003", "params": {}, "steps": 6},
    {"event": "collapsed", "run": "0003", "failure": "one class [road] takes all"},
    {"event": "started", "run": "0002", "params": {}, "steps": 6},
    {"event": "report", "run": "0002", "step": 6, "steps": 6, "value": 0.5},
    {"event": "finished", "run": "0002", "step": 6, "value": 0.5},
    {"event": "best", "run": "0002", "value": 0.5},
)


@pytest.mark.parametrize("terminal", [True, False])
def test_both_displays_tell_the_story(terminal: bool, tmp_path: Path) -> None:
    console = Console(force_terminal=terminal, record=True, width=120, file=(tmp_path / "out").open("w"))
    display = make_display("s", console)
    assert isinstance(display, LiveTable) == terminal
    events = Events(tmp_path)
    events.subscribers.append(display.on_event)
    with display:
        for event in EVENTS:
            facts = {name: value for name, value in event.items() if name != "event"}
            events(str(event["event"]), **facts)
        if terminal:
            console.print(display._render())
    text = console.export_text()
    for word in (
        "0000",
        "pruned",
        "0001",
        "boom [try]",
        "collapsed",
        "class [road]",
        "0002",
        "0.5000",
        "search",
        "optim.lr 0.01",
    ):
        assert word in text
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == len(EVENTS)
