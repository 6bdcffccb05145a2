"""Error sentences, overrides, relative paths, and the cross checks of a sweep."""

import shlex
from pathlib import Path

import pytest

from cps_ray.config import reader
from cps_ray.config.reader import load_sweep, load_train, parse, parse_train, read_sweep, sweeps
from cps_ray.config.sweep import ObjectiveConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.errors import ConfigError

LR = "  optim.lr: {type: float, low: 1e-3, high: 1e-1, log: true}"
WEIGHT = "{type: float, low: 0.5, high: 5}"
POINT = "{optim.lr: 0.01, cps.mix: cutmix, cps.cutmix_boxes: 3}"


def test_loads_with_paths_relative_to_the_file(sweep_file, tmp_path):
    sweep = load_sweep(sweep_file())
    assert sweep.train.optim.lr == 0.01
    assert sweep.train.data.shards == tmp_path / "data" / "tiny"
    assert sweep.output == tmp_path / "runs"


def test_the_dump_of_a_training_loads_as_a_file(sweep_file, tmp_path):
    train = load_sweep(sweep_file()).train
    path = tmp_path / "runs" / "tiny" / "best.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(dump_yaml(train.dump(str(path.parent)), "the best"), encoding="utf-8")
    assert "../../data/tiny" in path.read_text(encoding="utf-8")
    assert load_train(path) == train
    assert parse_train(train.dump(), "trial 3") == train


SCHEMA_FAULTS = [
    ("crop_px:", "crop_size:", "8: train.data.crop_size: no such setting. Did you mean train.data.crop_px?"),
    ("    lr: 1e-2", "    momentum: 0.5", "12: train.optim.lr: is missing."),
    ("lr: 1e-2", "lr: abc", "13: train.optim.lr: must be a number, but got 'abc'."),
    ("lr: 1e-2", "lr: true", "13: train.optim.lr: must be a number, but got true."),
    ("lr: 1e-2", "lr: 0", "13: train.optim.lr: must be greater than 0, but got 0."),
    ("version: 1", "version: 1" + "0" * 30, "1: version: must be a whole number of at most 64 bits, but got 1000"),
    ("train:\n", "train:\n  seed: 2147483648\n", "5: train.seed: must be less than 2147483648, but got 2147483648."),
    ("lr: 1e-2", "lr: .inf", "13: train.optim.lr: must be a finite number, but got inf."),
    ("labeled: 0.125", "labeled: [1]", "7: train.data.labeled: must be a whole number or a number or text, but got [1]."),
    ("labeled: 0.125", "labeled: ../x", "7: train.data.labeled: must be a whole number or a number or text that fits ^[A-Za-z0-9]"),
    ("[64, 96]", "[64]", "8: train.data.crop_px[1]: is missing."),
    ("[64, 96]", "[64, 9.5]", "8: train.data.crop_px[1]: must be a whole number, but got 9.5."),
    ("{encoder: resnet18,", "{encoder: resnet18, b: {encoder: x, weigths: y},", "11: train.model.b.weigths: no such setting. Did you mean train.model.b.weights?"),
    ("steps: 200", "steps: 210", "14: `train.schedule.steps % train.schedule.eval_every == 0` must hold, but got steps=210, eval_every=50."),
    ("labeled_batch: 4", "labeled_batch: -4", "9: train.data.labeled_batch: must be greater than 0, but got -4."),
    ("asha", "ash", "16: early_stopping.type: must be asha, hyperband, median or none, but got 'ash'."),
    ("{trials: 4}", "{trials: 4, time: 3x}", "15: budget.time: a duration is a number with"),
    ("budget: {", "failures: {on_oom: retry}\nbudget: {", "15: failures.on_oom: must be fail or halve, but got 'retry'."),
    ("budget: {", "failures: {trial_timeout: 0}\nbudget: {", "15: failures.trial_timeout: must be greater than 0, but got 0."),
    ("budget: {", "failures: {trial_timeout: 30m, first_report_timeout: 1h}\nbudget: {", "15: `failures.first_report_timeout < failures.trial_timeout` must hold, but got 3600 s and 1800 s"),
    ("low: 0.5", "lo: 0.5", "19: search_space.cps.weight.lo: no such setting. Did you mean search_space.cps.weight.low?"),
    ("type: choice", "type: chioce", "20: search_space.cps.mix.type: must be one of float, int, choice, but got 'chioce'."),
    ("type: choice, ", "", "20: search_space.cps.mix.type: is missing."),
    ("budget: {", "objective: {metric: test/miou}\nbudget: {", "15: objective.metric: must be a validation metric"),
    ("budget: {", "objective: {metric: val/ensemble/ece}\nbudget: {", "15: objective.metric: must be better the higher it is, such as val/miou, but got 'val/ensemble/ece'"),
    ("schedule:", "evaluation: {stride_px: [8, 8]}\n  schedule:", "14: `train.evaluation.stride_px` needs a (height, width) in `train.evaluation.window_px`, but got none."),
    ("version: 1", "version: 2", "1: version: must be 1, but got 2."),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), SCHEMA_FAULTS)
