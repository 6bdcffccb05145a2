"""A Ray cluster to work on: starting a local one or joining another, and how many trainings fit on it."""

import fcntl
import math
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cps_ray.config.train import ResourcesConfig
from cps_ray.errors import ResourceError
from cps_ray.text import first_line

T = TypeVar("T")

WORKER_ENV = {
    # A report waits for the next health check: 2 s by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    # Relative paths must mean the same in a worker as in the driver.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The display is ours; with the new output Tune prints boxes even when asked to be quiet.
    "RAY_AIR_NEW_OUTPUT": "0",
}
_LONGEST_FOLDER = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/dash_ReportHead")
"""Longest name, in bytes, of a folder in which Ray can put its sockets: the kernel takes 107."""
_TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
_DATA_CPUS = 1.0
"""Ray Data hangs without a word unless one whole CPU is free of reservations."""
_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """A connected cluster."""

    dashboard_url: str
    local: bool
    """Started here, and stopped with this process."""

    def banner(self) -> list[str]:
        """Where the dashboard is and how to get in."""
        lines = [f"Ray dashboard: {self.dashboard_url}"]
        if self.local:
            ray = os.path.relpath(Path(sys.executable).with_name("ray"))
            path = os.environ.get(_TOKEN_PATH)
            where = f"{_TOKEN_PATH}={path} " if path else ""
            lines.append(f"  It asks for a token once: `{where}{ray} get-auth-token` prints it.")
        return lines


@contextmanager
def connected(address: str | None, job: str = "cps_ray") -> Iterator[Cluster]:
    """Joins the cluster at `address` (or in RAY_ADDRESS), else starts one on this machine; leaves or stops it at the end.

    `job`: its name among the jobs in Ray's dashboard. Raises ResourceError if the address does not answer.
    """
    # Here for the driver, below for workers: each process reads them by itself.
    for name, value in WORKER_ENV.items():
        os.environ.setdefault(name, value)
    address = address or os.environ.get("RAY_ADDRESS")
    _check_answers(address)
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": WORKER_ENV},
    }
    if address is not None:
        yield from _joined(address, job, options)
        return
    with _dashboard_port() as port:
        # With two Ray instances on one host, Train's cleaner finds its own only by this address.
        api = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
        options["runtime_env"] = {"env_vars": WORKER_ENV | api}
        # Token authentication stays on: Ray's own default for local clusters.
        options |= {"dashboard_host": "127.0.0.1", "dashboard_port": port, "include_dashboard": True}
        _make_room()
        yield from _joined(None, job, options)


def _make_room() -> None:
    """Lets Ray and its processes write where they can: no longer in a TMPDIR that is too long for sockets or cannot be written, nor a
    token in such a home. Raises ResourceError if there is no other temporary folder."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        wanted = os.environ.get(name)
        if wanted is None or _takes_sockets(wanted):
            continue
        short = next((folder for folder in ("/tmp", "/var/tmp", "/dev/shm") if _takes_sockets(folder)), None)
        if short is None:
            raise ResourceError(
                f"{name}={wanted}: must be a folder that can be written and has at most {_LONGEST_FOLDER} bytes in its name, since Ray "
                f"puts sockets there. Set another one: {name}=FOLDER cps-ray ..."
            )
        os.environ[name] = short
    home = Path.home() / ".ray"
    if (
        not {"RAY_AUTH_TOKEN", _TOKEN_PATH} & set(os.environ)
        and not (home / "auth_token").is_file()
        and not _is_writable(home)
    ):
        handle, path = tempfile.mkstemp(prefix="cps-ray-token-")
        with open(handle, "w") as file:
            file.write(secrets.token_hex(32))
        os.environ[_TOKEN_PATH] = path


def _takes_sockets(folder: str) -> bool:
    return len(os.fsencode(os.path.abspath(folder))) <= _LONGEST_FOLDER and _is_writable(Path(folder))


def _is_writable(folder: Path) -> bool:
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return True
    return False


def _joined(address: str | None, job: str, options: dict[str, Any]) -> Iterator[Cluster]:
    import ray
    from ray.job_config import JobConfig

    in_main = threading.current_thread() is threading.main_thread()  # only there handlers can be set
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        named = JobConfig(metadata={"job_name": job})
        context = ray.init(address=address or "local", job_config=named, **options)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as err:
        raise ResourceError(
            f"--address {address or 'local'}: no Ray cluster can be joined there ({first_line(err)}). "
            "If it asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` prints there."
        ) from err
    finally:
        if in_main:
            # ray.init installs a handler that exits at once; a sweep has to save and to take down its trainings first.
            signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield Cluster(f"http://{context.dashboard_url}", local=address is None)
    finally:
        ray.shutdown()


def _check_answers(address: str | None) -> None:
    """Raises ResourceError if nothing listens at the address: Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # no address, or `auto`
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as err:
        raise ResourceError(
            f"--address {address}: no Ray cluster answers there ({err}). Start one: ray start --head"
        ) from err


