"""What both face detectors share: which face is the main one, and how a crop is aligned.

A talking-face clip may show bystanders. The main face is the track with the most size over time, so
neither the face that is detected first nor one that is large for a moment wins.
"""

from dataclasses import dataclass

import cv2
import numpy as np

MIN_OVERLAP = 0.2  # intersection over union that continues a track; heads move between frames that are stride apart
MAX_SUPERSAMPLING = 16

# Left eye, right eye, nose, left and right mouth corner as seen in the image, in pixels of a 128 x 128
# crop: ArcFace's five points, with insightface's margins for this size. The crop then reaches from the
# forehead to below the chin, like OpenFace's -simalign -simsize 128.
TEMPLATE_SIZE = 128
TEMPLATE = np.array(
    [[46.2946, 51.6963], [81.5318, 51.5014], [64.0252, 71.7366], [49.5493, 92.3655], [78.7299, 92.2041]]
)


@dataclass(frozen=True)
class Face:
    """One detection, in pixels of the frame; pixel i covers [i, i + 1)."""

    box: np.ndarray  # (4,) float32: left, top, right, bottom
    landmarks: np.ndarray  # (5, 2) float32: x, y in the order of TEMPLATE
    confidence: float

    @property
    def size(self) -> float:
        """Side of the square of the box's area."""
        width, height = self.box[2:] - self.box[:2]
        return float(np.sqrt(max(width, 0.0) * max(height, 0.0)))


class Tracker:
    """Links the faces of successive frames by overlap and finds the main one.

    A track is never closed: a face that the detector loses and finds again at the same place goes on.
    """

    def __init__(self) -> None:
        self._boxes = np.zeros((0, 4), np.float32)  # of each track, where it was last seen
        self._weights: list[float] = []

    def update(self, faces: list[Face]) -> list[int]:
        """The track number of each of a frame's faces: best overlaps first, one face per track."""
        assigned: dict[int, int] = {}
        if faces:
            overlaps = overlap(np.stack([face.box for face in faces]), self._boxes)
            for flat in np.argsort(-overlaps, axis=None, kind="stable"):
                nearest, track = divmod(int(flat), len(self._boxes))
                if overlaps[nearest, track] < MIN_OVERLAP:
                    break
                if nearest not in assigned and track not in assigned.values():
                    assigned[nearest] = track
        for index, face in enumerate(faces):
            if index not in assigned:
                assigned[index] = len(self._weights)
                self._weights.append(0.0)
                self._boxes = np.vstack([self._boxes, face.box])
            track = assigned[index]
            self._boxes[track] = face.box
            self._weights[track] += face.size * face.confidence
        return [assigned[index] for index in range(len(faces))]

    @property
    def main(self) -> int | None:
        """The track whose size x confidence, summed over the clip, is largest; None if there is no face."""
        return int(np.argmax(self._weights)) if self._weights else None


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (n, 4) and (m, 4): (n, m)."""
    corner = np.maximum(a[:, None, :2], b[None, :, :2])
    opposite = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.prod(np.maximum(opposite - corner, 0), axis=-1)
    areas = [np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=-1) for boxes in (a, b)]
    return shared / np.maximum(areas[0][:, None] + areas[1][None, :] - shared, 1e-9)


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation, uniform scale and shift (2, 3) that brings points (n, 2) closest to target (n, 2).

    Least squares in closed form (Umeyama, 1991): with points as complex numbers it is a linear fit.
    The points must not all coincide.
    """
    z, w = source @ (1, 1j), target @ (1, 1j)
    centred = z - z.mean()
    turn = np.vdot(centred, w - w.mean()) / np.vdot(centred, centred).real
    shift = w.mean() - turn * z.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def align(image: np.ndarray, landmarks: np.ndarray, size: int, spacing: float = 1.0) -> np.ndarray:
    """The face upright and centred: RGB uint8 (size, size, 3), landmarks on TEMPLATE by a similarity.

    A face larger than the crop is drawn several times finer and averaged down, so that nothing
    aliases: with samples at most `spacing` pixels of the frame apart. Outside the frame its border is continued.
    """
    fit = similarity(np.asarray(landmarks, np.float64), TEMPLATE * (size / TEMPLATE_SIZE))
    scale = np.hypot(fit[0, 0], fit[1, 0])
    finer = int(np.clip(np.ceil(1 / (scale * spacing)), 1, MAX_SUPERSAMPLING))
    # pixel centres lie at + 0.5; OpenCV counts from them
    warp = fit * finer
    warp[:, 2] += warp[:, :2] @ (0.5, 0.5) - 0.5
    crop = cv2.warpAffine(
        image, warp, (size * finer, size * finer), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return crop if finer == 1 else cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)
