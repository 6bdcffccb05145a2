"""The shipped trainings hold the reference recipes, and what a file says beside `preset:` changes them."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cps_ray
from cps_ray.config.reader import load_sweep, load_train, presets
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.engine.encoders import size_of, weights_of
from cps_ray.engine.names import check_names
from cps_ray.engine.preflight import refusal
from cps_ray.errors import ConfigError

PUBLISHED = ["reference/cityscapes", "reference/cityscapes-cutmix", "reference/voc", "reference/voc-cutmix"]
MODERN = ["modern/dinov2-small", "modern/dinov2-small-convnext", "modern/dinov3-small"]
NAMES = [*MODERN, *PUBLISHED]
SHIPPED = [*NAMES, "unimatch/voc"]

# The scripts of charlesCXK/TorchSemiSeg at 5e0c29c. The loss is divided by the number of GPUs before the gradient is
# averaged over them, so what acts is the nominal rate / GPUs and the nominal weight decay x GPUs.
SCRIPTS: dict[str, dict[str, Any]] = {
    "voc": {
        "gpus": 4,
        "nominal_lr": 0.01,
        "crop": 512,
        "stride": 342,
        "epochs": 34,
        "steps_per_epoch": 1157,
        "supervised": "ce",
        "weight": {"": 1.5, "-cutmix": 1.0},
        "evaluations": 34,
    },
    "cityscapes": {
        "gpus": 8,
        "nominal_lr": 0.02,
        "crop": 800,
        "stride": 534,
        "epochs": 137,
        "steps_per_epoch": 325,
        "supervised": "ohem",
        "weight": {"": 6.0, "-cutmix": 5.0},
        "evaluations": 25,
    },
}
NOMINAL_DECAY = 1e-4


def recipe(name: str) -> dict[str, Any]:
    """Dotted setting -> value, from the scripts."""
    dataset, _, variant = name.removeprefix("reference/").partition("-")
    script, cutmix = SCRIPTS[dataset], variant == "cutmix"
    steps = script["epochs"] * script["steps_per_epoch"]
    return {
        "seed": 0,
        "method": "cps",
        "data.labeled": "1_8",
        "data.crop_px": [script["crop"], script["crop"]],
        "data.labeled_batch": 8,
        "data.unlabeled_batch": 8,
        "model.architecture": "deeplabv3plus-cps",
        "model.encoder": "tu-resnet50s",
        "model.weights": "imagenet",
        "model.b": None,
        "model.networks": 2,
        "model.backbone_init": "shared",
        "optim.name": "sgd",
        "optim.lr": pytest.approx(script["nominal_lr"] / script["gpus"]),
        "optim.momentum": 0.9,
        "optim.weight_decay": pytest.approx(NOMINAL_DECAY * script["gpus"]),
        "optim.decay": "poly",
        "optim.power": 0.9,
        "optim.warmup_steps": 0,
        "optim.clip_norm": None,
        "schedule.steps": steps,
        "schedule.eval_every": steps // script["evaluations"],
        "loss.supervised": script["supervised"],
        "loss.ohem_threshold": 0.7,
        "loss.ohem_min_kept": 50_000,
        "cps.weight": script["weight"]["-cutmix" if cutmix else ""],
        "cps.ramp": 0.0,
        "cps.confidence": 0.0,
        "cps.images": "unlabeled" if cutmix else "all",
        "cps.mix": "cutmix" if cutmix else "none",
        "cps.cutmix_boxes": 3,
        "cps.cutmix_area": [0.25, 0.5],
        "cps.cutmix_partner": "self",
        "cps.teacher_bn": "train",
        "cps.forwards": "separate",
        "ema.decay": None,
        "augment.scales": [0.5, 0.75, 1.0, 1.5, 1.75, 2.0],
        "augment.flip": 0.5,
        "augment.color": 0.0,
        "augment.blur": 0.0,
        "compute.autocast": "none",
        "compute.accumulate": 1,
        "evaluation.networks": "a",
        "evaluation.window_px": [script["crop"], script["crop"]],
        "evaluation.stride_px": [script["stride"], script["stride"]],
        "evaluation.sum": "logits",
        "evaluation.scales": [1.0],
        "evaluation.flip": False,
        "evaluation.hidden_images": 0,
        "resources.workers": script["gpus"],
        "resources.cpus_per_worker": 4,
        "resources.gpus_per_worker": 1,
        "resources.placement": "replicated",
    }


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


@pytest.fixture
def train_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes mine.yaml into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        path = Path("mine.yaml")
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_these_are_shipped() -> None:
    assert presets() == SHIPPED


def test_unimatch_holds_the_recipe_of_its_authors() -> None:
    """configs/pascal.yaml and unimatch.py of LiheYoung/UniMatch at 7292bac: 10582 images, over 4 GPUs."""
    config = load_train(Path("unimatch/voc"), ["data.shards=here"])
    found = flat(config.dump())
    wanted = {
        "method": "unimatch",
        "unimatch.version": "v1",
        "unimatch.weight": 1.0,
        "unimatch.confidence": 0.95,
        "unimatch.feature_dropout": 0.5,
        "unimatch.mix": "one_box",
        "unimatch.padding": "ignore",
        "unimatch.ramp": 0.0,
        "data.crop_px": [321, 321],
        "data.labeled_batch": 8,
        "data.unlabeled_batch": 8,
        "optim.name": "sgd",
        "optim.lr": 0.001,
        "optim.head_lr_factor": 10.0,
        "optim.weight_decay": 1e-4,
        "optim.power": 0.9,
        "loss.supervised": "ce",
        "augment.scale": [0.5, 2.0],
        "augment.scales": None,
        "resources.workers": 4,
        # A sampler's share is rounded up, its last batch dropped.
        "schedule.steps": 80 * (math.ceil((10582 - 183) / 4) // 2),
        "schedule.eval_every": math.ceil((10582 - 183) / 4) // 2,
    }
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_holds_the_recipe(name: str) -> None:
    config = load_train(Path(name), ["data.shards=here"])
    found, wanted = flat(config.dump()), recipe(name)
    assert {key: found[key] for key in wanted} == wanted
    # One rule for both data sets: 0.0025 for every 8 labelled images.
    assert config.optim.lr == pytest.approx(0.0025 * config.data.labeled_batch / 8)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_preset_is_a_file_that_asks_for_shards_alone(
    train_file: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    config = load_train(train_file(f"preset: {name}\ndata: {{shards: here}}\n"))
    assert config == load_train(Path(name), ["data.shards=here"])
    assert config.data.shards == tmp_path / "here"
    with pytest.raises(ConfigError, match=r"^mine\.yaml:1: data\.shards: is missing\.$"):
        load_train(train_file(f"preset: {name}\n"))
    with pytest.raises(ConfigError, match=rf"^{name}:\d+: data\.shards: is missing\.$"):
        load_train(Path(name))


@pytest.mark.parametrize("name", MODERN)
def test_a_modern_preset_has_weights_with_a_licence_and_runs_at_its_crop_without_padding(name: str) -> None:
    config = load_train(Path(name), ["data.shards=here"])
    assert config.data.crop_px == config.evaluation.window_px
    text = (Path(cps_ray.__file__).parent / f"config/presets/{name}.yaml").read_text(encoding="utf-8")
    assert "Ours, not a published recipe" in text
    for number in range(config.networks):
        form = config.model.of(number)
        check_names(form)  # the tag exists
        licence = weights_of(form).licence
        assert licence is not None
        assert licence.replace("-license", "").lower() in text.lower()
        size = size_of(form.encoder)
        assert size is not None
        assert all(side % size.divisor == 0 for side in config.data.crop_px)
        assert refusal(form, config.data.crop_px) == ""


def test_what_stands_beside_a_preset_changes_it(train_file: Callable[[str], Path]) -> None:
    config = load_train(
        train_file(
            "preset: reference/voc-cutmix\n"
            "data: {shards: here, labeled: 1_4, prepare: null, slices: {mine: x*}}\n"
            "model: {options: {a: 1}}\n"
            "augment: {scales: [0.5, 1.25]}\n"
            "schedule: {steps: 11570}\n"
        )
    )
    assert config.data.labeled == "1_4"
    assert config.data.crop_px == (512, 512)
    assert config.data.slices == {"mine": "x*"}
    assert config.model.options == {"a": 1}
    assert config.model.encoder == "tu-resnet50s"
    assert config.augment.scales == (0.5, 1.25)
    assert config.augment.flip == 0.5
    assert (config.schedule.steps, config.schedule.eval_every) == (11570, 1157)
    assert config.data.prepare is None


def test_overrides_change_what_the_preset_and_the_file_say(train_file: Callable[[str], Path]) -> None:
    path = train_file("preset: reference/voc\ndata: {shards: here}\ncps: {weight: 3}\n")
    config = load_train(path, ["cps.weight=2", "cps={ramp: 0.5}", "schedule.steps=2314"])
    assert (config.cps.weight, config.cps.ramp, config.cps.images) == (2.0, 0.5, "all")
    assert config.schedule.steps == 2314


def test_the_dump_holds_all_settings_and_no_preset(train_file: Callable[[str], Path]) -> None:
    config = load_train(train_file("preset: reference/cityscapes\ndata: {shards: here}\n"))
    text = dump_yaml(config.dump(str(Path.cwd())))
    assert "preset:" not in text
    assert load_train(train_file(text)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset: reference/vox", "mine.yaml:1: preset: there is no preset 'reference/vox'. Did you mean reference/voc?"),
        ("seed: 1\npreset: 7", f"mine.yaml:2: preset: there is no preset 7. There are {', '.join(SHIPPED)}."),
        ("preset: [a]", f"mine.yaml:1: preset: there is no preset ['a']. There are {', '.join(SHIPPED)}."),
        ("preset: ../reader", f"mine.yaml:1: preset: there is no preset '../reader'. There are {', '.join(SHIPPED)}."),
        ("preset: reference/voc\ndata: {shards: s}\ncps:\n  wieght: 2",
         "mine.yaml:4: cps.wieght: no such setting. Did you mean cps.weight?"),
        ("preset: reference/voc\ndata: {shards: s}\ncps:\n  weight: two",
         "mine.yaml:4: cps.weight: must be a number, but got 'two'."),
        ("preset: reference/voc\ndata:\n  shards: s\nschedule:\n  eval_every: 100",
         "mine.yaml:4: `schedule.steps % schedule.eval_every == 0` must hold, but got steps=39338, eval_every=100."),
        ("preset: reference/voc\ndata:", "mine.yaml:2: data: must be a mapping of settings, but got null."),
        ("presett: reference/voc\ndata: {shards: s}", "mine.yaml:1: presett: no such setting. Did you mean preset?"),
    ],
)  # fmt: skip
def test_faults_beside_a_preset_name_the_line(train_file: Callable[[str], Path], text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_train(train_file(f"{text}\n"))
    assert str(caught.value) == message


def test_a_name_that_is_neither_file_nor_preset(train_file: Callable[[str], Path]) -> None:
    with pytest.raises(
        ConfigError, match=r"^none\.yaml: no such file, and there is no preset 'none\.yaml'\. There are"
    ):
        load_train(Path("none.yaml"))


def test_a_file_comes_before_a_preset_of_its_name(train_file: Callable[[str], Path]) -> None:
    train_file("")
    Path("reference").mkdir()
    Path("reference/voc").write_text("preset: reference/voc\ndata: {shards: s}\nseed: 3\n", encoding="utf-8")
    config = load_train(Path("reference/voc"))
    assert config.seed == 3
    assert config.data.shards == Path.cwd() / "reference/s"


def test_an_override_of_the_preset_is_refused(train_file: Callable[[str], Path]) -> None:
    path = train_file("preset: reference/voc\ndata: {shards: here}\n")
    with pytest.raises(ConfigError) as caught:
        load_train(path, ["preset=reference/cityscapes"])
    assert str(caught.value).startswith("--set preset=reference/cityscapes: a preset is named in the file")
    assert "\n" not in str(caught.value)


TRAIN = """\
train:
  preset: reference/cityscapes-cutmix
  data:
    shards: ../data/tiny
  schedule: {eval_every: 25}
