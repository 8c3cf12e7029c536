"""Adapter ravdess: the speech of RAVDESS, 1,440 takes of 24 actors, in Actor_01/ and so on or anywhere below.

Names as its publishers document them (zenodo.org/record/1188976, as github.com/MikhailRogachev/speech_project repeats):
02-01-06-01-02-01-12.mp4 is the modality (01 full, 02 video alone, 03 sound alone), speech or song (01, 02), emotion,
intensity, statement, repetition and actor. Of one take the full recording counts, else the sound, else the video. Songs
are left out. There is no official split: actors are held out (published.held_out). The statements are the same for
every emotion.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from stages.corpora.folders import say_left_out
from stages.corpora.layout import Entry
from stages.corpora.published import by_speaker, named_files

NAME = re.compile(r"(?P<modality>0[123])-(?P<take>(?P<channel>0[12])-(?P<emotion>0[1-8])-0[12]-0[12]-0[12]-"
                  r"(?P<speaker>\d\d))")
EMOTIONS = {"01": "neutral", "02": "calm", "03": "happiness", "04": "sadness", "05": "anger", "06": "fear",
            "07": "disgust", "08": "surprise"}
PREFERRED = ("01", "03", "02")


def read(root: Path, labels: Sequence[str]) -> list[Entry]:
    """Every spoken take of an emotion that `labels` has. Raises PipelineError where there is none."""
    found = named_files(root, NAME, "03-01-06-01-02-01-12.wav")
    speech = [(path, match) for path, match in found if match["channel"] == "01"]
    takes: dict[str, tuple[Path, re.Match[str]]] = {}
    for path, match in sorted(speech, key=lambda clip: PREFERRED.index(clip[1]["modality"])):
        takes.setdefault(match["take"], (path, match))
    songs = [str(path.relative_to(root)) for path, match in found if match["channel"] == "02"]
    further = sorted({str(path.relative_to(root)) for path, _ in speech}
                     - {str(path.relative_to(root)) for path, _ in takes.values()})
    kinds = {"song": songs, "file of a take without its sound or picture": further}
    say_left_out(root, len(takes), {kind: names for kind, names in kinds.items() if names})
    return by_speaker(root, labels, takes.values(), EMOTIONS)
