import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from support import changed

from cps_ray.config.space import apply
from cps_ray.config.train import NetworkConfig, TrainConfig
from cps_ray.engine.names import check_names
from cps_ray.engine.networks import build_network, build_networks
from cps_ray.engine.normalisation import normalisation, padding_color
from cps_ray.engine.state import load_networks
from cps_ray.errors import CheckpointError, ConfigError

TINY = NetworkConfig(encoder="tu-test_efficientnet", options={"decoder_channels": 16})


def first_weight(network: torch.nn.Module) -> torch.Tensor:
    return next(network.parameters())


def test_the_networks_differ_and_the_seed_fixes_each(tiny: TrainConfig) -> None:
    three = changed(tiny, model__networks=3)
    first, again, other = build_networks(three, 3), build_networks(three, 3), build_networks(changed(three, seed=1), 3)
    assert [*first] == ["a", "b", "c"]
    weights = [first_weight(network) for networks in (first, other) for network in networks.values()]
    assert not any(torch.equal(p, q) for i, p in enumerate(weights) for q in weights[:i])
    assert all(torch.equal(first_weight(first[name]), first_weight(again[name])) for name in first)


@pytest.mark.parametrize("method", ["supervised", "mean_teacher", "fixmatch", "unimatch"])
def test_other_methods_have_one_network_the_same_as_a(tiny: TrainConfig, method: str) -> None:
    alone = build_networks(changed(tiny, method=method, ema__decay=0.9), 3)
    assert [*alone] == ["a"]
    both = build_networks(tiny, 3)
    assert all(torch.equal(p, q) for p, q in zip(alone["a"].parameters(), both["a"].parameters(), strict=True))


def test_the_networks_may_have_different_architectures_in_turn(tiny: TrainConfig) -> None:
    mixed = changed(tiny, model__b={"architecture": "fpn", "encoder": "tu-test_resnet"}, model__networks=3)
    networks = build_networks(mixed, 3)
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert {network.eval().logits(image).shape for network in networks.values()} == {(1, 3, 32, 32)}
    kinds = [type(network.network).__name__ for network in networks.values()]
    assert kinds == ["DeepLabV3Plus", "FPN", "DeepLabV3Plus"]


def test_shared_backbones_start_as_copies_and_heads_do_not(tiny: TrainConfig) -> None:
    networks = build_networks(changed(tiny, model__backbone_init="shared", model__networks=3), 3)
    for name in "bc":
        a, other = networks["a"].network, networks[name].network
        for p, q in zip(a.encoder.state_dict().values(), other.encoder.state_dict().values(), strict=True):
            assert torch.equal(p, q)
            assert p.data_ptr() != q.data_ptr()
        assert not torch.equal(a.segmentation_head[0].weight, other.segmentation_head[0].weight)
        assert not torch.equal(first_weight(a.decoder), first_weight(other.decoder))


@pytest.mark.parametrize("architecture", ["unet", "fpn", "pspnet", "deeplabv3", "deeplabv3plus", "segformer"])
def test_logits_are_those_of_smp_itself(architecture: str) -> None:
    """The upsampling that is taken out of a network and done by us changes nothing."""
    import segmentation_models_pytorch as smp

    config = NetworkConfig(architecture=architecture, encoder="resnet18")
    network = build_network(config, 3, seed=0).eval()
    theirs = smp.create_model(architecture, "resnet18", encoder_weights=None, classes=3).eval()
    theirs.load_state_dict(network.network.state_dict())
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(network.logits(image), theirs((image - network.mean) / network.std), rtol=1e-4, atol=1e-5)


def test_any_size_goes_in_and_comes_out() -> None:
    network = build_network(TINY, 3, seed=0).eval()
    image = torch.randint(0, 256, (1, 3, 45, 50), dtype=torch.uint8)
    assert network.logits(image).shape == (1, 3, 45, 50)


