"""What all commands have in common: their parser, errors as one line and an exit code, and a progress bar.

Imports little, and rich only where a bar is drawn: an import that fails is reported in one line, too.
"""

import argparse
import contextlib
import os
import platform
import select
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from cps_ray import __version__
from cps_ray.errors import ConfigError, CpsRayError, place
from cps_ray.text import in_words, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

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
    """Parses `argv` (None: the process's own arguments) and returns the exit code of `run`, or that of the error it printed."""
    # Ray warns that many idle processes were started: a trial's helpers are actors that take no CPU; and of each process that
    # died it has a page, where we say what follows. Ray reads the variable when it is imported, which commands do only inside `run`.
    os.environ.setdefault(
        "RAY_DEDUP_LOGS_SKIP_REGEX", "PYTHON worker processes have been started|A worker died or was killed"
    )
    return reported(lambda: run(parser.parse_args(argv)))


def reported(work: Callable[[], int]) -> int:
    """Returns the exit code of `work`, or, whatever it raises, prints one line on stderr and returns the exit code for that."""
    # Names of files and classes may hold what the terminal's encoding has not.
    with contextlib.suppress(AttributeError):  # None where it is closed, or a stand-in
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            return work()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here: the interpreter would flush only after all of us
    except SystemExit:
        raise
    except BaseException as err:
        return _report(err)


def _report(err: BaseException) -> int:
    if isinstance(err, KeyboardInterrupt):
        return 130
    is_reader_gone = isinstance(err, BrokenPipeError) and _nobody_reads()
    if isinstance(err, OSError):
        _flush_for_the_last_time()
    if is_reader_gone:
        return 1  # `| head` has seen enough
    if isinstance(err, CpsRayError):
        text = str(err)
    else:
        text = ": ".join(part for part in (place(err), in_words(err)) if part) + f". {_kept(err)}"
    # Of a file that a person wrote, each fault has a line.
    lines = text.split("\n") if isinstance(err, ConfigError) else [text]
    with contextlib.suppress(OSError):
        print("error:", "\n".join(map(printable, lines)), file=sys.stderr)
    return err.exit_code if isinstance(err, CpsRayError) else 1


def _flush_for_the_last_time() -> None:
    """Gives up an output that takes nothing any more: the interpreter would flush it at its end, and complain again."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _nobody_reads() -> bool:
    """Whether stdout or stderr is a pipe that has been closed at its other end."""
    watch = select.poll()
    for stream in (1, 2):
        watch.register(stream, 0)
    return any(event & select.POLLERR for _, event in watch.poll(0))


def _kept(err: BaseException) -> str:
    """Writes the traceback to a file and says where that is."""
    trace = "".join(traceback.format_exception(err))
    text = f"{shlex.join(sys.argv)}\ncps_ray {__version__}, Python {platform.python_version()}\n\n{trace}"
    for folder in (None, os.curdir):  # None: the temporary folder, the first of several that can be written
        with contextlib.suppress(OSError):
            handle, path = tempfile.mkstemp(prefix="cps-ray-error-", suffix=".txt", dir=folder)
            with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return f"The traceback is in {path}"
    return "The traceback is lost: neither the temporary folder nor this one can be written"


def _report_uncaught(kind: type[BaseException], err: BaseException, trace: TracebackType | None) -> None:
    _report(err)


# `python -m cps_ray.NAME` imports all of NAME before any of its code could catch an error. Other processes stay as they are.
_main = getattr(sys.modules["__main__"], "__spec__", None)
if _main is not None and _main.name.startswith("cps_ray."):
    sys.excepthook = _report_uncaught


def checked(number: Callable[[str], N], text: str, holds: Callable[[N], bool], must_be: str) -> N:
    """Returns the number in an argument. For anything else raises what argparse prints as it is: it would name our function otherwise."""
    with contextlib.suppress(ValueError):
        value = number(text)
        if holds(value):
            return value
    raise argparse.ArgumentTypeError(f"must be {must_be}, but got {text!r}.")


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --address and --wait."""
    parser.add_argument("--address", help="join this Ray cluster instead of starting one")
    parser.add_argument(
        "--wait",
        type=_wait_s,
        metavar="TIME",
        help="wait so long, such as 10m, for nodes that join the cluster at --address late, or that it is scaled up by",
    )


def _wait_s(text: str) -> float:
    from cps_ray.config.sweep import seconds

    return checked(lambda text: float(seconds(text)), text, lambda value: value > 0, "a duration, such as 90s or 10m")


def entry(main: Callable[[Sequence[str] | None], int]) -> None:
    """Ends the process with the exit code of `main`, as `python -m cps_ray.NAME` does."""
    code = main(None)
    if code > 128:
        os._exit(code)  # interrupted: nobody waits for seconds until torch and Ray are unloaded; all is flushed
    sys.exit(code)


def say(console: "Console", *lines: str) -> None:
    """Prints lines as they are: no name in them is markup, steers the terminal or is broken at its width."""
    from rich.text import Text

    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)


def image_bar(description: str) -> "Progress":
    """Returns a bar on stderr that counts images, with rate and time left; it shows nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.0f} images/s" if task.speed else "")

    console = Console(stderr=True)
    console.quiet = not console.is_terminal  # rich before 14.3 ends even a disabled bar with an empty line
    columns = (TextColumn(description), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
