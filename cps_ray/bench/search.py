"""`bench search`: how much of a grid of recorded trainings a search trains until it has one that is as good as the grid's best.

Trainings are recorded once, with all their evaluations. A search is then replayed in seconds: a trial that it draws is the recorded
training nearest to it, and costs the steps up to its end.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageDraw
from rich.table import Table

from cps_ray.bench import wide
from cps_ray.bench.methods import in_processes, threads_of
from cps_ray.config.reader import load_sweep, parse, parse_train
from cps_ray.config.space import apply
from cps_ray.config.sweep import ChoiceParam, Param, SweepConfig, Value
from cps_ray.datasets.loader import eval_batches, train_batches, train_data
from cps_ray.datasets.open import open_data
from cps_ray.datasets.show.picture import fit_text
from cps_ray.engine.cpu.threads import tune_cpu
from cps_ray.engine.evaluation import evaluate, summarise
from cps_ray.engine.loop import fit
from cps_ray.engine.normalisation import padding_color
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import TrainState, build_state
from cps_ray.engine.telemetry import Metrics
from cps_ray.errors import ConfigError, DivergedError
from cps_ray.files import write_json
from cps_ray.model.examples import FAINT, INK, PAPER
from cps_ray.search.plain import PRUNERS, plain_random, plain_tpe
from cps_ray.search.study import SweepStudy

Point = dict[str, Value]
Curve = dict[int, float]

_NEAR = 0.01
"""Relative distance from the grid's best value at which a search has found it."""
_MOST_TRIALS = 10_000
"""Trials of a replayed search, which its steps end long before."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A training of the grid."""

    point: Point
    curve: Curve
    """Step -> value of the objective; it ends before the last step where the training diverged."""


@dataclass(frozen=True, slots=True)
class Grid:
    """All trainings of a record, and the sweep whose search space they cover."""

    sweep: SweepConfig
    trainings: list[Recorded]

    @property
    def best(self) -> float:
        """The best value of a training that came to its end."""
        return max(max(one.curve.values()) for one in self.trainings if self.is_whole(one))

    @property
    def steps(self) -> int:
        """Steps of all trainings."""
        return sum(max(one.curve, default=0) for one in self.trainings)

    def is_whole(self, one: Recorded) -> bool:
        """Whether the training came to its end."""
        return max(one.curve, default=0) == self.sweep.train.schedule.steps

    def nearest(self, point: Mapping[str, Value]) -> Recorded:
        """Returns the training nearest to a point of the space; distances are fractions of the ranges."""
        return min(
            self.trainings, key=lambda one: sum(self._distance(name, one.point[name], point[name]) for name in point)
        )

    def _distance(self, name: str, one: Any, other: Any) -> float:
        param = self.sweep.search_space[name]
        if isinstance(param, ChoiceParam):
            return 0.0 if one == other else math.inf
        low, high, one, other = (math.log(x) if param.log else float(x) for x in (param.low, param.high, one, other))
        return ((one - other) / (high - low)) ** 2 if high > low else 0.0


class Search(Protocol):
    """A search that is replayed."""

    def ask(self) -> tuple[int, Point]:
        """Begins a trial: its number and its point."""

    def report(self, number: int, step: int, value: float) -> bool:
        """Reports an evaluation; False if the trial is to be stopped."""

    def tell(self, number: int, *, failed: bool) -> None:
        """Ends a trial."""


class Ours:
    """Our study, with the sampler of the sweep and a rule of early stopping, beginning at its `grace`."""

    def __init__(self, sweep: SweepConfig, seed: int, folder: Path, rule: str) -> None:
        sampler = sweep.sampler.model_copy(update={"seed": seed})
        stopping = sweep.early_stopping.model_copy(update={"type": rule})
        budget = sweep.budget.model_copy(update={"trials": _MOST_TRIALS, "patience": None})
        self._study = SweepStudy(
            sweep.model_copy(
                update={"sampler": sampler, "early_stopping": stopping, "budget": budget, "warm_start": []}
            ),
            folder,
        )

    def ask(self) -> tuple[int, Point]:
        found = self._study.ask()
        assert found is not None
        return found[0], self._study.trial(found[0]).params

    def report(self, number: int, step: int, value: float) -> bool:
        self._study.report(number, step, value)
        return not self._study.should_prune(number)

    def tell(self, number: int, *, failed: bool) -> None:
        self._study.tell(number, failure="diverged" if failed else None, collapsed=failed)


@dataclass(slots=True)
class _Live:
    number: int
    found: Recorded
    steps: list[int] = field(default_factory=list)
    """Steps of its evaluations that are still to come."""


