"""A sweep from its file to best.yaml: search, final runs, verdict, export. Any part may be cut off, and resumed."""

import difflib
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from optuna.trial import TrialState
from rich.console import Console

from cps_ray.config.space import apply
from cps_ray.config.sweep import ChoiceParam, SweepConfig
from cps_ray.config.train import DataConfig, ModelConfig, TrainConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.datasets.loader import check_data, metrics_of
from cps_ray.datasets.shards import Shards
from cps_ray.datasets.synthetic import open_data
from cps_ray.engine.loop import Metrics
from cps_ray.engine.networks import check_model
from cps_ray.errors import ConfigError, FailureLimitError, FinalRunError, NoTrialError
from cps_ray.on_ray.cluster import connected, nodes, trainings_at_once
from cps_ray.on_ray.gauges import SweepGauges
from cps_ray.on_ray.trainer import Objective, best_checkpoint, drop_checkpoints
from cps_ray.search.display import Display, make_display, show_params
from cps_ray.search.export import MODEL_FOLDER, export_model, write_best, write_picture, write_seeds
from cps_ray.search.finals import (
    OWN,
    FinalRun,
    FinalWork,
    Judged,
    compare,
    drop_stale,
    is_done,
    judge_finals,
    plan_finals,
)
from cps_ray.search.records import (
    EVENTS_FILE,
    SUMMARY_FILE,
    TRIALS_FOLDER,
    Events,
    read_json,
    trial_folder,
    write_summary,
    write_tables,
    write_text,
)
from cps_ray.search.session import Job, Session
from cps_ray.search.study import STUDY_FILE, Search

SWEEP_FILE = "sweep.yaml"
SOURCE_FILE = "sweep.source.yaml"
LOCK_FILE = ".lock"
_RESUME = "python -m cps_ray.sweep resume"


def begin(config: SweepConfig, source: Path, *, fresh: bool) -> Path:
    """Makes the run folder with the resolved sweep and the file as written.

    Raises ConfigError if the folder holds a sweep or anything else; `fresh` moves it aside instead.
    """
    root = config.output / config.name
    if root.exists() and any(path.name != LOCK_FILE for path in root.iterdir()):
        with _locked(root):
            if fresh:
                root.rename(root.with_name(f"{root.name}.bak-{time.strftime('%Y%m%d-%H%M%S')}"))
            else:
                _clear(root)
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / SOURCE_FILE, source.read_text(encoding="utf-8"))
    write_resolved(root, config)
    return root


def _clear(root: Path) -> None:
    """Empties a folder that a sweep was refused in before its first trial; ConfigError if there is more to lose."""
    if not (root / SOURCE_FILE).exists():
        raise ConfigError(
            f"{root}: must be empty or a sweep's, but holds other files. Take another --name or --output."
        )
    if (root / TRIALS_FOLDER).exists():
        summary = read_json(root / SUMMARY_FILE) or {}
        done = summary.get("trials", {})
        state = f"{summary.get('status', 'unfinished')}, {done.get('complete', 0)}/{done.get('budget', '?')} trials complete"
        raise ConfigError(
            f"{root}: already holds a sweep ({state}). Continue: {_RESUME} {_shown(root)}. "
            "Start again: --name NEW, or --fresh to move it aside."
        )
    for name in (SOURCE_FILE, SWEEP_FILE, STUDY_FILE, SUMMARY_FILE, EVENTS_FILE):
        (root / name).unlink(missing_ok=True)


def write_resolved(root: Path, config: SweepConfig) -> None:
    """sweep.yaml: every setting, paths relative to the run folder."""
    resolved = config.model_dump(mode="json", context={"base": str(root)})
    write_text(root / SWEEP_FILE, dump_yaml(resolved, f"Every setting of this sweep. Resume: {_RESUME} {_shown(root)}"))


def check(config: SweepConfig) -> Shards:
    """Everything that can be wrong before a cluster starts: networks, data and metric, of trials and of final runs."""
    shards = open_data(config.train.data)
    models: list[ModelConfig] = []
    data: list[tuple[DataConfig, str]] = []
    for changed in (*_network_choices(config), *_final_trainings(config)):
        if changed.model not in models:
            models.append(changed.model)
            check_model(changed.model)
        if (changed.data, changed.method) not in data:
            data.append((changed.data, changed.method))
            check_data(open_data(changed.data), changed)
    known = metrics_of(shards, "val", config.train.data.groups)
    if config.objective.metric not in known:
        near = difflib.get_close_matches(config.objective.metric, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known[:6])}, ..."
        raise ConfigError(f"objective.metric: {config.objective.metric} is not measured on this val split. {hint}")
    return shards


