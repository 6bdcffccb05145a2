"""Several gloo processes on the same global batch train as one does, whether each has all networks or one of them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import changed

from cps_ray.config.train import NetworkConfig, TrainConfig
from cps_ray.engine.networks import build_network
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state
from cps_ray.runs import read_checkpoint

pytestmark = pytest.mark.xdist_group("gloo")  # else each test process would train all of `trained`

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from cps_ray.config.reader import parse_train
from cps_ray.config.train import NETWORK_NAMES
from cps_ray.datasets.loader import eval_batches, train_batches, train_data
from cps_ray.datasets.shards import open_shards
from cps_ray.engine.evaluation import evaluate
from cps_ray.engine.ranks import join
from cps_ray.engine.state import build_state
from cps_ray.engine.step import train_step
from cps_ray.engine.telemetry import Meter
from cps_ray.runs import write_checkpoint
from pathlib import Path

jobs, rank, world, folder = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
torch.set_num_threads(1)
# In double precision throughout. In single, where two classes tie in a pixel, the last bit of a sum turns its hard label.
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
# Random per worker; the head of smp's DPT has no option without it.
torch.nn.Dropout.forward = lambda self, x: x
if world > 1:
    dist.init_process_group("gloo", rank=rank, world_size=world)
for name, raw in jobs.items():
    config = parse_train(raw, "config")
    ranks = join(config, rank, world, torch.device("cpu"))
    shards = open_shards(config.data.shards)
    state = build_state(config, 7, ranks)
    wrapped = [model for model in state.models.values() if isinstance(model, torch.nn.parallel.DistributedDataParallel)]
    assert bool(wrapped) == (ranks.num_batch_shards > 1) and not any(model.will_sync_module_buffers() for model in wrapped)
    losses = []
    meter = Meter(ranks)
    mine = {"batch_shard": ranks.batch_shard, "num_batch_shards": ranks.num_batch_shards}
    for batch in train_batches(train_data(shards, config), config, **mine):
        measured = train_step(config, state, batch)
        meter.add(state.step - 1, measured)
        losses.append(float(ranks.sum(measured["loss"])) / world)
    counts = evaluate(config, state.evaluated, eval_batches(shards, "test", **mine), 7, ranks)
    read = meter.read()
    for network in state.networks:  # only now: their steps are in single precision
        state.scalers[network] = torch.amp.GradScaler("cpu", init_scale=2.0 ** (1 + NETWORK_NAMES.index(network)))
    snapshot = state.snapshot()
    if rank == 0:
        means = {name: value for name, value in read.items() if name.startswith(("train/", "pseudo/"))}
        others = {name: matrix.tolist() for name, matrix in counts.others.items()}
        found = {"a": counts.whole_split.tolist(), "others": others, "agreement": counts.agreement.tolist(), "means": means}
        out = folder / name
        out.mkdir()
        write_checkpoint(out, snapshot, {})
        (out / "found.json").write_text(json.dumps(found | {"losses": losses}))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train(jobs: dict[str, TrainConfig], world: int, folder: Path) -> None:
    """Trains each of them with `world` processes, one after the other; leaves a checkpoint and `found.json` in folder/NAME."""
    raw = json.dumps({name: config.dump() for name, config in jobs.items()})
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    workers = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, raw, str(rank), str(world), str(folder)], env=env)
        for rank in range(world)
    ]
    assert [worker.wait(timeout=240) for worker in workers] == [0] * world


@pytest.fixture(scope="module")
def trained(tiny: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every training below. Processes take seconds to load torch, so those of a world do all its trainings."""
    folder = tmp_path_factory.mktemp("ranks")
    averaged = changed(tiny, schedule__steps=20, optim__clip_norm=10.0, ema__decay=0.9)
    # As the paper's code has it: both kinds of image under the loss, in passes of their own.
    papers = changed(tiny, schedule__steps=4, cps__images="all", cps__forwards="separate", cps__cutmix_partner="self")
    three = changed(tiny, schedule__steps=2, model__networks=3, cps__mix="none")
    # A vision transformer of 14 px patches, and a CNN whose encoder is frozen, batch norm included.
    weights = folder / "resnet.pt"
    torch.save(build_network(NetworkConfig(encoder="tu-test_resnet"), 2, seed=5).network.encoder.state_dict(), weights)
    cnn = {"encoder": "tu-test_resnet", "architecture": "fpn", "weights_file": str(weights), "freeze_encoder": True}
    cnn["options"] = {"decoder_dropout": 0.0}
    small = {"decoder_intermediate_channels": [8] * 4, "decoder_fusion_channels": 8, "patch_size": 14, "img_size": 70}
    model = {"architecture": "dpt", "encoder": "tu-test_vit", "options": small, "b": cnn}
    vit = changed(tiny, schedule__steps=4, model=model, optim__head_lr_factor=10.0)
    # Each worker draws its own dropout.
    unimatch = changed(tiny, method="unimatch", ema__decay=0.9, unimatch__confidence=0.15)
    unimatch = changed(unimatch, schedule__steps=4, unimatch__feature_dropout=0.0)
    second = changed(unimatch, unimatch__version="v2")

    def spread(config: TrainConfig, workers: int) -> TrainConfig:
        return changed(config, resources={"placement": "one_network_per_worker", "workers": workers})

    train({"averaged": averaged, "papers": papers, "three": three, "vit": vit, "v1": unimatch, "v2": second}, 1, folder)
    two = {"averaged-two": averaged, "averaged-spread": spread(averaged, 2), "three-two": three}
    train({**two, "vit-two": vit, "vit-spread": spread(vit, 2), "v1-two": unimatch, "v2-two": second}, 2, folder)
    train({"three-spread": spread(three, 3)}, 3, folder)
    train({"papers-spread": spread(papers, 4)}, 4, folder)
    return folder


