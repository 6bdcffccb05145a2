"""The trial run: does a training fit together, and does it take its crops and images? Found out before any cluster starts.

Networks lie on torch's meta device, whose tensors have shapes and no memory: a ResNet's step at 800 px takes a second, not minutes.
Nothing is fetched from the hub. What was tried once is not tried again.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cps_ray.config.plugins import is_import_path
from cps_ray.config.schema import Where, dotted, first_sentences, settings, whole_names
from cps_ray.config.sweep import ChoiceParam, SweepConfig
from cps_ray.config.train import METHOD_SETTINGS, ComputeConfig, LossConfig, NetworkConfig, TrainConfig
from cps_ray.config.variants import Variant, variants
from cps_ray.config.yaml_reader import Loc
from cps_ray.engine.batch import Batch
from cps_ray.engine.inference import predict, window_of
from cps_ray.engine.losses import check_losses
from cps_ray.engine.methods import losses_of_networks
from cps_ray.engine.names import check_names, timm_cfg
from cps_ray.engine.networks import Segmenter, build_network
from cps_ray.engine.normalisation import planned_normalisation
from cps_ray.engine.pseudo_labels import MicroBatch
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import TrainState
from cps_ray.errors import CheckpointError, ConfigError
from cps_ray.text import first_line

_META = torch.device("meta")
_CLASSES = 2  # where the data, and with them the number of classes, are not there yet
_MOST_IMAGES = 2
"""Images of a kind that pass at once in a trial: what two pass, more do. One image alone is another case, see `_batch_of_one`."""

Size = tuple[int, int]
"""(height, width) in px."""


@dataclass(frozen=True, slots=True)
class TrialFault:
    """Why a training cannot run."""

    settings: tuple[str, ...]
    """Dotted names of the settings that it depends on; the likeliest to be wrong comes first."""
    text: str


class _DoesNotRunError(Exception):
    """Carries a fault out of a trial."""

    def __init__(self, text: str, *names: str) -> None:
        super().__init__(text)
        self.fault = TrialFault(names, text)


class _OneValueError(Exception):
    """Batch norm is to normalise one value per channel, which has no variance; torch refuses it, too."""


class _ShapesAlone(TorchFunctionMode):
    """Batch norm, resizing and random weights as what they do to shapes: on the meta device torch's own are in Python, and take most of
    the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _ON_META.get(func, func)(*args, **(kwargs or {}))


def _nearest(
    x: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "", align_corners: Any = None, **_: Any
) -> Tensor:
    """Takes the arguments of `F.interpolate`, and returns the same shape."""
    return F.interpolate(x, size, scale_factor)