def test_bytes_are_normalised_as_the_weights_expect() -> None:
    network = build_network(TINY, 2, seed=0)
    seen: list[torch.Tensor] = []
    network.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network.eval()(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))
    expected = [(1 - mean) / std for mean, std in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    assert seen[0][0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_encoder_weights_from_a_file(tmp_path: Path, suffix: str) -> None:
    donor = build_network(TINY, 2, seed=5).network.encoder
    path = tmp_path / f"encoder{suffix}"
    state = donor.state_dict()
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    loaded = build_network(TINY.model_copy(update={"weights_file": path}), 2, seed=0).network.encoder
    assert all(torch.equal(a, b) for a, b in zip(donor.parameters(), loaded.parameters(), strict=True))


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "encoder.pt"
    other = NetworkConfig(encoder="tu-test_resnet", options={"decoder_channels": 16})
    torch.save(build_network(other, 2, seed=0).network.encoder.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"encoder\.pt: every tensor of the encoder tu-test_efficientnet"):
        build_network(TINY.model_copy(update={"weights_file": path}), 2, seed=0)


def test_a_weight_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "encoder.pt"
    torch.save({"conv": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(CheckpointError, match=r"holds Python objects \(torch\.nn\.modules\.linear\.Linear\)"):
        build_network(TINY.model_copy(update={"weights_file": path}), 2, seed=0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"encoder": "resnet5O"},
            "model.encoder: segmentation-models-pytorch knows no 'resnet5O'. Did you mean resnet50?",
        ),
        ({"encoder": "tu-test_resnett"}, "Did you mean tu-test_resnet?"),
        ({"architecture": "deeplabv3plas"}, "Did you mean deeplabv3plus?"),
        ({"encoder": "resnet50", "weights": "imagenett"}, "Did you mean imagenet?"),
    ],
)
def test_unknown_names_get_a_near_one(changes: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_names(TINY.model_copy(update=changes))
    assert sentence in str(caught.value)


def test_a_state_carries_its_normalisation() -> None:
    network = build_network(TINY, 2, seed=0)
    network.mean.fill_(127.5)
    other = build_network(TINY, 2, seed=1)
    other.load_state_dict(network.state_dict())
    assert other.mean.flatten().tolist() == [127.5] * 3


LITE = NetworkConfig(architecture="unet", encoder="tu-tf_efficientnet_lite0")  # timm: mean and std 0.5


@pytest.fixture(scope="module")
def lite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the whole timm model, as its files are."""
    path = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), path)
    return path


def normalised(network: torch.nn.Module, value: int) -> list[float]:
    """What a network sees of pixels of this value, per channel."""
    seen: list[torch.Tensor] = []
    network.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        network.eval()(torch.full((1, 3, 32, 32), value, dtype=torch.uint8))
    return [round(x, 5) for x in seen[0][0, :, 0, 0].tolist()]


def test_a_weights_file_of_timm_is_normalised_as_timm_does(lite_file: Path) -> None:
    network = build_network(LITE.model_copy(update={"weights_file": lite_file}), 2, seed=0)
    assert normalised(network, 255) == [1.0, 1.0, 1.0]
    assert normalised(network, 0) == [-1.0, -1.0, -1.0]


def test_mean_and_std_of_the_settings_come_first(lite_file: Path) -> None:
    update = {"weights_file": lite_file, "mean": (0.0, 0.2, 0.4), "std": (1.0, 0.8, 0.6)}
    assert normalised(build_network(LITE.model_copy(update=update), 2, seed=0), 255) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "mean", "source"),
    [
        ({}, 0.485, "ImageNet's, for an encoder without weights"),
        ({"weights_file": Path("x/lite0.pt")}, 0.5, "timm's of tf_efficientnet_lite0.in1k, the encoder of lite0.pt"),
        ({"weights": "imagenet"}, 0.5, "timm's of tf_efficientnet_lite0.in1k"),
        (
            {"encoder": "resnet18", "weights_file": Path("x/r.pt")},
            0.485,
            "ImageNet's: r.pt does not say; model.mean and",
        ),
        ({"encoder": "tu-resnet50.a1_in1k", "weights": "imagenet"}, 0.485, "timm's of resnet50.a1_in1k"),
        (
            {"architecture": "deeplabv3plus-cps", "encoder": "tu-resnet50", "weights": "fb_swsl_ig1b_ft_in1k"},
            *(0.485, "timm's of resnet50.fb_swsl_ig1b_ft_in1k"),
        ),
        ({"mean": (0.1, 0.2, 0.3), "std": (0.1, 0.1, 0.1)}, 0.1, "model.mean and model.std"),
    ],
)
def test_where_mean_and_std_come_from(changes: dict[str, Any], mean: float, source: str) -> None:
    found = normalisation(LITE.model_copy(update=changes))
    assert found.mean[0] == mean
    assert found.source.startswith(source)
    assert str(found).startswith(f"mean {mean:g} ")


def test_padding_has_the_mean_colour_of_network_a(tiny: TrainConfig) -> None:
    assert padding_color(tiny.model) == (124, 116, 104)
    mean_std = {"model.mean": [0.5, 0.4, 0.0], "model.std": [0.5, 0.5, 0.5]}
    assert padding_color(apply(tiny, mean_std, "").model) == (128, 102, 0)


def test_loaded_networks_are_normalised_as_they_were_trained(tiny: TrainConfig) -> None:
    config = changed(tiny, model__mean=[0.5, 0.5, 0.5], model__std=[0.5, 0.5, 0.5])
    saved = {
        name: {"network": network.state_dict(), "average": None} for name, network in build_networks(config, 3).items()
    }
    # The snapshot's, whatever the config says.
    for network in load_networks(tiny, {"networks": saved}, 3, "test").values():
        assert normalised(network, 255) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"mean": [0.5, 0.5, 0.5]}, "`model.mean` needs `model.std`, too"),
        ({"std": [0.5, 0.5, 0.5]}, "`model.std` needs `model.mean`, too"),
        ({"mean": [123.7, 116.3, 103.5], "std": [0.5, 0.5, 0.5]}, "must be at most 1"),
        ({"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.0, 0.5]}, "must be greater than 0"),
        ({"mean": [0.5, 0.5, 0.5], "std": [58.4, 57.1, 57.4]}, "must be at most 1"),
    ],
)
def test_half_a_normalisation_is_refused(tiny: TrainConfig, model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        changed(tiny, model=model)


def test_an_option_that_nobody_takes_is_named_without_foreign_functions() -> None:
    config = NetworkConfig(encoder="tu-test_efficientnet", options={"foo": 3})
    with pytest.raises(ConfigError, match=r"cannot be built: neither takes an option 'foo'\.$"):
        build_network(config, 3, seed=0)
