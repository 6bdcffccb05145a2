"""`python -m cps_ray.subsets`: draws or imports labelled subsets, and writes them as list files beside the shards.

A config names one of them: `data: {labeled: 1_16}`.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cps_ray.command import checked, command_parser, entry, run_command, say
from cps_ray.errors import DataError
from cps_ray.text import first_few, printable

if TYPE_CHECKING:
    from cps_ray.datasets.shards import Index, Shards

EXAMPLES = """\
examples:
  python -m cps_ray.subsets draw data/camvid/shards --labeled 46 --seed 0
  python -m cps_ray.subsets import UniMatch/splits/cityscapes data/cityscapes/shards
  python -m cps_ray.subsets import TorchSemiSeg/DATA/pascal_voc/subset_train_aug data/voc/shards
Lists are text files with one image a line: an id, or the paths of image and mask, separated by spaces or tabs."""


@dataclass(frozen=True)
class SubsetLists:
    """The lists of one labelled subset: ids of labelled and unlabelled images, in the order of the source."""

    name: str
    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Remarks on differences between the source and these lists."""


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("subsets", __doc__, EXAMPLES)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    draw = commands.add_parser(
        "draw", help="draw labelled images in which classes are about as frequent as in all images"
    )
    import_lists = commands.add_parser("import", help="import published lists, under their own names")
    import_lists.add_argument(
        "lists",
        type=Path,
        metavar="LISTS",
        help="folder that holds NAME/labeled.txt or ..._labeled_NAME.txt, at any depth",
    )
    for command in (draw, import_lists):
        command.add_argument("shards", type=Path, metavar="SHARDS", help="prepared data set")
    draw.add_argument(
        "--labeled", type=_count_or_fraction, required=True, metavar="N", help="a count, or a fraction such as 0.0625"
    )
    draw.add_argument("--seed", type=int, default=0, help="another seed draws other images (default 0)")
    draw.add_argument("--name", help="name of the subset (default: drawn_N_seed_S)")
    return parser


def _count_or_fraction(text: str) -> int | float:
    number = float if "." in text else int
    limit = 1.0 if number is float else math.inf
    return checked(
        number, text, lambda value: 0 < value <= limit, "a count of at least 1, or a fraction such as 0.0625"
    )


def _draw(args: argparse.Namespace, shards: "Shards", index: "Index") -> list[SubsetLists]:
    from cps_ray.datasets.subsets import labeled_rows

    rows = labeled_rows(shards.folder, index, args.labeled, args.seed)
    labeled = set(rows.tolist())
    unlabeled = tuple(key for row, key in enumerate(index.ids) if row not in labeled)
    name = args.name or f"drawn_{args.labeled}_seed_{args.seed}"
    return [SubsetLists(name, tuple(index.ids[row] for row in rows), unlabeled)]


def _subset_name(path: Path, root: Path) -> str:
    """Returns the name of the subset in a list file: 1_16 for 1_16/labeled.txt and for train_aug_labeled_1-16.txt."""
    if path.stem == "labeled":
        parts = path.parent.relative_to(root).parts or (root.name,)
        return "_".join(parts)
    words = [word for word in path.stem.replace("train_aug", "").split("_") if word not in ("", "labeled")]
    return "_".join(words).replace("-", "_") or path.parent.name


