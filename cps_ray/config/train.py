"""The schema of one training: of the file for `python -m cps_ray.train`, of `train:` in a sweep, and of `best.yaml`."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from cps_ray.config.plugins import ImportPath, is_import_path, load_plugin, load_sink
from cps_ray.config.schema import parse
from cps_ray.config.section import Regex, RelativePath, Section
from cps_ray.errors import ConfigError

PositiveInt = Annotated[int, Field(gt=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**31, strict=True)]  # torch's seed is this times the step, in 64 bits
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFraction = Annotated[float, Field(gt=0.0, le=1.0)]
Fingerprint = Annotated[str, Field(pattern=r"^[0-9]+-[0-9a-f]{32}$", strict=True)]
SubsetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", strict=True)]
NETWORK_NAMES = "abcdefgh"
"""Names of the networks, one letter each: network 0 is `a`."""
ENSEMBLE = "ensemble"
"""The mean of all networks' probabilities is reported under this name."""
HELD_OUT = "held_out"
"""Name under which the held-out fold is evaluated like a split."""
Precision = Literal["none", "bf16", "fp16"]


def _some_class_counts(weights: tuple[float, ...]) -> tuple[float, ...]:
    if not any(weights):
        raise ValueError("must have a weight above 0, but all are 0: nothing would be learned.")
    return weights


ClassWeights = (
    Annotated[tuple[Annotated[float, Field(ge=0.0)], ...], Field(min_length=2), AfterValidator(_some_class_counts)]
    | Annotated[float, Field(gt=0.0, le=1.0)]
)
"""One weight per class, in the order of the classes; or a power p. Of a class with the fraction f of the labelled images' pixels the weight is
then 1 / f^p, times what makes the weights' mean over these pixels 1; a class without a pixel weighs as much as the rarest. 0.5 is usual, 1
lets all classes weigh the same in sum."""


def _weights_of(pixels: Sequence[int], power: float) -> tuple[float, ...]:
    """Returns the weights that a power of 1 / frequency gives classes with so many pixels; see `ClassWeights`."""
    rarest = min((count for count in pixels if count), default=1)
    raw = [max(count, rarest) ** -power for count in pixels]
    weighed = sum(weight * count for weight, count in zip(raw, pixels, strict=True))
    scale = sum(pixels) / weighed if weighed else 1.0
    return tuple(weight * scale for weight in raw)


ColorMean = tuple[Fraction, Fraction, Fraction]
ColorStd = tuple[PositiveFraction, PositiveFraction, PositiveFraction]
PositiveFloat = Annotated[float, Field(gt=0.0)]
SupervisedLoss = Literal["ce", "ohem", "dice", "focal", "lovasz"] | ImportPath
WITHOUT_CLASS_WEIGHTS = {"lovasz"}
View = Literal["weak", "strong", "elsewhere"]
"""What a batch may hold of an unlabelled image: `strong` is the weak view's place in other colours, `elsewhere` another place."""
VIEWS: tuple[tuple[View, ...], ...] = (
    ("weak",),
    ("weak", "strong"),
    ("weak", "strong", "strong"),
    ("weak", "elsewhere"),
    ("weak", "elsewhere", "strong"),
)
"""What batches can hold of unlabelled images."""
OptionValue = bool | int | float | str | None | list[int] | list[float]
_OUR_OPTIONS = {
    "arch": "set `architecture` instead",
    "encoder_name": "set `encoder` instead",
    "encoder_weights": "set `weights` instead",
    "in_channels": "images are RGB",
    "classes": "there are as many as the data have",
    "activation": "losses and evaluation need logits",
    "aux_params": "losses know one output",
}
"""Arguments of `create_model` that are not `model.options` -> why."""


class SyntheticConfig(Section):
    """Settings of the embedded data set, street scenes drawn by a program: the same bits for the same settings."""

    train: PositiveInt = 440
    """Number of training images. All have a mask; `data.labeled` says how many masks are used."""
    val: PositiveInt = 60
    test: PositiveInt = 120
    height_px: Annotated[int, Field(ge=32, strict=True)] = 64
    width_px: Annotated[int, Field(ge=32, strict=True)] = 96
    seed: NonNegativeInt = 0


