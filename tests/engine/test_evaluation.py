import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import changed
from torch import Tensor, nn

from cps_ray.config.train import ENSEMBLE, TrainConfig
from cps_ray.datasets.loader import eval_batches, metrics_of
from cps_ray.datasets.shards import open_shards
from cps_ray.engine import evaluation
from cps_ray.engine.batch import IGNORE, EvalBatch
from cps_ray.engine.evaluation import Counts, Tally, evaluate, evaluate_hidden, further_scores, summarise
from cps_ray.engine.inference import predict, windows
from cps_ray.engine.networks import Segmenter
from cps_ray.engine.ranks import Ranks

MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)
SUMS = ["logits", "probabilities"]


# --- what a network says of an image, against loops in double precision ---


class Tiny(nn.Module):
    """One convolution whose zero padding makes scores depend on where a window ends. Remembers what it saw."""

    def __init__(self, stride: int = 1, classes: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.conv = nn.Conv2d(3, classes, 5, stride=stride, padding=2)
        nn.init.uniform_(self.conv.weight, -0.5, 0.5, generator=torch.Generator().manual_seed(5))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        made: Tensor = self.conv(x)
        return made


def tiny_segmenter(stride: int = 1) -> tuple[Segmenter, Tiny]:
    network = Tiny(stride)
    return Segmenter(network, MEAN, STD).eval(), network


def random_images(images: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (images, 3, height, width), generator=torch.Generator().manual_seed(seed)).byte()


def normalised(image_3HW: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) * 255 for values in (MEAN, STD))
    return (image_3HW.double() - mean) / std


def said(network: Tiny, x_3HW: Tensor, how: str) -> Tensor:
    """Scores of one normalised image or window, (C, H, W) in double precision; networks of stride 1."""
    assert network.conv.bias is not None
    height, width = x_3HW.shape[-2:]
    padded = F.pad(x_3HW, (2, 2 + -width % 32, 2, 2 + -height % 32))
    logits = F.conv2d(padded[None], network.conv.weight.double(), network.conv.bias.double())[0, :, :height, :width]
    return logits if how == "logits" else logits.exp() / logits.exp().sum(0)


def slid(network: Tiny, x_3HW: Tensor, window: tuple[int, int], stride: tuple[int, int], how: str) -> Tensor:
    """Every pixel on its own: the mean over all windows that contain it."""
    height, width = x_3HW.shape[-2:]
    above, before = (max(0, side - own) // 2 for side, own in zip(window, (height, width), strict=True))
    tall, wide = max(height, window[0]), max(width, window[1])
    field = torch.zeros(3, tall, wide, dtype=torch.float64)
    field[:, above : above + height, before : before + width] = x_3HW
    corners = set()
    for k in range(30):
        for m in range(30):
            corners.add((min(k * stride[0], tall - window[0]), min(m * stride[1], wide - window[1])))
    windows = {(y, x): said(network, field[:, y : y + window[0], x : x + window[1]], how) for y, x in corners}
    mean = torch.zeros(3, height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            found = [
                scores[:, row + above - y, column + before - x]
                for (y, x), scores in windows.items()
                if 0 <= row + above - y < window[0] and 0 <= column + before - x < window[1]
            ]
            mean[:, row, column] = torch.stack(found).mean(0)
    return mean


def stretch(x_CHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with pixels' centres at halves, one weight at a time."""

    def weights(old: int, new: int) -> Tensor:
        matrix = torch.zeros(new, old, dtype=torch.float64)
        for place in range(new):
            at = min(max((place + 0.5) * old / new - 0.5, 0.0), old - 1.0)
            low = int(at)
            matrix[place, low] += 1 - (at - low)
            matrix[place, min(low + 1, old - 1)] += at - low
        return matrix

    height, width = x_CHW.shape[-2:]
    return weights(height, size[0]) @ x_CHW.double() @ weights(width, size[1]).T


@pytest.mark.parametrize("how", SUMS)
@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [
        ((15, 29), (10, 16), None),  # larger than a window, by no multiple of the stride
        ((19, 23), (13, 11), (7, 11)),  # odd; windows side by side across
        ((9, 23), (14, 10), (3, 5)),  # smaller along one side, by an odd number of pixels
        ((10, 7), (17, 32), None),  # smaller along both
        ((10, 12), (10, 12), (1, 1)),  # exactly one
    ],
)
def test_a_pixel_is_the_mean_over_the_windows_that_see_it(
    tiny: TrainConfig, how: str, size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int] | None
) -> None:
    config = changed(tiny, evaluation__window_px=window, evaluation__stride_px=stride, evaluation__sum=how)
    segmenter, network = tiny_segmenter()
    image = random_images(2, *size)
    found = predict(config.inference, segmenter, image)
    assert found.dtype == torch.float32
    stride = stride or (math.ceil(window[0] * 2 / 3), math.ceil(window[1] * 2 / 3))
    for n in range(2):
        expected = slid(network, normalised(image[n]), window, stride, how)
        torch.testing.assert_close(found[n].double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("how", SUMS)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.7), (1.3,)])
