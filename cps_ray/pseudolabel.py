"""`python -m cps_ray.pseudolabel MODEL SHARDS OUT`: a model's confident labels as masks of a new data set to train on.

    python -m cps_ray.pseudolabel runs/mine/best data/mine/shards data/mine/pseudo --threshold 0.9
    python -m cps_ray.pseudolabel runs/mine/best data/mine/shards data/mine/pseudo --threshold 0.95 --threshold-class person=0.7
    python -m cps_ray.pseudolabel runs/mine/best data/mine/shards data/mine/pseudo --keep 0.5

OUT holds the images of SHARDS. Training images that are labelled keep their mask; of the others, the pixels of which the model is certain get its
class, and all others count nowhere. Other splits stay as they are: no pseudo label is ever evaluated on. Train on it with `data.labeled: 1.0`; the
labelled subset `true-masks` in OUT names the images whose masks people made. The certainty is a probability that the model gives, and no model is as
right as it is certain: look at OUT with `cps-ray inspect`.

Exit codes: 0 done; 2 wrong input; 130 interrupted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cps_ray.command import checked, command_parser, entry, image_bar, run_command, say
from cps_ray.errors import ConfigError, DataError
from cps_ray.text import did_you_mean, printable, shell_path

if TYPE_CHECKING:
    from cps_ray.model.pseudolabeling import KeptPixels

_THRESHOLD = 0.9


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("pseudolabel", __doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a model, such as runs/NAME/best")
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="prepared data set with the model's classes")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the shards")
    parser.add_argument(
        "--threshold",
        type=_probability,
        metavar="P",
        help=f"certainty from which on a pixel is kept (default {_THRESHOLD})",
    )
    parser.add_argument(
        "--threshold-class",
        type=_of_class,
        action="append",
        default=[],
        metavar="NAME=P",
        help="threshold of one class; may be given several times",
    )
    parser.add_argument(
        "--keep",
        type=_probability,
        metavar="FRACTION",
        help="instead of thresholds: keep this fraction of the pixels predicted as each class, the most certain ones (predicts twice)",
    )
    parser.add_argument(
        "--labeled",
        metavar="WHICH",
        help="training images that keep their mask: a count, a fraction, the name of a subset, or a list file (default: those of the "
        "model's training if SHARDS are its own, else all that have a mask)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of labelled images that --labeled draws (default 0)")
    parser.add_argument("--network", help="a, b, ... or ensemble (default: the one that the training measured)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the first GPU, if there is one)")
    parser.add_argument("--plugins", action="store_true", help="run code that the model names by import path")
    return parser


def _probability(text: str) -> float:
    return checked(float, text, lambda value: 0 < value <= 1, "a number above 0 and up to 1")


def _of_class(text: str) -> tuple[str, float]:
    name, equals, value = text.rpartition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"must be NAME=P, such as person=0.7, but got {text!r}.")
    return name, _probability(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes shards, and returns the exit code: 0, or that of the error it printed."""
    return run_command(_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    if args.keep is not None and (args.threshold is not None or args.threshold_class):
        raise ConfigError("--keep makes the thresholds; leave out --threshold and --threshold-class.")
    # Imported only now, because torch takes seconds, and --help needs none of it.
    import numpy as np
    from rich.console import Console

    from cps_ray.datasets.shards import open_shards
    from cps_ray.model import pseudolabeling
    from cps_ray.model.data import check_fit, check_new, labeled_rows_of
    from cps_ray.model.model import load_model

    check_new(args.out)
    console, shards = Console(), open_shards(args.shards)
    index = shards.index("train")
    model = load_model(args.model, device=args.device, network=args.network, plugins=args.plugins)
    check_fit(model, shards, args.shards)
    threshold = _THRESHOLD if args.threshold is None else args.threshold
    thresholds, rule = np.full(len(model.classes), threshold), f"certainty is at least {threshold:g}"
    for name, value in args.threshold_class:
        if name not in model.classes:
            raise ConfigError(
                f"--threshold-class {name}: must name a class of the model.{did_you_mean(name, model.classes)}"
            )
        thresholds[model.classes.index(name)] = value
        rule += f", of {name} {value:g}"
    labeled, words = labeled_rows_of(model, shards, index, args.labeled, args.seed)
    unlabeled = np.setdiff1d(np.arange(len(index)), labeled)
    say(
        console,
        f"{args.shards}: {len(labeled)} training images keep their mask ({words}), {len(unlabeled)} are predicted.",
    )
    if not len(unlabeled):
        raise DataError(
            f"{args.shards}: there must be unlabelled training images, but all are labelled. Which are? --labeled WHICH."
        )
    with image_bar("predicting") as progress:
        task = progress.add_task("", total=len(unlabeled) * (1 if args.keep is None else 2))

        def advance(images: int) -> None:
            progress.advance(task, images)

        if args.keep is not None:
            thresholds = pseudolabeling.keeping_thresholds(model, index, unlabeled, args.keep, advance)
            by_class = ", ".join(f"{name} {value:g}" for name, value in zip(model.classes, thresholds, strict=True))
            rule = f"a pixel is among the most certain {100 * args.keep:g} % of its class: {by_class}"
        manifest, kept = pseudolabeling.write_pseudo_labels(
            args.out, model, shards, labeled, thresholds, rule=rule, on_images=advance
        )
    _print_table(console, model.classes, thresholds, kept)
    masks = manifest.splits["train"].masks - len(labeled)
    if kept.checked.any():
        say(console, "Right: of the kept pixels whose true class is known from masks that nothing here learns from.")
    say(
        console,
        f"{shell_path(args.out)}: {len(labeled)} true and {masks} pseudo-labelled training masks, {len(unlabeled) - masks} images without.",
        f"Look: cps-ray inspect {shell_path(args.out)}",
        f"Train: cps-ray train {shell_path(args.model / 'config.yaml')} --set method=supervised --set data.labeled=1.0 "
        f"--set data.labeled_list=null --set data.unlabeled_list=null --set data.unlabeled=null --set data.folds=null "
        f"--set data.synthetic=null --set data.fingerprint=null "
        f"--set data.shards={shell_path(args.out)} --output NEW",
    )
    return 0


def _print_table(console: Any, classes: Sequence[str], thresholds: Any, kept: "KeptPixels") -> None:
    from rich.table import Table
    from rich.text import Text

    from cps_ray.model.pseudolabeling import percentage

    table = Table(box=None)
    table.add_column("class")
    for name in ("threshold", "predicted px", "kept", *(["right"] if kept.checked.any() else [])):
        table.add_column(name, justify="right")
    rows = zip(classes, kept.predicted, kept.kept, kept.checked, kept.right, strict=True)
    for (name, predicted, some, checked_px, right), threshold in zip(rows, thresholds, strict=True):
        accuracy = [percentage(right, checked_px)] if kept.checked.any() else []
        table.add_row(Text(printable(name)), f"{threshold:.3f}", str(predicted), percentage(some, predicted), *accuracy)
    table.add_section()
    totals = [percentage(kept.right.sum(), kept.checked.sum())] if kept.checked.any() else []
    table.add_row("all", "", str(kept.predicted.sum()), percentage(kept.kept.sum(), kept.predicted.sum()), *totals)
    console.print(table)


if __name__ == "__main__":
    entry(main)