def _network_choices(config: SweepConfig) -> Iterator[TrainConfig]:
    yield config.train
    for name, param in config.search_space.items():
        if name.startswith("model.") and isinstance(param, ChoiceParam):
            for value in param.values:
                yield apply(config.train, {name: value}, f"search_space.{name}")


def _final_trainings(config: SweepConfig) -> list[TrainConfig]:
    """The final runs as far as they are known before the search."""
    if config.final.retrain == "none":
        return []
    groups = ({}, *config.baselines.values())
    return [apply(config.train, {**config.final.set, **changes}, "final runs") for changes in groups]


def _shown(path: Path) -> str:
    """Relative to where the user stands, if that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


class Interrupted(Exception):  # noqa: N818
    """Ctrl-C or SIGTERM."""


@dataclass(slots=True)
class _Signals:
    """The first SIGINT or SIGTERM ends things in order, the second one at once."""

    received: int = 0
    on_signal: Callable[[], None] | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        again, self.received = self.received, number
        if again or self.on_signal is None:
            raise Interrupted
        self.on_signal()


@dataclass(slots=True)
class SearchWork:
    """The trials as the work of a session. Of all their checkpoints only the best trial's stay."""

    search: Search
    config: SweepConfig
    root: Path
    events: Events
    gauges: SweepGauges
    limit: str | None = None
    """Why the failure limits stopped the sweep."""
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Wall time of the search, earlier sessions included."""
        return self.search.seconds_before + time.monotonic() - self.started

    @property
    def out_of_time(self) -> bool:
        """Whether the budget of wall time is used up."""
        limit = self.config.budget.time
        return limit is not None and self.seconds > limit

    def next(self) -> Job | None:
        if self.limit or self.out_of_time:
            return None
        found = self.search.next()
        if found is None:
            return None
        number, config = found
        job = Job(f"{number:04d}", trial_folder(self.root, number), config)
        params = self.search.study.trials[number].params
        self.events("started", run=job.name, params=params, steps=config.schedule.steps)
        self._publish()
        return job

    def report(self, job: Job, metrics: Metrics) -> bool:
        value = metrics[self.config.objective.metric]
        self.events("report", run=job.name, step=metrics["step"], steps=job.config.schedule.steps, value=value)
        return self.search.report(int(job.name), metrics["step"], value)

    def finish(self, job: Job, failure: str | None) -> None:
        number = int(job.name)
        before = self.search.best()
        state = self.search.finish(number, failure=failure)
        curve = self.search.study.trials[number].intermediate_values
        if state == TrialState.FAIL:
            self.events("failed", run=job.name, failure=failure or "no finite value was reported")
            self._check_limits(failure or "")
        else:
            kind = "finished" if state == TrialState.COMPLETE else "pruned"
            self.events(kind, run=job.name, step=max(curve), value=self.search.value(curve))
        best = self.search.best()
        if best is not None and (before is None or best.number != before.number):
            self.events("best", run=job.name, value=best.value)
            self._write_best()
        self.tidy()
        write_tables(self.root, self.search, self.config)
        write_summary(self.root, self.search, self.config, "running")
        self._publish()

    def cut(self) -> None:
        """A limit has ended the search: gives the trials that it cut short their verdicts."""
        for number in self.search.live:
            self.search.finish(number, failure=None, cut="failures" if self.limit else "budget.time")
        self.tidy()

    def tidy(self) -> None:
        """Frees the disk. Of all ended trials each time: a stopped one may still have been writing when its turn came."""
        best = self.search.best()
        for trial in self.search.trials:
            if trial.state.is_finished() and (best is None or trial.number != best.number):
                drop_checkpoints(trial_folder(self.root, trial.number))

    def _write_best(self) -> None:
        write_best(self.root, best_config(self.search, self.config), best_header(self.root, self.search, self.config))

    def _check_limits(self, failure: str) -> None:
        limits = self.config.failures
        total, in_a_row = self.search.failures()
        where = f"Last: {failure}. Whole text: {self.root / 'trials'}/*/error.txt"
        if in_a_row >= limits.max_consecutive:
            self.limit = f"{in_a_row} trials in a row failed (failures.max_consecutive). {where}"
        elif total >= limits.max_failed:
            self.limit = f"{total} trials failed (failures.max_failed). {where}"

    def _publish(self) -> None:
        best = self.search.best()
        self.gauges.set(self.search.counts(), None if best is None else best.value)


def best_config(search: Search, config: SweepConfig) -> TrainConfig:
    """The best trial's training."""
    best = search.best()
    assert best is not None
    return apply(config.train, best.params, f"trial {best.number}")


