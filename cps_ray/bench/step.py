"""`bench step`: compares our step with the eight-pass step of the paper's algorithm, on the same networks and images, without Ray."""

import argparse
import gc
import json
import multiprocessing
import platform
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from cps_ray.bench import wide
from cps_ray.bench.paper_step import PaperStep
from cps_ray.config.reader import parse_train
from cps_ray.config.train import TrainConfig
from cps_ray.engine.batch import IGNORE, Batch
from cps_ray.engine.cpu.threads import tune_cpu
from cps_ray.engine.dense import upsample
from cps_ray.engine.mixing import cutmix_masks
from cps_ray.engine.networks import Segmenter, build_networks
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state
from cps_ray.engine.step import train_step

PAPER = "paper, 8 passes"
PAPER_TUNED = "paper, with our memory settings"
_FAITHFUL = {"cutmix_partner": "self", "forwards": "separate"}
"""Settings of `cps` that make our step compute what the paper's step computes."""
_BF16_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12}
"""Part of a GPU's name -> dense bf16 operations per second by the maker's data sheet."""
_WITHOUT_DROPOUT = {"deeplabv3plus": {"decoder_aspp_dropout": 0.0}}
_WARM_UP_STEPS = 2

Figures = dict[str, Any]
Changes = dict[str, dict[str, Any]]
"""Section of a training -> its settings."""


def training_config(args: argparse.Namespace, encoder: str, changes: Changes) -> TrainConfig:
    """Returns a CPS training with CutMix and these changes; nothing is read from its `shards`."""
    raw = {
        "data": {
            "shards": ".",
            "labeled": 1,
            "crop_px": [args.crop, args.crop],
            "labeled_batch": args.batch,
            "unlabeled_batch": args.batch,
        },
        # Without dropout, so that the first losses of all contestants can be compared.
        "model": {
            "architecture": args.architecture,
            "encoder": encoder,
            "options": _WITHOUT_DROPOUT.get(args.architecture, {}),
        },
        "optim": {"lr": 1e-3, "decay": "constant"},
        "schedule": {"steps": 10**6, "eval_every": 10**6},
        "loss": changes.get("loss", {}),
        "cps": {"weight": 1.0, "mix": "cutmix", **changes.get("cps", {})},
        "compute": {"channels_last": True, **changes.get("compute", {})},
        "resources": {"gpus_per_worker": 1.0 if getattr(args, "device", "cpu") == "cuda" else 0.0},
    }
    return parse_train(raw, "bench")


def contestants(args: argparse.Namespace) -> dict[str, Changes | None]:
    """Returns name -> changes of our training, of what is compared; None is the paper's own step."""
    rows: dict[str, Changes | None] = {
        PAPER: None,
        **({PAPER_TUNED: None} if args.device == "cpu" else {}),
        "ours, the paper's switches": {"cps": _FAITHFUL},
        "ours": {},
    }
    if args.loss:
        rows[f"ours, {' + '.join(args.loss)}"] = {"loss": {"supervised": dict.fromkeys(args.loss, 1.0)}}
    if args.bf16:
        rows["ours, bf16"] = {"compute": {"autocast": "bf16"}}
    if args.compile:
        rows["ours, compiled"] = {"compute": {"compile": True}}
    if args.bf16 and args.compile:
        rows["ours, bf16, compiled"] = {"compute": {"autocast": "bf16", "compile": True}}
    return rows


def make_batch(args: argparse.Namespace) -> Batch:
    """Returns random images, masks of random patches, and two views of the unlabelled images, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, args.batch, 3, args.crop, args.crop), dtype=torch.uint8, generator=generator)
    cells = torch.randint(0, args.classes, (args.batch, 1, args.crop // 16, args.crop // 16), generator=generator)
    mask = cells.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, 0].to(torch.uint8)
    mask[:, : args.crop // 10] = IGNORE
    return Batch(images[0], mask, images[1], images[2])


class _WithUpsampling(nn.Module):
    """A network as a user would build it, whose logits have the size of the image."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.network = segmenter.network

    def forward(self, image_B3HW: Tensor) -> Tensor:
        return upsample(self.network(image_B3HW), (image_B3HW.shape[-2], image_B3HW.shape[-1]))


def make_step(args: argparse.Namespace, encoder: str, name: str) -> Callable[[], float]:
    """Returns a function that takes one step of the contestant `name` and returns its loss."""
    device, batch, changes = torch.device(args.device), make_batch(args), contestants(args)[name]
    if changes is not None:
        config = training_config(args, encoder, changes)
        state = build_state(config, args.classes, Ranks(device=device))
        if args.device == "cuda":
            batch = batch.map(lambda images: images.pin_memory())
        return lambda: float(train_step(config, state, batch)["loss"])
    config = training_config(args, encoder, {"cps": _FAITHFUL, "compute": {"channels_last": False}})
    segmenters = build_networks(config, args.classes)
    mean, std = segmenters["a"].mean, segmenters["a"].std
    x, u0, u1 = (
        ((images.float() - mean) / std).to(device)
        for images in (batch.labeled_image, batch.unlabeled_image, batch.unlabeled_second)
        if images is not None
    )
    y = batch.labeled_mask.long().to(device)
    networks = [_WithUpsampling(segmenter).to(device).train() for segmenter in segmenters.values()]
    step = PaperStep(networks, config.optim.lr, config.optim.weight_decay, config.cps.weight)
    masks = cutmix_masks(config.cps, config.seed, 0, range(args.batch), args.crop, args.crop)
    mask = masks.unsqueeze(1).float().to(device)
    return lambda: step(x, y, u0, u1, mask)


