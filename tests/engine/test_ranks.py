"""Two gloo processes on the same global batch train as one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import changed

from cps_ray.config.train import TrainConfig

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from cps_ray.config.reader import parse_train
from cps_ray.datasets.loader import eval_batches, train_batches, train_data
from cps_ray.datasets.shards import open_shards
from cps_ray.engine.loop import evaluate
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state
from cps_ray.engine.step import train_step

raw, rank, world, out = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
# In double precision throughout. In single, where two classes tie in a pixel, the last bit of a sum turns its hard label.
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
if world > 1:
    dist.init_process_group("gloo", rank=rank, world_size=world)
config = parse_train(raw, "config")
ranks = Ranks(rank, world)
shards = open_shards(config.data.shards)
state = build_state(config, 7, ranks)
losses = []
for batch in train_batches(train_data(shards, config), config, rank=rank, world=world):
    losses.append(float(ranks.sum(train_step(config, state, batch)["loss"])) / world)
matrix = evaluate(config, state.pair.a, eval_batches(shards, "test", rank=rank, world=world), 7, ranks)[""]
if rank == 0:
    json.dump({"losses": losses, "pixels": int(matrix.sum())}, open(out, "w"))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train(config: TrainConfig, world: int, out: Path) -> dict:
    raw = json.dumps(config.dump())
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    workers = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, raw, str(rank), str(world), str(out)], env=env)
        for rank in range(world)
    ]
    assert [worker.wait(timeout=240) for worker in workers] == [0] * world
    return json.loads(out.read_text())


@pytest.mark.parametrize("mix", ["cutmix", "none"])
def test_one_worker_and_two_have_the_same_curve(tiny: TrainConfig, tmp_path: Path, mix: str) -> None:
    config = changed(tiny, schedule__steps=20, cps__mix=mix, optim__clip_norm=10.0)
    one = train(config, 1, tmp_path / "one.json")
    two = train(config, 2, tmp_path / "two.json")
    assert len(one["losses"]) == 20
    # Sums in another order differ in the last bits: 1e-15 a step.
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-9)
    # No image counted twice or left out: 6 images of 32x48.
    assert one["pixels"] == two["pixels"] == 6 * 32 * 48
