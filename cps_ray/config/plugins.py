"""What people plug in by import path, `module:name`: losses, methods, sinks, encoders, architectures."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from cps_ray.errors import ConfigError
from cps_ray.text import did_you_mean, first_line

if TYPE_CHECKING:
    from cps_ray.config.train import TrainConfig

IMPORT_PATH = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
ImportPath = Annotated[str, Field(pattern=IMPORT_PATH, strict=True)]
"""`module:name`. The module lies in the working directory or on PYTHONPATH, or is installed; on a cluster, on every node."""


class Sink(ABC):
    """Takes the metrics of one training, on the worker of rank 0. Base of sinks of one's own: a class that `sinks` names."""

    def __init__(self, config: TrainConfig, run_dir: Path, step: int) -> None:  # noqa: B027 (nothing need be kept)
        """`run_dir`: the training's folder. `step`: the one from which it starts or goes on; what was written of later ones comes again."""

    @abstractmethod
    def write(self, metrics: dict[str, float]) -> None:
        """Takes one evaluation: `step`, and everything that was measured, by name (`val/miou`).

        The process may be ended at any time after it, so nothing may wait for `close`.
        """

    def close(self) -> None:  # noqa: B027 (nothing need be closed)
        """Ends a training that has come to its end, or has failed."""


def load_sink(path: str) -> type[Sink]:
    """Returns the class at an import path. Raises ConfigError unless it is a sink."""
    plugin = load_plugin("sinks", path)
    if not (isinstance(plugin, type) and issubclass(plugin, Sink) and not inspect.isabstract(plugin)):
        raise ConfigError(
            f"sinks: {path} must be a subclass of cps_ray.Sink with `write(self, metrics)`, which takes a dict of name -> number."
        )
    return plugin


def is_import_path(name: str) -> bool:
    """Tells a plug-in from a name of ours, smp's or timm's: none of those has a colon."""
    return ":" in name


def load_plugin(setting: str, path: str) -> Any:
    """Returns what `path`, an import path, names. Raises ConfigError, which begins with `setting`."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as err:  # whatever a module raises while it is imported
        advice = " It must lie in the working directory or on PYTHONPATH." if _is_missing(err, module_name) else ""
        raise ConfigError(
            f"{setting}: {module_name} cannot be imported: {first_line(err).rstrip('.')}.{advice}"
        ) from err
    if not hasattr(module, name):
        known = [each for each in vars(module) if not each.startswith("_")]
        raise ConfigError(f"{setting}: {module_name} has no {name!r}.{did_you_mean(name, known)}")
    return getattr(module, name)


def _is_missing(err: BaseException, module: str) -> bool:
    return isinstance(err, ModuleNotFoundError) and f"{module}.".startswith(f"{err.name}.")
