"""The picture of a learning curve: how mIoU grows with the number of labels, or of unlabelled images."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from cps_ray.datasets.show.picture import fit_text
from cps_ray.model.examples import FAINT, INK, PAPER

_COLORS = ((38, 109, 176), (200, 82, 20), (70, 140, 60), (130, 80, 160))
_PANEL = (460, 340)
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 24, 46, 54


def curve_picture(curve: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Draws what `search.curve.learning_curve` returns: a panel for labels and one for images, a colour for each arm. Dots are trainings, the line joins
    their means, and what is dashed is how it goes on."""
    panels = [
        (title, [each for each in curve if each["what"] == what])
        for what, title in (("labels", "labelled images"), ("images", "unlabelled images"))
    ]
    panels = [(title, lines) for title, lines in panels if lines]
    arms = list(dict.fromkeys(each["arm"] for each in curve))
    picture = Image.new("RGB", (_PANEL[0] * len(panels), _PANEL[1]), PAPER)
    every = [value for each in curve for point in each["points"] for value in point["values"]]
    every += [_mean(each["points"][-1]) + each["more"]["gain"] for each in curve]
    low, high = math.floor(20 * min(every) - 0.2) / 20, math.ceil(20 * max(every) + 0.2) / 20
    for number, (title, lines) in enumerate(panels):
        _panel(ImageDraw.Draw(picture), number * _PANEL[0], title, lines, arms, low, high)
    return picture


def _mean(point: Mapping[str, Any]) -> float:
    return float(sum(point["values"]) / len(point["values"]))


def _panel(
    draw: ImageDraw.ImageDraw,
    left: int,
    title: str,
    lines: Sequence[Mapping[str, Any]],
    arms: Sequence[str],
    low: float,
    high: float,
) -> None:
    x0, x1, y0, y1 = left + _LEFT, left + _PANEL[0] - _RIGHT, _PANEL[1] - _BOTTOM, _TOP
    counts = sorted({point["count"] for each in lines for point in each["points"]})
    last = max(each["points"][-1]["count"] + each["more"]["count"] for each in lines)
    first = min(counts) / 1.15

    def at(count: float, value: float) -> tuple[float, float]:
        """Place of a point: numbers of images on a logarithmic axis."""
        right = math.log(count / first) / math.log(1.15 * last / first)
        return x0 + right * (x1 - x0), y0 + (value - low) / (high - low) * (y1 - y0)

    def text(place: tuple[float, float], words: str, color: tuple[int, int, int], anchor: str, size: int = 13) -> None:
        fitted, font = fit_text(words, x1 - x0, size)
        draw.text(place, fitted, fill=color, font=font, anchor=anchor)

    for tick in range(round(100 * low), round(100 * high) + 1, 5):
        y = at(last, tick / 100)[1]
        draw.line((x0, y, x1, y), fill=(225, 228, 232))
        text((x0 - 6, y), str(tick), FAINT, "rm")
    text((x0 - 40, y1 - 18), "test mIoU, %", FAINT, "lm")
    for count in (*counts, last):
        x = at(count, low)[0]
        draw.line((x, y0, x, y0 + 4), fill=FAINT)
        text((x, y0 + 14), f"{count:,}".replace(",", " "), FAINT, "mm")
    text(((x0 + x1) / 2, y0 + 36), f"{title} (logarithmic)", INK, "mm")
    for each in lines:
        color = _COLORS[arms.index(each["arm"]) % len(_COLORS)]
        means = [at(point["count"], _mean(point)) for point in each["points"]]
        draw.line(means, fill=color, width=2)
        for point in each["points"]:
            for value in point["values"]:
                x, y = at(point["count"], value)
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), outline=color)
        end = each["points"][-1]
        goal = at(end["count"] + each["more"]["count"], _mean(end) + each["more"]["gain"])
        for part in range(0, 10, 2):
            draw.line([_between(means[-1], goal, (part + k) / 10) for k in (0, 1)], fill=color, width=2)
        text((goal[0], goal[1] - 10), f"{100 * each['more']['gain']:+.1f}", color, "mm")
    for row, arm in enumerate(dict.fromkeys(each["arm"] for each in lines)):
        color = _COLORS[arms.index(arm) % len(_COLORS)]
        text((x0 + 8, y1 + 10 + 16 * row), arm, color, "lm")


def _between(start: tuple[float, float], end: tuple[float, float], part: float) -> tuple[float, float]:
    return start[0] + part * (end[0] - start[0]), start[1] + part * (end[1] - start[1])
