"""Speed and memory, measured side by side: `python -m cps_ray.bench WHAT`. No other package imports this one."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def wide() -> "Console":
    """Returns a console that is 120 columns wide where the output is no terminal."""
    from rich.console import Console  # here: --help needs none

    console = Console()
    return console if console.is_terminal else Console(width=120)
