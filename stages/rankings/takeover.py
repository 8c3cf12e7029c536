"""Answers and batches of the JSON-lines cache that came before the database: taken over once, the files stay.

Its keys knew neither base_url nor the labels' order nor the glossary: its answers become answers to the present
question where provider, model, prompt version and label set agree.
"""

import hashlib
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from stages.engine.errors import PipelineError
from stages.rankings.cache import Answer, Cache, Job, Question


def take_over(cache: Cache) -> None:
    """Store what the old cache knows for this question, once. Raises PipelineError for a damaged batch."""
    question = cache.question
    name = f"{question.provider}-{question.model}-{question.prompt_version}"
    path = cache.path.with_name(re.sub(r"[^\w.-]+", "_", name)[:200] + ".jsonl")
    mark = hashlib.sha256(question.custom_id("").encode()).hexdigest()[:8]  # of the folder of batches
    batches = path.with_name(f"{path.stem}-{mark}.batches")
    if not path.exists() and not batches.exists():
        return
    answers, damaged = _answers(path, question) if path.exists() else ([], 0)
    jobs = [_job(file, question) for file in sorted(batches.glob("*.json"))]
    if cache.take_over(f"{path.name} {mark}", answers, jobs):
        print(
            f"rank_emotions: {path}: {len(answers)} answers and {len(jobs)} batches under way taken over into "
            f"{cache.path.name} for the present rankings.base_url and corpus.labels; {damaged} lines were damaged"
        )


def _answers(path: Path, question: Question) -> tuple[list[Answer], int]:
    """The answers of this provider, model, prompt version and label set, and the number of damaged lines.

    What follows the last newline was torn by a kill and never reported as done.
    """
    found, damaged = [], 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
            if row["key"] != question.custom_id(row["transcript"]):
                continue
            if row["ranking"] is not None and sorted(row["ranking"]) != sorted(question.labels):
                raise ValueError
            tokens = int(row["input_tokens"]), int(row["output_tokens"])
            found.append(
                Answer(row["transcript"], row["ranking"], *tokens, str(row["reason"]), str(row.get("batch", "")))
            )
        except (ValueError, KeyError, TypeError):
            damaged += 1
    return found, damaged


def _job(path: Path, question: Question) -> tuple[Question, Job]:
    """A batch under way, of the server that it was sent to."""
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
        with open(path.with_suffix(".jsonl"), encoding="utf-8") as lines:
            body = json.loads(next(lines))["body"]
        request = {name: value for name, value in body.items() if name not in ("model", "messages")}
        known = {field.name for field in fields(Job)}
        job = Job(**{name: value for name, value in state.items() if name in known}, fields=request)
        return replace(question, base_url=state["base_url"]), job
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        raise PipelineError(
            f"{path}: damaged; the server lists its batch with the metadata mer_job = {path.stem}; "
            f"delete the file to give up that batch's answers"
        ) from None
