"""cps_ray: sweeps of semi-supervised segmentation trainings with Cross Pseudo Supervision on Ray.

The names in `__all__` are the Python interface; each is imported when it is first used, so importing the package loads nothing.
"""

import os

TYPE_CHECKING = False  # that of `typing` would be an import
if TYPE_CHECKING:
    from cps_ray.config.plugins import Sink
    from cps_ray.config.reader import load_sweep, load_train
    from cps_ray.config.sweep import SweepConfig
    from cps_ray.config.train import MethodConfig, MixConfig, PseudoLabelConfig, TrainConfig
    from cps_ray.engine.batch import IGNORE, Batch
    from cps_ray.engine.losses import loss_on_masks
    from cps_ray.engine.methods import label_images, loss_on_labels
    from cps_ray.engine.passes import second_view, strong_views, student_logits, teacher_logits, weak_view
    from cps_ray.errors import CpsRayError
    from cps_ray.model.model import Model, load_model
    from cps_ray.results import open_sweep

# albumentations asks the package index for a newer version when it is imported: in each worker, behind whatever firewall.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

__version__ = "0.1.0"

_HOMES = {
    "cps_ray.config.plugins": ["Sink"],
    "cps_ray.config.reader": ["load_sweep", "load_train"],
    "cps_ray.config.sweep": ["SweepConfig"],
    "cps_ray.config.train": ["MethodConfig", "MixConfig", "PseudoLabelConfig", "TrainConfig"],
    "cps_ray.engine.batch": ["IGNORE", "Batch"],
    "cps_ray.engine.losses": ["loss_on_masks"],
    "cps_ray.engine.methods": ["label_images", "loss_on_labels"],
    "cps_ray.engine.passes": ["second_view", "strong_views", "student_logits", "teacher_logits", "weak_view"],
    "cps_ray.errors": ["CpsRayError"],
    "cps_ray.model.model": ["Model", "load_model"],
    "cps_ray.results": ["open_sweep"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "IGNORE",
    "Batch",
    "CpsRayError",
    "MethodConfig",
    "MixConfig",
    "Model",
    "PseudoLabelConfig",
    "Sink",
    "SweepConfig",
    "TrainConfig",
    "label_images",
    "load_model",
    "load_sweep",
    "load_train",
    "loss_on_labels",
    "loss_on_masks",
    "open_sweep",
    "second_view",
    "strong_views",
    "student_logits",
    "teacher_logits",
    "weak_view",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
