"""Decoding segments: the same samples and frames as of the whole file, found by seeking."""

from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from stages.engine.errors import PipelineError, Skip
from stages.engine.manifest import Clip, Segment, source_of
from stages.engine.params import Faces
from stages.media.audio import load_audio
from stages.media.clip import Reader
from stages.media.face_crops import _faces_row
from stages.media.frames import FrameStream, sample_frames

RATE, FPS, SECONDS = 16000, 25, 12
SOUND = {"wav": "pcm_s16le", "flac": "flac", "mp3": "libmp3lame", "ogg": "libopus", "m4a": "aac", "aac": "aac"}
VIDEO = {"mp4": ("libx264", "aac"), "mkv": ("libx264", "aac"), "avi": ("mpeg4", "pcm_s16le"),
         "webm": ("libvpx", "libopus"), "ts": ("mpeg2video", "mp2"), "mov": ("libx264", "aac"),
         "mpg": ("mpeg2video", "mp2"), "m2ts": ("libx264", "aac"), "3gp": ("mpeg4", "aac"),
         "vob": ("mpeg2video", "mp2"),
         "flv": ("flv", "libmp3lame"), "wmv": ("wmv2", "libmp3lame")}
MPEG = ("ts", "m2ts", "mpg", "vob")  # clocks that begin anywhere, and no index
FORMATS = {"ts": "mpegts", "m4a": "mp4", "aac": "adts", "mkv": "matroska", "mpg": "mpeg", "m2ts": "mpegts",
           "wmv": "asf"}


def noise(seconds: float, rate: int) -> np.ndarray:
    """Noise below 3 kHz: no two parts of it are alike, and lossy codecs keep it."""
    white = np.random.default_rng(7).normal(size=int(seconds * rate))
    spectrum = np.fft.rfft(white)
    spectrum[np.fft.rfftfreq(len(white), 1 / rate) > 3000] = 0
    wave = np.fft.irfft(spectrum, len(white))
    return (0.3 * wave / np.abs(wave).max()).astype(np.float32)