"""


def on_preset(sweep_file: Callable[..., Path]) -> Path:
    """The small sweep of these tests, its training replaced."""
    path = sweep_file()
    head, _, rest = path.read_text(encoding="utf-8").partition("train:\n")
    path.write_text(f"{head}{TRAIN}{rest[rest.index('budget:') :]}", encoding="utf-8")
    return path


def test_a_sweep_on_a_preset(sweep_file: Callable[..., Path], tmp_path: Path) -> None:
    path = on_preset(sweep_file)
    text = path.read_text(encoding="utf-8").replace("schedule.steps: 400", "schedule.steps: 50000")
    path.write_text(text, encoding="utf-8")
    sweep = load_sweep(path, ["train.cps.ramp=0.1", "early_stopping={type: none}"])
    wanted = load_train(
        Path("reference/cityscapes-cutmix"), ["data.shards=data/tiny", "schedule.eval_every=25", "cps.ramp=0.1"]
    )
    assert sweep.train == wanted
    assert sweep.train.data.shards == tmp_path / "data" / "tiny"
    assert "preset:" not in dump_yaml(sweep.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "cityscapes-cutmix",
            "citycsapes",
            "5: train.preset: there is no preset 'reference/citycsapes'. Did you mean ",
        ),
        (
            "eval_every: 25",
            "eval_evry: 25",
            "8: train.schedule.eval_evry: no such setting. Did you mean train.schedule.eval_every?",
        ),
        ("    shards: ../data/tiny", "    subset_seed: 1", "6: train.data.shards: is missing."),
    ],
)
def test_faults_in_a_sweep_on_a_preset(sweep_file: Callable[..., Path], old: str, new: str, message: str) -> None:
    path = on_preset(sweep_file)
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_sweep(path)
    assert str(caught.value).startswith(f"sweeps/x.yaml:{message}")


def test_a_sweep_does_not_take_a_preset_over_an_override(sweep_file: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"^--set train\.preset=reference/voc: a preset is named in the file"):
        load_sweep(sweep_file(), ["train.preset=reference/voc"])


def test_a_training_on_a_preset_given_as_a_sweep(train_file: Callable[[str], Path]) -> None:
    path = train_file("preset: reference/voc\ndata: {shards: here}\n")
    with pytest.raises(ConfigError, match="this is a training, not a sweep"):
        load_sweep(path)
