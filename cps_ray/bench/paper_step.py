"""The step of CPS with CutMix as the paper's algorithm states it: eight passes, float logits mixed at full size.

`bench step` compares the engine with it. On purpose it has no code of the engine; only the initial weights are the same.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PaperStep:
    """One step of two networks, which map normalised images (B, 3, H, W) to logits (B, C, H, W). Each has its own SGD.

    Source: Chen, Yuan, Zeng, Wang, CVPR 2021.
    """

    def __init__(self, networks: Sequence[nn.Module], lr: float, weight_decay: float, cps_weight: float) -> None:
        self.net1, self.net2 = networks
        self.optimizers = [
            torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay) for net in networks
        ]
        self.cps_weight = cps_weight

    def __call__(self, x: Tensor, y: Tensor, u0: Tensor, u1: Tensor, mask: Tensor) -> float:
        """Takes a step and returns its loss.

        `x`, labelled, and `u0` and `u1`, unlabelled: normalised float (B, 3, H, W). `y`: int64 (B, H, W), 255 is ignored.
        `mask`: float (B, 1, H, W), 1 where u1 is pasted into u0.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        mixed = u0 * (1 - mask) + u1 * mask
        # Teachers: each network sees both sources unmixed; their logits are mixed like the images.
        with torch.no_grad():
            logits1_u0, logits1_u1 = self.net1(u0), self.net1(u1)
            logits2_u0, logits2_u1 = self.net2(u0), self.net2(u1)
            label1 = (logits1_u0 * (1 - mask) + logits1_u1 * mask).argmax(dim=1)
            label2 = (logits2_u0 * (1 - mask) + logits2_u1 * mask).argmax(dim=1)
        mixed1, mixed2 = self.net1(mixed), self.net2(mixed)
        cross = F.cross_entropy(mixed1, label2, ignore_index=255) + F.cross_entropy(mixed2, label1, ignore_index=255)
        labeled1, labeled2 = self.net1(x), self.net2(x)
        supervised = F.cross_entropy(labeled1, y, ignore_index=255) + F.cross_entropy(labeled2, y, ignore_index=255)
        loss = supervised + self.cps_weight * cross
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.step()
        return float(loss.detach())
