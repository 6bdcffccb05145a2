"""Variants of a training compared with one of them, the control, pair by pair: mean difference, its t-interval, its signs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from cps_ray.config.space import apply
from cps_ray.config.train import ENSEMBLE, NETWORK_NAMES, DataConfig, TrainConfig

Figures = dict[str, Any]
Pair = tuple[int, int]
"""(draw, seed): two runs with the same labelled images, and the same order of images, augmentation and initialisation."""
_COLUMNS = {
    "mIoU %": ("{split}/miou", 100.0),
    "ensemble": ("{split}/ensemble/miou", 100.0),
    "pseudo labels": ("pseudo/miou", 100.0),
    "agreement": ("pseudo/agreement", 100.0),
    "seconds": ("seconds", 1.0),
}
"""Columns of the table: what they show of a run, and the factor by which it is shown."""


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """A variant minus the control, over n draws of labelled images, or over n seeds of a single draw."""

    mean: float
    half_width: float | None
    """The interval is mean +- half_width; None where n is 1."""
    better: int
    """Number of the n in which the variant is better; equal does not count."""
    n: int


def independent_values(values: Mapping[Pair, float], *, over_draws: bool) -> list[float]:
    """Returns what a spread or an interval is computed over: the mean over seeds of each draw, or the values as they are.

    Seeds within a draw have the same labelled images and are not independent: counted one by one, the interval would be too narrow.
    """
    if not over_draws:
        return list(values.values())
    draws: dict[int, list[float]] = {}
    for (draw, _), value in values.items():
        draws.setdefault(draw, []).append(value)
    return [fmean(seeds) for seeds in draws.values()]


def paired(scores: Mapping[Pair, float], control: Mapping[Pair, float], *, over_draws: bool) -> list[float]:
    """Returns the independent differences over the pairs that both have."""
    both = {pair: score - control[pair] for pair, score in scores.items() if pair in control}
    return independent_values(both, over_draws=over_draws)


def paired_difference(
    scores: Mapping[Pair, float], control: Mapping[Pair, float], *, over_draws: bool, at_once: int = 1
) -> PairedDifference | None:
    """Compares over the pairs that both have. None if there is none.

    Student's 95 % interval for the mean of n independent, normal differences: mean +- t(0.975, n - 1) * sd / sqrt(n). Of `at_once` intervals
    all hold in 95 % of all comparisons (Bonferroni): t(1 - 0.025 / at_once, n - 1).
    """
    from scipy.special import stdtrit  # takes a third of a second to import

    differences = paired(scores, control, over_draws=over_draws)
    if not differences:
        return None
    n = len(differences)
    half_width = None if n == 1 else float(stdtrit(n - 1, 1.0 - 0.025 / at_once)) * stdev(differences) / sqrt(n)
    return PairedDifference(fmean(differences), half_width, sum(each > 0.0 for each in differences), n)


def further_scores(runs: Mapping[str, Figures], split: str) -> list[str]:
    """Returns what is compared beside the mIoU: pixel accuracy, mIoU of each slice and of the pseudo labels, IoU of each class."""
    names = dict.fromkeys(metric for figures in runs.values() for metric in figures)
    networks = {f"{split}/{name}/miou" for name in (*NETWORK_NAMES, ENSEMBLE)}
    slices = [
        name for name in names if name.startswith(f"{split}/") and name.count("/") == 2 and name.endswith("/miou")
    ]
    found = [f"{split}/pixel_accuracy", *(name for name in slices if name not in networks), "pseudo/miou"]
    return [name for name in found if name in names] + [name for name in names if is_of_class(name, split)]


def is_of_class(metric: str, split: str) -> bool:
    """Tells whether it is the IoU of a class on the whole split."""
    return metric.startswith(f"{split}/iou/")


def is_drawn(data: DataConfig) -> bool:
    """Tells whether `data.subset_seed` decides which images are labelled. `labeled: 1` is one image and `labeled: 1.0` is all."""
    return isinstance(data.labeled, int) or (isinstance(data.labeled, float) and data.labeled < 1.0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is trained, and what is computed of it."""

    trainings: dict[str, TrainConfig]
    """Variant -> its training."""
    control: str
    split: str
    pairs: list[Pair]

    @property
    def over_draws(self) -> bool:
        """Whether spreads and intervals are over draws; over seeds if there is one draw."""
        return len({draw for draw, _ in self.pairs}) > 1

    @property
    def control_name(self) -> str:
        """The control as `trainings` names it, which may be indented."""
        return next(name for name in self.trainings if name.strip() == self.control)

    def key(self, name: str, pair: Pair) -> str:
        """Returns the name of a run. Draws of one that has the same labelled images in all of them are one run."""
        draw = f" draw {pair[0]}" if is_drawn(self.trainings[name].data) else ""
        return f"{name.strip()}{draw} seed {pair[1]}"

    def config(self, name: str, pair: Pair) -> TrainConfig:
        """Returns the training of a run."""
        draw, seed = pair
        return apply(self.trainings[name], {"seed": seed, "data.subset_seed": draw}, self.key(name, pair))

    def figures(self, runs: Mapping[str, Figures]) -> dict[str, Figures]:
        """Returns what the tables show, by variant: `mean` and `sd` of each metric, number of `runs` and of those that `failed`, the
        `difference` of its mIoU to the control's, None where there is none, and those of `further` scores. Scores are in 0..1.
        """
        return {name.strip(): self._figures(name, runs) for name in self.trainings}

    def _figures(self, name: str, runs: Mapping[str, Figures]) -> Figures:
        keys = {self.key(name, pair) for pair in self.pairs} & {*runs}
        failed = sum("failed" in runs[key] for key in keys)
        figures: Figures = {"runs": len(keys) - failed, "failed": failed}
        for template, _ in _COLUMNS.values():
            metric = template.format(split=self.split)
            if values := self._values(name, metric, runs):
                figures[metric] = self._spread(name, values)
        if name == self.control_name:
            return {**figures, "difference": None, "further": {}}
        classes = [metric for metric in further_scores(runs, self.split) if is_of_class(metric, self.split)]
        differences = {
            metric: self._difference(name, runs, metric, len(classes) if metric in classes else 1)
            for metric in [f"{self.split}/miou", *further_scores(runs, self.split)]
        }
        found = {metric: asdict(each) for metric, each in differences.items() if each is not None}
        return {**figures, "difference": found.pop(f"{self.split}/miou", None), "further": found}

    def by_pair(self, name: str, metric: str, runs: Mapping[str, Figures]) -> list[float]:
        """Returns a metric of a variant's draws, or of its seeds if there is one draw."""
        return independent_values(self._values(name, metric, runs), over_draws=self.over_draws)

    def _values(self, name: str, metric: str, runs: Mapping[str, Figures]) -> dict[Pair, float]:
        """Returns a metric of the runs that have it, in the order of `pairs`."""
        return {pair: figures[metric] for pair, figures in self.ended(name, runs).items() if metric in figures}

    def ended(self, name: str, runs: Mapping[str, Figures]) -> dict[Pair, Figures]:
        """Returns a variant's runs that have ended and have not failed, in the order of `pairs`."""
        keys = {pair: self.key(name, pair) for pair in self.pairs}
        return {pair: runs[key] for pair, key in keys.items() if key in runs and "failed" not in runs[key]}

    def _spread(self, name: str, values: Mapping[Pair, float]) -> Figures:
        independent = independent_values(values, over_draws=self.over_draws)
        # Runs that stand for all draws have no spread over them.
        known = len(independent) > 1 and (not self.over_draws or is_drawn(self.trainings[name].data))
        return {"mean": fmean(independent), "sd": stdev(independent) if known else None}

    def gains(self, name: str, metric: str, runs: Mapping[str, Figures]) -> list[float]:
        """Returns a variant's differences to the control in a metric, over draws, or over seeds if nothing of the two is drawn or there is one draw."""
        over_draws, scores, controls = self._compared(name, metric, runs)
        return paired(scores, controls, over_draws=over_draws)

    def _difference(self, name: str, runs: Mapping[str, Figures], metric: str, at_once: int) -> PairedDifference | None:
        over_draws, scores, controls = self._compared(name, metric, runs)
        return paired_difference(scores, controls, over_draws=over_draws, at_once=at_once)

    def _compared(
        self, name: str, metric: str, runs: Mapping[str, Figures]
    ) -> tuple[bool, dict[Pair, float], dict[Pair, float]]:
        scores, controls = (self._values(one, metric, runs) for one in (name, self.control_name))
        if not any(is_drawn(self.trainings[one].data) for one in (name, self.control_name)):
            # The same runs stand for all draws: only seeds differ.
            return False, {pair: score for pair, score in scores.items() if pair[0] == self.pairs[0][0]}, controls
        return self.over_draws, scores, controls


