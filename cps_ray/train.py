"""`python -m cps_ray.train FILE`: runs one training on Ray Train, such as the best.yaml of a sweep.

    python -m cps_ray.train runs/quickstart/best.yaml
    python -m cps_ray.train runs/camvid/best.yaml --set seed=7 --output runs/camvid-seed7 --workers 2
    python -m cps_ray.train runs/camvid-seed7/config.yaml --output runs/camvid-seed7 --resume
    python -m cps_ray.train reference/voc --set data.shards=data/voc/shards --dry-run

If there is no such file, FILE is the name of a preset (docs/presets.md); its paths are relative to the working directory.

When it ends, the run folder also has best/, the model: docs/models.md.

Exit codes: 0 done; 1 the training failed, or a bug, a full disk and the like; 2 wrong input; 5 can never be scheduled; 130/143 interrupted, resumable.
"""

import argparse
import math
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cps_ray.command import add_cluster_flags, command_parser, entry, run_command
from cps_ray.config.reader import load_train, read_train
from cps_ray.config.schema import Where
from cps_ray.config.train import CpsConfig, MixConfig, TrainConfig, UniMatchConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.errors import ConfigError, CpsRayError, DivergedError
from cps_ray.text import first_few, printable, shell_path

if TYPE_CHECKING:
    from cps_ray.datasets.subsets import LabeledSubset

