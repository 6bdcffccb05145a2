"""What all commands have in common: any exception is one line and an exit code, names are printed as text, --help loads little."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import sqlalchemy.exc
from rich.console import Console

from cps_ray import inspect, prepare, subsets
from cps_ray.__main__ import COMMANDS
from cps_ray.command import reported, say
from cps_ray.datasets.shards import open_shards
from cps_ray.errors import ConfigError, DataError, at
from cps_ray.files import write_json


@pytest.fixture(autouse=True)
def _logs_in_a_folder_of_their_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path_factory.mktemp("tmp"))
    monkeypatch.setattr("tempfile.tempdir", folder)
    monkeypatch.setenv("TMPDIR", folder)


ODD = [
    "[unlabeled]",
    "lane [/left]",
    "a\\",
    "[bold]x[/bold]",
    "images",
    ":smile:",
    "esc\x1b[31mred",
    "two\nlines",
    "人行道",
]
"""Names of classes that were taken as markup, as other rows of a table, or as orders to the terminal."""


def run_python(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *words], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def wrapped_by_optuna() -> Exception:
    full = sqlite3.OperationalError("database or disk is full")
    err = optuna.exceptions.StorageInternalError("An exception is raised during the commit.")
    err.__cause__ = sqlalchemy.exc.OperationalError("INSERT", {}, full)
    return err


@pytest.mark.parametrize(
    ("err", "words"),
    [
        (PermissionError(13, "Permission denied", "runs/x"), "runs/x: Permission denied."),
        (OSError(28, "No space left on device"), "No space left on device."),
        (OSError(18, "Invalid cross-device link", "a", None, "b"), "a -> b: Invalid cross-device link."),
        (MemoryError(), "out of memory."),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "not utf-8: invalid start byte, at byte 0."),
        (UnicodeEncodeError("ascii", "a人", 1, 2, "ordinal not in range"), "'\\u4eba' cannot be written in ascii."),
        (ModuleNotFoundError("No module named 'cv2'", name="cv2"), "the Python package cv2 is missing."),
        (ImportError("libGL.so.1: cannot open"), "a Python package cannot be loaded: libGL.so.1: cannot open."),
        (wrapped_by_optuna(), "the SQLite database cannot be used: database or disk is full."),
        (TypeError("first\nsecond \x1b[2J"), "TypeError: first second \\x1b[2J."),
        (AssertionError(), "AssertionError."),
    ],
)
def test_any_exception_is_one_line_and_its_traceback_is_kept(
    err: Exception, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        with at("the sweep"), at("photo\x1b.png"):
            raise err

    assert reported(work) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"error: photo\\x1b.png: {words} The traceback is in /")
    assert line.count("\n") == 1
    log = Path(line.rstrip().rpartition(" ")[2])
    assert "in work" in log.read_text()
    assert "raise err" in log.read_text()
    log.unlink()


def test_what_is_raised_on_purpose_and_ctrl_c_leave_no_log(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> int:
        raise ConfigError("a.yaml:1: one\na.yaml:2: two\x1b")

    def damaged() -> int:
        raise DataError("two\nlines.png: is empty.")

    def interrupted() -> int:
        raise KeyboardInterrupt

    assert reported(wrong) == 2
    assert capsys.readouterr().err == "error: a.yaml:1: one\na.yaml:2: two\\x1b\n"
    assert reported(damaged) == 2
    assert capsys.readouterr().err == "error: two\\nlines.png: is empty.\n"
    assert reported(interrupted) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "module"), [("prepare", "cv2"), ("inspect", "pyarrow"), ("sweep", "pydantic"), ("encoders", "rich")]
)
@pytest.mark.parametrize("form", ["-m cps_ray NAME", "-m cps_ray.NAME"])
def test_an_import_that_fails_is_one_line(words: str, module: str, form: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')\n")
    arguments = {
        "prepare": ["folder", ".", "out", "--recipe", "x"],
        "inspect": ["."],
        "sweep": ["x.yaml"],
        "encoders": [],
    }
    path = os.pathsep.join([str(tmp_path), str(Path(prepare.__file__).parents[1])])
    done = run_python(*form.replace("NAME", words).split(), *arguments[words], PYTHONPATH=path, TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: a Python package cannot be loaded: libGL.so.1: cannot open shared object file. "
    )
    assert done.stderr.count("\n") == 1
    (log,) = tmp_path.glob("cps-ray-error-*.txt")
    assert str(log) in done.stderr
    assert "Traceback" in log.read_text()


def test_the_log_goes_where_something_can_be_written(tmp_path: Path) -> None:
    script = (
        "from cps_ray.command import reported; import tempfile; tempfile.tempdir = '/nowhere'; reported(lambda: 1 // 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    (log,) = tmp_path.iterdir()
    assert done.stderr == f"error: ZeroDivisionError: integer division or modulo by zero. The traceback is in {log}\n"
    script = f"import os; os.chdir('/proc'); {script}"
    done = run_python("-c", script)
    assert done.stderr.endswith(". The traceback is lost: neither the temporary folder nor this one can be written\n")


@pytest.mark.parametrize("command", ["train --help", "schema sweep", "encoders"])
def test_a_reader_that_has_seen_enough_is_no_error(command: str) -> None:
    """The pipe's reader is gone before anything is written; unbuffered and buffered output fail in different places."""
    for unbuffered in ("", "1"):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", "cps_ray", *command.split()],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        os.close(writer)
        assert done.stderr == ""
        assert done.returncode in (0, 1)  # argparse swallows the error of its own help


