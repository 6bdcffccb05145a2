"""A model as one file that needs no cps_ray, ONNX or torch's .pt2: written, and compared with the model itself on real images."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import logging
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cps_ray.config import yaml_reader
from cps_ray.datasets.images import decode_image
from cps_ray.datasets.loader import eval_batches
from cps_ray.datasets.prepare.patterns import Pattern
from cps_ray.datasets.raster import IMAGE_SUFFIXES
from cps_ray.datasets.shards import MANIFEST, Shards, open_shards
from cps_ray.engine.dense import padded
from cps_ray.engine.inference import label_strips
from cps_ray.engine.metrics import confusion, mean_iou
from cps_ray.engine.networks import Segmenter
from cps_ray.errors import CheckpointError, ConfigError, DataError
from cps_ray.model.data import check_fit
from cps_ray.model.description import read_description, write_description
from cps_ray.model.model import Model, Pixels
from cps_ray.text import on_one_line, printable

# N images, C classes, H W pixels.
Format = Literal["onnx", "torch"]
Precision = Literal["float32", "fp16", "int8"]
Size = tuple[int, int]
"""(height, width) in px."""
Run = Callable[[Pixels], tuple[Pixels, NDArray[np.float32]]]
"""uint8 images (N, H, W, 3) -> labels uint8 (N, H, W), probabilities (N, C, H, W)."""

SUFFIXES: Mapping[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
LEAST_OPSET = 18
LEAST_EQUAL = 0.9999
"""Fraction of the pixels whose labels must be the model's."""
_IMAGES = 16
_LONGEST_SIDE_PX = 2048
"""Larger images are compared by their middle: a graph holds the scores of all pixels at once."""
_TRACED = (2, 288, 416)
"""Images, height and width with which a graph of any size is traced. No map of a network may be 1 px, which torch would take for fixed."""
_LONGEST_S = 120
"""Time that torch may take to trace a network."""
_EXTRA = "pip install 'cps_ray[onnx]'"


class Graph(nn.Module):
    """Networks with everything around them: images as they are in memory -> labels and probabilities.

    What `Segmenter` and `dense.upsample` do, but without a branch on the image's size, which a graph cannot have.
    """

    def __init__(self, segmenters: Iterable[Segmenter], *, half: bool = False) -> None:
        """`half`: the networks, and nothing else, compute in float16."""
        super().__init__()
        self.segmenters = nn.ModuleList(copy.deepcopy(each) for each in segmenters)
        self._dtype = torch.float16 if half else torch.float32
        for segmenter in self.segmenters:
            segmenter.network.to(self._dtype)  # type: ignore[operator, union-attr]
        self.eval()

    def forward(self, image_NHW3: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 (N, H, W, 3), RGB -> labels uint8 (N, H, W), probabilities float32 (N, C, H, W)."""
        image_N3HW = image_NHW3.permute(0, 3, 1, 2).float()
        probs = [self._probabilities(each, image_N3HW) for each in self.segmenters]
        prob_NCHW = probs[0] if len(probs) == 1 else torch.stack(probs).mean(dim=0)
        return prob_NCHW.argmax(dim=1).to(torch.uint8), prob_NCHW

    def _probabilities(self, segmenter: Any, image_N3HW: Tensor) -> Tensor:
        height, width = image_N3HW.shape[-2:]
        tall, wide = padded(padded((height, width)), segmenter.divisor)
        x = F.pad((image_N3HW - segmenter.mean) / segmenter.std, (0, wide - width, 0, tall - height))
        logits = segmenter.network(x.to(self._dtype)).float()
        logits = F.interpolate(logits, (tall, wide), mode="bilinear", align_corners=True)
        # Not a slice, whose memory depends on whether anything is cut off: torch.export would note that as a condition on the size.
        return F.pad(logits, (0, width - wide, 0, height - tall)).softmax(dim=1)


@dataclass(frozen=True, slots=True)
class RealImages:
    """What an exported model is compared on."""

    source: str
    images: tuple[Pixels, ...]
    """(H, W, 3) each, RGB."""
    calibration: tuple[Pixels, ...]
    """Images by which int8 sets its ranges: of train, where there are shards with train."""
    shards: Shards | None
    split: str


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How a model is exported, and how far the file may differ from it."""

    size: Size | None = None
    """None: any size, and any number of images."""
    precision: Precision = "float32"
    opset: int | None = None
    """None: the one that torch's exporter takes."""
    tolerance: float = 1e-3
    """Largest difference of a probability, in float32."""
    tolerance_miou: float = 1.0
    """Points of mIoU that fp16 and int8 may lose."""


def default_file(model: Model, format: Format, precision: Precision) -> Path:
    """Returns where an export is written by default: in the model's folder, `model.onnx`, `model-b.onnx`, `model-int8.onnx`, ..."""
    parts = ["model", *([model.network] if model.network != model.description.network else [])]
    return model.folder / ("-".join([*parts, *([precision] if precision != "float32" else [])]) + SUFFIXES[format])


def check_options(options: ExportOptions, formats: Iterable[Format]) -> None:
    """Raises ConfigError for what cannot be exported or checked here."""
    formats = set(formats)
    if "onnx" in formats:
        missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"--onnx needs the Python package(s) {', '.join(missing)}, without which nothing could be written and checked: {_EXTRA}"
            )
    if options.precision == "int8" and "torch" in formats:
        raise ConfigError("--int8 is made by ONNX Runtime: give --onnx without --torch.")
    if options.opset is not None and (options.opset < LEAST_OPSET or formats != {"onnx"}):
        raise ConfigError(f"--opset must be at least {LEAST_OPSET}, with --onnx alone, but got {options.opset}.")