def replay(search: Search, grid: Grid, at_once: int) -> float:
    """Returns the steps of all trials until one has come to its end with a value near the grid's best, as a fraction of the grid's steps; 1
    where that many did not suffice."""
    target, every, last = (
        (1.0 - _NEAR) * grid.best,
        grid.sweep.train.schedule.eval_every,
        grid.sweep.train.schedule.steps,
    )
    live: list[_Live] = []
    spent = 0
    while spent < grid.steps:
        while len(live) < at_once:
            number, point = search.ask()
            found = grid.nearest(point)
            live.append(_Live(number, found, sorted(found.curve)))
        for one in [*live]:
            spent += every
            step = one.steps.pop(0) if one.steps else None  # None: it has diverged
            if step is not None and search.report(one.number, step, one.found.curve[step]) and step != last:
                continue
            search.tell(one.number, failed=step is None)
            live.remove(one)
            if step == last and max(one.found.curve.values()) >= target:
                return min(1.0, spent / grid.steps)
    return 1.0


def replayed(grid: Grid, seeds: int, folder: Path) -> Iterator[tuple[str, int, list[float]]]:
    """Yields the name of each search, how many trials it has at once, and its fraction of the grid for each seed."""

    def ours(rule: str, seed: int, at_once: int) -> Search:
        root = folder / f"{rule}-{seed}-{at_once}"
        root.mkdir()
        return Ours(grid.sweep, seed, root, rule)

    def plain(pruner: str, seed: int, at_once: int) -> Search:
        return plain_tpe(grid.sweep.search_space, seed, pruner)

    def at_random(seed: int, at_once: int) -> Search:
        return plain_random(grid.sweep.search_space, seed)

    sampler = grid.sweep.sampler.type
    searches: dict[str, Callable[[int, int], Search]] = {
        **{f"cps_ray: {sampler}, {rule}": partial(ours, rule) for rule in ("asha", "median", "none")},
        **{f"Optuna: TPE, {pruner} pruner": partial(plain, pruner) for pruner in PRUNERS},
        "random, no pruner": at_random,
    }
    for at_once in (1, 2):
        for name, make in searches.items():
            yield name, at_once, [replay(make(seed, at_once), grid, at_once) for seed in range(seeds)]


def read(path: Path) -> Grid:
    """Returns the grid of a record. ConfigError if it is none, or not whole."""
    record = _record(path)
    sweep = parse(SweepConfig, record["sweep"], base=path.parent.absolute(), where=lambda loc: str(path))
    missing = len(record["points"]) - len(record["curves"])
    if missing:
        raise ConfigError(
            f"{path}: must hold the whole grid, but {missing} of {len(record['points'])} trainings are missing. "
            f"Go on with: python -m cps_ray.bench search --record {path}"
        )
    curves = record["curves"]
    return Grid(
        sweep,
        [
            Recorded(point, {int(step): value for step, value in curves[_key(point)].items()})
            for point in record["points"]
        ],
    )


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: record[name] for name in ("sweep", "points", "curves")}
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ConfigError(f"{path}: must be what `bench search --record` has written: {err}") from err


def _key(point: Mapping[str, Value]) -> str:
    return json.dumps(point, sort_keys=True)


def points_of(space: Mapping[str, Param], count: int) -> list[Point]:
    """Returns a grid of the space: all choices, and `count` values of each range, from end to end. ConfigError where `when` cuts holes into it."""
    values: dict[str, list[Value]] = {}
    for name, param in space.items():
        if param.when:
            raise ConfigError(f"search_space.{name}: must be drawn in every trial, but has `when`. Take it out.")
        if isinstance(param, ChoiceParam):
            values[name] = param.values
            continue
        low, high = (math.log(x) if param.log else x for x in (param.low, param.high))
        between = [low + k * (high - low) / max(1, count - 1) for k in range(count)]
        values[name] = [math.exp(x) if param.log else x for x in between]
        if param.type == "int":
            values[name] = list(dict.fromkeys(round(x) for x in between))
        else:  # rounding must not lead out of the range
            values[name] = [min(max(x, param.low), param.high) for x in values[name]]  # type: ignore[type-var, operator]
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def record(args: argparse.Namespace) -> None:
    """Trains what the record lacks of the grid, and writes each training to it as it ends."""
    path: Path = args.record
    sweep = load_sweep(args.sweep, args.set)
    points = points_of(sweep.search_space, args.points)
    folder = path.parent.absolute()
    # Nothing is written to `output`: where it lies makes no other record.
    sweep = sweep.model_copy(update={"output": folder})
    wanted: dict[str, Any] = {
        "sweep": sweep.model_dump(mode="json", context={"base": str(folder)}),
        "points": points,
        "curves": {},
    }
    if path.exists():
        found = _record(path)
        for name in ("sweep", "points"):
            if found[name] != json.loads(json.dumps(wanted[name])):
                raise ConfigError(f"--record {path}: holds trainings of another {name}. Name another file.")
        wanted["curves"] = found["curves"]
    write_json(path, wanted)
    missing = [point for point in points if _key(point) not in wanted["curves"]]
    trainings = [apply(sweep.train, point, "bench") for point in missing]  # all are valid before the first one begins
    calls = {
        _key(point): partial(train, config.dump(), sweep.objective.metric, threads_of(args.jobs))
        for config, point in zip(trainings, missing, strict=True)
    }
    for key, curve in in_processes(args.jobs, calls):
        wanted["curves"][key] = curve
        write_json(path, wanted)
        best = max(curve.values(), default=math.nan)
        print(f"{len(wanted['curves'])} of {len(points)}: {key} {best:.4f}", flush=True)


