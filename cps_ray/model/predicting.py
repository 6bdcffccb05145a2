"""Photos predicted with a model: read, predicted and written side by side, in bounded memory."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cps_ray.config.train import ENSEMBLE
from cps_ray.datasets.show.picture import paint_mask
from cps_ray.engine.inference import entropy
from cps_ray.errors import ConfigError, DataError, at
from cps_ray.files import write_whole
from cps_ray.model.model import Model, Pixels
from cps_ray.model.photos import Photo, cut_into_chunks

# N images, H W pixels, R rows of a strip, C classes.
CHUNK_PX = {"cpu": 2**18, "cuda": 2**21}
"""Most pixels of photos that pass the networks together: on CPUs by caches, on GPUs launches cost more."""
_AHEAD = 1
"""Chunks that are read before they are predicted, and chunks whose files are still being written."""
_PAINTED_PX = 2**20
"""Pixels of an overlay that are painted at once."""

Record = dict[str, Any]
"""What is known of a photo when its files are complete, or why there are none (`error`); a line of JSON."""


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What is written of each photo beside its labels."""

    overlays: bool = True
    probabilities: bool = False
    certainty: bool = False
    entropy: bool = False
    disagreement: bool = False
    sure: float = 0.9
    """Probability from which a pixel counts as sure."""

    def files(self, name: str) -> dict[str, str]:
        """Returns what is written of a photo of this name: kind -> path."""
        suffixes = {"labels": "png", "overlays": "jpg", "probabilities": "npz"}
        kinds = ["labels", *(kind for kind in _OPTIONAL if getattr(self, kind))]
        return {kind: f"{kind}/{name}.{suffixes.get(kind, 'png')}" for kind in kinds}


_OPTIONAL = ("overlays", "probabilities", "certainty", "entropy", "disagreement")


@dataclass(frozen=True, slots=True)
class _Maps:
    """What a batch of photos became: uint8 (N, H, W), or float16 (N, H, W, C), by kind; figures by name and photo."""

    maps: dict[str, NDArray[Any]]
    figures: list[dict[str, Any]]


def check_options(model: Model, options: OutputOptions) -> None:
    """Raises ConfigError for what the model cannot give, CheckpointError if a network that is needed cannot be loaded."""
    if options.disagreement:
        if not {"a", "b"} <= {*model.description.networks}:
            raise ConfigError(f"--disagreement: needs a model of networks a and b, but {model.folder} has one alone.")
        model.networks(ENSEMBLE)


def cut_work(photos: Sequence[Photo], complete: Mapping[str, Record], device: str, threads: int) -> list[list[Photo]]:
    """Returns the chunks to predict on a type of device. They are cut from all photos, so that those that are not `complete` have the
    same companions whenever they are predicted, and so the same bytes."""
    known = {name: (record["height"], record["width"]) for name, record in complete.items()}
    chunks = cut_into_chunks(photos, known, CHUNK_PX.get(device.partition(":")[0], CHUNK_PX["cpu"]), threads)
    rest = ([photo for photo in chunk if photo.name not in complete] for chunk in chunks)
    return [chunk for chunk in rest if chunk]


