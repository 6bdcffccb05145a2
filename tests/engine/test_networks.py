from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import changed

from cps_ray.config.train import NetworkConfig, TrainConfig
from cps_ray.engine.networks import Pair, build_network, build_pair, check_names
from cps_ray.errors import CheckpointError, ConfigError

TINY = NetworkConfig(encoder="tu-test_efficientnet", options={"decoder_channels": 16})


def test_the_two_networks_differ_and_the_seed_fixes_both(tiny: TrainConfig) -> None:
    first, again, other = build_pair(tiny, 3), build_pair(tiny, 3), build_pair(changed(tiny, seed=1), 3)
    assert first.b is not None
    weight = lambda network: next(network.parameters())  # noqa: E731
    assert not torch.equal(weight(first.a), weight(first.b))
    assert torch.equal(weight(first.a), weight(again.a))
    assert not torch.equal(weight(first.a), weight(other.a))
    assert not torch.equal(weight(first.b), weight(other.a))


def test_supervised_has_one_network_the_same_as_a(tiny: TrainConfig) -> None:
    alone = build_pair(changed(tiny, method="supervised"), 3)
    assert alone.b is None
    both = build_pair(tiny, 3)
    assert all(torch.equal(p, q) for p, q in zip(alone.a.parameters(), both.a.parameters(), strict=True))


def test_the_networks_may_have_different_architectures(tiny: TrainConfig) -> None:
    mixed = changed(tiny, model__b={"architecture": "fpn", "encoder": "tu-test_resnet"})
    pair = build_pair(mixed, 3).eval()
    logits_a, logits_b = pair(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert logits_b is not None
    assert logits_a.shape == logits_b.shape == (1, 3, 32, 32)


def test_any_size_goes_in_and_comes_out() -> None:
    network = build_network(TINY, 3, seed=0).eval()
    image = torch.randint(0, 256, (1, 3, 45, 50), dtype=torch.uint8)
    assert network(image).shape == (1, 3, 45, 50)


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
    with pytest.raises(CheckpointError, match=r"encoder\.pt: every key must fit"):
        build_network(TINY.model_copy(update={"weights_file": path}), 2, seed=0)


def test_a_weight_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "encoder.pt"
    torch.save({"conv": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
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


def test_pair_is_one_module(tiny: TrainConfig) -> None:
    pair = build_pair(tiny, 3)
    assert isinstance(pair, Pair)
    assert {name.split(".")[0] for name, _ in pair.named_parameters()} == {"a", "b"}


def test_a_state_carries_its_normalisation() -> None:
    network = build_network(TINY, 2, seed=0)
    network.mean.fill_(127.5)
    other = build_network(TINY, 2, seed=1)
    other.load_state_dict(network.state_dict())
    assert other.mean.flatten().tolist() == [127.5] * 3
