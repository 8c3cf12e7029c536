"""Adapter emodb: the Berlin Database of Emotional Speech, 535 utterances of 10 speakers, in wav/ or anywhere below.

Names as its documentation says, which e-com-net.com/article/1275696281754288128.htm quotes: 03a01Fa.wav is speaker
03 with the text a01, the emotion F (Freude) and, of several versions, a; emotions go by the initials of their German
names. There is no official split: speakers are held out (published.held_out). The texts are the same for every emotion.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from stages.corpora.layout import Entry
from stages.corpora.published import by_speaker, named_files

NAME = re.compile(r"(?P<speaker>\d\d)[ab]\d\d(?P<emotion>[WLEAFTN])[a-z]?")
EMOTIONS = {"W": "anger", "L": "boredom", "E": "disgust", "A": "fear", "F": "happiness", "T": "sadness", "N": "neutral"}


def read(root: Path, labels: Sequence[str]) -> list[Entry]:
    """Every clip of an emotion that `labels` has. Raises PipelineError where there is none."""
    return by_speaker(root, labels, named_files(root, NAME, "03a01Fa.wav"), EMOTIONS)
