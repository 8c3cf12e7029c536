"""What the adapters of published corpora share: clips by the pattern of their names, held-out speakers, and the choice
of emotions that corpus.labels makes."""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from stages.corpora.folders import VIDEO, say_left_out, scan
from stages.corpora.labels import match_label
from stages.corpora.layout import Entry
from stages.engine.errors import PipelineError

EVERY = 5  # of this many speakers one is held out for the test


def named_files(root: Path, pattern: re.Pattern[str], shape: str) -> list[tuple[Path, re.Match[str]]]:
    """The sound and video files below root whose names, without the extension, match; one a name, video first.

    Raises PipelineError where there is none; `shape` is what its text says a name looks like. What is left out is said.
    """
    content = scan(root, deep=True)
    found: dict[str, tuple[Path, re.Match[str]]] = {}
    left_out: dict[str, list[str]] = {kind: list(names) for kind, names in content.left_out.items()}
    for path in sorted(content.clips, key=lambda path: (path.suffix.lower() not in VIDEO, path.suffix != ".wav", path)):
        match = pattern.fullmatch(path.stem)
        if match and path.stem not in found:
            found[path.stem] = path, match
        else:
            kind = "file that a clip has besides" if match else "file whose name is not the corpus's"
            left_out.setdefault(kind, []).append(str(path.relative_to(root)))
    if not found:
        raise PipelineError(f"{root}: no clips of this corpus; expected names such as {shape} in or below that folder")
    say_left_out(root, len(found), left_out)
    return [found[name] for name in sorted(found)]


def by_speaker(root: Path, labels: Sequence[str], found: Iterable[tuple[Path, re.Match[str]]],
               emotions: Mapping[str, str]) -> list[Entry]:
    """One entry per file, by the groups `speaker` and `emotion` of its name; the speakers held out are the test."""
    found = list(found)
    test = held_out({match["speaker"] for _, match in found})
    clips = [(Entry(path.stem, str(path.relative_to(root)), "test" if match["speaker"] in test else "labelled",
                    group=f"speaker-{match['speaker']}"), [emotions[match["emotion"]]]) for path, match in found]
    return choose(root, clips, labels)


def held_out(speakers: Iterable[str]) -> set[str]:
    """Every fifth speaker in alphabetical order, or the last one of fewer: nobody is trained and tested on."""
    ordered = sorted(speakers)
    return set(ordered[EVERY - 1 :: EVERY] or ordered[-1:] if len(ordered) > 1 else [])


def choose(root: Path, clips: Iterable[tuple[Entry, Sequence[str]]], labels: Sequence[str]) -> list[Entry]:
    """The clips with the first of their names for the emotion that corpus.labels has. The others are left out, which is
    said. Raises PipelineError where none is left."""
    kept, left_out = [], Counter[str]()
    for entry, names in clips:
        label = next((known for name in names if (known := match_label(name, labels))), None)
        if label is None:
            left_out[names[0]] += 1
        else:
            kept.append(replace(entry, label=label))
    counts = ", ".join(f"{count} {name}" for name, count in sorted(left_out.items()))
    if not kept:
        raise PipelineError(f"corpus.labels: found {list(labels)}, but the clips in {root} are {counts}")
    if left_out:
        print(f"{root}: left out for emotions that corpus.labels does not have: {counts}", file=sys.stderr)
    return kept
