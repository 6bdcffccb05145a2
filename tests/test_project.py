"""The files that surround the package are of the form that their readers expect, and agree with each other and with what is there."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from cps_ray import __version__

ROOT = Path(__file__).parents[1]
CITATION, MAKEFILE = ROOT / "CITATION.cff", ROOT / "Makefile"
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
CHOOSER = ROOT / ".github/ISSUE_TEMPLATE/config.yml"
FORMS = sorted(set(CHOOSER.parent.glob("*.yml")) - {CHOOSER})
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*.md"), *ROOT.glob(".github/*.md")])
SCHEMAS = {
    "vendor.github-workflows": WORKFLOWS,
    "custom.github-workflows-require-timeout": WORKFLOWS,
    "vendor.github-issue-config": [CHOOSER],
    "vendor.github-issue-forms": FORMS,
    "vendor.citation-file-format": [CITATION],
}
"""Schema that check-jsonschema ships -> files that follow it."""


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_follow_their_schema(schema: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, SCHEMAS[schema])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_version_and_licence_are_said_alike() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load(CITATION.read_text())
    assert __version__ == project["version"] == citation["version"]
    assert project["license"] == citation["license"]


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / ".ci/run", *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_make_has_the_targets_that_are_named(path: Path) -> None:
    named = set(re.findall(r"(?m)(?:^ *|: |`)make ([a-z][\w-]*)", path.read_text()))
    assert named <= set(re.findall(r"(?m)^([a-z][\w-]*):", MAKEFILE.read_text()))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    titles = re.findall(r"(?m)^#+ (.+)$", page.read_text())
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", path.read_text()):
        page = path.parent / target if target else path
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), f"{target}#{anchor}"