class FoldsConfig(Section):
    """The labelled images dealt into folds for cross-validation: classes in all of them, images that belong together in one."""

    count: Annotated[int, Field(ge=2, strict=True)]
    """Number of folds."""
    held_out: NonNegativeInt | None = None
    """Fold, from 0, that is not trained on and is evaluated in place of val. None: all are trained on; val is evaluated or, if it has no
    masks, the labelled images themselves."""
    aside: NonNegativeInt | None = None
    """Fold, from 0, that is neither trained on nor evaluated: where a search chooses by `held_out`, the test of what it finds."""
    seed: NonNegativeInt = 0
    """Another seed deals other folds. Beside it, ids and classes alone decide, so that all methods have the same folds."""
    group_by: Regex | None = None
    """Regular expression that finds, in an id, what images that belong together share, as in a recipe: its first group counts or, without one,
    all that it matches. None: every image is on its own. Equal images and tiles of one image belong together in any case."""

    @model_validator(mode="after")
    def _held_out_is_a_fold(self) -> Self:
        for name, fold in (("held_out", self.held_out), ("aside", self.aside)):
            if fold is not None and fold >= self.count:
                raise ValueError(f"`{name}` must be below `count`, {self.count}, but got {fold}.")
        if self.aside is not None and self.held_out in (self.aside, None):
            raise ValueError(f"`aside` must be another fold than `held_out`, but got {self.aside} and {self.held_out}.")
        if self.aside is not None and self.count < 3:
            raise ValueError("`count` must be at least 3 with `aside`: one fold must be left to train on.")
        return self


class DataConfig(Section):
    """Which shards to train on, which of their images are labelled, and what a batch is."""

    shards: RelativePath
    """Folder written by `python -m cps_ray.prepare`."""
    synthetic: SyntheticConfig | None = None
    """Settings with which the embedded data set is drawn into `shards` on first use. None: the shards must exist."""
    prepare: str | None = None
    """Command or advice that is shown when the shards are missing."""
    labeled: PositiveInt | Annotated[float, Field(gt=0.0, le=1.0, strict=True)] | SubsetName | None = None
    """Training images whose masks are used: a count, or a fraction in (0, 1], drawn by `subset_seed` and stratified by class; or
    the name of a labelled subset that `python -m cps_ray.subsets` has put beside the shards, such as 1_16."""
    labeled_list: RelativePath | None = None
    """Text file with the ids of the labelled images, instead of `labeled`."""
    further_labeled: tuple[SubsetName, ...] = ()
    """Other splits, such as val, whose images with masks are labelled images, too: all of them, whatever `labeled` says of train."""
    folds: FoldsConfig | None = None
    """Cross-validation over the labelled images. None: all of them are trained on, and val is evaluated."""
    unlabeled: PositiveInt | Annotated[float, Field(gt=0.0, le=1.0, strict=True)] | None = None
    """Unlabelled images that are used: a count, or a fraction in (0, 1], drawn by `subset_seed`; a shorter draw is part of a longer one.
    None: all."""
    unlabeled_list: RelativePath | None = None
    """Text file with the ids of the unlabelled images. None: every image that is not labelled."""
    subset_seed: NonNegativeInt = 0
    """Seed of the draws of labelled and unlabelled images. `seed` of the training does not change which images are labelled."""
    crop_px: tuple[PositiveInt, PositiveInt]
    """(height, width) of a training crop."""
    labeled_batch: PositiveInt
    """Labelled images per step, over all workers."""
    unlabeled_batch: PositiveInt
    """Unlabelled images per step, over all workers; not used by `method: supervised`."""
    slices: dict[str, str] = Field(default_factory=dict)
    """Name -> glob pattern of image ids: slices of a split whose scores are also reported apart."""
    fingerprint: dict[str, Fingerprint] | None = None
    """Split -> fingerprint of its images and masks, as the manifest of the shards has it. Sweeps and trainings write it when they begin, and
    refuse other data from then on. None: not checked."""

    @field_validator("fingerprint")
    @classmethod
    def _what_is_trained_on_is_checked(
        cls, fingerprint: dict[str, str] | None, info: ValidationInfo
    ) -> dict[str, str] | None:
        # With folds, what there is of other splits is used; those of a sweep stand elsewhere, so val is asked for only where it is named.
        used = ("train",) if info.data.get("folds") else ("train", *info.data.get("further_labeled", ()))
        missing = [split for split in used if fingerprint is not None and split not in fingerprint]
        if missing:
            raise ValueError(f"must have the fingerprint of {missing[0]}, or be null for no check.")
        return fingerprint

    @field_validator("further_labeled")
    @classmethod
    def _further_splits_are_others(cls, splits: tuple[str, ...]) -> tuple[str, ...]:
        if "train" in splits or len({*splits}) < len(splits):
            raise ValueError(f"must name splits beside train, each once, but got {', '.join(splits)}.")
        return splits

    @field_validator("slices")
    @classmethod
    def _slices_are_not_networks(cls, slices: dict[str, str]) -> dict[str, str]:
        reserved = sorted({*NETWORK_NAMES, "ensemble"} & set(slices))
        if reserved:
            raise ValueError(f"must not name a slice {reserved[0]!r}: networks are reported under that name.")
        return slices

    @model_validator(mode="after")
    def _one_labeled_subset(self) -> Self:
        if (self.labeled is None) == (self.labeled_list is None):
            raise ValueError("exactly one of `labeled` and `labeled_list` must be given.")
        return self


