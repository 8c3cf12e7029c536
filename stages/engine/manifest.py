"""data/manifest.csv, data/folds.csv and data/transcripts.csv: what the other stages know of the corpus."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, cast

from stages.engine.files import read_rows, write_rows

Split = Literal["labelled", "unlabelled", "test"]


@dataclass(frozen=True)
class Clip:
    """One row of the manifest. Text fields are empty where the corpus says nothing."""

    clip_id: str
    path: str  # relative to corpus.path; empty for a clip of words alone
    split: Split
    label: str  # of labelled clips only; other splits' labels are in data/truth.csv
    transcript: str
    group: str  # clips of one group never straddle folds
    duration: float | None  # seconds, None if the file can't be read
    bytes: int
    digest: str  # SHA-256 of the content, hex: of the file or, of a segment, of the file's digest, start and end; or ""
    start: float | None = None  # seconds from the file's start, for a clip that is a segment of it
    end: float | None = None


@dataclass(frozen=True)
class Segment:
    """A part of a media file, in seconds from its start; end None: to the file's end."""

    path: str
    start: float = 0.0
    end: float | None = None


Source = str | Path | Segment  # what is decoded as one clip


def source_of(clip: Clip, root: Path) -> str | Segment:
    """Where the clip's media lie, "" for a clip of words alone; root: corpus.path."""
    if not clip.path:
        return ""
    path = str(root / clip.path)
    return path if clip.start is None and clip.end is None else Segment(path, clip.start or 0.0, clip.end)


def segment_digest(digest: str, start: float | None, end: float | None) -> str:
    """A segment's digest, of its file's: SHA-256, hex."""
    return hashlib.sha256(f"{digest} {start} {end}".encode()).hexdigest()


SEGMENT = ["start", "end"]  # columns of a corpus with segments only
COLUMNS = [field.name for field in fields(Clip) if field.name not in SEGMENT]


def read_manifest(path: str | Path = "data/manifest.csv") -> list[Clip]:
    """The corpus's clips in manifest order."""
    return [
        Clip(
            clip_id=row["clip_id"],
            path=row["path"],
            split=cast(Split, row["split"]),
            label=row["label"],
            transcript=row["transcript"],
            group=row["group"],
            duration=float(row["duration"]) if row["duration"] else None,
            bytes=int(row["bytes"]),
            digest=row["digest"],
            start=float(row["start"]) if row.get("start") else None,
            end=float(row["end"]) if row.get("end") else None,
        )
        for row in read_rows(path, COLUMNS)
    ]


def write_manifest(clips: Iterable[Clip], path: str | Path = "data/manifest.csv") -> None:
    clips = list(clips)
    segments = any(clip.start is not None or clip.end is not None for clip in clips)
    columns = COLUMNS + SEGMENT if segments else COLUMNS
    rows = (asdict(clip) for clip in clips)
    write_rows(path, columns, (["" if row[column] is None else row[column] for column in columns] for row in rows))


def read_folds(path: str | Path = "data/folds.csv") -> dict[str, int]:
    """Fold of each labelled clip: clip_id -> 0..count - 1."""
    return {row["clip_id"]: int(row["fold"]) for row in read_rows(path, ["clip_id", "fold"])}


def read_transcripts(path: str | Path = "data/transcripts.csv") -> dict[str, str]:
    """Transcript of every clip, from the corpus or from speech recognition: clip_id -> text, "" where there is none."""
    return {row["clip_id"]: row["transcript"] for row in read_rows(path, ["clip_id", "transcript"])}
