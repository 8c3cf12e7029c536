"""The answers that were paid for and the batches under way, in one SQLite database, .cache/rankings/answers.sqlite.

It lies outside DVC's outs, which DVC deletes before a stage runs. SQLite commits are atomic and on disk when they
return, so a process killed at any moment loses nothing. The journal is the rollback one: write-ahead logging does not
work on network file systems (sqlite.org/wal.html). Whoever asks holds an advisory lock on a file beside the database
for hours, which no lock of SQLite's can be without keeping readers out; it ends with its holder.
"""

import fcntl
import hashlib
import json
import sqlite3
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from stages.engine.errors import PipelineError
from stages.rankings import prompt

MOST_REPLIES = 3  # to one transcript that are no ranking, in all runs together
REQUEST_SECONDS = 120.0  # that a reply is waited for
FOLDER = Path(".cache/rankings")
VENDOR = "https://api.openai.com/v1"  # what base_url: null means
BATCH_DISCOUNT = 0.5  # what OpenAI's Batch API bills of the direct price
LOCK_SECONDS = 60.0  # how long a commit waits for another process's
SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS questions (question TEXT PRIMARY KEY, identity TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS replies (
    id INTEGER PRIMARY KEY, question TEXT NOT NULL, transcript TEXT NOT NULL,
    ranking TEXT NOT NULL, reason TEXT NOT NULL, -- JSON: the labels or null
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, -- as told or estimated
    most_input INTEGER NOT NULL, most_output INTEGER NOT NULL, -- what can have been billed at most
    batch TEXT NOT NULL, state TEXT NOT NULL -- sent: no reply is known; kept; retry: asked again all the same
);
CREATE INDEX IF NOT EXISTS by_question ON replies (question);
CREATE UNIQUE INDEX IF NOT EXISTS once_per_batch ON replies (question, transcript, batch) WHERE batch <> '';
CREATE TABLE IF NOT EXISTS jobs (key TEXT PRIMARY KEY, question TEXT NOT NULL, state TEXT NOT NULL);
COMMIT;
"""


@dataclass(frozen=True)
class Question:
    """All that an answer depends on besides the transcript. `model` names revision, digest and dtype of a local one."""

    provider: str
    model: str
    prompt_version: str
    labels: tuple[str, ...]  # in the order in which the prompt shows them
    base_url: str = ""
    reasoning_effort: str = ""
    clip: str = ""  # how clips are sent with the words; "" where they are not

    def identity(self) -> str:
        """JSON of it, with the instructions as the model reads them: they hold the glossary."""
        source = "clip" if self.clip else "transcript"
        (instructions, _) = prompt.messages("", self.labels, self.prompt_version, source)
        return json.dumps(asdict(self) | {"instructions": instructions["content"]}, ensure_ascii=False)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.identity().encode()).hexdigest()[:16]

    def custom_id(self, transcript: str) -> str:
        """How a batch names the transcript."""
        content = [self.provider, self.model, self.prompt_version, sorted(self.labels), transcript]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    """What came of one transcript. `ranking` is None where no valid answer could be had; `reason` says why.

    Tokens are what the transcript cost in all, invalid answers included, and `replies` how many there were. `batch` is
    the id of the batch that brought the answer, for half the price: a batch answers a transcript once, however often it
    is collected.
    """

    transcript: str
    ranking: list[str] | None
    input_tokens: int = 0
    output_tokens: int = 0
    reason: str = ""
    batch: str = ""
    replies: int = field(default=1, compare=False)


@dataclass
class Job:
    """One batch, from before its upload until its answers are stored.

    `key` travels in the batch's metadata, so that a batch whose id never reached us is found in the server's list.
    """

    transcripts: list[str]
    fields: dict[str, Any]  # of every request, besides model and messages
    worst_usd: float  # what it can cost at most
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: float = field(default_factory=time.time)  # seconds since the epoch
    file_id: str | None = None
    creating: float | None = None  # since when a batch may exist at the server whose id we do not know
    batch_id: str | None = None


class Cache:
    """Answers to one question by transcript, and its batches under way.

    Every method raises PipelineError where the database can't be read or written, and then nothing has changed.
    """

    def __init__(self, question: Question, folder: Path = FOLDER):
        self.question, self.digest = question, question.digest
        self.path = folder / "answers.sqlite"

    @contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """A connection whose changes are on disk, all or none of them, when the block ends."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=LOCK_SECONDS, isolation_level=None)
            with closing(connection) as db, db:
                db.execute("PRAGMA journal_mode = TRUNCATE")
                db.execute("PRAGMA synchronous = FULL")
                if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'jobs'").fetchone():
                    db.executescript(SCHEMA)
                db.execute(begin)
                yield db
        except sqlite3.Error as error:
            raise PipelineError(
                f"{self.path}: can't be used: {error}; make room, check its permissions, or, where it is damaged, "
                f"restore a copy or move it away"
            ) from None

    def _query(self, sql: str) -> list[tuple[Any, ...]]:
        with self._transaction("BEGIN") as db:
            return db.execute(sql, (self.digest,)).fetchall()

    # ------------------------------------------------------------ answers

    def load(self, transcripts: Sequence[str]) -> dict[str, Answer]:
        """The stored answers to these transcripts; a ranking beats the failures before it, and carries their tokens."""
        wanted = set(transcripts)
        found: dict[str, Answer] = {}
        columns = "transcript, ranking, reason, input_tokens, output_tokens, state"
        for transcript, ranking, reason, used_in, used_out, state in self._query(
            f"SELECT {columns} FROM replies WHERE question = ? AND state <> 'sent' ORDER BY id"
        ):
            if transcript in wanted:
                earlier = found.get(transcript, Answer(transcript, None, replies=0))
                found[transcript] = Answer(
                    transcript,
                    earlier.ranking or json.loads(ranking),
                    earlier.input_tokens + used_in,
                    earlier.output_tokens + used_out,
                    reason,
                    replies=earlier.replies + (state == "kept"),
                )
        return found

    def spent(self, transcripts: Sequence[str], price: tuple[float, float]) -> float:
        """USD that these transcripts cost so far, at most: a request whose reply was lost counts with its worst case.

        `price` is per million input and output tokens.
        """
        wanted = set(transcripts)
        return sum(
            (tokens_in * price[0] + tokens_out * price[1]) * (BATCH_DISCOUNT if batch else 1.0) / 1e6
            for transcript, tokens_in, tokens_out, batch in self._query(
                "SELECT transcript, most_input, most_output, batch FROM replies WHERE question = ?"
            )
            if transcript in wanted
        )

    def begin(self, transcript: str, most: tuple[int, int]) -> int:
        """Note a request before it is sent, with the most tokens that it can take; the number to end it with."""
        with self._transaction() as db:
            return self._insert(db, [Answer(transcript, None)], [most], "sent")

    def end(self, number: int, answer: Answer | None, most: tuple[int, int] = (0, 0)) -> None:
        """Store the reply to a request, or that it costs nothing (None). Without this its worst case stays counted."""
        with self._transaction() as db:
            db.execute("DELETE FROM replies WHERE id = ?", (number,))
            if answer is not None:
                self._insert(db, [answer], [most])

    def append(self, answers: Sequence[Answer]) -> None:
        """Store answers: on disk when this returns."""
        with self._transaction() as db:
            self._insert(db, answers)

    def _insert(
        self,
        db: sqlite3.Connection,
        answers: Sequence[Answer],
        most: Sequence[tuple[int, int]] | None = None,
        state: str = "kept",
    ) -> int:
        """The number of the last one; `most` where it is not the answers' own tokens."""
        most = most or [(answer.input_tokens, answer.output_tokens) for answer in answers]
        db.execute("INSERT OR IGNORE INTO questions VALUES (?, ?)", (self.digest, self.question.identity()))
        cursor = db.cursor()
        for a, (most_in, most_out) in zip(answers, most, strict=True):
            cursor.execute(
                "INSERT OR IGNORE INTO replies (question, transcript, ranking, reason, input_tokens, output_tokens, "
                "most_input, most_output, batch, state) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (self.digest, a.transcript, json.dumps(a.ranking), a.reason, a.input_tokens, a.output_tokens,
                 most_in, most_out, a.batch, state),
            )  # fmt: skip
        return cursor.lastrowid or 0

    @contextmanager
    def asking(self) -> Iterator[IO[str]]:
        """One process asks at a time: a second one waits here, and then finds the answers of the first.

        The lock is the open file's: whoever inherits that holds it too.
        """
        lock = self.path.with_name(f"{self.digest}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(
                    f"{lock}: another process is asking; waiting for it to end (after a kill, for the replies that are "
                    f"under way: {REQUEST_SECONDS:.0f} s at most)",
                    file=sys.stderr,
                    flush=True,
                )
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    # ------------------------------------------------------------ batches under way

    def jobs(self) -> list[Job]:
        """The batches under way, the oldest first."""
        found = [Job(**json.loads(state)) for (state,) in self._query("SELECT state FROM jobs WHERE question = ?")]
        return sorted(found, key=lambda job: (job.created, job.key))

    def save(self, job: Job) -> None:
        """Store how far a batch is: from the first call on a kill does not lose it."""
        with self._transaction() as db:
            self._save(db, self.digest, job)

    def _save(self, db: sqlite3.Connection, question: str, job: Job) -> None:
        state = json.dumps(asdict(job), ensure_ascii=False)
        db.execute("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?)", (job.key, question, state))

    def close(self, job: Job, answers: Sequence[Answer], most: Sequence[tuple[int, int]]) -> None:
        """Store what a batch brought and end it, in one."""
        with self._transaction() as db:
            self._insert(db, answers, most)
            db.execute("DELETE FROM jobs WHERE key = ?", (job.key,))


GIVE_UP = "DELETE FROM jobs WHERE key = ?"
RETRY = "UPDATE replies SET state = 'retry' WHERE state = 'kept' AND ranking = 'null'"


def giving_up(job: Job) -> str:
    """The command that ends a batch without its answers."""
    return f"python -m stages.rankings.cache give-up {job.key}"


if __name__ == "__main__":
    command, *arguments = sys.argv[1:] or ["retry or give-up KEY"]
    if command not in ("retry", "give-up"):
        sys.exit(f"python -m stages.rankings.cache: found {command}, expected retry or give-up KEY")
    with closing(sqlite3.connect(FOLDER / "answers.sqlite")) as database, database:
        print(database.execute(RETRY if command == "retry" else GIVE_UP, arguments).rowcount, "entries changed")
