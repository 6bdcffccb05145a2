"""A sweep that is edited between two sessions: what may change changes, what may not is refused by name, and nothing is written then."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import SMALL_SWEEP

from cps_ray import open_sweep, sweep
from cps_ray.config.reader import load_sweep
from cps_ray.results import BEGUN_FILE
from cps_ray.search.records import write_tables
from cps_ray.search.study import SweepStudy
from cps_ray.search.sweep_folder import begun, with_fingerprints

Edit = Callable[..., Path]


@pytest.fixture
def edit(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Edit:
    """Writes the sweep above with (old, new) parts replaced into another folder, whose paths count from there; returns the file."""

    def connect(address: str | None, *_: str) -> object:
        raise SystemExit("a cluster is started")

    monkeypatch.setattr("cps_ray.search.sweep.connected", connect)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").symlink_to(shards)

    def written(*changes: tuple[str, str], path: str = "other/s.yaml") -> Path:
        text = SMALL_SWEEP.replace("SHARDS", "../shards")
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return file

    return written


@pytest.fixture
def root(edit: Edit) -> Path:
    """The folder of a sweep that has begun a trial."""
    file = edit(path="first/s.yaml")
    config = with_fingerprints(load_sweep(file))
    with begun(config, file, fresh=False) as root:
        study = SweepStudy(config, root)
        study.ask()
        (root / "trials").mkdir()
        write_tables(root, study, config)
    return root


def starts(*words: str) -> None:
    with pytest.raises(SystemExit, match="a cluster is started"):
        sweep.main(list(words))


def refused(capsys: pytest.CaptureFixture[str], root: Path, *words: str) -> list[str]:
    """Returns the lines with which `resume` refuses; nothing is written."""
    capsys.readouterr()
    before = {path: path.read_bytes() for path in root.iterdir() if path.is_file()}
    assert sweep.main(["resume", str(root), *words]) == 2
    assert {path: path.read_bytes() for path in root.iterdir() if path.is_file()} == before
    return capsys.readouterr().err.removeprefix("error: ").splitlines()


MAY = [
    (("trials: 2", "trials: 9, time: 2h"), ("budget", "time"), 7200.0),
    (("search_space:", "failures: {retries: 4}\nsearch_space:"), ("failures", "retries"), 4),
    (("search_space:", "concurrency: 3\nsearch_space:"), ("concurrency",), 3),
    (("seeds: [1]", "seeds: [5, 6]"), ("final", "seeds"), (5, 6)),
    (("supervised: {method", "plain: {method"), ("baselines",), {"plain": {"method": "supervised"}}),
    (("high: 2.0", "high: 3.0"), ("search_space", "cps.weight", "high"), 3.0),
    (("low: 0.5", "low: 0.25"), ("search_space", "cps.weight", "low"), 0.25),
]


@pytest.mark.parametrize(("change", "setting", "value"), MAY)
@pytest.mark.parametrize("in_the_folder", [False, True])
def test_what_keeps_trials_comparable_may_change(
    edit: Edit, root: Path, change: tuple[str, str], setting: tuple[str, ...], value: object, in_the_folder: bool
) -> None:
    file = edit(change)
    if in_the_folder:
        (root / "sweep.yaml").write_text(file.read_text().replace("../shards", str(file.parents[1] / "shards")))
        starts("resume", str(root))
    else:
        starts("resume", str(root), "--file", str(file))
        assert (root / "sweep.source.yaml").read_text() == file.read_text()
    now = load_sweep(root / "sweep.yaml")
    found: object = now
    for name in setting:
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == value
    assert now.output == root.parent, "the sweep stays where it is"
    assert now.train.data.fingerprint, "the data are still those it began with"


MAY_NOT = [
    (("name: s", "name: t"), "2: name: must stay 's', as this sweep began, but is 't'."),
    (("lr: 0.01", "lr: 0.02"), "13: train.optim.lr: must stay 0.01, as this sweep began, but is 0.02."),
    (("../shards", "elsewhere"), "train.data.shards: must stay '"),
    (("type: random", "type: random, seed: 1"), "sampler.seed: must stay 0, as this sweep began, but is 1."),
    (
        ("early_stopping: {type: none", "early_stopping: {type: none, reduction: 4"),
        "early_stopping.reduction: must stay 3, as",
    ),
    (("seeds: [1]", "folds: 3"), "final.folds: must stay null, since trials depend on the folds, but is 3."),
    (("search_space:", "objective: {select: last}\nsearch_space:"), "objective.select: must stay 'best', as"),
    (("search_space:", "enqueue: [{cps.weight: 1.0}]\nsearch_space:"), "enqueue: must stay [], as"),
    (("high: 2.0", "high: 1.5"), "search_space.cps.weight.high: must stay 2.0, as this sweep began, but is 1.5."),
    (("low: 0.5", "low: 0.6"), "search_space.cps.weight.low: must stay 0.5, as"),
    (("high: 2.0", "high: 2.0, log: true"), "search_space.cps.weight.log: must stay false, as"),
    (("cutmix]", "cutmix, classmix]"), "search_space.cps.mix.values: must stay ['none', 'cutmix'], as"),
    (("  cps.mix: {type: choice, values: [none, cutmix]}\n", ""), "search_space.cps.mix: is gone: the trials of this"),
    (
        ("  cps.mix:", "  optim.lr: {type: float, low: 0.1, high: 0.2}\n  cps.mix:"),
        "search_space.optim.lr: is new: the",
    ),
]


@pytest.mark.parametrize(("change", "expected"), MAY_NOT, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("in_the_folder", [False, True])
def test_what_would_make_other_trials_is_refused_by_name(
    edit: Edit,
    root: Path,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    expected: str,
    in_the_folder: bool,
) -> None:
    file, words = edit(change), []
    if in_the_folder:
        text = file.read_text().replace("../shards", str(file.parents[1] / "shards"))
        (root / "sweep.yaml").write_text(text)
        file = root / "sweep.yaml"
    else:
        words = ["--file", str(file)]
    (line,) = refused(capsys, root, *words)
    assert line.startswith(f"{file}:")
    assert expected in line
    assert line.endswith(" Put it back, or begin another sweep from this file with --name.")


def test_each_wrong_setting_has_a_line(edit: Edit, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = edit(("name: s", "name: t"), ("lr: 0.01", "lr: 0.02"), ("trials: 2", "trials: 5"))
    lines = refused(capsys, root, "--file", str(file), "--trials", "7")
    assert [line.split(": ")[1] for line in lines] == ["name", "train.optim.lr"]


def test_a_budget_of_fewer_trials_than_begun_is_refused_where_it_stands(
    edit: Edit, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = SweepStudy(load_sweep(root / "sweep.yaml"), root)
    study.ask()  # the one that had begun
    study.ask()
    file = edit(("trials: 2", "trials: 1"))
    (line,) = refused(capsys, root, "--file", str(file))
    assert line.startswith(f"{file}:16: must be at least 2, as many trials as {root} has begun.")


def test_other_data_are_not_let_in_by_an_edited_sweep(
    edit: Edit, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_sweep(root / "sweep.yaml").train.data.fingerprint
    assert before is not None
    resolved = (root / "sweep.yaml").read_text()
    (root / "sweep.yaml").write_text(resolved.replace(before["train"], f"99-{'0' * 32}"))
    (line,) = refused(capsys, root)
    assert "train.data.fingerprint.train: must stay" in line
    (root / "sweep.yaml").write_text("\n".join(line for line in resolved.splitlines() if "fingerprint" not in line))
    # Taken out, the fingerprint is still that of the data that the sweep began with.
    (root / "sweep.yaml").write_text(edit().read_text().replace("../shards", str(root.parents[2] / "shards")))
    starts("resume", str(root))
    assert load_sweep(root / "sweep.yaml").train.data.fingerprint == before


def test_a_folder_of_before_is_taken_as_it_is(edit: Edit, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / BEGUN_FILE).unlink()
    text = (root / "sweep.yaml").read_text()
    (root / "sweep.yaml").write_text(text.replace("lr: 0.01", "lr: 0.02"))
    starts("resume", str(root))
    (line,) = refused(capsys, root, "--file", str(edit()))
    assert "train.optim.lr: must stay 0.02, as this sweep began, but is 0.01." in line


def test_a_damaged_record_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / BEGUN_FILE).write_text("{")
    (line,) = refused(capsys, root)
    assert line.startswith(f"{root}/{BEGUN_FILE}: cannot be read")
    assert open_sweep(root).verdict.endswith(f"resume {root.relative_to(Path.cwd())}")


def test_the_way_to_resume_names_the_cluster(edit: Edit, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = root.relative_to(Path.cwd())
    assert open_sweep(root).verdict.splitlines()[-1] == f"Resume: python -m cps_ray.sweep resume {place}"
    starts("resume", str(root), "--address", "head:6379")
    resume = f"python -m cps_ray.sweep resume {place} --address head:6379"
    assert open_sweep(root).verdict.splitlines()[-1] == f"Resume: {resume}"
    assert f"Resume: {resume}\n" in (root / "sweep.yaml").read_text()
    assert sweep.main([str(edit(path="first/s.yaml"))]) == 2
    assert f"Continue: {resume}. " in capsys.readouterr().err
    assert json.loads((root / BEGUN_FILE).read_text())["address"] == "head:6379"
    starts("resume", str(root))
    assert open_sweep(root).verdict.splitlines()[-1] == f"Resume: python -m cps_ray.sweep resume {place}"
