"""Faces followed between detections: where detection on every frame finds them, at a fraction of its work."""

import hashlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen, run

import numpy as np
import pytest
from engine import ROOT, contents
from media_files import write_small_clip
from ruamel.yaml import YAML

from benchmarks import face_clips
from stages.engine.manifest import Clip, write_manifest
from stages.engine.store import Store
from stages.engine.yaml_file import read_yaml
from stages.media import centerface
from stages.media.faces import Face, Tracker, align
from stages.media.following import eye_distance, find_faces
from stages.media.frames import FrameStream

EVERY, SIZE = 8, (480, 360)  # small, for speed: the network shrinks frames anyway


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], Path]:
    """A drawn clip of 1.4 s that begins at the given time of its kind."""
    folder = tmp_path_factory.mktemp("faces")

    def clip(kind: str, start: float) -> Path:
        path = folder / f"{kind}-{start}.mp4"
        if not path.exists():
            face_clips.write(kind, path, 1.4, start, *SIZE)
        return path

    return clip


@dataclass
class Found:
    faces: list[list[Face]]
    seen: int  # frames that the network saw

    @property
    def main(self) -> dict[int, Face]:
        tracker = Tracker()
        tracks = [tracker.update(faces) for faces in self.faces]
        return {i: self.faces[i][numbers.index(tracker.main)]
                for i, numbers in enumerate(tracks) if tracker.main in numbers}


def find(path: Path, every: int) -> Found:
    detector, seen = centerface.load_detector(centerface.CPU, True), []

    def detect(image: np.ndarray) -> list[Face]:
        seen.append(image.shape)
        return detector.detect([image], 0.5)[0]

    faces = [faces for _, _, faces in find_faces(FrameStream(path, 1), every, 1 << 30, detect)]
    return Found(faces, len(seen))


@pytest.mark.parametrize(
    ("kind", "start", "most"),  # most: frames of 35 that the network may see
    [("moving", 0.0, 8), ("turning", 0.2, 10), ("hidden", 0.6, 35), ("two faces", 0.2, 16), ("crossing", 1.0, 20),
     ("cuts", 0.2, 16)],
)
def test_followed_faces_are_where_detection_finds_them(
    clips: Callable[[str, float], Path], kind: str, start: float, most: int
) -> None:
    alone, followed = find(clips(kind, start), 1), find(clips(kind, start), EVERY)
    assert alone.seen == len(alone.faces) == len(followed.faces) == 35
    assert 5 <= followed.seen <= most
    assert followed.main.keys() == alone.main.keys()  # and so the same person, frame by frame:
    units = [eye_distance(face.landmarks) for face in alone.main.values()]
    errors = np.array([np.linalg.norm(followed.main[i].landmarks - face.landmarks, axis=1) / unit
                       for (i, face), unit in zip(alone.main.items(), units, strict=True)])
    assert errors.mean(axis=1).max() < 0.3
    assert np.median(errors) <= 0.03 and np.percentile(errors, 99) <= 0.08


def test_a_face_that_enters_between_two_detections_is_found_at_once(clips: Callable[[str, float], Path]) -> None:
    alone, followed = ([len(faces) for faces in find(clips("two faces", 0.2), every).faces] for every in (1, EVERY))
    assert set(alone) == {1, 2} and alone.index(2) % EVERY
    assert followed.index(2) == alone.index(2)
    # at the frame's edge the network loses it again for a frame now and then
    assert sum(a != b for a, b in zip(alone, followed, strict=True)) <= 2


def test_what_the_network_has_not_seen_has_the_lower_confidence_of_both_ends(
    clips: Callable[[str, float], Path]
) -> None:
    alone, followed = (find(clips("moving", 0.0), every).faces for every in (1, EVERY))
    for i, [face] in enumerate(followed[: 4 * EVERY]):
        first, last = (alone[end][0].confidence for end in (i - i % EVERY, i - i % EVERY + EVERY))
        assert face.confidence == (first if i % EVERY == 0 else min(first, last))


