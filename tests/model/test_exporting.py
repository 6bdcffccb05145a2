"""Exported files beside the model that they are made from: on real images of several sizes, whole, as one, and with planted faults."""

import importlib.util
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from support import changed, write_untrained

from cps_ray.config.train import TrainConfig
from cps_ray.datasets.images import decode_image
from cps_ray.datasets.shards import open_shards
from cps_ray.errors import CheckpointError, ConfigError, DataError
from cps_ray.model import exporting
from cps_ray.model.description import read_description
from cps_ray.model.exporting import (
    ExportOptions,
    Graph,
    check_options,
    default_file,
    export_model,
    find_real_images,
    left_out,
)
from cps_ray.model.model import Model, load_model

FIXED = ExportOptions(size=(32, 48))


@pytest.fixture
def folder(exported: Path, shards: Path, tmp_path: Path) -> Path:
    """A copy of the model, to write into, that still knows its shards."""
    copied = Path(shutil.copytree(exported, tmp_path / "best"))
    lines = (copied / "config.yaml").read_text().splitlines()
    lines = [f"  shards: {shards}" if line.startswith("  shards:") else line for line in lines]
    (copied / "config.yaml").write_text("\n".join(lines))
    return copied


def photos(shards: Path) -> list[np.ndarray]:
    locations = open_shards(shards).index("test").locations
    return [decode_image(each.image) for each in locations.read(range(len(locations)), masks=False)]


def export(model: Model, format: Any, options: ExportOptions) -> tuple[Path, dict[str, Any]]:
    target = default_file(model, format, options.precision)
    return target, export_model(model, target, format, find_real_images(model, options), options)


def test_onnx_of_an_ensemble_is_the_model_at_any_size(folder: Path, shards: Path) -> None:
    model = load_model(folder, device="cpu", network="ensemble")
    file, entry = export(model, "onnx", ExportOptions())
    assert file == folder / "model-ensemble.onnx"
    assert read_description(folder).exports == {"model-ensemble.onnx": json.loads(json.dumps(entry))}
    assert entry["dynamic"]
    assert entry["bytes"] == file.stat().st_size
    assert entry["opset"] == max(each.version for each in onnx.load(file).opset_import if each.domain == "")
    parity = entry["parity"]
    assert (parity["images"], parity["sizes"]) == (6, ["21x33", "32x48"])
    assert (parity["equal_labels"], parity["equal_to_predict"]) == (1.0, 1.0)
    assert parity["largest_difference"] < 1e-5
    session = onnxruntime.InferenceSession(file)
    large = np.hstack([np.vstack(photos(shards)[:3]), np.vstack(photos(shards)[3:])])
    for height, width in ((96, 96), (45, 71), (1, 1), (33, 64), (95, 31)):
        image = large[:height, :width]
        labels, prob = session.run(["labels", "probabilities"], {"image": np.stack([image, image, image])})
        assert (labels.dtype, prob.dtype) == (np.uint8, np.float32)
        expected = model.probabilities(image)
        for number in range(3):
            np.testing.assert_allclose(prob[number].transpose(1, 2, 0), expected, atol=1e-5)
            assert np.array_equal(labels[number], expected.argmax(-1))


def test_torch_of_any_size(folder: Path, shards: Path) -> None:
    model = load_model(folder, device="cpu")
    file, entry = export(model, "torch", ExportOptions())
    assert file == folder / "model.pt2"
    assert entry["parity"]["equal_labels"] == 1.0
    module = torch.export.load(file).module()
    for height, width in ((32, 32), (45, 71), (96, 33)):
        image = np.tile(photos(shards)[0], (3, 2, 1))[:height, :width]
        labels, prob = module(torch.from_numpy(image.copy())[None])
        np.testing.assert_allclose(prob[0].permute(1, 2, 0).numpy(), model.probabilities(image), atol=1e-5)
        assert np.array_equal(labels[0].numpy(), model.predict(image))


SMALL = {"decoder_intermediate_channels": [16, 16, 16, 16], "decoder_fusion_channels": 16}
FORMS = [
    ("deeplabv3plus-cps", "tu-test_resnet", {}, (45, 71)),
    ("unet", "tu-mobilenetv3_small_050", {"decoder_channels": [32, 16, 8, 8, 8]}, (45, 71)),
    ("segformer", "mit_b0", {}, (45, 71)),
    # Its own size: with torch 2.8, the resized position embedding differs in ONNX by too much.
    ("dpt", "tu-test_vit", SMALL, (150, 160)),
]


def model_of(config: TrainConfig, folder: Path, architecture: str, encoder: str, options: dict[str, Any]) -> Model:
    form = {"model__architecture": architecture, "model__encoder": encoder, "model__options": options}
    config = changed(config, **form)
    write_untrained(config, folder)
    return load_model(folder, device="cpu")


