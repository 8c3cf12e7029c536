"""The same bytes more than once, where that spoils what the figures mean: data/duplicates.csv, and a warning.

A clip that was trained on makes the test figures too good; one with two labels is wrong at least once.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from stages.corpora.layout import shown
from stages.engine.files import write_rows
from stages.engine.manifest import Clip

IN_TEST, TWO_LABELS = "train and test", "two labels"
PATH = Path("data/duplicates.csv")


@dataclass(frozen=True)
class Duplicate:
    """One of several clips of the same content. Labels are not named: those of test clips are for evaluate alone."""

    digest: str
    clip_id: str
    split: str
    problem: str  # IN_TEST, TWO_LABELS or both, joined by "; "


COLUMNS = [field.name for field in fields(Duplicate)]


def find_duplicates(clips: Iterable[Clip], truth: Mapping[str, str]) -> list[Duplicate]:
    """Clips of one digest that are both labelled for training and in the test split, or that have two labels.

    truth: labels of the clips that are not labelled for training, where known. Clips without a digest are not compared.
    """
    same: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        same[clip.digest].append(clip)
    found: list[Duplicate] = []
    for digest, group in sorted(same.items()):
        labels = {clip.label or truth.get(clip.clip_id, "") for clip in group} - {""}
        problems = [IN_TEST] if {"labelled", "test"} <= {clip.split for clip in group} else []
        problems += [TWO_LABELS] if len(labels) > 1 else []
        if digest and problems:
            found += [Duplicate(digest, clip.clip_id, clip.split, "; ".join(problems)) for clip in group]
    return found


def report_duplicates(source: Path, found: list[Duplicate], path: Path = PATH) -> None:
    """Write the table, empty where there are none, and a line per problem on stderr."""
    write_rows(path, COLUMNS, map(astuple, found))
    for problem in (IN_TEST, TWO_LABELS):
        groups: dict[str, list[str]] = defaultdict(list)
        for row in found:
            if problem in row.problem:
                groups[row.digest].append(row.clip_id)
        if groups:
            print(f"warning: {source}: {len(groups)} clip{'s' * (len(groups) > 1)} with the same bytes "
                  f"{'in train and test' if problem == IN_TEST else 'under two labels'}: "
                  f"{shown([' = '.join(names) for names in groups.values()])}; all in {PATH}", file=sys.stderr)