def best_header(root: Path, search: Search, config: SweepConfig) -> str:
    """The comment on top of best.yaml."""
    best = search.best()
    assert best is not None
    curve = best.intermediate_values
    step = min(step for step, value in curve.items() if value == best.value)
    return (
        f"Best of sweep {config.name}: trial {best.number}, {config.objective.metric} {best.value:.4f} at step {step}.\n"
        f"{show_params(best.params)}\n"
        f"Train it again: python -m cps_ray.train {_shown(root / 'best.yaml')}"
    )


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One process per run folder."""
    with (root / LOCK_FILE).open("w") as file:
        _lock(file, root)
        yield


def _lock(file: TextIO, root: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        raise ConfigError(f"{root}: another process is running this sweep. Wait for it, or stop it.") from err


class Sweep:
    """One process's work on a run folder."""

    def __init__(self, config: SweepConfig, root: Path, console: Console, address: str | None) -> None:
        self._config, self._root, self._console, self._address = config, root, console, address
        self._objective = Objective(config.objective.metric, config.objective.mode)
        self._signals = _Signals()

    def run(self, shards: Shards) -> int:
        """Works on `shards`, as `check` opened them. Returns the exit code: 0, or 130/143 when interrupted.

        Raises ResourceError, FailureLimitError, NoTrialError; what is finished is on disk then.
        """
        with _locked(self._root), self._signals.watched():
            self._search = Search(self._config, self._root)
            self._events = Events(self._root)
            try:
                with connected(self._address) as cluster:
                    self._at_once = self._fit([self._config.train])
                    self._finals_at_once = self._fit(_final_trainings(self._config))
                    for line in cluster.banner():
                        self._say(line)
                    self._say(f"Run folder: {_shown(self._root)}, {self._at_once} training(s) at once")
                    self._work(shards)
            except Interrupted:
                return self._interrupted()
            except (FailureLimitError, NoTrialError, FinalRunError) as err:
                self._save("failed", reason=str(err))
                raise
        return 0

    def _fit(self, trainings: list[TrainConfig]) -> int:
        """How many of these may run at once; ResourceError if one never could."""
        asked, there = self._config.concurrency, nodes()
        each = [trainings_at_once(c.resources, asked, there, streams=c.method == "cps") for c in trainings]
        return min(each, default=1)

    def _work(self, shards: Shards) -> None:
        display = make_display(self._config.name, self._config.budget.trials, self._console)
        self._events.listeners.append(display.listen)
        with display:
            self._run_search(display)
            if self._search.best() is None:
                failed = self._search.counts()["failed"]
                raise NoTrialError(
                    f"{self._root}: no trial completed ({failed} failed). See trials/*/error.txt and log.txt."
                )
            best = best_config(self._search, self._config)
            write_best(self._root, best, best_header(self._root, self._search, self._config))
            runs = plan_finals(self._root, self._config, best)
            judged = self._run_finals(runs, display)
        self._export(best, judged, shards)

    def _session(
        self, work: Any, display: Display, at_once: int, tick: Callable[[Session], None] = lambda _: None
    ) -> None:
        session = Session(
            work,
            self._root / "tune",
            sweep=self._config.name,
            at_once=at_once,
            objective=self._objective,
            retries=self._config.failures.retries,
        )
        self._signals.on_signal = session.stop

        def each() -> None:
            tick(session)
            display.tick()

        try:
            session.run(each)
        finally:
            self._signals.on_signal = None
        if self._signals.received:
            raise Interrupted

    def _run_search(self, display: Display) -> None:
        counts = self._search.counts()
        done = sum(counts.values()) - counts["running"]
        left = self._config.budget.trials - done
        limit = self._config.budget.time
        if left <= 0 or (limit is not None and self._search.seconds_before > limit):
            return
        self._events("phase", text=f"search: {done} of {self._config.budget.trials} trials done" if done else "search")
        work = SearchWork(self._search, self._config, self._root, self._events, SweepGauges(self._config.name))

        def tick(session: Session) -> None:
            if work.limit or work.out_of_time:
                session.stop()

        try:
            self._session(work, display, self._at_once, tick)
        finally:
            self._search.add_seconds(time.monotonic() - work.started)
        work.cut()
        write_tables(self._root, self._search, self._config)
        if work.limit:
            raise FailureLimitError(f"stopped: {work.limit}")

    def _run_finals(self, runs: list[FinalRun], display: Display) -> list[Judged]:
        if not runs:
            return []
        drop_stale(runs)
        waiting = [run for run in runs if not is_done(run.job)]
        self._events("phase", text=f"final runs: {len(waiting)} of {len(runs)} to do")
        work = FinalWork(runs, self._objective, self._events)
        if waiting:
            self._session(work, display, self._finals_at_once)
        write_tables(self._root, self._search, self._config)
        if work.failed:
            name, failure = next(iter(work.failed.items()))
            raise FinalRunError(
                f"{self._root}: {len(work.failed)} of {len(runs)} final runs failed ({name}: {failure}). "
                f"Try them again: {_RESUME} {_shown(self._root)}"
            )
        self._events("phase", text="judging the final models on the test split")
        return judge_finals(runs, self._objective)

    def _export(self, best: TrainConfig, judged: list[Judged], shards: Shards) -> None:
        own = [one for one in judged if one.run.group == OWN]
        if own:
            sign = 1.0 if self._objective.mode == "max" else -1.0
            top = max(own, key=lambda one: sign * one.validation)
            metrics = {
                "step": top.step,
                "seed": top.run.seed,
                self._objective.metric: top.validation,
                **top.verdict.metrics,
            }
            folder = export_model(self._root, top.run.job.config, top.checkpoint, shards.manifest, metrics)
            write_seeds(folder / "seeds.csv", [one.row(self._objective.metric) for one in judged])
            answers = {one.run.group: one.verdict for one in judged if one.run.seed == top.run.seed}
            answers[best.method.upper()] = answers.pop(OWN)  # last, so that it stands beside what it is compared with
            write_picture(folder / "examples.png", answers, shards.manifest)
            final = compare(judged)
        else:
            trial = self._search.best()
            assert trial is not None
            found = best_checkpoint(trial_folder(self._root, trial.number), self._objective)
            final = None
            if found is not None:
                metrics = {"step": found[1]["step"], "seed": best.seed, **found[1]["metrics"]}
                export_model(self._root, best, found[0], shards.manifest, metrics)
        summary = self._save("finished", final=final)
        for line in verdict_lines(self._root, summary):
            self._say(line)

    def _save(self, status: str, **facts: Any) -> dict[str, Any]:
        write_tables(self._root, self._search, self._config)
        self._events("end", status=status)
        return write_summary(self._root, self._search, self._config, status, **facts)

    def _interrupted(self) -> int:
        summary = self._save("interrupted")
        best = summary["best"]
        so_far = f", best {self._config.objective.metric} {best['value']:.4f} (trial {best['trial']})" if best else ""
        counts = summary["trials"]
        ended = counts["complete"] + counts["pruned"] + counts["failed"]
        self._say(f"interrupted: {ended} of {counts['budget']} trials done{so_far}.")
        self._say(f"Resume: {_RESUME} {_shown(self._root)}")
        return 128 + (self._signals.received or signal.SIGINT)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def verdict_lines(root: Path, summary: dict[str, Any]) -> list[str]:
    """The end of a sweep, for people."""
    best = summary["best"]
    lines = [
        f"Best trial {best['trial']}: {summary['objective']} {best['value']:.4f} at step {best['step']}  {show_params(best['params'])}"
    ]
    final = summary.get("final")
    if final:
        for group, row in final["groups"].items():
            score = row["test/miou"]
            deviation = "" if score["sd"] is None else f" +- {100 * score['sd']:.1f}"
            gain = "" if group == OWN else f"   best is {final['gain'][group]:+.1f} points"
            lines.append(
                f"Test mIoU  {group:<18}{100 * score['mean']:.1f}{deviation} % over {score['n']} seed(s){gain}"
            )
    lines.append(f"Results: {_shown(root)}: best.yaml, {MODEL_FOLDER}/, trials.csv, summary.json")
    lines.append(f"Train the best again: python -m cps_ray.train {_shown(root / 'best.yaml')}")
    return lines


def is_run_folder(path: Path) -> bool:
    """Whether a sweep lies there."""
    return (path / SWEEP_FILE).is_file() and (path / STUDY_FILE).is_file()