_FINGERPRINT = "data.fingerprint"


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and returns the exit code: 0, or that of the error it printed."""
    return run_command(_parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("train", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="a training, or the name of a preset")
    parser.add_argument("--workers", type=int, help="Ray Train workers; the global batch is divided over them")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting, as in optim.lr=0.01"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="run folder; default: train-STEM beside FILE, or runs/NAME here for a preset, such as runs/reference-voc",
    )
    parser.add_argument("--resume", action="store_true", help="continue the training in an existing run folder")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, show the plan, start and write nothing"
    )
    add_cluster_flags(parser)
    return parser


def _run(args: argparse.Namespace) -> int:
    workers = {} if args.workers is None else {"resources.workers": args.workers}
    config, where = read_train(args.file, args.set, workers)
    folder = (args.output or _default_folder(args.file)).absolute()
    begun = _check_folder(folder, config, args.resume)
    hashes_in = args.file.parent
    unchecked = any(text.startswith(f"{_FINGERPRINT}=") for text in args.set)
    if begun and begun.data.fingerprint and not unchecked:
        config, hashes_in = _with_fingerprint(config, begun.data.fingerprint), folder
    if args.dry_run:
        _print_plan(config, where, args.output or _default_folder(args.file), hashes_in)
        return 0
    # Imported only now, because torch and Ray take seconds, and --help and a wrong file need neither.
    from cps_ray.datasets.loader import check_data, evaluated_sizes
    from cps_ray.datasets.open import fingerprints, open_data, write_image_hashes
    from cps_ray.engine.preflight import Preflight, check_training
    from cps_ray.on_ray.cluster import awaited, connected, nodes, trainings_at_once
    from cps_ray.on_ray.export import export_best
    from cps_ray.on_ray.leaving import head_watched, leave_in_time
    from cps_ray.on_ray.trainer import DEFAULT_METRIC
    from cps_ray.runs import CONFIG_FILE

    shards = open_data(config.data, hashes_in=hashes_in, setting=_FINGERPRINT)
    check_data(shards, config, evaluated=("val",))
    check_training(Preflight(len(shards.classes), evaluated_sizes(shards, config)), config, where)
    folder.mkdir(parents=True, exist_ok=True)
    config = _with_fingerprint(config, fingerprints(shards))
    write_image_hashes(folder, shards)
    source = args.file.name if args.file.exists() else f"the preset {args.file}"
    (folder / CONFIG_FILE).write_text(dump_yaml(config.dump(str(folder)), f"Made from {source}."))
    signals: list[int] = []

    def say_how_to_resume(what: str = "interrupted") -> None:
        print(printable(f"{what}. Resume: {_resume_command(folder)}"), flush=True)

    def interrupt(number: int, _: Any) -> None:
        if not signals:
            leave_in_time(128 + number, say_how_to_resume)
        signals.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        with (
            connected(args.address, f"train {folder.name}") as cluster,
            head_watched(lambda what: say_how_to_resume(f"error: {what}")),
        ):
            awaited(
                lambda: trainings_at_once(config.resources, 1, nodes(), streams=config.semi_supervised),
                cluster,
                args.wait,
                lambda text: print(printable(text), flush=True),
            )
            print(*map(printable, (*cluster.banner(), f"Run folder: {folder}")), sep="\n", flush=True)
            _fit(config, folder)
            model = export_best(folder, config, folder, DEFAULT_METRIC, "a", shards)
            if model is not None:
                print(printable(f"Model: {shell_path(model)}"))
    except KeyboardInterrupt:
        say_how_to_resume()
        return 128 + signals[0]
    return 0


def _default_folder(file: Path) -> Path:
    """Returns the run folder of a training without `--output`."""
    return file.parent / f"train-{file.stem}" if file.exists() else Path("runs", "-".join(file.parts))


def _check_folder(folder: Path, config: TrainConfig, resume: bool) -> TrainConfig | None:
    """Returns the training that the folder holds, if it does. Raises ConfigError for any without `resume`, for one with other settings
    with it."""
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not resume:
        raise ConfigError(
            f"{folder}: already holds a training. Continue it: {_resume_command(folder)}. Start again: --output another folder."
        )
    from cps_ray.datasets.open import HASHES_FILE
    from cps_ray.runs import CONFIG_FILE

    config_file = folder / CONFIG_FILE
    if not config_file.exists():
        others = sorted(path.name for path in folder.iterdir() if path.name != HASHES_FILE and path.name[0] != ".")
        if others:  # a sweep's folder, say, whose best/ would be replaced
            raise ConfigError(
                f"{folder}: must hold a training to be continued, with a {CONFIG_FILE}, but holds {first_few(others)}. "
                "Name its run folder, or a new one, with --output."
            )
        return None  # it was ended before its first line
    begun = load_train(config_file)
    free = {"resources": config.resources, "sinks": config.sinks}
    # Whether the data are the same is compared with the data.
    if _with_fingerprint(begun.model_copy(update=free), config.data.fingerprint) != config:
        raise ConfigError(
            f"{folder}: was begun with other settings; only resources and sinks may change. Continue it: {_resume_command(folder)}"
        )
    return begun


def _with_fingerprint(config: TrainConfig, fingerprint: dict[str, str] | None) -> TrainConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"fingerprint": fingerprint})})


def _print_plan(config: TrainConfig, where: Where, folder: Path, hashes_in: Path) -> None:
    """Checks what can be checked without a cluster and without hub weights, and prints what the training would do."""
    from cps_ray.engine.preflight import Preflight, check_training

    images, subset, num_classes, sizes = _images(config, hashes_in)
    check_training(Preflight(num_classes, sizes), config, where)
    resources = config.resources
    per_worker = f"each {resources.cpus_per_worker:g} CPUs, {resources.gpus_per_worker:g} GPUs"
    rows = [
        ("run folder", str(folder)),
        ("method", _method(config)),
        *_networks(config, num_classes),
        ("images", images),
        *_steps_and_batches(config, subset),
        ("workers", f"{resources.workers}, {per_worker}"),
        ("speed", "images per second are known once it runs"),
    ]
    for name, text in rows:
        print(f"{name:<12}{printable(text)}")


def _images(config: TrainConfig, hashes_in: Path) -> tuple[str, "LabeledSubset | None", int, list[tuple[int, int]]]:
    """Returns the numbers of images in words, the labelled subset (None: the data are still to be drawn), the number of classes, and
    the sizes of evaluated images. `hashes_in`: as `open_data` takes it."""
    from cps_ray.datasets.loader import check_data, evaluated_images, evaluated_sizes, train_data
    from cps_ray.datasets.open import open_data
    from cps_ray.datasets.synthetic import CLASSES

    synthetic, folds = config.data.synthetic, config.data.folds
    if synthetic is not None and not config.data.shards.exists():
        validated = f"and {synthetic.val} to validate" if folds is None else f"in {folds.count} folds"
        images = f"{synthetic.train} to train on {validated}, drawn on first use"
        return images, None, len(CLASSES), [(synthetic.height_px, synthetic.width_px)]
    shards = open_data(config.data, hashes_in=hashes_in, setting=_FINGERPRINT)
    check_data(shards, config, evaluated=("val",))
    subset = train_data(shards, config).subset
    num_val = len(evaluated_images(shards, config, "val"))
    fold = f" (fold {folds.held_out} of 0 to {folds.count - 1})" if folds and folds.held_out is not None else ""
    images = f"{len(subset.labeled)} labelled, {len(subset.unlabeled)} unlabelled, {num_val} to validate{fold}"
    return images, subset, len(shards.classes), evaluated_sizes(shards, config)


def _method(config: TrainConfig) -> str:
    settings = config.settings
    if settings is None:
        return config.method
    start = f" from step {math.ceil(settings.start * config.schedule.steps)} on" if settings.start else ""
    ramp = f" after a ramp over {settings.ramp:.0%} of the steps" if settings.ramp else ""
    mix = f", mix {settings.mix}" if isinstance(settings, MixConfig) else ""
    images = f" on {settings.images} images" if isinstance(settings, CpsConfig) else ""
    version = f" {settings.version}" if isinstance(settings, UniMatchConfig) else ""
    return f"{config.method}{version}, weight {settings.weight:g}{start}{ramp}{images}{mix}"


def _networks(config: TrainConfig, num_classes: int) -> Iterator[tuple[str, str]]:
    """Yields each network's name with its form and size, what a file filled, and what its images are normalised by."""
    from cps_ray.engine.networks import build_networks
    from cps_ray.engine.normalisation import planned_normalisation

    # Built to count parameters, without hub weights, so that a dry run downloads nothing.
    b = config.model.b
    no_weights = {"weights": "none"}
    model = config.model.model_copy(update={**no_weights, "b": b and b.model_copy(update=no_weights)})
    networks = build_networks(config.model_copy(update={"model": model}), num_classes)
    for number, (name, network) in enumerate(networks.items()):
        form = config.model.of(number)
        weights = form.weights_file.name if form.weights_file else form.weights
        millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        yield f"network {name}", f"{form.architecture}, {form.encoder}, weights {weights}: {millions:.1f} M parameters"
        if network.filled:
            yield "weights", network.filled
        yield "normalised", planned_normalisation(form)


