"""`python -m cps_ray.predict`: labels of photos of any size, from a model that a training or a sweep has left.

Writes, for each photo, labels/NAME.png, whose values are the positions of the classes and whose palette is theirs, and overlays/NAME.jpg;
and, when all are done, index.csv, a row per photo. Exit codes: 0 all predicted, 1 some files could not be read (failed.csv), 2 wrong
input, 130 interrupted; the same command goes on.
"""

import argparse
import os
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from cps_ray.command import checked, command_parser, entry, image_bar, run_command, say
from cps_ray.errors import ConfigError, CpsRayError
from cps_ray.text import display_path

if TYPE_CHECKING:
    from cps_ray.model.model import Model
    from cps_ray.model.photos import Photo
    from cps_ray.model.predicting import OutputOptions, Record

EXAMPLES = """\
examples:
  python -m cps_ray.predict runs/mine/best photos predicted
  python -m cps_ray.predict runs/mine/best 'drive/**/*.png' more.txt predicted --certainty --no-overlays
  python -m cps_ray.predict runs/mine/best photos predicted --network ensemble --disagreement
  python -m cps_ray.predict runs/mine/best photos predicted --ray --address auto
The same command goes on where one was stopped."""


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("predict", __doc__, EXAMPLES)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the model, such as best/ of a sweep")
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="folders (with all below them), patterns in quotes, files, or lists (.txt) of one path a line, from the list's folder",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the predictions: new, or one to go on in")
    parser.add_argument("--no-overlays", dest="overlays", action="store_false", help="no photos with colours over them")
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="probabilities/NAME.npz: `probabilities`, float16 (height, width, classes), all in memory at once",
    )
    parser.add_argument(
        "--certainty", action="store_true", help="certainty/NAME.png: the label's probability, 0..1 as 0..255"
    )
    parser.add_argument(
        "--entropy", action="store_true", help="entropy/NAME.png: entropy by its largest value, 0..1 as 0..255"
    )
    parser.add_argument(
        "--disagreement",
        action="store_true",
        help="disagreement/NAME.png: 255 where networks a and b give other labels, else 0",
    )
    parser.add_argument(
        "--sure",
        type=lambda text: checked(float, text, lambda value: 0 < value <= 1, "a probability above 0, at most 1"),
        default=0.9,
        metavar="P",
        help="probability from which a pixel counts as sure in index.csv (default 0.9)",
    )
    parser.add_argument("--network", help="a, b, ..., or ensemble (default: the one that the training was measured by)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the first GPU, or the CPU without one)")
    parser.add_argument(
        "--plugins", action="store_true", help="run code outside cps_ray that the model names by import path"
    )
    parser.add_argument("--ray", action="store_true", help="spread the photos over a Ray cluster")
    parser.add_argument(
        "--address", help="with --ray: the cluster; it must see MODEL, IMAGES and OUT (default: this machine)"
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    # Imported only now and below, because --help needs none of it.
    from rich.console import Console

    from cps_ray.model.model import load_model
    from cps_ray.model.photos import find_photos
    from cps_ray.model.predicting import OutputOptions, check_options
    from cps_ray.model.prediction_folder import FAILED_FILE, PredictionFolder

    if args.address is not None and not args.ray:
        raise ConfigError("--address is of use with --ray only; add it.")
    photos = find_photos(args.images, args.out)
    # Where others predict, this process only checks.
    model = load_model(
        args.model, device="cpu" if args.ray else args.device, network=args.network, plugins=args.plugins
    )
    options = OutputOptions(**{name: getattr(args, name) for name in OutputOptions.__dataclass_fields__})
    check_options(model, options)
    folder = PredictionFolder(args.out, model, options)
    complete = folder.complete(photos)
    if complete:
        print(f"{len(complete)} of {len(photos)} images were done before.", file=sys.stderr)
    count, start = len(photos) - len(complete), time.perf_counter()
    predict = _on_a_cluster if args.ray else _here
    try:
        with image_bar("predicting") as progress, closing(predict(args, model, photos, complete, options)) as work:
            task = progress.add_task("", total=count)
            for records in work:
                folder.add(records)
                progress.advance(task, len(records))
    except KeyboardInterrupt:
        print("stopped; the same command continues from here.", file=sys.stderr)
        raise
    seconds = time.perf_counter() - start
    failed = folder.write_tables(photos)
    rate = f" ({count / seconds:.1f} images/s)" if count else ""
    say(Console(), f"{count} image(s) in {seconds:.1f} s{rate}: {display_path(args.out)}")
    if failed:
        listed = display_path(args.out / FAILED_FILE)
        raise CpsRayError(f"{failed} of {len(photos)} images could not be read; {listed} says why.")
    return 0


def _here(
    args: argparse.Namespace,
    model: "Model",
    photos: "list[Photo]",
    complete: "dict[str, Record]",
    options: "OutputOptions",
) -> "Generator[list[Record], None, None]":
    """Predicts in this process, on all its cores or a GPU."""
    import torch

    from cps_ray.engine.cpu.threads import tune_cpu
    from cps_ray.model.predicting import cut_work, predict_chunks

    threads = len(os.sched_getaffinity(0))
    if model.device.type == "cpu":
        tune_cpu(torch.get_num_threads())  # all cores, or as many as OMP_NUM_THREADS says
    chunks = cut_work(photos, complete, model.device.type, threads)
    yield from predict_chunks(model, chunks, args.out, options, threads)


def _on_a_cluster(
    args: argparse.Namespace,
    model: "Model",
    photos: "list[Photo]",
    complete: "dict[str, Record]",
    options: "OutputOptions",
) -> "Generator[list[Record], None, None]":
    """Predicts on the workers of a Ray cluster."""
    # Imported only now, because Ray takes seconds.
    from cps_ray.model.predicting import cut_work
    from cps_ray.on_ray.cluster import connected
    from cps_ray.on_ray.predict_images import WorkerModel, predict_on_cluster, workers_device

    with connected(args.address, "predict"):
        device = workers_device(args.device)
        chunks = cut_work(photos, complete, device, len(os.sched_getaffinity(0)))
        worker_model = WorkerModel(str(args.model.absolute()), device, model.network, args.plugins)
        yield from predict_on_cluster(worker_model, chunks, args.out.absolute(), options)


def main(argv: Sequence[str] | None = None) -> int:
    """Predicts, prints how long it took, and returns the exit code: 0, or that of the error it printed."""
    return run_command(_parser(), _run, argv)


if __name__ == "__main__":
    entry(main)
