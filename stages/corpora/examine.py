"""Size, digest and duration of every clip file.

Apart from the stage: worker processes can't import functions of a package's __main__.
"""

import sys
from pathlib import Path

from tqdm import tqdm

from stages.corpora.layout import Entry, shown
from stages.engine.devices import pick_workers
from stages.engine.errors import PipelineError, Skip, describe, is_machines
from stages.engine.files import file_digest
from stages.engine.manifest import Clip, segment_digest
from stages.engine.params import Params
from stages.engine.workers import Workers
from stages.media.clip import probe_duration

SLACK = 0.5  # seconds: headers round, and sound may end before its picture


def examine(path: str) -> tuple[int, str, float | None]:
    """(bytes, SHA-256, seconds or None where the container can't be read) of one file."""
    digest = file_digest(path)
    try:
        duration = probe_duration(path)
    except Skip:
        duration = None
    return Path(path).stat().st_size, digest, duration


def examine_all(p: Params, entries: list[Entry]) -> list[Clip]:
    """The manifest's rows; files are read in worker processes, because a damaged one can crash its reader."""
    root = Path(p.corpus.path)
    paths = list(dict.fromkeys(entry.path for entry in entries if entry.path))  # several may be segments of one file
    pool = Workers(pick_workers(p.runtime), p.runtime.clip_timeout_seconds)
    results = pool.map(examine, ((str(root / path),) for path in paths))
    files: dict[str, tuple[int, str, float | None]] = {"": (0, "", None)}  # of clips of words alone
    for path, result in zip(paths, tqdm(results, "corpus", len(paths), unit="clip", mininterval=1), strict=True):
        if isinstance(result, Skip):  # its reader crashed or timed out: the later stages record why they can't use it
            result = (root / path).stat().st_size, file_digest(root / path), None
        if is_machines(result):
            raise PipelineError(f"{root / path}: {describe(result)}")
        files[path] = result
    pool.close()
    late = [entry.clip_id for entry in entries if _ends_late(entry, files[entry.path][2])]
    if late:
        print(f"warning: {root}: {len(late)} segments reach beyond the end of their files: {shown(late)}",
              file=sys.stderr)
    return [_clip(entry, *files[entry.path]) for entry in entries]


def _ends_late(entry: Entry, seconds: float | None) -> bool:
    return seconds is not None and max(entry.start or 0, entry.end or 0) > seconds + SLACK


def _clip(entry: Entry, size: int, digest: str, duration: float | None) -> Clip:
    if entry.start is not None or entry.end is not None:
        digest = segment_digest(digest, entry.start, entry.end)
        ends = [seconds for seconds in (entry.end, duration) if seconds is not None]
        duration = max(0.0, min(ends) - (entry.start or 0)) if ends else None
    label = entry.label if entry.split == "labelled" else ""
    return Clip(entry.clip_id, entry.path, entry.split, label, entry.transcript, entry.group,
                None if duration is None else round(duration, 3), size, digest, entry.start, entry.end)