class NetworkConfig(Section):
    """One segmentation network of segmentation-models-pytorch."""

    architecture: str = "deeplabv3plus"
    """Name that `segmentation_models_pytorch.create_model` knows, or `deeplabv3plus-cps`, the network of the CPS authors."""
    encoder: str
    """Encoder of segmentation-models-pytorch; `tu-NAME` is the model NAME of timm."""
    weights: str = "none"
    """`none`, or a tag of the encoder's hub weights, such as `imagenet`."""
    weights_file: RelativePath | None = None
    """Local file of torch.save or safetensors, or a folder with a model.safetensors, that holds every tensor of the encoder, instead of
    `weights`; what else it holds is left out."""
    mean: ColorMean | None = None
    """Mean of images per RGB channel, for values in 0..1, that the weights were trained with. None: that of the `weights`; with a
    weights_file, that of its model.json, or timm's for a `tu-` encoder; else ImageNet's."""
    std: ColorStd | None = None
    """Standard deviation per RGB channel, for values in 0..1; given with `mean` or not at all."""
    freeze_encoder: bool = False
    """Whether the encoder stays as its weights are, batch-norm statistics included, and only the rest of the network learns."""
    options: dict[str, OptionValue] = Field(default_factory=dict)
    """Further arguments of `create_model`, such as `decoder_channels`."""

    @model_validator(mode="after")
    def _frozen_is_not_random(self) -> Self:
        if self.freeze_encoder and self.weights == "none" and self.weights_file is None:
            raise ValueError(
                "`freeze_encoder: true` needs `weights` or `weights_file`: this encoder would stay random."
            )
        return self

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        if self.weights_file is not None and self.weights != "none":
            raise ValueError(f"`weights: none` must hold beside `weights_file`, but got weights={self.weights!r}.")
        return self

    @model_validator(mode="after")
    def _mean_and_std_together(self) -> Self:
        if (self.mean is None) != (self.std is None):
            given, other = ("mean", "std") if self.std is None else ("std", "mean")
            raise ValueError(f"`{given}` needs `{other}`, too: images are normalised by both.")
        return self

    @model_validator(mode="after")
    def _options_are_not_ours(self) -> Self:
        for name, why in _OUR_OPTIONS.items():
            if name in self.options:
                raise ValueError(f"`options.{name}` cannot be given: {why}.")
        return self


class ModelConfig(NetworkConfig):
    """The networks that teach each other: the settings of network a, and of network b where it has another form."""

    b: NetworkConfig | None = None
    """Form of network b. None: that of network a; only the initialisation differs."""
    networks: Annotated[int, Field(ge=2, le=len(NETWORK_NAMES), strict=True)] = 2
    """Number of networks that teach each other (n-CPS, Filipiak et al. 2021). Beyond two, their forms alternate: c is like a, d
    like b. Only `method: cps` trains more than one."""
    backbone_init: Literal["independent", "shared"] = "independent"
    """`shared`: every encoder begins as a copy of that of network a, so that only decoders and heads differ, as in the paper's
    code. With hub weights or a weights_file the encoders begin equal either way."""

    @model_validator(mode="after")
    def _shared_encoders_are_alike(self) -> Self:
        if self.backbone_init == "shared" and self.b is not None and self.b.encoder != self.encoder:
            raise ValueError(
                f"`backbone_init: shared` needs one encoder for all networks, but got {self.encoder!r} and {self.b.encoder!r}."
            )
        return self

    def of(self, number: int) -> NetworkConfig:
        """Returns the form of network `number`: 0 is a, 1 is b."""
        return self.b if self.b is not None and number % 2 else self


class OptimConfig(Section):
    """The optimizers: one per network, all with these settings."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0.0)]
    """Base learning rate for the global batch; it does not depend on the number of workers."""
    head_lr_factor: Annotated[float, Field(gt=0.0)] = 1.0
    """Learning rate of everything but the encoder, as a multiple of `lr`; 10 to 40 is usual with pretrained encoders."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum of SGD; AdamW does not use it."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4
    """Weight decay of convolution and linear weights; biases and normalisation layers have none."""
    decay: Literal["poly", "cosine", "constant"] = "poly"
    power: Annotated[float, Field(gt=0.0)] = 0.9
    """Exponent of `decay: poly`: lr * (1 - step/steps)^power."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the rate rises linearly to `lr`."""
    clip_norm: Annotated[float, Field(gt=0.0)] | None = None
    """Largest norm of one network's gradient. None: no clipping."""


class ScheduleConfig(Section):
    """Length of a training, in optimizer steps at the global batch."""

    steps: PositiveInt
    eval_every: PositiveInt
    """Steps between two evaluations; each is followed by a report and a checkpoint."""

    @model_validator(mode="after")
    def _ends_on_an_evaluation(self) -> Self:
        if self.steps % self.eval_every:
            raise ValueError(
                f"`steps % eval_every == 0` must hold, but got steps={self.steps}, eval_every={self.eval_every}."
            )
        return self


