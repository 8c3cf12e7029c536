"""Asking a server of batch_server, in this process or in one that something kills, for the tests of batches."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batch_server import BatchServer
from chat_server import KEY, LABELS, ranking_of

from stages.rankings.cache import Cache, Question
from stages.rankings.chat import Chat, Patience
from stages.rankings.openai_batch import Batches

HASTY = Patience(first_wait=0.005, longest_wait=0.02, timeout=20, first_poll=0.01, longest_poll=0.02, settle=0.2)
TRANSCRIPTS = [f"这是第{i}句话。" for i in range(7)]
RANKINGS = {transcript: ranking_of(transcript) for transcript in TRANSCRIPTS}


QUESTION = Question("openai", "gpt-test", "v1", tuple(LABELS))


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

    process = multiprocessing.get_context("fork").Process(target=work)
    server.victim = None
    process.start()
    server.victim = process.pid
    process.join(60)
    return process.exitcode
