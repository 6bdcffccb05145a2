"""A sweep from its file to best.yaml: search, final runs, verdict, export. Any part may be cut off, and resumed."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.datasets.shards import Shards
from cps_ray.errors import FailureLimitError, FinalRunError, NoTrialError
from cps_ray.on_ray.cluster import connected, nodes, trainings_at_once
from cps_ray.on_ray.gauges import SweepGauges
from cps_ray.on_ray.trainer import Objective, best_checkpoint
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
from cps_ray.search.folder import RESUME, final_trainings, locked, shown
from cps_ray.search.records import Events, trial_folder, write_summary, write_tables
from cps_ray.search.session import Session
from cps_ray.search.study import Search
from cps_ray.search.trials import SearchWork, best_config, best_header


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
        with locked(self._root), self._signals.watched():
            self._search = Search(self._config, self._root)
            self._events = Events(self._root)
            try:
                with connected(self._address) as cluster:
                    self._at_once = self._fit([self._config.train])
                    self._finals_at_once = self._fit(final_trainings(self._config))
                    for line in cluster.banner():
                        self._say(line)
                    self._say(f"Run folder: {shown(self._root)}, {self._at_once} training(s) at once")
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
        each = [trainings_at_once(c.resources, asked, there, streams=c.semi_supervised) for c in trainings]
        return min(each, default=1)

    def _work(self, shards: Shards) -> None:
        display = make_display(self._config.name, self._console)
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
                f"Try them again: {RESUME} {shown(self._root)}"
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
        self._say(f"Resume: {RESUME} {shown(self._root)}")
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
    lines.append(f"Results: {shown(root)}: best.yaml, {MODEL_FOLDER}/, trials.csv, summary.json")
    lines.append(f"Train the best again: python -m cps_ray.train {shown(root / 'best.yaml')}")
    return lines
