"""Sweeps and trainings as people run them: commands in processes of their own, on a local cluster, killed for real."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from support import TINY_DATA, changed, without_a_cluster

from cps_ray.config.reader import load_train
from cps_ray.config.train import TrainConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.datasets.loader import eval_batches
from cps_ray.datasets.shards import open_shards
from cps_ray.model.evaluating import evaluate_model
from cps_ray.model.model import load_model

pytestmark = pytest.mark.ray

SWEEP = (
    """\
version: 1
name: tiny
output: runs
train:
"""
    + TINY_DATA
    + """\
    slices: {first: "*_0000[012]"}
  model: {encoder: tu-test_efficientnet, options: {decoder_channels: 16, decoder_aspp_dropout: 0.0}}
  optim: {name: adamw, lr: 3e-3}
  schedule: {steps: 20, eval_every: 5}
  resources: {cpus_per_worker: 0.5}
budget: {trials: 4}
early_stopping: {type: asha, grace: 5, reduction: 2}
search_space:
  cps.weight: {type: float, low: 0.5, high: 2.0}
  optim.lr: {type: float, low: 1e-6, high: 1e-2, log: true}
baselines:
  supervised-only: {method: supervised}
final: {retrain: best, seeds: [1, 2]}
"""
)


@pytest.fixture
def sweep_file(tmp_path: Path, shards: Path) -> Path:
    # A folder whose name is a URL, a glob, markup and a comment to whoever does not take it as a name.
    folder = tmp_path / "we ird%2F[v2]?#é"
    folder.mkdir()
    path = folder / "tiny.yaml"
    path.write_text(SWEEP.replace("SHARDS", str(shards)))
    return path


def start(*words: str, cwd: Path) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env["TMPDIR"] = str(cwd / ("too-long-for-a-socket-" * 5))
    command = [sys.executable, "-u", "-m", f"cps_ray.{words[0]}", *words[1:]]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(*words: str, cwd: Path) -> tuple[int, str]:
    process = start(*words, cwd=cwd)
    out, _ = process.communicate(timeout=400)
    return process.returncode, out


def read_until(process: subprocess.Popen[str], wanted: Callable[[str], bool]) -> str:
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if wanted(line):
            return text
    raise AssertionError(f"ended before the wanted line:\n{text}")


def descendants(pid: int) -> dict[int, str]:
    """Returns the living processes that descend from `pid`, with their command lines."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        for child in parents.get(waiting.pop(), []):
            waiting.append(child)
            try:
                found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
    return found


