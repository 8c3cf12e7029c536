"""Stage transcribe: every clip's words in data/transcripts.csv, the corpus's own or recognised from the sound.

Without transcribe.checkpoint, clips that come without a transcript stay without.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.corpus.manifest import read_manifest, write_rows
from stages.errors import Skip, run_stage
from stages.extraction import Input, Stage, batches, default_batch_bytes, extract, pick_devices
from stages.fingerprint import checkpoint_digest, stage_fingerprint
from stages.params import Params, load
from stages.store import Row, Store

if TYPE_CHECKING:
    from stages.encoders.asr import Config

AUDIO = Path("data/audio")
RECOGNIZED = Path(".cache/transcripts")  # the texts as a store, so that a kill costs one shard
OUT = Path("data/transcripts.csv")


class Recognize:
    """Work of the engine: one row of text per clip."""

    attributes: Mapping[str, Any] = {}

    def __init__(self, config: "Config", audio: Path, batch_bytes: int | None):
        self.config, self.audio, self.batch_bytes = config, audio, batch_bytes

    def open(self, device: str) -> None:
        from stages.encoders.asr import Recognizer

        self._recognizer = Recognizer(self.config, device)
        self._store = Store(self.audio)
        self._rate = int(self._store.attrs["sample_rate"])
        self._budget = self.batch_bytes or default_batch_bytes(device)

    def close(self) -> None:
        del self._recognizer

    def rows(self, inputs: Sequence[Input]) -> Iterator[Row]:
        recognizer, rows, waveforms = self._recognizer, {}, []
        for clip in inputs:
            rows[clip.clip_id] = Row(clip.clip_id)
            try:
                if not clip.absent:
                    waveform = recognizer.prepare((self._store.read(clip.clip_id), self._rate))
                    waveforms.append((clip.clip_id, waveform))
            except Skip as skip:
                rows[clip.clip_id] = Row(clip.clip_id, reason=str(skip))
        for batch in batches(waveforms, lambda pair: recognizer.size(pair[1]), recognizer.unit_bytes, self._budget):
            texts = recognizer.encode([waveform for _, waveform in batch])
            for (clip_id, _), text in zip(batch, texts, strict=True):
                rows[clip_id] = Row(clip_id, values=text)
        return iter([rows[clip.clip_id] for clip in inputs])


def recognize(clip_ids: Sequence[str], p: Params) -> dict[str, str]:
    """Texts of those clips that have usable audio, by clip; "" where nothing was recognised."""
    from stages.encoders.asr import Config

    options = p.transcribe.model_dump()
    audio = Store(AUDIO)
    known = {clip_id: i for i, clip_id in enumerate(audio.clip_ids)}
    inputs = [Input(c, c, audio.digests[known[c]], absent=not audio.present[known[c]]) for c in clip_ids]
    memory = p.runtime.batch_memory_mb
    work = Recognize(Config(**options), AUDIO, None if memory == "auto" else memory << 20)
    fingerprint = stage_fingerprint("transcribe", checkpoint_digest(options["checkpoint"]))
    stage = Stage("transcribe", RECOGNIZED, "text", {"extractor": "transcribe", **options}, fingerprint)
    extract(stage, inputs, work, p, pick_devices(p.runtime.device))
    texts = Store(RECOGNIZED)
    return {c: texts.read(c) for c, present in zip(texts.clip_ids, texts.present, strict=True) if present}


def main() -> None:
    p = load()
    given = {clip.clip_id: clip.transcript.strip() for clip in read_manifest()}
    wordless = [clip_id for clip_id, text in given.items() if not text]
    heard = recognize(wordless, p) if p.transcribe.checkpoint and wordless else {}
    rows = [
        (clip_id, text, "corpus") if text else (clip_id, heard.get(clip_id, ""), "asr" if clip_id in heard else "none")
        for clip_id, text in given.items()
    ]
    write_rows(OUT, ["clip_id", "transcript", "source"], rows)
    counts = Counter(source for _, _, source in rows)
    print(f"transcribe: {counts['corpus']} of the corpus, {counts['asr']} recognised, {counts['none']} without")


if __name__ == "__main__":
    run_stage(main)
