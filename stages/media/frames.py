"""Frames of a clip: a uniform sample as JPEG for the store, or every n-th as arrays for the detector."""

from collections.abc import Callable, Iterator
from functools import partial

import cv2
import numpy as np
from av.video.frame import VideoFrame

from stages.engine.errors import Skip
from stages.engine.manifest import Source
from stages.engine.params import Params
from stages.engine.store import Row
from stages.media.clip import Reader, damage_note


def frames_decoder(p: Params) -> Callable[[str, Source], Row]:
    """As the stage slice_frames and predict decode a clip's frames: JPEG, with their indices."""
    return partial(_frames_row, **p.frames.model_dump())


def _frames_row(clip_id: str, path: Source, per_clip: int | None, short_side: int, quality: int) -> Row:
    images, indices, note = sample_frames(path, per_clip, short_side, quality)
    return Row(clip_id, values=images, reason=note, items={"frame": indices})


def sample_frames(
    path: Source, per_clip: int | None, short_side: int, quality: int
) -> tuple[list[bytes], list[int], str]:
    """Uniformly sampled frames: (JPEG bytes each, their indices in order of presentation, a note).

    The clip is cut into per_clip segments of equal length and each gives its middle frame; None or
    more than the clip has gives every frame. Frames are upright (rotation metadata applied), and
    shrunk so that the short side is short_side; smaller ones are kept. Packets are counted first,
    which decodes nothing; then one decoding pass converts only the wanted frames and stops after the
    last. Should fewer frames decode than were counted, the choice is repeated over those that did.
    Skip: the file can't be opened, has no video stream, or no frame decodes.
    """
    with Reader(path, "video") as reader:
        count = sum(not packet.is_discard and reader.within(packet) for packet in reader.packets())
        note = damage_note(reader.seconds, reader.declared_seconds, reader.damaged)
    images, decoded, damaged = encode_chosen(path, segment_midpoints(count, per_clip), short_side, quality)
    if not images or len(images) < len(segment_midpoints(count, per_clip)):
        if not decoded:
            raise Skip(f"no frame can be decoded: {note or f'{count} packets read'}")
        note = f"damaged: {decoded} of {count} frames decoded"
        images, decoded, damaged = encode_chosen(path, segment_midpoints(decoded, per_clip), short_side, quality)
    return list(images.values()), list(images), note or damage_note(0, None, damaged)


def segment_midpoints(count: int, pieces: int | None) -> list[int]:
    """The middle index of each of `pieces` equal segments of range(count); all of it if it has no more."""
    if pieces is None or pieces >= count:
        return list(range(count))
    return [(2 * piece + 1) * count // (2 * pieces) for piece in range(pieces)]


def encode_chosen(
    path: Source, chosen: list[int], short_side: int, quality: int
) -> tuple[dict[int, bytes], int, int]:
    """Decode up to the last chosen frame: (JPEG by index, frames decoded, packets passed over)."""
    images: dict[int, bytes] = {}
    wanted, decoded = set(chosen), 0
    with Reader(path, "video") as reader:
        for frame in reader.frames():
            if decoded in wanted:
                images[decoded] = encode_jpeg(shrink(upright(frame), short_side), quality)
            decoded += 1
            if len(images) == len(wanted):
                break
        return images, decoded, reader.damaged


class FrameStream:
    """Every stride-th frame of a clip, one at a time, so that a long clip needs no more memory.

    Iterating yields (index, RGB uint8 (height, width, 3), upright). `note` is set when it is through;
    `read` counts the frames that were yielded. Skip as in sample_frames.
    """

    def __init__(self, path: Source, stride: int):
        self.path, self.stride = path, stride
        self.read, self.note = 0, ""

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        with Reader(self.path, "video") as reader:
            for index, frame in enumerate(reader.frames()):
                if index % self.stride == 0:
                    self.read += 1
                    yield index, upright(frame)
            self.note = damage_note(reader.seconds, reader.declared_seconds, reader.damaged)
        if not self.read:
            raise Skip(f"no frame can be decoded: {self.note or 'the stream is empty'}")


def upright(frame: VideoFrame) -> np.ndarray:
    """RGB uint8 (height, width, 3) of any pixel format and depth, turned as the clip's metadata says."""
    image = frame.to_ndarray(format="rgb24", threads=1)
    quarter_turns = round(frame.rotation / 90) % 4  # counter-clockwise, as numpy turns
    return np.ascontiguousarray(np.rot90(image, quarter_turns)) if quarter_turns else image


def shrink(image: np.ndarray, short_side: int) -> np.ndarray:
    """The image with its short side at most short_side, averaged over the pixels that fall together."""
    height, width = image.shape[:2]
    scale = short_side / min(height, width)
    if scale >= 1:
        return image
    size = max(short_side, round(width * scale)), max(short_side, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """RGB uint8 (height, width, 3) to JPEG."""
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise Skip(f"a frame of {image.shape[1]}x{image.shape[0]} can't be stored as JPEG")
    return data.tobytes()
