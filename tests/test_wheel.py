"""The wheel holds all that the commands need, and works without the repository."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]


def build(source: Path, target: Path, kind: str) -> Path:
    """Builds a wheel or an sdist with the backend that is installed, so without network."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(target)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


def test_the_wheel_holds_code_presets_sweeps_recipe_and_licence(wheel: Path) -> None:
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cps_ray").rglob("*.py")}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "cps_ray").rglob("*.yaml")}
    expected |= {f"cps_ray/sweeps/{path.name}" for path in (ROOT / "sweeps").iterdir()}
    expected |= {"cps_ray/data/recipe.yaml", "cps_ray/py.typed"}
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]


def test_the_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build(ROOT, tmp_path / "sdist", "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("cps_ray-*")
    with ZipFile(wheel) as ours, ZipFile(build(source, tmp_path / "wheel", "wheel")) as theirs:
        assert {info.filename: info.CRC for info in ours.infolist()} == {
            info.filename: info.CRC for info in theirs.infolist()
        }


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files, as pip would place them."""
    folder = tmp_path_factory.mktemp("installed")
    with ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.parametrize(
    ("command", "code", "line"),
    [
        ("sweep quickstart --dry-run", 0, "Data: {cwd}/data/synthetic/shards will be drawn on first use."),
        (
            "sweep quickstart --set trian.seed=1",
            2,
            "error: --set trian.seed=1: trian: no such setting. Did you mean train?",
        ),
        (
            "prepare folder RAW OUT --recipe mine.yaml",
            2,
            "error: mine.yaml: no such file. Copy {installed}/cps_ray/data/recipe.yaml, which shows every setting.",
        ),
    ],
)
def test_it_works_in_an_empty_folder(installed: Path, tmp_path: Path, command: str, code: int, line: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    words = [sys.executable, "-m", "cps_ray", *command.split()]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert (done.stdout + done.stderr).splitlines()[-1] == line.format(
        cwd=tmp_path, installed=os.path.relpath(installed, tmp_path)
    )
    assert not list(tmp_path.iterdir())
