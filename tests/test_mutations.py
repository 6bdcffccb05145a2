"""Bugs planted on purpose, one at a time, in a copy of the package: each must turn the numerics' tests red.

Minutes long: `make test ARGS="-m slow tests/test_mutations.py"`.

A bug replaces a pattern in the syntax tree of one function. In patterns a single capital letter stands for any expression, so a bug survives
new names of variables, comments and line breaks; what it pins is the function, and what belongs to the language or to a library.
"""

import ast
import copy
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STEP, LOOP, DENSE = "tests/engine/test_step.py", "tests/engine/test_loop.py", "tests/engine/test_dense.py"
DEPTHWISE, SCHEDULES = "tests/engine/cpu/test_depthwise.py", "tests/engine/test_schedules.py"
LOSSES, METRICS = "tests/engine/test_losses.py", "tests/engine/test_metrics.py"
EVALUATION, NETWORKS = "tests/engine/test_evaluation.py", "tests/engine/test_networks.py"
AUTHORS = "tests/engine/test_authors_equations.py"


@dataclass(frozen=True)
class Bug:
    """What is right and what is put in its place, as expressions or as statements; and the tests that have to see it."""

    file: str
    """Path below cps_ray/engine/."""
    function: str
    right: str
    wrong: str
    tests: str
    last: bool = False
    """Whether only the last place that fits is changed."""


BUGS = {
    "a network learns from its own labels": Bug("methods.py", "_peer_terms", "A != B", "A == B", STEP),
    "n networks divided by n": Bug("methods.py", "_cps_losses", "A / (len(B) - 1)", "A / len(B)", STEP),
    "the CutMix mask is inverted": Bug("mixing.py", "paste", "torch.where(A, B, C)", "torch.where(A, C, B)", STEP),
    "labels are not mixed with their images": Bug(
        "pseudo_labels.py",
        "mix_with_labels",
        "paste(A, B, C)",
        "torch.cat([paste(A, B, C)[:, :3], B[:, 3:]], dim=1)",
        STEP,
    ),
    "the partner is the image before": Bug(
        "ranks.py", "roll", "torch.cat([A[1:], B])", "torch.cat([A[-1:], A[:-1]])", STEP
    ),
    "the teacher stays in evaluation mode": Bug("passes.py", "teacher_logits", "A.train(B)", "pass", STEP, last=True),
    "UniMatch's loss is not halved": Bug("methods.py", "unimatch", "A / 2.0", "A", STEP),
    "UniMatch labels what is pasted like the rest": Bug(
        "methods.py", "_unimatch_weak_pass", "[A.detach(), B]", "[A.detach()]", STEP
    ),
    "both views keep the same channels": Bug("features.py", "complementary_dropout", "2.0 - A", "A", STEP),
    "the softmax's Jacobian is forgotten": Bug("dense.py", "squared_difference", "A * (B - C)", "A * B", DENSE),
    "ignored pixels count in the divisor": Bug("losses.py", "weighed_pixels", "A != IGNORE", "A >= 0", STEP),
    "a dilated kernel is mirrored": Bug(
        "cpu/depthwise.py", "_spans", "(A - B // 2) * C", "(B // 2 - A) * C", DEPTHWISE
    ),
    "phases go back with rows and columns exchanged": Bug(
        "cpu/depthwise.py", "_by_phases", "A.permute(0, 3, 1, 4, 2, 5)", "A.permute(0, 3, 2, 4, 1, 5)", DEPTHWISE
    ),
    "unsure labels count": Bug("dense.py", "hard_labels", "A < B", "A > B", DENSE),
    "upsampling from pixel edges": Bug(
        "dense.py",
        "upsample",
        "F.interpolate(A, B, mode=C, align_corners=True)",
        "F.interpolate(A, B, mode=C, align_corners=False)",
        DENSE,
    ),
    "the ramp is one step ahead": Bug("schedules.py", "ramped_weight", "A / B", "(A + 1) / B", SCHEDULES),
    "poly is one step ahead": Bug(
        "schedules.py", "learning_rate", "min(A / B, 1.0)", "min((A + 1) / B, 1.0)", SCHEDULES
    ),
    "OHEM keeps the easy pixels": Bug("losses.py", "hard_pixels", "A >= B", "A <= B", LOSSES),
    "norms are decayed": Bug("state.py", "_optimizer", "A.dim() > 1", "A.dim() > 0", STEP),
    "the average moves the wrong way": Bug("state.py", "update_averages", "A.lerp_(B, 1.0 - C)", "A.lerp_(B, C)", STEP),
    "the average is not resumed": Bug(
        "state.py", "load", "A.load_state_dict(B['average'])", "A.load_state_dict(B['network'])", LOOP
    ),
    "both networks start alike": Bug("networks.py", "build_networks", "A * B + C", "A * B", NETWORKS),
    "overlapping windows count once": Bug("inference.py", "_times_seen", "A[B:C] += 1", "A[B:C] = 1", EVALUATION),
    "absent classes count as zero": Bug("metrics.py", "mean_iou", "A.nanmean()", "A.nan_to_num().mean()", METRICS),
    "dropout draws the same in no second run": Bug(
        "step.py", "_begin_step", "torch.manual_seed(A)", "torch.seed()", LOOP
    ),
    "labels are not exchanged": Bug("methods.py", "_peer_terms", "A != B", "A == B", AUTHORS),
    "OHEM's threshold is halved": Bug("losses.py", "hard_pixels", "math.log(A)", "math.log(A / 2)", AUTHORS),
    "with CutMix the labelled images go first": Bug(
        "methods.py", "_student_logits", "A != 'none'", "A == 'none'", AUTHORS
    ),
}