def picture(i: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Noise, another for every i: nothing can be followed."""
    return np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)


def one_face(image: np.ndarray) -> list[Face]:
    box = np.array([100, 100, 200, 220], np.float32)
    return [Face(box, np.array([[120, 140], [180, 140], [150, 165], [130, 190], [170, 190]], np.float32), 0.9)]


@pytest.mark.parametrize(
    ("images", "every", "max_bytes", "expected"),  # the frames that are detected
    [
        ([picture(0)] * 17, 8, 1 << 30, [0, 8, 16]),
        ([picture(0)] * 14, 8, 1 << 30, [0, 8, 13]),
        ([picture(0)] * 9, 8, 3 * picture(0).nbytes, [0, 2, 4, 6, 8]),
        ([picture(0)] * 4, 8, 1, [0, 1, 2, 3]),
        ([picture(0)] * 5 + [picture(1, (320, 240))] * 4, 8, 1 << 30, [0, 4, 5, 8]),
        ([picture(i) for i in range(9)], 8, 1 << 30, list(range(9))),
        ([picture(0)] * 5 + [picture(1)] * 4, 8, 1 << 30, [0, 4, 5, 6, 8]),
        ([picture(0)], 8, 1 << 30, [0]),
        ([], 8, 1 << 30, []),
    ],
    ids=["still", "end", "memory", "no memory", "size changes", "noise", "cut", "one", "none"],
)
def test_the_network_sees_every_eighth_frame_and_whatever_is_unsure(
    images: list[np.ndarray], every: int, max_bytes: int, expected: list[int]
) -> None:
    stamped = [image.copy() for image in images]
    for i, image in enumerate(stamped):
        image[0, 0] = i
    seen: list[int] = []

    def detect(image: np.ndarray) -> list[Face]:
        seen.append(int(image[0, 0, 0]))
        return one_face(image)

    found = list(find_faces(((3 * i, image) for i, image in enumerate(stamped)), every, max_bytes, detect))
    assert sorted(seen) == expected and len(set(seen)) == len(seen)
    assert [index for index, _, _ in found] == [3 * i for i in range(len(images))]
    for (_, image, [face]), given in zip(found, stamped, strict=True):
        assert image is given
        assert np.abs(face.landmarks - one_face(given)[0].landmarks).max() < 0.5
        assert np.abs(face.box - one_face(given)[0].box).max() < 0.5


def test_where_flow_and_detection_disagree_the_detection_stands() -> None:
    images = [picture(0)] * 9
    seen: list[int] = []

    def detect(image: np.ndarray) -> list[Face]:
        """The picture stands still, the face it is said to show does not."""
        seen.append(next(times))
        [face] = one_face(image)
        shift = np.float32(20 if seen[-1] > 4 else 0)
        return [Face(face.box + shift, face.landmarks + shift, face.confidence)]

    times = iter([0, 8, 4, 6, 5])  # the order in which halves are tried
    found = list(find_faces(enumerate(images), 8, 1 << 30, detect))
    assert seen == [0, 8, 4, 6, 5]
    moved = [face.landmarks[0, 0] - one_face(images[0])[0].landmarks[0, 0] for _, _, [face] in found]
    assert np.allclose(moved, [0] * 5 + [20] * 4, atol=0.5)


def test_a_crop_drawn_less_finely_looks_the_same() -> None:
    image = next(face_clips.frames("close", 0.04))
    landmarks = face_clips.truth("close", 0)[0]
    finest, *others = (align(image, landmarks, 128, spacing).astype(float) for spacing in (1, centerface.SPACING, 8))
    less, coarse = (10 * np.log10(255**2 / np.mean((other - finest) ** 2)) for other in others)  # dB
    assert np.inf > less > 50 > coarse


def test_a_stride_as_long_as_the_distance_of_detections_follows_nothing(clips: Callable[[str, float], Path]) -> None:
    path = clips("moving", 0.0)
    alone = centerface.crop_clip(path, 8, 64, 0.5, 95)
    assert centerface.crop_clip(path, 8, 64, 0.5, 95, detect_every=8) == alone
    assert centerface.crop_clip(path, 8, 64, 0.5, 95, detect_every=15) == alone
    assert centerface.crop_clip(path, 4, 64, 0.5, 95, detect_every=8) != centerface.crop_clip(path, 4, 64, 0.5, 95)


def test_a_clip_gives_the_same_bytes_whatever_was_searched_before_it(clips: Callable[[str, float], Path]) -> None:
    path, other = clips("moving", 0.0), clips("cuts", 0.2)
    centerface.crop_clip(other, 1, 64, 0.5, 95, EVERY)
    here = centerface.crop_clip(path, 1, 64, 0.5, 95, EVERY)
    code = ("import hashlib, sys; from stages.media.centerface import crop_clip; "
            f"print(hashlib.sha256(repr(crop_clip(sys.argv[1], 1, 64, 0.5, 95, {EVERY})).encode()).hexdigest())")
    alone = run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout.strip()
    assert hashlib.sha256(repr(here).encode()).hexdigest() == alone


# ---------------------------------------------------------------- the stage with following


@pytest.fixture
def stage(clips: Callable[[str, float], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params and manifest for crop_faces, every frame read, a clip to a shard; returns that of the clips,
    of which `broken` is its head only and `grey` shows nobody.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    shutil.copyfile(ROOT / "dvc.yaml", "dvc.yaml")
    values = read_yaml(ROOT / "params.yaml")
    values["corpus"] |= {"shard_size": 1, "max_bad_fraction": 0.5}
    values["faces"] |= {"stride": 1, "detect_every": EVERY, "size": 64}
    values["runtime"] |= {"device": "cpu", "workers": 1}
    YAML().dump(values, tmp_path / "params.yaml")
    folder = tmp_path / values["corpus"]["path"]
    folder.mkdir(parents=True)
    for name, (kind, start) in SHOWN.items():
        shutil.copyfile(clips(kind, start), folder / f"{name}.mp4")
    (folder / "broken.mp4").write_bytes((folder / "moving.mp4").read_bytes()[:500])
    write_small_clip(folder / "grey.mp4", 0.6)
    names = ["moving", "broken", "cuts", "grey", "hidden"]
    write_manifest(Clip(n, f"{n}.mp4", "unlabelled", "", "", "", 1.4, 1, f"{i:064x}") for i, n in enumerate(names))
    return folder


SHOWN = {"moving": ("moving", 0.0), "cuts": ("cuts", 0.2), "hidden": ("hidden", 0.6)}
CROP = [sys.executable, "-m", "stages.crop_faces"]


def parts() -> dict[str, tuple[int, bytes]]:
    """Finished shards of crop_faces: when each was written, and its bytes."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes())
            for path in Path(".cache/parts/crop_faces").rglob("*.h5")}


