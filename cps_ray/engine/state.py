"""Everything a training is at one step, and its checkpoint.

Random numbers are a function of (seed, step) and the position in the data is the step, so a checkpoint that holds the
step holds both: a resumed training equals the unbroken one.
"""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cps_ray.config.train import OptimConfig, TrainConfig
from cps_ray.engine.networks import Pair, build_pair
from cps_ray.engine.norm import synchronise
from cps_ray.engine.ranks import Ranks
from cps_ray.errors import CheckpointError

STATE_FILE = "state.pt"
META_FILE = "meta.json"


@dataclass(slots=True)
class TrainState:
    """The mutable heart of a training; `train_step` advances it."""

    pair: Pair
    model: nn.Module
    """`pair` itself, or DDP around it."""
    optimizers: list[torch.optim.Optimizer]
    """Of network a, and of b if there is one."""
    scaler: torch.amp.GradScaler
    """Does nothing unless autocast is fp16."""
    ranks: Ranks
    step: int = 0

    def save(self, folder: Path, metrics: dict[str, Any]) -> None:
        """`state.pt` and `meta.json` (step and metrics, readable without torch) in an existing folder."""
        torch.save(
            {
                "step": self.step,
                "networks": self.pair.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "scaler": self.scaler.state_dict(),
            },
            folder / STATE_FILE,
        )
        temporary = folder / f"{META_FILE}.tmp"
        size = (folder / STATE_FILE).stat().st_size  # tells a whole copy of this folder from one cut short
        temporary.write_text(json.dumps({"step": self.step, "metrics": metrics, "bytes": size}))
        os.replace(temporary, folder / META_FILE)

    def load(self, folder: Path) -> None:
        """Continues from a checkpoint. Raises CheckpointError if it is damaged or of another network."""
        saved = read_checkpoint(folder)
        try:
            self.pair.load_state_dict(saved["networks"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.scaler.load_state_dict(saved["scaler"])
        except (RuntimeError, ValueError, KeyError) as err:
            reason = " ".join(str(err).split())[:300]
            raise CheckpointError(f"{folder}: the checkpoint must be of this config's networks, but {reason}") from err
        self.step = int(saved["step"])


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The saved dict, on the CPU, read without unpickling code. Raises CheckpointError."""
    path = folder / STATE_FILE
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # a damaged file raises one of many types
        reason = " ".join(str(err).split())[:200]
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {reason}") from err
    return saved


def build_state(config: TrainConfig, num_classes: int, ranks: Ranks) -> TrainState:
    """Step 0 on this rank's device: networks, optimizers, scaler; wrapped in DDP when there are more ranks."""
    pair = build_pair(config, num_classes).to(ranks.device)
    if config.compute.channels_last:
        pair = pair.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _freeze_unused(pair, config.data.crop_px)
    model: nn.Module = pair
    if ranks.world > 1:
        # In place, so that `pair` and `model` go on sharing their networks.
        pair.a = synchronise(pair.a, ranks.device)  # type: ignore[assignment]
        if pair.b is not None:
            pair.b = synchronise(pair.b, ranks.device)  # type: ignore[assignment]
        ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        # Buffers are equal on all ranks already (synchronised batch norm); exchanging them would break the second forward.
        model = DistributedDataParallel(pair, device_ids=ids, forward_sync_buffers=False, gradient_as_bucket_view=True)
    networks = [pair.a] if pair.b is None else [pair.a, pair.b]
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.compute.autocast == "fp16")
    return TrainState(pair, model, [_optimizer(config.optim, network) for network in networks], scaler, ranks)


def _freeze_unused(pair: Pair, crop_px: tuple[int, int]) -> None:
    """Some networks have parameters that no output depends on, such as the classifier's last convolution in smp's
    EfficientNet; DDP would wait for their gradients. On any number of workers, so that checkpoints stay the same.
    """
    mean = pair.a.mean
    image = torch.zeros(1, 3, *crop_px, dtype=torch.uint8, device=mean.device)
    pair.eval()  # batch norm keeps its statistics
    logits_a, logits_b = pair(image)
    (logits_a.sum() if logits_b is None else logits_a.sum() + logits_b.sum()).backward()
    for parameter in pair.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    pair.zero_grad(set_to_none=True)
    pair.train()


def _optimizer(optim: OptimConfig, network: nn.Module) -> torch.optim.Optimizer:
    """Weight decay on weights of two and more dimensions; none on biases and normalisation."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr)
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context in which networks run."""
    if config.compute.autocast == "none":
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if config.compute.autocast == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)