def alive(pid: int, command: str) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") == command != ""
    except OSError:
        return False


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_sweep_from_its_file_to_a_model(sweep_file: Path) -> None:
    cwd = sweep_file.parent
    # The third one learns nothing, and the first two, of which one is the file's own, are ahead of it at every rung.
    points = ", ".join(f"{{cps.weight: 1.0, optim.lr: {rate}}}" for rate in ("5.0e-3", "1.0e-6"))
    baseline = "baselines.supervised-only={method: supervised, search: [optim.lr], trials: 2}"
    code, out = run("sweep", "tiny.yaml", "--set", f"enqueue=[{points}]", "--set", baseline, cwd=cwd)
    assert code == 0, out
    assert "Ray dashboard: http://127.0.0.1:" in out
    root = cwd / "runs" / "tiny"

    summary = json.loads((root / "summary.json").read_text())
    counts = summary["trials"]
    assert summary["status"] == "finished"
    assert counts["complete"] + counts["pruned"] == 4, out
    assert counts["complete"] >= 1
    assert counts["pruned"] >= 1
    assert set(summary["final"]["arms"]) == {"best", "supervised-only"}
    assert summary["final"]["arms"]["best"]["test/miou"]["n"] == 2
    assert "test/first/miou" in summary["final"]["arms"]["best"]

    trials = pq.read_table(root / "trials.parquet").to_pylist()
    assert [row["number"] for row in trials] == [0, 1, 2, 3]
    assert (root / "trials.csv").read_text().count("\n") == 5
    history = pq.read_table(root / "history.parquet").to_pylist()
    assert {row["run"] for row in history} >= {"0000", "best-seed1", "supervised-only-seed2"}

    # What was sampled is what was trained, and what is on record is what was reported.
    for row in trials:
        folder = root / "trials" / f"{row['number']:04d}"
        config = load_train(folder / "config.yaml")
        assert config.optim.lr == row["params.optim.lr"]
        assert config.cps.weight == row["params.cps.weight"]
        evaluated = {record["step"]: record["val/miou"] for record in records(folder)}
        assert max(evaluated) == row["steps"], "a trial that is stopped takes not one step more"
        assert max(evaluated.values()) == row["score_best"]
        assert (folder / "log.txt").read_text()
        assert not (folder / "error.txt").exists(), (folder / "error.txt").read_text()
        assert (row["state"] == "pruned") == (row["steps"] < 20)

    best = load_train(root / "best.yaml")
    (top,) = [row for row in trials if row["number"] == summary["best"]["trial"]]
    assert best.optim.lr == top["params.optim.lr"]
    assert top["score"] == max(row["score"] for row in trials if row["score"] is not None)
    # The baseline is the best configuration, supervised, with what its own search has found, which began with the best one's.
    baseline = load_train(root / "final" / "supervised-only-seed1" / "config.yaml")
    assert baseline.method == "supervised"
    assert (baseline.schedule, baseline.model) == (best.schedule, best.model)
    lines = (root / "baselines/supervised-only/trials.jsonl").read_text().splitlines()
    tried = {row["number"]: row for row in map(json.loads, lines)}
    assert [*tried] == [0, 1]
    assert tried[0]["params.optim.lr"] == best.optim.lr
    found = max((row for row in tried.values() if row["score"] is not None), key=lambda row: row["score"])
    assert baseline.optim.lr == found["params.optim.lr"]
    difference = summary["final"]["difference"]["supervised-only"]
    assert (difference["tuned"], difference["trainings"], difference["images"]) == (True, 2, 6)
    arms = [summary["final"]["arms"][arm]["test/miou"]["mean"] for arm in ("best", "supervised-only")]
    assert difference["gain"] == pytest.approx(arms[0] - arms[1])
    assert "Best against supervised-only: " in out
    assert "config sha256" in (root / "trials/0000/log.txt").read_text()

    model = load_model(root / "best", device="cpu")
    assert len(model.classes) == 7
    weights = [network.weights for network in model.description.networks.values()]
    assert summary["weights"] == weights[:1] == weights[1:]
    assert weights[0]["sentence"].endswith("none, trained from scratch")
    assert_scores_are_the_models(root / "best", "test")
    # What a person sees in the card is what was measured.
    metrics = json.loads((root / "best" / "metrics.json").read_text())
    assert f"This model: mIoU {100 * metrics['test/miou']:.1f} %" in (root / "best" / "README.md").read_text()
    assert cv2.imread(str(root / "best" / "examples.png")).shape[1] > 4 * 200
    seeds = (root / "best" / "seeds.csv").read_text().splitlines()
    assert len(seeds) == 5

    code, told = run("sweep", "resume", "runs/tiny", cwd=cwd)
    assert (code, told.splitlines()[0]) == (0, "Nothing to do: the sweep is finished. More trials: --trials N.")
    assert run("sweep", "status", "runs/tiny", cwd=cwd)[0] == 0
    assert run("sweep", "best", "runs/tiny", cwd=cwd)[1] == (root / "best.yaml").read_text()

    # best.yaml trains as it is, and to the same score.
    code, out = run("train", "runs/tiny/best.yaml", cwd=cwd)
    assert code == 0, out
    again = max(record["val/miou"] for record in records(root / "train-best"))
    assert f"{again:.4f}" == f"{summary['best']['value']:.4f}"
    assert "Model: runs/tiny/train-best/best" in out
    assert_scores_are_the_models(root / "train-best/best", "val")


def assert_scores_are_the_models(folder: Path, split: str) -> None:
    """The confusion matrices in a model's folder are those of the model in it."""
    metrics = json.loads((folder / "metrics.json").read_text())
    config = load_train(folder / "config.yaml")
    assert set(metrics["confusion"]) == {"a", "b", "ensemble"}
    for network, matrix in metrics["confusion"].items():
        model = load_model(folder, device="cpu", network=network)
        found = evaluate_model(model, eval_batches(open_shards(config.data.shards), split))
        # Threads may sum in another order: then a pixel between two classes may change.
        assert abs(found.matrix - np.array(matrix)).sum() <= 2 * found.matrix.sum() * 1e-4, network
    assert cv2.imread(str(folder / "examples.png")) is not None


