"""A model loaded from its folder: the numbers of the training's own networks, images of all kinds, and folders of strangers."""

import io
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import changed, write_untrained

import cps_ray
from cps_ray.config.train import TrainConfig
from cps_ray.datasets.shards import open_shards
from cps_ray.engine.evaluation import evaluate
from cps_ray.engine.inference import ENSEMBLE, predict
from cps_ray.engine.networks import build_networks
from cps_ray.engine.ranks import Ranks
from cps_ray.errors import CheckpointError, ConfigError, CpsRayError, DataError
from cps_ray.model.model import Model, load_model
from cps_ray.model.writing import write_model

RNG = np.random.default_rng(3)
PHOTO = RNG.integers(0, 256, (45, 70, 3), np.uint8)


@pytest.fixture(scope="module")
def model(exported: Path) -> Model:
    return load_model(exported, device="cpu")


def own_probabilities(config: TrainConfig, image: np.ndarray) -> dict[str, np.ndarray]:
    """The training's networks themselves, without the model's folder."""
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    prob = {}
    for name, network in build_networks(config, 7).items():
        scores = predict(config.inference, network.eval(), tensor)[0].double()
        prob[name] = scores.softmax(0).permute(1, 2, 0).numpy()
    return prob | {ENSEMBLE: (prob["a"] + prob["b"]) / 2}


@pytest.mark.parametrize("network", ["a", "b", "ensemble"])
def test_predicts_what_the_trainings_networks_do(exported: Path, pair: TrainConfig, network: str) -> None:
    loaded = load_model(str(exported), device="cpu", network=network)
    expected = own_probabilities(pair, PHOTO)[network]
    found = loaded.probabilities(PHOTO)
    assert found.shape == (45, 70, 7)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)
    labels = loaded.predict(PHOTO)
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, found.argmax(-1))


def test_large_images_come_in_strips_and_are_the_same(exported: Path, pair: TrainConfig, tmp_path: Path) -> None:
    large = np.tile(PHOTO, (6, 3, 1))
    found = load_model(exported, device="cpu").probabilities(large)
    np.testing.assert_allclose(found, own_probabilities(pair, large)["a"], atol=2e-6)
    strips = [*load_model(exported, device="cpu").strips(torch.from_numpy(large).permute(2, 0, 1)[None])]
    assert len(strips) > 5
    assert max(labels.labels.shape[1] for _, labels in strips) <= 44, "rows of two windows at most"


def jpeg_turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    Image.fromarray(PHOTO).save(data, "jpeg", exif=exif, quality=95)
    return data.getvalue()


def test_paths_pillow_and_arrays_are_the_same_image(model: Model, tmp_path: Path) -> None:
    (tmp_path / "turned.jpg").write_bytes(jpeg_turned())
    path = tmp_path / "turned.jpg"
    upright = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)  # OpenCV turns it
    assert upright.shape == (70, 45, 3)
    expected = model.predict(upright)
    for image in (path, str(path), Image.open(path)):
        assert np.array_equal(model.to_rgb(image), upright), type(image)
        assert np.array_equal(model.predict(image), expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA", "I;16"])
def test_pillow_modes(model: Model, mode: str) -> None:
    image = Image.fromarray(PHOTO).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        assert np.array_equal(model.to_rgb(image), model.to_rgb(Image.fromarray(PHOTO).convert("L")))
    assert model.predict(image).shape == (45, 70)


def test_grey_and_16_bits_are_read_as_by_prepare(model: Model, tmp_path: Path) -> None:
    grey = PHOTO[..., 0]
    wide = grey.astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "wide.png"), wide)
    expected = model.predict(np.repeat(grey[..., None], 3, axis=2))
    for image in (grey, grey[..., None], wide, tmp_path / "wide.png"):
        assert np.array_equal(model.predict(image), expected)


