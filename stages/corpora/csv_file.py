"""Adapter csv: any corpus, described by clips.csv in its folder.

Columns: path (relative to the folder; empty for a clip of words alone, which has a name and a transcript), split
(labelled, unlabelled or test), label (may be empty but for labelled clips); optional: name (else the file's name
without its extension), transcript, group (speaker or dialogue: clips of one group never straddle folds), start and end
(seconds: the clip is that segment of the file, of which there may be several; an empty one stands for the file's start
or end, and names are made of both: dialogue_0.5-2.75).
"""

import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import cast, get_args

from stages.corpora.folders import HIDDEN, NOTHING, OTHER, say_left_out, scan, what_is
from stages.corpora.labels import read_labels
from stages.corpora.layout import Entry
from stages.corpora.tables import read_lines
from stages.engine.errors import PipelineError
from stages.engine.manifest import SEGMENT, Split

COLUMNS = ("path", "split", "label")


def read(root: Path, labels: Sequence[str]) -> list[Entry]:
    """Every clip of the table. Raises PipelineError naming the row and what is wrong with it."""
    table = root / "clips.csv"
    rows = {f"{table}: line {row.line}: {row.cells['path']}".removesuffix(": "): row.cells
            for row in read_lines(table, COLUMNS, blank=True)[1]}
    found = read_labels(table, {where: row["label"] for where, row in rows.items()}, labels)
    entries = [_entry(root, where, row, found[where]) for where, row in rows.items()]
    first: dict[str, str] = {}
    for where, entry in zip(rows, entries, strict=True):
        if entry.clip_id in first:
            raise PipelineError(f"{where}: clip name {entry.clip_id!r} occurs twice, first in {first[entry.clip_id]}; "
                                f"give every clip a name of its own in a column name")
        first[entry.clip_id] = where.removeprefix(f"{table}: ")
    _say_unlisted(root, entries)
    return entries


def _say_unlisted(root: Path, entries: list[Entry]) -> None:
    listed = {entry.path for entry in entries}
    content = scan(root, deep=True)
    unlisted = [str(path.relative_to(root)) for path in content.clips if str(path.relative_to(root)) not in listed]
    odd = {kind: names for kind, names in content.left_out.items() if kind not in (HIDDEN, OTHER)}
    say_left_out(root, len(entries), odd | ({"file that clips.csv does not name": unlisted} if unlisted else {}))


def _entry(root: Path, where: str, row: dict[str, str], label: str) -> Entry:
    path = _path(root, where, row)
    start, end = (_seconds(where, column, row.get(column, "")) for column in SEGMENT)
    if end is not None and end <= (start or 0):
        raise PipelineError(f"{where}: found start {row.get('start')!r} and end {row['end']!r}, expected an end after "
                            f"the start")
    segment = "" if start is end is None else f"_{row.get('start') or 0}-{row.get('end') or 'end'}"
    clip_id = row.get("name") or PurePosixPath(path).stem + segment
    if "/" in clip_id:
        raise PipelineError(f"{where}: found name {clip_id!r}, expected one without a slash")
    split = row["split"]
    if split not in get_args(Split):
        raise PipelineError(f"{where}: found split {split!r}, expected one of {list(get_args(Split))}")
    if split == "labelled" and not label:
        raise PipelineError(f"{where}: a labelled clip without a label; expected one of corpus.labels")
    return Entry(
        clip_id=clip_id,
        path=path,
        split=cast(Split, split),
        label=label,
        transcript=row.get("transcript", ""),
        group=row.get("group", ""),
        start=start,
        end=end,
    )


def _path(root: Path, where: str, row: dict[str, str]) -> str:
    """The clip's file relative to root; "" for a clip of words alone."""
    if not row["path"]:
        if not (row.get("name") and row.get("transcript")):
            raise PipelineError(f"{where}: no path; expected one in every row that has not both a name and a "
                                f"transcript")
        if any(row.get(column) for column in SEGMENT):
            raise PipelineError(f"{where}: no path, but a start or end; expected the file that they are in")
        return ""
    relative = PurePosixPath(row["path"])
    if relative.is_absolute() or ".." in relative.parts:
        raise PipelineError(f"{where}: leaves the corpus folder; expected a path below {root}")
    if kind := what_is(root / relative):
        raise PipelineError(f"{where}: {'no such file' if kind == NOTHING else f'a {kind}'} in {root}; expected a file")
    if not (root / relative).resolve().is_relative_to(root.resolve()):
        raise PipelineError(f"{where}: a link that leaves the corpus folder; expected a file below {root}")
    return str(relative)


def _seconds(where: str, column: str, cell: str) -> float | None:
    try:
        seconds = float(cell) if cell else None
    except ValueError:
        seconds = -1.0
    if seconds is not None and not 0 <= seconds < math.inf:
        raise PipelineError(f"{where}: found {column} {cell!r}, expected seconds from the file's start, as 12.5")
    return seconds

