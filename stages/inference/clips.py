"""What predict is asked for: clips, by name or by folder, and the transcripts that the user has of them."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from stages.corpora.folders import EXPECTED, NOTHING, escaped, say_left_out, scan, what_is
from stages.corpora.tables import read_lines, read_table
from stages.engine.errors import PipelineError
from stages.engine.files import file_digest
from stages.engine.manifest import Segment, Source, segment_digest

# Columns of a transcript table: predict's own output, data/transcripts.csv, any other, and the MER corpora's
FORMS = (("clip", "transcript"), ("clip_id", "transcript"), ("name", "transcript"), ("name", "chinese"))


def name_of(clip: Source) -> str:
    """How a clip is called in messages, and told from others: its path, and of a segment its seconds."""
    if isinstance(clip, Segment):
        return f"{clip.path} {clip.start:.3f}-{'' if clip.end is None else format(clip.end, '.3f')} s"
    return str(clip)


@cache
def _file_digest(path: str) -> str:
    return file_digest(path)


def digest_of(clip: Source) -> str:
    """What tells the clip's content from others', as data/manifest.csv has it."""
    if isinstance(clip, Segment):
        return segment_digest(_file_digest(clip.path), clip.start, clip.end)
    return file_digest(clip)


def find_clips(arguments: Sequence[str]) -> list[Path]:
    """The files named, whatever their extension, and the sound and video files in and below the folders named; each
    once. What a folder holds besides is said on stderr.

    Raises PipelineError for a path that is no file or folder and for a folder without sound and video files.
    """
    found: dict[Path, None] = {}
    for path in map(Path, arguments):
        kind = what_is(path)
        if kind == "folder":
            content = scan(path, deep=True)
            say_left_out(path, len(content.clips), content.left_out)
            if not content.clips:
                raise PipelineError(f"{escaped(path)}: a folder without video files; expected {EXPECTED}")
            found |= dict.fromkeys(content.clips)
        elif not kind:
            found[path] = None
        elif kind == NOTHING:
            raise PipelineError(f"{escaped(path)}: no such file or folder; expected a clip or a folder of clips")
        else:
            raise PipelineError(f"{escaped(path)}: a {kind}; expected a clip or a folder of clips")
    return list(found)


def read_transcripts(path: Path) -> dict[str, str]:
    """name -> transcript of a CSV with the columns of one of FORMS. Raises PipelineError."""
    if kind := what_is(path):
        raise PipelineError(f"{path}: can't be read as a CSV of transcripts (a {kind})")
    header, _ = read_lines(path, ())
    for name, text in FORMS:
        if name in header and text in header:
            return {key: row[text] for key, row in read_table(path, (name, text), key=name).items()}
    raise PipelineError(f"{path}: found columns {header}, expected name,transcript")


def transcript_of(clip: Path, known: Mapping[str, str]) -> str:
    """The clip's transcript by its path, its file's name or that without the extension; "" where there is none."""
    return next((known[name] for name in (str(clip), clip.name, clip.stem) if name in known), "").strip()
