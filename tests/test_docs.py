"""What the pages print works: commands parse, and run where that is quick, YAML loads, and everything else is named here.

Links and targets of make are checked in `test_project.py`, the modules of CONTRIBUTING.md in `test_doors.py`.
"""

import argparse
import importlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from markdown_it import MarkdownIt
from trees import patches, save, scene

from cps_ray import init, subsets
from cps_ray.__main__ import COMMANDS
from cps_ray.bench import methods
from cps_ray.config.reader import load_sweep, load_train, presets
from cps_ray.config.schema import locate, types_at
from cps_ray.config.space import apply
from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import SyntheticConfig, TrainConfig
from cps_ray.config.yaml_reader import dump_yaml, scalar
from cps_ray.datasets.prepare.recipe import load_recipe
from cps_ray.datasets.subsets import LABELED_LIST
from cps_ray.datasets.synthetic import write_synthetic
from cps_ray.errors import ConfigError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data/README.md", *sorted(ROOT.glob("docs/*.md"))]
HELP = [*ROOT.glob("cps_ray/*.py"), *ROOT.glob("sweeps/*.yaml"), *ROOT.glob("cps_ray/config/presets/**/*.yaml")]
"""Files with commands in docstrings, in examples below --help, or in comments."""
NEITHER = (
    "Best trial 0: val/miou ",
    "Best trial 2: val/miou ",
    "runs/NAME/ ",
    "best/model.safetensors ",
    "cps_ray/errors.py ",
    "train/ trainannot/ ",
    "leftImg8bit/{train",
    "data/voc/raw/VOCdevkit/",
    "Weights of tu-vit_small",
    "Test mIoU  best",
    "Best against ",
    "What next, best: ",
)
"""Beginnings of printed text that is neither commands nor YAML: output, and folders."""
OURS = re.compile(r"(?:\.venv/bin/)?(?:python -m cps_ray\.|cps-ray )")
OTHERS = re.compile(r"make [a-z]|\.ci/run|git clone |pip install |labelme |\. \.venv/bin/activate")
BESIDE: list[dict[str, Any]] = [
    {},
    {"ema.decay": 0.99},
    {"model.weights": "imagenet"},
    {"data.labeled": None},
    {"method": "noisy:NoisyStudent"},
]
"""Settings that a fragment in a sentence may need beside it."""


class Printed(NamedTuple):
    """Text that a page sets as code; `lang` is "" for indented text, and `inline` for code in a sentence."""

    page: str
    line: int
    lang: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {self.text.splitlines()[0]:.60}"


def printed() -> Iterator[Printed]:
    for path in PAGES:
        for token in MarkdownIt().parse(path.read_text(encoding="utf-8")):
            page, line = str(path.relative_to(ROOT)), token.map[0] + 1 if token.map else 0
            if token.type in ("fence", "code_block"):
                # A block may show folders, and below them the commands that fill them.
                parts = token.content.split("\n\n") if token.type == "code_block" else [token.content]
                yield from (Printed(page, line, token.info, part.strip("\n")) for part in parts)
            yield from (
                Printed(page, line, "inline", c.content) for c in token.children or [] if c.type == "code_inline"
            )


def helping() -> Iterator[Printed]:
    for path in sorted(HELP):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if found := re.match(r"(?:# +|  |    )((?:python -m cps_ray\.|cps-ray )\S.*)", line):
                yield Printed(str(path.relative_to(ROOT)), number, "inline", found[1])


