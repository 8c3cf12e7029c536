"""Answers that were paid for elsewhere: those of data/rankings.jsonl as dvc.lock describes it, from DVC's cache.

.cache/rankings stays on its machine, but data/rankings.jsonl travels with `dvc push` and `dvc pull`. DVC deletes it
before the stage runs; its content is still in DVC's cache, under the checksum in dvc.lock. So on a clone, a corpus that
grew asks for its new transcripts only.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.engine.dvc_cache import cache_folder, cached
from stages.engine.errors import PipelineError
from stages.engine.params import read_yaml
from stages.rankings.cache import VENDOR, Answer, Question

OUT = "data/rankings.jsonl"


def earlier_answers(transcripts: Sequence[str], question: Question, needed: bool) -> list[Answer]:
    """The valid answers to these transcripts in the earlier rankings.jsonl, where its rows answer the same question.

    Rows from before they named their question count where all that dvc.lock and they do name agrees.
    Raises PipelineError where the file is damaged, or where it is `needed` (nothing is known without it, and asking
    costs money) but missing from DVC's cache.
    """
    locked = read_yaml("dvc.lock")["stages"].get("rank_emotions") if Path("dvc.lock").exists() else None
    if not locked or not _asked_the_same(locked["params"]["params.yaml"], question):
        return []
    md5 = next(out["md5"] for out in locked["outs"] if out["path"] == OUT)
    path = cached(cache_folder(), md5)
    if not path.exists():
        if needed:
            raise PipelineError(
                f"{OUT}: {len(transcripts)} transcripts are not ranked on this machine, but dvc.lock knows rankings "
                f"that were paid for: `dvc pull {OUT}` brings them. If they are lost, remove rank_emotions from "
                f"dvc.lock to ask again"
            )
        return []
    # the mark halves the price, as the batch did, where the sum that was spent is counted; older locks lack the param
    batch = md5 if locked["params"]["params.yaml"]["rankings"].get("batch") else ""
    try:
        rows = {row["transcript"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
        return [
            Answer(text, rows[text]["ranking"], rows[text]["input_tokens"], rows[text]["output_tokens"], batch=batch)
            for text in transcripts
            if text in rows
            and rows[text]["ranking"] is not None
            and rows[text].get("question", question.digest) == question.digest
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{path}: damaged ({error!r}); remove it, then `dvc pull {OUT}`") from None


def _asked_the_same(params: dict[str, Any], question: Question) -> bool:
    """Whether dvc.lock's params, as far as it knows them, ask this question; of a local model it knows no digest."""
    before = params["rankings"]
    server = (before.get("base_url") or VENDOR) if before["provider"] == "openai" else ""
    asked = (before["provider"], before["prompt_version"], server, tuple(params["corpus.labels"]))
    now = (question.provider, question.prompt_version, question.base_url, question.labels)
    return asked == now and question.model.split("@")[0] == before["model"]
