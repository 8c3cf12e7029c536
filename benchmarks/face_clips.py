"""Drawn clips of faces that move, turn, are partly hidden, cross or cut, for the measurement of their detection.

The demo's warped portraits, placed by a perspective per frame into a scene of any size, with noise of a camera.
"""

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import cv2
import numpy as np

from stages.corpora.demo import portraits
from stages.corpora.demo.video import FPS, write_clip

WIDTH, HEIGHT = 960, 720
FACE = 320, 240  # of a drawn portrait, pixels
SENSOR_NOISE = 1.5  # deviation, grey levels


@dataclass(frozen=True)
class Pose:
    """Of one face in one frame. x, y: the middle of the portrait in shares of the scene; eyes: the distance between
    them in shares of the scene's height; roll and yaw in degrees."""

    x: float = 0.5
    y: float = 0.5
    eyes: float = 0.16
    roll: float = 0.0
    yaw: float = 0.0


@dataclass(frozen=True)
class Shown:
    """One face in one frame."""

    portrait: int
    emotion: str
    pose: Pose


@dataclass(frozen=True)
class Kind:
    """faces(t): those shown at t seconds, far ones first. hide(t): where an arm (x, y in shares of the first face's
    eye distance from its middle) lies before it, or None. blur: share of a frame's time that the shutter is open."""

    faces: Callable[[float], list[Shown]]
    hide: Callable[[float], tuple[float, float] | None] = lambda t: None
    blur: float = 0.0


def wave(t: float, hertz: float, phase: float = 0.0) -> float:
    return float(np.sin(2 * np.pi * (hertz * t + phase)))


def cut(t: float) -> list[Shown]:
    shots = [Shown(0, "anger", Pose(0.35, 0.5, 0.16)), Shown(1, "sadness", Pose(0.6, 0.5, 0.22, 8)),
             Shown(0, "happiness", Pose(0.62, 0.55, 0.12, -6)), Shown(1, "neutral", Pose(0.45, 0.5, 0.16))]
    shot = shots[int(t / 0.9) % len(shots)]
    pose = shot.pose
    return [Shown(shot.portrait, shot.emotion, Pose(pose.x + 0.02 * wave(t, 0.6), pose.y, pose.eyes, pose.roll))]


def two(t: float) -> list[Shown]:
    """A speaker, and a bystander who comes in, is the larger for a second, and leaves."""
    found = [Shown(0, "happiness", Pose(0.3 + 0.02 * wave(t, 0.5), 0.5, 0.13, 4 * wave(t, 0.4)))]
    if 0.6 < t < 3.4:
        near = 1 - abs(t - 2) / 1.4  # 0..1..0
        found.append(Shown(1, "neutral", Pose(1.05 - 0.38 * min(1, 1.6 * near), 0.5, 0.07 + 0.09 * near)))
    return found


def crossing(t: float) -> list[Shown]:
    """Two people whose ways cross: the nearer one hides the other for a moment."""
    return [Shown(0, "neutral", Pose(0.2 + 0.15 * t, 0.45, 0.09)), Shown(1, "anger", Pose(0.85 - 0.15 * t, 0.55, 0.14))]


KINDS = {
    "still": Kind(lambda t: [Shown(1, "neutral", Pose(0.5 + 0.01 * wave(t, 0.3), 0.5, 0.16, 2 * wave(t, 0.2)))]),
    "moving": Kind(lambda t: [Shown(0, "happiness", Pose(0.5 + 0.25 * wave(t, 0.4), 0.5 + 0.08 * wave(t, 0.9),
                                                        0.14 + 0.05 * wave(t, 0.3)))]),
    "turning": Kind(lambda t: [Shown(0, "sadness", Pose(0.5 + 0.04 * wave(t, 0.4), 0.5, 0.17, 20 * wave(t, 0.35),
                                                         28 * wave(t, 0.5, 0.2)))]),
    "hidden": Kind(lambda t: [Shown(0, "worry", Pose(0.5, 0.5, 0.17, 5 * wave(t, 0.4)))],
                   hide=lambda t: (0.0, 3.4 - 2.6 * wave(t / 4, 0.5)) if t < 2 else (-3.4 + 2.2 * (t - 2), 0.5)),
    "two faces": Kind(two),
    "crossing": Kind(crossing),
    "cuts": Kind(cut),
    "blurred": Kind(lambda t: [Shown(1, "sadness", Pose(0.5 + 0.12 * wave(t, 1.6), 0.5 + 0.05 * wave(t, 2.3), 0.16,
                                                        6 * wave(t, 1.1)))], blur=0.5),
    "far": Kind(lambda t: [Shown(0, "anger", Pose(0.6 + 0.1 * wave(t, 0.3), 0.4, 0.05, 8 * wave(t, 0.5)))]),
    "close": Kind(lambda t: [Shown(1, "happiness", Pose(0.5 + 0.03 * wave(t, 0.4), 0.5, 0.30, 6 * wave(t, 0.5)))]),
}


