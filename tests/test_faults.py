"""Faults that are really injected into real sweeps: nothing that was finished is lost, and no process is left.

Each test compares the study afterwards with that of a sweep that nobody disturbed. It leaves a line for each fault in the file named by
CPS_RAY_FAULT_TABLE; with CPS_RAY_FAULT_RUNS=3 each fault comes three times.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytest
from support import TINY_DATA

from cps_ray.files import read_json
from cps_ray.on_ray.cluster import _free_port
from cps_ray.runs import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RUNS = int(os.environ.get("CPS_RAY_FAULT_RUNS", "1"))
TABLE = os.environ.get("CPS_RAY_FAULT_TABLE")
SWEEP = (
    """\
version: 1
name: tiny
output: runs
train:
"""
    + TINY_DATA
    + """\
  model: {encoder: tu-test_efficientnet, options: {decoder_channels: 16, decoder_aspp_dropout: 0.0}}
  loss: {supervised: "fault_plugin:loss"}
  optim: {name: adamw, lr: 3e-3}
  schedule: {steps: 60, eval_every: 5}
  resources: {cpus_per_worker: 0.5}
budget: {trials: 4}
sampler: {type: random}
concurrency: 1
early_stopping: {type: none}
search_space:
  cps.weight: {type: float, low: 0.05, high: 0.2}
  optim.lr: {type: float, low: 1e-4, high: 1e-2, log: true}
baselines:
  supervised-only: {method: supervised}
final: {retrain: best, seeds: [1]}
"""
)
PLUGIN = '''
"""A loss that is cross entropy, until a file beside it says otherwise: what is to happen, and how often."""

import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

FAULT = Path(__file__).with_name("fault")


def loss(logits, target):
    fault = ""
    if target.shape[-1] == 48 and FAULT.exists():  # a crop, not what the contract is checked with
        fault, times = FAULT.read_text().split()
        FAULT.write_text(f"{fault} {int(times) - 1}") if int(times) > 1 else FAULT.unlink()
    if fault == "raise":
        raise KeyError("no such class")
    if fault == "hang":
        time.sleep(3600)
    if fault == "greedy":
        torch.empty(2**50)  # more than there is: as a CUDA device that is full, the allocator refuses
    return cross_entropy(logits, target, ignore_index=255) * (float("nan") if fault == "nan" else 1.0)
'''
USUAL = re.compile(
    r"\d\d:\d\d  (\S+  (step |started|finished|is the new)|search|final runs|evaluating)|Ray dashboard|  It asks|Sweep folder"
)
"""Lines that every sweep prints."""


def started_at(pid: int) -> str | None:
    """Returns when a process was started, by which it is told from a later one with its number; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def processes() -> Iterator[tuple[int, int]]:
    """Gives number and parent of every process."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            yield int(entry.name), int((entry / "stat").read_text().rpartition(")")[2].split()[1])


class Command:
    """A sweep command in a process of its own: what it prints, and every process that it has ever started."""

    def __init__(self, cwd: Path, *words: str) -> None:
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        env["PYTHONPATH"] = os.pathsep.join([str(cwd), env.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "cps_ray.sweep", *words],
            cwd=cwd,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[tuple[float, str]] = []
        self._known = {self.process.pid: started_at(self.process.pid)}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    def _watch(self) -> None:
        while self.living():
            parents = [*processes()]
            for _ in range(4):  # children of children
                for pid, parent in parents:
                    if parent in self._known and pid not in self._known:
                        self._known[pid] = started_at(pid)
            time.sleep(0.3)

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def living(self) -> dict[int, str]:
        """Returns those of its processes that are there, with their command lines."""
        found = {}
        for pid, began in [*self._known.items()]:
            if began is not None and started_at(pid) == began:
                with suppress(OSError):
                    found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        return found

    def pids(self, title: str) -> list[int]:
        """Returns the processes whose titles begin so."""
        return [pid for pid, command in self.living().items() if re.match(title, command)]

    def until(self, wanted: Callable[[str], Any], seconds: float = 240.0, since: float = 0.0) -> float:
        """Waits for a line; returns when it came."""
        deadline = time.monotonic() + seconds
        while True:
            for at, line in self.lines:
                if at > since and wanted(line):
                    return at
            assert time.monotonic() < deadline, f"no such line in {seconds:g} s:\n{self.text}"
            assert self._reader.is_alive(), f"ended before such a line:\n{self.text}"
            time.sleep(0.02)

    def end(self, seconds: float = 400.0) -> int:
        """Waits for its end; returns its exit code."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"did not end in {seconds:g} s:\n{self.text}") from None
        self._reader.join(5)
        return self.process.returncode

    def left(self, seconds: float = 20.0) -> dict[int, str]:
        """Returns those of its processes that are still there after so many seconds."""
        deadline = time.monotonic() + seconds
        while self.living() and time.monotonic() < deadline:
            time.sleep(0.2)
        left = self.living()
        for pid in left:  # the next test is to have the machine for itself
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        return left

    def saw(self, since: float) -> str:
        """Returns the last of what it printed since then that is not what every sweep prints."""
        told = [re.sub(r"\x1b\[\d+m", "", line) for at, line in self.lines if at > since and not USUAL.match(line)]
        verdict = next((n for n, line in enumerate(told) if line.startswith("Best trial")), len(told))
        return " / ".join(line[:300] for line in told[:verdict][-3:]) or "nothing"


