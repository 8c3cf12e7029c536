"""What is said of a clip's sound: nothing of whole files, whatever their header says; why there is none."""

import wave
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from stages.engine.errors import Skip
from stages.engine.manifest import Segment
from stages.media.audio import load_audio
from stages.media.clip import probe_duration

RATE = 44100
SECONDS = 8
rng = np.random.default_rng(0)
LATE = np.concatenate([np.zeros(4 * RATE), 0.4 * rng.normal(size=4 * RATE).clip(-1, 1)])  # few bits, then many


def encode(path: Path, codec: str, container: str, samples: np.ndarray, start: int = 0, **options: str) -> Path:
    """Mono samples at RATE; start in samples on the container's clock."""
    with av.open(str(path), "w", format=container, options=options) as file:
        stream = file.add_stream(codec, rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples.astype(np.float32)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = RATE, start
        resampler = av.AudioResampler(stream.format, stream.layout, RATE, frame_size=stream.frame_size or None)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return path


def unknown_flac(folder: Path) -> Path:
    """As an encoder that writes to a pipe leaves it: STREAMINFO without the number of samples."""
    path = encode(folder / "a.flac", "flac", "flac", LATE)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    return path


def joined(folder: Path, start: int) -> Path:
    """Two MPEG-TS recordings in one file, the second one's clock beginning at `start`."""
    half = LATE[: 4 * RATE]
    first = encode(folder / "1.ts", "aac", "mpegts", half)
    second = encode(folder / "2.ts", "aac", "mpegts", half + 0.1 * np.sin(np.arange(len(half))), start)
    path = folder / "joined.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    return path


NO_XING = {"write_xing": "0", "id3v2_version": "0"}
WHOLE: dict[str, Callable[[Path], Path]] = {
    "MP3 without a count, quiet first": lambda f: encode(f / "a.mp3", "libmp3lame", "mp3", LATE, **NO_XING),
    "MP3 without a count, loud first": lambda f: encode(f / "a.mp3", "libmp3lame", "mp3", LATE[::-1], **NO_XING),
    "MP3 with a count": lambda f: encode(f / "a.mp3", "libmp3lame", "mp3", LATE),
    "raw AAC, quiet first": lambda f: encode(f / "a.aac", "aac", "adts", LATE),
    "raw AAC, loud first": lambda f: encode(f / "a.aac", "aac", "adts", LATE[::-1]),
    "FLAC from a pipe": unknown_flac,
    "MPEG-TS": lambda f: encode(f / "a.ts", "aac", "mpegts", LATE),
    "MPEG-TS whose clock goes back": lambda f: joined(f, 0),
    "MPEG-TS whose clock jumps ahead": lambda f: joined(f, 90000 * RATE),
    "Matroska": lambda f: encode(f / "a.mka", "aac", "matroska", LATE),
    "MP4": lambda f: encode(f / "a.m4a", "aac", "mp4", LATE),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_files_get_no_note(kind: str, tmp_path: Path) -> None:
    samples, note = load_audio(WHOLE[kind](tmp_path), 24000)
    assert note == "" and len(samples) / 24000 == pytest.approx(SECONDS, abs=0.2)


@pytest.mark.parametrize(("name", "codec", "container"), [
    ("a.mp3", "libmp3lame", "mp3"), ("a.m4a", "aac", "mp4"), ("a.flac", "flac", "flac"), ("a.mka", "aac", "matroska"),
])
def test_a_stated_length_tells_what_is_cut_off(name: str, codec: str, container: str, tmp_path: Path) -> None:
    options = {"movflags": "faststart"} if container == "mp4" else {}
    path = encode(tmp_path / name, codec, container, LATE, **options)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    assert load_audio(path, 24000)[1].startswith(("truncated", "damaged"))


def test_a_guessed_length_refuses_no_segment(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.aac", "aac", "adts", LATE[::-1] + 0.01 * np.sin(np.arange(len(LATE)) / 9))
    assert probe_duration(path) is None
    samples, note = load_audio(Segment(str(path), 6.0, 7.0), 24000)
    assert note == "" and len(samples) == pytest.approx(24000, rel=0.05)


@pytest.mark.parametrize(("name", "codec", "container"), [
    ("a.aiff", "pcm_s16be", "aiff"), ("a.caf", "pcm_s16le", "caf"), ("a.au", "pcm_s16be", "au"),
    ("a.wv", "wavpack", "wv"), ("a.ac3", "ac3", "ac3"), ("a.w64", "pcm_s16le", "w64"),
])
def test_containers_that_are_not_allowed_are_named(name: str, codec: str, container: str, tmp_path: Path) -> None:
    path = encode(tmp_path / name, codec, container, LATE[-RATE:])
    for disguised in (path, path.rename(tmp_path / "a.mp4")):
        if disguised.exists():
            with pytest.raises(Skip, match=rf"its container \({container}\) is not allowed; convert it"):
                load_audio(disguised, 24000)


def test_a_playlist_is_not_allowed_and_not_followed(tmp_path: Path) -> None:
    encode(tmp_path / "a.ts", "aac", "mpegts", LATE)
    (tmp_path / "a.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:8,\na.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(Skip, match=r"its container \(hls\) is not allowed"):
        load_audio(tmp_path / "a.m3u8", 24000)


def stereo(path: Path, left: np.ndarray, right: np.ndarray, width: int = 2) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(16000)
        both = np.stack([left, right], 1)
        file.writeframes((both.astype("<i2") if width == 2 else (both / 256 + 128).astype(np.uint8)).tobytes())
    return path


TONE = 9000 * np.sin(np.arange(16000) / 10)
OTHER = 9000 * np.sin(np.arange(16000) / 7)


@pytest.mark.parametrize(("left", "right", "note"), [
    (TONE, TONE, ""),
    (TONE, 0 * TONE, ""),
    (TONE, OTHER, ""),
    (TONE, -0.5 * TONE, ""),
    (TONE, -0.95 * TONE, r"channels in opposite phase: mixing them leaves 0\.\d % of the sound"),
    (TONE + 100 * np.sign(OTHER), -TONE, "channels in opposite phase"),
])
@pytest.mark.parametrize("width", [1, 2])
def test_channels_in_opposite_phase_are_noted(left: np.ndarray, right: np.ndarray, note: str, width: int,
                                              tmp_path: Path) -> None:
    import re

    found = load_audio(stereo(tmp_path / "a.wav", left, right, width), 24000)[1]
    assert re.match(note, found) if note else not found


@pytest.mark.parametrize(("left", "right", "reason"), [
    (0 * TONE, 0 * TONE, "digital silence: every sample is zero$"),
    (TONE, -TONE, r"digital silence: every sample is zero \(channels in opposite phase"),
])
def test_sound_of_nothing_but_zeros_is_absent(left: np.ndarray, right: np.ndarray, reason: str, tmp_path: Path) -> None:
    with pytest.raises(Skip, match=reason):
        load_audio(stereo(tmp_path / "a.wav", left.round(), right.round()), 24000)


def test_a_silent_segment_of_a_file_is_absent(tmp_path: Path) -> None:
    path = stereo(tmp_path / "a.wav", np.concatenate([TONE, 0 * TONE]), np.concatenate([TONE, 0 * TONE]))
    assert load_audio(Segment(str(path), 0.0, 1.0), 16000)[0].any()
    with pytest.raises(Skip, match="digital silence"):
        load_audio(Segment(str(path), 1.2, 1.9), 16000)


def test_one_quiet_sample_is_sound(tmp_path: Path) -> None:
    spike = np.zeros(16000)
    spike[8000] = 300
    assert load_audio(stereo(tmp_path / "a.wav", spike, spike), 16000)[1] == ""
