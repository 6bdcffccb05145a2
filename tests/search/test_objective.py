"""What follows the network that the objective is of: checkpoints, verdict, weights and pictures. No cluster."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import changed

from cps_ray.config.sweep import SweepConfig, measured_network
from cps_ray.config.train import HELD_OUT, TrainConfig
from cps_ray.datasets.loader import eval_batch, evaluated_images, image_batches
from cps_ray.datasets.open import fingerprints
from cps_ray.datasets.shards import open_shards
from cps_ray.engine.inference import predict
from cps_ray.engine.metrics import mean_iou
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state, load_networks
from cps_ray.model.model import load_model
from cps_ray.on_ray import evaluate_runs
from cps_ray.on_ray.evaluate_runs import CheckpointScores, evaluate_checkpoint
from cps_ray.on_ray.export import write_checkpoint_model
from cps_ray.results import verdict_lines
from cps_ray.runs import META_FILE, STATE_FILE, best_checkpoint, read_checkpoint, write_checkpoint
from cps_ray.search.final_phase import EvaluatedRun, FinalPhase, FinalRun, is_done, plan_final_runs
from cps_ray.search.objective import headline_score, own_metric
from cps_ray.search.records import Events
from cps_ray.search.tune_session import TrainingJob
from cps_ray.search.verdict import compare


@pytest.mark.parametrize(
    ("metric", "network"),
    [
        ("val/miou", "a"),
        ("val/b/miou", "b"),
        ("val/ensemble/miou", "ensemble"),
        ("val/ab/miou", "a"),  # a slice
        ("val/iou/b", "a"),  # a class
    ],
)
def test_the_network_of_a_metric(metric: str, network: str) -> None:
    assert measured_network(metric) == network
    assert headline_score(metric, ["test/miou"]) == "test/miou", "of one network there is nothing else"
    both = ["test/miou", "test/b/miou", "test/ensemble/miou"]
    assert headline_score(metric, both) == ("test/miou" if network == "a" else f"test/{network}/miou")


@pytest.mark.parametrize("metric", ["val/b/miou", "val/ensemble/miou", "val/agreement", "val/iou/b", "val/miou"])
def test_a_baseline_of_one_network_is_measured_by_what_it_has(tiny: TrainConfig, metric: str) -> None:
    assert own_metric(metric, tiny) == metric
    of_a = metric in ("val/iou/b", "val/miou")
    for alone in (changed(tiny, method="supervised"), changed(tiny, evaluation__networks="a")):
        assert own_metric(metric, alone) == (metric if of_a else "val/miou")


def sweep(tiny: TrainConfig, root: Path, metric: str) -> SweepConfig:
    return SweepConfig.model_validate(
        {
            "version": 1,
            "name": "s",
            "output": str(root),
            "train": tiny.dump(),
            "budget": {"trials": 1},
            "objective": {"metric": metric},
            "early_stopping": {"type": "none"},
            "search_space": {"optim.lr": {"type": "float", "low": 0.001, "high": 0.1}},
            "baselines": {"supervised-only": {"method": "supervised"}},
            "final": {"seeds": [1]},
        }
    )


def test_final_runs_keep_and_report_what_they_measure(tiny: TrainConfig, tmp_path: Path) -> None:
    ours, theirs = plan_final_runs(tmp_path, sweep(tiny, tmp_path, "val/b/miou"), tiny, 0, {})
    assert (ours.job.metric, theirs.job.metric) == ("val/b/miou", "val/miou")
    phase = FinalPhase([ours, theirs], Events(tmp_path))
    for run, record in ((ours, {"val/miou": 0.1, "val/b/miou": 0.2}), (theirs, {"val/miou": 0.3})):
        assert phase.report(run.job, {"step": 6, **record})
        run.job.folder.mkdir(parents=True)
        (run.job.folder / "metrics.jsonl").write_text(json.dumps({"step": 6, **record}) + "\n")
        phase.tell(run.job, None, collapsed=False)
    told = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["value"] for event in told if event["event"] == "finished"] == [0.2, 0.3]
    rows = [EvaluatedRun(run, Path(), 6, 0.5, CheckpointScores({}, []), 6, 0).row() for run in (ours, theirs)]
    assert [list(row)[-1] for row in rows] == ["val/b/miou", "val/miou"]


def test_a_run_that_collapsed_at_its_last_step_is_not_done(tiny: TrainConfig, tmp_path: Path) -> None:
    job = TrainingJob("r", tmp_path / "r", tiny)
    checkpoint = job.folder / "checkpoint_1"
    checkpoint.mkdir(parents=True)
    (checkpoint / STATE_FILE).write_bytes(b"x")
    (checkpoint / META_FILE).write_text(json.dumps({"step": 6, "bytes": 1, "metrics": {}}))
    assert is_done(job)
    (job.folder / "error.txt").write_text("one class takes all")
    assert not is_done(job)
    phase = FinalPhase([FinalRun("best", 1, job)], Events(tmp_path))
    assert phase.ask() == job
    phase.tell(job, "one class takes all", collapsed=True)
    assert (phase.collapsed, phase.failed) == ({"r": "one class takes all"}, {})


def evaluated(arm: str, config: TrainConfig, metric: str, scores: dict[str, float]) -> EvaluatedRun:
    run = FinalRun(arm, 1, TrainingJob(f"{arm}-1", Path(), config, metric))
    # Two images of one class each, of which the headline's network finds its part.
    found = round(100 * scores[headline_score(metric, scores)])
    counts = np.array([[[found], [100], [found]], [[found], [100], [found]]])
    return EvaluatedRun(run, Path(), 6, 0.5, CheckpointScores(scores, [], ids=("x", "y"), counts=counts), 6, 0)


@pytest.mark.parametrize(
    ("metric", "gain", "lines"),
    [
        ("val/miou", 10.0, ["50.0 % over 1 seed", "40.0 % over 1 seed", "Best against plain: better by 10.0 points"]),
        ("val/b/miou", 20.0, ["60.0 % over 1 seed, network b", "better by 20.0 points"]),
        ("val/ensemble/miou", 30.0, ["70.0 % over 1 seed, all networks together", "better by 30.0 points"]),
        ("val/iou/car", 10.0, ["better by 10.0 points", "test/iou/car  best   20.0 % over 1 seed"]),
    ],
)
def test_the_verdict_is_on_the_network_of_the_objective(
    tiny: TrainConfig, tmp_path: Path, metric: str, gain: float, lines: list[str]
) -> None:
    pair = {"test/miou": 0.5, "test/b/miou": 0.6, "test/ensemble/miou": 0.7, "test/iou/car": 0.2}
    runs = [
        evaluated("best", tiny, metric, pair),
        evaluated("plain", tiny, "val/miou", {"test/miou": 0.4, "test/iou/car": 0.1}),
    ]
    config = sweep(tiny, tmp_path, metric)
    final = compare(runs, config, ["road"], tuned=["plain"], chosen=True)
    assert final["gain"] == {"plain": pytest.approx(gain)}
    best = {"trial": 0, "value": 0.5, "step": 6, "params": {}}
    text = "\n".join(verdict_lines(tmp_path, {"best": best, "objective": metric, "final": final}))
    assert all(line in text for line in lines), text
    assert text.count("test/iou/car") == (2 if metric == "val/iou/car" else 0)
    earlier = {name: final[name] for name in ("arms", "gain", "vanished")}
    assert verdict_lines(tmp_path, {"best": best, "objective": metric, "final": earlier}), "of an earlier version"


@pytest.fixture(scope="module")
def trained(tiny: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """A checkpoint of two networks of different forms."""
    b = {"encoder": "tu-test_resnet", "options": {"decoder_channels": 16}}
    config = changed(tiny, model__b=b)
    folder = tmp_path_factory.mktemp("objective")
    snapshot = build_state(config, 7, Ranks()).snapshot()
    assert snapshot is not None
    write_checkpoint(folder, snapshot, {"val/iou/road": 0.25})
    return config, folder


@pytest.mark.parametrize("network", ["a", "b", "ensemble"])
def test_what_is_exported_uses_the_network_of_the_objective(
    trained: tuple[TrainConfig, Path], tmp_path: Path, network: str
) -> None:
    config, checkpoint = trained
    shards = open_shards(config.data.shards)
    scores = evaluate_checkpoint(config.dump(), str(checkpoint), "test", 0, network)
    facts = {"step": 6, "seed": 1}
    write_checkpoint_model(tmp_path, config, checkpoint, shards, scores, facts, network=network)
    networks = load_networks(config, read_checkpoint(checkpoint), 7, source=checkpoint)
    model = load_model(tmp_path, device="cpu")
    assert model.network == network
    for name, file in (("a", "model.safetensors"), ("b", "model-b.safetensors")):
        weights, expected = load_file(tmp_path / file), networks[name].network.state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in weights)
        assert model.description.networks[name].encoder == config.model.of("ab".index(name)).encoder
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["step"], metrics["test/miou"]) == (6, scores.metrics["test/miou"])
    assert metrics["val/iou/road"] == 0.25
    assert {name: np.shape(matrix) for name, matrix in metrics["confusion"].items()} == dict.fromkeys(
        ("a", "b", "ensemble"), (7, 7)
    )
    matrix = torch.tensor(metrics["confusion"]["b"])
    assert mean_iou(matrix) == pytest.approx(metrics["test/b/miou"])


@pytest.mark.parametrize("shown", ["a", "b", "ensemble"])
def test_counts_per_image_are_those_of_the_network_shown(
    trained: tuple[TrainConfig, Path], monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    config, checkpoint = changed(trained[0], evaluation__window_px=(16, 24)), trained[1]  # in several strips
    backwards = lambda index, rows, **settings: image_batches(index, rows[::-1], **settings)  # noqa: E731
    monkeypatch.setattr(evaluate_runs, "image_batches", backwards)
    scores = evaluate_checkpoint(config.dump(), str(checkpoint), "test", 0, shown)
    index = open_shards(config.data.shards).index("test")
    networks = load_networks(config, read_checkpoint(checkpoint), 7, source=checkpoint)
    assert scores.ids == tuple(sorted(index.ids))
    assert scores.counts.shape == (len(index), 3, 7)
    for image_id, (hit, true, predicted) in zip(scores.ids, scores.counts, strict=True):
        batch = eval_batch(index, [index.ids.index(image_id)])
        with torch.inference_mode():
            prob = {each: predict(config.inference, networks[each], batch.image).softmax(1) for each in "ab"}
        found = (prob["a"] + prob["b"] if shown == "ensemble" else prob[shown]).argmax(1).numpy()
        mask = batch.mask.numpy()
        for label in range(7):
            assert hit[label] == ((found == label) & (mask == label)).sum()
            assert true[label] == (mask == label).sum()
            assert predicted[label] == ((found == label) & (mask != 255)).sum()


@pytest.mark.parametrize("shown", ["a", "b", "ensemble"])
def test_examples_show_the_network_of_the_objective(trained: tuple[TrainConfig, Path], shown: str) -> None:
    config, checkpoint = trained
    scores = evaluate_checkpoint(config.dump(), str(checkpoint), "test", 2, shown)
    networks = load_networks(config, read_checkpoint(checkpoint), 7, source=checkpoint)
    index = open_shards(config.data.shards).index("test")
    for row, (name, _, _, mask) in zip((0, len(index) - 1), scores.examples, strict=True):
        batch = eval_batch(index, [row])
        assert batch.ids == (name,)
        with torch.inference_mode():
            prob = {each: predict(config.inference, networks[each], batch.image).softmax(1) for each in "ab"}
        expected = (prob["a"] + prob["b"] if shown == "ensemble" else prob[shown]).argmax(1)[0]
        assert np.array_equal(mask, expected.numpy())


def test_the_fold_that_is_held_out_is_evaluated_as_test(trained: tuple[TrainConfig, Path]) -> None:
    shards = open_shards(trained[0].data.shards)
    config = changed(trained[0], data__folds={"count": 3, "held_out": 1}, data__fingerprint=fingerprints(shards))
    scores = evaluate_checkpoint(config.dump(), str(trained[1]), HELD_OUT, 1)
    assert scores.ids == tuple(sorted(evaluated_images(shards, config, "val").ids))
    assert len(scores.ids) == 2
    assert scores.examples[0][0] in scores.ids
    validation = evaluate_checkpoint(config.dump(), str(trained[1]), "val")
    assert scores.metrics["test/miou"] == validation.metrics["val/miou"]
    assert (scores.counts == validation.counts).all()


def test_the_checkpoint_is_chosen_by_the_objective(tmp_path: Path) -> None:
    for step, b in ((2, 0.9), (4, 0.1)):
        folder = tmp_path / f"checkpoint_{step}"
        folder.mkdir()
        (folder / STATE_FILE).write_bytes(b"x")
        meta = {"step": step, "bytes": 1, "metrics": {"val/miou": step / 10, "val/b/miou": b}}
        (folder / META_FILE).write_text(json.dumps(meta))
    assert [best_checkpoint(tmp_path, metric)[1]["step"] for metric in ("val/miou", "val/b/miou")] == [4, 2]