@dataclass
class Faults:
    """The folder of one test's sweep, and the lines of the table that the test leaves."""

    name: str
    cwd: Path
    rows: list[list[Any]] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.cwd / "runs/tiny"

    def start(self, *words: str) -> Command:
        """Starts the sweep, or goes on with it."""
        self.commands.append(
            Command(self.cwd, *(words or (("resume", "runs/tiny") if self.root.exists() else ("tiny.yaml",))))
        )
        return self.commands[-1]

    def fault(self, what: str) -> None:
        (self.cwd / "fault").write_text(what)

    def note(self, saw: str, seconds: float, code: int | None, left: dict[int, str] | None = None) -> None:
        """Adds a line: what was seen, the seconds until the next evaluation or the exit, the exit code, the processes left."""
        self.rows.append([saw.replace(str(self.cwd), "."), f"{seconds:.1f}", code, {} if left is None else left])

    def ended(self, command: Command) -> None:
        """Waits for the good end of a sweep in which the noted faults have happened."""
        code = command.end()
        left = command.left()
        self.rows = [[saw, seconds, code, left] for saw, seconds, _, _ in self.rows]
        assert code == 0, command.text

    def check(self, expected: "Outcome", *, failed: tuple[int, ...] = ()) -> None:
        """Writes the lines, and compares what is on disk with the undisturbed sweep; `failed`: trials that the fault was to end."""
        found = Outcome.of(self.root)
        lost = [n for n, trial in expected.trials.items() if n not in failed and found.trials.get(n) != trial]
        self.write(len(lost))
        assert not lost, f"{found.trials}\n{expected.trials}"
        assert not [row for row in self.rows if row[3]], "processes are left"
        if not failed:
            assert found == expected

    def write(self, lost: int) -> None:
        """Writes the lines of the table."""
        for saw, seconds, code, left in self.rows:
            line = f"| {self.name} | {saw} | {seconds} | {lost} | {'' if code is None else code} | {len(left)} |"
            print(line, *(title.strip() for title in left.values()), sep="\n")
            if TABLE:
                with open(TABLE, "a") as file:
                    file.write(line + "\n")


@dataclass(frozen=True)
class Outcome:
    """What a sweep has found, without what depends on the clock."""

    counts: dict[str, int]
    trials: dict[int, Any]
    final: Any
    curves: dict[str, list[tuple[int, float]]]

    @classmethod
    def of(cls, root: Path) -> "Outcome":
        study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{root}/study.db")
        summary = read_json(root / "summary.json")
        return cls(
            summary["trials"],
            {
                t.number: (t.state.name, t.params, t.values, t.intermediate_values, t.user_attrs.get("failure"))
                for t in study.trials
            },
            summary["final"],
            {
                path.parent.name: [(record["step"], record["val/miou"]) for record in read_metrics(path.parent)]
                for path in sorted(root.glob("*/*/metrics.jsonl"))
            },
        )


