"""Adapter iemocap: IEMOCAP_full_release, 10 speakers in five sessions; session 5 is the test, as is usual.

Layout as in github.com/CXianRen/AMST, Doc/dataset/IEMOCAP.md, and other readers of it: per turn Session1/dialog/
EmoEvaluation/*.txt has `[6.2901 - 8.2357]<TAB>Ses01F_impro01_F000<TAB>neu<TAB>[...]` and dialog/transcriptions/*.txt
`Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me.`. A turn is a segment of the dialogue's video in dialog/avi/ where
that is there, else its own file in sentences/wav/. The letter after the last _ is the speaker: `group`. Excitement is
happiness where corpus.labels has no excitement; xxx (raters disagree) and oth are left out.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from stages.corpora.folders import what_is
from stages.corpora.layout import Entry
from stages.corpora.published import choose
from stages.engine.errors import PipelineError

TURN = re.compile(r"^\[(?P<start>[\d.]+) - (?P<end>[\d.]+)\]\s+(?P<name>(?P<dialogue>Ses0(?P<session>\d)\w+)_"
                  r"(?P<speaker>[FM])\w+)\s+(?P<emotion>\w{3})\s", re.M)
TEXT = re.compile(r"^(?P<name>Ses0\d\w+) \[[\d.]+-[\d.]+\]: (?P<text>.*)$", re.M)
EMOTIONS = {"ang": ["anger"], "hap": ["happiness"], "exc": ["excitement", "happiness"], "sad": ["sadness"],
            "neu": ["neutral"], "fru": ["frustration"], "fea": ["fear"], "sur": ["surprise"], "dis": ["disgust"]}
TEST = "5"


def read(root: Path, labels: Sequence[str]) -> list[Entry]:
    """Every turn of an emotion that `labels` has. Raises PipelineError naming what is missing."""
    texts = {match["name"]: match["text"].strip() for match in _matches(root, "transcriptions", TEXT)}
    videos = {path.stem: path for path in sorted(root.glob("Session*/dialog/avi/**/Ses*.avi"))}
    turns = [(_entry(root, turn, videos, texts), EMOTIONS.get(turn["emotion"], [turn["emotion"]]))
             for turn in _matches(root, "EmoEvaluation", TURN)]
    if not turns:
        raise PipelineError(f"{root}: no rated turns; expected Session1/dialog/EmoEvaluation/Ses01F_impro01.txt ...")
    return choose(root, turns, labels)


def _matches(root: Path, folder: str, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
    for path in sorted(root.glob(f"Session*/dialog/{folder}/Ses*.txt")):
        yield from pattern.finditer(path.read_text(encoding="utf-8", errors="replace"))


def _entry(root: Path, turn: re.Match[str], videos: dict[str, Path], texts: dict[str, str]) -> Entry:
    session, name = turn["session"], turn["name"]
    path = videos.get(turn["dialogue"], root / f"Session{session}/sentences/wav/{turn['dialogue']}/{name}.wav")
    if kind := what_is(path):
        raise PipelineError(f"{path}: a {kind}; expected the turn's sound there, or the dialogue's video in dialog/avi")
    whole = turn["dialogue"] not in videos
    segment = (None, None) if whole else (float(turn["start"]), float(turn["end"]))
    return Entry(name, str(path.relative_to(root)), "test" if session == TEST else "labelled", "", texts.get(name, ""),
                 f"Ses0{session}{turn['speaker']}", *segment)
