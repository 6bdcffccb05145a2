"""Our own numbers among Ray's metrics: `ray_cps_*`, scraped by Prometheus, seen in Grafana."""

from pathlib import Path

from cps_ray.config.plugins import Sink
from cps_ray.config.train import TrainConfig


class TrainGauges(Sink):
    """Gauges of one training, set by rank 0 at each evaluation."""

    def __init__(self, config: TrainConfig, run_dir: Path, step: int, sweep: str = "") -> None:
        """`sweep`: its tag, beside that of the run."""
        from ray.util.metrics import Counter, Gauge

        data = config.data
        per_step = data.labeled_batch + (data.unlabeled_batch if config.semi_supervised else 0)
        self._images_per_evaluation = per_step * config.schedule.eval_every
        tags = {"sweep": sweep, "run": run_dir.name}
        keys = ("sweep", "run")
        self._miou = Gauge("cps_val_miou", "Validation mIoU, 0 to 1.", keys)
        self._step = Gauge("cps_step", "Optimizer steps done.", keys)
        self._loss = Gauge("cps_loss", "Mean of a loss term since the last evaluation.", (*keys, "term"))
        self._rate = Gauge("cps_images_per_s", "Training images per second, all workers.", keys)
        self._wait = Gauge("cps_data_wait", "Fraction of the time a worker waits for data, 0 to 1.", keys)
        self._pseudo = Gauge(
            "cps_pseudo", "Scores of the pseudo labels, 0 to 1: agreement, confidence, ...", (*keys, "kind")
        )
        self._images = Counter("cps_images_total", "Training images seen.", keys)
        self._norm = Gauge("cps_grad_norm", "Gradient norm before clipping.", (*keys, "network"))
        self._memory = Gauge("cps_peak_bytes", "Most memory that a worker has held.", keys)
        gauges = (self._miou, self._step, self._loss, self._rate, self._wait, self._pseudo, self._norm, self._memory)
        for metric in (*gauges, self._images):
            metric.set_default_tags(tags)  # `term`, `kind` and `network` come with each value

    def write(self, metrics: dict[str, float]) -> None:
        """Sets every gauge that there is for a metric."""
        self._miou.set(metrics["val/miou"])
        self._step.set(metrics["step"])
        self._rate.set(metrics["time/images_per_s"])
        self._wait.set(metrics["time/data_wait"])
        self._memory.set(metrics["memory/peak_bytes"])
        for name, value in metrics.items():
            kind, _, rest = name.partition("/")
            # Names of metrics are open (a method has its own terms), those of gauges are fixed: the rest becomes a tag.
            if kind == "pseudo" and "/" not in rest:
                self._pseudo.set(value, {"kind": rest})
            elif rest.startswith("grad_norm_"):
                self._norm.set(value, {"network": rest.removeprefix("grad_norm_")})
            elif kind == "train":
                self._loss.set(value, {"term": rest})
        self._images.inc(self._images_per_evaluation)


class SweepGauges:
    """Gauges of a sweep, set by the driver: trials by state, and the best value."""

    def __init__(self, sweep: str) -> None:
        from ray.util.metrics import Gauge

        self._trials = Gauge("cps_trials", "Trials of the sweep by state.", ("sweep", "state"))
        self._best = Gauge("cps_best_miou", "Best value of the objective so far.", ("sweep",))
        self._trials.set_default_tags({"sweep": sweep})
        self._best.set_default_tags({"sweep": sweep})

    def set(self, counts: dict[str, int], best: float | None) -> None:
        """Takes the number of trials by state, and the best value if there is one."""
        for state, count in counts.items():
            self._trials.set(count, {"state": state})
        if best is not None:
            self._best.set(best)
