"""What the command `inspect` does; apart, because it loads what its parser does not need."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from cps_ray.command import image_bar, say
from cps_ray.datasets.prepare import checks
from cps_ray.datasets.prepare.findings import Finding, summary_lines
from cps_ray.datasets.prepare.verification import damage_finding, verify
from cps_ray.datasets.shards import Index, Manifest, Shards, open_shards
from cps_ray.datasets.show import page, picture
from cps_ray.datasets.show.statistics import Statistics, percent, size_text, statistics
from cps_ray.datasets.subsets import named_rows
from cps_ray.errors import DataError
from cps_ray.text import first_few, printable

PAGE_FILE = "index.html"
FINDINGS_FILE = "findings.txt"
_MAX_LINES = 20
"""Longest list of findings that is printed in full."""
_LABELED_SLUG = "train-labeled"
_MAX_SIZES = 3
"""Largest number of distinct image sizes that are listed one by one."""


@dataclass(frozen=True)
class SplitRows:
    """Images of a split that are shown together: all of them, or the labelled ones."""

    name: str
    slug: str
    """Name as it stands in file names."""
    index: Index
    rows: NDArray[np.int64]
    """Rows of the images in `index`, ascending."""


def _indexes(shards: Shards) -> tuple[dict[str, Index], list[Finding]]:
    """Returns the index of every split whose index is undamaged, and a finding for each of the others."""
    indexes, findings = {}, []
    for split in shards.manifest.splits:
        try:
            indexes[split] = shards.index(split)
        except DataError as error:
            findings.append(damage_finding(shards.folder / shards.manifest.splits[split].index, error))
    return indexes, findings


def _labeled_rows(shards: Shards, index: Index, which: str, seed: int) -> SplitRows:
    """Returns the images that `--labeled` names. Raises DataError if there are no such images."""
    rows = named_rows(shards.folder, index, which, seed)
    return SplitRows(f"labelled: {which}", _LABELED_SLUG, index, np.sort(rows))


def _label_findings(part: SplitRows, classes: Sequence[str]) -> list[Finding]:
    """Returns what keeps a training from learning all classes from these labelled images."""
    findings = []
    without_mask = [part.index.ids[row] for row in part.rows if not part.index.labeled[row]]
    if without_mask:
        found = f"every labelled image must have a mask, but {len(without_mask)} have none ({first_few(without_mask)})"
        findings.append(Finding("label without mask", part.name, found, "take them off the list"))
    missing = checks.absent_classes(part.index.pixels[part.rows], classes)
    if missing:
        found = f"every class should be seen, but no labelled mask shows {', '.join(missing)}: no label teaches it"
        findings.append(Finding("class is absent", part.name, found, "label more, or other, images", fatal=False))
    return findings


def _verify(shards: Shards, indexes: Mapping[str, Index]) -> list[Finding]:
    findings = []
    with image_bar("verifying") as progress:
        task = progress.add_task("", total=sum(map(len, indexes.values())))
        for images, found in verify(shards.manifest, indexes):
            findings += found
            progress.advance(task, images)
    return sorted(findings, key=lambda finding: finding.where)


def _finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Returns a line per finding, or, if there are many, a line per kind of finding."""
    return [finding.line for finding in findings] if len(findings) <= _MAX_LINES else summary_lines(findings)


def _size_lines(split: Statistics) -> str:
    if len(split.sizes) <= _MAX_SIZES:
        return "\n".join(f"{size_text(size)} ({count})" for size, count in split.sizes.items())
    extremes = zip(("min", "median", "max"), split.extremes(), strict=True)
    return "\n".join([f"{len(split.sizes)} sizes", *(f"{word} {size_text(size)}" for word, size in extremes)])


def _summary_table(parts: Sequence[page.ImageSet], classes: Sequence[str]) -> Table:
    """Returns a table with a column per part: counts, then each class."""
    table = Table(caption="per class: % of the counted pixels (masks that show it)")
    table.add_column("")
    for part in parts:
        table.add_column(Text(printable(part.name)), justify="right")
    columns = [part.statistics for part in parts]
    table.add_row("images", *(str(column.images) for column in columns))
    table.add_row("masks", *(str(column.masks) for column in columns))
    table.add_row("unlabelled", *(str(column.unlabeled) for column in columns))
    table.add_row("stored", *(decimal(column.bytes) for column in columns))
    table.add_row("sizes", *(_size_lines(column) for column in columns))
    table.add_row("ignored %", *(percent(column.ignored) for column in columns), end_section=True)
    for label, name in enumerate(classes):
        cells = (f"{percent(float(column.frequency[label]))} ({column.masks_per_class[label]})" for column in columns)
        table.add_row(Text(printable(name)), *cells)
    return table


