"""`python -m cps_ray.sweep FILE`: searches, compares the best trial with baselines, and exports the best model.

    python -m cps_ray.sweep sweeps/quickstart.yaml
    python -m cps_ray.sweep sweeps/cityscapes.yaml --dry-run 5
    python -m cps_ray.sweep sweeps/camvid.yaml --set budget.trials=30 --name camvid-long
    python -m cps_ray.sweep resume runs/camvid-long --trials 50
    python -m cps_ray.sweep resume runs/camvid-long --file sweeps/camvid-long.yaml
    python -m cps_ray.sweep status runs/camvid-long --watch

If there is no such file, FILE is the name of a shipped sweep, such as `quickstart`; its paths count from the working directory.

Exit codes: 0 done; 1 a bug, a full disk and the like; 2 wrong input; 3 no trial completed; 4 stopped by the `failures` limits; 5 can never be scheduled;
130/143 interrupted, resumable.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cps_ray.command import add_cluster_flags, checked, command_parser, entry, reported, run_command, say
from cps_ray.config.checks import remarks
from cps_ray.config.reader import read_sweep, sweep_file
from cps_ray.config.schema import Where
from cps_ray.config.space import apply, preview
from cps_ray.config.sweep import FINGERPRINT, SweepConfig
from cps_ray.errors import ConfigError, DataError
from cps_ray.text import did_you_mean, nearest, printable

if TYPE_CHECKING:
    from rich.console import Console

    from cps_ray.datasets.shards import Shards
    from cps_ray.engine.preflight import Preflight
    from cps_ray.results import SweepResults

_VERBS = ("run", "resume", "status", "best")
_DRAWS = "5"
_REDRAW_S = 2
_COLUMNS = ("number", "state", "steps", "score_best", "seconds")
_PARAMS = "params."
_WITH_VALUE = (
    "--dry-run",
    "--set",
    "--name",
    "--output",
    "--address",
    "--trials",
    "--time",
    "--patience",
    "--file",
    "--wait",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; a file without a verb means `run`. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return reported(lambda: run_command(_parser(), lambda args: int(args.run(args)), _verb_first(words)))


def _verb_first(words: list[str]) -> list[str]:
    """Returns the words as argparse wants them: it has no default for a sub-command, and would take FILE for the N of --dry-run."""
    following = [*words[1:], ""][: len(words)]
    words = [
        f"{word}={_DRAWS}" if word == "--dry-run" and not n.removeprefix("-").isdigit() else word
        for word, n in zip(words, following, strict=True)
    ]
    at = 0
    while at < len(words) and words[at].startswith("-"):
        at += 2 if words[at] in _WITH_VALUE else 1
    verb = words[at] if at < len(words) else ""
    if verb in _VERBS:
        return [verb, *words[:at], *words[at + 1 :]]
    if not verb and {"-h", "--help"} & set(words):
        return words
    if nearest(verb, _VERBS) and not Path(verb).exists() and len(words) > at + 1:
        _parser().error(f"there is no file {verb}.{did_you_mean(verb, _VERBS)}")
    return ["run", *words] if words else words


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("sweep", __doc__)
    verbs = parser.add_subparsers(required=True, metavar="FILE | resume | status | best")
    run = verbs.add_parser("run", help="run the sweep in FILE (the word `run` may be left out)", allow_abbrev=False)
    run.add_argument("file", type=Path, help="a sweep, or the name of a shipped one, such as quickstart")
    run.add_argument(
        "--dry-run", type=_draws, metavar="N", help="check everything, show N draws (default 5), start nothing"
    )
    run.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting, as in budget.trials=10"
    )
    run.add_argument("--name", help="another name, hence another sweep folder")
    run.add_argument("--output", type=Path, help="another folder for sweep folders")
    run.add_argument("--fresh", action="store_true", help="move an existing sweep folder aside")
    add_cluster_flags(run)
    run.set_defaults(run=_run)
    resume = verbs.add_parser("resume", help="continue an interrupted sweep, or extend a finished one")
    resume.add_argument("folder", type=Path)
    resume.add_argument(
        "--file",
        type=Path,
        help="an edited sweep: budget, failures, concurrency, baselines, final, wider bounds of the search space",
    )
    resume.add_argument("--trials", type=int, help="another budget of trials, those so far included")
    resume.add_argument(
        "--time", type=_seconds_or_text, help="a larger budget of wall time, over all sessions, such as 10h"
    )
    resume.add_argument("--patience", type=int, help="another number of trials that may end without a better value")
    resume.add_argument(
        "--set",
        choices=[f"{FINGERPRINT}=null"],
        help="go on although the data are no longer those it began with",
    )
    add_cluster_flags(resume)
    resume.set_defaults(run=_resume)
    status = verbs.add_parser(
        "status", help="show the trials so far, and the verdict; only reads, also while the sweep runs"
    )
    status.add_argument("folder", type=Path)
    form = status.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON document, for scripts")
    form.add_argument(
        "--watch", action="store_true", help=f"draw it again every {_REDRAW_S} s, until the sweep ends, or Ctrl-C"
    )
    status.set_defaults(run=_status)
    best = verbs.add_parser("best", help="print the best configuration, a file that trains as it is")
    best.add_argument("folder", type=Path)
    best.set_defaults(run=_best)
    return parser


def _given(**flags: object) -> dict[str, object]:
    return {name: value for name, value in flags.items() if value is not None}


def _seconds_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _draws(text: str) -> int:
    return checked(int, text, lambda count: count >= 0, "a whole number of at least 0")


def _run(args: argparse.Namespace) -> int:
    config, where = read_sweep(args.file, args.set, _given(name=args.name, output=args.output and str(args.output)))
    if args.dry_run is not None:
        return _dry_run(config, where, args.dry_run, args.file.parent)
    from cps_ray.search.lock import locked

    root = config.output / config.name
    with locked(root) if root.exists() else nullcontext():
        # Imported only now, because torch and Ray take seconds, and --help, a wrong file and a folder in use need neither.
        from rich.console import Console

        from cps_ray.datasets.open import write_image_hashes
        from cps_ray.search import sweep, sweep_folder

        config = sweep_folder.with_fingerprints(config)
        shards = sweep_folder.check(config, where, args.file.parent)
        with sweep_folder.begun(config, sweep_file(args.file), fresh=args.fresh, address=args.address):
            write_image_hashes(root, shards)
            return sweep.Sweep(config, root, Console(), args.address, args.wait).run(shards)


def _dry_run(config: SweepConfig, where: Where, draws: int, hashes_in: Path) -> int:
    """Checks the sweep and prints random draws; needs neither data nor a cluster, but reports missing data. `hashes_in`: as `open_data` takes it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cps_ray.engine.preflight import check_sweep, searched_networks

    shards, data = _data(config, hashes_in)
    preflight = _preflight(config, shards)
    check_sweep(preflight, config, where)
    console = Console()
    table = Table(
        title=f"{config.name}: {draws} random draws of {config.budget.trials} trials", title_justify="left", box=None
    )
    for name in config.search_space:
        table.add_column(Text(name), justify="right")
    for changes in preview(config.search_space, draws, config.sampler.seed):
        cells = [changes.get(name, "-") for name in config.search_space]
        table.add_row(*(Text(_cell(value)) for value in cells))
    console.print(table)
    steps = config.train.schedule.steps
    searches = [
        f"{baseline.trials or config.budget.trials} for baseline {name}"
        for name in (config.baselines if config.final.retrain == "best" else ())
        if (baseline := config.baseline(name)).search
    ]
    trials = ", ".join([f"{config.budget.trials} trials", *searches])
    if config.num_searches > 1:
        trials = f"{config.num_searches} times, once a fold: {trials}"
    plan = f"{trials} of up to {steps} steps, then {config.num_final_runs} final runs."
    normalised = (f"Images for {encoder}: {text}" for encoder, text in searched_networks(config).items())
    filled = (f"{text}." for text in preflight.filled)
    say(console, *remarks(config), *_earlier(config))
    say(console, f"{plan} Every draw is a valid training.", *normalised, *filled, *data.split("\n"))
    return 0