def test_schema_faults_name_line_setting_and_remedy(sweep_file, old, new, message):
    with pytest.raises(ConfigError) as caught:
        load_sweep(sweep_file((old, new)))
    assert str(caught.value).startswith(f"sweeps/x.yaml:{message.split(':')[0]}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_many_faults_are_cut_to_ten(sweep_file):
    many = "".join(f"\nx{number}: 1" for number in range(11))
    with pytest.raises(ConfigError) as caught:
        load_sweep(sweep_file(("version: 1", f"version: 1{many}")))
    assert len(str(caught.value).splitlines()) == 11
    assert str(caught.value).endswith("\n... and 1 more.")


def test_parse_names_any_place():
    with pytest.raises(ConfigError, match=r"^trial 7: model: is missing\.$"):
        parse_train({"data": _DATA, "optim": {"lr": 1.0}, "schedule": _SCHEDULE}, "trial 7")
    assert parse(ObjectiveConfig, {}) == ObjectiveConfig()


_DATA = {"shards": "s", "labeled": 1, "crop_px": [64, 64], "labeled_batch": 2, "unlabeled_batch": 2}
_SCHEDULE = {"steps": 10, "eval_every": 5}


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("budget.trials=10", lambda sweep: sweep.budget.trials == 10),
        ("train.optim.lr=1e-4", lambda sweep: sweep.train.optim.lr == 1e-4),
        ("train.data.synthetic.train=20", lambda sweep: sweep.train.data.synthetic.train == 20),
        ("train.data.synthetic={}", lambda sweep: sweep.train.data.synthetic.train == 440),
        ("train.cps={ramp: 0.25}", lambda sweep: sweep.train.cps.ramp == 0.25),
        ("train.model.options={}", lambda sweep: sweep.train.model.options == {}),
        (
            "train.model.options.depth=4",
            lambda sweep: sweep.train.model.options == {"decoder_channels": 64, "depth": 4},
        ),
        ("search_space.optim.lr.high=0.05", lambda sweep: sweep.search_space["optim.lr"].high == 0.05),
        ("search_space.cps.ramp={type: float, low: 0, high: 0.25}", lambda sweep: "cps.ramp" in sweep.search_space),
        ("baselines.new.cps.weight=0", lambda sweep: sweep.baselines["new"] == {"cps.weight": 0}),
        ("final.set.optim.lr=0.1", lambda sweep: sweep.final.set == {"schedule.steps": 400, "optim.lr": 0.1}),
        ("output=here", lambda sweep: sweep.output == Path.cwd() / "here"),
        ("train.data={shards: here}", lambda sweep: sweep.train.data.shards == Path.cwd() / "here"),
    ],
)
def test_overrides(sweep_file, override, found):
    assert found(load_sweep(sweep_file(), [override]))