def is_wildcard(node: object) -> bool:
    return isinstance(node, ast.Name) and len(node.id) == 1 and node.id.isupper()


def fits(pattern: object, tree: object, bound: dict[str, ast.AST]) -> bool:
    """Whether a tree has the form of a pattern; `bound` takes what its letters stand for, the same for the same letter."""
    if is_wildcard(pattern):
        if not isinstance(tree, ast.expr):
            return False
        known = bound.setdefault(pattern.id, tree)
        return known is tree or ast.dump(known) == ast.dump(tree)
    if isinstance(pattern, ast.AST):
        return type(pattern) is type(tree) and all(
            name == "ctx" or fits(value, getattr(tree, name), bound) for name, value in ast.iter_fields(pattern)
        )
    if isinstance(pattern, list):
        same_length = isinstance(tree, list) and len(pattern) == len(tree)
        return same_length and all(fits(one, other, bound) for one, other in zip(pattern, tree, strict=True))
    return pattern == tree


class Fill(ast.NodeTransformer):
    """Puts expressions in place of a pattern's letters."""

    def __init__(self, bound: dict[str, ast.AST]) -> None:
        self.bound = bound

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return copy.deepcopy(self.bound[node.id]) if is_wildcard(node) else node


class Plant(ast.NodeTransformer):
    """Replaces every place that fits `right`, or only that of number `only`; counts them."""

    def __init__(self, bug: Bug, only: int | None = None) -> None:
        right, wrong = ast.parse(bug.right).body[0], ast.parse(bug.wrong).body[0]
        if isinstance(right, ast.Expr) and isinstance(wrong, ast.Expr):
            right, wrong = right.value, wrong.value
        self.right, self.wrong, self.only, self.count = right, wrong, only, 0

    def visit(self, node: ast.AST) -> ast.AST:
        bound: dict[str, ast.AST] = {}
        if fits(self.right, node, bound):
            self.count += 1
            if self.only in (None, self.count):
                return Fill(bound).visit(copy.deepcopy(self.wrong))
        return self.generic_visit(node)


def planted(source: str, bug: Bug) -> str:
    """The source with the bug. AssertionError: nothing in the function has the form that it replaces."""
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == bug.function]
    assert functions, f"{bug.file} has no function {bug.function}"
    for function in functions:
        finder = Plant(bug)
        finder.visit(copy.deepcopy(function))
        assert finder.count, f"nothing in {bug.file}: {bug.function} has the form {bug.right}"
        Plant(bug, only=finder.count if bug.last else None).visit(function)
    return ast.unparse(ast.fix_missing_locations(tree))


def copied(folder: Path) -> Path:
    for name in ("cps_ray", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def outcome(folder: Path, tests: str) -> subprocess.CompletedProcess[str]:
    options = ["-x", "-q", "--numprocesses=0", "-p", "no:cacheprovider", "--basetemp", str(folder / "tmp")]
    command = [sys.executable, "-m", "pytest", *options, tests]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True
    )


def test_without_a_bug_all_are_green(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    for file in {bug.file for bug in BUGS.values()}:  # without comments, as files with a bug are
        path = folder / "cps_ray/engine" / file
        path.write_text(ast.unparse(ast.parse(path.read_text())))
    for tests in sorted({bug.tests for bug in BUGS.values()}):
        done = outcome(folder, tests)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", BUGS)
def test_each_bug_turns_a_test_red(tmp_path: Path, name: str) -> None:
    bug = BUGS[name]
    folder = copied(tmp_path)
    file = folder / "cps_ray/engine" / bug.file
    file.write_text(planted(file.read_text(), bug))
    done = outcome(folder, bug.tests)
    assert done.returncode == 1, done.stdout
    assert "failed" in done.stdout.splitlines()[-1]
