"""Speech of a clip as mono PCM.

Resampled by FFmpeg's swresample, through PyAV: it takes every sample format, rate and channel layout
frame by frame, so memory stays at the result's size, and it is what the official baseline's ffmpeg
call uses. (soxr is a little sharper near the Nyquist frequency, but needs the whole clip as float
and a downmix of our own.)
"""

from collections.abc import Callable, Iterator
from functools import partial

import av
import numpy as np
from av.audio.frame import AudioFrame

from stages.engine.errors import Skip
from stages.engine.manifest import Source
from stages.engine.params import Params
from stages.engine.store import Row
from stages.media.clip import Reader, damage_note, describe

OPPOSITE = 0.01  # of two channels' energy that is left in their mix: speech recorded twice keeps half or more
SOURCE_RATES = (1_000, 768_000)  # Hz; a damaged header can say 1 Hz, and a minute would fill the memory


def audio_decoder(p: Params) -> Callable[[str, Source], Row]:
    """As the stage extract_audio and predict decode a clip's sound: int16 samples at audio.sample_rate."""
    return partial(_audio_row, sample_rate=p.audio.sample_rate)


def _audio_row(clip_id: str, path: Source, sample_rate: int) -> Row:
    samples, note = load_audio(path, sample_rate)
    return Row(clip_id, values=samples, reason=note)


def load_audio(path: Source, sample_rate: int) -> tuple[np.ndarray, str]:
    """Decode a clip's best audio stream: (samples int16 (n,), mono at sample_rate; a note). A segment begins and ends
    at its samples, not at the codec's frames.

    The note is "" or says what is missing of a damaged stream ("truncated: 1.2 of 2.6 s decoded"), or that two channels
    cancel each other out. Several channels are mixed down by swresample's matrix, scaled so that it can't clip.
    Skip: the file can't be opened, has no audio stream, nothing of it decodes, or every sample is zero.
    """
    with Reader(path, "audio") as reader:
        seconds = Passing()
        try:
            parts = list(resampled(seconds.of(reader.frames()), sample_rate))
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise Skip(f"audio can't be decoded: {describe(error)}") from None
        note = damage_note(seconds.total, reader.declared_seconds, reader.damaged)
    samples = reader.cut(np.concatenate(parts) if parts else np.zeros(0, np.int16), sample_rate)
    if not len(samples):
        raise Skip(f"audio can't be decoded: {note or 'it is empty'}")
    if not samples.any():
        raise Skip(f"digital silence: every sample is zero{f' ({seconds.cancelled})' if seconds.cancelled else ''}")
    return samples, "; ".join(filter(None, [note, seconds.cancelled]))


class Passing:
    """What passes through: `total`, how long the frames last in seconds, and how much of two channels cancels out."""

    def __init__(self) -> None:
        self.total = 0.0
        self._channels, self._mix = 0.0, 0.0  # energies: of the channels, their mean; of their sum, halved

    @property
    def cancelled(self) -> str:
        """"" unless the two channels are in opposite phase."""
        if self._mix >= OPPOSITE * self._channels:
            return ""
        return f"channels in opposite phase: mixing them leaves {100 * self._mix / self._channels:.1f} % of the sound"

    def _measure(self, frame: AudioFrame) -> None:
        samples = frame.to_ndarray()
        samples = (samples if frame.format.is_planar else samples.reshape(-1, 2).T).astype(np.float32)
        if frame.format.name.startswith("u8"):
            samples -= 128
        self._channels += float((samples**2).sum()) / 2
        self._mix += float(((samples[0] + samples[1]) ** 2).sum()) / 4

    def of(self, frames: Iterator[AudioFrame]) -> Iterator[AudioFrame]:
        for frame in frames:
            if not SOURCE_RATES[0] <= frame.sample_rate <= SOURCE_RATES[1]:
                raise ValueError(f"sample rate {frame.sample_rate} Hz, expected {SOURCE_RATES[0]} to {SOURCE_RATES[1]}")
            self.total += frame.samples / frame.sample_rate
            if len(frame.layout.channels) == 2:
                self._measure(frame)
            yield frame


def resampled(frames: Iterator[AudioFrame], sample_rate: int) -> Iterator[np.ndarray]:
    """Mono int16 arrays at sample_rate. A stream that changes its format midway (HE-AAC does) is followed."""
    resampler, current = None, None
    for frame in frames:
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != current:
            yield from pull(resampler, None)
            resampler, current = av.AudioResampler(format="s16", layout="mono", rate=sample_rate), kind
        frame.pts = None  # samples follow each other: gaps and jumps of damaged clocks are not filled
        yield from pull(resampler, frame)
    yield from pull(resampler, None)


def pull(resampler: av.AudioResampler | None, frame: AudioFrame | None) -> Iterator[np.ndarray]:
    """Feed one frame (None flushes) and yield what comes out."""
    if resampler is not None:
        for out in resampler.resample(frame):
            yield out.to_ndarray()[0]
