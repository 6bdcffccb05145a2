"""A trial as Ray Tune sees it: it asks for a training, and says when there is news of it.

It carries no results: the run's records lie in its folder, where the driver reads them. Its process does not train, so it is kept for the
next trial, and one that is lost takes no training with it: the trial's new process asks for the same one again.
"""

from typing import Any

import ray
from ray import tune

from cps_ray.on_ray.worker_groups import Training

_BYTES = 256 * 2**20
_BEAT_S = 1.0
"""How long it is silent at most: Tune can stop a trial only between two results."""


class TuneTrial(tune.Trainable):  # type: ignore[misc]
    """Has `config["training"]` trained by `pool`, the actor of `WorkerGroups`."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """Memory only: CPUs would be booked twice, as workers have their own placement group."""
        return tune.PlacementGroupFactory([{"memory": _BYTES}])

    def setup(self, config: dict[str, Any], pool: Any = None) -> None:
        self._pool = pool
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Takes the next trial. Always possible."""
        self._training: Training = new_config["training"]
        self._judged = 0
        ray.get(self._pool.begin.remote(self._training))
        return True

    def step(self) -> dict[str, Any]:
        """Returns within a second, at once when the training has reported or ended: the last result has `done`, with `failure` and `kind` if
        it failed. That Tune calls it again is the report's answer: the training goes on."""
        news = ray.get(self._pool.wait.remote(self._training.folder, self._judged, _BEAT_S))
        if news is None:
            ray.get(self._pool.begin.remote(self._training))
            return {}
        if news["outcome"] is not None:
            return {"done": True, **news["outcome"]}
        self._judged = news["reported"]
        return {"notice": news["notice"], "reported": news["reported"]}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Saves nothing: the training keeps its own."""
        return {}

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Loads nothing: the training finds its own."""

    def cleanup(self) -> None:
        """Ends the training, unless it has ended. Not waited for: whoever started the pool closes it."""
        self._pool.abandon.remote(self._training.folder)
