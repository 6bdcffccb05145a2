"""The shards that a config names, whether they were prepared or are to be drawn."""

from cps_ray.config.train import DataConfig
from cps_ray.datasets.shards import MANIFEST, Shards, open_shards
from cps_ray.datasets.synthetic import made_by, write_synthetic
from cps_ray.errors import DataError


def open_data(data: DataConfig) -> Shards:
    """Opens the shards of a config; synthetic ones are drawn on first use.

    Several processes may do so at once: one of them puts its folder in place, and the others use that one. DataError if the
    shards are missing, or were drawn with other settings.
    """
    if data.synthetic is None:
        return open_shards(data.shards, data.prepare)
    if not data.shards.exists():
        try:
            write_synthetic(data.shards, data.synthetic)
        except DataError:
            if not (data.shards / MANIFEST).exists():  # else another process was faster
                raise
    shards = open_shards(data.shards, data.prepare)
    found, wanted = shards.manifest.made_by.format, made_by(data.synthetic)
    if found != wanted:
        raise DataError(
            f"{data.shards}: these shards are ({found}), but the config asks for ({wanted}); "
            "remove the folder or set `data.shards` to another one."
        )
    return shards
