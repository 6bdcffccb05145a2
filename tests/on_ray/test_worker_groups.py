"""Which group trains what, without Ray: groups are names here, and the test says what their workers say."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cps_ray.on_ray import worker_groups
from cps_ray.on_ray.failures import COLLAPSED, CRASHED, OUT_OF_MEMORY, TIMED_OUT
from cps_ray.on_ray.worker_groups import END, Group, GroupShape, Training, WorkerGroups

ONE = GroupShape(1, 1.0, 0.0)
TWO = GroupShape(2, 1.0, 0.0)


class Workers:
    """The groups of a test: started ones are listed, and ended by hand."""

    def __init__(self, idle_s: float = 30.0) -> None:
        self.started: list[Group] = []
        self.pool = WorkerGroups(self.started.append, idle_s)

    async def begin(self, name: str, shape: GroupShape = ONE, **settings: Any) -> str:
        await self.pool.begin(Training(name, "val/miou", "", shape, **settings))
        return name

    async def train(self, group: str, wanted: str) -> None:
        """A group's workers take a training, and begin it."""
        found = await self.pool.take(group)
        assert isinstance(found, Training)
        assert found.folder == wanted
        await self.pool.started(group, wanted)

    async def outcome(self, name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = (await self.pool.wait(name, 0, 0.0))["outcome"]
        return found


def run(test: Callable[[Workers], Awaitable[None]], **settings: float) -> None:
    async def inside() -> None:
        await asyncio.wait_for(test(Workers(**settings)), 20)

    asyncio.run(inside())


async def soon(task: "asyncio.Task[Any]") -> bool:
    """Whether a task that has what it waits for is done."""
    await asyncio.sleep(0.01)
    return task.done()


def test_one_group_serves_one_training_after_the_other() -> None:
    async def test(workers: Workers) -> None:
        await workers.begin("a")
        await workers.begin("b")
        assert [group.name for group in workers.started] == ["group-000", "group-001"], "two wait: two groups"
        await workers.train("group-000", "a")
        await workers.pool.finished("group-000", "a", None, "")
        assert await workers.outcome("a") == {}
        await workers.train("group-000", "b")
        assert len(workers.started) == 2
        await workers.pool.finished("group-000", "b", "the loss is not finite", COLLAPSED)
        assert await workers.outcome("b") == {"failure": "the loss is not finite", "kind": COLLAPSED}
        await workers.begin("c")
        await workers.train("group-000", "c")
        assert len(workers.started) == 2, "a collapse is a result: its group stays"

    run(test)


def test_a_report_waits_for_its_answer() -> None:
    async def test(workers: Workers) -> None:
        await workers.begin("a")
        await workers.train("group-000", "a")
        first = asyncio.create_task(workers.pool.report("group-000", "a", 5))
        assert not await soon(first)
        assert (await workers.pool.wait("a", 0, 10.0))["reported"] == 5
        assert not await soon(first), "heard, but not judged"
        judging = asyncio.create_task(workers.pool.wait("a", 5, 10.0))
        assert await first
        second = asyncio.create_task(workers.pool.report("group-000", "a", 10))
        assert (await judging)["reported"] == 10
        await workers.pool.stop("a")
        assert not await second, "stopped: no"
        # The next trial has its group as soon as the workers are back.
        await workers.begin("b")
        assert len(workers.started) == 1
        taking = asyncio.create_task(workers.pool.take("group-000"))
        await workers.pool.finished("group-000", "a", None, "")
        found = await taking
        assert isinstance(found, Training)
        assert found.folder == "b"

    run(test)


@pytest.mark.parametrize("said_by", ["workers", "controller", "nobody"])
def test_a_crash_is_tried_again_as_often_as_asked(said_by: str) -> None:
    async def test(workers: Workers) -> None:
        await workers.begin("a", retries=1)
        for number in range(2):
            await workers.train("group-000", "a")
            if said_by == "workers":
                await workers.pool.finished("group-000", "a", f"boom {number}", CRASHED)
            if said_by != "nobody":
                await workers.pool.group_failed("group-000", f"boom {number}", is_waiting=False)
        if said_by == "nobody":
            asking = asyncio.create_task(workers.pool.take("group-000"))
            assert not await soon(asking), "the training is over, and there is no other"
            asking.cancel()
        expected = "a worker died" if said_by == "nobody" else "boom 1"
        assert await workers.outcome("a") == {"failure": expected, "kind": CRASHED}
        assert len(workers.started) == 1

    run(test)


def test_what_is_tried_again_is_said_once() -> None:
    async def test(workers: Workers) -> None:
        await workers.begin("runs/s/trials/0007", retries=2)
        await workers.train("group-000", "runs/s/trials/0007")
        hearing = asyncio.create_task(workers.pool.wait("runs/s/trials/0007", 0, 10.0))
        assert not await soon(hearing)
        await workers.pool.group_failed("group-000", "the node is gone", is_waiting=False)
        assert (await hearing)["notice"] == "0007: the node is gone; once more from its latest checkpoint, try 2 of 3"
        assert (await workers.pool.wait("runs/s/trials/0007", 0, 0.0))["notice"] is None

    run(test)


def test_a_stopped_training_ends_with_its_group() -> None:
    async def test(workers: Workers) -> None:
        await workers.begin("a")
        await workers.pool.take("group-000")  # and dies before it trains
        await workers.pool.stop("a")
        workers.pool.group_ended(workers.started[0], None)
        await asyncio.wait_for(workers.pool.begin(Training("a", "val/miou", "", ONE)), 1.0)
        await workers.train("group-001", "a")

    run(test)


def test_workers_that_die_before_they_train_cost_no_try() -> None:
    async def test(workers: Workers) -> None:
        await workers.begin("a", retries=0)
        for _ in range(5):
            found = await workers.pool.take("group-000")
            assert isinstance(found, Training)
            await workers.pool.group_failed("group-000", "killed", is_waiting=False)
        await workers.train("group-000", "a")
        await workers.pool.finished("group-000", "a", None, "")
        assert await workers.outcome("a") == {}

    run(test)


def test_out_of_memory_is_not_tried_again() -> None:
    async def test(workers: Workers) -> None:
        await workers.begin("a", retries=5)
        await workers.train("group-000", "a")
        await workers.pool.finished("group-000", "a", "CUDA out of memory", OUT_OF_MEMORY)
        assert await workers.outcome("a") == {"failure": "CUDA out of memory", "kind": OUT_OF_MEMORY}
        # Its processes are on their way out, and serve nobody until they are back.
        await workers.begin("b")
        assert len(workers.started) == 1
        await workers.pool.group_failed("group-000", "CUDA out of memory", is_waiting=False)
        await workers.train("group-000", "b")

    run(test)


def test_a_lost_controller_gives_its_training_to_another_group() -> None:
    async def test(workers: Workers) -> None:
        await workers.begin("a", retries=1)
        await workers.train("group-000", "a")
        workers.pool.group_ended(workers.started[0], "the actor died")
        assert [group.name for group in workers.started] == ["group-000", "group-001"]
        assert await workers.pool.take("group-000") == END, "workers of a group that is no more"
        await workers.train("group-001", "a")
        workers.pool.group_ended(workers.started[1], "the actor died")
        assert await workers.outcome("a") == {"failure": "the actor died", "kind": CRASHED}

    run(test)


def test_a_group_that_never_comes_up_is_given_up() -> None:
    async def test(workers: Workers) -> None:
        await workers.begin("a")
        for _ in range(3):
            assert await workers.outcome("a") is None
            await workers.pool.group_failed("group-000", "no module named cps_ray", is_waiting=False)
        assert await workers.outcome("a") == {"failure": "no module named cps_ray", "kind": CRASHED}

    run(test)


def test_no_room_is_waited_for_and_said() -> None:
    async def test(workers: Workers) -> None:
        await workers.begin("a")
        for _ in range(9):
            await workers.pool.group_failed("group-000", "timed out", is_waiting=True)
        found = await workers.pool.wait("a", 0, 0.0)
        assert found["outcome"] is None
        assert found["notice"] == "waiting for 1 x (1 CPUs, 0 GPUs) to be free: the cluster has no room now"
        await workers.train("group-000", "a")
        assert (await workers.pool.wait("a", 0, 0.0))["notice"] is None

    run(test)


def test_other_resources_get_another_group_and_idle_ones_make_room() -> None:
    async def test(workers: Workers) -> None:
        await workers.begin("a")
        await workers.train("group-000", "a")
        idle = asyncio.create_task(workers.pool.take("group-000"))
        await workers.pool.finished("group-000", "a", None, "")
        assert not await soon(idle)
        await workers.begin("b", TWO)
        assert workers.started[1].shape == TWO
        assert await idle == END, "it has what the other one needs"
        await workers.train("group-001", "b")

    run(test)


def test_an_idle_group_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_groups, "_POLL_S", 0.02)

    async def test(workers: Workers) -> None:
        await workers.pool.prepare(ONE, 2)
        assert len(workers.started) == 2
        answers = [await workers.pool.take("group-000")]
        while answers[-1] is None:
            answers.append(await workers.pool.take("group-000"))
        assert answers[-1] == END
        assert len(answers) > 2, "asked again and again"
        workers.pool.group_ended(workers.started[0], None)
        await workers.begin("a")
        assert len(workers.started) == 2, "the other one is coming"
        await workers.train("group-001", "a")

    run(test, idle_s=0.1)


