"""Waiting for a cluster that is too small as yet: nodes that join late, and an autoscaler that has to be asked."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import SMALL_SWEEP

from cps_ray.config.train import ResourcesConfig
from cps_ray.errors import ResourceError
from cps_ray.on_ray.cluster import Cluster, TooSmallError, awaited, nodes, trainings_at_once

JOINED = Cluster("http://x", local=False)
ONE = ResourcesConfig(workers=2, cpus_per_worker=1)
NEEDS = [{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0}]
LINE = (
    "resources: one training takes 2 workers x (1 CPUs, 0 GPUs), but the cluster has 0 CPUs, 0 GPUs on 1 node(s). "
    "Lower resources.workers, cpus_per_worker or gpus_per_worker, or add nodes."
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, float]]]:
    """What the autoscaler is asked for. A second of waiting passes at once."""
    asked: list[list[dict[str, float]]] = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    clock = [0.0]
    monkeypatch.setattr("cps_ray.on_ray.cluster.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("cps_ray.on_ray.cluster.time.sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    return asked


def growing(*sizes: int) -> Callable[[], int]:
    """Returns what fits on a cluster of so many CPUs, one size at each look, the last one from then on."""
    left = list(sizes)

    def fits() -> int:
        return trainings_at_once(ONE, "auto", [{"CPU": left.pop(0) if len(left) > 1 else left[0]}])

    return fits


def test_waits_until_there_is_room_and_says_so_once(asked: list[Any]) -> None:
    said: list[str] = []
    assert awaited(growing(0, 1, 2, 3), JOINED, 600.0, said.append) == 1
    assert asked == [NEEDS, NEEDS, NEEDS, []]
    assert said == [f"Waiting for nodes, 600 s at most: {LINE.partition('. ')[0]}."]


def test_where_there_is_room_nobody_waits(asked: list[Any]) -> None:
    assert awaited(growing(4), JOINED, 600.0, pytest.fail) == 1
    assert asked == []


def test_after_the_time_the_line_is_that_of_before(asked: list[Any]) -> None:
    with pytest.raises(TooSmallError) as err:
        awaited(growing(0), JOINED, 3.0, lambda _: None)
    assert str(err.value) == LINE
    assert err.value.exit_code == 5
    assert asked == [NEEDS, NEEDS, NEEDS, []]


def test_without_wait_it_is_refused_at_once_and_the_way_out_named(asked: list[Any]) -> None:
    with pytest.raises(ResourceError) as err:
        awaited(growing(0), JOINED, None, pytest.fail)
    assert str(err.value) == f"{LINE} To wait for nodes that are still to come: --wait 10m."
    with pytest.raises(ResourceError) as err:
        awaited(growing(0), Cluster("http://x", local=True), 600.0, pytest.fail)
    assert str(err.value) == LINE, "a cluster of this process never grows"
    assert asked == []


def test_ctrl_c_takes_the_request_back(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cps_ray.on_ray.cluster.time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        awaited(growing(0), JOINED, 600.0, lambda _: None)
    assert asked == [NEEDS, []]


def test_trainings_at_once_ask_for_as_many_bundles(asked: list[Any]) -> None:
    resources = ResourcesConfig(workers=1, cpus_per_worker=2, gpus_per_worker=1)
    with pytest.raises(TooSmallError) as err:
        trainings_at_once(resources, 3, [{"CPU": 8, "GPU": 2}], streams=False)
    assert err.value.bundles == [{"CPU": 2.0, "GPU": 1.0}] * 3


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_joins_late_is_waited_for() -> None:
    import ray
    from ray.cluster_utils import Cluster as Nodes

    there = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20})
    try:
        ray.init(address=there.address, log_to_driver=False)
        said: list[str] = []
        with ThreadPoolExecutor(1) as pool:  # nodes are added by the main thread alone
            fits = pool.submit(awaited, lambda: trainings_at_once(ONE, "auto", nodes()), JOINED, 120.0, said.append)
            while not said:
                time.sleep(0.1)
            there.add_node(num_cpus=3, object_store_memory=100 * 2**20)
            assert fits.result(timeout=60) == 1
        assert len(said) == 1
    finally:
        ray.shutdown()
        there.shutdown()


@pytest.fixture
def scaled_from_zero() -> Iterator[tuple[str, Path]]:
    """Address and logs of a cluster that Ray's autoscaler gives up to two nodes of two CPUs, each a process here.

    Not by Ray's AutoscalingCluster, which stops every Ray on the machine when it starts.
    """
    from ray._private.services import get_node_ip_address

    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray puts sockets there
    with socket.socket() as probe:
        probe.bind(("", 0))
        address = f"{get_node_ip_address()}:{probe.getsockname()[1]}"
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    lists += ("head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude", "rsync_filter")
    nowhere = {"use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}
    worker = {"resources": {"CPU": 2, "object_store_memory": 10**8}, "node_config": {}, "max_workers": 2}
    config = {
        "cluster_name": "zero",
        "max_workers": 2,
        "provider": {"type": "fake_multinode", "gcs_address": address, **nowhere},
        "available_node_types": {
            "worker": worker,
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 1,
        **{name: [] for name in lists},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
    }
    (folder / "scaling.json").write_text(json.dumps(config))
    words = f"start --head --block --num-cpus=0 --port={address.split(':')[1]} --object-store-memory=100000000"
    places = [f"--temp-dir={folder}", f"--autoscaling-config={folder}/scaling.json", "--include-dashboard=false"]
    head = subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), *words.split(), *places],
        env={**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield address, folder / "session_latest/logs"
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_waits_for_a_cluster_that_scales_from_zero(
    scaled_from_zero: tuple[str, Path], tmp_path: Path, shards: Path
) -> None:
    address, logs = scaled_from_zero
    text = (
        SMALL_SWEEP.replace("SHARDS", str(shards))
        .replace("seeds: [1]", "retrain: none")
        .replace("trials: 2", "trials: 1")
    )
    (tmp_path / "s.yaml").write_text(text.replace("cpus_per_worker: 0.5", "cpus_per_worker: 1"))
    until = time.monotonic() + 60
    while time.monotonic() < until and "update iteration" not in read(logs / "monitor.log"):
        time.sleep(0.5)
    words = ["s.yaml", "--address", address, "--wait", "3m"]
    done = subprocess.run(
        [sys.executable, "-m", "cps_ray.sweep", *words],
        cwd=tmp_path,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Waiting for nodes, 180 s at most: ") == 1
    assert "but the cluster has 0 CPUs, 0 GPUs on 1 node(s).\n" in done.stdout
    requests = re.findall(r"From request_resources:\n (.*)", read(logs / "monitor.log"))
    assert "{'CPU': 1.0}: 2 from request_resources()" in requests
    assert requests[-1] == "(none)", "the request is taken back"


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