def test_the_last_override_wins(sweep_file):
    assert load_sweep(sweep_file(), ["budget.trials=10", "budget.trials=11"]).budget.trials == 11


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.optim.lrr=1", "train.optim.lrr: no such setting. Did you mean train.optim.lr?"),
        ("train.optim.lr=x", "train.optim.lr: must be a number, but got 'x'."),
        ("train.schedule.steps=210", "`train.schedule.steps % train.schedule.eval_every == 0` must hold"),
        ("sampler.seed=2147483648", "sampler.seed: must be less than 2147483648, but got 2147483648."),
        ("train.seed.x=1", "train.seed: must be a whole number, but got a mapping."),
        ("name.x=1", "name is 'tiny' and holds no settings."),
        ("search_space.optim.lr.low=-1", "search_space.optim.lr: log: true needs low > 0 (got -1)."),
        ("final.set.schedule.steps=7", "final.set: `schedule.steps % schedule.eval_every == 0` must hold"),
        ("train.optim.lr=@", "not valid YAML: found character '@'"),
        ("budget", "must be NAME=VALUE, such as --set train.optim.lr=0.01."),
        ("a..b=1", "must be NAME=VALUE, such as --set train.optim.lr=0.01."),
    ],
)
def test_override_errors_name_the_override(sweep_file, override, message):
    with pytest.raises(ConfigError) as caught:
        load_sweep(sweep_file(), ["train.optim.momentum=0.5", override])
    assert str(caught.value).startswith(f"--set {override}: {message}")


