"""Adapter mer2026: MER2025's layout with other tables: track1_train.csv (name, discrete) is labelled, 9,395 clips, and
track1_track2_candidate.csv (name) the test, 20,000 of the 132,171 clips in video/.

As in MERTools, MER2026/MER2026_Track1 (README.md and toolkit/preprocess/mer2026.py): the labels are the speaker's, what
the candidates are scored by is the interlocutor's emotion. audio/ and openface_face/ are not needed.
"""

from collections.abc import Sequence
from pathlib import Path

from stages.corpora.layout import Entry
from stages.corpora.mer2025 import read_tables


def read(root: Path, labels: Sequence[str]) -> list[Entry]:
    """Every clip of the corpus. Raises PipelineError naming what is missing or contradictory."""
    return read_tables(root, labels, "track1_train.csv", "track1_track2_candidate.csv")