def found(folder: Path, name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / name / "found.json").read_text())
    return read


@pytest.mark.parametrize(
    ("one", "several"),
    [
        ("averaged", "averaged-two"),
        ("averaged", "averaged-spread"),
        # Two batch shards of two networks: labels cross between neighbours, gradients and statistics between batch shards.
        ("papers", "papers-spread"),
        ("three", "three-two"),
        ("three", "three-spread"),
        ("vit", "vit-two"),
        ("vit", "vit-spread"),
        ("v1", "v1-two"),
        ("v2", "v2-two"),
    ],
)
def test_several_workers_have_the_curve_of_one(trained: Path, one: str, several: str) -> None:
    alone, together = found(trained, one), found(trained, several)
    assert len(alone["losses"]) == {"averaged": 20, "papers": 4, "three": 2, "vit": 4, "v1": 4, "v2": 4}[one]
    # Sums in another order differ in the last bits: 1e-15 a step.
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-9)
    assert together["means"] == pytest.approx(alone["means"], rel=1e-6)
    # No image counted twice or left out: 6 images of 32x48.
    assert sum(map(sum, alone["a"])) == 6 * 32 * 48
    for name in ("a", "others", "agreement"):
        assert together[name] == alone[name], name


def test_checkpoints_of_both_placements_are_the_same_and_load_into_either(trained: Path, tiny: TrainConfig) -> None:
    alone, parts = (read_checkpoint(trained / name) for name in ("averaged", "averaged-spread"))
    assert [*parts["networks"]] == ["a", "b"]
    for name, kept in alone["networks"].items():
        for kind in ("network", "average"):
            for key, value in kept[kind].items():
                assert torch.allclose(value, parts["networks"][name][kind][key], rtol=1e-6, atol=1e-9), (name, key)
    state = build_state(changed(tiny, ema__decay=0.9), 7, Ranks())
    state.load(read_checkpoint(trained / "averaged-spread"), source="averaged-spread")
    assert state.step == 20


@pytest.mark.parametrize("name", ["averaged", "averaged-spread"])
def test_each_networks_loss_scale_is_its_own_in_either_placement(trained: Path, tiny: TrainConfig, name: str) -> None:
    snapshot = read_checkpoint(trained / name)
    scales = {network: kept["scaler"]["scale"] for network, kept in snapshot["networks"].items()}
    assert scales == {"a": 2.0, "b": 4.0}
    config = changed(tiny, ema__decay=0.9, compute__autocast="fp16", resources__gpus_per_worker=1.0)
    cpu = torch.device("cpu")
    # All networks here, and each rank of a pair: none takes the scale of another rank's network.
    for ranks in (Ranks(), Ranks(0, 2, cpu, 2), Ranks(1, 2, cpu, 2)):
        state = build_state(config, 7, ranks)
        state.load(snapshot, source=name)
        assert {network: scaler.get_scale() for network, scaler in state.scalers.items()} == {
            network: scales[network] for network in state.networks
        }


def test_a_frozen_encoder_is_as_its_file_has_it_on_any_number_of_workers(trained: Path) -> None:
    weights = torch.load(trained / "resnet.pt", weights_only=True)
    for name in ("vit", "vit-two", "vit-spread"):
        state = read_checkpoint(trained / name)["networks"]["b"]["network"]
        assert all(
            torch.equal(state[f"network.encoder.{key}"], value.to(state[f"network.encoder.{key}"].dtype))
            for key, value in weights.items()
        ), name
