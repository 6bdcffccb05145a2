"""YAML 1.2 scalars, line numbers, refusals, and dumps that read back."""

from pathlib import Path

import pytest

from cps_ray.config.yaml_reader import dump_yaml, load, scalar
from cps_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-3", 0.001), ("1.", 1.0), (".5e2", 50.0), ("-2", -2), ("0o17", 15), ("0x1f", 31), ("0777", 777)],
        *[("true", True), ("false", False), ("on", "on"), ("yes", "yes"), ("no", "no"), ("off", "off")],
        *[("", None), ("null", None), ("1:30", "1:30"), ("2020-01-01", "2020-01-01"), ("1_000", "1_000")],
        *[("[1, 2e3]", [1, 2000.0]), ("{a: {b: 1}}", {"a": {"b": 1}}), ("'1'", "1"), ("-.inf", float("-inf"))],
    ],
)
def test_scalar_is_yaml_1_2(text, value):
    found = scalar(text)
    assert found == value
    assert type(found) is type(value)


def test_dump_reads_back_with_types_and_order():
    data = {
        "z": 1e-5,
        "a": {"on": "on", "crop_px": [64, 96], "empty": {}, "none": None},
        "text": ["1e-3", "0o7", "null", "", "12", "1.", "yes", "a: b", "<<"],
        "points": [{"lr": 1e20, "mix": "none"}, {"lr": 2.0}],
    }
    text = dump_yaml(data, "first\n\nthird")
    assert text.startswith("# first\n#\n# third\nz: ")
    assert "  crop_px: [64, 96]\n" in text
    back = scalar(text)
    assert back == data
    assert list(back) == list(data)
    assert type(back["points"][1]["lr"]) is float


def test_dump_writes_long_lists_as_blocks_and_no_anchors():
    shared = list(range(100))
    text = dump_yaml({"a": shared, "b": shared, "c": (1, 2)})
    assert text.count("\n- 7\n") == 2
    assert "c: [1, 2]" in text


def test_lines_of_settings(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("# top\na:\n  b: 1\n  c:\n    - 5\n    - {d: 6}\nm: &m\n  k: 1\nn:\n  <<: *m\n  own: 2\n")
    document = load(path)
    assert document.data["n"] == {"k": 1, "own": 2}
    lines = {("a",): 2, ("a", "b"): 3, ("a", "b", "x"): 3, ("a", "c", 1, "d"): 6, ("a", "c", 9): 4, ("z",): 2}
    lines |= {("n", "own"): 11, ("n", "k"): 8}
    assert {loc: document.line(loc) for loc in lines} == lines
    assert document.where(("a", "c", 0)) == f"{path}:5"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: 2\na: 3\n", "x.yaml:3: not valid YAML: a is given twice, first in line 1; remove one."),
        (b"a:\n  b: {c: 1, c: 2}\n", "x.yaml:2: not valid YAML: c is given twice, first in line 2; remove one."),
        (b"", "x.yaml:1: must hold a mapping of settings, such as `version: 1`, but is empty."),
        (b"- 1\n", "x.yaml:1: must hold a mapping of settings, such as `version: 1`, but holds [1]."),
        (b"a: 1\nb: \xe9\n", "x.yaml:2: must be UTF-8, but holds the byte 0xe9."),
        (b"a: 1\nb: c: d\n", "x.yaml:2: not valid YAML: mapping values are not allowed here."),
        (b"a: 1\n2: b\n", "x.yaml:2: not valid YAML: a key must be text; quote it."),
        (b"a: 1\nb: \x07\n", "x.yaml:2: not valid YAML: the character '\\x07' is not allowed."),
        (b"a: !!int b\n", "x.yaml:1: not valid YAML: 'b' is no !!int."),
        (b"a: !!python/name:os.system x\n", "could not determine a constructor"),
        (b"a: &a [*a]\n", "x.yaml:1: not valid YAML: found unconstructable recursive node."),
        (None, "x.yaml: no such file."),
    ],
)
def test_refusals_name_file_and_line(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("x.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(Path("x.yaml"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)


def test_scalar_names_its_place():
    with pytest.raises(ConfigError, match=r"^--set a=@: not valid YAML: "):
        scalar("@", "--set a=@")