@pytest.fixture
def faults(tmp_path: Path, shards: Path, request: pytest.FixtureRequest) -> Iterator[Faults]:
    write_sweep(tmp_path, shards)
    faults = Faults(request.node.name.removeprefix("test_"), tmp_path)
    yield faults
    for command in faults.commands:
        command.left(0)


def write_sweep(folder: Path, shards: Path) -> None:
    (folder / "tiny.yaml").write_text(SWEEP.replace("SHARDS", str(shards)))
    (folder / "fault_plugin.py").write_text(PLUGIN)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Outcome:
    """What the sweep finds when nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_sweep(folder, shards)
    command = Command(folder, "tiny.yaml")
    assert command.end() == 0, command.text
    assert not command.left()
    return Outcome.of(folder / "runs/tiny")


def at_step(run: str, step: int) -> Callable[[str], bool]:
    return lambda line: f"{run}  step {step}/" in line


def later(run: str, step: int) -> Callable[[str], bool]:
    """Takes the report of a run after a step."""
    return lambda line: bool((found := re.search(rf"{run}  step (\d+)/", line)) and int(found[1]) > step)


def last_step(command: Command, run: str) -> int:
    steps = [int(found[1]) for _, line in command.lines if (found := re.search(rf"{run}  step (\d+)/", line))]
    return max(steps, default=0)


def interrupt(command: Command) -> None:
    command.process.send_signal(signal.SIGINT)


def interrupt_twice(command: Command) -> None:
    command.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    command.process.send_signal(signal.SIGINT)


def terminate(command: Command) -> None:
    command.process.send_signal(signal.SIGTERM)


def terminate_all(command: Command) -> None:
    for pid in command.living():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def kill(command: Command) -> None:
    command.process.kill()


@pytest.mark.parametrize(
    ("stop", "code", "most_s"),
    [
        pytest.param(interrupt, 130, 8.0, id="SIGINT"),
        pytest.param(interrupt_twice, 130, 8.0, id="SIGINT twice"),
        pytest.param(terminate, 143, 8.0, id="SIGTERM"),
        pytest.param(terminate_all, 143, 10.0, id="SIGTERM to every process"),
        pytest.param(kill, -9, 8.0, id="SIGKILL of the driver"),
    ],
)
def test_stopped(
    faults: Faults, undisturbed: Outcome, stop: Callable[[Command], None], code: int, most_s: float
) -> None:
    for number in range(RUNS):
        command = faults.start()
        command.until(at_step(f"{number:04d}", 20))
        began = time.monotonic()
        stop(command)
        found = command.end(120)
        seconds = time.monotonic() - began
        # Ray's own agents miss their raylet after a minute: it is not they that hold anything.
        faults.note(command.saw(began), seconds, found, command.left(120))
        assert found == code, command.text
        assert seconds < most_s, command.text
        if stop is not kill:
            assert "Resume: python -m cps_ray.sweep resume runs/tiny" in command.text
            assert read_json(faults.root / "summary.json")["status"] == "interrupted"
    command = faults.start()
    assert command.end() == 0, command.text
    assert not command.left()
    faults.check(undisturbed)


@pytest.mark.parametrize(
    "title",
    [
        pytest.param("ray::(ResourceTrainable|TuneTrial)", id="trial actor"),
        pytest.param("ray::TrainController", id="controller"),
        pytest.param("ray::RayTrainWorker", id="worker"),
        pytest.param("ray::_WorkerGroupsActor", id="actor that hands out trainings"),
    ],
)
def test_killed(faults: Faults, undisturbed: Outcome, title: str) -> None:
    command = faults.start()
    for number in range(RUNS):
        run = f"{number:04d}"
        command.until(at_step(run, 20))
        victims = command.pids(title)
        assert victims, command.living()
        began, step = time.monotonic(), last_step(command, run)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        step += 5  # it may have been on its way
        recovered = command.until(later(run, step), since=began)
        faults.note(command.saw(began), recovered - began, None)
    faults.ended(command)
    faults.check(undisturbed)


ENDED = {
    "nan": "not finite at step",
    "raise": "KeyError: 'no such class'",
    "greedy": "memory",
    "hang": "its log ends with: ",
}
"""Fault -> what the line of a trial that it ends says."""


@pytest.mark.parametrize(
    ("fault", "limits", "is_ended"),
    [
        pytest.param("nan 1", "", True, id="loss is NaN"),
        pytest.param("raise 1", "", False, id="exception in user data"),
        pytest.param("raise 2", "", True, id="exception in user data, again"),
        pytest.param("hang 1", "first_report_timeout: 45s", True, id="hang before the first report"),
        pytest.param("hang 1", "trial_timeout: 60s", True, id="hang"),
        pytest.param("greedy 1", "on_oom: fail", True, id="out of memory, fail"),
    ],
)
def test_in_a_training(faults: Faults, undisturbed: Outcome, fault: str, limits: str, is_ended: bool) -> None:
    command = faults.start("tiny.yaml", "--set", f"failures={{{limits}}}")
    # The workers of the first training take seconds to start.
    command.until(lambda line: "0000  started" in line)
    runs = 1 if "first_report" in limits else RUNS
    for number in range(runs):
        run = f"{number:04d}"
        if "first_report" not in limits:
            command.until(at_step(run, 20))
        began = time.monotonic()
        faults.fault(fault)
        if is_ended:
            told = command.until(lambda line, run=run: re.search(f"{run}  (failed|collapsed): ", line), since=began)
            recovered = command.until(later("", 0), since=told)
            assert ENDED[fault.split()[0]] in (faults.root / "trials" / run / "error.txt").read_text()
        else:
            recovered = command.until(later(run, last_step(command, run) + 5), since=began)
        faults.note(command.saw(began), recovered - began, None)
    faults.ended(command)
    faults.check(undisturbed, failed=tuple(range(runs)) if is_ended else ())
    counts = read_json(faults.root / "summary.json")["trials"]
    assert counts["failed"] + counts["collapsed"] == (runs if is_ended else 0)


def test_out_of_memory_halve(faults: Faults, undisturbed: Outcome) -> None:
    """The trial runs again with half as many images at once, and is marked: batch norm's batch is another one."""
    command = faults.start("tiny.yaml", "--set", "failures={on_oom: halve}")
    for number in range(RUNS):
        run = f"{number:04d}"
        command.until(at_step(run, 20))
        began = time.monotonic()
        faults.fault("greedy 1")
        told = command.until(lambda line: "compute.accumulate 2" in line, since=began)
        recovered = command.until(later(run, last_step(command, run)), since=told)
        faults.note(command.saw(began), recovered - began, None)
    faults.ended(command)
    faults.check(undisturbed, failed=tuple(range(RUNS)))
    counts = read_json(faults.root / "summary.json")["trials"]
    assert counts["complete"] == 4
    assert "accumulate: 2" in (faults.root / "trials/0000/config.yaml").read_text()
    assert (
        optuna.load_study(study_name="tiny", storage=f"sqlite:///{faults.root}/study.db")
        .trials[0]
        .user_attrs["accumulate"]
        == 2
    )