def placement(pose: Pose, width: int, height: int) -> np.ndarray:
    """The perspective (3, 3) from a drawn portrait to the scene."""
    scale = pose.eyes * height / portraits.EYES
    roll, yaw = np.radians(pose.roll), np.radians(pose.yaw)
    away = 4.0 * FACE[0]  # of the camera from the head, portrait pixels
    middle = np.array([[1, 0, -FACE[0] / 2], [0, 1, -FACE[1] / 2], [0, 0, 1]])
    turned = np.array([[np.cos(yaw), 0, 0], [0, 1, 0], [np.sin(yaw) / away, 0, 1]])
    upright = scale * np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
    placed = np.eye(3)
    placed[:2, :2], placed[:2, 2] = upright, (pose.x * width, pose.y * height)
    return placed @ turned @ middle


def truth(name: str, frame: int, width: int = WIDTH, height: int = HEIGHT) -> list[np.ndarray]:
    """Landmarks (5, 2) of each face shown, pixels of the scene, hidden ones too."""
    kind, t = KINDS[name], (frame + KINDS[name].blur / 2) / FPS
    found = []
    for shown in kind.faces(t):
        points = np.array(list(portraits.drawn(shown.portrait)[1].values()))
        columns, rows = np.round(points).astype(int).T
        level, opening = expression(t)
        full = portraits.EXPRESSIONS[shown.emotion]
        scaled = portraits.Expression(*(portraits.INTENSITIES[level] * value for value in astuple(full)))
        for part, moved in portraits.movements(scaled, opening / (portraits.OPENINGS - 1)).items():
            share = portraits.STRENGTH * portraits.EYES * portraits.bells(shown.portrait)[part][rows, columns]
            points = points + share[:, None] * moved
        found.append(cv2.perspectiveTransform(points[None], placement(shown.pose, width, height))[0])
    return found


def expression(t: float) -> tuple[int, int]:
    """How strong it is and how far the mouth is open at t seconds, as steps of portraits.faces."""
    opening = round((portraits.OPENINGS - 1) * (0.5 + 0.5 * wave(t, 2.2)) * (0.5 + 0.5 * wave(t, 0.7)))
    return int(np.clip(round(1 + 1.2 * wave(t, 0.4)), 0, len(portraits.INTENSITIES) - 1)), opening


def scenery(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A room with edges in it: smooth colours and some frames and shelves."""
    image = cv2.resize(portraits.background(rng), (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(25):
        x, y = int(rng.uniform(0, width)), int(rng.uniform(0, height))
        corner = x + int(rng.uniform(20, width / 4)), y + int(rng.uniform(20, height / 4))
        cv2.rectangle(image, (x, y), corner, rng.uniform(40, 210, 3).tolist(), int(rng.choice([-1, 2, 4])))
    return cv2.GaussianBlur(image, (5, 5), 0)


def scene(kind: Kind, t: float, room: np.ndarray) -> np.ndarray:
    height, width = room.shape[:2]
    image = room
    for shown in kind.faces(t):
        stages = portraits.faces(shown.portrait, shown.emotion)
        level, talking = expression(t)
        move = placement(shown.pose, width, height)
        head = cv2.warpPerspective(stages[level, talking], move, (width, height), flags=cv2.INTER_LINEAR)
        mask = cv2.extractChannel(head, 3).astype(np.float32) / 255
        image = cv2.blendLinear(cv2.cvtColor(head, cv2.COLOR_RGBA2RGB), image, mask, 1 - mask)
    arm = kind.hide(t)
    if arm is not None:
        first = kind.faces(t)[0].pose
        eyes = first.eyes * height
        x, y = first.x * width + arm[0] * eyes, first.y * height + arm[1] * eyes
        image = image.copy()
        cv2.ellipse(image, ((x, y), (1.1 * eyes, 2.8 * eyes), 20.0), (150, 110, 90), -1, cv2.LINE_AA)
    return image


def frames(
    name: str, seconds: float = 4.0, start: float = 0.0, width: int = WIDTH, height: int = HEIGHT
) -> Iterator[np.ndarray]:
    """RGB uint8 (height, width, 3), FPS a second, from `start` seconds on, the same at every call."""
    kind = KINDS[name]
    rng = np.random.default_rng(sum(name.encode()))
    rooms = [scenery(rng, width, height) for _ in range(4)]
    noise = rng.normal(0, SENSOR_NOISE, (2 * height, 2 * width, 1)).astype(np.float32)
    for i in range(round(start * FPS), round((start + seconds) * FPS)):
        room = rooms[int(i / FPS / 0.9) % 4] if name == "cuts" else rooms[0]
        instants = np.linspace(0, kind.blur, 8) if kind.blur else [0.0]
        image = np.mean([scene(kind, (i + part) / FPS, room) for part in instants], axis=0, dtype=np.float32)
        x, y = int(rng.integers(width)), int(rng.integers(height))
        yield np.clip(image + noise[y : y + height, x : x + width], 0, 255).astype(np.uint8)


def write(
    name: str, path: Path, seconds: float = 4.0, start: float = 0.0, width: int = WIDTH, height: int = HEIGHT
) -> None:
    write_clip(path, list(frames(name, seconds, start, width, height)), None, 16000)