def test_followed_faces_are_the_clips_own_and_survive_a_kill(stage: Path) -> None:
    run(CROP, check=True, capture_output=True)
    store, out = Store("data/faces"), contents(Path("data/faces"))
    assert dict(zip(store.clip_ids, store.present.tolist(), strict=True)) == {
        "moving": True, "broken": False, "cuts": True, "grey": False, "hidden": True}
    for name in SHOWN:  # as alone: neither neighbours nor what was searched before matter
        crops, frames, confidences, _ = centerface.crop_clip(stage / f"{name}.mp4", 1, 64, 0.5, 95, EVERY)
        assert store.read(name) == crops and len(crops) > EVERY
        assert np.array_equal(store.read_items(name, "frame"), frames)
        assert np.array_equal(store.read_items(name, "confidence"), np.float32(confidences))
        assert crops != centerface.crop_clip(stage / f"{name}.mp4", 1, 64, 0.5, 95)[0]  # of detected faces alone
    shutil.rmtree(".cache/parts")
    shutil.rmtree("data/faces")
    killed = Popen(CROP, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True)
    while len(parts()) < 2 and killed.poll() is None:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    kept = parts()
    assert 2 <= len(kept) < len(store) and not Path("data/faces").exists()
    values = read_yaml(Path("params.yaml"))
    values["runtime"]["workers"] = 3
    YAML().dump(values, Path("params.yaml"))
    run(CROP, check=True, capture_output=True)
    assert contents(Path("data/faces")) == out
    assert kept.items() <= parts().items()  # not computed again
