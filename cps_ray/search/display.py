"""What a sweep shows while it runs: a live table on a terminal, one line per event elsewhere."""

import time
from collections import Counter, deque
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cps_ray.search.records import Event
from cps_ray.text import printable, show_params

_FINISHED_SHOWN = 8
_STYLES = {"finished": "green", "pruned": "yellow", "collapsed": "magenta", "failed": "red", "running": "cyan"}
"""State of a run -> its colour."""


class Display(Protocol):
    """Shows events as they come."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def on_event(self, event: Event) -> None:
        """Takes every event."""


def make_display(name: str, console: Console) -> Display:
    """Returns a live table on a terminal, lines elsewhere."""
    return LiveTable(name, console) if console.is_terminal else Lines(console)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


class Lines:
    """One line per event, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def on_event(self, event: Event) -> None:
        text = _sentence(event)
        if text:
            clock = _clock(time.monotonic() - self._start)
            # Text: a failure may hold square brackets. Soft wrap: a log's line is never broken.
            self._console.print(Text(printable(f"{clock}  {text}")), soft_wrap=True)


def _sentence(event: Event) -> str:
    kind, run = event["event"], event.get("run")
    if kind == "started":
        params = show_params(event.get("params", {}))
        return f"{run}  started  {params}".rstrip()
    if kind == "report":
        return f"{run}  step {event['step']}/{event['steps']}  {event['value']:.4f}"
    if kind == "finished":
        return f"{run}  finished  best {event['value']:.4f}"
    if kind == "pruned":
        return f"{run}  pruned at step {event['step']}  best {event['value']:.4f}"
    if kind in ("failed", "collapsed"):
        return f"{run}  {kind}: {event['failure']}"
    if kind == "best":
        return f"{run}  is the new best: {event['value']:.4f}"
    return str(event["text"]) if kind in ("phase", "notice") else ""


class LiveTable:
    """A table that rich redraws in place, from a thread of its own."""

    def __init__(self, name: str, console: Console) -> None:
        self._name = name
        self._start = time.monotonic()
        self._running: dict[str, dict[str, Any]] = {}
        self._ended: deque[tuple[str, dict[str, Any]]] = deque(maxlen=_FINISHED_SHOWN)
        self._counts: Counter[str] = Counter()
        self._notice = ""
        self._best: tuple[str, float] | None = None
        self._phase = "search"
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._render, vertical_overflow="crop")

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._live.__exit__(*details)

    def on_event(self, event: Event) -> None:
        """Takes an event into the rows; the table is drawn later, by rich's own thread."""
        kind = event["event"]
        if kind == "phase":
            self._phase = str(event["text"])
        elif kind == "notice":
            self._notice = str(event["text"])
        elif kind == "best":
            self._best = (event["run"], event["value"])
        elif "run" in event:
            self._take(event["run"], kind, event)

    def _take(self, run: str, kind: str, event: Event) -> None:
        row = self._running.setdefault(run, {"state": "", "since": time.monotonic(), "params": {}, "steps": 0})
        if kind == "started":
            row |= {
                "state": "starting",
                "params": event.get("params", {}),
                "since": time.monotonic(),
                "steps": event["steps"],
            }
        elif kind == "report":
            best = max(row.get("best", event["value"]), event["value"])
            row |= {"state": "running", "step": event["step"], "last": event["value"], "best": best}
            self._notice = ""  # of what was waited for
        else:  # finished, pruned, collapsed or failed: the clock of this row stops
            row |= {"state": kind, "seconds": time.monotonic() - row["since"], "failure": event.get("failure", "")}
            self._ended.append((run, self._running.pop(run)))
            self._counts[kind] += 1

    def _render(self) -> Group:
        head = Text(f"{self._name}", style="bold")
        head.append(f"   {self._phase}   {_clock(time.monotonic() - self._start)}   ", style="not bold")
        for state, style in _STYLES.items():
            # Starting takes seconds and no decision: for the count it is running.
            count = len(self._running) if state == "running" else self._counts[state]
            head.append(f"{count} {state}   ", style=style if count else "dim")
        best = Text("best  ", style="bold")
        best.append(
            "none yet" if self._best is None else f"{self._best[1]:.4f}  trial {self._best[0]}", style="not bold green"
        )
        notice = [Text(printable(self._notice), style="yellow")] if self._notice else []
        return Group(head, best, *notice, self._table())

    def _table(self) -> Table:
        table = Table(box=None, header_style="dim", pad_edge=False)
        for column, side in (
            ("run", "left"),
            ("state", "left"),
            ("step", "right"),
            ("last", "right"),
            ("best", "right"),
            ("time", "right"),
        ):
            table.add_column(column, justify=side, no_wrap=True)  # type: ignore[arg-type]
        table.add_column("settings", overflow="fold")
        # Running ones last, and only a few of the ended ones: rich cannot redraw what has scrolled out of the window. Copies: events come
        # in another thread.
        for name, row in [*self._ended, *self._running.items()]:
            seconds = row.get("seconds", time.monotonic() - row["since"])
            last, best = (f"{row[key]:.4f}" if key in row else "" for key in ("last", "best"))
            # Why it failed is worth more than what it tried; that stands in trials.csv.
            about = row.get("failure") or show_params(row["params"])
            step = f"{row.get('step', 0)}/{row['steps']}"
            cells = (name, row["state"], step, last, best, _clock(seconds), about)
            # Text, not a string: rich would take square brackets for markup, and drop them.
            table.add_row(*(Text(printable(cell)) for cell in cells), style=_STYLES.get(row["state"], "dim"))
        return table
