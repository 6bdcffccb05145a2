"""The unlabelled stream: the order of the plan, whoever reads; damage is reported; nothing is left running."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
from support import changed

from cps_ray.config.train import TrainConfig
from cps_ray.datasets.loader import TrainData, read_unlabeled, train_batches, train_data, unlabeled_positions
from cps_ray.datasets.shards import open_shards
from cps_ray.errors import DataError
from cps_ray.on_ray.cluster import connected
from cps_ray.on_ray.stream import StreamPlan, _execution, _PrefetchedChunks, make_plan, stream

STEPS = 40


@pytest.fixture
def config(tiny: TrainConfig) -> TrainConfig:
    return changed(tiny, schedule__steps=STEPS)


@pytest.fixture
def data(config: TrainConfig) -> TrainData:
    return train_data(open_shards(config.data.shards), config)


def running() -> list[str]:
    """Threads of streams."""
    return [t.name for t in threading.enumerate() if t.name.startswith(("stream", "StreamingExecutor", "batches"))]


def wait_until_none_runs(deadline: float) -> None:
    while running():
        assert time.monotonic() < deadline, running()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connected(None):
        yield
        # A stream that nobody reads any more ends when its execution is up; without its cluster it would start another.
        wait_until_none_runs(time.monotonic() + 60)


def small(plan: StreamPlan) -> StreamPlan:
    return replace(plan, chunk=3)


@pytest.mark.parametrize(("rank", "world", "start"), [(0, 1, 0), (1, 2, 0), (1, 4, 7), (0, 1, STEPS)])
def test_a_plan_reads_what_its_rank_trains_on_in_order(
    config: TrainConfig, data: TrainData, rank: int, world: int, start: int
) -> None:
    plan = small(make_plan(data, config, rank, world, start))
    found = [one.id for number in range(len(plan)) for one in plan.read(number)]
    assert found == [one.id for one in read_unlabeled(data, config, unlabeled_positions(config, rank, world, start))]
    assert len(found) == (STEPS - start) * 4 // world


def test_a_pass_over_all_ranks_visits_every_image_once(config: TrainConfig, data: TrainData) -> None:
    whole = config.data.unlabeled_batch * STEPS
    plans = [make_plan(data, config, rank, 2, 0) for rank in range(2)]
    steps = [zip(*[iter([one.id for n in range(len(p)) for one in p.read(n)])] * 2, strict=True) for p in plans]
    order = [one for a, b in zip(*steps, strict=True) for one in (*a, *b)]
    assert len(order) == whole
    count = len(data.subset.unlabeled)
    for first in range(0, whole - count, count):
        assert len(set(order[first : first + count])) == count


def test_a_plan_is_as_small_for_a_billion_steps(config: TrainConfig, data: TrainData) -> None:
    import pickle

    plans = [make_plan(data, changed(config, schedule__steps=steps), 0, 1, 0) for steps in (40, 10**9)]
    assert abs(len(pickle.dumps(plans[0])) - len(pickle.dumps(plans[1]))) < 64


@pytest.mark.ray
def test_ray_data_delivers_the_chunks_in_order(config: TrainConfig, data: TrainData, cluster: None) -> None:
    plan = small(make_plan(data, config, 0, 1, 0))
    chunks = list(_execution(plan))
    assert [number for number, _ in chunks] == list(range(2, len(plan)))
    for number, chunk in chunks:
        assert [(one.id, one.image) for one in chunk] == [(one.id, one.image) for one in plan.read(number)]


@pytest.mark.ray
@pytest.mark.parametrize("waits", [True, False])
def test_the_stream_is_the_plan_whether_a_chunk_has_come_or_is_read_here(
    config: TrainConfig, data: TrainData, cluster: None, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small(make_plan(data, config, 0, 1, 0))
    came: list[bool] = []
    take = _PrefetchedChunks.take

    def watched(self: _PrefetchedChunks, number: int) -> object:
        chunk = take(self, number)
        came.append(chunk is not None)
        return chunk

    monkeypatch.setattr(_PrefetchedChunks, "take", watched)
    found = []
    for one in stream(plan):
        found.append(one.id)
        if waits and not any(came):
            time.sleep(0.05)  # until the execution is up
    assert found == [one.id for one in read_unlabeled(data, config, unlabeled_positions(config, 0, 1, 0))]
    assert any(came) or not waits


@pytest.mark.ray
def test_damage_that_a_task_finds_names_the_shard(config: TrainConfig, tmp_path: Path, cluster: None) -> None:
    copytree(config.data.shards, tmp_path / "shards")
    config = changed(config, data__shards=str(tmp_path / "shards"))
    plan = small(make_plan(train_data(open_shards(config.data.shards), config), config, 0, 1, 0))
    at = int(plan.locations.image[0, 0]) + 20
    with (tmp_path / "shards/train-00000.parquet").open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DataError, match=r"train-00000\.parquet: the image of .* does not match its checksum"):
        list(_execution(plan))


@pytest.mark.ray
def test_a_training_that_stops_early_leaves_no_execution(config: TrainConfig, data: TrainData, cluster: None) -> None:
    config = changed(config, schedule__steps=10_000)
    batches = train_batches(data, config, unlabeled=stream(small(make_plan(data, config, 0, 1, 0))))
    deadline = time.monotonic() + 60
    while not any(name.startswith("StreamingExecutor") for name in running()):
        next(batches)
        assert time.monotonic() < deadline
    batches.close()
    wait_until_none_runs(deadline)