def find_real_images(
    model: Model, options: ExportOptions, *, images: Path | None = None, shards: Path | None = None, split: str = "val"
) -> RealImages:
    """Returns real images: of a file or folder, of shards or, with neither, of the shards that trained the model.

    Raises ConfigError where there are none: on noise, errors hide in probabilities that are all alike.
    """
    wanted = shards is not None or images is None or options.precision != "float32"
    found = _shards(model, shards) if wanted else None
    if found is None and (images is None or options.precision != "float32"):
        what = "images with masks, by which the mIoU is measured" if images else "real images"
        or_images = "" if options.precision != "float32" else ", or --images FOLDER"
        raise ConfigError(
            f"{model.folder}: an export is compared with the model on {what}, and the shards that trained it are not here. "
            f"Give --shards FOLDER{or_images}."
        )
    calibration: tuple[Pixels, ...] = ()
    if found is not None and options.precision == "int8":
        calibration = _fit(_images(found, "train" if "train" in found.manifest.splits else split), options.size)
    if images is not None:
        read = tuple(model.to_rgb(path) for path in _spread(_files(images)))
        return RealImages(images.name, _fit(read, options.size), calibration, found, split)
    assert found is not None
    source = f"{split} of {found.folder.name}"
    return RealImages(source, _fit(_images(found, split), options.size), calibration, found, split)


def _shards(model: Model, given: Path | None) -> Shards | None:
    """Opens the shards that were given, or those of the model's training if they are still there."""
    folder = given
    if folder is None:
        try:
            # Not as a training, which would import the code that it names.
            data = yaml_reader.load(model.folder / "config.yaml").data["data"]["shards"]
            folder = (model.folder / data).resolve()
        except (ConfigError, KeyError, TypeError):
            return None
        if not (folder / MANIFEST).is_file():
            return None
    shards = open_shards(folder)
    check_fit(model, shards, folder)
    return shards


def _images(shards: Shards, split: str) -> tuple[Pixels, ...]:
    locations = shards.index(split).locations
    return tuple(decode_image(each.image) for each in locations.read(_spread(range(len(locations))), masks=False))


def _files(given: Path) -> list[Path]:
    if given.is_file():
        return [given]
    found = [each.path for each in Pattern("**").find(given)] if given.is_dir() else []
    images = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise DataError(f"{given}: must be an image or a folder of images, but is none.")
    return images


def _spread(things: Any) -> list[Any]:
    """Returns up to _IMAGES of many things, evenly spaced."""
    chosen = np.linspace(0, len(things) - 1, min(len(things), _IMAGES)).round().astype(int)
    return [things[number] for number in chosen]


def _fit(images: Iterable[Pixels], size: Size | None) -> tuple[Pixels, ...]:
    """Resizes images to a fixed size; else cuts the middle out of very large ones."""
    return tuple(_resized(image, size) if size else _middle(image) for image in images)


def _resized(pixels: Pixels, size: Size, *, mask: bool = False) -> Pixels:
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_NEAREST if mask else cv2.INTER_LINEAR))