@pytest.mark.parametrize(("architecture", "encoder", "options", "size"), FORMS)
def test_architectures(
    tiny: TrainConfig, tmp_path: Path, architecture: str, encoder: str, options: dict[str, Any], size: tuple[int, int]
) -> None:
    model = model_of(tiny, tmp_path, architecture, encoder, options)
    _, entry = export(model, "onnx", ExportOptions(size=size))
    assert entry["parity"]["sizes"] == ["{}x{}".format(*size)]
    assert entry["parity"]["equal_labels"] >= 0.9999
    assert entry["parity"]["largest_difference"] < 1e-4


def test_a_network_of_one_size_is_told_to_give_it(tiny: TrainConfig, tmp_path: Path) -> None:
    config = changed(tiny, data__crop_px=(160, 160))
    model = model_of(config, tmp_path, "dpt", "tu-test_vit", {"dynamic_img_size": False, **SMALL})
    with pytest.raises(ConfigError, match=r"any size \(give one, as --size 160 160\): .*doesn't match model \(160\)"):
        export(model, "torch", ExportOptions())
    with pytest.raises(ConfigError, match=r"cannot be exported for images of 32x48 px: .*doesn't match model"):
        export(model, "torch", FIXED)
    assert not [*tmp_path.glob("*.pt2")]
    assert export(model, "torch", ExportOptions(size=(150, 160)))[0].is_file()


def other_mean(graph: Graph, segmenter: Any, image: torch.Tensor) -> torch.Tensor:
    return RIGHT(graph, segmenter, image + 20)


def nan(graph: Graph, segmenter: Any, image: torch.Tensor) -> torch.Tensor:
    return (RIGHT(graph, segmenter, image) - 2).log()


def fewer_classes(graph: Graph, segmenter: Any, image: torch.Tensor) -> torch.Tensor:
    return RIGHT(graph, segmenter, image)[:, :5]


RIGHT = Graph._probabilities
FAULTS = [
    (other_mean, "differs too far"),
    (nan, "by up to inf"),
    (fewer_classes, "shape"),
]


@pytest.mark.parametrize(("fault", "text"), FAULTS)
def test_a_fault_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any], text: str
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(Graph, "_probabilities", fault)
    strict = ExportOptions(size=(32, 48), tolerance=1e-5)
    with pytest.raises(CheckpointError, match=text):
        export(load_model(folder, device="cpu"), "torch", strict)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_older_file_and_its_entry_outlive_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, entry = export(load_model(folder, device="cpu"), "torch", FIXED)
    kept = file.read_bytes()
    monkeypatch.setattr(Graph, "_probabilities", nan)
    with pytest.raises(CheckpointError):
        export(load_model(folder, device="cpu"), "torch", FIXED)
    assert file.read_bytes() == kept
    assert read_description(folder).exports[file.name]["sha256"] == entry["sha256"]


def test_a_file_elsewhere_does_not_take_the_entry_of_one_of_its_name(folder: Path, tmp_path: Path) -> None:
    file, entry = export(load_model(folder, device="cpu"), "torch", FIXED)
    model = load_model(folder, device="cpu", network="b")
    (tmp_path / "elsewhere").mkdir()
    export_model(model, tmp_path / "elsewhere" / file.name, "torch", find_real_images(model, FIXED), FIXED)
    assert (tmp_path / "elsewhere" / file.name).exists()
    assert read_description(folder).exports == {file.name: json.loads(json.dumps(entry))}


def test_fp16_and_int8_are_measured_by_miou(folder: Path) -> None:
    model = load_model(folder, device="cpu", network="b")
    half, entry = export(model, "torch", ExportOptions(size=(32, 48), precision="fp16"))
    full, _ = export(model, "torch", FIXED)
    assert half.name == "model-b-fp16.pt2"
    assert half.stat().st_size < 0.7 * full.stat().st_size
    assert entry["parity"]["miou"] == pytest.approx(entry["parity"]["miou_of_model"], abs=0.01)
    assert entry["parity"]["miou_of_model"] > 0
    eighth, entry = export(model, "onnx", ExportOptions(size=(32, 48), precision="int8"))
    assert eighth.name == "model-b-int8.onnx"
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(eighth).graph.node)
    assert {"miou", "miou_of_model"} <= {*entry["parity"]}


def test_int8_that_loses_miou_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantise = exporting._quantise

    def one_class(file: Path, images: Any) -> None:
        graph = onnx.load(file)
        (bias,) = (each for each in graph.graph.initializer if each.name.endswith("segmentation_head.0.bias"))
        bias.CopyFrom(numpy_helper.from_array(np.float32([0, 0, 0, 0, 0, 0, 99]), bias.name))
        onnx.save(graph, file)
        quantise(file, images)

    model = load_model(folder, device="cpu")
    options = ExportOptions(size=(32, 48), precision="int8", tolerance_miou=0.5)
    monkeypatch.setattr(exporting, "_quantise", one_class)
    with pytest.raises(CheckpointError, match=r"int8 loses too much: mIoU .* \(allowed: 0.5 points\)"):
        export(model, "onnx", options)
    assert not [*folder.glob("*.onnx")]
    assert read_description(folder).exports == {}


