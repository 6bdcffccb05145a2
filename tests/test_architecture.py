"""Imports point down, the engine needs no Ray, importing costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "cps_ray"
MODULES = sorted(ROOT.rglob("*.py"))
LAYERS = ("errors", "config", "engine", "datasets", "on_ray", "search")
COMMANDS = {"sweep", "train", "prepare", "inspect", "splits", "bench"}
HOMES = {"ray": {"on_ray", "search"}, "optuna": {"search"}}


def layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {
        f"{node.module}.{a.name}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = layer(path)
    used = {name.split(".")[1] for name in imports(path) if name.startswith("cps_ray.") and name.count(".")}
    if own in LAYERS:
        allowed = {*LAYERS[: LAYERS.index(own) + 1], "__version__"}
        if own == "datasets":  # shares only the batch contract with the engine
            engine = {name for name in imports(path) if name.startswith("cps_ray.engine")}
            assert all(name.startswith("cps_ray.engine.batch") for name in engine), f"{path}: {engine}"
        assert used <= allowed, f"{path} must not import {sorted(used - allowed)}"
    assert not (used - {own}) & COMMANDS, f"{path}: nobody imports a command"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_ray_and_optuna_stay_in_their_layers(path: Path) -> None:
    for package, homes in HOMES.items():
        if any(name == package or name.startswith(f"{package}.") for name in imports(path)):
            assert layer(path) in homes, f"{path} must not import {package}"


def test_the_engine_loads_neither_ray_nor_data_libraries() -> None:
    modules = [f"cps_ray.engine.{path.stem}" for path in (ROOT / "engine").glob("*.py") if path.stem != "__init__"]
    heavy = "{'ray', 'optuna', 'pyarrow', 'albumentations', 'cv2', 'segmentation_models_pytorch'}"
    code = f"import sys, {', '.join(modules)}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys; before = set(sys.modules); import cps_ray; print(sorted(m for m in set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['cps_ray']"
