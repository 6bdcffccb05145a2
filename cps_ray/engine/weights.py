"""Encoder weights from a local file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cps_ray.errors import CheckpointError
from cps_ray.text import first_line

_COUNTER = "num_batches_tracked"  # of BatchNorm; files from before torch 0.4.1 lack it, and only momentum=None reads it


def load_encoder(encoder: nn.Module, name: str, path: Path) -> None:
    """Weights of a local file (.safetensors, or .pt/.pth read without unpickling code) into an encoder; every key must fit.

    `name` is the encoder's as in the config. The file holds tensors by name, also inside `state_dict` or `model`, also
    with `module.` before every name: the encoder's own state, or that of the whole classifier it was taken from (of
    timm's layout for a `tu-` encoder), whose parts after the encoder are left out. Raises CheckpointError.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: model.weights_file does not exist. Paths are relative to the config file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # a damaged file raises one of many types
        raise CheckpointError(f"{path}: cannot be read as weights: {first_line(err)[:200]}") from err
    try:
        state = _unwrapped(content)
        encoder.load_state_dict(_of_timm(encoder, name, state) if name.startswith("tu-") else state)
    except (RuntimeError, TypeError, AttributeError, KeyError, ValueError) as err:
        # torch's first line only names the class; the two after it say which keys are missing or have other shapes.
        lines = [line.strip() for line in str(err).splitlines()] or [""]
        detail = " ".join(lines[1:3] if len(lines) > 1 else lines)[:300]
        raise CheckpointError(
            f"{path}: every key must fit the encoder {name}, but {detail} Choose the encoder this file was made for."
        ) from err


def _unwrapped(content: Any) -> dict[str, Tensor]:
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict):
        raise TypeError(f"the file holds a {type(content).__name__}.")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{key} is a {type(value).__name__}.")
    prefix = "module." if all(str(key).startswith("module.") for key in content) else ""
    return {str(key).removeprefix(prefix): value for key, value in content.items()}


def _of_timm(encoder: nn.Module, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a timm model's file by the encoder's keys. Raises ValueError for what fits nowhere."""
    own: dict[str, Tensor] = encoder.state_dict()
    found = {key: value for key, value in own.items() if key.endswith(_COUNTER)}  # the file's own, if any, replace them
    taken: set[str] = set()
    left: dict[str, Tensor] = {}
    for key, value in state.items():
        target = next((k for k in _keys_in_encoder(key) if k in own), None)
        if target is None:
            left[key] = value
        elif target in taken:
            raise ValueError(f"{key} and another key both fit {target}.")
        else:
            taken.add(target)
            found[target] = value
    if lacking := [key for key in own if key not in found]:
        raise ValueError(f"the file lacks {_first_and_rest(lacking)}.")
    if left:
        _check_left_out(left, name)
    _check_shapes(found, own)
    return found


def _keys_in_encoder(key: str) -> list[str]:
    """Names that a key of the whole timm model may have in the encoder, where smp and timm's feature extractors wrap it."""
    # timm's FeatureListNet makes the children of a Sequential its own: stages.0 -> stages_0
    flat = key.replace(".", "_", 1)
    return [key, f"model.{key}", f"model.{flat}", f"model.model.{key}", f"model.body.{key}"]


def _check_left_out(left: dict[str, Tensor], name: str) -> None:
    """Raises ValueError unless these are parts of the whole timm model; a classifier may be one for other classes."""
    import timm

    with torch.device("meta"):  # shapes without memory
        model = timm.create_model(name.removeprefix("tu-"))
    model_state: dict[str, Tensor] = model.state_dict()
    if unknown := [key for key in left if key not in model_state]:
        raise ValueError(f"the file has the unknown {_first_and_rest(unknown)}.")
    heads = model.default_cfg["classifier"] or ()
    prefixes = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    _check_shapes({key: value for key, value in left.items() if not key.startswith(prefixes)}, model_state)


def _check_shapes(found: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    wrong = [
        f"{key} of shape {tuple(value.shape)} instead of {tuple(own[key].shape)}"
        for key, value in found.items()
        if value.shape != own[key].shape
    ]
    if wrong:
        raise ValueError(f"the file has {_first_and_rest(wrong)}.")


def _first_and_rest(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{words[0]} and {len(words) - 1} more"