class LossConfig(Section):
    """The supervised loss. Ignored pixels (255) never count."""

    supervised: SupervisedLoss | Annotated[dict[SupervisedLoss, PositiveFloat], Field(min_length=1)] = "ce"
    """A loss by its name, or several and their weights, such as {ce: 1.0, dice: 0.5}. `ce`: cross-entropy; `ohem`: that of hard pixels;
    `dice`, `focal` (gamma 2) and `lovasz` as segmentation-models-pytorch computes them, over the images that pass a network at once; an import
    path: a function of yours, see CONTRIBUTING.md."""
    ohem_threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.7
    """ohem: pixels whose true class has at most this probability are kept."""
    ohem_min_kept: PositiveInt = 50_000
    """ohem: smallest number of pixels that are kept, per worker and micro-batch."""
    class_weights: ClassWeights | None = None
    """Weight of each class, in the order of the classes of the shards, or a power of 1 / its frequency among the labelled images' pixels, in
    (0, 1]: 0.5 is usual where rare classes are lost. The loss is divided by the sum of its pixels' weights, as torch's cross-entropy is, `dice`
    and `focal` by the sum of all weights. `lovasz` has none. None: all count the same."""

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each loss, by its name."""
        return {self.supervised: 1.0} if isinstance(self.supervised, str) else dict(self.supervised)

    @model_validator(mode="after")
    def _some_loss_has_class_weights(self) -> Self:
        if self.class_weights is not None and set(self.weights) <= WITHOUT_CLASS_WEIGHTS:
            raise ValueError("`class_weights` needs another loss in `supervised`: lovasz has none.")
        return self


class MethodConfig(Section):
    """A method: its loss on unlabelled images, whose weight may rise at the beginning, and what it wants of batches and networks.

    Base of methods of one's own, too: CONTRIBUTING.md.
    """

    weight: Annotated[float, Field(ge=0.0)] = 1.0
    start: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Fraction of all steps before this loss begins: until then every network learns from the masks alone."""
    ramp: Fraction = 0.0
    """Fraction of all steps, after `start`, over which the weight rises from 0 to `weight`. 0: full weight at once."""
    ramp_shape: Literal["linear", "sigmoid"] = "linear"
    """How the weight rises; `sigmoid` is exp(-5 (1 - t)^2) with t from 0 to 1 (Laine and Aila, ICLR 2017)."""
    padding: Literal["count", "ignore"] = "count"
    """Whether the padding round an image that is smaller than its crop has this loss, as in the CPS paper's code, or is left out of its
    mean. The telemetry of pseudo labels never counts it."""

    @property
    def views(self) -> tuple[View, ...]:
        """What a batch holds of each unlabelled image; `weak` comes first. Of `strong` there may be two."""
        return ("weak",)

    @property
    def needs_average(self) -> str:
        """The setting that needs the averaged weights of `ema`, in words; "" if none does."""
        return ""

    def num_networks(self, model: ModelConfig) -> int:
        """Number of networks that are trained."""
        return 1


class PseudoLabelConfig(MethodConfig):
    """A method whose targets are hard labels that networks give to unlabelled images."""

    confidence: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Pixels whose pseudo label has a lower probability are ignored. 0: every pixel counts, as in the CPS paper."""
    class_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Fraction of each class's pseudo labels that counts, the surest ones: a threshold of confidence per class, so that rare and hard
    classes keep as many of theirs as easy ones (Zou et al., ECCV 2018: class-balanced self-training). Taken over the pixels that
    pass the networks at once, on all workers. 1: all."""
    class_weights: ClassWeights | None = None
    """Weight of each class, in the order of the classes of the shards, or a power, as in `loss.class_weights`. The loss stays a mean over
    pixels. None: all count the same."""


class MixConfig(Section):
    """Mixing of unlabelled images with each other: CutMix (French et al., BMVC 2020) pastes boxes, ClassMix (Olsson et al., WACV 2021) the
    pixels of half of the classes that the networks see in the other image."""

    mix: Literal["none", "cutmix", "classmix", "one_box"] = "cutmix"
    """`one_box` is CutMix as in UniMatch's code: with probability 1/2 one box of 0.02 to 0.4 of the image, else nothing."""
    cutmix_boxes: PositiveInt = 3
    cutmix_area: tuple[Fraction, Fraction] = (0.25, 0.5)
    """Range of the boxes' summed area as a fraction of the image. Overlaps count too, although where two boxes overlap nothing
    is pasted."""

    @model_validator(mode="after")
    def _area_is_a_range(self) -> Self:
        low, high = self.cutmix_area
        if low > high:
            raise ValueError(f"`cutmix_area` must be (low, high) with low <= high, but got ({low}, {high}).")
        return self


