"""`cps-ray COMMAND ...` and `python -m cps_ray COMMAND ...`: the same as `python -m cps_ray.COMMAND ...`."""

import importlib
import os
import sys

from cps_ray import __version__
from cps_ray.text import did_you_mean

COMMANDS = {
    "init": "photos and masks -> a recipe and a first sweep that run as they are",
    "prepare": "raw data set -> checked Parquet shards",
    "inspect": "prepared shards -> checks, statistics, contact sheets and a page",
    "subsets": "which training images are labelled: drawn or published lists",
    "encoders": "encoders and pretrained weights: size, licence, whether they run at a crop",
    "sweep": "search, compare and export: one YAML file to best.yaml",
    "train": "one training, such as best.yaml",
    "predict": "a model and photos -> label maps, overlays and a table",
    "evaluate": "a model on images with masks: scores per class, confusion, worst images",
    "suggest": "which images to label next, with drafts of their masks",
    "pseudolabel": "a model's confident labels as masks of a data set to train on",
    "export": "a model -> ONNX or torch.export, checked against the model on real images",
    "bench": "speed and memory, measured side by side",
    "schema": "JSON schema of a sweep or a training, for editors",
}


def main() -> int:
    """Runs the command named by the first argument."""
    if sys.argv[1:2] == ["splits"]:
        print("error: `splits` is called `subsets` now: cps-ray subsets ...", file=sys.stderr)
        return 2
    if sys.argv[1:] == ["--version"]:
        print(f"cps-ray {__version__}")
        return 0
    if sys.argv[1:] and not sys.argv[1].startswith("-") and sys.argv[1] not in COMMANDS:
        hint = did_you_mean(sys.argv[1], COMMANDS) or f" There are {', '.join(COMMANDS)}."
        print(f"error: {sys.argv[1]!r} is no command.{hint}", file=sys.stderr)
        return 2
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(
            "usage: cps-ray COMMAND ...\n", *(f"  {name:<13}{summary}" for name, summary in COMMANDS.items()), sep="\n"
        )
        print("\n`cps-ray COMMAND --help` shows its options.")
        return 0 if sys.argv[1:] in (["--help"], ["-h"]) else 2
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: plug-ins lie in the working directory
    from cps_ray.command import reported

    return reported(_run_command)


def _run_command() -> int:
    name = sys.argv.pop(1)  # the command parses what is left of sys.argv
    module = "cps_ray.bench.__main__" if name == "bench" else f"cps_ray.{name}"
    command = importlib.import_module(module)
    return int(command.main())


if __name__ == "__main__":
    sys.exit(main())