def test_ctrl_c_leaves_nothing_running_and_resume_finishes(sweep_file: Path) -> None:
    cwd = sweep_file.parent
    process = start("sweep", "tiny.yaml", "--set", "final.retrain=none", "--set", "early_stopping.type=none", cwd=cwd)
    before = read_until(process, lambda line: "step 5/20" in line)
    children = descendants(process.pid)
    assert any("RayTrainWorker" in command for command in children.values())
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 130, before + rest
    deadline = time.monotonic() + 20
    while (left := {p: c for p, c in children.items() if alive(p, c)}) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left
    assert "Resume: python -m cps_ray.sweep resume runs/tiny" in rest
    summary = json.loads((cwd / "runs/tiny/summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["trials"]["running"] >= 1

    code, out = run("sweep", "resume", "runs/tiny", cwd=cwd)
    assert code == 0, out
    summary = json.loads((cwd / "runs/tiny/summary.json").read_text())
    states = {"complete": 4, "pruned": 0, "collapsed": 0, "failed": 0, "running": 0}
    assert summary["trials"] == {"budget": 4, **states}
    # The interrupted trial continued from its checkpoint, under its number.
    logs = [(cwd / f"runs/tiny/trials/{number:04d}/log.txt").read_text() for number in range(4)]
    assert any(log.count(" of 20: rank 0 of 1") == 2 for log in logs)
    for number in range(4):
        folder = cwd / "runs/tiny/trials" / f"{number:04d}"
        assert [record["step"] for record in records(folder)] == [5, 10, 15, 20]
    resumed = load_train(cwd / "runs/tiny/trials/0000/config.yaml")
    expected = [record["val/miou"] for record in without_a_cluster(resumed)]
    assert [record["val/miou"] for record in records(cwd / "runs/tiny/trials/0000")] == pytest.approx(
        expected, abs=1e-9
    )


def test_stopped_resumed_and_killed_a_training_ends_as_if_nothing_had_happened(
    tiny: TrainConfig, tmp_path: Path
) -> None:
    """SIGTERM to the command, `--resume`, then SIGKILL to the worker, which Ray Train replaces."""
    # At the tiny training's full weight the networks really do teach each other one class, which would end it.
    config = changed(tiny, schedule__steps=120, schedule__eval_every=10, cps__weight=0.1)
    config = changed(config, resources__cpus_per_worker=0.5)
    (tmp_path / "t.yaml").write_text(dump_yaml(config.dump(str(tmp_path))))
    process = start("train", "t.yaml", cwd=tmp_path)
    read_until(process, lambda line: line.startswith("step 20/120"))
    children = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    time.sleep(2)
    assert not [command for pid, command in children.items() if alive(pid, command)]

    command = rest.split("Resume: python -m cps_ray.")[1].splitlines()[0].split()
    code, out = run(*command, "--set", "optim.lr=0.5", cwd=tmp_path)
    assert code == 2, f"other settings would make another training: {out}"
    before = len(records(tmp_path / "train-t"))
    process = start(*command, cwd=tmp_path)
    read_until(process, lambda line: line.startswith(f"step {10 * before + 20}/120"))
    (victim,) = [pid for pid, command in descendants(process.pid).items() if "RayTrainWorker" in command]
    os.kill(victim, signal.SIGKILL)
    rest, _ = process.communicate(timeout=300)
    assert process.returncode == 0, rest

    lines = (tmp_path / "train-t/log.txt").read_text().splitlines()
    starts = [int(line.split("step ")[1].split()[0]) for line in lines if " of 120: rank 0 of 1" in line]
    assert len(starts) == 3
    assert starts[0] == 0
    # Each time from the checkpoint before: a record comes before its checkpoint, and one evaluation may follow what was read.
    assert starts[1] in (10 * before - 10, 10 * before)
    assert starts[2] in (10 * before + 10, 10 * before + 20, 10 * before + 30)
    found, expected = records(tmp_path / "train-t"), without_a_cluster(config)
    assert [record["step"] for record in found] == list(range(10, 121, 10))
    for name in ("train/loss", "val/miou"):
        assert [r[name] for r in found] == pytest.approx([r[name] for r in expected], abs=1e-9)


def test_when_every_trial_diverges_the_limit_stops_the_sweep(sweep_file: Path) -> None:
    cwd = sweep_file.parent
    space = "search_space={optim.lr: {type: float, low: 1.0e+20, high: 1.0e+25, log: true}}"
    limits = "failures={max_consecutive: 2}"
    code, out = run("sweep", "tiny.yaml", "--set", space, "--set", limits, "--set", "budget.trials=9", cwd=cwd)
    assert code == 4, out
    assert "2 trials in a row failed or collapsed" in out
    assert "not finite at step" in out
    assert "not finite at step" in (cwd / "runs/tiny/trials/0000/error.txt").read_text()
    summary = json.loads((cwd / "runs/tiny/summary.json").read_text())
    assert summary["status"] == "failed"
    counts = summary["trials"]
    assert counts["collapsed"] >= 2
    begun = sum(counts.values()) - counts["budget"]
    code, out = run("sweep", "resume", "runs/tiny", "--trials", str(begun), cwd=cwd)
    assert code == 3, out
    assert "no trial completed" in out
