"""Broken clips made from good ones: as they occur among 120,000 downloaded videos."""

import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np

from stages.corpora.demo.portraits import faces
from stages.corpora.demo.video import write_clip

RATE = 16000
CODECS = {
    ".mp4": ("libx264", "aac"),
    ".mov": ("libx264", "aac"),
    ".mkv": ("libx264", "flac"),
    ".webm": ("libvpx", "libopus"),
    ".avi": ("mpeg4", "pcm_s16le"),
}


def pictures(count: int, size: tuple[int, int] = (320, 240)) -> Iterator[np.ndarray]:
    """Frames RGB uint8 of a talking face, `size` = width, height."""
    import cv2

    mouths = [np.ascontiguousarray(image[..., :3]) for image in faces(0, "happiness")[-1]]
    scaled = [cv2.resize(image, size) for image in mouths]
    return (scaled[i % len(scaled)] for i in range(count))


def hum(seconds: float) -> np.ndarray:
    """float32 (n,) at RATE."""
    return (0.3 * np.sin(2 * np.pi * 300 * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def clip(path: Path, count: int = 15, seconds: float = 0.6, size: tuple[int, int] = (320, 240),
         fps: Fraction | int = 25, gop: int = 12) -> None:
    """A whole clip in the container that the name says, of `count` frames and `seconds` of sound."""
    with av.open(str(path), "w") as container:
        codecs = CODECS[path.suffix]
        video = container.add_stream(codecs[0], rate=Fraction(fps))
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        if codecs[0] == "libx264":
            video.options = {"preset": "ultrafast", "g": str(gop)}
        audio = container.add_stream(codecs[1], rate=48000 if codecs[1] == "libopus" else RATE, layout="mono")
        resampler = av.AudioResampler(audio.format, "mono", audio.rate)
        wave = hum(seconds)
        per_second = max(1, round(count / max(seconds, 0.04)))
        frames = pictures(count, size)
        for start in range(0, max(len(wave), 1), RATE):  # a second at a time, interleaved
            for picture in islice(frames, per_second):
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            sound = av.AudioFrame.from_ndarray(wave[None, start : start + RATE], format="flt", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = RATE, start, Fraction(1, RATE)
            if sound.samples:
                for piece in resampler.resample(sound):
                    container.mux(audio.encode(piece))
        for picture in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))


def truncated(good: Path, folder: Path, count: int) -> None:
    """Cut at evenly spread places, the first and the last byte among them."""
    content = good.read_bytes()
    for i, size in enumerate(np.linspace(1, len(content) - 1, count).astype(int)):
        (folder / f"cut-{good.suffix[1:]}-{i:02d}{good.suffix}").write_bytes(content[:size])


def flipped(good: Path, folder: Path, count: int, seed: int) -> None:
    """One to sixteen bytes each, half of the clips only in the first kilobyte, where the headers are."""
    content = good.read_bytes()
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        damaged = bytearray(content)
        reach = len(content) if i % 2 else min(1024, len(content))
        for offset in rng.integers(0, reach, 1 + i % 16):
            damaged[offset] ^= int(rng.integers(1, 256))
        (folder / f"flip-{good.suffix[1:]}-{i:03d}{good.suffix}").write_bytes(bytes(damaged))


ODD: dict[str, Callable[[Path], object]] = {
    "empty.mp4": lambda path: path.touch(),
    "text.mp4": lambda path: path.write_text("name,discrete\nclip,happy\n" * 500),
    "zeros.mp4": lambda path: path.write_bytes(bytes(100_000)),
    "noise.mp4": lambda path: path.write_bytes(np.random.default_rng(0).bytes(100_000)),
    "playlist.mp4": lambda path: path.write_text("#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n"),
    "concat.mp4": lambda path: path.write_text("ffconcat version 1.0\nfile /etc/passwd\n"),
    "image.mp4": lambda path: path.write_bytes(jpeg()),
    "no audio.mp4": lambda path: write_clip(path, list(pictures(10)), None, RATE),
    "no video.mp4": lambda path: write_clip(path, [], hum(1), RATE),
    "audio longer.mp4": lambda path: clip(path, 5, 3.0),
    "video longer.mp4": lambda path: clip(path, 50, 0.1),
    "one frame.mp4": lambda path: clip(path, 1, 0.3),
    "one sample.mp4": lambda path: clip(path, 5, 1 / RATE),
    "100x100.mp4": lambda path: clip(path, 5, 0.2, (100, 100)),
    "16x16.mp4": lambda path: clip(path, 5, 0.2, (16, 16)),
    "4k.mp4": lambda path: clip(path, 3, 0.2, (3840, 2160)),
    "wide.mp4": lambda path: clip(path, 3, 0.2, (4096, 64)),
    "strip.mp4": lambda path: clip(path, 3, 0.2, (320, 9968)),  # what one flipped byte made of 320x240
    "1 fps.mp4": lambda path: clip(path, 3, 3.0, fps=1),
    "120 fps.mp4": lambda path: clip(path, 60, 0.5, fps=120),
    "ntsc.mp4": lambda path: clip(path, 15, 0.5, fps=Fraction(30000, 1001)),
    "ten minutes.mkv": lambda path: clip(path, 600, 600.0, (64, 48), fps=1, gop=60),
}


def jpeg() -> bytes:
    import cv2

    return cv2.imencode(".jpg", next(pictures(1)))[1].tobytes()


def make_broken(folder: Path, flips: int, cuts: int, seed: int) -> list[Path]:
    """Write all of it; returns the files, sorted. `flips` and `cuts` are counts per container."""
    folder.mkdir(parents=True)
    for suffix in (".mp4", ".mkv", ".webm", ".avi", ".mov"):
        good = folder / f"good{suffix}"
        if suffix == ".mp4":  # with its index first, so that not every cut loses everything
            write_clip(good, list(pictures(15)), hum(0.6), RATE)
        else:
            clip(good)
        truncated(good, folder, cuts)
        flipped(good, folder, flips, seed)
    shutil.copyfile(folder / "good.mkv", folder / "wrong extension.mp4")
    for name, make in ODD.items():
        make(folder / name)
    return sorted(folder.iterdir())
