"""A small whole clip for tests that need any clip at all."""

from pathlib import Path

import av
import numpy as np
from av.container import InputContainer, OutputContainer

from stages.corpora.demo.video import write_clip


def write_small_clip(path: Path, seconds: float = 1.0, rate: int = 16000) -> None:
    """Grey frames that brighten, and a tone."""
    count = int(seconds * 25)
    frames = [np.full((48, 64, 3), 50 + i, np.uint8) for i in range(count)]
    tone = 0.3 * np.sin(2 * np.pi * 300 * np.arange(int(seconds * rate)) / rate)
    write_clip(path, frames, tone.astype(np.float32), rate)


ENCODED = {  # where the mp4's own streams don't go: codecs of both streams, samples per second
    ".webm": ("libvpx", "libopus", 48000),
    ".avi": ("mpeg4", "pcm_s16le", 16000),
}


def remux(source: Path, target: Path) -> None:
    """The same clip in the container that target's extension names, whatever its case."""
    extension = target.suffix.lower()
    target.parent.mkdir(parents=True, exist_ok=True)
    kind = {".mkv": "matroska"}.get(extension, extension[1:])
    with av.open(str(source)) as read, av.open(f"file:{target}", "w", format=kind) as written:
        if extension in ENCODED:
            _encode(read, written, *ENCODED[extension])
            return
        streams = {stream.index: written.add_stream_from_template(stream) for stream in read.streams}
        for packet in read.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                written.mux(packet)


def _encode(read: InputContainer, written: OutputContainer, video: str, audio: str, rate: int) -> None:
    pictures, sound = written.add_stream(video, rate=25), written.add_stream(audio, rate=rate, layout="mono")
    pictures.width, pictures.height = read.streams.video[0].width, read.streams.video[0].height
    pictures.pix_fmt = "yuv420p"
    resampler = av.AudioResampler("s16", "mono", rate, frame_size=960)
    for frame in read.decode():
        if isinstance(frame, av.AudioFrame):
            for part in resampler.resample(frame):
                written.mux(sound.encode(part))
        else:
            written.mux(pictures.encode(av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), "rgb24")))
    for stream in (pictures, sound):
        written.mux(stream.encode(None))
