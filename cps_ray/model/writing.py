"""The folder of a model, written: weights, how to use them, their training, their scores and a card for people."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cps_ray.config.plugins import is_import_path
from cps_ray.config.train import NETWORK_NAMES, TrainConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.datasets.shards import Manifest
from cps_ray.engine.deeplab import ARCHITECTURE as DEEPLAB
from cps_ray.engine.encoders import weights_of
from cps_ray.engine.networks import Segmenter, create_model_options
from cps_ray.engine.vit import ARCHITECTURE as DPT
from cps_ray.files import write_json, write_text
from cps_ray.model.card import Arms, model_card
from cps_ray.model.description import WEIGHTS_FILE, ModelDescription, NetworkDescription, write_description

CARD_FILE = "README.md"
METRICS_FILE = "metrics.json"
_HUB_CONFIG = "config.json"


def write_model(
    folder: Path,
    config: TrainConfig,
    networks: Mapping[str, Segmenter],
    manifest: Manifest,
    metrics: Mapping[str, Any],
    *,
    network: str = "a",
    arms: Arms | None = None,
) -> ModelDescription:
    """Writes a training's networks, with all that is needed to use them, into an empty folder.

    `networks`: all of the training, averaged where averages are on. `network`: the one that is used by default, or ENSEMBLE. `metrics`:
    their scores, which become metrics.json as they are. `arms`: mean and deviation over seeds, for the card.
    """
    described = {}
    for name, segmenter in networks.items():
        form = config.model.of(NETWORK_NAMES.index(name))
        file = WEIGHTS_FILE if name == "a" else f"model-{name}.safetensors"
        # safetensors stores memory as it lies and would refuse channels_last.
        # The inner network alone, so that smp loads the file by itself; normalisation is in model.json.
        weights = {key: value.contiguous() for key, value in segmenter.network.state_dict().items()}
        save_file(weights, folder / file, metadata={"format": "pt"})
        plugged_in = is_import_path(form.architecture) or is_import_path(form.encoder)
        ours = form.architecture == DEEPLAB
        described[name] = NetworkDescription(
            file=file,
            library="plug-in"
            if plugged_in
            else "cps_ray"
            if ours or _is_changed(segmenter)
            else "segmentation-models-pytorch",
            architecture=form.architecture,
            encoder=form.encoder,
            options=form.options if ours else create_model_options(form),
            mean=_channels(segmenter.mean),
            std=_channels(segmenter.std),
            divisor=segmenter.divisor,
            weights=weights_of(form).record(),
        )
    description = ModelDescription(
        version=1,
        network=network,
        networks=described,
        inference=config.inference,
        classes=manifest.classes,
        palette=manifest.palette,
        bands=manifest.bands,
        value_range=manifest.value_range,
        fingerprint=config.data.fingerprint,
    )
    write_description(folder, description)
    write_text(folder / "config.yaml", dump_yaml(config.dump(str(folder)), "The training that made this model."))
    write_json(folder / METRICS_FILE, metrics)
    write_text(folder / CARD_FILE, model_card(description, config, metrics, manifest, arms))
    if described["a"].library == "segmentation-models-pytorch":
        _write_hub_config(folder, networks["a"])
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors lets only the owner read; a model is there to be shared
    return description


def _is_changed(segmenter: Segmenter) -> bool:
    """Whether the network is smp's, but `fit_patches` has given it other layers, so that smp alone cannot load it."""
    head = getattr(segmenter.network, "segmentation_head", None)
    is_dpt = type(segmenter.network).__name__.lower() == DPT
    return is_dpt and float(getattr(head, "upsampling_factor", 2.0)) != 2.0


def _channels(buffer: Tensor) -> tuple[float, ...]:
    """Returns the fewest digits of which a Segmenter makes these very values: 0.485, not 0.48500001430511475."""
    return tuple(
        next(short for digits in range(2, 20) if torch.tensor(short := round(value / 255, digits)) * 255.0 == value)
        for value in buffer.flatten().tolist()
    )


def _write_hub_config(folder: Path, segmenter: Segmenter) -> None:
    """Writes what `smp.from_pretrained(folder)` reads."""
    network: Any = segmenter.network
    write_json(
        folder / _HUB_CONFIG, {**network.config, "encoder_weights": None, "_model_class": type(network).__name__}
    )
