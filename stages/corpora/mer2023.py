"""Adapter mer2023: train/ with train-label.csv (name, discrete, valence) is labelled, test1/ and test2/ are the
split `test`, test3/ is `unlabelled`. A transcription CSV (name, chinese) is used where there is one."""

from collections.abc import Sequence
from pathlib import Path

from stages.corpora.layout import Entry, label_column, media_files, require_same, transcript_column
from stages.engine.manifest import Split

FOLDERS: dict[str, Split] = {"test1": "test", "test2": "test", "test3": "unlabelled"}


def read(root: Path, labels: Sequence[str]) -> list[Entry]:
    """Every clip of the corpus. Raises PipelineError naming what is missing or contradictory."""
    labelled = media_files(root, "train")
    label_of = label_column(root / "train-label.csv", labels)
    require_same(label_of, labelled, root / "train-label.csv", root / "train", both=True)
    text = transcript_column(root / "label-transcription.csv")
    entries = [Entry(name, path, "labelled", label_of[name], text.get(name, "")) for name, path in labelled.items()]
    for folder, split in FOLDERS.items():
        entries += [Entry(n, path, split, "", text.get(n, "")) for n, path in media_files(root, folder).items()]
    return entries
