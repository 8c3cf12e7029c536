"""Answers that were paid for elsewhere: those of data/rankings.jsonl as dvc.lock describes it, from DVC's cache.

.cache/rankings stays on its machine, but data/rankings.jsonl travels with `dvc push` and `dvc pull`. DVC deletes it
before the stage runs; its content is still in DVC's cache, under the checksum in dvc.lock. So on a clone, a corpus that
grew asks for its new transcripts only.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stages.engine.dvc_cache import cache_folder, cached
from stages.engine.errors import PipelineError
from stages.engine.yaml_file import read_yaml
from stages.rankings.cache import VENDOR, Answer, Question

OUT = "data/rankings.jsonl"


def earlier_answers(items: Sequence[str], question: Question, needed: bool) -> list[Answer]:
    """The valid answers to these items in the earlier rankings.jsonl, in whichever voice's column asked this question.

    Rows from before they named their question count where all that dvc.lock and they do name agrees.
    Raises PipelineError where the file is damaged, or where it is `needed` (nothing is known without it, and asking
    costs money) but missing from DVC's cache.
    """
    locked = read_yaml("dvc.lock")["stages"].get("rank_emotions") if Path("dvc.lock").exists() else None
    if not locked:
        return []
    params = locked["params"]["params.yaml"]
    first = params["rankings"]
    asked = [first, *(first | changes for changes in (first.get("providers") or {}).values())]
    same = [before for before in asked if _asked_the_same(before, params["corpus.labels"], question)]
    if not same:
        return []
    md5 = next(out["md5"] for out in locked["outs"] if out["path"] == OUT)
    path = cached(cache_folder(), md5)
    if not path.exists():
        if needed:
            raise PipelineError(
                f"{OUT}: {len(items)} transcripts are not ranked on this machine, but dvc.lock knows rankings "
                f"that were paid for: `dvc pull {OUT}` brings them. If they are lost, remove rank_emotions from "
                f"dvc.lock to ask again"
            )
        return []
    # the mark halves the price, as the batch did, where the sum that was spent is counted; older locks lack the param
    batch = md5 if same[0].get("batch") else ""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        cells = {item: cell for row in rows for item, cell in _cells(row, question.digest)}
        return [
            Answer(item, cell["ranking"], cell["input_tokens"], cell["output_tokens"], batch=batch)
            for item in items
            if (cell := cells.get(item)) is not None and cell["ranking"] is not None
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PipelineError(f"{path}: damaged ({error!r}); remove it, then `dvc pull {OUT}`") from None


def _cells(row: dict[str, Any], digest: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row's answers to this question, by item."""
    for cell in (row, *row.get("voices", {}).values()):
        if cell.get("question", digest) == digest:
            yield cell.get("item", row["transcript"]), cell


def _asked_the_same(before: dict[str, Any], labels: Sequence[str], question: Question) -> bool:
    """Whether these params of dvc.lock, as far as it knows them, ask this question; of a local model no digest."""
    server = (before.get("base_url") or VENDOR) if before["provider"] == "openai" else ""
    asked = (before["provider"], before["prompt_version"], server, tuple(labels), before.get("input") == "clip")
    now = (question.provider, question.prompt_version, question.base_url, question.labels, bool(question.clip))
    return asked == now and question.model.split("@")[0] == before["model"]