SWEEP_FAULTS = [
    (LR, LR.replace("lr", "lrr"), "18: search_space.optim.lrr: no such setting in train. Did you mean optim.lr?"),
    (LR, LR.replace("optim.lr", "lr"), "18: search_space.lr: no such setting in train. Did you mean optim.lr?"),
    *[
        (LR, LR.replace("optim.lr", name), f"18: search_space.{name}: cannot be searched: ")
        for name in ("seed", "method", "data.crop_px", "schedule.steps", "resources.workers", "sinks", "compute.accumulate",
                     "model.weights_file")
    ],
    (WEIGHT, "{type: float, low: 6, high: 5}", "19: search_space.cps.weight: low <= high must hold"),
    (WEIGHT, "{type: float, low: 0, high: 5, log: true}",
     '19: search_space.cps.weight: log: true needs low > 0 (got 0). For "without CPS" use baselines.'),
    (WEIGHT, "{type: float, low: 1, high: 2, log: true, step: 0.5}", "log: true and step exclude each other"),
    (WEIGHT, "{type: float, low: 0.0, high: 0.9, step: 0.2}", "high must be low + k * step"),
    (WEIGHT, "{type: float, low: -1, high: 5}", "19: search_space.cps.weight.low: must be at least 0, but got -1.0."),
    ("values: [none, cutmix]", "values: [none, cutmix, mixup]", "20: search_space.cps.mix.values[2]: must be none, cutmix, "),
    ("values: [none, cutmix]", "values: [cutmix, cutmix]", "20: search_space.cps.mix: values lists 'cutmix' twice."),
    ("when: {cps.mix", "when: {cps.mixx", "21: search_space.cps.cutmix_boxes.when.cps.mixx: when refers to cps.mixx, "
     "which is not in search_space. Did you mean cps.mix?"),
    ("when: {cps.mix: cutmix}", "when: {cps.cutmix_boxes: 1}", "refers to itself."),
    ("when: {cps.mix: cutmix}", "when: {cps.mix: cut}", "'cut' is not one of none, cutmix."),
    ("when: {cps.mix: cutmix}", "when: {cps.mix: []}", "needs at least one value."),
    ("[none, cutmix]}", "[none, cutmix], when: {cps.cutmix_boxes: 3}}", "depend on each other in a circle."),
    (POINT, "{optim.lrr: 0.01}", "23: enqueue[0].optim.lrr: is not in search_space. Did you mean optim.lr?"),
    (POINT, "{optim.lr: 1}", "23: enqueue[0].optim.lr: 1 is not within 0.001 and 0.1."),
    (POINT, "{cps.mix: cutmix, cps.cutmix_boxes: 2.5}", "23: enqueue[0].cps.cutmix_boxes: must be a whole number"),
    (POINT, "{cps.mix: cosine}", "23: enqueue[0].cps.mix: 'cosine' is not one of none, cutmix."),
    (POINT, "{cps.mix: none, cps.cutmix_boxes: 2}", "23: enqueue[0].cps.cutmix_boxes: is drawn only where cps.mix = cutmix"),
    (POINT, "{cps.cutmix_boxes: 2}", "23: enqueue[0].cps.cutmix_boxes: is drawn only where cps.mix = cutmix"),
    ("{method: supervised}", "{methd: supervised}", "25: baselines.supervised.methd: no such setting. Did you mean method?"),
    ("supervised: {", "../up: {", "25: baselines.../up: names a folder"),
    ("{schedule.steps: 400}", "{schedule.steps: 410}", "28: final.set: `schedule.steps % schedule.eval_every == 0` must hold"),
    ("{schedule.steps: 400}", "{data.labeled: 0.5}", "28: final.set.data.labeled: cannot be changed"),
    ("{schedule.steps: 400}", "{seed: 5}", "28: final.set.seed: cannot be changed: use `final.seeds`."),
    ("lr: 1e-2", "lr: 1e-2\n  cps: {start: 0.1, ramp: 0.2}", "17: early_stopping.grace: must be at least 60, the step at which the weight of cps "
     "has risen in every trial (cps.start + cps.ramp, of 200 steps), but got 50: before it"),
    (LR, f"{LR}\n  cps.ramp: {{type: float, low: 0.0, high: 0.3}}", "16: early_stopping.grace: must be at least 60, "),
    (LR, f"{LR}\n  cps.ramp: {{type: choice, values: [0.0, 1.0], when: {{cps.mix: cutmix}}}}", "must be at least 200, "),
    ("asha, grace: 50", "hyperband", "must hold, but got grace=1, eval_every=50."),
    ("values: [none, cutmix]", "values: [[1, 2], [1, 2]]", "20: search_space.cps.mix: values lists [1, 2] twice."),
    (POINT, "{cps.mix: [none]}", "23: enqueue[0].cps.mix: ['none'] is not one of none, cutmix."),
    ("budget: {trials: 4}", "budget: {trials: 4}\nsampler: {type: grid}", "search_space.cps.weight: needs a step, since sampler.type is grid."),
    ("budget: {trials: 4}", "budget: {trials: 4}\nwarm_start: [a]\nsampler: {type: qmc}",
     "16: warm_start: has no effect with sampler.type=qmc: only tpe and gp learn from it."),
    ("{method: supervised}", "{method: supervised, search: [optim.lrr]}",
     "25: baselines.supervised.search: optim.lrr is not in search_space. Did you mean optim.lr?"),
    ("{method: supervised}", "{method: supervised, trials: 3}", "25: baselines.supervised: `trials` is the number of trials of a `search`"),
    ("{method: supervised}", "{method: supervised, optim.lr: 0.02, search: [optim.lr]}",
     "25: baselines.supervised.search: optim.lr is searched, but the baseline itself says what it is. Remove one."),
    ("{schedule.steps: 400}", "{schedule.steps: 400}\n  folds: 3\n  nested: true\nwarm_start: [a]",
     "warm_start: brings values that images of all folds have decided, but with final.nested"),
    ("{schedule.steps: 400}", "{schedule.steps: 400}\n  draws: 3\n  folds: 3", "`final.draws` and `final.folds` exclude each other"),
    ("{schedule.steps: 400}", "{schedule.steps: 400}\n  curve: [0.5]\n  folds: 3", "`final.curve` needs a test split"),
    ("supervised: {", "best-of-all: {", "25: baselines.best-of-all: begins as the names of the best one's own runs do"),
    ("supervised: {", "trial-7: {", "25: baselines.trial-7: begins as the names of the best one's own runs do"),
    ("{schedule.steps: 400}", "{schedule.steps: 400}\n  nested: true", "`final.nested` needs at least 3 `final.folds`"),
    ("{schedule.steps: 400}", "{schedule.steps: 400}\n  folds: 1", "final.folds: must be at least 2"),
    ("grace: 50", "grace: 400", "16: early_stopping.grace: must be at most train.schedule.steps=200, but got 400."),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), SWEEP_FAULTS)
def test_sweep_faults(sweep_file, old, new, message):
    with pytest.raises(ConfigError) as caught:
        load_sweep(sweep_file((old, new)))
    lines = str(caught.value).splitlines()
    assert all(line.startswith("sweeps/x.yaml:") for line in lines)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["draws: 3", "curve: [0.5]"])
@pytest.mark.parametrize(("labeled", "text"), [("labeled: x", "the subset x"), ("labeled_list: x.txt", "a list")])
def test_labels_that_are_listed_cannot_be_drawn_anew(sweep_file, name, labeled, text):
    path = sweep_file(("labeled: 0.125", labeled), ("seeds: [1, 2]", f"seeds: [1, 2]\n  {name}"))
    with pytest.raises(ConfigError, match=f"train.data.labeled must be a count or a fraction, but is {text}"):
        load_sweep(path)


