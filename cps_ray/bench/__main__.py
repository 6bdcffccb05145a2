"""`python -m cps_ray.bench`: what is measured, how, and the table."""

import argparse
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cps_ray.command import checked, command_parser, entry, run_command

if TYPE_CHECKING:  # the class cannot be subscripted at run time
    Benchmarks = argparse._SubParsersAction[argparse.ArgumentParser]

_SMALLEST_SET = 20
"""Fewest images that `stream` draws: enough for a labelled batch, an unlabelled one, and two to validate."""


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("bench", __doc__)
    benchmarks = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    _add_stream(benchmarks)
    _add_step(benchmarks)
    _add_placement(benchmarks)
    _add_methods(benchmarks)
    _add_verdict(benchmarks)
    _add_folds(benchmarks)
    _add_start(benchmarks)
    _add_driver(benchmarks)
    _add_search(benchmarks)
    return parser


def _add_start(benchmarks: "Benchmarks") -> None:
    start = benchmarks.add_parser(
        "start",
        help="from the wish to train to the first evaluation: a plain script, a cold worker group, a warm one; and many short trials",
        description="Trains one step and evaluates, by a script without Ray, in a worker group that is started for it, and in one that has "
        "trained before. With --trials also a sweep of so many trials of 20 steps: seconds a trial, CPU and memory of its processes.",
    )
    add = start.add_argument
    add(
        "file",
        nargs="?",
        type=Path,
        default=Path("quickstart"),
        help="a sweep, or the name of a shipped one (default quickstart)",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the sweep")
    add("--rounds", type=_positive, default=3, help="scripts, and worker groups (default 3)")
    add("--warm", type=_positive, default=8, help="trainings in each group after the first one (default 8)")
    add("--trials", type=int, default=0, metavar="N", help="trials of a sweep (default 0: no sweep)")
    add("--json", type=Path, metavar="FILE", help="file that every figure is written to")


def _add_stream(benchmarks: "Benchmarks") -> None:
    stream = benchmarks.add_parser(
        "stream",
        help="images per second of the stream in a Ray Train worker, of a plain DataLoader, and of bare decoding",
        description="Takes turns on this machine: the stream, torch's DataLoader on the raw files, bare decoding. "
        "Then the cost of pass boundaries, and memory over a small and a ten times larger data set.",
    )
    add = stream.add_argument
    add("--camvid", type=Path, metavar="RAW", help="folder with train/ and trainannot/; left out without")
    images = "images of 2048x1024 px to draw, 0 or from 20 on (default 24)"
    add("--wide", type=_num_images, default=24, metavar="N", help=images)
    add("--rounds", type=int, default=3, help="turns of each (default 3)")
    add("--seconds", type=float, default=10.0, help="seconds of measuring per turn (default 10)")
    add("--only", nargs="+", choices=("speed", "passes", "memory"), help="parts to measure (default: all)")
    add("--work", type=Path, metavar="FOLDER", help="folder that keeps what is drawn and prepared")
    add("--json", type=Path, metavar="FILE", help="file that every figure is written to")


def _add_step(benchmarks: "Benchmarks") -> None:
    step = benchmarks.add_parser(
        "step",
        help="our step beside the eight-pass step of the paper's algorithm: time and peak memory; no Ray, CPU or GPU",
        description="CPS with CutMix on random images: the paper's algorithm written down plainly (float32, eight passes), ours "
        "with the paper's switches, and ours. Each has a process of its own, and they take their steps in turn.",
    )
    add = step.add_argument
    encoders = ["resnet18", "resnet34", "tu-mobilenetv3_large_100", "tu-efficientnet_b0"]
    add("--architecture", default="deeplabv3plus")
    add("--encoders", nargs="+", default=encoders, metavar="NAME")
    add("--crop", type=int, default=256, help="px, a multiple of 32 (default 256)")
    add("--batch", type=int, default=4, help="labelled images, and as many unlabelled (default 4)")
    add("--classes", type=int, default=19)
    add("--rounds", type=int, default=7, help="steps that count (default 7)")
    add(
        "--loss",
        nargs="+",
        default=[],
        metavar="NAME",
        help="also ours with the sum of these supervised losses, such as ce dice",
    )
    add("--bf16", action="store_true", help="also ours in bf16")
    add("--compile", action="store_true", help="also ours with torch.compile")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch on a CPU (default: all cores)")
    add("--json", type=Path, metavar="FILE", help="file that every figure is written to")


def _add_placement(benchmarks: "Benchmarks") -> None:
    placement = benchmarks.add_parser(
        "placement",
        help="one network per worker beside replicated networks: losses, bytes on the wire, memory per worker",
        description="Trains the same global batches with gloo workers on this machine in both placements.",
    )
    add = placement.add_argument
    add("--architecture", default="deeplabv3plus")
    add("--encoder", default="resnet50")
    add("--workers", type=int, default=2, help="a multiple of two (default 2)")
    add("--crop", type=int, default=128)
    add("--batch", type=int, default=4)
    add("--classes", type=int, default=19)
    add("--steps", type=int, default=6, help="steps after a first one that does not count (default 6)")
    add("--json", type=Path, metavar="FILE")


def _add_methods(benchmarks: "Benchmarks") -> None:
    methods = benchmarks.add_parser(
        "methods",
        help="the methods, and each switch of CPS on its own, at equal steps over draws and seeds: mIoU on a split",
        description="Trains variants of one training by the engine alone, without Ray, and evaluates the last step's networks. Runs "
        "are paired: the same draw of labelled images, the same seed. docs/methods.md says how to read the table.",
    )
    add = methods.add_argument
    add(
        "file",
        type=Path,
        help="a training or a sweep, whose `train` is then taken, the name of a shipped one, or a record: FILE.json of --json, which is only shown",
    )
    settings = "change a setting of all variants: data.shards, data.labeled, schedule.steps, model.weights_file, ..."
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=settings)
    draws = (
        "train on N draws of labelled images (data.subset_seed 0 to N - 1) with each seed (default: that of the file)"
    )
    add("--draws", type=_positive, metavar="N", help=draws)
    add("--seeds", type=int, nargs="+", help="seeds of the training (default 1 2 3)")
    add("--only", nargs="+", metavar="NAME", help="variants beside the control (default: all)")
    further = "a further variant, such as 'half weight: method=cps cps.weight=0.5'; may be repeated"
    add("--variant", action="append", default=[], metavar="'NAME: KEY=VALUE ...'", help=further)
    control = "variant that all are compared with (default supervised)"
    add("--control", default="supervised", metavar="NAME", help=control)
    add("--split", help="split that the last networks are evaluated on (default test)")
    add("--jobs", type=_positive, default=1, help="trainings at once, among which the cores are divided (default 1)")
    record = "file that every run is written to as it ends; runs that it already holds are not repeated"
    add("--json", type=Path, metavar="FILE", help=record)
    add("--png", type=_picture, metavar="FILE", help="picture of what each variant gains, on each class, too")
    add("--along", metavar="KEY", help="the picture is that of mIoU along this setting, such as cps.weight")


