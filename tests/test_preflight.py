"""Valid means run: what would fail later is refused before any cluster starts, in one line with its place; what runs, passes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import TINY_DATA

from cps_ray import sweep, train
from cps_ray.config.reader import load_sweep
from cps_ray.engine import preflight
from cps_ray.engine.networks import build_network

SWEEP = (
    """\
version: 1
name: trial
output: runs
train:
"""
    + TINY_DATA
    + """\
  model:
    architecture: unet
    encoder: resnet18
    options: {}
  optim: {lr: 0.01}
  schedule: {steps: 4, eval_every: 2}
  cps: {weight: 1.0}
budget: {trials: 2}
early_stopping: {type: none}
search_space:
  optim.lr: {type: float, low: 0.01, high: 0.1}
baselines:
  supervised: {method: supervised}
final:
  set: {schedule.steps: 6}
"""
)
ARCHITECTURE, ENCODER, OPTIONS = "architecture: unet", "encoder: resnet18", "options: {}"
LABELED, UNLABELED, CROP = " labeled_batch: 4", "unlabeled_batch: 4", "crop_px: [32, 48]"
CPS, SPACE = "cps: {weight: 1.0}", "  optim.lr: {type: float, low: 0.01, high: 0.1}\n"
BASELINE, FINAL = "{method: supervised}", "{schedule.steps: 6}"
DEEPLAB = (ARCHITECTURE, "architecture: deeplabv3plus")
SWIN, MAXVIT = "tu-swin_tiny_patch4_window7_224", "tu-maxvit_pico_rw_256"
Change = tuple[str, str]
Write = Callable[..., Path]


def searched(*lines: str) -> Change:
    return SPACE, SPACE + "".join(f"  {line}\n" for line in lines)


def choice(name: str, *values: str) -> str:
    return f"{name}: {{type: choice, values: [{', '.join(values)}]}}"


@pytest.fixture
def write(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes the sweep above, with (old, new) parts replaced, into the working directory."""
    monkeypatch.chdir(tmp_path)

    def written(*changes: Change) -> Path:
        text = SWEEP
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        path = Path("trial.yaml")
        path.write_text(text.replace("SHARDS", str(shards)))
        return path

    return written


