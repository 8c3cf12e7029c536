"""Stage rank_emotions: the labels by likelihood for every distinct transcript [paper 3.4], in data/rankings.jsonl.

The first voice, `rankings` itself, is the row's own; each of `rankings.providers` has its column in `voices`. Where one
of them is sent the clip (`input: clip`), there is a row per clip in place of one per distinct transcript.

Answers that cost money are kept in .cache/rankings, where DVC deletes nothing, and not asked for twice.
A transcript that got no valid ranking (a refusal, say) stands in the file with `ranking: null` and the reason; more of
them than corpus.max_bad_fraction stop the stage, and so does every transcript that could not be asked at all.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.engine.errors import NO_KNOWN_WORD, PipelineError, run_stage
from stages.engine.files import replacing
from stages.engine.manifest import Source, read_manifest, read_transcripts, source_of
from stages.engine.params import Params, load
from stages.engine.plan import left_out
from stages.rankings.cache import FOLDER, Answer, Cache
from stages.rankings.clips import item_of
from stages.rankings.earlier import earlier_answers
from stages.rankings.providers import question, rank, spent, unanswered, voices
from stages.rankings.voices import FIRST

OUT = Path("data/rankings.jsonl")
REASONS_SHOWN = 3
AGAIN = "`python -m stages.rankings.cache retry && dvc repro -f -s rank_emotions` asks"


@dataclass(frozen=True)
class Row:
    """One line of data/rankings.jsonl, before it is answered. `item` names the clip to those who are sent it."""

    transcript: str
    clip_ids: list[str]
    item: str = ""
    path: Source = ""

    def asks(self, p: Params) -> str:
        """What the voice is asked; "" for nothing."""
        return self.item if p.rankings.input == "clip" else self.transcript


def read_work(asked: Iterable[Params]) -> list[Row]:
    """A row for each distinct transcript, in order of first appearance; or for each clip, where one is sent."""
    transcripts = {clip_id: text if text.strip() else "" for clip_id, text in read_transcripts().items()}
    sent = [p for p in asked if p.rankings.input == "clip"]
    if sent:
        folder = Path(sent[0].corpus.path)
        clips = [(clip, transcripts.get(clip.clip_id, "")) for clip in read_manifest()]
        return [Row(text, [c.clip_id], item_of(c.digest, text), source_of(c, folder)) for c, text in clips]
    clip_ids: dict[str, list[str]] = {}
    for clip_id, text in transcripts.items():
        if text:
            clip_ids.setdefault(text, []).append(clip_id)
    return [Row(text, ids) for text, ids in clip_ids.items()]


def ask(rows: list[Row], p: Params) -> dict[str, dict[str, Answer]]:
    """Each voice's answers. They share rankings.max_cost_usd: what one has spent, the next has less."""
    asked = voices(p)
    items = {name: list(dict.fromkeys(filter(None, (row.asks(v) for row in rows)))) for name, v in asked.items()}
    paths = {row.item: row.path for row in rows if row.item}
    answers = {}
    for name, voice in asked.items():
        elsewhere = sum(spent(items[other], asked[other]) for other in asked if other != name)
        answers[name] = rank(items[name], voice, paths, elsewhere)
        check_failures(answers[name], voice, "" if name == FIRST else f"rankings.providers.{name}: ")
    return answers


def check_failures(answers: Mapping[str, Answer], p: Params, voice: str = "") -> None:
    """Report what got no valid ranking. Raises PipelineError if it is more than corpus.max_bad_fraction of those in a
    language that the provider knows, or if none is in one."""
    unknown = [answer for answer in answers.values() if answer.reason == NO_KNOWN_WORD]
    if unknown:
        shown = ", ".join(repr(answer.transcript) for answer in unknown[:REASONS_SHOWN])
        text = f"{voice}the Chinese lexicon knows no word of {len(unknown)} of {len(answers)} transcripts ({shown})"
        if len(unknown) == len(answers):
            raise PipelineError(f"{text}; for another language set rankings.provider to openai or transformers, or "
                                f"let the row of extractors read transcripts.csv")
        print(f"warning: rank_emotions: {text}: they count as without a ranking", file=sys.stderr)
    answers = {item: answer for item, answer in answers.items() if answer.reason != NO_KNOWN_WORD}
    failed = [answer for answer in answers.values() if answer.ranking is None]
    if not failed:
        return
    shown = "; ".join(f"{answer.transcript!r}: {answer.reason}" for answer in failed[:REASONS_SHOWN])
    text = f"{voice}{len(failed)} of {len(answers)} transcripts got no valid ranking ({shown})"
    if len(failed) > p.corpus.max_bad_fraction * len(answers):
        raise PipelineError(
            f"{text}, more than corpus.max_bad_fraction = {p.corpus.max_bad_fraction} allows; "
            f"the others are kept in {FOLDER}: {AGAIN} for these only"
        )
    print(f"rank_emotions: {text}; {AGAIN} for these again")


def leave_out(rows: list[Row], asked: Mapping[str, Params], reason: str) -> None:
    """Write a file that ranks nothing. What was paid for elsewhere and is in DVC's cache alone is kept before: dvc.lock
    will name it no longer."""
    for voice in asked.values():
        items = list(dict.fromkeys(filter(None, (row.asks(voice) for row in rows))))
        if voice.rankings.provider != "lexicon" and items:
            cache = Cache(question(voice))
            with cache.asking():
                cache.append(earlier_answers(unanswered(items, cache.load(items)), cache.question, needed=False))
    with replacing(OUT) as file:
        file.write(json.dumps({"transcript": "", "clip_ids": [], "ranking": None, "reason": reason}) + "\n")
    print(f"rank_emotions: {OUT} stays empty: {reason}")


def cell(row: Row, answers: Mapping[str, Answer], p: Params, asked: str) -> dict[str, Any]:
    """A voice's answer to a row; `asked` is the digest of its question, which a clone compares with its own."""
    item = row.asks(p)
    answer = answers[item] if item else Answer("", None, reason="no words")
    found: dict[str, Any] = {
        "ranking": answer.ranking,
        "question": asked,
        "provider": p.rankings.provider,
        "model": p.rankings.model,
        "prompt_version": p.rankings.prompt_version,
        "input_tokens": answer.input_tokens,
        "output_tokens": answer.output_tokens,
    }
    if item != row.transcript:
        found["item"] = item
    if answer.ranking is None:
        found["reason"] = answer.reason
    return found


def main() -> None:
    p = load()
    asked = voices(p)
    rows = read_work(asked.values())
    if reason := left_out("rankings.jsonl"):
        leave_out(rows, asked, reason)
        return
    if not any(row.asks(voice) for row in rows for voice in asked.values()):
        raise PipelineError("data/transcripts.csv: no clip has a transcript, but fusion.modalities names rows that "
                            "read rankings; expected transcripts in the corpus, transcribe.checkpoint, or others")
    answers = ask(rows, p)
    digests = {name: question(voice).digest for name, voice in asked.items()}
    with replacing(OUT) as file:
        for row in rows:
            cells = {name: cell(row, answers[name], voice, digests[name]) for name, voice in asked.items()}
            line = {"transcript": row.transcript, "clip_ids": row.clip_ids} | cells.pop(FIRST)
            if cells:
                line["voices"] = cells
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    told = ", ".join(f"{voice.rankings.provider} {voice.rankings.model}" for voice in asked.values())
    what = "clips" if any(row.item for row in rows) else "distinct transcripts"
    print(f"rank_emotions: {len(rows)} {what} ranked by {told}")


if __name__ == "__main__":
    run_stage(main)
