"""A sweep: one file with the training inline, the search space, the budget and what happens afterwards."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from cps_ray.config.section import RelativePath, Section
from cps_ray.config.train import NonNegativeInt, PositiveInt, TrainConfig

Scalar = bool | int | float | str

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(value: Any) -> Any:
    """`90s`, `10m`, `1.5h`, `2d` or a number of seconds -> seconds."""
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", value)
        if not found:
            raise ValueError(f"a duration is a number with s, m, h or d, such as 90s or 1.5h, but got {value!r}.")
        return float(found[1]) * _UNITS[found[2]]
    return value


Duration = Annotated[float, BeforeValidator(_seconds), Field(gt=0.0)]


class FloatParam(Section):
    """A real number in [low, high]."""

    type: Literal["float"]
    low: float
    high: float
    log: bool = False
    step: Annotated[float, Field(gt=0.0)] | None = None
    when: dict[str, Scalar | list[Scalar]] | None = None
    """Other parameters and the value, or values, under which this one is drawn; else `train` keeps its own."""


class IntParam(Section):
    """A whole number in [low, high]."""

    type: Literal["int"]
    low: Annotated[int, Field(strict=True)]
    high: Annotated[int, Field(strict=True)]
    log: bool = False
    step: PositiveInt | None = None
    when: dict[str, Scalar | list[Scalar]] | None = None


class ChoiceParam(Section):
    """One of the listed values."""

    type: Literal["choice"]
    values: Annotated[list[Scalar], Field(min_length=1)]
    when: dict[str, Scalar | list[Scalar]] | None = None


Param = Annotated[FloatParam | IntParam | ChoiceParam, Field(discriminator="type")]


class ObjectiveConfig(Section):
    """What the search maximises, on the validation split: every metric there is better when it is higher."""

    metric: str = "val/miou"
    select: Literal["best", "last"] = "best"
    """Which of a trial's evaluations counts."""

    def step(self, curve: Mapping[int, float]) -> int | None:
        """Step of the evaluation of `curve` (step -> value) that counts, the earlier one at a tie; None if no value is finite."""
        finite = sorted(step for step, value in curve.items() if math.isfinite(value))
        if not finite:
            return None
        return finite[-1] if self.select == "last" else max(finite, key=lambda step: curve[step])

    def value(self, curve: Mapping[int, float]) -> float | None:
        """Value of the evaluation of `curve` that counts; None if no value is finite."""
        step = self.step(curve)
        return None if step is None else curve[step]

    @field_validator("metric")
    @classmethod
    def _is_of_validation(cls, metric: str) -> str:
        if not metric.startswith("val/"):
            raise ValueError(
                f"must be a validation metric such as val/miou, but got {metric!r}. "
                "Searching on the test split is refused."
            )
        return metric


class BudgetConfig(Section):
    """The first limit reached ends the search cleanly."""

    trials: PositiveInt
    time: Duration | None = None
    """Wall time of the search, all its sessions together, without final runs. Trials it cuts short count as pruned."""


class SamplerConfig(Section):
    """How Optuna proposes the next trial."""

    type: Literal["tpe", "random", "qmc", "gp"] = "tpe"
    seed: NonNegativeInt = 0
    startup_trials: NonNegativeInt = 10
    """Random trials before the model takes over (tpe and gp)."""


class EarlyStoppingConfig(Section):
    """Which trials are stopped early, by `objective.metric` at steps."""

    type: Literal["asha", "median", "none"] = "asha"
    grace: PositiveInt = 1
    """Steps before a trial may be stopped: asha's first rung. At least as long as the longest ramp, or late bloomers are cut."""
    reduction: Annotated[int, Field(ge=2, strict=True)] = 3
    """asha: rungs lie at grace * reduction^k steps, and the best 1/reduction goes on."""


class FailuresConfig(Section):
    """What a sweep puts up with."""

    retries: NonNegativeInt = 1
    """Restarts of one training after a crash or a lost node; each goes on from the last checkpoint."""
    max_failed: PositiveInt = 10
    """Failed trials that stop the sweep (exit 4)."""
    max_consecutive: PositiveInt = 5
    """Failed trials in a row that stop the sweep (exit 4)."""


class FinalConfig(Section):
    """After the search: the best configuration and the baselines, trained over seeds and evaluated on the test split."""

    retrain: Literal["best", "none"] = "best"
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (1, 2, 3)
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings changed for these runs, such as a longer schedule."""


class SweepConfig(Section):
    """One sweep, complete."""

    version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output: RelativePath
    """The sweep folder is output/name."""
    train: TrainConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    budget: BudgetConfig
    sampler: SamplerConfig = SamplerConfig()
    early_stopping: EarlyStoppingConfig
    concurrency: Literal["auto"] | PositiveInt = "auto"
    """Trainings at once. auto: as many as the cluster holds, leaving Ray Data a whole CPU."""
    failures: FailuresConfig = FailuresConfig()
    search_space: Annotated[dict[str, Param], Field(min_length=1)]
    """Dotted names inside `train`."""
    enqueue: list[dict[str, Scalar]] = Field(default_factory=list)
    """Points tried first."""
    baselines: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name -> changes to the best configuration: same network, rate and steps, so that what differs is the change."""
    final: FinalConfig = FinalConfig()

    @model_validator(mode="after")
    def _grace_is_an_evaluation(self) -> Self:
        every = self.train.schedule.eval_every
        if self.early_stopping.type != "none" and self.early_stopping.grace % every:
            raise ValueError(
                f"`early_stopping.grace % train.schedule.eval_every == 0` must hold, "
                f"but got grace={self.early_stopping.grace}, eval_every={every}."
            )
        return self
