"""Every clip's words and their ranking, before the encoders see anything.

One pass over all clips: so the ranking provider is asked once, estimates the cost once, and its hard stop holds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.engine.devices import pick_device
from stages.engine.errors import PipelineError
from stages.engine.inputs import identity, ranked_item, row_inputs
from stages.engine.manifest import Source
from stages.engine.params import Params
from stages.engine.workers import Workers
from stages.inference.clips import digest_of
from stages.inference.media import Decoding, media_functions
from stages.inference.trained import Trained
from stages.rankings.cache import Answer
from stages.rankings.clips import item_of
from stages.rankings.providers import rank


class Texts:
    """Transcripts and, where an encoder wants them, rankings."""

    def __init__(
        self, transcripts: Mapping[Source, str], answers: Mapping[str, Answer],
        items: Mapping[Source, str] | None = None,
    ):
        self._transcripts, self._answers = transcripts, answers
        self._items = transcripts if items is None else items  # what the ranking provider was asked for each clip

    def transcript(self, clip: Source) -> str:
        return self._transcripts.get(clip, "")

    def ranking(self, clip: Source) -> list[str] | None:
        answer = self._answers.get(self._items.get(clip, ""))
        return answer.ranking if answer else None

    def item(self, clip: Source, medium: str) -> Any:
        """What extract's text encoders take: the transcript, or it with its ranking; "" where there is none."""
        transcript = self.transcript(clip)
        if medium == "transcripts.csv" or not self._items.get(clip):
            return transcript
        answer = self._answers[self._items[clip]]
        return ranked_item(transcript, answer.ranking, answer.reason)


def find_texts(trained: Trained, clips: Sequence[Source], given: Mapping[Source, str], workers: Workers) -> Texts:
    """The given transcripts, recognised ones for the clips without, and the rankings of all.

    Raises PipelineError as the recogniser and the ranking provider do.
    """
    if not trained.reads_text:
        return Texts(given, {})
    p = trained.params
    transcripts = {clip: text.strip() for clip, text in given.items()}
    wordless = [clip for clip in clips if not transcripts.get(clip)]
    if wordless and p.transcribe.checkpoint:
        transcripts |= recognize(wordless, p, workers)
    distinct = list(dict.fromkeys(text for clip in clips if (text := transcripts.get(clip))))
    if "rankings.jsonl" not in trained.media:
        return Texts(transcripts, {})
    if p.rankings.input == "transcript":
        return Texts(transcripts, rank(distinct, p) if distinct else {})
    items = {clip: item_of(digest_of(clip), transcripts.get(clip, "")) for clip in clips}
    answers = rank(list(dict.fromkeys(items.values())), p, {item: clip for clip, item in items.items()})
    return Texts(transcripts, answers, items)


def recognize(clips: Sequence[Source], p: Params, workers: Workers) -> dict[Source, str]:
    """Texts of those clips that have usable audio, as the stage transcribe makes them."""
    from tqdm import tqdm

    from stages.encoders.asr import recognise_work

    decoding = Decoding(clips, media_functions(p, {"audio"}), workers)
    work = recognise_work(p.transcribe, identity, p.runtime)
    try:
        work.open(pick_device(p.runtime.device))
    except PipelineError as error:
        raise PipelineError(f"transcribe: {error}") from None
    texts: dict[Source, str] = {}
    with tqdm(total=len(clips), desc="transcribe", unit="clip", mininterval=1) as bar:
        for part, media in decoding:
            rows = work.rows(row_inputs("audio", media["audio"], p.audio.sample_rate))
            texts |= {clip: row.values for clip, row in zip(part, rows, strict=True) if row.present}
            bar.update(len(part))
    work.close()
    return texts
