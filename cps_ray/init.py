"""`python -m cps_ray.init`: looks at photos and masks, and writes a recipe and a first sweep that run as they are.

Says what it assumed and how sure that is, and draws some masks over their photos. What was edited is never overwritten.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cps_ray.command import command_parser, entry, run_command

EXAMPLES = """\
examples:
  python -m cps_ray.init photos
  python -m cps_ray.init photos masks --unlabeled more --output mine
Masks may be images of the same names (ids, colours, black and white), in PHOTOS or in a folder of their own, for some photos alone;
COCO or LabelMe json; YOLO's outlines; CVAT's export of masks."""


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("init", __doc__, EXAMPLES)
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of photos, or of a whole data set")
    parser.add_argument(
        "masks", type=Path, nargs="?", metavar="MASKS", help="folder or file of masks (default: PHOTOS)"
    )
    parser.add_argument("--unlabeled", type=Path, metavar="DIR", help="folder of more photos, without masks")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder for the files (default: PHOTOS-cps)")
    return parser


def _run(args: argparse.Namespace) -> int:
    # Imported only now, because --help needs none of it.
    from cps_ray.proposal import run

    return run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Looks, writes and says what was assumed; returns the exit code: 0, or that of the error it printed."""
    return run_command(_parser(), _run, argv)


if __name__ == "__main__":
    entry(main)
