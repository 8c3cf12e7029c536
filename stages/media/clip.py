"""Opening a clip and walking over one of its streams, however damaged it is.

PyAV brings its own FFmpeg, so no system package is needed. A packet that can't be decoded is skipped
and counted: a damaged clip keeps its other frames, and the caller gets a note about it.

FFmpeg reports a disk that fails and a stream that is damaged in the same words. So whatever goes wrong, the file is
read once more as plain bytes: if that fails, the machine is at fault (OSError), else the clip.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition

from stages.engine.errors import NO_FILE, NO_STREAM, Skip, is_last_attempt, is_machines
from stages.engine.manifest import Segment, Source

# Only plain media containers: a "clip" that is really a playlist must not make FFmpeg open other
# files or the network.
OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,wav,mp3,aac,flac",
    "protocol_whitelist": "file",
}
# Containers whose header states no length: FFmpeg guesses it from the bit rate, or takes the last clock time it finds
GUESSED, CLOCKED = {"aac", "mpegvideo"}, {"mpegts", "mpeg"}
HEAD_BYTES = 1 << 16  # of an MP3: its first frame, which may say how many there are, lies behind the ID3 tag
Kind = Literal["audio", "video"]
READ_BYTES = 16 << 20  # and as much memory as a sound clip may need at once
MAX_PIXELS = 8192 * 8192  # of one frame: a damaged header can ask for any amount of memory
TICK_SECONDS = 0.0005  # clocks count in milliseconds at worst
PREROLL_SECONDS = 0.2  # decoded before a segment: what sound codecs carry over from one frame to the next
SLACK_SECONDS = 0.1  # codecs pad and trim by a few thousand samples
SLACK_SHARE = 0.02


def open_clip(path: str | Path) -> InputContainer:
    """Open a clip for reading, whatever its extension says. Skip if it is not a media file, OSError if it is away."""
    if not path:
        raise Skip(NO_FILE)
    try:
        # "file:" keeps a name such as "a:b.mp4" from being read as a protocol
        container = av.open(f"file:{path}", options=OPTIONS, metadata_errors="ignore")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        blame(path, error)
        raise Skip(f"file can't be opened: {_not_allowed(path) or describe(error)}") from None
    return container


def _not_allowed(path: str | Path) -> str:
    """The sentence for a container that FFmpeg knows, but that is not read here; "" for what is none of those."""
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as lines, suppress(av.error.FFmpegError, OSError, ValueError):
            av.open(f"file:{path}", options=OPTIONS, metadata_errors="ignore").close()
    finally:
        av.logging.set_level(None)
    name = next((name for _, name, text in lines if "not on whitelist" in text), "")
    return name and f"its container ({name}) is not allowed; convert it, to mp4, matroska or wav say"


def states_length(container: InputContainer, path: str | Path) -> bool:
    """Whether the length that FFmpeg gives comes from a header, and is no guess."""
    if container.format.name != "mp3":
        return container.format.name not in GUESSED
    with open(path, "rb") as file:
        head = file.read(10)
        size = 0
        if head[:3] == b"ID3":  # ID3v2: four bytes of seven bits
            size = 10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        file.seek(size)
        frame = file.read(HEAD_BYTES)
    return any(tag in frame for tag in (b"Xing", b"Info", b"VBRI"))


def blame(path: str | Path, error: BaseException | None) -> None:
    """Return where `error`, which reading the file gave, is the file's own fault.

    Raises OSError where the machine can't read the file's bytes, MemoryError where it has no memory to do so. Where it
    can, but the error looks like the machine's, it may have passed: it is raised too, until the last attempt.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            while file.read(READ_BYTES):
                pass
    except OSError as fault:
        fault.filename = str(path)  # reading does not say
        raise
    if error is not None and is_machines(error) and not is_last_attempt():
        if isinstance(error, OSError):
            raise OSError(error.errno, describe(error), str(path)) from None
        raise MemoryError from None


