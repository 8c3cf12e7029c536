"""What each voice of data/rankings.jsonl says of each clip, for those who count votes or compare."""

import json
from pathlib import Path

PATH = Path("data/rankings.jsonl")
FIRST = "ranking"  # the voice that `rankings` itself describes; the others are the keys of rankings.providers


def read_voices(path: Path = PATH) -> dict[str, dict[str, list[str]]]:
    """Voice -> clip id -> its labels, most likely first; clips without a ranking are missing. {} without the file."""
    found: dict[str, dict[str, list[str]]] = {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    for row in rows:
        for voice, cell in {FIRST: row, **row.get("voices", {})}.items():
            clips = found.setdefault(voice, {})
            if cell["ranking"] is not None:
                clips |= dict.fromkeys(row["clip_ids"], cell["ranking"])
    return found
