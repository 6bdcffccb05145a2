"""`cps-ray` by itself: its version, and what is no command."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from cps_ray import __version__
from cps_ray.__main__ import COMMANDS, main


def test_the_version_is_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cps-ray", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"cps-ray {__version__}\n"
    assert version("cps-ray") == __version__


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("swep", "Did you mean sweep?"),
        (
            "foo",
            "There are init, prepare, inspect, subsets, encoders, sweep, train, predict, evaluate, suggest, pseudolabel, export, bench, schema.",
        ),
    ],
)
def test_what_is_no_command_is_said_to_be_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str, hint: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["cps-ray", word])
    assert main() == 2
    assert capsys.readouterr().err == f"error: {word!r} is no command. {hint}\n"


def test_no_worker_asks_the_package_index() -> None:
    """albumentations looks at this variable when it is imported, and else asks for a newer version of itself."""
    environment = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    script = "import cps_ray.datasets.augment, os; print(os.environ['NO_ALBUMENTATIONS_UPDATE'])"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("bench methods x.yaml --draws 0", "argument --draws: must be a whole number of at least 1, but got '0'."),
        ("bench stream --wide few", "argument --wide: must be 0 or at least "),
        ("subsets draw shards --labeled 1.5", "argument --labeled: must be a count of at least 1, or a fraction"),
        ("subsets draw shards --labeled nan.", "argument --labeled: must be a count of at least 1, or a fraction"),
    ],
)
def test_a_wrong_number_is_told_what_must_hold(
    words: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cps-ray", *words.split()])
    with pytest.raises(SystemExit):
        main()
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_another_system_is_refused_in_one_line(name: str) -> None:
    script = (
        "import sys; sys.platform = 'darwin'; sys.modules['fcntl'] = None; from cps_ray.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script, name], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: cps_ray runs on Linux alone (on Windows in WSL 2), and this is darwin\n"
