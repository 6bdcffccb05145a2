"""Gauges at the metrics port: there at every reading until they are closed, then gone, with nothing left behind."""

import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import ClassVar

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


class FakeGauge:
    """What of Ray's gauges is used, with the times at which it was set."""

    set_at: ClassVar[list[tuple[str, dict[str, str], float]]] = []

    def __init__(self, name: str, meaning: str, keys: tuple[str, ...]) -> None:
        self._name, self._keys, self._tags = name, keys, dict[str, str]()

    def set_default_tags(self, tags: dict[str, str]) -> "FakeGauge":
        self._tags = tags
        return self

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert {*self._tags, *tags} == set(self._keys)
        self.set_at.append((self._name, tags, value))


def test_values_are_set_again_until_the_end_and_no_thread_is_left(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.util.metrics.Gauge", FakeGauge)
    monkeypatch.setattr(gauges, "_REPEAT_S", 0.01)
    threads, seen = threading.active_count(), FakeGauge.set_at
    with closing(SweepGauges("s")) as sweep, closing(TrainGauges(tiny, Path("0000"), 0, "s")) as train:
        sweep.set({"complete": 1, "failed": 0}, None)
        sweep.set({"complete": 2, "failed": 0}, 0.5)
        train.write(METRICS)
        seen.clear()
        time.sleep(0.3)
        assert threading.active_count() == threads + 2
    again = {(name, *labels.values(), value) for name, labels, value in seen}
    assert {name for name, *_ in again} == {*gauges._TRAINING, *gauges._SWEEP}
    assert {row for row in again if row[0] == "cps_trials"} == {
        ("cps_trials", "complete", 2),
        ("cps_trials", "failed", 0),
    }
    assert threading.active_count() == threads
    seen.clear()
    time.sleep(0.1)
    assert not seen


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


@pytest.fixture
def local_ray() -> Iterator[None]:
    import ray

    options = {"num_cpus": 1, "include_dashboard": False, "log_to_driver": False, "object_store_memory": 100 * 2**20}
    ray.init(address="local", **options)
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_gauges_stay_until_they_are_closed(tiny: TrainConfig, local_ray: None) -> None:
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
                until = time.monotonic() + 40
                while time.monotonic() < until:
                    now = exported()
                    assert {key: now.get(key) for key in there | expected(run)} == there | expected(run)
                    time.sleep(4)
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
