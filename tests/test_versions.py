"""docs/versions.md has the packages and bounds of pyproject.toml."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_has_every_package_with_its_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *extras["onnx"], *extras["cmaes"]]
    wanted = [re.sub(r"\[.*\]", "", requirement) for requirement in named]  # without extras
    rows = re.findall(r"(?m)^\| ([a-z][\w-]*) \| ([<>=].*?) \|", (ROOT / "docs/versions.md").read_text())
    assert ["".join(row) for row in rows] == wanted


def test_the_page_and_the_classifiers_begin_with_the_same_python() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = project["requires-python"].removeprefix(">=")
    named = [c.rsplit(" ", 1)[1] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert named[0] == lowest
    assert f"Python {lowest} or newer" in (ROOT / "docs/versions.md").read_text()
    assert f"Python {lowest} or newer" in (ROOT / "README.md").read_text()
    assert f"python{lowest} -m venv" in (ROOT / "Makefile").read_text()