def _middle(image: Pixels) -> Pixels:
    top, left = (max(0, side - _LONGEST_SIDE_PX) // 2 for side in image.shape[:2])
    return image[top : top + _LONGEST_SIDE_PX, left : left + _LONGEST_SIDE_PX]


def export_model(
    model: Model, target: Path, format: Format, real: RealImages, options: ExportOptions
) -> dict[str, Any]:
    """Writes a file, compares it with the model, and notes it in model.json where the file lies beside it; returns what is noted there.

    Raises ConfigError where the network cannot be exported, CheckpointError where the file differs too far: nothing is left of it then.
    """
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{target}: must be in a folder that exists and can be written. Name another file.")
    program = _traced(model, options)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as folder:
        file = Path(folder) / target.name
        opset = {}
        if format == "onnx":
            opset = {"opset": _write_onnx(program, file, real, options)}
        else:
            with _refused(f"torch cannot save this model{_hint(options)}"):
                torch.export.save(program, file)
        parity = _compare(model, (_onnx_run if format == "onnx" else _torch_run)(file), real, options)
        entry = {
            "format": format,
            "network": model.network,
            "precision": options.precision,
            **opset,
            "dynamic": options.size is None,
            "size": options.size,
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "parity": parity,
            "made_with": _versions(format),
        }
        os.replace(file, target)
    if target.parent.resolve() == model.folder.resolve():  # a file elsewhere may have the name of one here
        description = read_description(model.folder)  # anew: another export may have ended meanwhile
        exports = {**description.exports, target.name: entry}
        write_description(model.folder, description.model_copy(update={"exports": exports}))
    return entry


def _versions(format: Format) -> dict[str, str]:
    from importlib.metadata import version

    return {
        name: version(name) for name in ("torch", *(("onnx", "onnxruntime", "onnxscript") if format == "onnx" else ()))
    }


@contextmanager
def _refused(text: str) -> Iterator[None]:
    """Makes one line of whatever torch's exporters raise, and lets nothing else of theirs through."""
    logged = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # tracebacks of ways that they try before they find one
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as err:
        raise ConfigError(f"{text}: {printable(on_one_line(err, 200))}") from err
    finally:
        logging.disable(logged)


@contextmanager
def _in_time() -> Iterator[None]:
    """Raises TimeoutError in a block that takes more than _LONGEST_S: of sizes that a network computes with (the padding of `tf_` encoders),
    torch may work out what holds for all of them and not end. In the main thread, which alone can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"torch was not done after {_LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_LONGEST_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _traced(model: Model, options: ExportOptions) -> torch.export.ExportedProgram:
    graph = Graph(model.networks().values(), half=options.precision == "fp16")
    forms = ", ".join(f"{each.architecture} with {each.encoder}" for each in _described(model))
    if options.size is None:
        example, sides = torch.zeros((*_TRACED, 3), dtype=torch.uint8), torch.export.Dim.DYNAMIC
        shapes, text = ({0: sides, 1: sides, 2: sides},), f"{forms} cannot be exported for images of any size"
        height, width = model.description.inference.crop_px
        text += f" (give one, as --size {height} {width})"
    else:
        example, shapes = torch.zeros((1, *options.size, 3), dtype=torch.uint8), None
        text = f"{forms} cannot be exported for images of {options.size[0]}x{options.size[1]} px"
    with _refused(text), _in_time(), torch.no_grad():
        return torch.export.export(graph, (example,), dynamic_shapes=shapes, strict=False)


def _hint(options: ExportOptions) -> str:
    return "" if options.size else " for images of any size (give one: --size H W)"


def _described(model: Model) -> list[Any]:
    return [model.description.networks[name] for name in model.networks()]


def _write_onnx(program: torch.export.ExportedProgram, file: Path, real: RealImages, options: ExportOptions) -> int:
    """Writes an ONNX file and returns its opset."""
    with _refused(f"torch cannot write this model as ONNX{_hint(options)}"), torch.no_grad():
        written = torch.onnx.export(
            program,
            input_names=["image"],
            output_names=["labels", "probabilities"],
            opset_version=options.opset,
            dynamo=True,
            verbose=False,
        )
        assert written is not None
        written.save(file, external_data=False)
        if options.precision == "int8":
            _quantise(file, real.calibration)
    opset = int(written.model.opset_imports[""])
    if options.opset not in (None, opset):
        raise ConfigError(f"--opset {options.opset}: torch can make opset {opset} of this model alone.")
    return opset


def _quantise(file: Path, images: Iterable[Pixels]) -> None:
    """Makes int8 of the convolutions and matrix products of an ONNX file, in place, with ranges that real images have."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter([{"image": image[None]} for image in images])

        def get_next(self) -> dict[str, Pixels] | None:
            return next(self.feeds, None)

    prepared = file.with_name("prepared.onnx")
    quant_pre_process(file, prepared, skip_symbolic_shape=True)
    quantize_static(prepared, file, Reader(), op_types_to_quantize=["Conv", "Gemm", "MatMul"], per_channel=True)
    prepared.unlink()


def _onnx_run(file: Path) -> Run:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()  # as torch, so that speeds compare
    settings.log_severity_level = 4  # what it reports is raised, too
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])

    def run(image_NHW3: Pixels) -> tuple[Pixels, NDArray[np.float32]]:
        labels, prob = session.run(["labels", "probabilities"], {"image": image_NHW3})
        return labels, prob

    return run


