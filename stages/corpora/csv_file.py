"""Adapter csv: any corpus, described by clips.csv in its folder.

Columns: path (relative to the folder), split (labelled, unlabelled or test), label (may be empty but for labelled
clips); optional: name (else the file's name without its extension), transcript, group (speaker or dialogue: clips of
one group never straddle folds).
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import cast, get_args

from stages.corpora.folders import HIDDEN, NOTHING, OTHER, say_left_out, scan, what_is
from stages.corpora.labels import read_labels
from stages.corpora.layout import Entry
from stages.corpora.tables import read_lines
from stages.engine.errors import PipelineError
from stages.engine.manifest import Split

COLUMNS = ("path", "split", "label")


def read(root: Path, labels: Sequence[str]) -> list[Entry]:
    """Every clip of the table. Raises PipelineError naming the row and what is wrong with it."""
    table = root / "clips.csv"
    rows = {f"{table}: line {row.line}: {row.cells['path']}": row.cells for row in read_lines(table, COLUMNS)[1]}
    found = read_labels(table, {where: row["label"] for where, row in rows.items()}, labels)
    entries = [_entry(root, where, row, found[where]) for where, row in rows.items()]
    _say_unlisted(root, entries)
    return entries


def _say_unlisted(root: Path, entries: list[Entry]) -> None:
    listed = {entry.path for entry in entries}
    content = scan(root, deep=True)
    unlisted = [str(path.relative_to(root)) for path in content.clips if str(path.relative_to(root)) not in listed]
    odd = {kind: names for kind, names in content.left_out.items() if kind not in (HIDDEN, OTHER)}
    say_left_out(root, len(entries), odd | ({"file that clips.csv does not name": unlisted} if unlisted else {}))


def _entry(root: Path, where: str, row: dict[str, str], label: str) -> Entry:
    relative = PurePosixPath(row["path"])
    if relative.is_absolute() or ".." in relative.parts:
        raise PipelineError(f"{where}: leaves the corpus folder; expected a path below {root}")
    if kind := what_is(root / relative):
        raise PipelineError(f"{where}: {'no such file' if kind == NOTHING else f'a {kind}'} in {root}; expected a file")
    if not (root / relative).resolve().is_relative_to(root.resolve()):
        raise PipelineError(f"{where}: a link that leaves the corpus folder; expected a file below {root}")
    clip_id = row.get("name") or relative.stem
    if "/" in clip_id:
        raise PipelineError(f"{where}: found name {clip_id!r}, expected one without a slash")
    split = row["split"]
    if split not in get_args(Split):
        raise PipelineError(f"{where}: found split {split!r}, expected one of {list(get_args(Split))}")
    if split == "labelled" and not label:
        raise PipelineError(f"{where}: a labelled clip without a label; expected one of corpus.labels")
    return Entry(
        clip_id=clip_id,
        path=str(relative),
        split=cast(Split, split),
        label=label,
        transcript=row.get("transcript", ""),
        group=row.get("group", ""),
    )

