"""Everything a training is at one step, and its checkpoint.

Random numbers are a function of (seed, step) and the position in the data is the step, so a checkpoint that holds the
step holds both: a resumed training equals the unbroken one.
"""

import contextlib
import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cps_ray.config.train import NETWORK_NAMES, OptimConfig, TrainConfig
from cps_ray.engine.networks import Segmenter, build_network, build_networks
from cps_ray.engine.norm import synchronise
from cps_ray.engine.quicken import quicken
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.schedules import average_decay
from cps_ray.errors import CheckpointError

STATE_FILE = "state.pt"
META_FILE = "meta.json"


@dataclass(slots=True)
class TrainState:
    """The mutable heart of a training; `train_step` advances it. The dicts have the networks that this rank trains, by name."""

    networks: dict[str, Segmenter]
    models: dict[str, nn.Module]
    """Each network itself, or DDP around it: so one network's pass forward and back ends before the next one's begins."""
    optimizers: dict[str, torch.optim.Optimizer]
    averages: dict[str, Segmenter]
    """Averaged weights, if there is an `ema.decay`: what is judged."""
    scaler: torch.amp.GradScaler
    """Does nothing unless autocast is fp16."""
    ranks: Ranks
    step: int = 0
    collapsed: int = 0
    """Evaluations in a row at which the networks did not tell classes apart."""

    @property
    def judged(self) -> dict[str, Segmenter]:
        """What is evaluated, judged and exported."""
        return self.averages or self.networks

    def snapshot(self) -> dict[str, Any] | None:
        """What a checkpoint holds: of all networks, wherever they are trained, so that it does not depend on the placement.

        A collective of the ranks that hold share 0; None but on rank 0.
        """
        if self.ranks.share != 0:
            return None
        own = {
            name: {
                "network": network.state_dict(),
                "optimizer": self.optimizers[name].state_dict(),
                "average": self.averages[name].state_dict() if self.averages else None,
            }
            for name, network in self.networks.items()
        }
        if self.ranks.split > 1:
            gathered: list[Any] | None = [None] * self.ranks.split if self.ranks.rank == 0 else None
            dist.gather_object(_on_cpu(own), gathered, dst=0, group=self.ranks.peers)
            if gathered is None:
                return None
            own = {name: kept for each in gathered for name, kept in each.items()}
        return {"step": self.step, "collapsed": self.collapsed, "networks": own, "scaler": self.scaler.state_dict()}

    def load(self, folder: Path) -> None:
        """Continues from a checkpoint. Raises CheckpointError if it is damaged or of another config."""
        saved = read_checkpoint(folder)
        try:
            for name, network in self.networks.items():
                kept = saved["networks"][name]
                network.load_state_dict(kept["network"])
                self.optimizers[name].load_state_dict(kept["optimizer"])
                if self.averages:
                    self.averages[name].load_state_dict(kept["average"])
            self.scaler.load_state_dict(saved["scaler"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as err:
            reason = " ".join(str(err).split())[:300]
            raise CheckpointError(f"{folder}: the checkpoint must be of this config's networks, but {reason}") from err
        self.step, self.collapsed = int(saved["step"]), int(saved["collapsed"])


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu()
    return {key: _on_cpu(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def write_checkpoint(folder: Path, snapshot: dict[str, Any], metrics: dict[str, Any]) -> None:
    """`state.pt` and `meta.json` (step and metrics, readable without torch) in an existing folder."""
    torch.save(snapshot, folder / STATE_FILE)
    temporary = folder / f"{META_FILE}.tmp"
    size = (folder / STATE_FILE).stat().st_size  # tells a whole copy of this folder from one cut short
    temporary.write_text(json.dumps({"step": snapshot["step"], "metrics": metrics, "bytes": size}))
    os.replace(temporary, folder / META_FILE)


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The saved dict, on the CPU, read without unpickling code. Raises CheckpointError."""
    path = folder / STATE_FILE
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # a damaged file raises one of many types
        reason = " ".join(str(err).split())[:200]
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {reason}") from err
    return saved


def load_networks(config: TrainConfig, checkpoint: Path, num_classes: int) -> dict[str, Segmenter]:
    """A checkpoint's networks, averaged if they were averaged, in evaluation mode on the CPU. Raises CheckpointError."""
    saved = read_checkpoint(checkpoint).get("networks", {})
    networks = {}
    for number, name in enumerate(NETWORK_NAMES[: config.networks]):
        # Its weights all come from the checkpoint, so none are fetched.
        bare = config.model.of(number).model_copy(update={"weights": "none", "weights_file": None})
        networks[name] = build_network(bare, num_classes, seed=0)
        try:
            kept = saved[name]
            networks[name].load_state_dict(kept["network"] if kept["average"] is None else kept["average"])
        except (RuntimeError, KeyError, TypeError) as err:
            raise CheckpointError(
                f"{checkpoint}: must hold this config's network {name}, but {' '.join(str(err).split())[:300]}"
            ) from err
        networks[name].eval()
    return networks


def build_state(config: TrainConfig, num_classes: int, ranks: Ranks) -> TrainState:
    """Step 0 on this rank's device: networks, optimizers, averages, scaler; wrapped in DDP where others train the same."""
    networks = build_networks(config, num_classes)
    if ranks.split > 1:
        name = NETWORK_NAMES[ranks.own]
        networks = {name: networks[name]}
    models: dict[str, nn.Module] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    averages: dict[str, Segmenter] = {}
    for name, network in networks.items():
        network.to(ranks.device)
        if config.compute.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        _freeze_unused(network, config.data.crop_px)
        if ranks.device.type == "cpu":
            quicken(network)
        if config.ema.decay is not None:
            averages[name] = copy.deepcopy(network).eval().requires_grad_(False)
        if ranks.shares > 1:
            synchronise(network, ranks.device, ranks.alike)
        if config.compute.compile:
            network.network.compile(dynamic=False)  # in place: names of weights stay
        models[name] = _parallel(network, ranks) if ranks.shares > 1 else network
        optimizers[name] = _optimizer(config.optim, network)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.compute.autocast == "fp16")
    return TrainState(networks, models, optimizers, averages, scaler, ranks)


def _parallel(network: Segmenter, ranks: Ranks) -> nn.Module:
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    # Buffers are equal on all ranks already (synchronised batch norm); exchanging them would break a second forward.
    return DistributedDataParallel(
        network, device_ids=ids, process_group=ranks.alike, forward_sync_buffers=False, gradient_as_bucket_view=True
    )


def _freeze_unused(network: Segmenter, crop_px: tuple[int, int]) -> None:
    """Some networks have parameters that no output depends on, such as the classifier's last convolution in smp's
    EfficientNet; DDP would wait for their gradients. On any number of workers, so that checkpoints stay the same.
    """
    image = torch.zeros(1, 3, *crop_px, dtype=torch.uint8, device=network.mean.device)
    network.eval()  # batch norm keeps its statistics
    network(image).sum().backward()
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    network.zero_grad(set_to_none=True)
    network.train()


def _optimizer(optim: OptimConfig, network: nn.Module) -> torch.optim.Optimizer:
    """Weight decay on weights of two and more dimensions; none on biases and normalisation."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, fused=True)
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=True)


@torch.no_grad()
def update_averages(config: TrainConfig, state: TrainState) -> None:
    """Moves the averaged weights, and batch norm's running statistics, towards those after update number `state.step`."""
    for name, average in state.averages.items():
        decay = average_decay(config.ema.decay or 0.0, state.step)
        for kept, new in zip(average.state_dict().values(), state.networks[name].state_dict().values(), strict=True):
            if kept.is_floating_point():
                kept.lerp_(new, 1.0 - decay)
            else:
                kept.copy_(new)


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context in which networks run."""
    if config.compute.autocast == "none":
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if config.compute.autocast == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)
