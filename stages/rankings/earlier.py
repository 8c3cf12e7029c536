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
from stages.engine.params import Params, read_yaml
from stages.rankings.cache import Answer

OUT = "data/rankings.jsonl"
ASKED = ("provider", "model", "revision", "dtype", "prompt_version")  # of `rankings`: what an answer depends on


def earlier_answers(transcripts: Sequence[str], p: Params, needed: bool) -> list[Answer]:
    """The valid answers to these transcripts in the earlier rankings.jsonl, if the same model was asked the same.

    Raises PipelineError where the file is damaged, or where it is `needed` (nothing is known without it, and asking
    costs money) but missing from DVC's cache.
    """
    locked = read_yaml("dvc.lock")["stages"].get("rank_emotions") if Path("dvc.lock").exists() else None
    if not locked or not _asked_the_same(locked, p):
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
    batch = md5 if _params(locked)["rankings"].get("batch") else ""
    try:
        rows = {row["transcript"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
        return [
            Answer(text, rows[text]["ranking"], rows[text]["input_tokens"], rows[text]["output_tokens"], batch=batch)
            for text in transcripts
            if text in rows and rows[text]["ranking"] is not None
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{path}: damaged ({error!r}); remove it, then `dvc pull {OUT}`") from None


def _asked_the_same(locked: dict[str, Any], p: Params) -> bool:
    before, now = _params(locked), p.rankings.model_dump()
    same = all(before["rankings"].get(key) == now[key] for key in ASKED)
    return same and sorted(before["corpus.labels"]) == sorted(p.corpus.labels)


def _params(locked: dict[str, Any]) -> dict[str, Any]:
    return locked["params"]["params.yaml"]
