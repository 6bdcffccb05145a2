"""Speed and memory, measured side by side: `python -m cps_ray.bench WHAT`. No other package imports this one."""

from rich.console import Console


def wide() -> Console:
    """Returns a console that is 120 columns wide where the output is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
