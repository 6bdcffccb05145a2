"""What the commands share: errors become one line and an exit code."""

import os
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from cps_ray.errors import CpsRayError


def guarded(run: Callable[[], int]) -> int:
    """The exit code of `run`; a CpsRayError is printed as one line on stderr."""
    # Ray warns that many idle processes were started: a trial's helpers are actors that take no CPU. Read at import.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "PYTHON worker processes have been started")
    try:
        return run()
    except CpsRayError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    except KeyboardInterrupt:
        return 130


def entry(main: Callable[[Sequence[str] | None], int]) -> None:
    """`python -m cps_ray.<command>`."""
    sys.exit(main(None))


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.0f} images/s" if task.speed else "")


def image_bar(doing: str) -> Progress:
    """A bar on stderr that counts images, with rate and time left; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
