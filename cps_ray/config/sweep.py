"""The schema of a sweep: the training, the search space, the budget, and what happens after the search."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from cps_ray.config.schema import parse
from cps_ray.config.section import Regex, RelativePath, Section
from cps_ray.config.train import ENSEMBLE, NETWORK_NAMES, NonNegativeInt, PositiveInt, Seed, TrainConfig

Scalar = bool | int | float | str
Value = Scalar | list[Scalar] | None
"""What a setting may be set to by a search."""
When = dict[str, Scalar | list[Value] | None]
"""Other parameters, each with a value or a list of values. A value that is itself a list stands in a list."""

BEST_ARM = "best"
"""Name of the best configuration among the baselines' names."""
FINGERPRINT = "train.data.fingerprint"
"""Setting of a sweep that `--set ...=null` takes away, so that it goes on with other data."""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = r"^\s*(\d+(?:\.\d+)?)\s*([smhd])\s*$"


def seconds(value: Any) -> Any:
    """Returns the seconds of `90s`, `10m`, `1.5h` or `2d`; anything else as it is, for pydantic to check."""
    if isinstance(value, str):
        match = re.fullmatch(_DURATION, value)
        if not match:
            raise ValueError(f"a duration is a number with s, m, h or d, such as 90s or 1.5h, but got {value!r}.")
        return float(match[1]) * _UNITS[match[2]]
    return value


_Written = Annotated[float, Field(gt=0.0)] | Annotated[str, Field(pattern=_DURATION)]
Duration = Annotated[float, BeforeValidator(seconds, json_schema_input_type=_Written), Field(gt=0.0)]


class FloatParam(Section):
    """Parameter whose values are the real numbers in [low, high]."""

    type: Literal["float"]
    low: float
    high: float
    log: bool = False
    step: Annotated[float, Field(gt=0.0)] | None = None
    when: When | None = None
    """Other parameters, each with the value, or list of values, for which this one is drawn. Otherwise the setting keeps the value
    that it has in `train`. A value that is itself a list stands in a list: `[[64, 96]]`."""


class IntParam(Section):
    """Parameter whose values are the whole numbers in [low, high]."""

    type: Literal["int"]
    low: Annotated[int, Field(strict=True)]
    high: Annotated[int, Field(strict=True)]
    log: bool = False
    step: PositiveInt | None = None
    when: When | None = None


class ChoiceParam(Section):
    """Parameter whose values are listed: numbers, texts, true, false, null, or lists of them."""

    type: Literal["choice"]
    values: Annotated[list[Value], Field(min_length=1)]
    when: When | None = None


Param = Annotated[FloatParam | IntParam | ChoiceParam, Field(discriminator="type")]


class ObjectiveConfig(Section):
    """The metric of the validation split that the search maximises. Calibration errors (`val/ece`) are refused: lower is better there."""

    metric: str = "val/miou"
    select: Literal["best", "last"] = "best"
    """Which evaluation of a trial counts: the highest one, or the last."""

    def step(self, curve: Mapping[int, float]) -> int | None:
        """Returns the step of the evaluation in `curve` (step -> value) that counts, the earlier one at a tie; None if no value is
        finite."""
        finite = sorted(step for step, value in curve.items() if math.isfinite(value))
        if not finite:
            return None
        return finite[-1] if self.select == "last" else max(finite, key=lambda step: curve[step])

    def value(self, curve: Mapping[int, float]) -> float | None:
        """Returns the value of the evaluation in `curve` that counts; None if no value is finite."""
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
        if re.fullmatch(rf"val/([{NETWORK_NAMES}]/|ensemble/)?ece", metric):
            raise ValueError(
                f"must be better the higher it is, such as val/miou, but got {metric!r}, an error: 0 is best."
            )
        return metric


def measured_network(metric: str) -> str:
    """Returns the name of the network that a metric is of: `b` of val/b/miou, ENSEMBLE of val/ensemble/miou, `a` of all others."""
    name = metric.split("/")[1]  # slices never have a network's name
    return name if name in {*NETWORK_NAMES, ENSEMBLE} else "a"


class BudgetConfig(Section):
    """Limits of the search; the first one that is reached ends it in good order."""

    trials: PositiveInt
    time: Duration | None = None
    """Wall time of the search phase, all sessions together. Trials that it cuts short count as pruned."""
    patience: PositiveInt | None = None
    """Trials that may end, one after the other, without a better value than the best so far; then no further one begins. Pruned and
    failed ones count. null: no limit."""


class SamplerConfig(Section):
    """How Optuna proposes the next trial."""

    type: Literal["tpe", "random", "grid", "qmc", "gp", "cmaes"] = "tpe"
    """`grid`: every combination of choices, whole numbers and ranges with a step, once each, in an order drawn by `seed`. `cmaes`:
    models numbers alone and draws choices at random; it needs the extra `cmaes`."""
    seed: Seed = 0
    startup_trials: NonNegativeInt = 10
    """Number of random trials before the model takes over (tpe, gp and cmaes)."""


