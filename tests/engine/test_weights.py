import argparse
import io
import json
import random
import shlex
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from safetensors.torch import save_file
from support import changed as changed_config
from torch import Tensor, nn

from cps_ray.config.train import TrainConfig
from cps_ray.engine.deeplab import build_deeplab
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state
from cps_ray.engine.weights import load_encoder
from cps_ray.errors import CheckpointError

TINY = "tu-test_efficientnet"
State = dict[str, Tensor]

# How timm's feature extractors call `stages.0`: the same, `stages_0`, `model.stages.0`, `body.stages.0`. The last has a
# loader of its own in smp.
UNIVERSAL = [TINY, "tu-test_convnext", "tu-cspnext_tiny", "tu-legacy_xception", "tu-regnetx_002"]


def universal(name: str) -> nn.Module:
    torch.manual_seed(0)
    encoder: nn.Module = smp.encoders.get_encoder(name, weights=None)
    return encoder


def deeplab(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_deeplab(name, None, 2).encoder  # type: ignore[return-value]


def donor(name: str, classes: int = 1000) -> State:
    """A whole timm model's state, unlike any encoder's here, as timm's files have it."""
    torch.manual_seed(1)
    model = timm.create_model(name.removeprefix("tu-"), num_classes=classes)
    return {key: torch.rand_like(v) if v.is_floating_point() else v + 7 for key, v in model.state_dict().items()}


def saved(folder: Path, content: object, name: str = "weights.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def assert_all_came(encoder: nn.Module, before: State, state: State) -> None:
    """Every tensor of the encoder changed, to one of the file."""
    for key, value in encoder.state_dict().items():
        assert not torch.equal(value, before[key]), key
        tail = key.split(".")[-1]
        assert any(k.endswith(tail) and torch.equal(value, v) for k, v in state.items() if v.shape == value.shape), key


def copied(module: nn.Module) -> State:
    return {key: value.clone() for key, value in module.state_dict().items()}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def unlike(module: nn.Module, seed: int = 1) -> State:
    """A state of the same names and shapes with other values."""
    torch.manual_seed(seed)
    return {key: torch.rand_like(v) if v.is_floating_point() else v + 7 for key, v in module.state_dict().items()}


def assert_holds(encoder: nn.Module, state: State) -> None:
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("name", UNIVERSAL)
def test_timms_own_files(tmp_path: Path, name: str) -> None:
    encoder, state = universal(name), donor(name)
    before = copied(encoder)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    load_encoder(encoder, name, path)
    assert_all_came(encoder, before, state)


@pytest.mark.parametrize("name", ["tu-resnet50s", "tu-resnet18", "tu-test_resnet"])
def test_timms_own_files_for_the_papers_network(tmp_path: Path, name: str) -> None:
    encoder, state = deeplab(name), donor(name)
    before = copied(encoder)
    load_encoder(encoder, name, saved(tmp_path, state))
    assert_all_came(encoder, before, state)
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())


def test_each_tensor_lands_where_timm_puts_it(tmp_path: Path) -> None:
    encoder, state = universal("tu-test_convnext"), donor("tu-test_convnext")
    load_encoder(encoder, "tu-test_convnext", saved(tmp_path, state))
    own = encoder.state_dict()
    assert torch.equal(own["model.stem_0.weight"], state["stem.0.weight"])
    assert torch.equal(own["model.stages_2.blocks.0.norm.weight"], state["stages.2.blocks.0.norm.weight"])


@pytest.mark.parametrize("make", [universal, deeplab])
def test_the_encoders_own_state(tmp_path: Path, make: Callable[[str], nn.Module]) -> None:
    encoder = make("tu-test_resnet")
    state = {key: value + 1 for key, value in encoder.state_dict().items()}
    load_encoder(encoder, "tu-test_resnet", saved(tmp_path, state))
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())


