"""Worker groups that stay warm: started once, each serves one training after the other.

Starting processes, importing torch and joining a process group take longer than many a training. So a group is a Ray Train run whose
workers ask for trainings (`worker.serve`) until there is none for a while. Ray Train places its workers, watches them and starts them
again; which training runs where, how often it is tried and when it is to stop is decided here, in one actor per command.

Who calls what: the trial that wants a training calls `begin`, then `wait` again and again; rank 0 of a group calls `take`, `started`,
`report` and `finished`; a group's controller calls `controller_started` and `group_failed`.
"""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cps_ray.config.train import ResourcesConfig
from cps_ray.on_ray.failures import CRASHED, TIMED_OUT

END = "end"
"""What `take` gives a group that is to end."""
_IDLE_S = 30.0
"""How long a group without a training keeps its resources."""
_POLL_S = 5.0
_MOST_STARTS = 3
"""Starts in a row that may fail before a group is given up."""
_ABORT_S = 3.0
_GROWTH_BYTES = 2**30
"""A group whose workers hold this much more than after their first training is renewed."""


@dataclass(frozen=True, slots=True)
class GroupShape:
    """What a worker group takes of the cluster."""

    workers: int
    cpus: float
    gpus: float

    @classmethod
    def of(cls, resources: ResourcesConfig) -> "GroupShape":
        """Returns what a training asks for."""
        return cls(resources.workers, resources.cpus_per_worker, resources.gpus_per_worker)

    def __str__(self) -> str:
        return f"{self.workers} x ({self.cpus:g} CPUs, {self.gpus:g} GPUs)"


@dataclass(frozen=True, slots=True)
class Training:
    """A training that is asked for. Its config lies in its folder."""

    folder: str
    metric: str
    """Metric by which its best checkpoint is kept."""
    sha256: str
    """Hash of its config, `TrainConfig.sha256`: its workers train no other."""
    shape: GroupShape
    sweep: str = ""
    retries: int = 1
    first_report_s: float | None = None
    """How long its workers may train before their first report."""
    most_s: float | None = None
    """How long its workers may train in all."""


@dataclass(slots=True)
class Run:
    """A training and how it stands."""

    training: Training
    group: "Group | None" = None
    is_running: bool = False
    """Workers have said that they train."""
    tries: int = 0
    began: float = 0.0
    reported: int = 0
    """Step of the last report."""
    judged: int = 0
    """Last step after which it may go on."""
    is_stopped: bool = False
    notice: str | None = None
    """What happened to it that nobody has been told."""
    outcome: dict[str, Any] | None = None
    """Once it has ended: nothing, or `failure` in a line and its `kind`."""


@dataclass(slots=True)
class Group:
    """A worker group and how it stands."""

    name: str
    shape: GroupShape
    run: Run | None = None
    has_asked: bool = False
    """Its workers are up: they have asked for a training since they were started last."""
    idle_since: float = 0.0
    is_ending: bool = False
    is_waiting: bool = False
    """It could not be placed yet."""
    failed_starts: int = 0
    has_served: bool = False
    first_held: int = 0
    """Bytes that rank 0 held after the group's first training."""
    controller: Any = None
    workers: str = ""
    """Those of its workers that asked last. Started again, they have another name."""
    lost: set[str] = field(default_factory=set)
    """Those before them: on a node that was lost some may live on, and must not train beside the new ones."""


