"""Pictures of a comparison: what each class gains, and how the mIoU goes along one setting."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from PIL import Image, ImageDraw

from cps_ray.bench.comparison import Comparison, Figures, further_scores, short_name
from cps_ray.config.train import TrainConfig
from cps_ray.datasets.show.picture import fit_text
from cps_ray.errors import ConfigError
from cps_ray.model.examples import FAINT, INK, PAPER

_GAIN, _LOSS, _LINE = (38, 109, 176), (200, 82, 20), (225, 228, 232)
_ROW_PX, _PANEL_PX, _TOP_PX, _FOOT_PX, _MARGIN_PX = 26, 250, 64, 40, 44


def gains_picture(comparison: Comparison, runs: Mapping[str, Figures]) -> Image.Image:
    """Draws a panel for each variant and a row for each score: a dot for each draw's gain over the control, and the mean with its interval,
    filled where that does not hold 0. Intervals of classes hold at once."""
    metrics = [f"{comparison.split}/miou", *further_scores(runs, comparison.split)]
    names = ["mIoU", *(short_name(metric, comparison.split) for metric in metrics[1:])]
    figures = comparison.figures(runs)
    shown = [name for name in comparison.trainings if figures[name.strip()]["difference"]]
    controls = {metric: comparison.by_pair(comparison.control_name, metric, runs) for metric in metrics}
    rows = {
        name: [
            (figures[name.strip()]["difference"] if number == 0 else figures[name.strip()]["further"].get(metric))
            for number, metric in enumerate(metrics)
        ]
        for name in shown
    }
    dots = {name: [comparison.gains(name, metric, runs) for metric in metrics] for name in shown}
    most = max((abs(value) for each in dots.values() for row in each for value in row), default=0.05)
    most = math.ceil(20 * most) / 20 or 0.05
    fitted = [fit_text(name, 150, 13) for name in names]
    left = 18 + round(max(font.getlength(text) for text, font in fitted)) + 62
    height = _TOP_PX + _ROW_PX * len(metrics) + _FOOT_PX
    picture = Image.new("RGB", (left + (_PANEL_PX + _MARGIN_PX) * len(shown) + _MARGIN_PX, height), PAPER)
    draw = ImageDraw.Draw(picture)
    for number, ((text, font), metric) in enumerate(zip(fitted, metrics, strict=True)):
        y = _TOP_PX + _ROW_PX * (number + 0.5)
        draw.text((left - 62, y), text, fill=INK, font=font, anchor="rm")
        if controls[metric]:
            _text(draw, (left - 14, y), f"{100 * fmean(controls[metric]):.1f}", FAINT, "rm", 60)
    _text(draw, (left - 14, _TOP_PX - 14), comparison.control, FAINT, "rm", left - 20)
    for number, name in enumerate(shown):
        x0 = left + number * (_PANEL_PX + _MARGIN_PX)
        _gains_panel(draw, x0, name.strip(), rows[name], dots[name], most)
    return picture


def _gains_panel(
    draw: ImageDraw.ImageDraw,
    x0: int,
    title: str,
    rows: Sequence[Figures | None],
    dots: Sequence[Sequence[float]],
    most: float,
) -> None:
    bottom = _TOP_PX + _ROW_PX * len(rows)

    def at(gain: float) -> float:
        return x0 + _PANEL_PX * (min(max(gain, -most), most) / most + 1) / 2

    _text(draw, (x0 + _PANEL_PX / 2, 18), title, INK, "mm", _PANEL_PX)
    for part in (-1.0, -0.5, 0.0, 0.5, 1.0):
        x = at(part * most)
        draw.line((x, _TOP_PX - 6, x, bottom), fill=FAINT if part == 0 else _LINE)
        _text(draw, (x, bottom + 12), f"{100 * part * most:+g}" if part else "0", FAINT, "mm", 60)
    _text(draw, (x0 + _PANEL_PX / 2, bottom + 28), "points", FAINT, "mm", 60)
    for number, (row, values) in enumerate(zip(rows, dots, strict=True)):
        y = _TOP_PX + _ROW_PX * (number + 0.5)
        for value in values:
            draw.ellipse((at(value) - 2, y - 2, at(value) + 2, y + 2), outline=FAINT)
        if row is None:
            continue
        mean, half = row["mean"], row["half_width"]
        color = _GAIN if mean >= 0 else _LOSS
        if half is not None:
            draw.line((at(mean - half), y, at(mean + half), y), fill=color, width=2)
        decided = half is not None and abs(mean) > half
        draw.ellipse(
            (at(mean) - 5, y - 5, at(mean) + 5, y + 5), outline=color, fill=color if decided else PAPER, width=2
        )


def along_picture(comparison: Comparison, runs: Mapping[str, Figures], key: str) -> Image.Image:
    """Draws the mIoU of the variants along a setting, on a logarithmic axis: a dot for each run, a line through the means, and the control's mean,
    all of the draws and seeds that every one of them has.

    Raises ConfigError where fewer than two variants have runs and a positive number there.
    """
    values = {name: _setting(training, key) for name, training in comparison.trainings.items()}
    found = {
        name: {pair: run[f"{comparison.split}/miou"] for pair, run in comparison.ended(name, runs).items()}
        for name, value in values.items()
        if name == comparison.control_name or (isinstance(value, int | float) and value is not True and value > 0)
    }
    found = {name: scores for name, scores in found.items() if scores}
    common = set.intersection(*(set(scores) for scores in found.values())) if found else set()
    shown = {name: [score for pair, score in scores.items() if pair in common] for name, scores in found.items()}
    control = shown.pop(comparison.control_name, [])
    points = sorted((float(str(values[name])), scores) for name, scores in shown.items())
    if not common or len({value for value, _ in points}) < 2:
        raise ConfigError(
            f"--along {key}: needs two variants with other positive numbers there, and runs of the same draw and seed of each."
        )
    every = [score for _, scores in points for score in scores] + control
    width, height, left, right, top, bottom = 560, 360, 62, 24, 46, 54
    low, high = math.floor(50 * min(every) - 0.2) / 50, math.ceil(50 * max(every) + 0.2) / 50
    first, last = points[0][0], points[-1][0]
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)

    def at(value: float, score: float) -> tuple[float, float]:
        part = 0.04 + 0.92 * math.log(value / first) / math.log(last / first)
        return left + part * (width - left - right), top + (high - score) / (high - low) * (height - top - bottom)

    for tick in range(round(100 * low), round(100 * high) + 1, 2):
        y = at(first, tick / 100)[1]
        draw.line((left, y, width - right, y), fill=_LINE)
        _text(draw, (left - 6, y), str(tick), FAINT, "rm", 50)
    _text(draw, (16, top - 22), f"{comparison.split} mIoU, %", FAINT, "lm", 200)
    for value in dict.fromkeys(value for value, _ in points):
        _text(draw, (at(value, low)[0], height - bottom + 14), f"{value:g}", FAINT, "mm", 60)
    _text(draw, ((left + width) / 2, height - 18), f"{key} (logarithmic)", INK, "mm", 300)
    if control:
        y = at(first, fmean(control))[1]
        for dash in range(left, width - right, 10):
            draw.line((dash, y, dash + 5, y), fill=_LOSS, width=2)
        _text(draw, (width - right, y - 10), comparison.control, _LOSS, "rm", 200)
    draw.line([at(value, fmean(scores)) for value, scores in points], fill=_GAIN, width=2)
    for value, scores in points:
        for score in scores:
            x, y = at(value, score)
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), outline=_GAIN)
    return picture


def _setting(training: TrainConfig, key: str) -> object:
    found: object = training
    for part in key.split("."):
        found = getattr(found, part, None)
    return found


def _text(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    words: str,
    color: tuple[int, int, int],
    anchor: str,
    width_px: int,
) -> None:
    fitted, font = fit_text(words, width_px, 13)
    draw.text(place, fitted, fill=color, font=font, anchor=anchor)
