"""Faces followed from frame to frame between detections: sparse optical flow, checked at both ends.

Detection on every frame is most of what a clip's faces cost. Here the network sees a frame now and then. Between two
detections the landmarks of the first are moved on by pyramidal Lucas-Kanade (Bouguet, 2001; calcOpticalFlowPyrLK of
OpenCV), frame by frame, as a similarity fitted to points around them; what they are off on arrival at the second
detection is spread evenly over the way there. Where the flow is unsure, or its end and the second detection disagree,
the frame in the middle is detected and both halves are tried. So cuts, faces that come and go, and faces behind hands
are detected down to the single frame.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from stages.media.faces import Face, similarity

FLOW_SIDE = 240  # the short side that the flow needs; frames are thinned out by whole factors to no less
WINDOW, LEVELS = (15, 15), 3  # of the flow, pixels; levels above the first
STEPS = cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 20, 0.02  # iterations, pixels
# around each landmark, in distances between the eyes
PATTERN = 0.12 * np.array([[0, 0], [-1, -1], [1, -1], [-1, 1], [1, 1]])
TINY = 2.0  # eye distance in pixels of the flow below which nothing is followed
MARGIN = 1.0  # around the points, where the flow looks for them: eye distances
RETURN = 0.03, 0.1  # how far from its start a point may end that is followed there and back: eye distances + pixels
LEAST = 0.4  # share of the points that must come back
DISAGREEMENT = 0.1  # eye distances between a landmark followed and detected, mean of the five
MINOR = 0.25  # a face smaller than this share of the largest may come and go between two detections
PROFILE = 0.865  # eye distance of a frontal face in distances from eyes to mouth (faces.TEMPLATE)

Detect = Callable[[np.ndarray], list[Face]]


@dataclass
class Frame:
    """index and image (h, w, 3) uint8 RGB as read; faces once they are found."""

    index: int
    image: np.ndarray
    faces: list[Face] | None = None

    @property
    def factor(self) -> int:
        return max(1, min(self.image.shape[:2]) // FLOW_SIDE)

    @cached_property
    def grey(self) -> np.ndarray:
        """uint8 (h, w): green of every factor-th pixel: the flow is no worse than on means, at a tenth of the cost."""
        return np.ascontiguousarray(self.image[:: self.factor, :: self.factor, 1])


def find_faces(
    frames: Iterable[tuple[int, np.ndarray]], every: int, max_bytes: int, detect: Detect
) -> Iterator[tuple[int, np.ndarray, list[Face]]]:
    """Each (index, image) with its faces: of the network on at least every every-th, followed in between.

    At most every + 1 frames are held, fewer where they pass max_bytes.
    """
    held: list[Frame] = []
    for index, image in frames:
        if held and held[0].image.shape != image.shape:
            yield from complete(held, detect)
            held = []
        held.append(Frame(index, image))
        if len(held) > every or len(held) > 1 and len(held) * image.nbytes >= max_bytes:
            yield from complete(held, detect)[:-1]
            held = held[-1:]
    yield from complete(held, detect)


def complete(held: list[Frame], detect: Detect) -> list[tuple[int, np.ndarray, list[Face]]]:
    """The frames with their faces."""
    if held:
        fill(held, detect)
    return [(frame.index, frame.image, frame.faces or []) for frame in held]


def fill(held: list[Frame], detect: Detect) -> None:
    """Find the faces of the first frame and the last, and of those between by following or, if unsure, by halves."""
    for end in (held[0], held[-1]):
        if end.faces is None:
            end.faces = detect(end.image)
    if len(held) < 3:
        return
    between = followed(held)
    if between is None:
        middle = len(held) // 2
        fill(held[: middle + 1], detect)
        fill(held[middle:], detect)
        return
    for frame, faces in zip(held[1:-1], between, strict=True):
        frame.faces = faces


def followed(held: list[Frame]) -> list[list[Face]] | None:
    """The faces of each frame between the first and the last, largest first; None where following is unsure.

    A followed face has the lower confidence of the two detections: the network has not seen it there.
    """
    first, last = held[0].faces or [], held[-1].faces or []
    least = MINOR * max((face.size for face in first + last), default=0.0)
    open_ends = list(last)
    pairs: list[tuple[Face, Face, np.ndarray]] = []
    for face in first:
        path = follow(face.landmarks, held) if open_ends else None
        gaps = [] if path is None else [np.linalg.norm(path[-1] - e.landmarks, axis=1).mean() for e in open_ends]
        if path is not None and min(gaps) <= DISAGREEMENT * eye_distance(face.landmarks):
            pairs.append((face, open_ends.pop(int(np.argmin(gaps))), path))
        elif face.size >= least:
            return None
    if any(face.size >= least for face in open_ends):
        return None
    steps = len(held) - 1
    found: list[list[Face]] = [[] for _ in range(steps - 1)]
    for start, end, path in pairs:
        for k in range(1, steps):
            share = k / steps
            landmarks = path[k] + share * (end.landmarks - path[-1])
            around = [face.box - np.tile(face.landmarks.mean(axis=0), 2) for face in (start, end)]
            box = np.tile(landmarks.mean(axis=0), 2) + (1 - share) * around[0] + share * around[1]
            found[k - 1].append(Face(box.astype(np.float32), landmarks.astype(np.float32),
                                     min(start.confidence, end.confidence)))
    return [sorted(faces, key=lambda face: -face.size) for faces in found]


def follow(landmarks: np.ndarray, held: list[Frame]) -> np.ndarray | None:
    """Landmarks (5, 2) of the first frame in every frame: (frames, 5, 2), pixels; None where the flow loses them."""
    factor = held[0].factor
    path = [landmarks.astype(np.float64) / factor]
    for before, after in zip(held, held[1:], strict=False):
        moved = step(path[-1], before.grey, after.grey)
        if moved is None:
            return None
        path.append(moved)
    return np.stack(path) * factor


def step(landmarks: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray | None:
    """Landmarks one frame on, by the similarity of the points around them that come back to their start."""
    unit = eye_distance(landmarks)
    if unit < TINY:
        return None
    points = (landmarks[:, None] + unit * PATTERN).reshape(-1, 2).astype(np.float32)
    start = np.maximum(np.floor(points.min(axis=0) - MARGIN * unit), 0).astype(int)
    stop = np.maximum(np.ceil(points.max(axis=0) + MARGIN * unit).astype(int), start)
    before, after = (image[start[1] : stop[1], start[0] : stop[0]] for image in (before, after))
    if min(before.shape) < WINDOW[0]:  # it has left the frame
        return None
    points -= start
    there, seen = flow(before, after, points)
    back, seen_again = flow(after, before, there)
    kept = seen & seen_again & (np.linalg.norm(back - points, axis=1) <= RETURN[0] * unit + RETURN[1])
    if kept.mean() < LEAST:
        return None
    source, target = points + start, there.astype(np.float64) + start
    fit = similarity(source[kept], target[kept])
    off = np.linalg.norm(source @ fit[:, :2].T + fit[:, 2] - target, axis=1)
    kept &= off <= 2 * np.median(off[kept])  # a mouth that opens, a hair that falls: not the head's movement
    fit = similarity(source[kept], target[kept])
    return landmarks @ fit[:, :2].T + fit[:, 2]


def flow(before: np.ndarray, after: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where points (n, 2) float32 of one grey image are in the other, and which of them were found."""
    moved, found, _ = cv2.calcOpticalFlowPyrLK(
        before, after, points, np.empty_like(points), winSize=WINDOW, maxLevel=LEVELS, criteria=STEPS)
    return moved, found.ravel().astype(bool)


def eye_distance(landmarks: np.ndarray) -> float:
    """Between the eyes, or what it would be from the front where the head is turned away."""
    across = np.linalg.norm(landmarks[1] - landmarks[0])
    down = np.linalg.norm(landmarks[3:].mean(axis=0) - landmarks[:2].mean(axis=0))
    return max(float(across), PROFILE * float(down), 1e-3)