def describe(error: Exception) -> str:
    """An FFmpeg error without the path, which differs between machines and is recorded elsewhere."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class Reader:
    """One forward pass over the best audio or video stream of a clip, or over a segment of it.

    with Reader(path, "video") as reader:
        for frame in reader.frames(): ...
    Raises Skip if the file can't be opened, has no such stream or ends before the segment begins. Afterwards `damaged`
    counts the packets that could not be read or decoded and `seconds` is the time that the packets spanned.

    A segment is found by seeking to the key frame before it; where a container can't seek, by decoding from the start.
    Its frames of video are those that begin in it, those of sound all that have a sample in it (see cut).
    """

    def __init__(self, clip: Source, kind: Kind):
        segment = clip if isinstance(clip, Segment) else Segment(str(clip))
        self.path, self.start, self.end, self.kind = segment.path, segment.start, segment.end, kind
        self.container = open_clip(self.path)
        try:
            self.stream = self._best_stream(kind)
            declared = self._stream_seconds
            if declared is not None and self.start >= declared > 0:
                raise Skip(f"the segment begins at {self.start:g} s, where {declared:.1f} s of {kind} have ended")
        except Skip:
            self.container.close()
            raise
        self.damaged = 0
        self.seconds = 0.0
        self._fault: BaseException | None = None  # the last error that looked like the machine's
        if self.start:
            self._seek(PREROLL_SECONDS)
        self.first = 0.0  # seconds after the segment's start at which its first frame begins; of sound, often before

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.container.close()
        if self.damaged or kind is not None:
            blame(self.path, self._fault)

    def _best_stream(self, kind: Kind) -> Any:
        streams = [
            stream
            for stream in self.container.streams
            if stream.type == kind and not stream.disposition & Disposition.attached_pic  # cover art is no video
        ]
        if not streams:
            raise Skip(NO_STREAM[kind])
        best = self.container.streams.best(kind)
        stream = best if best in streams else streams[0]
        if stream.codec_context is None:
            raise Skip(f"{kind} can't be decoded: no decoder for its codec")
        stream.codec_context.thread_count = 1  # clips run in parallel, one process each
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)} if kind == "video" else {}
        return stream

    def _seek(self, preroll: float) -> None:
        target = max(0.0, self.start - preroll) + self._origin
        with suppress(av.error.FFmpegError, OSError, ValueError):  # then every frame is decoded, from the first
            self.container.seek(int(target / self.stream.time_base), stream=self.stream)

    @property
    def _origin(self) -> float:
        """The clock's time at the file's start, in seconds."""
        return (self.container.start_time or 0) / av.time_base

    def _time(self, ticks: int | None) -> float | None:
        """Seconds after the segment's start."""
        return None if ticks is None else float(ticks * self.stream.time_base) - self._origin - self.start

    @property
    def _length(self) -> float:
        return math.inf if self.end is None else self.end - self.start

    def within(self, packet: Packet) -> bool:
        """Whether what the packet holds begins in the segment."""
        time = self._time(packet.dts if packet.pts is None else packet.pts)
        return time is None or (self.start == 0 or time >= -TICK_SECONDS) and time < self._length - TICK_SECONDS

    def cut(self, samples: np.ndarray, sample_rate: int) -> np.ndarray:
        """The segment's samples (n,), of those that its frames hold."""
        begin = max(0, round(-self.first * sample_rate)) if self.start else 0
        return samples[begin:] if self.end is None else samples[begin : begin + round(self._length * sample_rate)]

    @property
    def declared_seconds(self) -> float | None:
        """What the header says the stream, or the part of it in the segment, lasts; None where it says nothing."""
        ends = [seconds for seconds in (self._stream_seconds, self.end) if seconds is not None]
        return max(0.0, min(ends) - self.start) if ends else None

    @property
    def _stream_seconds(self) -> float | None:
        if self.container.format.name in CLOCKED or not states_length(self.container, self.path):
            return None
        if self.stream.duration and self.stream.time_base:
            return float(self.stream.duration * self.stream.time_base)
        clock = self.stream.metadata.get("DURATION", "").split(":")  # Matroska: 00:00:02.600000000
        try:
            hours, minutes, seconds = (float(part) for part in clock)
        except ValueError:
            return None
        return hours * 3600 + minutes * 60 + seconds

    def packets(self) -> Iterator[Packet]:
        """Every packet that holds data, of a segment from the key frame before it to its end. A read error ends the
        stream: what came before it stands."""
        start = end = None
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except (av.error.FFmpegError, OSError, ValueError) as error:
                self._count(error)
                return
            if packet.size == 0:  # PyAV ends with an empty packet
                continue
            reached = self._time(packet.dts)
            if reached is not None and reached >= self._length:  # no later packet is shown earlier
                return
            if packet.pts is not None and packet.time_base and self.within(packet):
                start = packet.pts if start is None else min(start, packet.pts)
                end = max(end if end is not None else packet.pts, packet.pts + (packet.duration or 0))
                self.seconds = float((end - start) * packet.time_base)
            yield packet

    def frames(self) -> Iterator[Any]:
        """Every AudioFrame or VideoFrame that decodes, in order of presentation."""
        return self._decoded() if self.start == 0 and self.end is None else self._segment()

    def _decoded(self) -> Iterator[Any]:
        for packet in self.packets():
            yield from self._decode(packet)
        yield from self._decode(None)  # frames that the decoder still buffers

    def _from_before(self) -> Iterator[Any]:
        """Every frame from one on that begins before the segment; from the file's first where none is found sooner.

        Containers without an index, MPEG's, seek to a moment, and the decoder may have to wait for a later key frame.
        """
        preroll = PREROLL_SECONDS
        while True:
            frames = self._decoded()
            first = next(frames, None)
            begins = None if first is None else self._time(first.pts)
            if preroll >= self.start or (first is not None and (begins is None or begins <= TICK_SECONDS)):
                return frames if first is None else chain([first], frames)
            preroll *= 10
            self._seek(preroll)

    def _segment(self) -> Iterator[Any]:
        time, begun = -self.start, False
        for frame in self._from_before():
            known = self._time(frame.pts)  # in the stream's ticks: PyAV gives the last frames no time_base
            time = time if known is None else known
            seconds = frame.samples / frame.sample_rate if self.kind == "audio" else 0.0
            if time >= self._length - TICK_SECONDS:
                return
            if time + seconds >= -TICK_SECONDS:
                if not begun:
                    begun, self.first, self.damaged = True, time, 0  # a seek may land in the middle of a packet
                yield frame
            time += seconds

    def _decode(self, packet: Packet | None) -> list:
        try:
            return self.stream.codec_context.decode(packet)
        except av.error.EOFError:
            return []
        except (av.error.FFmpegError, OSError, ValueError, MemoryError) as error:
            self._count(error)
            return []

    def _count(self, error: BaseException) -> None:
        self.damaged += 1
        if is_machines(error):
            self._fault = error


def damage_note(decoded: float, declared: float | None, damaged: int) -> str:
    """"" for a whole stream, else what is missing, e.g. "truncated: 1.2 of 2.6 s decoded"."""
    if declared is not None and declared - decoded > max(SLACK_SECONDS, SLACK_SHARE * declared):
        return f"truncated: {decoded:.1f} of {declared:.1f} s decoded"
    if damaged:
        return f"damaged: {damaged} packet{'s' if damaged > 1 else ''} passed over"
    return ""


def probe_duration(path: str | Path) -> float | None:
    """Seconds that the container declares, without decoding; None where it says nothing. Skip as open_clip."""
    with open_clip(path) as container:
        if container.duration is None or not states_length(container, path):
            return None
        return container.duration / av.time_base