def _torch_run(file: Path) -> Run:
    module = torch.export.load(file).module()

    @torch.inference_mode()
    def run(image_NHW3: Pixels) -> tuple[Pixels, NDArray[np.float32]]:
        labels, prob = module(torch.from_numpy(image_NHW3))
        return labels.numpy(), prob.numpy()

    return run


def _model_run(model: Model) -> Run:
    """Returns the model itself, as it predicts an image in one piece, at one scale and in float32."""
    whole = {"window_px": "whole", "stride_px": None, "scales": (1.0,), "flip": False, "autocast": "none"}
    inference, networks = model.description.inference.model_copy(update=whole), model.networks()

    def run(image_NHW3: Pixels) -> tuple[Pixels, NDArray[np.float32]]:
        *_, (_, found) = label_strips(inference, networks, _tensor(image_NHW3))
        return found.labels.numpy(), (found.prob / len(networks)).movedim(-1, 1).numpy()

    return run


def _tensor(image_NHW3: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image_NHW3)).permute(0, 3, 1, 2)


def left_out(model: Model) -> str:
    """Returns what of the model's way to predict a graph does not do, as a sentence, or ""."""
    inference = model.description.inference
    parts = [
        *([f"scales {inference.scales}"] if inference.scales != (1.0,) else []),
        *(["the mirrored view"] if inference.flip else []),
        *([f"autocast {inference.autocast}"] if inference.autocast != "none" else []),
    ]
    if inference.window_px != "whole":
        height, width = inference.window_px or inference.crop_px
        large = "" if inference.window_px else " of larger images"
        parts.append(f"windows of {height}x{width} px{large}")
    if model.description.bands or model.description.value_range:
        parts.append("bands and value_range of model.json, by which raw images become 8-bit RGB")
    return f"The file predicts an image in one piece. Left out: {', '.join(parts)}." if parts else ""


