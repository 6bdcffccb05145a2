"""`python -m cps_ray.evaluate MODEL SHARDS`: how well a model predicts images whose masks are known.

    python -m cps_ray.evaluate runs/quickstart/best runs/quickstart/shards --split test
    python -m cps_ray.evaluate runs/camvid/best --images photos --masks masks
    python -m cps_ray.evaluate runs/mine/best data/mine/shards --against runs/old/best --group-by '^(seq\\d+)'

Prints scores per class, and writes scores.json, images.csv, a picture of the confusion matrix and the worst images. With `--against` the
difference of two models has an interval, by leaving out images one by one; frames of one video are then to be left out together: `--group-by`.

Exit codes: 0 done; 2 wrong input; 130 interrupted.
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cps_ray.command import checked, command_parser, entry, run_command, say
from cps_ray.errors import ConfigError, DataError
from cps_ray.text import display_path, printable

if TYPE_CHECKING:
    from cps_ray.engine.batch import EvalBatch
    from cps_ray.model.evaluating import ModelScores
    from cps_ray.model.model import Model


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("evaluate", __doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a model, such as runs/NAME/best")
    parser.add_argument(
        "shards", type=Path, nargs="?", metavar="SHARDS", help="prepared data set with the model's classes"
    )
    parser.add_argument("--split", default="test", help="split of SHARDS (default test)")
    parser.add_argument("--images", help="folder, pattern or list of image files, instead of SHARDS")
    parser.add_argument(
        "--masks",
        help="their masks, of the same names: PNG with positions of classes, as predict writes",
    )
    parser.add_argument("--network", help="a, b, ... or ensemble (default: the one that the training measured)")
    parser.add_argument("--against", type=Path, metavar="OTHER", help="another model, on the same images")
    parser.add_argument("--against-network", metavar="NETWORK", help="the other model's network")
    parser.add_argument(
        "--group-by",
        type=_pattern,
        metavar="REGEX",
        help="images whose ids agree in its first group, or in all it matches, are left out together",
    )
    parser.add_argument(
        "--worst", type=_count, default=8, metavar="N", help="number of worst images in the picture (default 8)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="default: MODEL-SPLIT beside the model, such as runs/NAME/best-test",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the first GPU, if there is one)")
    parser.add_argument("--plugins", action="store_true", help="run code that the model names by import path")
    return parser


def _count(text: str) -> int:
    return checked(int, text, lambda count: count >= 0, "a whole number of at least 0")


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as err:
        raise argparse.ArgumentTypeError(f"must be a regular expression, but {text!r} is none: {err}.") from err


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates, and returns the exit code: 0, or that of the error it printed."""
    return run_command(_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    of_files = args.images is not None and args.masks is not None
    if (args.shards is None) != of_files or (args.images is None) != (args.masks is None):
        raise ConfigError("either SHARDS, or both --images and --masks must be given.")
    for flag, given in (("--against-network", args.against_network), ("--group-by", args.group_by)):
        if given and args.against is None:
            raise ConfigError(f"{flag} needs --against MODEL.")
    # Imported only now, because torch takes seconds, and --help needs none of it.
    from rich.console import Console

    from cps_ray.model.evaluating import evaluate_model
    from cps_ray.model.model import load_model

    model = load_model(args.model, device=args.device, network=args.network, plugins=args.plugins)
    other = None
    if args.against is not None:
        other = load_model(args.against, device=args.device, network=args.against_network, plugins=args.plugins)
        if other.classes != model.classes:
            raise ConfigError(
                f"{args.against}: must have the classes of {args.model}, but has {', '.join(other.classes)}."
            )
    output = args.output or _default_output(args)
    images = _Images(args, output)
    _groups(args.group_by, images.ids)  # before hours of predictions, and so is the folder
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise DataError(
            f"{output}: cannot be made ({err.strerror or err}). Name another folder with --output."
        ) from err
    scores = evaluate_model(model, images.of(model), args.worst)
    theirs = None if other is None else evaluate_model(other, images.of(other))
    result = _result(args, scores, theirs)
    _write(output, result, scores, theirs, model)
    console = Console()
    _print_table(console, result)
    for each in (model, other):
        say(console, *(images.warnings(each) if each is not None else []))
    files = ", ".join(["scores.json", "images.csv", "confusion.png", *(["worst.png"] if scores.worst else [])])
    say(console, f"{len(scores.ids)} image(s): {display_path(output)}: {files}")
    return 0


def _default_output(args: argparse.Namespace) -> Path:
    """Returns MODEL-SPLIT, or MODEL and the name of the masks' folder, beside the model."""
    model, name = args.model.absolute(), args.split
    if args.masks is not None:
        masks = Path(args.masks)
        name = (masks.absolute().parent if {*"*?["} & {*masks.name} else masks).name
    return Path(model.with_name(f"{model.name}-{name}"))


def _result(args: argparse.Namespace, scores: "ModelScores", theirs: "ModelScores | None") -> dict[str, Any]:
    """Returns what scores.json holds."""
    import numpy as np
    import torch

    from cps_ray.engine.metrics import mean_iou
    from cps_ray.model.intervals import difference

    result: dict[str, Any] = {
        "model": str(args.model),
        "network": scores.network,
        "data": str(args.shards or args.images),
        "split": args.split if args.shards else None,
        "images": len(scores.ids),
        **scores.metrics(),
        "confusion": scores.matrix.tolist(),
        "networks": {name: mean_iou(torch.from_numpy(matrix)) for name, matrix in scores.others.items()},
    }
    if theirs is not None:
        if theirs.ids != scores.ids:
            raise DataError(f"{args.against}: both models must see the same images in the same order, but do not.")
        counts = [np.stack(scores.counts)], [np.stack(theirs.counts)]
        found = difference(*counts, scores.classes, _groups(args.group_by, scores.ids))
        result["against"] = {
            "model": str(args.against),
            "network": theirs.network,
            **theirs.metrics(),
            "difference": asdict(found),
        }
    return result


def _write(
    output: Path, result: dict[str, Any], scores: "ModelScores", theirs: "ModelScores | None", model: "Model"
) -> None:
    from cps_ray.files import write_json
    from cps_ray.model.examples import confusion_picture, write_examples

    write_json(output / "scores.json", result)
    _write_images(output / "images.csv", scores, theirs)
    confusion_picture(scores.matrix, model.classes).save(output / "confusion.png")
    (output / "worst.png").unlink(missing_ok=True)  # of an earlier call
    if scores.worst:
        notes = [f"mIoU {100 * value:.1f} %" for value, _ in scores.worst]
        title = "all networks" if model.network == "ensemble" else f"network {model.network}"
        write_examples(output / "worst.png", {title: [example for _, example in scores.worst]}, model.palette, notes)


class _Images:
    """The images to evaluate on, which each model reads in its own way."""

    def __init__(self, args: argparse.Namespace, output: Path) -> None:
        from cps_ray.datasets.shards import open_shards
        from cps_ray.model.evaluating import pair_files
        from cps_ray.model.photos import find_photos

        self._args = args
        self._shards = None if args.shards is None else open_shards(args.shards)
        self._notes: list[str] = []
        if self._shards is not None:
            index = self._shards.index(args.split)
            self.ids = [index.ids[row] for row in index.labeled.nonzero()[0]]
            if not self.ids:
                raise DataError(
                    f"{args.shards}: split {args.split!r} must have masks to be evaluated on, but has none."
                )
            if args.split == "train":  # where alone masks may be a model's
                self._notes = [note for note in self._shards.manifest.notes if note.startswith("pseudo labels")]
            return
        images, masks = (
            {photo.name: Path(photo.path) for photo in find_photos([given], output)}
            for given in (args.images, args.masks)
        )
        self._pairs = pair_files(images, masks)
        self.ids = [name for name, *_ in self._pairs]
        if len(images) > len(masks):
            self._notes = [f"{len(images) - len(masks)} of {len(images)} images have no mask and were left out."]

    def of(self, model: "Model") -> Iterable["EvalBatch"]:
        """Returns the images with their masks. Raises DataError for shards that do not fit the model."""
        from cps_ray.datasets.loader import eval_batches
        from cps_ray.model.data import check_fit
        from cps_ray.model.evaluating import file_batches

        if self._shards is None:
            return file_batches(model, self._pairs)
        check_fit(model, self._shards, self._args.shards)
        return eval_batches(self._shards, self._args.split)

    def warnings(self, model: "Model") -> list[str]:
        """Returns what makes the scores of this model better than they are, or what else one must know of them."""
        from cps_ray.model.data import trained_splits

        own = self._shards and self._shards.manifest.splits[self._args.split].fingerprint
        reasons = {
            "val": "had its checkpoint, and in a sweep its settings, chosen by these very images",
            **dict.fromkeys(trained_splits(model), "was trained on these very images"),
        }
        known = model.description.fingerprint or {}
        return self._notes + [
            f"{model.folder} {reason}: on new ones it is worse."
            for split, reason in reasons.items()
            if own is not None and known.get(split) == own
        ]


def _groups(pattern: re.Pattern[str] | None, ids: Sequence[str]) -> list[str] | None:
    if pattern is None:
        return None
    matches = [pattern.search(image_id) for image_id in ids]
    if not any(matches):
        raise ConfigError(
            f"--group-by {pattern.pattern!r} must match ids, but matches none; they look like {ids[0]!r}."
        )
    named = [match and match[match.re.groups and 1] for match in matches]
    # An image that the pattern does not match is a group of its own.
    return [f"={image_id}" if name is None else f"~{name}" for image_id, name in zip(ids, named, strict=True)]


def _write_images(path: Path, scores: "ModelScores", theirs: "ModelScores | None") -> None:
    import pyarrow as pa
    from pyarrow import csv

    from cps_ray.files import write_whole
    from cps_ray.model.intervals import image_ious

    def columns(each: "ModelScores", suffix: str) -> dict[str, list[float | None]]:
        values = [float(image_ious(counts)) for counts in each.counts]
        hits = [float(counts[0].sum() / total) if (total := counts[1].sum()) else None for counts in each.counts]
        return {
            f"miou{suffix}": [None if value != value else value for value in values],
            f"pixel_accuracy{suffix}": hits,
        }

    table = {"id": scores.ids, **columns(scores, ""), **(columns(theirs, "_other") if theirs else {})}
    write_whole(path, lambda temporary: csv.write_csv(pa.table(table), temporary))


def _print_table(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from cps_ray.model.intervals import Difference, in_words

    theirs = result.get("against")
    table = Table(box=None)
    table.add_column("class")
    for name in ("IoU", *(["other"] if theirs else []), "recall", "precision", "of all pixels"):
        table.add_column(f"{name} %", justify="right")
    for name, row in result["classes"].items():
        own = [_percent(row["iou"]), *([_percent(theirs["classes"][name]["iou"])] if theirs else [])]
        table.add_row(Text(printable(name)), *own, *(_percent(row[key]) for key in ("recall", "precision", "fraction")))
    table.add_section()
    means = [result["miou"], *([theirs["miou"]] if theirs else []), result["class_accuracy"]]
    table.add_row("mean", *map(_percent, means))
    console.print(table)
    say(
        console,
        f"Network {result['network']}: mIoU {_percent(result['miou'])} %, pixels right {_percent(result['pixel_accuracy'])} %, "
        f"calibration error {_percent(result['ece'])} %",
        *(f"mIoU of network {name} alone: {_percent(value)} %" for name, value in result["networks"].items()),
    )
    if theirs:
        names = (f"{each['model']} ({each['network']})" for each in (result, theirs))
        say(console, f"{' against '.join(names)}: {in_words(Difference(**theirs['difference']))}")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


if __name__ == "__main__":
    entry(main)