class EarlyStoppingConfig(Section):
    """Which trials are stopped early, by comparing `objective.metric` at equal steps."""

    type: Literal["asha", "hyperband", "median", "none"] = "asha"
    """`hyperband`: trials are divided among several `asha`, whose first rungs lie at grace, grace * reduction, ... steps."""
    grace: PositiveInt = 1
    """Steps before a trial may be stopped; asha's first rung. Must not lie inside the ramp of the method's weight: before its end a
    trial does not show what it can reach."""
    reduction: Annotated[int, Field(ge=2, strict=True)] = 3
    """asha and hyperband: rungs lie at grace * reduction^k steps, and the best 1/reduction of the trials continue."""


class FailuresConfig(Section):
    """How many failures a sweep tolerates."""

    retries: NonNegativeInt = 1
    """Restarts of one training after a crash or a lost node; each continues from the last checkpoint."""
    max_failed: PositiveInt = 10
    """Number of failed or collapsed trials that stops the sweep (exit 4)."""
    max_consecutive: PositiveInt = 5
    """Number of failed or collapsed trials in a row that stops the sweep (exit 4)."""
    on_oom: Literal["fail", "halve"] = "fail"
    """What follows when a training runs out of memory: it fails, or goes on from its last checkpoint in micro-batches of half the size
    (`compute.accumulate` doubled), and its trial is marked, because batch norm then sees half as many crops at once."""
    trial_timeout: Duration | None = None
    """Longest time that a training may take, from the start of its workers to its end; one that takes longer fails. null: no limit."""
    first_report_timeout: Duration | None = None
    """Longest time from the start of a training's workers to its first evaluation, which comes after `schedule.eval_every` steps; one that
    takes longer hangs, and fails with what it was waiting for. null: no limit, because no number is right for every network and machine.
    Choose several times what one takes that works."""

    @model_validator(mode="after")
    def _first_report_is_the_sooner(self) -> Self:
        first, whole = self.first_report_timeout, self.trial_timeout
        if first is not None and whole is not None and first >= whole:
            raise ValueError(
                f"`first_report_timeout < trial_timeout` must hold, but got {first:g} s and {whole:g} s: it would have no effect."
            )
        return self


class FinalConfig(Section):
    """The final phase: the best configuration and the baselines are trained with several seeds and evaluated on the test split."""

    retrain: Literal["best", "none"] = "best"
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (1, 2, 3)
    draws: Annotated[int, Field(ge=2, strict=True)] | None = None
    """Instead of `seeds`: so many draws of the labelled images, with `data.subset_seed` and `seed` 1, 2, ... With few labels, which ones they are
    makes more difference than the seed."""
    folds: Annotated[int, Field(ge=2, strict=True)] | None = None
    """Instead of `seeds`, for few masks: cross-validation over all labelled images, those of val and test included. Each fold is held out once, and is
    the test of the trainings on the others, one an arm; the model that is delivered is trained on all of them."""
    nested: bool = False
    """Whether the search is made again in each of the `folds`, choosing by another fold, so that no image that is tested on has chosen anything.
    It costs a search a fold."""
    group_by: Regex | None = None
    """Pattern: images whose ids agree in its first group, or in all it matches, such as frames of one video, come into one fold, and are drawn together for
    the interval of the verdict."""
    top: PositiveInt = 1
    """How many of the best trials are trained again over the seeds; the best of them by the mean over seeds is compared and delivered."""
    curve: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] = ()
    """Fractions of the labelled, and of the unlabelled, images with which the best configuration and the first baseline are trained again: what
    more labels, and more images, would bring."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted names and values of settings that are changed for the final runs, such as a longer schedule."""

    @model_validator(mode="after")
    def _one_kind_of_repeats(self) -> Self:
        if self.draws and self.folds:
            raise ValueError(
                "`draws` and `folds` exclude each other: draws are for many masks, folds for few. Remove one."
            )
        if self.nested and (self.folds or 0) < 3:
            raise ValueError(
                "`nested` needs at least 3 `folds`: one to test on, one to choose by, one to train on. Set `folds`, or remove `nested`."
            )
        if self.folds and self.top > 1:
            raise ValueError(
                "`top` would choose by the images of the folds, which are the test. Remove one of `top` and `folds`."
            )
        if self.folds and self.retrain == "none":
            raise ValueError("`folds` compare trainings after the search, but `retrain: none` makes none. Remove one.")
        if self.folds and self.curve:
            raise ValueError("`curve` needs a test split, but with `folds` there is none. Remove one.")
        return self

    @property
    def repeats(self) -> tuple[int, ...]:
        """Number of each training of an arm: its seed, draw or fold, each from 1."""
        return tuple(range(1, (self.draws or self.folds or 0) + 1)) or self.seeds

    @property
    def repeat_name(self) -> str:
        """What an arm's trainings differ in."""
        return "draw" if self.draws else "fold" if self.folds else "seed"

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        repeated = [seed for number, seed in enumerate(seeds) if seed in seeds[:number]]
        if repeated:
            raise ValueError(f"lists {repeated[0]} twice: a run with the same seed is the same run. Remove one.")
        return seeds