def test_bands_and_value_range_are_the_trainings(pair: TrainConfig, tmp_path: Path) -> None:
    manifest = open_shards(pair.data.shards).manifest
    manifest = manifest.model_copy(update={"bands": (4, 2, 1), "value_range": (100.0, 1100.0)})
    write_model(tmp_path, pair, build_networks(pair, 7), manifest, {})
    model = load_model(tmp_path, device="cpu")
    cube = np.dstack([PHOTO, PHOTO[::-1, :, 0]]).astype(np.uint16) * 4 + 100
    expected = ((cube[..., [3, 1, 0]].astype(float) - 100) * 255 / 1000).clip(0, 255).round().astype(np.uint8)
    assert np.array_equal(model.to_rgb(cube), expected)
    with pytest.raises(DataError, match="should have band 4"):
        model.predict(PHOTO)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (np.zeros((4, 4, 5), np.uint8), "should be grey or RGB"),
        (np.zeros((4, 4, 4), np.uint8), "give it as the training's images were: grey or RGB, of unsigned integers."),
        (np.zeros((4, 4), np.float32), "holds float32 values; give it as the training's images were"),
        (np.zeros((4, 0, 3), np.uint8), "has shape (4, 0, 3)"),
        (np.zeros(4, np.uint8), "has shape (4,)"),
        (np.array([["a"]]), "of <U1"),
        (3, "is a int"),
        ("no/such.jpg", "no/such.jpg: cannot be read: No such file"),
        (__file__, "the file is no image that is known"),
    ],
)
def test_what_is_no_image_is_said(model: Model, image: Any, text: str) -> None:
    with pytest.raises(DataError) as err:
        model.predict(image)
    assert text in str(err.value)


def test_labels_are_those_of_an_evaluation(exported: Path, pair: TrainConfig) -> None:
    """One function makes labels here and there: a confusion matrix from predictions is that of `evaluate`."""
    from cps_ray.datasets.loader import eval_batches

    shards = open_shards(pair.data.shards)
    alone = [*eval_batches(shards, "val", size_px=1)]
    counts = evaluate(pair, build_networks(pair, 7), alone, 7, Ranks())
    for network, expected in {"a": counts.whole_split, **counts.others}.items():
        model = load_model(exported, device="cpu", network=network)
        matrix = np.zeros((7, 7), np.int64)
        for batch in alone:
            labels = model.predict(batch.image[0].permute(1, 2, 0).numpy())
            mask = batch.mask[0].numpy()
            np.add.at(matrix, (mask[mask < 7], labels[mask < 7]), 1)
        assert np.array_equal(matrix, expected.numpy()), network


def test_choices_that_there_are_not(exported: Path) -> None:
    with pytest.raises(ConfigError, match="network must be one of a, b, ensemble, but got 'c'"):
        load_model(exported, network="c")
    with pytest.raises(ConfigError, match="device must be one that torch has here, but got 'cuda:9'"):
        load_model(exported, device="cuda:9")


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "model.json"
    description = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        inner = description
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    path.write_text(json.dumps(description))


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def other_classes(folder: Path) -> None:
    description = json.loads((folder / "model.json").read_text())
    edited(folder, classes=description["classes"][:5], palette=description["palette"][:5])


def pickled(folder: Path) -> None:
    state = {key: value.clone() for key, value in load_file(folder / "model.safetensors").items()}
    torch.save(state, folder / "model.safetensors")


def other_keys(folder: Path) -> None:
    state = {key: value.clone() for key, value in load_file(folder / "model.safetensors").items()}
    state["extra.weight"] = torch.ones(1)
    save_file(state, folder / "model.safetensors")


def not_finite(folder: Path) -> None:
    state = {key: value.clone() for key, value in load_file(folder / "model.safetensors").items()}
    state["segmentation_head.0.bias"][2] = float("nan")
    save_file(state, folder / "model.safetensors")


