"""Adapter mer2025: all clips in video/; those in track1_train_disdim.csv (name, discrete, valence) are labelled,
those in track_all_candidates.csv (name) are the split `test`, the others `unlabelled`. Transcripts from
subtitle_chieng.csv (name, chinese, english)."""

from collections.abc import Sequence
from pathlib import Path

from stages.corpora.layout import Entry, label_column, media_files, require_same, transcript_column
from stages.corpora.tables import read_table


def read(root: Path, labels: Sequence[str]) -> list[Entry]:
    """Every clip of the corpus. Raises PipelineError naming what is missing or contradictory."""
    return read_tables(root, labels, "track1_train_disdim.csv", "track_all_candidates.csv")


def read_tables(root: Path, labels: Sequence[str], train: str, scored_names: str) -> list[Entry]:
    """The same with the names of the two tables."""
    clips = media_files(root, "video")
    label_file, candidates = root / train, root / scored_names
    label_of = label_column(label_file, labels)
    scored = read_table(candidates, ("name",))
    require_same(label_of, clips, label_file, root / "video", both=False)
    # the candidates name training clips too; what has a label is labelled
    require_same(scored, clips, candidates, root / "video", both=False)
    text = transcript_column(root / "subtitle_chieng.csv")
    return [
        Entry(
            name,
            path,
            "labelled" if name in label_of else "test" if name in scored else "unlabelled",
            label_of.get(name, ""),
            text.get(name, ""),
        )
        for name, path in clips.items()
    ]