class BaselineConfig(Section):
    """What a baseline says beside its changes."""

    search: tuple[str, ...] = ()
    """Parameters of the search space that are searched for the baseline, too, as they were for the best configuration: in a study of its own,
    which begins with the values of the best one. Without any, the baseline takes those values, and the verdict says `not tuned`."""
    trials: PositiveInt | None = None
    """Number of trials of that search. null: as many as the sweep has begun."""
    train_on: Literal["labeled", "labeled+val"] = "labeled"
    """`labeled+val`: the masks of the val split are trained on, too. Nothing can then be chosen by them: the values of the best configuration
    are taken, and the last step."""

    @model_validator(mode="after")
    def _val_does_not_choose(self) -> Self:
        if self.search and self.train_on == "labeled+val":
            raise ValueError("`search` needs val to choose by, but `train_on: labeled+val` trains on it. Remove one.")
        if self.trials is not None and not self.search:
            raise ValueError("`trials` is the number of trials of a `search`, but there is none.")
        return self


class SweepConfig(Section):
    """One sweep, complete."""

    version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output: RelativePath
    """Folder of sweep folders: this sweep's is output/name."""
    train: TrainConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    budget: BudgetConfig
    sampler: SamplerConfig = SamplerConfig()
    early_stopping: EarlyStoppingConfig
    concurrency: Literal["auto"] | PositiveInt = "auto"
    """Trainings at once. auto: as many as the cluster can hold while a whole CPU is left to Ray Data."""
    failures: FailuresConfig = FailuresConfig()
    search_space: Annotated[dict[str, Param], Field(min_length=1)]
    """Dotted name of a setting of `train` -> its range or its values."""
    enqueue: list[dict[str, Value]] = Field(default_factory=list)
    """Points that are tried right after trial 0, which has the values of `train` wherever they lie in the search space: dotted name ->
    value."""
    warm_start: list[RelativePath] = Field(default_factory=list)
    """Folders of earlier sweeps: the sampler learns from their trials, as far as these lie in this search space."""
    baselines: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name -> changes to the best configuration. Everything else, such as network, rate and steps, stays the same, so that only the
    changes make a difference; and what `BaselineConfig` says: what is searched for the baseline, too."""
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

    @model_validator(mode="after")
    def _nested_repeats_a_search(self) -> Self:
        if self.final.nested and self.budget.trials == 1:
            raise ValueError(
                "`final.nested` makes the search again in each fold, but with `budget.trials: 1` there is none. Remove `nested`."
            )
        return self

    @property
    def num_searches(self) -> int:
        """How often the search space is searched: more than once with `final.nested`."""
        return self.final.folds if self.final.folds and self.final.nested else 1

    @property
    def num_final_runs(self) -> int:
        """Number of trainings after the search."""
        final, arms = self.final, 1 + len(self.baselines)
        if final.retrain == "none":
            return 0
        fewer = len({*final.curve} - {1.0}) * (min(2, arms) + self.train.semi_supervised)
        return len(final.repeats) * (arms + final.top - 1 + fewer) + bool(final.folds)

    def fold(self, held_out: int | None, aside: int | None = None) -> dict[str, Any]:
        """Returns the changes that make a training one of a cross-validation, with fold `held_out` or none held out; {} without `final.folds`."""
        if self.final.folds is None:
            return {}
        folds = {"count": self.final.folds, "held_out": held_out, "aside": aside, "group_by": self.final.group_by}
        return {"data.folds": folds, "data.further_labeled": ["val", "test"]}

    def searched_fold(self, repeat: int = 1) -> dict[str, Any]:
        """Returns the changes that make a training a trial of the search before the `repeat`-th final runs: it chooses by the fold that these are
        tested on, the first one, or with `final.nested` by the next one."""
        if not self.final.nested:
            return self.fold(0)
        return self.fold(repeat % (self.final.folds or 1), aside=repeat - 1)

    def baseline(self, name: str) -> BaselineConfig:
        """Returns what a baseline says beside its changes. Raises ConfigError if that is not what it must be."""
        return parse(
            BaselineConfig, {k: v for k, v in self.baselines[name].items() if k in BaselineConfig.model_fields}
        )

    def changes(self, name: str) -> dict[str, Any]:
        """Returns the changes that a baseline makes to the best configuration: dotted name -> value."""
        changes = {k: v for k, v in self.baselines[name].items() if k not in BaselineConfig.model_fields}
        on_val = self.baselines[name].get("train_on") == "labeled+val"
        return changes | ({"data.further_labeled": ["val"]} if on_val else {})
