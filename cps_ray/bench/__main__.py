"""`python -m cps_ray.bench`: what is measured, how, and the table."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cps_ray.command import entry, guarded


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cps_ray.bench", description=__doc__)
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    stream = commands.add_parser(
        "stream",
        help="images per second of the stream in a Ray Train worker, of a plain DataLoader, and of bare decoding",
        description="Takes turns on this machine: the stream, torch's DataLoader on the raw files, bare decoding. "
        "Then the cost of pass boundaries, and memory over a small and a ten times larger data set.",
    )
    stream.add_argument(
        "--camvid", type=Path, metavar="RAW", help="folder with train/ and trainannot/; left out without"
    )
    stream.add_argument(
        "--wide",
        type=_enough,
        default=24,
        metavar="N",
        help="images of 2048x1024 px to draw, 0 or from 20 on (default 24)",
    )
    stream.add_argument("--rounds", type=int, default=3, help="turns that each one takes (default 3)")
    stream.add_argument("--seconds", type=float, default=10.0, help="of measuring per turn (default 10)")
    stream.add_argument("--only", nargs="+", choices=("speed", "passes", "memory"), help="parts (default: all)")
    stream.add_argument("--work", type=Path, metavar="FOLDER", help="keep what is drawn and prepared there")
    stream.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    return parser


def _enough(text: str) -> int:
    """A batch of labelled and one of unlabelled images, and two to validate."""
    count = int(text)
    if 0 < count < 20:
        raise ValueError(text)
    return count


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and returns the exit code."""
    args = _parser().parse_args(argv)
    from cps_ray.bench import stream

    return guarded(lambda: stream.run(args))


if __name__ == "__main__":
    entry(main)
