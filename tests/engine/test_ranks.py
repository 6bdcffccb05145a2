"""Several gloo processes on the same global batch train as one does, whether each has all networks or one of them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import changed

from cps_ray.config.train import TrainConfig
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state, read_checkpoint

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from cps_ray.config.reader import parse_train
from cps_ray.datasets.loader import eval_batches, train_batches, train_data
from cps_ray.datasets.shards import open_shards
from cps_ray.engine.evaluation import evaluate
from cps_ray.engine.ranks import join
from cps_ray.engine.state import build_state, write_checkpoint
from cps_ray.engine.step import train_step
from cps_ray.engine.telemetry import Meter
from pathlib import Path

raw, rank, world, out = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
torch.set_num_threads(1)
# In double precision throughout. In single, where two classes tie in a pixel, the last bit of a sum turns its hard label.
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
if world > 1:
    dist.init_process_group("gloo", rank=rank, world_size=world)
config = parse_train(raw, "config")
ranks = join(config, rank, world, torch.device("cpu"))
shards = open_shards(config.data.shards)
state = build_state(config, 7, ranks)
losses = []
meter = Meter(ranks)
for batch in train_batches(train_data(shards, config), config, rank=ranks.share, world=ranks.shares):
    measured = train_step(config, state, batch)
    meter.add(state.step - 1, measured)
    losses.append(float(ranks.sum(measured["loss"])) / world)
counts = evaluate(config, state.judged, eval_batches(shards, "test", rank=ranks.share, world=ranks.shares), 7, ranks)
read = meter.read()
snapshot = state.snapshot()
if rank == 0:
    means = {name: value for name, value in read.items() if name.startswith(("train/", "pseudo/"))}
    others = {name: matrix.tolist() for name, matrix in counts.others.items()}
    found = {"a": counts.whole.tolist(), "others": others, "agreement": counts.agreement.tolist(), "means": means}
    out.mkdir()
    write_checkpoint(out, snapshot, {})
    (out / "found.json").write_text(json.dumps(found | {"losses": losses}))
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
    return json.loads((out / "found.json").read_text())


def same(one: dict, several: dict) -> None:
    # Sums in another order differ in the last bits: 1e-15 a step.
    assert several["losses"] == pytest.approx(one["losses"], rel=1e-9)
    assert several["means"] == pytest.approx(one["means"], rel=1e-6)
    # No image counted twice or left out: 6 images of 32x48.
    assert sum(map(sum, one["a"])) == 6 * 32 * 48
    for name in ("a", "others", "agreement"):
        assert several[name] == one[name], name


def test_one_worker_and_two_have_the_same_curve(tiny: TrainConfig, tmp_path: Path) -> None:
    """Two workers in either placement. All three end in the same checkpoint, which loads into any of them."""
    config = changed(tiny, schedule__steps=20, optim__clip_norm=10.0, ema__decay=0.9)
    one = train(config, 1, tmp_path / "one")
    assert len(one["losses"]) == 20
    same(one, train(config, 2, tmp_path / "two"))
    split = changed(config, resources={"placement": "split", "workers": 2})
    same(one, train(split, 2, tmp_path / "split"))
    whole, parts = (read_checkpoint(tmp_path / name) for name in ("one", "split"))
    assert [*parts["networks"]] == ["a", "b"]
    for name, kept in whole["networks"].items():
        for kind in ("network", "average"):
            for key, value in kept[kind].items():
                assert torch.allclose(value, parts["networks"][name][kind][key], rtol=1e-6, atol=1e-9), (name, key)
    state = build_state(config, 7, Ranks())
    state.load(tmp_path / "split")
    assert state.step == 20


def test_split_networks_may_be_trained_by_several_workers_each(tiny: TrainConfig, tmp_path: Path) -> None:
    """Four workers, two shares of two networks: labels cross between neighbours, gradients and statistics between shares. As the
    paper's code has it: both kinds of image under the loss, in passes of their own."""
    config = changed(tiny, schedule__steps=4, cps__on="all", cps__forwards="separate", cps__cutmix_partner="self")
    one = train(config, 1, tmp_path / "one")
    same(one, train(changed(config, resources={"placement": "split", "workers": 4}), 4, tmp_path / "four"))


def test_three_networks_on_two_workers_and_on_three(tiny: TrainConfig, tmp_path: Path) -> None:
    config = changed(tiny, schedule__steps=2, model__networks=3, cps__mix="none")
    one = train(config, 1, tmp_path / "one")
    same(one, train(config, 2, tmp_path / "two"))
    same(one, train(changed(config, resources={"placement": "split", "workers": 3}), 3, tmp_path / "three"))