def train(raw: dict[str, Any], metric: str, threads: int) -> Curve:
    """Trains by the engine alone. Returns the metric at each evaluation, up to where the training diverged if it did."""
    config = parse_train(raw, "bench")
    tune_cpu(threads)
    shards, ranks = open_data(config.data), Ranks()
    data, classes = train_data(shards, config), shards.classes
    curve: Curve = {}

    def validate(state: TrainState) -> Metrics:
        batches = eval_batches(shards, "val", threads=threads)
        return summarise(evaluate(config, state.evaluated, batches, len(classes), ranks), classes, "val")

    def report(metrics: Metrics, _: TrainState) -> bool:
        curve[int(metrics["step"])] = metrics[metric]
        return True

    with closing(train_batches(data, config, threads=threads, fill=padding_color(config.model))) as batches:
        try:
            fit(data.weigh(config), build_state(config, len(classes), ranks), batches, validate, report)
        except DivergedError:
            return curve
    return curve


def picture(rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Draws a line for each search: a dot for each seed's fraction of the grid, and a stroke at their mean."""
    left, width, line, top = 380, 560, 34, 46
    found = Image.new("RGB", (left + width + 30, top + line * len(rows) + 40), PAPER)
    draw = ImageDraw.Draw(found)

    def text(place: tuple[float, float], words: str, color: tuple[int, int, int], anchor: str) -> None:
        fitted, font = fit_text(words, width if anchor == "lm" else left - 30, 13)
        draw.text(place, fitted, fill=color, font=font, anchor=anchor)

    bottom = top + line * len(rows)
    for tick in range(0, 101, 25):
        x = left + width * tick / 100
        draw.line((x, top - 8, x, bottom), fill=(225, 228, 232))
        text((x, bottom + 12), f"{tick} %", FAINT, "mm")
    text((left, 20), "steps until one of the best is found, of those of the whole grid", INK, "lm")
    for number, row in enumerate(rows):
        y = top + line * (number + 0.5)
        text((left - 14, y), f"{row['search']}, {row['at_once']} at once", INK, "rm")
        for fraction in row["fractions"]:
            x = left + width * fraction
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), outline=(38, 109, 176))
        x = left + width * row["mean"]
        draw.line((x, y - 11, x, y + 11), fill=(200, 82, 20), width=2)
    return found


def run(args: argparse.Namespace) -> int:
    """Records a grid, or replays searches on it and prints the table; returns 0."""
    if (args.file is None) == (args.record is None):
        raise ConfigError("bench search: needs either a record to replay or --record FILE to make one.")
    if args.record is not None:
        record(args)
        return 0
    if args.set:
        raise ConfigError("bench search: --set changes what is recorded, so it needs --record. Remove it.")
    grid = read(args.file)
    steps, trials = grid.sweep.train.schedule.steps, len(grid.trainings)
    table = Table(
        *("search", "at once", "mean", "median", "worst tenth", "not found"),
        title=f"Steps until within {100 * _NEAR:g} % of the grid's best ({grid.best:.4f}), as a fraction of the grid's "
        f"({trials} trainings of {steps} steps), {args.seeds} seeds",
    )
    rows = []
    with tempfile.TemporaryDirectory(prefix="cps-ray-bench-") as work:
        for name, at_once, fractions in replayed(grid, args.seeds, Path(work)):
            ordered = sorted(fractions)
            figures = {
                "mean": statistics.fmean(ordered),
                "median": statistics.median(ordered),
                "worst_tenth": ordered[math.ceil(0.9 * len(ordered)) - 1],
                "not_found": sum(fraction >= 1.0 for fraction in ordered),
            }
            rows.append({"search": name, "at_once": at_once, **figures, "fractions": fractions})
            numbers = (f"{figures[key]:.3f}" for key in ("mean", "median", "worst_tenth"))
            table.add_row(name, str(at_once), *numbers, str(figures["not_found"]))
    wide().print(table)
    if args.png:
        picture(rows).save(args.png)
    if args.json:
        write_json(args.json, {"best": grid.best, "trainings": trials, "steps": grid.steps, "searches": rows})
    return 0
