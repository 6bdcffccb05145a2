"""`python -m cps_ray.inspect`: what prepared shards hold, whether they are whole, and how they look.

Reads every image and mask, checks them, prints counts and class frequencies, and writes a page and contact sheets.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from cps_ray.command import entry, guarded, image_bar
from cps_ray.datasets.prepare import checks
from cps_ray.datasets.prepare.findings import Finding, first_few, summary_lines
from cps_ray.datasets.prepare.verification import damage, verified
from cps_ray.datasets.shards import Index, Manifest, Shards, open_shards
from cps_ray.datasets.show import page, picture
from cps_ray.datasets.show.statistics import Statistics, percent, size_text, statistics
from cps_ray.datasets.subsets import labeled_rows, read_ids, subset_folder
from cps_ray.errors import DataError

PAGE_FILE = "index.html"
FINDINGS_FILE = "findings.txt"
EXAMPLES = """\
examples:
  python -m cps_ray.inspect data/camvid/shards
  python -m cps_ray.inspect data/cityscapes/shards --labeled 1_16 --output cityscapes-looked-at
What is wrong is listed line by line; the exit code is 2 if a training could not rely on the data."""
_LINES = 20
_SIZES = 3
"""More distinct sizes than these are summed up."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cps_ray.inspect",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="prepared data set")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for page and pictures (default: SHARDS-inspect)")
    parser.add_argument(
        "--labeled",
        metavar="WHICH",
        help="look at the labelled part too: a count, a fraction such as 0.125, the name of a subset, or a list file",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the images shown, and of a drawn labelled part (default 0)"
    )
    return parser


@dataclass(frozen=True)
class Chosen:
    """A split, or the labelled part of one."""

    name: str
    slug: str
    """Of file names."""
    index: Index
    rows: NDArray[np.int64]


def _indexes(shards: Shards) -> tuple[dict[str, Index], list[Finding]]:
    """Of every split that has a whole index, and what is wrong with the others."""
    indexes, findings = {}, []
    for split in shards.manifest.splits:
        try:
            indexes[split] = shards.index(split)
        except DataError as error:
            findings.append(damage(shards.folder / shards.manifest.splits[split].index, error))
    return indexes, findings


def _labeled(shards: Shards, index: Index, wanted: str, seed: int) -> Chosen:
    """The part that --labeled means. DataError if there is no such part."""
    if subset_folder(shards.folder, wanted).is_dir():
        rows = labeled_rows(shards.folder, index, wanted, seed)
    elif Path(wanted).is_file() or wanted.endswith(".txt"):
        rows = read_ids(Path(wanted), index)
    else:
        rows = labeled_rows(shards.folder, index, _number(wanted), seed)
    return Chosen(f"labelled: {wanted}", "train-labeled", index, np.sort(rows))


def _number(text: str) -> int | float | str:
    """A count of at least 1, a fraction in (0, 1], or what is neither: a name."""
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        return text
    if value <= 0 or (isinstance(value, float) and value > 1):
        raise DataError(f"--labeled must be a count of at least 1 or a fraction in (0, 1], but is {text}.")
    return value


def _labels(part: Chosen, classes: Sequence[str]) -> list[Finding]:
    """What a training with these labels could not learn."""
    findings = []
    bare = [part.index.ids[row] for row in part.rows if not part.index.labeled[row]]
    if bare:
        found = f"every labelled image must have a mask, but {len(bare)} have none ({first_few(bare)})"
        findings.append(Finding("label without mask", part.name, found, "take them off the list"))
    missing = checks.absent(part.index.pixels[part.rows], classes)
    if missing:
        found = f"every class should be seen, but no labelled mask shows {', '.join(missing)}: no label teaches it"
        findings.append(Finding("class is absent", part.name, found, "label more, or other, images", fatal=False))
    return findings


def _verify(shards: Shards, indexes: Mapping[str, Index]) -> list[Finding]:
    findings = []
    with image_bar("verifying") as progress:
        task = progress.add_task("", total=sum(map(len, indexes.values())))
        for images, found in verified(shards.manifest, indexes):
            findings += found
            progress.advance(task, images)
    return sorted(findings, key=lambda finding: finding.where)


def _lines(findings: Sequence[Finding]) -> list[str]:
    """Each finding, or, of many, one line per trouble."""
    return [finding.line for finding in findings] if len(findings) <= _LINES else summary_lines(findings)


def _sizes(known: Statistics) -> str:
    if len(known.sizes) <= _SIZES:
        return "\n".join(f"{size_text(size)} ({count})" for size, count in known.sizes.items())
    ends = zip(("min", "median", "max"), known.extremes(), strict=True)
    return "\n".join([f"{len(known.sizes)} sizes", *(f"{word} {size_text(size)}" for word, size in ends)])