def _scaled(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Takes the arguments of `F.batch_norm`, and returns the same shape with a gradient for its weight."""
    if training and x.numel() == x.shape[1]:
        raise _OneValueError
    broadcast = (-1, *[1] * (x.dim() - 2))
    return x.clone() if weight is None else x * weight.view(broadcast)


def _as_it_is(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


_ON_META: dict[Any, Callable[..., Tensor]] = {
    F.batch_norm: _scaled,
    F.interpolate: _nearest,
    **dict.fromkeys((Tensor.normal_, Tensor.uniform_, Tensor.erfinv_), _as_it_is),
}


class Preflight:
    """Tries trainings, each once."""

    def __init__(self, num_classes: int | None = None, image_sizes: Sequence[Size] = ()) -> None:
        """`num_classes`: None where it is not known yet. `image_sizes`: of the images that will be evaluated; empty: not known yet, and only
        crops are tried."""
        self._known_classes, self._num_classes = num_classes, num_classes or _CLASSES
        # If all images are of one size, it is both. Encoders of one fixed size do not take both of two sizes.
        self._image_sizes = dict.fromkeys(
            (max(image_sizes, key=_area), min(image_sizes, key=_area)) if image_sizes else ()
        )
        self._networks: dict[str, Segmenter | TrialFault] = {}
        self._trainings: dict[str, TrialFault | None] = {}

    @property
    def filled(self) -> list[str]:
        """Sentences on what files the encoders of the networks tried so far were filled by, each once."""
        networks = (network for network in self._networks.values() if isinstance(network, Segmenter))
        return [*dict.fromkeys(network.filled for network in networks if network.filled)]

    def fault(self, config: TrainConfig) -> TrialFault | None:
        """Returns why this training cannot run, or None: its networks are built, take one micro-batch forward and back as the method has
        it, and predict images of the smallest and the largest size, in the evaluation's way."""
        key = repr(_what_decides(config))
        if key not in self._trainings:
            self._trainings[key] = self._try(config)
        return self._trainings[key]

    def _try(self, config: TrainConfig) -> TrialFault | None:
        forms = {"model": config.model.of(0)}
        if config.networks > 1 and config.model.b is not None:
            forms["model.b"] = config.model.b
        try:
            networks = {place: self._network(place, form) for place, form in forms.items()}
            for place, network in networks.items():
                _try_crop(place, forms[place], network, config.data.crop_px, self._num_classes)
            _try_losses(config.loss, self._known_classes)
            _try_step(config, [*networks.values()])
            for place, network in networks.items():
                for size in self._image_sizes:
                    _try_image(config, place, forms[place], network, size)
        except _DoesNotRunError as err:
            return err.fault
        return None

    def _network(self, place: str, form: NetworkConfig) -> Segmenter:
        key = repr((place, form))
        if key not in self._networks:
            try:
                self._networks[key] = _build(place, form, self._num_classes)
            except _DoesNotRunError as err:
                self._networks[key] = err.fault
        found = self._networks[key]
        if isinstance(found, TrialFault):
            raise _DoesNotRunError(found.text, *found.settings)
        return found


def check_training(preflight: Preflight, config: TrainConfig, where: Where) -> None:
    """Raises ConfigError, beginning with FILE:LINE, if the training cannot run."""
    fault = preflight.fault(config)
    if fault is not None:
        loc = tuple(fault.settings[0].split("."))
        raise ConfigError(f"{where(loc)}: {dotted(loc)}: {fault.text}")


def check_sweep(preflight: Preflight, sweep: SweepConfig, where: Where) -> None:
    """Tries every combination of choices that shapes depend on, as a trial, as a final run and with each baseline.

    Raises ConfigError with a line for each place of the sweep file that makes trainings fail, beginning with FILE:LINE; ten lines at most.
    """
    faults: dict[Loc, str] = {}
    for together in variants(sweep, lambda name: _is_decisive(sweep, name)):
        for variant in together:
            fault = _fault_of(preflight, sweep, variant)
            if fault is None:
                continue
            values = variant.values(fault.settings)
            faults.setdefault(variant.blame(fault.settings), f"with {values}, {fault.text}" if values else fault.text)
            if not variant.is_baseline:
                break  # the other runs of this combination would fail for the same reason
    if faults:
        texts = {loc: whole_names(SweepConfig, ("train",), text) for loc, text in faults.items()}
        raise ConfigError(first_sentences(f"{where(loc)}: {dotted(loc)}: {text}" for loc, text in texts.items()))


def refusal(form: NetworkConfig, size_px: Size) -> str:
    """Returns why a network of this form does not take images of (height, width) px, or ""."""
    try:
        return _runs(_build("model", form.model_copy(update={"weights_file": None}), _CLASSES), size_px)
    except _DoesNotRunError as err:
        return err.fault.text


def _is_decisive(sweep: SweepConfig, name: str) -> bool:
    """Tells whether a trial run may depend on this searched setting."""
    section, param = name.split(".")[0], sweep.search_space[name]
    if section in ("model", "evaluation"):
        return True
    if name == "loss.supervised":  # only a plug-in may be wrong
        return isinstance(param, ChoiceParam) and any(is_import_path(str(value)) for value in param.values)
    # How a method divides its images into passes matters where one image may pass alone.
    in_words = isinstance(param, ChoiceParam) and all(isinstance(value, str) for value in param.values)
    return 1 in _images(sweep.train) and section in METHOD_SETTINGS and (in_words or name.endswith(".start"))


def _fault_of(preflight: Preflight, sweep: SweepConfig, variant: Variant) -> TrialFault | None:
    try:
        config = variant.config(sweep.train)
    except ConfigError as err:  # each change alone is valid: the reader has tried them
        return TrialFault(tuple(reversed(variant.changes)), first_line(err))
    return preflight.fault(config)


def _area(size: Size) -> int:
    return size[0] * size[1]


def _what_decides(config: TrainConfig) -> list[Any]:
    """Returns what the outcome of a trial depends on, beside the data."""
    form = (config.model, config.networks, config.data.crop_px, config.evaluation)
    return [*form, *_images(config), config.method, config.settings, config.loss]


def _images(config: TrainConfig) -> tuple[int, int]:
    """Returns the labelled and unlabelled images over which batch norm takes its statistics: those of one micro-batch of all workers
    that train a network together."""
    count = config.compute.accumulate
    unlabeled = config.data.unlabeled_batch // count if config.semi_supervised else 0
    return min(config.data.labeled_batch // count, _MOST_IMAGES), min(unlabeled, _MOST_IMAGES)


def _build(place: str, form: NetworkConfig, num_classes: int) -> Segmenter:
    bare = form.model_copy(update={"weights": "none"})
    try:
        check_names(form)
        try:
            # Among the warnings is that a weights_file's tensors fit, but have no place to go.
            with torch.device("meta"), _shapes_only():
                return build_network(bare, num_classes, seed=0)
        except ConfigError:
            # Some networks compute with values when they are built (mit_b0). An error that is one without the meta device, too, counts.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return build_network(bare, num_classes, seed=0).to(_META)
    except (ConfigError, CheckpointError) as err:
        raise _fault_of_build(place, form, str(err)) from err


def _fault_of_build(place: str, form: NetworkConfig, text: str) -> _DoesNotRunError:
    """Returns the fault for a sentence of the engine's, which begins with the setting if there is just one to blame."""
    setting, _, rest = text.partition(": ")
    name = setting.removeprefix("model.")
    if setting != name and name in settings(NetworkConfig):
        return _DoesNotRunError(rest, f"{place}.{name}")
    if form.weights_file is not None and text.startswith(str(form.weights_file)):
        if not form.weights_file.exists():
            return _DoesNotRunError(text, f"{place}.weights_file")
        return _DoesNotRunError(text, f"{place}.weights_file", f"{place}.encoder")
    return _DoesNotRunError(
        text.removeprefix("model: "), *(f"{place}.{name}" for name in ("encoder", "architecture", "options"))
    )


@contextmanager
def _shapes_only() -> Iterator[None]:
    with _ShapesAlone(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _image(count: int, size: Size) -> Tensor:
    return torch.empty(count, 3, *size, dtype=torch.uint8, device=_META)


def _runs(network: Segmenter, size: Size, num_classes: int | None = None) -> str:
    """Returns "" if the network takes an image of this size, and has logits of `num_classes`, else what it says."""
    network.eval()
    try:
        with torch.no_grad(), _shapes_only():
            coarse = network(_image(1, size))
    except Exception as err:  # networks come from elsewhere, and raise what they like
        return first_line(err)[:200].rstrip(".")
    shape = tuple(coarse.shape) if isinstance(coarse, Tensor) else (type(coarse).__name__,)
    as_it_must = len(shape) == 4 and shape[0] == 1 and num_classes in (None, shape[1])
    return "" if as_it_must else f"its output must be (1, {num_classes or 'C'}, h, w), but is {shape}"


def _try_crop(place: str, form: NetworkConfig, network: Segmenter, crop_px: Size, num_classes: int) -> None:
    problem = _runs(network, crop_px, num_classes)
    if problem:
        raise _DoesNotRunError(
            f"{form.encoder} in {form.architecture} does not take crops of {_px(crop_px)} (`data.crop_px`): {problem}."
            f"{_another_size(form, network, crop_px)}",
            *(f"{place}.{name}" for name in ("encoder", "architecture", "options")),
            "data.crop_px",
        )


def _try_image(config: TrainConfig, place: str, form: NetworkConfig, network: Segmenter, size: Size) -> None:
    """Predicts one image as an evaluation does: in windows, at all scales; mirrored it has the same shape."""
    inference = config.inference.model_copy(update={"flip": False})
    network.eval()
    try:
        with _shapes_only():
            predict(inference, network, _image(1, size))
    except Exception as err:  # see `_runs`
        names = [f"{place}.{name}" for name in ("encoder", "architecture", "options")]
        what, advice = f"images of {_px(size)}", ""
        window = window_of(inference, *size)
        if window is not None:
            names.insert(0, "evaluation.window_px")
            what = f"windows of {_px(window)}"
        else:
            advice = f" Set `evaluation.window_px`, such as to the crop's {[*config.data.crop_px]}, or choose another encoder."
        raise _DoesNotRunError(
            f"{form.encoder} in {form.architecture} takes crops of {_px(config.data.crop_px)}, but in evaluations not {what}: "
            f"{first_line(err)[:200].rstrip('.')}.{advice}",
            *names,
        ) from err


def _try_losses(loss: LossConfig, num_classes: int | None) -> None:
    try:
        check_losses(loss, num_classes)
    except ConfigError as err:
        name, _, text = str(err).partition(": ")
        raise _DoesNotRunError(text, name) from err


def _try_step(config: TrainConfig, networks: Sequence[Segmenter]) -> None:
    """Takes the losses of one micro-batch, as the method has them, forward and back: in the last step, and in the first, which may be one
    before the method's `start`."""
    # Without weights of classes, whose number may not be known yet: the data's own check counts them.
    quick = config.without_class_weights().model_copy(update={"compute": ComputeConfig()})
    count_L, count_U = _images(config)
    crop = config.data.crop_px
    mask = torch.empty(count_L, *crop, dtype=torch.uint8, device=_META)
    # As many views as the method has declared.
    views = [*(_image(count_U, crop) for _ in config.unlabeled_views), None, None, None]
    batch = Batch(_image(count_L, crop), mask, *views[:3])
    # Two networks of one form are one here, and a third is of a form that has been tried.
    named = dict(zip("ab"[: config.networks], [*networks, *networks], strict=False))
    for network in networks:
        network.train()
    state = TrainState(named, dict(named), {}, dict(named), {}, Ranks(device=_META))  # type: ignore[arg-type]
    micro = MicroBatch(batch, 0, torch.ones((), device=_META), observe=False)
    starts = config.settings is not None and config.settings.start > 0.0
    try:
        for state.step in (0, config.schedule.steps - 1) if starts else (0,):
            with _shapes_only():
                for losses, _ in zip(losses_of_networks(quick, state, micro), networks, strict=False):
                    losses["loss"].backward()  # type: ignore[no-untyped-call]
    except _OneValueError as err:
        raise _batch_of_one(config) from err
    except ConfigError as err:  # of a method of one's own
        raise _DoesNotRunError(str(err).removeprefix("method: "), "method", "custom") from err
    except Exception as err:  # see `_runs`
        raise _DoesNotRunError(
            f"a step of method {config.method} on crops of {_px(crop)} fails in {config.model.architecture} with "
            f"{config.model.encoder}: {first_line(err)[:200].rstrip('.')}.",
            *("model.encoder", "model.architecture", "model.options", "method", "data.crop_px"),
        ) from err


def _batch_of_one(config: TrainConfig) -> _DoesNotRunError:
    """Returns the fault of one image alone where batch norm follows a pooling to one cell: it has a single value per channel."""
    data, count = config.data, config.compute.accumulate
    sizes = {"labeled_batch": data.labeled_batch, "unlabeled_batch": data.unlabeled_batch}
    small = [
        name
        for name, size in sizes.items()
        if size // count == 1 and (config.semi_supervised or name == "labeled_batch")
    ]
    given = ", ".join(
        [*(f"data.{name}={sizes[name]}" for name in small), *([f"compute.accumulate={count}"] if count > 1 else [])]
    )
    return _DoesNotRunError(
        f"at least 2 images must pass {config.model.architecture} with {config.model.encoder} together, because its batch norm meets "
        f"maps of one cell, but method {config.method} passes 1 alone ({given}). Raise the batch"
        f"{', lower `compute.accumulate`' if count > 1 else ''} or choose an architecture without pooling to one cell, such as unet.",
        *(f"data.{name}" for name in small),
        *("compute.accumulate", *METHOD_SETTINGS, "model.architecture", "model.encoder", "model.b"),
    )


def _another_size(form: NetworkConfig, network: Segmenter, size: Size) -> str:
    """Returns advice with a size near this one that the network takes, tried; "" if none was found."""
    cfg = timm_cfg(form)
    if cfg is None:
        return ""
    _, height, width = cfg.input_size
    near = (max(1, round(size[0] / height)) * height, max(1, round(size[1] / width)) * width)
    for candidate in dict.fromkeys((near, (height, width))):
        if candidate != size and not _runs(network, candidate):
            return f" It does take {_px(candidate)}."
    return " Choose another encoder."


def _px(size: Size) -> str:
    return f"{size[0]}x{size[1]} px"


def searched_networks(sweep: SweepConfig) -> dict[str, str]:
    """Returns what images are normalised by, in words, for each encoder that trials may have."""
    found: dict[str, str] = {}
    for trial, *_ in variants(sweep, lambda name: name.startswith("model.")):
        model = trial.config(sweep.train).model
        for form in (model, model.b):
            if form is not None:
                found[form.encoder] = planned_normalisation(form)
    return found
