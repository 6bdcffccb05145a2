"""`python -m cps_ray.encoders`: which encoders there are, how large they are, and whether their weights may be used.

Without a pattern it lists families to begin with. Nothing is fetched, and no network needs memory.
"""

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cps_ray.command import command_parser, entry, run_command, say
from cps_ray.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = """\
examples:
  python -m cps_ray.encoders
  python -m cps_ray.encoders 'tu-vit_small*dino*' --crop 448x448
  python -m cps_ray.encoders 'resnet*' --crop 512x512 --architecture unet
In a config: `model: {encoder: ENCODER, weights: WEIGHTS}`, and `architecture: dpt` where the table says so."""
_MAX_ROWS = 25
_UNBOUNDED = 10_000
_FAMILIES = (
    ("resnet*", "ResNet and ResNeXt: what papers compare with", "bsd-3-clause; ssl, swsl, instagram non-commercial"),
    ("tu-convnext*", "ConvNeXt, many sizes and pretrainings", "mostly apache-2.0, some non-commercial"),
    ("tu-vit*dinov2*", "DINOv2: foundation models, architecture dpt", "apache-2.0"),
    ("tu-vit*dinov3*", "DINOv3: foundation models, architecture dpt", "dinov3-license: commercial use on its terms"),
    ("tu-convnext*dinov3*", "DINOv3 in CNNs, for every architecture", "dinov3-license: commercial use on its terms"),
    ("tu-mobilenetv4*", "MobileNetV4: small and quick, also on CPUs", "apache-2.0"),
    ("tu-efficientnet*", "EfficientNet", "apache-2.0"),
    ("mit_b*", "SegFormer's encoders", "NVIDIA's, non-commercial"),
)
"""Pattern, what it finds, and licences in short."""


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("encoders", __doc__, EXAMPLES)
    parser.add_argument(
        "pattern",
        nargs="?",
        metavar="PATTERN",
        help="glob over encoders of smp and, as tu-NAME, of timm, such as 'tu-convnext*'",
    )
    parser.add_argument(
        "--crop", metavar="HxW", help="also say whether each runs on images of this size in px, such as 512x512"
    )
    parser.add_argument(
        "--architecture",
        metavar="NAME",
        help="with --crop: the architecture it runs in (default deeplabv3plus, dpt for plain vision transformers)",
    )
    return parser


def _size_px(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or "0" in found.groups():
        raise ConfigError(f"--crop: must be HEIGHTxWIDTH in px, such as 512x512, but got {text!r}.")
    return int(found[1]), int(found[2])


def _print_families(console: "Console") -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("pattern", "what it finds", "licence of the weights")
    for family in _FAMILIES:
        table.add_row(*map(Text, family))
    console.print(table)
    say(console, "all of them: cps-ray encoders PATTERN, such as 'tu-*dinov3*' or 'tu-swin*'")


def _print_encoders(
    console: "Console", pattern: str, size_px: tuple[int, int] | None, architecture: str | None
) -> None:
    # Imported only now, because torch and timm take seconds, and --help needs neither.
    from rich.table import Column, Table
    from rich.text import Text

    from cps_ray.config.train import NetworkConfig
    from cps_ray.engine.encoders import matching, size_of, unusual_normalisation
    from cps_ray.engine.names import check_names
    from cps_ray.engine.preflight import refusal

    if architecture is not None:
        check_names(NetworkConfig(architecture=architecture, encoder="tu-resnet50"))
    found = matching(pattern)
    if not found:
        raise ConfigError(f"no encoder fits {pattern!r}. `python -m cps_ray.encoders` lists patterns to begin with.")
    titles = ["encoder", "weights", "M params", "licence of the weights", "mean; std", "divisor", "architecture"]
    titles += ["at the crop"] if size_px else []
    rows = []
    for weights in found[:_MAX_ROWS]:
        size = size_of(weights.encoder)
        licence = weights.licence or "none: from scratch"
        facts = (
            ("?", "?", "none")
            if size is None
            else (f"{size.parameters / 1e6:.1f}", str(size.divisor), size.architecture or "any")
        )
        row = [weights.encoder, weights.source, facts[0], licence, unusual_normalisation(weights), *facts[1:]]
        if size_px is not None:
            form = architecture or (size.architecture if size else None) or "deeplabv3plus"
            refused = refusal(NetworkConfig(architecture=form, encoder=weights.encoder), size_px)
            row.append(f"no: {refused}" if refused else f"runs in {form}")
        rows.append(row)
    table = Table(Column(titles[0], no_wrap=True), *titles[1:])
    for row in rows:
        table.add_row(*map(Text, row))
    # Narrower than its longest words, rich would cut them, and names are to be copied.
    if console.measure(table, options=console.options.update(width=_UNBOUNDED)).minimum <= console.width:
        console.print(table)
    else:
        for name, *facts_of in rows:
            named = zip(titles[1:], facts_of, strict=True)
            say(console, name, "    " + ", ".join(f"{title}: {fact}" for title, fact in named if fact))
    if len(found) > _MAX_ROWS:
        say(console, f"and {len(found) - _MAX_ROWS} more, narrow the pattern")
    if any(unusual_normalisation(weights) for weights in found[:_MAX_ROWS]):
        say(console, "mean; std: where they are not ImageNet's; ? = they come with the weights")


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console

    size_px = _size_px(args.crop) if args.crop else None
    console = Console()
    if args.pattern is None:
        _print_families(console)
    else:
        _print_encoders(console, args.pattern, size_px, args.architecture)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Lists encoders, and returns the exit code: 0, or that of the error it printed."""
    return run_command(_parser(), _run, argv)


if __name__ == "__main__":
    entry(main)
