"""`python -m cps_ray.export`: a model as one file that needs no cps_ray, compared with the model on real images before it is kept.

The file takes `image`, uint8 (N, H, W, 3), RGB, and gives `labels`, uint8 (N, H, W), and `probabilities`, float32 (N, classes, H, W).
Normalising, padding, upsampling and, of an ensemble, the mean are in it. It predicts an image in one piece: windows, scales and
mirrored views, where the model has them, are not in it. What differs too far, or cannot be compared, is not written.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cps_ray.command import checked, command_parser, entry, run_command, say
from cps_ray.errors import ConfigError
from cps_ray.text import display_path

if TYPE_CHECKING:
    from cps_ray.model.exporting import Format

EXAMPLES = """\
examples:
  python -m cps_ray.export runs/mine/best --onnx
  python -m cps_ray.export runs/mine/best --onnx --network ensemble --shards data/mine/shards --split test
  python -m cps_ray.export runs/mine/best --onnx --size 512 1024 --int8
  python -m cps_ray.export runs/mine/best --torch segmenter.pt2 --images photos
Real images are those of val that trained the model, where they still are; else --shards or --images names some."""


def _positive(text: str) -> int:
    return checked(int, text, lambda value: value > 0, "a whole number above 0")


def _tolerance(text: str) -> float:
    return checked(float, text, lambda value: value >= 0, "a number of at least 0")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("export", __doc__, EXAMPLES)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the model, such as best/ of a sweep")
    # "": the default name, which needs the model.
    parser.add_argument("--onnx", nargs="?", const="", metavar="FILE", help="ONNX (default: model.onnx in MODEL)")
    parser.add_argument(
        "--torch",
        nargs="?",
        const="",
        metavar="FILE",
        help="what torch.export.load reads (default: model.pt2 in MODEL)",
    )
    parser.add_argument("--network", help="a, b, ..., or ensemble (default: the one that the training was measured by)")
    parser.add_argument(
        "--size",
        nargs=2,
        type=_positive,
        metavar=("H", "W"),
        help="fixed height and width in px, and one image at a time (default: any)",
    )
    parser.add_argument("--opset", type=_positive, metavar="N", help="of ONNX, at least 18 (default: what torch takes)")
    parser.add_argument("--images", type=Path, metavar="IMAGES", help="image or folder of images to compare on")
    parser.add_argument(
        "--shards", type=Path, help="prepared data set to compare on (default: the one of the training, if it is here)"
    )
    parser.add_argument("--split", default="val", help="its split (default val)")
    precision = parser.add_mutually_exclusive_group()
    for name, what in (("fp16", "networks in float16"), ("int8", "convolutions and matrix products in int8")):
        precision.add_argument(
            f"--{name}",
            dest="precision",
            action="store_const",
            const=name,
            help=f"{what}; needs masks, by which the loss of mIoU is measured",
        )
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        default=1e-3,
        metavar="P",
        help="largest difference of a probability (default 0.001); 99.99 %% of the labels must be equal, too",
    )
    parser.add_argument(
        "--tolerance-miou",
        type=_tolerance,
        default=1.0,
        metavar="POINTS",
        help="points of mIoU that fp16 and int8 may lose (default 1)",
    )
    parser.add_argument(
        "--plugins", action="store_true", help="run code outside cps_ray that the model names by import path"
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    # Imported only now, because --help needs none of it.
    from rich.console import Console

    from cps_ray.model.exporting import (
        ExportOptions,
        check_options,
        default_file,
        export_model,
        find_real_images,
        left_out,
        usage,
    )
    from cps_ray.model.model import load_model

    both: dict[Format, str | None] = {"onnx": args.onnx, "torch": args.torch}
    given = {name: file for name, file in both.items() if file is not None}
    if not given:
        raise ConfigError("give --onnx, --torch or both: the form in which the model is to be exported.")
    options = ExportOptions(
        size=tuple(args.size) if args.size else None,
        precision=args.precision or "float32",
        opset=args.opset,
        tolerance=args.tolerance,
        tolerance_miou=args.tolerance_miou,
    )
    check_options(options, given)
    model = load_model(args.model, device="cpu", network=args.network, plugins=args.plugins)
    real = find_real_images(model, options, images=args.images, shards=args.shards, split=args.split)
    for name, file in given.items():
        target = Path(file) if file else default_file(model, name, options.precision)
        written = export_model(model, target, name, real, options)
        lines = [*_summary(target, written), left_out(model), "Use it:", "", *usage(target, written).splitlines()]
        say(Console(), *lines, "")
    return 0


def _summary(target: Path, written: dict[str, Any]) -> list[str]:
    parity = written["parity"]
    opset = f", opset {written['opset']}" if "opset" in written else ""
    size = "images of any size" if written["dynamic"] else "one image of {}x{} px".format(*written["size"])
    speed = parity["images_per_s"]
    return [
        f"{display_path(target)}: network {written['network']}, {written['precision']}, {written['bytes'] / 1e6:.1f} MB{opset}, {size}",
        f"Compared on {parity['images']} images ({parity['source']}): probabilities differ by up to {parity['largest_difference']:.2g}, "
        f"{100 * parity['equal_labels']:.3f} % of the labels are equal ({100 * parity['equal_to_predict']:.2f} % to cps-ray predict).",
        *(
            [
                f"mIoU {100 * parity['miou']:.2f} % on {parity['split']}, the model's {100 * parity['miou_of_model']:.2f} %."
            ]
            if "miou" in parity
            else []
        ),
        f"Images per second with {parity['threads']} thread(s): {speed['torch']:.2f} by the model, {speed['exported']:.2f} by the file.",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Exports, prints how far the file differs, and returns the exit code: 0, or that of the error it printed."""
    return run_command(_parser(), _run, argv)


if __name__ == "__main__":
    entry(main)