def test_a_group_that_grows_is_renewed() -> None:
    async def test(workers: Workers) -> None:
        await workers.pool.prepare(ONE, 1)
        starting = asyncio.create_task(workers.pool.take("group-000", held=1))  # nothing yet
        await soon(starting)
        for name, held, then in (("a", 2 * 2**30, None), ("b", 3 * 2**30, None), ("c", 3 * 2**30 + 1, END)):
            await workers.begin(name)
            await workers.train("group-000", name)
            await workers.pool.finished("group-000", name, None, "")
            asking = asyncio.create_task(workers.pool.take("group-000", held=held))
            assert (asking.result() if await soon(asking) else None) == then, name
            asking.cancel()
        starting.cancel()
        await workers.begin("d")
        assert len(workers.started) == 2

    run(test)


def test_trainings_that_take_too_long_are_ended(tmp_path: Path) -> None:
    async def test(workers: Workers) -> None:
        (tmp_path / "log.txt").write_text("12:00 begins\n12:01 waits for the moon\n")
        await workers.begin(str(tmp_path), first_report_s=0.5)
        await workers.train("group-000", str(tmp_path))
        found = await workers.pool.wait(str(tmp_path), 0, 10.0)
        assert found["outcome"] == {
            "failure": "no evaluation after 0.5 s (failures.first_report_timeout); its log ends with: 12:01 waits for the moon",
            "kind": TIMED_OUT,
        }
        await workers.begin("b", most_s=0.5)
        assert len(workers.started) == 2, "the hung one's processes are taken down"
        await workers.train("group-001", "b")
        reporting = asyncio.create_task(workers.pool.report("group-001", "b", 5))
        await workers.pool.wait("b", 0, 10.0)
        found = await workers.pool.wait("b", 5, 10.0)
        assert found["outcome"]["failure"].startswith("has not ended after 0.5 s (failures.trial_timeout), at step 5; ")
        await reporting

    run(test)


