"""What is wrong with a data set: one finding per file, reported in one line where many files have the same trouble."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from cps_ray.errors import DataError

_NAMED = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """One trouble of one file, or of one split."""

    rule: str
    """What was checked; findings of one rule and remedy are reported in one line."""
    where: str
    """File, or split."""
    found: str
    """What must hold and what was found."""
    remedy: str
    fatal: bool = True
    """Whether the item cannot be used; else it is a warning."""
    whole: bool = False
    """Whether it spoils the whole split, so that leaving out this file would not help."""

    @property
    def line(self) -> str:
        """The whole finding."""
        return f"{self.where}: {self.found}; {self.remedy}."


class BadItemError(DataError):
    """An image or its mask cannot be used."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.line)
        self.finding = finding

    def __reduce__(self) -> tuple[type["BadItemError"], tuple[Finding]]:
        return BadItemError, (self.finding,)


def summary_lines(findings: Iterable[Finding]) -> list[str]:
    """One line per trouble, whatever the number of files that have it; fatal ones first. Warnings are about splits, a line each."""

    def trouble(finding: Finding) -> tuple[bool, str, str, str]:
        return not finding.fatal, finding.rule, finding.remedy, "" if finding.fatal else finding.where

    lines = []
    for _, group in groupby(sorted(findings, key=trouble), key=trouble):
        same = list(group)
        where = same[0].where if len(same) == 1 else f"{same[0].where} and {len(same) - 1} more"
        lines.append(f"{where}: {same[0].found}; {same[0].remedy}.")
    return lines


def first_few(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