class CpsConfig(PseudoLabelConfig, MixConfig):
    """Cross pseudo supervision (Chen et al., CVPR 2021), for `method: cps`."""

    weight: Annotated[float, Field(ge=0.0)] = 1.5
    """Weight of the cross pseudo loss: the sum over all directions, divided by the number of peers of a network."""
    student: Literal["weak", "strong"] = "weak"
    """What the networks learn on: the view that was labelled, as in the paper, or the same view after a strong change of colour, as
    in FixMatch."""
    teacher: Literal["network", "average"] = "network"
    """Which weights make pseudo labels: those that are trained, as in the paper, or their averages of `ema` (Tarvainen and Valpola,
    NeurIPS 2017). Labelled images (`images: all`) are always labelled by the pass that learns."""
    images: Literal["unlabeled", "all"] = "unlabeled"
    """Images that have a cross pseudo loss. In the paper: all without CutMix, unlabelled ones with it."""
    cutmix_partner: Literal["other", "self"] = "other"
    """What `mix` pastes: another image of the batch, as the paper describes, or another view of the same image, as its code does."""
    teacher_bn: Literal["train", "eval"] = "train"
    """Whether a pass of its own that makes pseudo labels, as with CutMix, normalises by statistics of its batch, as the paper's code
    does, or by running statistics. Averages always normalise by the latter."""
    forwards: Literal["joint", "separate"] = "joint"
    """Whether labelled and unlabelled images pass a network together, with joint batch statistics, or one kind after the other, as in
    the paper's code."""

    @property
    def teachers_pass_apart(self) -> bool:
        """Whether pseudo labels come from a pass of their own: students see other images or have other weights."""
        return self.mix != "none" or self.student == "strong" or self.teacher == "average"

    @property
    def pastes_other_view(self) -> bool:
        """Whether what is pasted is another view of the same image."""
        return self.mix != "none" and self.cutmix_partner == "self"

    @property
    def views(self) -> tuple[View, ...]:
        """The weak view, and another one to learn on or to paste."""
        if self.student == "strong":
            return ("weak", "strong")
        return ("weak", "elsewhere") if self.pastes_other_view else ("weak",)

    @property
    def needs_average(self) -> str:
        """Says whether averages are the teachers."""
        return "cps.teacher: average" if self.teacher == "average" else ""

    def num_networks(self, model: ModelConfig) -> int:
        """All networks, which teach each other."""
        return model.networks

    @model_validator(mode="after")
    def _one_second_view(self) -> Self:
        if self.student == "strong" and self.pastes_other_view:
            raise ValueError("`cutmix_partner: other` must hold with `student: strong`, but got self.")
        return self


class MeanTeacherConfig(MethodConfig):
    """Mean teacher (Tarvainen and Valpola, NeurIPS 2017), for `method: mean_teacher`. The teacher is the network with the averaged
    weights of `ema`."""

    weight: Annotated[float, Field(ge=0.0)] = 100.0
    """Weight of the squared difference of probabilities, averaged over pixels and classes; 100 as in the CPS paper's code."""

    @property
    def views(self) -> tuple[View, ...]:
        """The teacher's view and the student's."""
        return ("weak", "strong")

    @property
    def needs_average(self) -> str:
        """The average is the teacher."""
        return "method: mean_teacher"


class FixMatchConfig(PseudoLabelConfig, MixConfig):
    """FixMatch (Sohn et al., NeurIPS 2020), for `method: fixmatch`: one network, whose confident labels of weak views are the
    targets for strong views."""

    weight: Annotated[float, Field(ge=0.0)] = 1.0
    confidence: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Pixels whose pseudo label has a lower probability are ignored."""
    teacher: Literal["self", "average"] = "self"
    """Which weights make pseudo labels: those that are trained, or their averages of `ema`."""
    view: Literal["weak", "strong"] = "strong"
    """What the network learns on: strong views, or the very view that was labelled. The latter with `confidence: 0` is plain
    self-training, the control of CPS (single-network pseudo supervision, Table 6 of the paper)."""
    strong_views: Annotated[int, Field(ge=1, le=2, strict=True)] = 1
    """Number of strong views of each image, in colours and with CutMix boxes of their own; their losses are averaged."""
    feature_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability with which each channel between encoder and decoder is dropped in a further pass of the weak view. Its loss then
    has half the weight and that of the strong views the other half, as in UniMatch. 0: no such pass."""

    @property
    def views(self) -> tuple[View, ...]:
        """The view that is labelled, and those to learn on."""
        if self.view == "weak":
            return ("weak",)
        return ("weak", "strong") if self.strong_views == 1 else ("weak", "strong", "strong")

    @property
    def needs_average(self) -> str:
        """Says whether the average is the teacher."""
        return "fixmatch.teacher: average" if self.teacher == "average" else ""

    @model_validator(mode="after")
    def _weak_views_are_single(self) -> Self:
        if self.view == "weak" and self.strong_views != 1:
            raise ValueError(f"`strong_views: 1` must hold with `view: weak`, but got {self.strong_views}.")
        return self


