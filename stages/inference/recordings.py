"""Long recordings cut into segments that are predicted like clips: by voice activity, by words, or evenly.

Voice activity is Silero's [choice: MIT, its weights come inside the package as ONNX, which holds no code, and it needs
nothing that is not here already]. Of a recording in which nothing is found stays the reason.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.engine.devices import pick_device, pick_workers
from stages.engine.errors import PipelineError, Skip
from stages.engine.inputs import identity, row_inputs
from stages.engine.manifest import Segment, Source
from stages.engine.params import Params
from stages.engine.per_clip import result_row
from stages.engine.store import Row
from stages.engine.workers import Workers
from stages.inference.media import usable
from stages.media.audio import audio_decoder, load_audio
from stages.media.clip import Reader, probe_duration

if TYPE_CHECKING:
    from stages.encoders.asr_times import Said

VOICE_RATE = 16_000  # Hz, what the detector was trained on
VOICE = {"min_silence_duration_ms": 500, "speech_pad_ms": 100, "max_speech_duration_s": 15.0}  # [choice] utterances
SHORTEST = 0.5  # seconds of an even segment
PATIENCE = 20  # times runtime.clip_timeout_seconds: a recording is decoded whole here
WAYS = "vad, asr or a number of seconds"


@dataclass(frozen=True)
class Cut:
    """What the recordings hold, in order: segments to predict, and the files themselves where there are none."""

    pieces: list[Source]
    texts: dict[Source, str]  # of segments whose words are known
    reasons: dict[Source, str]  # of files that are not cut: why


def check_way(way: str, p: Params) -> None:
    """Raises PipelineError for what is no way to cut recordings, and for `asr` without a checkpoint."""
    if way == "asr" and not p.transcribe.checkpoint:
        raise PipelineError("--segment asr: params.yaml: transcribe.checkpoint is null, expected a Whisper or CTC "
                            "checkpoint; or use --segment vad")
    if way not in ("vad", "asr"):
        try:
            seconds = float(way)
        except ValueError:
            seconds = math.nan
        if not SHORTEST <= seconds < math.inf:
            raise PipelineError(f"--segment: found {way!r}, expected {WAYS} from {SHORTEST:g} on")


def cut(clips: Sequence[Path], way: str, p: Params) -> Cut:
    """Cut every recording as `way` says; check_way has seen it. Raises PipelineError as the recogniser does."""
    workers = Workers(pick_workers(p.runtime), PATIENCE * p.runtime.clip_timeout_seconds)
    try:
        rows = _said(clips, p, workers) if way == "asr" else _spans(clips, way, workers)
        return _together(clips, rows)
    finally:
        workers.close()


def _together(clips: Sequence[Path], rows: Iterable[Row]) -> Cut:
    pieces: list[Source] = []
    texts: dict[Source, str] = {}
    reasons: dict[Source, str] = {}
    for clip, row in zip(clips, rows, strict=True):
        if not row.present:
            reasons[clip] = row.reason
            pieces.append(clip)
        for start, end, text in row.values if row.present else ():
            pieces.append(Segment(str(clip), start, end))
            if text:
                texts[pieces[-1]] = text
    return Cut(pieces, texts, reasons)


# ---------------------------------------------------------------- by voice, or evenly


def _spans(clips: Sequence[Path], way: str, workers: Workers) -> Iterable[Row]:
    from tqdm import tqdm

    function: Callable[[str], Row] = voices if way == "vad" else partial(even, seconds=float(way))
    results = workers.map(function, [(str(clip),) for clip in clips])
    shown = tqdm(results, "segment", len(clips), unit="file", mininterval=1, disable=len(clips) == 1)
    return (result_row(str(clip), usable(result)) for clip, result in zip(clips, shown, strict=True))


def voices(path: str) -> Row:
    """Where somebody speaks: a row of [(start, end, "")], seconds. Skip as load_audio, and where nobody does."""
    from silero_vad import get_speech_timestamps_sequence

    samples, _ = load_audio(path, VOICE_RATE)
    found = get_speech_timestamps_sequence(samples.astype(np.float32) / 32768, _detector(), return_seconds=True,
                                           time_resolution=3, **VOICE)
    if not found:
        raise Skip(f"nobody speaks in its {len(samples) / VOICE_RATE:.1f} s")
    return Row(path, values=[(part["start"], part["end"], "") for part in found])


@cache
def _detector() -> Any:
    from silero_vad import load_silero_vad

    return load_silero_vad(sequence=True)


def even(path: str, seconds: float) -> Row:
    """Segments of `seconds` each, the last between half and one and a half of that. Skip where it can't be opened."""
    length = probe_duration(path) or _measured(path)
    count = max(1, round(length / seconds))
    bounds = [round(i * seconds, 3) for i in range(count)] + [round(max(length, 0.001), 3)]
    return Row(path, values=[(start, end, "") for start, end in zip(bounds, bounds[1:], strict=False)])


def _measured(path: str) -> float:
    """Seconds by the clock of its packets, for a header that says nothing. Skip without a stream."""
    for kind in ("video", "audio"):
        try:
            with Reader(path, kind) as reader:
                for _ in reader.packets():
                    pass
                if reader.seconds:
                    return reader.seconds
        except Skip:
            continue
    raise Skip("its length can't be told: no readable stream")


# ---------------------------------------------------------------- by words


def _said(clips: Sequence[Path], p: Params, workers: Workers) -> Iterable[Row]:
    """One recording after another: hours of sound are held only once."""
    from tqdm import tqdm

    from stages.encoders.asr_times import Config, TimedRecognizer
    from stages.engine.encoding import Encode

    config = Config(**p.transcribe.model_dump())
    work = Encode(lambda device: TimedRecognizer(config, device), identity, _row_of, p.runtime)
    try:
        work.open(pick_device(p.runtime.device))
    except PipelineError as error:
        raise PipelineError(f"--segment asr: {error}") from None
    decode = audio_decoder(p)
    for clip in tqdm(clips, "segment", unit="file", mininterval=1, disable=len(clips) == 1):
        (result,) = workers.map(decode, [(str(clip), str(clip))])
        sound = result_row(str(clip), usable(result))
        (row,) = work.rows(row_inputs("audio", [sound], p.audio.sample_rate)) if sound.present else (sound,)
        yield row if row.present or row.reason else Row(str(clip), reason=sound.reason)
    work.close()


def _row_of(_: Any, clip_id: str, said: Sequence["Said"]) -> Row:
    if not said:
        return Row(clip_id, reason="no words are recognised in it")
    return Row(clip_id, values=[(round(part.start, 3), round(part.end, 3), part.text) for part in said])
