"""The programme's centre: read this first. Train, evaluate now and then, report, stop when asked to."""

from collections.abc import Callable, Iterable, Sequence

from cps_ray.config.train import TrainConfig
from cps_ray.engine.batch import Batch
from cps_ray.engine.schedules import learning_rate, ramped_weight
from cps_ray.engine.state import TrainState
from cps_ray.engine.step import train_step
from cps_ray.engine.telemetry import PATIENCE, Meter, Metrics, collapse, is_kept_up, is_lost
from cps_ray.errors import DivergedError

Validate = Callable[[TrainState], Metrics]
Report = Callable[[Metrics, TrainState], bool]
"""Takes what was measured at an evaluation; False stops the training."""


def fit(
    config: TrainConfig,
    state: TrainState,
    batches: Iterable[Batch],
    validate: Validate,
    report: Report,
    classes: Sequence[str] = (),
) -> None:
    """Trains from `state.step` to `config.schedule.steps`. `batches` starts at the batch of `state.step`.
    `classes`: names of all classes, whose pseudo labels are then also reported apart.

    Raises DivergedError where going on is of no use: a loss is not finite, or the networks have collapsed for good.
    """
    if is_lost(config.schedule, state.step, state.collapsed):
        # The process was lost between the last checkpoint and the news of its end. Going on would give another end.
        raise DivergedError(f"the networks had collapsed for good at step {state.step}.")
    meter = Meter(state.ranks, classes)
    for batch in meter.timed(batches):
        meter.add(state.step, train_step(config, state, batch))  # advances state.step
        if state.step % config.schedule.eval_every == 0:
            metrics = meter.read() | _scheduled(config, state) | validate(state)
            why = collapse(metrics)
            # Before the report, which saves it: a resumed training counts on.
            state.collapsed = state.collapsed + 1 if why and is_kept_up(config, metrics) else 0
            if not report(metrics | {"step": state.step}, state):
                return
            # After the report: the evaluation at which a training ends is on record.
            if is_lost(config.schedule, state.step, state.collapsed):
                raise DivergedError(f"{why}, at {PATIENCE} evaluations in a row, the last at step {state.step}.")
            meter.reset()  # here, so that the evaluation's time counts in no rate
        if state.step >= config.schedule.steps:
            return


def _scheduled(config: TrainConfig, state: TrainState) -> Metrics:
    """Learning rate and loss weight of the last step."""
    step, steps = state.step - 1, config.schedule.steps
    scheduled = {"optim/lr": learning_rate(config.optim, step, steps)}
    if config.settings is not None:
        scheduled[f"{config.method_name}/weight"] = ramped_weight(config.settings, step, steps)
    return scheduled