def table(comparison: Comparison, runs: Mapping[str, Figures], title: str) -> Table:
    """Returns the table of what there is of the comparison so far; `title` says which training it is of."""
    num_draws, num_seeds = (len({pair[place] for pair in comparison.pairs}) for place in (0, 1))
    if comparison.over_draws:
        over = f"{num_draws} draws of labelled images, each the mean of {num_seeds} seed{'s' * (num_seeds > 1)}"
        holds = "Intervals are over draws."
    else:
        over = f"{num_seeds} seed{'s' * (num_seeds > 1)}"
        holds = "Intervals are over seeds, and hold for this draw of labelled images only."
    score, *others = _COLUMNS
    differences: list[Column | str] = [Column(Text(f"to {comparison.control}")), "better in"]
    shown = Table(
        _names(comparison),
        score,
        *differences,
        *others,
        "runs",
        title=Text(f"{title}, evaluated on {comparison.split}: mean and sd over {over}"),
        caption=Text(f"to {comparison.control}: paired difference in points, with a 95 % t-interval. {holds}"),
    )
    figures = comparison.figures(runs)
    for name in comparison.trainings:
        row = figures[name.strip()]
        first, *rest = (
            _cell(row.get(metric.format(split=comparison.split)), scale) for metric, scale in _COLUMNS.values()
        )
        failed = f", {row['failed']} failed" if row["failed"] else ""
        shown.add_row(Text(name), first, *_difference_cells(row["difference"]), *rest, f"{row['runs']}{failed}")
    return shown


