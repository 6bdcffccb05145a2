"""Gauges at the metrics port: there at every reading until they are closed, then gone, with nothing left behind."""

import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cps_ray.config.train import TrainConfig
from cps_ray.on_ray import gauges
from cps_ray.on_ray.gauges import SweepGauges, TrainGauges

METRICS = {
    "step": 4,
    "val/miou": 0.25,
    "train/loss": 1.5,
    "train/grad_norm_a": 2.0,
    "time/images_per_s": 8.0,
    "time/data_wait": 0.125,
    "memory/peak_bytes": 1e6,
    "pseudo/agreement": 0.75,
    "pseudo/confidence/road": 0.5,
}
Series = tuple[str, tuple[tuple[str, str], ...]]
CADENCES = [pytest.param((1000, 0.5, 8.0)), pytest.param((10000, gauges._REPEAT_S, 40.0), marks=pytest.mark.slow)]
"""How often Ray exports (ms), how often we set (s), and for how long that is watched (s): ten times as fast, and as it is."""


@pytest.fixture(params=CADENCES)
def cadence(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[float, float]]:
    """Seconds between two exports, and for how long to watch, on a local Ray that has begun."""
    import ray

    export_ms, repeat_s, seconds = request.param
    monkeypatch.setattr(gauges, "_REPEAT_S", repeat_s)
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        _system_config={"metrics_report_interval_ms": export_ms},
    )
    try:
        yield export_ms / 1000, seconds
    finally:
        ray.shutdown()


def exported() -> dict[Series, float]:
    """Returns our gauges as Prometheus reads them, without the labels that Ray adds."""
    import ray

    port = ray.nodes()[0]["MetricsExportPort"]
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=10).read().decode()
    found = {}
    for name, labels, value in re.findall(r"^ray_(cps_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        ours = [pair for pair in re.findall(r'(\w+)="(.*?)"', labels) if pair[0] in LABELS]
        found[name, tuple(sorted(ours))] = float(value)
    return found


LABELS = ("sweep", "run", "term", "kind", "network", "state")


def of_run(run: str, **labels: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"sweep": "s", "run": run, **labels}.items()))


def expected(run: str) -> dict[Series, float]:
    return {
        ("cps_val_miou", of_run(run)): 0.25,
        ("cps_step", of_run(run)): 4,
        ("cps_images", of_run(run)): 32,
        ("cps_loss", of_run(run, term="loss")): 1.5,
        ("cps_grad_norm", of_run(run, network="a")): 2.0,
        ("cps_images_per_s", of_run(run)): 8.0,
        ("cps_data_wait", of_run(run)): 0.125,
        ("cps_peak_bytes", of_run(run)): 1e6,
        ("cps_pseudo", of_run(run, kind="agreement")): 0.75,
    }


@pytest.mark.ray
def test_gauges_stay_until_they_are_closed(cadence: tuple[float, float], tiny: TrainConfig) -> None:
    export_s, seconds = cadence
    threads = threading.active_count()
    trials = {
        ("cps_trials", (("state", state), ("sweep", "s"))): n for state, n in (("complete", 2.0), ("failed", 0.0))
    }
    there = trials | {("cps_best_miou", (("sweep", "s"),)): 0.5}
    with closing(SweepGauges("s")) as sweep:
        sweep.set({"complete": 2, "failed": 0}, 0.5)
        for run in ("0000", "0001"):  # one after the other in one process
            with closing(TrainGauges(tiny, Path(run), 0, "s")) as train:
                train.write(METRICS)
                wait_for(there | expected(run))
                until = time.monotonic() + seconds / 2
                while time.monotonic() < until:
                    now = exported()
                    assert {key: now.get(key) for key in there | expected(run)} == there | expected(run)
                    time.sleep(export_s / 3)
    wait_for({})
    assert threading.active_count() == threads


def wait_for(series: dict[Series, float]) -> None:
    until = time.monotonic() + 60  # Ray keeps a value that is set no more for two exports of 10 s
    while (now := exported()) != series:
        assert time.monotonic() < until, now
        time.sleep(0.2)


def test_every_gauge_is_documented_with_its_labels() -> None:
    page = (Path(__file__).parents[2] / "docs/sweeps.md").read_text()
    rows = {
        name: set(re.findall(r"`(\w+)`", labels))
        for name, labels in re.findall(r"\| `ray_(cps_\w+)` .* \| (.*) \|", page)
    }
    assert rows == {
        **{name: {"sweep", "run", *labels} for name, (_, labels) in gauges._TRAINING.items()},
        **{name: {"sweep", *labels} for name, (_, labels) in gauges._SWEEP.items()},
    }