# (changes of the sweep, text in the line to blame, setting, words of the reason)
WRONG: dict[str, tuple[list[Change], str, str, str]] = {
    "a baseline's batch of one": (
        [DEEPLAB, (LABELED, " labeled_batch: 1"), (UNLABELED, "unlabeled_batch: 2")],
        *("supervised: {method", "baselines.supervised.method", "at least 2 images must pass deeplabv3plus"),
    ),
    "a micro-batch of one": (
        [DEEPLAB, (CPS, f"method: supervised\n  compute: {{accumulate: 4}}\n  {CPS}")],
        *(LABELED, "train.data.labeled_batch", "data.labeled_batch=4, compute.accumulate=4"),
    ),
    "a teacher's batch of one": (
        [DEEPLAB, (UNLABELED, "unlabeled_batch: 1")],
        *("unlabeled_batch: 1", "train.data.unlabeled_batch", "method cps passes 1 alone (data.unlabeled_batch=1)"),
    ),
    "one image of a kind at a time": (
        [DEEPLAB, (LABELED, " labeled_batch: 1"), (CPS, "cps: {weight: 1.0, mix: none, forwards: separate}")],
        *("labeled_batch: 1", "train.data.labeled_batch", "at least 2 images must pass"),
    ),
    "masks alone at first": (
        [DEEPLAB, (LABELED, " labeled_batch: 1"), (CPS, "cps: {weight: 1.0, start: 0.5}")],
        *("labeled_batch: 1", "train.data.labeled_batch", "at least 2 images must pass"),
    ),
    "one choice passes one image alone": (
        [
            *(
                DEEPLAB,
                (LABELED, " labeled_batch: 1"),
                (CPS, "cps: {weight: 1.0, mix: none}"),
                (BASELINE, "{cps.weight: 0.5}"),
            ),
            searched(choice("cps.forwards", "joint", "separate")),
        ],
        *("cps.forwards", "search_space.cps.forwards.values[1]", "with cps.forwards=separate, at least 2 images"),
    ),
    "the authors' network and one image": (
        [
            *((ARCHITECTURE, "architecture: deeplabv3plus-cps"), (ENCODER, "encoder: tu-test_resnet")),
            *((LABELED, " labeled_batch: 1"), (BASELINE, "{method: fixmatch}"), (CPS, "method: supervised")),
        ],
        *("labeled_batch: 1", "train.data.labeled_batch", "deeplabv3plus-cps with tu-test_resnet together"),
    ),
    "windows of attention do not divide the crop": (
        [searched(choice("model.encoder", "resnet18", MAXVIT))],
        *("model.encoder:", "search_space.model.encoder.values[1]", f"with model.encoder={MAXVIT}, "),
    ),
    "an encoder of one size": (
        [(ENCODER, f"encoder: {SWIN}")],
        *(SWIN, "train.model.encoder", "does not take crops of 32x48 px (`train.data.crop_px`)"),
    ),
    "an encoder of one size evaluates whole images": (
        [(ENCODER, f"encoder: {SWIN}"), (CROP, "crop_px: [224, 224]")],
        *(SWIN, "train.model.encoder", "in evaluations not images of 32x48 px"),
    ),
    "an encoder of one size and other windows": (
        [
            *((ENCODER, f"encoder: {SWIN}"), (CROP, "crop_px: [224, 224]")),
            (CPS, f"{CPS}\n  evaluation: {{window_px: [192, 192]}}"),
        ],
        *("window_px", "train.evaluation.window_px", "in evaluations not windows of 192x192 px"),
    ),
    "an architecture that refuses an encoder": (
        [(ARCHITECTURE, "architecture: unetplusplus"), searched(choice("model.encoder", "resnet18", "mit_b0"))],
        *("model.encoder:", "search_space.model.encoder.values[1]", "unetplusplus with encoder mit_b0"),
    ),
    "two choices that do not go together": (
        [searched(choice("model.encoder", "resnet18", "mit_b0"), choice("model.architecture", "unet", "linknet"))],
        *(
            "model.encoder:",
            "search_space.model.encoder.values[1]",
            "with model.encoder=mit_b0, model.architecture=linknet",
        ),
    ),
    "a pyramid that cannot be dilated": (
        [DEEPLAB, (BASELINE, f"{{model.encoder: {SWIN}}}")],
        *("supervised: {model", "baselines.supervised.model.encoder", "cannot be built"),
    ),
    "softmax at the end": (
        [(OPTIONS, "options: {activation: softmax}")],
        *("activation", "`train.model.options.activation`", " cannot be given: losses and evaluation need logits"),
    ),
    "other classes": (
        [(OPTIONS, "options: {classes: 3}")],
        *("classes", "`train.model.options.classes`", " cannot be given: there are as many as the data have"),
    ),
    "channels that no image has": (
        [(OPTIONS, "options: {in_channels: 4}")],
        *("in_channels", "`train.model.options.in_channels`", " cannot be given"),
    ),
    "an encoder by another name": (
        [(OPTIONS, "options: {encoder_name: resnet34}")],
        *("encoder_name", "`train.model.options.encoder_name`", "set `train.model.encoder` instead"),
    ),
    "weights by another name": (
        [(OPTIONS, "options: {encoder_weights: imagenet}")],
        *("encoder_weights", "`train.model.options.encoder_weights`", "set `train.model.weights` instead"),
    ),
    "a second output": (
        [(OPTIONS, "options: {aux_params: [1]}")],
        *("aux_params", "`train.model.options.aux_params`", "losses know one output"),
    ),
    "no such option": (
        [(OPTIONS, "options: {decoder_chanels: 16}")],
        *(
            "decoder_chanels",
            "train.model.options",
            "unet has no option 'decoder_chanels'. Did you mean decoder_channels?",
        ),
    ),
    "an option of another form": (
        [(OPTIONS, "options: {decoder_channels: [16, 8]}")],
        *(ENCODER, "train.model.encoder", "decoder_channels"),
    ),
    "a stride that there is not": (
        [DEEPLAB, searched(choice("model.options.encoder_output_stride", "16", "8", "4"))],
        *("encoder_output_stride", "search_space.model.options.encoder_output_stride.values[2]", "4"),
    ),
    "a misspelt encoder that is seldom drawn": (
        [searched(choice("model.encoder", *(f"resnet{n}" for n in (18, 34, 50, 101)), "resnet512"))],
        *("model.encoder:", "search_space.model.encoder.values[4]", "no 'resnet512'. Did you mean resnet152?"),
    ),
    "a misspelt second network": (
        [searched(choice("model.b.encoder", "resnet18", "resnet18s"))],
        *("model.b.encoder", "search_space.model.b.encoder.values[1]", "Did you mean resnet18?"),
    ),
    "a misspelt architecture behind a condition": (
        [
            searched(
                choice("cps.mix", "none", "cutmix"),
                "model.architecture: {type: choice, values: [unet, fpnn], when: {cps.mix: cutmix}}",
            )
        ],
        *("model.architecture:", "search_space.model.architecture.values[1]", "Did you mean fpn?"),
    ),
    "a misspelt encoder in a baseline": (
        [(BASELINE, "{method: supervised, model.encoder: resnet81}")],
        *("resnet81", "baselines.supervised.model.encoder", "no 'resnet81'"),
    ),
    "a misspelt encoder of the final runs": (
        [(FINAL, "{model: {encoder: resnet81}}")],
        *("resnet81", "final.set.model.encoder", "no 'resnet81'"),
    ),
    "weights that smp does not have": (
        [
            (ENCODER, f"{ENCODER}\n    weights: none"),
            searched(choice("model.weights", "none", "imagenet", "imagenet22k")),
        ],
        *("model.weights:", "search_space.model.weights.values[2]", "no 'imagenet22k'"),
    ),
    "a tag that smp would pass over": (
        [(ENCODER, "encoder: tu-resnet18\n    weights: a3_in1k")],
        *("a3_in1k", "train.model.weights", "Other weights of timm are a tag of the encoder"),
    ),
    "a tag that timm does not have": (
        [(ENCODER, "encoder: tu-resnet18.a1_in1")],
        *("a1_in1", "train.model.encoder", "Did you mean a1_in1k?"),
    ),
    "a model that timm has no weights of": (
        [(ENCODER, "encoder: tu-seresnet18\n    weights: imagenet")],
        *("weights: imagenet", "train.model.weights", "timm has no weights of tu-seresnet18"),
    ),
    "a weights file that is not there": (
        [(ENCODER, f"{ENCODER}\n    weights_file: nowhere.pt")],
        *("nowhere.pt", "train.model.weights_file", "does not exist"),
    ),
    "a weights file of another encoder": (
        [
            (ENCODER, f"{ENCODER}\n    weights_file: resnet18.pt"),
            searched(choice("model.encoder", "resnet18", "resnet34")),
        ],
        *(
            "model.encoder:",
            "search_space.model.encoder.values[1]",
            "every tensor of the encoder resnet34 must be in it",
        ),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_would_fail_later_is_refused(case: str, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    changes, blamed, setting, reason = WRONG[case]
    path = write(*changes)
    if "resnet18.pt" in path.read_text():
        _save_encoder(Path("resnet18.pt"))
    assert sweep.main([str(path), "--dry-run"]) == 2
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if blamed in text)
    text = capsys.readouterr().err
    # A rule over several settings names them in backquotes.
    after = " " if setting.startswith("`") else ": "
    assert text.startswith(f"error: trial.yaml:{line}: {setting}{after}"), text
    assert reason in text, text
    assert text.count("\n") == 1, text
    assert "Traceback" not in text


def _save_encoder(path: Path) -> None:
    config = load_sweep(Path("trial.yaml")).train.model.model_copy(update={"weights_file": None})
    torch.save(build_network(config, 2, seed=0).network.encoder.state_dict(), path)


RIGHT: dict[str, list[Change]] = {
    "as it is": [],
    "architectures and encoders": [
        searched(
            choice("model.encoder", "resnet18", "tu-test_efficientnet"),
            choice("model.architecture", "unet", "fpn", "segformer"),
        )
    ],
    "an encoder that computes when it is built": [(ENCODER, "encoder: mit_b0")],
    "an encoder of one size, in windows": [
        *((ENCODER, f"encoder: {SWIN}"), (CROP, "crop_px: [224, 224]")),
        (CPS, f"{CPS}\n  evaluation: {{window_px: [224, 224]}}"),
    ],
    "the authors' network": [(ARCHITECTURE, "architecture: deeplabv3plus-cps"), (ENCODER, "encoder: tu-test_resnet")],
    "a pair of two forms": [(OPTIONS, "b: {architecture: fpn, encoder: tu-test_resnet}")],
    "three networks": [(OPTIONS, "networks: 3")],
    "one image of a kind, together": [
        DEEPLAB,
        (LABELED, " labeled_batch: 1"),
        (CPS, "cps: {mix: none}"),
        (BASELINE, "{cps.weight: 0.5}"),
    ],
    "one image a worker, with norms over all": [DEEPLAB, (CPS, f"{CPS}\n  resources: {{workers: 4}}")],
    "one image without pooling": [(LABELED, " labeled_batch: 1"), (CROP, "crop_px: [64, 64]")],
    "hard pixels and the other methods": [
        (CPS, "ema: {decay: 0.9}\n  loss: {supervised: ohem}"),
        (BASELINE, f"{BASELINE}\n  teacher: {{method: mean_teacher}}\n  fixmatch: {{method: fixmatch}}"),
    ],
    "a model that timm has no weights of, from scratch": [(ENCODER, "encoder: tu-seresnet18")],
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_runs_passes(case: str, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([str(write(*RIGHT[case])), "--dry-run"]) == 0, capsys.readouterr().err


def test_a_dry_run_says_what_a_weights_file_fills_and_what_is_left_over(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write((ENCODER, f"{ENCODER}\n    weights_file: resnet18.pt"))
    _save_encoder(Path("resnet18.pt"))
    state = torch.load("resnet18.pt")
    torch.save(
        {"state_dict": {**{f"net.{key}": v for key, v in state.items()}, "fc.bias": torch.ones(1)}}, "resnet18.pt"
    )
    assert sweep.main([str(path), "--dry-run"]) == 0
    said = "resnet18 filled by 120 tensors of resnet18.pt under state_dict.net.; 1 tensor not used: state_dict.fc.*."
    assert said in capsys.readouterr().out.splitlines()


def test_all_commands_refuse_alike(write: Write, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write((ENCODER, f"encoder: {MAXVIT}"))
    errors = []
    for words in ([str(path), "--dry-run"], [str(path)]):
        assert sweep.main(words) == 2
        errors.append(capsys.readouterr().err)
    assert errors[0] == errors[1]
    assert not Path("runs").exists()
    Path("one.yaml").write_text(
        f"data: {{shards: {shards}, labeled: 6, crop_px: [32, 48], labeled_batch: 4, unlabeled_batch: 4}}\n"
        f"model:\n  architecture: unet\n  encoder: {MAXVIT}\n"
        "optim: {lr: 0.1}\nschedule: {steps: 2, eval_every: 1}\n"
    )
    for words in (["one.yaml", "--dry-run"], ["one.yaml"]):
        assert train.main(words) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: one.yaml:4: model.encoder: ")
        # A sweep's settings are those of its training, below `train`.
        assert text.split(": ", 3)[3] == errors[0].split(": ", 3)[3].replace("train.", "")


def test_without_data_crops_are_tried_and_it_says_so(
    write: Write, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write((ENCODER, f"encoder: {SWIN}"), (CROP, "crop_px: [224, 224]"))
    path.write_text(path.read_text().replace(str(shards), "nowhere"))
    assert sweep.main([str(path), "--dry-run"]) == 0
    assert "Until then networks are tried on crops, not on whole images." in capsys.readouterr().out
    path.write_text(path.read_text().replace("[224, 224]", "[32, 48]"))
    assert sweep.main([str(path), "--dry-run"]) == 2


def test_sizes_of_all_evaluated_images_count(write: Write, shards: Path, tmp_path: Path) -> None:
    from cps_ray.datasets.loader import evaluated_sizes
    from cps_ray.datasets.shards import open_shards

    config = load_sweep(write()).train
    assert evaluated_sizes(open_shards(shards), config) == [(32, 48)]


def test_equal_trainings_are_tried_once(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    build = preflight._build
    monkeypatch.setattr(preflight, "_build", lambda *args: tried.append(args[1].encoder) or build(*args))
    changes = searched(choice("model.encoder", "resnet18", "tu-test_resnet"), choice("cps.ramp", "0.0", "0.1", "0.2"))
    assert sweep.main([str(write(changes)), "--dry-run"]) == 0
    assert tried == ["resnet18", "tu-test_resnet"]


def test_nothing_is_fetched_from_the_hub(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    monkeypatch.setattr("segmentation_models_pytorch.encoders.hf_hub_download", refuse)
    path = write(
        (ENCODER, "encoder: resnet18\n    weights: imagenet"),
        searched(choice("model.encoder", "resnet18", "tu-resnet18")),
    )
    assert sweep.main([str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "Images for resnet18: mean and std that the hub has beside the imagenet weights of resnet18" in out
    assert "Images for tu-resnet18: mean 0.485 0.456 0.406, std 0.229 0.224 0.225 (timm's of resnet18." in out
