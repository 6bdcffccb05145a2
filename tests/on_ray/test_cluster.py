"""The preflight: how many trainings fit beside Ray Data's whole CPU."""

import os
from pathlib import Path

import pytest

from cps_ray.config.train import ResourcesConfig
from cps_ray.errors import ResourceError
from cps_ray.on_ray.cluster import (
    _LONGEST_FOLDER,
    Cluster,
    _dashboard_port,
    _make_room,
    connected,
    trainings_at_once,
)


def node(cpus: float, gpus: float = 0.0) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus}


@pytest.mark.parametrize(
    ("resources", "nodes", "expected"),
    [
        ({"cpus_per_worker": 0.5}, [node(2)], 2),
        ({"cpus_per_worker": 1}, [node(2)], 1),
        ({"workers": 2, "cpus_per_worker": 1}, [node(4)], 1),
        ({"workers": 2, "cpus_per_worker": 1}, [node(2), node(2)], 1),
        ({"cpus_per_worker": 6, "gpus_per_worker": 1}, [node(64, 8)], 8),
        ({"cpus_per_worker": 8, "gpus_per_worker": 1}, [node(64, 8)], 7),
        ({"workers": 8, "cpus_per_worker": 6, "gpus_per_worker": 1}, [node(64, 4), node(64, 4)], 1),
        ({"cpus_per_worker": 8, "gpus_per_worker": 1}, [node(8, 1), node(16, 1)], 2),
        ({"cpus_per_worker": 1}, [node(0), node(1), node(1)], 1),
    ],
)
def test_as_many_as_fit(resources: dict[str, float], nodes: list[dict[str, float]], expected: int) -> None:
    assert trainings_at_once(ResourcesConfig(**resources), "auto", nodes) == expected


@pytest.mark.parametrize(
    ("resources", "nodes"),
    [
        ({"cpus_per_worker": 2}, [node(2)]),
        ({"workers": 2, "cpus_per_worker": 1}, [node(2)]),
        ({"gpus_per_worker": 1}, [node(16)]),
        ({"workers": 3, "cpus_per_worker": 2, "gpus_per_worker": 1}, [node(16, 2)]),
        ({"cpus_per_worker": 6}, [node(4), node(4)]),
    ],
)
def test_what_can_never_run_is_refused(resources: dict[str, float], nodes: list[dict[str, float]]) -> None:
    with pytest.raises(ResourceError, match=r"one training takes .* but the cluster has"):
        trainings_at_once(ResourcesConfig(**resources), "auto", nodes)


def test_without_a_stream_every_cpu_is_for_training() -> None:
    resources = ResourcesConfig(workers=2, cpus_per_worker=1)
    assert trainings_at_once(resources, "auto", [node(2)], streams=False) == 1


def test_a_number_is_taken_at_its_word_or_refused() -> None:
    resources = ResourcesConfig(cpus_per_worker=1)
    assert trainings_at_once(resources, 2, [node(8)]) == 2
    with pytest.raises(ResourceError, match=r"concurrency: 8 trainings at once.* 7 fit"):
        trainings_at_once(resources, 8, [node(8)])


def test_two_commands_that_start_at_the_same_time_take_different_ports() -> None:
    """Neither dashboard listens yet: Ray's takes seconds to start, and one on a port that is taken fails after a minute."""
    with _dashboard_port() as one, _dashboard_port() as other:
        assert one != other


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_temporary_folder_that_is_too_long_or_cannot_be_written_is_not_taken(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * _LONGEST_FOLDER)
    long.mkdir()
    for bad in (str(long), "/proc/1", "/dev/null"):
        monkeypatch.setenv(name, bad)
        _make_room()
        assert os.environ[name] == "/tmp"
    for good in ("/var/tmp", "/tmp"):
        monkeypatch.setenv(name, good)
        _make_room()
        assert os.environ[name] == good


def test_where_no_folder_takes_sockets_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/x" * 60)
    monkeypatch.setattr("cps_ray.on_ray.cluster._is_writable", lambda folder: False)
    with pytest.raises(
        ResourceError, match=r"^TMPDIR=/x/x.*: must be a folder that can be written and has at most \d+ bytes"
    ):
        _make_room()


def test_a_home_that_cannot_be_written_needs_no_token_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    _make_room()
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _make_room()
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.parent == tmp_path
    assert len(token.read_text()) == 64
    assert token.stat().st_mode & 0o777 == 0o600
    assert f"RAY_AUTH_TOKEN_PATH={token} " in Cluster("http://x", local=True).banner()[1]


@pytest.mark.ray
def test_the_job_has_a_name_in_the_dashboard() -> None:
    from ray.util.state import list_jobs

    with connected(None, "sweep mine") as cluster:
        assert [job.metadata["job_name"] for job in list_jobs(cluster.dashboard_url, detail=True)] == ["sweep mine"]
