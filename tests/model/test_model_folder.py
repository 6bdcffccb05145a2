"""The folder of a model: its files, and what else can read them."""

import json
import stat
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from support import changed, write_untrained

from cps_ray.config.reader import load_train
from cps_ray.config.train import TrainConfig
from cps_ray.engine.networks import build_networks
from cps_ray.errors import CheckpointError
from cps_ray.files import replaced_folder
from cps_ray.model.model import load_model

PHOTO = np.random.default_rng(4).integers(0, 256, (64, 96, 3), np.uint8)


SMALL = {"decoder_intermediate_channels": [8, 8, 8, 8], "decoder_fusion_channels": 8}


def test_files_and_their_mode(exported: Path, pair: TrainConfig) -> None:
    names = {path.name for path in exported.iterdir()}
    assert names == {
        "model.safetensors",
        "model-b.safetensors",
        "model.json",
        "config.json",
        "config.yaml",
        "metrics.json",
        "README.md",
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in exported.iterdir()} == {0o644}
    assert load_train(exported / "config.yaml") == pair
    assert json.loads((exported / "model.json").read_text())["fingerprint"] == pair.data.fingerprint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "the val split, by which"),
        ({"further_labeled": ["val"]}, "the val split, on which it was trained, too, by which"),
        ({"folds": {"count": 3}}, "the val split, by which"),
        (
            {"folds": {"count": 3, "held_out": 1}},
            "fold 1 of 0 to 2 of the labelled images, on which it was not trained, by",
        ),
    ],
)
def test_the_card_says_which_images_were_validated(
    tiny: TrainConfig, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    config = changed(tiny, method="supervised", **{f"data__{name}": value for name, value in changes.items()})
    folder = write_untrained(config, tmp_path / "best")
    assert f"Measured on {words}" in (folder / "README.md").read_text()


def test_smp_alone_loads_network_a(exported: Path) -> None:
    network = smp.from_pretrained(str(exported)).eval()
    description = json.loads((exported / "model.json").read_text())["networks"]["a"]
    x = (torch.from_numpy(PHOTO) / 255 - torch.tensor(description["mean"])) / torch.tensor(description["std"])
    with torch.inference_mode():
        logits = network(x.permute(2, 0, 1)[None].float())[0]
    expected = load_model(exported, device="cpu").probabilities(PHOTO)
    torch.testing.assert_close(logits.softmax(0).permute(1, 2, 0), torch.from_numpy(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("model", "library"),
    [
        ({"architecture": "deeplabv3plus-cps", "encoder": "tu-test_resnet", "options": {}}, "cps_ray"),
        ({"architecture": "unet", "encoder": "resnet18", "options": {"decoder_channels": [32, 16, 8, 8, 4]}}, "segmentation-models-pytorch"),
        ({"architecture": "dpt", "encoder": "tu-test_vit", "options": SMALL}, "segmentation-models-pytorch"),
        ({"architecture": "dpt", "encoder": "tu-test_vit", "options": {**SMALL, "patch_size": 14, "img_size": 70}}, "cps_ray"),
        ({"architecture": "segformer", "encoder": "mit_b0", "options": {}}, "segmentation-models-pytorch"),
    ],
)  # fmt: skip
def test_every_architecture_loads_again(tiny: TrainConfig, tmp_path: Path, model: dict, library: str) -> None:
    config = changed(tiny, method="supervised", model={**tiny.model.model_dump(mode="json"), **model})
    folder = write_untrained(config, tmp_path / "best")
    loaded = load_model(folder, device="cpu")
    assert loaded.description.networks["a"].library == library
    assert (folder / "config.json").exists() == (library == "segmentation-models-pytorch")
    expected = build_networks(config, 7)["a"].eval()
    with torch.inference_mode():
        prob = expected.logits(torch.from_numpy(PHOTO).permute(2, 0, 1)[None])[0].softmax(0).permute(1, 2, 0)
    torch.testing.assert_close(torch.from_numpy(loaded.probabilities(PHOTO)), prob, atol=1e-5, rtol=0)
    if library == "segmentation-models-pytorch":
        assert smp.from_pretrained(str(folder)).state_dict().keys() == expected.network.state_dict().keys()


def test_normalisation_is_the_same_to_the_last_bit(tiny: TrainConfig, tmp_path: Path) -> None:
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 1 / 3, 0.27577711)
    config = changed(tiny, method="supervised", model__mean=mean, model__std=std)
    folder = write_untrained(config, tmp_path / "best")
    network = load_model(folder, device="cpu").networks()["a"]
    expected = build_networks(config, 7)["a"]
    assert torch.equal(network.mean, expected.mean)
    assert torch.equal(network.std, expected.std)


def test_a_kill_leaves_the_model_of_before(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    with replaced_folder(folder) as new:
        (new / "x").write_text("1")
    with suppress(KeyboardInterrupt), replaced_folder(folder) as new:
        (new / "y").write_text("2")
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == ["x"]
    with replaced_folder(folder) as new:
        (new / "z").write_text("3")
    assert [path.name for path in folder.iterdir()] == ["z"]
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_it_is_a_weights_file_with_its_normalisation(tiny: TrainConfig, tmp_path: Path) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    trained = changed(tiny, method="supervised", seed=5, model__mean=mean, model__std=std)
    folder = write_untrained(trained, tmp_path / "best")
    expected = build_networks(trained, 7)["a"]
    for file in (folder, folder / "model.safetensors"):
        found = build_networks(changed(tiny, model__weights_file=str(file)), 7)["b"]
        own = found.network.encoder.state_dict()
        assert all(torch.equal(value, own[key]) for key, value in expected.network.encoder.state_dict().items())
        assert torch.equal(found.mean, expected.mean)
        assert torch.equal(found.std, expected.std)
    (folder / "model.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model\.json: must be that of a model"):
        build_networks(changed(tiny, model__weights_file=str(folder)), 7)
