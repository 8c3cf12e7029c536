"""Writing one mp4: H.264 and AAC through PyAV. One encoder thread and no time stamps: same input, same bytes."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

FPS = 25
AAC_FRAME = 1024


def write_clip(path: Path, frames: list[np.ndarray], waveform: np.ndarray | None, rate: int) -> None:
    """RGB uint8 frames (may be none) and float32 mono samples (may be None) as an mp4 whose index comes first.

    faststart: a copy that breaks off in the middle can be played so far, as with published corpora.
    """
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        video = _video_stream(container, frames) if frames else None
        audio = _audio_stream(container, rate) if waveform is not None else None
        # interleaved by time, as players and truncated copies want it
        written = 0
        for i, frame in enumerate(frames):
            assert video is not None
            picture = VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = i
            container.mux(video.encode(picture))
            if audio is not None and waveform is not None:
                until = (i + 1) * rate // FPS
                while written + AAC_FRAME <= min(until, len(waveform)):
                    written = _write_audio(container, audio, waveform, written, rate)
        if audio is not None and waveform is not None:
            while written < len(waveform):
                written = _write_audio(container, audio, waveform, written, rate)
        for stream in (video, audio):
            if stream is not None:
                container.mux(stream.encode(None))


def _video_stream(container: av.container.OutputContainer, frames: list[np.ndarray]) -> VideoStream:
    stream = container.add_stream("libx264", rate=FPS)
    stream.height, stream.width = frames[0].shape[:2]
    stream.pix_fmt = "yuv420p"
    stream.codec_context.thread_count = 1
    stream.codec_context.flags |= av.codec.context.Flags.bitexact
    stream.options = {"preset": "ultrafast", "crf": "21"}
    return stream


def _audio_stream(container: av.container.OutputContainer, rate: int) -> AudioStream:
    stream = container.add_stream("aac", rate=rate, layout="mono")
    stream.codec_context.thread_count = 1
    stream.codec_context.flags |= av.codec.context.Flags.bitexact
    stream.bit_rate = 64_000
    stream.options = {"aac_coder": "fast"}
    return stream


def _write_audio(
    container: av.container.OutputContainer, stream: AudioStream, waveform: np.ndarray, start: int, rate: int
) -> int:
    chunk = waveform[start : start + AAC_FRAME]
    frame = AudioFrame.from_ndarray(np.ascontiguousarray(chunk[None]), format="fltp", layout="mono")
    frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), start
    container.mux(stream.encode(frame))
    return start + len(chunk)