def _earlier(config: SweepConfig) -> list[str]:
    """Returns what a warm start would take. ConfigError if it cannot."""
    if not config.warm_start:
        return []
    from cps_ray.search.warm_start import earlier_trials

    return earlier_trials(config)[1]


def _cell(value: object) -> str:
    if value is None:
        return "null"
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def _data(config: SweepConfig, hashes_in: Path) -> "tuple[Shards | None, str]":
    """Returns the data if they are there, and a sentence about them. DataError if they are not those of the sweep."""
    from cps_ray.datasets.loader import check_data
    from cps_ray.datasets.open import open_data
    from cps_ray.datasets.shards import open_shards

    data = config.train.data
    if data.synthetic is not None and not data.shards.exists():
        return None, f"Data: {data.shards} will be drawn on first use."
    try:
        shards = open_shards(data.shards, data.prepare)
        check_data(shards, apply(config.train, config.searched_fold(), "trials"))
    except DataError as err:
        known = isinstance(config.train.evaluation.window_px, tuple)
        untried = "" if known else "\nUntil then networks are tried on crops, not on whole images."
        return None, f"Data is missing: {err}{untried}"
    open_data(data, None, hashes_in=hashes_in, setting=FINGERPRINT)
    return shards, f"Data: {data.shards} is there."


def _preflight(config: SweepConfig, shards: "Shards | None") -> "Preflight":
    from cps_ray.datasets.loader import evaluated_sizes
    from cps_ray.engine.preflight import Preflight

    synthetic, window = config.train.data.synthetic, config.train.evaluation.window_px
    if shards is not None:
        return Preflight(
            len(shards.classes), evaluated_sizes(shards, apply(config.train, config.searched_fold(), "trials"))
        )
    if synthetic is not None:
        return Preflight(image_sizes=[(synthetic.height_px, synthetic.width_px)])
    return Preflight(image_sizes=[window] if isinstance(window, tuple) else [])


