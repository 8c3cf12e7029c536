"""Adapter mer2024: the MER2024 raw folder, which the demo corpus imitates.

video-labeled/ and label-disdim.csv (name, discrete, valence): 5,030 labelled clips.
video-unlabeled-with-test2noise/: 115,595 clips; those in candidate_20000.csv (name) are scored and form the split
`test`, the others `unlabelled`. label-transcription.csv (name, chinese, english) need not cover all of them.
"""

from collections.abc import Sequence
from pathlib import Path

from stages.corpora.layout import Entry, label_column, media_files, require_same, transcript_column
from stages.corpora.tables import read_table


def read(root: Path, labels: Sequence[str]) -> list[Entry]:
    """Every clip of the corpus. Raises PipelineError naming what is missing or contradictory."""
    labelled, others = media_files(root, "video-labeled"), media_files(root, "video-unlabeled-with-test2noise")
    label_of = label_column(root / "label-disdim.csv", labels)
    require_same(label_of, labelled, root / "label-disdim.csv", root / "video-labeled", both=True)
    scored = read_table(root / "candidate_20000.csv", ("name",))
    require_same(scored, others, root / "candidate_20000.csv", root / "video-unlabeled-with-test2noise", both=False)
    text = transcript_column(root / "label-transcription.csv")
    return [Entry(name, path, "labelled", label_of[name], text.get(name, "")) for name, path in labelled.items()] + [
        Entry(name, path, "test" if name in scored else "unlabelled", "", text.get(name, ""))
        for name, path in others.items()
    ]
