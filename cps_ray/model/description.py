"""model.json: all that is needed to use a model's weights, in a form that is checked when it is read."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cps_ray import __version__
from cps_ray.config.plugins import is_import_path
from cps_ray.config.schema import parse
from cps_ray.config.section import Section
from cps_ray.config.train import (
    ColorMean,
    ColorStd,
    Fingerprint,
    InferenceConfig,
    NetworkConfig,
    OptionValue,
    PositiveInt,
)
from cps_ray.errors import CheckpointError, ConfigError
from cps_ray.files import write_json

MODEL_FOLDER = "best"
"""Name of the folder of a sweep's or a training's model."""
MODEL_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"
"""Weights of network a, under the name that smp and the Hugging Face hub expect."""
_LARGEST_BYTES = 10_000_000
_Channel = Annotated[int, Field(ge=0, le=255, strict=True)]


class NetworkDescription(Section):
    """One network: the file of its weights, how it is built and what it takes."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.safetensors$", strict=True)]
    """Name in the model's folder; never a path."""
    library: Literal["segmentation-models-pytorch", "cps_ray", "plug-in"]
    """Who builds it. smp: `create_model(architecture, encoder_name=encoder, encoder_weights=None, classes=..., **options)`. cps_ray: the
    paper's network. A plug-in, MODULE:NAME, must be at hand."""
    architecture: str
    encoder: str
    options: dict[str, OptionValue] = Field(default_factory=dict)
    mean: ColorMean
    """Mean per RGB channel that is subtracted from values in 0..1."""
    std: ColorStd
    """Standard deviation per RGB channel, by which the difference is divided."""
    divisor: PositiveInt
    """What the sides in px of the normalised image are padded to multiples of."""
    padding: Literal["mean colour, right and bottom"] = "mean colour, right and bottom"
    upsampling: Literal["bilinear, corners aligned"] = "bilinear, corners aligned"
    """How logits become as large as the padded image, whose padding is then cut off."""
    weights: dict[str, Any] = Field(default_factory=dict)
    """What the encoder began with: name, source, licence. The licence may bind the model."""

    @property
    def needs_plugins(self) -> list[str]:
        """Import paths of what is not part of any library here."""
        return [name for name in (self.architecture, self.encoder) if is_import_path(name)]

    def config(self) -> NetworkConfig:
        """Returns the network's form as a training has it, without weights."""
        form = {"architecture": self.architecture, "encoder": self.encoder, "options": self.options}
        return NetworkConfig(**form, mean=self.mean, std=self.std)


class ModelDescription(Section):
    """Content of model.json."""

    version: Literal[1]
    made_by: str = f"cps_ray {__version__}"
    network: str
    """The network that is used unless another one is asked for: a name of `networks`, or `ensemble`, the mean of the probabilities of
    all of them. It is the one that the training's best checkpoint was chosen by."""
    networks: dict[str, NetworkDescription]
    inference: InferenceConfig
    """Windows, scales and the like."""
    classes: Annotated[tuple[str, ...], Field(min_length=2, max_length=255)]
    palette: tuple[tuple[_Channel, _Channel, _Channel], ...]
    """(r, g, b) of each class."""
    ignore: Literal[255] = 255
    """Mask value of pixels that count nowhere."""
    bands: tuple[int, ...] | None = None
    """Numbers, from 1, of the bands of raw images that are red, green and blue. None: images are grey or RGB."""
    value_range: tuple[float, float] | tuple[tuple[float, float], ...] | None = None
    """Values that are black and white in images of more than 8 bits. None: all of their range."""
    orientation: Literal["as EXIF says"] = "as EXIF says"
    """How images are turned before they are predicted."""
    fingerprint: dict[str, Fingerprint] | None = None
    """Split -> fingerprint of the data that the model was trained and validated on."""
    exports: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """File of another form of the model -> how it was made, and how far it differs from this one."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "ModelDescription":
        if "a" not in self.networks:
            raise ValueError(f"`networks` must hold a, but has {', '.join(self.networks) or 'none'}.")
        if self.network not in {*self.networks, "ensemble"} or (self.network == "ensemble" and len(self.networks) < 2):
            raise ValueError(f"`network` must be one of {', '.join(self.networks)}, but is {self.network!r}.")
        if len(self.palette) != len(self.classes):
            raise ValueError(
                f"`palette` must have a colour for each of {len(self.classes)} classes, but has {len(self.palette)}."
            )
        return self


def read_description(folder: Path) -> ModelDescription:
    """Reads model.json of a model's folder. Raises CheckpointError."""
    path = folder / MODEL_FILE
    if not path.is_file():
        inner = next((each for each in ("best", "..") if (folder / each / MODEL_FILE).is_file()), None)
        hint = (
            f" Did you mean {folder / inner}?"
            if inner == "best"
            else f" Did you mean {folder.parent}?"
            if inner
            else ""
        )
        raise CheckpointError(
            f"{folder}: must be the folder of a model, such as best/ of a sweep, with {MODEL_FILE}, but has none.{hint}"
        )
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{path}: must be JSON, as an export writes it, but {err}.") from err
    found = raw.get("version") if isinstance(raw, dict) else None
    if found != 1:
        what = (
            f"version {found!r}"
            if found is not None
            else "no version: an export of an earlier cps_ray, or another file"
        )
        raise CheckpointError(
            f"{path}: must be of version 1, but has {what}. Remove {folder} and resume its sweep or training, which writes it again."
        )
    try:
        return parse(ModelDescription, raw, base=folder, where=lambda loc: str(path))
    except ConfigError as err:
        raise CheckpointError(str(err).split("\n")[0]) from err


def write_description(folder: Path, description: ModelDescription) -> None:
    """Writes model.json."""
    write_json(folder / MODEL_FILE, description.model_dump(mode="json"))