def _write_pictures_and_page(
    output: Path, name: str, manifest: Manifest, parts: Mapping[str, page.ImageSet], messages: page.Messages
) -> list[Path]:
    """Writes a contact sheet for each part (slug -> part) and the page. Returns the paths of these files."""
    written = []
    for slug, part in parts.items():
        total = part.statistics
        title = f"{name} · {part.name} · {len(part.thumbnails)} of {total.images} images, {total.masks} with a mask"
        missing = [
            label
            for label, masks in zip(manifest.classes, total.masks_per_class, strict=True)
            if total.masks and not masks
        ]
        sheet = picture.contact_sheet(title, part.thumbnails, manifest.classes, manifest.palette, missing)
        written.append(output / _sheet_file(slug))
        sheet.save(written[-1])
    written.append(output / PAGE_FILE)
    written[-1].write_text(page.page(name, manifest, list(parts.values()), messages), encoding="utf-8")
    return written


def _sheet_file(slug: str) -> str:
    return f"contact-{slug}.png"


def _page_part(part: SplitRows, manifest: Manifest, seed: int) -> page.ImageSet:
    shown_rows = picture.choose_examples(part.index, part.rows, seed)
    thumbnails = picture.thumbnails(part.index, shown_rows, manifest.palette)
    return page.ImageSet(part.name, statistics(part.index, part.rows), tuple(thumbnails))


def _make_output(chosen: Path | None, folder: Path) -> Path:
    """Makes the folder for page and pictures and returns it: `chosen`, or FOLDER-inspect."""
    output = chosen or folder.with_name(f"{folder.name}-inspect")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{output}: cannot be made ({error.strerror}); name another folder with --output.") from None
    return output


def _print_report(
    parts: Mapping[str, page.ImageSet], manifest: Manifest, messages: page.Messages, written: Sequence[Path]
) -> None:
    console = Console()
    if parts:
        console.print(_summary_table(list(parts.values()), manifest.classes))
    kinds = (("error", messages.errors), ("warning", messages.warnings), ("note", messages.notes))
    say(console, *(f"{kind}: {line}" for kind, lines in kinds for line in lines))
    if manifest.left_out:
        say(console, f"left out when this was prepared: {len(manifest.left_out)} files")
    say(console, *(f"wrote {path}" for path in written))


def run(args: argparse.Namespace) -> int:
    """Checks and prints, writes page and pictures, and returns the exit code. Raises DataError if a finding is fatal."""
    shards = open_shards(args.shards)
    manifest = shards.manifest
    folder = args.shards.resolve()
    output = _make_output(args.output, folder)
    indexes, findings = _indexes(shards)
    selections = [SplitRows(split, split, index, np.arange(len(index))) for split, index in indexes.items()]
    if args.labeled and "train" in indexes:
        labeled = _labeled_rows(shards, indexes["train"], args.labeled, args.seed)
        selections.insert(1, labeled)
        findings += _label_findings(labeled, shards.classes)
    findings += _verify(shards, indexes) + checks.check_prepared(indexes, shards.classes)
    name = folder.parent.name if folder.name == "shards" else folder.name
    parts = {part.slug: _page_part(part, manifest, args.seed) for part in selections if part.rows.size}
    fatal = [finding for finding in findings if finding.fatal]
    warnings = [finding for finding in findings if not finding.fatal]
    # `prepare` has stored its warnings as notes, and the checks find them again here.
    repeated = summary_lines(warnings)
    notes = [note for note in manifest.notes if note not in repeated]
    messages = page.Messages(tuple(_finding_lines(fatal)), tuple(_finding_lines(warnings)), tuple(notes))
    for earlier in (FINDINGS_FILE, _sheet_file(_LABELED_SLUG)):  # which this call may not write
        (output / earlier).unlink(missing_ok=True)
    written = _write_pictures_and_page(output, name, manifest, parts, messages)
    if len(messages.errors) < len(fatal):
        written.append(output / FINDINGS_FILE)
        written[-1].write_text("".join(f"{finding.line}\n" for finding in fatal), encoding="utf-8")
    _print_report(parts, manifest, messages, written)
    if fatal:
        raise DataError(f"{args.shards}: {len(fatal)} findings must be fixed, or scores mean nothing; see above.")
    return 0
