"""`bench placement`: trains the same global batches in both placements and compares losses, bytes on the wire and memory."""

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
from cps_ray.bench.step import make_batch, process_bytes, training_config
from cps_ray.config.space import apply
from cps_ray.engine.ranks import join
from cps_ray.engine.state import TrainState, build_state
from cps_ray.engine.step import train_step

Figures = dict[str, Any]
PLACEMENTS = ("replicated", "one_network_per_worker")


def _num_bytes(values: list[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in values)


def _weight_bytes(state: TrainState) -> int:
    return sum(_num_bytes([*network.state_dict().values()]) for network in state.networks.values())


def _optimizer_bytes(state: TrainState) -> int:
    parameter_states = [entry for optimizer in state.optimizers.values() for entry in optimizer.state.values()]
    return _num_bytes([value for entry in parameter_states for value in entry.values() if isinstance(value, Tensor)])


def _loopback_bytes() -> int:
    """Returns the bytes that the loopback interface has sent so far, headers included."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])  # the ninth column: bytes transmitted
    return 0


def _train_rank(args: argparse.Namespace, placement: str, rank: int, port: int, results: Connection) -> None:
    """Trains as one rank, in a process of its own, and sends what it measured."""
    torch.set_num_threads(1)
    before = process_bytes("VmRSS")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.workers)
    config = apply(
        training_config(args, args.encoder, {}),
        {"resources": {"placement": placement, "workers": args.workers}},
        "bench",
    )
    ranks = join(config, rank, args.workers, torch.device("cpu"))
    state = build_state(config, args.classes, ranks)
    batch = make_batch(args).map(lambda images: images.chunk(ranks.num_batch_shards)[ranks.batch_shard])
    losses = [train_step(config, state, batch)["loss"]]
    dist.barrier()
    bytes_before, seconds = _loopback_bytes(), []
    for _ in range(args.steps):
        begin = time.perf_counter()
        losses.append(train_step(config, state, batch)["loss"])
        seconds.append(time.perf_counter() - begin)
    dist.barrier()
    wire_bytes = _loopback_bytes() - bytes_before
    mean = ranks.sum(torch.stack(losses)) / args.workers
    results.send(
        {
            "losses": mean.tolist(),
            "wire_bytes_per_step": wire_bytes / args.steps,
            "weight_bytes": _weight_bytes(state),
            "optimizer_bytes": _optimizer_bytes(state),
            "peak_bytes": process_bytes("VmHWM") - before,
            "step_s": median(seconds),
        }
    )
    dist.destroy_process_group()


def _measure(args: argparse.Namespace, placement: str) -> list[Figures]:
    """Returns what each worker measured, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # the system picks a free port
        port = int(probe.getsockname()[1])
    spawn = multiprocessing.get_context("spawn")
    receivers, workers = [], []
    for rank in range(args.workers):
        receiver, sender = spawn.Pipe()
        receivers.append(receiver)
        workers.append(spawn.Process(target=_train_rank, args=(args, placement, rank, port, sender), daemon=True))
        workers[-1].start()
        sender.close()  # the worker has the only one, so that `recv` fails instead of waiting if the worker dies
    rows = [receiver.recv() for receiver in receivers]
    for worker in workers:
        worker.join()
    return rows


def run(args: argparse.Namespace) -> int:
    """Measures one placement after the other, prints the table, writes the JSON."""
    rows_by_placement = {placement: _measure(args, placement) for placement in PLACEMENTS}
    losses = (rows_by_placement[placement][0]["losses"] for placement in PLACEMENTS)
    differences = [abs(replicated - spread) / abs(replicated) for replicated, spread in zip(*losses, strict=True)]
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
        f"{args.batch} + {args.batch} images, {args.classes} classes; the largest value of any worker"
    )
    table = Table("placement", *columns)
    largest = {
        placement: {key: max(row[key] for row in rows) for key in columns.values()}
        for placement, rows in rows_by_placement.items()
    }
    for placement, row in largest.items():
        cells = [f"{row[key]:.2f}" if key == "step_s" else f"{row[key] / 2**20:.2f}" for key in columns.values()]
        table.add_row(placement, *cells)
    table.add_row(
        "ratio",
        *(f"{largest['one_network_per_worker'][key] / largest['replicated'][key]:.3g}" for key in columns.values()),
    )
    console.print(table)
    console.print(
        f"relative difference of the loss: {differences[0]:.1e} in the first step, up to {max(differences):.1e} in {len(differences)}: where two "
        "classes tie, the last bit of a sum turns a hard label (in double precision a test holds 1e-9 over 20 steps)"
    )
    if args.json is not None:
        args.json.write_text(json.dumps({"loss_differences": differences, **rows_by_placement}, indent=2) + "\n")
    return 0
