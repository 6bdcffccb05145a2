"""What all commands have in common: their parser, errors as one line and an exit code, and a progress bar."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from cps_ray.errors import CpsRayError

N = TypeVar("N", int, float)

# Here, because every command imports this module first: without fcntl the next import would end in a traceback.
if sys.platform != "linux":
    sys.exit(f"error: cps_ray runs on Linux alone (on Windows in WSL 2), and this is {sys.platform}")


def command_parser(name: str, description: str | None, examples: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser of `python -m cps_ray.NAME`. Both texts keep their line breaks; `examples` come last in the help."""
    return argparse.ArgumentParser(
        prog=f"python -m cps_ray.{name}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None
) -> int:
    """Parses `argv` (None: the process's own arguments) and returns the exit code of `run`.

    A CpsRayError is printed as one line on stderr, and its `exit_code` returned.
    """
    args = parser.parse_args(argv)
    # Ray warns that many idle processes were started: a trial's helpers are actors that take no CPU. Ray reads the
    # variable when it is imported, which commands do only inside `run`.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "PYTHON worker processes have been started")
    try:
        return run(args)
    except CpsRayError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    except KeyboardInterrupt:
        return 130


def checked(number: Callable[[str], N], text: str, holds: Callable[[N], bool], must_be: str) -> N:
    """Returns the number in an argument. For anything else raises what argparse prints as it is: it would name our function otherwise."""
    with contextlib.suppress(ValueError):
        value = number(text)
        if holds(value):
            return value
    raise argparse.ArgumentTypeError(f"must be {must_be}, but got {text!r}.")


def entry(main: Callable[[Sequence[str] | None], int]) -> None:
    """Ends the process with the exit code of `main`, as `python -m cps_ray.NAME` does."""
    sys.exit(main(None))


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.0f} images/s" if task.speed else "")


def image_bar(description: str) -> Progress:
    """Returns a bar on stderr that counts images, with rate and time left; it shows nothing where stderr is no terminal."""
    console = Console(stderr=True)
    console.quiet = not console.is_terminal  # rich before 14.3 ends even a disabled bar with an empty line
    columns = (TextColumn(description), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
