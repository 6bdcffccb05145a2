"""CutMix between unlabelled images (French et al., BMVC 2020), in the form of the CPS reference, boxes combined by XOR, and in that of
UniMatch, one box. ClassMix (Olsson et al., WACV 2021): the pixels of classes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cps_ray.config.train import MixConfig
from cps_ray.engine.batch import IGNORE

# B images, H W pixels.
# These tell the random numbers here from each other, and from others of the same (seed, step).
_TAG = 0xC07
_CLASSMIX_TAG = 0xC1A


def boxes_mask(settings: MixConfig, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Where the partner is pasted: bool (H, W).

    Each of n boxes has the area a/n with a ~ U(cutmix_area) and a random aspect; overlaps cancel.
    """
    area = rng.uniform(*settings.cutmix_area, size=settings.cutmix_boxes)
    tall = area ** rng.uniform(size=settings.cutmix_boxes)
    # n boxes of area a have sides of a whole box over sqrt(n), hence n times a/n in all.
    shrink = 1.0 / np.sqrt(settings.cutmix_boxes)
    box_h = np.round(tall * shrink * height).astype(int)
    box_w = np.round(area / np.maximum(tall, 1e-12) * shrink * width).astype(int)
    top = np.round((height - box_h) * rng.uniform(size=settings.cutmix_boxes)).astype(int)
    left = np.round((width - box_w) * rng.uniform(size=settings.cutmix_boxes)).astype(int)
    mask = np.zeros((height, width), dtype=bool)
    for y, x, h, w in zip(top, left, box_h, box_w, strict=True):
        mask[y : y + h, x : x + w] ^= True  # XOR, as in the reference: where boxes overlap, the image stays its own
    return mask


def one_box_mask(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Where the partner is pasted, as in the code of UniMatch (Yang et al., CVPR 2023): bool (H, W), with probability 1/2 nowhere.

    Otherwise it is a box of 0.02 to 0.4 of the area, 0.3 to 1/0.3 times as tall as the whole in proportion to its width, drawn again
    until it lies inside.
    """
    mask = np.zeros((height, width), dtype=bool)
    if rng.random() < 0.5:
        return mask
    area = rng.uniform(0.02, 0.4)
    tall = wide = top = left = 1.0  # fractions of height and width
    while top + tall > 1.0 or left + wide > 1.0:
        aspect = rng.uniform(0.3, 1.0 / 0.3)
        tall, wide = np.sqrt(area * aspect), np.sqrt(area / aspect)
        top, left = rng.random(2)
    y, x = int(top * height), int(left * width)
    mask[y : y + int(tall * height), x : x + int(wide * width)] = True
    return mask


def cutmix_masks(
    settings: MixConfig, seed: int, step: int, positions: range, height: int, width: int, view: int = 0
) -> Tensor:
    """Masks of the images at these positions of the global batch: bool (B, H, W), a function of (seed, step, position, view)."""
    masks = []
    for at in positions:
        rng = _generator(_TAG, seed, step, at, view)
        one_box = settings.mix == "one_box"
        masks.append(one_box_mask(height, width, rng) if one_box else boxes_mask(settings, height, width, rng))
    return torch.from_numpy(np.stack(masks))


def _generator(tag: int, seed: int, step: int, at: int, view: int) -> np.random.Generator:
    return np.random.default_rng((tag, seed, step, at, view) if view else (tag, seed, step, at))


def classmix_masks(label_BHW: Tensor, seed: int, step: int, positions: range, view: int = 0) -> Tensor:
    """Where an image is pasted: the pixels of half of the classes (rounded down) in its labels, uint8 (B, H, W), drawn anew for each
    image (Olsson et al., WACV 2021). IGNORE is no class. bool (B, H, W), a function of (labels, seed, step, position, view).
    """
    draws = np.stack([_generator(_CLASSMIX_TAG, seed, step, at, view).random(IGNORE) for at in positions])
    flat_BN = label_BHW.flatten(1).long()
    present = torch.zeros(len(flat_BN), IGNORE + 1, device=flat_BN.device).scatter_(1, flat_BN, 1.0)[:, :IGNORE] > 0
    draw = torch.from_numpy(draws).to(flat_BN.device, non_blocking=True).masked_fill(~present, np.inf)
    rank = draw.argsort(dim=1).argsort(dim=1)
    chosen = F.pad(rank < present.sum(dim=1, keepdim=True) // 2, (0, 1))  # IGNORE is never chosen
    return chosen.gather(1, flat_BN).view(label_BHW.shape)


def paste(mask_BHW: Tensor, own: Tensor, partner: Tensor) -> Tensor:
    """`partner` where the mask is set, else `own`: for images (B, 3, H, W) and label maps (B, H, W) alike."""
    mask = mask_BHW.unsqueeze(1) if own.dim() == 4 else mask_BHW
    return torch.where(mask, partner, own)