def test_a_full_disk_behind_the_output_is_one_line() -> None:
    script = "import sys; from cps_ray.command import reported; sys.exit(reported(lambda: print('x') or 0))"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: No space left on device. ")
    assert done.stderr.count("\n") == 1


def test_names_that_the_encoding_lacks_are_printed_as_escapes() -> None:
    script = "from cps_ray.command import reported; reported(lambda: print('人 \\udcff'))"
    assert run_python("-c", script, PYTHONIOENCODING="ascii", PYTHONUTF8="0").stdout == "\\u4eba \\udcff\n"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("words", ["--help", "--no-such-flag"])
def test_help_and_wrong_flags_load_little(name: str, words: str) -> None:
    heavy = {"torch", "ray", "cv2", "pyarrow", "scipy", "PIL", "optuna", "numpy", "rich"}
    script = (
        "import sys; from cps_ray.__main__ import main\n"
        "try: main()\n"
        f"except SystemExit: print('loaded:', sorted({heavy} & set(sys.modules)))"
    )
    done = run_python("-c", script, name, words)
    assert done.stdout.splitlines()[-1] == "loaded: []", done.stderr


def test_lines_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    say(Console(), *ODD)
    assert capsys.readouterr().out.splitlines() == [
        *ODD[:6],
        "esc\\x1b[31mred",
        "two\\nlines",
        "人行道",
    ]


def test_names_of_classes_stand_in_every_table_as_they_are(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "[v2] lane[" / "left]"
    folder.mkdir(parents=True)
    for file in shards.iterdir():
        (folder / file.name).symlink_to(file)
    manifest = json.loads((shards / "manifest.json").read_text())
    names = [*ODD[: len(manifest["classes"]) - 1], "two\nlines"]
    manifest["classes"] = names
    manifest["notes"] = ["[red]note[/] of \x1b[2J"]
    manifest.pop("sha256", None)
    (folder / "manifest.json").unlink()
    write_json(folder / "manifest.json", manifest)
    console = Console(width=200)
    console.print(prepare.summary(open_shards(folder).manifest))
    table = capsys.readouterr().out
    assert inspect.main([str(folder), "--labeled", "5"]) == 0
    report = capsys.readouterr().out
    assert subsets.main(["draw", str(folder), "--labeled", "4", "--name", "[b]x"]) == 0
    drawn = capsys.readouterr().out
    for name in [*names[:-1], "two\\nlines"]:
        for text in (table, report):
            assert re.search(rf"│ {re.escape(name).replace(chr(27), re.escape(chr(92) + 'x1b'))} +│", text), name
    assert "note: [red]note[/] of \\x1b[2J" in report
    assert str(folder) in report
    assert "[b]x" in drawn
    assert f"written to {folder}/subsets" in drawn
    assert "\x1b" not in table + report + drawn
