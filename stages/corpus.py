"""Stage corpus: what clips there are, in data/manifest.csv; apart, the labels that only evaluate may
see, and in data/duplicates.csv the clips that it should not hold.

    python -m stages.corpus

Order: labelled, test, unlabelled, each by name, so that more unlabelled clips leave earlier shards as they are.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from stages.corpora import cremad, csv_file, emodb, iemocap, meld, mer2023, mer2024, mer2025, mer2026, ravdess
from stages.corpora.duplicates import find_duplicates, report_duplicates
from stages.corpora.examine import examine_all
from stages.corpora.folders import escaped
from stages.corpora.layout import Entry, label_column, shown
from stages.engine.errors import PipelineError, run_stage
from stages.engine.files import write_rows
from stages.engine.manifest import write_manifest
from stages.engine.params import Params, load

ADAPTERS: dict[str, Callable[[Path, Sequence[str]], list[Entry]]] = {
    "demo": mer2024.read,
    "mer2024": mer2024.read,
    "mer2023": mer2023.read,
    "mer2025": mer2025.read,
    "mer2026": mer2026.read,
    "meld": meld.read,
    "iemocap": iemocap.read,
    "cremad": cremad.read,
    "ravdess": ravdess.read,
    "emodb": emodb.read,
    "csv": csv_file.read,
}
WATCHED = (Path("data/truth"), Path("data/demo"))  # deps of this stage: dvc.yaml can't name a file that may be null
ORDER = ("labelled", "test", "unlabelled")


def read_entries(p: Params) -> list[Entry]:
    """The adapter's clips, checked and in manifest order. Raises PipelineError."""
    root = Path(p.corpus.path)
    if not root.is_dir():
        raise PipelineError(f"corpus.path: found no folder {root}, expected the {p.corpus.adapter} corpus there")
    entries = ADAPTERS[p.corpus.adapter](root, p.corpus.labels)
    first: dict[str, str] = {}
    for entry in entries:
        if entry.clip_id in first:
            raise PipelineError(f"{root}: clip name {entry.clip_id!r} occurs twice ({first[entry.clip_id]} and "
                                f"{entry.path}); expected each name once in the whole corpus")
        if escaped(entry.path) != entry.path:
            raise PipelineError(f"{root}: file name {escaped(entry.path)} is not UTF-8, or holds control characters; "
                                f"rename it (convmv does, for files unpacked in another encoding)")
        if not entry.clip_id.isprintable():
            raise PipelineError(f"{root}: clip name {entry.clip_id!r} holds control characters; rename {entry.path}")
        first[entry.clip_id] = entry.path
    if not any(entry.split == "labelled" for entry in entries):
        raise PipelineError(f"{root}: no labelled clips; expected some to train on")
    return sorted(entries, key=lambda entry: (ORDER.index(entry.split), entry.clip_id))


def read_truth(p: Params, entries: list[Entry]) -> dict[str, str]:
    """Labels of clips that are not labelled for training: from corpus.truth, or the csv adapter's own table.

    Raises PipelineError for a corpus.truth that is no dependency of this stage.
    """
    truth = {entry.clip_id: entry.label for entry in entries if entry.split != "labelled" and entry.label}
    if p.corpus.truth is not None:
        watched = [Path(p.corpus.path), *WATCHED]
        if not any(Path(os.path.abspath(p.corpus.truth)).is_relative_to(os.path.abspath(folder)) for folder in watched):
            raise PipelineError(f"corpus.truth: {p.corpus.truth} lies where DVC would not notice that it changes; put "
                                f"it below {' or '.join(map(str, watched))}, and name it there")
        extra = label_column(Path(p.corpus.truth), p.corpus.labels)
        unknown = sorted(set(extra) - {entry.clip_id for entry in entries if entry.split != "labelled"})
        if unknown:
            raise PipelineError(f"{p.corpus.truth}: {len(unknown)} names that are no unlabelled or test clips: "
                                f"{shown(unknown)}")
        truth |= extra
    return truth


def main() -> None:
    p = load()
    entries = read_entries(p)
    truth = read_truth(p, entries)
    clips = examine_all(p, entries)
    write_manifest(clips)
    report_duplicates(Path(p.corpus.path), find_duplicates(clips, truth))
    write_rows("data/truth.csv", ["clip_id", "label"], [(e.clip_id, truth[e.clip_id]) for e in entries
                                                        if e.clip_id in truth])


if __name__ == "__main__":
    run_stage(main)