STRANGERS: list[tuple[Callable[[Path], Any], str]] = [
    (truncate, "model.safetensors: must be safetensors, but cannot be read"),
    (huge_header, "model.safetensors: must be safetensors, but cannot be read"),
    (pickled, "model.safetensors: must be safetensors, but cannot be read"),
    (
        other_classes,
        "with tu-test_efficientnet and 5 classes, but segmentation_head.0.weight is (7, 16, 1, 1) instead of (5, 16, 1, 1)",
    ),
    (other_keys, "but also has extra.weight"),
    (not_finite, "must hold finite weights, but segmentation_head.0.bias has nan or inf"),
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: is missing"),
    (lambda f: (f / "model.json").unlink(), "must be the folder of a model"),
    (lambda f: (f / "model.json").write_text("{"), "model.json: must be JSON"),
    (lambda f: (f / "model.json").write_text("[" * 100_000), "model.json: must be JSON"),
    (lambda f: (f / "model.json").write_text("[1]"), "model.json: must be of version 1, but has no version"),
    (lambda f: edited(f, version=2), "model.json: must be of version 1, but has version 2"),
    (lambda f: edited(f, networks__a__file="../../secret.safetensors"), "networks.a.file: must be text that fits"),
    (lambda f: edited(f, networks__a__file="/etc/secret.safetensors"), "networks.a.file: must be text that fits"),
    (lambda f: edited(f, networks__a__architecture="os:system"), "network a needs os:system, code outside cps_ray"),
    (lambda f: edited(f, networks__a__encoder="no-such"), "network a cannot be built"),
    (lambda f: edited(f, networks__a__divisor=7), "takes sides of multiples of 32 px, but its model.json says 7"),
    (lambda f: edited(f, networks__a__std=[0, 1, 1]), "networks.a.std[0]: must be greater than 0"),
    (lambda f: edited(f, network="c"), "`network` must be one of a, b, but is 'c'"),
    (lambda f: edited(f, networks={}), "`networks` must hold a"),
    (lambda f: edited(f, surprise=1), "surprise"),
    (lambda f: edited(f, palette=[]), "`palette` must have a colour for each of 7 classes"),
]


@pytest.mark.parametrize(("spoil", "text"), STRANGERS)
def test_a_folder_of_a_stranger_is_one_line(
    exported: Path, tmp_path: Path, spoil: Callable[[Path], Any], text: str
) -> None:
    folder = tmp_path / "best"
    shutil.copytree(exported, folder)
    spoil(folder)
    with pytest.raises(CpsRayError) as err:
        load_model(folder, device="cpu")
    assert isinstance(err.value, CheckpointError)
    assert text in str(err.value)
    assert "\n" not in str(err.value)


def test_the_folder_beside_is_named(exported: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Did you mean .*best\?"):
        load_model(exported.parent)


def test_plugins_run_only_when_they_are_allowed(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "import segmentation_models_pytorch as smp\ndef build(**kw):\n    print('run')\n    return smp.Unet(**kw)\n"
    )
    (tmp_path / "my_net.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    config = changed(tiny, method="supervised", model__architecture="my_net:build", model__options={})
    folder = tmp_path / "best"
    write_untrained(config, folder)
    with pytest.raises(CheckpointError, match="needs my_net:build"):
        load_model(folder)
    assert load_model(folder, device="cpu", plugins=True).predict(PHOTO).shape == (45, 70)


def test_loading_and_predicting_needs_no_ray(exported: Path) -> None:
    code = f"""
import sys, numpy as np, cps_ray
model = cps_ray.load_model({str(exported)!r}, device="cpu")
model.predict(np.zeros((40, 40, 3), np.uint8))
print(sorted({{"ray", "optuna", "pandas", "albumentations"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_names_are_the_packages() -> None:
    assert cps_ray.load_model is load_model
    assert cps_ray.Model is Model


def test_what_only_gpus_compute_is_left_out_on_a_cpu(pair: TrainConfig, tmp_path: Path) -> None:
    config = changed(pair, compute__autocast="fp16", resources__gpus_per_worker=1)
    write_untrained(config, tmp_path)
    found = load_model(tmp_path, device="cpu").probabilities(PHOTO)
    np.testing.assert_allclose(found, own_probabilities(pair, PHOTO)["a"], atol=2e-6)