def lines(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


def words_after_name(text: str) -> list[str]:
    """Returns a command of ours without `python -m cps_ray.`, its comment, and where its output goes."""
    words = shlex.split(OURS.sub("", text), comments=True)
    return words[: words.index(">")] if ">" in words else words


ALL = list(printed())
BLOCKS = [each for each in ALL if each.lang != "inline"]
TEXTS = [each for each in BLOCKS if each.lang not in ("yaml", "python")]
COMMAND_LINES = [each._replace(text=line) for each in TEXTS for line in lines(each.text) if OURS.match(line)]
# `cps-ray sweep ...` and `python -m cps_ray.subsets` in a sentence only name the command.
MENTIONED = [e for e in (*ALL, *helping()) if e.lang == "inline" and OURS.match(e.text) and "..." not in e.text]
YAML_BLOCKS = [each for each in BLOCKS if each.lang == "yaml"]


def settings_in(text: str) -> dict[str, Any]:
    """Returns the settings of a training in code of a sentence, such as `ema: {decay: 0.99}`; of anything else, nothing."""
    try:
        found = scalar(text)
    except ConfigError:
        return {}
    known = isinstance(found, dict) and all(
        name == "preset" or types_at(TrainConfig, locate(TrainConfig, {}, name)) for name in found
    )
    return found if known and "..." not in text else {}


FRAGMENTS = [each for each in ALL if each.lang == "inline" and settings_in(each.text)]


@pytest.mark.parametrize("block", TEXTS, ids=str)
def test_every_block_is_understood_or_named(block: Printed) -> None:
    if not block.text.startswith(NEITHER):
        unknown = [line for line in lines(block.text) if not (OURS.match(line) or OTHERS.match(line))]
        assert not unknown, "neither a command nor in NEITHER"


def test_all_that_is_named_is_printed() -> None:
    for beginning in NEITHER:
        assert sum(block.text.startswith(beginning) for block in TEXTS) == 1, beginning
    assert {block.lang for block in BLOCKS} == {"", "yaml", "python"}, "a language that no test reads"


def test_the_map_of_the_code_names_what_is_there() -> None:
    (text,) = (block.text for block in TEXTS if block.text.startswith("cps_ray/errors.py "))
    for line in text.splitlines():
        for path in line.split()[: None if line.startswith("sweeps/") else 1]:
            assert (ROOT / path).exists() or (ROOT / "cps_ray" / path).exists(), path


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with as many training images as the pages label, and the labelled subset 1_8."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_synthetic(folder, SyntheticConfig(train=64, val=8, test=8, height_px=32, width_px=48))
    assert subsets.main(["draw", str(folder), "--labeled", "8", "--name", "1_8"]) == 0
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: the shipped sweeps, README's own, its best.yaml, and the modules of CONTRIBUTING.md."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "sweeps", "sweeps")
    (own,) = (block.text for block in YAML_BLOCKS if block.page == "README.md")
    Path("sweeps/mine.yaml").write_text(own)
    best = Path("runs/mine/best.yaml")
    best.parent.mkdir(parents=True)
    best.write_text(dump_yaml(load_sweep(Path("sweeps/mine.yaml")).train.dump(str(best.parent))))
    for block in BLOCKS:
        if block.lang == "python":
            Path(block.text.split()[1]).write_text(block.text)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, argparse.Namespace]:
    """Returns the module of a command, and what its own parser makes of the words after its name."""
    name, *rest = words
    assert name in COMMANDS
    module = importlib.import_module("cps_ray.bench.__main__" if name == "bench" else f"cps_ray.{name}")
    found: list[argparse.Namespace] = []

    def only_parse(parser: argparse.ArgumentParser, run: object, argv: list[str]) -> int:
        found.append(parser.parse_args(argv))
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(module, "run_command", only_parse)
        module.main(rest)
    return module, found[0]


@pytest.mark.parametrize("command", COMMAND_LINES, ids=str)
def test_commands_work_as_printed(
    command: Printed, place: Path, data_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = words_after_name(command.text)
    if "crops" in command.text:
        for number in range(6):
            save(Path(f"crops/{number:03d}.jpg"), scene(str(number)))
            save(Path(f"crops/{number:03d}.png"), patches(str(number), (0, 1)))
        if words[0] != "init":
            assert init.main(["crops"]) == 0
    module, args = parsed(words, monkeypatch)
    given = vars(args)
    if words[0] == "sweep" and given.get("file"):
        load_sweep(args.file, args.set or [])
    elif words[0] == "train":
        workers = [] if args.workers is None else [f"resources.workers={args.workers}"]
        training = load_train(args.file, [*args.set, *workers])
        given["shards"] = training.data.shards
    elif words[:2] == ["bench", "methods"]:
        methods._training(args)
        methods._chosen(args)
    if given.get("shards"):
        shutil.copytree(data_set, args.shards)
    if "lists" in given:
        (args.lists / "1_8").mkdir(parents=True)
        shutil.copy(data_set / "subsets/1_8" / LABELED_LIST, args.lists / "1_8")
    quick = words[0] in ("init", "inspect", "subsets", "encoders") or words[:2] == ["prepare", "synthetic"]
    if quick or given.get("dry_run"):
        assert module.main(words[1:]) == 0


@pytest.mark.parametrize("command", MENTIONED, ids=str)
def test_commands_in_sentences_and_help_parse(command: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    words = words_after_name(command.text)
    if len(words) == 1:
        assert words[0] in {*COMMANDS, "--version"}
    else:
        parsed(words, monkeypatch)


@pytest.mark.parametrize("block", YAML_BLOCKS, ids=str)
def test_yaml_loads(block: Printed, place: Path) -> None:
    file = place / "sweeps" / "block.yaml"
    file.write_text(block.text)
    settings = scalar(block.text)
    if {*settings} <= {*SweepConfig.model_fields} and "train" not in settings:
        # The quickstart's baselines name its own search space.
        replaced = settings if "search_space" not in settings else {"baselines": {}, **settings}
        load_sweep(Path("quickstart"), [f"{name}={json.dumps(value)}" for name, value in replaced.items()])
    elif "search_space" in settings:
        load_sweep(file)
    elif "splits" in settings:
        load_recipe(file)
    elif "preset" in settings:
        load_train(file)
    else:
        apply(load_sweep(Path("quickstart")).train, settings, str(block))


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=str)
def test_settings_in_sentences_are_valid(fragment: Printed, place: Path) -> None:
    settings, base, faults = settings_in(fragment.text), load_sweep(Path("quickstart")).train, []
    if settings.pop("preset", presets()[0]) not in presets():
        pytest.fail("no such preset")
    for beside in BESIDE:
        try:
            apply(base, {**beside, **settings}, str(fragment))
            return
        except ConfigError as err:
            faults.append(str(err))
    pytest.fail("\n".join(faults))
