"""The batches under way, on disk beside the cache: what a killed process needs to collect what it paid for.

A job is two files named by a random key of ours: <key>.jsonl, the requests as they are uploaded, and then <key>.json,
which makes it a job and is replaced whole at every step. The same key travels in the batch's metadata, so that a batch
whose id never reached us is found in the server's list.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stages.engine.errors import PipelineError
from stages.engine.files import replacing
from stages.rankings.cache import Cache


@dataclass
class Job:
    """One batch, from before its upload until its answers are in the cache."""

    base_url: str
    transcripts: list[str]
    worst_usd: float  # what it can cost at most
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: float = field(default_factory=time.time)  # seconds since the epoch
    file_id: str | None = None
    creating: float | None = None  # since when a batch may exist at the server whose id we do not know
    batch_id: str | None = None


class Journal:
    """The jobs of one cache: of one model, prompt version and label set."""

    def __init__(self, cache: Cache):
        identity = hashlib.sha256(cache.key("").encode()).hexdigest()[:8]  # names can look alike, as the cache's
        self.folder = cache.path.with_name(f"{cache.path.stem}-{identity}.batches")

    def requests(self, job: Job) -> Path:
        return self.folder / f"{job.key}.jsonl"

    def state(self, job: Job) -> Path:
        return self.folder / f"{job.key}.json"

    def jobs(self) -> list[Job]:
        """The jobs under way, the oldest first. Raises PipelineError for a file that is damaged."""
        found = []
        for path in self.folder.glob("*.json"):
            try:
                found.append(Job(**json.loads(path.read_bytes())))
            except FileNotFoundError:
                continue  # the process that holds the lock on asking has just ended this job
            except (ValueError, TypeError):
                raise PipelineError(
                    f"{path}: damaged; the server lists its batch with the metadata mer_job = {path.stem}; "
                    "delete the file to give up that batch's answers"
                ) from None
        return sorted(found, key=lambda job: (job.created, job.key))

    def add(self, job: Job, lines: Iterable[str]) -> None:
        """Begin a job: from here on a kill does not lose it."""
        self._write(self.requests(job), lines)
        self.save(job)

    def save(self, job: Job) -> None:
        """Replace a job's state. Raises PipelineError (disk full): what stood there before stands."""
        self._write(self.state(job), [json.dumps(asdict(job), ensure_ascii=False)])

    def _write(self, path: Path, lines: Iterable[str]) -> None:
        try:
            with replacing(path) as file:
                file.writelines(lines)
        except OSError as error:
            raise PipelineError(f"{path}: can't note a batch: {error}") from None

    def drop(self, job: Job) -> None:
        """End a job: its answers are stored, or there are none."""
        self.requests(job).unlink(missing_ok=True)
        self.state(job).unlink(missing_ok=True)  # last: until then the job is found, collected again and ended again

    def sweep(self, jobs: Sequence[Job]) -> None:
        """Remove what kills left: files of no job, and half-written ones. The caller holds the lock on asking."""
        kept = {path for job in jobs for path in (self.state(job), self.requests(job))}
        for path in self.folder.glob("*"):
            if path not in kept:
                path.unlink()
