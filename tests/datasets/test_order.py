from cps_ray.datasets.order import LABELED, UNLABELED, ShardPositions, image_at, positions


def test_every_pass_visits_every_image_once_in_another_order() -> None:
    first, second = ([image_at(p, 10, 3, LABELED) for p in range(start, start + 10)] for start in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_order_depends_on_seed_and_stream() -> None:
    order = lambda seed, stream: [image_at(p, 50, seed, stream) for p in range(50)]  # noqa: E731
    assert order(0, LABELED) == order(0, LABELED)
    assert order(0, LABELED) != order(1, LABELED)
    assert order(0, LABELED) != order(0, UNLABELED)


def test_ranks_share_a_step_without_overlap() -> None:
    whole = list(positions(5, 12, 0, 1))
    assert whole == list(range(60, 72))
    for world in (2, 3, 4):
        assert [p for rank in range(world) for p in positions(5, 12, rank, world)] == whole


def test_starting_late_is_skipping() -> None:
    whole = list(ShardPositions(0, 6, 8, 1, 2))
    assert whole == [p for step in range(6) for p in positions(step, 8, 1, 2)]
    assert list(ShardPositions(4, 6, 8, 1, 2)) == whole[4 * 4 :]
    assert len(ShardPositions(4, 6, 8, 1, 2)) == 8
    assert list(ShardPositions(6, 6, 8, 1, 2)) == []


def test_visits_take_no_memory_however_many_they_are() -> None:
    visits = ShardPositions(0, 10**12, 16, 3, 4)
    assert len(visits) == 4 * 10**12
    assert visits[len(visits) - 1] == 16 * 10**12 - 1
