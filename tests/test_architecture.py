"""Imports point down and never in a circle, the engine needs no Ray, preparing data no torch, importing the package nothing."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "cps_ray"
MODULES = sorted(ROOT.rglob("*.py"))
LAYERS = ("errors", "text", "files", "config", "engine", "datasets", "model", "runs", "results", "on_ray", "search")
"""A layer imports only what stands left of it."""
COMMANDS = {
    "init",
    "sweep",
    "train",
    "prepare",
    "inspect",
    "subsets",
    "encoders",
    "predict",
    "evaluate",
    "suggest",
    "pseudolabel",
    "export",
    "bench",
    "schema",
}
HOMES = {"ray": {"on_ray", "search"}, "optuna": {"search"}}
DATASETS = {"show": {"prepare", ""}, "prepare": {""}, "": {"prepare"}}
"""Room of datasets -> those that it may import beside itself; "" are the modules of datasets/ itself, of which only `synthetic`
prepares anything."""


def layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module(path: Path) -> str:
    return ".".join(("cps_ray", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Every name imported anywhere in a file, also late; what is imported for types alone left out."""
    tree = ast.parse(path.read_text())
    for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    left_out = {id(inner) for block in for_types for inner in ast.walk(block)}
    nodes = [node for node in ast.walk(tree) if id(node) not in left_out]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {f"{n.module}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = layer(path)
    used = {name.split(".")[1] for name in imports(path) if name.startswith("cps_ray.") and name.count(".")}
    if own in LAYERS:
        allowed = {*LAYERS[: LAYERS.index(own) + 1], "__version__"}
        if own == "datasets":  # has only the batch contract in common with the engine
            engine = {name for name in imports(path) if name.startswith("cps_ray.engine")}
            assert all(name.startswith("cps_ray.engine.batch") for name in engine), f"{path}: {engine}"
        if own in ("runs", "results"):
            allowed -= {"engine", "datasets"}
        if own == "runs":
            allowed -= {"model"}
        assert used <= allowed, f"{path} must not import {sorted(used - allowed)}"
    assert not (used - {own}) & COMMANDS, f"{path}: nobody imports a command"


def room(name: str) -> str:
    """`cps_ray.datasets.show.page.page` -> `show`; `cps_ray.datasets.shards.Shards` -> ``."""
    part = name.split(".")[2]
    return part if (ROOT / "datasets" / part).is_dir() else ""


@pytest.mark.parametrize("path", sorted((ROOT / "datasets").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_of_datasets(path: Path) -> None:
    own = room(module(path) + ".x")
    used = {room(name) for name in imports(path) if name.startswith("cps_ray.datasets.")}
    assert used - {own} <= DATASETS[own], f"{path} must not import {sorted(used)}"
    if own == "" and "prepare" in used:
        assert path.stem == "synthetic", f"{path}: what training reads does not prepare"


def test_nothing_imports_in_a_circle() -> None:
    names = {module(path) for path in MODULES}
    graph = {}
    for path in MODULES:
        targets = {name for full in imports(path) for name in (full, full.rpartition(".")[0])} & names
        graph[module(path)] = targets - {module(path), "cps_ray"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as err:
        pytest.fail(" -> ".join(err.args[1]))


def test_class_names_are_unique() -> None:
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: where for name, where in places.items() if len(where) > 1}


BARE = re.compile(
    r"(?:Above|After|Against|Along|Among|As|At|Before|Below|Beside|Between|By|For|From|In|Into|Of|On|Over|Per|Through|To|Under|Until|"
    r"With|Within|Without)\b"
)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb_or_with_what_the_thing_is(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert not BARE.match(node.value.value), f"{path}:{node.lineno} begins with a bare preposition"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_ray_and_optuna_stay_in_their_layers(path: Path) -> None:
    for package, homes in HOMES.items():
        if any(name == package or name.startswith(f"{package}.") for name in imports(path)):
            assert layer(path) in homes, f"{path} must not import {package}"


def loaded(modules: list[str], heavy: set[str]) -> str:
    code = f"import sys, {', '.join(modules)}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def modules_in(folder: str) -> list[str]:
    return [module(path) for path in MODULES if path.is_relative_to(ROOT / folder)]


def test_the_engine_loads_neither_ray_nor_data_libraries() -> None:
    heavy = {"ray", "optuna", "pyarrow", "albumentations", "cv2", "segmentation_models_pytorch"}
    assert loaded(modules_in("engine"), heavy) == "[]"


def test_preparing_and_showing_data_load_no_torch() -> None:
    heavy = {"torch", "ray", "optuna", "albumentations"}
    assert loaded([*modules_in("datasets/prepare"), *modules_in("datasets/show")], heavy) == "[]"


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys; before = set(sys.modules); import cps_ray; print(sorted(m for m in set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['cps_ray']"