@contextmanager
def _dashboard_port() -> Iterator[int]:
    """Ray's usual 8265 on 127.0.0.1, unless it is taken, or another command that is just starting is about to take it."""
    claim = Path(tempfile.gettempdir(), f"cps-ray-{os.getuid()}-dashboard.lock")
    with ExitStack() as held:
        try:
            fcntl.flock(held.enter_context(claim.open("w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            wanted = [8265, 0]
        except OSError:  # another command has it, or the file is not ours
            wanted = [0]
        yield _free_port(*wanted)


def _free_port(*wanted: int) -> int:
    for port in wanted:
        with socket.socket() as probe:
            # As the dashboard binds it: a port whose last owner has just ended counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ResourceError("no free port on 127.0.0.1 for the dashboard.")


def nodes() -> list[dict[str, float]]:
    """Resources of every living node of the connected cluster."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


class TooSmallError(ResourceError):
    """The cluster, as it is now, cannot hold a plan."""

    def __init__(self, what: str, hint: str, bundles: list[dict[str, float]]) -> None:
        """`bundles`: what the plan needs, as Ray's autoscaler takes it."""
        super().__init__(f"{what}. {hint}")
        self.what, self.bundles = what, bundles


def awaited(fits: Callable[[], T], cluster: Cluster, wait_s: float | None, say: Callable[[str], None]) -> T:
    """Returns what `fits` does, as soon as it raises TooSmallError no more: nodes may join late, and an autoscaler is asked for them.

    `wait_s`: after how many seconds the error is raised all the same; None: at once.
    """
    from ray.autoscaler.sdk import request_resources

    until = time.monotonic() + (wait_s or 0.0)
    waits = False
    try:
        while True:
            try:
                return fits()
            except TooSmallError as err:
                if cluster.local:  # it never grows
                    raise
                if wait_s is None:
                    raise ResourceError(f"{err} To wait for nodes that are still to come: --wait 10m.") from err
                if time.monotonic() >= until:
                    raise
                if not waits:
                    say(f"Waiting for nodes, {wait_s:g} s at most: {err.what}.")
                waits = True
                # Each time: the request is the cluster's, and another sweep that waits on it replaces ours.
                request_resources(bundles=err.bundles)
            time.sleep(_POLL_S)
    finally:
        if waits:
            request_resources(bundles=[])  # else the cluster would never scale down again


def trainings_at_once(
    resources: ResourcesConfig, concurrency: str | int, on: Sequence[Mapping[str, float]], *, streams: bool = True
) -> int:
    """Number of trainings that may run at once on these nodes, leaving Ray Data a whole CPU: the preflight.

    `streams`: whether they read unlabelled images, hence need Ray Data at all.

    Raises TooSmallError for a plan that could never be scheduled: Ray itself would wait for ever without a word.
    """
    worker = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    training = [{name: amount for name, amount in worker.items() if amount}] * resources.workers
    data = [{"CPU": _DATA_CPUS}] if streams else []
    need = f"{resources.workers} workers x ({resources.cpus_per_worker:g} CPUs, {resources.gpus_per_worker:g} GPUs)"
    have = (
        f"{sum(n.get('CPU', 0.0) for n in on):g} CPUs, {sum(n.get('GPU', 0.0) for n in on):g} GPUs on {len(on)} node(s)"
    )
    # Ray Data takes its CPU from one node: of all nodes the one where that costs the fewest workers.
    spares = range(len(on)) if streams else [None]
    fit = max((_bundles(resources, on, spare) for spare in spares), default=0) // resources.workers
    if fit < 1:
        without_data = _bundles(resources, on, None) // resources.workers
        why = "and Ray Data one whole CPU beside them, " if without_data else ""
        raise TooSmallError(
            f"resources: one training takes {need}, {why}but the cluster has {have}",
            "Lower resources.workers, cpus_per_worker or gpus_per_worker, or add nodes.",
            training + data,
        )
    if concurrency == "auto":
        return fit
    if int(concurrency) > fit:
        raise TooSmallError(
            f"concurrency: {concurrency} trainings at once, each {need}, and one whole CPU for Ray Data must fit, "
            f"but the cluster has {have}: {fit} fit",
            "Lower concurrency or resources.cpus_per_worker, or say `auto`.",
            training * int(concurrency) + data,
        )
    return int(concurrency)


def _bundles(resources: ResourcesConfig, on: Sequence[Mapping[str, float]], spare: int | None) -> int:
    """Workers that fit, when node number `spare` keeps a CPU for Ray Data."""
    total = 0
    for number, node in enumerate(on):
        cpus = node.get("CPU", 0.0) - (_DATA_CPUS if number == spare else 0.0)
        if cpus < 0:
            return 0  # this node has no CPU to spare, so Ray Data cannot have it here
        # Workers are not cut over nodes, so whole ones are counted node by node. 0.3 / 0.1 is 2.999...: hence the epsilon.
        fit = math.floor(cpus / resources.cpus_per_worker + 1e-9)
        if resources.gpus_per_worker > 0:
            fit = min(fit, math.floor(node.get("GPU", 0.0) / resources.gpus_per_worker + 1e-9))
        total += fit
    return total