def test_nested_needs_a_search_to_repeat(sweep_file):
    nested = ("{schedule.steps: 400}", "{schedule.steps: 400}\n  folds: 3\n  nested: true")
    with pytest.raises(ConfigError, match=r"with `budget.trials: 1` there is none. Remove `nested`."):
        load_sweep(sweep_file(("budget: {trials: 4}", "budget: {trials: 1}"), nested))


def test_parts_of_few_labels_must_differ(sweep_file):
    path = sweep_file(("labeled: 0.125", "labeled: 3"), ("seeds: [1, 2]", "seeds: [1, 2]\n  curve: [0.3, 0.4, 1.0]"))
    with pytest.raises(ConfigError, match=r"must give different numbers of labels, but of 3 gives \[1, 1, 3\]"):
        load_sweep(path)


def test_sweep_allows_what_is_right(sweep_file):
    load_sweep(sweep_file((WEIGHT, "{type: float, low: 0.0, high: 0.95, step: 0.05}")))
    load_sweep(sweep_file(("asha, grace: 50", "none, grace: 400")))
    load_sweep(
        sweep_file((LR, "  model.options.decoder_channels: {type: int, low: 16, high: 64, step: 16}"), (POINT, "{}"))
    )


def test_only_the_ramp_of_the_method_that_is_trained_counts(sweep_file):
    ramp = "lr: 1e-2\n  mean_teacher: {ramp: 1.0}"
    load_sweep(sweep_file(("lr: 1e-2", ramp)))
    load_sweep(sweep_file(("  data:", "  method: supervised\n  cps: {ramp: 1.0}\n  data:")))
    # In trials that do not draw it the ramp is train's own, 0.
    space = f"{LR}\n  cps.ramp: {{type: choice, values: [0.1, 0.25], when: {{cps.mix: cutmix}}}}"
    load_sweep(sweep_file((LR, space)))


def test_cmaes_is_refused_by_name_where_it_is_missing(sweep_file, monkeypatch):
    file = sweep_file(("budget: {trials: 4}", "budget: {trials: 4}\nsampler: {type: cmaes}"))
    load_sweep(file)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"x.yaml:16: sampler.type: cmaes needs .* pip install 'cps_ray\[cmaes\]'"):
        load_sweep(file)


def test_bounds_are_tried_with_what_makes_them_active(sweep_file):
    space = "  model.b.encoder: {type: choice, values: [resnet18]}\n"
    space += "  model.b.architecture: {type: choice, values: [unet], when: {model.b.encoder: resnet18}}"
    assert "model.b.encoder" in load_sweep(sweep_file((LR, space), (POINT, "{}"))).search_space


def test_paths_in_changes_are_relative_to_the_file(sweep_file, tmp_path):
    baselines = "{method: supervised}\n  more: {data: {shards: ../other}}"
    sweep = load_sweep(
        sweep_file(("{method: supervised}", baselines), ("{schedule.steps: 400}", "{model.weights_file: w.pt}"))
    )
    assert sweep.baselines["more"] == {"data": {"shards": str(tmp_path / "other")}}
    assert sweep.final.set == {"model.weights_file": str(tmp_path / "sweeps" / "w.pt")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            "method=fixmatch fixmatch.teacher=average",
            "`train.ema.decay` must be given with `train.fixmatch.teacher: average`. 0.99 is",
        ),
        (
            "method=unimatch unimatch.version=v2",
            "`train.ema.decay` must be given with `train.unimatch.version: v2`. 0.996 is usual.",
        ),
        ("method=mean_teacher", "`train.ema.decay` must be given with `train.method: mean_teacher`. 0.99 is usual."),
        ("cps.teacher=average", "`train.ema.decay` must be given with `train.cps.teacher: average`. 0.99 is usual."),
        (
            "fixmatch.view=weak fixmatch.strong_views=2",
            "`train.fixmatch.strong_views: 1` must hold with `train.fixmatch.view: weak`, but got 2.",
        ),
    ],
)
def test_settings_that_need_others_say_so(sweep_file, changes, message):
    with pytest.raises(ConfigError) as caught:
        load_sweep(sweep_file(), [f"train.{change}" for change in changes.split()])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