def write(path: Path, video: str | None, audio: str) -> Path:
    """Frames whose brightness tells their number, a key frame in every second, and noise."""
    rate = 48000 if audio == "libopus" else 44100
    kind = path.suffix[1:]
    with av.open(str(path), "w", format=FORMATS.get(kind, kind)) as container:
        pictures = container.add_stream(video, rate=FPS) if video else None
        if pictures is not None:
            pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
            pictures.options = {"g": str(FPS), "b": "2M"}
        stream = container.add_stream(audio, rate=rate, layout="mono")
        packets = []
        for i in range(SECONDS * FPS if pictures is not None else 0):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 + i % 180, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            packets += pictures.encode(frame)
        packets += pictures.encode(None) if pictures is not None else []
        frame = av.AudioFrame.from_ndarray(noise(SECONDS, rate)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        resampler = av.AudioResampler(stream.format, "mono", rate, frame_size=stream.codec_context.frame_size or 1024)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            packets += stream.encode(part)
        packets += stream.encode(None)
        for packet in sorted(packets, key=lambda packet: float((packet.dts or 0) * packet.time_base)):
            container.mux(packet)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A file of each kind, written once."""
    folder = tmp_path_factory.mktemp("made")

    @cache
    def make(kind: str) -> Path:
        return write(folder / f"a.{kind}", *(VIDEO.get(kind) or (None, SOUND[kind])))

    return make


def brightness(images: list[bytes]) -> list[int]:
    return [round(cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_GRAYSCALE).mean()) for image in images]


def delay(part: np.ndarray, whole: np.ndarray, expected: int, reach: int = 2000) -> int:
    """How many samples after `expected` the part begins in the whole, by cross-correlation."""
    window = whole[max(0, expected - reach) : expected + len(part) + reach].astype(float)
    size = 2 * len(window)
    found = np.fft.irfft(np.fft.rfft(window, size) * np.conj(np.fft.rfft(part.astype(float), size)))
    return int(np.argmax(found[: 2 * reach + 1])) - min(reach, expected)


@pytest.mark.parametrize("kind", [*SOUND, *VIDEO])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.5), (0.1, 0.4), (5.03, 6.71), (10.5, None), (3.0, 3.02)])
def test_sound_of_a_segment_is_that_part_of_the_whole(made: Callable[[str], Path], kind: str, start: float,
                                                      end: float | None) -> None:
    path = made(kind)
    whole, _ = load_audio(path, RATE)
    part, note = load_audio(Segment(str(path), start, end), RATE)
    assert note == ""
    length = ((end or len(whole) / RATE) - start) * RATE
    assert abs(len(part) - length) <= (1 if end else 0.05 * RATE)
    if length > 1000:
        tolerance = 1200 if kind in MPEG else 600 if kind in ("mp3", "wmv", "flv") else 40  # samples, of 16,000
        assert abs(delay(part[:16000], whole, round(start * RATE))) <= tolerance


@pytest.mark.parametrize("kind", VIDEO)
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (4.0, 5.0), (5.48, 6.2), (11.0, None)])
def test_frames_of_a_segment_are_those_that_begin_in_it(made: Callable[[str], Path], kind: str, start: float,
                                                        end: float | None) -> None:
    path = made(kind)
    late = int(kind in MPEG)  # their clocks may begin a frame after the container's
    images, indices, note = sample_frames(Segment(str(path), start, end), None, 224, 95)
    expected = [40 + i % 180 for i in range(round(start * FPS), round((end or SECONDS) * FPS))]
    assert note == "" and indices == list(range(len(images))) and abs(len(images) - len(expected)) <= late
    differences = [abs(found - wanted) for found, wanted in zip(brightness(images), expected, strict=False)]
    assert max(differences) <= 2 + late
    four, indices, _ = sample_frames(Segment(str(path), start, end), 4, 224, 95)
    assert len(four) == 4 and brightness(four) == [brightness(images)[i] for i in indices]
    stream = FrameStream(Segment(str(path), start, end), 5)
    seen = [round(float(image.mean())) for _, image in stream]
    assert len(seen) == stream.read == len(range(0, len(images), 5)) and stream.note == ""


def test_a_segment_late_in_a_long_file_is_found_by_seeking(made: Callable[[str], Path]) -> None:
    path = made("mp4")
    for kind in ("video", "audio"):
        with Reader(path, kind) as reader:
            every = sum(1 for _ in reader.packets())
        with Reader(Segment(str(path), 10.0, 10.5), kind) as reader:
            assert sum(1 for _ in reader.packets()) < every / 4
            assert reader.damaged == 0 and reader.seconds == pytest.approx(0.5, abs=0.05)
            assert reader.declared_seconds == 0.5


def test_a_segment_of_nothing_says_why(made: Callable[[str], Path]) -> None:
    path = made("mp4")
    for read in (lambda clip: load_audio(clip, RATE), lambda clip: sample_frames(clip, 4, 224, 90)):
        with pytest.raises(Skip, match=r"the segment begins at 20 s, where 12\.\d s of (audio|video) have ended"):
            read(Segment(str(path), 20.0, 21.0))
    with pytest.raises(Skip, match="no frame can be decoded"):
        sample_frames(Segment(str(path), 1.001, 1.002), 4, 224, 90)
    samples, note = load_audio(Segment(str(path), 11.0, 99.0), RATE)  # the stage corpus has warned of it
    assert note == "" and len(samples) == pytest.approx(RATE, rel=0.06)


def test_openface_reads_no_segments() -> None:
    faces = Faces(detector="openface", openface_binary="x", stride=1, detect_every=1, size=128, min_confidence=0.5,
                  quality=95)
    with pytest.raises(PipelineError, match="faces.detector: found openface, which reads whole files"):
        _faces_row("a", Segment("a.mp4", 1.0, 2.0), faces, 10.0)


def test_a_manifests_clips_are_files_or_segments() -> None:
    clip = Clip("a", "s/a.wav", "test", "", "", "", 1.0, 1, "00")
    assert source_of(clip, Path("corpus")) == "corpus/s/a.wav"
    for start, end, expected in ((1.5, None, (1.5, None)), (None, 2.0, (0.0, 2.0)), (1.0, 2.0, (1.0, 2.0))):
        part = Clip("a", "s/a.wav", "test", "", "", "", 1.0, 1, "00", start, end)
        assert source_of(part, Path("corpus")) == Segment("corpus/s/a.wav", *expected)