class UniMatchConfig(PseudoLabelConfig, MixConfig):
    """UniMatch (Yang et al., CVPR 2023; V2: TPAMI 2025), for `method: unimatch`: one network, two strong views and perturbed
    features. As in the authors' code the whole loss is halved, the supervised one too: SGD then needs twice the rate of another
    method's for the same step. The loss on masks alone before `start` is not."""

    weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the loss on unlabelled images. v1: half the mean of the strong views and half that of dropped features; v2: the mean of
    the strong views."""
    version: Literal["v1", "v2"] = "v1"
    """`v1`: the network labels images for itself, and learns on the weak view with dropped features, too. `v2`: the average of `ema`
    labels them, and the two strong views divide the channels of their features."""
    feature_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """v1: probability with which each channel between encoder and decoder is dropped. v2: fraction of the images whose channels are
    divided."""
    confidence: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Pixels whose pseudo label has a lower probability are ignored."""
    mix: Literal["none", "cutmix", "classmix", "one_box"] = "one_box"
    """Drawn for each strong view anew."""
    padding: Literal["count", "ignore"] = "ignore"
    """Whether the padding counts, as with other methods; the authors' code leaves it out."""

    @property
    def views(self) -> tuple[View, ...]:
        """The view that is labelled, and two to learn on."""
        return ("weak", "strong", "strong")

    @property
    def needs_average(self) -> str:
        """Says whether the average is the teacher."""
        return "unimatch.version: v2" if self.version == "v2" else ""


class EmaConfig(Section):
    """Averaged weights. If there are any, the networks with these weights are evaluated and exported."""

    decay: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """A step keeps the fraction min(decay, 1 - 1/(step + 1)) of the average. None: no average."""


class AugmentConfig(Section):
    """What training sees of the images: which come up how often, and their augmentation, the same for labelled and unlabelled ones."""

    repeat_threshold: Fraction = 0.0
    """Classes that a smaller fraction of the labelled images shows are repeated: an image comes up as often as the largest
    max(1, sqrt(threshold / fraction)) of its classes says (repeat factors: Gupta et al., CVPR 2019). 0: all images equally often."""

    scale: tuple[Annotated[float, Field(gt=0.0)], Annotated[float, Field(gt=0.0)]] = (0.5, 2.0)
    """Range of the random zoom before the crop."""
    scales: Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], Field(min_length=1)] | None = None
    """Zooms of which one is drawn, all equally likely, instead of the range `scale`."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    color: Fraction = 0.0
    """Strength of random brightness, contrast, saturation and hue. 0: none, as in the paper."""
    blur: Fraction = 0.0
    """Probability of a Gaussian blur."""

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> Self:
        low, high = self.scale
        if low > high:
            raise ValueError(f"`scale` must be (low, high) with low <= high, but got ({low}, {high}).")
        return self


class ComputeConfig(Section):
    """How a step is computed. Its result stays the same, up to rounding and batch-norm statistics."""

    autocast: Precision = "none"
    """Precision of the networks' passes. `none`: float32, in which NVIDIA GPUs from Ampere on compute convolutions in TF32, as torch does by
    default. `fp16` scales the loss, and needs a GPU."""
    channels_last: bool = False
    compile: bool = False
    """Whether `torch.compile` compiles the networks. On a CPU it needs a C++ compiler, and the first step takes minutes."""
    accumulate: PositiveInt = 1
    """Number of micro-batches per step and worker, whose gradients are accumulated."""
    cpu_kernels: bool = True
    """Whether our own code computes dilated depthwise convolutions on CPUs, several times as fast as torch (docs/step.md). Results
    agree to float tolerance; with false they are those of torch, bit for bit."""


class ViewsConfig(Section):
    """How a network sees an image that it predicts, and how the scores of its views are put together."""

    window_px: tuple[PositiveInt, PositiveInt] | Literal["whole"] | None = None
    """(height, width) of a sliding window; smaller images are padded to it. `whole`: every image in one piece, whatever memory it takes.
    None: in one piece up to 8 times the pixels of `data.crop_px`, larger images in windows of that size."""
    stride_px: tuple[PositiveInt, PositiveInt] | None = None
    """(vertical, horizontal) distance between windows. None: two thirds of the window, as in the CPS paper's code."""
    window_batch: PositiveInt = 8
    """Number of windows that pass a network at once."""
    sum: Literal["logits", "probabilities"] = "logits"
    """What is averaged where windows overlap, and over `scales` and `flip`."""
    scales: Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], Field(min_length=1)] = (1.0,)
    """Zooms at which each image is predicted."""
    flip: bool = False
    """Whether each image is also predicted mirrored."""

    @model_validator(mode="after")
    def _windows_touch(self) -> Self:
        if self.stride_px is None:
            return self
        if not isinstance(self.window_px, tuple):
            raise ValueError(f"`stride_px` needs a (height, width) in `window_px`, but got {self.window_px or 'none'}.")
        for stride, window in zip(self.stride_px, self.window_px, strict=True):
            if stride > window:
                raise ValueError(f"`stride_px` must be at most `window_px`, but got {stride} for {window}.")
        return self


