"""A sweep folder that another process holds: the second one is refused before it loads anything heavy, and writes nothing."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import SMALL_SWEEP

from cps_ray.config.reader import load_sweep
from cps_ray.errors import ConfigError, DiskError
from cps_ray.results import LOCK_FILE
from cps_ray.search.lock import locked
from cps_ray.search.study import SweepStudy
from cps_ray.search.sweep_folder import begun

HEAVY = ("torch", "ray", "optuna")


@pytest.fixture
def root(tmp_path: Path, shards: Path) -> Path:
    file = tmp_path / "s.yaml"
    file.write_text(SMALL_SWEEP.replace("SHARDS", str(shards)))
    config = load_sweep(file)
    with begun(config, file, fresh=False) as root:
        SweepStudy(config, root).ask()
        (root / "trials").mkdir()
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    "words",
    ["resume runs/s --trials 50", "resume runs/s --set train.data.fingerprint=null", "s.yaml", "s.yaml --fresh"],
)
def test_a_second_process_is_refused_before_it_loads_or_writes_anything(root: Path, words: str) -> None:
    before = contents(root)
    code = (
        "import json, sys, time; from cps_ray.sweep import main; code = main(sys.argv[1:]); "
        f"print(json.dumps([code, [m for m in {HEAVY} if m in sys.modules], time.process_time()]))"
    )
    with (root / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = subprocess.run(
            [sys.executable, "-c", code, *words.split()],
            capture_output=True,
            text=True,
            check=True,
            cwd=root.parents[1],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    code, heavy, seconds = json.loads(done.stdout)
    assert (code, heavy) == (2, [])
    assert seconds < 2
    assert "s: another process is running this sweep. Wait for it, or stop it.\n" in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(root) == before
    assert [path.name for path in root.parent.iterdir()] == ["s"], "nothing is moved aside"


def test_a_process_that_holds_a_folder_may_ask_for_it_again(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with locked(tmp_path):
        with locked(tmp_path):
            pass
        with lock.open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ConfigError, match="another process"), locked(tmp_path):
            pass


def test_a_folder_that_is_moved_aside_leaves_the_new_one_held(root: Path) -> None:
    file = root.parents[1] / "s.yaml"
    with locked(root), begun(load_sweep(file), file, fresh=True) as new:
        assert new == root
        for lock in root.parent.glob("s*/.lock"):
            with lock.open() as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert len(list(root.parent.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).mkdir()  # also for root, who may write everywhere else
    with (
        pytest.raises(DiskError, match=r"must be a folder that can be written to, but is not \(Is a directory\)"),
        locked(tmp_path),
    ):
        pass
