"""Pieces of messages."""

import pytest

from cps_ray.text import did_you_mean, first_few, first_line, nearest, on_one_line

KNOWN = ["optim.lr", "optim.momentum", "cps.weight"]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("optim.lrr", "optim.lr"),
        ("lr", "optim.lr"),
        ("weight", "cps.weight"),
        ("cps.wieght", "cps.weight"),
        ("zzz", ""),
    ],
)
def test_nearest(name: str, known: str) -> None:
    assert nearest(name, KNOWN) == known
    assert did_you_mean(name, iter(KNOWN)) == (f" Did you mean {known}?" if known else "")


def test_an_error_is_cut_to_its_first_line_or_put_on_one() -> None:
    err = ValueError("first line\n  second\n\nthird")
    assert first_line(err) == "first line"
    assert on_one_line(err) == "first line second third"
    assert on_one_line(err, length=7) == "first l"
    assert first_line(ValueError()) == "ValueError"
    assert on_one_line(ValueError()) == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, ""), (1, "a0"), (3, "a0, a1, a2"), (4, "a0, a1, a2 and 1 more"), (9, "a0, a1, a2 and 6 more")],
)
def test_first_few(count: int, text: str) -> None:
    assert first_few([f"a{number}" for number in range(count)]) == text
