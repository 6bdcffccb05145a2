"""`bench placement`: the same global batches trained with networks split over workers and replicated; losses, wire, memory."""

import argparse
import json
import multiprocessing
import socket
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from cps_ray.bench import wide
from cps_ray.bench.step import held, make_batch, training
from cps_ray.config.space import apply
from cps_ray.engine.ranks import join
from cps_ray.engine.state import TrainState, build_state
from cps_ray.engine.step import train_step

Figures = dict[str, Any]
PLACEMENTS = ("replicated", "one_network_per_worker")


def _bytes(values: list[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in values)


def _weights(state: TrainState) -> int:
    return sum(_bytes([*network.state_dict().values()]) for network in state.networks.values())


def _optimizers(state: TrainState) -> int:
    kept = [
        value for optimizer in state.optimizers.values() for of in optimizer.state.values() for value in of.values()
    ]
    return _bytes([value for value in kept if isinstance(value, Tensor)])


def _on_wire() -> int:
    """Bytes that loopback has carried, headers and all."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    return 0


def _work(args: argparse.Namespace, placement: str, rank: int, port: int, line: Connection) -> None:
    torch.set_num_threads(1)
    before = held("VmRSS")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.workers)
    config = apply(
        training(args, args.encoder, {}, {}), {"resources": {"placement": placement, "workers": args.workers}}, "bench"
    )
    ranks = join(config, rank, args.workers, torch.device("cpu"))
    state = build_state(config, args.classes, ranks)
    batch = make_batch(args).map(lambda images: images.chunk(ranks.num_batch_shards)[ranks.batch_shard])
    losses = [train_step(config, state, batch)["loss"]]
    dist.barrier()
    carried, seconds = _on_wire(), []
    for _ in range(args.steps):
        begin = time.perf_counter()
        losses.append(train_step(config, state, batch)["loss"])
        seconds.append(time.perf_counter() - begin)
    dist.barrier()
    carried = _on_wire() - carried
    mean = ranks.sum(torch.stack(losses)) / args.workers
    line.send(
        {
            "losses": mean.tolist(),
            "wire_bytes_per_step": carried / args.steps,
            "weight_bytes": _weights(state),
            "optimizer_bytes": _optimizers(state),
            "peak_bytes": held("VmHWM") - before,
            "step_s": median(seconds),
        }
    )
    dist.destroy_process_group()


def _measure(args: argparse.Namespace, placement: str) -> list[Figures]:
    """What each worker found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    spawn = multiprocessing.get_context("spawn")
    lines, workers = [], []
    for rank in range(args.workers):
        here, there = spawn.Pipe()
        lines.append(here)
        workers.append(spawn.Process(target=_work, args=(args, placement, rank, port, there), daemon=True))
        workers[-1].start()
        there.close()
    found = [line.recv() for line in lines]
    for worker in workers:
        worker.join()
    return found


def run(args: argparse.Namespace) -> int:
    """Measures one placement after the other, prints the table, writes the JSON."""
    found = {placement: _measure(args, placement) for placement in PLACEMENTS}
    pairs = zip(found["replicated"][0]["losses"], found["one_network_per_worker"][0]["losses"], strict=True)
    apart = [abs(one - other) / abs(one) for one, other in pairs]
    columns = {
        "wire MB/step": "wire_bytes_per_step",
        "weights MB": "weight_bytes",
        "optimizer MB": "optimizer_bytes",
        "peak MB": "peak_bytes",
        "s/step": "step_s",
    }
    console = wide()
    console.print(
        f"{args.architecture} {args.encoder}, {args.workers} gloo workers of one thread, {args.crop}x{args.crop} px, "
        f"{args.batch} + {args.batch} images, {args.classes} classes; the most of any worker"
    )
    table = Table("placement", *columns)
    most = {
        placement: {key: max(each[key] for each in rows) for key in columns.values()}
        for placement, rows in found.items()
    }
    for placement, row in most.items():
        cells = [f"{row[key]:.2f}" if key == "step_s" else f"{row[key] / 2**20:.2f}" for key in columns.values()]
        table.add_row(placement, *cells)
    table.add_row(
        "ratio", *(f"{most['one_network_per_worker'][key] / most['replicated'][key]:.3g}" for key in columns.values())
    )
    console.print(table)
    console.print(
        f"relative difference of the loss: {apart[0]:.1e} in the first step, up to {max(apart):.1e} in {len(apart)}: where two "
        "classes tie, the last bit of a sum turns a hard label (in double precision a test holds 1e-9 over 20 steps)"
    )
    if args.json is not None:
        args.json.write_text(json.dumps({"loss_differences": apart, **found}, indent=2) + "\n")
    return 0
