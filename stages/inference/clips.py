"""What predict is asked for: clips, by name or by folder, and the transcripts that the user has of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.corpora.layout import MEDIA
from stages.corpora.tables import read_lines, read_table
from stages.engine.errors import PipelineError

# Columns of a transcript table: predict's own output, data/transcripts.csv, any other, and the MER corpora's
FORMS = (("clip", "transcript"), ("clip_id", "transcript"), ("name", "transcript"), ("name", "chinese"))


def find_clips(arguments: Sequence[str]) -> list[Path]:
    """The files named, whatever their extension, and the video files in and below the folders named; each once.

    Raises PipelineError for a path that is not there and for a folder without video files.
    """
    found: dict[Path, None] = {}
    for path in map(Path, arguments):
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in MEDIA and file.is_file()]
            clips = [file for file in inside if not file.name.startswith(".")]
            if not clips:
                raise PipelineError(f"{path}: a folder without video files; expected {', '.join(sorted(MEDIA))}")
            found |= dict.fromkeys(clips)
        elif path.exists():
            found[path] = None
        else:
            raise PipelineError(f"{path}: no such file or folder; expected a clip or a folder of clips")
    return list(found)


def read_transcripts(path: Path) -> dict[str, str]:
    """name -> transcript of a CSV with the columns of one of FORMS. Raises PipelineError."""
    header, _ = read_lines(path, ())
    for name, text in FORMS:
        if name in header and text in header:
            return {key: row[text] for key, row in read_table(path, (name, text), key=name).items()}
    raise PipelineError(f"{path}: found columns {header}, expected name,transcript")


def transcript_of(clip: Path, known: Mapping[str, str]) -> str:
    """The clip's transcript by its path, its file's name or that without the extension; "" where there is none."""
    return next((known[name] for name in (str(clip), clip.name, clip.stem) if name in known), "").strip()