def test_smps_own_encoders_leave_out_the_classifier_too(tmp_path: Path) -> None:
    encoder = universal("mit_b0")  # no model of timm's
    state = {key: value + 1 for key, value in encoder.state_dict().items()}
    load_encoder(
        encoder, "mit_b0", saved(tmp_path, {**state, "head.weight": torch.ones(1), "head.bias": torch.ones(1)})
    )
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("wrap", ["state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", [TINY, "resnet18"])
def test_wrapped_files(tmp_path: Path, wrap: str, prefix: str, name: str) -> None:
    encoder, state = universal(name), donor(name)
    before = copied(encoder)
    wrapped = {"epoch": 3, wrap: {prefix + key: value for key, value in state.items()}}
    load_encoder(encoder, name, saved(tmp_path, wrapped))
    assert_all_came(encoder, before, state)


def test_a_classifier_for_other_classes_is_left_out(tmp_path: Path) -> None:
    load_encoder(universal(TINY), TINY, saved(tmp_path, donor(TINY, classes=7)))


@pytest.mark.parametrize("name", [TINY, "resnet18"])
def test_old_files_without_counters(tmp_path: Path, name: str) -> None:
    encoder = universal(name)
    counters = {
        key: value.fill_(5) for key, value in encoder.state_dict().items() if key.endswith("num_batches_tracked")
    }
    assert counters
    state = {key: value for key, value in donor(name).items() if not key.endswith("num_batches_tracked")}
    load_encoder(encoder, name, saved(tmp_path, state))
    assert all(encoder.state_dict()[key] == 5 for key in counters)


def changed(state: State, **changes: Tensor | None) -> State:
    merged = {**state, **{key.replace("__", "."): value for key, value in changes.items()}}
    return {key: value for key, value in merged.items() if value is not None}


RESNET = "resnet18"
OLD = {"_use_new_zipfile_serialization": False}  # as before torch 1.6


@pytest.fixture
def encoder() -> nn.Module:
    return universal(RESNET)


@pytest.fixture(scope="module")
def resnet() -> State:
    """Of torchvision's whole model, whose names are those of timm and smp."""
    return unlike(torchvision.models.resnet18(weights=None))


def backbone(state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def head_of(width: int = 512) -> State:
    return {"mlp.0.weight": torch.rand(8, width), "mlp.0.bias": torch.rand(8), "last_layer.weight": torch.rand(4, 8)}


def momentum(state: State) -> dict[str, Any]:
    """An optimizer's state: tensors in the shapes of the network's."""
    values = [value for value in state.values() if value.is_floating_point()]
    return {
        "state": {i: {"momentum_buffer": torch.zeros_like(v)} for i, v in enumerate(values)},
        "param_groups": [{"lr": 0.1, "params": [*range(len(values))]}],
    }


# Files as people have them: what holds the encoder -> what is said of it.
FILES: dict[str, tuple[Callable[[State, State], Any], str]] = {
    "torchvision": (lambda own, _: own, "; 2 tensors not used: fc.* (2)"),
    "the encoder alone": (lambda own, _: backbone(own), "w.pth; no tensor left over"),
    "lightning": (
        lambda own, _: {
            "epoch": 3,
            "pytorch-lightning_version": "2.4.0",
            "hyper_parameters": {"lr": 0.1, "name": "resnet18", "weights": None},
            "state_dict": {**prefixed("model.encoder.", own), "criterion.weight": torch.ones(7)},
            "optimizer_states": [momentum(own)],
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        },
        " under state_dict.model.encoder.; 4 tensors not used: state_dict.model.encoder.fc.* (2), state_dict.criterion.*, callbacks.*",
    ),
    "mmsegmentation": (
        lambda own, _: {
            "meta": {"CLASSES": ["road"]},
            "state_dict": {**prefixed("backbone.", backbone(own)), **prefixed("decode_head.", head_of())},
            "optimizer": momentum(own),
        },
        " under state_dict.backbone.; 105 tensors not used: state_dict.decode_head.* (3), optimizer.* (102)",
    ),
    "MoCo v1 and v2": (
        lambda own, other: {
            "arch": "resnet18",
            "state_dict": {
                **prefixed("module.encoder_k.", other),
                **prefixed("module.encoder_q.", own),
                "module.queue": torch.rand(8, 16),
            },
        },
        " under state_dict.module.encoder_q. (state_dict.module.encoder_k. would fit, too); 125 tensors not used: "
        "state_dict.module.encoder_k.* (122), state_dict.module.encoder_q.fc.* (2), state_dict.module.queue",
    ),
    "MoCo v3": (
        lambda own, other: {
            "state_dict": {
                **prefixed("module.momentum_encoder.", {**backbone(other), **head_of()}),
                **prefixed("module.base_encoder.", {**backbone(own), **head_of()}),
            }
        },
        " under state_dict.module.base_encoder. (state_dict.module.momentum_encoder. would fit, too)",
    ),
    "DINO": (
        lambda own, other: {
            "student": {**prefixed("module.backbone.", backbone(other)), **prefixed("module.head.", head_of())},
            "teacher": {**prefixed("backbone.", backbone(own)), **prefixed("head.", head_of())},
            "optimizer": momentum(own),
            "fp16_scaler": None,
            "dino_loss": {"center": torch.zeros(1, 8)},
        },
        " under teacher.backbone. (student.module.backbone. would fit, too); ",
    ),
    "BYOL": (
        lambda own, other: {
            "state_dict": {**prefixed("target_net.0.", backbone(other)), **prefixed("online_net.0.", backbone(own))}
        },
        " under state_dict.online_net.0. (state_dict.target_net.0. would fit, too); ",
    ),
    "SwAV": (
        lambda own, _: prefixed("module.", {**backbone(own), **prefixed("projection_head.", head_of())}),
        " under module.; 3 tensors not used: module.projection_head.* (3)",
    ),
    "a training of timm's": (
        lambda own, other: {"arch": "resnet18", "state_dict": other, "state_dict_ema": own, "optimizer": momentum(own)},
        " under state_dict_ema. (state_dict. would fit, too); ",
    ),
    "two encoders of no known order": (
        lambda own, other: {**prefixed("right.", other), **prefixed("left.", own)},
        " under left. (right. would fit, too); ",
    ),
    "one encoder in another": (
        lambda own, other: {**prefixed("module.encoder.", other), **prefixed("encoder.", own)},
        " under encoder. (module.encoder. would fit, too); ",
    ),
    "an encoder beside prefixed ones": (
        lambda own, other: {**prefixed("a.", other), **own, **prefixed("b.c.", other)},
        "tensors of w.pth (a., b.c. would fit, too); ",
    ),
    "half precision": (
        lambda own, _: {k: v.half() if v.is_floating_point() else v for k, v in own.items()},
        "w.pth; 2 ",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_as_people_have_them(tmp_path: Path, encoder: nn.Module, resnet: State, kind: str) -> None:
    make, said = FILES[kind]
    other = {key: value + 1 for key, value in resnet.items()}
    text = load_encoder(encoder, RESNET, saved(tmp_path, make(resnet, other), "w.pth"))
    exact = {key: value.half().float() if value.is_floating_point() else value for key, value in resnet.items()}
    assert_holds(encoder, exact if kind == "half precision" else resnet)
    assert said in text
    assert text.startswith("resnet18 filled by 120 tensors of w.pth")


@pytest.mark.parametrize("architecture", ["unet", "deeplabv3plus", "upernet"])
@pytest.mark.parametrize("name", [RESNET, TINY, "timm-efficientnet-b0"])
def test_whole_models_of_smp(tmp_path: Path, architecture: str, name: str) -> None:
    model = smp.create_model(architecture, name, encoder_weights=None, classes=3)
    model.load_state_dict(unlike(model))
    model.save_pretrained(tmp_path / "smp")
    target = smp.encoders.get_encoder(name, weights=None)
    text = load_encoder(target, name, tmp_path / "smp")
    assert_holds(target, model.encoder.state_dict())
    assert " of smp under encoder" in text
    assert "decoder.*" in text
    assert "segmentation_head.* (2)" in text


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_checkpoint_of_our_own_gives_network_a(tiny: TrainConfig, tmp_path: Path, decay: float | None) -> None:
    state = build_state(changed_config(tiny, **({} if decay is None else {"ema__decay": decay})), 7, Ranks())
    for each in (*state.networks.values(), *state.averages.values()):
        each.load_state_dict({key: torch.rand_like(v.float()).to(v.dtype) for key, v in each.state_dict().items()})
    target = smp.create_model("deeplabv3plus", TINY, encoder_weights=None, decoder_channels=16).encoder
    text = load_encoder(target, TINY, saved(tmp_path, state.snapshot()))
    assert_holds(target, state.evaluated["a"].network.encoder.state_dict())  # type: ignore[union-attr, operator]
    assert f" under networks.a.{'network' if decay is None else 'average'}.network.encoder.model. (" in text


@pytest.mark.parametrize("name", [RESNET, TINY, "tu-test_convnext", "tu-legacy_xception", "tu-cspnext_tiny", "mit_b0"])
def test_no_prefix_and_no_further_tensor_changes_what_is_taken(tmp_path: Path, name: str) -> None:
    draw = random.Random(name)
    target = universal(name)
    states = [unlike(target, seed=2)] if name == "mit_b0" else [unlike(target, seed=2), donor(name)]
    words = ["module", "model", "encoder", "net", "backbone", "0", "x_y", "state_dict", "layer1", "conv1", "blocks"]
    for state in states * 2:
        load_encoder(target, name, saved(tmp_path, state))
        expected = copied(target)
        prefix = "".join(f"{draw.choice(words)}." for _ in range(draw.randrange(4)))
        moved = prefixed(prefix, state)
        for _ in range(40):  # copies of the encoder's tensors, under names that nearly fit
            key, value = draw.choice([*state.items()])
            moved[f"further.{draw.choice(words)}.{draw.choice(words)}.{key}"] = value * 0
            moved[f"z{draw.randrange(9)}.{key.split('.', 1)[-1]}"] = value * 0
        items = [*moved.items()]
        draw.shuffle(items)
        target.load_state_dict({key: torch.zeros_like(value) for key, value in expected.items()})
        load_encoder(target, name, saved(tmp_path, dict(items)))
        assert_holds(target, expected)


def test_an_encoder_of_few_maps_takes_the_whole_models_file(tmp_path: Path) -> None:
    name = "tu-cspnext_tiny"
    cut, state = smp.encoders.get_encoder(name, weights=None, depth=3), donor(name)
    text = load_encoder(cut, name, saved(tmp_path, state))
    assert "not used: stages.* (" in text
    assert torch.equal(cut.state_dict()["model.model.stem.0.conv.weight"], state["stem.0.conv.weight"])
    before = copied(cut)
    for further in ("stages.0.9.x", "stages.2.0.conv.weight"):  # unknown to timm, and of another shape
        with pytest.raises(CheckpointError, match=rf"; {further} would be left over: the file is of another encoder"):
            load_encoder(cut, name, saved(tmp_path, {**state, further: torch.ones(1)}))
    assert_holds(cut, before)


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"conv_stem__weight": None}, "67 of 68 tensors fit; conv_stem.weight is lacking. "),
        ({"conv_stem__weight": None, "bn1__weight": None}, "66 of 68 tensors fit; conv_stem.weight is lacking. "),
        ({"bn1__running_mean": None}, "67 of 68 tensors fit; bn1.running_mean is lacking. "),
        (
            {"conv_stem__weight": torch.ones(24, 1, 3, 3)},
            "conv_stem.weight has shape (24, 1, 3, 3) instead of (24, 3, 3, 3). ",
        ),
        ({"bn1__num_batches_tracked": torch.ones(2)}, "bn1.num_batches_tracked has shape (2,) instead of (). "),
        (
            {"bn1__weight": torch.ones(24).int()},
            "bn1.weight is of torch.int32, torch.strided instead of torch.float32, ",
        ),
        ({"bn1__weight": torch.ones(24).to_sparse()}, "bn1.weight is of torch.float32, torch.sparse_coo instead of "),
        ({"bn1__weight": 3}, "67 of 68 tensors fit; bn1.weight is lacking. "),
        ({"blocks__9__0__x": torch.ones(1)}, "68 of 68 tensors fit; blocks.9.0.x would be left over: "),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
def test_whatever_does_not_fit_is_named(
    tmp_path: Path, changes: dict[str, Tensor | None], detail: str, prefix: str
) -> None:
    path = saved(tmp_path, prefixed(prefix, changed(donor(TINY), **changes)))
    encoder = universal(TINY)
    before = copied(encoder)
    with pytest.raises(CheckpointError) as caught:
        load_encoder(encoder, TINY, path)
    message = str(caught.value)
    under = f"under {prefix} " if prefix else ""
    assert message.startswith(f"{path}: every tensor of the encoder {TINY} must be in it, but {under}")
    assert detail in message
    assert message.endswith("Choose the encoder this file was made for.")
    assert "\n" not in message
    assert_holds(encoder, before)


def test_what_is_there_twice_is_named(tmp_path: Path, resnet: State) -> None:
    state = donor("tu-test_convnext")
    path = saved(tmp_path, {**state, "stem_0.weight": state["stem.0.weight"]})
    with pytest.raises(
        CheckpointError, match=r"stem_0\.weight is there more than once \(stem\.0\.weight, stem_0\.weight\)"
    ):
        load_encoder(universal("tu-test_convnext"), "tu-test_convnext", path)
    path = saved(tmp_path, {"encoder": resnet, "encoder.conv1.weight": resnet["conv1.weight"]})
    with pytest.raises(
        CheckpointError, match=r"conv1\.weight is there more than once \(encoder\.conv1\.weight, encoder"
    ):
        load_encoder(universal(RESNET), RESNET, path)


def test_a_copy_that_does_not_fit_leaves_the_choice_to_the_other(
    tmp_path: Path, encoder: nn.Module, resnet: State
) -> None:
    larger = unlike(torchvision.models.resnet34(weights=None))
    text = load_encoder(encoder, RESNET, saved(tmp_path, {"teacher": larger, "student": resnet}))
    assert_holds(encoder, resnet)
    assert " under student.; " in text


@pytest.mark.parametrize(
    ("name", "other", "make"),
    [
        (TINY, "test_resnet", universal),
        ("tu-resnet18", "resnet34", universal),
        ("tu-resnet34", "resnet18", universal),
        ("tu-test_resnet", "test_efficientnet", deeplab),
        ("tu-resnet50s", "resnet50", deeplab),  # the plain stem
        ("tu-resnet50s", "resnet50c", deeplab),  # the same keys, a 32-32-64 stem
        ("tu-resnet26", "resnet50", deeplab),
        ("resnet18", "resnet34", universal),
        ("resnet34", "resnet18", universal),
        ("resnet18", "test_resnet", universal),
        ("resnet50", "wide_resnet50_2", universal),
    ],
)
def test_files_of_other_models_are_refused(
    tmp_path: Path, name: str, other: str, make: Callable[[str], nn.Module]
) -> None:
    with pytest.raises(CheckpointError, match=rf"weights\.pt: every tensor of the encoder {name} must be in it, but "):
        load_encoder(make(name), name, saved(tmp_path, donor(other)))


def test_a_larger_encoder_is_one_that_would_have_blocks_left_over(tmp_path: Path, encoder: nn.Module) -> None:
    path = saved(tmp_path, prefixed("module.", unlike(torchvision.models.resnet34(weights=None))))
    with pytest.raises(CheckpointError) as caught:
        load_encoder(encoder, RESNET, path)
    assert "but under module. 100 of 100 tensors fit; layer1.2.conv1.weight, layer1.2.bn1.weight, " in str(caught.value)
    assert " would be left over: the file is of another encoder. Choose" in str(caught.value)


@pytest.mark.parametrize("name", [TINY, "resnet18"])
@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (torch.ones(3), "it holds no tensors with names"),
        ({}, "it holds no tensors with names"),
        ([torch.ones(3)], "it holds no tensors with names"),
        ({"state_dict": {}}, "it holds no tensors with names"),
        ({"epoch": 3}, "it holds no tensors with names"),
        ({"epoch": torch.ones(1), "a\nb": torch.ones(1)}, "its 2 tensors have other names (epoch, a\\nb)"),
    ],
)
def test_files_without_weights_are_refused(tmp_path: Path, name: str, content: object, detail: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_encoder(universal(name), name, saved(tmp_path, content))
    assert f"weights.pt: every tensor of the encoder {name} must be in it, but {detail}. Choose" in str(caught.value)


def pickled_kinds(model: nn.Module) -> dict[str, Any]:
    shared = {**model.state_dict(), "fc.twice": model.state_dict()["conv1.weight"]}
    shared["conv1.weight"] = shared["conv1.weight"].to(memory_format=torch.channels_last)
    return {
        "argparse": {"state_dict": prefixed("module.", shared), "args": argparse.Namespace(lr=0.1)},
        "numpy": {"model": shared, "best": np.float64(0.5), "optimizer": momentum(shared), "type": torch.optim.SGD},
        "a model": model,
        "a model in a dictionary": {"epoch": 1, "ema": model, "hyper_parameters": {"root": Path("data")}},
    }


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("argparse", {}),
        ("argparse", OLD),
        ("numpy", {"pickle_protocol": 4}),
        ("a model", {}),
        ("a model in a dictionary", {}),
    ],
)
def test_the_remedy_for_pickled_objects_works(
    tmp_path: Path, encoder: nn.Module, kind: str, form: dict[str, Any]
) -> None:
    model = torchvision.models.resnet18(weights=None)
    model.load_state_dict(unlike(model))
    path = tmp_path / "it's a file.pth"
    torch.save(pickled_kinds(model)[kind], path, **form)
    with pytest.raises(CheckpointError) as caught:
        load_encoder(encoder, RESNET, path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: holds ")
    assert " If you trust the file, save its tensors alone" in message
    command = message[message.index("python -c ") :].replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, check=True)
    load_encoder(encoder, RESNET, tmp_path / "it's a file-tensors.pt")
    assert_holds(encoder, model.state_dict())