def _steps_and_batches(config: TrainConfig, subset: "LabeledSubset | None") -> Iterator[tuple[str, str]]:
    """Yields steps, passes over the images if their number is known, and batches."""
    data, steps, every = config.data, config.schedule.steps, config.schedule.eval_every
    yield "steps", f"{steps}, with {steps // every} evaluations, one every {every}"
    sizes = {"labelled": data.labeled_batch}
    if config.semi_supervised:
        sizes["unlabelled"] = data.unlabeled_batch
    if subset is not None:
        counts = {"labelled": len(subset.labeled), "unlabelled": len(subset.unlabeled)}
        passes = (f"{steps * size / counts[kind]:.1f} over the {kind} images" for kind, size in sizes.items())
        yield "passes", ", ".join(passes)
    batch, per_worker = (
        " + ".join(str(size // divisor) for size in sizes.values()) for divisor in (1, config.num_batch_shards)
    )
    micro = f" in {config.compute.accumulate} micro-batches" if config.compute.accumulate > 1 else ""
    height, width = data.crop_px
    yield "batch", f"{batch} crops of {height}x{width} px ({' + '.join(sizes)}), {per_worker} per worker{micro}"


def _resume_command(folder: Path) -> str:
    config, output = (shlex.quote(str(path)) for path in (folder / "config.yaml", folder))
    return f"python -m cps_ray.train {config} --output {output} --resume"


def _fit(config: TrainConfig, folder: Path) -> None:
    """Runs the training and prints its evaluations as they come. Raises CpsRayError if it fails, DivergedError if it diverges."""
    from cps_ray.engine.encoders import weights_of_networks
    from cps_ray.on_ray.failures import reason
    from cps_ray.on_ray.trainer import DEFAULT_METRIC, make_trainer
    from cps_ray.runs import best_checkpoint

    outcome: dict[str, Any] = {}

    # In a thread: `fit` blocks, while the main thread receives Ctrl-C and prints.
    def fit() -> None:
        try:
            outcome["value"] = make_trainer(config, folder, sweep="train").fit().return_value
        except BaseException as err:
            outcome["error"] = err  # raised below, in the main thread

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    printed_step = 0
    while thread.is_alive():
        thread.join(0.5)
        printed_step = _print_evaluations(config, folder, after=printed_step)
    error = outcome.get("error")
    if error is not None:
        raise CpsRayError(f"{folder}: the training failed: {reason(error)}. More in {folder}/log.txt") from error
    if outcome.get("value"):
        raise DivergedError(f"{folder}: {outcome['value']['diverged']}")
    best = best_checkpoint(folder, DEFAULT_METRIC)
    if best is not None:
        checkpoint, meta = best
        print(printable(f"best val/miou {meta['metrics']['val/miou']:.4f} at step {meta['step']}: {checkpoint}"))
    print(*(each.sentence() for each in weights_of_networks(config)), sep="\n")


def _print_evaluations(config: TrainConfig, folder: Path, after: int) -> int:
    """Prints the evaluations on record after step `after`; returns the last one's step."""
    from cps_ray.runs import read_metrics

    last = after
    for metrics in read_metrics(folder):
        if metrics["step"] > last:
            last = metrics["step"]
            print(
                f"step {last}/{config.schedule.steps}  val/miou {metrics['val/miou']:.4f}  "
                f"train/loss {metrics['train/loss']:.4f}  {metrics['time/images_per_s']:.1f} images/s",
                flush=True,
            )
    return last


if __name__ == "__main__":
    entry(main)