def test_every_rate_diverges(faults: Faults) -> None:
    """The limits end the sweep: what was learnt is on disk."""
    space = "search_space={optim.lr: {type: float, low: 1.0e+20, high: 1.0e+25, log: true}}"
    began = time.monotonic()
    command = faults.start("tiny.yaml", "--set", space, "--set", "failures={max_consecutive: 2}")
    code = command.end()
    faults.note(command.saw(began), time.monotonic() - began, code, command.left())
    faults.write(0)
    assert code == 4, command.text
    assert "2 trials in a row failed or collapsed" in command.text
    assert read_json(faults.root / "summary.json")["trials"]["collapsed"] >= 2


@contextmanager
def small_disk(folder: Path, megabytes: int = 96) -> Iterator[None]:
    """Mounts a small disk at a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, free: int = 0) -> None:
    """Fills a disk but for so many bytes."""
    room = os.statvfs(disk)
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        if free:
            os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_bsize - free)
        while not free:
            file.write(b"x" * 2**16)


def assert_one_line(command: Command, code: int, names: Path) -> None:
    assert "Traceback" not in command.text, command.text
    errors = [line for _, line in command.lines if line.startswith("error: ")]
    assert len(errors) == 1, command.text
    assert str(names) in errors[0] or str(names.relative_to(names.parents[2])) in errors[0], errors
    assert code == 1, command.text


@pytest.mark.parametrize(
    ("disk", "state_fits"),
    [
        pytest.param("runs", False, id="full disk below the driver"),
        pytest.param("runs/tiny/trials", False, id="full disk while a checkpoint is written"),
        pytest.param("runs/tiny/trials", True, id="full disk before a checkpoint is renamed"),
    ],
)
def test_disk(faults: Faults, undisturbed: Outcome, disk: str, state_fits: bool) -> None:
    path, trials = faults.cwd / disk, faults.root / "trials"
    with small_disk(faults.cwd / "runs"):
        command = faults.start()
        command.until(lambda line: "Ray dashboard" in line)
        # Of its own, so that the one disk or the other is full.
        with small_disk(trials):
            for number in range(RUNS):
                run = f"{number:04d}"
                command.until(at_step(run, 20))
                began = time.monotonic()
                state = (
                    max(trials.glob("*/checkpoint_*/state.pt"), key=lambda path: path.stat().st_mtime).stat().st_size
                )
                fill(path, (state // 4096 + 2) * 4096 if state_fits else 0)
                code = command.end(120)
                faults.note(command.saw(began), time.monotonic() - began, code, command.left())
                (path / "filler").unlink()
                assert_one_line(command, code, faults.root if disk == "runs" else trials)
                command = faults.start()
            assert command.end() == 0, command.text
            assert not command.left()
            faults.check(undisturbed)


def test_read_only_folder(faults: Faults, undisturbed: Outcome) -> None:
    with small_disk(faults.cwd / "runs"):
        for number in range(RUNS):
            command = faults.start()
            command.until(at_step(f"{number:04d}", 20))
            interrupt(command)
            assert command.end(60) == 130
            assert not command.left()
            subprocess.run(["mount", "-o", "remount,ro", faults.cwd / "runs"], check=True)
            began = time.monotonic()
            command = faults.start()
            code = command.end(120)
            faults.note(command.saw(began), time.monotonic() - began, code, command.left())
            status = Command(faults.cwd, "status", "runs/tiny")
            assert status.end() == 0, status.text
            subprocess.run(["mount", "-o", "remount,rw", faults.cwd / "runs"], check=True)
            assert_one_line(command, code, faults.root)
        command = faults.start()
        assert command.end() == 0, command.text
        assert not command.left()
        faults.check(undisturbed)


@pytest.mark.parametrize(
    "name", [pytest.param("metrics.jsonl", id="metrics.jsonl"), pytest.param("checkpoint_*/state.pt", id="checkpoint")]
)
def test_truncated(faults: Faults, undisturbed: Outcome, name: str) -> None:
    command = faults.start()
    for number in range(RUNS):
        run = f"{number:04d}"
        command.until(at_step(run, 20))
        interrupt(command)
        assert command.end(60) == 130
        assert not command.left()
        latest = max((faults.root / "trials" / run).glob(name))
        # Of the records the last line.
        os.truncate(latest, latest.stat().st_size - 10 if "metrics" in name else latest.stat().st_size * 2 // 3)
        step, began = last_step(command, run), time.monotonic()
        command = faults.start()
        recovered = command.until(later(run, step), since=began)
        faults.note(command.saw(began), recovered - began, None)
    faults.ended(command)
    faults.check(undisturbed)


def test_truncated_study(faults: Faults, undisturbed: Outcome) -> None:
    study = faults.root / "study.db"
    for number in range(RUNS):
        command = faults.start()
        command.until(at_step(f"{number:04d}", 20))
        interrupt(command)
        assert command.end(60) == 130
        assert not command.left()
        copy = study.read_bytes()
        os.truncate(study, len(copy) * 2 // 3)
        began = time.monotonic()
        command = faults.start()
        code = command.end(60)
        faults.note(command.saw(began), time.monotonic() - began, code, command.left())
        assert code == 2, command.text
        assert "study.db" in command.text
        assert "Traceback" not in command.text, command.text
        study.write_bytes(copy)
    command = faults.start()
    assert command.end() == 0, command.text
    assert not command.left()
    faults.check(undisturbed)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, faults: Faults) -> Iterator[Callable[[], Any]]:
    """Gives what starts a cluster: a head, where the driver is, and two nodes that train."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(faults.cwd), os.environ.get("PYTHONPATH", "")]))
    clusters = []

    def start() -> Any:
        clusters.append(
            Cluster(
                initialize_head=True,
                head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_port": _free_port(0)},
            )
        )
        for _ in range(2):
            clusters[-1].add_node(num_cpus=2, object_store_memory=100 * 2**20)
        return clusters[-1]

    yield start
    for each in clusters:
        each.shutdown()


