"""Adapter meld: MELD.Raw unpacked, 13,708 utterances of Friends with the official split; dev is labelled too, because
folds for validation are cut from what is labelled.

As in its README (github.com/declare-lab/MELD): train_, dev_ and test_sent_emo.csv with Utterance, Speaker, Emotion,
Dialogue_ID and Utterance_ID; the clips are dia0_utt0.mp4 in train_splits/, dev_splits_complete/ and
output_repeated_splits_test/, wherever below the folder those lie. The names repeat between the splits, so each clip's
begins with its own. `group` is the speaker: folds are of different speakers, though the official test is not. Joy is
happiness where corpus.labels has no joy.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from stages.corpora.folders import what_is
from stages.corpora.layout import Entry, shown
from stages.corpora.published import choose
from stages.corpora.tables import read_lines
from stages.engine.errors import PipelineError
from stages.engine.manifest import Split

SPLITS: dict[str, tuple[str, Split]] = {
    "train": ("train_splits", "labelled"),
    "dev": ("dev_splits_complete", "labelled"),
    "test": ("output_repeated_splits_test", "test"),
}
COLUMNS = ("Utterance_ID", "Dialogue_ID", "Utterance", "Speaker", "Emotion")


def read(root: Path, labels: Sequence[str]) -> list[Entry]:
    """Every utterance with a file and an emotion that `labels` has. Raises PipelineError naming what is missing."""
    clips, absent = [], []
    for name, (folder, split) in SPLITS.items():
        table, videos = _only(root, f"{name}_sent_emo.csv"), _only(root, folder)
        for row in (row.cells for row in read_lines(table, COLUMNS)[1]):
            path = videos / f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}.mp4"
            if what_is(path):
                absent.append(f"{name}: {path.name}")
                continue
            entry = Entry(f"{name}_{path.stem}", str(path.relative_to(root)), split, "", row["Utterance"],
                          row["Speaker"])
            clips.append((entry, [row["Emotion"], *(["happiness"] if row["Emotion"].lower() == "joy" else [])]))
    if absent:
        print(f"{root}: {len(absent)} utterances without a file are left out: {shown(absent)}", file=sys.stderr)
    return choose(root, clips, labels)


def _only(root: Path, name: str) -> Path:
    """The shallowest file or folder of that name. Raises PipelineError where there is none."""
    found = sorted(root.rglob(name), key=lambda path: (len(path.parts), path))
    if not found:
        raise PipelineError(f"{root}: found no {name} in or below it; expected MELD.Raw and its archives, unpacked")
    return found[0]
