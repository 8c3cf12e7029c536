"""Adapter cremad: CREMA-D, 7,442 clips of 91 actors; VideoFlash/*.flv where they are there, else AudioWAV/*.wav.

Names as in its README (github.com/CheyneyComputerScience/CREMA-D): 1001_DFA_ANG_XX is actor 1001 with the sentence DFA,
the intended emotion ANG and its level (LO, MD, HI, XX). The label is the intended emotion, not the raters'. There is no
official split: actors are held out (published.held_out); the twelve sentences are the same for every emotion.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from stages.corpora.layout import Entry
from stages.corpora.published import by_speaker, named_files

NAME = re.compile(r"(?P<speaker>\d{4})_[A-Z]{3}_(?P<emotion>ANG|DIS|FEA|HAP|NEU|SAD)_[A-Z]{1,2}")
EMOTIONS = {"ANG": "anger", "DIS": "disgust", "FEA": "fear", "HAP": "happiness", "NEU": "neutral", "SAD": "sadness"}


def read(root: Path, labels: Sequence[str]) -> list[Entry]:
    """Every clip of an emotion that `labels` has. Raises PipelineError where there is none."""
    return by_speaker(root, labels, named_files(root, NAME, "1001_DFA_ANG_XX.wav"), EMOTIONS)
