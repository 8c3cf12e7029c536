"""Faces on every frame by the network alone and with following, side by side: what they cost and how they differ.

    python -m benchmarks.faces [folder of clips ...]

CPU time of one process, everything included (decoding, detection, alignment, JPEG), on drawn clips of 960 x 720 and on
the clips of the folders, 150 frames of each at most. Errors are distances between landmarks of the main face, in
distances between the eyes (as seen from the front).
"""

import argparse
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks import face_clips
from stages.engine.params import load
from stages.media import centerface
from stages.media.clip import Reader
from stages.media.faces import Face, Tracker
from stages.media.following import eye_distance
from stages.media.frames import FrameStream, sample_frames

FRAMES = 150
SIZE, CONFIDENCE, QUALITY = 128, 0.5, 95
Item = tuple[int, np.ndarray, list[Face]]


@dataclass
class Found:
    """milliseconds of CPU per frame; share of frames that the network saw; the main face by frame."""

    milliseconds: float
    seen: float
    main: dict[int, Face]


def find(path: Path, every: int) -> Found:
    faces: list[list[Face]] = []
    detector = centerface.load_detector(centerface.CPU, every > 1)
    detect, seen = detector.detect, []

    def counted(images: list[np.ndarray], min_confidence: float) -> list[list[Face]]:
        seen.append(len(images))
        return detect(images, min_confidence)

    detector.detect = counted  # type: ignore[method-assign]
    start = time.process_time()
    found = centerface.search(islice(FrameStream(path, 1), FRAMES), CONFIDENCE, every)
    centerface.crop_faces(noted(found, faces), SIZE, QUALITY, centerface.SPACING if every > 1 else 1.0)
    spent = time.process_time() - start
    detector.detect = detect  # type: ignore[method-assign]
    tracker = Tracker()
    tracks = [tracker.update(shown) for shown in faces]
    main = {i: faces[i][numbers.index(tracker.main)] for i, numbers in enumerate(tracks) if tracker.main in numbers}
    return Found(1e3 * spent / len(faces), sum(seen) / len(faces), main)


def decoding(path: Path) -> str:
    """What a pass over the clip shared by slice_frames and crop_faces could save."""
    start = time.process_time()
    with Reader(path, "video") as reader:
        frames = sum(1 for _ in reader.frames())
    decoded = time.process_time()
    for _ in FrameStream(path, 1):
        pass
    converted = time.process_time()
    sample_frames(path, 16, 224, QUALITY)
    end = time.process_time()
    spent = decoded - start, converted - decoded, end - converted
    alone, both, sampled = (1e3 * seconds / frames for seconds in spent)
    return (f"decoding {alone:.2f} ms a frame, with RGB {both:.2f}; "
            f"16 frames sampled from the clip {sampled:.2f} ms for each that it has")


def noted(found: Iterable[Item], faces: list[list[Face]]) -> Iterator[Item]:
    for item in found:
        faces.append(item[2])
        yield item


def distances(face: Face, others: list[np.ndarray]) -> np.ndarray:
    """Of the five landmarks to those of the nearest of `others`."""
    return min((np.linalg.norm(face.landmarks - other, axis=1) / eye_distance(other) for other in others),
               key=lambda distance: float(distance.mean()))


def shown(errors: list[np.ndarray]) -> str:
    """Median and 99th percentile in per cent."""
    pooled = 100 * np.concatenate(errors)
    return f"{np.median(pooled):.1f} / {np.percentile(pooled, 99):.1f}"


def compare(path: Path, every: int, kind: str | None) -> tuple[list[str], list[np.ndarray]]:
    """Cells of a row, and the errors."""
    old, new = find(path, 1), find(path, every)
    both = sorted(old.main.keys() & new.main.keys())
    errors = [distances(new.main[i], [old.main[i].landmarks]) for i in both]
    same = np.mean([error.mean() < 1 for error in errors]) if errors else 0.0
    cells = [f"{old.milliseconds:.1f}", f"{new.milliseconds:.1f}", f"{new.seen:.2f}",
             shown(errors), f"{same:.0%}", f"{len(old.main)}", f"{len(new.main)}"]
    if kind:
        known = {i: face_clips.truth(kind, i) for i in both}
        cells += [shown([distances(found.main[i], known[i]) for i in both]) for found in (old, new)]
    return cells, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    every = load().faces.detect_every
    clips: list[tuple[str, Path, str | None]] = []
    with tempfile.TemporaryDirectory() as folder:
        for drawn in face_clips.KINDS:
            path = Path(folder) / f"{drawn}.mp4"
            face_clips.write(drawn, path)
            clips.append((drawn, path, drawn))
        clips += [(path.name, path, None) for real in parser.parse_args().folders for path in sorted(real.iterdir())]
        find(clips[0][1], 1), find(clips[0][1], every)  # what is loaded once
        print(f"detect_every {every}; {decoding(clips[1][1])}\n")
        print("| clip | ms | followed: ms | seen by the network | landmarks, median / p99 % | same face | faces "
              "| followed: faces | from the truth | followed: from the truth |\n" + "|---" * 10 + "|")
        pooled: dict[bool, list[np.ndarray]] = {True: [], False: []}
        for name, path, kind in clips:
            cells, errors = compare(path, every, kind)
            pooled[kind is not None] += errors
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        for is_drawn, errors in pooled.items():
            if errors:
                print(f"{'drawn' if is_drawn else 'real'}: {shown(errors)}")


if __name__ == "__main__":
    main()
