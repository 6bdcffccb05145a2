"""The network that a sweep's objective measures: by it checkpoints are kept, arms compared, and weights and pictures delivered."""

from collections.abc import Iterable

from cps_ray.config.sweep import measured_network
from cps_ray.config.train import NETWORK_NAMES, EvaluationConfig, TrainConfig
from cps_ray.engine.evaluation import further_scores
from cps_ray.on_ray.trainer import DEFAULT_METRIC
from cps_ray.results import HEADLINE


def own_metric(metric: str, config: TrainConfig) -> str:
    """Returns the objective as this training measures it: val/miou where a baseline has not the networks that the objective is of."""
    of_peers = {*further_scores(EvaluationConfig(), len(NETWORK_NAMES))}
    missing = of_peers - {*further_scores(config.evaluation, config.networks)}
    return DEFAULT_METRIC if metric.removeprefix("val/") in missing else metric


def headline_score(metric: str, scores: Iterable[str]) -> str:
    """Returns the test score by which an arm with these scores is compared: the mIoU of the objective's network, or of its only one."""
    wanted = f"test/{measured_network(metric)}/miou"
    return wanted if wanted in scores else HEADLINE