def _odd(image: Pixels) -> Pixels:
    """Returns two parts of an image whose sides are odd, as a batch."""
    height, width = (max(1, side * 2 // 3) | 1 if side > 2 else 1 for side in image.shape[:2])
    return np.stack([image[:height, :width], image[-height:, -width:]])


def _compare(model: Model, run: Run, real: RealImages, options: ExportOptions) -> dict[str, Any]:
    """Returns how far a file differs from the model. Raises CheckpointError where that is too far."""
    batches = [np.ascontiguousarray(image[None]) for image in real.images]
    runs = {"the model itself": _model_run(model), "the exported file": run}
    for name, each in runs.items():
        _answer(name, each, batches[0], options)  # the first call of either is slow
    seconds, largest, equal, equal_to_predict, pixels = [0.0, 0.0], 0.0, 0, 0, 0
    extra = [_odd(real.images[0])] if options.size is None else []
    for number, batch in enumerate([*batches, *extra]):
        answers = []
        for which, (name, each) in enumerate(runs.items()):
            start = time.perf_counter()
            answers.append(_answer(name, each, batch, options))
            seconds[which] += time.perf_counter() - start if number < len(batches) else 0.0
        (labels, prob), (other_labels, other_prob) = answers
        if other_labels.shape != labels.shape or other_prob.shape != prob.shape:
            raise CheckpointError(
                f"the exported file makes probabilities of shape {other_prob.shape} instead of {prob.shape}; nothing is kept of it."
            )
        # A nan differs from everything: max would pass it by.
        largest = max(largest, float(np.nan_to_num(np.abs(prob - other_prob), nan=np.inf).max()))
        equal += int((labels == other_labels).sum())
        predicted = np.concatenate([found.labels.numpy() for _, found in model.strips(_tensor(batch))], axis=1)
        equal_to_predict += int((predicted == other_labels).sum())
        pixels += labels.size
    parity = {
        "source": real.source,
        "images": len(batches),
        "sizes": sorted({f"{h}x{w}" for _, h, w, _ in (batch.shape for batch in [*batches, *extra])}),
        "largest_difference": largest,
        "equal_labels": equal / pixels,
        "equal_to_predict": equal_to_predict / pixels,
        "images_per_s": {"torch": len(batches) / seconds[0], "exported": len(batches) / seconds[1]},
        "threads": torch.get_num_threads(),
    }
    if options.precision == "float32":
        if not (largest <= options.tolerance and equal / pixels >= LEAST_EQUAL):
            raise CheckpointError(
                f"the exported file differs too far from the model: probabilities by up to {largest:.2g} (allowed: {options.tolerance:g}), "
                f"{100 * equal / pixels:.3f} % of the labels are equal (demanded: {100 * LEAST_EQUAL:g} %); nothing is kept of it."
            )
        return parity
    assert real.shards is not None
    before, after = _mean_ious(model, runs, real.shards, real.split, options)
    if not 100 * (before - after) <= options.tolerance_miou:
        raise CheckpointError(
            f"{options.precision} loses too much: mIoU {100 * after:.2f} % on {real.split} instead of {100 * before:.2f} % "
            f"(allowed: {options.tolerance_miou:g} points); nothing is kept of it."
        )
    return parity | {"miou": after, "miou_of_model": before, "split": real.split}


def _answer(name: str, run: Run, batch: Pixels, options: ExportOptions) -> tuple[Pixels, NDArray[np.float32]]:
    try:
        return run(batch)
    except Exception as err:  # of many types; one size may fail where another one passes
        size = "x".join(map(str, batch.shape[1:3]))
        raise CheckpointError(
            f"{name} cannot predict {len(batch)} image(s) of {size} px{_hint(options)}; nothing is kept: {on_one_line(err, 200)}"
        ) from err


def _mean_ious(
    model: Model, runs: Mapping[str, Run], shards: Shards, split: str, options: ExportOptions
) -> list[float]:
    """Returns the mIoU of several forms of a model on all images of a split that have masks."""
    classes, size = len(model.classes), options.size
    matrices = [torch.zeros(classes, classes, dtype=torch.int64) for _ in runs]
    for batch in eval_batches(shards, split, size_px=1):
        image, mask = batch.image[0].permute(1, 2, 0).numpy(), batch.mask[0].numpy()
        image, mask = (_resized(image, size), _resized(mask, size, mask=True)) if size else (image, mask)
        for matrix, (name, run) in zip(matrices, runs.items(), strict=True):
            labels, _ = _answer(name, run, np.ascontiguousarray(image[None]), options)
            matrix += confusion(torch.from_numpy(labels), torch.from_numpy(np.array(mask))[None], classes)[0]
    if not matrices[0].any():
        raise DataError(f"{shards.folder}: {split} must have images with masks, but has none.")
    return [mean_iou(matrix) for matrix in matrices]


def usage(file: Path, entry: Mapping[str, Any]) -> str:
    """Returns Python that uses an exported file."""
    height, width = entry["size"] or (0, 0)
    resized = f".resize(({width}, {height}))" if entry["size"] else ""
    photo = f'ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB"){resized}'
    if entry["format"] == "torch":
        return f"""\
import numpy as np, torch
from PIL import Image, ImageOps
module = torch.export.load({str(file)!r}).module()
image = torch.from_numpy(np.array({photo}))[None]
labels, probabilities = module(image)"""
    return f"""\
import numpy as np, onnxruntime
from PIL import Image, ImageOps
session = onnxruntime.InferenceSession({str(file)!r})
image = np.asarray({photo})[None]
labels, probabilities = session.run(["labels", "probabilities"], {{"image": image}})"""