class WorkerGroups:
    """All worker groups of a command, and the trainings that wait for one. Runs in an asyncio actor: what stands between two awaits is
    atomic."""

    def __init__(self, start: Callable[[Group], None], idle_s: float = _IDLE_S) -> None:
        """`start` starts a group, and sees to it that `group_ended` is called in this event loop once."""
        self._start, self._idle_s = start, idle_s
        self._runs: dict[str, Run] = {}
        self._groups: dict[str, Group] = {}
        self._numbers = itertools.count()
        self._news = asyncio.Event()
        self._is_closed = False
        self._watch = asyncio.get_running_loop().create_task(self._watch_clock())

    # What a trial calls.

    async def begin(self, training: Training) -> None:
        """Wants a training. Does nothing if it is under way: a trial whose process was lost asks again."""
        run = self._runs.get(training.folder)
        if run is not None and run.is_stopped:
            await self._until(lambda: training.folder not in self._runs, 60.0)  # its workers write into the folder
            run = self._runs.get(training.folder)
        if run is None or run.outcome is not None:
            self._runs[training.folder] = Run(training)
        self._change()

    async def wait(self, folder: str, judged: int, timeout: float) -> dict[str, Any] | None:
        """Accepts reports up to step `judged`, and waits for news: returns `reported`, the last step, `outcome` once it has ended, and
        a `notice` of what a person should know. Returns None if nobody has begun it: this process is new, the one before it died."""
        run = self._runs.get(folder)
        if run is None:
            return None
        if judged > run.judged:
            run.judged = judged
            self._change()
        await self._until(lambda: run.reported > judged or run.notice is not None or run.outcome is not None, timeout)
        if run.outcome is not None and self._runs.get(folder) is run:
            del self._runs[folder]
        notice, run.notice = run.notice or self._waits_for(run), None
        return {"reported": run.reported, "outcome": run.outcome, "notice": notice}

    async def stop(self, folder: str) -> None:
        """Answers the training's report: it ends, and its workers take the next one. Nobody waits for it any more."""
        run = self._runs.get(folder)
        if run is not None:
            run.is_stopped = True
            if run.outcome is not None or run.group is None:
                del self._runs[folder]
            self._change()

    async def abandon(self, folder: str) -> None:
        """Ends a training wherever it is, and the group that it runs in."""
        run = self._runs.get(folder)
        if run is None or run.is_stopped:
            return
        del self._runs[folder]
        if run.outcome is None:
            self._cut(run, {})
        self._change()

    async def prepare(self, shape: GroupShape, count: int) -> None:
        """Starts groups that will be wanted in a moment."""
        for _ in range(count):
            self._add(shape)

    async def close(self, timeout: float) -> int:
        """Ends all trainings and groups; returns how many groups were still there after `timeout` seconds."""
        self._is_closed = True
        for run in self._runs.values():
            run.outcome = run.outcome or {}
        for group in [*self._groups.values()]:
            group.is_ending = True
            if group.run is not None or not group.has_asked:
                group.run = None
                self._take_down(group)
        self._change()
        await self._until(lambda: not self._groups, timeout)
        self._is_closed = False  # for a phase that comes later
        return len(self._groups)

    # What a group's workers call.

    async def take(self, name: str, workers: str = "", held: int = 0) -> Training | str | None:
        """Waits for the group's next training, the one that it has if its workers were started again; END: end; None: ask again.
        `workers`: another name each time that they are started. `held`: bytes of rank 0's memory."""
        group = self._groups.get(name)
        if group is None or workers in group.lost:
            return END
        if workers != group.workers:
            group.lost.add(group.workers)
            group.workers = workers
        if group.run is not None and group.run.is_running:
            self._lose(group.run, "a worker died")
        if not group.has_asked:
            group.idle_since = time.monotonic()
        group.has_asked, group.is_waiting, group.failed_starts = True, False, 0
        if group.has_served:
            group.first_held = group.first_held or held
            group.is_ending |= held - group.first_held > _GROWTH_BYTES
        self._change()
        await self._until(lambda: group.is_ending or group.run is not None, min(_POLL_S, self._idle_s))
        if group.run is None and time.monotonic() - group.idle_since >= self._idle_s:
            group.is_ending = True
        if group.is_ending:
            return END
        return None if group.run is None else group.run.training

    async def started(self, name: str, folder: str, workers: str = "") -> bool:
        """Takes note that the workers train: what fails from here on is a try. Returns whether they shall, still."""
        run = self._run_of(name, folder, workers)
        if run is None:
            return False
        if run.is_stopped:  # meanwhile: its folder is not touched any more
            self._end(run, {})
            self._change()
            return False
        run.is_running, run.tries, run.began = True, run.tries + 1, time.monotonic()
        return True

    async def report(self, name: str, folder: str, step: int, workers: str = "") -> bool:
        """Takes note of an evaluation; returns whether the training is to go on, once somebody has decided."""
        run = self._run_of(name, folder, workers)
        if run is None:
            return False
        tries, run.reported = run.tries, step
        self._change()
        await self._until(lambda: run.judged >= step or run.is_stopped or run.outcome is not None or run.tries != tries)
        return not run.is_stopped and run.outcome is None

    async def finished(self, name: str, folder: str, failure: str | None, kind: str, workers: str = "") -> None:
        """Takes note of the end of a training; called by the first rank that fails, too."""
        run, group = self._run_of(name, folder, workers), self._groups.get(name)
        if run is None or group is None:
            return
        if kind == CRASHED:
            self._lose(run, failure or "")
        else:
            self._end(run, {} if failure is None else {"failure": failure, "kind": kind})
        group.has_asked, group.has_served = False, True
        self._change()

    # What a group's controller calls.

    async def controller_started(self, name: str, controller: Any) -> None:
        """Takes the handle by which a group is ended."""
        group = self._groups.get(name)
        if group is not None:
            group.controller = controller
            if group.is_ending:
                self._take_down(group)

    async def group_failed(self, name: str, reason: str, *, is_waiting: bool) -> None:
        """Takes note that a group's workers are started again, and why; `is_waiting`: there was no room for them."""
        group = self._groups.get(name)
        if group is None:
            return
        group.is_waiting = is_waiting
        if group.run is not None and group.run.is_running:
            self._lose(group.run, reason)
        if not is_waiting and not group.has_asked:
            group.failed_starts += 1
        group.has_asked = False
        if group.failed_starts >= _MOST_STARTS:
            self._give_up(group, reason)
        self._change()

    def group_ended(self, group: Group, reason: str | None) -> None:
        """Takes note that a group is no more; `reason` if that was not in order."""
        self._groups.pop(group.name, None)
        run, group.run = group.run, None
        if run is not None and run.outcome is None:
            if run.is_running:
                self._lose(run, reason or "its worker group ended")
            elif run.is_stopped or reason is not None:
                self._end(run, {} if run.is_stopped else {"failure": reason, "kind": CRASHED})
            run.group = None
        elif reason is not None and not group.is_ending:
            self._give_up(group, reason)
        self._change()

    # Under the hood.

    def _run_of(self, name: str, folder: str, workers: str) -> Run | None:
        group = self._groups.get(name)
        run = None if group is None or group.workers != workers else group.run
        return run if run is not None and run.training.folder == folder and run.outcome is None else None

    def _lose(self, run: Run, reason: str) -> None:
        """A try has failed: its workers will ask for the training again, unless it has had enough tries."""
        if not run.is_running:
            return
        run.is_running = False
        if run.is_stopped:
            self._end(run, {})
        elif run.tries > run.training.retries:
            self._end(run, {"failure": reason, "kind": CRASHED})
        else:
            again = f"once more from its latest checkpoint, try {run.tries + 1} of {run.training.retries + 1}"
            run.notice = f"{Path(run.training.folder).name}: {reason}; {again}"
            self._change()

    def _end(self, run: Run, outcome: dict[str, Any]) -> None:
        run.outcome, run.is_running = outcome, False
        if run.group is not None:
            run.group.run, run.group.idle_since = None, time.monotonic()
        run.group = None
        if run.is_stopped:
            self._runs.pop(run.training.folder, None)

    def _cut(self, run: Run, outcome: dict[str, Any]) -> None:
        """Ends a run whose workers do not end by themselves, and their group with it."""
        group = run.group
        self._end(run, outcome)
        if group is not None:
            self._take_down(group)

    def _give_up(self, group: Group, reason: str) -> None:
        """Ends a group that does not come up, and with it the training that waited longest for one of its kind."""
        run = group.run or next((run for run in self._waiting() if run.training.shape == group.shape), None)
        if run is not None:
            self._end(run, {"failure": reason, "kind": CRASHED})
        self._take_down(group)

    def _waiting(self) -> list[Run]:
        return [run for run in self._runs.values() if run.group is None and run.outcome is None and not run.is_stopped]

    def _waits_for(self, run: Run) -> str | None:
        if run.group is not None or run.outcome is not None:
            return None
        shape = run.training.shape
        waiting = [group for group in self._groups.values() if group.shape == shape and group.is_waiting]
        return f"waiting for {shape} to be free: the cluster has no room now" if waiting else None

    def _change(self) -> None:
        """Gives trainings to groups, starts groups that are missing, and wakes all who wait for news."""
        if not self._is_closed:
            self._provide()
        self._news.set()
        self._news = asyncio.Event()

    def _provide(self) -> None:
        for run in self._waiting():
            groups = [group for group in self._groups.values() if group.run is None and not group.is_ending]
            free = next((g for g in groups if g.has_asked and g.shape == run.training.shape), None)
            if free is not None:
                free.run, run.group = run, free
        lacking: dict[GroupShape, int] = {}
        for run in self._waiting():
            lacking[run.training.shape] = lacking.get(run.training.shape, 0) + 1
        for shape, wanted in lacking.items():
            # Those that come up, and those whose training is about to end.
            coming = [
                group
                for group in self._groups.values()
                if group.shape == shape and not group.is_ending and (group.run is None or group.run.is_stopped)
            ]
            for _ in range(wanted - len(coming)):
                for other in self._groups.values():
                    # It has what the new one needs, perhaps.
                    other.is_ending |= other.run is None and other.shape != shape
                self._add(shape)

    def _add(self, shape: GroupShape) -> None:
        group = Group(f"group-{next(self._numbers):03d}", shape)
        self._groups[group.name] = group
        self._start(group)

    def _take_down(self, group: Group) -> None:
        """Ends a group at once. Its controller may be busy waiting for room: then it is killed, and its placement group goes with it."""
        group.is_ending = True
        if group.controller is None:
            return  # as soon as it is known

        def end(controller: Any = group.controller) -> None:
            import ray

            with suppress(Exception):  # the actor ends in this call, whichever way it tells
                ray.get(controller.abort.remote(), timeout=_ABORT_S)
            with suppress(Exception):
                ray.kill(controller)

        threading.Thread(target=end, name=f"end {group.name}", daemon=True).start()

    async def _until(self, ready: Callable[[], bool], timeout: float | None = None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not ready():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), left)

    async def _watch_clock(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            for run in [*self._runs.values()]:
                late = _late(run, now)
                if late is not None:
                    self._cut(run, {"failure": late, "kind": TIMED_OUT})
                    self._change()


def _late(run: Run, now: float) -> str | None:
    """Why a run has taken too long, if it has."""
    training = run.training
    if not run.is_running:
        return None
    if training.most_s is not None and now - run.began > training.most_s:
        return f"has not ended after {training.most_s:g} s (failures.trial_timeout), at step {run.reported}; {_last_words(training)}"
    if training.first_report_s is not None and not run.reported and now - run.began > training.first_report_s:
        return f"no evaluation after {training.first_report_s:g} s (failures.first_report_timeout); {_last_words(training)}"
    return None


def _last_words(training: Training) -> str:
    from cps_ray.runs import LOG_FILE

    try:
        lines = Path(training.folder, LOG_FILE).read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    return f"its log ends with: {lines[-1]}" if lines else "its workers have logged nothing"
