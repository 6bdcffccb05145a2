"""Speed and memory, measured side by side: `python -m cps_ray.bench WHAT`. Nothing here is imported by anything else."""

from rich.console import Console


def wide() -> Console:
    """A console that does not squeeze tables into 80 columns where the output is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
