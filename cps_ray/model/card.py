"""The model card: what a model is, was made from and reaches, for whoever finds its folder."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from cps_ray.config.sweep import BEST_ARM
from cps_ray.config.train import ENSEMBLE, TrainConfig
from cps_ray.datasets.shards import Manifest
from cps_ray.engine.metrics import iou
from cps_ray.model.description import ModelDescription

Arms = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Arm of a sweep -> metric -> its mean, sd and n over seeds."""


def model_card(
    description: ModelDescription,
    config: TrainConfig,
    metrics: Mapping[str, Any],
    manifest: Manifest,
    arms: Arms | None = None,
) -> str:
    """Returns the card as Markdown, with the header that the Hugging Face hub reads. Arguments: `writing.write_model`."""
    name = f"{config.model.architecture} with {config.model.encoder}"
    parts = [
        *_hub_header(description),
        f"# Semantic segmentation: {', '.join(_code(each) for each in description.classes[:6])}"
        + (" and more" if len(description.classes) > 6 else ""),
        "",
        f"{name}, trained by cps_ray with the method `{config.method}`. Labels are {len(description.classes)} classes, for each pixel of a photo.",
        "",
        "## Use",
        "",
        "```python",
        "import cps_ray",
        "",
        'model = cps_ray.load_model("best")         # this folder',
        'labels = model.predict("photo.jpg")        # uint8 (H, W): positions in model.classes',
        "```",
        "",
        "```sh",
        "cps-ray predict best photos/ masks/        # label maps, overlays, index.csv",
        "```",
        "",
        *_smp(description),
        "## Scores",
        "",
        *_scores(description, config, metrics, manifest, arms),
        "",
        "## Data",
        "",
        *_data(config, manifest),
        "",
        "## Training",
        "",
        *_recipe(config),
        "",
        "## Limits",
        "",
        "- Scores hold for images like those above. For others (another camera, place, season) evaluate on some with masks first.",
        f"- Images of more than 8 bits are read as the training's were: {_bits(description)}.",
        "- Every pixel gets one of the classes, also where the image shows none of them; a low probability is the only hint.",
        "- Rare classes are the least certain; see their scores.",
        "",
        "## Licences",
        "",
        *_licences(description),
    ]
    return "\n".join(parts) + "\n"


def _code(text: str) -> str:
    return f"`{text}`"


def _hub_header(description: ModelDescription) -> list[str]:
    library = description.networks["a"].library
    return [
        "---",
        # What the weights came from may bind the model: whoever publishes it has to choose.
        "license: other",
        "pipeline_tag: image-segmentation",
        *(["library_name: segmentation-models-pytorch"] if library == "segmentation-models-pytorch" else []),
        "tags:",
        "- semantic-segmentation",
        "- semi-supervised",
        "- cps-ray",
        "---",
        "",
    ]


def _smp(description: ModelDescription) -> list[str]:
    a = description.networks["a"]
    if a.library != "segmentation-models-pytorch":
        return []
    mean, std = ([round(value, 4) for value in values] for values in (a.mean, a.std))
    return [
        "Network a loads with segmentation-models-pytorch alone. It then takes normalised RGB, `(image / 255 - mean) / std` with",
        f"mean {mean} and std {std}, sides padded to multiples of {a.divisor}:",
        "",
        "```python",
        "import segmentation_models_pytorch as smp",
        "",
        'network = smp.from_pretrained("best").eval()',
        "```",
        "",
    ]


