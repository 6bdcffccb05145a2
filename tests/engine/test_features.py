"""What is done to features between encoder and decoder."""

import pytest
import torch
from support import changed

from cps_ray.config.train import NetworkConfig, TrainConfig
from cps_ray.engine.features import beside, complementary_dropout, dropout, forward_perturbed
from cps_ray.engine.networks import Segmenter, build_network
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state
from cps_ray.errors import ConfigError

FORMS = {
    **{name: {"encoder": "tu-test_efficientnet"} for name in ("unet", "fpn", "pspnet", "segformer", "deeplabv3plus")},
    "deeplabv3plus-cps": {"encoder": "tu-resnet14t"},
}


@pytest.mark.parametrize("architecture", FORMS)
def test_the_decoder_sees_perturbed_features(architecture: str) -> None:
    network = build_network(NetworkConfig(architecture=architecture, **FORMS[architecture]), 3, seed=0).eval()
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        plain, doubled = network(image), network(image, perturb=beside(torch.zeros_like))
        assert torch.equal(plain, network(image, perturb=lambda features: features))
    assert doubled.shape == (4, *plain.shape[1:])
    assert torch.allclose(doubled[:2], plain, atol=1e-5)
    assert torch.allclose(doubled[2], doubled[3], atol=1e-6), "nothing of the image is left"
    assert not torch.allclose(doubled[:2], doubled[2:], atol=1e-4)


def test_tokens_are_perturbed_like_maps() -> None:
    """A vision transformer's encoder returns maps, and tokens with the channels last, or None."""

    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            maps, tokens = self.encoder(x)
            assert tokens[1] is None
            return maps[0].flatten(1).sum(1) + 1000 * tokens[0].flatten(1).sum(1)

    class Encoder(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
            return [x, x], [x.flatten(2).transpose(1, 2), None]

    def first_channel(features: torch.Tensor) -> torch.Tensor:
        return features[:, :1]

    x = torch.randn(2, 3, 4, 5)
    expected = 1001 * x[:, 0].flatten(1).sum(1)
    assert torch.allclose(forward_perturbed(Tokens(), x, first_channel), expected, rtol=1e-4)


def test_a_network_without_an_encoder_is_refused() -> None:
    network = Segmenter(torch.nn.Conv2d(3, 2, 1), [0.5] * 3, [0.5] * 3)
    with pytest.raises(ConfigError, match=r"model\.architecture: perturbed features need .* but Conv2d has none"):
        network(torch.zeros(1, 3, 32, 32), perturb=dropout(0.5))


def test_compiled_code_does_not_hide_the_perturbation(tiny: TrainConfig) -> None:
    network = build_state(changed(tiny), 3, Ranks()).networks["a"].eval()
    network.network.compile(backend="eager")
    image = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    with torch.no_grad():
        plain = network(image)
        assert not torch.allclose(network(image, perturb=torch.zeros_like), plain, atol=1e-4)
        assert torch.allclose(network(image), plain)


def test_dropout_takes_whole_channels_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = dropout(0.25)(torch.ones(50, 80, 3, 4))
    of_channel = dropped[:, :, :1, :1]
    assert torch.equal(dropped, of_channel.expand_as(dropped))
    assert {round(value, 4) for value in of_channel.unique().tolist()} == {0.0, round(4 / 3, 4)}
    assert float((of_channel == 0).double().mean()) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(("probability", "kept"), [(0.5, 3), (0.9, 0), (0.0, 7)])
def test_two_views_share_out_the_channels(probability: float, kept: int) -> None:
    torch.manual_seed(0)
    perturb = complementary_dropout(probability)
    fine, coarse, other = (perturb(torch.ones(14, *shape)) for shape in ((64, 5, 5), (64, 2, 2), (32, 2, 2)))
    first, second = fine[:, :, 0, 0].chunk(2)
    assert torch.equal(first + second, torch.full((7, 64), 2.0))
    whole = (first == 1.0).all(dim=1)
    assert int(whole.sum()) == kept
    assert set(first[~whole].unique().tolist()) <= {0.0, 2.0}
    assert torch.equal(fine[:, :, 0, 0], coarse[:, :, 0, 0]), "maps of as many channels have one mask"
    assert torch.equal((other[:7, :, 0, 0] == 1.0).all(dim=1), whole), "the same images keep theirs in all maps"
    if kept < 6:
        assert not torch.equal(first[~whole][0], first[~whole][1])
        assert 0.4 < float((first[~whole] == 0.0).double().mean()) < 0.6