def test_a_suffix_decides_nothing(tmp_path: Path, encoder: nn.Module, resnet: State) -> None:
    save_file(resnet, tmp_path / "model.pth")
    load_encoder(encoder, RESNET, tmp_path / "model.pth")
    assert_holds(encoder, resnet)
    torch.save(resnet, tmp_path / "model.safetensors", _use_new_zipfile_serialization=False)
    encoder = universal(RESNET)
    load_encoder(encoder, RESNET, tmp_path)
    assert_holds(encoder, resnet)


def whole(**form: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"conv1.weight": torch.rand(300, 30)}, file, **form)
    return file.getvalue()


def safetensors(shape: list[int], end: int, length: int | None = None) -> bytes:
    header = json.dumps({"conv1.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(16)


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("weights/model.pth", whole())
    return file.getvalue()


CUT = "it is cut short or damaged ("
NEITHER = "it is neither a file of safetensors nor one of torch.save."
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty."),
    "text": (b"no weights", NEITHER),
    "an array": (b"\x93NUMPY\x01\x00v\x00{'descr'", NEITHER),
    "a web page": (b"\n<!DOCTYPE html><html>", "it is a web page; download the file that the page is about."),
    "LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 46830571\n",
        "it only points to a file in Git LFS, which `git lfs pull` fetches.",
    ),
    "an archive": (archive(), "it is an archive of other files; unpack it."),
    **{f"torch, {cut} bytes": (whole()[:cut], CUT) for cut in (4, 100, 5000)},
    **{f"old torch, {cut} bytes": (whole(**OLD)[:cut], CUT) for cut in (20, 60, 200, 5000)},
    "safetensors, cut": (safetensors([1000], 4000), CUT),
    "safetensors, cut in the header": (safetensors([4], 16)[:40], CUT),
    "safetensors of exabytes": (safetensors([2**58], 2**60), CUT),
    "safetensors of exabytes that end early": (safetensors([2**58], 16), CUT),
    "safetensors with a header of exabytes": (safetensors([4], 16, 2**62), CUT),
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_damaged_files(tmp_path: Path, encoder: nn.Module, kind: str, name: str) -> None:
    content, said = DAMAGED[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_encoder(encoder, RESNET, tmp_path / name)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: cannot be read as weights: {said}")
    assert "\n" not in message
    assert message.endswith(said if said != CUT else "; copy or download it again.")


def test_missing_files(tmp_path: Path, encoder: nn.Module) -> None:
    for path, missing in ((tmp_path / "w.pt", tmp_path / "w.pt"), (tmp_path, tmp_path / "model.safetensors")):
        with pytest.raises(CheckpointError) as caught:
            load_encoder(encoder, RESNET, path)
        assert str(caught.value).startswith(f"{missing}: model.weights_file does not exist. ")