def predict_chunks(
    model: Model, chunks: Iterable[Sequence[Photo]], out: Path, options: OutputOptions, threads: int
) -> Iterator[list[Record]]:
    """Writes the outputs of photos, and yields the records of each chunk when all of its files are complete.

    Threads read the next chunks and write the last ones while the networks compute. A file that is no image becomes a record with an
    `error`. The photos of a chunk pass the networks together as far as their sizes are equal.
    """
    cv2.setNumThreads(1)  # the threads are over photos
    pool = ThreadPoolExecutor(threads, thread_name_prefix="photos")
    writing: deque[list[Future[Record]]] = deque()
    try:
        for photos, read in _read_ahead(pool, model, chunks):
            writing.append(_predict_chunk(pool, model, photos, read, out, options))
            if len(writing) > _AHEAD:
                yield [future.result() for future in writing.popleft()]
        while writing:
            yield [future.result() for future in writing.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def _read_ahead(
    pool: ThreadPoolExecutor, model: Model, chunks: Iterable[Sequence[Photo]]
) -> Iterator[tuple[Sequence[Photo], list[Pixels | str]]]:
    """Yields each chunk with its pixels, or with why there are none."""
    pending: deque[tuple[Sequence[Photo], list[Future[Pixels | str]]]] = deque()
    for chunk in chunks:
        pending.append((chunk, [pool.submit(_read, model, photo) for photo in chunk]))
        if len(pending) > _AHEAD:
            photos, futures = pending.popleft()
            yield photos, [future.result() for future in futures]
            del futures  # else pixels would stay for a round more
    while pending:
        photos, futures = pending.popleft()
        yield photos, [future.result() for future in futures]
        del futures


def _read(model: Model, photo: Photo) -> Pixels | str:
    try:
        with at(photo.path):
            return model.to_rgb(photo.path)
    except DataError as err:
        return str(err).removeprefix(f"{Path(photo.path)}: ")


def _predict_chunk(
    pool: ThreadPoolExecutor,
    model: Model,
    photos: Sequence[Photo],
    read: Sequence[Pixels | str],
    out: Path,
    options: OutputOptions,
) -> list[Future[Record]]:
    """Predicts a chunk, and returns the records that its files will have."""
    futures = [
        pool.submit(_fail, out, options, _record(photo, error=why))
        for photo, why in zip(photos, read, strict=True)
        if isinstance(why, str)
    ]
    good = [(photo, pixels) for photo, pixels in zip(photos, read, strict=True) if not isinstance(pixels, str)]
    # A size that was looked up in a header may be wrong.
    for _, group in groupby(good, key=lambda pair: pair[1].shape):
        batch = [*group]
        # One alone is not copied, unless it is Pillow's, in which nobody may write.
        stacked = (
            np.stack([pixels for _, pixels in batch])
            if len(batch) > 1
            else np.require(batch[0][1], requirements="W")[None]
        )
        image_N3HW = torch.from_numpy(stacked).permute(0, 3, 1, 2)
        found = _predict(model, options, image_N3HW.to(model.device))
        for n, (photo, pixels) in enumerate(batch):
            maps = {kind: whole[n] for kind, whole in found.maps.items()}
            record = _record(photo, width=pixels.shape[1], height=pixels.shape[0], **found.figures[n])
            futures.append(pool.submit(_write, out, options, model.palette, pixels, maps, record))
    return futures


def _record(photo: Photo, **figures: Any) -> Record:
    where = {"name": photo.name, "path": os.path.abspath(photo.path)}
    return where | {"bytes": photo.bytes, "mtime_ns": photo.mtime_ns} | figures


def _predict(model: Model, options: OutputOptions, image_N3HW: Tensor) -> _Maps:
    images, _, height, width = image_N3HW.shape
    num_classes, area = len(model.classes), height * width
    parts: dict[str, list[NDArray[Any]]] = {kind: [] for kind in options.files("") if kind != "overlays"}
    pixels_NC = np.zeros((images, num_classes), np.int64)
    sums = {name: np.zeros(images) for name in ("certainty", "sure", "disagreement")}
    several = options.disagreement or model.network == ENSEMBLE
    summed = len(model.description.networks) if model.network == ENSEMBLE else 1
    pair: dict[str, Tensor] = {}
    # Strip by strip: the probabilities of a whole photo of many megapixels are gigabytes.
    for name, found in model.strips(image_N3HW, all_networks=several):
        if name in ("a", "b"):
            pair[name] = found.labels
        if len(pair) == 2:
            differ = pair["a"] != pair["b"]
            pair.clear()
            sums["disagreement"] += differ.sum((1, 2)).cpu().numpy()
            if options.disagreement:
                parts["disagreement"].append((differ.to(torch.uint8) * 255).cpu().numpy())
        if name != model.network:
            continue
        labels_NRW = found.labels.cpu().numpy()
        parts["labels"].append(labels_NRW)
        pixels_NC += np.stack([np.bincount(labels.ravel(), minlength=num_classes) for labels in labels_NRW])
        sums["certainty"] += found.certainty.sum((1, 2), dtype=torch.float64).cpu().numpy()
        sums["sure"] += (found.certainty >= options.sure).sum((1, 2)).cpu().numpy()
        if options.certainty:
            parts["certainty"].append(_in_8_bits(found.certainty))
        if options.entropy:
            parts["entropy"].append(_in_8_bits(entropy(found.prob / summed)))
        if options.probabilities:
            parts["probabilities"].append((found.prob / summed).half().cpu().numpy())
    if not several:
        del sums["disagreement"]
    figures = [
        # Six digits: the last ones depend on how many threads have summed.
        {name: round(float(total[n]) / area, 6) for name, total in sums.items()}
        | {"fractions": (pixels_NC[n] / area).round(6).tolist()}
        for n in range(images)
    ]
    return _Maps({kind: _joined(strips) for kind, strips in parts.items()}, figures)


def _in_8_bits(fraction: Tensor) -> Pixels:
    return np.asarray((fraction * 255).round_().clamp_(0, 255).to(torch.uint8).cpu().numpy(), np.uint8)


def _joined(strips: list[NDArray[Any]]) -> NDArray[Any]:
    return strips[0] if len(strips) == 1 else np.concatenate(strips, axis=1)


def _write(
    out: Path,
    options: OutputOptions,
    palette: Sequence[tuple[int, int, int]],
    pixels: Pixels,
    maps: dict[str, NDArray[Any]],
    record: Record,
) -> Record:
    """Writes the files of a photo, each whole or not at all, and returns its record."""
    for kind, file in options.files(record["name"]).items():
        path = out / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "overlays":
            overlay = np.empty_like(pixels)  # BGR
            # Some rows at a time: on the way, painting takes four times what it paints.
            rows = max(1, _PAINTED_PX // pixels.shape[1])
            for first in range(0, len(pixels), rows):
                part = slice(first, first + rows)
                overlay[part] = paint_mask(maps["labels"][part], palette, pixels[part])[..., ::-1]
            _, encoded = cv2.imencode(".jpg", overlay, [cv2.IMWRITE_JPEG_QUALITY, 90])
            del overlay
            write_whole(path, partial(_write_bytes, data=encoded.tobytes()))
        elif kind == "probabilities":
            write_whole(path, partial(_write_npz, probabilities=maps[kind]))
        else:
            image = Image.fromarray(maps[kind])
            if kind == "labels":
                image.putpalette(
                    [channel for color in palette for channel in color]
                )  # which makes it an image of indices
            write_whole(path, partial(image.save, format="PNG"))
    return record


def _fail(out: Path, options: OutputOptions, record: Record) -> Record:
    """Removes what was predicted when the file still was an image, and returns the record."""
    for file in options.files(record["name"]).values():
        (out / file).unlink(missing_ok=True)
    return record


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _write_npz(path: Path, probabilities: NDArray[np.float16]) -> None:
    with path.open("wb") as file:  # else numpy would put its own suffix after `.tmp`
        np.savez_compressed(file, probabilities=probabilities)
