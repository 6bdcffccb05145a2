"""`python -m cps_ray.bench`: what is measured, how, and the table."""

import argparse
import importlib
import os
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
    step = commands.add_parser(
        "step",
        help="our step beside the eight-pass step of the paper's algorithm: time and peak memory; no Ray, CPU or GPU",
        description="CPS with CutMix on random images: the paper's algorithm written down plainly (float32, eight passes), ours "
        "with the paper's switches, and ours. Each has a process of its own, and they take their steps in turn.",
    )
    step.add_argument("--architecture", default="deeplabv3plus")
    step.add_argument(
        "--encoders",
        nargs="+",
        default=["resnet18", "resnet34", "tu-mobilenetv3_large_100", "tu-efficientnet_b0"],
        metavar="NAME",
    )
    step.add_argument("--crop", type=int, default=256, help="px, a multiple of 32 (default 256)")
    step.add_argument("--batch", type=int, default=4, help="labelled images, and as many unlabelled (default 4)")
    step.add_argument("--classes", type=int, default=19)
    step.add_argument("--rounds", type=int, default=7, help="steps that count (default 7)")
    step.add_argument("--bf16", action="store_true", help="also ours in bf16")
    step.add_argument("--compile", action="store_true", help="also ours with torch.compile")
    _device(step)
    placement = commands.add_parser(
        "placement",
        help="networks split over workers beside replicated ones: losses, bytes on the wire, memory per worker",
        description="Trains the same global batches with gloo workers on this machine in both placements.",
    )
    placement.add_argument("--architecture", default="deeplabv3plus")
    placement.add_argument("--encoder", default="resnet50")
    placement.add_argument("--workers", type=int, default=2, help="a multiple of two (default 2)")
    placement.add_argument("--crop", type=int, default=128)
    placement.add_argument("--batch", type=int, default=4)
    placement.add_argument("--classes", type=int, default=19)
    placement.add_argument("--steps", type=int, default=6, help="after a first one that does not count (default 6)")
    placement.add_argument("--json", type=Path, metavar="FILE")
    methods = commands.add_parser(
        "methods",
        help="the methods, and each switch of CPS on its own, at equal steps over seeds: mIoU on a split",
        description="Trains variants of one training by the engine alone, without Ray, and judges the last step's networks.",
    )
    methods.add_argument("file", type=Path, help="a training, or a sweep, whose `train` is then taken")
    methods.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of all variants"
    )
    methods.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    methods.add_argument("--only", nargs="+", metavar="NAME", help="variants (default: all)")
    methods.add_argument("--split", default="test", help="that the last networks are evaluated on (default test)")
    methods.add_argument("--jobs", type=int, default=1, help="trainings at once, which share the cores (default 1)")
    methods.add_argument(
        "--json", type=Path, metavar="FILE", help="also write every run there, as it ends; those in it are kept"
    )
    return parser


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="of torch on a CPU (default: all cores)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")


def _enough(text: str) -> int:
    """A batch of labelled and one of unlabelled images, and two to validate."""
    count = int(text)
    if 0 < count < 20:
        raise ValueError(text)
    return count


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and returns the exit code."""
    args = _parser().parse_args(argv)
    bench = importlib.import_module(f"cps_ray.bench.{args.what}")
    return guarded(lambda: int(bench.run(args)))


if __name__ == "__main__":
    entry(main)
