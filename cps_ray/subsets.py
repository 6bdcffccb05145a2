"""`python -m cps_ray.subsets`: which training images are labelled, as list files beside the shards.

A config names them: `data: {labeled: 1_16}`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cps_ray.command import entry, guarded
from cps_ray.datasets.lists import matcher, read_list, write_list
from cps_ray.datasets.prepare.checks import absent
from cps_ray.datasets.prepare.findings import first_few
from cps_ray.datasets.shards import Index, Shards, open_shards
from cps_ray.datasets.subsets import LABELED_LIST, UNLABELED_LIST, labeled_rows, subset_folder
from cps_ray.errors import DataError

EXAMPLES = """\
examples:
  python -m cps_ray.subsets draw data/camvid/shards --labeled 46 --seed 0
  python -m cps_ray.subsets import UniMatch/splits/cityscapes data/cityscapes/shards
  python -m cps_ray.subsets import TorchSemiSeg/DATA/pascal_voc/subset_train_aug data/voc/shards
Lists are text files of one image a line: an id, or paths of image and mask, apart by spaces or tabs."""


@dataclass(frozen=True)
class Lists:
    """Who is labelled and who is not, by id, in the order of the source."""

    name: str
    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    notes: tuple[str, ...] = ()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cps_ray.subsets",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    draw = commands.add_parser(
        "draw", help="draw labelled images, classes as frequent as in the whole, and write them out"
    )
    bring = commands.add_parser("import", help="bring in published lists, under their own names")
    bring.add_argument(
        "lists",
        type=Path,
        metavar="LISTS",
        help="folder that holds NAME/labeled.txt or ..._labeled_NAME.txt, at any depth",
    )
    for command in (draw, bring):
        command.add_argument("shards", type=Path, metavar="SHARDS", help="prepared data set")
    draw.add_argument(
        "--labeled", type=_wanted, required=True, metavar="N", help="a count, or a fraction such as 0.0625"
    )
    draw.add_argument("--seed", type=int, default=0, help="another seed draws other images (default 0)")
    draw.add_argument("--name", help="of the subset (default: drawn_N_seed_S)")
    return parser


def _wanted(text: str) -> int | float:
    value = float(text) if "." in text else int(text)
    if value <= 0 or (isinstance(value, float) and value > 1):
        raise ValueError(text)
    return value


def _draw(args: argparse.Namespace, shards: Shards, index: Index) -> list[Lists]:
    rows = labeled_rows(shards.folder, index, args.labeled, args.seed)
    chosen = set(rows.tolist())
    rest = tuple(name for row, name in enumerate(index.ids) if row not in chosen)
    name = args.name or f"drawn_{args.labeled}_seed_{args.seed}"
    return [Lists(name, tuple(index.ids[row] for row in rows), rest)]


def _name(path: Path, root: Path) -> str:
    """1_16/labeled.txt and train_aug_labeled_1-16.txt are both 1_16."""
    if path.stem == "labeled":
        parts = path.parent.relative_to(root).parts or (root.name,)
        return "_".join(parts)
    words = [word for word in path.stem.replace("train_aug", "").split("_") if word not in ("", "labeled")]
    return "_".join(words).replace("-", "_") or path.parent.name


def _import(root: Path, shards: Shards, index: Index) -> list[Lists]:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; it must hold the lists, such as UniMatch/splits/pascal.")
    files = sorted(path for path in root.rglob("*labeled*.txt") if "unlabeled" not in path.name)
    if not files:
        raise DataError(f"{root}: must hold lists named labeled.txt, or ..._labeled_NAME.txt, but holds none.")
    elsewhere = {key: split for split in shards.manifest.splits if split != "train" for key in shards.index(split).ids}
    return [_lists(path, _name(path, root), index, elsewhere) for path in files]


def _lists(path: Path, name: str, index: Index, elsewhere: dict[str, str]) -> Lists:
    """DataError if a list speaks of images that are in no split."""
    in_train, in_others = matcher(index.ids), matcher(elsewhere)
    masked = {key for key, has_mask in zip(index.ids, index.labeled, strict=True) if has_mask}
    notes: list[str] = []

    def ids(file: Path) -> list[str]:
        entries = read_list(file)
        strange = [one for one in entries if in_train(one) is None and in_others(one) is None]
        if strange:
            raise DataError(
                f"{file}: every entry must be an image of these shards, whose ids look like {index.ids[0]!r}, but "
                f"{len(strange)} of {len(entries)} are not ({first_few(strange)}); are the lists of another data set?"
            )
        found = [key for one in entries if (key := in_train(one)) is not None]
        if len(found) < len(entries):
            others = sorted({elsewhere[key] for one in entries if (key := in_others(one)) is not None})
            notes.append(f"{len(entries) - len(found)} of {len(entries)} are in {', '.join(others)} here, and left out")
        return found

    labeled = ids(path)
    bare = [key for key in labeled if key not in masked]
    if bare or not labeled:
        raise DataError(f"{path}: labelled images must be in train, with masks; {first_few(bare) or 'all'} are not.")
    partner = path.with_name(path.name.replace("labeled", "unlabeled"))
    unlabeled = ids(partner) if partner.exists() else [key for key in index.ids if key not in set(labeled)]
    both = [key for key in unlabeled if key in set(labeled)]
    if both:
        notes.append(f"{first_few(both)} is in both lists, and counts as labelled")
        unlabeled = [key for key in unlabeled if key not in set(labeled)]
    return Lists(name, tuple(labeled), tuple(unlabeled), tuple(notes))


def _write(shards: Shards, index: Index, found: Sequence[Lists]) -> None:
    table = Table("name", "labelled", "unlabelled", "remarks")
    rows = {key: row for row, key in enumerate(index.ids)}
    for one in found:
        folder = subset_folder(shards.folder, one.name)
        write_list(folder / LABELED_LIST, one.labeled)
        write_list(folder / UNLABELED_LIST, one.unlabeled)
        missing = absent(index.pixels[[rows[key] for key in one.labeled]], shards.classes)
        notes = [*one.notes, *([f"no labelled mask shows {first_few(missing)}"] if missing else [])]
        table.add_row(one.name, str(len(one.labeled)), str(len(one.unlabeled)), "; ".join(notes))
    console = Console()
    console.print(table)
    console.print(
        f"written to {subset_folder(shards.folder, '')}; in a config: data: {{labeled: NAME}}", soft_wrap=True
    )
    if any(one.name.isdigit() for one in found):
        console.print('a name that is a number goes in quotes: data: {labeled: "92"}; without, 92 images are drawn')


def _run(args: argparse.Namespace) -> int:
    shards = open_shards(args.shards)
    index = shards.index("train")
    found = _draw(args, shards, index) if args.command == "draw" else _import(args.lists, shards, index)
    _write(shards, index, found)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Writes list files, and returns the exit code: 0, or that of the error it printed."""
    args = _parser().parse_args(argv)
    return guarded(lambda: _run(args))


if __name__ == "__main__":
    entry(main)