def test_scales_and_mirror_images_are_averaged(
    tiny: TrainConfig, how: str, flip: bool, scales: tuple[float, ...]
) -> None:
    config = changed(tiny, evaluation__scales=scales, evaluation__flip=flip, evaluation__sum=how)
    segmenter, network = tiny_segmenter()
    image = random_images(2, 23, 37, seed=1)
    found = predict(config.inference, segmenter, image)
    for n in range(2):
        terms = []
        for scale in scales:
            scaled = normalised(stretch(image[n], (round(23 * scale), round(37 * scale))))
            terms.append(stretch(said(network, scaled, how), (23, 37)))
            if flip:
                mirrored = said(network, scaled.flip(-1), how)
                terms.append(stretch(mirrored, (23, 37)).flip(-1))
        torch.testing.assert_close(found[n].double(), sum(terms) / len(terms), rtol=0, atol=5e-5)


def test_windows_of_scaled_and_mirrored_images(tiny: TrainConfig) -> None:
    config = changed(tiny, evaluation__scales=(0.5, 1.5), evaluation__flip=True, evaluation__window_px=(12, 16))
    segmenter, network = tiny_segmenter()
    image = random_images(1, 15, 21, seed=2)
    terms = []
    for size in ((8, 10), (22, 32)):  # 7.5, 10.5; 22.5, 31.5
        scaled = normalised(stretch(image[0], size))
        for mirrored in (False, True):
            scores = slid(network, scaled.flip(-1) if mirrored else scaled, (12, 16), (8, 11), "logits")
            terms.append(stretch(scores.flip(-1) if mirrored else scores, (15, 21)))
    torch.testing.assert_close(
        predict(config.inference, segmenter, image)[0].double(), sum(terms) / 4, rtol=0, atol=5e-5
    )


