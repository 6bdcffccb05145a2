"""`python -m cps_ray.train FILE`: one training on Ray Train, such as the best.yaml of a sweep.

    python -m cps_ray.train runs/quickstart/best.yaml
    python -m cps_ray.train runs/camvid/best.yaml --set seed=7 --output runs/camvid-seed7 --workers 2
    python -m cps_ray.train runs/camvid-seed7/config.yaml --output runs/camvid-seed7 --resume

Exit codes: 0 done; 1 the training failed; 2 wrong input; 5 can never be scheduled; 130/143 interrupted, resumable.
"""

import argparse
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cps_ray.command import entry, guarded
from cps_ray.config.reader import load_train
from cps_ray.config.train import TrainConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.errors import ConfigError, CpsRayError, DivergedError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cps_ray.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--workers", type=int, help="Ray Train workers; the global batch is split over them")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting, as in optim.lr=0.01"
    )
    parser.add_argument("--output", type=Path, help="run folder; default: train-STEM beside FILE")
    parser.add_argument("--resume", action="store_true", help="go on in an existing run folder")
    parser.add_argument("--address", help="join this Ray cluster instead of starting one")
    args = parser.parse_args(argv)
    return guarded(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    from cps_ray.datasets.loader import check_data
    from cps_ray.datasets.synthetic import open_data
    from cps_ray.engine.networks import check_model
    from cps_ray.on_ray.cluster import connected, nodes, trainings_at_once
    from cps_ray.on_ray.trainer import CONFIG_FILE

    workers = [] if args.workers is None else [f"resources.workers={args.workers}"]
    config = load_train(args.file, [*args.set, *workers])
    folder = (args.output or args.file.parent / f"train-{args.file.stem}").absolute()
    begun = folder / CONFIG_FILE
    if folder.exists() and any(folder.iterdir()) and not args.resume:
        raise ConfigError(
            f"{folder}: already holds a training. Go on: {_resume(folder)}. Start again: --output another folder."
        )
    if begun.exists() and load_train(begun).model_copy(update={"resources": config.resources}) != config:
        raise ConfigError(
            f"{folder}: was begun with other settings; only resources may change. Go on: {_resume(folder)}"
        )
    check_model(config.model)
    check_data(open_data(config.data), config, judged=("val",))
    folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(dump_yaml(config.dump(str(folder)), f"Made from {args.file.name}."))
    received: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        with connected(args.address) as cluster:
            trainings_at_once(config.resources, 1, nodes(), streams=config.method == "cps")
            print(*cluster.banner(), f"Run folder: {folder}", sep="\n", flush=True)
            _fit(config, folder)
    except KeyboardInterrupt:
        print(f"interrupted. Resume: {_resume(folder)}")
        return 128 + received[0]
    return 0


def _resume(folder: Path) -> str:
    return f"python -m cps_ray.train {folder}/config.yaml --output {folder} --resume"


def _fit(config: TrainConfig, folder: Path) -> None:
    """Runs the training in a thread, so that Ctrl-C and the progress lines stay ours."""
    from cps_ray.on_ray.trainer import Objective, best_checkpoint, make_trainer, reason

    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["value"] = make_trainer(config, folder, sweep="train").fit().return_value
        except BaseException as err:
            outcome["error"] = err

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    shown = 0
    while thread.is_alive():
        thread.join(0.5)
        shown = _show(config, folder, shown)
    error = outcome.get("error")
    if error is not None:
        raise CpsRayError(f"{folder}: the training failed: {reason(error)}. More in {folder}/log.txt") from error
    if outcome.get("value"):
        raise DivergedError(f"{folder}: {outcome['value']['diverged']}")
    found = best_checkpoint(folder, Objective())
    if found is not None:
        checkpoint, meta = found
        print(f"best val/miou {meta['metrics']['val/miou']:.4f} at step {meta['step']}: {checkpoint}")


def _show(config: TrainConfig, folder: Path, shown: int) -> int:
    """Prints evaluations after step `shown`; returns the last one's step."""
    from cps_ray.on_ray.worker import METRICS_FILE, read_metrics

    for metrics in read_metrics(folder / METRICS_FILE):
        if metrics["step"] > shown:
            shown = metrics["step"]
            print(
                f"step {shown}/{config.schedule.steps}  val/miou {metrics['val/miou']:.4f}  "
                f"train/loss {metrics['train/loss']:.4f}  {metrics['time/images_per_s']:.1f} images/s",
                flush=True,
            )
    return shown


if __name__ == "__main__":
    entry(main)