def test_a_trial_whose_process_was_lost_asks_for_the_same_training() -> None:
    async def test(workers: Workers) -> None:
        await workers.begin("a")
        await workers.train("group-000", "a")
        reporting = asyncio.create_task(workers.pool.report("group-000", "a", 5))
        await workers.begin("a")
        assert (await workers.pool.wait("a", 0, 10.0))["reported"] == 5
        asyncio.create_task(workers.pool.wait("a", 5, 10.0))  # noqa: RUF006
        assert await reporting
        assert len(workers.started) == 1

    run(test)


def test_what_is_abandoned_ends_with_its_group() -> None:
    async def test(workers: Workers) -> None:
        await workers.begin("a")
        await workers.train("group-000", "a")
        reporting = asyncio.create_task(workers.pool.report("group-000", "a", 5))
        await soon(reporting)
        await workers.pool.abandon("a")
        assert not await reporting
        assert await workers.pool.take("group-000") == END
        await workers.begin("b")
        assert len(workers.started) == 2
        await workers.pool.stop("nobody")
        await workers.pool.abandon("nobody")

    run(test)


def test_closed_all_end_and_a_later_phase_starts_new_ones() -> None:
    async def test(workers: Workers) -> None:
        await workers.begin("a")
        await workers.begin("b")
        await workers.train("group-000", "a")
        waiting = asyncio.create_task(workers.pool.wait("b", 0, 60.0))
        closing = asyncio.create_task(workers.pool.close(10.0))
        assert (await waiting)["outcome"] == {}
        assert await workers.pool.take("group-001") == END
        assert not await soon(closing)
        for group in workers.started:
            workers.pool.group_ended(group, None)
        assert await closing == 0
        await workers.begin("c")
        assert len(workers.started) == 3

    run(test)


def test_workers_that_live_on_beside_their_successors_are_cut_off() -> None:
    async def test(workers: Workers) -> None:
        await workers.begin("a")
        pool, group, old, new = workers.pool, "group-000", "old", "new"
        await pool.take(group, old)
        assert await pool.started(group, "a", old)
        found = await pool.take(group, new)  # the node of the old ones was lost; they are not
        assert isinstance(found, Training)
        assert not await pool.report(group, "a", 5, old)
        await pool.finished(group, "a", None, "", old)
        assert await workers.outcome("a") is None
        assert await pool.take(group, old) == END
        assert await pool.started(group, "a", new)
        await pool.finished(group, "a", None, "", new)
        assert await workers.outcome("a") == {}

    run(test)


def test_a_training_that_was_stopped_before_its_workers_begin_is_not_begun() -> None:
    async def test(workers: Workers) -> None:
        await workers.begin("a")
        await workers.pool.take("group-000")
        await workers.pool.stop("a")
        assert not await workers.pool.started("group-000", "a")
        await workers.begin("b")
        await workers.train("group-000", "b")

    run(test)


def test_a_pool_that_was_started_again_is_asked_again() -> None:
    async def test(workers: Workers) -> None:
        assert await workers.pool.wait("a", 7, 0.0) is None
        await workers.begin("a")
        assert (await workers.pool.wait("a", 7, 0.0))["outcome"] is None

    run(test)


def test_idle_time_is_the_documented_one() -> None:
    assert worker_groups._IDLE_S == 30.0