def _add_verdict(benchmarks: "Benchmarks") -> None:
    verdict = benchmarks.add_parser(
        "verdict",
        help="the interval of a verdict: how often it holds the truth, and how often an arm is told from itself",
        description="Trains many pairs of CPS and supervised trainings on the embedded data, as sweeps/quickstart.yaml does, and evaluates them on "
        "2 000 images. Then draws three pairs and 60 images again and again: docs/verdict.md.",
    )
    add = verdict.add_argument
    add(
        "pool",
        type=Path,
        metavar="FOLDER",
        help="folder of the trainings; those that it already holds are not repeated",
    )
    varied = "seed: all trainings have the same labelled images; draw: each has others, too (default seed)"
    add("--vary", choices=("seed", "draw"), default="seed", help=varied)
    add("--trainings", type=_pool_size, default=24, help="trainings of each arm (default 24)")
    add("--steps", type=_positive, default=400, help="steps of each training (default 400)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of all trainings")
    add("--draws", type=_positive, default=1000, help="how often a few are drawn (default 1000)")
    add("--jobs", type=_positive, default=1, help="trainings at once, among which the cores are divided (default 1)")
    add("--json", type=Path, metavar="FILE", help="file that every figure is written to")


def _add_folds(benchmarks: "Benchmarks") -> None:
    folds = benchmarks.add_parser(
        "folds",
        help="a verdict by cross-validation of few masks beside what the same trainings reach on many images",
        description="Runs sweeps/quickstart.yaml without a search and with folds, each time on other scenes, and evaluates the trainings of all "
        "folds on 2 000 further images.",
    )
    add = folds.add_argument
    add(
        "folder", type=Path, metavar="FOLDER", help="folder of the sweeps; those that it already holds are not repeated"
    )
    add("--sets", type=_positive, default=5, help="sweeps (default 5)")
    add("--folds", type=_positive, default=5, help="folds of each (default 5)")
    add("--labeled", type=_positive, default=16, help="labelled images of train (default 16)")
    add("--held", type=_positive, default=7, help="images of val, and of test; they join the folds (default 7)")
    add("--images", type=_positive, default=2000, help="images that the truth is measured on (default 2000)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of all sweeps")
    add("--jobs", type=_positive, default=1, help="evaluations at once, among which the cores are divided (default 1)")
    add("--json", type=Path, metavar="FILE", help="file that every figure is written to")


