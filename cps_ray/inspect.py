"""`python -m cps_ray.inspect`: what prepared shards hold, whether they are undamaged, and how they look.

Reads and checks every image and mask, prints counts and class frequencies, and writes a page and contact sheets.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cps_ray.command import command_parser, entry, run_command

EXAMPLES = """\
examples:
  python -m cps_ray.inspect data/camvid/shards
  python -m cps_ray.inspect data/cityscapes/shards --labeled 1_16 --output cityscapes-inspected
Findings are listed line by line; the exit code is 2 if a training could not rely on the data."""


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("inspect", __doc__, EXAMPLES)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="prepared data set")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder for page and pictures (default: SHARDS-inspect)"
    )
    parser.add_argument(
        "--labeled",
        metavar="WHICH",
        help="show labelled images apart, too: a count, a fraction such as 0.125, the name of a subset, or a list file",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the images shown, and of drawn labelled images (default 0)"
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    # Imported only now, because --help needs none of it.
    from cps_ray.inspection import run

    return run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Checks and prints, writes page and pictures, and returns the exit code: 0, or that of the error it printed."""
    return run_command(_parser(), _run, argv)


if __name__ == "__main__":
    entry(main)
