"""The store of answers that were paid for: append-only, one JSON line each, under .cache/rankings.

It lies outside DVC's outs, which DVC deletes before a stage runs. A line is one write() under an exclusive lock,
then fsync: a process killed at any moment leaves at most one torn last line, which was not yet reported as done; the
next writer cuts it off. The lock lies on the file itself and dies with its holder.
"""

import fcntl
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stages.engine.errors import PipelineError

FOLDER = Path(".cache/rankings")
BATCH_DISCOUNT = 0.5  # what OpenAI's Batch API bills of the direct price


@dataclass(frozen=True)
class Answer:
    """What came of one transcript. `ranking` is None where no valid answer could be had; `reason` says why.

    Tokens are what the transcript cost in all, invalid answers included. `batch` is the id of the batch that brought
    the answer, for half the price: a batch answers a transcript once, however often it is collected.
    """

    transcript: str
    ranking: list[str] | None
    input_tokens: int = 0
    output_tokens: int = 0
    reason: str = ""
    batch: str = ""


class Cache:
    """Answers of one (provider, model, prompt version, label set), by transcript."""

    def __init__(self, provider: str, model: str, prompt_version: str, labels: Sequence[str], folder: Path = FOLDER):
        self.identity = (provider, model, prompt_version, tuple(labels))
        # The name is for people: the keys inside tell models apart whose names look alike on disk.
        self.path = folder / (re.sub(r"[^\w.-]+", "_", f"{provider}-{model}-{prompt_version}")[:200] + ".jsonl")

    def key(self, transcript: str) -> str:
        """sha256 over everything that an answer depends on."""
        provider, model, prompt_version, labels = self.identity
        content = json.dumps([provider, model, prompt_version, sorted(labels), transcript])
        return hashlib.sha256(content.encode()).hexdigest()

    def load(self, transcripts: Sequence[str]) -> dict[str, Answer]:
        """The stored answers to these transcripts; a ranking beats the failures before it, and carries their tokens.

        A damaged line costs that line only: it is named on stderr and its transcript asked again.
        """
        found: dict[str, Answer] = {}
        for answer in self._read(transcripts):
            earlier = found.get(answer.transcript, Answer(answer.transcript, None))
            found[answer.transcript] = Answer(
                answer.transcript,
                earlier.ranking or answer.ranking,
                earlier.input_tokens + answer.input_tokens,
                earlier.output_tokens + answer.output_tokens,
                answer.reason,
            )
        return found

    def spent(self, transcripts: Sequence[str], price: tuple[float, float]) -> float:
        """USD that these transcripts cost so far; `price` is per million input and output tokens."""
        return sum(
            (answer.input_tokens * price[0] + answer.output_tokens * price[1])
            * (BATCH_DISCOUNT if answer.batch else 1.0)
            / 1e6
            for answer in self._read(transcripts)
        )

    def _read(self, transcripts: Sequence[str]) -> Iterator[Answer]:
        """Every line about these transcripts, but what a batch brought only once."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            lines = file.read().split(b"\n")
        wanted = {self.key(transcript): transcript for transcript in transcripts}
        collected: set[tuple[str, str]] = set()
        for number, line in enumerate(lines[:-1], start=1):  # the last is empty, or torn by a kill
            try:
                entry = json.loads(line)
                if entry["key"] not in wanted:
                    continue
                answer = self._answer(wanted[entry["key"]], entry)
            except (ValueError, KeyError, TypeError):
                print(f"{self.path}: line {number} is damaged; what it answered is asked again", file=sys.stderr)
                continue
            if (answer.batch, answer.transcript) not in collected:
                yield answer
            if answer.batch:
                collected.add((answer.batch, answer.transcript))

    def _answer(self, transcript: str, entry: dict) -> Answer:
        """The answer in a line. Raises ValueError, KeyError or TypeError for one that no writer of ours wrote."""
        ranking = entry["ranking"]
        if ranking is not None and sorted(ranking) != sorted(self.identity[3]):
            raise ValueError
        tokens_in, tokens_out = int(entry["input_tokens"]), int(entry["output_tokens"])
        return Answer(transcript, ranking, tokens_in, tokens_out, str(entry["reason"]), str(entry.get("batch", "")))

    def append(self, answers: Sequence[Answer]) -> None:
        """Store answers: on disk when this returns. Raises PipelineError (disk full), leaving no partial line."""
        provider, model, prompt_version, _ = self.identity
        entries = [
            {
                "key": self.key(answer.transcript),
                "transcript": answer.transcript,
                "ranking": answer.ranking,
                "reason": answer.reason,
                "input_tokens": answer.input_tokens,
                "output_tokens": answer.output_tokens,
                "batch": answer.batch,
                "provider": provider,
                "model": model,
                "prompt_version": prompt_version,
            }
            for answer in answers
        ]
        data = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = _cut_torn_line(file.fileno())
            try:
                if os.write(file.fileno(), data) < len(data):
                    raise OSError("the disk is full")
                os.fsync(file.fileno())
            except OSError as error:
                os.ftruncate(file.fileno(), size)
                raise PipelineError(f"{self.path}: can't store an answer: {error}") from None

    @contextmanager
    def asking(self) -> Iterator[None]:
        """One process asks at a time: a second one waits here, and then finds the answers of the first."""
        lock = self.path.with_suffix(".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{lock}: another process is asking; waiting for it to end", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _cut_torn_line(descriptor: int) -> int:
    """Remove what a killed writer left after the last newline; the file's size then. The caller holds the lock."""
    size = os.fstat(descriptor).st_size
    end, tail = size, b""
    while end and b"\n" not in tail:
        start = max(0, end - 4096)
        tail = os.pread(descriptor, end - start, start)
        end = start
    whole = end + tail.rfind(b"\n") + 1
    if whole < size:
        os.ftruncate(descriptor, whole)
    return whole