def _tables(parts: Sequence[page.Part], classes: Sequence[str]) -> Table:
    """A column per part: counts, then each class."""
    table = Table(caption="per class: % of the counted pixels (masks that show it)")
    table.add_column("")
    for part in parts:
        table.add_column(part.name, justify="right")
    known = [part.statistics for part in parts]
    table.add_row("images", *(str(one.images) for one in known))
    table.add_row("masks", *(str(one.masks) for one in known))
    table.add_row("unlabelled", *(str(one.unlabeled) for one in known))
    table.add_row("stored", *(decimal(one.bytes) for one in known))
    table.add_row("sizes", *(_sizes(one) for one in known))
    table.add_row("ignored %", *(percent(one.ignored) for one in known), end_section=True)
    for label, name in enumerate(classes):
        cells = (f"{percent(float(one.frequency[label]))} ({one.shown[label]})" for one in known)
        table.add_row(escape(name), *cells)
    return table


def _write(output: Path, name: str, manifest: Manifest, parts: Mapping[str, page.Part], said: page.Said) -> list[Path]:
    """The page, and a contact sheet for each part, by the slug of its name."""
    written = []
    for slug, part in parts.items():
        known = part.statistics
        title = f"{name} · {part.name} · {len(part.thumbnails)} of {known.images} images, {known.masks} with a mask"
        missing = [
            label for label, masks in zip(manifest.classes, known.shown, strict=True) if known.masks and not masks
        ]
        sheet = picture.contact_sheet(title, part.thumbnails, manifest.classes, manifest.palette, missing)
        written.append(output / f"contact-{slug}.png")
        sheet.save(written[-1])
    written.append(output / PAGE_FILE)
    written[-1].write_text(page.page(name, manifest, list(parts.values()), said), encoding="utf-8")
    return written


def _part(part: Chosen, manifest: Manifest, seed: int) -> page.Part:
    shown = picture.chosen(part.index, part.rows, seed)
    made = picture.thumbnails(part.index, shown, manifest.palette)
    return page.Part(part.name, statistics(part.index, part.rows), tuple(made))


def _output(wanted: Path | None, folder: Path) -> Path:
    """The folder to write to, which is there."""
    output = wanted or folder.with_name(f"{folder.name}-inspect")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{output}: cannot be made ({error.strerror}); name another folder with --output.") from None
    return output


def _print(parts: Mapping[str, page.Part], manifest: Manifest, said: page.Said, written: Sequence[Path]) -> None:
    console = Console()
    if parts:
        console.print(_tables(list(parts.values()), manifest.classes))
    groups = (("error", said.errors), ("warning", said.warnings), ("note", said.notes))
    for kind, lines in groups:
        for line in lines:
            console.print(f"{kind}: {line}", highlight=False, soft_wrap=True, markup=False)
    if manifest.left_out:
        console.print(f"left out when this was prepared: {len(manifest.left_out)} files", highlight=False)
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)


def _run(args: argparse.Namespace) -> int:
    shards = open_shards(args.shards)
    manifest = shards.manifest
    folder = args.shards.resolve()
    output = _output(args.output, folder)
    indexes, findings = _indexes(shards)
    chosen = [Chosen(split, split, index, np.arange(len(index))) for split, index in indexes.items()]
    if args.labeled and "train" in indexes:
        chosen.insert(1, _labeled(shards, indexes["train"], args.labeled, args.seed))
        findings += _labels(chosen[1], shards.classes)
    findings += _verify(shards, indexes) + checks.whole(indexes, shards.classes)
    name = folder.parent.name if folder.name == "shards" else folder.name
    parts = {part.slug: _part(part, manifest, args.seed) for part in chosen if part.rows.size}
    fatal = [finding for finding in findings if finding.fatal]
    warnings = [finding for finding in findings if not finding.fatal]
    # Preparing has noted its warnings, which are found again here.
    again = summary_lines(warnings)
    notes = [note for note in manifest.notes if note not in again]
    said = page.Said(tuple(_lines(fatal)), tuple(_lines(warnings)), tuple(notes))
    written = _write(output, name, manifest, parts, said)
    if len(said.errors) < len(fatal):
        written.append(output / FINDINGS_FILE)
        written[-1].write_text("".join(f"{finding.line}\n" for finding in fatal), encoding="utf-8")
    _print(parts, manifest, said, written)
    if fatal:
        raise DataError(f"{args.shards}: {len(fatal)} findings must be mended, or scores mean nothing; see above.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Looks, prints and writes, and returns the exit code: 0, or that of the error it printed."""
    args = _parser().parse_args(argv)
    return guarded(lambda: _run(args))


if __name__ == "__main__":
    entry(main)