def _contest(args: argparse.Namespace, encoder: str, name: str, line: Connection) -> None:
    """Takes a step for every True that comes over `line`, and sends its seconds and loss; runs in a process of its own.

    After a False, sends the peak memory above what the process held before there was a network, and the operations of a step.
    """
    # The paper's step runs as a plain program does: without the memory settings that tune_cpu makes.
    if name == PAPER or args.device == "cuda":
        torch.set_num_threads(args.threads)
    else:
        tune_cpu(args.threads)
    before = process_bytes("VmRSS")
    step = make_step(args, encoder, name)
    while line.recv():
        gc.collect()  # outside the measured time
        begin = time.perf_counter()
        loss = step()  # reading the loss waits for the device
        line.send((time.perf_counter() - begin, loss))
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else process_bytes("VmHWM") - before
    line.send({"peak_bytes": peak, "flops": _operations(step)})


def _measure(args: argparse.Namespace, encoder: str) -> dict[str, Figures]:
    """Returns the figures of each contestant. They take their steps in turn; the first ones do not count."""
    spawn = multiprocessing.get_context("spawn")
    lines: dict[str, Connection] = {}
    workers = []
    for name in contestants(args):
        lines[name], other_end = spawn.Pipe()
        workers.append(spawn.Process(target=_contest, args=(args, encoder, name, other_end), daemon=True))
        workers[-1].start()
        other_end.close()
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    first_loss: dict[str, float] = {}
    for number in range(_WARM_UP_STEPS + args.rounds):
        for name, line in lines.items():
            line.send(True)
            took, loss = line.recv()
            first_loss.setdefault(name, loss)
            if number >= _WARM_UP_STEPS:
                seconds[name].append(took)
    rows: dict[str, Figures] = {}
    for name, line in lines.items():
        line.send(False)
        step_s = median(seconds[name])
        rows[name] = {
            "seconds": seconds[name],
            "step_s": step_s,
            # Step by step, because both of a pair were taken under the same load of the machine.
            "of_paper": median(own / paper for own, paper in zip(seconds[name], seconds[PAPER], strict=True)),
            "images_per_s": 2 * args.batch / step_s,
            "first_loss": first_loss[name],
            **line.recv(),
        }
    for worker in workers:
        worker.join()
    return rows


def _operations(step: Callable[[], float]) -> int:
    """Takes a step and returns the multiplications and additions of its convolutions; a backward pass counts as two forward passes."""
    total = 0

    def count(layer: nn.Module, _: Any, out: Any) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            per_output = layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
            total += 2 * out.numel() * per_output * (3 if torch.is_grad_enabled() else 1)

    hook = nn.modules.module.register_module_forward_hook(count)
    with torch.compiler.set_stance("force_eager"):  # compiled code calls no hooks
        step()
    hook.remove()
    return total


def process_bytes(kind: str) -> int:
    """Returns the resident memory of this process: VmRSS, now; VmHWM, at most so far. 0 where Linux does not report it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    return 0


def device_name(device: str) -> str:
    """Returns the name of the GPU, or the architecture of the CPU, that `device` (cpu or cuda) means."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"


def run(args: argparse.Namespace) -> int:
    """Measures, prints the tables, writes the JSON."""
    console = wide()
    figures: Figures = {
        "device": device_name(args.device),
        "threads": args.threads,
        "torch": torch.__version__,
        "crop_px": args.crop,
        "batch": f"{args.batch} + {args.batch}",
        "classes": args.classes,
        "architecture": args.architecture,
        "encoders": {},
    }
    peak = next((value for name, value in _BF16_PEAK.items() if name in figures["device"]), None)
    for encoder in args.encoders:
        rows = _measure(args, encoder)
        for row in rows.values():
            row["memory_of_paper"] = row["peak_bytes"] / rows[PAPER]["peak_bytes"]
            if peak is not None:
                row["fraction_of_bf16_peak"] = row["flops"] / row["step_s"] / peak
        figures["encoders"][encoder] = rows
        if args.json:  # after each encoder, which takes minutes: an interruption loses little
            args.json.write_text(json.dumps(figures, indent=2) + "\n")
        console.print(
            f"\n{args.architecture} {encoder}, {args.crop}x{args.crop} px, {args.batch} + {args.batch} images, {args.classes} "
            f"classes, {figures['device']}, {args.threads} threads, float32 unless the name says bf16"
        )
        table = Table("", "s/step", "ratio", "images/s", "peak MB", "ratio", "GFLOP", "first loss")
        for name, row in rows.items():
            table.add_row(
                name,
                f"{row['step_s']:.3f}",
                f"{row['of_paper']:.2f}",
                f"{row['images_per_s']:.2f}",
                f"{row['peak_bytes'] / 2**20:.0f}",
                f"{row['memory_of_paper']:.2f}",
                f"{row['flops'] / 1e9:.0f}",
                f"{row['first_loss']:.4f}",
            )
        console.print(table)
        for name, row in rows.items():
            if "fraction_of_bf16_peak" in row:
                console.print(f"{name}: {100 * row['fraction_of_bf16_peak']:.1f} % of the card's bf16 peak")
    return 0