def _scores(
    description: ModelDescription,
    config: TrainConfig,
    metrics: Mapping[str, Any],
    manifest: Manifest,
    arms: Arms | None,
) -> Iterator[str]:
    split = "test" if "test/miou" in metrics else "val"
    images = (
        f"all labelled images, each predicted by one of {config.data.folds.count} trainings that had not seen it; this model was trained on all of them"
        if split == "test" and config.data.folds
        else "the test split, which nothing was chosen by"
        if split == "test"
        else f"{_validation(config, manifest)}, by which its checkpoint was chosen"
    )
    inner = "" if description.network == "a" else f"{description.network}/"
    yield f"Measured on {images}. This model: mIoU {_percent(metrics.get(f'{split}/{inner}miou'))} %."
    over = (arms or {}).get(BEST_ARM, {})
    seeds = max((row["n"] for row in over.values()), default=0)
    others = [arm for arm in arms or {} if arm != BEST_ARM]
    differ = "folds" if config.data.folds else "seeds"
    if seeds:
        yield f"The columns are means over {seeds} training(s) with other {differ}{', and standard deviations' if seeds > 1 else ''}."
    yield ""
    yield " | ".join(["| class", "this model", *([f"all {differ}"] if seeds else []), *others]) + " |"
    yield "|---" * (2 + bool(seeds) + len(others)) + "|"
    matrix = metrics.get("confusion", {}).get(description.network)
    exact = dict(zip(description.classes, iou(torch.tensor(matrix)).tolist(), strict=True)) if matrix else {}
    rows = [("**mean IoU**", f"{split}/{inner}miou", f"{split}/miou")]
    rows += [(name, f"{split}/iou/{name}", f"{split}/iou/{name}") for name in description.classes]
    for title, own, compared in rows:
        cells = [_percent(exact.get(title, metrics.get(own)))]
        cells += [_spread(over.get(own) or over.get(compared))] if seeds else []
        cells += [_spread((arms or {})[arm].get(own) or (arms or {})[arm].get(compared)) for arm in others]
        yield f"| {_cell(title)} | {' | '.join(cells)} |"
    if inner and seeds:
        yield ""
        yield "IoUs of single classes over all seeds are those of network a."
    ece = metrics.get(f"{split}/{inner}ece")
    if ece is not None:
        yield ""
        yield f"Expected calibration error: {_percent(ece)} % (how far probabilities are from how often they are right)."


def _validation(config: TrainConfig, manifest: Manifest) -> str:
    """Returns what stands for val in the evaluations of a training, in words."""
    folds, val = config.data.folds, manifest.splits.get("val")
    if folds is not None and folds.held_out is not None:
        return f"fold {folds.held_out} of 0 to {folds.count - 1} of the labelled images, on which it was not trained"
    if folds is not None and not (val and val.masks):
        return "the labelled images, on which it was trained"
    return f"the val split{', on which it was trained, too' if 'val' in config.data.further_labeled else ''}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _percent(value: Any) -> str:
    return "-" if value is None or value != value else f"{100 * value:.1f}"


def _spread(row: Mapping[str, Any] | None) -> str:
    if not row:
        return "-"
    return _percent(row["mean"]) + ("" if row.get("sd") is None else f" ± {100 * row['sd']:.1f}")


def _data(config: TrainConfig, manifest: Manifest) -> Iterator[str]:
    yield f"Made by {manifest.made_by.format}."
    yield ""
    yield "| split | images | with masks | fingerprint |"
    yield "|---|---|---|---|"
    for name, split in manifest.splits.items():
        yield f"| {name} | {split.images} | {split.masks} | `{split.fingerprint}` |"
    labeled = config.data.labeled_list.name if config.data.labeled_list else config.data.labeled
    if labeled is not None:
        yield ""
        yield f"Of train, the masks of `labeled: {labeled}` were used, drawn with `subset_seed: {config.data.subset_seed}`."
    if config.data.further_labeled:
        yield ""
        yield f"The masks of {', '.join(config.data.further_labeled)} were used to train, too."


def _recipe(config: TrainConfig) -> Iterator[str]:
    model, optim, data = config.model, config.optim, config.data
    yield f"- method `{config.method}`, {config.networks} network(s), {config.schedule.steps} steps, seed {config.seed}"
    second = (
        "" if model.b is None or config.networks == 1 else f"; network b: {model.b.architecture}, {model.b.encoder}"
    )
    yield f"- {model.architecture}, {model.encoder}{second}"
    unlabeled = f" and {data.unlabeled_batch} unlabelled" if config.semi_supervised else ""
    height, width = data.crop_px
    yield f"- a step has {data.labeled_batch} labelled{unlabeled} crops of {height}x{width} px"
    yield f"- {optim.name}, learning rate {optim.lr:g}, {optim.decay}"
    yield "- all settings: `config.yaml`, which `cps-ray train` takes"


def _bits(description: ModelDescription) -> str:
    return f"values {description.value_range} are black and white" if description.value_range else "their whole range"


def _licences(description: ModelDescription) -> Iterator[str]:
    yield "What the encoders began with; its licence may bind this model, and so may those of the images:"
    yield ""
    for sentence in dict.fromkeys(each.weights.get("sentence", "") for each in description.networks.values()):
        yield f"- {sentence}"
    if len(description.networks) > 1:
        yield ""
        yield f"The networks have taught each other, so each one's licence counts, also where one is used without `{ENSEMBLE}`."