def _add_driver(benchmarks: "Benchmarks") -> None:
    driver = benchmarks.add_parser(
        "driver",
        help="a sweep's driver beside Ray: CPU seconds per trial, memory and files, as trials become more",
        description="Searches with the real study, tables and events, in a temporary folder, with trainings that only write ten records "
        "each. Each size has a process of its own. CPU seconds count, so that other work on the machine disturbs little.",
    )
    add = driver.add_argument
    sizes = "trials of each sweep (default 100 1000 3000)"
    add("--trials", type=_positive, nargs="+", default=[100, 1000, 3000], metavar="N", help=sizes)
    add("--sampler", choices=("random", "tpe"), default="random")
    add("--early-stopping", choices=("asha", "median", "none"), default="asha")
    add("--json", type=Path, metavar="FILE", help="file that every figure is written to")


def _add_search(benchmarks: "Benchmarks") -> None:
    search = benchmarks.add_parser(
        "search",
        help="how much of a grid of trainings a search needs to find one as good as the best: ours, a plain Optuna loop, random search",
        description="--record trains a grid over a sweep's search space by the engine alone. With the record, searches are replayed in "
        "seconds: a drawn trial is the recorded training nearest to it. Steps until a finished trial is within 1 %% of the grid's best.",
    )
    add = search.add_argument
    add("file", nargs="?", type=Path, help="a record to replay searches on")
    add(
        "--record",
        type=Path,
        metavar="FILE",
        help="train the grid into this file; trainings that it holds are not repeated",
    )
    add("--sweep", type=Path, default=Path("quickstart"), help="sweep whose space is recorded (default quickstart)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of that sweep")
    add("--points", type=_positive, default=5, help="values of each range (default 5)")
    add("--jobs", type=_positive, default=1, help="trainings at once, among which the cores are divided (default 1)")
    add("--seeds", type=_positive, default=20, help="searches of each kind (default 20)")
    add("--png", type=_picture, metavar="FILE", help="picture of the searches")
    add("--json", type=Path, metavar="FILE", help="file that every figure is written to")


def _positive(text: str) -> int:
    return checked(int, text, lambda count: count >= 1, "a whole number of at least 1")


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".png" or not path.parent.is_dir():  # now, and not after hours
        raise argparse.ArgumentTypeError(f"must be a .png file in a folder that exists, got {text!r}")
    return path


def _num_images(text: str) -> int:
    return checked(int, text, lambda count: count == 0 or count >= _SMALLEST_SET, f"0 or at least {_SMALLEST_SET}")


def _pool_size(text: str) -> int:
    return checked(int, text, lambda count: count >= 2, "a whole number of at least 2")


def _run(args: argparse.Namespace) -> int:
    benchmark = importlib.import_module(f"cps_ray.bench.{args.what}")
    return int(benchmark.run(args))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and returns the exit code: 0, or that of the error it printed."""
    return run_command(_parser(), _run, argv)


if __name__ == "__main__":
    entry(main)
