"""A recipe and a first sweep as commented YAML. JSON stands for values: all of it is YAML, whatever a name holds."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_CLEARLY_GROUPED = re.compile(r"(?:frame|tile|patch|crop|slice|frm)[_\-]?\d+|_y\d+_x\d+|_x\d+_y\d+|_r\d+_c\d+", re.I)
_TILE_REGEX = r"^(.*?)[_\-]?(?:(?:frame|tile|patch|crop|slice|frm)[_\-]?\d+|_?y\d+_x\d+|x\d+_y\d+|r\d+_c\d+)"
_NUMBER_REGEX = r"^(.*\D)\d+$"
_FOLDER_REGEX = r"^(.+)/"
_FEWEST_GROUPS = 6
"""Fewest groups that can be drawn evenly for three splits."""


def value(setting: Any) -> str:
    """Returns a value as YAML on one line."""
    if isinstance(setting, Mapping):
        return (
            "{"
            + ", ".join(f"{key if str(key).isidentifier() else value(key)}: {value(v)}" for key, v in setting.items())
            + "}"
        )
    return json.dumps(setting, ensure_ascii=not str(setting).isprintable())


@dataclass
class Grouping:
    """A proposal for `group_by`."""

    regex: str
    groups: int
    is_clear: bool


def find_grouping(ids: Sequence[str]) -> Grouping | None:
    """Returns by what ids may belong together; None if each seems to be on its own."""
    for regex, clear in ((_FOLDER_REGEX, False), (_TILE_REGEX, True), (_NUMBER_REGEX, False)):
        groups: dict[str, int] = defaultdict(int)
        for key in ids:
            match = re.search(regex, key)
            groups[match[1] if match else key] += 1
        if 1 < len(groups) <= len(ids) / 2:
            return Grouping(regex, len(groups), clear and len(groups) >= _FEWEST_GROUPS)
    return None


def recipe_text(
    command: str,
    classes: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    comments: Sequence[str],
    splits: Mapping[str, Any],
    grouping: Grouping | None,
    assumed: Sequence[tuple[str, str]],
) -> str:
    """Returns a recipe as YAML, with what was assumed."""
    lines = [f"# {command}", "#", "# What was assumed, and how sure that is:"]
    lines += [f"# - {what} ({sure})" for what, sure in assumed]
    lines += ["#", "# Patterns are relative to RAW. Every setting: data/recipe.yaml and data/README.md of cps_ray.", ""]
    lines += [f"# {comment}" for comment in comments]
    unnamed = any(str(entry["name"]).startswith("class_") for entry in classes)
    lines.append("classes:" + " " * 40 + "# rename class_... as you like" * unnamed)
    for entry in classes:
        kept = {key: part for key, part in entry.items() if not key.startswith("_")}
        share = f"   # {entry['_share']}" if "_share" in entry else ""
        lines.append(f"  - {value(kept)}{share}")
    lines += [f"{name}: {value(setting)}" for name, setting in settings.items()]
    if grouping is not None:
        mark = "" if grouping.is_clear else "# "
        lines += [
            "",
            f"# {grouping.groups} groups, if images whose names begin alike belong together (a video, a scene, a patient): each group",
            "# then stays in one split, and test scores are not of near copies of training images.",
            f"{mark}group_by: {value(grouping.regex)}",
        ]
    lines += ["", "splits:"]
    for name, split in splits.items():
        if isinstance(split, Mapping):
            lines.append(f"  {name}:")
            for key, setting in split.items():
                lines.append(f"    {key}: {value(setting)}")
        else:
            lines.append(f"  {name}: {split}   # this fraction of the labelled images is drawn once, and stays")
    return "\n".join(line.rstrip() for line in lines) + "\n"


@dataclass(frozen=True)
class Amount:
    """How much there is to train on."""

    labeled: int
    """Training images with a mask."""
    unlabeled: int
    size: tuple[int, int]
    """(height, width) in px of a typical training image, or of a tile."""
    group_by: str | None
    """What images that belong together have in common in their ids, as in the recipe."""
    has_gpu: bool


def _crop(side: int, limit: int) -> int:
    return max(32, min(side, limit) // 32 * 32)


def sweep_text(command: str, name: str, shards: str, prepare: str, amount: Amount) -> str:
    """Returns a first sweep as YAML, with settings that suit the amount of data."""
    gpu, few = amount.has_gpu, amount.labeled < 100
    crop = [_crop(side, 512 if gpu else 256) for side in amount.size]
    batch = min(8 if gpu else 4, max(1, amount.labeled))
    steps = (4000 if few else 10000 if amount.labeled < 1000 else 20000) if gpu else (400 if few else 800)
    every, grace = steps // 8, steps // 2
    encoder, rate = ("resnet34", 3e-3) if gpu else ("tu-mobilenetv3_small_050", 3e-3)
    labeled = "1.0                             # all masks"
    if not amount.unlabeled:
        labeled = (
            "0.25                            # no photo is without a mask, so the masks of the others are not used"
        )
    where = "GPU" if gpu else "CPU"
    # So few masks that a val and a test split of them would decide by chance.
    repeats = "seeds: [1, 2, 3]"
    if 10 <= amount.labeled < 100:
        repeats = "folds: 5" if amount.group_by is None else f"folds: 5, group_by: {value(amount.group_by)}"
    resources = "{gpus_per_worker: 1}" if gpu else "{workers: 1, cpus_per_worker: 0.5}"
    return f"""\
# {command}
#
# A first sweep for {amount.labeled} labelled and {amount.unlabeled} unlabelled training images on a {where}. Check it, then run it:
#   python -m cps_ray.sweep FILE --dry-run
#   python -m cps_ray.sweep FILE
version: 1
name: {value(name)}
output: runs

train:
  seed: 0
  method: cps
  data:
    shards: {value(shards)}
    prepare: {value(prepare)}
    labeled: {labeled}
    crop_px: {crop}                   # of photos of {amount.size[1]}x{amount.size[0]} px; multiples of 32
    labeled_batch: {batch}
    unlabeled_batch: {batch}
  model:
    architecture: deeplabv3plus
    encoder: {encoder}
    weights: none                         # pretrained ones are much better: `encoder: resnet34`, `weights: imagenet` (a download)
    options: {{decoder_channels: {128 if gpu else 64}}}
  optim: {{name: adamw, lr: {rate}, weight_decay: 1.0e-2, decay: poly}}
  schedule: {{steps: {steps}, eval_every: {every}}}
  cps: {{weight: 1.0, ramp: 0.3, mix: cutmix}}
  augment: {{scale: [0.75, 1.5], color: 0.5}}
  compute: {{channels_last: true}}
  resources: {resources}

objective: {{metric: val/miou}}
budget: {{trials: {20 if gpu else 6}}}
sampler: {{type: tpe, seed: 0, startup_trials: {8 if gpu else 4}}}
early_stopping: {{type: asha, grace: {grace}, reduction: 2}}

search_space:
  cps.weight: {{type: float, low: 0.1, high: 3.0, log: true}}
  optim.lr: {{type: float, low: 5.0e-4, high: 1.0e-2, log: true}}

baselines:
  supervised-only: {{method: supervised, search: [optim.lr]}}     # without unlabelled photos, searched as well

final: {{retrain: best, {repeats}}}
"""