def test_real_images_must_be_there(folder: Path, shards: Path, tmp_path: Path) -> None:
    model = load_model(folder, device="cpu")
    (folder / "config.yaml").write_text("data: {shards: gone}\nmethod: no_such_module:Method\n")
    with pytest.raises(ConfigError, match=r"are not here\. Give --shards FOLDER, or --images FOLDER"):
        find_real_images(model, FIXED)
    with pytest.raises(ConfigError, match=r"are not here. Give --shards FOLDER\.$"):
        find_real_images(model, ExportOptions(precision="int8"), images=tmp_path)
    assert len(find_real_images(model, FIXED, shards=shards, split="train").images) == 16
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="must be an image or a folder of images"):
        find_real_images(model, FIXED, images=tmp_path / "photos")
    Image.fromarray(photos(shards)[0]).save(tmp_path / "photos/one.png")
    real = find_real_images(
        model, ExportOptions(size=(32, 48), precision="int8"), images=tmp_path / "photos", shards=shards
    )
    assert (len(real.images), len(real.calibration)) == (1, 16)
    (folder / "config.yaml").write_text(f"data: {{shards: {shards}}}\n")
    assert find_real_images(model, ExportOptions(precision="fp16"), images=tmp_path / "photos").shards is not None
    for given in (tmp_path / "photos", tmp_path / "photos/one.png"):
        (image,) = find_real_images(model, ExportOptions(), images=given).images
        assert np.array_equal(image, photos(shards)[0])
    with pytest.raises(DataError, match="no split 'dev'"):
        find_real_images(model, FIXED, shards=shards, split="dev")


def test_shards_of_other_classes_are_refused(folder: Path, shards: Path) -> None:
    model = load_model(folder, device="cpu")
    model.description = model.description.model_copy(update={"classes": ("a", "b")})
    with pytest.raises(DataError, match="must have the model's classes in its order, a, b, but has"):
        find_real_images(model, FIXED, shards=shards)


def test_what_cannot_be_checked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, formats, text in (
        (ExportOptions(opset=17), ["onnx"], "--opset must be at least 18"),
        (ExportOptions(opset=20), ["torch"], "with --onnx alone"),
        (ExportOptions(precision="int8"), ["onnx", "torch"], "without --torch"),
    ):
        with pytest.raises(ConfigError, match=text):
            check_options(options, formats)  # type: ignore[arg-type]
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    check_options(ExportOptions(), ["torch"])
    with pytest.raises(ConfigError, match=r"onnxruntime, without .*: pip install 'cps_ray\[onnx\]'"):
        check_options(ExportOptions(), ["onnx"])


def test_an_opset_that_there_is_not(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--opset 99: torch can make opset \d\d of this model alone"):
        export(load_model(folder, device="cpu"), "onnx", ExportOptions(size=(32, 48), opset=99))
    assert not [*folder.glob("*.onnx")]


def test_what_a_graph_leaves_out_is_said(folder: Path) -> None:
    model = load_model(folder, device="cpu")
    assert left_out(model).endswith("Left out: windows of 32x48 px of larger images.")
    more = {"scales": (1.0, 2.0), "flip": True, "autocast": "bf16", "window_px": (16, 16)}
    inference = model.description.inference.model_copy(update=more)
    model.description = model.description.model_copy(update={"inference": inference})
    assert left_out(model).endswith(
        "Left out: scales (1.0, 2.0), the mirrored view, autocast bf16, windows of 16x16 px."
    )
    inference = inference.model_copy(update={"window_px": "whole", "scales": (1.0,), "flip": False, "autocast": "none"})
    model.description = model.description.model_copy(update={"inference": inference})
    assert left_out(model) == ""


def test_a_model_in_windows_is_compared_in_one_piece(folder: Path, shards: Path) -> None:
    """What windows change is in `equal_to_predict`, not in what is tolerated."""
    description = json.loads((folder / "model.json").read_text())
    description["inference"] |= {"window_px": [16, 16], "flip": True}
    (folder / "model.json").write_text(json.dumps(description))
    model = load_model(folder, device="cpu")
    parity = export(model, "torch", FIXED)[1]["parity"]
    assert parity["equal_labels"] == 1.0
    image = photos(shards)[0]
    assert not np.allclose(
        model.probabilities(image), exporting._model_run(model)(image[None])[1][0].transpose(1, 2, 0)
    )


def test_torch_may_not_trace_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_LONGEST_S", 1)
    with pytest.raises(TimeoutError, match="not done after 1 s"), exporting._in_time():
        time.sleep(5)
    with exporting._in_time():
        pass
    time.sleep(1.1)  # the alarm is off
