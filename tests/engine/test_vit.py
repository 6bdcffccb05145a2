"""Vision transformers, whose patches need not divide 32, against smp's own parts, and beside a CNN in one training."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import changed

from cps_ray.config.train import NetworkConfig, TrainConfig
from cps_ray.datasets.loader import eval_batches, train_batches, train_data
from cps_ray.datasets.shards import open_shards
from cps_ray.engine.batch import IGNORE
from cps_ray.engine.dense import cross_entropy
from cps_ray.engine.evaluation import evaluate
from cps_ray.engine.inference import predict
from cps_ray.engine.networks import Segmenter, build_network, create_model_options
from cps_ray.engine.preflight import refusal
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state
from cps_ray.engine.step import train_step
from cps_ray.engine.vit import fit_patches
from cps_ray.errors import ConfigError

SMALL = {"decoder_intermediate_channels": [8, 8, 8, 8], "decoder_fusion_channels": 8}
PATCH14 = {"architecture": "dpt", "encoder": "tu-test_vit", "options": {**SMALL, "patch_size": 14, "img_size": 70}}
CNN = {"encoder": "tu-test_efficientnet", "options": {"decoder_channels": 16, "decoder_aspp_dropout": 0.0}}


def vit(**options: int) -> NetworkConfig:
    return NetworkConfig(architecture="dpt", encoder="tu-test_vit", options={**SMALL, **options})


def image(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_logits_of_14_px_patches_are_those_of_smps_parts() -> None:
    """An encoder, decoder and head of smp for 16 px patches, whose last upsampling ends at 14 px a patch instead."""
    from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder, DPTSegmentationHead
    from segmentation_models_pytorch.encoders.timm_vit import TimmViTEncoder

    network = build_network(NetworkConfig(**PATCH14), 5, seed=0).eval()
    assert network.divisor == 28
    encoder = TimmViTEncoder("test_vit", pretrained=False, patch_size=14, img_size=70, dynamic_img_size=True).eval()
    decoder = DPTDecoder(encoder.out_channels, (16,) * 4, encoder.has_prefix_tokens, "cat", (8, 8, 8, 8), 8).eval()
    head = DPTSegmentationHead(8, 5, upsampling=1).eval()
    for name, part in (("encoder", encoder), ("decoder", decoder), ("segmentation_head", head)):
        part.load_state_dict(getattr(network.network, name).state_dict())
    seen = F.pad((image(45, 70) - network.mean) / network.std, (0, 112 - 70, 0, 84 - 45))  # 64 x 96, then 84 x 112
    with torch.no_grad():
        coarse = head(decoder(*encoder(seen)))
        assert coarse.shape == (2, 5, 48, 64)  # half of 16 px a patch
        wanted = F.interpolate(coarse, (84, 112), mode="bilinear", align_corners=True)[..., :45, :70]
        assert torch.allclose(network.logits(image(45, 70)), wanted, rtol=1e-4, atol=1e-5)
        assert network(image(45, 70)).shape == (2, 5, 64, 96)  # as large as `dense` takes full logits to be


def test_a_network_is_built_from_smp_as_model_json_says() -> None:
    import segmentation_models_pytorch as smp

    config = NetworkConfig(**PATCH14)
    network = build_network(config, 5, seed=0).eval()
    again = smp.create_model("dpt", config.encoder, encoder_weights=None, classes=5, **create_model_options(config))
    fit_patches(again)
    again.load_state_dict(network.network.state_dict())
    seen = (image(84, 112) - network.mean) / network.std
    with torch.no_grad():
        assert torch.equal(again.eval()(seen), network.network(seen))


@pytest.mark.parametrize("encoder", ["tu-test_vit", "tu-test_vit4"])
def test_patches_of_16_px_are_left_to_smp(encoder: str) -> None:
    """The same initial weights, the same logits; `dynamic_img_size` draws nothing."""
    import segmentation_models_pytorch as smp

    config = NetworkConfig(architecture="dpt", encoder=encoder, options=SMALL)
    network = build_network(config, 5, seed=7).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        theirs = smp.create_model("dpt", encoder, encoder_weights=None, classes=5, **SMALL).eval()
    ours = network.network.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in theirs.state_dict().items())
    with torch.no_grad():  # 160 px is the only size that smp takes without the switch
        wanted = theirs((image(160, 160) - network.mean) / network.std)
        assert torch.allclose(network.logits(image(160, 160)), wanted, rtol=1e-4, atol=1e-5)
        assert network.logits(image(50, 70)).shape == (2, 5, 50, 70)


@pytest.mark.parametrize(
    ("options", "divisor"),
    [
        ({"patch_size": 16}, 32),
        ({"patch_size": 8}, 32),
        ({"patch_size": 14}, 28),
        ({"patch_size": 14, "encoder_depth": 3, "decoder_intermediate_channels": [8, 8, 8]}, 14),
        ({"patch_size": 16, "encoder_depth": 5, "decoder_intermediate_channels": [8] * 5}, 64),
    ],
)
def test_the_divisor_is_the_least_that_runs(options: dict[str, int], divisor: int) -> None:
    network = build_network(vit(**{"img_size": 112, **options}), 2, seed=0).eval()
    assert network.divisor == divisor
    assert network.logits(image(33, 65)).shape == (2, 2, 33, 65)
    if divisor > 14:  # half of it does not run
        with pytest.raises(RuntimeError):
            network.network(torch.zeros(1, 3, divisor // 2, divisor // 2))


def test_coarse_logits_of_another_divisor_are_upsampled_to_what_the_network_saw() -> None:
    patches = torch.nn.Conv2d(3, 2, 14, stride=14)
    network = Segmenter(patches, (0.5,) * 3, (0.25,) * 3, divisor=14)
    seen = F.pad((image(40, 64) / 255 - 0.5) / 0.25, (0, 6, 0, 30))  # 64 x 64, then 70 x 70
    wanted = F.interpolate(patches(seen), (70, 70), mode="bilinear", align_corners=True)[..., :40, :64]
    assert torch.allclose(network.logits(image(40, 64)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [{"cps__mix": "none"}, {"cps__mix": "cutmix"}, {"method": "fixmatch"}])
def test_a_vision_transformer_trains_beside_a_cnn(tiny: TrainConfig, form: dict[str, str]) -> None:
    config = changed(tiny, model={**PATCH14, "b": CNN}, compute__accumulate=2, evaluation={"flip": True}, **form)
    shards = open_shards(config.data.shards)
    state = build_state(config, 7, Ranks())
    before = {name: [p.clone() for p in network.parameters()] for name, network in state.networks.items()}
    for batch in train_batches(train_data(shards, config), config):
        assert math.isfinite(train_step(config, state, batch)["loss"])
    for name, network in state.networks.items():
        moved = [not torch.equal(p, q) for p, q in zip(network.parameters(), before[name], strict=True)]
        assert all(m for m, p in zip(moved, network.parameters(), strict=True) if p.requires_grad)
    for window in (None, (32, 32)):
        windowed = changed(config, evaluation={"window_px": window, "flip": False})
        counts = evaluate(windowed, state.evaluated, eval_batches(shards, "val"), 7, Ranks())
        assert counts.whole_split.sum() == 6 * 32 * 48
    with torch.inference_mode():
        whole = changed(config, evaluation={"flip": False})
        for network in state.networks.values():
            assert torch.allclose(
                predict(whole.inference, network.eval(), image(45, 50)), network.logits(image(45, 50)), atol=1e-5
            )


def test_the_loss_and_its_gradient_are_those_of_the_full_logits() -> None:
    network = build_network(NetworkConfig(**PATCH14), 5, seed=0).eval()
    target = torch.randint(0, 5, (2, 45, 70), dtype=torch.uint8)
    target[0, :9] = IGNORE

    def gradients(loss: torch.Tensor) -> list[torch.Tensor | None]:
        found = torch.autograd.grad(loss, [*network.parameters()], allow_unused=True)
        return [*found, loss.detach()]

    wanted = F.cross_entropy(network.logits(image(45, 70)), target.long(), ignore_index=IGNORE)
    dense, _ = cross_entropy(network(image(45, 70)), [target], [1 / int((target != IGNORE).sum())])
    for ours, theirs in zip(gradients(dense), gradients(wanted), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_plain_transformer_under_another_architecture_is_told_which_takes_it() -> None:
    with pytest.raises(ConfigError, match=r"without a pyramid of maps needs architecture: dpt\.$"):
        build_network(NetworkConfig(architecture="unet", encoder="tu-test_vit"), 2, seed=0)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (NetworkConfig(**PATCH14), ""),
        (NetworkConfig(encoder="tu-test_efficientnet"), ""),
        (NetworkConfig(encoder="mit_b0", architecture="segformer"), ""),  # its code cannot be built without memory
        (vit(dynamic_img_size=False), "Input height (64) doesn't match model (160)"),
        (NetworkConfig(encoder="tu-test_nothing"), "segmentation-models-pytorch knows no 'tu-test_nothing'."),
    ],
)
def test_whether_a_network_runs_at_a_size(config: NetworkConfig, reason: str) -> None:
    found = refusal(config, (64, 96))
    assert reason in found
    assert bool(found) == bool(reason)
