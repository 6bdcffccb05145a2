"""The command `encoders`: families, a table of what fits a pattern, and whether it runs at a crop."""

import subprocess
import sys

import pytest

from cps_ray.__main__ import COMMANDS
from cps_ray.encoders import main


def test_without_a_pattern_it_lists_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "tu-vit*dinov2*" in capsys.readouterr().out


def test_every_family_finds_something() -> None:
    from cps_ray.encoders import _FAMILIES
    from cps_ray.engine.encoders import matching

    assert all(matching(pattern) for pattern, _, _ in _FAMILIES)


def test_a_table_names_size_licence_divisor_and_whether_it_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["tu-vit_small_patch14_*dinov2*", "--crop", "448x448"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "tu-vit_small_patch14_dinov2.lvd142m" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["tu-vit_small_patch14_dinov2.lvd142m", "lvd142m", "22.1", "apache-2.0", "", "28", "dpt", "runs in dpt"]  # fmt: skip
    assert main(["tu-maxvit_tiny_tf_224", "--crop", "64x64", "--architecture", "fpn"]) == 0
    assert "no: height (16) must be divisible by window (7)" in capsys.readouterr().out


def test_names_are_whole_however_narrow_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["tu-vit_small_patch14_reg4_dinov2"]) == 0
    name, facts, *_ = capsys.readouterr().out.splitlines()
    assert name == "tu-vit_small_patch14_reg4_dinov2.lvd142m"
    assert facts == (
        "    weights: lvd142m, M params: 22.1, licence of the weights: apache-2.0, divisor: 28, architecture: dpt"
    )


def test_long_lists_are_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cps_ray.encoders._MAX_ROWS", 2)
    assert main(["resnet18"]) == 0
    out = capsys.readouterr().out
    assert "and 1 more, narrow the pattern" in out
    assert "swsl" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["qqqq"], "error: no encoder fits 'qqqq'."),
        (["resnet18", "--crop", "512"], "error: --crop: must be HEIGHTxWIDTH in px, such as 512x512, but got '512'."),
        (["resnet18", "--architecture", "unett"], "error: model.architecture:"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(message)


def test_it_is_a_command_and_its_help_needs_no_torch() -> None:
    assert "encoders" in COMMANDS
    code = "import sys, cps_ray.encoders; cps_ray.encoders._parser(); assert not {'torch', 'timm', 'pydantic'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