def _import(root: Path, shards: "Shards", index: "Index") -> list[SubsetLists]:
    """Reads all lists below `root`. Raises DataError if there are none, or if they do not fit the shards."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; it must hold the lists, such as UniMatch/splits/pascal.")
    # The pattern also matches *unlabeled*.txt; those lists are read beside their labelled ones.
    files = sorted(path for path in root.rglob("*labeled*.txt") if "unlabeled" not in path.name)
    if not files:
        raise DataError(f"{root}: must hold lists named labeled.txt, or ..._labeled_NAME.txt, but holds none.")
    other_splits = {
        key: split for split in shards.manifest.splits if split != "train" for key in shards.index(split).ids
    }
    found: dict[str, tuple[Path, SubsetLists]] = {}
    for path in files:
        subset = _read_lists(path, _subset_name(path, root), index, other_splits)
        before, same = found.setdefault(subset.name, (path, subset))
        if subset != same:
            raise DataError(
                f"{path}: must not mean the subset {subset.name}, which {before} is, with other images. Rename one of them."
            )
    return [subset for _, subset in found.values()]


def _read_lists(path: Path, name: str, index: "Index", other_splits: dict[str, str]) -> SubsetLists:
    """Reads the list of labelled images at `path`, and that of unlabelled images beside it if there is one.

    `other_splits`: id -> split of every image outside train. Raises DataError if an entry is in no split, or a labelled image
    has no mask in train.
    """
    from cps_ray.datasets.lists import listed_ids

    train_ids, foreign = set(index.ids), "Are the lists of another data set?"
    with_mask = {key for key, has_mask in zip(index.ids, index.labeled, strict=True) if has_mask}
    notes: list[str] = []

    def ids(file: Path) -> list[str]:
        """Returns the ids in train that a list names, and notes those that are in other splits."""
        listed = listed_ids(file, [*index.ids, *other_splits], "these shards", remedy=foreign)
        in_train = [key for key in listed if key in train_ids]
        if len(in_train) < len(listed):
            others = sorted({other_splits[key] for key in listed if key not in train_ids})
            num_left_out = len(listed) - len(in_train)
            notes.append(f"{num_left_out} of {len(listed)} are in {', '.join(others)} here, and left out")
        return in_train

    labeled = ids(path)
    without_mask = [key for key in labeled if key not in with_mask]
    if without_mask or not labeled:
        culprits = first_few(without_mask) or "all"
        raise DataError(f"{path}: labelled images must be in train, with masks; {culprits} are not.")
    unlabeled_list = path.with_name(path.name.replace("labeled", "unlabeled"))
    unlabeled = (
        ids(unlabeled_list) if unlabeled_list.exists() else [key for key in index.ids if key not in set(labeled)]
    )
    both = [key for key in unlabeled if key in set(labeled)]
    if both:
        notes.append(f"{first_few(both)} is in both lists, and counts as labelled")
        unlabeled = [key for key in unlabeled if key not in set(labeled)]
    return SubsetLists(name, tuple(labeled), tuple(unlabeled), tuple(notes))


def _write(shards: "Shards", index: "Index", subsets: Sequence[SubsetLists]) -> None:
    """Writes the list files and prints a table of them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cps_ray.datasets.lists import write_list
    from cps_ray.datasets.prepare.checks import absent_classes
    from cps_ray.datasets.subsets import LABELED_LIST, UNLABELED_LIST, subset_folder

    for subset in subsets:
        _refuse_to_replace(subset_folder(shards.folder, subset.name), subset)
    table = Table("name", "labelled", "unlabelled", "remarks")
    rows = {key: row for row, key in enumerate(index.ids)}
    for subset in subsets:
        folder = subset_folder(shards.folder, subset.name)
        write_list(folder / LABELED_LIST, subset.labeled)
        write_list(folder / UNLABELED_LIST, subset.unlabeled)
        missing = absent_classes(index.pixels[[rows[key] for key in subset.labeled]], shards.classes)
        notes = [*subset.notes, *([f"no labelled mask shows {first_few(missing)}"] if missing else [])]
        cells = (subset.name, str(len(subset.labeled)), str(len(subset.unlabeled)), "; ".join(notes))
        table.add_row(*(Text(printable(cell)) for cell in cells))
    console = Console()
    console.print(table)
    say(console, f"written to {subset_folder(shards.folder, '')}; in a config: data: {{labeled: NAME}}")
    if any(subset.name.isdigit() for subset in subsets):
        say(console, 'a name that is a number goes in quotes: data: {labeled: "92"}; without, 92 images are drawn')


def _refuse_to_replace(folder: Path, subset: SubsetLists) -> None:
    """Raises DataError if there is a subset of this name with other images: a training that names it would mean others than before."""
    from cps_ray.datasets.subsets import LABELED_LIST, UNLABELED_LIST

    for name, ids in ((LABELED_LIST, subset.labeled), (UNLABELED_LIST, subset.unlabeled)):
        path = folder / name
        if path.exists() and path.read_bytes() != "".join(f"{key}\n" for key in ids).encode():
            raise DataError(
                f"{path}: must name the same images as the list that is to be written, but names others. "
                f"Remove {folder} to replace it, or rename it to keep both."
            )


def _run(args: argparse.Namespace) -> int:
    # Imported only here and above, because --help needs none of it.
    from cps_ray.datasets.shards import open_shards

    shards = open_shards(args.shards)
    index = shards.index("train")
    subsets = _draw(args, shards, index) if args.command == "draw" else _import(args.lists, shards, index)
    _write(shards, index, subsets)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Writes list files, and returns the exit code: 0, or that of the error it printed."""
    return run_command(_parser(), _run, argv)


if __name__ == "__main__":
    entry(main)
