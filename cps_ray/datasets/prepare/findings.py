"""What is wrong with a data set: one finding per file, reported in one line where many files have the same problem."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from cps_ray.errors import DataError


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of a file, or of a split."""

    rule: str
    """What was checked; findings of one rule and remedy are reported in one line."""
    where: str
    """File, or split."""
    found: str
    """What must hold and what was found."""
    remedy: str
    fatal: bool = True
    """Whether the item cannot be used; False: a warning."""
    whole_split: bool = False
    """Whether the whole split is spoilt, so that leaving out this file would not help."""
    split: str = ""
    """The split that loses an image with it, where it was found before files were read."""
    image_id: str = ""
    """The image that is lost with it, where it was found when that was read."""

    @property
    def line(self) -> str:
        """The finding as one sentence: where, what was found, what to do."""
        return f"{self.where}: {self.found}; {self.remedy}."


class BadItemError(DataError):
    """An image or its mask cannot be used."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.line)
        self.finding = finding

    # By default an exception is unpickled by passing its message to its class, but this class takes a finding.
    def __reduce__(self) -> tuple[type["BadItemError"], tuple[Finding]]:
        return BadItemError, (self.finding,)


def summary_lines(findings: Iterable[Finding]) -> list[str]:
    """Returns one line per fatal problem, however many files have it, then one per warning; warnings are about splits."""

    def problem(finding: Finding) -> tuple[bool, str, str, str]:
        return not finding.fatal, finding.rule, finding.remedy, "" if finding.fatal else finding.where

    lines = []
    # groupby joins only neighbours, so it needs the order of its own key.
    for _, group in groupby(sorted(findings, key=problem), key=problem):
        same = list(group)
        where = same[0].where if len(same) == 1 else f"{same[0].where} and {len(same) - 1} more"
        lines.append(f"{where}: {same[0].found}; {same[0].remedy}.")
    return lines