@pytest.mark.parametrize(
    ("size", "changes", "seen"),
    [
        ((32, 64), {}, [(1, 32, 64)]),  # eight crops
        ((34, 64), {}, [(8, 16, 16), (8, 16, 16), (2, 16, 16)]),  # more: rows 0, 11, 18, columns 0, 11, ..., 44, 48
        ((34, 64), {"evaluation__window_px": "whole"}, [(1, 64, 64)]),  # padded to a multiple of 32
        ((34, 64), {"evaluation__window_px": (40, 64)}, [(1, 64, 64)]),
        ((16, 32), {"evaluation__scales": (1.0, 4.0)}, [(1, 32, 32), *[(8, 16, 16)] * 9]),
    ],
)
def test_images_of_more_than_eight_crops_are_evaluated_in_windows_of_a_crop(
    tiny: TrainConfig, size: tuple[int, int], changes: dict[str, Any], seen: list[tuple[int, ...]]
) -> None:
    segmenter, network = tiny_segmenter(stride=16)
    predict(changed(tiny, data__crop_px=(16, 16), **changes).inference, segmenter, random_images(1, *size))
    assert [(x.shape[0], *x.shape[-2:]) for x in network.seen] == [
        (batch, -(-height // 32) * 32, -(-width // 32) * 32) for batch, height, width in seen
    ]


def test_the_two_sums_differ_and_probabilities_sum_to_one(tiny: TrainConfig) -> None:
    segmenter, _ = tiny_segmenter()
    image = random_images(2, 30, 50)
    views = {"evaluation__scales": (0.75, 1.0), "evaluation__flip": True, "evaluation__window_px": (16, 16)}
    logits, prob = (predict(changed(tiny, **views, evaluation__sum=how).inference, segmenter, image) for how in SUMS)
    torch.testing.assert_close(prob.sum(1), torch.ones(2, 30, 50))
    assert not torch.equal(logits.argmax(1), prob.argmax(1))
    once_logits, once_prob = (predict(changed(tiny, evaluation__sum=how).inference, segmenter, image) for how in SUMS)
    torch.testing.assert_close(once_logits.softmax(1), once_prob)  # one term: nothing to average


@pytest.mark.parametrize("stride", [1, 2])
def test_how_many_windows_at_once_changes_nothing(tiny: TrainConfig, stride: int) -> None:
    image = random_images(3, 40, 70)
    found = []
    for batch in (1, 8):
        segmenter, network = tiny_segmenter(stride)
        config = changed(tiny, evaluation__window_px=(32, 32), evaluation__window_batch=batch)
        found.append(predict(config.inference, segmenter, image))
        assert [x.shape[0] for x in network.seen] == ([1] * 18 if batch == 1 else [8, 8, 2])
    torch.testing.assert_close(found[0], found[1])


def test_coarse_logits_of_odd_images_are_those_of_the_network(tiny: TrainConfig) -> None:
    segmenter, _ = tiny_segmenter(stride=4)
    image = random_images(2, 37, 45)
    with torch.inference_mode():
        torch.testing.assert_close(predict(tiny.inference, segmenter, image), segmenter.logits(image))


def test_the_windows_of_the_reference(tiny: TrainConfig) -> None:
    assert windows(1024, 800, 534) == [0, 224]
    assert windows(2048, 800, 534) == [0, 534, 1068, 1248]
    segmenter, network = tiny_segmenter(stride=32)
    for window, size, count in (
        ((800, 800), (1024, 2048), 8),
        ((512, 512), (375, 500), 1),
        ((32, 512), (32, 512 + 342), 2),  # 342 is 512 * 2 / 3 rounded up
        ((32, 512), (32, 512 + 343), 3),
    ):
        network.seen.clear()
        predict(changed(tiny, evaluation__window_px=window).inference, segmenter, random_images(1, *size))
        assert sum(x.shape[0] for x in network.seen) == count
        assert all(x.shape[-2:] == window for x in network.seen)


def test_a_small_image_lies_amid_exact_zeros(tiny: TrainConfig) -> None:
    segmenter, network = tiny_segmenter(stride=32)
    image = random_images(1, 375, 500)
    predict(changed(tiny, evaluation__window_px=(512, 512)).inference, segmenter, image)
    seen = network.seen[0][0].clone()
    inside = seen[:, 68 : 68 + 375, 6:506]
    torch.testing.assert_close(inside.double(), normalised(image[0]), rtol=0, atol=1e-5)
    inside.zero_()
    assert not seen.any()


class Table(nn.Module):
    """The red value of a pixel says which row of logits it gets; the normalisation of its Segmenter does nothing."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", logits.float())
        self.made: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        rows = self.rows
        assert isinstance(rows, Tensor)
        self.made.append(rows[x[:, 0].round().long()].movedim(-1, 1))
        return self.made[-1]


def table(logits: Tensor) -> Segmenter:
    return Segmenter(Table(logits), (0.0,) * 3, (1 / 255,) * 3)


def test_a_whole_image_costs_one_forward_and_no_copy(tiny: TrainConfig) -> None:
    segmenter = table(torch.eye(4)).eval()
    image = torch.zeros(2, 3, 32, 64, dtype=torch.uint8)
    found = predict(tiny.inference, segmenter, image)
    made = segmenter.network.made
    assert isinstance(made, list)
    assert len(made) == 1
    assert found.data_ptr() == made[0].data_ptr()


def test_half_precision_networks_give_full_precision_scores(tiny: TrainConfig) -> None:
    segmenter, _ = tiny_segmenter(stride=2)
    image = random_images(1, 40, 40)
    half = predict(changed(tiny, compute__autocast="bf16").inference, segmenter, image)
    assert half.dtype == torch.float32
    exact = predict(tiny.inference, segmenter, image)
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.1)


# --- what is counted over a split ---


def drawn(images: int, height: int, width: int, classes: int, first: int = 0) -> EvalBatch:
    generator = torch.Generator().manual_seed(first)
    image = torch.randint(0, 8, (images, 3, height, width), generator=generator).byte()
    mask = torch.randint(0, classes, (images, height, width), generator=generator).byte()
    mask[torch.rand(mask.shape, generator=generator) < 0.2] = IGNORE
    return EvalBatch(tuple(f"val_{first + n:02d}" for n in range(images)), image, mask)


def batches() -> list[EvalBatch]:
    """Six images in batches of different sizes, of images too. Class 4 is nowhere true."""
    return [drawn(3, 9, 14, 4), drawn(1, 33, 20, 4, first=3), drawn(2, 5, 5, 4, first=4)]


def random_logits(seed: int, classes: int = 5) -> Tensor:
    return torch.randn(8, classes, generator=torch.Generator().manual_seed(seed)) * 2


def by_hand(
    rule: Callable[[int], int], classes: int, member: Callable[[str], bool] = lambda name: True
) -> tuple[Tensor, int]:
    """The matrix of a prediction that is a function of the red value; how many pixels count."""
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    for batch in batches():
        for n, name in enumerate(batch.ids):
            pixels = zip(batch.image[n, 0].flatten().tolist(), batch.mask[n].flatten().tolist(), strict=True)
            for red, true in pixels if member(name) else ():
                if true != IGNORE:
                    matrix[true, rule(red)] += 1
    return matrix, int(matrix.sum())


def best(logits: Tensor) -> Callable[[int], int]:
    return lambda red: int(logits[red].argmax())


def best_mean(*logits: Tensor) -> Callable[[int], int]:
    return lambda red: int(torch.stack([each[red].double().softmax(0) for each in logits]).mean(0).argmax())


def test_every_pixel_counts_once_for_each_network_and_group(tiny: TrainConfig) -> None:
    tables = {name: random_logits(seed) for seed, name in enumerate("abc")}
    config = changed(tiny, model__networks=3, data__slices={"odd": "val_*[135]", "last": "val_05", "none": "test*"})
    networks = {name: table(logits).train() for name, logits in tables.items()}
    counts = evaluate(config, networks, iter(batches()), 5, Ranks())
    whole, pixels = by_hand(best(tables["a"]), 5)
    assert torch.equal(counts.whole_split, whole)
    assert pixels == sum(int((batch.mask != IGNORE).sum()) for batch in batches())
    assert set(counts.slices) == {"odd", "last", "none"}
    odd = by_hand(best(tables["a"]), 5, lambda name: int(name[-2:]) % 2 == 1)[0]
    assert torch.equal(counts.slices["odd"], odd)
    assert torch.equal(counts.slices["last"], by_hand(best(tables["a"]), 5, lambda name: name == "val_05")[0])
    assert not counts.slices["none"].any()
    assert list(counts.others) == ["b", "c", ENSEMBLE]
    assert torch.equal(counts.others["b"], by_hand(best(tables["b"]), 5)[0])
    assert torch.equal(counts.others["c"], by_hand(best(tables["c"]), 5)[0])
    assert torch.equal(counts.others[ENSEMBLE], by_hand(best_mean(*tables.values()), 5)[0])
    same = 0
    for batch in batches():
        for red, true in zip(batch.image[:, 0].flatten().tolist(), batch.mask.flatten().tolist(), strict=True):
            same += true != IGNORE and int(tables["a"][red].argmax()) == int(tables["b"][red].argmax())
    assert 0 < same < pixels
    assert counts.agreement.tolist() == [same, pixels]


def expected_calibration_error(prob: Tensor, target: Tensor) -> float:
    """Guo et al. (ICML 2017), equations 3 and 5, bin by bin over all pixels, from probabilities (pixels, classes) in double precision."""
    kept = target.numpy() != IGNORE
    confidence, hit = prob.numpy().max(1)[kept], (prob.numpy().argmax(1) == target.numpy())[kept]
    error = 0.0
    for m in range(15):
        members = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if members.any():
            error += members.mean() * abs(hit[members].mean() - confidence[members].mean())
    return float(error)


@pytest.mark.parametrize("how", SUMS)
def test_calibration_is_that_of_the_averaged_scores_over_whole_images(
    tiny: TrainConfig, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(evaluation._CHUNK_PX, "cpu", 50)  # no multiple of an image's pixels
    config = changed(tiny, evaluation__window_px=(8, 8), evaluation__sum=how)
    networks = {"a": tiny_segmenter()[0], "b": table(random_logits(1, 3))}
    found = summarise(evaluate(config, networks, batches(), 3, Ranks()), "xyz", "val")
    per_network: dict[str, list[Tensor]] = {"a": [], "b": []}
    for batch in batches():
        for name, network in networks.items():
            scores = predict(config.inference, network, batch.image).double().movedim(1, -1).reshape(-1, 3)
            per_network[name].append(scores.softmax(1) if how == "logits" else scores)
    prob = {name: torch.cat(parts) for name, parts in per_network.items()}
    target = torch.cat([batch.mask.flatten() for batch in batches()])
    ensemble = (prob["a"] + prob["b"]) / 2
    for name, expected in (("ece", prob["a"]), ("b/ece", prob["b"]), ("ensemble/ece", ensemble)):
        assert found[f"val/{name}"] == pytest.approx(expected_calibration_error(expected, target), abs=1e-6)
        assert found[f"val/{name}"] > 0.01


def test_hidden_masks_score_each_class_of_network_a_alone(tiny: TrainConfig) -> None:
    networks = {name: table(random_logits(seed)) for seed, name in enumerate("ab")}
    found = evaluate_hidden(tiny, networks, batches(), "vwxyz", Ranks())
    matrix = by_hand(best(random_logits(0)), 5)[0].double()
    ious = (matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())).tolist()
    expected = {f"pseudo/iou/{name}": value for name, value in zip("vwxyz", ious, strict=True) if value == value}
    assert found == pytest.approx(expected | {"pseudo/miou": sum(expected.values()) / len(expected)})
    assert evaluate_hidden(tiny, networks, [], "vwxyz", Ranks()) == {}


OPINIONS = torch.tensor([[0.40, 0.0005, 0.399, 0.20, 0.0005], [0.02, 0.45, 0.06, 0.20, 0.27]])
"""Their mean is largest at 2. Network a says 0, b says 1, as would a softmax of the probabilities; the mean of logits says 3."""


@pytest.mark.parametrize("how", SUMS)
def test_the_ensemble_is_the_mean_of_probabilities(tiny: TrainConfig, how: str) -> None:
    a, b = OPINIONS.log()
    assert (int(a.argmax()), int(b.argmax()), int((a + b).argmax())) == (0, 1, 3)
    assert (int(OPINIONS.sum(0).argmax()), int(OPINIONS.softmax(1).sum(0).argmax())) == (2, 1)
    networks = {"a": table(a.expand(8, -1) + 1.0), "b": table(b.expand(8, -1) - 3.0)}
    counts = evaluate(changed(tiny, evaluation__sum=how), networks, batches(), 5, Ranks())
    for matrix, label in ((counts.whole_split, 0), (counts.others["b"], 1), (counts.others[ENSEMBLE], 2)):
        assert matrix[:, label].sum() == matrix.sum() > 0
    assert counts.agreement[0] == 0


def test_one_network_is_judged_where_there_is_one_or_it_is_asked_for(tiny: TrainConfig) -> None:
    a, b = (table(random_logits(seed)) for seed in (0, 1))
    only_a = changed(tiny, evaluation__networks="a")
    for config, networks in ((tiny, {"a": a}), (only_a, {"a": a, "b": b})):
        counts = evaluate(config, networks, batches(), 5, Ranks())
        assert counts.others == {}
        assert counts.agreement.tolist() == [0, 0]
        assert torch.equal(counts.whole_split, by_hand(best(random_logits(0)), 5)[0])
    assert b.network.made == []


@dataclass
class Threads:
    """Ranks that are threads: each hands in its tensor, all read the sum."""

    ranks: int
    spread: int
    slots: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.all = threading.Barrier(self.ranks)
        self.shards = [threading.Barrier(self.spread) for _ in range(self.ranks // self.spread)]

    def total(self, barrier: threading.Barrier, kind: str, rank: int, members: range, tensor: Tensor) -> Tensor:
        assert tensor.is_contiguous()
        self.slots[kind, rank] = tensor.clone()
        barrier.wait(10)
        parts = [self.slots[kind, member] for member in members]
        barrier.wait(10)
        made = parts[0].clone()
        for part in parts[1:]:
            made += part
        return made


@dataclass
class ThreadRank:
    """The members of `Ranks` that an evaluation uses."""

    threads: Threads
    rank: int
    device: torch.device

    @property
    def ranks_per_shard(self) -> int:
        return self.threads.spread

    def sum(self, tensor: Tensor) -> Tensor:
        return self.threads.total(self.threads.all, "all", self.rank, range(self.threads.ranks), tensor)

    def sum_over_networks(self, tensor: Tensor) -> Tensor:
        if self.ranks_per_shard == 1:
            return tensor
        shard = self.rank // self.ranks_per_shard
        members = range(shard * self.ranks_per_shard, (shard + 1) * self.ranks_per_shard)
        return self.threads.total(self.threads.shards[shard], "same shard", self.rank, members, tensor)


@pytest.mark.parametrize("evaluated", ["all", "a"])
@pytest.mark.parametrize("how", SUMS)
@pytest.mark.parametrize(("ranks", "spread", "names"), [(2, 1, "ab"), (2, 2, "ab"), (4, 2, "ab"), (6, 3, "abc")])
def test_any_number_of_ranks_counts_the_same(
    tiny: TrainConfig, evaluated: str, how: str, ranks: int, spread: int, names: str
) -> None:
    changes: dict[str, Any] = {"model__networks": len(names), "data__slices": {"odd": "val_*[135]"}}
    views = {"evaluation__window_px": (8, 8), "evaluation__sum": how, "evaluation__networks": evaluated}
    config = changed(tiny, **changes, **views)

    def networks() -> dict[str, Segmenter]:
        return {name: table(random_logits(seed)) for seed, name in enumerate(names)}

    alone = evaluate(config, networks(), batches(), 5, Ranks())
    threads = Threads(ranks, spread)

    def on(rank: int) -> Counts:
        own = {names[rank % spread]: networks()[names[rank % spread]]} if spread > 1 else networks()
        shard = batches()[rank // spread :: ranks // spread]
        return evaluate(config, own, shard, 5, ThreadRank(threads, rank, torch.device("cpu")))  # type: ignore[arg-type]

    with ThreadPoolExecutor(ranks) as pool:
        for counts in pool.map(on, range(ranks)):
            assert torch.equal(counts.whole_split, alone.whole_split)
            assert torch.equal(counts.slices["odd"], alone.slices["odd"])
            assert list(counts.others) == list(alone.others)
            assert all(torch.equal(counts.others[name], alone.others[name]) for name in alone.others)
            assert torch.equal(counts.agreement, alone.agreement)
            assert {name: sums.tolist() for name, sums in counts.calibration.items()} == {
                name: sums.tolist() for name, sums in alone.calibration.items()
            }
            assert all(sums[0].sum() == alone.whole_split.sum() for sums in counts.calibration.values())


def test_a_tally_adds_by_name_and_keeps_shapes() -> None:
    tally = Tally({"matrix": (2, 2), "pair": (2,), "nobody": (3,)}, torch.device("cpu"))
    for _ in range(2):
        tally.add("matrix", torch.tensor([[1, 2], [3, 4]]))
    tally.add("pair", torch.tensor([5, 6]))
    counts = tally.reduce(Ranks())
    assert {name: total.tolist() for name, total in counts.items()} == {
        "matrix": [[2, 4], [6, 8]],
        "pair": [5, 6],
        "nobody": [0, 0, 0],
    }


# --- names of scores ---


def test_names_and_values_of_scores() -> None:
    matrix = torch.tensor([[8, 2, 0], [0, 10, 0], [0, 0, 0]])
    other = torch.tensor([[10, 0, 0], [0, 5, 5], [0, 0, 0]])
    slices = {"day": other, "night": torch.zeros(3, 3)}
    sums = torch.zeros(3, 15, dtype=torch.int64)
    sums[:, 9], sums[:, 14] = torch.tensor([8, 4, 5 * 2**24]), torch.tensor([12, 12, 11 * 2**24])
    calibration = {"a": sums, "b": torch.zeros_like(sums), ENSEMBLE: sums[:, 9:10]}
    counts = Counts(matrix, slices, {"b": other, ENSEMBLE: matrix}, torch.tensor([15, 20]), calibration)
    found = summarise(counts, iter(["sky", "road", "car"]), "val")
    assert found == pytest.approx(
        {
            "val/miou": (8 / 10 + 10 / 12) / 2,
            "val/iou/sky": 8 / 10,
            "val/iou/road": 10 / 12,
            "val/iou_micro": 18 / 22,
            "val/pixel_accuracy": 18 / 20,
            "val/class_accuracy": (8 / 10 + 1) / 2,
            "val/day/miou": (1 + 1 / 2 + 0) / 3,
            "val/day/iou/sky": 1,
            "val/day/iou/road": 1 / 2,
            "val/day/iou/car": 0,
            "val/b/miou": (1 + 1 / 2 + 0) / 3,
            "val/ensemble/miou": (8 / 10 + 10 / 12) / 2,
            "val/agreement": 15 / 20,
            "val/ece": (1 + 1) / 20,
            "val/ensemble/ece": 1 / 8,
        }
    )


def test_nothing_seen_gives_no_scores(tiny: TrainConfig) -> None:
    networks = {"a": table(torch.eye(5)), "b": table(torch.eye(5))}
    assert summarise(evaluate(tiny, networks, [], 5, Ranks()), "vwxyz", "val") == {}


@pytest.mark.parametrize(
    "changes", [{}, {"method": "supervised"}, {"evaluation__networks": "a"}, {"model__networks": 3}]
)
def test_an_objective_may_be_whatever_is_measured(tiny: TrainConfig, changes: dict[str, Any]) -> None:
    config = changed(tiny, **changes, data__slices={"first": "val_00000"})
    shards = open_shards(config.data.shards)
    known = metrics_of(shards, config, "val", further_scores(config.evaluation, config.networks))
    logits = torch.randn(256, len(shards.classes), generator=torch.Generator().manual_seed(0))
    networks = {name: table(logits) for name in "abc"[: config.networks]}

    def read() -> Iterator[EvalBatch]:
        return eval_batches(shards, "val", size_px=4 * 32 * 48)

    found = summarise(evaluate(config, networks, read(), len(shards.classes), Ranks()), shards.classes, "val")
    # A class that is only predicted has an IoU, of 0, that no objective should be.
    # Nor an error, which is better the lower it is.
    assert {name for name in known if "/iou/" not in name} == {
        name for name in found if "/iou/" not in name and not name.endswith("/ece")
    }
    assert {name for name in known if "/iou/" in name} <= set(found)
    assert ("val/agreement" in known) == (len(changes) == 0 or "model__networks" in changes)