class EvaluationConfig(ViewsConfig):
    """How images are evaluated, at their own size: every pixel counts once."""

    networks: Literal["all", "a"] = "all"
    """`a`: network a alone, as `val/miou`. `all`: also the others, as `val/b/miou`, and the mean of all networks' probabilities, as
    `val/ensemble/miou`."""
    hidden_images: NonNegativeInt = 32
    """Largest number of unlabelled training images whose masks, if there are any, are used to measure pseudo labels (`pseudo/miou`).
    No loss and no search sees these masks. 0: they are never read."""


class InferenceConfig(ViewsConfig):
    """What of a training's settings its model keeps, to predict images as they were evaluated."""

    crop_px: tuple[PositiveInt, PositiveInt]
    """(height, width) of a training crop, for `window_px: null`."""
    autocast: Precision = "none"
    """`compute.autocast` of the training."""


class ResourcesConfig(Section):
    """What one training takes of the cluster."""

    workers: PositiveInt = 1
    """Number of Ray Train workers; the global batch is divided over them."""
    cpus_per_worker: Annotated[float, Field(gt=0.0)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0.0)] = 0.0
    placement: Literal["replicated", "one_network_per_worker"] = "replicated"
    """`replicated`: each worker trains all networks on a batch shard of its own. `one_network_per_worker`: workers 0, 1, ... train
    networks a, b, ... in turn, and those with the same batch shard exchange label maps. With two networks, a worker then
    has half the weights, optimizer state and gradient traffic."""


@contextmanager
def _as_value_error(prefix: str = "") -> Iterator[None]:
    """Makes of a ConfigError, without `prefix`, what pydantic reports beside other faults."""
    try:
        yield
    except ConfigError as err:
        raise ValueError(str(err).removeprefix(prefix)) from err


def _method_class(path: str) -> type[MethodConfig]:
    """Returns the class at an import path. Raises ConfigError unless it is a method."""
    plugin = load_plugin("method", path)
    if not (isinstance(plugin, type) and issubclass(plugin, MethodConfig) and hasattr(plugin, "losses")):
        raise ConfigError(
            f"method: {path} must be a subclass of cps_ray.MethodConfig with `losses(self, config, state, micro)`, which yields a dict "
            "with `loss` for each network in turn."
        )
    return plugin


@cache
def _plugged_in(path: str, custom: str) -> MethodConfig:
    """Returns the method at an import path with the settings `custom`, JSON. Raises ConfigError if either is not what it must be."""
    settings = parse(_method_class(path), json.loads(custom))
    if settings.views not in VIEWS:
        raise ConfigError(
            f"method: {path}: its views must be one of {', '.join(map(str, VIEWS))}, but is {settings.views!r}."
        )
    return settings