ROOT = Path(__file__).parents[2]


def test_a_shipped_sweep_is_read_by_its_name_as_if_it_lay_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"camvid", "cityscapes", "quickstart"} <= {*sweeps()}
    for name in sweeps():
        shipped, where = read_sweep(Path(name))
        (tmp_path / "sweeps").mkdir(exist_ok=True)
        copy = tmp_path / "sweeps" / f"{name}.yaml"
        copy.write_text((ROOT / copy.relative_to(tmp_path)).read_text(encoding="utf-8"), encoding="utf-8")
        assert shipped == load_sweep(copy)
        assert shipped.output == tmp_path / "runs"
        assert where(("train",)).startswith(f"{name}:")
        assert reader.sweep_file(Path(name)).read_text() == copy.read_text()


def test_a_folder_of_the_name_is_no_sweep_but_a_file_is(sweep_file, tmp_path):
    (tmp_path / "camvid").mkdir()
    assert load_sweep(Path("camvid")).name == "camvid"
    sweep_file().rename("quickstart")
    assert load_sweep(Path("quickstart")).name == "tiny"


@pytest.mark.parametrize(
    ("load", "name", "message"),
    [
        (
            load_sweep,
            "quikstart",
            "quikstart: no such file, and there is no sweep 'quikstart'. Did you mean quickstart?",
        ),
        (
            load_sweep,
            "sweeps/camvid.yaml",
            "sweeps/camvid.yaml: no such file, and there is no sweep 'sweeps/camvid.yaml'. Did you mean camvid?",
        ),
        (
            load_sweep,
            "mine.yaml",
            "mine.yaml: no such file, and there is no sweep 'mine.yaml'. There are {names}.",
        ),
        (
            load_sweep,
            "reference/voc",
            "reference/voc: this is a training, not a sweep. Run it: python -m cps_ray.train reference/voc",
        ),
        (
            load_train,
            "quickstart",
            "quickstart: this is a sweep, not a training. Run it: python -m cps_ray.sweep quickstart",
        ),
    ],
)
def test_a_name_that_is_neither_file_nor_shipped(tmp_path, monkeypatch, load, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(Path(name))
    assert str(caught.value) == message.format(names=", ".join(sweeps()))


@pytest.mark.parametrize("value", ["1_16", "yes", "null", "12", "1e3", "0x10", "true"])
def test_what_a_flag_says_is_text_and_no_yaml(sweep_file, value):
    flags = {"name": value, "output": f"[{value}]: #v2?%2F"}
    config, where = read_sweep(sweep_file(), flags=flags)
    assert config.name == flags["name"]
    assert config.output == Path.cwd() / flags["output"]
    assert where(("name",)) == f"--name {flags['name']}"


def test_a_wrong_flag_is_named(sweep_file):
    with pytest.raises(ConfigError) as caught:
        read_sweep(sweep_file(), flags={"name": "[v2]"})
    assert str(caught.value).startswith("--name [v2]: name: must be text that fits ")


@pytest.mark.parametrize(
    "path",
    ["[v2]", "[v2]/x", "a #1/x", "#x", "a: b/x", "{x}", "&x", "@x", "%2F", "12", "true", "- x", '"x', "*x", "x: "],
)
def test_a_path_that_yaml_takes_for_something_else_is_refused_and_the_remedy_works(sweep_file, path):
    override = f"train.data.shards={path}"
    with pytest.raises(ConfigError, match="If it is text, quote it for YAML and for the shell: ") as caught:
        load_sweep(sweep_file(), [override])
    remedy = shlex.split(str(caught.value).partition("for the shell: ")[2])
    assert load_sweep(sweep_file(), remedy).train.data.shards == Path.cwd() / path


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.data.labeled=3", 3),
        ("train.data.labeled=0.5", 0.5),
        ("train.data.labeled='3'", "3"),
        ("train.data.labeled=1_16", "1_16"),
        ("train.data.labeled=!!str 92", "92"),
    ],
)
def test_what_may_be_text_or_a_number_is_read_as_yaml(sweep_file, override, value):
    assert load_sweep(sweep_file(), [override]).train.data.labeled == value