def further_table(comparison: Comparison, runs: Mapping[str, Figures]) -> Table:
    """Returns the table of all other scores: what each variant gains on each, in points; a star where the interval does not hold 0."""
    metrics = further_scores(runs, comparison.split)
    figures = comparison.figures(runs)
    shown = Table(
        _names(comparison),
        *(
            Column(Text(short_name(metric, comparison.split), overflow="fold"), justify="right", overflow="fold")
            for metric in metrics
        ),
        title=Text(f"to {comparison.control}, in points"),
        caption=Text(
            "*: the 95 % interval does not hold 0; those of all classes of a row hold at once in 95 % of all comparisons."
        ),
    )
    for name in comparison.trainings:
        row = figures[name.strip()]["further"]
        if row:
            shown.add_row(Text(name), *(_short_cell(row.get(metric)) for metric in metrics))
    return shown


def _names(comparison: Comparison) -> Column:
    """Returns the column of the variants' names, which narrow terminals do not cut."""
    return Column("", min_width=min(48, max(len(name) for name in comparison.trainings)))


def short_name(metric: str, split: str) -> str:
    """Returns what a column calls a further score."""
    if metric == "pseudo/miou":
        return "pseudo labels"
    return (
        metric.removeprefix(f"{split}/")
        .removeprefix("iou/")
        .removesuffix("/miou")
        .replace("pixel_accuracy", "accuracy")
    )


def _short_cell(raw: Figures | None) -> str:
    if raw is None:
        return ""
    one = PairedDifference(**raw)
    decided = one.half_width is not None and abs(one.mean) > one.half_width
    return f"{100 * one.mean:+.1f}{'*' if decided else ' '}"


def _cell(spread: Figures | None, scale: float) -> str:
    """Returns the mean and, where it is known, the standard deviation."""
    if spread is None:
        return ""
    return f"{scale * spread['mean']:.1f}" + ("" if spread["sd"] is None else f" ± {scale * spread['sd']:.1f}")


def _difference_cells(raw: Figures | None) -> tuple[str, str]:
    if raw is None:
        return "", ""
    one = PairedDifference(**raw)
    low, high = (100 * (one.mean + sign * (one.half_width or 0.0)) for sign in (-1, 1))
    interval = "" if one.half_width is None else f" ({low:+.1f} to {high:+.1f})"
    return f"{100 * one.mean:+.1f}{interval}", f"{one.better} of {one.n}"