def raylet(node: Any) -> "subprocess.Popen[bytes]":
    found: subprocess.Popen[bytes] = node.all_processes["raylet"][0].process
    return found


def of_sweep() -> dict[int, str]:
    """Returns the processes of sweeps that descend from this one, with their titles; without those that Ray keeps for the whole cluster."""
    parents, known = [*processes()], {os.getpid()}
    for _ in range(6):
        known |= {pid for pid, parent in parents if parent in known}
    found = {}
    for pid in known:
        with suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            if re.match(
                "ray::(?!IDLE|DashboardAgent|RuntimeEnvAgent|_AutoscalingCoordinatorActor|TrainStateActor)", title
            ):
                found[pid] = title
    return found


def left_of_sweep(seconds: float = 20.0) -> dict[int, str]:
    deadline = time.monotonic() + seconds
    while of_sweep() and time.monotonic() < deadline:
        time.sleep(0.5)
    return of_sweep()


def test_second_node_lost(faults: Faults, undisturbed: Outcome, cluster: Callable[[], Any]) -> None:
    """SIGKILL of the raylet of the node that trains: another node goes on, and one that joins late is as good."""
    nodes = cluster()
    command = faults.start("tiny.yaml", "--address", nodes.address)
    for number in range(RUNS):
        run = f"{number:04d}"
        command.until(at_step(run, 20))
        training = {pid for pid, title in of_sweep().items() if "RayTrainWorker" in title}
        homes = {parent for pid, parent in processes() if pid in training}
        (victim,) = [node for node in nodes.worker_nodes if raylet(node).pid in homes]
        began = time.monotonic()
        raylet(victim).kill()
        raylet(victim).wait()  # its workers look for its number
        while any(started_at(pid) for pid in training):  # they may report once more
            time.sleep(0.1)
        recovered = command.until(later("", 0), since=time.monotonic(), seconds=400)
        faults.note(command.saw(began), recovered - began, None)
        nodes.remove_node(victim, allow_graceful=False)
        nodes.add_node(num_cpus=2, object_store_memory=100 * 2**20)
    code = command.end()
    left = left_of_sweep()
    faults.rows = [[saw, seconds, code, left] for saw, seconds, _, _ in faults.rows]
    assert code == 0, command.text
    faults.check(undisturbed)


def test_head_lost_in_the_final_phase(faults: Faults, undisturbed: Outcome, cluster: Callable[[], Any]) -> None:
    for number in range(min(RUNS, 2)):  # there are two final runs
        nodes = cluster()
        words = ("resume", "runs/tiny") if number else ("tiny.yaml",)
        command = faults.start(*words, "--address", nodes.address)
        command.until(at_step(("best-seed1", "supervised-only-seed1")[number], 20))
        address, began = nodes.address, time.monotonic()
        nodes.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
        code = command.end(300)
        faults.note(command.saw(began), time.monotonic() - began, code, left_of_sweep(60))
        nodes.shutdown()
        assert code == 1, command.text
        assert "has not answered for" in command.text
        assert f"Resume: python -m cps_ray.sweep resume runs/tiny --address {address}" in command.text
    command = faults.start("resume", "runs/tiny", "--address", cluster().address)
    assert command.end() == 0, command.text
    faults.check(undisturbed)
