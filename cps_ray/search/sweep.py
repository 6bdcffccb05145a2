"""A sweep from its file to best.yaml: search, final runs, verdict, export. Any part may be cut off, and resumed."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.text import Text

from cps_ray.config.schema import parse
from cps_ray.config.sweep import BEST_ARM, FinalConfig, SweepConfig, measured_network
from cps_ray.config.train import TrainConfig
from cps_ray.datasets.shards import Shards
from cps_ray.engine.encoders import weights_of_networks
from cps_ray.errors import ConfigError, FailureLimitError, FinalRunError, NoTrialError, ResourceError, at
from cps_ray.files import read_json
from cps_ray.model.description import MODEL_FOLDER
from cps_ray.on_ray.cluster import awaited, connected, nodes, trainings_at_once
from cps_ray.on_ray.export import export_best
from cps_ray.on_ray.gauges import SweepGauges
from cps_ray.on_ray.leaving import head_watched, leave_in_time
from cps_ray.on_ray.trainer import close_groups, prepare_groups, worker_groups
from cps_ray.results import (
    BEST_FILE,
    COLLAPSED,
    FAILED,
    INTERRUPTED,
    RUNNING,
    SUMMARY_FILE,
    SWEEP_FILE,
    progress_lines,
    resume_command,
    trial_folder,
    verdict_lines,
)
from cps_ray.runs import drop_checkpoints
from cps_ray.search.disk import on_disk
from cps_ray.search.display import make_display
from cps_ray.search.export import export_final, write_best
from cps_ray.search.final_phase import (
    EvaluatedRun,
    FinalPhase,
    FinalRun,
    candidate,
    drop_stale,
    evaluate_final_runs,
    is_done,
    is_stale,
    plan_candidates,
    plan_final_runs,
    validation,
)
from cps_ray.search.further_searches import FurtherSearch, further_searches, is_of, open_study
from cps_ray.search.lock import locked
from cps_ray.search.records import Events, write_summary, write_tables
from cps_ray.search.search_phase import SearchPhase, best_config, best_header, trial_config
from cps_ray.search.study import SweepStudy, drawn
from cps_ray.search.sweep_folder import final_training_configs
from cps_ray.search.tune_session import Phase, TuneSession
from cps_ray.search.verdict import compare, notes
from cps_ray.text import display_path, printable

_ROOM_S = 5.0


class Interrupted(Exception):  # noqa: N818
    """Ctrl-C or SIGTERM."""


@dataclass(slots=True)
class _Signals:
    """The first SIGINT or SIGTERM ends things in order, the second one at once."""

    say: Callable[[], None]
    """Says how far things are: called if they do not end in time."""
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
        # Runs in the main thread, between two instructions of whatever that is doing: it may only set flags or raise.
        again, self.received = self.received, number
        if not again:
            leave_in_time(128 + number, self.say)
        if again or self.on_signal is None:
            raise Interrupted
        self.on_signal()


class _Room:
    """How many trainings the cluster holds, asked again now and then: nodes come and go."""

    def __init__(self, count: Callable[[], int]) -> None:
        self._count, self._known, self._asked = count, 1, -math.inf

    def __call__(self) -> int:
        if time.monotonic() - self._asked > _ROOM_S:
            self._asked = time.monotonic()
            with suppress(ResourceError):  # a node that was lost: what is there waits for another
                self._known = self._count()
        return self._known


class Sweep:
    """One process's work on a sweep folder."""

    def __init__(
        self, config: SweepConfig, root: Path, console: Console, address: str | None, wait_s: float | None = None
    ) -> None:
        """`wait_s`: as `awaited` takes it."""
        self._config, self._root, self._console, self._address, self._wait_s = config, root, console, address, wait_s
        self._metric = config.objective.metric
        self._signals = _Signals(self._say_progress)
        self._has_said = False
        self._scratch = root / "tune"  # Ray's own files

    def run(self, shards: Shards) -> int:
        """Works on `shards`, as `check` opened them. Returns the exit code: 0, or 130/143 when interrupted.

        Raises ResourceError, FailureLimitError, NoTrialError; what is finished is on disk then.
        """
        with at(display_path(self._root)), locked(self._root), self._signals.watched():
            self._study = SweepStudy(self._config, self._root)
            for line in self._study.notices:
                self._say(line)
            self._events = Events(self._root)
            write_tables(self._root, self._study, self._config)  # they may be deleted, or damaged
            summary = read_json(self._root / SUMMARY_FILE) or {}
            if self._is_finished(summary):
                self._say(f"Nothing to do: the sweep is finished.{self._how_to_extend()}")
                self._say_verdict(summary)
                return 0
            try:
                if not self._trials_left():  # before a cluster is started for nothing
                    self._need_best()
                    self._need_bests_of_further_searches()
                with connected(self._address, f"sweep {self._config.name}") as cluster, head_watched(self._say_lost):
                    # Both before the first trial: final runs that can never start must not be found after three days.
                    at_once, _ = awaited(self._how_many_fit, cluster, self._wait_s, self._say)
                    for line in cluster.banner():
                        self._say(line)
                    self._say(f"Sweep folder: {display_path(self._root)}, {at_once} training(s) at once")
                    with worker_groups(self._scratch) as self._pool:
                        if self._trials_left():
                            # Before anything else: they take longest to come.
                            num_left = self._config.budget.trials - self._num_ended()
                            prepare_groups(self._pool, self._config.train, min(at_once, num_left))
                        self._work(shards)
            except Interrupted:  # from anywhere inside, Ray's own waits included
                return self._interrupted()
            except (FailureLimitError, NoTrialError, FinalRunError) as err:
                self._save("failed", reason=str(err))
                raise
        return 0

    def _is_finished(self, summary: dict[str, Any]) -> bool:
        """Whether no trial is left, and `summary` and the files are of the best trial and of the final runs that the sweep asks for:
        nothing is then evaluated a second time."""
        best = self._study.best()
        if summary.get("status") != "finished" or self._trials_left() or best is None:
            return False
        # A summary of an earlier version does not say what was asked for, or knew fewer settings.
        asked = (summary.get("final") or {}).get("asked")
        if asked is not None and not self._is_asked_for(asked):
            return False
        if self._elects and not self._study.is_elected:
            return False
        if not all(self._is_made(search) for search in self._further_searches()):
            return False
        runs = self._planned(best_config(self._study, self._config))
        return (
            summary["best"]["trial"] == best.number
            and {*((summary.get("final") or {}).get("arms") or {})} == {run.arm for run in runs}
            and all(is_done(run.job) and not is_stale(run.job) for run in runs)
            and all((self._root / name).exists() for name in (BEST_FILE, MODEL_FOLDER))
        )

    def _is_asked_for(self, asked: dict[str, Any]) -> bool:
        try:
            return parse(FinalConfig, asked) == self._config.final
        except ConfigError:  # of a later version, or edited
            return False

    def _how_to_extend(self) -> str:
        """Returns what to say of how the search could go on."""
        limit = self._config.budget.time
        flags = {
            "--trials N": not self._study.num_left,
            "--patience N": self._study.is_stalled,
            "--time T": limit is not None and self._study.seconds_before > limit,
        }
        needed = " ".join(flag for flag, is_needed in flags.items() if is_needed)
        return f" More trials: {needed}." if needed else ""  # a grid has no more

    @property
    def _elects(self) -> bool:
        """Whether the best of the best trials is named by training them again."""
        return self._config.final.top > 1 and self._config.final.retrain == "best"

    def _trials_left(self) -> bool:
        """Whether there are trials to begin or to continue, and time for them."""
        limit = self._config.budget.time
        in_time = limit is None or self._study.seconds_before <= limit
        return in_time and not self._study.why_no_more

    def _num_ended(self) -> int:
        return self._config.budget.trials - self._study.num_left

    def _how_many_fit(self) -> tuple[int, int]:
        """Number of trials, and of final runs, that may run at once. TooSmallError if one never could."""
        finals = [self._fit(training) for training in final_training_configs(self._config)]
        return self._fit(self._config.train), min(finals, default=1)

    def _fit(self, training: TrainConfig) -> int:
        return trainings_at_once(
            training.resources, self._config.concurrency, nodes(), streams=training.semi_supervised
        )

    def _work(self, shards: Shards) -> None:
        write_summary(self._root, self._study, self._config, RUNNING)  # a verdict of fewer trials holds no more
        display = make_display(self._config.name, self._console)
        self._events.subscribers.append(display.on_event)
        with display, on_disk(self._root / SUMMARY_FILE), closing(SweepGauges(self._config.name)) as self._gauges:
            self._run_search()
            self._need_best()
            self._run_candidates()
            best = best_config(self._study, self._config)
            # Again, though each new best trial writes it: a resume after the search may find it deleted, or of an older version.
            write_best(self._root, best, best_header(self._root, self._study, self._config))
            self._run_further_searches()
            runs = self._planned(best)
            evaluated = self._run_finals(runs)
        self._export(best, runs, evaluated, shards)

    def _need_best(self) -> None:
        """Raises NoTrialError if no trial has completed."""
        if self._study.best() is None:
            counts = self._study.counts()
            raise NoTrialError(
                f"{self._root}: no trial completed ({counts[COLLAPSED]} collapsed, {counts[FAILED]} failed). "
                "See trials/*/error.txt and log.txt."
            )

    def _session(
        self,
        phase: Phase,
        room: Callable[[], int],
        tick: Callable[[TuneSession], None] = lambda _: None,
        name: str = "",
    ) -> None:
        """`room` counts the trainings of this phase that the cluster holds at once."""
        session = TuneSession(
            phase,
            self._scratch,
            self._pool,
            sweep=name or self._config.name,
            at_once=_Room(room),
            failures=self._config.failures,
            resume=resume_command(self._root),
            say=lambda text: self._events("notice", text=text),
        )
        # While a session runs, the first signal only asks it to stop: its trainings are taken down in order, resumable.
        self._signals.on_signal = session.stop
        try:
            session.run(lambda: tick(session))
        finally:
            self._signals.on_signal = None
        if self._signals.received:
            raise Interrupted

    def _run_search(self) -> None:
        if not self._trials_left():
            return
        done = self._num_ended()
        self._events("phase", text=f"search: {done} of {self._config.budget.trials} trials done" if done else "search")
        phase = SearchPhase(self._study, self._config, self._root, self._events, self._gauges)

        def tick(session: TuneSession) -> None:
            if phase.limit or phase.out_of_time:
                session.stop()

        try:
            self._session(phase, lambda: self._how_many_fit()[0], tick)
        finally:
            self._study.add_seconds(time.monotonic() - phase.started)
        phase.end_cut_trials()  # not after a signal: what that has stopped is resumed
        write_tables(self._root, self._study, self._config)
        if phase.limit:
            raise FailureLimitError(f"stopped: {phase.limit}")

    def _further_searches(self) -> Iterator[FurtherSearch]:
        return further_searches(self._root, self._config, self._study)

    def _is_made(self, search: FurtherSearch) -> bool:
        study = SweepStudy(search.sweep, self._root, home=search.folder)
        return is_of(study, self._root, search.sweep) and bool(study.why_no_more) and study.best() is not None

    def _need_bests_of_further_searches(self) -> None:
        """Raises NoTrialError if a further search has ended without a complete trial."""
        for search in self._further_searches():
            study = SweepStudy(search.sweep, self._root, home=search.folder)
            if is_of(study, self._root, search.sweep):
                self._need_best_of(search, study)

    def _need_best_of(self, search: FurtherSearch, study: SweepStudy) -> None:
        if study.why_no_more and study.best() is None:
            raise NoTrialError(
                f"{search.folder}: no trial of the search for {search} completed. See trials/*/error.txt and log.txt there. To try more "
                f"values, there and in the sweep's own search: {resume_command(self._root)} --trials N"
            )

    def _planned(self, best: TrainConfig) -> list[FinalRun]:
        trial = self._study.best()
        assert trial is not None
        tuned, bests = {}, {}
        for search in self._further_searches():
            study = open_study(self._root, search.sweep, search.folder)
            found = study.best()
            assert found is not None  # each search has been made
            if search.arm == BEST_ARM:
                bests[search.repeat] = best_config(study, search.sweep)
            else:
                tuned[search.arm, search.repeat] = drawn(found)
        return plan_final_runs(self._root, self._config, best, trial.number, tuned, bests)

    def _run_further_searches(self) -> None:
        for search in self._further_searches():
            study = open_study(self._root, search.sweep, search.folder)
            if not study.why_no_more:
                self._run_further_search(search, study)
            self._need_best_of(search, study)

    def _run_further_search(self, search: FurtherSearch, study: SweepStudy) -> None:
        folder, config = search.folder, search.sweep
        folder.mkdir(parents=True, exist_ok=True)
        done = config.budget.trials - study.num_left
        done_before = f": {done} of {config.budget.trials} trials done" if done else f", {study.num_left} trials"
        self._events("phase", text=f"search for {search}{done_before}")
        phase = SearchPhase(study, config, folder, self._events, None, prefix=search.prefix)

        def tick(session: TuneSession) -> None:
            if phase.limit or phase.out_of_time:
                session.stop()

        self._session(phase, lambda: self._fit(config.train), tick, config.name.replace("/", "-"))
        phase.end_cut_trials()
        for trial in study.trials:  # values are what is looked for: nobody needs the networks
            drop_checkpoints(trial_folder(folder, trial.number))
        write_tables(folder, study, config)
        write_summary(folder, study, config, "finished")
        if phase.limit:
            raise FailureLimitError(f"stopped in the search for {search}: {phase.limit}")

    def _run_candidates(self) -> None:
        """Trains the best trials again, and names the best of them by the mean of what they reach on val: single trials rank noise."""
        if not self._elects or self._study.is_elected:
            return
        trials = {trial.number: trial_config(trial, self._config) for trial in self._study.top(self._config.final.top)}
        runs = plan_candidates(self._root, self._config, trials)
        collapsed = self._train(runs, may_collapse=True)
        reached = {
            number: [validation(run) for run in runs if run.arm == candidate(number)]
            for number in trials
            if not any(run.job.name in collapsed for run in runs if run.arm == candidate(number))
        }
        if not reached:
            raise FinalRunError(
                f"{self._root}: each of the {len(trials)} best trials collapsed when it was trained again. See final/*/error.txt, and search "
                "where trainings are stable: begin another sweep."
            )
        self._study.elect({number: fmean(values) for number, values in reached.items()})

    def _run_finals(self, runs: list[FinalRun]) -> list[EvaluatedRun]:
        if not runs:
            return []
        self._train(runs)
        close_groups(self._pool)  # evaluating takes what they hold
        self._events("phase", text="evaluating the final models")
        return evaluate_final_runs(runs)

    def _train(self, runs: list[FinalRun], *, may_collapse: bool = False) -> dict[str, str]:
        """Trains final runs that are not done; returns which have collapsed, and why, if they may. Raises FinalRunError if one fails."""
        drop_stale(runs)  # before the rest is looked at: a stale run would count as done
        waiting = [run for run in runs if not is_done(run.job)]
        self._events("phase", text=f"final runs: {len(waiting)} of {len(runs)} to do")
        phase = FinalPhase(runs, self._events)
        if waiting:
            self._session(phase, lambda: self._how_many_fit()[1])
        write_tables(self._root, self._study, self._config)
        resume = resume_command(self._root)
        if phase.failed:
            name, failure = next(iter(phase.failed.items()))
            raise FinalRunError(
                f"{self._root}: {len(phase.failed)} of {len(runs)} final runs failed ({name}: {failure}). "
                f"Try them again: {resume}"
            )
        if phase.collapsed and not may_collapse:
            name, failure = next(iter(phase.collapsed.items()))
            final, file = self._config.final, display_path(self._root / SWEEP_FILE)
            way_out = f"To compare the other seeds, take theirs out of final.seeds in {file}, then: {resume}"
            if final.draws:
                way_out = f"To compare others, write `seeds` in place of `draws` into final in {file}, then: {resume}"
            if final.folds:
                way_out = "Begin another sweep, where trainings are stable: a lower rate or weight."
            raise FinalRunError(
                f"{self._root}: {len(phase.collapsed)} of {len(runs)} final runs collapsed ({name}: {failure}), and would again. {way_out}"
            )
        return phase.collapsed

    def _export(self, best: TrainConfig, runs: list[FinalRun], evaluated: list[EvaluatedRun], shards: Shards) -> None:
        if evaluated:
            final = self._compare(evaluated, shards)
            exported = export_final(self._root, self._config, runs, evaluated, final, shards)
        else:  # `final.retrain: none`: the search's own best model is what there is
            trial = self._study.best()
            assert trial is not None
            folder = trial_folder(self._root, trial.number)
            export_best(self._root, best, folder, self._metric, measured_network(self._metric), shards)
            exported, final = best, None
        weights = [each.record() for each in weights_of_networks(exported)]
        self._say_verdict(self._save("finished", final=final, weights=weights))

    def _compare(self, evaluated: list[EvaluatedRun], shards: Shards) -> dict[str, Any]:
        # A single trial has been chosen by nothing.
        tuned = [search.arm for search in self._further_searches() if search.repeat == 1]
        chosen = len(self._study.trials) > 1 or bool(tuned)
        final = compare(evaluated, self._config, shards.classes, tuned=tuned, chosen=chosen)
        asked = self._config.final.model_dump(mode="json")
        return final | {"notes": notes(evaluated, self._config, shards), "asked": asked}

    def _say_verdict(self, summary: dict[str, Any]) -> None:
        for line in verdict_lines(self._root, summary):
            self._say(line)

    def _save(self, status: str, **facts: Any) -> dict[str, Any]:
        write_tables(self._root, self._study, self._config)
        self._events("end", status=status)
        return write_summary(self._root, self._study, self._config, status, **facts)

    def _say_progress(self) -> None:
        if self._has_said:
            return  # what comes second, the end in order or the end in time, has nothing to add
        self._has_said = True
        for line in progress_lines(self._root, self._save(INTERRUPTED)):
            self._say(line)

    def _say_lost(self, what: str) -> None:
        self._say(f"error: {what}.")
        self._say_progress()

    def _interrupted(self) -> int:
        self._say_progress()
        return 128 + (self._signals.received or signal.SIGINT)  # the shell's convention for a signal

    def _say(self, text: str) -> None:
        self._console.print(Text(printable(text)), soft_wrap=True)
