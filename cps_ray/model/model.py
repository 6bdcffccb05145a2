"""A model in Python: loaded from its folder, applied to images of any size."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cps_ray.config.train import ENSEMBLE
from cps_ray.datasets.images import to_rgb
from cps_ray.datasets.raster import Raster, UnreadableError, open_raster
from cps_ray.engine.inference import Labels, label_strips, window_of
from cps_ray.engine.networks import Segmenter, build_network
from cps_ray.errors import CheckpointError, ConfigError, DataError
from cps_ray.model.description import ModelDescription, NetworkDescription, read_description
from cps_ray.text import first_line, on_one_line

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

    ImageLike = str | os.PathLike[str] | PilImage | NDArray[Any]

Pixels = NDArray[np.uint8]
_ORIENTATION = 0x0112  # EXIF
_WINDOWS_PX = 2**18
"""Most pixels of windows that pass a network at once on a CPU, where more are no faster, but take memory: one of 512x512."""


class Model:
    """A trained model. Networks are loaded when they are first needed; use one Model per thread."""

    def __init__(
        self, folder: Path, description: ModelDescription, device: torch.device, network: str, *, plugins: bool = False
    ) -> None:
        self.folder = folder
        self.description = description
        self.device = device
        self.network = network
        """The network that predicts, or `ensemble` for all of them."""
        self._plugins = plugins
        self._loaded: dict[str, Segmenter] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; labels are their positions."""
        return self.description.classes

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """(r, g, b) in 0..255 of each class."""
        return self.description.palette

    def predict(self, image: ImageLike) -> Pixels:
        """Returns the class of each pixel: uint8 (H, W), of the upright image.

        `image`: a path; an image of Pillow; or an array (H, W), (H, W, 1) or (H, W, 3), RGB, of uint8 in 0..255 or of more bits, which are
        read as the training's images were (`value_range`). Raises DataError for any other.
        """
        image_13HW = self.to_tensor(image)
        return np.concatenate([found.labels[0].cpu().numpy() for name, found in self.strips(image_13HW)])

    def probabilities(self, image: ImageLike) -> NDArray[np.float32]:
        """Returns the probability of each class at each pixel: float32 (H, W, C). `image`: as in `predict`."""
        parts = []
        for name, found in self.strips(self.to_tensor(image)):
            summed = len(self.networks(name)) if name == ENSEMBLE else 1
            parts.append((found.prob[0] / summed).cpu().numpy())
        return np.concatenate(parts)

    def strips(self, image_N3HW: Tensor, *, all_networks: bool = False) -> Iterator[tuple[str, Labels]]:
        """Yields what `label_strips` does of images of one size on the model's device: of `network` alone, or of `all_networks` each
        and together."""
        networks = self.networks(ENSEMBLE if all_networks and len(self.description.networks) > 1 else self.network)
        inference = self.description.inference
        if self.device.type == "cpu":
            height, width = window_of(inference, *image_N3HW.shape[-2:]) or (1, 1)
            changes: dict[str, Any] = {
                "window_batch": min(inference.window_batch, max(1, _WINDOWS_PX // (height * width)))
            }
            if inference.autocast == "fp16":
                changes["autocast"] = "none"  # what only GPUs compute; trainings refuse it on a CPU
            inference = inference.model_copy(update=changes)
        for name, found in label_strips(inference, networks, image_N3HW):
            if all_networks or name == self.network:
                yield name, found

    def to_rgb(self, image: ImageLike) -> Pixels:
        """Returns an image as uint8 (H, W, 3) RGB, upright, as the training's images were made. `image`: as in `predict`."""
        if isinstance(image, str | os.PathLike):
            path = Path(image)
            try:
                data = path.read_bytes()
            except OSError as err:
                raise DataError(f"{path}: cannot be read: {err.strerror or err}.") from err
            try:
                return self._read(open_raster(data, path.name))
            except DataError as err:
                raise DataError(f"{path}: {err}") from err
        return self._read(_raster(image))

    def _read(self, raster: Raster) -> Pixels:
        bands, value_range = self.description.bands, self.description.value_range
        try:
            return to_rgb(raster, value_range, bands)[0]
        except UnreadableError as err:
            # Its remedies are settings of a recipe, which a model that is trained has no more.
            form = f"bands {bands} of which are red, green and blue" if bands else "grey or RGB"
            span = f"with values {value_range} as black and white" if value_range else "of unsigned integers"
            raise DataError(f"{err.found}; give it as the training's images were: {form}, {span}.") from err

    def to_tensor(self, image: ImageLike) -> Tensor:
        """Returns an image as uint8 (1, 3, H, W) on the model's device."""
        pixels = torch.from_numpy(np.array(self.to_rgb(image)))  # a copy: Pillow lets nobody write into its own
        return pixels.permute(2, 0, 1).unsqueeze(0).to(self.device)

    def networks(self, name: str = "") -> Mapping[str, Segmenter]:
        """Returns the networks that `name` (by default the model's `network`) takes, in evaluation mode on the model's device."""
        name = name or self.network
        names = [*self.description.networks] if name == ENSEMBLE else [name]
        for each in names:
            if each not in self._loaded:
                network = self._load(each)
                self._loaded[each] = network.to(self.device).eval().requires_grad_(False)
        return {each: self._loaded[each] for each in names}

    def _load(self, name: str) -> Segmenter:
        described = self.description.networks[name]
        path = self.folder / described.file
        if described.needs_plugins and not self._plugins:
            raise CheckpointError(
                f"{self.folder}: network {name} needs {' and '.join(described.needs_plugins)}, code outside cps_ray that would be run. "
                "If you trust it: load_model(..., plugins=True), or --plugins."
            )
        state = _read_weights(path)
        try:
            network = build_network(described.config(), len(self.classes), seed=0)
        except ConfigError as err:
            raise CheckpointError(f"{self.folder}: network {name} cannot be built: {err}") from err
        _check_fits(path, network, described, state, len(self.classes))
        network.network.load_state_dict(state)
        return network


def load_model(
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    network: str | None = None,
    plugins: bool = False,
) -> Model:
    """Returns the model in a folder such as best/ of a sweep.

    `device`: None for the first GPU, or the CPU without one. `network`: "a", "b", ..., or "ensemble" for the mean of all networks'
    probabilities; None for the one that the training was told to measure. `plugins`: whether code that the model names by import path
    may be run. Raises CheckpointError for a folder that is no model, ConfigError for a network or a device that there is not.
    """
    path = Path(folder)
    description = read_description(path)
    known = [*description.networks, *([ENSEMBLE] if len(description.networks) > 1 else [])]
    if network is not None and network not in known:
        raise ConfigError(f"network must be one of {', '.join(known)}, but got {network!r}.")
    model = Model(path, description, _device(device), network or description.network, plugins=plugins)
    model.networks()  # now: a file that does not fit is found before the first image
    return model


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        raise ConfigError(
            f"device must be one that torch has here, but got {str(name)!r}: {first_line(err)[:150]}"
        ) from err
    return device


def _raster(image: PilImage | NDArray[Any]) -> Raster:
    """Returns an image in memory as its file would be opened."""
    orientation = 1
    if not isinstance(image, np.ndarray):
        if not hasattr(image, "getexif"):
            raise DataError(f"image must be a path, an array or an image of Pillow, but is a {type(image).__name__}.")
        orientation = image.getexif().get(_ORIENTATION, 1)
        image = np.asarray(image if image.mode in ("L", "RGB", "I;16", "I", "F") else image.convert("RGB"))
    samples = image[..., None] if image.ndim == 2 else image
    if samples.ndim != 3 or 0 in samples.shape or samples.dtype.kind not in "uif":
        raise DataError(f"image must be (H, W) or (H, W, C) numbers, but has shape {image.shape} of {image.dtype}.")
    white = int(np.iinfo(samples.dtype).max) if samples.dtype.kind == "u" else None
    return Raster("array", samples, white, orientation=orientation if orientation in range(1, 9) else 1)


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        state: dict[str, Tensor] = load_file(path)
        return state
    except FileNotFoundError as err:
        raise CheckpointError(f"{path}: is missing. A model is its whole folder.") from err
    except Exception as err:  # a damaged file raises one of many types
        raise CheckpointError(f"{path}: must be safetensors, but cannot be read: {on_one_line(err, 200)}.") from err


def _check_fits(
    path: Path, network: Segmenter, described: NetworkDescription, state: dict[str, Tensor], num_classes: int
) -> None:
    """Raises CheckpointError unless the weights are of this network, tensor by tensor."""
    own: dict[str, Tensor] = network.network.state_dict()
    form = f"{described.architecture} with {described.encoder} and {num_classes} classes"
    missing, unknown = [key for key in own if key not in state], [key for key in state if key not in own]
    wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
    if wrong:
        shapes = f"{wrong[0]} is {tuple(state[wrong[0]].shape)} instead of {tuple(own[wrong[0]].shape)}"
        raise CheckpointError(f"{path}: must hold the weights of {form}, but {shapes}.")
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"also has {unknown[0]}"
        raise CheckpointError(f"{path}: must hold the weights of {form}, but {what}.")
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{path}: must hold finite weights, but {broken[0]} has nan or inf: its training diverged."
        )
    if described.divisor != network.divisor:
        raise CheckpointError(
            f"{path.parent}: the network takes sides of multiples of {network.divisor} px, but its model.json says {described.divisor}."
        )
