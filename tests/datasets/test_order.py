"""The order of images: every pass reads all of them once, and no step depends on how it is divided or where it began."""

from cps_ray.datasets.order import LABELED, UNLABELED, ShardPositions, image_at, positions


def test_every_pass_reads_every_image_once_in_another_order() -> None:
    first, second = ([image_at(p, 10, 3, LABELED) for p in range(start, start + 10)] for start in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_order_depends_on_seed_and_stream() -> None:
    order = lambda seed, stream: [image_at(p, 50, seed, stream) for p in range(50)]  # noqa: E731
    assert order(0, LABELED) == order(0, LABELED)
    assert order(0, LABELED) != order(1, LABELED)
    assert order(0, LABELED) != order(0, UNLABELED)


def test_batch_shards_divide_a_step_without_overlap() -> None:
    global_batch = list(positions(5, 12, 0, 1))
    assert global_batch == list(range(60, 72))
    for count in (2, 3, 4):
        assert [p for shard in range(count) for p in positions(5, 12, shard, count)] == global_batch


def test_starting_late_is_skipping() -> None:
    from_the_start = list(ShardPositions(0, 6, 8, 1, 2))
    assert from_the_start == [p for step in range(6) for p in positions(step, 8, 1, 2)]
    assert list(ShardPositions(4, 6, 8, 1, 2)) == from_the_start[4 * 4 :]
    assert len(ShardPositions(4, 6, 8, 1, 2)) == 8
    assert list(ShardPositions(6, 6, 8, 1, 2)) == []


def test_positions_take_no_memory_however_many_they_are() -> None:
    many = ShardPositions(0, 10**12, 16, 3, 4)
    assert len(many) == 4 * 10**12
    assert many[len(many) - 1] == 16 * 10**12 - 1
