"""Our own numbers among Ray's metrics: `ray_cps_*`, scraped by Prometheus, seen in Grafana. docs/sweeps.md lists them."""

import threading
from pathlib import Path

from cps_ray.config.plugins import Sink
from cps_ray.config.train import TrainConfig

_REPEAT_S = 5.0
"""Ray exports a gauge only where it was set since the last export, 10 s before."""

_Gauges = dict[str, tuple[str, tuple[str, ...]]]
"""Name -> meaning, and labels beside those of the training or the sweep."""
_TRAINING: _Gauges = {
    "cps_val_miou": ("Validation mIoU, 0 to 1.", ()),
    "cps_step": ("Optimizer steps done.", ()),
    "cps_images": ("Training images seen, all workers, from step 0.", ()),
    "cps_loss": ("Mean of a loss term since the last evaluation.", ("term",)),
    "cps_images_per_s": ("Training images per second, all workers.", ()),
    "cps_data_wait": ("Fraction of the time a worker waits for data, 0 to 1.", ()),
    "cps_pseudo": ("Scores of the pseudo labels, 0 to 1: agreement, confidence, ...", ("kind",)),
    "cps_grad_norm": ("Gradient norm before clipping.", ("network",)),
    "cps_peak_bytes": ("Most memory that a worker has held.", ()),
}
_SWEEP: _Gauges = {
    "cps_trials": ("Trials of the sweep by state.", ("state",)),
    "cps_best_miou": ("Best value of the objective so far.", ()),
}


class _LastingGauges:
    """Gauges that stay from when they are set until `close`: a thread sets them again and again."""

    def __init__(self, gauges: _Gauges, tags: dict[str, str]) -> None:
        from ray.util.metrics import Gauge

        self._gauges = {
            name: Gauge(name, meaning, (*tags, *labels)).set_default_tags(tags)
            for name, (meaning, labels) in gauges.items()
        }
        self._values: dict[tuple[str, str], tuple[float, dict[str, str]]] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="gauges", daemon=True)
        self._thread.start()

    def set(self, name: str, value: float, **labels: str) -> None:
        self._values[name, str(labels)] = (value, labels)
        self._gauges[name].set(value, labels)

    def close(self) -> None:
        """Ends the thread; Ray then exports the gauges for some seconds more."""
        self._closed.set()
        self._thread.join()

    def _repeat(self) -> None:
        while not self._closed.wait(_REPEAT_S):
            for (name, _), (value, labels) in list(self._values.items()):
                self._gauges[name].set(value, labels)


class TrainGauges(Sink):
    """Gauges of one training, set by rank 0 at each evaluation."""

    def __init__(self, config: TrainConfig, run_dir: Path, step: int, sweep: str = "") -> None:
        """`sweep`: its label, beside that of the run."""
        data = config.data
        self._images_per_step = data.labeled_batch + (data.unlabeled_batch if config.semi_supervised else 0)
        self._gauges = _LastingGauges(_TRAINING, {"sweep": sweep, "run": run_dir.name})

    def write(self, metrics: dict[str, float]) -> None:
        """Sets every gauge that there is for a metric."""
        gauge = self._gauges.set
        gauge("cps_val_miou", metrics["val/miou"])
        gauge("cps_step", metrics["step"])
        gauge("cps_images", metrics["step"] * self._images_per_step)
        gauge("cps_images_per_s", metrics["time/images_per_s"])
        gauge("cps_data_wait", metrics["time/data_wait"])
        gauge("cps_peak_bytes", metrics["memory/peak_bytes"])
        for name, value in metrics.items():
            kind, _, rest = name.partition("/")
            # Names of metrics are open (a method has its own terms), those of gauges are fixed: the rest becomes a label.
            if kind == "pseudo" and "/" not in rest:
                gauge("cps_pseudo", value, kind=rest)
            elif rest.startswith("grad_norm_"):
                gauge("cps_grad_norm", value, network=rest.removeprefix("grad_norm_"))
            elif kind == "train":
                gauge("cps_loss", value, term=rest)

    def close(self) -> None:
        """Lets the gauges go: a process may serve one training after the other."""
        self._gauges.close()


class SweepGauges:
    """Gauges of a sweep, set by the driver: trials by state, and the best value."""

    def __init__(self, sweep: str) -> None:
        self._gauges = _LastingGauges(_SWEEP, {"sweep": sweep})

    def set(self, counts: dict[str, int], best: float | None) -> None:
        """Takes the number of trials by state, and the best value if there is one."""
        for state, count in counts.items():
            self._gauges.set("cps_trials", count, state=state)
        if best is not None:
            self._gauges.set("cps_best_miou", best)

    def close(self) -> None:
        """Lets the gauges go."""
        self._gauges.close()
