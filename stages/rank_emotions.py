"""Stage rank_emotions: the labels by likelihood for every distinct transcript [paper 3.4], in data/rankings.jsonl.

Answers that cost something are kept for ever in .cache/rankings and never asked for twice, whatever DVC deletes.
A transcript that got no valid ranking (a refusal, say) stands in the file with `ranking: null` and the reason; more of
them than corpus.max_bad_fraction stop the stage, and so does every transcript that could not be asked at all.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.engine.errors import PipelineError, run_stage
from stages.engine.files import replacing
from stages.engine.manifest import read_transcripts
from stages.engine.params import Params, load
from stages.engine.plan import left_out
from stages.rankings.cache import FOLDER, Answer, Cache
from stages.rankings.earlier import earlier_answers
from stages.rankings.providers import model_identity, rank, unanswered

OUT = Path("data/rankings.jsonl")
REASONS_SHOWN = 3


def check_failures(answers: Mapping[str, Answer], p: Params) -> None:
    """Report what got no valid ranking. Raises PipelineError if it is more than corpus.max_bad_fraction."""
    failed = [answer for answer in answers.values() if answer.ranking is None]
    if not failed:
        return
    shown = "; ".join(f"{answer.transcript!r}: {answer.reason}" for answer in failed[:REASONS_SHOWN])
    text = f"{len(failed)} of {len(answers)} transcripts got no valid ranking ({shown})"
    if len(failed) > p.corpus.max_bad_fraction * len(answers):
        raise PipelineError(
            f"{text}, more than corpus.max_bad_fraction = {p.corpus.max_bad_fraction} allows; "
            f"the others are kept in {FOLDER}: run again to ask for these only"
        )
    print(f"rank_emotions: {text}; `dvc repro -f -s rank_emotions` asks for these again")


def known_answers(transcripts: Sequence[str], p: Params) -> dict[str, Answer]:
    """What was paid for before, here or as dvc.lock has it: DVC deletes the file that it may be known from alone."""
    if p.rankings.provider == "lexicon" or not transcripts:
        return {}
    cache = Cache(p.rankings.provider, model_identity(p.rankings), p.rankings.prompt_version, p.corpus.labels)
    with cache.asking():
        cache.append(earlier_answers(unanswered(transcripts, cache.load(transcripts)), p, needed=False))
        return {text: answer for text, answer in cache.load(transcripts).items() if answer.ranking is not None}


def write_rankings(clips: Mapping[str, Sequence[str]], answers: Mapping[str, Answer], p: Params,
                   left_out: str | None = None) -> None:
    """One JSON line per distinct transcript, in order of first appearance; `clips` are the clips of each.

    left_out: why the other transcripts were not asked for; a line of no clip says so where there would be none.
    """
    ranked = {transcript: clip_ids for transcript, clip_ids in clips.items() if transcript in answers}
    with replacing(OUT) as file:
        if left_out and not ranked:
            file.write(json.dumps({"transcript": "", "ranking": None, "clip_ids": [], "reason": left_out}) + "\n")
        for transcript, clip_ids in ranked.items():
            answer = answers[transcript]
            row = {
                "transcript": transcript,
                "ranking": answer.ranking,
                "clip_ids": clip_ids,
                "provider": p.rankings.provider,
                "model": p.rankings.model,
                "prompt_version": p.rankings.prompt_version,
                "input_tokens": answer.input_tokens,
                "output_tokens": answer.output_tokens,
            }
            if answer.ranking is None:
                row["reason"] = answer.reason
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    p = load()
    clips: dict[str, list[str]] = {}
    for clip_id, transcript in read_transcripts().items():
        if transcript.strip():
            clips.setdefault(transcript, []).append(clip_id)
    if reason := left_out("rankings.jsonl"):
        known = known_answers(list(clips), p)
        write_rankings(clips, known, p, reason)
        print(f"rank_emotions: nothing is ranked: {reason}; {len(known)} of {len(clips)} transcripts were before")
        return
    if not clips:
        raise PipelineError("data/transcripts.csv: no clip has a transcript, but fusion.modalities names rows that "
                            "read rankings; expected transcripts in the corpus, transcribe.checkpoint, or others")
    answers = rank(list(clips), p)
    check_failures(answers, p)
    write_rankings(clips, answers, p)
    print(f"rank_emotions: {len(clips)} distinct transcripts ranked by {p.rankings.provider} {p.rankings.model}")


if __name__ == "__main__":
    run_stage(main)
