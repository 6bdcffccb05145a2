"""What is known of encoders and their weights without building or fetching them."""

from pathlib import Path

import pytest

from cps_ray.config.train import NetworkConfig
from cps_ray.engine.encoders import UNKNOWN, Weights, matching, size_of, unusual_normalisation, weights_of
from cps_ray.engine.names import check_names
from cps_ray.engine.networks import build_network
from cps_ray.errors import ConfigError


def network(encoder: str, weights: str = "imagenet", **more: object) -> NetworkConfig:
    return NetworkConfig.model_validate({"encoder": encoder, "weights": weights, **more})


@pytest.mark.parametrize(
    ("config", "source", "licence"),
    [
        (network("tu-vit_small_patch14_dinov2.lvd142m"), "lvd142m", "apache-2.0"),
        (network("tu-vit_small_patch14_dinov2"), "lvd142m", "apache-2.0"),  # the tag that timm takes by itself
        (network("tu-vit_small_patch16_dinov3.lvd1689m", "lvd1689m"), "lvd1689m", "dinov3-license"),
        (network("tu-convnextv2_atto.fcmae"), "fcmae", "cc-by-nc-4.0"),
        (network("tu-resnet50s", architecture="deeplabv3plus-cps"), "gluon_in1k", "apache-2.0"),
        (network("tu-resnet18", "fb_ssl_yfcc100m_ft_in1k", architecture="deeplabv3plus-cps"), "fb_ssl_yfcc100m_ft_in1k", "cc-by-nc-4.0"),
        (network("resnet50"), "imagenet", "bsd-3-clause"),
        (network("resnet50", "swsl"), "swsl", "cc-by-nc-4.0"),
        (network("efficientnet-b0", "advprop"), "advprop", "apache-2.0"),
        (network("mit_b2"), "imagenet", "nvidia-source-code-license (non-commercial)"),
        (network("dpn68"), "imagenet", UNKNOWN),
    ],
)  # fmt: skip
def test_weights_of_the_hub_have_a_source_a_licence_and_a_page(
    config: NetworkConfig, source: str, licence: str
) -> None:
    check_names(config)
    found = weights_of(config)
    assert (found.source, found.licence) == (source, licence)
    assert found.url is not None
    assert found.sentence() == f"Weights of {config.encoder}: {source}, licence {licence} (see {found.url})"


def test_weights_of_a_file_and_no_weights() -> None:
    file = weights_of(network("resnet50", "none", weights_file=Path("/somewhere/mine.pt")))
    assert file.sentence() == "Weights of resnet50: mine.pt, licence unknown: ask where they come from"
    assert file.record()["licence"] == "unknown"
    scratch = weights_of(network("resnet50", "none"))
    assert scratch.sentence() == "Weights of resnet50: none, trained from scratch"
    assert scratch.record()["licence"] is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (network("tu-vit_small_patch14_dinov2", "lvd1689m"), "model.weights: must be none, imagenet or the tag of the tu- encoder, but got 'lvd1689m'."),
        (network("tu-resnet18.tv_in1k", "a1_in1k"), "model.weights: must be none, imagenet or the tag of the tu- encoder, but got 'a1_in1k'."),
        (network("tu-vit_small_patch16_36x1_224"), "model.weights: timm has no weights of tu-vit_small_patch16_36x1_224"),
    ],
)  # fmt: skip
def test_weights_that_timm_does_not_have_are_refused(config: NetworkConfig, message: str) -> None:
    """smp takes those of the encoder's name whatever `weights` says, so that other weights than asked for would be trained."""
    with pytest.raises(ConfigError) as caught:
        check_names(config)
    assert message in str(caught.value)
    check_names(config.model_copy(update={"weights": "none"}))


def encoders(pattern: str) -> list[str]:
    return [weights.encoder for weights in matching(pattern)]


def test_patterns_find_encoders_of_both_libraries() -> None:
    assert [weights.source for weights in matching("resnet18")] == ["imagenet", "ssl", "swsl"]
    assert encoders("tu-vit_small_patch14_dinov2") == ["tu-vit_small_patch14_dinov2.lvd142m"]
    assert encoders("vit_small_patch14_dinov2") == ["tu-vit_small_patch14_dinov2.lvd142m"]  # part of a name
    assert "tu-resnet18.tv_in1k" in encoders("*resnet18*")
    assert matching("tu-vit_small_patch16_36x1_224") == [Weights("tu-vit_small_patch16_36x1_224", "none", None, None)]
    assert matching("no-such-thing*") == []


@pytest.mark.parametrize("encoder", ["resnet18", "mit_b0", "tu-resnet18", "tu-test_convnext.r160_in1k"])
def test_sizes_are_those_of_the_built_encoder(encoder: str) -> None:
    config = NetworkConfig(architecture="fpn", encoder=encoder)
    parameters = sum(p.numel() for p in build_network(config, 2, seed=0).network.encoder.parameters())
    size = size_of(encoder)
    assert size is not None
    assert (size.parameters, size.divisor, size.architecture) == (parameters, 32, None)


def test_sizes_of_transformers() -> None:
    size = size_of("tu-vit_small_patch14_dinov2.lvd142m")
    assert size is not None
    assert size.parameters == pytest.approx(22_056_192, rel=1e-3)  # without or with the last norm
    assert (size.divisor, size.architecture) == (28, "dpt")
    sixteen = size_of("tu-vit_small_patch16_dinov3.lvd1689m")
    assert sixteen is not None
    assert (sixteen.divisor, sixteen.architecture) == (32, "dpt")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("tu-resnet18.tv_in1k", ""), ("resnet18", ""), ("inceptionv4", "?"), ("tu-vit_base_patch16_siglip_224.webli", "0.5; 0.5")],
)  # fmt: skip
def test_normalisation_is_shown_where_it_is_not_imagenets(pattern: str, said: str) -> None:
    assert unusual_normalisation(matching(pattern)[0]) == said