def _resume(args: argparse.Namespace) -> int:
    from cps_ray.results import SWEEP_FILE, open_sweep
    from cps_ray.search.edits import edited, read_begun
    from cps_ray.search.lock import locked

    open_sweep(args.folder)  # ConfigError where there is no sweep
    root = args.folder.absolute()
    with locked(root):
        changes = _given(**{"budget.trials": args.trials, "budget.time": args.time, "budget.patience": args.patience})
        begun = read_begun(root)
        read, where = read_sweep(
            args.file or args.folder / SWEEP_FILE, [args.set] if args.set else [], changes, begun=True
        )
        config = edited(begun, read, where, other_data=bool(args.set))
        # Imported only now, because torch and Ray take seconds, and a folder in use and a wrong setting need neither.
        from rich.console import Console

        from cps_ray.datasets.open import write_image_hashes
        from cps_ray.search import sweep, sweep_folder
        from cps_ray.search.study import SweepStudy

        study = SweepStudy(config, root)
        study.check_space(where)
        num_begun = len(study.trials)
        if config.budget.trials < num_begun:
            raise ConfigError(
                f"{where(('budget', 'trials'))}: must be at least {num_begun}, as many trials as {args.folder} has begun. "
                "It is the number in all, not of further ones."
            )
        if args.set or args.file:
            config = sweep_folder.with_fingerprints(config)
        shards = sweep_folder.check(config, where, root)
        # Stored, so that a later `resume` keeps a larger budget, and compares with this sweep and these data.
        sweep_folder.write_session(root, config, args.address, args.file and sweep_file(args.file))
        if args.set:
            write_image_hashes(root, shards)
        return sweep.Sweep(config, root, Console(), args.address, args.wait).run(shards)


def _status(args: argparse.Namespace) -> int:
    from rich.console import Console

    from cps_ray.results import open_sweep

    sweep = open_sweep(args.folder)
    if args.json:
        print(_status_json(sweep))
        return 0
    console = Console()
    if args.watch:
        _watch(sweep, console)
    say(console, *_status_lines(sweep, sweep.summary))
    return 0


def _status_json(sweep: "SweepResults") -> str:
    summary = sweep.summary
    document = {
        "name": summary["name"],
        "status": summary["status"],
        "counts": summary["trials"],
        "trials": sweep.trials.to_pylist(),
        "best": summary["best"],
        "final": summary["final"],
        "verdict": sweep.verdict,
    }
    # JSON has no NaN, which a training that has diverged may have measured.
    return json.dumps(json.loads(json.dumps(document), parse_constant=lambda _: None), indent=2)


def _watch(sweep: "SweepResults", console: "Console") -> None:
    """Draws the status again and again, until the sweep ends or Ctrl-C, and wipes it out at the end."""
    from rich.live import Live
    from rich.text import Text

    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop") as live,
    ):
        while (summary := sweep.summary)["status"] == "running":
            # rich cannot redraw what has scrolled out of the window: the trials that fit into it, those that run as the last ones.
            lines = [printable(line) for line in _status_lines(sweep, summary, max(1, console.height - 6))]
            live.update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"), refresh=True)
            time.sleep(_REDRAW_S)


def _status_lines(sweep: "SweepResults", summary: dict[str, Any], limit: int | None = None) -> list[str]:
    """Returns a line about the sweep, a table of its trials (at most the last `limit`, those that run behind the others), and its verdict."""
    from rich.cells import cell_len

    counts = "  ".join(f"{count} {state}" for state, count in summary["trials"].items() if state != "budget" and count)
    table = sweep.trials
    names = [*_COLUMNS, *(name for name in table.column_names if name.startswith(_PARAMS))]
    rows = table.select(names).to_pylist()
    if limit is not None:
        rows = sorted(rows, key=lambda row: bool(row["state"] == "running"))[-limit:]
    cells = [[printable(name.removeprefix(_PARAMS)) for name in names]]
    cells += [["-" if row[name] is None else _cell(row[name]) for name in names] for row in rows]
    # Not by rich's Table, which takes a second for a thousand rows, and breaks them where there is no terminal.
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    return [
        f"{summary['name']}: {summary['status']}, {counts or 'none begun'}, of {summary['trials']['budget']} trials",
        *("  ".join(" " * (n - cell_len(cell)) + cell for n, cell in zip(widths, line, strict=True)) for line in cells),
        *sweep.verdict.split("\n"),
    ]


def _best(args: argparse.Namespace) -> int:
    path = args.folder / "best.yaml"
    if not path.is_file():
        raise ConfigError(f"{path}: no trial of this sweep has completed yet, or this is no sweep folder.")
    print(path.read_text(), end="")
    return 0


if __name__ == "__main__":
    entry(main)
