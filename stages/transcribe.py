"""Stage transcribe: every clip's words in data/transcripts.csv, the corpus's own or recognised from the sound.

Without transcribe.checkpoint, clips that come without a transcript stay without.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from stages.engine.devices import stage_devices
from stages.engine.errors import run_stage
from stages.engine.extraction import write_store
from stages.engine.files import write_rows
from stages.engine.fingerprint import checkpoint_digest, stage_fingerprint
from stages.engine.inputs import StoreReader
from stages.engine.manifest import read_manifest
from stages.engine.params import Params, load
from stages.engine.plan import left_out
from stages.engine.store import Store
from stages.engine.work import Input, Target

AUDIO = Path("data/audio")
RECOGNIZED = Path(".cache/transcripts")  # the texts as a store, so that a kill costs one shard
OUT = Path("data/transcripts.csv")


def recognize(clip_ids: Sequence[str], p: Params) -> dict[str, str]:
    """Texts of those clips that have usable audio, by clip; "" where nothing was recognised."""
    from stages.encoders.asr import recognise_work

    options = p.transcribe.model_dump()
    audio = Store(AUDIO)
    known = {clip_id: i for i, clip_id in enumerate(audio.clip_ids)}
    inputs = [Input(c, c, audio.digests[known[c]], absent=not audio.present[known[c]]) for c in clip_ids]
    work = recognise_work(p.transcribe, StoreReader(AUDIO), p.runtime)
    fingerprint = stage_fingerprint("transcribe", checkpoint_digest(options["checkpoint"]))
    target = Target("transcribe", RECOGNIZED, "text", {"extractor": "transcribe", **options}, fingerprint)
    if not write_store(target, inputs, work, p, stage_devices(p.runtime)):
        raise SystemExit(0)
    texts = Store(RECOGNIZED)
    return {c: texts.read(c) for c, present in zip(texts.clip_ids, texts.present, strict=True) if present}


def main() -> None:
    p = load()
    given = {clip.clip_id: clip.transcript.strip() for clip in read_manifest()}
    wordless = [clip_id for clip_id, text in given.items() if not text]
    wanted = p.transcribe.checkpoint and wordless
    if wanted and (reason := left_out("transcripts.csv") or Store(AUDIO).empty):
        print(f"transcribe: {len(wordless)} clips without words are not listened to: {reason}")
        wanted = None
    heard = recognize(wordless, p) if wanted else {}
    rows = [
        (clip_id, text, "corpus") if text else (clip_id, heard.get(clip_id, ""), "asr" if clip_id in heard else "none")
        for clip_id, text in given.items()
    ]
    write_rows(OUT, ["clip_id", "transcript", "source"], rows)
    counts = Counter(source for _, _, source in rows)
    print(f"transcribe: {counts['corpus']} of the corpus, {counts['asr']} recognised, {counts['none']} without")


if __name__ == "__main__":
    run_stage(main)
