"""Size, digest and duration of every clip file.

Apart from the stage: worker processes can't import functions of a package's __main__.
"""

import hashlib
from pathlib import Path

from tqdm import tqdm

from stages.corpora.layout import Entry
from stages.engine.devices import pick_workers
from stages.engine.errors import PipelineError, Skip, describe
from stages.engine.manifest import Clip
from stages.engine.params import Params
from stages.engine.workers import Workers
from stages.media.clip import probe_duration


def examine(path: str) -> tuple[int, str, float | None]:
    """(bytes, SHA-256, seconds or None where the container can't be read) of one file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        duration = probe_duration(path)
    except Skip:
        duration = None
    return Path(path).stat().st_size, digest, duration


def examine_all(p: Params, entries: list[Entry]) -> list[Clip]:
    """The manifest's rows; files are read in worker processes, because a damaged one can crash its reader."""
    root = Path(p.corpus.path)
    pool = Workers(pick_workers(p.runtime), p.runtime.clip_timeout_seconds)
    clips = []
    results = pool.map(examine, ((str(root / entry.path),) for entry in entries))
    for entry, result in zip(entries, tqdm(results, "corpus", len(entries), unit="clip", mininterval=1), strict=True):
        if isinstance(result, Skip):  # its reader died or hung: the later stages will record why they can't use it
            content = (root / entry.path).read_bytes()
            result = len(content), hashlib.sha256(content).hexdigest(), None
        if isinstance(result, (OSError, MemoryError)):
            raise PipelineError(f"clip {entry.clip_id}: {describe(result)}")
        size, digest, duration = result
        label = entry.label if entry.split == "labelled" else ""
        clips.append(Clip(entry.clip_id, entry.path, entry.split, label, entry.transcript, entry.group,
                          None if duration is None else round(duration, 3), size, digest))
    pool.close()
    return clips
