"""`python -m cps_ray.suggest MODEL SHARDS --output OUT`: which images to label next, with drafts of their masks to correct.

    python -m cps_ray.suggest runs/mine/best data/mine/shards --count 20 --output next-20
    python -m cps_ray.suggest runs/mine/best data/mine/shards --exclude next-20/suggested.txt --output another-10

Writes suggested.txt (ids, as `data.labeled_list` takes them), suggested.csv, sheet.png, and drafts/ with images, masks, coco.json and LabelMe's
files. Suggests images for which the model's networks disagree most, most of all on rare and badly learnt classes, and that differ from each
other: cps_ray/model/suggesting.py has the formula and its sources. No mask of an unlabelled image is read.

Exit codes: 0 done; 2 wrong input; 130 interrupted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cps_ray.command import checked, command_parser, entry, image_bar, run_command, say
from cps_ray.errors import DataError
from cps_ray.text import shell_path

if TYPE_CHECKING:
    from cps_ray.model.model import Model
    from cps_ray.model.suggesting import ImageScores

_LEAST_FRACTION = 0.001
"""Fraction of an image's pixels from which on a class is named in suggested.csv."""


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("suggest", __doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a model, such as runs/NAME/best")
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="prepared data set with the model's classes")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="new folder")
    parser.add_argument("--count", type=_count, default=10, metavar="N", help="number of images (default 10)")
    parser.add_argument("--split", default="train", help="split of SHARDS (default train)")
    parser.add_argument(
        "--labeled",
        metavar="WHICH",
        help="labelled images of train: a count, a fraction, the name of a subset, or a list file (default: those of the model's "
        "training if SHARDS are its own, else all that have a mask)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of labelled images that --labeled draws (default 0)")
    parser.add_argument("--exclude", type=Path, metavar="LIST", help="list file of images that are not to be suggested")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the first GPU, if there is one)")
    parser.add_argument("--plugins", action="store_true", help="run code that the model names by import path")
    return parser


def _count(text: str) -> int:
    return checked(int, text, lambda count: count >= 1, "a whole number of at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Suggests, and returns the exit code: 0, or that of the error it printed."""
    return run_command(_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    if args.labeled is not None and args.split != "train":
        raise DataError(f"--labeled names images of split train, but --split is {args.split}.")
    # Imported only now, because torch takes seconds, and --help needs none of it.
    import numpy as np
    from rich.console import Console

    from cps_ray.datasets.lists import listed_ids, write_list
    from cps_ray.datasets.shards import open_shards
    from cps_ray.files import read_json
    from cps_ray.model import suggesting
    from cps_ray.model.data import check_fit, check_new, labeled_rows_of, new_folder
    from cps_ray.model.drafting import write_drafts
    from cps_ray.model.model import load_model
    from cps_ray.model.writing import METRICS_FILE

    check_new(args.output)
    console, shards = Console(), open_shards(args.shards)
    index = shards.index(args.split)
    model = load_model(args.model, device=args.device, plugins=args.plugins)
    check_fit(model, shards, args.shards)
    if args.split == "train":
        labeled, words = labeled_rows_of(model, shards, index, args.labeled, args.seed)
    else:
        labeled, words = np.flatnonzero(index.labeled), "all that have a mask"
    excluded = {} if args.exclude is None else listed_ids(args.exclude, index.ids, f"split {args.split}")
    known = {*labeled.tolist()}
    candidates = np.array(
        [row for row, image_id in enumerate(index.ids) if row not in known and image_id not in excluded], np.int64
    )
    say(
        console,
        f"{args.shards}, split {args.split}: {len(index)} images, {len(labeled)} labelled ({words}), {len(candidates)} candidates.",
    )
    if not len(candidates):
        raise DataError(
            f"{args.shards}: there must be unlabelled images in split {args.split}, but there are none left."
            + (" Which are labelled? --labeled WHICH." if args.split == "train" and args.labeled is None else "")
        )
    ious = suggesting.validation_ious(read_json(args.model / METRICS_FILE), model.classes)
    weights = suggesting.class_weights(index.pixels[labeled].sum(0), ious)
    with image_bar("scoring") as progress:
        task = progress.add_task("", total=len(candidates))
        scores = suggesting.score_images(
            model, index, candidates, weights, lambda images: progress.advance(task, images)
        )
    chosen = suggesting.suggest(model, index, scores, labeled, args.count)
    with new_folder(args.output) as folder:
        write_list(folder / "suggested.txt", [index.ids[row] for row in scores.rows[chosen]])
        _write_scores(folder / "suggested.csv", index.ids, scores, chosen, model.classes)
        drafts = suggesting.drafts(model, index, scores.rows[chosen])
        write_drafts(folder / "drafts", drafts, model.classes, model.palette)
        _sheet(args, model, drafts).save(folder / "sheet.png")
    if len(chosen) < args.count:
        say(console, f"Only {len(chosen)} of {args.count}: all others look like one of these or like a labelled image.")
    _say_next(console, args.output, len(chosen))
    return 0


def _write_scores(path: Path, ids: Sequence[str], scores: "ImageScores", chosen: Any, classes: Sequence[str]) -> None:
    import pyarrow as pa
    from pyarrow import csv

    from cps_ray.files import write_whole

    brings = [
        ", ".join(
            f"{classes[label]} {100 * fraction[label]:.1f} %"
            for label in fraction.argsort()[::-1]
            if fraction[label] >= _LEAST_FRACTION
        )
        for fraction in scores.fraction[chosen]
    ]
    differing = None if scores.disagreement is None else scores.disagreement[chosen]
    table = {
        "id": [ids[row] for row in scores.rows[chosen]],
        "score": scores.score[chosen],
        "disagreement": pa.nulls(len(chosen), pa.float64()) if differing is None else differing,
        "entropy": scores.entropy[chosen],
        "classes": brings,
    }
    write_whole(path, lambda temporary: csv.write_csv(pa.table(table), temporary))


def _sheet(args: argparse.Namespace, model: "Model", drafts: Any) -> Any:
    from cps_ray.datasets.images import decode_image
    from cps_ray.datasets.show.picture import contact_sheet, make_thumbnail

    pictures = [make_thumbnail(each.id, decode_image(each.image), each.mask, model.palette) for each in drafts]
    title = f"{args.shards.resolve().name} · {len(pictures)} images to label next, with drafts"
    return contact_sheet(title, pictures, model.classes, model.palette)


def _say_next(console: Any, output: Path, count: int) -> None:
    drafts, corrected, recipe, listed, coco = (
        shell_path(path)
        for path in (
            output / "drafts",
            output / "corrected",
            output / "drafts/recipe.yaml",
            output / "suggested.txt",
            output / "drafts/coco.json",
        )
    )
    images, labels = shell_path(output / "drafts/images"), shell_path(output / "drafts/labels.txt")
    say(
        console,
        f"{count} images: {shell_path(output)}: suggested.txt, suggested.csv, sheet.png, drafts/",
        "Next:",
        f"  correct the drafts: labelme {images} --labels {labels}",
        f"    (or import {coco} into CVAT and the like, or paint on masks/)",
        f"  check them: cps-ray prepare folder {drafts} {corrected} --recipe {recipe} && cps-ray inspect {corrected}",
        f"  put the masks where the recipe of your data finds them, `cps-ray prepare` it again, and append {listed} to the list of "
        "`data.labeled_list`, if the training has one.",
    )


if __name__ == "__main__":
    entry(main)
