"""A whole sweep read from its folder: before its first trial, while it runs, cut off, finished, damaged. No cluster."""

import fcntl
import json
import math
import re
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cps_ray
from cps_ray import sweep
from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import NetworkConfig, TrainConfig
from cps_ray.engine.encoders import weights_of
from cps_ray.results import TRIAL_COLUMNS, table_of, verdict_lines
from cps_ray.search import sweep_folder
from cps_ray.search.lock import locked
from cps_ray.search.records import Events, write_summary
from cps_ray.search.search_phase import SearchPhase
from cps_ray.search.study import SweepStudy
from cps_ray.search.tune_session import TuneSession


class Searching:
    """A search of at most four trials whose trainings are written by hand: what is on disk is what a sweep leaves there."""

    def __init__(self, tiny: TrainConfig, root: Path) -> None:
        raw = {
            "version": 1,
            "name": root.name,
            "output": str(root.parent),
            "train": tiny.dump(),
            "budget": {"trials": 4},
            "early_stopping": {"type": "none"},
            "search_space": {
                "optim.lr": {"type": "float", "low": 0.001, "high": 0.1},
                "model.options.decoder_atrous_rates": {"type": "choice", "values": [1, "a"]},
            },
        }
        self.root, self.config = root, SweepConfig.model_validate(raw)
        root.mkdir()
        sweep_folder.write_resolved(root, self.config)
        self.study = SweepStudy(self.config, root)
        gauges: Any = SimpleNamespace(set=lambda *_: None)
        phase = SearchPhase(self.study, self.config, root, Events(root), gauges)
        self._session = TuneSession(
            phase, root / "tune", None, sweep=root.name, at_once=lambda: 9, failures=self.config.failures, resume=""
        )

    def begin(self, *values: float) -> str:
        """Begins a trial with these evaluations, one every second step."""
        trial = str(len(self.study.trials))
        begun = self._session.suggest(trial)
        assert begun is not None
        lines = [json.dumps({"step": 2 * n, "val/miou": value}) for n, value in enumerate(values, 1)]
        (Path(begun["training"].folder) / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return trial

    def end(self, trial: str) -> None:
        self._session.end(trial, {}, error=False)


@pytest.fixture
def searching(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Searching:
    monkeypatch.setattr("cps_ray.search.study.apply", lambda train, changes, where: train)
    monkeypatch.setattr("cps_ray.search.search_phase.apply", lambda train, changes, where: train)
    return Searching(tiny, tmp_path / "s")


def status(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert sweep.main(["status", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_before_the_first_trial(searching: Searching, capsys: pytest.CaptureFixture[str]) -> None:
    read = cps_ray.open_sweep(searching.root)
    assert (read.trials.num_rows, read.trials.column_names) == (0, list(TRIAL_COLUMNS))
    assert (read.history.num_rows, read.history.column_names) == (0, ["run", "step"])
    assert read.best is None
    first, last = read.verdict.split("\n")
    assert first == "interrupted: 0 of 4 trials done."
    assert last.startswith("Resume: python -m cps_ray.sweep resume ")
    with locked(searching.root):
        assert read.verdict == "running: 0 of 4 trials done."
    assert "s: interrupted, none begun, of 4 trials" in status(capsys, searching.root)


def test_what_runs_is_there_with_its_parameters_and_scores_so_far(
    searching: Searching, capsys: pytest.CaptureFixture[str]
) -> None:
    read = cps_ray.open_sweep(str(searching.root))
    with locked(searching.root):
        searching.end(searching.begin(0.1, 0.4, 0.3))
        searching.begin(0.2, 0.1)
        done, runs = read.trials.to_pylist()
        text = status(capsys, searching.root)
    assert (done["state"], done["score"], done["score_best"], done["steps"]) == ("complete", 0.4, 0.4, 6)
    measured = [runs[name] for name in ("state", "score", "score_best", "step_best", "score_last", "steps", "seconds")]
    assert measured == ["running", None, 0.2, 2, 0.1, 4, None]
    drawn = searching.study.trials[1].params
    assert runs["params.optim.lr"] == drawn["optim.lr"]
    assert runs["params.model.options.decoder_atrous_rates"] == str(drawn["model.options.decoder_atrous_rates"])
    assert read.trials.schema == pq.read_table(searching.root / "trials.parquet").schema
    assert [(row["run"], row["step"], row["val/miou"]) for row in read.history.to_pylist()] == [
        ("0000", 2, 0.1),
        ("0000", 4, 0.4),
        ("0000", 6, 0.3),
        ("0001", 2, 0.2),
        ("0001", 4, 0.1),
    ]
    assert text.splitlines()[0] == "s: running, 1 complete  1 running, of 4 trials"
    assert text.splitlines()[-1] == "running: 1 of 4 trials done, best val/miou 0.4000 (trial 0)."
    assert read.best == searching.config.train


def test_what_was_cut_off_is_interrupted(searching: Searching, capsys: pytest.CaptureFixture[str]) -> None:
    searching.end(searching.begin(0.1, 0.4, 0.3))
    searching.begin(0.2)
    read = cps_ray.open_sweep(searching.root)
    assert read.trials["state"].to_pylist() == ["complete", "interrupted"]
    assert (read.summary["status"], read.summary["trials"]["interrupted"]) == ("interrupted", 1)
    assert read.verdict.startswith("interrupted: 1 of 4 trials done, best val/miou 0.4000 (trial 0).\nResume: ")
    assert "s: interrupted, 1 complete  1 interrupted, of 4 trials" in status(capsys, searching.root)


def test_a_finished_sweep_says_its_verdict(searching: Searching, capsys: pytest.CaptureFixture[str]) -> None:
    searching.end(searching.begin(0.1, 0.4, 0.3))
    final = searching.root / "final" / "best-seed1"
    final.mkdir(parents=True)
    (final / "metrics.jsonl").write_text('{"step": 6, "val/b/miou": 0.5}\n')
    (final / "config.yaml").touch()
    read = cps_ray.open_sweep(searching.root)
    assert "1 final run(s) begun" in read.verdict
    score = {"mean": 0.5, "sd": None, "n": 1, "values": [0.5]}
    outcome = {"arms": {"best": {"test/miou": score}}, "headline": {"best": "test/miou"}, "gain": {}}
    summary = write_summary(searching.root, searching.study, searching.config, "finished", final=outcome)
    assert read.verdict == "\n".join(verdict_lines(searching.root, summary))
    assert "Test mIoU  best  50.0 % over 1 seed" in status(capsys, searching.root)
    assert read.history.to_pylist()[-1] == {"run": "best-seed1", "step": 6, "val/miou": None, "val/b/miou": 0.5}
    (searching.root / "best.yaml").unlink()
    assert read.best is None
    with locked(searching.root):
        assert read.verdict.startswith("running: 1 of 4"), "it goes on"


def test_a_failed_sweep_says_why(searching: Searching) -> None:
    write_summary(searching.root, searching.study, searching.config, "failed", reason="five in a row")
    assert cps_ray.open_sweep(searching.root).verdict == "failed: five in a row"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: (root / "trials.jsonl").write_text('{"num\n{}\n'), "trials.jsonl: cannot be read"),
        (lambda root: (root / "trials.jsonl").unlink(), "trials.jsonl: cannot be read"),
        (lambda root: (root / "summary.json").write_text('{"name": "s", "sta'), "summary.json: must be a JSON object"),
        (lambda root: (root / "summary.json").write_text("[1]"), "summary.json: must be a JSON object"),
        (lambda root: (root / "sweep.yaml").write_text("version: 1\n"), "sweep.yaml: must hold "),
        (lambda root: (root / "study.db").unlink(), "must be the folder of a sweep"),
        (lambda root: (root / "sweep.yaml").unlink(), "must be the folder of a sweep"),
    ],
)
def test_a_damaged_folder_is_one_line(
    searching: Searching, capsys: pytest.CaptureFixture[str], damage: Any, said: str
) -> None:
    searching.end(searching.begin(0.1, 0.4, 0.3))
    searching.begin(0.2)
    damage(searching.root)
    assert sweep.main(["status", str(searching.root)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {searching.root}")
    assert said in err
    assert err.count("\n") == 1


def test_nothing_is_written(searching: Searching, capsys: pytest.CaptureFixture[str]) -> None:
    searching.end(searching.begin(0.1, 0.4, 0.3))
    searching.begin(0.2)
    with locked(searching.root):
        pass
    paths = [searching.root, *searching.root.rglob("*")]
    before = {path: (path.stat().st_mtime_ns, path.stat().st_mode) for path in paths}
    for path in paths:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        status(capsys, searching.root)
        status(capsys, searching.root, "--json")
        assert cps_ray.open_sweep(searching.root).history.num_rows == 4
    finally:
        for path, (_, mode) in before.items():
            path.chmod(mode)
    assert {
        path: (path.stat().st_mtime_ns, path.stat().st_mode) for path in [searching.root, *searching.root.rglob("*")]
    } == before


def test_plug_ins_need_not_be_at_hand(searching: Searching, capsys: pytest.CaptureFixture[str]) -> None:
    file = searching.root / "sweep.yaml"
    file.write_text(file.read_text().replace("method: cps", "method: nowhere:Method"))
    assert "nowhere:Method" in file.read_text()
    assert "of 4 trials" in status(capsys, searching.root)


def test_the_document_is_json(searching: Searching, capsys: pytest.CaptureFixture[str]) -> None:
    searching.end(searching.begin(0.1, 0.4, 0.3))
    searching.begin(0.2, math.nan)
    document = json.loads(status(capsys, searching.root, "--json"), parse_constant=pytest.fail)
    assert list(document) == ["name", "status", "counts", "trials", "best", "final", "verdict"]
    assert (document["name"], document["status"], document["counts"]["complete"]) == ("s", "interrupted", 1)
    assert document["best"]["value"] == 0.4
    assert [(row["score_best"], row["score_last"]) for row in document["trials"]] == [(0.4, 0.3), (0.2, None)]


@pytest.mark.parametrize("stopped", [False, True])
def test_watch_draws_until_the_end_or_ctrl_c(
    searching: Searching, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ExitStack() as runs:
        runs.enter_context(locked(searching.root))
        trial = searching.begin(0.1)
        seen: list[float] = []

        def sleep(seconds: float) -> None:
            seen.append(seconds)
            if stopped:
                raise KeyboardInterrupt
            if len(seen) == 2:
                searching.end(trial)
                runs.close()

        monkeypatch.setattr(sweep.time, "sleep", sleep)
        text = status(capsys, searching.root, "--watch")
    assert len(seen) == (1 if stopped else 2)
    drawn, last = text.rsplit("\x1b[?25h", 1)  # where the cursor is shown again
    assert "s: running, 1 running, of 4 trials" in drawn
    assert ("s: running, 1 running" if stopped else "s: interrupted, 1 pruned") in last, "what stays on the screen"


def test_who_looks_does_not_keep_a_sweep_from_beginning(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.touch()
    looks = threading.Event()

    def look() -> None:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            looks.set()
            time.sleep(0.05)

    thread = threading.Thread(target=look)
    thread.start()
    looks.wait()
    with locked(tmp_path), lock.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    thread.join()


def test_a_sweep_is_read_without_heavy_packages(searching: Searching) -> None:
    searching.end(searching.begin(0.1, 0.4, 0.3))
    searching.begin(0.2)
    heavy = {"ray", "torch", "optuna", "pandas", "segmentation_models_pytorch", "albumentations", "cv2"}
    code = (
        f"import sys, cps_ray; s = cps_ray.open_sweep({str(searching.root)!r}); from cps_ray.sweep import main; "
        "s.verdict, s.trials, s.history, s.best; main(['status', str(s.folder)]); main(['status', str(s.folder), '--json']); "
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_example_of_the_readme(
    searching: Searching, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    searching.end(searching.begin(0.1, 0.4, 0.3))
    monkeypatch.chdir(searching.root.parent)
    Path("runs").mkdir()
    Path("runs/mine").symlink_to(searching.root)
    readme = Path(__file__).parents[1] / "README.md"
    (example,) = re.findall(r"```python\n# look.py\n(.*?)```", readme.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    assert capsys.readouterr().out.splitlines()[-1] == str(searching.config.train.optim.lr)
    assert names["curves"]["0000"].tolist() == [0.1, 0.4, 0.3]


def test_tables_are_those_that_pyarrow_makes() -> None:
    rows = [
        {"run": "a", "step": 1, "flag": True, "x": 1, "text": "µ\n", "none": None},
        {"run": "", "step": 2, "flag": None, "x": math.inf, "text": None, "none": None},
        {"run": "人行道", "step": 2**40, "flag": False, "x": None, "text": "", "none": None},
    ] * 5
    table = table_of(rows, {"run": str, "step": int})
    table.validate(full=True)
    assert table == pa.Table.from_pylist(rows)
    assert table_of([{"x": None}], {"x": float}).schema == pa.schema([("x", pa.float64())])


CONFIGS = {
    "none, trained from scratch": {"encoder": "resnet18"},
    "mine.pt, licence unknown: ask where they come from": {"encoder": "resnet18", "weights_file": "/x/mine.pt"},
    "ssl, licence cc-by-nc-4.0 (see https://huggingface.co/": {"encoder": "resnet18", "weights": "ssl"},
}


@pytest.mark.parametrize("said", CONFIGS)
def test_the_licence_of_the_weights_is_among_the_last_lines(tmp_path: Path, said: str) -> None:
    best = {"trial": 3, "value": 0.5, "step": 20, "params": {"optim.lr": 0.1}}
    weights = weights_of(NetworkConfig.model_validate(CONFIGS[said])).record()
    lines = verdict_lines(tmp_path, {"best": best, "objective": "val/miou", "weights": [weights]})
    assert any(line.startswith(f"Weights of resnet18: {said}") for line in lines[-3:])
