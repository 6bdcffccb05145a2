"""Bugs planted on purpose, one at a time, in a copy of the package: each must turn the numerics' tests red.

Minutes long: `make test ARGS="-m slow tests/test_mutations.py"`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STEP, LOOP, DENSE = "tests/engine/test_step.py", "tests/engine/test_loop.py", "tests/engine/test_dense.py"
DEPTHWISE, WINOGRAD = "tests/engine/test_depthwise.py", "tests/engine/test_winograd.py"

BUGS = {
    "a network learns from its own labels": (
        "methods.py",
        "for number, label in enumerate(labels) if number != own",
        "for number, label in enumerate(labels) if number == own",
        STEP,
    ),
    "n networks divided by n": ("methods.py", "(pixels * (len(labels_U) - 1))", "(pixels * len(labels_U))", STEP),
    "the CutMix mask is inverted": (
        "mixing.py",
        "torch.where(mask, partner, own)",
        "torch.where(mask, own, partner)",
        STEP,
    ),
    "labels are not mixed with their images": (
        "methods.py",
        "return mixed[:, :3], list(mixed[:, 3:].unbind(dim=1))",
        "return mixed[:, :3], list(own[:, 3:].unbind(dim=1))",
        STEP,
    ),
    "the partner is the image before": (
        "ranks.py",
        "return torch.cat([tensor[1:], first])",
        "return torch.cat([tensor[-1:], tensor[:-1]])",
        STEP,
    ),
    "the teacher stays in evaluation mode": ("methods.py", "    network.train(mode)\n", "", STEP),
    "the softmax's Jacobian is forgotten": (
        "dense.py",
        "2.0 * weight * prob_BCHW * (apart_BCHW - mean_B1HW)",
        "2.0 * weight * prob_BCHW * apart_BCHW",
        DENSE,
    ),
    "ignored pixels count in the divisor": (
        "step.py",
        "(batch.labeled_mask != IGNORE).sum()",
        "(batch.labeled_mask >= 0).sum()",
        STEP,
    ),
    "a dilated kernel is mirrored": (
        "depthwise.py",
        "shift = (place - size // 2) * dilation",
        "shift = (size // 2 - place) * dilation",
        DEPTHWISE,
    ),
    "a tile forgets what its neighbours share with it": (
        "winograd.py",
        "for columns, here in (slice(0, _TILE), 0), (slice(_TILE, _REACH), 1):",
        "for columns, here in ((slice(0, _TILE), 0),):",
        WINOGRAD,
    ),
    "unsure labels count": (
        "dense.py",
        "labels_BHW[part].masked_fill_(_certainty(logits_BCHW) < confidence, IGNORE)",
        "labels_BHW[part].masked_fill_(_certainty(logits_BCHW) > confidence, IGNORE)",
        DENSE,
    ),
    "upsampling from pixel edges": ("dense.py", "align_corners=True", "align_corners=False", DENSE),
    "the ramp is one step ahead": (
        "schedules.py",
        "done = step / ramp_steps",
        "done = (step + 1) / ramp_steps",
        "tests/engine/test_schedules.py",
    ),
    "poly is one step ahead": (
        "schedules.py",
        "done = min(step / total_steps, 1.0)",
        "done = min((step + 1) / total_steps, 1.0)",
        "tests/engine/test_schedules.py",
    ),
    "OHEM keeps the easy pixels": (
        "losses.py",
        "(loss_BHW >= hardest",
        "(loss_BHW <= hardest",
        "tests/engine/test_losses.py",
    ),
    "norms are decayed": (
        "state.py",
        "for p in parameters if p.dim() > 1]",
        "for p in parameters if p.dim() > 0]",
        STEP,
    ),
    "the average moves the wrong way": ("state.py", "kept.lerp_(new, 1.0 - decay)", "kept.lerp_(new, decay)", STEP),
    "the average is not resumed": (
        "state.py",
        'self.averages[name].load_state_dict(kept["average"])',
        'self.averages[name].load_state_dict(kept["network"])',
        LOOP,
    ),
    "both networks start alike": (
        "networks.py",
        "seed=many * config.seed + number",
        "seed=many * config.seed",
        "tests/engine/test_networks.py",
    ),
    "overlapping windows count once": (
        "evaluation.py",
        "seen[first : first + window] += 1",
        "seen[first : first + window] = 1",
        "tests/engine/test_evaluation.py",
    ),
    "absent classes count as zero": (
        "metrics.py",
        ".nanmean()",
        ".nan_to_num().mean()",
        "tests/engine/test_metrics.py",
    ),
    "dropout draws the same in every step": (
        "step.py",
        "(config.seed * 1_000_003 + state.step) * 4099",
        "(config.seed * 1_000_003 + id(state) % 4096) * 4099",
        LOOP,
    ),
}


def copied(folder: Path) -> Path:
    for name in ("cps_ray", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def outcome(folder: Path, tests: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--numprocesses=0",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        str(folder / "tmp"),
        tests,
    ]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True
    )


def test_without_a_bug_all_are_green(tmp_path: Path) -> None:
    tests = sorted({tests for *_, tests in BUGS.values()})
    folder = copied(tmp_path)
    for each in tests:
        done = outcome(folder, each)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("bug", BUGS)
def test_each_bug_turns_a_test_red(tmp_path: Path, bug: str) -> None:
    name, right, wrong, tests = BUGS[bug]
    folder = copied(tmp_path)
    file = folder / "cps_ray/engine" / name
    text = file.read_text()
    assert right in text, f"{name} no longer has {right!r}"
    file.write_text(text.replace(right, wrong))
    done = outcome(folder, tests)
    assert done.returncode == 1, done.stdout
    assert "failed" in done.stdout.splitlines()[-1]