class TrainConfig(Section):
    """All settings of one training."""

    seed: Seed = 0
    """Seed of initialisation, order of images, augmentation and mixing. Which images are labelled has its own, `data.subset_seed`."""
    method: Literal["supervised", "cps", "mean_teacher", "fixmatch", "unimatch"] | ImportPath = "cps"
    """`cps` trains `model.networks` networks on all images. `supervised` trains network a alone on the labelled images: the
    baseline. `mean_teacher`, `fixmatch` and `unimatch` train network a alone on all images. An import path: a method of yours, see
    CONTRIBUTING.md."""
    custom: dict[str, Any] = Field(default_factory=dict)
    """Settings of a `method` of yours."""
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    loss: LossConfig = LossConfig()
    cps: CpsConfig = CpsConfig()
    mean_teacher: MeanTeacherConfig = MeanTeacherConfig()
    fixmatch: FixMatchConfig = FixMatchConfig()
    unimatch: UniMatchConfig = UniMatchConfig()
    ema: EmaConfig = EmaConfig()
    augment: AugmentConfig = AugmentConfig()
    compute: ComputeConfig = ComputeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()
    sinks: tuple[ImportPath, ...] = ()
    """Import paths of sinks of yours, which take the metrics of every evaluation as well: CONTRIBUTING.md."""

    @field_validator("sinks")
    @classmethod
    def _sinks_are_some(cls, sinks: tuple[str, ...]) -> tuple[str, ...]:
        with _as_value_error("sinks: "):
            for path in sinks:
                load_sink(path)
        return sinks

    @field_validator("method")
    @classmethod
    def _method_is_one(cls, method: str) -> str:
        if is_import_path(method):
            with _as_value_error("method: "):
                _method_class(method)
        return method

    @field_validator("custom")
    @classmethod
    def _custom_fits(cls, custom: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        method = info.data.get("method", "")  # none if it is wrong itself
        if is_import_path(method):
            with _as_value_error("method: "):
                return _plugged_in(method, json.dumps(custom)).model_dump(mode="json")
        if custom and method:
            raise ValueError(f"is for a method of yours, MODULE:NAME, but method is {method}.")
        return custom

    @property
    def settings(self) -> MethodConfig | None:
        """What the method is set to: the section of its name or, of a plug-in, its own class with `custom`. None: supervised."""
        if is_import_path(self.method):
            return _plugged_in(self.method, json.dumps(self.custom))
        found: MethodConfig | None = getattr(self, self.method, None)
        return found

    @property
    def method_name(self) -> str:
        """The method's name in metrics: that of a plug-in's class, without its module."""
        return self.method.rpartition(":")[2]

    @property
    def networks(self) -> int:
        """Number of networks that are trained."""
        return 1 if self.settings is None else self.settings.num_networks(self.model)

    @property
    def semi_supervised(self) -> bool:
        """Whether unlabelled images are used."""
        return self.settings is not None

    @property
    def class_weights(self) -> dict[str, tuple[float, ...] | float]:
        """Weights of the classes, or the power that makes them, by the section of the loss that has some."""
        sections = {name: section for name, section in self if isinstance(section, Section)}
        if is_import_path(self.method):
            sections["custom"] = self.settings  # type: ignore[assignment]
        weights = {name: getattr(section, "class_weights", None) for name, section in sections.items()}
        return {name: found for name, found in weights.items() if found is not None}

    def weighed(self, pixels: Sequence[int]) -> Self:
        """Returns the same training with weights in place of powers, for labelled images with so many pixels of each class."""
        powers = {name: power for name, power in self.class_weights.items() if isinstance(power, float)}
        return self._with_class_weights({name: _weights_of(pixels, power) for name, power in powers.items()})

    def without_class_weights(self) -> Self:
        """Returns the same training with all classes weighing the same."""
        return self._with_class_weights(dict.fromkeys(self.class_weights))

    def _with_class_weights(self, weights: Mapping[str, tuple[float, ...] | None]) -> Self:
        changes: dict[str, Any] = {
            name: {**self.custom, "class_weights": found}
            if name == "custom"
            else getattr(self, name).model_copy(update={"class_weights": found})
            for name, found in weights.items()
        }
        return self.model_copy(update=changes)

    @property
    def inference(self) -> InferenceConfig:
        """How the networks predict images."""
        views = self.evaluation.model_dump(include=set(ViewsConfig.model_fields))
        return InferenceConfig(**views, crop_px=self.data.crop_px, autocast=self.compute.autocast)

    @property
    def unlabeled_views(self) -> tuple[View, ...]:
        """What a batch holds of each unlabelled image."""
        return () if self.settings is None else self.settings.views

    @property
    def num_batch_shards(self) -> int:
        """Number of batch shards that the global batch is divided into: workers that train the same network have different ones."""
        resources = self.resources
        return resources.workers // (self.networks if resources.placement == "one_network_per_worker" else 1)

    @model_validator(mode="after")
    def _workers_fit_the_networks(self) -> Self:
        resources = self.resources
        if resources.placement == "one_network_per_worker" and (
            self.networks == 1 or resources.workers % self.networks
        ):
            raise ValueError(
                f"`resources.placement: one_network_per_worker` needs method cps and workers in multiples of its {self.model.networks} networks, "
                f"but got method={self.method!r}, workers={resources.workers}."
            )
        return self

    @model_validator(mode="after")
    def _batches_divide_evenly(self) -> Self:
        num_micro_batches = self.num_batch_shards * self.compute.accumulate
        batches = {"labeled_batch": self.data.labeled_batch}
        if self.semi_supervised:
            batches["unlabeled_batch"] = self.data.unlabeled_batch
        divisor = "resources.workers" if self.resources.placement == "replicated" else "workers per network"
        for name, size in batches.items():
            if size % num_micro_batches:
                raise ValueError(
                    f"`data.{name} % ({divisor} * compute.accumulate) == 0` must hold, "
                    f"but got {size} images for {self.num_batch_shards} x {self.compute.accumulate}."
                )
        return self

    @model_validator(mode="after")
    def _teachers_from_averages_need_them(self) -> Self:
        setting = "" if self.settings is None else self.settings.needs_average
        if setting and self.ema.decay is None:
            usual = 0.996 if self.method == "unimatch" else 0.99
            raise ValueError(f"`ema.decay` must be given with `{setting}`. {usual} is usual.")
        return self

    @model_validator(mode="after")
    def _half_precision_needs_a_gpu(self) -> Self:
        if self.compute.autocast == "fp16" and self.resources.gpus_per_worker == 0:
            raise ValueError(
                "`compute.autocast: fp16` needs `resources.gpus_per_worker` above 0, but got 0. On a CPU choose bf16 or none."
            )
        return self

    def dump(self, base: str | None = None) -> dict[str, Any]:
        """Returns a plain dict of every setting; paths are relative to the folder `base`, or absolute without it."""
        return self.model_dump(mode="json", context={"base": base})

    @property
    def sha256(self) -> str:
        """Hash of every setting but `sinks`, which say where metrics go: equal for trainings that are the same."""
        settings = {name: value for name, value in self.dump().items() if name != "sinks"}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


METHOD_SETTINGS = (
    "method",
    *(name for name, field in TrainConfig.model_fields.items() if isinstance(field.default, MethodConfig)),
    "custom",
)
"""Settings and sections that say what the method does."""
