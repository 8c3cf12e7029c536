"""Asking a server of batch_server, in this process or in one that something kills, for the tests of batches."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from batch_server import BatchServer
from chat_server import KEY, LABELS, QUESTION, ranking_of

from stages.rankings import openai_batch
from stages.rankings.cache import Cache
from stages.rankings.chat import Chat, Patience
from stages.rankings.openai_batch import Batches

HASTY = Patience(first_wait=0.0)


class Clock:
    """`time` as openai_batch takes it, but that nobody sleeps."""

    slept = 0.0

    def time(self) -> float:
        return time.time() + self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


openai_batch.time = Clock()  # type: ignore[assignment]
TRANSCRIPTS = [f"这是第{i}句话。" for i in range(7)]
RANKINGS = {transcript: ranking_of(transcript) for transcript in TRANSCRIPTS}


def store(folder: Path) -> Cache:
    return Cache(QUESTION, folder)


def ask(server: BatchServer, folder: Path, transcripts: list[str] = TRANSCRIPTS, **options: Any) -> Batches:
    """Ask for what the cache in `folder` lacks, as the stage does."""
    cache = store(folder)
    defaults: dict[str, Any] = {"price": (2.5, 10.0), "max_cost_usd": 1000.0, "patience": HASTY}
    with cache.asking():
        known = cache.load(transcripts)
        spent = cache.spent(transcripts, (2.5, 10.0))
        chat = Chat("gpt-test", LABELS, "v1", server.url, KEY)
        batches = Batches(chat, cache, spent_usd=spent, **(defaults | options))
        wanted = [t for t in transcripts if t not in known or known[t].ranking is None]
        if wanted or cache.jobs():
            batches.rank(wanted)
    return batches


def rankings(folder: Path, transcripts: list[str] = TRANSCRIPTS) -> dict[str, list[str] | None]:
    return {transcript: answer.ranking for transcript, answer in store(folder).load(transcripts).items()}


def nothing_under_way(folder: Path) -> bool:
    return not store(folder).jobs()


def killed(
    server: BatchServer, folder: Path, prepare: Callable[[], None] = lambda: None, **options: Any
) -> int | None:
    """Ask in a process of its own, which something kills; its exit code."""

    def work() -> None:
        prepare()
        ask(server, folder, **options)

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    server.victim = SimpleQueue()
    process.start()
    server.victim.put(process.pid)
    process.join(60)
    return process.exitcode
