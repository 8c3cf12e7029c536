"""One rule for the labels that users supply, of corpora and of imported features alike.

Case, blanks and full-width letters do not count; angry, happy, ... are known for anger, happiness, ...; 1.0, as pandas
writes a column of numbers with gaps, is 1. `nan` and its like are no label. What was merged so, and what looks like no
class, is listed in one warning. Numbers that are no classes are refused: there is no regression here.
"""

import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.engine.errors import PipelineError

SPELLINGS = {"angry": "anger", "happy": "happiness", "sad": "sadness", "worried": "worry", "surprised": "surprise",
             "fearful": "fear", "disgusted": "disgust", "bored": "boredom", "frustrated": "frustration",
             "excited": "excitement"}
MISSING = {"", "nan", "null", "<na>", "n/a", "#n/a", "nat"}  # as spreadsheets, pandas and databases write no value
# Marks of annotators for what is no emotion; xxx and oth are IEMOCAP's
DOUBTFUL = {"xxx", "oth", "unknown", "unk", "none", "na", "?", "-", "undefined", "todo", "tbd", "x"}
MANY = 10  # different numbers that may be classes, whatever the number of clips


def folded(label: str) -> str:
    """The label without what does not count: case, the width of letters, doubled blanks, a whole number's decimals."""
    text = " ".join(unicodedata.normalize("NFKC", label).split()).casefold()
    return str(int(float(text))) if re.fullmatch(r"[+-]?\d{1,15}(\.0*)?", text) else text


def canonical(label: str) -> str:
    """The same for every spelling of one class."""
    return SPELLINGS.get(folded(label), folded(label))


def match_label(label: str, labels: Sequence[str]) -> str | None:
    """The label in the spelling of `labels`; None where it is not among them."""
    for same in (str, folded, canonical):
        if found := [known for known in labels if same(known) == same(label)]:
            return found[0]
    return None


def known_label(label: str, labels: Sequence[str], where: str) -> str:
    """The label in the spelling of corpus.labels. Raises PipelineError for one that is not among them."""
    found = match_label(label, labels)
    if found is None:
        raise PipelineError(f"{where}: found label {label!r}, expected one of corpus.labels {list(labels)}")
    return found


def read_labels(source: Path, found: Mapping[str, str], labels: Sequence[str] | None) -> dict[str, str]:
    """The class of every row: found and returned by where the row stands, as errors name it; "" where there is none.

    labels: the classes; None: those that occur, each in its most frequent spelling. What was merged or looks wrong goes
    to stderr in one line. Raises PipelineError for a label that is not among `labels`, and for a column of numbers.
    """
    declared = {folded(label) for label in labels or []}
    given = {where: label for where, label in found.items()
             if folded(label) in declared or folded(label) not in MISSING}
    if not {folded(label) for label in given.values()} <= declared:
        _refuse_numbers(source, list(given.values()))
    counts = Counter(given.values())
    if labels is None:
        spellings: dict[str, list[str]] = defaultdict(list)
        for label in counts:
            spellings[canonical(label)].append(label)
        usual = {same: max(variants, key=lambda label: (counts[label], label == folded(label), label))
                 for same, variants in spellings.items()}
        classes = {where: " ".join(usual[canonical(label)].split()) for where, label in given.items()}
    else:
        classes = {where: known_label(label, labels, where) for where, label in given.items()}
    remarks = _merged(counts, {given[where]: name for where, name in classes.items()})
    remarks += _doubtful(Counter(classes.values())) if labels is None else []
    nothing = Counter(label for where, label in found.items() if label and where not in given)
    remarks += [f"taken as no label: {_counted(nothing)}"] if nothing else []
    if remarks:
        print(f"warning: {source}: {'; '.join(remarks)}", file=sys.stderr)
    return {where: classes.get(where, "") for where in found}


def _refuse_numbers(source: Path, values: Sequence[str]) -> None:
    """Raises PipelineError where every value is a number, and there are fractions or too many for classes."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return
    distinct = sorted(set(numbers))
    if any(not number.is_integer() for number in numbers) or len(distinct) > max(MANY, len(numbers) / 2):
        raise PipelineError(
            f"{source}: the labels are numbers on a scale ({len(distinct)} different ones in {len(numbers)} rows, "
            f"{distinct[0]:g} to {distinct[-1]:g}), expected classes: this pipeline does no regression; make classes "
            f"of them (negative, neutral, positive)")


def _merged(counts: Mapping[str, int], classes: Mapping[str, str]) -> list[str]:
    """One remark per class with several spellings."""
    variants: dict[str, dict[str, int]] = defaultdict(dict)
    for label, name in classes.items():
        variants[name][label] = counts[label]
    return [f"merged as {name!r}: {_counted(found)}" for name, found in variants.items() if len(found) > 1]


def _doubtful(counts: Mapping[str, int]) -> list[str]:
    """What looks like no class among those that were found."""
    remarks = []
    if marks := {name: n for name, n in counts.items() if folded(name) in DOUBTFUL or (n == 1 and len(counts) > 2)}:
        remarks.append(f"looks like no class: {_counted(marks)}; remove such rows unless it is one")
    if counts and all(re.fullmatch(r"[+-]?\d+", folded(name)) for name in counts):
        remarks.append(f"the classes are numbers ({', '.join(sorted(counts))}); the report can't name them")
    return remarks


def _counted(counts: Mapping[str, int]) -> str:
    shown = [f"{name!r} ({count})" for name, count in sorted(counts.items())]
    return ", ".join(shown[:10]) + (" ..." if len(shown) > 10 else "")
