"""Decoding: every odd clip gives samples and frames, or a reason; nothing crashes, and every loss is reported."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from stages.corpora.demo.portraits import faces
from stages.engine.errors import Skip
from stages.media import centerface
from stages.media.audio import load_audio
from stages.media.faces import Face, Tracker, align
from stages.media.frames import FrameStream, sample_frames, segment_midpoints


def sound(path: Path, samples: np.ndarray, rate: int, codec: str = "pcm_s16le", layout: str = "mono") -> Path:
    """Write (channels, n) float samples in -1..1."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        name = {"pcm_s16le": "s16", "pcm_f32le": "flt", "aac": "fltp"}[codec]
        data = (samples * 32767).astype(np.int16) if name == "s16" else samples.astype(np.float32)
        data = data if name.endswith("p") else data.T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(data), format=name, layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def video(path: Path, count: int, size: tuple[int, int] = (64, 48), codec: str = "libx264", pix_fmt: str = "yuv420p",
          pts: list[int] | None = None) -> Path:
    """Frames whose brightness is their number, so that a test can tell them apart."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.options = {"crf": "10"} if codec == "libx264" else {}
        for i in range(count):
            image = np.full((size[1], size[0], 3), min(255, 20 + 4 * i), np.uint8)
            image[: size[1] // 4, : size[0] // 4] = 255
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = (pts[i] if pts else i), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def tone(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    return np.tile(0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate), (channels, 1))


@pytest.mark.parametrize(
    ("rate", "codec", "layout", "name"),
    [
        (8000, "pcm_s16le", "mono", "8k.wav"),
        (44100, "pcm_s16le", "stereo", "stereo.wav"),
        (48000, "pcm_f32le", "mono", "float.wav"),
        (22050, "aac", "mono", "aac.mp4"),
        (48000, "pcm_s16le", "5.1", "surround.wav"),
    ],
)
def test_any_rate_layout_and_format_becomes_mono_pcm(
    tmp_path: Path, rate: int, codec: str, layout: str, name: str
) -> None:
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    samples, note = load_audio(sound(tmp_path / name, tone(1.0, rate, channels), rate, codec, layout), 24000)
    assert samples.dtype == np.int16 and samples.ndim == 1 and note == ""
    assert abs(len(samples) - 24000) < 0.1 * 24000
    spectrum = np.abs(np.fft.rfft(samples[:24000].astype(float)))
    assert abs(np.argmax(spectrum) * 24000 / min(len(samples), 24000) - 440) < 5
    assert samples.std() > 2000


def test_ten_milliseconds_and_silence(tmp_path: Path) -> None:
    short, _ = load_audio(sound(tmp_path / "short.wav", tone(0.01, 16000), 16000), 24000)
    assert 100 < len(short) < 400
    with pytest.raises(Skip, match="digital silence: every sample is zero"):
        load_audio(sound(tmp_path / "silent.wav", np.zeros((1, 16000)), 16000), 24000)


def test_what_is_no_media_is_a_skip(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("this is a text file\n" * 100)
    (tmp_path / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:10,\n/etc/passwd\n")
    readers = (lambda path: load_audio(path, 24000), lambda path: sample_frames(path, 4, 224, 90))
    for read in readers:
        for path in tmp_path.iterdir():
            with pytest.raises(Skip):
                read(path)
        with pytest.raises(FileNotFoundError, match=r"missing\.mp4"):  # the machine's fault: a folder not mounted, say
            read(tmp_path / "missing.mp4")
    video(tmp_path / "mute.mp4", 5)
    with pytest.raises(Skip, match="no audio stream"):
        load_audio(tmp_path / "mute.mp4", 24000)
    sound(tmp_path / "blind.wav", tone(1, 16000), 16000)
    with pytest.raises(Skip, match="no video stream"):
        sample_frames(tmp_path / "blind.wav", 4, 224, 90)


def brightness(jpeg: bytes) -> float:
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE)
    return float(image[image.shape[0] // 2 :].mean())


def test_frames_are_the_middles_of_equal_segments(tmp_path: Path) -> None:
    images, indices, note = sample_frames(video(tmp_path / "v.mp4", 40), 4, 224, 95)
    assert indices == [5, 15, 25, 35] == segment_midpoints(40, 4) and note == ""
    assert np.abs([brightness(j) - (20 + 4 * i) for j, i in zip(images, indices, strict=True)]).max() < 4
    every, indices, _ = sample_frames(tmp_path / "v.mp4", None, 224, 95)
    assert len(every) == 40 and indices == list(range(40))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("one.mp4", {"count": 1}),
        ("odd.mkv", {"count": 6, "size": (63, 47), "codec": "ffv1", "pix_fmt": "yuv444p"}),
        ("422.mkv", {"count": 6, "codec": "ffv1", "pix_fmt": "yuv422p"}),
        ("10bit.mkv", {"count": 6, "codec": "ffv1", "pix_fmt": "yuv420p10le"}),
        ("vfr.mp4", {"count": 6, "pts": [0, 1, 2, 10, 11, 40]}),
        ("v.avi", {"count": 6, "codec": "mpeg4"}),
        ("v.webm", {"count": 6, "codec": "libvpx-vp9"}),
        ("V.MOV", {"count": 6}),
    ],
)
def test_odd_videos_give_their_frames(tmp_path: Path, name: str, options: dict) -> None:
    images, indices, _ = sample_frames(video(tmp_path / name, **options), 4, 224, 95)
    expected = segment_midpoints(options["count"], 4)
    assert indices == expected and len(images) == len(expected)
    assert np.abs([brightness(j) - (20 + 4 * i) for j, i in zip(images, indices, strict=True)]).max() < 8


@pytest.mark.parametrize(
    ("matrix", "corner"),  # of QuickTime's track header: a, b, c, d; where the top left corner is shown
    [((0, 1, -1, 0), (0, 1)), ((-1, 0, 0, -1), (1, 1)), ((0, -1, 1, 0), (1, 0)), ((1, 0, 0, 1), (0, 0))],
)
def test_a_rotated_clip_is_turned_upright(
    tmp_path: Path, matrix: tuple[int, int, int, int], corner: tuple[int, int]
) -> None:
    path = video(tmp_path / "v.mp4", 5, (96, 64))
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # version and flags, times, track, layer, volume
    assert content[at : at + 4] == b"\x00\x01\x00\x00"
    a, b, c, d = (struct.pack(">i", value << 16) for value in matrix)
    content[at : at + 36] = a + b + bytes(4) + c + d + bytes(4) + bytes(8) + struct.pack(">i", 1 << 30)
    path.write_bytes(content)
    images, _, _ = sample_frames(path, 1, 224, 95)
    for image in (cv2.imdecode(np.frombuffer(images[0], np.uint8), cv2.IMREAD_GRAYSCALE),
                  cv2.cvtColor(next(iter(FrameStream(path, 1)))[1], cv2.COLOR_RGB2GRAY)):
        assert image.shape == ((96, 64) if matrix[0] == 0 else (64, 96))
        rows, columns = np.nonzero(image > 200)
        assert (rows.mean() > image.shape[0] / 2, columns.mean() > image.shape[1] / 2) == corner


def test_large_frames_are_shrunk_and_small_ones_kept(tmp_path: Path) -> None:
    for size, expected in (((640, 480), (224, 299)), ((64, 48), (48, 64))):
        images, _, _ = sample_frames(video(tmp_path / f"{size[0]}.mp4", 3, size), 1, 224, 95)
        shape = cv2.imdecode(np.frombuffer(images[0], np.uint8), cv2.IMREAD_COLOR).shape[:2]
        assert np.abs(np.subtract(shape, expected)).max() <= 1


def test_a_truncated_clip_gives_what_it_has_and_says_so(tmp_path: Path) -> None:
    whole = video(tmp_path / "whole.mkv", 50, (320, 240), "mpeg4")
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    images, indices, _ = sample_frames(cut, 4, 224, 90)
    assert len(images) == 4 and max(indices) < 45


def portrait(emotion: str = "happiness") -> np.ndarray:
    return np.ascontiguousarray(faces(0, emotion)[-1, 0, ..., :3])


def test_the_main_face_is_cropped_upright_and_centred() -> None:
    frames = [(3, portrait()), (9, portrait("anger"))]
    crops, indices, confidences = centerface.crop_faces(centerface.search(frames, 0.5), 128, 95)
    assert indices == [3, 9] and min(confidences) > 0.5
    for crop in crops:
        image = cv2.imdecode(np.frombuffer(crop, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert image.shape == (128, 128, 3)
        assert image[55:100, 40:90, 0].mean() > image[55:100, 40:90, 2].mean() + 15  # skin


def test_no_face_is_no_crop() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3)).astype(np.uint8)
    assert centerface.crop_faces(centerface.search([(0, noise)], 0.5), 128, 95) == ([], [], [])


def test_the_main_face_is_the_one_that_lasts_not_the_one_that_comes_first() -> None:
    def face(x: float, side: float) -> Face:
        return Face(np.array([x, 0, x + side, side], np.float32), np.zeros((5, 2), np.float32), 0.9)

    tracker = Tracker()
    tracks = [tracker.update(found) for found in (
        [face(0, 20)], [face(200, 30), face(2, 20)], [face(3, 20), face(202, 30)], [face(204, 30)], [face(207, 31)])]
    assert tracker.main == tracks[1][0] == tracks[2][1] == tracks[4][0] != tracks[0][0]


def test_the_speaker_is_followed_although_a_bystander_is_seen_first(tmp_path: Path) -> None:
    speaker, bystander = portrait(), cv2.resize(portrait("anger"), (160, 120), interpolation=cv2.INTER_AREA)
    frames = []
    for i in range(6):
        image = np.full((240, 560, 3), 90, np.uint8)
        image[60:180, 10:170] = bystander
        if i >= 2:
            image[:, 200 + 4 * i : 520 + 4 * i] = speaker  # and moves
        frames.append((i, image))
    detector = centerface.load_detector()
    assert [len(faces) for faces in detector.detect([image for _, image in frames], 0.5)] == [1, 1, 2, 2, 2, 2]
    crops, indices, _ = centerface.crop_faces(centerface.search(frames, 0.5), 128, 95)
    assert indices == [2, 3, 4, 5]
    [alone], _, _ = centerface.crop_faces(centerface.search([(0, speaker)], 0.5), 128, 95)
    for crop in crops:
        ours, expected = (cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE) for jpeg in (crop, alone))
        assert np.abs(ours[20:108, 30:98].astype(int) - expected[20:108, 30:98]).mean() < 12


def test_alignment_puts_the_eyes_where_they_belong() -> None:
    image = np.zeros((200, 300, 3), np.uint8)
    landmarks = np.array([[100, 80], [150, 90], [120, 110], [98, 135], [140, 143]], np.float32)
    for x, y in landmarks[:2]:
        cv2.circle(image, (int(x), int(y)), 5, (255, 255, 255), -1)
    crop = align(image, landmarks, 128)[..., 0].astype(float)
    left, right = crop[:, :64], crop[:, 64:]
    centre = [np.average(np.indices(half.shape)[1], weights=half + 1e-9) for half in (left, right)]
    height = [np.average(np.indices(half.shape)[0], weights=half + 1e-9) for half in (left, right)]
    assert abs(height[0] - height[1]) < 4 and abs(centre[0] - 46) < 5 and abs(centre[1] + 64 - 81) < 5
